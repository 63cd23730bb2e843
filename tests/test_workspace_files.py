"""The files of a workspace, as the host reads them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sandbox import files
from sandbox.ns import syscalls, workspace


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
