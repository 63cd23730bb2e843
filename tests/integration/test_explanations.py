"""Why something was refused: that what an explanation proposes does allow it, and that where it says no, nothing does."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import socket
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    EnhancedPluginSandbox,
    Explanation,
    IsolationConfig,
    IsolationLevel,
    PluginExecutionError,
    PluginLimitsV2,
    PluginPermissionsV2,
    ResourceLimitExceededError,
    SandboxException,
    SandboxViolation,
    SecurityLevel,
    SecurityViolationError,
    host,
    load_config,
)
from sandbox.seccomp.filter import known_syscalls

from . import cli_harness, harness
from .cli_harness import Caller

rootless = pytest.mark.rootless
TWO = pytest.mark.parametrize("level", [IsolationLevel.MINIMAL, IsolationLevel.STRICT], ids=lambda level: level.value)
NUMBERS = known_syscalls(os.uname().machine)


@dataclasses.dataclass
class Outcome:
    value: Any
    error: SandboxException | None
    violations: list[SandboxViolation]

    @property
    def explanation(self) -> Explanation:
        """The last; they are the same but for the place."""
        told = [each.explanation for each in self.violations if each.explanation is not None]
        assert len({dataclasses.replace(each, file=None, line=None) for each in told}) == 1
        return told[-1]


def attempt(level: IsolationLevel, function: Callable[..., Any], *args: Any, settings: Any = None, **given: Any) -> Outcome:
    """A call, with `settings` from a file, or fields of the three classes."""

    async def main() -> Outcome:
        config, limits, permissions = settings or (
            IsolationConfig(**given.get("config", {})),
            PluginLimitsV2(**given.get("limits", {})),
            PluginPermissionsV2(**given.get("permissions", {})),
        )
        config = dataclasses.replace(config, level=level, enable_real_time_monitoring=False, violation_threshold=10)
        async with EnhancedPluginSandbox(limits, permissions, config) as sandbox:
            try:
                value, error = await sandbox.execute_plugin_safe(function, *args), None
            except SandboxException as raised:
                value, error = None, raised
            violations = sandbox.get_violations()
            assert all(violation.explanation for violation in violations)
            return Outcome(value, error, violations)

    return asyncio.run(main())


def proposed(explanation: Explanation, folder: Path) -> Any:
    """The settings that its TOML is, alone in a file."""
    assert explanation.toml is not None, explanation.text()
    path = folder / "psie.toml"
    path.write_text(explanation.toml)
    config, limits, permissions = load_config(path)
    if "--allow-degraded" in explanation.note:
        config.allow_degraded = True
    return config, limits, permissions


# -- plugins -------------------------------------------------------------------------------------------------------------


def fork() -> int:
    import os

    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_program() -> str:
    import subprocess
    import sys

    return subprocess.run([sys.executable, "-S", "-c", "print(7)"], capture_output=True, text=True, check=True).stdout


def connect(address: str, port: int) -> str:
    import socket

    with socket.create_connection((address, port), 5) as connection:
        return connection.recv(5).decode()


def import_statistics() -> str:
    import statistics

    return statistics.__name__


def sleep() -> None:
    import time

    time.sleep(0.5)


def hold() -> int:
    return len(bytearray(b"x") * (80 << 20))


def speak() -> None:
    print("x" * (1 << 20) + "y" * (1 << 19))


def answer() -> bytes:
    return bytes(3 << 19)


def write_one() -> int:
    with open("file", "wb") as file:
        file.write(bytes(3 << 19))
    return 1


def write_many() -> int:
    for number in range(3):
        with open(f"file{number}", "wb") as file:
            file.write(bytes(1 << 19))
    return 3


def open_many() -> int:
    import os

    return len([os.open("/dev/null", os.O_RDONLY) for _ in range(30)])


def start_threads() -> int:
    import threading

    event, started = threading.Event(), []
    try:
        for _ in range(4):
            thread = threading.Thread(target=event.wait)
            thread.start()
            started.append(thread)
    finally:
        event.set()
    return len(started)


def call_kernel(number: int, *arguments: int) -> int:
    """The errno of a system call."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.syscall(number, *arguments) == -1 else 0


# -- what allows it ------------------------------------------------------------------------------------------------------


@rootless
@pytest.mark.parametrize(("function", "value"), [(fork, 7), (run_program, "7\n")])
def test_new_processes(level: IsolationLevel, function: Callable[[], Any], value: Any, tmp_path: Path) -> None:
    refused = attempt(level, function)
    assert isinstance(refused.error, SecurityViolationError)
    assert (refused.explanation.flag, refused.explanation.protection) == ("--allow-subprocess", "seccomp")
    first, second = str(refused.error).splitlines()
    assert second == refused.explanation.text()
    assert "()" in first
    allowed = attempt(level, function, settings=proposed(refused.explanation, tmp_path))
    assert (allowed.value, allowed.error, allowed.violations) == (value, None, [])


@pytest.fixture
def server() -> Iterator[tuple[str, int]]:
    """Somebody of this machine who greets."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            try:
                while True:
                    connection, _ = listener.accept()
                    connection.sendall(b"hello")
                    connection.close()
            except OSError:
                return  # it has been shut down

        thread = threading.Thread(target=greet)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def has_sockets(level: IsolationLevel) -> bool:
    """Whether there is a socket to be refused a connection: not without root at level minimal."""
    return harness.ROOT or level is not IsolationLevel.MINIMAL


@pytest.mark.parametrize(
    "before", [{}, {"allow_network_access": True, "blocked_hosts": ["127.0.0.0/8"]}], ids=["none", "blocked"]
)
@rootless
def test_a_connection(level: IsolationLevel, server: tuple[str, int], before: dict[str, Any], tmp_path: Path) -> None:
    refused = attempt(level, connect, *server, permissions=before)
    assert isinstance(refused.error, SecurityViolationError)
    settings = proposed(refused.explanation, tmp_path)
    if not before and not has_sockets(level):
        settings[2].allowed_hosts = [f"127.0.0.1:{server[1]}"]
    allowed = attempt(level, connect, *server, settings=settings)
    assert (allowed.value, allowed.error, allowed.violations) == ("hello", None, [])


def test_one_connection_more_than_permitted(level: IsolationLevel, server: tuple[str, int], tmp_path: Path) -> None:
    def connect_twice(address: str, port: int) -> str:
        import socket

        for _ in range(2):
            with socket.create_connection((address, port), 5) as connection:
                said = connection.recv(5).decode()
        return said

    permissions = PluginPermissionsV2(allow_network_access=True, allowed_hosts=[f"127.0.0.1:{server[1]}"])
    few = IsolationConfig(), PluginLimitsV2(max_network_requests=1), permissions
    refused = attempt(level, connect_twice, *server, settings=few)
    config, limits, _ = proposed(refused.explanation, tmp_path)
    allowed = attempt(level, connect_twice, *server, settings=(config, limits, permissions))
    assert (allowed.value, allowed.error) == ("hello", None)


@pytest.mark.parametrize("lists", [{"blocked_modules": ["http", "statistics"]}, {"allowed_modules": ["json", "ast"]}])
def test_imports(level: IsolationLevel, lists: dict[str, list[str]], tmp_path: Path) -> None:
    refused = attempt(level, import_statistics, permissions=lists)
    assert isinstance(refused.error, PluginExecutionError)
    line = import_statistics.__code__.co_firstlineno + 1
    assert (refused.explanation.file, refused.explanation.line) == (__file__, line)
    assert refused.explanation.flag is None
    settings = proposed(refused.explanation, tmp_path)
    (name,) = lists
    assert len(getattr(settings[2], name)) == len(lists[name]) + (1 if name == "allowed_modules" else -1)
    allowed = attempt(level, import_statistics, settings=settings)
    assert (allowed.value, allowed.violations) == ("statistics", [])


SMALL: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "time": (sleep, {"limits": {"max_execution_time_seconds": 0.3}}),
    "memory": (hold, {"limits": {"max_memory_mb": 64}}),
    "output": (speak, {"limits": {"max_output_mb": 1}}),
    "result": (answer, {"limits": {"max_result_mb": 1}}),
    "file_size": (write_one, {"permissions": {"max_file_size_mb": 1}}),
    "disk": (write_many, {"limits": {"max_disk_usage_mb": 1}}),
    "open_files": (open_many, {"limits": {"max_open_files": 25}}),
    "pids": (start_threads, {"limits": {"max_thread_count": 3}}),
}


@pytest.mark.parametrize("name", SMALL)
def test_limits(level: IsolationLevel, name: str, tmp_path: Path) -> None:
    function, small = SMALL[name]
    if name == "disk" and level is IsolationLevel.MINIMAL:
        pytest.skip("level minimal has no disk quota")
    if name == "pids" and level is IsolationLevel.MINIMAL and not harness.ROOT and "pids" not in host.facts().controllers:
        pytest.skip("nothing limits threads there")
    struck = attempt(level, function, **small)
    assert isinstance(struck.error, ResourceLimitExceededError)
    assert struck.error.limit == name
    assert struck.error.explanation is not None
    assert str(struck.error).splitlines()[1] == struck.error.explanation.text()
    settings = proposed(struck.error.explanation, tmp_path)
    if name == "time" and harness.PATIENCE > 1:
        settings[1].max_execution_time_seconds *= harness.PATIENCE
    assert attempt(level, function, settings=settings).error is None


@pytest.mark.parametrize("level", [each for each in IsolationLevel if each is not IsolationLevel.MINIMAL], ids=str)
def test_deletions(level: IsolationLevel, tmp_path: Path) -> None:
    def delete(folder: str) -> None:
        import os

        os.unlink(f"{folder}/old")

    folder = tmp_path / "granted"
    folder.mkdir()
    if harness.ROOT:
        os.chown(folder, 4321, 4321)
        for above in (tmp_path, *tmp_path.parents[:2]):
            above.chmod(0o711)

    async def main(permissions: PluginPermissionsV2) -> list[Explanation | None]:
        config = IsolationConfig(level=level)
        async with EnhancedPluginSandbox(PluginLimitsV2(), permissions, config) as sandbox:
            await sandbox.execute_plugin_safe(delete, str(folder))
            if not sandbox.get_violations():
                await sandbox.commit_changes()
            return [violation.explanation for violation in sandbox.get_violations()]

    (folder / "old").write_text("old")
    if harness.ROOT:
        os.chown(folder / "old", 4321, 4321)
    (explanation,) = asyncio.run(main(PluginPermissionsV2(allowed_directories=[str(folder)])))
    assert explanation is not None
    assert explanation.flag == "--allow-delete"
    assert (folder / "old").exists()
    _, _, permissions = proposed(explanation, tmp_path)
    permissions.allowed_directories = [str(folder)]
    assert asyncio.run(main(permissions)) == []
    assert not (folder / "old").exists()


# -- what nothing allows -------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "limits": {"max_subprocess_count": 16},
    "permissions": {
        "allow_subprocess_execution": True,
        "allow_network_access": True,
        "allowed_hosts": ["*", "0.0.0.0/0", "::/0"],
        "allow_file_deletion": True,
        "security_level": SecurityLevel.LOW,
    },
    "config": {"allow_degraded": True},
}
CLONE_NEWUSER, SIGCHLD, TIOCSTI = 0x10000000, 17, 0x5412
NOTHING: dict[str, tuple[int, ...]] = {
    "mount": (0, 0, 0, 0, 0),
    "chroot": (0,),
    "unshare": (CLONE_NEWUSER,),
    "setns": (0, 0),
    "clone": (CLONE_NEWUSER | SIGCHLD, 0),
    "ptrace": (0, 0, 0, 0),
    "process_vm_readv": (1, 0, 0, 0, 0, 0),
    "keyctl": (0, 0, 0),
    "io_uring_setup": (1, 0),
    "bpf": (0, 0, 0),
    "perf_event_open": (0, 0, 0, 0, 0),
    "userfaultfd": (0,),
    "reboot": (0, 0, 0, 0),
    "open_by_handle_at": (0, 0, 0),
    "ioctl": (0, TIOCSTI, 0),
    "socket": (40, 1, 0),
    "socketpair": (16, 3, 0, 0),
}


@TWO
@pytest.mark.parametrize("name", NOTHING)
def test_what_no_setting_allows_is_refused_with_all_of_them(level: IsolationLevel, name: str) -> None:
    done = attempt(level, call_kernel, NUMBERS[name], *NOTHING[name], **EVERYTHING)
    assert done.value == 1, "EPERM"
    assert done.explanation.setting is None
    assert "no setting and no level allows it" in done.explanation.text()


def own_file() -> None:
    import os

    os.close(os.open("own", os.O_CREAT | os.O_RDWR))


def owner() -> None:
    import os

    own_file()
    os.chown("own", 0, 0)


def attribute() -> None:
    import os

    own_file()
    os.setxattr("own", "user.name", b"value")


def priority() -> None:
    import os

    os.nice(-5)


def memory() -> None:
    import mmap

    mmap.mmap(-1, 4096)


def memory_file() -> None:
    import os

    os.memfd_create("memory")


def buffers() -> None:
    import socket

    ours, _theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)


def lock() -> None:
    import fcntl
    import struct

    with open("own", "w") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))


def request() -> None:
    import fcntl

    with open("own", "w") as file:
        fcntl.ioctl(file, 0xABCD)


def own_opinion() -> None:
    raise PermissionError(1, "nobody may chown here")


def busy_lock() -> None:
    import fcntl

    with open("own", "w") as one, open("own") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def own_mode() -> None:
    """Something is refused, and caught; what ends it is another matter."""
    import os
    import socket

    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW)
    except OSError:
        pass
    own_file()
    os.chmod("own", 0)
    os.open("own", os.O_RDONLY)


def large_pipe() -> None:
    import fcntl
    import os

    fcntl.fcntl(os.pipe()[1], fcntl.F_SETPIPE_SZ, 1 << 28)  # beyond /proc/sys/fs/pipe-max-size it takes a capability


def after_a_file() -> None:
    import os

    try:
        os.open("/etc/hosts", os.O_WRONLY)
    except OSError:
        pass
    os.nice(-5)


def after_a_fork() -> None:
    import os

    try:
        os.fork()
    except OSError:
        pass
    os.nice(-5)


def odd_name() -> None:
    import os

    os.open("/etc/a\\'b", os.O_WRONLY | os.O_CREAT)


def name_of_bytes() -> None:
    import os

    os.open(b"/etc/\xff", os.O_WRONLY | os.O_CREAT)


# What a plugin that has ended by it was refused, of which the kernel keeps no record.
QUIETLY: dict[Callable[[], None], str] = {
    owner: "a capability",
    attribute: "extended attributes",
    priority: "a capability",
    memory: "no memory controller",
    memory_file: "no memory controller",
    buffers: "no memory controller",
    lock: "locks of open files",
    request: "unusual requests",
}


@TWO
@pytest.mark.parametrize("function", QUIETLY)
def test_what_was_refused_without_a_record_is_told_too(level: IsolationLevel, function: Callable[[], None]) -> None:
    done = attempt(level, function, **EVERYTHING)
    if QUIETLY[function] == "no memory controller" and done.error is None:
        assert "memory" in host.facts().controllers
        return
    assert isinstance(done.error, SecurityViolationError)
    (violation,) = done.violations
    assert QUIETLY[function] in violation.message
    assert QUIETLY[function] in done.explanation.reason
    assert "no setting and no level allows it" in done.explanation.text()
    assert violation.details["source"] == "interpreter"
    assert done.explanation.file == __file__
    assert done.explanation.line is not None


@TWO
@pytest.mark.parametrize("function", [busy_lock, own_mode, large_pipe])
def test_what_psie_has_not_refused_is_an_error_of_the_plugin(level: IsolationLevel, function: Callable[[], None]) -> None:
    done = attempt(level, function)
    assert type(done.error) is PluginExecutionError
    assert done.error.exception_type in ("BlockingIOError", "PermissionError")


@TWO
@pytest.mark.parametrize(
    ("function", "what"),
    [
        (after_a_file, "nice()"),
        (after_a_fork, "nice()"),
        (odd_name, "of /etc/a\\'b"),
        (name_of_bytes, "of /etc/"),
    ],
)
def test_of_several_refusals_that_is_told_which_ended_it(
    level: IsolationLevel, function: Callable[[], None], what: str
) -> None:
    done = attempt(level, function)
    assert isinstance(done.error, SecurityViolationError)
    assert what in str(done.error).splitlines()[0]


@TWO
def test_what_the_plugin_has_refused_itself_is_not_told(level: IsolationLevel) -> None:
    done = attempt(level, own_opinion)
    assert isinstance(done.error, PluginExecutionError)
    assert done.violations == []


# -- where it was --------------------------------------------------------------------------------------------------------


@rootless
def test_an_uncaught_refusal_tells_its_line(level: IsolationLevel) -> None:
    done = attempt(level, fork)
    (violation,) = done.violations
    assert (done.explanation.file, done.explanation.line) == (__file__, fork.__code__.co_firstlineno + 3)
    assert (violation.details["line"], violation.details["position"]) == (done.explanation.line, "interpreter")
    program = attempt(level, run_program)
    assert program.explanation.line == run_program.__code__.co_firstlineno + 4, "of the plugin, not of the library"
    outward = attempt(level, connect, "192.0.2.1", 9)
    assert outward.explanation.line == connect.__code__.co_firstlineno + 3


def caught_import() -> None:
    try:
        import socket  # noqa: F401
    except ImportError:
        pass
    raise PermissionError(1, "the licence server says no")


def file_of_that_name() -> None:
    import os

    try:
        os.open("/etc/hosts", os.O_WRONLY | os.O_CREAT)
    except OSError:
        pass
    os.close(os.open("hosts", os.O_WRONLY | os.O_CREAT, 0))
    os.open("hosts", os.O_RDONLY)


@TWO
@pytest.mark.parametrize("function", [caught_import, file_of_that_name])
def test_what_was_caught_is_not_to_blame_for_something_else(level: IsolationLevel, function: Callable[[], None]) -> None:
    done = attempt(level, function, permissions={"blocked_modules": ["socket"]})
    assert type(done.error) is PluginExecutionError
    assert done.error.exception_type == "PermissionError"


@TWO
def test_an_exception_of_something_else_tells_no_line(level: IsolationLevel) -> None:
    def die_otherwise() -> None:
        import os

        try:
            os.fork()
        except PermissionError:
            pass
        raise PermissionError(1, "no")

    done = attempt(level, die_otherwise)
    assert isinstance(done.error, SecurityViolationError)
    assert done.explanation.file is None


# -- the command ---------------------------------------------------------------------------------------------------------

LEVELS = [level.value for level in IsolationLevel]


@pytest.fixture(params=LEVELS)
def caller(request: pytest.FixtureRequest, tmp_path: Path) -> Caller:
    return cli_harness.privileged(request.param, tmp_path)


def run(caller: Caller, source: str, *options: str) -> tuple[cli_harness.Done, list[str], dict[str, Any]]:
    """What it left, the explanations on stderr, and the result file."""
    plugin, result = caller.write("plugin.py", source), caller.folder / "result.json"
    done = caller.run("run", "--level", caller.level, "--result-file", result, *options, plugin)
    told = [line.removeprefix("psie: ") for line in done.err.splitlines() if line.startswith("psie: ")]
    told = [line for line in told if "was refused: " not in line and not line.startswith("weaker than on a host")]
    return done, told, json.loads(result.read_text())


REFUSED = """
    import os
    for _ in range(3):
        try:
            os.fork()
        except PermissionError:
            pass
    print("done")
    os.fork()
"""


@rootless
def test_the_command_says_at_the_end_what_would_allow_it(caller: Caller) -> None:
    done, told, result = run(caller, REFUSED)
    assert (done.status, done.out) == (126, "done\n")
    (violation,) = result["violations"]
    assert violation["details"]["count"] == 4
    assert violation["explanation"]["line"] == 9
    assert told == [f"at least 4 times: {violation['explanation']['text']}"]
    assert told[0].endswith("plugin.py, line 9)")
    flags = violation["explanation"]["flag"].split()
    flags += ["--allow-degraded"] if "--allow-degraded" in violation["explanation"]["note"] else []
    done, told, result = run(caller, REFUSED, *flags)
    assert (done.status, told, result["violations"]) == (0, [], [])
    done, told, _ = run(caller, REFUSED, "--quiet")
    assert (done.status, told) == (126, [])
    assert "explanation" in json.loads((caller.folder / "result.json").read_text())["violations"][0]


def test_the_command_tells_of_a_limit(caller: Caller) -> None:
    done, told, _ = run(caller, "while True: pass", "--timeout", "1")
    assert done.status == 124
    assert told[0].startswith("the plugin ran longer than 1 s")
    assert told[1].startswith("time is limited to 1 s: allow more with --timeout 2, PluginLimitsV2(")
    assert len(told) == 2


def test_psie_call_tells_it_too(caller: Caller) -> None:
    path = caller.write("plugin.py", "import os\ndef main():\n    try: os.fork()\n    except OSError: return 'caught'\n")
    done = caller.run("call", "--level", caller.level, f"{path}:main")
    assert (done.status, done.out) == (0, '"caught"\n')
    assert "seccomp refuses new processes: allow it with --allow-subprocess" in done.err


MANY = """
    import contextlib, ctypes
    libc = ctypes.CDLL(None)
    for number in {numbers}:
        libc.syscall(number, 0, 0, 0)
"""


def test_the_command_tells_at_most_five_kinds(tmp_path: Path) -> None:
    caller = cli_harness.privileged("standard", tmp_path)
    numbers = [NUMBERS[name] for name in ("mount", "chroot", "bpf", "keyctl", "ptrace", "reboot", "setns")]
    caller.write("settings.toml", "[isolation]\nviolation_threshold = 10\n")
    done, told, result = run(caller, MANY.format(numbers=numbers), "--config", "settings.toml")
    assert (done.status, done.out) == (0, "")
    assert len(result["violations"]) == 7
    assert len(told) == 6
    assert told[-1] == "and 2 more kinds: see --result-file"


HOSTILE = """
    import os, types
    code = compile("import os\\nos.fork()", "\\x1b[2J\\u202e" + "f" * 5000, "exec")
    exec(code)
"""


def test_what_the_plugin_says_is_escaped_and_bounded(caller: Caller) -> None:
    _, told, result = run(caller, HOSTILE)
    assert result["violations"][0]["details"]["syscall"] in ("clone", "fork")
    for line in told:
        assert line.isprintable()
        assert len(line) < 1000


def test_a_refused_import_is_told_with_its_line(caller: Caller) -> None:
    caller.write("settings.toml", '[permissions]\nblocked_modules = ["statistics"]\n')
    _, told, result = run(caller, "import statistics", "--config", "settings.toml")
    text = result["violations"][0]["explanation"]["text"]
    assert text in told
    assert re.search(r"\(.*plugin\.py, line 1\)$", text)
    caller.write("settings.toml", result["violations"][0]["explanation"]["toml"])
    assert tomllib.loads((caller.folder / "settings.toml").read_text()) == {"permissions": {"blocked_modules": []}}
    done, told, _ = run(caller, "import statistics", "--config", "settings.toml")
    assert (done.status, told) == (0, [])


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_deletion_is_told(level: str, tmp_path: Path) -> None:
    caller = cli_harness.privileged(level, tmp_path / "own")
    caller.folder.mkdir()
    folder = tmp_path / "granted"
    folder.mkdir()
    (folder / "old").write_text("old")
    source = f"import os\nos.unlink({str(folder / 'old')!r})"
    _, told, result = run(caller, source, "--rw", str(folder))
    assert [each["type"] for each in result["violations"]] == ["filesystem_violation"]
    assert told[-1] == result["violations"][0]["explanation"]["text"]
    assert (folder / "old").exists()
    done, told, result = run(caller, source, "--rw", str(folder), *result["violations"][0]["explanation"]["flag"].split())
    assert (done.status, told, result["violations"]) == (0, [], [])
    assert not (folder / "old").exists()


def test_warnings_are_not_told(caller: Caller) -> None:
    """Passing a warning threshold refuses nothing; it is in the result file only."""
    caller.write(
        "settings.toml",
        "[limits]\nexecution_warning_threshold_seconds = 0.1\n[isolation]\nresource_check_interval_seconds = 0.1\n",
    )
    done, told, result = run(caller, "import time; time.sleep(0.6)", "--config", "settings.toml")
    assert (done.status, told) == (0, [])
    warned = [each["explanation"] for each in result["violations"] if each["type"] == "execution_timeout"]
    assert [each["refused"] for each in warned] == [False]
