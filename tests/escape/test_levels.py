"""Every level can be opened here: otherwise the attacks on it would be skipped, and nobody would know."""

from __future__ import annotations

import pytest

from escape import kit
from sandbox.config import IsolationLevel
from sandbox.selftest import attacks


@pytest.mark.parametrize("level", attacks.LEVELS)
def test_level_opens(level: IsolationLevel) -> None:
    assert kit.why_closed(level) == ""
