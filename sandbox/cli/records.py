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
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def with_store(command: Callable[[Store], int]) -> int:
    """The status of `command`; one sentence and 125 where the records cannot be had or the command line is wrong."""
    try:
        with Store(on_trouble=say) as store:
            return command(store)
    except (SandboxException, UsageError) as error:
        return complain(error)


def known_as(plugin: str, is_known: Callable[[str], bool]) -> str:
    """The id that a person means: of a file it is its absolute path, with escapes for what is no UTF-8, as the store has it."""
    for each in (plugin, os.path.abspath(plugin)):
        stored = each.encode("utf-8", "backslashreplace").decode()
        if is_known(stored):
            return stored
    return plugin


def one_of(plugin: str, known: Iterable[str]) -> str:
    """The id that a person means among these, who may also have it as psie shows it: with escapes for what is no text."""
    ids = set(known)
    name = known_as(plugin, ids.__contains__)
    shown = [each for each in ids if escape_text(each, keep="") == plugin]
    return shown[0] if name not in ids and len(shown) == 1 else name


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
