"""The pytest side of the attacks: which cells there are, how one is carried out, and the matrix that comes of it.

Must not know single attacks: those that can be tried anywhere are in sandbox.selftest, one module per family; the others, and
what takes more than one call, in the test modules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.config import IsolationLevel
from sandbox.errors import SandboxException
from sandbox.selftest import trial
from sandbox.selftest.attacks import LEVELS, REGISTRY, Attack
from sandbox.selftest.outside import Outside

# What stands ready for the next caller would be counted as left open.
os.environ["PSIE_STANDING"] = "0"


# Attacks that take seconds each: `make test` leaves them to ALL=1.
LONG = {
    *("memory_behind_empty_files", "locks_of_mapped_files", "locks_of_many_places", "mappings_of_several_processes"),
    *("many_file_operations", "many_file_operations_in_folders"),
}


def matrix(modules: str) -> pytest.MarkDecorator:
    """Parametrize a test by the attacks of these modules (a prefix of their names) and the levels that claim to stop them."""
    rows = [
        pytest.param(one, level, id=f"{one.name}-{level.value}", marks=[pytest.mark.long] if one.name in LONG else [])
        for one in REGISTRY
        if one.function.__module__.startswith(modules)
        for level in one.levels
    ]
    return pytest.mark.parametrize(("one", "level"), rows)


def still_works(level: IsolationLevel) -> None:
    """The engine that has just been attacked serves the next caller."""
    outcome = trial.run_inside(lambda: "alive", level=level)
    assert outcome.error is None
    assert outcome.value == "alive"


class Matrix:
    """attack x level: what stopped it; beside each attack, why it is not applicable outside, if so."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], dict[str, str]] = {}
        self.not_applicable: dict[str, str] = {}

    def set(self, one: Attack, level: IsolationLevel, text: str) -> None:
        self.cells.setdefault((one.protection, one.name), {})[level.value] = text

    def to_plain(self) -> dict[str, Any]:
        return {
            "cells": [[*key, cells] for key, cells in self.cells.items()],
            "not_applicable": self.not_applicable,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Matrix:
        found = cls()
        found.cells = {(protection, name): cells for protection, name, cells in plain["cells"]}
        found.not_applicable = plain["not_applicable"]
        return found

    def lines(self) -> Iterator[str]:
        width = max((len(name) for _, name in self.cells), default=10) + 2
        heads = [level.value for level in LEVELS]
        yield f"{'attack':<{width}}" + "".join(f"{head:<22}" for head in heads)
        for protection in sorted({protection for protection, _ in self.cells}):
            yield f"-- {protection}"
            for (of, name), cells in sorted(self.cells.items()):
                if of == protection:
                    row = "".join(f"{cells.get(head, '')[:20]:<22}" for head in heads)
                    yield f"{name + (' (1)' if name in self.not_applicable else ''):<{width}}{row}".rstrip()
        for name, reason in sorted(self.not_applicable.items()):
            yield f"(1) {name}: does not work outside either: {reason}"
        yield f"{sum(map(len, self.cells.values()))} cells; {len(self.not_applicable)} attacks are not applicable here"


MATRIX = Matrix()
ROOTLESS: list[Matrix] = []
_closed: dict[IsolationLevel, str] = {}


def why_closed(level: IsolationLevel) -> str:
    """Why no sandbox of this level can be opened here; "" if it can. `test_levels` fails for it, the attacks only skip."""
    if level not in _closed:
        try:
            still_works(level)
            _closed[level] = ""
        except SandboxException as error:
            _closed[level] = str(error).splitlines()[0]
    return _closed[level]


def carry_out(one: Attack, level: IsolationLevel, outside: Outside, folder: Path) -> None:
    """The life of one cell of the matrix: outside, inside, judged."""
    if why_closed(level):
        MATRIX.set(one, level, "level is closed")
        pytest.skip(f"level {level.value} cannot be opened: {why_closed(level)}")
    answer = outside.run(one, folder)
    if answer.startswith("failed"):
        pytest.fail(f"{one.name} is broken outside: {answer}")
    if not answer.startswith("escaped"):
        MATRIX.not_applicable[one.name] = answer.splitlines()[0]
    MATRIX.set(one, level, "ESCAPED or broken")
    MATRIX.set(one, level, trial.attempt_inside(one, level, folder))
