"""Fixtures of the integration tests: every level, nothing left behind, and a user without rights."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from sandbox import IsolationLevel
from sandbox.ns import userids

from . import faults, harness
from .unprivileged import User, temporary_user


def pytest_configure(config: pytest.Config) -> None:
    # Where several processes of one user have tests at once nobody knows whose a file is; test_rootless.py has them alone.
    harness.KNOWS_FILES = harness.ROOT or config.getoption("--part") is None
    config.addinivalue_line("markers", "rootless: also run by a user without rights, see test_rootless.py")
    # An exception in the engine's thread is never just a warning.
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == harness.HERE and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(30 * harness.PATIENCE))


@pytest.fixture(params=harness.LEVELS, ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> IsolationLevel:
    chosen: IsolationLevel = request.param
    return chosen


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a process, mount, descriptor, network link, cgroup, workspace or temporary file behind.

    At level minimal zombies matter too: they count towards the process limit of the id that the next sandbox gets.
    """
    callspec = getattr(request.node, "callspec", None)
    with harness.nothing_left(zombies=callspec is not None and callspec.params.get("level") is IsolationLevel.MINIMAL):
        yield


@pytest.fixture(scope="session")
def user() -> Iterator[User]:
    """A user without rights, with an interpreter, the repository and a home that it can reach."""
    if not harness.ROOT:
        pytest.skip("needs root to become another user")
    with temporary_user() as somebody:
        yield somebody


@pytest.fixture
def own_ledger(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger in which nobody else's sandboxes count, for tests with bounds that those might reach."""
    folder = str(tmp_path_factory.mktemp("ledger"))
    monkeypatch.setattr(userids, "state", SimpleNamespace(folder=lambda kind: folder))


@pytest.fixture
def as_root() -> None:
    if not harness.ROOT:
        pytest.skip("needs root")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What came of which fault (test_faults.py)."""
    if faults.TABLE.cells:
        terminalreporter.section(f"faults as {'root' if harness.ROOT else 'an unprivileged user'}, and what came of them")
        for line in faults.TABLE.lines():
            terminalreporter.write_line(line)
