"""The little that the engine's host side asks of an event loop, and the smallest loop that gives it.

asyncio's loops give it as they are; importing asyncio costs 50 ms, which the command line does not have.
Must not know what is waited for.
"""

from __future__ import annotations

import select
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


LATE = 1.0  # seconds after which a timer has not just been served late: this process has been stopped


class PollTimer:
    def __init__(self, when: float, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.when = when
        self.callback: Callable[..., Any] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None


class PollLoop:
    """A loop over poll(2) for one thread that has nothing else to do."""

    def __init__(self) -> None:
        self.poll = select.poll()
        self.readers: dict[int, Callable[[], Any]] = {}
        self.writers: dict[int, Callable[[], Any]] = {}
        self.timers: list[PollTimer] = []

    def _register(self, fd: int) -> None:
        mask = (select.POLLIN if fd in self.readers else 0) | (select.POLLOUT if fd in self.writers else 0)
        if mask:
            self.poll.register(fd, mask)
        else:
            self.poll.unregister(fd)

    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        self.readers[fd] = lambda: callback(*args)
        self._register(fd)

    def remove_reader(self, fd: int) -> bool:
        if self.readers.pop(fd, None) is None:
            return False
        self._register(fd)
        return True

    def add_writer(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        self.writers[fd] = lambda: callback(*args)
        self._register(fd)

    def remove_writer(self, fd: int) -> bool:
        if self.writers.pop(fd, None) is None:
            return False
        self._register(fd)
        return True

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> PollTimer:
        timer = PollTimer(monotonic() + delay, callback, args)
        self.timers.append(timer)
        return timer

    def run_once(self, wait: float | None = None) -> None:
        """One round: at most `wait` seconds for the next event, then whatever is due, then the events.

        What is due comes first, so that after this process has been stopped nothing gets in before its end.
        """
        self.timers = [timer for timer in self.timers if timer.callback is not None]
        due = min((max(0.0, timer.when - monotonic()) for timer in self.timers), default=None)
        waits = [seconds for seconds in (wait, due) if seconds is not None]
        events = self.poll.poll(min(waits) * 1000 if waits else None)
        now = monotonic()
        for timer in [timer for timer in self.timers if timer.when <= now]:
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback(*timer.args)
        for fd, event in events:
            if event & ~select.POLLOUT and fd in self.readers:
                self.readers[fd]()
            if event & ~select.POLLIN and fd in self.writers:
                self.writers[fd]()

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
