"""The caller's side of the attacks: a plain process to try them outside, the rootless session, the matrix at the end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from escape import kit, rootless


def pytest_configure(config: pytest.Config) -> None:
    """As root: a folder that STANDARD shows, in the first of the host's rarely used ones that exists."""
    if kit.ROOT and kit.place() is None:
        for parent in ("/srv", "/opt", "/mnt"):
            if os.path.isdir(parent):
                folder = tempfile.mkdtemp(prefix="psie-escape-", dir=parent)
                os.chmod(folder, 0o1777)
                os.environ["PSIE_ESCAPE_PLACE"] = folder
                config.add_cleanup(partial(remove_place, folder))
                break


def remove_place(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.pop("PSIE_ESCAPE_PLACE", None)


@pytest.fixture(scope="session")
def outside() -> Iterator[kit.Outside]:
    server = kit.Outside()
    yield server
    server.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    """The rootless session runs beside this one, if its test was chosen."""
    if any(item.fspath.basename == "test_rootless.py" for item in session.items) and not session.config.option.collectonly:
        rootless.start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    rootless.stop()
    report = os.environ.get("PSIE_ESCAPE_REPORT")
    if report:
        Path(report).write_text(json.dumps(kit.MATRIX.to_plain()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What stopped which attack. A star: and it is on record as a violation."""
    tables = [("root" if kit.ROOT else "an unprivileged user", kit.MATRIX), *(("rootless", table) for table in kit.ROOTLESS)]
    for who, table in tables:
        if table.cells:
            terminalreporter.section(f"attacks as {who}: stopped by what (* recorded as a violation)")
            for line in table.lines():
                terminalreporter.write_line(line)
