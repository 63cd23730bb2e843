"""A call's caller listens to its worker itself: a job goes there, and a value comes from there, without a word with the
engine's thread, each of which costs the time of waking a thread.

It is the same work, done by whoever is awake: what is the engine's is touched only with its turn (see
sandbox.engine.service.ThreadLoop), and where that is not to be had at once, or there is more to be done than to take a small
value, the engine does it. So one frame of at most 64 KB is all that a worker can give a caller's loop to read. Must not know
what a call is for.
"""

from __future__ import annotations

import select

from sandbox.engine import channel
from sandbox.engine.client import WATCH_AFTER

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sandbox.engine.loop import Timer
    from sandbox.engine.service import Service, Worker


class Listener:
    """Of one worker, on one event loop. Every method is for that loop's thread."""

    def __init__(
        self,
        service: Service,
        worker: Worker,
        loop: asyncio.AbstractEventLoop,
        may_take: Callable[[], bool],
        on_value: Callable[[], None],
    ) -> None:
        """`may_take()`, with the engine's turn: whether nothing has to be told or done before a value; `on_value()`, likewise,
        when the call has one that is complete."""
        self.service = service
        self.call = worker.call
        self.loop = loop
        self.may_take = may_take
        self.on_value = on_value
        self._sources = worker.sources
        self._fd = -1  # that the loop watches
        self._lasting: Timer | None = None
        self._has_taken = False

    def send(self, send: Callable[[], None], size: int) -> bool:
        """Have a job of so many bytes sent now, by `send()`, and listen; False where that is the engine's work, and nothing has
        been done."""
        if size > channel.SMALL or not self.service.here(self._send, send):
            return False
        if self._fd < 0 and self.call.is_lent:
            fd = self.call.job.fileno()
            try:
                self.loop.add_reader(fd, self._heard)
            except Exception:
                self.stop()  # not every loop can do that, and a loop may be short of something: the engine can
            else:
                self._fd = fd
        return True

    def _send(self, send: Callable[[], None]) -> None:
        self.call.lend()
        send()
        self._lasting = self.call.loop.call_later(min(WATCH_AFTER, self.call.seconds / 2), self._lasts)

    def _lasts(self) -> None:
        """In the engine's thread: from now on it listens as well, and soon alone, because a caller whose loop is busy with
        something else may not be what a worker waits for."""
        self.call.listen_too()
        try:
            self.loop.call_soon_threadsafe(self.stop)
        except RuntimeError:
            pass  # it is closed

    def stop(self) -> None:
        """The engine listens from now on, or closes what was listened to. After a value that is the loop's next round, so that
        whoever has waited for it need not wait for that as well."""
        if self._fd >= 0:
            self.loop.remove_reader(self._fd)
            self._fd = -1
        elif not self.call.is_lent:
            return
        if not self._has_taken or not self.service.here(self.call.give_back):
            self.service.post(self.call.give_back)

    def _heard(self) -> None:
        """The worker has said something, or has gone: what is no value is the engine's."""
        self._has_taken = False
        try:
            self.service.here(self._take)
        except BaseException:  # a signal's: what was read then nobody reads again
            self.service.post(self.call.kill, "cancelled")
            self.stop()
            raise
        if not self._has_taken:
            self.stop()

    def _take(self) -> None:
        call = self.call
        if call.done or not call.awaits or call.reply_complete:
            return
        try:
            frame = channel.receive_frame(call.job)
        except BlockingIOError:
            return
        if call.take_value(frame, unless=bool(call.cause) or not self._is_quiet()):
            self._has_taken = True
            if self._lasting is not None:
                self._lasting.cancel()
            self.on_value()

    def _is_quiet(self) -> bool:
        """Whether the engine has nothing to tell or do before a value. That a worker has gone is no matter, nor that the engine
        has read all of it and closed what is asked about."""
        try:
            return not any(event & select.POLLIN for _, event in self._sources.poll(0)) and self.may_take()
        except OSError:
            return False  # as where this process may have fewer descriptors by now than are asked about: poll(2)
