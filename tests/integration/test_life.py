"""The life of sandboxes: many of them, killed parts, bounds, ids, forks. Nothing grows, nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    EnhancedPluginSandbox,
    IsolationLevel,
    PluginExecutionError,
    ResourceError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxInitializationError,
    host,
    state,
)
from sandbox.cgroups import place
from sandbox.engine import channel, service, warden
from sandbox.ns import processes, userids

from . import harness, plugins, soak

rootless = pytest.mark.rootless
HERE = Path(__file__).parent


def run_script(name: str, *arguments: str) -> subprocess.Popen[str]:
    """One of the scripts beside this file, with the same interpreter and modules."""
    path = os.pathsep.join([str(harness.REPOSITORY), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, str(HERE / name), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# -- many --------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_500_calls_do_not_add_up(level: IsolationLevel) -> None:
    """125 a level: most in one sandbox, some each in a sandbox of its own."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            await sandbox.execute_plugin_safe(plugins.give_back, 0)
            await asyncio.sleep(0)
            with harness.nothing_left():
                for number in range(100):
                    assert await sandbox.execute_plugin_safe(plugins.give_back, number) == number
                await asyncio.sleep(0)  # what the loop has listened to it gives back in its next round
        with harness.nothing_left():
            for number in range(25):
                async with harness.open_sandbox(level) as fresh:
                    assert await fresh.execute_plugin_safe(plugins.give_back, number) == number

    asyncio.run(main())


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(60 * harness.PATIENCE)
def test_a_short_soak() -> None:
    """Mixed levels, hostile plugins among them, parts killed at random: see soak.py, which has longer ones."""
    run = soak.soak(400, 6, seed=7)
    assert run.wrong == []
    assert run.begun == 400
    assert run.outcomes["good"] > 300
    assert run.outcomes["hostile, stopped"] > 5


@rootless
def test_50_calls_at_once(level: IsolationLevel) -> None:
    async def one(number: int) -> int:
        async with harness.open_sandbox(level) as sandbox:
            value: int = await sandbox.execute_plugin_safe(plugins.give_back, number)
            return value

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            shared = [sandbox.execute_plugin_safe(plugins.give_back, number) for number in range(25)]
            assert await asyncio.gather(*shared, *map(one, range(25, 50))) == list(range(50))

    with harness.nothing_left():
        asyncio.run(main())


@rootless
@pytest.mark.parametrize("at", ["_open", "take", "touch", "_recording_opens"])
def test_who_is_interrupted_while_it_opens_waits_for_nothing_and_leaves_nothing(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's exception before the engine knows of it, or between a sandbox that stands ready and who has taken it."""
    ready = harness.open_sandbox(IsolationLevel.STRICT)

    def post(self: service.Service, callback: Callable[..., Any], *args: Any) -> None:
        if callback.__name__ == at:
            raise KeyboardInterrupt
        self.loop.post(callback, *args)

    def interrupted() -> float:
        if sys._getframe(1).f_code.co_name == "take":
            raise KeyboardInterrupt
        return time.monotonic()

    async def main() -> None:
        if at in ("take", "touch"):
            monkeypatch.setenv("PSIE_STANDING", "1")
            assert await EnhancedPluginSandbox.prewarm(1, ready.limits, ready.permissions, ready.config) == 1
        monkeypatch.setenv("PSIE_STANDING", "0")
        with monkeypatch.context() as patched:
            patched.setattr(service.Service, "post", post)
            if at == "take":
                patched.setattr(service, "monotonic", interrupted)
            await ready.__aenter__()

    service.shut_down()
    with harness.nothing_left():
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
        assert time.monotonic() - begun < 20 * harness.PATIENCE


@rootless
@pytest.mark.parametrize("has_session", [False, True], ids=["sandbox", "session"])
def test_a_coroutine_that_is_thrown_away_after_its_loop_closes_its_sandbox(has_session: bool) -> None:
    """As where something ends the loop, and nobody ends its tasks."""
    sandbox = harness.open_sandbox(IsolationLevel.STRICT)

    async def use() -> None:
        async with sandbox, sandbox.session() if has_session else contextlib.nullcontext():
            stands.set_result(None)
            await asyncio.sleep(3600)

    loop = asyncio.new_event_loop()
    stands = loop.create_future()
    work = use()
    task: Any = loop.create_task(work)
    loop.run_until_complete(stands)
    loop.close()
    work.close()
    task._log_destroy_pending = False
    opened = sandbox._sandbox
    assert opened is not None
    assert harness.wait_until(lambda: opened.is_gone)


@rootless
def test_more_sandboxes_than_the_first_ones_limit_of_descriptors() -> None:
    """A caller that raises its own limit has a zygote from before, which is not to die of the next sandbox with all others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 40

    async def main() -> None:
        async with contextlib.AsyncExitStack() as open_ones:
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
            try:
                first = await open_ones.enter_async_context(harness.open_sandbox(IsolationLevel.STRICT))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for _ in range(few // 3):
                await open_ones.enter_async_context(harness.open_sandbox(IsolationLevel.STRICT, limits={"max_memory_mb": 30.0}))
            assert await first.execute_plugin_safe(plugins.give_back, 1) == 1

    service.shut_down()
    asyncio.run(main())


def test_a_warden_has_nothing_of_other_sandboxes(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch, as_root: None) -> None:
    """It begins with all descriptors of the zygote, which has a few of each sandbox."""

    def held(pid: int) -> list[str]:
        return [os.path.basename(os.readlink(entry.path)) for entry in os.scandir(f"/proc/{pid}/fd")]

    def alike() -> bool:
        found = harness.roles(os.getpid())
        each = [held(pid) for pid in (*found["warden"], *found["idle"])]
        at_work = [names for names in each if "locks" in names]
        idle = [names for names in each if "locks" not in names]
        return len(at_work) == 8 and len({(len(n), n.count("locks")) for n in at_work}) == len({len(n) for n in idle}) == 1

    monkeypatch.setenv("PSIE_STANDING", "0")

    async def main() -> None:
        async with contextlib.AsyncExitStack() as open_ones:
            for _ in range(8):
                await open_ones.enter_async_context(harness.open_sandbox(level))
            await harness.wait_for(alike)

    service.shut_down()
    asyncio.run(main())


@pytest.mark.long
@rootless
def test_wardens_that_are_killed_as_soon_as_they_are_there(level: IsolationLevel) -> None:
    """A new one shares its zygote's descriptors for a moment: neither it nor the zygote may be left hanging."""
    zygotes: set[int] = set()

    def kill() -> None:
        while not done.is_set():
            for zygote in zygotes:
                for pid in processes.children(zygote):
                    if not processes.children(pid):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)

    async def main() -> None:
        async with harness.open_sandbox(level) as first:
            zygotes.add(harness.zygote_of(first))
            killer = threading.Thread(target=kill)
            killer.start()
            try:
                for _ in range(20):
                    with contextlib.suppress(ResourceError, SandboxInitializationError):
                        async with asyncio.timeout(harness.SETTLE), harness.open_sandbox(level):
                            pass
            finally:
                done.set()
                killer.join()
        with contextlib.suppress(ResourceError):  # it may be given the one that was killed last
            async with asyncio.timeout(harness.SETTLE), harness.open_sandbox(level):
                pass
        for number in range(3):
            async with asyncio.timeout(harness.SETTLE), harness.open_sandbox(level) as sandbox:
                assert await sandbox.execute_plugin_safe(plugins.give_back, number) == number

    done = threading.Event()
    with harness.nothing_left():
        asyncio.run(main())


# -- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    os.environ.get("PSIE_TEST_CLOCK") != "set", reason="it sets the host's clock: make vm-test lets it, as root"
)
@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_changes_nothing(level: IsolationLevel, hours: int) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, limits={"max_execution_time_seconds": 20.0}) as sandbox:
            task = asyncio.create_task(sandbox.execute_plugin_safe(plugins.signal_and_sleep, "started", 1.0))
            await harness.wait_for((sandbox.temp_directory / "started").exists)
            with moved_clock(hours * 3600):
                await task
            telemetry = sandbox.get_telemetry()
            assert telemetry.end_time is not None
            assert 1.0 <= (telemetry.end_time - telemetry.start_time).total_seconds() < 30
            assert all(0 <= sample["elapsed_seconds"] < 30 for sample in telemetry.resource_samples)
        async with harness.open_sandbox(level, limits={"max_execution_time_seconds": 2.0}) as sandbox:
            start = time.monotonic()
            task = asyncio.create_task(sandbox.execute_plugin_safe(plugins.signal_and_sleep))
            await harness.wait_for((sandbox.temp_directory / "started").exists)
            with moved_clock(hours * 3600), pytest.raises(ResourceLimitExceededError) as caught:
                await task
            assert caught.value.limit == "time"
            assert 1.9 <= time.monotonic() - start < 2 + harness.SOON

    asyncio.run(main())


@contextlib.contextmanager
def moved_clock(seconds: float) -> Iterator[None]:
    """The host's wall clock, set `seconds` ahead; back again afterwards."""
    offset = time.time() - time.monotonic()
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)
    try:
        yield
    finally:
        time.clock_settime(time.CLOCK_REALTIME, time.monotonic() + offset)


# -- killed ------------------------------------------------------------------------------------------------------------


def gone(token: str) -> bool:
    return not harness.engine_processes(token)


@rootless
def test_a_killed_caller_leaves_nothing_after_a_second(level: IsolationLevel) -> None:
    with harness.nothing_left():
        caller = run_script("caller.py", level.value, "20")
        with caller:
            assert caller.stdout is not None
            token = caller.stdout.readline().strip()
            if not token:
                caller.wait()
                assert caller.stderr is not None
                pytest.fail(caller.stderr.read())
            found = harness.roles(caller.pid, token)
            caller.kill()
        left = {role: len(pids) for role, pids in found.items()}
        assert left == {"zygote": 1, "warden": 1, "idle": 1, "supervisor": 0, "init": 20, "worker": 20, "other": 0}
        assert harness.wait_until(lambda: gone(token), harness.SOON), f"{harness.engine_processes(token)} after a second"


@rootless
def test_a_killed_caller_leaves_nothing_of_what_it_had_asked_for(level: IsolationLevel) -> None:
    """A zygote that was slow hears of sandboxes after their caller has gone: what was made for them goes, too."""
    with harness.nothing_left():
        with run_script("asking_caller.py", level.value, "5") as caller:
            assert caller.stdout is not None
            token, _, made = caller.stdout.readline().partition(" ")
            caller.kill()
        assert token
        assert int(made) == (5 if level is IsolationLevel.MINIMAL or host.facts().cgroup_kind in ("root", "delegated") else 0)
        assert harness.wait_until(lambda: gone(token)), harness.engine_processes(token)


def stale_places(number: int) -> list[Path]:
    """A cgroup and a workspace folder as they stay when a caller and its zygote are killed together."""
    facts = host.facts()
    name = userids.name_of(number)
    places = [Path(state.folder("lib"), "work", name)]
    if facts.cgroup_kind in ("root", "delegated"):
        places.append(Path(facts.cgroup_folder, place.FOLDER, name))
    for each in places:
        each.mkdir(parents=True)
    (places[0] / "files").mkdir()
    (places[0] / "files" / "link").symlink_to("/etc")
    return places


@rootless
@pytest.mark.alone
@pytest.mark.parametrize("way", ["gc", "open"])
def test_what_dead_sandboxes_left_is_swept(way: str) -> None:
    """By `psie gc`, and by the first sandbox of a process. What belongs to a living sandbox stays."""
    places = stale_places(userids.SLOTS - (1 if way == "gc" else 2))
    others = [each.with_name(f"1-{way}-{userids.SLOTS - 1}") for each in places]  # of a sandbox that our ledger knows not
    for each in others:
        each.mkdir()

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.MINIMAL) as sandbox:
            if way == "gc":
                done = subprocess.run([sys.executable, "-m", "sandbox.cli", "gc"], capture_output=True, text=True, check=True)
                assert "removed" in done.stdout
            assert not [each for each in places if each.exists()]
            assert all(each.exists() for each in others)
            assert sandbox.temp_directory.is_dir()
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1

    service.shut_down()
    asyncio.run(main())
    for each in others:
        each.rmdir()


def test_who_has_got_the_number_of_a_worker_is_left_alone() -> None:
    """One that has ended as soon as it stood: its number may be another process's when the warden looks."""
    here, there = channel.pair()
    init, other = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    one = warden.Warden.__new__(warden.Warden)
    one.recipe, one.own_namespaces, one.hub = {"namespaces": []}, {}, there
    try:
        call = warden.Call(1, init.pid, os.pidfd_open(init.pid), there)
        one.sealed(call, {}, other.pid)
        os.close(call.pidfd)
        assert init.wait(harness.SETTLE) == -signal.SIGKILL
        kind, fields = channel.unpack(here.recv(channel.MESSAGE))
        assert (kind, fields["line"]) == ("failed", "call: read-back of the protections")
        time.sleep(0.05)
        assert other.poll() is None
    finally:
        here.close()
        there.close()
        for process in (init, other):
            process.kill()
            process.wait()


# What dies below a caller, what the call then ends with, and what its text names: see sandbox.engine.zygote.
KILLED: dict[str, tuple[type[SandboxException], str]] = {
    "zygote": (ResourceError, "zygote has died"),
    "warden": (ResourceError, "warden has died"),
    "supervisor": (ResourceError, "supervisor has died"),
    "init": (PluginExecutionError, "killed by SIGKILL"),
    "worker": (PluginExecutionError, "killed by SIGKILL"),
}


@rootless
@pytest.mark.parametrize("victim", KILLED)
def test_a_killed_part_ends_the_call(level: IsolationLevel, victim: str) -> None:
    error, text = KILLED[victim]

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            plugin = plugins.be_refused_and_sleep if victim == "supervisor" else plugins.signal_and_sleep
            task = asyncio.create_task(sandbox.execute_plugin_safe(plugin))
            await harness.wait_for((sandbox.temp_directory / "started").exists)
            (pid,) = harness.roles(os.getpid())[victim] if victim != "zygote" else [harness.zygote_of(sandbox)]
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(harness.SETTLE):
                with pytest.raises(error, match=text):
                    await task
            await harness.wait_for(lambda: not harness.roles(os.getpid())["worker"])
            if victim in ("init", "worker"):
                assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
            else:
                with pytest.raises((ResourceError, RuntimeError)):
                    await sandbox.execute_plugin_safe(plugins.give_back, 1)
        assert sandbox.get_telemetry().cleanup_successful

    with harness.nothing_left():
        asyncio.run(main())
    assert harness.call(level, plugins.give_back, 2) == 2  # a new one is not hurt


def test_calls_that_end_together_have_an_error_of_their_own_each(level: IsolationLevel) -> None:
    """A traceback that all of them add to would be as long as there are calls, and keep what they work with."""

    async def main() -> list[BaseException | None]:
        async with harness.open_sandbox(level) as sandbox:
            calls = [asyncio.create_task(sandbox.execute_plugin_safe(time.sleep, 20)) for _ in range(20)]
            await harness.wait_for(lambda: sandbox._running == 20)
            os.kill(harness.zygote_of(sandbox), signal.SIGKILL)
            await asyncio.wait(calls)
            return [call.exception() for call in calls]

    errors = asyncio.run(main())
    assert {type(error) for error in errors} == {ResourceError}
    assert {str(error) for error in errors} == {"the zygote has died: its sandboxes are gone; open new ones"}
    assert len({id(error) for error in errors}) == len(errors)
    assert all(error is not None and len(traceback.extract_tb(error.__traceback__)) < 10 for error in errors)


def test_workers_that_come_up_as_their_warden_is_killed_tell_the_caller_nothing(
    level: IsolationLevel, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main(delay: float) -> None:
        async with harness.open_sandbox(level) as sandbox:
            calls = [asyncio.create_task(sandbox.execute_plugin_safe(plugins.give_back, number)) for number in range(40)]
            await asyncio.sleep(delay)
            for pid in harness.roles(os.getpid())["warden"]:
                os.kill(pid, signal.SIGKILL)
            await asyncio.wait(calls)
            for call in calls:
                call.exception()

    for delay in (0.005, 0.01, 0.02, 0.03, 0.04):
        asyncio.run(main(delay))
    assert "Traceback" not in capfd.readouterr().err


@rootless
@pytest.mark.parametrize("victim", ["zygote", "warden"])
def test_a_killed_part_between_calls(level: IsolationLevel, victim: str) -> None:
    async def main() -> None:
        await harness.settle(level)
        async with harness.open_sandbox(level) as sandbox:
            await sandbox.execute_plugin_safe(plugins.give_back, 1)
            await sandbox._ends()  # its value comes earlier
            victims = [harness.zygote_of(sandbox)] if victim == "zygote" else harness.roles(os.getpid())["idle"]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(harness.SETTLE):
                with pytest.raises((ResourceError, RuntimeError)):
                    await sandbox.execute_plugin_safe(plugins.give_back, 2)
            # One that is still dying could be given to the next test's sandbox.
            await harness.wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in victims))

    asyncio.run(main())


@rootless
def test_a_supervisor_is_started_by_the_first_refusal(level: IsolationLevel) -> None:
    async def started(sandbox: EnhancedPluginSandbox, plugin: Callable[[], None]) -> int:
        task = asyncio.create_task(sandbox.execute_plugin_safe(plugin))
        await harness.wait_for((sandbox.temp_directory / "started").exists)
        count = len(harness.roles(os.getpid())["supervisor"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        (sandbox.temp_directory / "started").unlink()
        return count

    async def main() -> None:
        async with harness.open_sandbox(level, config={"enable_real_time_monitoring": False}) as sandbox:
            assert await started(sandbox, plugins.signal_and_sleep) == 0
            assert not sandbox.get_violations()
            assert await started(sandbox, plugins.be_refused_and_sleep) == 1
            assert await started(sandbox, plugins.be_refused_and_sleep) == 1  # one serves all calls
            assert [violation.details["syscall"] for violation in sandbox.get_violations()] == ["chroot", "chroot"]

    asyncio.run(main())


# -- bounds ------------------------------------------------------------------------------------------------------------


@rootless
def test_the_bound_on_memory(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIE_MAX_MEMORY_MB", "100")
    with pytest.raises(ResourceError, match=r"128 MB of 100 MB.*PSIE_MAX_MEMORY_MB"):
        harness.call(level, plugins.give_back, 1)


@rootless
def test_the_bound_on_sandboxes(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may hold places as well; of ours, at most one can be had when one is allowed."""
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "1")

    async def main() -> list[BaseException | None]:
        boxes = [harness.open_sandbox(level) for _ in range(3)]
        ends = await asyncio.gather(*(box.__aenter__() for box in boxes), return_exceptions=True)
        await asyncio.gather(*(box.cleanup_sandbox() for box in boxes))
        return [end if isinstance(end, BaseException) else None for end in ends]

    errors = [error for error in asyncio.run(main()) if error is not None]
    assert len(errors) >= 2
    for error in errors:
        assert isinstance(error, ResourceError)
        assert "PSIE_MAX_SANDBOXES" in str(error)


@rootless
def test_a_bound_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "many")
    with pytest.raises(ResourceError, match="PSIE_MAX_SANDBOXES is 'many'"):
        harness.call(IsolationLevel.STANDARD, plugins.give_back, 1)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[userids.Slot]]:
    """A ledger of our own; the slots put into the list are released at the end."""
    monkeypatch.setattr(state, "folder", lambda kind: str(tmp_path))
    slots: list[userids.Slot] = []
    yield slots
    for slot in slots:
        slot.release()


MB = 1 << 20


def test_the_ledger_counts_the_living(ledger: list[userids.Slot], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "3")
    ledger += [userids.claim(MB, 100 * MB) for _ in range(3)]
    assert [slot.number for slot in ledger] == [1, 2, 3]
    with pytest.raises(ResourceError, match="3 sandboxes"):
        userids.claim(MB, 100 * MB)
    ledger[1].release()
    ledger.append(userids.claim(MB, 100 * MB))
    assert ledger[-1].number == 2


MAKING_ROOM = """
import asyncio
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2

def settings(level):
    return PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(level=level)

async def use():
    async with EnhancedPluginSandbox(*settings(IsolationLevel.MAXIMUM)) as sandbox:
        return await sandbox.execute_plugin_safe(abs, -1)

async def main():
    standing = await EnhancedPluginSandbox.prewarm(2, *settings(IsolationLevel.STRICT))
    print(standing, *await asyncio.gather(use(), use(), return_exceptions=True))

asyncio.run(main())
"""


def in_a_ledger_of_its_own(script: str, places: int, folder: Path) -> list[str]:
    """The words that a script prints which may have so many sandboxes."""
    environment = {**os.environ, "PSIE_MAX_SANDBOXES": str(places), "PSIE_STANDING": "1", "XDG_RUNTIME_DIR": str(folder)}
    line = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"] if os.getuid() == 0 else []
    command = [*line, sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def test_several_wait_for_the_room_that_is_being_made(tmp_path: Path) -> None:
    """What stands ready for others goes for the first of them; the second waits for that as well."""
    assert in_a_ledger_of_its_own(MAKING_ROOM, 2, tmp_path) == ["2", "1", "1"]


GIVING_UP = """
import asyncio, threading
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2
from sandbox.engine.service import service

def settings(level):
    return PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(level=level)

async def main():
    loop, asked, cancelled = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def hold(then):
        found = give_way(then)
        loop.call_soon_threadsafe(asked.set)
        cancelled.wait()  # else it may have come by then
        return found

    standing = await EnhancedPluginSandbox.prewarm(1, *settings(IsolationLevel.STRICT))
    give_way, service().give_way = service().give_way, hold
    opening = asyncio.create_task(EnhancedPluginSandbox(*settings(IsolationLevel.MAXIMUM)).__aenter__())
    await asked.wait()
    opening.cancel()
    await asyncio.sleep(0)
    cancelled.set()
    await asyncio.wait([opening])
    async with EnhancedPluginSandbox(*settings(IsolationLevel.STRICT)) as sandbox:
        print(standing, opening.cancelled(), await sandbox.execute_plugin_safe(abs, -1))

asyncio.run(main())
"""


def test_who_is_cancelled_while_room_is_made_takes_none(tmp_path: Path) -> None:
    assert in_a_ledger_of_its_own(GIVING_UP, 1, tmp_path) == ["1", "True", "1"]


FOLDERS = """
import asyncio, os, resource, sys, tempfile
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2

async def one(folder):
    permissions = PluginPermissionsV2(allowed_directories=[folder])
    async with EnhancedPluginSandbox(PluginLimitsV2(), permissions, IsolationConfig(level=IsolationLevel.STRICT)) as sandbox:
        return await sandbox.execute_plugin_safe(abs, -1)

async def main():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o755)
        for number in range(120):
            os.mkdir(f"{place}/{number}")
            assert await one(f"{place}/{number}") == 1

resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
asyncio.run(main())
print("all")
"""


@pytest.mark.long
def test_recipes_that_are_no_more_used_cost_a_zygote_no_descriptor() -> None:
    done = subprocess.run([sys.executable, "-c", FOLDERS], capture_output=True, text=True, timeout=110, check=False)
    assert done.stdout == "all\n", done.stderr[-2000:]


FEW = """
import asyncio, mmap, resource, sys
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, ResourceError
from sandbox.sandbox import compiled

settings = PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(level=IsolationLevel.STRICT)

async def one():
    async with EnhancedPluginSandbox(*settings) as sandbox:
        return await sandbox.execute_plugin_safe(abs, -1)

compiled(settings[2], settings[0], settings[1], ())
limit, hard = int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
try:
    print(asyncio.run(one()))
except ResourceError as error:
    print(type(error).__name__, "ulimit -n" in str(error), error)
except OSError as error:
    place = error.__traceback__.tb_next.tb_frame.f_code.co_filename
    print("asyncio's own" if error.errno == 24 and "asyncio" in place else repr(error))
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
"""


@pytest.mark.long
def test_without_descriptors_one_sentence_says_what_is_short() -> None:
    """At whichever step they run out: nothing else is thrown, and nothing believed of the host that is not so."""
    told = []
    for limit in range(6, 40):
        done = subprocess.run([sys.executable, "-c", FEW, str(limit)], capture_output=True, text=True, timeout=60, check=False)
        told.append((limit, done.stdout.strip(), done.stderr.strip()))
    odd = [each for each in told if each[1] not in ("1", "asyncio's own") and not each[1].startswith("ResourceError True")]
    assert not odd
    assert any(each[1].startswith("ResourceError") for each in told)


def test_a_caller_without_descriptors_says_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would say is stored, and believed by all that come after."""
    known, stored = host.facts(), []
    monkeypatch.setattr(state.Cache, "read", lambda *_: None)
    monkeypatch.setattr(state.Cache, "write", lambda *_: stored.append("facts"))
    monkeypatch.setattr("sandbox.sandbox._compiled", {})

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD):
            pass

    for count in range(8):
        with harness.descriptors_left(count):
            try:
                assert host.facts() == known
            except OSError as error:
                said = str(error)
                assert count < 6
            else:
                continue
        assert "Too many open files" in said
        assert not stored
    loop = asyncio.new_event_loop()
    with harness.descriptors_left(2), pytest.raises(ResourceError, match="raise the limit of open files"):
        loop.run_until_complete(main())
    loop.close()


def test_the_ledger_adds_up_memory(ledger: list[userids.Slot]) -> None:
    ledger += [userids.claim(40 * MB, 100 * MB) for _ in range(2)]
    with pytest.raises(ResourceError, match="claim 80 MB and this one wants 21 MB of 100 MB"):
        userids.claim(21 * MB, 100 * MB)
    ledger[0].release()
    ledger.append(userids.claim(60 * MB, 100 * MB))


def test_the_ledger_counts_beyond_a_lower_bound(ledger: list[userids.Slot], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a lower bound than the others' sees their sandboxes, and does not make them forgotten."""
    ledger += [userids.claim(10 * MB, 100 * MB) for _ in range(3)]
    ledger[0].release()
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "2")
    with pytest.raises(ResourceError, match="PSIE_MAX_SANDBOXES"):
        ledger.append(userids.claim(10 * MB, 100 * MB))
    monkeypatch.delenv("PSIE_MAX_SANDBOXES")
    ledger.append(userids.claim(80 * MB, 100 * MB))
    with pytest.raises(ResourceError, match="claim 100 MB"):
        ledger.append(userids.claim(10 * MB, 100 * MB))


def test_what_is_being_swept_is_nobody_elses(ledger: list[userids.Slot]) -> None:
    """Whoever removes a leftover holds its place, which may lie beyond all those that are in use: no sandbox is to have it as
    well, whose ids and leaf the next one would get."""
    ledger.append(userids.claim(MB, 100 * MB))
    swept = userids.hold(userids.name_of(2))
    assert swept is not None
    ledger += [swept, userids.claim(MB, 100 * MB)]
    swept.release()
    assert userids.hold(ledger[-1].name) is None, "it is alive"
    ledger.append(userids.claim(MB, 100 * MB))
    assert [ledger[number].number for number in (0, 2, 3)] == [1, 3, 2]


# -- ids ---------------------------------------------------------------------------------------------------------------


def given_away(path: str) -> list[range]:
    """The subordinate ids of a table: subuid(5)."""
    try:
        rows = [line.split(":") for line in Path(path).read_text().splitlines() if line.count(":") == 2]
    except FileNotFoundError:
        return []
    return [range(int(start), int(start) + int(length)) for _, start, length in rows]


@pytest.mark.usefixtures("as_root")
def test_host_ids_are_nobody_elses(level: IsolationLevel) -> None:
    async def main() -> set[int]:
        async with harness.open_sandbox(level) as a, harness.open_sandbox(level) as b:
            owners = []
            for box in (a, b):
                task = asyncio.create_task(box.execute_plugin_safe(plugins.signal_and_sleep))
                mark = box.temp_directory / "started"
                await harness.wait_for(mark.exists)
                owners.append(mark.stat().st_uid)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert mark.stat().st_gid == mark.stat().st_uid
            assert len(set(owners)) == 2
            return set(owners)

    for uid in asyncio.run(main()):
        assert uid > 65536
        assert not any(uid in taken for table in ("/etc/subuid", "/etc/subgid") for taken in given_away(table))


@pytest.mark.usefixtures("as_root")
def test_processes_have_the_ids_that_files_have(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as box:
            task = asyncio.create_task(box.execute_plugin_safe(plugins.signal_and_sleep))
            mark = box.temp_directory / "started"
            await harness.wait_for(mark.exists)
            (worker,) = harness.roles(os.getpid())["worker"]
            assert harness.all_processes()[worker].uid == mark.stat().st_uid != 0
            assert "Groups:\t \n" in Path(f"/proc/{worker}/status").read_text()
            task.cancel()

    asyncio.run(main())


# -- forks -------------------------------------------------------------------------------------------------------------


@rootless
def test_a_fork_cannot_use_the_parents_sandbox(level: IsolationLevel) -> None:
    with run_script("forker.py", level.value) as caller:
        out, err = caller.communicate(timeout=30 * harness.PATIENCE)
    said: dict[str, Any] = dict(line.split(": ", 1) for line in out.splitlines())
    assert said["inherited"].startswith("ResourceError this sandbox belongs to the process that opened it"), err
    assert (said["own"], said["parent"]) == ("3", "4"), err
    assert said["place"] == "free", "a fork keeps the place of a sandbox that has gone"


def test_facts_are_those_of_this_host() -> None:
    assert host.facts() == host.probe()
