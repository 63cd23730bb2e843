"""NetworkIsolationManager: a network that several sandboxes share, and that is nobody else's."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import IsolationConfig, IsolationLevel, NetworkIsolationManager, SandboxInitializationError

from . import harness

pytestmark = pytest.mark.rootless
MINIMAL, STANDARD, STRICT, MAXIMUM = IsolationLevel
LEVELS = tuple(IsolationLevel) if harness.ROOT else (STANDARD, STRICT, MAXIMUM)


@pytest.fixture(params=LEVELS, ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> IsolationLevel:
    return IsolationLevel(request.param)


@pytest.fixture
def manager(level: IsolationLevel) -> Iterator[NetworkIsolationManager]:
    made = NetworkIsolationManager(IsolationConfig(level=level))
    assert made.enable_isolation(), made.reason
    yield made
    made.disable_isolation()


def look() -> list[Any]:
    """The network that it is in, and the interfaces there."""
    with open("/proc/self/net/dev") as file:
        names = sorted(line.partition(":")[0].strip() for line in file if ":" in line)
    return [os.readlink("/proc/self/ns/net"), names]


def connect() -> str:
    import socket

    try:
        socket.create_connection(("192.0.2.1", 9))
    except OSError as error:
        return type(error).__name__
    return "connected"


def test_its_sandboxes_are_in_one_network(level: IsolationLevel, manager: NetworkIsolationManager) -> None:
    before = os.readlink("/proc/self/ns/net")

    async def main() -> list[Any]:
        async with harness.open_sandbox(level, network=manager) as one, harness.open_sandbox(level, network=manager) as other:
            seen = [await sandbox.execute_plugin_safe(look) for sandbox in (one, other, one)]
            (network,) = [each for each in one.protections if each.name == "network"]
            assert "shared" in network.detail
        async with harness.open_sandbox(STRICT) as apart:
            return [*seen, await apart.execute_plugin_safe(look)]

    *seen, apart = asyncio.run(main())
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] not in (before, apart[0])
    assert seen[0][1] == (["eth0", "lo"] if level is MAXIMUM else ["lo"])
    assert os.readlink("/proc/self/ns/net") == before


def test_its_activity_is_that_of_its_sandboxes(level: IsolationLevel, manager: NetworkIsolationManager) -> None:
    async def main() -> None:
        for name in ("one", "other"):
            async with harness.open_sandbox(level, network=manager, sandbox_id=name) as sandbox:
                assert await sandbox.execute_plugin_safe(connect) == "PermissionError"
        async with harness.open_sandbox(level, sandbox_id="apart") as sandbox:
            await sandbox.execute_plugin_safe(connect)

    asyncio.run(main())
    seen = [(each["sandbox_id"], each["operation"], each["address"]) for each in manager.get_network_activity()]
    wanted = [("socket", None), ("connect", "192.0.2.1")]
    assert seen == [(name, *each) for name in ("one", "other") for each in wanted]


def test_a_running_sandbox_keeps_it(level: IsolationLevel, manager: NetworkIsolationManager) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, network=manager) as sandbox:
            before, _ = await sandbox.execute_plugin_safe(look)
            manager.disable_isolation()
            after, names = await sandbox.execute_plugin_safe(look)
            assert after == before
            assert "lo" in names
        with pytest.raises(RuntimeError, match=r"enable_isolation\(\) first"):
            async with harness.open_sandbox(level, network=manager):
                raise AssertionError("opened")

    asyncio.run(main())


def test_a_holder_that_is_stopped_keeps_nobody() -> None:
    manager = NetworkIsolationManager(IsolationConfig())
    with harness.nothing_left():
        assert manager.enable_isolation(), manager.reason
        holder = manager.holder.pid
        os.kill(holder, signal.SIGSTOP)
        ending = threading.Thread(target=manager.disable_isolation)
        ending.start()
        ending.join(harness.SETTLE)
        is_kept = ending.is_alive()
        if is_kept:
            os.kill(holder, signal.SIGCONT)
            ending.join()
        assert not is_kept


def test_a_manager_that_is_dropped_leaves_nothing() -> None:
    manager = NetworkIsolationManager(IsolationConfig())
    with harness.nothing_left():
        assert manager.enable_isolation(), manager.reason
        del manager
        gc.collect()


def test_a_fork_does_not_end_its_parents(level: IsolationLevel, manager: NetworkIsolationManager) -> None:
    pid = os.fork()
    if pid == 0:
        manager.disable_isolation()
        os._exit(0)
    os.waitpid(pid, 0)

    async def main() -> None:
        async with harness.open_sandbox(level, network=manager) as sandbox:
            assert "lo" in (await sandbox.execute_plugin_safe(look))[1]

    asyncio.run(main())


def test_it_says_why_not() -> None:
    manager = NetworkIsolationManager(IsolationConfig(enable_network_isolation=False))
    assert not manager.enable_isolation()
    assert manager.reason == "enable_network_isolation is False"
    with pytest.raises(TypeError, match="give a IsolationConfig"):
        NetworkIsolationManager("strict")  # type: ignore[arg-type]


@pytest.mark.skipif(harness.ROOT, reason="as root every level can join one; tests/integration/test_rootless.py runs it")
def test_minimal_without_root_cannot_join_one() -> None:
    manager = NetworkIsolationManager(IsolationConfig(level=MINIMAL))
    assert manager.enable_isolation(), manager.reason

    async def main() -> None:
        with pytest.raises(SandboxInitializationError, match="use level standard"):
            async with harness.open_sandbox(MINIMAL, network=manager):
                raise AssertionError("opened")

    asyncio.run(main())
    manager.disable_isolation()


KEEPER = """
import os, sys, time
from sandbox import IsolationConfig, IsolationLevel, NetworkIsolationManager
manager = NetworkIsolationManager(IsolationConfig(level=IsolationLevel.MAXIMUM))
assert manager.enable_isolation(), manager.reason
print(manager.holder.pid, flush=True)
time.sleep(60)
"""


def test_a_killed_caller_leaves_nothing() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    caller = subprocess.Popen([sys.executable, "-c", KEEPER], stdout=subprocess.PIPE, text=True, env=environment)
    assert caller.stdout is not None
    with caller.stdout:
        holder = int(caller.stdout.readline())
    assert Path(f"/proc/{holder}").exists()
    caller.send_signal(signal.SIGKILL)
    caller.wait()

    def gone() -> bool:
        try:
            with open(f"/proc/{holder}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"  # nobody here reaps orphans, perhaps
        except (FileNotFoundError, ProcessLookupError):
            return True

    assert harness.wait_until(gone, harness.SOON)
