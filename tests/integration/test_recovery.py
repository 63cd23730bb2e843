"""Recovery: what is done about each kind of violation is felt by the plugin, told step by step, and over with its calls.

What needs a memory, cpu or pids controller runs in the VM; here its substitute does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    CommitError,
    EnhancedPluginFramework,
    EnhancedPluginSandbox,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    ResourceLimitExceededError,
    SandboxRecoveryManager,
    SandboxViolation,
    SandboxViolationType,
    SecurityViolationError,
    host,
)
from sandbox.ns import processes
from sandbox.recovery import measures
from sandbox.recovery.measures import SLOW_SECONDS, Recovery
from sandbox.recovery.store import Store

from . import cli_harness, harness
from .test_network import Echo, Server, running

pytestmark = pytest.mark.rootless
NAMESPACED = [level for level in IsolationLevel if level is not IsolationLevel.MINIMAL]
CONTROLLERS = set(host.facts().controllers)
limited = pytest.mark.skipif(
    not {"memory", "pids", "cpu"} <= CONTROLLERS, reason="no cgroup v2 controllers of ours here: make vm-test has them"
)
Kind = SandboxViolationType
Manager = SandboxRecoveryManager


def violation(sandbox: EnhancedPluginSandbox, kind: SandboxViolationType, limit: str = "") -> SandboxViolation:
    details = {"sandbox_id": sandbox.sandbox_id, "limit": limit}
    return SandboxViolation(kind, "something happened", datetime.now(UTC), details=details)


async def running_call(sandbox: EnhancedPluginSandbox, function: Callable[..., Any], *args: Any) -> asyncio.Task[Any]:
    """A call of a function that makes the file "ready" once it is."""
    task = asyncio.create_task(sandbox.execute_plugin_safe(function, *args))
    await harness.wait_for(lambda: task.done() or has(sandbox, "ready"))
    return task


def has(sandbox: EnhancedPluginSandbox, name: str) -> bool:
    return any(entry.path == name for entry in sandbox.list_files())


def actions(history: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    return [(step["action"], step["success"]) for step in history]


# -- plugins -----------------------------------------------------------------------------------------------------------


def ready_then(what: str, seconds: float) -> Any:
    """Makes the file "ready", waits for the file "go", and does `what`."""
    import os
    import time

    open("ready", "w").close()
    end = time.monotonic() + seconds
    while not os.path.exists("go"):
        if time.monotonic() > end:
            return "nobody came"
        time.sleep(0.01)
    if what == "fork":
        try:
            pid = os.fork()
        except OSError as error:
            return error.errno
        if pid == 0:
            os._exit(0)
        return os.waitpid(pid, 0)[1]
    if what == "nice":
        with open("/proc/self/stat") as file:
            return int(file.read().rpartition(")")[2].split()[16])
    return "done"


def count_time(seconds: float) -> float:
    """The longest time that it did not run."""
    import time

    open("ready", "w").close()
    last = time.monotonic()
    end, longest = last + seconds, 0.0
    while last < end:
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


def burn(seconds: float) -> list[float]:
    """CPU seconds used in each second."""
    import time

    open("ready", "w").close()
    used = []
    for _ in range(int(seconds)):
        end, before = time.monotonic() + 1, time.process_time()
        while time.monotonic() < end:
            pass
        used.append(time.process_time() - before)
    return used


def say_goodbye(seconds: float) -> str:
    import signal
    import sys
    import time

    def leave(*_: object) -> None:
        with open("goodbye", "w") as file:
            file.write("tidied up")
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    open("ready", "w").close()
    time.sleep(seconds)
    return "nobody came"


def ignore(seconds: float) -> str:
    import signal
    import time

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open("ready", "w").close()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return "nobody came"


def keep_writing(seconds: float) -> None:
    import time

    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        number += 1
        with open("number", "w") as file:
            file.write(str(number))
        if number == 1:
            open("ready", "w").close()


def talk(port: int, seconds: float) -> list[Any]:
    """What its connection says, then what a new one does."""
    import os
    import socket
    import time

    found: list[Any] = []
    sock = socket.create_connection(("127.0.0.1", port))
    copy = sock.dup()
    sock.sendall(b"one\n")
    found.append(sock.recv(100))
    open("ready", "w").close()
    end = time.monotonic() + seconds
    while not os.path.exists("go") and time.monotonic() < end:
        time.sleep(0.01)
    for each in (sock, copy):
        try:
            each.sendall(b"two\n")
            found.append(each.recv(100))
        except OSError as error:
            found.append(error.errno)
    try:
        socket.create_connection(("127.0.0.1", port)).close()
        found.append("connected")
    except OSError as error:
        found.append(error.errno)
    return found


def write_into(folder: str, name: str, wait: bool) -> None:
    import os
    import time

    with open(os.path.join(folder, name), "w") as file:
        file.write("changed")
    open("ready", "w").close()
    while wait and not os.path.exists("go"):
        time.sleep(0.01)


def return_it(value: Any) -> Any:
    return value


def go(sandbox: EnhancedPluginSandbox) -> None:
    sandbox.write_file("go", b"")


# -- each kind of violation --------------------------------------------------------------------------------------------


def test_processes_no_further_one(level: IsolationLevel) -> None:
    if level is IsolationLevel.MINIMAL and "pids" not in CONTROLLERS:
        pytest.skip("without a cgroup level minimal has no processes to begin with")
    limits = {"max_subprocess_count": 3}

    async def main() -> None:
        permissions = {"allow_subprocess_execution": True}
        async with harness.open_sandbox(level, limits=limits, permissions=permissions) as sandbox:
            task = await running_call(sandbox, ready_then, "fork", 20 * harness.PATIENCE)
            go(sandbox)
            assert await task == 0  # so it does without recovery
            sandbox.temp_directory.joinpath("go").unlink()
            sandbox.temp_directory.joinpath("ready").unlink()

            manager = Manager()
            task = await running_call(sandbox, ready_then, "fork", 20 * harness.PATIENCE)
            found = violation(sandbox, Kind.RESOURCE_EXCEEDED, "pids")
            assert await manager.auto_recovery_violation(found) is True
            assert (found.auto_recovery_attempted, found.resolved) == (True, True)
            go(sandbox)
            assert await task == 11  # EAGAIN
            (step,) = manager.get_recovery_history()
            assert (step["action"], step["success"], step["sandbox_id"]) == ("stop forks", True, sandbox.sandbox_id)
            assert step["before"] != step["after"]
            assert step["violation"]["type"] == "resource_exceeded"
            assert await sandbox.execute_plugin_safe(ready_then, "fork", 20 * harness.PATIENCE) == 0  # over with that call

    asyncio.run(main())


def fork_once() -> int:
    import os

    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_processes_another_call_has_its_own(level: IsolationLevel) -> None:
    """It may fork, and its beginning and its end let nobody else do so."""
    if level is IsolationLevel.MINIMAL and "pids" not in CONTROLLERS:
        pytest.skip("without a cgroup level minimal has no processes to begin with")
    limits, permissions = {"max_subprocess_count": 3}, {"allow_subprocess_execution": True}

    async def main() -> None:
        async with harness.open_sandbox(level, limits=limits, permissions=permissions) as sandbox:
            task = await running_call(sandbox, ready_then, "fork", 20 * harness.PATIENCE)
            found = violation(sandbox, Kind.RESOURCE_EXCEEDED, "pids")
            assert await Manager().auto_recovery_violation(found) is True
            assert await sandbox.execute_plugin_safe(fork_once) == 0
            go(sandbox)
            assert await task == 11  # EAGAIN
            assert await sandbox.execute_plugin_safe(fork_once) == 0

    asyncio.run(main())


def test_cpu_comes_last(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, limits={"max_cpu_percent": 50.0}) as sandbox:
            manager = Manager()
            if "cpu" in CONTROLLERS:
                task = await running_call(sandbox, burn, 4)
                await asyncio.sleep(1)
            else:
                task = await running_call(sandbox, ready_then, "nice", 20 * harness.PATIENCE)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.RESOURCE_EXCEEDED, "cpu")) is True
            go(sandbox)
            (step,) = manager.get_recovery_history()
            assert (step["action"], step["success"]) == ("slow down", True)
            if "cpu" in CONTROLLERS:
                assert step["before"] == {"cpu.max": "50000 100000", "cpu.weight": "50"}
                assert step["after"] == {"cpu.max": "12500 100000", "cpu.weight": "1"}
                used = await task
                assert used[-1] < used[0] * 0.6
                assert sandbox.get_recovery_history()[0] == step
                fd = sandbox._opened_sandbox().leaf_fd
                settings = [Path(f"/proc/self/fd/{fd}/{name}").read_text().strip() for name in step["before"]]
                assert settings == list(step["before"].values())  # over with the call
            else:
                assert "there is no cpu controller" in step["note"]
                assert await task == 19

    asyncio.run(main())


@limited
def test_cpu_is_given_back_after_a_while() -> None:
    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            task = await running_call(sandbox, ready_then, "wait", 60 * harness.PATIENCE)
            await Manager().auto_recovery_violation(violation(sandbox, Kind.RESOURCE_EXCEEDED, "cpu"))
            await harness.wait_for(lambda: len(sandbox.get_recovery_history()) == 2, SLOW_SECONDS + harness.SETTLE)
            slow, relieved = sandbox.get_recovery_history()
            assert (relieved["action"], relieved["after"], relieved["success"]) == ("relieve", slow["before"], True)
            go(sandbox)
            await task

    asyncio.run(main())


@limited
@pytest.mark.parametrize("in_another_call", [False, True])
def test_who_is_slowed_down_anew_is_so_for_the_whole_time(*, in_another_call: bool) -> None:
    """What was to end the first time does not end the second."""

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            task = await running_call(sandbox, ready_then, "wait", 60 * harness.PATIENCE)
            await Manager().auto_recovery_violation(violation(sandbox, Kind.RESOURCE_EXCEEDED, "cpu"))
            first = time.monotonic()
            await asyncio.sleep(SLOW_SECONDS / 2)
            if in_another_call:
                go(sandbox)
                await task
                for name in ("go", "ready"):
                    sandbox.temp_directory.joinpath(name).unlink()
                task = await running_call(sandbox, ready_then, "wait", 60 * harness.PATIENCE)
            await Manager().auto_recovery_violation(violation(sandbox, Kind.RESOURCE_EXCEEDED, "cpu"))
            second = time.monotonic()
            await asyncio.sleep(first + 1.2 * SLOW_SECONDS - second)
            limit = Path(f"/proc/self/fd/{sandbox._opened_sandbox().leaf_fd}/cpu.max").read_text().strip()
            slow, again = sandbox.get_recovery_history()
            assert limit == slow["after"]["cpu.max"] == again["after"]["cpu.max"]
            await harness.wait_for(lambda: len(sandbox.get_recovery_history()) == 3, SLOW_SECONDS + harness.SETTLE)
            assert sandbox.get_recovery_history()[-1]["action"] == "relieve"
            assert time.monotonic() - second > 0.9 * SLOW_SECONDS
            go(sandbox)
            await task

    asyncio.run(main())


def test_network_is_cut_off(level: IsolationLevel) -> None:
    """Connections end for whoever holds them, none can be made, and a sandbox's own links are down."""

    async def main(port: int) -> None:
        permissions = {"allow_network_access": True, "allowed_hosts": [f"127.0.0.1:{port}"]}
        async with harness.open_sandbox(level, permissions=permissions) as sandbox:
            go(sandbox)
            assert await sandbox.execute_plugin_safe(talk, port, 20) == [b"ONE\n", b"TWO\n", b"TWO\n", "connected"]
            sandbox.temp_directory.joinpath("go").unlink()
            sandbox.temp_directory.joinpath("ready").unlink()

            manager = Manager()
            task = await running_call(sandbox, talk, port, 20 * harness.PATIENCE)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.NETWORK_VIOLATION)) is True
            freeze, step = manager.get_recovery_history()
            assert (freeze["action"], freeze["success"]) == ("freeze", True)
            links = {IsolationLevel.STRICT: 1, IsolationLevel.MAXIMUM: 2}.get(level, 0)
            assert (step["action"], step["after"]) == ("cut off", {"links_down": links, "connections_ended": 1})
            assert [flags & 1 for flags in link_flags(sandbox)] == [0] * links
            go(sandbox)
            said = await task
            assert said[0] == b"ONE\n"
            assert b"TWO\n" not in said
            assert said[3] == 1  # EPERM
            with pytest.raises(SecurityViolationError, match="cut off from the network") as caught:
                await sandbox.execute_plugin_safe(talk, port, 0)  # for the rest of its life
            assert caught.value.explanation is not None
            assert "open a new one" in caught.value.explanation.text()

    with running(Server(("127.0.0.1", 0), Echo)) as port:
        asyncio.run(main(port))


LINKS = """
import fcntl, os, socket, sys
from sandbox.ns import syscalls as sc
wanted = {"user": sc.CLONE_NEWUSER, "net": sc.CLONE_NEWNET} if sys.argv[2] == "rootless" else {"net": sc.CLONE_NEWNET}
opened = {name: os.open(f"/proc/{sys.argv[1]}/ns/{name}", os.O_RDONLY) for name in wanted}
for name, fd in opened.items():
    sc.setns(fd, wanted[name])
control = socket.socket()
for _, name in socket.if_nameindex():
    print(int.from_bytes(fcntl.ioctl(control, 0x8913, name.encode().ljust(40, b"\\0"))[16:18], "little"))
"""


def link_flags(sandbox: EnhancedPluginSandbox) -> list[int]:
    """SIOCGIFFLAGS of each link of the call that runs, netdevice(7); none where it has no network namespace."""
    (call,) = sandbox._opened_sandbox().calls.values()
    assert call.read_back is not None
    if call.read_back.get("ns/net") != "own":
        return []
    worker = call.read_back["NSpid"].split()[0]
    done = subprocess.run(
        [sys.executable, "-c", LINKS, worker, "root" if harness.ROOT else "rootless"],
        capture_output=True,
        text=True,
        check=False,
        cwd=harness.REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize("level", NAMESPACED, ids=lambda level: level.value)
def test_files_are_discarded(level: IsolationLevel, tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "old").write_text("old")
        async with harness.open_sandbox(level, permissions={"allowed_directories": [str(tmp_path)]}) as sandbox:
            manager = Manager()
            await sandbox.execute_plugin_safe(write_into, str(tmp_path), "old", False)
            assert len(sandbox.changes()) == 1
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.FILESYSTEM_VIOLATION)) is True
            (step,) = manager.get_recovery_history()
            assert (step["action"], step["before"]["changes"], step["after"]["changes"]) == ("discard changes", 1, 0)
            assert step["before"]["quota_mb"] == step["after"]["quota_mb"] == 100
            assert sandbox.changes() == []

            with contextlib.suppress(FileNotFoundError):
                sandbox.temp_directory.joinpath("ready").unlink()
            task = await running_call(sandbox, write_into, str(tmp_path), "old", True)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.RESOURCE_EXCEEDED, "disk")) is True
            go(sandbox)
            await task
            assert sandbox.changes() == []
            assert manager.get_recovery_history()[-1]["after"] == {"are_kept": False}
            assert await sandbox.commit_changes() == []

            await sandbox.execute_plugin_safe(write_into, str(tmp_path), "new", False)  # the next call's are kept again
            assert [change.kind for change in await sandbox.commit_changes()] == ["added"]
        assert (tmp_path / "old").read_text() == "old"
        assert (tmp_path / "new").read_text() == "changed"

    asyncio.run(main())


def test_recovery_during_a_commit_is_no_loss_for_the_next_call(tmp_path: Path) -> None:
    granted = tmp_path / "granted"
    granted.mkdir()
    granted.chmod(0o777)

    async def main() -> None:
        permissions = {"allowed_directories": [str(granted)]}
        async with harness.open_sandbox(IsolationLevel.STRICT, permissions=permissions) as sandbox:
            await sandbox.execute_plugin_safe(write_into, str(granted), "one", False)
            committing = asyncio.create_task(sandbox.commit_changes())
            while not sandbox._busy and not committing.done():
                await asyncio.sleep(0)
            manager = Manager()
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.FILESYSTEM_VIOLATION)) is True
            assert len(await committing) == 1
            assert manager.get_recovery_history()[0]["before"]["changes"] == 0  # it was too late for them
            await sandbox.execute_plugin_safe(write_into, str(granted), "two", False)
            assert [Path(change.path).name for change in sandbox.changes()] == ["two"]

    asyncio.run(main())


def test_where_nothing_was_granted_there_is_nothing_to_discard(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            manager = Manager()
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.FILESYSTEM_VIOLATION)) is False
            assert "nothing to discard" in manager.get_recovery_history()[0]["note"]

    asyncio.run(main())


def test_time_is_up(level: IsolationLevel) -> None:
    """SIGTERM lets a plugin tidy up; SIGKILL comes to those that do not mind."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            manager = Manager()
            task = await running_call(sandbox, say_goodbye, 20 * harness.PATIENCE)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.EXECUTION_TIMEOUT, "time")) is True
            with pytest.raises(ResourceLimitExceededError, match="recovery ended the plugin: something happened") as caught:
                await task
            assert caught.value.limit == "time"
            assert sandbox.read_file("goodbye") == b"tidied up"
            assert actions(manager.get_recovery_history()) == [("terminate", True)]
            sandbox.temp_directory.joinpath("ready").unlink()

            task = await running_call(sandbox, ignore, 20 * harness.PATIENCE)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.EXECUTION_TIMEOUT, "time")) is True
            with pytest.raises(ResourceLimitExceededError, match="recovery ended the plugin"):
                await task
            assert actions(manager.get_recovery_history())[1:] == [("terminate", False), ("kill", True)]

    asyncio.run(main())


@pytest.mark.parametrize("recovers", [True, False])
def test_at_the_time_limit_sigterm_comes_first(level: IsolationLevel, recovers: bool) -> None:
    """By a tenth of the limit, at most a second; not where auto_recovery_enabled is False."""

    async def main() -> None:
        limits, config = {"max_execution_time_seconds": 0.6 * harness.PATIENCE}, {"auto_recovery_enabled": recovers}
        async with harness.open_sandbox(level, limits=limits, config=config) as sandbox:
            with pytest.raises(ResourceLimitExceededError, match="the plugin ran longer than") as caught:
                await sandbox.execute_plugin_safe(say_goodbye, 60)
            assert caught.value.limit == "time"
            assert has(sandbox, "goodbye") is recovers
            begun = time.monotonic()
            with pytest.raises(ResourceLimitExceededError, match="the plugin ran longer than"):
                await sandbox.execute_plugin_safe(ignore, 60 * harness.PATIENCE)
            assert time.monotonic() - begun < 2.0 * harness.PATIENCE  # of 0.66

    asyncio.run(main())


@pytest.mark.parametrize("kind", [Kind.SECURITY_BREACH, Kind.PERMISSION_DENIED])
def test_a_breach_is_the_end(level: IsolationLevel, kind: SandboxViolationType) -> None:
    """It stands still while evidence is taken, which is so of one moment, and is killed."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            manager = Manager()
            task = await running_call(sandbox, keep_writing, 20 * harness.PATIENCE)
            assert await manager.auto_recovery_violation(violation(sandbox, kind)) is True
            with pytest.raises(SecurityViolationError, match="recovery ended the plugin: something happened"):
                await task
            history = manager.get_recovery_history()
            assert actions(history) == [("freeze", True), ("keep evidence", True), ("kill", True)]
            evidence = Path(history[1]["after"]["evidence"])
            try:
                assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=evidence).returncode == 0
                index = json.loads((evidence / "changes/index.json").read_text())["items"]
                number = next(entry["number"] for entry in index if entry["path"] == "workspace/number")
                assert (evidence / f"changes/{number}").read_bytes() == sandbox.read_file("number")
                said = json.loads((evidence / "violations.json").read_text())["items"]
                assert said[-1]["message"] == "something happened"
            finally:
                subprocess.run(["rm", "-r", evidence], check=True)
            assert await sandbox.execute_plugin_safe(return_it, "thawed") == "thawed"

    asyncio.run(main())


def be_nobody(seconds: float) -> None:
    """A name is bytes, which need be no text."""
    import ctypes
    import time

    ctypes.CDLL(None).prctl(15, b"\xff", 0, 0, 0)  # PR_SET_NAME
    open("ready", "w").close()
    time.sleep(seconds)


def test_a_name_that_is_no_text_saves_nobody(level: IsolationLevel) -> None:
    """Without a cgroup it is stopped process by process, and each is asked in /proc whether it stands still."""

    async def main() -> None:
        async with harness.open_sandbox(level, config={"telemetry_enabled": False}) as sandbox:
            manager = Manager()
            task = await running_call(sandbox, be_nobody, 20 * harness.PATIENCE)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.SECURITY_BREACH)) is True
            with pytest.raises(SecurityViolationError, match="recovery ended the plugin"):
                await task
            assert actions(manager.get_recovery_history()) == [("freeze", True), ("kill", True)]

    asyncio.run(main())


def test_evidence_is_kept_once_of_the_same_calls(tmp_path: Path) -> None:
    """A plugin can make hundreds of violations: each would take a copy of all that it has left on the host's disk."""

    async def main() -> list[str]:
        kept = []
        async with harness.open_sandbox(IsolationLevel.STRICT) as sandbox:
            manager = Manager(IsolationConfig(quarantine_on_violation=False))
            for _ in range(2):
                await sandbox.execute_plugin_safe(return_it, 1)
                for _ in range(5):
                    assert await manager.auto_recovery_violation(violation(sandbox, Kind.SECURITY_BREACH)) is True
            for step in manager.get_recovery_history():
                if step["action"] == "keep evidence":
                    kept.append(step["after"]["evidence"])
        return kept

    kept = asyncio.run(main())
    subprocess.run(["rm", "-r", *kept], check=True)
    assert len(set(kept)) == 2  # of each call


def test_without_telemetry_no_evidence_is_kept() -> None:
    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD, config={"telemetry_enabled": False}) as sandbox:
            manager = Manager()
            task = await running_call(sandbox, ignore, 20 * harness.PATIENCE)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.SECURITY_BREACH)) is True
            with pytest.raises(SecurityViolationError):
                await task
            assert actions(manager.get_recovery_history()) == [("freeze", True), ("kill", True)]

    asyncio.run(main())


def test_without_its_evidence_it_is_killed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task that keeps it may be cancelled by the caller's program, with all others; nothing stays frozen."""
    tasks: list[asyncio.Task[Any] | None] = []

    async def keep(sandbox: EnhancedPluginSandbox, found: SandboxViolation) -> dict[str, Any]:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(60)
        return {}

    async def main() -> None:
        monkeypatch.setattr(EnhancedPluginSandbox, "_keep_evidence", keep)
        async with harness.open_sandbox(IsolationLevel.STRICT) as sandbox:
            task = await running_call(sandbox, ignore, 20 * harness.PATIENCE)
            recovering = asyncio.create_task(Manager().auto_recovery_violation(violation(sandbox, Kind.SECURITY_BREACH)))
            await harness.wait_for(lambda: tasks)
            assert tasks[0] is not None
            tasks[0].cancel()
            assert await recovering is True
            with pytest.raises(SecurityViolationError, match="recovery ended the plugin"):
                await task
            assert actions(sandbox.get_recovery_history()) == [("freeze", True), ("keep evidence", False), ("kill", True)]
            assert await sandbox.execute_plugin_safe(return_it, "thawed") == "thawed"

    asyncio.run(main())


def test_recovery_ends_with_the_sandbox_though_its_caller_does_something_else() -> None:
    """Its loop does not run, so no evidence ever comes."""
    loop = asyncio.new_event_loop()
    sandbox = harness.open_sandbox(IsolationLevel.STRICT)

    async def begin() -> None:
        await sandbox.__aenter__()
        tasks.append(await running_call(sandbox, ignore, 20 * harness.PATIENCE))

    tasks: list[asyncio.Task[Any]] = []
    loop.run_until_complete(begin())
    worked = sandbox._recover(violation(sandbox, Kind.SECURITY_BREACH))
    assert worked is not None
    assert sandbox._sandbox is not None
    sandbox._post(sandbox._sandbox.close)
    assert harness.wait_until(worked.done), "it polls without end"
    loop.run_until_complete(asyncio.wait(tasks))
    assert isinstance(tasks[0].exception(), Exception)
    loop.run_until_complete(sandbox.cleanup_sandbox())
    loop.close()


def test_who_has_got_a_number_since_the_first_look_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(["sleep", "60"]) as ours:
        looks = [[other.pid, ours.pid], [ours.pid]]
        monkeypatch.setattr(Recovery, "_pids", lambda _: looks.pop(0))
        try:
            Recovery._signal_all(Recovery.__new__(Recovery), signal.SIGSTOP)
            assert harness.wait_until(lambda: processes.is_stopped(ours.pid))
            assert not processes.is_stopped(other.pid)
        finally:
            other.kill()
            ours.kill()


def test_who_has_got_the_number_of_an_ended_process_is_left_alone() -> None:
    """A recovery that still waits when the sandbox has gone finds calls whose numbers are others' by now."""

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STRICT) as sandbox:
            task = await running_call(sandbox, ignore, 20 * harness.PATIENCE)
            assert sandbox._sandbox is not None
            recovery, (call,) = sandbox._recoveries(sandbox._sandbox), sandbox._sandbox.calls.values()
            assert recovery._pids()
        with contextlib.suppress(Exception):
            await task
        other = subprocess.Popen(["sleep", "60"])
        try:
            assert call.read_back is not None
            call.read_back["NSpid"] = f"{other.pid}\t2"
            sandbox._sandbox.calls[call.number] = call
            assert recovery._pids() == []
        finally:
            other.kill()
            other.wait()

    asyncio.run(main())


def test_for_memory_it_stands_still_and_goes_on(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            manager = Manager()
            task = await running_call(sandbox, count_time, 1)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.RESOURCE_EXCEEDED, "memory")) is True
            assert await task < 1
            history = manager.get_recovery_history()
            assert [step["action"] for step in history] == ["freeze", "reclaim", "thaw", "look"]
            if "memory" not in CONTROLLERS:
                assert (history[1]["success"], history[1]["note"]) == (
                    False,
                    "no memory controller: nothing can be taken back",
                )
            assert all(step["success"] for step in (history[0], history[2], history[3]))

    asyncio.run(main())


# -- memory, in the VM ---------------------------------------------------------------------------------------------------


def read_much(megabytes: int) -> int:
    """A file of a folder on disk, whose pages count for whoever reads it first: those can be taken back."""
    import time

    with open("big", "wb") as file:
        for _ in range(megabytes):
            file.write(bytes(1 << 20))
        file.flush()
    time.sleep(2)
    return megabytes


def peak_and_come_down(megabytes: int, seconds: float) -> str:
    import time

    held = [bytearray(b"x") * (1 << 20) for _ in range(megabytes)]
    time.sleep(seconds)
    held.clear()
    time.sleep(2)
    return "alive"


def leak_slowly(pause: float) -> None:
    import time

    held = []
    while True:
        held.append(bytearray(b"x") * (1 << 20))
        time.sleep(pause)


LIMITS = {"max_memory_mb": 64.0, "memory_warning_threshold_mb": 40.0}


@limited
def test_memory_that_peaks_and_comes_down_is_kept_alive(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, limits=LIMITS) as sandbox:
            assert await sandbox.execute_plugin_safe(peak_and_come_down, 44, 1.5) == "alive"
            history = sandbox.get_recovery_history()
            assert [step["action"] for step in history] == ["freeze", "reclaim", "thaw", "look"]
            look = history[-1]
            assert look["success"]
            assert look["after"]["memory_mb"] < 40 < look["before"]["memory_mb"]
            (warned,) = [v for v in sandbox.get_violations() if (v.details["limit"], v.severity) == ("memory", "warning")]
            assert (warned.auto_recovery_attempted, warned.resolved) == (True, True)

    asyncio.run(main())


@limited
def test_memory_that_grows_on_is_killed(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, limits=LIMITS) as sandbox:
            with pytest.raises(ResourceLimitExceededError) as caught:
                await sandbox.execute_plugin_safe(leak_slowly, 0.05)
            assert caught.value.limit == "memory"
            history = sandbox.get_recovery_history()
            assert [step["action"] for step in history][:3] == ["freeze", "reclaim", "thaw"]
            kill = next(step for step in history if step["action"] == "kill")
            assert (kill["after"]["ended_by"], kill["note"]) == ("memory.max", "it went on to grow up to its limit")

    asyncio.run(main())


@limited
def test_memory_of_files_is_taken_back() -> None:
    """At level minimal, where the workspace lies on a disk: what it reads and writes there counts as its memory."""

    async def main() -> None:
        limits, permissions = {**LIMITS, "max_file_size_mb": 64.0}, {"max_file_size_mb": 64.0}
        async with harness.open_sandbox(IsolationLevel.MINIMAL, limits=limits, permissions=permissions) as sandbox:
            assert await sandbox.execute_plugin_safe(read_much, 48) == 48
            reclaim = next(step for step in sandbox.get_recovery_history() if step["action"] == "reclaim")
            assert reclaim["success"]
            assert reclaim["after"]["memory_mb"] <= 36 < reclaim["before"]["memory_mb"]
            assert int(reclaim["after"]["memory.high"]) <= 36 << 20

    asyncio.run(main())


# -- by itself -----------------------------------------------------------------------------------------------------------


def connect_to(ports: list[int]) -> list[Any]:
    import socket

    found: list[Any] = []
    for port in ports:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            found.append("connected")
        except OSError as error:
            found.append(error.errno)
    return found


@pytest.mark.parametrize("recovers", [True, False])
def test_at_the_threshold_it_is_contained(level: IsolationLevel, recovers: bool) -> None:
    """The last violation that is put up with: there is no network any more. One more is the end."""

    async def main(port: int) -> None:
        permissions = {"allow_network_access": True, "allowed_hosts": [f"127.0.0.1:{port}"]}
        config = {"violation_threshold": 2, "auto_recovery_enabled": recovers}
        async with harness.open_sandbox(level, permissions=permissions, config=config) as sandbox:
            assert await sandbox.execute_plugin_safe(connect_to, [1, port]) == [1, "connected"]
            assert await sandbox.execute_plugin_safe(connect_to, [1, 2]) == [1, 1]
            if recovers:
                await harness.wait_for(lambda: ("cut off", True) in actions(sandbox.get_recovery_history()))
            else:
                assert sandbox.get_recovery_history() == []
            if recovers:
                with pytest.raises(SecurityViolationError, match="cut off from the network"):
                    await sandbox.execute_plugin_safe(talk, port, 0)
            else:
                assert await sandbox.execute_plugin_safe(connect_to, [port]) == ["connected"]
            with pytest.raises(SecurityViolationError, match="passed the violation threshold"):
                await sandbox.execute_plugin_safe(connect_to, list(range(1, 30)))
            if recovers:
                (step,) = [step for step in sandbox.get_recovery_history() if step["action"] == "kill"]
                assert (step["success"], step["note"]) == (True, "violation_threshold was passed")
                assert step["before"]["violations"] > step["before"]["allowed"] == 2

    with running(Server(("127.0.0.1", 0), Echo)) as port:
        asyncio.run(main(port))


# -- the manager -------------------------------------------------------------------------------------------------------


def handled(manager: SandboxRecoveryManager, *kinds: SandboxViolationType) -> list[bool]:
    """Violations of a sandbox that is closed."""

    async def main() -> list[bool]:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            await sandbox.execute_plugin_safe(return_it, 1)
        return [await manager.auto_recovery_violation(violation(sandbox, kind)) for kind in kinds]

    return asyncio.run(main())


def test_of_a_closed_sandbox_nothing_is_left_to_act_on() -> None:
    manager = Manager()
    assert handled(manager, *Kind) == [kind in (Kind.RESOURCE_EXCEEDED, Kind.EXECUTION_TIMEOUT) for kind in Kind]
    history = manager.get_recovery_history()
    assert {step["note"] for step in history if step["success"]} == {"contained: the sandbox is gone"}
    assert len(history) == len(Kind)


def test_a_measure_that_comes_too_late_is_no_error_of_its_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warden cannot be told any more, because it was closed meanwhile: whoever calls is told that it is not open."""
    monkeypatch.setattr(measures, "ANSWER", 0.1)

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            opened, worked = sandbox._sandbox, concurrent.futures.Future[bool]()
            assert opened is not None

            def recover() -> None:
                sandbox._recoveries(opened).recover(violation(sandbox, Kind.NETWORK_VIOLATION), worked.set_result)
                opened.close()

            sandbox._post(recover)
            assert await asyncio.wrap_future(worked) is False
            assert actions(sandbox.get_recovery_history()) == [("cut off", False)]
        with pytest.raises(RuntimeError, match="is not open"):
            await sandbox.execute_plugin_safe(return_it, 1)

    asyncio.run(main())


def test_without_auto_recovery_it_only_records() -> None:
    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            manager = Manager(IsolationConfig(auto_recovery_enabled=False))
            task = await running_call(sandbox, ready_then, "nice", 20 * harness.PATIENCE)
            found = violation(sandbox, Kind.SECURITY_BREACH)
            assert await manager.auto_recovery_violation(found) is False
            assert (found.auto_recovery_attempted, found.resolved) == (False, False)
            go(sandbox)
            assert await task == os.getpriority(os.PRIO_PROCESS, 0)
            assert actions(manager.get_recovery_history()) == [("none", False)]
            assert sandbox.get_recovery_history() == []

    asyncio.run(main())


@pytest.mark.parametrize("quarantines", [True, False])
def test_beyond_the_threshold_any_violation_is_the_end(tmp_path: Path, quarantines: bool) -> None:
    config = IsolationConfig(violation_threshold=1, quarantine_on_violation=quarantines)

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD, config={"telemetry_enabled": False}) as sandbox:
            manager = Manager(config, state_folder=tmp_path / "state")
            task = await running_call(sandbox, ready_then, "wait", 20 * harness.PATIENCE)
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.RESOURCE_EXCEEDED, "cpu")) is True
            assert not task.done()
            assert await manager.auto_recovery_violation(violation(sandbox, Kind.RESOURCE_EXCEEDED, "cpu")) is True
            with pytest.raises(ResourceLimitExceededError, match="recovery ended the plugin"):
                await task
            last = [("quarantine", True)] * quarantines
            assert actions(manager.get_recovery_history()) == [("slow down", True), ("freeze", True), ("kill", True), *last]

    asyncio.run(main())
    with Store(tmp_path / "state") as store:
        found = store.quarantined()
    assert [each.plugin_id for each in found] == ["ready_then"] * quarantines
    if found:
        assert found[0].by == "library"
        assert len(found[0].violations) == 2


def innocent() -> int:
    return 1


def test_who_has_only_run_beside_it_is_not_quarantined(tmp_path: Path) -> None:
    config = IsolationConfig(violation_threshold=1)

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            manager = Manager(config, state_folder=tmp_path / "state")
            await sandbox.execute_plugin_safe(connect_to, [1, 2, 3])
            await sandbox.execute_plugin_safe(innocent)
            found = sandbox.get_violations()
            assert len(found) == 3
            for each in found:
                await manager.auto_recovery_violation(each)
            await manager.auto_recovery_violation(violation(sandbox, Kind.SECURITY_BREACH))  # of nobody knows which call
            said = [
                (step["success"], step["note"]) for step in manager.get_recovery_history() if step["action"] == "quarantine"
            ]
            assert said[0] == (True, "connect_to")
            assert not said[1][0]
            assert len(said) == 2  # it is quarantined once

    asyncio.run(main())
    with Store(tmp_path / "state") as store:
        assert [each.plugin_id for each in store.quarantined()] == ["connect_to"]


def test_each_step_is_told_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            manager = Manager()
            wanted = [violation(sandbox, Kind.FILESYSTEM_VIOLATION) for _ in range(3)]
            await asyncio.gather(*map(manager.auto_recovery_violation, wanted))
            assert manager.get_recovery_history() == sandbox.get_recovery_history()
            assert len(manager.get_recovery_history()) == 3

    asyncio.run(main())


def test_mistakes_are_told() -> None:
    with pytest.raises(TypeError, match="SandboxRecoveryManager: config is a dict: give an IsolationConfig"):
        Manager({})  # type: ignore[arg-type]
    manager = Manager()
    with pytest.raises(TypeError, match="auto_recovery_violation: a str is no violation"):
        asyncio.run(manager.auto_recovery_violation("breach"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="quarantine_plugin: plugin_id is a int: give a text"):
        manager.quarantine_plugin(1, "")  # type: ignore[arg-type]


def test_many_at_once(level: IsolationLevel) -> None:
    """One after the other, each to its end; also when the sandbox is closed in the middle."""

    async def main() -> None:
        manager = Manager(IsolationConfig(violation_threshold=10))
        async with harness.open_sandbox(level) as sandbox:
            task = await running_call(sandbox, ready_then, "wait", 20 * harness.PATIENCE)
            kinds = (("memory", 3), ("cpu", 3), ("pids", 2))
            found = [violation(sandbox, Kind.RESOURCE_EXCEEDED, limit) for limit, count in kinds for _ in range(count)]
            waiting: list[Coroutine[Any, Any, bool]] = [manager.auto_recovery_violation(each) for each in found]
            gathered = asyncio.gather(*waiting)
            await asyncio.sleep(0.05)
        worked = await gathered
        with contextlib.suppress(Exception):
            await task
        assert len(worked) == 8

    asyncio.run(main())


# -- the other doors -----------------------------------------------------------------------------------------------------

HUNGRY = "def main():\n    held = bytearray(b'x') * (80 << 20)\n    return len(held)"


@pytest.mark.parametrize("asked", [None, 160, 5000])
def test_the_framework_tries_once_more_with_the_memory_of_the_manifest(asked: int | None, tmp_path: Path) -> None:
    """If it asks for more, up to what the host grants."""
    plugins = tmp_path / "p"
    plugins.mkdir()
    (plugins / "hungry.py").write_text(HUNGRY)
    more = f"[recovery]\nmax_memory_mb = {asked}\n" if asked else ""
    (plugins / "hungry.toml").write_text(f"{more}[limits]\nmax_memory_mb = 48\n")
    framework = EnhancedPluginFramework(
        str(plugins), IsolationConfig(), limits=PluginLimitsV2(max_memory_mb=200.0), state_folder=tmp_path / "state"
    )
    try:
        done = asyncio.run(framework.load_plugin_enhanced("hungry"))
        history = framework.get_plugin_performance_history("hungry")
    finally:
        framework.close()
    retries = [step for step in done["recovery"] if step["action"] == "retry"]
    assert done["success"] is bool(asked)
    assert len(retries) == bool(asked)
    assert len(history) == 1
    if asked:
        assert done["result"] == 80 << 20
        assert retries[0]["before"]["max_memory_mb"] == 48
        assert "memory" in retries[0]["before"]["ended_by"]
        assert retries[0]["after"] == {"max_memory_mb": min(asked, 200), "ended_by": None}
        assert history[0]["limits"]["max_memory_mb"] == min(asked, 200)


def test_a_second_try_is_the_last(tmp_path: Path) -> None:
    plugins = tmp_path / "p"
    plugins.mkdir()
    (plugins / "hungry.py").write_text(HUNGRY)
    (plugins / "hungry.toml").write_text("[limits]\nmax_memory_mb = 32\n[recovery]\nmax_memory_mb = 48\n")
    framework = EnhancedPluginFramework(str(plugins), state_folder=tmp_path / "state")
    try:
        done = asyncio.run(framework.load_plugin_enhanced("hungry"))
    finally:
        framework.close()
    assert not done["success"]
    assert [(step["action"], step["success"]) for step in done["recovery"] if step["action"] == "retry"] == [("retry", False)]


COMMAND = """
    import signal, sys, time

    def leave(*_):
        print("goodbye", flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    time.sleep(60)
"""
ATTEMPTS = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("mount", "umount2", "unshare", "setns", "ptrace", "swapon"):
        getattr(libc, name)(0, 0, 0, 0, 0)
"""


def test_the_command_recovers_as_the_library_does(level: IsolationLevel, tmp_path: Path) -> None:
    caller = cli_harness.privileged(level.value, tmp_path)
    caller.write("slow.py", COMMAND)
    seconds = str(1.0 * harness.PATIENCE)
    done = caller.run("run", "slow.py", "--level", level.value, "--timeout", seconds)
    assert (done.status, done.out) == (124, "goodbye\n")
    caller.write("attempts.py", ATTEMPTS)
    done = caller.run("run", "attempts.py", "--level", level.value, "--result-file", "result.json")
    assert done.status == 126
    result = json.loads((caller.folder / "result.json").read_text())
    assert [(step["action"], step["success"]) for step in result["recovery"]] == [("kill", True)]


def test_a_killed_caller_leaves_nothing_frozen(level: IsolationLevel, tmp_path: Path) -> None:
    """kill -9 of the caller while its sandbox stands still."""
    code = f"""
import asyncio, sys, time
from datetime import UTC, datetime
from sandbox import *
from sandbox.recovery import measures

measures.Recovery._thaw = lambda self: None  # it is killed before it comes to that

async def main():
    config = IsolationConfig(level=IsolationLevel("{level.value}"))
    async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), config) as sandbox:
        task = asyncio.create_task(sandbox.execute_plugin_safe(time.sleep, 60))
        await asyncio.sleep(0.3)
        details = {{"sandbox_id": sandbox.sandbox_id, "limit": "memory"}}
        kind = SandboxViolationType.RESOURCE_EXCEEDED
        asyncio.create_task(SandboxRecoveryManager().auto_recovery_violation(
            SandboxViolation(kind, "", datetime.now(UTC), details=details)))
        while not any(step["action"] == "freeze" for step in sandbox.get_recovery_history()):
            await asyncio.sleep(0.01)
        print("frozen", flush=True)
        await task

asyncio.run(main())
"""
    environment = {**os.environ, "PSIE_STANDING": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=harness.REPOSITORY, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"frozen\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    # That nothing is left is what the fixture looks at.


def test_commit_is_refused_after_recovery_in_a_call(tmp_path: Path) -> None:
    """What recovery discards cannot be committed, not even before the call has ended."""

    async def main() -> None:
        permissions = {"allowed_directories": [str(tmp_path)]}
        async with harness.open_sandbox(IsolationLevel.STANDARD, permissions=permissions) as sandbox:
            task = await running_call(sandbox, write_into, str(tmp_path), "new", True)
            await Manager().auto_recovery_violation(violation(sandbox, Kind.FILESYSTEM_VIOLATION))
            with pytest.raises(CommitError, match="recovery discards them"):
                await sandbox.commit_changes()
            go(sandbox)
            await task
        assert not (tmp_path / "new").exists()

    asyncio.run(main())
