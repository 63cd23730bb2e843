"""Fixtures of the integration tests: every level, nothing left behind, and a user without rights."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import harness
from .unprivileged import User, make_user


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rootless: also run by a user without rights, see test_rootless.py")
    config.addinivalue_line("markers", "leaves(reason): this test looks after its own leftovers")


@pytest.fixture(params=harness.LEVELS, ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> harness.IsolationLevel:
    chosen: harness.IsolationLevel = request.param
    return chosen


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a process, mount, descriptor, network link, cgroup, workspace or temporary file behind."""
    if request.node.get_closest_marker("leaves"):
        yield
        return
    with harness.nothing_left():
        yield


@pytest.fixture(scope="session")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    """A user without rights, with an interpreter, the repository and a home that it can reach."""
    if not harness.ROOT:
        pytest.skip("needs root to become another user")
    return make_user(tmp_path_factory.mktemp("user"))


@pytest.fixture
def as_root() -> None:
    if not harness.ROOT:
        pytest.skip("needs root")
