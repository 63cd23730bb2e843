"""SandboxExecutor and @sandboxed, as users of concurrent.futures know executors, and what theirs cannot: kill, and isolate."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import dataclasses
import functools
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    IsolationLevel,
    PluginExecutionError,
    PluginLimitsV2,
    ResourceLimitExceededError,
    SandboxExecutor,
    SecurityViolationError,
    sandboxed,
)
from sandbox.engine import service
from sandbox.executor import SandboxFuture

from . import harness, plugins

pytestmark = pytest.mark.rootless


@pytest.fixture(params=[IsolationLevel.MINIMAL, IsolationLevel.MAXIMUM], ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> IsolationLevel:
    """Without namespaces and with all: an executor only opens sandboxes."""
    return IsolationLevel(request.param)


@pytest.fixture
def executor(level: IsolationLevel) -> Iterator[SandboxExecutor]:
    with SandboxExecutor(2, level=level) as made:
        yield made


def add(first: int, second: int = 0) -> int:
    return first + second


def named(**given: int) -> dict[str, int]:
    return given


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def leave_a_file(name: str) -> list[str]:
    Path(name).touch()
    return os.listdir()


def spin() -> None:
    while True:
        pass


# -- as any executor ---------------------------------------------------------------------------------------------------


def test_submit_and_map(executor: SandboxExecutor) -> None:
    assert executor.submit(add, 1, second=2).result(20) == 3
    assert list(executor.map(add, range(6), range(6), timeout=60 * harness.PATIENCE)) == [0, 2, 4, 6, 8, 10]
    assert list(executor.map(add, range(7), chunksize=3)) == list(range(7))
    assert list(executor.map(add, [])) == []
    assert executor.submit(named, self=1, fn=2, plugin_function=3).result(20) == {"self": 1, "fn": 2, "plugin_function": 3}
    futures = [executor.submit(add, number) for number in range(4)]
    done, left = concurrent.futures.wait(futures, 20)
    assert not left
    assert sorted(future.result() for future in done) == [0, 1, 2, 3]
    assert sorted(future.result() for future in concurrent.futures.as_completed(futures)) == [0, 1, 2, 3]
    with pytest.raises(TypeError):
        executor.submit()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="chunksize is 0"):
        executor.map(add, [1], chunksize=0)


@pytest.mark.parametrize(("chunksize", "expected"), [(1, [3, 4, 5, 6]), (2, [6, 8, 8, 10])])
def test_a_map_with_a_buffer_takes_items_as_results_are_asked_for(
    executor: SandboxExecutor, chunksize: int, expected: list[int]
) -> None:
    """Also of a source that has no end."""
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    results = executor.map(add, numbers(), chunksize=chunksize, buffersize=3)
    seen = [len(taken)]
    for number in range(3):
        assert next(results) == number
        seen.append(len(taken))
    del results
    assert seen == expected
    assert list(executor.map(add, range(5), range(9), buffersize=2)) == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="buffersize is 0"):
        executor.map(add, [1], buffersize=0)


def test_what_a_call_raises(executor: SandboxExecutor) -> None:
    with pytest.raises(PluginExecutionError, match="mine"):
        executor.submit(plugins.fail, "mine").result(20)
    assert isinstance(executor.submit(plugins.fail, "mine").exception(20), PluginExecutionError)
    with pytest.raises(SecurityViolationError):
        executor.submit(os.chroot, "/").result(20)
    with open(os.devnull) as file, pytest.raises(PluginExecutionError, match="cannot travel"):
        executor.submit(add, file).result(20)  # type: ignore[arg-type]
    with pytest.raises(PluginExecutionError, match="mine"):
        list(executor.map(plugins.fail, ["mine", "other"]))
    assert executor.submit(add, 1).result(20) == 1


def test_callbacks(executor: SandboxExecutor) -> None:
    seen: list[Any] = []
    called = threading.Event()
    future = executor.submit(add, 3)
    future.add_done_callback(lambda done: seen.append(done.result()))
    future.add_done_callback(lambda done: called.set())
    assert called.wait(20)
    assert seen == [3]


def test_no_more_run_at_once_than_may(executor: SandboxExecutor) -> None:
    seconds = 0.2 * harness.PATIENCE
    start = time.monotonic()
    futures = [executor.submit(sleep, seconds) for _ in range(6)]
    assert harness.wait_until(lambda: sum(future.running() for future in futures) == 2)
    for future in futures:
        future.result(60)
        assert sum(each.running() for each in futures) <= 2
    assert time.monotonic() - start >= 3 * seconds


def test_shut_down(level: IsolationLevel) -> None:
    executor = SandboxExecutor(1, level=level)
    futures = [executor.submit(sleep, 0.1) for _ in range(4)]
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit(add, 1)
    assert [future.result(30) for future in futures] == [0.1] * 4
    executor.shutdown()
    executor = SandboxExecutor(1, level=level)
    futures = [executor.submit(sleep, 0.2) for _ in range(4)]
    assert harness.wait_until(futures[0].running)
    executor.shutdown(cancel_futures=True)
    assert futures[0].result(0) == 0.2
    assert [future.cancelled() for future in futures] == [False, True, True, True]
    SandboxExecutor(1, level=level).shutdown()


def test_without_a_shutdown_its_thread_goes(level: IsolationLevel) -> None:
    executor = SandboxExecutor(1, level=level)
    assert executor.submit(add, 1).result(20) == 1
    thread = executor._thread
    assert thread is not None
    del executor
    assert harness.wait_until(lambda: not thread.is_alive())


# -- what others cannot --------------------------------------------------------------------------------------------------


def test_each_call_is_in_a_sandbox_of_its_own(executor: SandboxExecutor) -> None:
    assert [executor.submit(leave_a_file, str(number)).result(20) for number in range(3)] == [["0"], ["1"], ["2"]]
    assert list(executor.map(leave_a_file, "ab", chunksize=2))[1] != ["b"]  # one sandbox for a chunk


def test_a_running_call_is_killed(executor: SandboxExecutor) -> None:
    running = executor.submit(spin)
    assert harness.wait_until(running.running)
    start = time.monotonic()
    assert running.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        running.result(harness.SETTLE)
    assert running.cancelled()
    assert running.done()
    assert time.monotonic() - start < harness.SETTLE
    assert harness.wait_until(lambda: not harness.roles(os.getpid())["worker"])
    assert executor.submit(add, 1).result(20) == 1
    over = executor.submit(add, 1)
    over.result(20)
    assert not over.cancel()
    waiting = [executor.submit(sleep, 0.3) for _ in range(4)]
    assert waiting[3].cancel()
    assert waiting[3].cancelled()


def test_who_is_cancelled_again_and_again_is_gone_all_the_same(executor: SandboxExecutor) -> None:
    future = executor.submit(spin)
    assert harness.wait_until(lambda: harness.roles(os.getpid())["worker"])
    time.sleep(0.3 * harness.PATIENCE)
    for _ in range(3):
        assert future.cancel()
        time.sleep(0.001)
    assert concurrent.futures.wait([future], harness.SETTLE).done
    assert future.cancelled()
    sandboxes = [one for zygote in service.service().zygotes.values() for one in zygote.sandboxes.values()]
    assert not any(call.is_running for one in sandboxes for call in one.calls.values())


def test_who_is_cancelled_just_when_it_begins_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs by then, and there is no task yet that could be cancelled."""
    begin = SandboxFuture.set_running_or_notify_cancel

    def begin_and_cancel(future: SandboxFuture[int]) -> bool:
        return begin(future) and future.cancel()

    monkeypatch.setattr(SandboxFuture, "set_running_or_notify_cancel", begin_and_cancel)
    executor = SandboxExecutor(1, level=IsolationLevel.MINIMAL)
    future = executor.submit(add, 1)
    has_ended = bool(concurrent.futures.wait([future], harness.SETTLE).done)
    executor._running.clear()  # who ends the interpreter waits for them
    executor.shutdown()
    assert has_ended
    assert future.cancelled()


def test_a_cancellation_just_before_the_end_is_none_or_is_one() -> None:
    future: SandboxFuture[int] = SandboxFuture(lambda _: None)
    assert future.set_running_or_notify_cancel()
    answers = []
    future._condition = Interrupted(lambda: answers.append(future.cancel()))
    future._end(1, None)
    assert answers[0] is future.cancelled()


class Interrupted(threading.Condition):
    """Whenever it is left, something else happens at once; but not because of that."""

    def __init__(self, something: Callable[[], None]) -> None:
        super().__init__()
        self.something: Callable[[], None] | None = something

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        something, self.something = self.something, None
        if something is not None:
            something()


def test_time_and_other_limits(level: IsolationLevel) -> None:
    limits = PluginLimitsV2(max_execution_time_seconds=20.0, max_output_mb=0.01)
    with SandboxExecutor(1, level=level, limits=limits, timeout=0.4 * harness.PATIENCE) as executor:
        with pytest.raises(ResourceLimitExceededError, match="ran longer"):
            executor.submit(spin).result(30)
        with pytest.raises(ResourceLimitExceededError, match="output"):
            executor.submit(os.write, 1, b"x" * 100_000).result(30)


def test_submit_waits_where_too_many_wait(level: IsolationLevel) -> None:
    """Back-pressure: it holds up who asks for more than can be done."""
    with SandboxExecutor(1, level=level, max_waiting=2) as executor:
        futures = []
        moments = []
        for _ in range(6):
            futures.append(executor.submit(sleep, 0.15))
            moments.append(time.monotonic())
        assert moments[-1] - moments[0] > 0.3
        assert [future.result(30) for future in futures] == [0.15] * 6


def test_a_callback_that_submits_waits_for_nobody(level: IsolationLevel) -> None:
    """It is called in the thread that makes room."""
    later: list[concurrent.futures.Future[float]] = []
    with SandboxExecutor(1, level=level, max_waiting=1) as executor:
        first = executor.submit(sleep, 0.3)
        first.add_done_callback(lambda _: later.extend(executor.submit(sleep, 0.01) for _ in range(3)))
        assert harness.wait_until(first.running)
        assert executor.submit(sleep, 0.02).result(30) == 0.02
        assert harness.wait_until(lambda: len(later) == 3)
        assert [future.result(30) for future in later] == [0.01] * 3


def test_what_is_cancelled_while_it_waits_makes_room(level: IsolationLevel) -> None:
    """Also for whoever waits for room already."""
    with SandboxExecutor(1, level=level, max_waiting=2) as executor:
        first = executor.submit(sleep, 3600)
        assert harness.wait_until(first.running)
        waiting = [executor.submit(add, number) for number in range(2)]
        later: list[concurrent.futures.Future[int]] = []
        thread = threading.Thread(target=lambda: later.extend(executor.submit(add, number) for number in (2, 3)))
        thread.start()
        for future in waiting:
            future.cancel()
        thread.join(harness.SETTLE)
        is_stuck = thread.is_alive()
        first.cancel()
        thread.join()
        assert not is_stuck
        assert not concurrent.futures.wait(waiting, 30).not_done
        assert [future.result(30) for future in later] == [add(2), add(3)]


def test_who_waits_for_room_is_told_of_a_shutdown(level: IsolationLevel) -> None:
    executor = SandboxExecutor(1, level=level, max_waiting=1)
    futures = [executor.submit(sleep, 0.5)]
    assert harness.wait_until(futures[0].running)
    futures.append(executor.submit(sleep, 0.5))
    told: list[str] = []

    def submit() -> None:
        try:
            executor.submit(add, 1)
        except RuntimeError as error:
            told.append(str(error))

    thread = threading.Thread(target=submit)
    thread.start()
    time.sleep(0.1)
    executor.shutdown(wait=False)
    thread.join(0.3)
    assert told == ["the executor was shut down: make a new one"]
    assert [future.result(30) for future in futures] == [0.5, 0.5]


@dataclasses.dataclass
class Box:
    number: int


def boxed(number: int) -> Box:
    return Box(number)


async def doubled(number: int) -> int:
    return 2 * number


def with_environment(env: dict[str, Any], number: int) -> tuple[int, bool]:
    is_own = "mark" not in env
    env["mark"] = True
    return number, is_own


@pytest.mark.parametrize("function", [boxed, doubled, with_environment])
def test_chunks_are_as_single_calls(executor: SandboxExecutor, function: Callable[..., Any]) -> None:
    one, two = (list(executor.map(function, [1, 2, 3], chunksize=size)) for size in (1, 2))
    assert one == two
    assert [type(each) for each in one] == [type(each) for each in two]


def test_a_callback_that_exits_ends_nothing(executor: SandboxExecutor, caplog: pytest.LogCaptureFixture) -> None:
    future = executor.submit(plugins.fail, "mine")
    future.add_done_callback(lambda _: sys.exit(1))
    assert isinstance(future.exception(20), PluginExecutionError)
    assert executor.submit(add, 1).result(20) == 1


def test_prewarm_after_a_shutdown(level: IsolationLevel) -> None:
    made = SandboxExecutor(1, level=level)
    made.shutdown()
    with pytest.raises(RuntimeError, match="was shut down: make a new one"):
        made.prewarm()


class Cached:
    @functools.cached_property
    def number(self) -> int:
        return 4


def number_of(cached: Cached) -> int:
    return cached.number


def test_objects_with_cached_properties_travel(executor: SandboxExecutor) -> None:
    assert executor.submit(number_of, Cached()).result(20) == 4


def test_mistakes() -> None:
    for wrong in ({"max_workers": 0}, {"max_workers": "2"}, {"max_waiting": 0}, {"level": "strct"}, {"timeout": -1.0}):
        with pytest.raises((ValueError, TypeError)):
            SandboxExecutor(**wrong)
    with pytest.raises((ValueError, TypeError)):
        sandboxed(level="strct")(add)
    with pytest.raises(TypeError, match=r"'strict' is no function: .*@sandboxed\(level='strict'\)"):
        sandboxed("strict")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="a classmethod is no function: put @sandboxed below @classmethod"):
        sandboxed(classmethod(lambda cls: cls))  # type: ignore[call-overload]


# -- with event loops, threads, forks, and the end of the interpreter ------------------------------------------------------


def test_with_event_loops(executor: SandboxExecutor) -> None:
    async def use() -> int:
        loop = asyncio.get_running_loop()
        first, second = await asyncio.gather(
            loop.run_in_executor(executor, add, 1), asyncio.wrap_future(executor.submit(add, 2))
        )
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(executor.submit(spin)), 0.2 * harness.PATIENCE)
        return first + second

    assert asyncio.run(use()) == 3
    assert asyncio.run(use()) == 3
    assert harness.wait_until(lambda: not harness.roles(os.getpid())["worker"])


def test_from_many_threads(executor: SandboxExecutor) -> None:
    found: list[int] = []

    def use(number: int) -> None:
        found.append(executor.submit(add, number).result(60))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(12))


def test_a_fork_cannot_use_it(executor: SandboxExecutor) -> None:
    assert executor.submit(add, 1).result(20) == 1
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            executor.submit(add, 1)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader) as file:
        assert "after a fork make a new one" in file.read()
    assert executor.submit(add, 1).result(20) == 1


END = """
import sys, time
sys.path[:0] = {path!r}
from sandbox import PluginPermissionsV2, SandboxExecutor
def work(number):
    time.sleep(0.1)
    return number
permissions = PluginPermissionsV2(allowed_directories=[{folder!r}] if {folder!r} else [])
executor = SandboxExecutor(2, level={level!r}, permissions=permissions)
for number in range(4):
    executor.submit(work, number).add_done_callback(lambda done: print(done.result(), flush=True))
{last}
"""


@pytest.mark.long
@pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 3), reason="this CPython starts no thread and no process then: python/cpython#113964"
)
@pytest.mark.parametrize("last", ["", "raise SystemExit(3)", "executor.shutdown(wait=False)"])
@pytest.mark.parametrize("is_granted", [False, True], ids=["", "with a folder"])
def test_at_the_end_of_the_interpreter_all_is_done(level: IsolationLevel, last: str, is_granted: bool, tmp_path: Path) -> None:
    """Also where an opening needs a thread of the event loop's."""
    folder = str(tmp_path) if is_granted and level is not IsolationLevel.MINIMAL else ""
    code = END.format(path=sys.path, level=level.value, last=last, folder=folder)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60 * harness.PATIENCE, check=False
    )
    assert sorted(done.stdout.split()) == ["0", "1", "2", "3"], done.stderr
    assert done.returncode == (3 if "3" in last else 0)
    assert not done.stderr
    assert time.monotonic() - start < 10 * harness.PATIENCE


# -- the decorator -------------------------------------------------------------------------------------------------------


@sandboxed(level="standard")
def factorial(number: int) -> int:
    """Calls itself, in one sandbox."""
    return number * factorial(number - 1) if number > 1 else 1


@sandboxed
async def awaited(value: int) -> int:
    import asyncio

    await asyncio.sleep(0.01)
    return value


@sandboxed(timeout=20)
async def rest(seconds: float) -> None:
    import asyncio

    await asyncio.sleep(seconds)


@sandboxed(level=IsolationLevel.STRICT, limits=PluginLimitsV2(max_result_mb=0.01))
def in_strict(size: int = 0) -> Any:
    return bytes(size) if size else os.getcwd()


@pytest.fixture
def decorated() -> Iterator[None]:
    """Their executors are kept for the next call: here there is none."""
    yield
    for each in (factorial, awaited, rest, in_strict):
        each.executor.shutdown()  # type: ignore[union-attr]


@pytest.mark.usefixtures("decorated")
def test_a_function_that_is_always_in_a_sandbox() -> None:
    assert factorial(5) == 120
    assert factorial.__name__ == "factorial"
    assert factorial.__doc__ == "Calls itself, in one sandbox."
    assert in_strict() == "/workspace"
    with pytest.raises(ResourceLimitExceededError, match="reply"):
        in_strict(100_000)
    in_strict.executor.shutdown()  # type: ignore[attr-defined]
    assert in_strict() == "/workspace"


@pytest.mark.usefixtures("decorated")
def test_an_async_function_that_is_always_in_a_sandbox() -> None:
    async def use() -> list[int]:
        found = await asyncio.gather(*(awaited(number) for number in range(4)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(rest(15.0), 0.3 * harness.PATIENCE)
        return found

    assert asyncio.run(use()) == [0, 1, 2, 3]
    assert asyncio.run(use()) == [0, 1, 2, 3]
    assert harness.wait_until(lambda: not harness.roles(os.getpid())["worker"])


@sandboxed(level="strict")
def who() -> tuple[int, int]:
    return os.getpid(), os.getuid()


def test_whatever_is_made_of_it_is_in_a_sandbox_too() -> None:
    """copy, deepcopy and pickle give no plain function, whose call would be here."""
    import cloudpickle

    copies = [copy.copy(who), copy.deepcopy({"a": who})["a"], pickle.loads(pickle.dumps(who))]
    copies.append(cloudpickle.loads(cloudpickle.dumps(who)))
    made: dict[str, Any] = {"sandboxed": sandboxed, "__name__": "__main__"}
    exec("@sandboxed(level='strict')\ndef local():\n    import os\n    return os.getpid(), os.getuid()", made)
    copies.append(cloudpickle.loads(cloudpickle.dumps(made["local"])))
    assert who.__wrapped__() == (os.getpid(), os.getuid())  # type: ignore[attr-defined]
    for each in copies:
        pid, uid = each()
        each.executor.shutdown()
        assert pid != os.getpid()
        assert uid != os.getuid() or os.getuid()


def test_methods() -> None:
    source = textwrap.dedent(
        """
        import sys
        sys.path[:0] = {path!r}
        from sandbox import sandboxed
        class Counter:
            def __init__(self): self.value = 3
            @sandboxed
            def tripled(self): return self.value * 3
        print(Counter().tripled())
        """
    ).format(path=sys.path)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60 * harness.PATIENCE, check=False
    )
    assert done.stdout == "9\n", done.stderr


# -- where something is not to be had --------------------------------------------------------------------------------------


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_an_executor_that_had_no_thread_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    with SandboxExecutor(1, level="strict") as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="can't start"):
                executor.submit(abs, -1)
        assert executor.submit(abs, -2).result() == 2


FORKS = """
import asyncio, os, sys
from sandbox import SandboxExecutor, sandboxed, transport
from sandbox.engine import service

def double(number):
    return 2 * number

doubled = sandboxed(level="strict")(double)
if sys.argv[1] == "thread":
    import threading
    def refuse(thread):
        raise RuntimeError("can't start new thread")
    start, threading.Thread.start = threading.Thread.start, refuse
    seen = []
    for _ in range(3):
        try:
            service.service()
        except service.ResourceError as error:
            print(error)
        seen.append(len(os.listdir("/proc/self/fd")))
    print(seen[-1] - seen[0])
else:
    with transport._lock, service._lock, doubled._lock:  # as another thread may have them
        pid = os.fork()
    if not pid:
        assert doubled(4) == 8
        doubled.executor.shutdown()
        os._exit(0)
    print(os.waitpid(pid, 0)[1], doubled(5))
"""


def test_a_fork_waits_for_no_thread_of_its_parents() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, "fork"], cwd=harness.REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("0 10\n", "")


def test_an_engine_without_a_thread_leaves_nothing_open() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS, "thread"], cwd=harness.REPOSITORY, capture_output=True, text=True)
    assert done.stdout.count("psie's own thread could not be started") == 3
    assert done.stdout.endswith("\n0\n")


def test_asyncio_knows_an_async_one() -> None:
    @sandboxed(level="strict")
    async def later() -> int:
        return 1

    assert asyncio.iscoroutinefunction(later)
    assert inspect.iscoroutinefunction(later) or sys.version_info < (3, 12)


INTERRUPTED = """
import signal
from sandbox import PluginLimitsV2, sandboxed

@sandboxed(level="strict", limits=PluginLimitsV2(max_execution_time_seconds=3600))
def sleep():
    import time
    print("begun", flush=True)
    time.sleep(3600)

def strike(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, strike)
signal.setitimer(signal.ITIMER_REAL, 1)
try:
    sleep()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


# A signal's exception at the one place where threading.Condition would leave the lock taken that the engine's thread waits for.
BETWEEN = """
import asyncio, signal, sys, threading
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2

def new():
    return EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(level=IsolationLevel.STRICT))

async def opened():
    sandbox = new()
    await sandbox.__aenter__()
    await sandbox.execute_plugin_safe(abs, -1)
    return sandbox

async def call():
    return await sandbox.execute_plugin_safe(abs, -1)

loop = asyncio.new_event_loop()
sandbox = loop.run_until_complete(opened())
enter = threading.Condition.__enter__

def interrupted(self):
    got = enter(self)
    if sys._getframe(2).f_code.co_name == "stands":
        threading.Condition.__enter__ = enter
        signal.raise_signal(signal.SIGINT)
    return got

threading.Condition.__enter__ = interrupted
try:
    print(loop.run_until_complete(call()))
except KeyboardInterrupt:
    print("interrupted")
threading.Condition.__enter__ = enter

async def other():
    async with new() as another:
        return await another.execute_plugin_safe(abs, -2)

print(asyncio.run(other()))
loop.run_until_complete(sandbox.cleanup_sandbox())
"""


def test_an_interrupted_caller_holds_nothing_that_the_engine_waits_for() -> None:
    done = subprocess.run([sys.executable, "-c", BETWEEN], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split()[-1] == "2", done.stderr


# The same in whatever waits for the engine's thread without an event loop.
WAITS = """
import asyncio, signal, threading
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, SandboxExecutor
from sandbox.engine import service

SETTINGS = PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(level=IsolationLevel.MINIMAL)
enter = threading.Condition.__enter__
doors = []

def interrupted(self):
    got = enter(self)
    if doors and threading.current_thread() is threading.main_thread():
        signal.raise_signal(signal.SIGINT)
    return got

def interrupt(door, *args):
    doors.append(door)
    try:
        door(*args)
    except KeyboardInterrupt:
        pass
    doors.clear()
    service.service().loop.post(told.append, door)

async def main():
    async with EnhancedPluginSandbox(*SETTINGS) as sandbox:
        await sandbox.execute_plugin_safe(abs, -1)
        interrupt(sandbox.get_telemetry)
        interrupt(sandbox.list_files)
        return await sandbox.execute_plugin_safe(abs, -2)

told = []
executor = SandboxExecutor(1, level="minimal")
executor.prewarm()
threading.Condition.__enter__ = interrupted
loop = asyncio.new_event_loop()
print(loop.run_until_complete(main()))
interrupt(executor.prewarm)
interrupt(service.status)
interrupt(service.shut_down)
print(executor.submit(abs, -3).result(30), len(told))
"""


def test_nor_who_waits_for_it_without_an_event_loop() -> None:
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["2", "3", "5"], done.stderr


# Ctrl-C while Thread.start waits for the thread that it has begun.
BEGINS = """
import signal, threading, time
from sandbox import SandboxExecutor
from sandbox.engine import service

start = threading.Thread.start

def interrupted(thread):
    start(thread)
    signal.raise_signal(signal.SIGINT)

with SandboxExecutor(1, level="minimal") as executor:
    for begin in (lambda: executor.submit(abs, -1), service.service):
        threading.Thread.start = interrupted
        try:
            begin()
        except KeyboardInterrupt:
            print("interrupted")
        threading.Thread.start = start
    time.sleep(0.2)
    print(executor.submit(abs, -1).result())
"""


def test_an_interrupted_start_of_a_thread_leaves_none_that_fails() -> None:
    done = subprocess.run([sys.executable, "-c", BEGINS], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["interrupted", "interrupted", "1"]
    assert "Traceback" not in done.stderr


# Ctrl-C at the worst places, again and again.
STORM = """
import asyncio, os, signal, sys, time
import psutil
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2
from sandbox.sandbox import _Run
from sandbox.session import Session

def add(number):
    return number + 1

def count():
    return len(psutil.Process().children(recursive=True)), len(os.listdir("/proc/self/fd"))

def interrupting(function):
    def act(self, *given):
        signal.raise_signal(signal.SIGINT)
        return function(self, *given)
    return act

def interrupted(work):
    try:
        loop.run_until_complete(work)
    except KeyboardInterrupt:
        return
    raise AssertionError("it was to be interrupted")

async def opened():
    config = IsolationConfig(level=IsolationLevel.STRICT)
    sandbox = EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), config)
    await sandbox.__aenter__()
    await sandbox.execute_plugin_safe(abs, -1)
    session = sandbox.session()
    await session.__aenter__()
    return sandbox, session

async def call():
    return await sandbox.execute_plugin_safe(abs, -1)

async def ask(number):
    return await session.call(add, number)

loop = asyncio.new_event_loop()
sandbox, session = loop.run_until_complete(opened())
time.sleep(0.5)
before, stands, answered = count(), _Run.stands, Session._answered_value
_Run.stands = interrupting(stands)
for _ in range(10):
    interrupted(call())
_Run.stands = stands
for _ in range(100):
    if count() <= before:
        break
    time.sleep(0.1)
print(count() <= before)
Session._answered_value = interrupting(answered)
for _ in range(1000):  # on a slow machine the engine takes most answers, which do not come by there
    try:
        loop.run_until_complete(ask(1))
    except KeyboardInterrupt:
        break
else:
    raise AssertionError("it was to be interrupted")
Session._answered_value = answered
print(*(loop.run_until_complete(ask(number)) for number in range(3)))
loop.run_until_complete(session.__aexit__(None, None, None))
loop.run_until_complete(sandbox.cleanup_sandbox())
"""


def test_who_is_interrupted_leaves_no_worker_and_spoils_no_session() -> None:
    done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.split() == ["True", "1", "2", "3"], done.stderr


def test_an_interrupted_caller_has_its_call_killed() -> None:
    """Else the end of the program would wait for an hour."""
    line = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(line, cwd=harness.REPOSITORY, capture_output=True, text=True, timeout=60 * harness.PATIENCE)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "interrupted", "")


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
def test_who_is_interrupted_while_it_submits_leaves_no_call(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has its Future: else whoever ends the executor, or the program, would wait for its time."""
    limits = PluginLimitsV2(max_execution_time_seconds=60)
    executor = SandboxExecutor(1, limits=limits)
    if not is_first:
        assert executor.submit(add, 1, 1).result() == 2
    call_soon = asyncio.BaseEventLoop.call_soon_threadsafe

    def interrupted(loop: Any, callback: Callable[..., Any], *args: Any, **more: Any) -> None:
        call_soon(loop, callback, *args, **more)
        if callback == executor._more and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(time.sleep, 60)
    assert executor.submit(add, 1, 2).result(30) == 3
    executor.shutdown()


def test_a_shutdown_meanwhile_does_not_make_submit_fail() -> None:
    """What it has taken is done, so it has not refused it."""
    executor = SandboxExecutor(1)
    assert executor.submit(add, 1, 1).result() == 2
    loop, thread = executor._loop, executor._thread
    assert loop is not None
    assert thread is not None
    carry_on, other = loop.call_soon_threadsafe, threading.Thread(target=executor.shutdown)

    def held_up(*args: Any, **more: Any) -> Any:
        loop.call_soon_threadsafe = carry_on  # type: ignore[method-assign]
        other.start()
        thread.join(1.0)
        return carry_on(*args, **more)

    loop.call_soon_threadsafe = held_up  # type: ignore[assignment,method-assign]
    assert executor.submit(add, 2, 3).result(harness.SETTLE) == 5
    other.join()
