"""The self-test tells what was stopped from what was not, and from what says nothing."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox.config import IsolationLevel
from sandbox.selftest import attacks, files
from sandbox.selftest.attacks import REGISTRY, STRICT, Attack, Scene, Where
from sandbox.selftest.outside import Outside
from sandbox.selftest.run import FAIL, NOT_APPLICABLE, PASS, Result, result_of


def result(outside: Outside, folder: Path, function: Callable[..., str], name: str, **how: Any) -> Result:
    """Of an attack that is no other's."""
    attacks.attack("a test's own", name=f"test's own {name}", **how)(function)
    return result_of(REGISTRY.pop(), STRICT, outside, folder)


def is_inside() -> bool:
    import os

    return os.getcwd() == "/workspace"


def escape() -> str:
    return "escaped: always"


def be_stopped() -> str:
    return "stopped: EPERM" if is_inside() else "escaped: outside"


def be_stopped_by_something_else() -> str:
    return "stopped: EBUSY" if is_inside() else "escaped: outside"


def break_inside() -> str:
    return str(1 / 0) if is_inside() else "escaped: outside"


def say_nothing() -> str:
    return "nothing" if is_inside() else "escaped: outside"


def work_nowhere() -> str:
    return "stopped: EPERM"


def work_inside_alone() -> str:
    return "escaped: inside" if is_inside() else "stopped: EPERM"


@pytest.mark.parametrize(
    ("function", "verdict", "reason"),
    [
        (be_stopped, PASS, "EPERM"),
        (escape, FAIL, "escaped: always"),
        (work_inside_alone, FAIL, "escaped: inside"),
        (be_stopped_by_something_else, FAIL, "stopped, but by ['EBUSY'], which is no refusal that was expected"),
        (break_inside, FAIL, "not a refusal, the attack broke: PluginExecutionError"),
        (say_nothing, FAIL, "nothing"),
        (work_nowhere, NOT_APPLICABLE, "it does not work outside a sandbox either: stopped: EPERM"),
    ],
)
def test_verdicts(outside: Outside, tmp_path: Path, function: Callable[[], str], verdict: str, reason: str) -> None:
    found = result(outside, tmp_path, function, function.__name__)
    assert (found.verdict, found.reason[: len(reason)]) == (verdict, reason)


def test_harm_is_an_escape_whatever_the_attack_says(outside: Outside, tmp_path: Path) -> None:
    @contextmanager
    def scene(where: Where) -> Iterator[Scene]:
        yield Scene(harm=lambda: "the file has gone")

    found = result(outside, tmp_path, be_stopped, "harm", scene=scene)
    assert found.verdict == FAIL
    assert "the file has gone" in found.reason


def test_a_violation_is_told(outside: Outside, tmp_path: Path) -> None:
    (unshare,) = (one for one in REGISTRY if one.name == "unshare")
    found = result_of(unshare, STRICT, outside, tmp_path)
    assert (found.verdict, found.recorded, found.reason) == (PASS, True, "EPERM")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"levels": (IsolationLevel.MAXIMUM,)}, "level strict does not claim to stop it"),
        ({"unsafe": "it hurts"}, "not safe outside a sandbox: it hurts"),
        ({"memory_mb": 1 << 40}, "outside a sandbox it takes 1099511627776 MB"),
    ],
)
def test_what_is_not_to_be_tried_is_not(outside: Outside, tmp_path: Path, how: dict[str, Any], reason: str) -> None:
    def scene(where: Where) -> Any:
        raise AssertionError("it is staged")

    found = result(outside, tmp_path, escape, "untried", scene=scene, **how)
    assert found.verdict == NOT_APPLICABLE
    assert found.reason.startswith(reason)


def test_a_sandbox_that_is_refused_is_no_failure(outside: Outside, tmp_path: Path) -> None:
    found = result(outside, tmp_path, be_stopped, "refused", config={"preload": ("no_such_module",)})
    assert found.verdict == NOT_APPLICABLE
    assert found.reason.startswith("the sandbox that it needs is refused here: ")


def test_all_that_is_not_safe_says_why() -> None:
    unsafe: list[Attack] = [one for one in REGISTRY if one.unsafe]
    assert {one.name for one in unsafe} >= {"rename_the_host", "replace_the_kernel", "core_dump_of_a_program"}
    names = [one.name for one in REGISTRY]
    assert len(names) == len(set(names))  # they are named on the command line


def test_no_key_is_left_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside, where /usr can be encrypted, the attack adds one: as the kernel names it, it has to go again."""
    asked: list[tuple[int, bytes]] = []

    def ioctl(fd: int, request: int, argument: Any) -> int:
        if request == 0xC0506617:  # FS_IOC_ADD_ENCRYPTION_KEY
            argument[8:24] = b"the kernel's own"
        asked.append((request, argument.raw[8:24]))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert files.keys_of_encrypted_folders().startswith("escaped")
    assert asked == [(0xC0506617, b"the kernel's own"), (0xC0406618, b"the kernel's own")]  # and ..._REMOVE_...
