"""The interpreter's record of refused files: what it tells, how often, and that it never disturbs."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox.engine import channel, client
from sandbox.engine.refusals import DISTINCT, OPERATIONS, OTHER, REFUSED, TEXT, Refusals, innermost, is_library


def recorded(*places: str) -> tuple[Refusals, list[dict[str, object]]]:
    told: list[dict[str, object]] = []
    return Refusals(list(places), told.append, told.append), told


def test_both_sides_know_the_same_words() -> None:
    assert {*OPERATIONS.values(), OTHER} <= set(channel.FILE_OPERATIONS)
    assert {str(number) for number in REFUSED} == set(client.FILE_ERRORS)
    assert DISTINCT * 24 >= client.NOTES


def test_equal_refusals_are_told_now_and_then() -> None:
    refusals, told = recorded()
    for _ in range(100):
        refusals._tell("open", "/etc/x", errno.EACCES, "plugin.py", 3)
    assert [each["count"] for each in told] == [1, 2, 4, 8, 16, 32, 64]
    assert told[0] == {"path": "/etc/x", "operation": "open", "errno": 13, "file": "plugin.py", "line": 3, "count": 1}


def test_there_is_an_end_to_different_ones() -> None:
    refusals, told = recorded()
    for number in range(DISTINCT * 2):
        refusals._tell("open", f"/{'x' * TEXT}/{number}" if number % 2 else f"/{number}", errno.EACCES, "f" * 5000, 1)
    assert len(refusals.counts) <= DISTINCT
    assert max(len(str(each["path"])) for each in told) == TEXT
    assert max(len(str(each["file"])) for each in told) == TEXT


def test_what_may_be_written_is_left_to_its_mode(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/etc")
    refusals, told = recorded(str(tmp_path))
    refusals._tell("open", str(tmp_path / "file"), errno.EACCES, "", 0)
    refusals._tell("open", str(tmp_path), errno.EACCES, "", 0)
    refusals._tell("open", str(tmp_path / "out" / "file"), errno.EACCES, "", 0)
    refusals._tell("open", str(tmp_path) + "-other", errno.EACCES, "", 0)
    assert [each["path"] for each in told] == [str(tmp_path / "out" / "file"), str(tmp_path) + "-other"]


def test_what_may_only_be_read_in_there_is_told(tmp_path: Path) -> None:
    told: list[dict[str, object]] = []
    refusals = Refusals([str(tmp_path)], told.append, told.append, [str(tmp_path / "plugin")])
    for name in ("file", "plugins/file", "plugin/file"):
        refusals._tell("open", str(tmp_path / name), errno.EROFS, "", 0)
    assert [each["path"] for each in told] == [str(tmp_path / "plugin" / "file")]


class Strange(OSError):
    """Its attributes are the plugin's code."""

    @property
    def errno(self) -> int:  # type: ignore[override]
        raise SystemExit("mine")


class Endless(Exception):
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise SystemExit("mine")


def test_strange_exceptions_do_no_harm() -> None:
    refusals, told = recorded()
    code = sys._getframe().f_code
    for error in (Strange(13, "no", "/etc/x"), Endless(), OSError(), OSError(13, "no"), OSError(13, "no", 7)):
        refusals._raised(code, 0, error)
        refusals.uncaught(error)
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    refusals.uncaught(first)
    assert told == []


@pytest.mark.parametrize("sees_exceptions", [False, True])
def test_strange_events_do_no_harm(sees_exceptions: bool) -> None:
    refusals, told = recorded("/tmp")
    refusals.sees_exceptions = sees_exceptions
    hook = refusals._hook()
    events: list[tuple[Any, ...]] = [
        (),
        (1,),
        ("",),
        ("", "w", os.O_WRONLY),
        ("/\0", "w", os.O_WRONLY),
        (b"/tmp/\xff", None, os.O_RDWR),
        ("/tmp/x", "w", None),
        (None, None, 577),
        (7, "w", 577),
    ]
    for event in ("open", "os.mkdir", "os.remove", "import", ""):
        for args in events:
            hook(event, args)
    assert told == []


def test_the_innermost_frame_of_a_plugin() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Path("/nowhere/file").write_text("x")
    found = innermost(caught.value.__traceback__)
    assert found is caught.value.__traceback__
    assert found is not None
    assert found.tb_frame.f_code.co_filename == __file__
    assert is_library(os.__file__)
    assert is_library("/usr/lib/python3/dist-packages/apt.py")
    assert is_library("<frozen importlib._bootstrap>")
    assert not is_library("/srv/plugin.py")
    assert innermost(None) is None
