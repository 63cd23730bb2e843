"""`python -m benchmarks.plots FILE.json`: the plots of a run, as SVG beside its figures.

Start times, the distribution of call latencies, throughput by callers, memory by how many stand, the making of many. A plot
whose measure was left out is not drawn. Must not measure.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.results import Figures, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

pyplot.rcParams["svg.fonttype"] = "none"  # text stays text
OURS, THEIRS = "#1f5fa8", "#9a9a9a"
BLUES = ["#1f5fa8", "#5b9bd5", "#0b3766", "#8ec1ec"]
OTHERS = ["#7a7a7a", "#2e4057", "#b08968"]
COLORS = {  # by the first word of a name
    "bubblewrap": "#d1495b",
    "python3": "#edae49",
    "sandlock": "#66a182",
    "ProcessPoolExecutor(2)": "#8d6a9f",
    "nsjail": "#c77dff",
    "crun": "#00a6a6",
    "C": "#333333",
}
MARKERS = "osD^vPX*"


def is_ours(contender: str) -> bool:
    return contender.startswith("psie")


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def colors(contenders: Iterable[str]) -> dict[str, str]:
    """psie in blues, a peer in the same color in every plot."""
    blues = iter(BLUES * 5)
    others = iter(OTHERS * 5)
    used = {}
    for contender in contenders:
        known = COLORS.get(contender.partition(" ")[0])
        used[contender] = next(blues) if is_ours(contender) else known or next(others)
    return used


def bars(axes: Axes, figures: Figures) -> None:
    """Medians, the fastest at the top, with a line to the 95th percentile."""
    shown = {contender: values for contender, values in figures.samples.items() if values}
    names = sorted(shown, key=lambda contender: statistics.median(shown[contender]), reverse=True)
    medians = [statistics.median(shown[name]) for name in names]
    highs = [max(0.0, percentile(shown[name], 0.95) - median) for name, median in zip(names, medians, strict=True)]
    axes.barh(names, medians, color=[OURS if is_ours(name) else THEIRS for name in names])
    axes.errorbar(medians, names, xerr=[[0.0] * len(names), highs], fmt="none", ecolor="#333333", capsize=3, linewidth=1)
    for name, median in zip(names, medians, strict=True):
        inside = axes.annotate(f"{median:.3g}", (median, name), xytext=(4, 8), textcoords="offset points", fontsize=8)
        inside.set_annotation_clip(False)
    axes.set_xlabel(f"{figures.unit}: median, and line to the 95th percentile (less is better)")
    axes.set_title(figures.title)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def distribution(axes: Axes, figures: Figures) -> None:
    """What part of the calls took at most so long."""
    used = colors(figures.samples)
    for contender, values in figures.samples.items():
        if values:
            parts = [100 * (number + 1) / len(values) for number in range(len(values))]
            axes.step(sorted(values), parts, where="post", color=used[contender], label=contender)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel(f"{figures.unit} (logarithmic; further left is better)")
    axes.set_ylabel("% of the calls took at most that")
    axes.set_ylim(0, 102)
    finish(axes, figures)


def lines(axes: Axes, figures: Figures, *, logarithmic: bool = False) -> None:
    used = colors(figures.curves)
    for (contender, points), marker in zip(figures.curves.items(), MARKERS * 5, strict=False):
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, color=used[contender], label=contender)
    axes.set_xticks(sorted({x for points in figures.curves.values() for x, _ in points}))
    name_axes(axes, figures)
    if logarithmic:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.set_ylabel(f"{figures.axes[1]} (logarithmic)")
    else:
        axes.set_ylim(bottom=0)
    finish(axes, figures)


def dots(axes: Axes, figures: Figures) -> None:
    """Of many points; what is rare does not hide the rest."""
    used = colors(figures.curves)
    heights = [y for points in figures.curves.values() for _, y in points]
    top = 1.5 * percentile(heights, 0.99)
    above = sum(height > top for height in heights)
    for contender, points in figures.curves.items():
        axes.plot([x for x, _ in points], [y for _, y in points], ".", markersize=3, color=used[contender], label=contender)
    axes.set_ylim(0, top)
    name_axes(axes, figures)
    if above:
        axes.set_xlabel(f"{figures.axes[0]} ({above} slower ones are above)")
    finish(axes, figures)


def plain_numbers(axis: Axis) -> None:
    """On a logarithmic axis: 1, 2, 5, 10 and so on."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def name_axes(axes: Axes, figures: Figures) -> None:
    axes.set_xlabel(figures.axes[0])
    axes.set_ylabel(figures.axes[1])


def finish(axes: Axes, figures: Figures) -> None:
    axes.set_title(TITLES.get(figures.name, figures.title))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)


PLOTS: dict[str, tuple[tuple[str, ...], Callable[[Axes, Figures], None]]] = {  # of which measures, and how
    "starts": (("start", "run"), bars),
    "latency": (("call",), distribution),
    "throughput": (("throughput",), partial(lines, logarithmic=True)),
    "memory": (("memory",), lines),
    "standing": (("standing",), dots),
}
TITLES = {
    "throughput": "How many fresh sandboxes with a call in each",
    "memory": "Own memory of what stands warm",
}  # where a measure's own is of something narrower


def draw(report: Report, folder: Path, stem: str) -> list[Path]:
    """Write the plots of a run into a folder; their paths."""
    measured = {figures.name: figures for figures in report.measures}
    about = report.about
    below = f"psie {about['psie']}, {about['who']}, Linux {about['kernel']}, Python {about['python']}, {about['cpus']} CPUs"
    written = []
    for name, (wanted, plot) in PLOTS.items():
        shown = [measured[each] for each in wanted if each in measured]
        if not shown:
            continue
        heights = [max(4.5, 1 + 0.38 * len(figures.samples)) if plot is bars else 5.5 for figures in shown]
        figure, rows = pyplot.subplots(
            len(shown), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
        )
        for axes, figures in zip(rows[:, 0], shown, strict=True):
            plot(axes, figures)
        quick = "; quick: few rounds" if about["quick"] else ""
        figure.supxlabel(f"{below}; {about['date']}{quick}", fontsize=7, color="#666666")
        path = folder / f"{stem}-{name}.svg"
        figure.savefig(path)
        pyplot.close(figure)
        written.append(path)
    return written


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        source = Path(argument)
        for path in draw(Report.load(source), source.parent, source.stem):
            print(path)
