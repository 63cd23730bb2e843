"""How long a sandbox lives, and how long psie waits for its own parts. Minutes pass at once, by a clock of these tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from sandbox import EnhancedPluginSandbox, IsolationLevel, ResourceError, ResourceLimitExceededError, SecurityViolationError
from sandbox.engine import channel, client, loop, service
from sandbox.engine.clock import FIRST_LOOK

from . import cli_harness, harness, hostile, plugins, stopped_caller
from .test_life import gone, run_script

rootless = pytest.mark.rootless

FORGED_NOTE = channel.NOTE.upper() + channel.pack(
    "refused", {"module": "json", "list": "blocked_modules", "file": "f", "line": "1"}
)
WAIT = 5  # watchdog_timeout_seconds
LIFETIME = "sandbox was open for its whole lifetime of 60 minutes"


class Clock:
    """The clock of the engine's thread, which can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead

    def put_forward(self, seconds: float) -> None:
        """At once; whoever has waited for a part of psie's meanwhile has been stopped himself."""
        self._served()  # what was begun before has been
        self.ahead += seconds
        self._served()
        self._served()  # the round in which it was woken may have begun before

    def wait_out(self, seconds: float) -> None:
        """In steps that leave nobody late."""
        for _ in range(int(seconds) + 2):
            self.put_forward(1.0)

    @staticmethod
    def _served() -> None:
        done: Future[None] = Future()
        service.service().post(done.set_result, None)
        done.result(harness.SETTLE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    fake = Clock()
    monkeypatch.setattr(loop, "monotonic", fake)
    monkeypatch.setattr(loop, "LATE", 4.0)  # more than a step of this clock takes
    yield fake
    assert harness.call(IsolationLevel.STANDARD, plugins.give_back, 2) == 2  # whatever happened, the next one works
    service.shut_down()  # what waits by that clock would wait for ever


def stands(pid: int) -> bool:
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(thread.read_text().rpartition(")")[2].split()[0] in "TZX" for thread in threads)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """SIGSTOP, and all threads of them stand; whoever has survived goes on afterwards, so that a test that fails leaves
    nothing."""
    fds = [os.pidfd_open(pid) for pid in pids]
    for fd in fds:
        signal.pidfd_send_signal(fd, signal.SIGSTOP)
    try:
        assert harness.wait_until(lambda: all(map(stands, pids)))
        yield
    finally:
        for fd in fds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGCONT)
            os.close(fd)


@contextlib.asynccontextmanager
async def running(
    sandbox: EnhancedPluginSandbox, plugin: Callable[[], None] = plugins.signal_and_sleep
) -> AsyncIterator[asyncio.Task[Any]]:
    """A call that goes on until something ends it."""
    task = asyncio.create_task(sandbox.execute_plugin_safe(plugin))
    await harness.wait_for((sandbox.temp_directory / "started").exists)
    yield task
    assert task.done()


async def ends_with(kind: type[Exception], text: str, call: Awaitable[Any]) -> Exception:
    async with asyncio.timeout(harness.SETTLE):
        with pytest.raises(kind, match=text) as caught:
            await call
    return caught.value


def all_gone() -> bool:
    found = harness.roles(os.getpid())
    return not any(found[role] for role in ("warden", "supervisor", "init", "worker"))


# -- lifetimes ---------------------------------------------------------------------------------------------------------


@rootless
def test_a_lifetime_ends(level: IsolationLevel, clock: Clock) -> None:
    """For the call that runs, for those that come, and for everything that the sandbox had; what is known of it stays."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            clock.put_forward(59 * 60)
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
            async with running(sandbox, plugins.be_refused_and_sleep) as task:
                clock.put_forward(61)
                error = await ends_with(ResourceLimitExceededError, LIFETIME, task)
            assert isinstance(error, ResourceLimitExceededError)
            assert (error.limit, error.allowed, error.used) == ("lifetime", 3600.0, 3600.0)
            await harness.wait_for(all_gone)
            for _ in range(2):
                await ends_with(ResourceLimitExceededError, LIFETIME, sandbox.execute_plugin_safe(plugins.give_back, 1))
            with pytest.raises(RuntimeError, match="not open"):
                _ = sandbox.temp_directory
            with pytest.raises(RuntimeError, match="not open"):
                sandbox.read_file("started")
            assert [violation.details["syscall"] for violation in sandbox.get_violations()] == ["chroot"]
            assert LIFETIME in sandbox.get_telemetry().exit_reason
        assert sandbox.get_telemetry().cleanup_successful

    asyncio.run(main())


def test_a_worker_that_stands_goes_with_it(level: IsolationLevel, clock: Clock) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, config={"max_sandbox_lifetime_minutes": 1}) as sandbox:
            assert len(harness.roles(os.getpid())["worker"]) == 1
            clock.put_forward(61)
            await harness.wait_for(all_gone)
            await ends_with(ResourceLimitExceededError, "of 1 minutes", sandbox.execute_plugin_safe(plugins.give_back, 1))

    asyncio.run(main())


@rootless
def test_changes_cannot_be_committed_after_it(level: IsolationLevel, clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "granted"
    folder.mkdir()

    async def main() -> None:
        async with harness.open_sandbox(level, permissions={"allowed_directories": [str(folder)]}) as sandbox:
            await sandbox.execute_plugin_safe(plugins.signal_and_sleep, str(folder / "made"), 0.0)
            clock.put_forward(3601)
            for attempt in (sandbox.commit_changes(), sandbox.discard_changes()):
                await ends_with(RuntimeError, "not open", attempt)
            with pytest.raises(RuntimeError, match="not open"):
                sandbox.changes()

    if level is IsolationLevel.MINIMAL:
        pytest.skip("level minimal writes directly")
    asyncio.run(main())
    assert os.listdir(folder) == []


@rootless
def test_a_caller_that_is_blocked_keeps_nothing(level: IsolationLevel, clock: Clock) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox, running(sandbox) as task:
            clock.put_forward(3601)
            assert harness.wait_until(all_gone)  # this blocks the event loop
            await ends_with(ResourceLimitExceededError, LIFETIME, task)

    asyncio.run(main())


def test_a_caller_whose_loop_is_gone_keeps_nothing(level: IsolationLevel, clock: Clock) -> None:
    async def main() -> EnhancedPluginSandbox:
        return await harness.open_sandbox(level).__aenter__()

    sandbox = asyncio.run(main())
    assert not all_gone()
    clock.put_forward(3601)
    assert harness.wait_until(all_gone)
    assert sandbox.get_violations() == []


@pytest.mark.parametrize("level", [IsolationLevel.STANDARD, IsolationLevel.MAXIMUM])
def test_a_caller_that_was_stopped_meets_it_at_once(level: IsolationLevel, tmp_path: Path) -> None:
    """Nothing that it does when it goes on comes before that."""
    folder = tmp_path / "granted"
    folder.mkdir()
    with run_script("stopped_caller.py", level.value, str(folder)) as caller:
        assert caller.stdout is not None
        token = caller.stdout.readline().strip()
        with stopped(caller.pid):
            (tmp_path / "go").touch()
            time.sleep(stopped_caller.LIFETIME)
        said, _ = caller.communicate(timeout=harness.SETTLE)
    commit, call = said.splitlines()
    assert commit.startswith("RuntimeError")
    assert "not open" in commit
    assert call.startswith("ResourceLimitExceededError the sandbox was open for its whole lifetime")
    assert os.listdir(folder) == []
    assert harness.wait_until(lambda: gone(token))


def test_it_begins_when_a_sandbox_is_used(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stood ready for long has lost nothing of it."""
    monkeypatch.setenv("PSIE_STANDING", "1")
    monkeypatch.setattr(service, "IDLE_SECONDS", 7200.0)

    def ready() -> list[service.Worker]:
        return [worker for stock in service.service().stocks.values() for worker in stock.ready if worker.stands]

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STRICT):
            pass
        clock.put_forward(service.REFILL_SECONDS)
        await harness.wait_for(ready)
        (worker,) = ready()
        clock.put_forward(3540)
        async with harness.open_sandbox(IsolationLevel.STRICT) as sandbox:
            assert sandbox._sandbox is worker.sandbox
            clock.put_forward(3540)
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
            clock.put_forward(61)
            await ends_with(ResourceLimitExceededError, LIFETIME, sandbox.execute_plugin_safe(plugins.give_back, 1))

    asyncio.run(main())


def test_what_stands_ready_goes_by_the_same_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIE_STANDING", "1")

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STRICT):
            pass
        clock.put_forward(service.REFILL_SECONDS)
        await harness.wait_for(lambda: service.status()["ready"] == 1)
        clock.put_forward(service.IDLE_SECONDS + service.REFILL_SECONDS)
        await harness.wait_for(lambda: service.status() == {"ready": 0, "recipes": 0, "zygotes": 0})
        assert all_gone()

    asyncio.run(main())


def test_a_call_may_have_a_year(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds that is more than poll(2) takes at once. Where the memory controller counts its memory, its warden wakes
    for nothing before that."""
    wire_form = client._wire_form
    monkeypatch.setattr(client, "_wire_form", lambda recipe: {**wire_form(recipe), "memory_sampled": None})
    year = 365.0 * 86400
    assert harness.call(level, lasts, limits={"max_execution_time_seconds": year})


def lasts() -> bool:
    """Beyond the warden's first look."""
    time.sleep(3 * FIRST_LOOK)
    return True


# -- parts that do not answer ------------------------------------------------------------------------------------------

CONFIG = {"watchdog_timeout_seconds": WAIT}
WARDEN = rf"warden did not answer for {WAIT} s \(watchdog_timeout_seconds\) when {{}}, and was killed: open a new sandbox"
ZYGOTE = rf"zygote did not answer for {WAIT} s \(watchdog_timeout_seconds\) when {{}}, and was killed: its sandboxes are gone"


@rootless
def test_a_stopped_warden_at_a_deadline(level: IsolationLevel, clock: Clock) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, config=CONFIG) as sandbox, running(sandbox) as task:
            with stopped(*harness.roles(os.getpid())["warden"]):
                clock.wait_out(30)
                assert not task.done()
                clock.wait_out(WAIT)
                await ends_with(ResourceError, WARDEN.format("a call was to end"), task)
                await harness.wait_for(all_gone)
            await ends_with(
                ResourceError, WARDEN.format("a call was to end"), sandbox.execute_plugin_safe(plugins.give_back, 1)
            )
        assert sandbox.get_telemetry().cleanup_successful

    asyncio.run(main())


def test_a_warden_is_told_to_end_a_call_once(level: IsolationLevel) -> None:
    """One that is slow, while the plugin gives thousands of reasons: its socket is not filled by that, it ends the call."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            flood = sandbox.execute_plugin_safe(hostile.flood_when_told, FORGED_NOTE)
            task = asyncio.create_task(flood)
            await harness.wait_for((sandbox.temp_directory / "started").exists)
            assert sandbox._sandbox is not None
            (call,) = sandbox._sandbox.calls.values()
            with stopped(*harness.roles(os.getpid())["warden"]):
                (sandbox.temp_directory / "go").touch()
                await harness.wait_for(lambda: call.refusals > client.REFUSALS + 1000)
            await ends_with(SecurityViolationError, "threshold", task)
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1

    asyncio.run(main())


def test_what_keeps_a_warden_from_being_told_is_named(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not gone, as its sandbox's caller was told; but what it did not hear cannot be left out."""
    instruct = channel.instruct

    def refused(sock: socket.socket, instruction: dict[str, object], fds: Sequence[int] = ()) -> None:
        if instruction.get("op") == "call":
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        instruct(sock, instruction, fds)

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
            monkeypatch.setattr(channel, "instruct", refused)
            told = r"warden could not be told what to do \(No buffer space available\): "
            await ends_with(ResourceError, told, sandbox.execute_plugin_safe(plugins.give_back, 1))

    asyncio.run(main())


def test_a_zygotes_number_may_be_another_childs() -> None:
    """Where something in this process waits for all children, ours is gone before we look."""
    assert harness.call(IsolationLevel.STANDARD, plugins.give_back, 2) == 2
    zygotes = list(service.service().zygotes.values())
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            for zygote in zygotes:
                zygote.pid = other.pid
            service.shut_down()
            assert harness.wait_until(lambda: all(zygote.pidfd < 0 for zygote in zygotes))
        finally:
            other.kill()
    assert harness.call(IsolationLevel.STANDARD, plugins.give_back, 2) == 2


def test_a_warden_that_is_told_more_than_its_socket_holds(level: IsolationLevel) -> None:
    """As of the end of a thousand calls at once: it is told the rest when it has read that, and calls begin after it."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox, running(sandbox) as task:
            assert sandbox._sandbox is not None
            (call,) = sandbox._sandbox.calls.values()
            with stopped(*harness.roles(os.getpid())["warden"]):
                for _ in range(1000):
                    service.service().post(call.signal, int(signal.SIGCONT))
                calls = [asyncio.create_task(sandbox.execute_plugin_safe(plugins.give_back, number)) for number in range(20)]
                task.cancel()
                await harness.wait_for(lambda: call.cause)
            async with asyncio.timeout(harness.SETTLE):
                assert await asyncio.gather(*calls) == list(range(20))
                await asyncio.wait([task])
            assert task.cancelled()

    asyncio.run(main())


def test_what_the_engine_had_no_time_for_is_not_done_later(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller has not waited for ever: nobody would close what is opened then."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            own = sandbox._sandbox
            assert own is not None
            assert sandbox.list_files() == []  # by now all has been done that is done at the opening
            opened: list[int] = []
            original = own.open_workspace

            def open_workspace() -> int:
                opened.append(original())
                return opened[-1]

            monkeypatch.setattr(own, "open_workspace", open_workspace)
            go_on = threading.Event()
            service.service().post(go_on.wait, harness.SETTLE)
            with monkeypatch.context() as patched:
                patched.setattr(client, "GRACE", 0.1)
                with pytest.raises(TimeoutError):
                    sandbox.list_files()
            go_on.set()
            assert sandbox.list_files() == []
            assert len(opened) == 1

    asyncio.run(main())


def test_a_stopped_warden_and_a_call_that_is_cancelled(level: IsolationLevel, clock: Clock) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, config=CONFIG) as sandbox, running(sandbox) as task:
            with stopped(*harness.roles(os.getpid())["warden"]):
                task.cancel()
                await asyncio.sleep(0.1)
                clock.wait_out(WAIT)
                async with asyncio.timeout(harness.SETTLE):
                    with pytest.raises(asyncio.CancelledError):
                        await task
                await harness.wait_for(all_gone)

    asyncio.run(main())


@rootless
def test_a_stopped_warden_while_it_is_closed(level: IsolationLevel, clock: Clock) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, config=CONFIG) as sandbox:
            with stopped(*harness.roles(os.getpid())["warden"]):
                closing = asyncio.create_task(sandbox.cleanup_sandbox())
                await asyncio.sleep(0.1)
                assert not closing.done()
                clock.wait_out(WAIT)
                async with asyncio.timeout(harness.SETTLE):
                    assert await closing
                await harness.wait_for(all_gone)

    asyncio.run(main())


def test_a_stopped_warden_when_a_lifetime_ends(level: IsolationLevel, clock: Clock) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, config=CONFIG) as sandbox:
            with stopped(*harness.roles(os.getpid())["warden"]):
                clock.put_forward(3600)
                clock.wait_out(WAIT)
                await harness.wait_for(all_gone)
            await ends_with(ResourceLimitExceededError, LIFETIME, sandbox.execute_plugin_safe(plugins.give_back, 1))

    asyncio.run(main())


def test_a_stopped_warden_and_granted_folders(level: IsolationLevel, clock: Clock, tmp_path: Path) -> None:
    """What was committed is committed; the next call is told why there is no sandbox any more."""
    folder = tmp_path / "granted"
    folder.mkdir()
    waits = WARDEN.format("granted folders were to be attached anew")

    async def main() -> None:
        await harness.settle(level)
        async with harness.open_sandbox(level, config=CONFIG, permissions={"allowed_directories": [str(folder)]}) as sandbox:
            await sandbox.execute_plugin_safe(plugins.signal_and_sleep, str(folder / "made"), 0.0)
            with stopped(*harness.roles(os.getpid())["idle"]):
                task = asyncio.create_task(sandbox.commit_changes())
                await harness.wait_for(lambda: os.listdir(folder) == ["made"])
                await asyncio.sleep(0.2)
                assert not task.done()
                clock.wait_out(WAIT)
                async with asyncio.timeout(harness.SETTLE):
                    assert [change.path for change in await task] == [str(folder / "made")]
            await ends_with(ResourceError, waits, sandbox.execute_plugin_safe(plugins.give_back, 1))

    if level is IsolationLevel.MINIMAL:
        pytest.skip("level minimal writes directly")
    asyncio.run(main())


@rootless
def test_stopped_wardens_when_one_is_to_stand(level: IsolationLevel, clock: Clock) -> None:
    """Those that were idle; they are killed one by one, and then there are new ones."""

    async def main() -> None:
        await harness.settle(level, config=CONFIG)
        async with harness.open_sandbox(level, config=CONFIG):
            pass
        await harness.wait_for(lambda: len(harness.roles(os.getpid())["idle"]) >= 1)
        victims = harness.roles(os.getpid())["idle"]
        with stopped(*victims):
            for _ in victims:
                opening = asyncio.create_task(harness.open_sandbox(level, config=CONFIG).__aenter__())
                await asyncio.sleep(0.1)
                clock.wait_out(WAIT)
                await ends_with(ResourceError, WARDEN.format("a worker was to stand"), opening)
            assert not any(Path(f"/proc/{pid}").exists() for pid in victims)

    service.shut_down()
    asyncio.run(main())


@rootless
def test_a_stopped_zygote_when_one_is_to_stand(level: IsolationLevel, clock: Clock) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            zygote = harness.zygote_of(sandbox)
        with stopped(zygote):
            opening = asyncio.create_task(harness.open_sandbox(level, config=CONFIG).__aenter__())
            await asyncio.sleep(0.1)
            clock.wait_out(WAIT)
            assert not opening.done()
            clock.wait_out(client.GRACE)
            await ends_with(ResourceError, ZYGOTE.format("a worker was to stand"), opening)
            await harness.wait_for(lambda: not Path(f"/proc/{zygote}").exists())

    asyncio.run(main())


@rootless
def test_a_stopped_zygote_while_a_sandbox_is_open(level: IsolationLevel, clock: Clock) -> None:
    """Calls do not need it, but the end does."""

    async def main() -> None:
        async with harness.open_sandbox(level, config=CONFIG) as sandbox:
            zygote = harness.zygote_of(sandbox)
            with stopped(zygote):
                assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
                closing = asyncio.create_task(sandbox.cleanup_sandbox())
                await asyncio.sleep(0.1)
                clock.wait_out(WAIT)
                clock.wait_out(client.GRACE)
                async with asyncio.timeout(harness.SETTLE):
                    assert await closing
                await harness.wait_for(lambda: not Path(f"/proc/{zygote}").exists())

    asyncio.run(main())


def test_a_stopped_zygote_that_is_let_go(clock: Clock) -> None:
    async def main() -> int:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            return harness.zygote_of(sandbox)

    service.shut_down()
    zygote = asyncio.run(main())
    with stopped(zygote):
        service.shut_down()
        clock.wait_out(client.GRACE)
        assert harness.wait_until(lambda: not Path(f"/proc/{zygote}").exists())


@rootless
def test_a_caller_that_is_stopped_as_soon_as_it_has_sent_a_job(level: IsolationLevel) -> None:
    """The kernel keeps the time: the caller need say nothing after that."""
    with run_script("stopped_sender.py", level.value) as caller:
        try:
            assert caller.stdout is not None
            token = caller.stdout.readline().strip()
            assert harness.wait_until(lambda: stands(caller.pid))
            assert harness.roles(caller.pid, token)["zygote"]
            assert harness.wait_until(lambda: not harness.roles(caller.pid, token)["worker"])
            assert stands(caller.pid)
        finally:
            os.kill(caller.pid, signal.SIGCONT)
        said, _ = caller.communicate(timeout=harness.SETTLE)
    assert said.splitlines()[-1] == "time"


@rootless
def test_no_job_is_sent_before_the_warden_has_its_clock(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a caller with so many calls that what it says has to wait: stopped at that moment it would leave one without end."""
    tell, hand_over = client.Sandbox._tell, client.Call._hand_over
    done: list[str] = []

    def full_once(self: client.Sandbox, instruction: dict[str, object], fds: Sequence[int] = ()) -> bool:
        if instruction["op"] != "clock":
            return tell(self, instruction, fds)
        done.append("clock")
        return len(done) > 1 and tell(self, instruction, fds)

    def noted(self: client.Call, *job: Any) -> None:
        done.append("job")
        hand_over(self, *job)

    monkeypatch.setenv("PSIE_STANDING", "0")
    monkeypatch.setattr(client.Sandbox, "_tell", full_once)
    monkeypatch.setattr(client.Call, "_hand_over", noted)
    service.shut_down()  # what stands ready has its clock
    assert harness.call(level, plugins.give_back, 1) == 1
    assert done == ["clock", "clock", "job"]


@rootless
def test_a_warden_that_dies_as_soon_as_a_worker_stands(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the worker is told so, and not that it stands afterwards."""
    stood: list[client.Call] = []
    tell = client.Sandbox._tell

    def dies(self: client.Sandbox, instruction: dict[str, object], fds: Sequence[int] = ()) -> bool:
        if instruction["op"] == "clock":
            found = harness.roles(os.getpid())
            for pid in found["warden"]:
                os.kill(pid, signal.SIGKILL)
            below = {*found["warden"], *found["init"], *found["worker"]}
            assert harness.wait_until(lambda: not below & harness.engine_processes().keys())
        return tell(self, instruction, fds)

    monkeypatch.setenv("PSIE_STANDING", "0")
    monkeypatch.setattr(client.Sandbox, "_tell", dies)
    monkeypatch.setattr(service.Worker, "_sealed", lambda self, call: stood.append(call))
    service.shut_down()
    with pytest.raises(ResourceError, match="open a new sandbox"):
        harness.call(level, plugins.give_back, 1)
    assert not stood


@rootless
@pytest.mark.parametrize("victim", ["supervisor", "init", "worker"])
def test_what_else_is_stopped_ends_at_the_deadline(level: IsolationLevel, victim: str) -> None:
    """The warden kills them like any other; nothing has to be waited for."""
    seconds = 0.4 * harness.PATIENCE
    plugin = plugins.be_refused_and_sleep if victim == "supervisor" else plugins.signal_and_sleep

    async def main() -> None:
        async with harness.open_sandbox(level, limits={"max_execution_time_seconds": seconds}) as sandbox:
            async with running(sandbox, plugin) as task:
                with stopped(*harness.roles(os.getpid())[victim]):
                    error = await ends_with(ResourceLimitExceededError, "time", task)
                    assert isinstance(error, ResourceLimitExceededError)
                    assert error.limit == "time"
                    await harness.wait_for(lambda: not harness.roles(os.getpid())["worker"])
            if victim != "supervisor":
                assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1

    asyncio.run(main())


def test_who_was_stopped_with_all_the_rest_waits_once_more(clock: Clock) -> None:
    """A container that is paused, for instance: that time has passed says nothing about who answers."""

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD, config=CONFIG) as sandbox, running(sandbox) as task:
            with stopped(*harness.roles(os.getpid())["warden"]):
                task.cancel()
                await asyncio.sleep(0.1)
                clock.put_forward(WAIT + 2 * loop.LATE)
            async with asyncio.timeout(harness.SETTLE):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1

    asyncio.run(main())


def end_or_be_refused(ends: bool) -> int:
    import ctypes
    import os
    import time

    open(f"ready-{os.urandom(4).hex()}", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.001)
    if ends:
        os._exit(0)
    return int(ctypes.CDLL(None).unshare(0x10000000))  # CLONE_NEWUSER


@pytest.mark.parametrize("attempt", range(8))  # every second one is enough
def test_what_a_warden_hears_at_once_is_told_apart(attempt: int) -> None:
    """Two calls are refused something for the first time while a third one ends: the descriptors of that one are taken again
    at once, by the supervisor's, and what was heard of the old ones is not to be taken for its end."""

    async def main() -> list[Any]:
        await harness.settle(IsolationLevel.STRICT)
        async with harness.open_sandbox(IsolationLevel.STRICT) as sandbox:
            await sandbox.execute_plugin_safe(plugins.give_back, 1)
            wardens = harness.roles(os.getpid())["idle"]
            with stopped(*wardens):
                jobs = [sandbox.execute_plugin_safe(end_or_be_refused, ends) for ends in (False, False, True)]
                tasks = [asyncio.create_task(job) for job in jobs]
                await asyncio.sleep(0.05)
            await harness.wait_for(lambda: sum(entry.path.startswith("ready") for entry in sandbox.list_files()) == 3)
            with stopped(*wardens):
                sandbox.write_file("go", b"")
                await asyncio.sleep(0.05 * harness.PATIENCE)
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert asyncio.run(main())[:2] == [-1, -1]


# -- the command -------------------------------------------------------------------------------------------------------

SHORT = "from sandbox.engine import client; client.Sandbox.lifetime = {}; from sandbox.cli import main; main()"


ASKED = "import sys; del sys.argv[1:3]; " + SHORT  # for a caller whose command goes on with -m sandbox.cli


def psie(code: str, *arguments: str) -> subprocess.Popen[str]:
    """The command in a Python of its own, with this test's mark."""
    start = f"import sys; sys.path.append({harness.TOKEN + '-cli'!r}); {code}"
    return subprocess.Popen(
        [sys.executable, "-c", start, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "plugin.py"
    main = "if __name__ == '__main__':\n    sleep()\n"
    file.write_text(f"import time\ndef sleep():\n    print('ready', flush=True)\n    time.sleep(60)\n{main}")
    return file


@rootless
@pytest.mark.parametrize("command", ["run", "call"])
def test_the_command_ends_with_its_sandbox(level: IsolationLevel, command: str, plugin: Path) -> None:
    target = [str(plugin)] if command == "run" else [f"{plugin}:sleep"]
    with psie(SHORT.format(0.5), command, "--quiet", "--level", level.value, *target) as process:
        _, errors = process.communicate(timeout=harness.SETTLE)
    assert process.returncode == 124, errors
    assert errors.splitlines()[-1].startswith("psie: the sandbox was open for its whole lifetime")
    assert harness.wait_until(lambda: gone(harness.TOKEN + "-cli"))


@pytest.mark.long
def test_the_command_does_not_wait_for_a_stopped_warden(plugin: Path) -> None:
    config = plugin.with_name("psie.toml")
    config.write_text(f"[isolation]\nwatchdog_timeout_seconds = {WAIT}\n[limits]\nmax_execution_time_seconds = 1\n")
    code = "from sandbox.cli import main; main()"
    with psie(code, "run", "--quiet", "--config", str(config), str(plugin)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # The warden of the command's only sandbox is the zygote.
        with stopped(*harness.roles(process.pid, harness.TOKEN + "-cli")["zygote"]):
            _, errors = process.communicate(timeout=WAIT + 1 + harness.SETTLE)
            assert harness.wait_until(lambda: gone(harness.TOKEN + "-cli"))
    assert process.returncode == 125, errors
    (line,) = errors.splitlines()
    assert f"warden did not answer for {WAIT} s" in line


@pytest.mark.long
def test_the_command_that_is_ended_lets_a_stopped_zygote_clean_up(plugin: Path) -> None:
    code = "from sandbox.cli import main; main()"
    with psie(code, "run", "--quiet", str(plugin)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with stopped(*harness.roles(process.pid, harness.TOKEN + "-cli")["zygote"]):
            process.terminate()
            process.communicate(timeout=client.GRACE + harness.SETTLE)
            assert harness.wait_until(lambda: gone(harness.TOKEN + "-cli"))
    assert process.returncode == 128 + signal.SIGTERM


def test_a_question_that_nobody_answers(tmp_path: Path) -> None:
    """It is asked for no longer than the sandbox may live, and then nothing is committed."""
    folder = tmp_path / "granted"
    folder.mkdir()
    caller = cli_harness.privileged("strict", tmp_path)
    caller = dataclasses.replace(caller.as_module(), prefix=(*caller.prefix, "-c", ASKED.format(1.0 * harness.PATIENCE)))
    file = caller.write("plugin.py", "import sys\nopen(sys.argv[1] + '/made', 'w').close()\n")
    line = ("run", "--quiet", "--level", "strict", "--ask", "--rw", str(folder), str(file), str(folder))
    with cli_harness.Session(caller, *line) as session:
        session.until(b"commit 1 change? [y/N] ")
        session.until(b"psie: the sandbox was open for its whole lifetime")
        assert session.status() == 124
    assert os.listdir(folder) == []
    with cli_harness.Session(caller, *line) as session:
        session.until(b"commit 1 change? [y/N] ")
        session.type(b"y\n")
        assert session.status() == 0
    assert os.listdir(folder) == ["made"]
