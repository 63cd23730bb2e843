"""The table, the JSON and the plots of the benchmarks, of made figures."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import peers
from benchmarks.results import Figures, Report, Wanted, number, summary, table

OURS, THEIRS = "psie, maximum", "bubblewrap + python3"
ABOUT = {"psie": "1", "who": "root", "kernel": "6", "python": "3", "cpus": 2, "date": "2020-01-01", "quick": True}


def made(name: str = "call") -> Figures:
    figures = Figures(name, "A call", "ms", OURS)
    figures.samples = {OURS: [1.0, 2.0, 3.0], THEIRS: [10.0, 40.0, 20.0], "sandlock": []}
    figures.curves = {OURS: [(1, 2.0), (8, 3.0)], THEIRS: [(1, 10.0), (8, 20.0)]}
    figures.axes = ("callers", "calls a second")
    figures.want("a call", figures.median(OURS), "at most", 2, "ms")
    figures.want("the same, of bubblewrap", figures.ratio(OURS, THEIRS), "at most", 0.05, floor=0.075)
    figures.want("the same, of the floor", figures.ratio(OURS, "C"), "at least", 0.4)
    return figures


def test_what_is_wanted_is_met_or_missed_or_unknown() -> None:
    assert [each.verdict for each in made().wanted] == ["met", "MISSED", "unknown"]
    assert Wanted("calls", 5.0, "at least", 5, "a second").verdict == "met"
    assert Wanted("calls", 4.9, "at least", 5, "a second").verdict == "MISSED"


def test_the_table_has_medians_ratios_and_verdicts() -> None:
    rows = {line[:40].strip(): line.split() for line in table(made()).splitlines()}
    assert rows[OURS][-2:] == ["2.00", "3.00"]
    assert rows[THEIRS][-3:] == ["20.00", "40.00", "0.100"]
    assert rows["sandlock"][-1] == "-"
    text = summary(Report(ABOUT, [made()]))
    assert [line.split()[-1] for line in text.splitlines()[1:]] == ["met", "MISSED", "unknown"]
    assert "<= 0.05 times" in text
    assert text.splitlines()[2].split()[-3:] == ["0.100", "0.075", "MISSED"]
    assert "MISSED  the same, of bubblewrap: 0.100 (wanted at most 0.05 times; the floor: 0.075)" in table(made())


@pytest.mark.parametrize(("value", "shown"), [(0.0123, "0.012"), (1.234, "1.23"), (1234.5, "1,234"), (0, "0")])
def test_numbers_have_the_digits_that_count(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_report_that_was_saved_is_the_same_again(tmp_path: Path) -> None:
    report = Report(ABOUT, [made(), made("memory")])
    report.save(tmp_path / "run.json")
    assert Report.load(tmp_path / "run.json") == report


def test_what_is_published_has_medians_and_verdicts(tmp_path: Path) -> None:
    Report(ABOUT, [made()]).publish(tmp_path / "speed.json")
    (measure,) = json.loads((tmp_path / "speed.json").read_text())["measures"]
    assert measure["medians"] == {OURS: 2.0, THEIRS: 20.0, "sandlock": None}
    assert [each["verdict"] for each in measure["wanted"]] == ["met", "MISSED", "unknown"]
    assert [each["floor"] for each in measure["wanted"]] == [None, 0.075, None]


def test_plots_are_drawn_of_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    report = Report(ABOUT, [made(name) for name in ("call", "run", "throughput", "memory", "standing", "cpu")])
    written = plots.draw(report, tmp_path, "run")
    assert [path.name for path in written] == [f"run-{name}.svg" for name in plots.PLOTS]
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in written)
    assert plots.draw(Report(ABOUT, [made("cpu")]), tmp_path, "none") == []


def test_a_peer_does_the_same_work() -> None:
    plain = peers.Peer(peers.PLAIN, list)
    assert plain.call(7) == 7
    with plain.standing() as pid:
        assert Path(f"/proc/{pid}").exists()
    assert "--unshare-all" in peers.bubblewrap(["python3"])
    assert peers.crun_config(["python3"])["process"]["args"] == ["python3"]
