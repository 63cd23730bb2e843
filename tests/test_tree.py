"""What is known of a folder, and what looks at it find."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.monitor.tree import FileTree


class Looked:
    """A tree, and what it tells."""

    def __init__(self, folder: Path, lower: Path | None = None) -> None:
        self.told: list[dict[str, Any]] = []
        flags = os.O_RDONLY | os.O_DIRECTORY
        self.tree = FileTree(os.open(folder, flags), self.told.append, None if lower is None else os.open(lower, flags))
        self.tree.look(report=False)

    def look(self) -> list[tuple[str, str]]:
        self.told.clear()
        self.tree.look()
        return [(each["operation"], each["path"]) for each in self.told]


@pytest.fixture
def looked(tmp_path: Path) -> Iterator[Looked]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    looked = Looked(tmp_path)
    yield looked
    looked.tree.close(look=False)


def test_a_look_tells_each_difference_once(looked: Looked, tmp_path: Path) -> None:
    assert looked.look() == []
    (tmp_path / "new").write_text("x")
    (tmp_path / "folder" / "file").write_text("more")
    assert looked.look() == [("create", "new"), ("modify", "folder/file")]
    (tmp_path / "folder" / "file").chmod(0o600)
    assert looked.look() == [("attributes", "folder/file")]
    (tmp_path / "folder" / "file").unlink()
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("a file now")
    assert looked.look() == [("delete", "folder/file"), ("create", "folder")]
    assert looked.look() == []


def test_a_folder_that_cannot_be_opened_keeps_what_is_known_of_it(
    looked: Looked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = looked.tree._enter
    monkeypatch.setattr(looked.tree, "_enter", lambda folder, report: -1 if folder.name else enter(folder, report))
    (tmp_path / "folder" / "file").unlink()
    assert looked.look() == []
    monkeypatch.undo()
    assert looked.look() == [("delete", "folder/file")]


def test_without_a_descriptor_for_it_the_next_look_tells(looked: Looked, tmp_path: Path) -> None:
    """listdir(3) takes one more than the folder has; what holds it is not what is looked at."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (tmp_path / "new").touch()
    held = [os.open("/", os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 2, hard))
        while len(held) < 2:
            held.append(os.open("/", os.O_RDONLY))
        os.close(held.pop())  # the folder itself can be opened
        first = looked.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert first == []
    assert looked.look() == [("create", "new")]


@pytest.mark.parametrize("function", ["listdir", "stat"])
@pytest.mark.parametrize(("number", "told"), [(errno.EIO, [("hidden", "folder")]), (errno.ENOMEM, [])])
def test_a_folder_that_cannot_be_read_is_told_unless_that_passes(
    looked: Looked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, told: list[Any]
) -> None:
    (tmp_path / "folder" / "new").touch()
    folder, original = os.stat(tmp_path / "folder"), getattr(os, function)

    def fail(what: Any, *, dir_fd: int | None = None, **more: Any) -> Any:
        fd = what if dir_fd is None else dir_fd
        if isinstance(fd, int) and os.path.samestat(os.fstat(fd), folder):
            raise OSError(number, os.strerror(number))
        return original(what, **more) if dir_fd is None else original(what, dir_fd=dir_fd, **more)

    monkeypatch.setattr(os, function, fail)
    assert [looked.look(), looked.look()] == [told, []]
    monkeypatch.undo()
    assert looked.look() == [("create", "folder/new")]


def test_what_the_host_does_itself_is_not_told(looked: Looked, tmp_path: Path) -> None:
    looked.tree.own.append("own")
    (tmp_path / "own").write_text("x")
    assert looked.look() == []
    looked.tree.own.clear()
    assert looked.look() == []
    (tmp_path / "known").write_text("x")
    looked.tree.know("known")
    looked.tree.know("nothing")
    assert looked.look() == []


def test_many_removals_cost_what_they_are(looked: Looked, tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number}").mkdir()
    looked.look()
    for number in range(3000):
        (tmp_path / f"{number}").rmdir()
    start = time.process_time()
    assert len(looked.look()) == 3000
    assert time.process_time() - start < 2


def test_an_upper_layer_says_what_it_means(tmp_path: Path) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for folder in (upper, lower / "folder"):
        folder.mkdir(parents=True)
    for name in ("changed", "mode", "copied"):
        (lower / name).write_text("x")
    looked = Looked(upper, lower)
    try:
        for name in ("changed", "mode", "copied"):
            (upper / name).write_text("x")
            found = (lower / name).stat()
            os.utime(upper / name, ns=(found.st_atime_ns, found.st_mtime_ns))
        (upper / "changed").write_text("more")
        (upper / "mode").chmod(0o600)
        (upper / "folder").mkdir()
        (upper / "folder" / "new").write_text("x")
        assert looked.look() == [("modify", "changed"), ("attributes", "mode"), ("create", "folder/new")]
    finally:
        looked.tree.close(look=False)
