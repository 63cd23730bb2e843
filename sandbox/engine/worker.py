"""The worker: the process that runs the plugin, a fork of init.

It puts the filter on, shows by a self-probe that Landlock holds, reports "sealed", waits for a job, runs it and replies.
From the moment the plugin runs nothing that this process says is believed beyond being the plugin's reply.
Must not import anything heavy: what a job needs of the standard library is imported when the job is there. What it needs
of psie is imported by the zygote: a sandbox may not see the place where psie lies.
"""

from __future__ import annotations

import _signal as signal
import _socket
import errno
import fcntl
import gc
import marshal
import os
import select
import sys

from sandbox.engine import channel, failure, forkhooks
from sandbox.engine.refusals import Refusals
from sandbox.ns import mounts, native, privileges
from sandbox.ns import syscalls as sc
from sandbox.seccomp import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any, NoReturn

OWN_RLIMITS = ("RLIMIT_NOFILE", "RLIMIT_NPROC")
REST_MS = 2  # without a job, after which none is expected at once
PIECE = 4 << 20  # bytes of a large value that are mapped at once
TEXT_CHARACTERS = 8192  # of a message about a value that cannot travel
WRAPPERS = 100  # decorators around a function
TIOCSCTTY = 0x540E  # asm-generic/ioctls.h; termios has it, which is nothing that every worker needs
Py_file_input, PyCF_SOURCE_IS_UTF8 = 257, 0x100  # Python's compile.h
CO_GENERATOR, CO_ASYNC_GENERATOR = 0x20, 0x200  # the module inspect has them, and is heavy

refusals: Refusals | None = None  # of files
rehearsal = b""  # the message of a job for `rehearse`, where jobs are calls: see sandbox.engine.zygote
will_compile = False  # whether jobs are sources


def run(
    recipe: dict[str, Any],
    ids: dict[str, Any],
    report: _socket.socket,
    fds: list[int],
    notes: list[str],
    *,
    tty: bool,
) -> NoReturn:
    """The life of a worker, after the fork. `fds`: job, stdin, stdout, stderr."""
    try:
        job = seal(recipe, ids, report, fds, notes, tty=tty)
        if tty:
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        # What every job needs is done now, when nobody waits for it.
        sc.after_fork()
        forkhooks.make_up()
        note_refusals(job, recipe)
        if will_compile and not poll_for(job, 0):
            compiled(b"", "")  # for the same reason as `rehearse`
        if rehearsal and not poll_for(job, REST_MS):
            rehearse()
        received = next_job(job)
        if received is None:
            os._exit(0)
        status = serve(job, *received)
    except KeyboardInterrupt:  # in code of ours, before the plugin's: a traceback would tell nobody anything
        die_of_interrupt()
        status = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    os._exit(status)


def seal(
    recipe: dict[str, Any], ids: dict[str, Any], report: _socket.socket, fds: list[int], notes: list[str], *, tty: bool
) -> _socket.socket:
    """The last steps of the set-up: standard streams, session, filter, self-probe, "sealed". Returns the job socket."""
    line = "call: standard streams"
    try:
        privileges.die_with_parent()  # a fork does not inherit it
        job, *streams = fds
        channel.keep_only([report.fileno(), *fds])
        os.setsid()
        for target, source in enumerate(streams):
            os.dup2(source, target)
            os.close(source)
        if tty:
            fcntl.ioctl(0, TIOCSCTTY, 0)
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP) and signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_IGN)  # as CPython does at its start
        signal.signal(signal.SIGINT, signal.default_int_handler)
        line = "call: seccomp " + recipe["seccomp"]["profile"]
        listener = load.load_filter(recipe["seccomp"]["bpf"], new_listener=True)
        line = "call: self-probe of Landlock"
        probe = self_probe(recipe)
        line = "call: rlimit of open files"
        channel.send(report, "listener", {}, [listener])
        os.close(listener)
        privileges.set_rlimits(own_rlimits(recipe, ids))
        channel.send(report, "sealed", {"probe": probe, "notes": "; ".join(notes)})
        report.close()
    except (OSError, ValueError) as error:
        tell_failed(report, mounts.LineFailed(line, error))
        os._exit(1)
    return channel.from_fd(job)


def tell_failed(report: _socket.socket, failure: mounts.LineFailed) -> None:
    """Or nobody, where the warden has been killed: then this process is about to be, and no traceback is for the caller."""
    fields = {"line": failure.line, "errno": failure.errno, "path": failure.path, "text": failure.text}
    try:
        channel.send(report, "failed", fields)
    except (BrokenPipeError, ConnectionResetError):
        pass


def poll_for(job: _socket.socket, milliseconds: int) -> bool:
    poll = select.poll()
    poll.register(job.fileno(), select.POLLIN)
    return bool(poll.poll(milliseconds))


class Nobody:
    """In place of the socket to a caller."""

    def send(self, data: bytes) -> int:
        return len(data)


def rehearse() -> None:
    """Go through what a call goes through, while there is none: each page of the zygote's that a process writes to has to be
    copied first, and that takes longer than all else that it does for a small call."""
    try:
        serve(Nobody(), *channel.read_job(rehearsal))  # type: ignore[arg-type]
    except (OSError, MemoryError):
        pass  # the call will tell, if it meets it too
    gc.disable()


def next_job(job: _socket.socket) -> tuple[dict[str, Any], bytes | bytearray] | None:
    """None when there will be none, or it is more than this process may have memory for, which is told like any error."""
    try:
        return channel.receive_job(job)
    except MemoryError as error:
        send_error(job, error)
        return None


def serve(job: _socket.socket, instruction: dict[str, Any], payload: bytes | bytearray) -> int:
    """Do a job, and return the exit status."""
    take_on(job, instruction)
    return KINDS[instruction["kind"]](job, instruction, payload)


def own_rlimits(recipe: dict[str, Any], ids: dict[str, Any]) -> list[list[Any]]:
    """The rlimits that init must not have.

    Fds under way count, for all processes of an id together, against the RLIMIT_NOFILE of the sender (unix(7),
    ETOOMANYREFS): the listener has to be out before. RLIMIT_NPROC counts all tasks of an id: without a user namespace
    those of every call of the sandbox, so init could not fork beside others; it allows for the calls that run.
    """
    calls = 1 if "user" in recipe["namespaces"] else ids["calls"]
    return [
        [name, value * calls if name == "RLIMIT_NPROC" else value] for name, value in recipe["rlimits"] if name in OWN_RLIMITS
    ]


def self_probe(recipe: dict[str, Any]) -> str:
    """A write that everything but Landlock allows: init has just done it. Raises OSError if it is possible still."""
    path = recipe["landlock"]["probe"] if recipe["landlock"] is not None else None
    if path is None:
        return "none"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except PermissionError as error:
        return errno.errorcode[error.errno or 0]
    raise OSError(errno.ENOTRECOVERABLE, "Landlock let a forbidden write through", path)


def take_on(job: _socket.socket, instruction: dict[str, Any]) -> None:
    """What of the process depends on the job: folder, environment, which modules it may import.

    The zygote has set an environment already, that of the recipe; a job without another says None.
    """
    try:
        os.chdir(instruction["cwd"])
    except PermissionError:  # an earlier call has taken all rights from its own folder
        os.chmod(instruction["cwd"], 0o700)
        os.chdir(instruction["cwd"])
    wanted = instruction["environment"]
    if wanted is not None:
        for name in os.environ.keys() - wanted.keys():
            del os.environ[name]
        for name, value in wanted.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
    # As the variable says to every other Python: this one has started without it.
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    if instruction["allowed_modules"] or instruction["blocked_modules"]:
        from sandbox.engine import modules  # the zygote has it: see sandbox.engine.client.Zygote.set_up

        modules.bind_imports(
            instruction["allowed_modules"], instruction["blocked_modules"], lambda fields: send_note(job, fields)
        )
    if instruction["hosts"]:
        know_hosts(instruction["hosts"])
    if instruction.get("wishes") and refusals is not None:
        from sandbox.engine import wishes  # the zygote has it: see sandbox.cli.trial

        wishes.Wishes(refusals.places, lambda fields: send_note(job, fields, "wanted"), refusals.busy).watch()
    gc.enable()


def note_refusals(job: _socket.socket, recipe: dict[str, Any]) -> None:
    """Tell of files that the plugin is refused, and of names that it asks for. Which files, only Landlock's rules say."""
    global refusals
    if recipe["landlock"] is not None:
        places = [path for path, access in recipe["landlock"]["rules"] if access.startswith("write")]
        refusals = Refusals(
            places,
            lambda fields: send_note(job, fields),
            lambda fields: send_note(job, fields, "asked"),
            [target for _, target, _ in recipe["sandbox_mounts"]],
        )
        if recipe["watches_refusals"]:
            refusals.watch()


def know_hosts(hosts: dict[str, list[str]]) -> None:
    """Let Python's resolver know what /etc/hosts would say, where the plugin sees the host's; the rest is as before."""
    resolve = _socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *more: Any, **options: Any) -> list[Any]:
        name = host.decode("ascii", "replace") if isinstance(host, bytes) else host
        addresses = hosts.get(name.rstrip(".").lower()) if isinstance(name, str) else None
        if not addresses:
            return resolve(host, port, *more, **options)
        found: list[Any] = []
        for address in addresses:
            try:
                found += resolve(address, port, *more, **options)
            except _socket.gaierror as error:
                unfit = error  # of another family than the one that is wanted
        if not found:
            raise unfit
        return found

    def gethostbyname(host: str) -> str:
        return str(getaddrinfo(host, None, _socket.AF_INET, _socket.SOCK_STREAM)[0][4][0])

    _socket.getaddrinfo = getaddrinfo
    _socket.gethostbyname = gethostbyname
    socket = sys.modules.get("socket")  # a preload may have it
    if socket is not None:
        socket.gethostbyname = gethostbyname  # type: ignore[attr-defined]


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # the plugin closed or replaced it, or nobody reads any more


# -- a file, as `python FILE ARGS` would run it ------------------------------------------------------------------------


def run_file(job: _socket.socket, instruction: dict[str, Any], source: bytes | bytearray) -> int:
    """Run `source` as `__main__`; returns the exit status that `python` would have."""
    path = instruction["path"]
    sys.argv = [path, *instruction["argv"]]
    sys.path.insert(0, os.path.dirname(path))
    main = type(sys)("__main__")
    main.__file__ = path
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    main.__spec__ = None
    sys.modules["__main__"] = main

    def execute() -> None:
        exec(compiled(bytes(source), path), main.__dict__)

    status = guarded(job, execute)
    finalize()
    return status


def compiled(source: bytes, path: str) -> CodeType:
    """As compile() does it, which makes all classes of the module ast before, to see that this is no tree: a millisecond."""
    if 0 in source:
        raise SyntaxError("source code string cannot contain null bytes")
    compile_string = native.Program().Py_CompileStringObject
    compile_string.restype = native.py_object
    flags = (native.c_int * 2)(PyCF_SOURCE_IS_UTF8, sys.version_info.minor)
    code: CodeType = compile_string(source, native.py_object(path), Py_file_input, native.byref(flags), -1)
    return code


def guarded(job: _socket.socket, action: Callable[[], None]) -> int:
    """Call `action` as the interpreter calls a main program (pythonrun.c); an uncaught exception is reported as well."""
    try:
        action()
    except SystemExit as stop:
        return exit_status(stop.code)
    except KeyboardInterrupt as error:
        traceback = own_frames_off(traceback_of(error))
        set_traceback(error, traceback)
        sys.excepthook(type(error), error, traceback)
        finalize()
        die_of_interrupt()
        return 130
    except BaseException as error:
        set_traceback(error, own_frames_off(traceback_of(error)))
        send_error(job, error)
        try:
            sys.excepthook(type(error), error, traceback_of(error))
        except SystemExit as stop:
            return exit_status(stop.code)
        return 1
    return 0


def die_of_interrupt() -> None:
    """So that a caller can tell it from an exit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


# As the interpreter itself does it: a plugin's class may have attributes of its own there, or allow none to be set.
traceback_of = vars(BaseException)["__traceback__"].__get__
set_traceback = BaseException.with_traceback


def own_frames_off(traceback: Any) -> Any:
    """The traceback without its leading frames that are psie's own."""
    here = os.path.dirname(__file__)
    while traceback is not None and os.path.dirname(traceback.tb_frame.f_code.co_filename) == here:
        traceback = traceback.tb_next
    return traceback


def exit_status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if code.bit_length() < 64 else 0xFF  # as CPython has it, which asks for a C long
    try:
        print(code, file=sys.stderr)
    except BaseException:  # its __str__ is the plugin's
        pass
    return 1


def finalize() -> None:
    """What Py_FinalizeEx does that a program can see: join threads, run atexit functions, flush."""
    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()
    atexit = sys.modules.get("atexit")
    if atexit is not None:
        atexit._run_exitfuncs()
    flush()


# -- a call ------------------------------------------------------------------------------------------------------------


def run_call(job: _socket.socket, instruction: dict[str, Any], payload: bytes | bytearray) -> int:
    """Call a pickled function and send its value; the status is 0 also where it raised: the reply tells. Arguments that are
    plain are in the instruction."""
    from pickle import loads  # the zygote has it: see sandbox.engine.service.CALL_MODULES

    def value() -> object:
        nonlocal payload
        if instruction["alone"]:
            function = alone(payload)
        else:
            function, arguments, keywords = loads(payload)
        payload = b""
        if instruction["plain"] is not None:
            arguments, keywords = instruction["plain"]
        result = function(*arguments, **keywords)
        if instruction["coroutine"]:
            import asyncio

            result = asyncio.run(result)
        return result

    return reply(job, value, instruction["max_bytes"])


def alone(payload: bytes | bytearray) -> Callable[..., Any]:
    """A function that knows nothing of its module: see sandbox.parcels.Parcel.alone."""
    code, defaults, name, qualname, module, doc, notes, known = marshal.loads(payload)
    known["__builtins__"] = __builtins__
    function_type: Any = type(alone)
    function = function_type(code, known, name, defaults)
    function.__qualname__, function.__module__, function.__doc__, function.__annotations__ = qualname, module, doc, notes
    return function  # type: ignore[no-any-return]


def run_function(job: _socket.socket, instruction: dict[str, Any], source: bytes | bytearray) -> int:
    """Load `source` as a module and call the first of its functions that the instruction names.

    With `env` in the instruction it is a plugin of a plugin folder: a function whose first parameter is called env or
    environment gets that, and the library's modules come before the plugin's, which cannot stand in for those that the worker
    itself needs.
    """
    is_plugin = instruction["env"] is not None
    place = first_package_folder() if is_plugin else 0
    sys.path.insert(place, instruction["folder"])

    def value() -> object:
        module = load_module(instruction["module"], instruction["path"], source, keeps_names=is_plugin)
        found = [getattr(module, name, None) for name in instruction["functions"]]
        function = next((each for each in found if callable(each)), None)
        if function is None:
            raise AttributeError(f"{instruction['path']} has no function {' or '.join(instruction['functions'])}")
        code = code_of(function)
        if code is not None and code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
            raise TypeError(f"{code.co_name} is a generator: return a list instead")
        arguments = instruction["args"]
        if is_plugin and wants(function):
            arguments = [instruction["env"], *arguments]
        result = function(*arguments, **instruction["kwargs"])
        if hasattr(result, "__await__"):
            import asyncio

            result = asyncio.run(result)
        return result

    return reply(job, value, instruction["max_bytes"], show=True)


# -- a session ---------------------------------------------------------------------------------------------------------


def run_session(job: _socket.socket, instruction: dict[str, Any], payload: bytes | bytearray) -> int:
    """Prepare, and then serve one request after the other until the caller hangs up; what they leave behind stays.

    A session of functions is prepared by the function in `payload`, if there is one: what that returns is the state. One of a
    plugin folder loads the module whose source `payload` is. A function that raises ends nothing; SystemExit ends it all.
    """
    import pickle

    state: Any = None
    module: Any = None
    runner: Any = None
    known: dict[int, Callable[..., object]] = {}
    codes: dict[int, bytes] = {}  # of functions that are not known yet: one that cannot be loaded is tried again
    most = instruction["max_bytes"]

    def awaited(result: Any) -> object:
        """On one event loop for all of the session."""
        nonlocal runner
        if not hasattr(result, "__await__"):
            return result
        if runner is None:
            import asyncio

            runner = asyncio.Runner()
        return runner.run(as_coroutine(result))

    def prepare() -> None:
        nonlocal state, module
        if instruction["module"]:
            sys.path.insert(first_package_folder(), instruction["folder"])
            module = load_module(instruction["module"], instruction["path"], payload, keeps_names=True)
        elif payload:
            function, arguments, _ = pickle.loads(payload)
            state = awaited(function(*arguments))

    def function_of(request: dict[str, Any]) -> Callable[..., object]:
        if module is not None:
            function: Callable[..., object] | None = getattr(module, request["name"], None)
            if callable(function):
                return function
            raise AttributeError(f"{instruction['path']} has no function {request['name']}")
        number = request["function"]
        if request["code"]:
            codes[number] = request["code"]
        if number in codes:
            known[number] = pickle.loads(codes[number])[0]
            del codes[number]
        return known[number] if request["keeps"] else known.pop(number)

    def answer(request: dict[str, Any], pickled: bytes | bytearray) -> object:
        function = function_of(request)
        arguments, keywords = pickle.loads(pickled)[1:] if pickled else (request["args"], request["kwargs"])
        first = {"": (), "state": (state,), "env": (instruction["env"],)}[wants(function) if module else request["wants"]]
        return awaited(function(*first, *arguments, **keywords))

    try:
        send_outcome(job, prepare, most)
        while (received := next_job(job)) is not None:
            send_outcome(job, lambda: answer(*received), most)
    except SystemExit as stop:
        return exit_status(stop.code)
    if runner is not None:
        runner.close()
    finalize()
    return 0


async def as_coroutine(result: Any) -> object:
    return await result


def wants(function: Any) -> str:
    """What a function of a plugin folder gets before its arguments, as the name of its first parameter says."""
    code = code_of(function)
    name = code.co_varnames[0] if code is not None and code.co_argcount else ""
    return "env" if name in ("env", "environment") else ""


def first_package_folder() -> int:
    """The place in sys.path behind the standard library."""
    library = os.path.dirname(os.__file__)
    own = [number for number, path in enumerate(sys.path) if path == library or os.path.dirname(path) == library]
    inside = [number for number in own if os.path.basename(sys.path[number]) not in ("site-packages", "dist-packages")]
    return inside[-1] + 1 if inside else len(sys.path)


def load_module(name: str, path: str, source: bytes | bytearray, *, keeps_names: bool) -> Any:
    """Execute `source`, the content of `path`, as the module `name`, a package if the file is an __init__.py.

    With `keeps_names` one that is called like a module of the library's becomes plugin_NAME.
    """
    import importlib.util
    from _frozen_importlib_external import SourceFileLoader

    parent, _, last = name.rpartition(".")
    if parent:
        importlib.import_module(parent)
    elif keeps_names and (name in sys.modules or name in sys.stdlib_module_names):
        name = f"plugin_{name}"
    folders = [os.path.dirname(path)] if os.path.basename(path) == "__init__.py" else None
    loader = SourceFileLoader(name, path)  # whatever the file is called
    spec = importlib.util.spec_from_file_location(name, path, loader=loader, submodule_search_locations=folders)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compiled(bytes(source), path), module.__dict__)
    if parent:
        setattr(sys.modules[parent], last, module)
    return module


def code_of(function: Any) -> CodeType | None:
    """The code that a function comes down to, behind decorators that say what they wrap."""
    for _ in range(WRAPPERS):
        if not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    return code if isinstance(code, type(code_of.__code__)) else None


def reply(job: _socket.socket, action: Callable[[], object], max_bytes: int, *, show: bool = False) -> int:
    """Send what `action` returns or raises, and the exit status that it comes to."""
    try:
        return send_outcome(job, action, max_bytes, show=show)
    except SystemExit as stop:
        status = exit_status(stop.code)
        flush()
        return status


def send_outcome(job: _socket.socket, action: Callable[[], object], max_bytes: int, *, show: bool = False) -> int:
    """Send what `action` returns or raises, but for SystemExit; with `show` an exception is told on stderr too, as `python`
    would."""
    try:
        value = action()
    except SystemExit:
        raise
    except BaseException as error:
        set_traceback(error, own_frames_off(traceback_of(error)))
        flush()
        send_error(job, error)
        if show:
            sys.excepthook(type(error), error, traceback_of(error))
            flush()
        return 1 if show else 0
    flush()
    send_value(job, value, max_bytes)
    return 0


def send_value(job: _socket.socket, value: object, max_bytes: int) -> None:
    from sandbox.engine import codec  # the zygote has it: see sandbox.engine.client.VALUE_MODULES

    try:
        data = codec.encode(value, max_bytes=max_bytes)
    except codec.ReplyTooLarge as error:
        send_unfit(job, {"text": str(error), "allowed": error.allowed, "used": error.used})
        return
    except codec.CodecError as error:
        send_unfit(job, {"text": str(error)[:TEXT_CHARACTERS]})
        return
    except MemoryError as error:
        send_error(job, error)
        return
    if len(data) > channel.FRAME:
        send_in_memory(job, data)
    else:
        send_frames(job, channel.REPLY_VALUE, data)


def send_in_memory(job: _socket.socket, data: bytes) -> None:
    """A value that is too large for a frame, by a memory file of the caller's. It is mapped piece by piece: so it is neither
    taken for memory of the plugin's, nor for a file that could be too large."""
    import mmap  # the zygote has it: see sandbox.engine.client.VALUE_MODULES

    from sandbox.engine import codec

    begin = -codec.bulk_at(data) % channel.ALIGNMENT
    try:
        job.send(channel.REPLY_SIZE.upper() + channel.SIZE.pack(len(data)))
        _, memory = channel.receive_instruction(job, 1)
        for fd in memory:
            view = memoryview(data)
            for place in range(0, begin + len(data), PIECE):
                size = min(PIECE, begin + len(data) - place)
                with mmap.mmap(fd, size, offset=place) as mapped:
                    first = begin if place == 0 else 0
                    mapped[first:] = view[: size - first]
                    view = view[size - first :]
            os.close(fd)
        job.send(channel.REPLY_VALUE.upper() + begin.to_bytes(1, "little"))
    except OSError:
        return  # as for frames


def send_frames(job: _socket.socket, kind: bytes, data: bytes) -> None:
    """A whole reply. Where the plugin has closed the socket, the caller sees an end without a reply."""
    try:
        if 0 < len(data) <= channel.FRAME:
            job.send(kind.upper() + data)
            return
        view = memoryview(data)
        for start in range(0, len(view), channel.FRAME):
            last = start + channel.FRAME >= len(view)
            job.send((kind.upper() if last else kind) + view[start : start + channel.FRAME])
    except OSError:
        return


def send_note(job: _socket.socket, fields: dict[str, object], kind: str = "refused") -> None:
    """Tell the caller what was refused or asked for; where it does not listen fast enough, nothing is lost but that."""
    try:
        job.send(channel.NOTE.upper() + channel.pack(kind, fields), _socket.MSG_DONTWAIT)
    except OSError:
        return


def send_unfit(job: _socket.socket, fields: dict[str, object]) -> None:
    send_frames(job, channel.REPLY_UNFIT, channel.pack("unfit", fields))


def send_error(job: _socket.socket, error: BaseException) -> None:
    """Of the plugin; a refusal that it came from is told first."""
    if refusals is not None:
        try:
            refusals.uncaught(error)
        except BaseException:  # an attribute of its error is the plugin's own code
            pass
    send_frames(job, channel.REPLY_ERROR, failure.encode(error))


KINDS: dict[str, Callable[[_socket.socket, dict[str, Any], bytes | bytearray], int]] = {
    "run": run_file,
    "call": run_call,
    "function": run_function,
    "session": run_session,
}
