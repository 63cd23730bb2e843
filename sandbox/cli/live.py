"""The line on a person's terminal that tells how a plugin that takes its time is doing.

It stands only where a line of the plugin's output has ended, and is taken away before anything else is written there. A plugin
cannot disturb that, because its output is escaped: without --raw it never moves the cursor but forwards. Nothing is
measured for it but by a look at what the sandbox is watched by. Source: console_codes(4).
"""

from __future__ import annotations

import os
import select
from time import monotonic

from sandbox.cli import colours
from sandbox.cli.words import counted, duration, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.cli.session import Session

STDERR = 2
PERIOD = 0.5  # seconds between two looks
SOON = 0.1  # seconds: output that comes faster than that is not interrupted each time
HEAD = "psie: "
USUAL_COLUMNS = 80  # of a terminal that does not know its size
CLEAR = b"\r\x1b[K"
NEAR, NEARER = 0.75, 0.95  # of a limit: from there on in colour


class Live:
    """The line of one session, from now on until `end`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.is_coloured = colours.are_wanted(STDERR)
        self.is_drawn = False
        self.line = b""
        self.drawn_at = 0.0
        self.timer: Any = None
        self._tick()

    def _tick(self) -> None:
        try:
            self.line = self._made()
            self._draw()
        except OSError:
            return  # the terminal has gone
        self.timer = self.session.loop.call_later(PERIOD, self._tick)

    def clear(self) -> None:
        """Something else is about to be written."""
        if self.is_drawn:
            self.is_drawn = False
            self._put(CLEAR)

    def restore(self) -> None:
        """It has been written."""
        if monotonic() - self.drawn_at > SOON and self.timer is not None:
            self._draw()

    def end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if can_take(STDERR):
            self.clear()

    def _draw(self) -> None:
        from sandbox.cli.session import is_background

        if not self.line or self.session.shown_last != b"\n" or is_background(STDERR) or not can_take(STDERR):
            return
        self.drawn_at = monotonic()
        self.is_drawn = True
        self._put(CLEAR + self.line)

    def _put(self, data: bytes) -> None:
        from sandbox.cli.session import write_some

        view = memoryview(data)
        try:
            while view:
                view = view[write_some(STDERR, view) :]
        except OSError:
            self.is_drawn = False  # the terminal has gone

    # -- what it says ------------------------------------------------------------------------------------------------

    def _made(self) -> bytes:
        columns = os.get_terminal_size(STDERR).columns or USUAL_COLUMNS
        return fitting(self._measures(), columns - 1, coloured=self.is_coloured).encode()

    def _measures(self) -> list[Measure]:
        session = self.session
        watch, recorder, limits = session.watch, session.recorder, session.recipe.limits
        seconds, most = monotonic() - session.job_sent, float(limits["seconds"])
        found = [Measure("", seconds, most, duration(int(seconds)), duration(most))]
        reading = watch.source.read() if watch is not None else None
        if watch is not None and reading is not None:
            look = watch.describe(reading)
            found += [
                Measure("memory", look["memory_mb"], watch.limits.memory, unit=" MB"),
                Measure("CPU", look["cpu_percent"], watch.limits.cpu, unit=" %"),
            ]
            if look["pids"] is not None:
                found.append(Measure(said=counted(look["pids"], "process", "processes")))
        if recorder is not None and recorder.count:
            found.append(Measure(said=counted(recorder.count, "change") + " to files"))
        return [each for each in found if each.said]


class Measure:
    """One part of the line: what is used of how much; or just `said`."""

    def __init__(
        self, name: str = "", used: float | None = None, most: float = 0.0, said: str = "", of: str = "", unit: str = ""
    ) -> None:
        self.name = name
        self.share = used / most if used is not None and most else 0.0
        self.said = said or (number(round(used)) if used is not None else "")
        self.of = of or (number(most) + unit if most else "")

    def text(self, *, short: bool) -> str:
        between = "/" if short else " of "
        return (self.name + " " if self.name else "") + self.said + (between + self.of if self.of else "")

    @property
    def style(self) -> str:
        if self.share >= NEAR:
            return colours.RED if self.share >= NEARER else colours.YELLOW
        return colours.DIM


def fitting(measures: list[Measure], columns: int, *, coloured: bool) -> str:
    """The line in so many columns: in words, or short, or without its last parts."""
    parts: list[tuple[str, str]] = []
    for short in (False, True):
        parts = [(measure.text(short=short), measure.style) for measure in measures]
        if width(parts) <= columns:
            break
    while parts and width(parts) > columns:
        parts.pop()
    if not parts or not coloured:
        return HEAD + ", ".join(text for text, _ in parts) if parts else ""
    shown = colours.paint(HEAD, colours.DIM)
    comma = colours.paint(", ", colours.DIM)
    return shown + comma.join(colours.paint(text, style) for text, style in parts)


def width(parts: list[tuple[str, str]]) -> int:
    return len(HEAD) + len(", ".join(text for text, _ in parts))


def can_take(fd: int) -> bool:
    """Would a write return at once? A terminal that was stopped by Ctrl-S takes nothing, and must not stop us."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(0))
