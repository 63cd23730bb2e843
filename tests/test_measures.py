"""Measures of recovery, of which a folder with the same files stands for the cgroup: what the kernel makes of them is tested by
tests/integration/test_recovery.py, where there are controllers."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox import SandboxViolation, SandboxViolationType
from sandbox.engine import loop
from sandbox.recovery import measures

QUOTA, SLOW = "100000 100000", "25000 100000"


class Slowed:
    """A sandbox with a CPU limit, and a clock that is put forward."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(loop, "monotonic", lambda: self.now)
        self.limit = folder / "cpu.max"
        self.limit.write_text(QUOTA)
        (folder / "cpu.weight").write_text("9")
        self.loop = loop.PollLoop()
        self.leaf = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        recipe = SimpleNamespace(cgroup={"controllers": ["cpu"]})
        sandbox: Any = SimpleNamespace(loop=self.loop, leaf_fd=self.leaf, calls={}, recipe=recipe)
        self.recovery = measures.Recovery(sandbox, "slowed")

    def slow_down(self) -> None:
        details = {"limit": "cpu"}
        kind = SandboxViolationType.RESOURCE_EXCEEDED
        self.recovery.recover(SandboxViolation(kind, "too much", datetime.now(UTC), details=details))
        self.passes(0)

    def ends(self) -> None:
        """The only call that there was."""
        call: Any = SimpleNamespace(cause="", outcome=None)
        self.recovery.ended(call)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        for _ in range(4):  # what is done has steps
            self.loop.run_once(0)

    @property
    def has(self) -> str:
        """The start of what is there: a file is no setting, and keeps what was longer."""
        return self.limit.read_text()[: len(SLOW)]

    def close(self) -> None:
        self.loop.close()
        os.close(self.leaf)


@pytest.mark.parametrize("between", [Slowed.ends, lambda slowed: None], ids=["another call", "the same call"])
def test_who_is_slowed_down_anew_is_so_for_the_whole_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: Callable[[Slowed], None]
) -> None:
    slowed = Slowed(tmp_path, monkeypatch)
    slowed.slow_down()
    slowed.passes(measures.SLOW_SECONDS - 1)
    between(slowed)
    slowed.slow_down()
    slowed.passes(measures.SLOW_SECONDS - 1)
    assert slowed.has == SLOW
    slowed.passes(2)
    assert slowed.has != SLOW
    assert [step["action"] for step in slowed.recovery.history] == ["slow down", "slow down", "relieve"]
    slowed.close()
