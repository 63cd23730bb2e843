"""SandboxExecutor and @sandboxed: each call in a sandbox of its own, for code that knows nothing of event loops.

A concurrent.futures.Executor whose workers are sandboxes: what a call leaves behind no other call sees. Thin: one thread with
an event loop, in which each call opens an EnhancedPluginSandbox, runs, and closes it. Must not know how a sandbox is made.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import concurrent.futures.thread  # what it has to do at the interpreter's end comes after `_finish`, which needs its threads
import contextlib
import contextvars
import copy
import functools
import inspect
import os
import sys
import threading
import weakref
from collections import deque
from concurrent.futures._base import (  # type: ignore[attr-defined]
    CANCELLED_AND_NOTIFIED,
    LOGGER,
    RUNNING,
    _result_or_cancel,  # keeps no value longer than needed
)
from dataclasses import replace
from itertools import islice
from time import monotonic
from typing import overload

from sandbox import parcels, transport
from sandbox.config import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, level_of
from sandbox.engine.service import EngineFuture
from sandbox.sandbox import EnhancedPluginSandbox, checked_environment, prewarmed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, ParamSpec, TypeVar

    T = TypeVar("T")
    P = ParamSpec("P")


class SandboxFuture(EngineFuture["T"]):
    """A Future of one call; `cancel` kills a call that runs, and all that it has started."""

    def __init__(self, kill: Callable[[SandboxFuture[T]], None]) -> None:
        super().__init__()
        self._kill = kill
        self._is_killed = self._is_over = False

    def cancel(self) -> bool:
        """True unless it is over already. One that runs is killed; the Future is cancelled when nothing of it is left."""
        if super().cancel():
            return True
        with self._condition:
            if self._state != RUNNING or self._is_over:
                return False
            is_first, self._is_killed = not self._is_killed, True
        if is_first:
            self._kill(self)
        return True

    def _end(self, value: T | None, error: BaseException | None, *, is_left: bool = False) -> None:
        """What came of the call; whoever has killed it gets no result, also where it came first, and not while it `is_left`."""
        with self._condition:
            if self._is_killed and is_left:
                return
            is_killed, self._is_over = self._is_killed, True
            if is_killed:  # a Future that runs cannot be cancelled otherwise
                self._state = CANCELLED_AND_NOTIFIED
                for waiter in self._waiters:
                    waiter.add_cancelled(self)
                self._condition.notify_all()
        if is_killed:
            self._invoke_callbacks()  # type: ignore[attr-defined]
        elif error is not None:
            self.set_exception(error)
        else:
            self.set_result(value)  # type: ignore[arg-type]


class Work:
    """A call that waits or runs."""

    def __init__(self, future: SandboxFuture[Any], function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.future = future
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.task: asyncio.Task[None] | None = None
        self.context = contextvars.copy_context()  # the submitter's, for observers: whose span it is, for example


class SandboxExecutor(concurrent.futures.Executor):
    """Runs each submitted call in a fresh sandbox, at most `max_workers` at a time, in the order in which they came.

    Args:
        max_workers: how many run at once; the number of CPUs if None.
        level: in place of the level that `config` has.
        limits: as for EnhancedPluginSandbox; their defaults if None.
        permissions: likewise.
        config: likewise.
        timeout: seconds that a call may run, in place of the limit that `limits` have.
        max_waiting: `submit` waits while so many calls wait for a sandbox, but not in a callback of a Future, which holds
            them up; None: it never does.
        environment: further environment variables of the calls.

    What a call raises comes out of its Future as it comes out of `execute_plugin_safe`. Any thread may use it, and any event
    loop by asyncio.wrap_future or run_in_executor; a fork of its process may not. Left to itself it finishes what was
    submitted when the interpreter ends (but not with CPython 3.12.0 to 3.12.2, which then start nothing: use `with`).
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        level: IsolationLevel | str | None = None,
        limits: PluginLimitsV2 | None = None,
        permissions: PluginPermissionsV2 | None = None,
        config: IsolationConfig | None = None,
        timeout: float | None = None,
        max_waiting: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Raises ValueError, TypeError."""
        for name, number in (("max_workers", max_workers), ("max_waiting", max_waiting)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"SandboxExecutor: {name} is {number!r}: give a whole number above 0, or None")
        self._max_workers = max_workers or os.cpu_count() or 1
        self._config = IsolationConfig() if config is None else config
        if level is not None:
            self._config = replace(self._config, level=level_of("SandboxExecutor: level", level))
        self._limits = PluginLimitsV2() if limits is None else limits
        if timeout is not None:
            changed: dict[str, Any] = {"max_execution_time_seconds": timeout, "execution_warning_threshold_seconds": None}
            self._limits = replace(self._limits, **changed)
        self._permissions = PluginPermissionsV2() if permissions is None else permissions
        self._environment = checked_environment("SandboxExecutor", environment)
        self._new_sandbox()  # mistakes in the settings are told here
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._max_waiting = max_waiting
        self._waiting: deque[Work] = deque()
        self._running: dict[concurrent.futures.Future[Any], Work] = {}
        self._is_shut = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def _new_sandbox(self) -> EnhancedPluginSandbox:
        sandbox = EnhancedPluginSandbox(self._limits, self._permissions, self._config, environment=self._environment)
        sandbox._door = "executor"
        return sandbox

    def prewarm(self, count: int | None = None) -> int:
        """Have sandboxes stand ready for so many calls, max_workers if None; see EnhancedPluginSandbox.prewarm."""
        self._check()
        wanted = self._max_workers if count is None else count
        if self._is_shut:
            raise RuntimeError("the executor was shut down: make a new one")
        return prewarmed(wanted, self._limits, self._permissions, self._config).result()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> SandboxFuture[T]:
        """Have `fn(*args, **kwargs)` called in a sandbox. Raises RuntimeError after `shutdown`, and in a fork."""
        fn = fn._function if isinstance(fn, Sandboxed) else fn  # which is what it is inside, and may be a coroutine function
        self._check()
        future: SandboxFuture[T] = SandboxFuture(self._kill)
        try:
            with self._lock:
                while self._is_full():
                    self._room.wait()
                if self._is_shut:
                    raise RuntimeError("the executor was shut down: make a new one")
                loop = self._started()
                self._waiting.append(Work(future, fn, args, kwargs))
                loop.call_soon_threadsafe(self._more)  # before a shutdown of another thread's has it done and the loop closed
            if self._max_waiting is not None:
                future.add_done_callback(self._has_ended)
        except BaseException:
            future.cancel()  # of an interrupted caller, whom nobody tells of it
            raise
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As Executor.map; with a chunksize above 1 one sandbox serves so many items, one after the other, in one call.

        `buffersize`, as from Python 3.14 on: not all items are taken and submitted at once, but so many calls, and one more for
        each whose result has been asked for. Raises ValueError.
        """
        if chunksize < 1:
            raise ValueError(f"SandboxExecutor.map: chunksize is {chunksize}: give a whole number above 0")
        if buffersize is not None and buffersize < 1:
            raise ValueError(f"SandboxExecutor.map: buffersize is {buffersize}: give a whole number above 0, or None")
        items = zip(*iterables, strict=False)
        if chunksize == 1:
            return self._mapped(fn, items, timeout, buffersize)
        chunks = zip(iter(lambda: list(islice(items, chunksize)), []), strict=True)
        results = self._mapped(_of_chunks(fn), chunks, timeout, buffersize)
        return (result for chunk in results for result in chunk)

    def _mapped(
        self, fn: Callable[..., T], calls: Iterator[tuple[Any, ...]], timeout: float | None, most: int | None
    ) -> Iterator[T]:
        end = None if timeout is None else monotonic() + timeout
        begun = deque(self.submit(fn, *each) for each in islice(calls, most))
        return _results(weakref.ref(self), fn, begun, iter(()) if most is None else calls, end)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no further calls; with `cancel_futures` those that wait are cancelled. What runs is finished."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._is_shut = True
            self._room.notify_all()
            cancelled = list(self._waiting) if cancel_futures else []
            if cancel_futures:
                self._waiting.clear()
            loop, thread = self._loop, self._thread
        for work in cancelled:
            work.future.cancel()
            work.future.set_running_or_notify_cancel()
        if loop is None or thread is None:
            return
        with contextlib.suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(self._more)
        if wait and thread is not threading.current_thread():
            thread.join()

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("this executor belongs to the process that made it: after a fork make a new one")

    def _is_full(self) -> bool:
        """Whether `submit` has to wait. The thread that makes room cannot."""
        is_bound = self._max_waiting is not None and len(self._waiting) >= self._max_waiting
        return is_bound and not self._is_shut and threading.current_thread() is not self._thread

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(loop,), name="psie executor", daemon=True)
            _open.add(self)
            weakref.finalize(self, _stop, loop).atexit = False
            try:
                thread.start()
            except RuntimeError:  # "can't start new thread"
                loop.close()
                raise
            except BaseException:  # a signal's: by now the thread may be there, and then it closes the loop
                _stop(loop)
                raise
            self._loop, self._thread = loop, thread
        return self._loop

    def _kill(self, future: SandboxFuture[Any]) -> None:
        self._check()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended, and so has the call
                # A turn later: its task is being made perhaps, and one that is cancelled before it begins has no end.
                self._loop.call_soon_threadsafe(self._loop.call_soon, self._cancel, future)

    def _has_ended(self, future: concurrent.futures.Future[Any]) -> None:
        if future.cancelled() and self._loop is not None and os.getpid() == self._pid:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._make_room)

    # In the executor's thread:

    def _make_room(self) -> None:
        """Those that were cancelled while they waited do not any more: there is room for others."""
        with self._lock:
            gone = [work for work in self._waiting if work.future.cancelled()]
            for work in gone:
                self._waiting.remove(work)
            self._room.notify(len(gone))
        for work in gone:
            work.future.set_running_or_notify_cancel()
        self._more()

    def _more(self) -> None:
        """Begin what may begin; leave when there is nothing more to come."""
        while len(self._running) < self._max_workers:
            with self._lock:
                work = self._waiting.popleft() if self._waiting else None
                self._room.notify()
            if work is None:
                break
            if work.future.set_running_or_notify_cancel():
                self._running[work.future] = work
                work.task = asyncio.get_running_loop().create_task(self._run(work), context=work.context)
        with self._lock:
            is_over = self._is_shut and not self._waiting and not self._running
        if is_over:
            asyncio.get_running_loop().stop()

    def _cancel(self, future: SandboxFuture[Any]) -> None:
        work = self._running.get(future)
        if work is not None and work.task is not None:
            work.task.cancel()

    async def _run(self, work: Work) -> None:
        """Its caller has the value while the sandbox goes; the next call begins when that has gone."""
        error = None
        try:
            async with self._new_sandbox() as sandbox:
                try:
                    value = await sandbox._call(work.function, work.args, work.kwargs)
                finally:
                    work.task = None  # it is over: a cancellation from now on waits for the end of what is left
                work.future._end(value, None, is_left=True)
        except BaseException as raised:
            error = raised
        finally:
            try:
                if not work.future.done():
                    work.future._end(None, error)
            except BaseException:  # a callback's, as of sys.exit(): the other calls go on
                LOGGER.exception("exception calling callback for %r", work.future)
            del self._running[work.future]
            self._more()


def _results(
    executor: weakref.ref[SandboxExecutor],
    fn: Callable[..., T],
    begun: deque[SandboxFuture[T]],
    rest: Iterator[tuple[Any, ...]],
    end: float | None,
) -> Iterator[T]:
    """Of calls in their order; for each that is waited for one of the rest begins, as long as somebody has the executor."""
    try:
        while begun:
            owner = executor()
            if owner is not None:
                begun.extend(owner.submit(fn, *each) for each in islice(rest, 1))
            del owner
            yield _result_or_cancel(begun.popleft(), None if end is None else end - monotonic())
    finally:
        for future in begun:
            future.cancel()


def _of_chunks(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a list of arguments; those in here travel by value. Called and answered as `fn` itself would be."""
    is_async, wants_env = parcels.is_async(fn), transport.first_wish(fn) == "env"

    def each(chunk: list[tuple[Any, ...]]) -> list[Any]:
        return [fn(*item) for item in chunk]

    async def each_async(chunk: list[tuple[Any, ...]]) -> list[Any]:
        return [await fn(*item) for item in chunk]

    def each_env(env: dict[str, Any], chunk: list[tuple[Any, ...]]) -> list[Any]:
        return [fn(dict(env), *item) for item in chunk]

    async def each_async_env(env: dict[str, Any], chunk: list[tuple[Any, ...]]) -> list[Any]:
        return [await fn(dict(env), *item) for item in chunk]

    chosen: Any = (each_async_env if wants_env else each_async) if is_async else (each_env if wants_env else each)
    chosen.__module__ = getattr(fn, "__module__", None) or __name__  # where classes are looked for that come back
    made: Callable[..., Any] = chosen
    return made


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """The executor's thread; it knows no executor, so that one of which nobody knows any more can go."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # it has ended
        loop.call_soon_threadsafe(loop.stop)


_open: weakref.WeakSet[SandboxExecutor] = weakref.WeakSet()


def _finish() -> None:
    """At the end of the interpreter, before its last threads are joined: as ThreadPoolExecutor, finish what was submitted."""
    for executor in list(_open):
        executor.shutdown()


threading._register_atexit(_finish)  # type: ignore[attr-defined]


# -- the decorator -------------------------------------------------------------------------------------------------------


class Sandboxed:
    """A function whose every call is in a sandbox; inside it is the plain function.

    Attributes:
        executor: that its calls go through; made at its first call, and anew where it was shut down.
    """

    def __init__(self, function: Callable[..., Any], settings: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._settings = settings
        self._is_async = parcels.is_async(function)
        self._executor: SandboxExecutor | None = None
        self._lock, self._pid = threading.Lock(), os.getpid()
        if self._is_async:
            mark = getattr(inspect, "markcoroutinefunction", None)  # from Python 3.12
            if mark is not None:
                mark(self)
            self._is_coroutine = getattr(asyncio.coroutines, "_is_coroutine", None)  # asyncio's own mark, until it goes
        SandboxExecutor(**settings)  # mistakes are told where it is decorated

    @property
    def executor(self) -> SandboxExecutor:
        if self._pid != os.getpid():  # another thread of the parent's may have had it
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            known = self._executor
            if known is None or known._is_shut or known._pid != os.getpid():
                known = self._executor = SandboxExecutor(**self._settings)
            return known

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self._is_async:
            return self._awaited(args, kwargs)
        future = self.executor.submit(self._function, *args, **kwargs)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # of an interrupted caller; else it is over
            raise

    async def _awaited(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await asyncio.wrap_future(self.executor.submit(self._function, *args, **kwargs))

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __copy__(self) -> Sandboxed:
        return self  # as a function's

    def __deepcopy__(self, memo: object) -> Sandboxed:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        """For whoever else pickles it: wherever it goes, its calls are in a sandbox."""
        found: Any = sys.modules.get(self.__module__) if self.__module__ != "__main__" else None
        path: str = getattr(self, "__qualname__", "")
        for name in path.split("."):
            found = getattr(found, name, None)
        return path if found is self else (Sandboxed, (self._function, self._settings))


transport.travels_as[Sandboxed] = lambda decorated: (copy.copy, (decorated._function,))  # which for a function is itself


@overload
def sandboxed(function: Callable[P, T], /) -> Callable[P, T]: ...


@overload
def sandboxed(
    *,
    level: IsolationLevel | str | None = None,
    limits: PluginLimitsV2 | None = None,
    permissions: PluginPermissionsV2 | None = None,
    config: IsolationConfig | None = None,
    timeout: float | None = None,
    max_workers: int | None = None,
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def sandboxed(function: Callable[..., Any] | None = None, /, **settings: Any) -> Any:
    """Decorate a function so that each of its calls is in a sandbox: `@sandboxed`, or `@sandboxed(level="strict")`.

    Settings are as for SandboxExecutor: level, limits, permissions, config, timeout, max_workers. A call returns or raises what
    `execute_plugin_safe` does; of an `async def` function it is a coroutine, whose cancellation kills the call. Functions that
    it calls run with it, in the same sandbox, also those that are decorated themselves.
    """
    if isinstance(function, (classmethod, property)):
        kind = type(function).__name__
        raise TypeError(f"sandboxed: a {kind} is no function: put @sandboxed below @{kind}")
    if function is not None and not callable(function):
        mend = "write @sandboxed, or settings by name, as in @sandboxed(level='strict')"
        raise TypeError(f"sandboxed: {function!r} is no function: {mend}")
    if function is not None:
        return Sandboxed(function, settings)
    return lambda decorated: Sandboxed(decorated, settings)
