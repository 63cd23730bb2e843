"""Mount lines, where the kernel says no. Mounts themselves are tested where there is a namespace for them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sandbox.ns import mounts, syscalls


@pytest.mark.parametrize("call", ["mount", "move_mount"])
@pytest.mark.parametrize("operation", ["tmpfs", "cover"])
def test_a_line_that_fails_keeps_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, call: str) -> None:
    """A warden serves further sandboxes: what it has open of an earlier one would stay for as long as it lives."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("mount", "umount", "move_mount", "mount_setattr"):
        monkeypatch.setattr(syscalls, name, lambda *_, **__: None)
    monkeypatch.setattr(syscalls, "open_tree", lambda path, *_: os.open(path, os.O_PATH | os.O_CLOEXEC))
    monkeypatch.setattr(syscalls, call, refuse)
    for name in ("one", "other", "run"):
        (tmp_path / name).mkdir()
    for name in ("hosts", "names"):
        (tmp_path / name).touch()
    lines: dict[str, list[object]] = {
        "tmpfs": ["tmpfs", "", "nosuid", "mode=755", ["/one", "/other"]],
        "cover": ["cover", {"/hosts": "127.0.0.1 localhost\n", "/names": "\n"}],
    }
    before = os.listdir("/proc/self/fd")
    with pytest.raises(mounts.LineFailed, match="No space left"):
        mounts.carry_out(str(tmp_path), [lines[operation]], "sandbox")
    assert os.listdir("/proc/self/fd") == before
