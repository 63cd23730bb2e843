"""What `psie quarantine`, `psie history` and `psie audit` share: opening the store, times as people write and read them."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime

from sandbox.cli.inputs import UsageError
from sandbox.cli.session import complain, say
from sandbox.errors import SandboxException
from sandbox.recovery.store import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def with_store(command: Callable[[Store], int]) -> int:
    """The status of `command`; one sentence and 125 where the records cannot be had or the command line is wrong."""
    try:
        with Store(on_trouble=say) as store:
            return command(store)
    except (SandboxException, UsageError) as error:
        return complain(error)


def known_as(plugin: str, is_known: Callable[[str], bool]) -> str:
    """The id that a person means: of a file it is its absolute path."""
    path = os.path.abspath(plugin)
    return path if not is_known(plugin) and is_known(path) else plugin


def shown_time(moment: float | None) -> str:
    """Unix time as local time; "" for none."""
    if moment is None:
        return ""
    try:
        return datetime.fromtimestamp(moment).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # no year that a calendar has
        return f"{moment:g}"


def since(text: str | None) -> float | None:
    """Unix time of a date, a time in ISO 8601, or an age such as 90m, 24h or 7d. Raises UsageError."""
    if text is None:
        return None
    age = re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII)
    if age is not None:
        return time.time() - int(age[1]) * SECONDS[age[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(f"--since {text}: give an age such as 24h or 7d, or a time such as 2026-01-31T12:00") from None
