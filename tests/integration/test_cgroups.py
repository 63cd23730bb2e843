"""Limits that the kernel enforces by cgroup v2: what they end, what is counted and said, and that no leaf stays.

Most of it needs controllers, as the VM of `make vm-test` has them, for root and for a user with a user manager.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import IsolationLevel, PluginExecutionError, ResourceLimitExceededError, host
from sandbox.cgroups import leaf, place
from sandbox.cgroups.controllers import Cpu, Folder, Limit, Memory, V2Controller
from sandbox.config import PluginLimitsV2
from sandbox.engine.loop import PollLoop
from sandbox.monitor.sources import CgroupSource
from sandbox.monitor.watch import Thresholds, Watch

from . import harness, plugins

pytestmark = pytest.mark.rootless
FACTS = host.facts()
limited = pytest.mark.skipif(
    not {"memory", "pids", "cpu"} <= set(FACTS.controllers),
    reason="no cgroup v2 controllers of ours here: make vm-test has them",
)
FORKS: dict[str, Any] = {"allow_subprocess_execution": True}
LIMITS: dict[str, Any] = {"max_memory_mb": 64.0}


# -- bombs -------------------------------------------------------------------------------------------------------------


def heap() -> int:
    held = []
    while True:
        held.append(bytearray(b"x") * (1 << 20))


def anonymous_mapping() -> None:
    import mmap

    region = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, len(region), 4096):
        region[offset] = 1


def shared_mapping() -> None:
    import mmap

    region = mmap.mmap(-1, 256 << 20)
    for offset in range(0, len(region), 4096):
        region[offset] = 1


def memory_file() -> None:
    import os

    fd = os.memfd_create("bomb")
    for _ in range(256):
        os.write(fd, b"x" * (1 << 20))


def temporary_file() -> None:
    with open("/tmp/bomb", "wb", 0) as file:
        for number in range(200):
            file.write(b"x" * (1 << 20))
            if number % 9 == 8:
                file.seek(0, 2)


def grandchild() -> int:
    import os

    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            held = []
            while True:
                held.append(bytearray(b"x") * (1 << 20))
        os._exit(0)
    import time

    time.sleep(20)
    return 0


def shy_heap() -> None:
    """Asks to be killed last."""
    for value in ("-1000", "-1", "0"):
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(value)
                break
        except OSError:
            continue
    held = []
    while True:
        held.append(bytearray(b"x") * (1 << 20))


BOMBS: list[Callable[[], object]] = [heap, anonymous_mapping, shared_mapping, memory_file, temporary_file, grandchild, shy_heap]


@limited
@pytest.mark.parametrize("bomb", BOMBS)
def test_the_kernel_kills_for_memory(level: IsolationLevel, bomb: Callable[[], object]) -> None:
    settings: dict[str, Any] = {"limits": {**LIMITS, "max_disk_usage_mb": 200.0, "max_file_size_mb": 300.0}}
    settings["permissions"] = {"max_file_size_mb": 300.0}
    if bomb is grandchild:
        settings["permissions"] |= FORKS
        settings["limits"]["max_subprocess_count"] = 3
    if bomb is temporary_file and level is IsolationLevel.MINIMAL:
        pytest.skip("level minimal has no /tmp of its own: Landlock refuses the write")
    if bomb is memory_file and level is IsolationLevel.MAXIMUM:
        pytest.skip("the tight profile does not know memfd_create")
    with pytest.raises(ResourceLimitExceededError, match=r"killed: used 6[34].* of 64 MB") as caught:
        harness.call(level, bomb, **settings)
    assert caught.value.limit == "memory"
    assert caught.value.allowed == 64 << 20


@limited
def test_a_kill_takes_only_its_sandbox(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, limits=LIMITS) as bad, harness.open_sandbox(level, limits=LIMITS) as good:
            task = asyncio.create_task(good.execute_plugin_safe(plugins.signal_and_sleep))
            await harness.wait_for((good.temp_directory / "started").exists)
            for _ in range(2):
                with pytest.raises(ResourceLimitExceededError):
                    await bad.execute_plugin_safe(heap)
            assert await bad.execute_plugin_safe(plugins.give_back, 1) == 1, "the next call is not hurt"
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert not [v for v in good.get_violations() if v.details["limit"] == "memory"]
            warned = [v for v in bad.get_violations() if (v.details["limit"], v.severity) == ("memory", "warning")]
            assert warned, "memory.high has warned before"

    asyncio.run(main())


def breathe_high(megabytes: int) -> float:
    """Hold more than the warning threshold; returns the seconds that it took."""
    import time

    start = time.monotonic()
    held = [bytearray(b"x") * (1 << 20) for _ in range(megabytes)]
    time.sleep(0.3)
    held += [bytearray(b"x") * (1 << 20) for _ in range(8)]
    return time.monotonic() - start


@limited
def test_a_warning_does_not_slow_the_plugin_down(level: IsolationLevel) -> None:
    """memory.high throttles whoever is above it: the event reader lifts it when it has warned."""

    async def main() -> None:
        limits = {**LIMITS, "memory_warning_threshold_mb": 24.0}
        async with harness.open_sandbox(level, limits=limits) as sandbox:
            for _ in range(2):  # it warns in each call
                assert await sandbox.execute_plugin_safe(breathe_high, 32) < 10
            warned = [v for v in sandbox.get_violations() if (v.details["limit"], v.severity) == ("memory", "warning")]
            assert len(warned) == 2

    asyncio.run(main())


# -- tasks and CPU ------------------------------------------------------------------------------------------------------


def fork_until_refused(most: int) -> int:
    import os
    import signal

    children = []
    try:
        for _ in range(most):
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    except BlockingIOError:
        pass
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(children)


@limited
def test_pids_max_is_counted(level: IsolationLevel) -> None:
    limits = {**LIMITS, "max_subprocess_count": 3, "max_thread_count": 1}

    async def main() -> None:
        async with harness.open_sandbox(level, limits=limits, permissions=FORKS) as sandbox:
            for count in range(1, 4):
                assert await sandbox.execute_plugin_safe(fork_until_refused, 50) == 3
                said = [v for v in sandbox.get_violations() if v.details["limit"] == "pids"]
                assert [v.details["count"] for v in said] == [1] * count

    asyncio.run(main())


@limited
def test_calls_at_once_have_their_tasks_each(level: IsolationLevel) -> None:
    limits = {**LIMITS, "max_subprocess_count": 3, "max_thread_count": 1}

    async def main() -> None:
        async with harness.open_sandbox(level, limits=limits, permissions=FORKS) as sandbox:
            calls = [sandbox.execute_plugin_safe(fork_until_refused, 3) for _ in range(4)]
            assert await asyncio.gather(*calls) == [3] * 4

    asyncio.run(main())


def share_of_a_cpu(seconds: float) -> float:
    import time

    start, used = time.monotonic(), time.process_time()
    while time.monotonic() - start < seconds:
        pass
    return (time.process_time() - used) / (time.monotonic() - start)


@limited
def test_cpu_max_holds_and_is_said(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, limits={"max_cpu_percent": 25.0}) as sandbox:
            assert await sandbox.execute_plugin_safe(share_of_a_cpu, 3.0) < 0.25 + 0.03
            (said,) = [v for v in sandbox.get_violations() if (v.details["limit"], v.severity) == ("cpu", "info")]
            assert said.details["count"] >= 5

    asyncio.run(main())


def seconds_to_write(megabytes: int) -> float:
    import os
    import time

    start = time.monotonic()
    with open("large", "wb", 0) as file:
        for _ in range(megabytes):
            file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    return time.monotonic() - start


@pytest.mark.skipif(not FACTS.io_controller, reason="no io controller of ours here: make vm-test has one, as root")
def test_io_max_holds() -> None:
    """At level minimal, whose workspace lies on a disk."""

    async def writing(**limits: float) -> float:
        async with harness.open_sandbox(IsolationLevel.MINIMAL, limits={**LIMITS, **limits}) as sandbox:
            states = {each.name: each.state for each in sandbox.protections}
            assert states.get("disk throughput") == ("enforced" if limits else None)
            seconds: float = await sandbox.execute_plugin_safe(seconds_to_write, 8)
            return seconds

    assert asyncio.run(writing(max_io_mb_per_second=2.0)) > 2.5
    assert asyncio.run(writing()) < 2.0


# -- leaves ------------------------------------------------------------------------------------------------------------


def leaf_settings(pid: int) -> dict[str, str]:
    folder = Path(place.mount_point() + place.own_path(pid))
    names = ("memory.max", "memory.high", "memory.oom.group", "pids.max", "cpu.max", "cpu.weight")
    return {name: (folder / name).read_text().strip() for name in names}


@limited
def test_a_leaf_has_what_the_recipe_says() -> None:
    async def main() -> None:
        limits = PluginLimitsV2()
        async with harness.open_sandbox(IsolationLevel.STRICT, limits={"max_cpu_percent": limits.max_cpu_percent}) as sandbox:
            task = asyncio.create_task(sandbox.execute_plugin_safe(plugins.signal_and_sleep))
            await harness.wait_for((sandbox.temp_directory / "started").exists)
            (worker,) = harness.roles(os.getpid())["worker"]
            found = leaf_settings(worker)
            assert found == {
                "memory.max": str(128 << 20),
                "memory.high": str(int(limits.memory_warning_threshold_mb) << 20),
                "memory.oom.group": "1",
                "pids.max": str(1 + limits.max_thread_count),
                "cpu.max": "50000 100000",
                "cpu.weight": "50",
            }
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


@limited
@pytest.mark.skipif(FACTS.cgroup_kind == "scope", reason="a scope is its zygote's own: nobody finds it before")
@pytest.mark.alone
def test_controllers_that_were_taken_away_are_given_again() -> None:
    from sandbox.engine import service

    service.shut_down()
    folder = os.path.join(FACTS.cgroup_folder, place.FOLDER)
    place.write(folder + "/cgroup.subtree_control", "-pids")
    assert harness.call(IsolationLevel.STRICT, plugins.give_back, 1) == 1
    assert "pids" in place.words(folder + "/cgroup.subtree_control")


def test_two_sandboxes_of_one_name(level: IsolationLevel) -> None:
    async def main() -> None:
        one, other = (harness.open_sandbox(level, sandbox_id="twice") for _ in range(2))
        async with one, other:
            calls = [sandbox.execute_plugin_safe(plugins.give_back, number) for number, sandbox in enumerate((one, other))]
            assert await asyncio.gather(*calls) == [0, 1]

    asyncio.run(main())


# -- the classes, on a cgroup of this host's --------------------------------------------------------------------------------


@pytest.fixture
def cgroup() -> Iterator[Folder]:
    """An empty cgroup of ours, with whatever controllers there are."""
    if FACTS.cgroup_kind not in ("root", "delegated"):
        pytest.skip("no v2 tree in which we may make a cgroup by hand: root, or a delegated subtree, has one")
    controllers = [name for name in place.ENABLED if name in FACTS.controllers]
    parent = place.prepare(os.path.join(FACTS.cgroup_folder, place.FOLDER), controllers)
    folder = Folder(leaf.make(parent, "4090", {}))
    yield folder
    folder.close()
    leaf.remove(parent, "4090")
    os.close(parent)


def test_controllers_read_what_is_there(cgroup: Folder) -> None:
    core = V2Controller(cgroup)
    assert core.events == {"populated": 0, "frozen": 0}
    assert core.pids == []
    assert Cpu(cgroup).stat["usage_usec"] >= 0
    if "memory" not in FACTS.controllers:
        with pytest.raises(FileNotFoundError):
            _ = Memory(cgroup).current
        with pytest.raises(FileNotFoundError):
            Memory(cgroup).set_property("memory.max", "max")
        assert not os.path.exists(f"{cgroup.full_path}/memory.max"), "nothing is made"


def test_a_stall_is_told_by_a_psi_trigger(cgroup: Folder) -> None:
    """Whoever is above memory.high waits for memory."""
    if "memory" not in FACTS.controllers:
        pytest.skip("no memory controller of ours here: make vm-test has one")
    source = CgroupSource(os.dup(cgroup.fd))
    trigger = source.pressure()
    if trigger < 0:
        pytest.skip("before Linux 6.5 only CAP_SYS_RESOURCE may write triggers")
    os.close(trigger)
    source.warn_at(16 << 20)
    loop = PollLoop()
    watch = Watch(loop, source, Thresholds.of_limits(PluginLimitsV2()), 60.0)
    seen: list[str] = []
    watch.on_violation = lambda violation: seen.append(violation.details["limit"])
    grow = "import os; os.read(0, 1); held = bytearray(b'x') * (64 << 20)"
    with subprocess.Popen([sys.executable, "-c", grow], stdin=subprocess.PIPE) as child:
        leaf.write(cgroup.fd, "cgroup.procs", str(child.pid))
        run = watch.begin()
        assert child.stdin is not None
        child.stdin.close()
        end = time.monotonic() + 10 * harness.PATIENCE
        while "memory pressure" not in seen and time.monotonic() < end:
            loop.run_once(0.1)
        child.kill()
    watch.end(run)
    watch.close()
    loop.close()
    assert "memory pressure" in seen


def test_a_limit_may_be_none() -> None:
    limit = Limit("memory.max")
    assert [limit.sanitize_get("max"), limit.sanitize_get("4096")] == [None, 4096]
    assert [limit.sanitize_set(None), limit.sanitize_set(4096)] == ["max", "4096"]


def test_ancestors_stay_in_the_tree() -> None:
    assert place.ancestors("/t", "/a/b") == ["/t/a/b", "/t/a", "/t"]
    assert place.ancestors("/t", "/../x") == ["/t/x", "/t"]
    assert place.ancestors("/t", "/") == ["/t"]


@limited
def test_too_little_memory_says_how_much_is_needed(level: IsolationLevel) -> None:
    """The least that may be asked for is enough to start Python; what a plugin then needs is its own."""
    assert harness.call(level, plugins.give_back, 1, limits={"max_memory_mb": 8.0}) == 1
    with pytest.raises((ResourceLimitExceededError, PluginExecutionError)):
        harness.call(level, heap, limits={"max_memory_mb": 8.0})
