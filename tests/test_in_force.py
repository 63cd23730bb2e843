"""The file of the quarantines in force: what it holds, which files it is about, and what is believed of a damaged one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import ResourceError
from sandbox.plugins import files
from sandbox.recovery import in_force

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
SOURCE = b"print('bad')\n"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    folder.mkdir(0o700)
    return folder


def entry(plugin_id: str, sha256: str | None = None) -> dict[str, Any]:
    return {"plugin_id": plugin_id, "sha256": sha256, "reason": "why", "since": 5.25, "by": "test", "evidence": None}


def write(here: Path, entries: list[dict[str, Any]]) -> None:
    fd = os.open(here, os.O_RDONLY)
    in_force.write(fd, entries)
    os.close(fd)


def test_what_is_written_is_read(here: Path) -> None:
    assert in_force.read(str(here)) == []
    entries = [entry("/a/b.py", "aa" * 32), entry("é \x1b[2J")]
    write(here, entries)
    assert in_force.read(str(here)) == entries
    (here / in_force.NEW).write_text("left by one that was killed")
    write(here, [])
    assert in_force.read(str(here)) == []
    assert os.listdir(here) == [in_force.NAME]
    assert (here / in_force.NAME).stat().st_mode & 0o777 == 0o600
    (here / in_force.NAME).write_bytes(b"")
    assert in_force.read(str(here)) is None  # even one without entries says so
    assert in_force.read(str(here / "gone")) == []


def test_damage_is_seen(here: Path) -> None:
    write(here, [entry("/a/b.py")])
    whole = (here / in_force.NAME).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (here / in_force.NAME).write_bytes(damaged)
        assert in_force.read(str(here)) is None
        (here / in_force.NAME).write_bytes(whole[: max(position, 1)])
        assert in_force.read(str(here)) is None
    write(here, [{**entry("p"), "later": 1}])
    assert in_force.read(str(here)) is None


@pytest.mark.parametrize("how", ["mode", pytest.param("owner", marks=needs_root), "link", "fifo"])
def test_what_others_could_have_made_is_refused(here: Path, how: str) -> None:
    write(here, [])
    path = here / in_force.NAME
    if how == "mode":
        path.chmod(0o660)
    elif how == "owner":
        os.chown(path, NOBODY, NOBODY)
    else:
        path.unlink()
        if how == "link":
            path.symlink_to("/dev/null")
        else:
            os.mkfifo(path, 0o600)
    with pytest.raises(ResourceError, match=str(path)):
        in_force.read(str(here))


def test_a_file_is_known_by_its_path_and_by_its_content() -> None:
    digest = in_force.sha256(SOURCE)
    by_path, by_content = entry("/a/b.py"), entry("/c/d.py", digest)
    assert in_force.find([by_path, by_content], "/a/b.py", "ff" * 32) == by_path
    assert in_force.find([by_path, by_content], "/x/renamed.py", digest) == by_content
    assert in_force.find([by_path, by_content], "/x/other.py", "ff" * 32) is None
    assert in_force.find([entry("/a/\\udcff.py")], "/a/\udcff.py", "ff" * 32)  # the store has no lone surrogates


def test_a_plugin_of_the_framework_is_known_by_its_digest() -> None:
    digest = in_force.sha256(SOURCE)
    for name in ("bad.py", "main.py", "__init__.py"):
        quarantined = entry("bad", files.digest({name: SOURCE}))
        assert in_force.find([quarantined], "/tmp/copy.py", "ff" * 32, [digest]) == quarantined
        other = in_force.sha256(SOURCE + b"#")
        assert in_force.find([quarantined], "/tmp/copy.py", other, [other]) is None
    assert in_force.find([entry("bad")], "/tmp/bad.py", digest) is None  # a name is no path


@pytest.mark.parametrize("size", [0, 1000, (1 << 20) - 1, 1 << 20])
def test_a_digest_is_a_digest(size: int) -> None:
    assert in_force.sha256(b"x" * size) == hashlib.sha256(b"x" * size).hexdigest()
