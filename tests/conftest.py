"""What all tests share: sandboxes and frameworks that they open themselves record nothing where a person's records are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from sandbox.recovery import private


@pytest.fixture(scope="session", autouse=True)
def own_records() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="psie-records-") as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "default_folder", lambda: os.path.join(place, "psie"))
        yield
