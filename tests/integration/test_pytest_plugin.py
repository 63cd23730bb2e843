"""`@pytest.mark.sandbox`: tests of another pytest, whose bodies run in sandboxes."""

from __future__ import annotations

import os

import pytest

from . import harness

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def psie_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pytest of these tests, which begins in a folder of its own; also where psie is not installed."""
    others = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(harness.REPOSITORY), *others.split(os.pathsep)]).rstrip(os.pathsep))


TESTS = """
import asyncio
import os
import unittest

import pytest
from helper import twice

strict = pytest.mark.sandbox(level="strict")


@strict
def test_inside():
    print("printed inside")
    assert os.getpid() < 20
    assert twice(2) == 4


def test_outside():
    assert os.getpid() == PID


@strict
def test_wrong():
    print("printed before")
    found = {"a": 1, "b": [1, 2]}
    assert found == {"a": 1, "b": [1, 3]}


@strict
async def test_awaits():
    await asyncio.sleep(0)
    assert twice(1) == 3


@strict
@pytest.mark.parametrize("number", [1, 2])
def test_each(number, tmp_path):
    assert number < 2, tmp_path.name


@strict
class TestMethods:
    def setup_method(self):
        self.number = 3

    def test_state(self):
        assert self.number == 3


@strict
def test_skips():
    pytest.skip("not on Sundays")


@strict
def test_is_known():
    pytest.xfail("known")


@strict
@pytest.mark.xfail(raises=ZeroDivisionError, strict=True)
def test_marked():
    1 / 0


@strict
def test_is_refused():
    open("/etc/caught", "w")


@strict
def test_catches():
    with pytest.raises(OSError):
        open("/etc/caught", "w")


@pytest.mark.sandbox(level="strict", violations="allow")
def test_may_catch():
    with pytest.raises(OSError):
        open("/etc/caught", "w")


@pytest.mark.sandbox(level="strict", limits={"max_execution_time_seconds": 0.3})
def test_never_ends():
    while True:
        pass


@strict
def test_dies():
    os._exit(3)


@strict
def test_hostile():
    raise ValueError("one\\n\\x1b[2Jtwo")


@strict
def test_captures(capsys):
    pass


@pytest.fixture
def file():
    with open(__file__) as opened:
        yield opened


@strict
def test_takes_a_file(file):
    pass


@pytest.mark.sandbox(lvel="strict")
def test_typo():
    pass


@pytest.mark.sandbox(level="none")
def test_no_level():
    pass


@pytest.mark.sandbox(limits={"max_execution_time_seconds": 20, "execution_warning_threshold_seconds": 0.1})
def test_comes_near_a_limit():
    import time

    time.sleep(0.3)


@pytest.mark.sandbox(limits={"max_memory": 1})
def test_no_limit():
    pass


@pytest.mark.sandbox(environment={"A": 1})
def test_no_environment():
    pass


@pytest.mark.sandbox("strict")
def test_by_position():
    pass


@strict
class TestOld(unittest.TestCase):
    def test_old(self):
        pass
"""

WHY = {
    "test_wrong": "AssertionError: assert {'a': 1, 'b': [1, 2]} == {'a': 1, 'b': [1, 3]}",
    "test_awaits": "E    +  where 2 = twice(1)",
    "test_each[2]": "assert 2 < 2",
    "test_is_refused": "open of /etc/caught was refused: EROFS",
    "test_catches": "the test ran into 1 protection:",
    "test_never_ends": "ran longer than 0.3 s",
    "test_dies": "exited with status 3 instead of returning",
    "test_hostile": "E   \\x1b[2Jtwo",
    "test_captures": "the fixture 'capsys' acts on pytest's own process",
    "test_takes_a_file": "the value of the fixture 'file' (TextIOWrapper) cannot travel into the sandbox: an open file",
    "test_typo": "there is no setting 'lvel': give level, limits",
    "test_no_level": "level is 'none': give minimal, standard, strict, maximum, or an IsolationLevel",
    "test_no_limit": "PluginLimitsV2 has no 'max_memory', did you mean max_memory_mb?",
    "test_no_environment": "environment has a int at 'A': give texts",
    "test_by_position": "give settings by name (level, limits",
    "TestOld.test_old": "a TestCaseFunction cannot run in a sandbox, and has run outside",
}


def test_marked_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(helper="def twice(number):\n    return 2 * number\n")
    pytester.makepyfile(test_it=TESTS.replace("import asyncio\n", "import asyncio\nimport os\n\nPID = os.getpid()\n", 1))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rA", "--color=no")
    result.assert_outcomes(passed=6, failed=16, skipped=1, xfailed=2)
    text = result.stdout.str()
    sections = {name: text.partition(f"_ {name} _")[2].partition("\n____")[0] for name in WHY}
    assert {name for name, why in WHY.items() if why not in sections[name]} == set()
    lines = TESTS.splitlines()
    for name, source in (("test_wrong", "    assert found == "), ("test_awaits", "    assert twice(1) == 3")):
        number = next(number for number, line in enumerate(lines, 1) if line.startswith(source)) + 2  # lines put in above it
        assert f'test_it.py", line {number}, in {name}' in sections[name]
        assert f"test_it.py:{number}: AssertionError" in sections[name]
    assert "Differing items:" in sections["test_wrong"]
    assert "printed before" in sections["test_wrong"]
    assert "printed inside" in text
    assert "SKIPPED [1] test_it.py" in text
    assert "not on Sundays" in text
    assert "\x1b" not in text


def test_nothing_is_imported_for_others(pytester: pytest.Pytester) -> None:
    """Where no test is marked, psie's engine is not there."""
    pytester.makepyfile(
        """
        import sys

        def test_it():
            loaded = {name for name in sys.modules if name.startswith("sandbox.")}
            assert loaded <= {"sandbox.text", "sandbox.integrations", "sandbox.integrations.pytest_plugin"}
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
