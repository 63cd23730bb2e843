"""The files of a workspace, as the host reads them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox import files, host
from sandbox.ns import syscalls, workspace

NOBODY = 65534


@pytest.mark.parametrize(("number", "is_told"), [(errno.EMFILE, True), (errno.EACCES, False)], ids=["EMFILE", "EACCES"])
def test_a_list_is_whole_but_for_what_a_plugin_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_told: bool
) -> None:
    """What this process lacks is no word about the files."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    open_beneath = syscalls.open_beneath

    def fail_inside(root: int, path: str, flags: int) -> int:
        if path == "folder":
            raise OSError(number, os.strerror(number), path)
        return open_beneath(root, path, flags)

    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert [entry.path for entry in files.listed(root, "")] == ["folder", "folder/file"]
        monkeypatch.setattr(syscalls, "open_beneath", fail_inside)
        if is_told:
            with pytest.raises(OSError, match="Too many open files"):
                files.listed(root, "")
        else:
            assert [(entry.path, entry.hides) for entry in files.listed(root, "")] == [("folder", True)]
    finally:
        os.close(root)


def test_a_folder_too_deep_to_be_looked_into_is_told(tmp_path: Path) -> None:
    """The kernel takes no path of more than 4096 bytes; a plugin goes down step by step."""
    name = "d" * 250
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(17):
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("hidden", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        entries = files.listed(root, "")
    finally:
        os.close(root)
        workspace.remove_folder(os.open(tmp_path.parent, os.O_RDONLY), tmp_path.name)  # what pytest cannot do either
    assert [entry.hides for entry in entries] == [False] * 16 + [True]
    assert all(entry.kind == "folder" for entry in entries)


def as_nobody(action: Callable[[], None]) -> str:
    """What it says in a process that has no rights but those of its id."""

    def act() -> None:
        if os.getuid() == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        action()

    return host.in_child(act)


def test_a_folder_that_may_be_listed_but_not_searched_is_told(tmp_path: Path) -> None:
    """Below the folder that a list begins with, and at it; the workspace itself its owner may search again."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    if os.getuid() == 0:
        for path in (tmp_path, tmp_path / "folder"):
            os.chown(path, NOBODY, NOBODY)
    place = os.open(tmp_path, os.O_PATH)
    (tmp_path / "folder").chmod(0o400)
    tmp_path.chmod(0o400)

    def look() -> None:
        root = workspace.readable(lambda how: os.open(".", how | os.O_DIRECTORY, dir_fd=place), place)
        found = [(entry.path, entry.hides) for entry in files.listed(root, "")]
        assert found == [("folder", True)], found
        files.listed(root, "folder")

    try:
        assert as_nobody(look) == "Permission denied"
        assert tmp_path.stat().st_mode & 0o777 == 0o700
    finally:
        os.close(place)
        tmp_path.chmod(0o700)
        (tmp_path / "folder").chmod(0o700)
