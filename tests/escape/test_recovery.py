"""What is done about violations cannot be undone by the plugin, nor gone around.

Each attack is tried without the measure first, where it has to work, and then after it.
"""

from __future__ import annotations

import _socket
import _thread
import asyncio
import errno
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox import (
    EnhancedPluginSandbox,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    ResourceLimitExceededError,
    SandboxRecoveryManager,
    SandboxViolation,
    SandboxViolationType,
    SecurityViolationError,
    host,
)
from sandbox.engine import sockets
from sandbox.seccomp import notifier
from sandbox.selftest.attacks import ALL, NAMESPACED, PATIENCE, ROOT, SECONDS

Kind = SandboxViolationType
levels = pytest.mark.parametrize("level", ALL, ids=lambda level: level.value)
namespaced = pytest.mark.parametrize("level", NAMESPACED, ids=lambda level: level.value)


async def attacked(
    sandbox: EnhancedPluginSandbox, attack: Callable[..., Any], kind: SandboxViolationType | None, limit: str, *args: Any
) -> Any:
    """What `attack` returns: it makes the file "ready", is recovered from, if that, and is told to go on by the file "go"."""
    for name in ("ready", "go"):
        sandbox.temp_directory.joinpath(name).unlink(missing_ok=True)
    task = asyncio.create_task(sandbox.execute_plugin_safe(attack, *args))
    end = time.monotonic() + SECONDS
    while not task.done() and not any(entry.path == "ready" for entry in sandbox.list_files()):
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
    if kind is not None:
        details = {"sandbox_id": sandbox.sandbox_id, "limit": limit}
        violation = SandboxViolation(kind, "an attack", datetime.now(UTC), details=details)
        assert await SandboxRecoveryManager().auto_recovery_violation(violation) is True
    sandbox.write_file("go", b"")
    return await task


def with_and_without(
    level: IsolationLevel,
    attack: Callable[..., Any],
    kind: SandboxViolationType,
    limit: str,
    *args: Any,
    limits: dict[str, Any] | None = None,
    permissions: dict[str, Any] | None = None,
) -> tuple[Any, Any]:
    async def main() -> tuple[Any, Any]:
        settings = PluginLimitsV2(**(limits or {})), PluginPermissionsV2(**(permissions or {})), IsolationConfig(level=level)
        async with EnhancedPluginSandbox(*settings) as sandbox:
            without = await attacked(sandbox, attack, None, limit, *args)
            return without, await attacked(sandbox, attack, kind, limit, *args)

    return asyncio.run(main())


def go_on() -> None:
    """For the attacks, which travel by value and take it with them."""
    import os
    import time

    open("ready", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.005)


# -- processes and CPU -------------------------------------------------------------------------------------------------


def fork_all_the_same() -> str:
    """By a higher limit, by a daemon that was there before, by a thread."""
    import os
    import resource

    reader, writer = os.pipe()
    if os.fork() == 0:  # a daemon: it leaves the worker, and forks later
        os.setsid()
        if os.fork() == 0:
            while not os.path.exists("go"):
                pass
            try:
                pid = os.fork()
            except OSError:
                pid = -1
            if pid:
                os.write(writer, b"f" if pid > 0 else b"r")
        os._exit(0)
    os.wait()
    go_on()
    daemon = os.read(reader, 1)
    try:
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        resource.setrlimit(resource.RLIMIT_NPROC, (max(hard, 100), max(hard, 100)))
    except (OSError, ValueError):
        pass
    try:
        pid = os.fork()
    except OSError:
        return "stopped" if daemon == b"r" else "escaped: a daemon forked"
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "escaped: forked"


@namespaced
def test_forks_stay_stopped(level: IsolationLevel) -> None:
    permissions, limits = {"allow_subprocess_execution": True}, {"max_subprocess_count": 5}
    without, stopped = with_and_without(
        level, fork_all_the_same, Kind.RESOURCE_EXCEEDED, "pids", limits=limits, permissions=permissions
    )
    assert (without, stopped) == ("escaped: forked", "stopped")


def be_another_each_time() -> None:
    """A process that makes the next one and ends: whoever looks finds those that were."""
    import os
    import time

    if os.fork() == 0:
        number = 0
        while True:
            try:
                if os.fork():
                    os._exit(0)
            except OSError:  # also when those that were are not buried fast enough
                time.sleep(0.001)
                continue
            number += 1
            if number % 20 == 0:
                with open("number", "w") as file:
                    file.write(str(number))
    time.sleep(60)


@namespaced
@pytest.mark.long
def test_forks_of_a_moving_process_are_stopped(level: IsolationLevel) -> None:
    moved: list[bool] = []

    async def has_moved(sandbox: EnhancedPluginSandbox) -> bool:
        before = sandbox.read_file("number")
        await asyncio.sleep(0.2 * PATIENCE)
        return sandbox.read_file("number") != before

    async def main() -> None:
        limits = PluginLimitsV2(max_subprocess_count=8)
        permissions = PluginPermissionsV2(allow_subprocess_execution=True)
        for _ in range(6):  # luck helps one time in three
            async with EnhancedPluginSandbox(limits, permissions, IsolationConfig(level=level)) as sandbox:
                task = asyncio.create_task(sandbox.execute_plugin_safe(be_another_each_time))
                end = time.monotonic() + SECONDS
                while not any(entry.path == "number" for entry in sandbox.list_files()):
                    assert time.monotonic() < end
                    assert not task.done(), task.exception()
                    await asyncio.sleep(0.005)
                while not await has_moved(sandbox):  # on a busy machine it may not have had its turn
                    assert time.monotonic() < end
                details = {"sandbox_id": sandbox.sandbox_id, "limit": "pids"}
                violation = SandboxViolation(Kind.RESOURCE_EXCEEDED, "an attack", datetime.now(UTC), details=details)
                assert await SandboxRecoveryManager().auto_recovery_violation(violation) is True
                await asyncio.sleep(0.2 * PATIENCE)  # what it was about to write
                moved.append(await has_moved(sandbox))
                task.cancel()
                await asyncio.wait([task])

    asyncio.run(main())
    assert not any(moved)


def be_nice_no_more() -> int:
    """The lowest nice value of its threads that it can have."""
    import os
    import threading

    go_on()
    for thread in os.listdir("/proc/self/task"):
        try:
            os.setpriority(os.PRIO_PROCESS, int(thread), 0)
        except OSError:
            pass
    found = []

    def look() -> None:
        with open("/proc/thread-self/stat") as file:
            found.append(int(file.read().rpartition(")")[2].split()[16]))

    look()
    other = threading.Thread(target=look)
    other.start()
    other.join()
    return min(found)


@levels
def test_priority_stays_low(level: IsolationLevel) -> None:
    """Where there is a cpu controller its settings lie outside, where nothing of the sandbox can write."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    without, slow = with_and_without(level, be_nice_no_more, Kind.RESOURCE_EXCEEDED, "cpu")
    assert without == usual
    assert slow == (usual if "cpu" in host.facts().controllers else 19)


def nice_of_its_session() -> int:
    """Which counts where others have sessions of their own: sched(7), autogroup."""
    go_on()
    with open("/proc/self/autogroup") as file:
        return int(file.read().split()[-1])


@pytest.mark.skipif(not ROOT, reason="only root may write it of a process that is not dumpable")
@pytest.mark.skipif(not os.path.exists("/proc/self/autogroup"), reason="this kernel has no groups of sessions")
@levels
def test_its_session_is_slow_as_well(level: IsolationLevel) -> None:
    without, slow = with_and_without(level, nice_of_its_session, Kind.RESOURCE_EXCEEDED, "cpu")
    assert without == 0
    assert slow == (0 if "cpu" in host.facts().controllers else 19)


# -- network -----------------------------------------------------------------------------------------------------------


@contextmanager
def echo() -> Iterator[int]:
    """The port of a server that gives back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(100):
                    connection.sendall(data)
            except OSError:
                pass

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(server.getsockname()[1])
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def keep_a_connection(port: int, where: str) -> str:
    """Somewhere where nobody looks for it."""
    import ctypes
    import os
    import socket
    import sys
    import threading

    def alive(sock: socket.socket) -> str:
        try:
            sock.settimeout(5)
            sock.sendall(b"hello")
            return "escaped: it answers" if sock.recv(100) == b"hello" else "stopped"
        except OSError:
            return "stopped"

    def connect() -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port))
        assert alive(sock).startswith("escaped")
        return sock

    if where in ("message", "packet", "nested"):
        kind = socket.SOCK_SEQPACKET if where == "packet" else socket.SOCK_STREAM
        here, there = socket.socketpair(socket.AF_UNIX, kind)
        with connect() as sock:
            socket.send_fds(here, [b"first"], [])
            socket.send_fds(here, [b"second"], [sock.fileno()])
        if where == "nested":  # the pair itself is in a message, and nowhere else
            outer_here, outer_there = socket.socketpair()
            socket.send_fds(outer_here, [b"pair"], [there.fileno()])
            there.close()
            go_on()
            _, fds, _, _ = socket.recv_fds(outer_there, 100, 1)
            there = socket.socket(fileno=fds[0])
        else:
            go_on()
        fds = []
        there.settimeout(1)
        try:
            while not fds:
                _, fds, _, _ = socket.recv_fds(there, 5, 4)
        except OSError:
            return "stopped"
        return alive(socket.socket(fileno=fds[0]))
    if where == "peeked":  # a message without a byte, that was looked at before
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        there.settimeout(1)
        with connect() as sock:
            socket.send_fds(here, [b""], [sock.fileno()])
        _, looked, _, _ = there.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_PEEK)
        os.close(int.from_bytes(looked[0][2], sys.byteorder))
        go_on()
        try:
            _, fds, _, _ = socket.recv_fds(there, 5, 4)
        except OSError:
            return "stopped"
        return alive(socket.socket(fileno=fds[0]))
    if where == "urgent":  # a message that is passed over until it counts as one of the others
        here, there = socket.socketpair()
        with connect() as sock:
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sock.fileno().to_bytes(4, sys.byteorder))]
            here.sendmsg([b"x"], passed, socket.MSG_OOB)
        go_on()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        _, fds, _, _ = socket.recv_fds(there, 5, 4)
        return alive(socket.socket(fileno=fds[0]))
    if where == "thread":  # with a table of descriptors of its own
        said: list[str] = []
        ready = threading.Event()

        def hold() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(0x400) and libc.close_range(1 << 20, 1 << 20, 2):  # CLONE_FILES; CLOSE_RANGE_UNSHARE
                said.append("stopped: threads share their descriptors")
                ready.set()
                return
            sock = connect()
            ready.set()
            while not os.path.exists("go"):
                pass
            said.append(alive(sock))

        thread = threading.Thread(target=hold)
        thread.start()
        ready.wait()
        go_on()
        thread.join()
        return said[0]
    if where == "child":
        reader, writer = os.pipe()
        sock = connect()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while not os.path.exists("go"):
                    pass
                os.write(writer, alive(sock).encode())
            os._exit(0)
        sock.close()
        os.wait()
        go_on()
        return os.read(reader, 100).decode()
    sock = connect()
    copies = [sock.dup() for _ in range(5)]
    go_on()
    return max(alive(each) for each in copies) if where == "copies" else alive(connect())


@pytest.mark.parametrize("where", ["copies", "message", "packet", "peeked", "nested", "urgent", "thread", "child"])
@levels
def test_no_connection_is_kept(level: IsolationLevel, where: str) -> None:
    if where == "child" and level is IsolationLevel.MINIMAL:
        pytest.skip("without a cgroup it has no processes; that those are found is shown by the other levels")
    with echo() as port:
        permissions = {
            "allow_network_access": True,
            "allowed_hosts": [f"127.0.0.1:{port}"],
            "allow_subprocess_execution": where == "child",
        }
        without, after = with_and_without(
            level,
            keep_a_connection,
            Kind.NETWORK_VIOLATION,
            "",
            port,
            where,
            permissions=permissions,
            limits={"max_subprocess_count": 4 if where == "child" else 0, "max_open_files": 100},
        )
    if where == "thread" and without.startswith("stopped: threads"):
        assert after == without
    else:
        assert (without, after) == ("escaped: it answers", "stopped")


def test_a_connection_that_comes_late_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was allowed, but its thread gets to run only when all has been cut off."""
    begun: list[Callable[[], None]] = []
    answers: list[int] = []
    threads = SimpleNamespace(start_new_thread=lambda run, _: begun.append(run), allocate_lock=_thread.allocate_lock)
    monkeypatch.setattr(sockets, "_thread", threads)
    monkeypatch.setattr(notifier, "refuse", lambda listener, notification, code: answers.append(code))
    monkeypatch.setattr(notifier, "answer", lambda listener, notification: answers.append(0))
    network = {"access": {"allowed": [], "blocked": [], "ports": []}, "max_requests": 1, "sockets": True}
    one = sockets.Sockets(network, {})
    listener = os.open("/dev/null", os.O_RDONLY)
    with echo() as port, socket.socket() as plugins:
        wanted = sockets.Wanted(sockets.CONNECT)
        wanted.address, wanted.port = "127.0.0.1", port
        notification = notifier.Notification(1, os.getpid(), 0, 0, (0,) * 6)
        one._connect(listener, notification, _socket.socket(fileno=os.dup(plugins.fileno())), wanted, 1)
        assert one.cut_off([]) == 0
        begun[0]()
        assert answers == [errno.EPERM]
        with pytest.raises(BrokenPipeError):
            plugins.send(b"still there?")
    os.close(listener)


def test_what_psie_has_sent_is_not_taken_away() -> None:
    """To see connections in packets they are taken out: those of a plugin's own, not the job that waits for it."""
    network = {"access": {"allowed": [], "blocked": [], "ports": []}, "max_requests": 1, "sockets": True}
    told, told_inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with told, told_inside, subprocess.Popen(["sleep", "60"], pass_fds=[told_inside.fileno()]) as child:
        try:
            told_inside.setblocking(False)
            told.send(b"job")
            sockets.Sockets(network, {}).cut_off([child.pid], {os.getpid()})
            assert told_inside.recv(10) == b"job"
            told.send(b"job")
            sockets.Sockets(network, {}).cut_off([child.pid])
            with pytest.raises(BlockingIOError):
                told_inside.recv(10)
        finally:
            child.kill()


# -- standing still ----------------------------------------------------------------------------------------------------


def go_on_counting(how: str) -> None:
    """What is stopped by a signal is woken by a process that has left it, or goes on in a thread that outlives the first."""
    import ctypes
    import os
    import signal
    import threading
    import time

    def count() -> None:
        number = 0
        while True:
            number += 1
            with open("number", "w") as file:
                file.write(str(number))
            time.sleep(0.001)

    if how == "woken":
        worker = os.getpid()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True:
                    os.kill(worker, signal.SIGCONT)
            os._exit(0)
        os.wait()
    threading.Thread(target=count).start()
    open("ready", "w").close()
    if how == "thread":
        ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)  # exit(2), of this thread alone
    time.sleep(60)


@pytest.mark.parametrize("how", ["woken", "thread"])
@namespaced
def test_it_stands_still_while_evidence_is_kept(level: IsolationLevel, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[bool] = []

    async def has_moved(sandbox: EnhancedPluginSandbox) -> bool:
        before = sandbox.read_file("number")
        await asyncio.sleep(0.2 * PATIENCE)
        return sandbox.read_file("number") != before

    async def keep(sandbox: EnhancedPluginSandbox, violation: SandboxViolation) -> dict[str, Any]:
        moved.append(await has_moved(sandbox))
        return {}

    async def main() -> None:
        limits = PluginLimitsV2(max_subprocess_count=4)
        permissions = PluginPermissionsV2(allow_subprocess_execution=True)
        async with EnhancedPluginSandbox(limits, permissions, IsolationConfig(level=level)) as sandbox:
            task = asyncio.create_task(sandbox.execute_plugin_safe(go_on_counting, how))
            end = time.monotonic() + SECONDS
            while not {"ready", "number"} <= {entry.path for entry in sandbox.list_files()}:
                assert time.monotonic() < end
                assert not task.done(), task.exception()
                await asyncio.sleep(0.005)
            while not await has_moved(sandbox):  # who wakes it takes most of a slow machine
                assert time.monotonic() < end
            monkeypatch.setattr(EnhancedPluginSandbox, "_keep_evidence", keep)
            details = {"sandbox_id": sandbox.sandbox_id}
            violation = SandboxViolation(Kind.SECURITY_BREACH, "an attack", datetime.now(UTC), details=details)
            assert await SandboxRecoveryManager().auto_recovery_violation(violation) is True
            with pytest.raises(SecurityViolationError):
                await task

    asyncio.run(main())
    assert moved == [False]


# -- time and the end ----------------------------------------------------------------------------------------------------


def will_not_go(folder: str) -> None:
    """Catches what can be caught, forks nothing, and counts on."""
    import signal
    import time

    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    number = 0
    while True:
        number += 1
        with open("number", "w") as file:
            file.write(str(number))
        if number == 3:
            open("ready", "w").close()
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("kind", "limit", "error"),
    [
        (Kind.EXECUTION_TIMEOUT, "time", ResourceLimitExceededError),
        (Kind.SECURITY_BREACH, "", SecurityViolationError),
        (Kind.PERMISSION_DENIED, "", SecurityViolationError),
    ],
)
@levels
def test_nobody_stays(level: IsolationLevel, kind: SandboxViolationType, limit: str, error: type[Exception]) -> None:
    async def main() -> None:
        settings = PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(level=level, telemetry_enabled=False)
        async with EnhancedPluginSandbox(*settings) as sandbox:
            with pytest.raises(error, match="recovery ended the plugin"):
                await attacked(sandbox, will_not_go, kind, limit, "")
            before = sandbox.read_file("number")
            await asyncio.sleep(0.1)
            assert sandbox.read_file("number") == before

    asyncio.run(main())


def outlive_the_deadline() -> None:
    """SIGTERM comes before the end, and is no way to go on after it."""
    import signal
    import time

    def never(*_: object) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.01)

    signal.signal(signal.SIGTERM, never)
    never()


@levels
def test_the_grace_period_ends(level: IsolationLevel, tmp_path: Path) -> None:
    async def main() -> float:
        settings = PluginLimitsV2(max_execution_time_seconds=0.5), PluginPermissionsV2(), IsolationConfig(level=level)
        async with EnhancedPluginSandbox(*settings) as sandbox:
            begun = time.monotonic()
            with pytest.raises(ResourceLimitExceededError, match=r"the plugin ran longer than 0\.5 s"):
                await sandbox.execute_plugin_safe(outlive_the_deadline)
            return time.monotonic() - begun

    assert asyncio.run(main()) < 5 * PATIENCE
