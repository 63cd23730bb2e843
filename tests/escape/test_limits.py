"""Limits and their substitutes: memory, processes, time, disk, files, output, replies, and floods of all of them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from escape import kit
from sandbox.config import IsolationLevel
from sandbox.errors import PluginExecutionError, ResourceLimitExceededError, SecurityViolationError
from sandbox.ns import processes
from sandbox.selftest import trial
from sandbox.selftest.attacks import (
    ALL,
    NAMESPACED,
    PATIENCE,
    ROOT,
    SYSCALLS,
    socket_to_the_caller,
    syscall,
)


@pytest.mark.parametrize("level", ALL)
def test_a_crash_starts_no_program_of_the_host(level: IsolationLevel) -> None:
    """Where core_pattern names one, the limit of core dumps is not looked at, unless it is 1 (core(5), fs/coredump.c)."""

    def limit() -> tuple[int, int]:
        import resource

        return resource.getrlimit(resource.RLIMIT_CORE)

    _unless_closed(level)
    if not ROOT and resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("only root can raise this user's limit of 0")
    assert trial.run_inside(limit, level=level).value == (1, 1)


MANY_CHILDREN = """
import os, signal, sys
for _ in range(1000):
    if os.fork() == 0:
        signal.pause()
print("ready", flush=True)
sys.stdin.read()
os.killpg(0, signal.SIGKILL)
"""


def test_nobody_hides_among_many() -> None:
    """The kernel tells of some 800 children at a time: whoever counts memory, stops or cuts off has to ask further."""
    command = [sys.executable, "-I", "-S", "-c", MANY_CHILDREN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        found = processes.tree(process.pid)
    assert len(set(found)) == len(found) == 1001


# -- time ----------------------------------------------------------------------------------------------------------------


def spin() -> None:
    """Deaf to every signal that can be ignored."""
    import signal

    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    while True:
        pass


def stop_itself() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        pass


def stop_init() -> None:
    import os
    import signal

    try:
        os.kill(os.getppid(), signal.SIGSTOP)
    except OSError:
        pass
    while True:
        pass


def flood_of_refusals(number: int) -> None:
    """Every one of them goes through the supervisor."""
    while True:
        try:
            syscall(number, 0)
        except OSError:
            continue


def flood_of_frames() -> None:
    """Of replies that say nothing, on the socket to the caller."""
    job = socket_to_the_caller()
    while True:
        try:
            job.send(b"v")
        except OSError:
            continue


def swallow_everything() -> None:
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue


@pytest.mark.parametrize("level", ALL)
@pytest.mark.parametrize("plugin", [spin, stop_itself, stop_init, flood_of_refusals, flood_of_frames, swallow_everything])
def test_the_deadline_strikes(level: IsolationLevel, plugin: object) -> None:
    assert callable(plugin)
    _unless_closed(level)
    arguments = (SYSCALLS["unshare"],) if plugin is flood_of_refusals else ()
    before, memory = time.monotonic(), _resident_mb()
    outcome = trial.run_inside(plugin, *arguments, level=level, limits={"max_execution_time_seconds": 0.4})
    taken = time.monotonic() - before
    if plugin is flood_of_refusals and isinstance(outcome.error, SecurityViolationError):
        assert "threshold" in str(outcome.error)  # on a fast machine there are enough of them before
    else:
        assert isinstance(outcome.error, ResourceLimitExceededError), outcome
        assert outcome.error.limit == "time"
    assert taken < 3 * PATIENCE
    assert _resident_mb() - memory < 50
    kit.still_works(level)


def map_files_of_long_names(seconds: float) -> str:
    """Of each mapping /proc tells the whole path of its file."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    os.chdir("/tmp")
    for _ in range(1900):
        os.mkdir("x")
        os.chdir("x")
    fd = os.open("file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 8192)
    for number in range(32_000):
        libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(number % 2 * 4096))  # PROT_READ, MAP_SHARED
    os.fork()
    time.sleep(seconds)
    return "escaped: it has had all the time"


@pytest.mark.parametrize("level", NAMESPACED)
def test_long_names_delay_no_deadline(level: IsolationLevel) -> None:
    """Where no controller counts memory, the mappings of several processes are counted in what /proc tells of them."""
    _unless_closed(level)
    limits = {"max_execution_time_seconds": PATIENCE, "max_memory_mb": 512.0, "max_subprocess_count": 4}
    permissions = {"allow_subprocess_execution": True}
    began = time.monotonic()
    outcome = trial.run_inside(map_files_of_long_names, 15 * PATIENCE, level=level, limits=limits, permissions=permissions)
    took = time.monotonic() - began
    assert getattr(outcome.error, "limit", None) in ("time", "memory"), outcome
    assert took < 2.5 * PATIENCE


@pytest.mark.parametrize("level", ALL)
def test_without_init_nothing_lives(level: IsolationLevel) -> None:
    """Where there is a PID namespace init cannot be killed; where there is none, the call ends with it."""

    def kill_init() -> str:
        import os
        import signal
        import time

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
            try:
                os.kill(os.getppid(), number)
            except OSError:
                continue
        time.sleep(0.1)
        return "alive"

    _unless_closed(level)
    before = time.monotonic()
    outcome = trial.run_inside(kill_init, level=level)
    assert time.monotonic() - before < 5 * PATIENCE
    if level in NAMESPACED:
        assert outcome.value == "alive"
    else:
        assert isinstance(outcome.error, PluginExecutionError)
    kit.still_works(level)


@pytest.mark.parametrize("level", ALL if ROOT else NAMESPACED)
def test_no_daemon_outlives_the_call(level: IsolationLevel) -> None:
    """Sessions of their own, orphaned twice, by fork and by a program, also one whose init was killed."""
    name = f"esc-{os.getpid() % 10**7}"

    def start(name: str) -> int:
        import os
        import signal
        import time

        def rename() -> None:
            import ctypes

            ctypes.CDLL(None).prctl(15, name.encode())

        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in (signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                rename()
                time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(os.getppid(), signal.SIGKILL)
        return os.getpid()

    _unless_closed(level)
    trial.run_inside(
        start,
        name,
        level=level,
        permissions={"allow_subprocess_execution": True},
        limits={"max_subprocess_count": 4},
    )
    alive = _processes_named(name)
    try:
        assert [pid for pid in alive if not _is_zombie(pid)] == []
        kit.still_works(level)  # zombies of the id that the next sandbox gets count towards its RLIMIT_NPROC
    finally:
        end = time.monotonic() + 8 * PATIENCE
        while _processes_named(name) and time.monotonic() < end:  # the host's init reaps when it likes
            time.sleep(0.05)


def _is_zombie(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _processes_named(name: str) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found += [entry] if Path(f"/proc/{entry}/comm").read_text().strip() == name else []
            except OSError:
                continue
    return found


# -- output and replies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ALL)
def test_a_flood_of_output_ends_the_call(level: IsolationLevel, capfd: pytest.CaptureFixture[str]) -> None:
    def flood() -> None:
        import os

        while True:
            os.write(1, b"x" * 65536)

    _unless_closed(level)
    memory = _resident_mb()
    outcome = trial.run_inside(flood, level=level, limits={"max_output_mb": 1.0})
    assert isinstance(outcome.error, ResourceLimitExceededError)
    assert outcome.error.limit == "output"
    assert _resident_mb() - memory < 100
    capfd.readouterr()


@pytest.mark.parametrize("level", ALL)
def test_a_flood_of_reply_ends_the_call(level: IsolationLevel) -> None:
    def flood() -> None:
        job = socket_to_the_caller()
        while True:
            job.send(b"v" + bytes(65536))

    _unless_closed(level)
    memory = _resident_mb()
    outcome = trial.run_inside(flood, level=level, limits={"max_result_mb": 1.0})
    assert isinstance(outcome.error, ResourceLimitExceededError)
    assert outcome.error.limit == "result"
    assert _resident_mb() - memory < 50


@pytest.mark.parametrize("level", ALL)
def test_a_flood_of_different_violations_is_bounded(level: IsolationLevel) -> None:
    """Each with another argument, so that each is a record of its own: what passes the threshold has no answer any more."""

    def flood(number: int) -> None:
        for argument in range(1 << 20):
            try:
                syscall(number, argument)
            except OSError:
                continue

    _unless_closed(level)
    memory = _resident_mb()
    outcome = trial.run_inside(flood, SYSCALLS["unshare"], level=level)
    assert isinstance(outcome.error, SecurityViolationError)
    assert len(outcome.violations) == trial.THRESHOLD + 1
    assert _resident_mb() - memory < 50


@pytest.mark.parametrize("level", ALL)
def test_a_flood_of_harmless_questions_is_bounded(level: IsolationLevel) -> None:
    """Each is answered by the supervisor, whose time is nobody's limit."""

    def flood() -> int:
        import contextlib
        import socket
        import struct

        ours, theirs = socket.socketpair()
        with ours, theirs:
            for _ in range(1 << 20):
                with contextlib.suppress(PermissionError):  # minimal without root: nobody may read what it asks for
                    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        return 1 << 20

    _unless_closed(level)
    outcome = trial.run_inside(flood, level=level, limits={"max_execution_time_seconds": 60.0 * PATIENCE})
    assert isinstance(outcome.error, SecurityViolationError), outcome
    assert "threshold" in str(outcome.error)
    assert "setsockopt" in str(outcome.violations[0])


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _unless_closed(level: IsolationLevel) -> None:
    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")
