"""The tests that are marked rootless, and those of parts that the kernel treats a user differently in: as such a user."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from . import harness
from .unprivileged import User

FILES = [
    "test_calls.py",
    "test_bad_input.py",
    "test_life.py",
    "test_granted.py",
    "test_explanations.py",
    "test_file_records.py",
    "test_network.py",
    "test_shared_network.py",
    "test_sessions.py",
    "test_executor.py",
    "test_framework.py",
    "test_recovery.py",
    "test_lifetimes.py",
]
LONG = ["test_documentation.py", "test_faults.py", "test_records.py"]
UNITS = ["test_landlock.py", "test_refusals.py", "test_seccomp.py", "test_state.py"]

# Where each level takes a second or more and what is done does not depend on it: once without namespaces, once with all.
TWO_LEVELS = {"test_calls.py", "test_recovery.py", "test_lifetimes.py", "test_faults.py", "test_sessions.py"}


@pytest.mark.timeout(120 * harness.PATIENCE)
@pytest.mark.parametrize("file", [*FILES, *(pytest.param(file, marks=pytest.mark.long) for file in LONG)])
def test_as_a_user_without_rights(user: User, file: str, pytestconfig: pytest.Config) -> None:
    is_quick = pytestconfig.getoption("--quick")
    options = ["--quick"] if is_quick else ["--two-levels"] if file in TWO_LEVELS else []
    run(user, [f"integration/{file}"], ["-m", "rootless", *options], at_least=5 if is_quick else 10)


@pytest.mark.timeout(120 * harness.PATIENCE)
def test_parts_as_a_user_without_rights(user: User) -> None:
    run(user, UNITS, [], at_least=100)


def run(user: User, files: list[str], options: list[str], *, at_least: int) -> None:
    """Have the user run these test files, of which so many tests have to pass, and none may fail."""
    report = user.home / "report.xml"
    report.unlink(missing_ok=True)
    options = [
        *options,
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--maxfail=20",
        f"--timeout={15 * harness.PATIENCE}",
        f"--junitxml={report}",
    ]
    paths = [str(user.repository / "tests" / file) for file in files]
    done = user.run(user.interpreter, "-m", "pytest", *options, *paths, seconds=110 * harness.PATIENCE)
    assert report.exists(), done.stdout + done.stderr
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    assert not bad, f"as a user: {bad}\n{done.stdout}"
    ran = [case for case in cases if case.find("skipped") is None]
    assert len(ran) >= at_least, done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
