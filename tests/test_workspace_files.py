"""The files of a workspace, as the host reads them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sandbox import files
from sandbox.ns import syscalls


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
            assert [entry.path for entry in files.listed(root, "")] == ["folder"]
    finally:
        os.close(root)
