"""One small real run of the benchmarks, of their cheapest measure. What it measures is no matter here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import Report

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.long
def test_a_quick_run_writes_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "session", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    (figures,) = Report.load(path).measures
    assert len(figures.samples) == 2
    assert all(value > 0 for values in figures.samples.values() for value in values)
    assert len(figures.wanted) == 2
    assert f"{figures.wanted[0].what}: " in done.stdout
