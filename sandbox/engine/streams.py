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


class Pump:
    """Copies a caller's stdin into a pipe, as far as somebody reads there.

    The plugin never gets the caller's own descriptor: it could be a terminal, which it would drive, or a file that it
    could seek, lock or change.
    """

    def __init__(self, loop: Loop, source: int) -> None:
        self.loop = loop
        self.source = source
        self.inside, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.writer, False)
        self.pending = b""
        self.closed = False
        loop.add_reader(source, self._fill)

    def _fill(self) -> None:
        try:
            self.pending = os.read(self.source, READ)
        except BlockingIOError:
            return
        except OSError:
            self.pending = b""  # a terminal that has gone, or is not ours to read in the background
        if not self.pending:
            self.close()
            return
        self.loop.remove_reader(self.source)
        self._drain()

    def _drain(self) -> None:
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.writer, self.pending) :]
        except BlockingIOError:
            self.loop.add_writer(self.writer, self._drain)
            return
        except BrokenPipeError:
            self.close()
            return
        self.loop.remove_writer(self.writer)
        self.loop.add_reader(self.source, self._fill)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.loop.remove_reader(self.source)
            self.loop.remove_writer(self.writer)
            os.close(self.writer)


class Streams:
    """Stdin from /dev/null or pumped from a given fd; stdout and stderr through pipes into sinks, counted together.

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
        self.pump = Pump(loop, stdin) if stdin is not None else None
        source = self.pump.inside if self.pump is not None else os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self.inside = [source]
        try:
            for sink in sinks:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                os.set_blocking(reader, False)
                self.inside.append(writer)
                self.sinks[reader] = sink
                loop.add_reader(reader, self._readable, reader)
        except OSError:
            self.finish()
            raise

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
        data = data[: max(0, self.limit - before)]
        if data:
            self.sinks[fd](data)
        if before <= self.limit < self.used:
            self.on_excess()  # last: where there is nobody left to end, we are finished in there
        return True

    def _close(self, fd: int) -> None:
        self.loop.remove_reader(fd)
        del self.sinks[fd]
        os.close(fd)

    def catch_up(self) -> None:
        """Read what has been written so far."""
        for fd in list(self.sinks):
            while fd in self.sinks and self.used <= self.limit and self._readable(fd):
                pass

    def begin_anew(self) -> None:
        """The limit is for what comes from now on."""
        self.used = 0

    def finish(self) -> None:
        """The writers have gone: read what is left, up to the limit, and close."""
        self.close_inside()
        if self.pump is not None:
            self.pump.close()
        self.catch_up()
        for fd in list(self.sinks):
            self._close(fd)
