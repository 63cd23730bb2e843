"""The thread of a watchdog or a monitor: a loop that runs until it is stopped, and closes itself what it uses.

So a signal's exception in whoever starts or stops it, at any place, closes nothing under its hands.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

from sandbox.engine.client import close_fds
from sandbox.engine.loop import PollLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class WatchThread:
    """Runs `loop` from now on, until `stop`."""

    def __init__(self, name: str, loop: PollLoop, undo: ExitStack, end: Callable[[], None]) -> None:
        """`undo` closes what has been opened until it is the thread's, which closes it by `end()`, and then the loop.

        Raises OSError, and RuntimeError for "can't start new thread".
        """
        self._stop = os.pipe2(os.O_CLOEXEC)
        undo.callback(close_fds, self._stop)
        stopped = threading.Event()
        loop.add_reader(self._stop[0], stopped.set)

        def serve() -> None:
            try:
                loop.run_until(stopped.is_set)
            finally:
                with left:
                    left.callback(loop.close)
                    end()

        self._thread = threading.Thread(target=serve, name=name, daemon=True)
        opened, left = undo.pop_all(), ExitStack()
        try:
            self._thread.start()
        except RuntimeError:
            opened.close()
            raise
        except BaseException:  # a signal's: by now the thread may be there
            left.callback(close_fds, self._stop)
            os.write(self._stop[1], b"\0")
            raise

    def stop(self) -> None:
        """And wait for its end. To be called again where an exception has come, until `close`."""
        if self._thread.is_alive():
            os.write(self._stop[1], b"\0")
            self._thread.join()

    def close(self) -> None:
        close_fds(self._stop)
