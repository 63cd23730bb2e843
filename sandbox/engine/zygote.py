"""The zygote: a clean, single-threaded Python that forks sandboxes, so that no call pays for starting an interpreter.

Executed once per (interpreter, preload, template) by `python -I -S`; serves one caller and dies with it. It holds the
template mount tree, gives each sandbox a warden (one that is idle, or a new clone), and does the last cleaning when the caller
has gone.
Rootless it is executed *inside* an outer user namespace: after a mere unshare(2) the kernel would keep the memory's old
user namespace and refuse the read-back of a worker.

Who dies when whom is killed:

============ ============================================ ===========================================================
killed       notices                                      dies
============ ============================================ ===========================================================
caller       zygote: pidfd; wardens: hub closes           wardens end their calls and leave, or are killed after GRACE;
                                                          the zygote removes cgroup leaves and folders, then exits
zygote       kernel: PDEATHSIG of warden                  wardens, and with them all below (next line); the caller
                                                          sees the control socket close and removes the leaves
warden       kernel: PDEATHSIG of supervisor and of init  supervisor, inits; the caller sees the hub close
             zygote: pidfd                                an idle one was nobody's: the next sandbox gets another
supervisor   warden: pidfd of the supervisor (there is    warden kills every init, reports it, ends the sandbox
             one once something has been refused)
init         kernel: end of the PID namespace; without    every process of the call; warden reports the end
             one PDEATHSIG of the worker and cgroup.kill
worker       init: waitid                                 init reports the status and exits, which ends the namespace
caller and   kernel, as above                             all processes; but the cgroup leaf and a workspace on disk stay
zygote                                                    until the next sandbox takes that place of the ledger
net helper   -                                            nothing: its message is cached, its namespace is held by a
                                                          socket of the zygote
============ ============================================ ===========================================================

A part that is stopped (SIGSTOP) rather than killed: init and worker die at the call's deadline like any other, also where it
is the caller that is stopped (sandbox.engine.clock), and a worker waits for a stopped supervisor until then. A warden that
does not answer within watchdog_timeout_seconds is killed by its zygote when the caller says so, and a zygote that does not do
that by the caller. Of a caller that is killed the kernel sends its zygote SIGCONT: a stopped one goes on, and sees to the end.

Where there will be one sandbox only, as for the command, the zygote is the warden itself. Then both lines are one: it sees that
the caller has gone by the hub, and the caller kills it where it does not answer.

Must not import anything heavy, and nothing of the host's side.
"""

from __future__ import annotations

import _signal as signal
import _socket
import builtins
import errno
import fcntl
import gc
import io
import os
import resource
import select
import sys
from _collections import deque  # collections makes its classes by exec, for a millisecond

from sandbox.cgroups import leaf
from sandbox.engine import channel, forkhooks, meeting, warden, worker
from sandbox.ns import mounts, network, processes, workspace
from sandbox.ns import syscalls as sc

CONTROL = 3  # the socket to the caller
CALLER = 4  # a pidfd of the caller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar

# Looked up once, here, where libseccomp's table can still be reached.
CALLS = (
    *("clone3", "pivot_root", "open_tree", "move_mount", "mount_setattr", "seccomp"),
    *("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"),
    *("close_range", "openat2", "pidfd_getfd"),
    *("socket", "connect", "bind", "listen", "sendto", "sendmsg", "sendmmsg", "setsockopt"),  # see sandbox.engine.sockets
)
# What a worker does to be ready for its call: one of these settings, which are not the call's.
REHEARSAL: dict[str, object] = {
    **{"kind": "call", "cwd": "/", "environment": None, "allowed_modules": [], "blocked_modules": [], "hosts": {}},
    **{"max_bytes": 1 << 20, "coroutine": False, "plain": ((7,), {}), "alone": False},
}
# For the preloads: a process with threads cannot be forked safely.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Seconds that the wardens get to end by themselves when the caller has gone.
GRACE = 0.5
LINK = "zygote: network namespace of the link's outer end"
# Between looks whether what a killed warden has left has died.
REAP_SECONDS = 0.02
# Wardens without a sandbox that are kept for the next ones.
IDLE_WARDENS = 16
# After so many sandboxes a zygote makes what it has immortal. It writes to each of its pages for that, and who has been forked
# before keeps a copy of all: of one sandbox that stays open, or of a caller who wants no other, that is more than it saves.
WORTHWHILE = 4


def prepare_interpreter(path: list[str], prefix: str, modules: list[str]) -> None:
    """What `site` would have done, without running any file that a .pth or sitecustomize names; then the preloads."""
    sys.path[:] = path
    sys.prefix = sys.exec_prefix = prefix
    import _sitebuiltins

    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    builtins.help = _sitebuiltins._Helper()
    forkhooks.begin()
    for module in modules:
        __import__(module)
    if "cloudpickle" in modules:
        function = eval("lambda value: value", {})  # of no module, so that all of it travels
        worker.rehearsal = channel.job(REHEARSAL, pickled((function, (), {})))
    forkhooks.end()
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a preloaded module has started a thread: a process with threads cannot be forked safely")


def pickled(value: object) -> bytes:
    """As sandbox.transport does it."""
    from cloudpickle import Pickler

    class OwnPickler(Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[Any] = {**Pickler.dispatch_table, type(pickled.__code__): channel.reduce_code}

    with io.BytesIO() as buffer:
        OwnPickler(buffer).dump(value)
        return buffer.getvalue()


def open_streams() -> None:
    """sys.stdin, stdout and stderr as a Python has them whose standard streams are pipes; workers inherit the objects.

    They are made on pipes, because a file object remembers whether its descriptor could seek.
    """
    saved = [os.dup(fd) for fd in (0, 1, 2)]
    reader, writer = os.pipe()
    for (name, mode, errors), fd, end in zip(
        (("stdin", "r", "surrogateescape"), ("stdout", "w", "surrogateescape"), ("stderr", "w", "backslashreplace")),
        (0, 1, 2),
        (reader, writer, writer),
        strict=True,
    ):
        os.dup2(end, fd)
        raw = open(fd, mode + "b", closefd=False)  # noqa: SIM115  (it lives as long as the process)
        stream = io.TextIOWrapper(raw, "utf-8", errors, line_buffering=fd == 2)
        stream.mode = mode  # type: ignore[misc]  # as CPython sets it at its start
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for fd, before in enumerate(saved):
        os.dup2(before, fd)
    for fd in (*saved, reader, writer):
        os.close(fd)


def set_environment(variables: dict[str, str]) -> None:
    """That of the workers to come. The preloads had their own, with one thread each."""
    os.environ.clear()
    os.environ.update(variables)


def freeze() -> None:
    """What exists now is never collected, and so never written to, in any child; a worker turns the collector on again.

    Without a collection first: the holes it would leave are pages that every child then writes to and copies.
    """
    gc.disable()
    gc.freeze()


def allow_core_limit() -> None:
    """Where the caller's limit of core dumps is 0, as in many containers: root may still raise it to what a recipe wants."""
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
        except ValueError:
            pass  # not the host's root: a program that crashes may start the host's handler, as any of this user's


def allow_descriptors() -> None:
    """All that the hard limit allows: the caller may have raised its own soft one since. We and a warden hold some for each
    sandbox and each call, and a message whose descriptors do not fit is the end of its reader."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, channel.DESCRIPTORS) if hard != resource.RLIM_INFINITY else channel.DESCRIPTORS
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def anonymous_memory() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Sandbox:
    """What has to be removed when all of a sandbox has gone."""

    def __init__(self, name: str, lock: int, leaf: tuple[int, str] | None, folder: tuple[int, str] | None) -> None:
        self.name = name
        self.lock = lock  # the ledger's: its place is taken until leaf and folder have gone
        self.leaf = leaf  # (fd of the parent cgroup, name)
        self.folder = folder  # (fd of the parent folder, name)


def what_was_made(instruction: dict[str, Any], fds: list[int]) -> tuple[Sandbox, dict[str, int]]:
    """What the caller has made for a sandbox; and the descriptors, by name, that are not needed to remove that."""
    given = dict(zip(instruction["fds"], fds, strict=True))
    leaf = (given.pop("cgroup_parent"), instruction["cgroup"]) if "cgroup_parent" in given else None
    folder = (given.pop("folder_parent"), instruction["folder"]) if "folder_parent" in given else None
    return Sandbox(instruction["sandbox"], given["lock"], leaf, folder), given


def close_all_but_lock(fds: dict[str, int]) -> None:
    """The lock is the sandbox's until nothing of it is left."""
    for name, fd in fds.items():
        if name != "lock":
            os.close(fd)


class Warden:
    """One warden: at work for a sandbox, or idle and ready for the next."""

    def __init__(self, pid: int, pidfd: int, tasks: _socket.socket, *, early: bool) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.tasks = tasks
        self.early = early  # whether it was cloned before all was immortal
        self.sandbox: Sandbox | None = None
        self.number = 0  # of the one recipe that it knows: its workers have all of its memory


class Zygote:
    def __init__(self) -> None:
        self.control = channel.from_fd(CONTROL)
        self.baseline = 0  # bytes of anonymous memory that every child shares with us at first
        self.recipes: dict[int, int] = {}  # memory files, which we do not look into: wardens and workers have our memory
        self.host_namespace: int | None = None
        self.template: int | None = None  # our mount namespace, where each sandbox has a copy of it
        self.link_socket: _socket.socket | None = None
        self.orphans = False  # whether there may be children that are not wardens
        self.finishing = False  # the caller has gone
        self.spare = False  # whether a warden more than needed is kept ready
        self.single = False  # whether there will be one sandbox only
        self.wardens: dict[int, Warden] = {}  # by pidfd
        self.at_work: dict[int, Warden] = {}  # by the fd of `tasks`, while it has a sandbox
        self.idle: deque[Warden] = deque()
        self.epoll = select.epoll()
        self.nest = -1  # the descriptor of a new warden's end of its socket
        self.shared = -1  # the first of those that no warden is to have
        self.newest: Warden | None = None  # which shares our descriptors as far as we know
        self.mortal: Iterator[None] | None = None  # what is left to be done to make all that we have immortal
        self.opened = 0  # sandboxes

    def set_up(self, instruction: dict[str, Any]) -> None:
        try:
            prepare_interpreter(instruction["path"], instruction["prefix"], instruction["modules"])
        except Exception as error:
            raise mounts.LineFailed("zygote: preload", ValueError(f"{type(error).__name__}: {error}")) from None
        open_streams()
        set_environment(instruction["environment"])
        self.spare, self.single = instruction["spare"], instruction["single"]
        if not self.single:
            __import__(warden.SUPERVISOR)  # now, where it can be reached
            __import__("ctypes")  # which many plugins use
            from sandbox.engine import immortal  # the zygote of one sandbox has no time for it

            self.mortal = immortal.steps() if immortal.is_possible() else None
        worker.will_compile = self.single
        sc.know(instruction["calls"])
        sc.resolve(*CALLS)
        # The memory keeps the outer user namespace as its owner; not dumpable, nobody of the same id may look into it.
        sc.prctl(sc.PR_SET_DUMPABLE, 0)
        helper = None
        try:
            if instruction["link"]:
                self.link_socket = network.visited_namespace()
                helper = network.begin_helper() if self.link_socket is None else None  # which has its time
        except OSError as error:
            raise mounts.LineFailed(LINK, error) from None
        template = instruction["template"]
        if template is not None:
            try:
                self.host_namespace = mounts.own_namespace()
                mounts.build_template(template["lines"], pivot=template["pivot"])
                if template["pivot"]:
                    self.template = mounts.current_namespace()
            except OSError as error:
                raise mounts.LineFailed("zygote: mount namespace", error) from None
        if helper is not None:
            try:
                self.link_socket = network.helper_namespace(*helper)
            except OSError as error:
                raise mounts.LineFailed(LINK, error) from None
        self.nest = os.dup(0)
        self.shared = 1 + max(self.nest, *self.kept())
        freeze()
        self.baseline = anonymous_memory()
        channel.send(self.control, "ready", {})

    def open(self, instruction: dict[str, Any], fds: list[int]) -> None:
        """Give a warden a sandbox. `instruction["fds"]` names the fds: hub, violations, lock, those of cgroup and folder."""
        sandbox, given = what_was_made(instruction, fds)
        instruction["fds"] = list(given)
        if self.single:
            self.be_warden(sandbox, instruction, given)
            return
        self.opened += 1
        try:
            while True:
                known = self.suitable(instruction["recipe_number"])
                fresh = known is None
                warden = known or self.clone_warden()
                try:
                    self.assign(warden, sandbox, instruction, list(given.values()))
                    break
                except OSError:
                    warden.tasks.close()  # killed while it was idle, perhaps; if not, it leaves now
                    if fresh:
                        raise
        except OSError as error:
            self.report_failure(mounts.LineFailed("sandbox: clone of the warden", error), sandbox.name)
            self.over(sandbox)
        finally:
            close_all_but_lock(given)
        self.keep_one_ready()

    def keep_one_ready(self) -> None:
        if self.spare and all(known.number for known in self.idle):
            try:
                self.idle.append(self.clone_warden())
            except OSError:
                pass  # the next sandbox tries again, and is told why if that fails

    def make_immortal(self) -> None:
        """One step of it; after the last one wardens that were cloned before serve no other sandbox. The idle ones are killed:
        one that is stopped would not leave."""
        assert self.mortal is not None
        for _ in self.mortal:
            return
        self.mortal = None
        self.baseline = anonymous_memory()
        self.settle()
        for known in self.idle:
            sc.pidfd_send_signal(known.pidfd, signal.SIGKILL)
        self.idle.clear()
        self.keep_one_ready()

    def suitable(self, number: int) -> Warden | None:
        """An idle warden that knows of no other recipe than this."""
        known: Warden
        for wanted in (number, 0):
            for known in self.idle:
                if known.number == wanted:
                    self.idle.remove(known)
                    return known
        return None

    def kept(self) -> list[int]:
        """Descriptors that every warden has of us."""
        link = self.link_socket.fileno() if self.link_socket is not None else None
        return [self.nest, *(fd for fd in (self.template, self.host_namespace, link) if fd is not None)]

    def be_warden(self, sandbox: Sandbox, instruction: dict[str, Any], fds: dict[str, int]) -> None:
        """The one sandbox of a caller who wants no other needs no process between us and its calls, nor a copy of the template.

        Until its end we hear nothing else: that the caller has gone shows by its hub, as it does to any warden.
        """
        try:
            sandbox.lock = os.dup(fds["lock"])  # which is given back when leaf and folder have gone
        except OSError as error:
            self.report_failure(mounts.LineFailed("sandbox: second descriptor of its lock", error), sandbox.name)
            close_all_but_lock(fds)
            self.over(sandbox)
            return
        instruction["baseline"] = self.baseline
        recipe: Any = channel.from_memory(self.recipes[instruction["recipe_number"]])
        kept: list[int] = []
        try:
            warden.serve_sandbox(recipe, instruction, fds, self.host_namespace, self.link_socket, kept, None)
        finally:
            self.over(sandbox)

    def clone_warden(self) -> Warden:
        """It begins with our table of descriptors and takes a copy of its first few: to copy and to close all, among them
        the locks of every sandbox, would take milliseconds where there are a thousand."""
        self.settle()
        ours, theirs = channel.pair()
        own_pid = os.getpid()
        os.dup2(theirs.fileno(), self.nest, inheritable=False)
        theirs.close()
        try:
            pid, pidfd = sc.clone3(sc.CLONE_FILES)
            if pid == 0:
                places = self.template, self.host_namespace, self.link_socket
                warden.run(self.nest, self.shared, own_pid, self.baseline, *places)
        except OSError:
            self.empty_nest()
            ours.close()
            raise
        self.newest = made = Warden(pid, pidfd, ours, early=self.mortal is not None)
        try:
            self.epoll.register(pidfd, select.EPOLLIN)
        except OSError:  # nobody would hear of its end
            sc.pidfd_send_signal(pidfd, signal.SIGKILL)
            self.settle()
            os.waitpid(pid, 0)
            os.close(pidfd)
            ours.close()
            raise
        self.wardens[pidfd] = made
        return made

    def settle(self) -> bool:
        """Wait until the newest warden has its own descriptors, and close here what only it is to have. False if it died."""
        newest, self.newest = self.newest, None
        is_up = False
        if newest is not None:
            poll = select.poll()
            for fd in (newest.tasks.fileno(), newest.pidfd, CALLER):
                poll.register(fd, select.POLLIN)
            heard = [fd for fd, _ in poll.poll()]
            if newest.tasks.fileno() in heard:
                is_up = bool(channel.receive_bytes(newest.tasks, channel.MESSAGE)[0])
            elif newest.pidfd not in heard:  # the caller has gone, and it may be stopped
                sc.pidfd_send_signal(newest.pidfd, signal.SIGKILL)
            self.empty_nest()
        return is_up

    def empty_nest(self) -> None:
        os.dup2(0, self.nest, inheritable=False)

    def assign(self, warden: Warden, sandbox: Sandbox, instruction: dict[str, Any], fds: list[int]) -> None:
        """Raises OSError, and then it does not have the sandbox: to tell it is the last step that may fail."""
        if warden is self.newest and not self.settle():
            raise OSError(errno.ENOTRECOVERABLE, "it died as soon as it was there")
        self.epoll.register(warden.tasks.fileno(), select.EPOLLIN)
        try:
            number = instruction["recipe_number"]
            if warden.number != number:
                channel.instruct(warden.tasks, {"learn": number}, [self.recipes[number]])
                warden.number = number
            channel.instruct(warden.tasks, instruction, fds)
        except OSError:
            self.epoll.unregister(warden.tasks.fileno())
            raise
        warden.sandbox = sandbox
        self.at_work[warden.tasks.fileno()] = warden

    def kill(self, name: str) -> None:
        """A warden does not answer its caller. A stopped one dies of SIGKILL as well, and all below it with it."""
        for known in self.at_work.values():
            if known.sandbox is not None and known.sandbox.name == name:
                sc.pidfd_send_signal(known.pidfd, signal.SIGKILL)

    def report_failure(self, failure: mounts.LineFailed, sandbox: str = "") -> None:
        fields = {"line": failure.line, "errno": failure.errno, "path": failure.path, "text": failure.text, "sandbox": sandbox}
        self.tell("failed", fields)

    def tell(self, kind: str, fields: dict[str, object]) -> None:
        """Tell the caller; where it has gone, nobody: that is heard of, and what is left to be done is done."""
        try:
            channel.send(self.control, kind, fields)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise

    def reap_orphans(self) -> None:
        """Reap what a killed warden has left to us, a child subreaper; all of it is dying."""
        orphans = set(processes.children(os.getpid())) - {known.pid for known in self.wardens.values()}
        for pid in orphans:
            os.waitpid(pid, os.WNOHANG)
        self.orphans = bool(orphans)

    def freed(self, warden: Warden) -> None:
        """A warden has seen the end of its sandbox, or has itself come to an end."""
        self.epoll.unregister(warden.tasks.fileno())
        del self.at_work[warden.tasks.fileno()]
        data, _, _ = channel.receive_bytes(warden.tasks, channel.MESSAGE)
        if not data or warden.sandbox is None:
            return  # killed: its pidfd tells
        sandbox, warden.sandbox = warden.sandbox, None
        self.over(sandbox)
        if self.finishing or (warden.early and self.mortal is None):
            warden.tasks.close()  # upon which it leaves
            return
        self.idle.append(warden)
        if len(self.idle) > IDLE_WARDENS:
            oldest = next(known for known in self.idle if known.number)  # one that may serve any other recipe stays
            self.idle.remove(oldest)
            oldest.tasks.close()

    def buried(self, pidfd: int) -> None:
        """A warden has gone, and all below it: reap it and remove what was its sandbox's."""
        dead = self.wardens.pop(pidfd)
        if dead is self.newest:
            self.settle()
        self.epoll.unregister(pidfd)
        _, status = os.waitpid(dead.pid, 0)
        os.close(pidfd)
        if status:  # else it has seen the end of all below it itself
            self.orphans = True
        if dead in self.idle:
            self.idle.remove(dead)
        if self.at_work.pop(dead.tasks.fileno(), None):
            self.epoll.unregister(dead.tasks.fileno())
        dead.tasks.close()
        if dead.sandbox is not None:
            self.over(dead.sandbox)

    def over(self, sandbox: Sandbox) -> None:
        """Nothing of it lives any more: remove what was its, and tell the caller."""
        left = ""
        for place, remove in ((sandbox.leaf, leaf.remove), (sandbox.folder, workspace.remove_folder)):
            if place:
                for is_last in (False, True):  # what was lacking for a moment is no reason to leave something behind
                    try:
                        remove(*place)
                        break
                    except OSError as error:
                        if is_last:
                            left = f"{error.filename or 'a folder or cgroup of the sandbox'}: {error.strerror}"
                os.close(place[0])
        os.close(sandbox.lock)
        self.tell("closed", {"sandbox": sandbox.name, "left": left})

    def serve(self) -> None:
        self.epoll.register(CONTROL, select.EPOLLIN)
        self.epoll.register(CALLER, select.EPOLLIN)
        while True:
            if self.orphans:
                self.reap_orphans()
            patience = REAP_SECONDS if self.orphans else None
            is_worthwhile = self.mortal is not None and self.opened >= WORTHWHILE
            heard = self.epoll.poll(0.0 if is_worthwhile else patience)
            if is_worthwhile and not heard:
                self.make_immortal()
            # CONTROL is the first: what is opened for it may get the number of a descriptor that another event has closed.
            for fd, _ in sorted(heard):
                if fd == CALLER:
                    return
                if fd == CONTROL:
                    instruction, fds = channel.receive_instruction(self.control)
                    if instruction is None:
                        return
                    if "learn" in instruction:
                        number = int(instruction["learn"])  # type: ignore[call-overload]
                        self.recipes[number] = fds[0]
                    elif "forget" in instruction:
                        os.close(self.recipes.pop(int(instruction["forget"])))  # type: ignore[call-overload]
                    elif "kill" in instruction:
                        self.kill(str(instruction["kill"]))
                    else:
                        self.open(instruction, fds)
                else:
                    self.heard(fd)

    def heard(self, fd: int) -> None:
        if fd in self.at_work:
            self.freed(self.at_work[fd])
        elif fd in self.wardens:
            self.buried(fd)

    def decline_the_rest(self) -> None:
        """Sandboxes that the caller had asked for and made a cgroup or a folder for, when it went, are never opened."""
        self.control.setblocking(False)
        while True:
            try:
                instruction, fds = channel.receive_instruction(self.control)
            except BlockingIOError:
                return  # a fork of the caller's has its end of the socket
            if instruction is None:
                return
            if "sandbox" in instruction:
                sandbox, given = what_was_made(instruction, fds)
                close_all_but_lock(given)
                self.over(sandbox)
            else:
                for fd in fds:
                    os.close(fd)

    def finish(self) -> None:
        """The caller has gone: the wardens see their hubs close; those that do not leave in time are killed."""
        self.finishing = True
        self.decline_the_rest()
        self.epoll.unregister(CONTROL)
        self.epoll.unregister(CALLER)
        self.settle()
        for idle in self.idle:
            idle.tasks.close()
        self.idle.clear()
        for round_ in range(2):
            while self.wardens:
                heard = self.epoll.poll(GRACE)
                if not heard:
                    break
                for fd, _ in heard:
                    self.heard(fd)
            if round_ == 0:
                for pidfd in self.wardens:
                    sc.pidfd_send_signal(pidfd, signal.SIGKILL)


def come(listener: _socket.socket, caller: int) -> None:
    """main() of a zygote that the script `psie` has started beside the command, the process `caller`."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT}:  # the last one main() ignores
        signal.signal(number, signal.SIG_IGN if number in (signal.SIGPIPE, signal.SIGXFSZ) else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    pidfd = os.pidfd_open(caller)
    control = meeting.accept(listener, caller, pidfd) if os.getppid() == caller else None
    if control is None:
        os._exit(0)
    listener.close()  # sandbox.entry keeps it: with a number that is another descriptor's from now on
    place = [fcntl.fcntl(fd, fcntl.F_DUPFD, CALLER + 1) for fd in (control.detach(), pidfd)]
    for source, target in zip(place, (CONTROL, CALLER), strict=True):
        os.dup2(source, target)
    main()


def main() -> None:
    """Never returns. Fds 3 and 4 are the control socket and the caller's pidfd; everything else is closed."""
    channel.keep_only([CONTROL, CALLER])
    for fd in (CONTROL, CALLER):
        os.set_inheritable(fd, False)
    os.setsid()
    os.umask(0o022)
    os.environ.update(ONE_THREAD)
    allow_core_limit()
    allow_descriptors()
    sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1)
    # If we are stopped when the caller dies, or the thread of it that has started us, we go on; SIGKILL would leave cgroups and
    # folders behind. Who goes on already does not notice.
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGCONT)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the caller's Ctrl-C is the caller's to handle
    zygote = Zygote()
    try:
        instruction, fds = channel.receive_instruction(zygote.control)
        if instruction is None:
            os._exit(0)
        try:
            zygote.set_up(channel.from_memory(fds[0]))  # type: ignore[arg-type]
        except mounts.LineFailed as failure:
            zygote.report_failure(failure)
            os._exit(1)
        except OSError as error:
            zygote.report_failure(mounts.LineFailed("zygote: start", error))
            os._exit(1)
        zygote.serve()
        zygote.finish()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)
