"""When what psie says on a terminal is coloured, and how.

NO_COLOR (https://no-color.org) comes first, then FORCE_COLOR (https://force-color.org), then TERM=dumb, then whether it is a
terminal at all: as CPython does it.
"""

from __future__ import annotations

import os

BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"


def are_wanted(fd: int) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and os.isatty(fd)


def paint(text: str, style: str) -> str:
    """`text`, which is safe for a terminal already, in a style of console_codes(4)."""
    return f"\x1b[{style}m{text}\x1b[0m" if style else text
