"""The page of --report, its courses over time and the words for numbers; and files that are written whole or not at all."""

from __future__ import annotations

import base64
import copy
import hashlib
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.cli import charts, report, results
from sandbox.cli.inputs import UsageError
from sandbox.cli.live import Measure, fitting
from sandbox.cli.markup import LONGEST, Markup, tag
from sandbox.cli.summary import fitted
from sandbox.cli.target import Target
from sandbox.cli.words import counted, duration, number, size
from sandbox.config import PluginLimitsV2
from sandbox.recipe_data import ENFORCED, MISSING, SUBSTITUTED, Protection
from sandbox.telemetry import SandboxTelemetry
from sandbox.violations import Explanation, SandboxViolation, SandboxViolationType

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.style = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


def sample(seconds: float, **values: Any) -> dict[str, Any]:
    known = {"memory_mb": 20.0, "cpu_percent": 10.0, "pids": 2, "threads": 2}
    return {"timestamp": START.isoformat(), "elapsed_seconds": seconds, **known, **values}


def result(samples: list[dict[str, Any]], seconds: float, **more: Any) -> dict[str, Any]:
    telemetry = SandboxTelemetry("run", "plugin.py", START, START + timedelta(seconds=seconds), 30.0, 45.0)
    telemetry.cleanup_successful = True
    protections = [
        Protection("no_new_privs", ENFORCED, "prctl(2)", expected={"NoNewPrivs": "1"}),
        Protection("memory", SUBSTITUTED, "RLIMIT_DATA", "128 MB", "boot another kernel"),
        Protection("CPU", MISSING, "none"),
    ]
    return {
        **{"psie": "0.1.0", "kernel": "6.12.0", "uid": 0, "plugin": "/plugins/plugin.py", "sha256": "ab" * 32},
        **{"exit_code": 0, "outcome": "ok", "reason": "exited with status 0", "level": "strict", "seconds": seconds},
        "began": START.isoformat(),
        "limits": vars(PluginLimitsV2()),
        "max_tasks": 5,
        "sampling": {"enabled": True, "interval_seconds": 0.1, "began_seconds": 0.05},
        "protections": results.protections_of(protections, {"NoNewPrivs": "1"}),
        "violations": [],
        "telemetry": {**telemetry.to_dict(), "resource_samples": samples},
        "network": [],
        "file_operations": [],
        **more,
    }


def page_of(data: dict[str, Any]) -> Page:
    before = copy.deepcopy(data)
    page = report.page(data)
    assert data == before, "a page changes nothing"
    parsed = Page(page)
    assert not parsed.open, "every element is closed"
    return parsed


# -- the page -----------------------------------------------------------------------------------------------------------


def test_it_stands_alone() -> None:
    """Nothing in it runs or loads anything; the policy allows its own style sheet and nothing else."""
    parsed = page_of(result([sample(n / 10) for n in range(20)], 2.0))
    names = {name for name, _ in parsed.elements}
    assert not names & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "a",
        "image",
        "use",
        "foreignobject",
    }
    attributes = {name for _, found in parsed.elements for name in found}
    assert not {
        name for name in attributes if name.startswith("on") or name in ("style", "src", "href", "action", "xlink:href")
    }
    assert not re.search(r"url\(|@import|expression|https?:", parsed.style)
    (policy,) = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})
    digest = base64.b64encode(hashlib.sha256(parsed.style.encode()).digest()).decode()
    assert policy["content"] == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    places = [place for place, (name, found) in enumerate(parsed.elements) if name == "style" or found == policy]
    assert parsed.elements[places[0]][0] == "meta", "the policy comes before what it governs"


def test_it_is_for_light_and_dark_narrow_and_wide() -> None:
    parsed = page_of(result([], 0.02))
    assert parsed.all("meta", name="viewport", content="width=device-width, initial-scale=1")
    assert parsed.all("meta", name="color-scheme", content="light dark")
    assert "@media (prefers-color-scheme: dark)" in parsed.style
    assert "@media (max-width: 700px)" in parsed.style


def test_a_short_run_says_that_it_has_no_samples() -> None:
    parsed = page_of(result([], 0.02))
    assert "It ran for 20 ms: too short for a sample" in parsed.text
    assert not parsed.all("figure")
    unwatched = result([], 5.0)
    assert "it could not be watched" in page_of(unwatched).text
    unwatched["sampling"]["enabled"] = False
    assert "enable_real_time_monitoring is False" in page_of(unwatched).text


def test_one_sample() -> None:
    parsed = page_of(result([sample(1.0)], 1.05))
    assert "1 sample, one every 100 ms" in parsed.text
    _, memory = parsed.all("path", **{"class": "course memory"})  # behind the one of the legend
    assert memory["d"] == "M875.0 175.0h.1", "a dot: 1.05 of 1.2 s, 20 of 160 MB"


def test_axes_have_units_and_legends() -> None:
    parsed = page_of(result([sample(n / 10) for n in range(20)], 2.0))
    for said in ("Memory in MB", "CPU in % of one CPU", "Processes and threads in tasks", "time in s"):
        assert said in parsed.text
    assert "limit 128 MB (substituted)" in parsed.text
    assert "limit 50 % (missing)" in parsed.text
    assert "warning from 96 MB" in parsed.text


def test_what_nobody_counts() -> None:
    parsed = page_of(result([sample(n / 10, cpu_percent=None) for n in range(5)], 0.5))
    assert "Nobody counts this here." in parsed.text
    assert len(parsed.all("path", **{"class": "course cpu"})) == 0
    assert "Peak CPU" not in parsed.text
    unseen = result([], 0.5)
    unseen["telemetry"]["peak_memory_mb"] = 0.0
    assert "Peak memory" not in page_of(unseen).text, "a peak that nobody has seen is no zero"


def test_a_long_run_is_thinned_and_says_so() -> None:
    samples = [sample(n / 10, memory_mb=20.0 + (n % 7)) for n in range(6000)]
    samples[3137]["memory_mb"] = 111.0
    samples[4002]["memory_mb"] = 1.0
    data = result(samples, 600.0)
    page = report.page(data)
    assert len(page) < 100_000
    parsed = Page(page)
    assert "6,000 samples" in parsed.text
    assert "only the lowest and the highest are drawn" in parsed.text
    assert "time in min" in parsed.text
    drawn = parsed.all("path", **{"class": "course memory"})[1]["d"] or ""
    heights = [float(height) for height in re.findall(r" ([\d.]+)", drawn)]
    assert len(heights) <= charts.MOST + 2
    assert min(heights) == pytest.approx(charts.HEIGHT * (1 - 111 / 160), abs=0.1)
    assert max(heights) == pytest.approx(charts.HEIGHT * (1 - 1 / 160), abs=0.1)


def test_everything_that_happened_is_on_it() -> None:
    explanation = Explanation(
        "network", "sockets are refused", "PluginPermissionsV2.allow_network_access", "--allow-host x", "[permissions]\na = 1",
        "plugin.py", 3, "PluginPermissionsV2(allow_network_access=True)", "a note",
    )  # fmt: skip
    violation = SandboxViolation(
        SandboxViolationType.NETWORK_VIOLATION, "connect() refused", START, "critical", {"count": 1200}, True, True, explanation
    )
    record = violation.to_dict()
    step = {"timestamp": START.isoformat(), "action": "freeze", "before": {"memory_mb": 99.9883}, "after": {"frozen": True}}
    operation = {
        "timestamp": (START + timedelta(seconds=1.5)).isoformat(),
        "operation": "move",
        "path": "/w/new",
        "from": "old",
    }
    activity = {"timestamp": START.isoformat(), "operation": "connect", "family": "AF_INET6", "type": "", "pid": 7, "call": 1}
    data = result(
        [],
        2.0,
        violations=[record],
        recovery=[{**step, "violation": record, "success": False, "note": "too late"}],
        file_operations=[{**operation, "size": 1}],
        network=[{**activity, "address": "2001:db8::1", "port": 443, "allowed": False, "reason": "not permitted"}],
        changes=[{"kind": "added", "path": "/data/\udcff", "size": 2048, "sha256": "cd" * 32, "problem": ""}],
        committed=False,
    )
    data["telemetry"] |= {
        "file_operations_count": 1,
        "link_counters": {"tx_bytes": 1200},
        "process_hierarchy": [{"pid": 7, "ppid": 1, "name": "evil", "status": "running", "threads": 1, "started": 0.0}],
    }
    text = page_of(data).text
    for said in (
        *("connect() refused", "1,200 times", "recovered", "sockets are refused", "--allow-host x", "[permissions]", "a note"),
        *("plugin.py, line 3", "PluginPermissionsV2(allow_network_access=True)"),
        *("freeze", "memory 100 MB", "frozen yes", "too late"),
        *("/w/new", "(from old)", "1 byte", "1.5 s"),
        *("[2001:db8::1]:443", "refused", "tx_bytes 1,200"),
        *("None was committed", "cd" * 32, "2 KB", "/data/\\udcff"),
        *("evil", "/plugins/plugin.py", "ab" * 32, "strict", "6.12.0", "boot another kernel"),
        "read back from /proc/PID/status before the plugin began",
        "1 enforced, 1 substituted, 1 missing",
    ):
        assert said in text, said


def test_long_tables_are_cut_and_say_so() -> None:
    operation = {"timestamp": START.isoformat(), "operation": "create", "path": "x" * 10_000, "size": 0}
    data = result([], 2.0, file_operations=[operation] * 1000)
    data["telemetry"]["file_operations_count"] = 1500
    page = report.page(data)
    assert "and 1,300 more: --result-file has the first 1,000" in Page(page).text
    assert len(page) < 1_000_000


@given(st.text())
def test_no_text_is_markup(said: str) -> None:
    """Wherever a plugin's text goes it comes out as text, without what could hide, reorder or control."""
    parsed = Page(tag("p", said, data_label=said))
    assert [name for name, _ in parsed.elements] == ["p"]
    assert not set(parsed.text) & set("\x00\x1b\u202e\u2066\u200b\r")
    assert parsed.elements[0][1]["data-label"] == parsed.text


def test_markup_in_an_attribute_is_text() -> None:
    parsed = Page(tag("p", class_=Markup('"><script>')))
    assert parsed.elements == [("p", {"class": '"><script>'})]


def test_long_texts_are_cut() -> None:
    text = Page(tag("p", "x" * (LONGEST + 1234))).text
    assert text.endswith("x ... and 1,234 more characters")


@pytest.fixture
def zone(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield
    os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
    time.tzset()


@pytest.mark.parametrize(
    ("zone", "said"),
    [
        ("UTC", "2026-03-01 12:00:00 UTC"),
        ("Asia/Kolkata", "2026-03-01 17:30:00 UTC+05:30 (2026-03-01 12:00:00 UTC)"),
        ("America/New_York", "2026-03-01 07:00:00 UTC-05:00 (2026-03-01 12:00:00 UTC)"),
    ],
    indirect=["zone"],
)
@pytest.mark.usefixtures("zone")
def test_times_are_local_and_in_utc(said: str) -> None:
    parsed = Page(report.moment(START.isoformat()))
    assert parsed.text == said
    assert parsed.elements[0][1]["datetime"] == "2026-03-01T12:00:00+00:00"


# -- over time ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e6)), max_size=5000), st.integers(10, 100))
def test_thinning_keeps_the_extremes(values: list[float | None], most: int) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    kept = charts.thinned(points, most)
    assert len(kept) <= max(most, 2) + 2
    assert set(kept) <= set(points)
    assert kept == sorted(kept, key=lambda point: point[0])
    measured = [value for value in values if value is not None]
    if measured:
        shown = [value for _, value in kept if value is not None]
        assert (min(shown), max(shown)) == (min(measured), max(measured))


def test_a_course_is_broken_where_nothing_was_measured() -> None:
    points = [(0.0, 10.0), (1.0, 20.0), (2.0, None), (3.0, 40.0)]
    assert charts.course(charts.Series("x", "x", points), 4.0, 40.0) == "M0.0 150.0h.1L250.0 100.0M750.0 0.0h.1"
    before = charts.Series("x", "x", points, charts.STEPS_BEFORE)
    assert charts.course(before, 4.0, 40.0) == "M0.0 150.0h.1V100.0H250.0M500.0 0.0H750.0"
    after = charts.Series("x", "x", points, charts.STEPS_AFTER)
    assert charts.course(after, 4.0, 40.0) == "M0.0 150.0h.1H250.0V100.0M750.0 0.0h.1"


@given(st.floats(1e-3, 1e9))
def test_scales_hold_what_they_are_for(highest: float) -> None:
    rows, top = charts.scale(highest)
    assert top >= highest * (1 - 1e-9)
    assert 1 <= rows <= charts.ROWS
    columns, last = charts.times(highest)
    assert last >= highest * (1 - 1e-9)
    assert 1 <= columns <= charts.COLUMNS


@pytest.mark.parametrize("count", [1, 2, 3, 5, 13, 257])
def test_counts_have_whole_rows(count: int) -> None:
    rows, top = charts.scale(count, whole=True)
    assert top % rows == 0


# -- words --------------------------------------------------------------------------------------------------------------


def test_words() -> None:
    seconds = (0, 0.0018, 0.02, 0.9996, 1, 2.1499, 41.26, 59.96, 60, 605, 3599.6, 3720, 90_000)
    said = [
        "0 ms",
        "1.8 ms",
        "20 ms",
        "1 s",
        "1 s",
        "2.15 s",
        "41.3 s",
        "1 min",
        "1 min",
        "10 min 05 s",
        "1 h",
        "1 h 02 min",
        "25 h",
    ]
    assert [duration(each) for each in seconds] == said
    assert [number(each) for each in (0, 0.25, 2.1, 9.996, 49.94, 99.96, 1024.4)] == [
        "0",
        "0.25",
        "2.1",
        "10",
        "49.9",
        "100",
        "1,024",
    ]
    sizes = ["0 bytes", "1 byte", "1,023 bytes", "1 KB", "1.5 MB", "2 GB"]
    assert [size(each) for each in (0, 1, 1023, 1024, 3 << 19, 2 << 30)] == sizes
    assert (counted(1, "process", "processes"), counted(1200, "process", "processes")) == ("1 process", "1,200 processes")


def test_what_does_not_fit_is_counted() -> None:
    parts = ["one", "two, three", "four"]
    assert fitted(parts, 0) == fitted(parts, 21) == "one, two, three, four"
    assert fitted(parts, 20) == "one and 2 more"
    assert fitted(parts, 3) == "3 of them"


def test_the_live_line_fits() -> None:
    measures = [Measure("", 29.5, 30, "29 s", "30 s"), Measure("memory", 20, 128, unit=" MB"), Measure(said="2 processes")]
    line = "psie: 29 s of 30 s, memory 20 of 128 MB, 2 processes"
    assert fitting(measures, len(line), coloured=False) == line
    assert fitting(measures, len(line) - 1, coloured=False) == "psie: 29 s/30 s, memory 20/128 MB, 2 processes"
    assert fitting(measures, 40, coloured=False) == "psie: 29 s/30 s, memory 20/128 MB"
    assert fitting(measures, 5, coloured=True) == ""
    coloured = fitting(measures, 100, coloured=True)
    assert "\x1b[31m29 s of 30 s\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == line


# -- how it is known ------------------------------------------------------------------------------------------------------


def test_how_protections_were_checked() -> None:
    seen = {"NoNewPrivs": "1", "ns/net": "own", "limit/Max open files": "50", "probe": "EACCES"}

    def checked(name: str, expected: dict[str, str] | None = None, state: str = ENFORCED) -> str:
        return results.checked(Protection(name, state, "x", expected=expected), seen)

    assert checked("a", {"NoNewPrivs": "1"}) == "read back from /proc/PID/status before the plugin began"
    assert "/proc/PID/limits and /proc/PID/ns" in checked("a", {"ns/net": "own", "limit/Max open files": "50"})
    assert checked("writes only to the workspace").startswith("tried: ")
    assert "counted by psie" in checked("output")
    assert "set-up" in checked("own /proc")
    assert checked("a", state=MISSING) == "nothing to check"
    assert results.checked(Protection("a", ENFORCED, "x"), None).startswith("not checked")


# -- the file -----------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    Target("--report", str(path)).write("one ü \udcff")
    assert path.read_bytes() == "one ü \\udcff".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    Target("--report", str(path)).write("two")
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["out.html"]


@pytest.mark.parametrize("unnamed", [True, False])
def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path, unnamed: bool) -> None:
    """A real limit of the kernel (RLIMIT_FSIZE) ends the writing in the middle, with and without O_TMPFILE."""
    path = tmp_path / "out.html"
    path.write_text("old")
    code = (
        "import os, resource, sys\n"
        "from sandbox.cli.target import Target\n"
        f"{'' if unnamed else 'os.O_TMPFILE = os.O_DIRECTORY | os.O_CREAT'}\n"
        "target = Target('--report', sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: target.write('x' * 100_000)\n"
        "except OSError as error: print(error.errno, error.filename)\n"
    )
    root = Path(report.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == f"27 {path}\n"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.html"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10_000


def test_what_cannot_be_a_report(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for path in ("missing/out", "fifo", "folder", "x" * 300, ".", ""):
        with pytest.raises(UsageError, match="--report"):
            Target("--report", str(tmp_path / path) if path else "/")
    for path in ("/dev/stdout", "/dev/null", "/proc/self/out", "/proc/self/fd/1"):
        with pytest.raises(UsageError, match="cannot be written"):
            Target("--report", path)


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out.html").symlink_to("precious")
    Target("--report", str(tmp_path / "out.html")).write("page")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "out.html").read_text() == "page"
    assert not (tmp_path / "out.html").is_symlink()
