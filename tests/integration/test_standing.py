"""What stands ready for the next caller: it is as good as a new one, used once, bounded, and gone when nobody needs it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox import (
    EnhancedPluginSandbox,
    IsolationConfig,
    IsolationLevel,
    PluginExecutionError,
    PluginLimitsV2,
    PluginPermissionsV2,
    ResourceError,
    SandboxExecutor,
)
from sandbox.engine import client, immortal, service
from sandbox.sandbox import compiled

from . import harness


@pytest.fixture(autouse=True)
def standing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PSIE_STANDING", "1")
    yield
    service.shut_down()


def ready() -> list[service.Worker]:
    return [worker for stock in service.service().stocks.values() for worker in stock.ready if worker.stands]


def open_one(level: IsolationLevel, **settings: Any) -> EnhancedPluginSandbox:
    return harness.open_sandbox(level, **settings)


async def use_one(level: IsolationLevel, **settings: Any) -> int:
    """Use a sandbox, and wait until the next one stands; returns the pid of the zygote."""
    async with open_one(level, **settings) as sandbox:
        assert await sandbox.execute_plugin_safe(int, "42") == 42
    await harness.wait_for(ready)
    return ready()[0].sandbox.zygote.pid


def test_the_next_one_is_ready_and_used_once(level: IsolationLevel) -> None:
    async def main() -> None:
        await use_one(level)
        first = ready()[0]
        async with open_one(level) as sandbox:
            assert sandbox._sandbox is first.sandbox
            assert {each.state for each in sandbox.protections} <= {"enforced", "substituted", "missing"}
            assert any("seen: " in each.detail for each in sandbox.protections)
            assert await sandbox.execute_plugin_safe(os.listdir, ".") == []
            assert await sandbox.execute_plugin_safe(_leave_a_file) == ["left"]
        await harness.wait_for(ready)
        assert ready()[0].sandbox is not first.sandbox
        async with open_one(level) as sandbox:
            assert await sandbox.execute_plugin_safe(os.listdir, ".") == []

    asyncio.run(main())


def _leave_a_file() -> list[str]:
    with open("left", "w"):
        return os.listdir(".")


def test_in_a_rush_two_are_made_beside_the_calls(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than that; each is used once."""
    monkeypatch.setattr(service, "REFILL_SECONDS", service.REFILL_SECONDS * 5 * harness.PATIENCE)

    async def main() -> None:
        used = set()
        for _ in range(6):
            async with open_one(level) as sandbox:
                assert sandbox._sandbox is not None
                used.add(sandbox._sandbox.name)
                assert await sandbox.execute_plugin_safe(os.listdir, ".") == []
        assert len(used) == 6
        await harness.wait_for(lambda: len(ready()) == service.RUSH_READY)
        await asyncio.sleep(service.REFILL_SECONDS)
        assert len(ready()) == service.RUSH_READY
        async with open_one(level) as sandbox:
            assert await sandbox.execute_plugin_safe(int, "1") == 1
        await asyncio.sleep(service.REFILL_SECONDS)
        assert len(ready()) == 1  # no rush any more

    asyncio.run(main())


def test_other_settings_do_not_get_it(level: IsolationLevel) -> None:
    async def main() -> None:
        await use_one(level)
        first = ready()[0]
        async with open_one(level, limits={"max_open_files": 30}) as sandbox:
            assert sandbox._sandbox is not first.sandbox

    asyncio.run(main())


@pytest.mark.parametrize("victim", ["warden", "zygote"])
def test_one_that_has_died_is_not_given_away(level: IsolationLevel, victim: str) -> None:
    async def main() -> None:
        zygote = await use_one(level)
        worker = ready()[0]
        wardens = harness.roles(os.getpid())["warden"]
        os.kill(zygote if victim == "zygote" else wardens[0], signal.SIGKILL)
        await harness.wait_for(lambda: worker.sandbox.is_gone)
        async with open_one(level) as sandbox:
            assert sandbox._sandbox is not worker.sandbox
            assert await sandbox.execute_plugin_safe(int, "1") == 1

    asyncio.run(main())


def test_one_is_not_given_to_who_was_told_of_its_zygotes_death(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told to one sandbox after the other, and the first one's caller opens a new one at once."""

    async def main() -> None:
        async with open_one(level) as sandbox:
            await harness.wait_for(ready)
            clean_up = client.Sandbox.clean_up

            def slowly(dead: client.Sandbox) -> None:
                time.sleep(0.2)
                clean_up(dead)

            monkeypatch.setattr(client.Sandbox, "clean_up", slowly)
            os.kill(harness.zygote_of(sandbox), signal.SIGKILL)
            with pytest.raises(ResourceError, match="zygote has died"):
                await sandbox.execute_plugin_safe(time.sleep, 20)
            async with open_one(level) as another:
                assert await another.execute_plugin_safe(int, "1") == 1

    asyncio.run(main())


def test_one_that_dies_as_it_is_made_does_not_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever needs its room would wait for ever for the end of what has gone."""
    settings = PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig()
    make = service.Service._new

    def make_and_die(running: service.Service, *args: Any) -> service.Worker:
        worker = make(running, *args)
        zygote = worker.sandbox.zygote
        os.kill(zygote.pid, signal.SIGKILL)
        assert harness.wait_until(zygote.has_ended)
        zygote.catch_up()
        assert worker.sandbox.is_gone
        return worker

    async def main() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(service.Service, "_new", make_and_die)
            assert await EnhancedPluginSandbox.prewarm(1, *settings) == 0
        assert service.status()["ready"] == 0
        assert await EnhancedPluginSandbox.prewarm(1, *settings) == 1

    asyncio.run(main())


@pytest.mark.usefixtures("own_ledger")
def test_it_gives_way_at_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standing ready for one caller must not refuse another one."""
    fields = {"limits": {"max_memory_mb": 64.0}}

    async def main() -> None:
        await use_one(IsolationLevel.STANDARD, **fields)
        monkeypatch.setenv("PSIE_MAX_MEMORY_MB", "100")
        async with open_one(IsolationLevel.STRICT, **fields) as sandbox:
            assert await sandbox.execute_plugin_safe(int, "1") == 1
            with pytest.raises(ResourceError, match="PSIE_MAX_MEMORY_MB"):
                async with open_one(IsolationLevel.STANDARD, **fields):
                    pass

    asyncio.run(main())


def test_it_gives_way_where_descriptors_are_short() -> None:
    settings = PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig()

    async def main() -> None:
        assert await EnhancedPluginSandbox.prewarm(8, *settings) == 8
        for count in range(12):
            sandbox = open_one(IsolationLevel.STANDARD, limits={"max_open_files": 30 + count})
            compiled(sandbox.config, sandbox.limits, sandbox.permissions)
            with harness.descriptors_left(count):
                async with sandbox:
                    assert await sandbox.execute_plugin_safe(int, "1") == 1
            await EnhancedPluginSandbox.prewarm(8, *settings)

    asyncio.run(main())


def test_it_goes_when_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "IDLE_SECONDS", 0.4 * harness.PATIENCE)

    async def main() -> None:
        zygote = await use_one(IsolationLevel.MAXIMUM)
        await harness.wait_for(lambda: not os.path.exists(f"/proc/{zygote}"))
        assert not service.service().stocks

    asyncio.run(main())


def test_none_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIE_STANDING", "0")
    asyncio.run(_one_call())
    end = time.monotonic() + 3 * service.REFILL_SECONDS
    assert not harness.wait_until(
        lambda: any(stock.ready for stock in service.service().stocks.values()), end - time.monotonic()
    )


async def _one_call() -> None:
    async with open_one(IsolationLevel.STRICT) as sandbox:
        with pytest.raises(PluginExecutionError, match="ValueError"):
            await sandbox.execute_plugin_safe(int, "x")


# -- as many as are wanted -----------------------------------------------------------------------------------------------


@pytest.mark.rootless
def test_so_many_stand_as_are_asked_for(level: IsolationLevel) -> None:
    """And are all used, by those who ask for them at once."""
    settings = PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(level=level)

    async def use(_: int) -> str:
        async with EnhancedPluginSandbox(*settings) as sandbox:
            assert sandbox._sandbox is not None
            assert await sandbox.execute_plugin_safe(int, "42") == 42
            return sandbox._sandbox.name

    async def main() -> None:
        assert await EnhancedPluginSandbox.prewarm(5, *settings) == 5
        names = {worker.sandbox.name for worker in ready()}
        assert len(names) == 5
        assert set(await asyncio.gather(*map(use, range(5)))) == names
        await harness.wait_for(lambda: len(ready()) >= 5)  # as long as they are used
        with pytest.raises(ValueError, match="count is 0"):
            await EnhancedPluginSandbox.prewarm(0, *settings)

    asyncio.run(main())


@pytest.mark.rootless
@pytest.mark.parametrize("what", ["none stand", "a bound", "twice", "taken", "killed", "shut down"])
def test_whoever_asks_is_told_whatever_comes_between(monkeypatch: pytest.MonkeyPatch, own_ledger: None, what: str) -> None:
    settings = PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig()
    if what == "none stand":
        monkeypatch.setenv("PSIE_STANDING", "0")
    if what == "a bound":
        monkeypatch.setenv("PSIE_MAX_SANDBOXES", "4")
    told = {"none stand": [0], "a bound": [4], "twice": [5, 5]}

    async def take() -> None:
        async with EnhancedPluginSandbox(*settings) as sandbox:
            assert await sandbox.execute_plugin_safe(int, "42") == 42

    async def main() -> None:
        asked = [asyncio.create_task(EnhancedPluginSandbox.prewarm(5, *settings)) for _ in range(2 if what == "twice" else 1)]
        if what == "taken":
            await asyncio.gather(*(take() for _ in range(8)))
        elif what == "killed":
            await harness.wait_for(ready)
            zygote = ready()[0].sandbox.zygote
            os.kill(zygote.pid, signal.SIGKILL)
            await harness.wait_for(lambda: zygote.closed)  # else it may be asked for one more
        elif what == "shut down":
            await harness.wait_for(lambda: service.service().stocks)
            await asyncio.to_thread(service.shut_down)
        async with asyncio.timeout(harness.SETTLE):
            numbers = await asyncio.gather(*asked)
        assert numbers == told.get(what, numbers)
        assert max(numbers) <= 5
        if what == "killed":
            await take()

    asyncio.run(main())


def test_as_many_stand_as_were_in_use_at_once(level: IsolationLevel) -> None:
    async def use() -> None:
        async with open_one(level) as sandbox:
            await sandbox.execute_plugin_safe(time.sleep, 0.2)

    async def main() -> None:
        await use()
        await harness.wait_for(lambda: len(ready()) == 1)
        await asyncio.gather(*(use() for _ in range(4)))
        await harness.wait_for(lambda: len(ready()) == 4)
        await asyncio.sleep(0.3)
        assert len(ready()) == 4

    asyncio.run(main())


def test_no_more_stand_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch, own_ledger: None) -> None:
    """A part of what sandboxes may claim; what was asked for is bounded by all of it."""
    monkeypatch.setenv("PSIE_MAX_MEMORY_MB", "1100")
    settings = PluginLimitsV2(max_memory_mb=128), PluginPermissionsV2(), IsolationConfig()

    async def use() -> None:
        async with EnhancedPluginSandbox(*settings) as sandbox:
            await sandbox.execute_plugin_safe(time.sleep, 0.2)

    async def main() -> None:
        await asyncio.gather(*(use() for _ in range(6)))
        await harness.wait_for(lambda: len(ready()) == 2)
        await asyncio.sleep(0.3)
        assert len(ready()) == 2
        assert await EnhancedPluginSandbox.prewarm(50, *settings) == 8
        async with EnhancedPluginSandbox(PluginLimitsV2(max_memory_mb=512), *settings[1:]) as other:  # they make way
            assert await other.execute_plugin_safe(int, "1") == 1

    asyncio.run(main())


def test_what_has_stood_for_too_long_is_given_to_nobody(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        await use_one(level)
        old = ready()[0]
        monkeypatch.setattr(service, "AGE_SECONDS", 0.0)
        async with open_one(level) as sandbox:
            assert sandbox._sandbox is not old.sandbox
        await harness.wait_for(lambda: old.sandbox.is_gone)

    asyncio.run(main())


def test_an_executor_can_be_warmed_up(level: IsolationLevel) -> None:
    with SandboxExecutor(3, level=level) as executor:
        assert executor.prewarm() == 3
        assert list(executor.map(abs, [-1, -2, -3])) == [1, 2, 3]


later = pytest.mark.skipif(not immortal.is_possible(), reason="before Python 3.12 nothing is immortal: make vm-test has it")


@later
def test_what_all_share_is_immortal_after_a_moment(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules, functions, code, classes and values that a zygote has; not what has a finalizer, nor what a plugin makes. The
    wardens that were there before serve no other sandbox, those after do."""
    monkeypatch.setenv("PSIE_STANDING", "0")

    async def use() -> tuple[list[bool], list[int]]:
        async with open_one(level) as sandbox:
            wardens = harness.roles(os.getpid())["warden"]
            return await sandbox.execute_plugin_safe(_whether_immortal), wardens

    async def main() -> None:
        await harness.settle(level)
        immortals, wardens = await use()
        assert immortals == [True] * 5 + [False] * 2
        assert await use() == (immortals, wardens)

    asyncio.run(main())


def _whether_immortal() -> list[bool]:
    import gc
    import sys
    import traceback  # which every zygote has

    gc.unfreeze()
    gc.collect()  # which copes with it
    function = traceback.print_exception
    each = traceback, function, function.__code__, traceback.TracebackException, os.environ
    return [sys.getrefcount(value) >= immortal.COUNTED for value in (*each, sys.stdout, object())]


OF_ALL_KINDS = """
import gc, sys
from sandbox.engine import immortal

class Own(type):
    def __getattribute__(cls, name): raise RuntimeError("not to be asked")

class Odd(metaclass=Own): pass

class Finalized:
    def __del__(self): print("finalized")

kept, odd, finalized = [[number] for number in range(20_000)] + [str(number) for number in range(20_000)], Odd(), Finalized()
gc.disable()
count = sum(1 for _ in immortal.steps(4000))
assert count >= 10, count
assert all(sys.getrefcount(each) >= immortal.COUNTED for each in (kept, kept[0], kept[-1], odd, Odd, Finalized))
assert sys.getrefcount(finalized) < immortal.COUNTED
del finalized
gc.enable(); gc.unfreeze(); gc.collect()
"""


@later
def test_all_is_immortal_but_what_has_a_finalizer_and_no_step_is_long() -> None:
    """A preloaded module may have anything. And Python ends as ever."""
    done = subprocess.run([sys.executable, "-c", OF_ALL_KINDS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "finalized\n", "")
