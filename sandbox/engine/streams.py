"""The standard streams of a call, as the host's side sees them: pipes that are read, counted and handed on.

Must not know where the output goes: a sink is a function of bytes.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox.engine.loop import Loop

    Sink = Callable[[bytes], None]

READ = 65536


class Streams:
    """Stdin from /dev/null (or a given fd), stdout and stderr through pipes into sinks, all output counted together.

    `on_excess` is called once when more than `limit` bytes have come; what comes after is read and dropped.
    """

    def __init__(
        self, loop: Loop, limit: int, on_excess: Callable[[], None], sinks: tuple[Sink, Sink], stdin: int | None
    ) -> None:
        self.loop = loop
        self.limit = limit
        self.on_excess = on_excess
        self.used = 0
        self.sinks: dict[int, Sink] = {}
        self.inside = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) if stdin is None else os.dup(stdin)]
        for sink in sinks:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(reader, False)
            self.inside.append(writer)
            self.sinks[reader] = sink
            loop.add_reader(reader, self._readable, reader)

    def close_inside(self) -> None:
        """The sandbox has its copies: ours would keep the pipes open."""
        while self.inside:
            os.close(self.inside.pop())

    def _readable(self, fd: int) -> bool:
        """Read once; False at the end, or when there is nothing now."""
        try:
            data = os.read(fd, READ)
        except BlockingIOError:
            return False
        if not data:
            self._close(fd)
            return False
        before = self.used
        self.used += len(data)
        if self.used > self.limit:
            data = data[: max(0, self.limit - before)]
            if before <= self.limit:
                self.on_excess()
        if data:
            self.sinks[fd](data)
        return True

    def _close(self, fd: int) -> None:
        self.loop.remove_reader(fd)
        del self.sinks[fd]
        os.close(fd)

    def finish(self) -> None:
        """The writers have gone: read what is left and close."""
        self.close_inside()
        for fd in list(self.sinks):
            while fd in self.sinks and self._readable(fd):
                pass
            if fd in self.sinks:
                self._close(fd)
