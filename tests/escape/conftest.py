"""The caller's side of the attacks: a plain process to try them outside, the rootless session, the matrix at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from escape import kit, rootless
from sandbox.selftest import attacks
from sandbox.selftest.outside import Outside

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    shown = ExitStack()
    shown.enter_context(attacks.shown_folder())
    config.add_cleanup(shown.close)


@pytest.fixture(scope="session")
def outside() -> Iterator[Outside]:
    server = Outside()
    yield server
    server.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(120 * attacks.PATIENCE))


def pytest_collection_finish(session: pytest.Session) -> None:
    """The rootless session runs beside this one, if its test was chosen."""
    chosen = any(item.path == Path(__file__).with_name("test_rootless.py") for item in session.items)
    if chosen and not session.config.option.collectonly:
        rootless.start(is_quick=session.config.getoption("--quick"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    rootless.stop()
    report = os.environ.get("PSIE_ESCAPE_REPORT")
    if report:
        Path(report).write_text(json.dumps(kit.MATRIX.to_plain()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What stopped which attack. A star: and it is on record as a violation."""
    tables = [
        ("root" if attacks.ROOT else "an unprivileged user", kit.MATRIX),
        *(("rootless", table) for table in kit.ROOTLESS),
    ]
    for who, table in tables:
        if table.cells:
            terminalreporter.section(f"attacks as {who}: stopped by what (* recorded as a violation)")
            for line in table.lines():
                terminalreporter.write_line(line)
