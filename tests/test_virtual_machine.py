"""What the virtual machine runs, vagrant/in-the-vm: tests that there are, and all that need what only it has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INTEGRATION = ROOT / "tests" / "integration"
RUNS = {"root", "commands", "service", "session"}
LINES = [line.split(maxsplit=1) for line in (ROOT / "vagrant/in-the-vm").read_text().splitlines() if line and line[0] != "#"]


def functions_of(file: str) -> dict[str, ast.FunctionDef]:
    body = ast.parse((INTEGRATION / file).read_text()).body
    return {one.name: one for one in body if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")}


@pytest.mark.parametrize(("runs", "test"), LINES, ids=lambda value: value)
def test_each_line_is_of_runs_and_of_a_test_that_is_there(runs: str, test: str) -> None:
    assert set(runs.split(",")) <= RUNS
    file, _, name = re.sub(r"\[.*\]$", "", test).partition("::")
    assert not name or name in functions_of(file)


def test_what_is_skipped_for_want_of_it_runs_there() -> None:
    named = {test for _, test in LINES}
    wanting = set()
    for path in INTEGRATION.glob("test_*.py"):
        for name, test in functions_of(path.name).items():
            says = "make vm-test" in ast.unparse(test)
            if says or any(isinstance(mark, ast.Name) and mark.id == "limited" for mark in test.decorator_list):
                wanting.add(f"{path.name}::{name}")
    assert len(wanting) > 10
    assert {test for test in wanting if test not in named and test.partition("::")[0] not in named} == set()
