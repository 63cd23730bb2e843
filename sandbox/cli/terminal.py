"""A pseudo-terminal for interactive plugins, between the person's terminal and the sandbox.

The person's terminal is put into raw mode and given back whatever happens; the plugin has a terminal of its own, whose
line discipline turns Ctrl-C into its SIGINT. Sources: pty(7), termios(3), ioctl_tty(2).
"""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import termios
import tty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox.engine.loop import PollLoop

INTERRUPT = 0x03  # Ctrl-C


class Terminal:
    """The pty of one call.

    `on_interrupts()` at a second Ctrl-C in a row, and at the first while no plugin has `begun` that could take it,
    `on_excess()` after `limit` bytes of output, `on_end()` when nothing can be typed any more.
    """

    def __init__(
        self,
        loop: PollLoop,
        output: Callable[[bytes], None],
        *,
        limit: int,
        on_interrupts: Callable[[], None],
        on_excess: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self.loop = loop
        self.output = output
        self.left = limit
        self.on_interrupts = on_interrupts
        self.on_excess = on_excess
        self.on_end = on_end
        self.master, slave = os.openpty()
        for fd in (self.master, slave):
            os.set_inheritable(fd, False)
        self.inside = [slave, os.dup(slave), os.dup(slave)]
        self.begun = False
        self.interrupts = 0
        self.pending = b""
        self.saved = termios.tcgetattr(0)
        self._resize(0, None)
        atexit.register(self._restore)
        tty.setraw(0, termios.TCSANOW)
        os.set_blocking(self.master, False)
        signal.signal(signal.SIGWINCH, self._resize)
        loop.add_reader(0, self._typed)
        loop.add_reader(self.master, self._shown)

    def close_inside(self) -> None:
        while self.inside:
            os.close(self.inside.pop())

    def _resize(self, number: int, frame: object) -> None:
        try:
            size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))
        except OSError:
            return  # the person's terminal has gone
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def _typed(self) -> None:
        try:
            data = os.read(0, 4096)
        except OSError:  # EIO
            data = b""
        if not data:
            self.loop.remove_reader(0)
            self.on_end()
            return
        for byte in data:
            self.interrupts = self.interrupts + 1 if byte == INTERRUPT else 0
            if self.interrupts == 2 or (self.interrupts and not self.begun):
                self.on_interrupts()
        self.pending += data
        self._pass_on()

    def _pass_on(self) -> None:
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.master, self.pending) :]
        except BlockingIOError:
            self.loop.add_writer(self.master, self._pass_on)
            return
        self.loop.remove_writer(self.master)

    def _shown(self) -> bool:
        """Show what has come from the plugin; False when there is no more."""
        try:
            data = os.read(self.master, 65536)
        except BlockingIOError:
            return False
        except OSError:  # EIO: the last process with the terminal has gone
            data = b""
        if not data:
            self.loop.remove_reader(self.master)
            return False
        if self.left >= 0:
            self.output(data[: self.left])
            self.left -= len(data)
            if self.left < 0:
                self.on_excess()
        return True

    def close(self) -> None:
        """Show the rest, and give the person's terminal back."""
        self.close_inside()
        while self._shown():
            pass
        for fd in (0, self.master):
            self.loop.remove_reader(fd)
        self.loop.remove_writer(self.master)
        os.close(self.master)
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        self._restore()
        atexit.unregister(self._restore)

    def _restore(self) -> None:
        try:
            termios.tcsetattr(0, termios.TCSADRAIN, self.saved)
        except (termios.error, OSError):
            return  # the person's terminal has gone
