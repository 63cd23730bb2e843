"""What --summary says on stderr when a run is over: at most five lines. Must not know how anything was enforced or measured."""

from __future__ import annotations

import os

from sandbox.cli import colours
from sandbox.cli.words import counted, duration, number
from sandbox.recipe_data import ENFORCED, MISSING, SUBSTITUTED
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandbox.cli.session import Session
    from sandbox.recipe_data import Protection

STDERR = 2
NARROWEST = 40  # columns: in fewer, lines are broken by the terminal
STYLES = {ENFORCED: colours.GREEN, SUBSTITUTED: colours.YELLOW, MISSING: colours.RED}


def show(session: Session, status: int) -> None:
    coloured = colours.are_wanted(STDERR)
    columns = os.get_terminal_size(STDERR).columns if os.isatty(STDERR) else 0
    for name, parts, style in lines(session, status):
        head = f"psie: {name}: " if parts else f"psie: {name}"
        fits = columns - len(head) if name in STYLES and columns >= NARROWEST else 0
        rest = fitted([escape_text(part, keep="") for part in parts], fits)
        shown = head.replace(name, colours.paint(name, style), 1) if coloured else head
        try:
            os.write(STDERR, f"{shown}{rest}\n".encode("utf-8", "backslashreplace"))
        except OSError:
            return  # nobody listens


def lines(session: Session, status: int) -> list[tuple[str, list[str], str]]:
    """(how it begins, the rest, colour of the beginning)"""
    named = {state: names(session.protections(), state) for state in STYLES}
    ended = f"level {session.recipe.level}, status {status}, {duration(session.seconds)}"
    found = [(ended, list[str](), colours.GREEN if status == 0 else colours.RED), (ENFORCED, named[ENFORCED], STYLES[ENFORCED])]
    if named[SUBSTITUTED] and named[MISSING]:
        named[MISSING][0] = f"{MISSING}: {named[MISSING][0]}"
        found.append((SUBSTITUTED, named[SUBSTITUTED] + named[MISSING], STYLES[MISSING]))
    else:
        found += [(state, named[state], STYLES[state]) for state in (SUBSTITUTED, MISSING) if named[state]]
    measured = used(session)
    if measured:
        found.append(("used", measured, ""))
    if session.recovery is not None and session.recovery.history:
        found.append(("recovery", [step["action"] for step in session.recovery.history], colours.YELLOW))
    return found


def names(protections: Sequence[Protection], state: str) -> list[str]:
    return [each.name for each in protections if each.state == state]


def used(session: Session) -> list[str]:
    """Peaks, of their limits, and counts."""
    watch, recorder = session.watch, session.recorder
    parts, peak = [], session.peak_memory_mb()
    if peak:  # else nobody has seen it
        parts.append(f"memory {number(peak)} of {number(float(session.limits['max_memory_mb']))} MB")
    if watch is not None and any(each["cpu_percent"] is not None for each in session.samples):
        parts.append(f"CPU {number(watch.peak_cpu)} of {number(float(session.limits['max_cpu_percent']))} %")
    if recorder is not None and recorder.count:
        parts.append(counted(recorder.count, "change") + " to files")
    if session.network_operations:
        parts.append(counted(session.network_operations, "network operation"))
    return parts


def fitted(parts: list[str], columns: int) -> str:
    """A list in so many columns, the last ones only counted; all of it for 0."""
    if columns <= 0 or len(", ".join(parts)) <= columns:
        return ", ".join(parts)
    for shown in range(len(parts) - 1, 0, -1):
        line = f"{', '.join(parts[:shown])} and {len(parts) - shown} more"
        if len(line) <= columns:
            return line
    return f"{len(parts)} of them"
