"""What the docs refer to is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def test_every_promise_names_tests_that_exist() -> None:
    """As a function, or as an attack that is registered under that name in a test or a family of the self-test."""
    text = (ROOT / "docs" / "threat-model.md").read_text()
    named = re.findall(r"`(\w+)::(\w+)`", text)
    named.remove(("module", "test"))
    named.remove(("module", "attack"))
    assert len(named) > 50
    sources: dict[str, str] = {}
    for path in (*TESTS.rglob("test_*.py"), *(ROOT / "sandbox" / "selftest").glob("*.py")):
        sources[path.stem] = sources.get(path.stem, "") + path.read_text()
    missing = [
        f"{file}::{name}" for file, name in named if not re.search(rf'\bdef {name}\(|name="{name}"', sources.get(file, ""))
    ]
    assert not missing
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert all("::" in row for row in rows)
