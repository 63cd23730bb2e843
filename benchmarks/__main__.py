"""`python -m benchmarks`: psie beside what people use in its place, on the same work, in the same rounds; what is wanted, and
whether it is so.

Prints a table of medians with ratios, and writes figures (JSON) and plots (SVG) into benchmarks/results; with --publish those
of the documentation, too. Run it on a quiet machine, as root and as a user; benchmarks/measures.py has the measures,
benchmarks/peers.py the peers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from benchmarks import peers
from benchmarks.measures import MEASURES, Bench
from benchmarks.results import Report, summary, table
from sandbox import __version__
from sandbox.engine.service import shut_down
from sandbox.recovery import private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

RESULTS = peers.ROOT / "benchmarks" / "results"
PUBLISHED = peers.ROOT / "docs" / "speed.json"  # tools/docs_tables.py makes tables of it


def about(*, quick: bool) -> dict[str, Any]:
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "psie": __version__,
        "who": "root" if os.getuid() == 0 else "rootless",
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "quick": quick,
    }


@contextlib.contextmanager
def own_records() -> Iterator[None]:
    """Calls of this process are remembered, as they always are, but not among a person's."""
    with tempfile.TemporaryDirectory(prefix="psie-bench-", dir="/var/tmp") as folder:
        place = os.path.join(folder, "psie")
        with mock.patch.object(private, "default_folder", return_value=place):
            yield


def measure(names: list[str], *, quick: bool) -> Report:
    report = Report(about(quick=quick))
    shown = report.about
    print(
        f"psie {shown['psie']}, {shown['who']}, Linux {shown['kernel']}, Python {shown['python']}, {shown['cpus']} CPUs, "
        f"load {shown['load'][0]:.1f}{' (quick: few rounds, no figures to rely on)' if quick else ''}"
    )
    with own_records(), peers.available() as found, peers.floor() as floor:
        shown["peers"] = [*found, *([peers.FLOOR] if floor is not None else [])]
        bench = Bench(quick, found, floor)
        for name in names:
            figures = asyncio.run(MEASURES[name](bench))
            shut_down()  # what stands ready is no other measure's
            report.measures.append(figures)
            print(f"\n{name}: {table(figures)}", flush=True)
    return report


def draw(report: Report, folder: Path, stem: str) -> list[Path]:
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no plots: {error}: pip install '.[bench]'", file=sys.stderr)
        return []
    return plots.draw(report, folder, stem)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="psie beside its peers, in the same rounds")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that all of it works")
    parser.add_argument("--only", action="append", choices=list(MEASURES), metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--folder", type=Path, default=RESULTS, help="for the JSON and the plots (default: %(default)s)")
    parser.add_argument("--publish", action="store_true", help="and the figures and plots that the documentation shows")
    options = parser.parse_args()
    if options.publish and (options.quick or options.only):
        parser.error("--publish is for a whole run: leave out --quick and --only")
    report = measure(options.only or list(MEASURES), quick=options.quick)
    print(f"\n{summary(report)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    stem = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path = options.folder / f"{stem}.json"
    report.save(path)
    written = [path, *draw(report, options.folder, stem)]
    if options.publish:
        report.publish(PUBLISHED)
        written += [PUBLISHED, *draw(report, PUBLISHED.parent / "images", PUBLISHED.stem)]
    for each in written:
        print(each)


if __name__ == "__main__":
    main()
