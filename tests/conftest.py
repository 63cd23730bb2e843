"""What all tests share: which part of them a process runs, which of them want the host for themselves, where they record.

`make test` runs three pytest processes side by side (tools/run_tests.py): "library" has most integration tests, "rootless"
those of a user without rights and some more, "rest" all that is left, so that nothing is ever left out of all. A test
marked `alone` changes what other sandboxes of this user depend on, or would be disturbed by their end: meanwhile the other
processes run none that opens sandboxes of this user.

With `--two-levels`, as the virtual machine has it without ALL=1, of integration tests with a level for each of the four those
of standard and strict are left out: minimal has no namespaces, maximum has all. With `--quick`, as `make test` has it without
ALL=1, of any test with several levels one is left, for each test always the same, and what is marked `long` is left out.
Continuous integration has all of it outside the virtual machine.

Sandboxes and frameworks that tests open themselves record nothing where a person's records are.
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import pytest

from sandbox import state
from sandbox.recovery import private

ENDS, MIDDLE = {"minimal", "maximum"}, {"standard", "strict"}
LEVELS = ("minimal", "standard", "strict", "maximum")
PARTS = ("library", "rootless", "rest")
# Integration tests that are in other parts, so that each part takes about as long.
ELSEWHERE = {
    **dict.fromkeys(
        ("test_rootless.py", "test_faults.py", "test_framework.py", "test_plugins_cli.py", "test_doctor.py"), "rootless"
    ),
    **dict.fromkeys(("test_bad_input.py", "test_lifetimes.py", "test_recovery.py"), "rootless"),
    **dict.fromkeys(("test_cli.py", "test_start.py"), "rest"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=PARTS, help="run only this part of the tests")
    parser.addoption("--two-levels", action="store_true", help="leave out the two levels in the middle")
    parser.addoption("--quick", action="store_true", help="one level for each test, and no long ones")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: left out by --quick")
    config.addinivalue_line("markers", "alone: not beside tests of another pytest process of this user")
    # A shell's job in the background has these ignored, and under nohup, and hands that down to what tests start and interrupt.
    kinds = ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL))
    for number, handler in kinds:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def in_the_middle(items: list[pytest.Item]) -> list[pytest.Item]:
    """What --two-levels leaves out."""
    with_ends = {name_of(item) for item in items if words_of(item) & ENDS}
    return [
        item
        for item in items
        if item.path.parent.name == "integration" and words_of(item) & MIDDLE and name_of(item) in with_ends
    ]


def of_other_levels(items: list[pytest.Item]) -> list[pytest.Item]:
    """What --quick leaves out: of a test with several levels, and else the same parameters, all but one, chosen by its name."""
    groups: dict[tuple[Path, str, str], dict[str, list[pytest.Item]]] = {}
    for item in items:
        words = words_of(item)
        levels = [level for level in LEVELS if level in words]
        if len(levels) == 1:
            groups.setdefault((*name_of(item), " ".join(sorted(words - {*levels}))), {}).setdefault(levels[0], []).append(item)
    others = []
    for (_, name, rest), by_level in groups.items():
        levels = [level for level in LEVELS if level in by_level]
        chosen = levels[crc32(f"{name} {rest}".encode()) % len(levels)]
        others += [item for level in levels if level != chosen for item in by_level[level]]
    return others


def name_of(item: pytest.Item) -> tuple[Path, str]:
    return item.path, item.originalname  # type: ignore[attr-defined]


def words_of(item: pytest.Item) -> set[str]:
    """Of its parameters; a level is one word, whichever way it is written."""
    callspec = getattr(item, "callspec", None)
    return set(callspec.id.lower().replace("isolationlevel.", "").split("-")) if callspec is not None else set()


def part_of(item: pytest.Item) -> str:
    return ELSEWHERE.get(item.path.name, "library") if item.path.parent.name == "integration" else "rest"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--part")
    others = [item for item in items if wanted is not None and part_of(item) != wanted]
    if config.getoption("--quick"):
        others += [item for item in items if item.get_closest_marker("long")]
        others += of_other_levels(items)
    elif config.getoption("--two-levels"):
        others += in_the_middle(items)
    if others:
        left = dict.fromkeys(others)
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """The locks lie beside the ledger, which is what sandboxes of one user share: see flock(2).

    Who waits to be alone holds the turn, for which all others then wait: else there would always be one more beside it.
    """
    opens_none = item.path.parent.name not in ("integration", "escape") or item.path.name == "test_rootless.py"
    if opens_none:
        return (yield)
    with lock("tests-turn", fcntl.LOCK_EX) as turn, lock("tests", fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH):
        fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@contextmanager
def lock(name: str, kind: int) -> Iterator[int]:
    fd = os.open(os.path.join(state.folder("run"), name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, kind)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(scope="session", autouse=True)
def own_records() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="psie-records-") as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "default_folder", lambda: os.path.join(place, "psie"))
        yield
