"""The audit: whatever is changed, taken out or cut off is found, at its line; what a killed writer leaves is mended."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import ResourceError
from sandbox.recovery import audit, private
from sandbox.recovery.audit import KEPT, NAME, START, AuditLog, Verdict, verify
from sandbox.recovery.store import MIGRATIONS, Store

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
LINES = 4


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    folder.mkdir(0o700)
    return folder


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def log(here: Path, told: list[str]) -> Iterator[AuditLog]:
    with Store(here, on_trouble=told.append) as store:
        yield AuditLog(store)


@pytest.fixture
def file(here: Path, log: AuditLog) -> Path:
    """An audit of LINES lines."""
    for number in range(LINES):
        assert log.append("event", number=number) == number + 1
    return here / NAME


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sealed(line: dict[str, Any]) -> bytes:
    """A line with its hash, worked out as the module's first words say."""
    content = {name: value for name, value in line.items() if name != "hash"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**content, "hash": digest}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def broken(verdict: Verdict) -> tuple[str | None, int | None, str | None]:
    assert not verdict.ok
    return verdict.file, verdict.line, verdict.why


def test_every_line_has_the_hash_of_the_one_before(file: Path, here: Path) -> None:
    lines = lines_of(file)
    assert [line["seq"] for line in lines] == list(range(1, LINES + 1))
    assert [line["number"] for line in lines] == list(range(LINES))
    assert [line["previous"] for line in lines] == [START, *(line["hash"] for line in lines[:-1])]
    assert b"".join(map(sealed, lines)) == file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert verify(here) == Verdict(True, LINES)


def test_nothing_was_decided_yet(here: Path) -> None:
    assert verify(here) == Verdict(True, 0)


def test_hostile_fields_are_one_line(here: Path, log: AuditLog) -> None:
    values = ["\n", "\udcff\0", "x" * 10**6, float("nan"), b"\xff", {"a": [1, {2}]}, 10**30, object(), None]
    for value in values:
        log.append("event", value=value)
    assert verify(here) == Verdict(True, len(values))
    assert len((here / NAME).read_bytes().splitlines()) == len(values)
    assert "x" * 1000 in lines_of(here / NAME)[2]["cut"]
    assert (here / NAME).stat().st_size < audit.LINE_BYTES
    for name in ("seq", "time", "previous", "hash"):
        with pytest.raises(ValueError, match=f"'{name}' is the audit's own"):
            log.append("event", **{name: 1})


# -- what was changed ----------------------------------------------------------------------------------------------------


def test_a_flipped_byte_anywhere_is_found_at_its_line(file: Path, here: Path) -> None:
    whole = file.read_bytes()
    for position in range(len(whole)):
        for bit in (1, 0x20):
            changed = bytearray(whole)
            changed[position] ^= bit
            file.write_bytes(changed)
            line = whole.count(b"\n", 0, position) + 1
            assert broken(verify(here))[:2] == (NAME, line), (position, bit)
    file.write_bytes(whole)
    assert verify(here) == Verdict(True, LINES)


Change = Callable[[list[bytes]], list[bytes]]


def resealed(lines: list[bytes], index: int, **values: Any) -> list[bytes]:
    """The lines, one of them changed with a fitting hash."""
    return [*lines[:index], sealed({**json.loads(lines[index]), **values}), *lines[index + 1 :]]


def chain(lines: list[bytes]) -> list[bytes]:
    """All lines made anew, so that each fits the one before."""
    made: list[bytes] = []
    for line in lines:
        previous = json.loads(made[-1])["hash"] if made else START
        made.append(sealed({**json.loads(line), "previous": previous}))
    return made


CHANGES: dict[str, tuple[Change, int, str]] = {
    "a line is taken out": (lambda lines: lines[:1] + lines[2:], 2, "seq"),
    "the first line is taken out": (lambda lines: lines[1:], 1, "seq"),
    "two lines are exchanged": (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 2, "seq"),
    "a line is there twice": (lambda lines: [*lines[:2], *lines[1:]], 3, "seq"),
    "a line has another content": (lambda lines: resealed(lines, 1, number=7), 3, "previous"),
    "the last line has another content": (lambda lines: resealed(lines, 3, number=7), 4, "hash"),
    "all is made anew": (lambda lines: chain(resealed(lines, 1, number=7)), 4, "hash"),
    "the last line is cut off": (lambda lines: lines[:-1], 4, "missing end"),
    "half is cut off": (lambda lines: lines[:2], 3, "missing end"),
    "all is cut off": (lambda lines: [], 1, "missing end"),
    "the last line is cut in two": (lambda lines: [*lines[:-1], lines[-1][:50]], 4, "missing end"),
    "the last line's end is cut off": (lambda lines: [*lines[:-1], lines[-1][:-1]], 4, "missing end"),
    "an empty line": (lambda lines: [*lines[:2], b"\n", *lines[2:]], 3, "json"),
    "a space": (lambda lines: [lines[0].replace(b",", b", ", 1), *lines[1:]], 1, "json"),
    "a field twice": (lambda lines: [lines[0].replace(b"{", b'{"event":"x",', 1), *lines[1:]], 1, "json"),
    "no object": (lambda lines: [b"[1]\n", *lines[1:]], 1, "json"),
    "deep": (lambda lines: [b"[" * 60_000 + b"\n", *lines[1:]], 1, "json"),
    "no number": (lambda lines: resealed(lines, 0, seq="1"), 1, "json"),
    "a bool as the number": (lambda lines: resealed(lines, 0, seq=True), 1, "json"),
    "an endless line": (lambda lines: [*lines, b"x" * (3 * audit.LINE_BYTES)], 5, "json"),
    "binary": (lambda lines: [b"\0\xff\n", *lines[1:]], 1, "json"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_is_found_at_its_line(file: Path, here: Path, how: str) -> None:
    change, line, why = CHANGES[how]
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
    assert broken(verify(here)) == (NAME, line, why)


@pytest.mark.parametrize("how", sorted(CHANGES.keys() - {"an endless line"}))  # that one is cut off, which is told
def test_a_change_stays_found_when_it_goes_on(file: Path, here: Path, log: AuditLog, how: str) -> None:
    change, line, _ = CHANGES[how]
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
    for _ in range(LINES * 2):
        log.append("later")
    verdict = verify(here)
    assert not verdict.ok
    assert verdict.line is not None
    assert abs(verdict.line - line) <= 1
    assert lines_of_events(file, "later") == LINES * 2


def lines_of_events(path: Path, event: str) -> int:
    return path.read_bytes().count(f'"event":"{event}"'.encode())


def test_a_removed_file_is_found(file: Path, here: Path, log: AuditLog) -> None:
    file.unlink()
    assert broken(verify(here)) == (NAME, 1, "missing end")
    log.append("later")
    assert [line["event"] for line in lines_of(file)] == [audit.MISSING, "later"]
    assert lines_of(file)[0]["last_written"] == LINES
    assert broken(verify(here)) == (NAME, 1, "seq")


# -- what was not finished -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"{", b'{"event":"x","hash":"00"}', b"x" * 50_000])
def test_an_unfinished_line_is_cut_off_and_that_is_told(file: Path, here: Path, log: AuditLog, torn: bytes) -> None:
    with open(file, "ab") as opened:
        opened.write(torn)
    assert verify(here) == Verdict(True, LINES, torn=len(torn))
    assert log.append("later") == LINES + 2
    cut, later = lines_of(file)[LINES:]
    assert (cut["event"], cut["bytes"], later["event"]) == (audit.TORN, len(torn), "later")
    assert verify(here) == Verdict(True, LINES + 2)


def test_a_store_that_was_not_told_is_behind(file: Path, here: Path, log: AuditLog) -> None:
    connection = sqlite3.connect(here / "psie.db")
    before = connection.execute("SELECT value FROM meta").fetchall()
    log.append("told late")
    with connection:
        connection.executemany("UPDATE meta SET value = ?", before)
    connection.close()
    assert verify(here) == Verdict(True, LINES + 1)
    log.append("later")
    assert verify(here) == Verdict(True, LINES + 2)


def test_a_line_stands_without_the_store(file: Path, here: Path, log: AuditLog, told: list[str]) -> None:
    connection = sqlite3.connect(here / "psie.db")
    connection.execute("PRAGMA user_version = 99")
    assert log.append("untold") == LINES + 1
    assert len(told) == 1
    assert "upgrade psie" in told[0]
    with pytest.raises(ResourceError, match="upgrade psie"):
        verify(here)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    connection.close()
    assert verify(here) == Verdict(True, LINES + 1)


def test_a_full_disk_leaves_no_half_line(file: Path, here: Path) -> None:
    source = (
        "import resource\nfrom sandbox.recovery.audit import *\nfrom sandbox.recovery.store import Store\n"
        f"store = Store({str(here)!r})\nlog = AuditLog(store)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file.stat().st_size + 100}, resource.RLIM_INFINITY))\n"
        "try:\n    log.append('too long')\nexcept Exception as error:\n    print(type(error).__name__)\n"
    )
    before = file.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("ResourceError\n", "")
    assert file.read_bytes() == before
    assert verify(here) == Verdict(True, LINES)


def test_a_fork_meanwhile_does_not_keep_the_lock(
    file: Path, here: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "PATIENCE", 0.2)
    reading, writing = os.pipe()
    with private.folder(str(here)) as folder, audit._locked(folder, os.O_RDWR, fcntl.LOCK_EX, str(file)):
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        assert log.append("event") == LINES + 1
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(pid, 0)


# -- older files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rotated(here: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An audit of which the oldest lines are gone already; its files, oldest first."""
    monkeypatch.setattr(audit, "ROTATE_BYTES", 1000)
    for number in range(40):
        log.append("event", number=number)
        assert verify(here).ok, number
    files = [here / f"{NAME}.{number}" for number in range(KEPT, 0, -1)]
    return [*files, here / NAME]


def test_a_large_file_makes_room(rotated: list[Path], here: Path) -> None:
    assert sorted(path.name for path in rotated) == sorted(name for name in os.listdir(here) if name.startswith(NAME))
    for before, after in pairwise(rotated):
        first, last = lines_of(after)[0], lines_of(before)[-1]
        assert (first["event"], first["previous"], first["seq"]) == (audit.ROTATED, last["hash"], last["seq"] + 1)
        assert 1000 <= before.stat().st_size < 2000
    numbers = [line["number"] for path in rotated for line in lines_of(path) if line["event"] == "event"]
    assert numbers == list(range(numbers[0], 40))
    assert numbers[0] > 0
    assert verify(here) == Verdict(True, sum(len(lines_of(path)) for path in rotated))


@pytest.mark.parametrize("number", range(KEPT + 1))
def test_an_older_file_that_is_gone_is_found(rotated: list[Path], here: Path, number: int) -> None:
    rotated[number].unlink()
    verdict = verify(here)
    if number == KEPT:
        assert broken(verdict) == (rotated[-2].name, len(lines_of(rotated[-2])) + 1, "missing end")
    else:
        assert broken(verdict) == (rotated[number + 1].name, 1, "seq")


def test_the_start_of_the_oldest_file_is_not_just_any_line(rotated: list[Path], here: Path) -> None:
    content = rotated[0].read_bytes().splitlines(keepends=True)
    rotated[0].write_bytes(b"".join(content[1:]))
    assert broken(verify(here)) == (rotated[0].name, 1, "seq")


def test_an_older_file_has_no_unfinished_line(rotated: list[Path], here: Path) -> None:
    with open(rotated[2], "ab") as opened:
        opened.write(b"{")
    assert broken(verify(here)) == (rotated[2].name, len(rotated[2].read_bytes().splitlines()), "json")


@pytest.mark.parametrize("moves", range(KEPT + 1))
def test_a_killed_rotation_goes_on(rotated: list[Path], here: Path, log: AuditLog, moves: int) -> None:
    """After each of its renames, as `_rotate` does them."""
    for number in range(KEPT, KEPT - moves, -1):
        older = here / (f"{NAME}.{number - 1}" if number > 1 else NAME)
        older.rename(here / f"{NAME}.{number}")
    assert verify(here).ok
    for number in range(30):
        log.append("later", number=number)
        assert verify(here).ok
    assert sorted(path.name for path in rotated) == sorted(name for name in os.listdir(here) if name.startswith(NAME))


# -- whose file it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mode", pytest.param("owner", marks=needs_root), "second name", "link", "fifo", "folder"])
def test_what_others_could_have_made_is_refused(file: Path, here: Path, log: AuditLog, how: str) -> None:
    before = file.read_bytes()
    target = here.parent / "target"
    if how == "mode":
        file.chmod(0o604)
    elif how == "owner":
        os.chown(file, NOBODY, NOBODY)
    elif how == "second name":
        os.link(file, target)
    else:
        shutil.move(file, target)
        if how == "link":
            file.symlink_to(target)
        elif how == "fifo":
            os.mkfifo(file, 0o600)
        else:
            file.mkdir()
    for use in (lambda: log.append("event"), lambda: verify(here)):
        with pytest.raises(ResourceError, match=r"chmod 600 it|belongs to another user|remove it") as caught:
            use()
        assert str(file) in str(caught.value)
    assert (target if target.exists() else file).read_bytes() == before
