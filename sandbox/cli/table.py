"""Tables for the terminal. Imports rich, so it is imported inside commands only. It must not know what a row is about."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sandbox.recipe_data import ENFORCED, MISSING, SUBSTITUTED
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

OK, ABSENT, WRONG = "ok", "absent", "wrong"
LIMIT, FAILURES = "limit", ("error", "violation", "refused", "quarantined")  # of a plugin's run
COLOURS = {ENFORCED: "green", OK: "green", SUBSTITUTED: "yellow", ABSENT: "yellow", MISSING: "red", WRONG: "red"}
COLOURS |= {LIMIT: "yellow", **dict.fromkeys(FAILURES, "red")}


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns side by side, wrapped to the terminal where there is one; a state in the first one is coloured."""
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table_of(head, rows))


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The same, to be printed."""
    table = Table(box=None, pad_edge=True, show_edge=False, header_style="bold")
    for title in head:
        table.add_column(title, overflow="fold")
    for first, *others in rows:
        cells = [escape_text(cell, keep="") for cell in others]
        table.add_row(Text(escape_text(first, keep=""), style=COLOURS.get(first, "")), *map(Text, cells))
    return table
