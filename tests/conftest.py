"""What all tests share: which half of them a process runs, which of them want the host for themselves, where they record.

`make test` runs two pytest processes side by side (tools/run_tests.py): "library" has most integration tests, "rest" all that
is left, so that nothing is ever left out of both. A test marked `alone` changes what other sandboxes of this user depend
on, or would be disturbed by their end: meanwhile the other process runs none that opens sandboxes of this user.

Sandboxes and frameworks that tests open themselves record nothing where a person's records are.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator

import pytest

from sandbox import state
from sandbox.recovery import private

HALVES = ("library", "rest")
# Integration tests that are none of the first half's, which takes longer: those of a user without rights, and one more file.
AMONG_THE_REST = ("test_rootless.py", "test_bad_input.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--half", choices=HALVES, help="run only this half of the tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: not beside tests of another pytest process of this user")


def half_of(item: pytest.Item) -> str:
    """Either half takes about as long."""
    return "library" if item.path.parent.name == "integration" and item.path.name not in AMONG_THE_REST else "rest"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--half")
    others = [item for item in items if wanted is not None and half_of(item) != wanted]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if half_of(item) == wanted]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """The lock lies beside the ledger, which is what sandboxes of one user share: see flock(2)."""
    opens_none = item.path.parent.name not in ("integration", "escape") or item.path.name == "test_rootless.py"
    if opens_none:
        return (yield)
    fd = os.open(os.path.join(state.folder("run"), "tests"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)
    finally:
        os.close(fd)


@pytest.fixture(scope="session", autouse=True)
def own_records() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="psie-records-") as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "default_folder", lambda: os.path.join(place, "psie"))
        yield
