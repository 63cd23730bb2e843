"""The little that the engine's host side asks of an event loop, and the smallest loop that gives it.

asyncio's loops give it as they are; importing asyncio costs 50 ms, which the command line does not have.
Must not know what is waited for.
"""

from __future__ import annotations

import errno
import select
from _heapq import heapify, heappop, heappush  # heapq.py is Python code that says the same
from time import monotonic as monotonic  # also for those who use this loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class Timer(Protocol):
        def cancel(self) -> None: ...

    class Loop(Protocol):
        """The part of asyncio.AbstractEventLoop that the engine uses."""

        def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None: ...
        def remove_reader(self, fd: int) -> bool: ...
        def add_writer(self, fd: int, callback: Callable[..., Any], *args: Any) -> None: ...
        def remove_writer(self, fd: int) -> bool: ...
        def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer: ...


# From epoll_ctl(2): what is always ready, and what was opened with O_PATH and can only fail.
REFUSED = errno.EPERM, errno.EBADF
TIMERS = 64  # of which any number may be cancelled; of more, at most half and those that have come since
LATE = 1.0  # seconds after which a timer has not just been served late: this process has been stopped


class PollTimer:
    def __init__(self, when: float, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.when = when
        self.callback: Callable[..., Any] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def __lt__(self, other: PollTimer) -> bool:
        return self.when < other.when


class PollLoop:
    """A loop over epoll(7) for one thread that has nothing else to do: what a round costs does not grow with what is waited
    for. What epoll refuses - files, folders, /dev/null - is always ready, as poll(2) says of it too.

    A descriptor is removed before it is closed: a fork may have it open still, and what it tells would come for ever.
    """

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.readers: dict[int, Callable[[], Any]] = {}
        self.writers: dict[int, Callable[[], Any]] = {}
        self.watched: set[int] = set()  # by epoll
        self.always: dict[int, int] = {}  # what it refuses, and what is wanted of that
        self.fresh: set[int] = set()  # registered since the last look
        self.timers: list[PollTimer] = []  # a heap; those that were cancelled stay for a while
        self.most_timers = TIMERS

    def _register(self, fd: int) -> None:
        mask = (select.EPOLLIN if fd in self.readers else 0) | (select.EPOLLOUT if fd in self.writers else 0)
        if fd in self.watched:
            if mask:
                self.epoll.modify(fd, mask)
            else:
                self.epoll.unregister(fd)
                self.watched.remove(fd)
        elif not mask:
            self.always.pop(fd, None)
        elif fd in self.always:
            self.always[fd] = mask
        else:
            try:
                self.epoll.register(fd, mask)
                self.watched.add(fd)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                self.always[fd] = mask

    def _add(self, callbacks: dict[int, Callable[[], Any]], fd: int, callback: Callable[[], Any]) -> None:
        """Raises OSError, and then all is as it was."""
        before = callbacks.get(fd)
        callbacks[fd] = callback
        try:
            self._register(fd)
        except BaseException:
            del callbacks[fd]
            if before is not None:
                callbacks[fd] = before
            raise
        self.fresh.add(fd)

    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        self._add(self.readers, fd, lambda: callback(*args))

    def remove_reader(self, fd: int) -> bool:
        if self.readers.pop(fd, None) is None:
            return False
        self._register(fd)
        return True

    def add_writer(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        self._add(self.writers, fd, lambda: callback(*args))

    def remove_writer(self, fd: int) -> bool:
        if self.writers.pop(fd, None) is None:
            return False
        self._register(fd)
        return True

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> PollTimer:
        if len(self.timers) > self.most_timers:
            self.timers = [timer for timer in self.timers if timer.callback is not None]
            heapify(self.timers)
            self.most_timers = max(TIMERS, 2 * len(self.timers))
        timer = PollTimer(monotonic() + delay, callback, args)
        heappush(self.timers, timer)
        return timer

    def run_once(self, wait: float | None = None) -> None:
        """One round: at most `wait` seconds for the next event, then whatever is due, then the events.

        What is due comes first, so that after this process has been stopped nothing gets in before its end.
        """
        while self.timers and self.timers[0].callback is None:
            heappop(self.timers)
        if self.always:
            wait = 0.0
        if self.timers:
            due = max(0.0, self.timers[0].when - monotonic())
            wait = due if wait is None else min(wait, due)
        self.fresh.clear()
        told = self._wait(wait)
        # A callback may close descriptors, and another one open others of the same number: those have not been heard of yet.
        heard = [
            (event, fd, self.readers.get(fd), self.writers.get(fd))
            for fd, event in (*told, *self.always.items())
            if fd not in self.fresh
        ]
        now = monotonic()
        while self.timers and self.timers[0].when <= now:
            timer = heappop(self.timers)
            callback, args = timer.callback, timer.args
            timer.cancel()
            if callback is not None:
                callback(*args)
        for event, fd, reader, writer in heard:
            if event & ~select.EPOLLOUT and reader is not None and self.readers.get(fd) is reader:
                reader()
            if event & ~select.EPOLLIN and writer is not None and self.writers.get(fd) is writer:
                writer()

    def _wait(self, wait: float | None) -> list[tuple[int, int]]:
        """The next events, after at most so many seconds."""
        return self.epoll.poll(wait)

    def close(self) -> None:
        """Nothing is waited for any more."""
        self.epoll.close()

    def run_until(self, finished: Callable[[], bool]) -> None:
        """Serve until `finished()`; it is asked after every round."""
        while not finished():
            self.run_once()


class Patience:
    """Calls `run_out` when an answer has not come within `seconds`, unless it is cancelled; `after` so many seconds more.

    Who is called late has been stopped himself, perhaps together with those he waits for: he waits once more, because the
    answer may be on its way.
    """

    def __init__(self, loop: Loop, seconds: float, run_out: Callable[[], None], after: float = 0.0) -> None:
        self.loop = loop
        self.seconds = seconds
        self.run_out = run_out
        self._begin(seconds + after)

    def _begin(self, seconds: float) -> None:
        self.due = monotonic() + seconds
        self.timer = self.loop.call_later(seconds, self._is_due)

    def _is_due(self) -> None:
        if monotonic() > self.due + LATE:
            self._begin(self.seconds)
        else:
            self.run_out()

    def cancel(self) -> None:
        self.timer.cancel()
