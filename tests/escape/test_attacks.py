"""The attacks that can be tried anywhere, at every level that claims to stop them; `psie selftest` does so for a user."""

from __future__ import annotations

from pathlib import Path

from escape.kit import LONG, carry_out, matrix
from sandbox.config import IsolationLevel
from sandbox.selftest import families  # noqa: F401 - registers them
from sandbox.selftest.attacks import REGISTRY, Attack
from sandbox.selftest.outside import Outside


@matrix("sandbox.selftest.")
def test_attack(one: Attack, level: IsolationLevel, outside: Outside, tmp_path: Path) -> None:
    carry_out(one, level, outside, tmp_path)


def test_those_that_take_long_are_there() -> None:
    assert {one.name for one in REGISTRY} >= LONG
