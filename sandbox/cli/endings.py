"""How a command ends by SIGTERM or SIGHUP that has made things on this host: by an exception, so that they are removed."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def by_exception() -> Iterator[None]:
    """SystemExit with 128 plus the signal's number, as from a shell; what is ignored, as by nohup, stays so."""
    come: list[int] = []

    def arrived(number: int, frame: object) -> None:
        """Between two callbacks where an event loop runs: in the middle of one, what it has taken from a socket would be lost,
        and who tidies up would wait for it."""
        logging.getLogger("asyncio").disabled = True  # of a task that ends by this it would show the traceback
        come.append(number)
        loop = asyncio._get_running_loop()
        if loop is None:
            leave(number)
        loop.call_soon_threadsafe(leave, number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, arrived)
    try:
        yield
    finally:  # also of a loop that was about to end, or where another error came of it
        if come:
            leave(come[0])


def leave(number: int) -> NoReturn:
    raise SystemExit(128 + number)
