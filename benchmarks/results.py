"""What has been measured: the figures of each measure, what is wanted of them, as a table and as JSON.

Must measure nothing itself, and draw nothing.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

WIDTH = 56  # of a name in the table


@dataclass
class Wanted:
    """One thing that is wanted: `value` is to be at most, or at least, `bound`. A value of None: what it takes is missing.

    `floor`, of the same run, is of what does only that which cannot be left out: a sandbox that does more is no better.
    """

    what: str
    value: float | None
    relation: str  # "at most" or "at least"
    bound: float
    unit: str
    floor: float | None = None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "unknown"
        is_met = self.value <= self.bound if self.relation == "at most" else self.value >= self.bound
        return "met" if is_met else "MISSED"


@dataclass
class Figures:
    """What one measure has found.

    Attributes:
        name: of the measure, as `--only` has it.
        title: what was done.
        unit: of the samples: ms, MB, s, or "a second".
        samples: of each contender, in the order in which they were taken.
        ours: the contender to which the others are compared.
        wanted: and whether it is so.
        curves: of some contenders, points (x, y); `axes` says what x and y are.
    """

    name: str
    title: str
    unit: str
    ours: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    wanted: list[Wanted] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")

    def median(self, contender: str) -> float | None:
        values = self.samples.get(contender)
        return statistics.median(values) if values else None

    def ratio(self, ours: str, theirs: str) -> float | None:
        """Of the medians; None where either was not measured."""
        one, other = self.median(ours), self.median(theirs)
        return one / other if one is not None and other else None

    def want(
        self, what: str, value: float | None, relation: str, bound: float, unit: str = "times", floor: float | None = None
    ) -> None:
        self.wanted.append(Wanted(what, value, relation, bound, unit, floor))


@dataclass
class Report:
    """A whole run. `about` says on what machine, when, and with what."""

    about: dict[str, Any]
    measures: list[Figures] = field(default_factory=list)

    def save(self, path: Path) -> None:
        content = asdict(self)
        for measure, figures in zip(content["measures"], self.measures, strict=True):
            measure["medians"] = {contender: figures.median(contender) for contender in figures.samples}
            for wanted, each in zip(measure["wanted"], figures.wanted, strict=True):
                wanted["verdict"] = each.verdict
        path.write_text(json.dumps(content, indent=1) + "\n")

    def publish(self, path: Path) -> None:
        """What the documentation shows: medians, and what is wanted."""
        measures = [
            {
                **{"name": figures.name, "title": figures.title, "unit": figures.unit, "ours": figures.ours},
                "medians": {contender: figures.median(contender) for contender in figures.samples},
                "wanted": [{**asdict(wanted), "verdict": wanted.verdict} for wanted in figures.wanted],
            }
            for figures in self.measures
        ]
        path.write_text(json.dumps({"about": self.about, "measures": measures}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        content = json.loads(path.read_text())
        report = cls(content["about"])
        for measure in content["measures"]:
            del measure["medians"]
            for wanted in measure["wanted"]:
                del wanted["verdict"]
            measure["wanted"] = [Wanted(**wanted) for wanted in measure["wanted"]]
            measure["axes"] = tuple(measure["axes"])
            curves = measure["curves"].items()
            measure["curves"] = {contender: [(x, y) for x, y in points] for contender, points in curves}
            report.measures.append(Figures(**measure))
        return report


def number(value: float) -> str:
    """With three digits that count, or all of those before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def table(figures: Figures) -> str:
    """Medians, 95th percentiles, psie's median over each contender's, and what is wanted."""
    lines = [f"{figures.title} ({figures.unit})", f"  {'':<{WIDTH}}{'median':>10}{'p95':>10}{'psie / it':>12}"]
    for contender, values in figures.samples.items():
        if not values:
            lines.append(f"  {contender:<{WIDTH}}{'-':>10}")
            continue
        p95 = sorted(values)[min(len(values) - 1, int(len(values) * 0.95))]
        ratio = figures.ratio(figures.ours, contender)
        shown = "" if ratio is None or contender == figures.ours else number(ratio)
        lines.append(f"  {contender:<{WIDTH}}{number(statistics.median(values)):>10}{number(p95):>10}{shown:>12}")
    for each in figures.wanted:
        value = "not measured" if each.value is None else number(each.value)
        floor = "" if each.floor is None else f"; the floor: {number(each.floor)}"
        lines.append(f"    {each.verdict:<8}{each.what}: {value} (wanted {each.relation} {each.bound:g} {each.unit}{floor})")
    return "\n".join(lines)


def summary(report: Report) -> str:
    """All that is wanted, met or not, in one place."""
    rows = [(figures.name, wanted) for figures in report.measures for wanted in figures.wanted]
    if not rows:
        return "nothing is wanted of what was measured"
    lines = [f"{'measure':<12}{'what is wanted':<{WIDTH + 12}}{'wanted':>18}{'measured':>12}{'floor':>10}   "]
    for name, wanted in rows:
        sign = "<=" if wanted.relation == "at most" else ">="
        measured = "-" if wanted.value is None else number(wanted.value)
        asked = f"{sign} {wanted.bound:g} {wanted.unit}"
        floor = "" if wanted.floor is None else number(wanted.floor)
        lines.append(f"{name:<12}{wanted.what:<{WIDTH + 12}}{asked:>18}{measured:>12}{floor:>10}   {wanted.verdict}")
    return "\n".join(lines)
