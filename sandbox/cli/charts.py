"""Courses over time as inline SVG, without a script and without a style attribute: both would need a weaker policy.

Only lines are SVG, stretched to the width that there is; all text is HTML beside it, which stays as large as the reader wants
it. Must not know what is measured, nor where the colours come from (classes that a style sheet names).
"""

from __future__ import annotations

from math import ceil, floor, log10

from sandbox.cli.markup import Markup, joined, tag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Point = tuple[float, float | None]  # seconds, value; None where nobody has measured it

MOST = 600  # points that are drawn of a series
WIDTH, HEIGHT = 1000, 200  # of the picture's own units
ROWS = 4  # at most, between lines across
COLUMNS = 8  # at most, between marks of time
DAY = 86400
TIME_STEPS = (60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, DAY)
FAR = 40  # a limit that is so many times what was used is not drawn: the course would be a line at the bottom

LINE, STEPS_BEFORE, STEPS_AFTER = "line", "steps before", "steps after"


class Series:
    """What was measured. `shape`: a line from point to point; or each value holds since the point before; or until the next."""

    def __init__(self, name: str, style: str, points: Sequence[Point], shape: str = LINE) -> None:
        self.name = name
        self.style = style
        self.points = points
        self.shape = shape

    @property
    def highest(self) -> float:
        return max((value for _, value in self.points if value is not None), default=0.0)

    @property
    def is_empty(self) -> bool:
        return all(value is None for _, value in self.points)


class Level:
    """A limit: a line across."""

    def __init__(self, name: str, style: str, value: float) -> None:
        self.name = name
        self.style = style
        self.value = value


def chart(
    title: str, unit: str, series: Sequence[Series], levels: Sequence[Level], end: float, *, whole: bool = False
) -> Markup:
    """A figure: `series` from 0 to `end` seconds, `levels` across. With `whole` they are counts."""
    series = [each for each in series if not each.is_empty]
    if not series:
        return tag("figure", tag("figcaption", tag("h3", title)), tag("p", "Nobody counts this here.", class_="none"))
    highest = max(each.highest for each in series)
    drawn = [level for level in levels if level.value <= max(highest * FAR, 1)]
    rows, top = scale(max([highest, *(level.value for level in drawn)]), whole=whole)
    columns, last = times(end)
    paths = [tag("path", class_=f"course {each.style}", d=course(each, last, top)) for each in series]
    paths += [
        tag("path", class_=f"level {each.style}", d=f"M0 {HEIGHT * (1 - each.value / top):.1f}H{WIDTH}") for each in drawn
    ]
    legend = [entry(each.name, f"course {each.style}") for each in series]
    legend += [
        entry(each.name, f"level {each.style}") if each in drawn else entry(f"{each.name}, far above") for each in levels
    ]
    seconds, per = unit_of_time(last)
    size = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "preserveAspectRatio": "none"}
    plot = (
        tag("div", *(tag("span", f"{top * row / rows:,.6g}") for row in range(rows, -1, -1)), class_="y"),
        tag("svg", grid(rows, columns), *paths, **size, role="img", aria_label=f"{title} over time"),
        tag("div", *(tag("span", f"{last * each / columns / per:.6g}") for each in range(columns + 1)), class_="x"),
        tag("div", f"time in {seconds}", class_="time"),
    )
    head = (tag("h3", title, tag("span", f" in {unit}", class_="unit")), tag("ul", *legend, class_="legend"))
    return tag("figure", tag("figcaption", *head), tag("div", *plot, class_="plot"))


def entry(name: str, style: str = "") -> Markup:
    """A line of a legend, with how it looks in the picture."""
    sample = tag("svg", tag("path", class_=style, d="M0 5H22"), viewBox="0 0 22 10", aria_hidden="true")
    return tag("li", sample if style else "", name)


def grid(rows: int, columns: int) -> Markup:
    across = "".join(f"M0 {HEIGHT * row / rows:.1f}H{WIDTH}" for row in range(rows + 1))
    down = "".join(f"M{WIDTH * column / columns:.1f} 0V{HEIGHT}" for column in range(columns + 1))
    return tag("path", class_="grid", d=across + down)


def course(series: Series, last: float, top: float) -> str:
    """The path: broken where nothing was measured, a dot where a value stands alone."""
    said: list[str] = []
    before: Point | None = None
    for seconds, value in thinned(series.points):
        earlier, before = before, (seconds, value)
        if value is None:
            continue
        x, y = WIDTH * seconds / last, HEIGHT * (1 - value / top)
        if earlier is not None and earlier[1] is None and series.shape == STEPS_BEFORE:
            said.append(f"M{WIDTH * earlier[0] / last:.1f} {y:.1f}H{x:.1f}")
        elif earlier is None or earlier[1] is None:
            said.append(f"M{x:.1f} {y:.1f}h.1")  # with round ends: a dot
        elif series.shape == STEPS_BEFORE:
            said.append(f"V{y:.1f}H{x:.1f}")
        elif series.shape == STEPS_AFTER:
            said.append(f"H{x:.1f}V{y:.1f}")
        else:
            said.append(f"L{x:.1f} {y:.1f}")
    return "".join(said)


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most about so many: of each stretch of them the lowest and the highest, in their order, and the first and the last."""
    if len(points) <= most:
        return list(points)
    kept = [points[0]]
    size = ceil((len(points) - 2) / (most // 2 - 1))
    for start in range(1, len(points) - 1, size):
        stretch = points[start : min(start + size, len(points) - 1)]
        measured = [(value, place) for place, (_, value) in enumerate(stretch) if value is not None]
        places = sorted({min(measured)[1], max(measured)[1]}) if measured else [0]
        kept += [stretch[place] for place in places]
    return [*kept, points[-1]]


def scale(highest: float, *, whole: bool = False) -> tuple[int, float]:
    """(rows, value at the top): at least `highest`, each row a round number, or a whole one."""
    step = rounded_up(max(highest, 1e-9) / ROWS)
    step = ceil(step) if whole else step
    rows = max(1, ceil(highest / step - 1e-9))
    return rows, rows * step


def rounded_up(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5 and 8 times a power of ten."""
    power = 10.0 ** floor(log10(value))
    return next(digit * power for digit in (1, 2, 2.5, 4, 5, 8, 10) if digit * power >= value * (1 - 1e-9))


def times(end: float) -> tuple[int, float]:
    """(columns, seconds at the right): at least `end`, each column a round time."""
    least = max(end, 1e-3) / COLUMNS
    step = rounded_up(least) if least <= 30 else next((each for each in TIME_STEPS if each >= least), DAY * ceil(least / DAY))
    columns = max(1, ceil(end / step - 1e-9))
    return columns, columns * step


def unit_of_time(last: float) -> tuple[str, float]:
    """(name, seconds) of the unit for an axis up to `last` seconds."""
    if last < 1:
        return "ms", 0.001
    if last <= 120:
        return "s", 1
    return ("min", 60) if last <= 7200 else ("h", 3600)


def meter(share: float, style: str) -> Markup:
    """A bar that is filled to `share`."""
    full = f"{100 * min(1.0, max(0.0, share)):.1f}%"
    bar = (tag("rect", class_="rest", width="100%", height="100%"), tag("rect", class_=style, width=full, height="100%"))
    return tag("svg", joined(bar), class_="meter", aria_hidden="true")
