"""How a command ends by SIGTERM or SIGHUP that has made things on this host: by an exception, so that they are removed."""

from __future__ import annotations

import logging
import signal
from typing import NoReturn


def by_exception() -> None:
    """From now on; what is ignored, as by nohup, stays so."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, leave)


def leave(number: int, frame: object) -> NoReturn:
    logging.getLogger("asyncio").disabled = True  # of a task that ends by this it would show the traceback
    raise SystemExit(128 + number)
