"""The audit: what was decided, as lines of JSON of which each holds the hash of the one before.

Line n+1 has the hash of line n, and the store has the last one: a line that was changed, taken out, put in or cut off is found,
by number. It is no protection from somebody who may write all of it, the store included: that one can make it anew.

A line is canonical JSON (keys sorted, no spaces, ASCII) of seq, time, event, further fields, previous and hash, where hash is
the SHA-256 of the canonical line without hash. Files: audit.jsonl, and the older ones audit.jsonl.1 to .5. Must not know what
the events mean. Sources: flock(2), write(2), rename(2).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sandbox.errors import ResourceError
from sandbox.recovery import private
from sandbox.recovery.store import Store
from sandbox.text import escape_text
from sandbox.violations import to_plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

NAME = "audit.jsonl"
KEPT = 5  # older files
ROTATE_BYTES = 10 << 20
FIELD_BYTES = 1 << 15  # of JSON in one line; more is cut
LINE_BYTES = 1 << 17
START = "0" * 64  # previous of the first line
OWN = ("seq", "time", "event", "previous", "hash")  # fields that every line has

TORN, MISSING, ROTATED = "audit-torn-line-cut", "audit-lines-missing", "audit-rotated"  # events of our own


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        ok: whether all lines are there and as they were written.
        lines: how many lines were read and found whole.
        file: name of the file with the first broken line; None if there is none.
        line: its number in that file, from 1.
        why: "json" (no canonical line), "hash" (not what was written), "seq" (lines before it are missing, or it is out of
            its place), "previous" (the line before it is another one), "missing end".
        torn: bytes of an unfinished line at the end, which is no damage: the next line takes its place.
    """

    ok: bool
    lines: int
    file: str | None = None
    line: int | None = None
    why: str | None = None
    torn: int = 0


class AuditLog:
    """The audit beside a store. For any number of processes and threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.folder

    def append(self, event: str, **fields: object) -> int:
        """Add a line; it is on disk when this returns. Returns its number.

        Fields become plain data as by `to_plain`; together they have room for 32 KiB. The store is told afterwards; if it
        cannot be, the line stands, and `store.on_trouble` is told.

        Raises:
            ValueError: a field has a name that every line has.
            ResourceError: it cannot be written; then nothing was.
        """
        return self.append_all([(event, fields)])

    def append_all(self, events: Sequence[tuple[str, Mapping[str, object]]]) -> int:
        """Add a line for each (event, fields), at least one, by one write; returns the number of the last. As `append`."""
        for _, fields in events:
            for name in fields:
                if name in OWN:
                    raise ValueError(f"append: the field {name!r} is the audit's own: give it another name")
        path = os.path.join(self.folder, NAME)
        try:
            with (
                private.folder(self.folder) as folder,
                _locked(folder, os.O_RDWR | os.O_CREAT | os.O_APPEND, fcntl.LOCK_EX, path) as fd,
            ):
                assert fd is not None
                seq, digest = self._append(folder, fd, [(event, _fitting(fields)) for event, fields in events])
                _told(self.store, seq, digest)
                if os.fstat(fd).st_size >= ROTATE_BYTES:
                    _rotate(folder)
        except OSError as error:
            raise ResourceError(f"{path} cannot be written ({error.strerror}): see to the disk and its rights") from None
        return seq

    def _append(self, folder: int, fd: int, wanted: list[tuple[str, dict[str, Any]]]) -> tuple[int, str]:
        """Below the lock: number and hash of the last new line."""
        whole, torn, last = _end(fd)
        is_new = whole == 0
        if is_new:
            last = self._end_of_older(folder)
        try:
            known = self.store.audit_end()
        except ResourceError:
            known = None  # told of when the store is to learn of this line
        found = _position(last)
        seq, digest = max(found, known, key=lambda end: end[0]) if known is not None else found
        if known is not None and known[0] == found[0]:
            seq, digest = known  # of two lines with one number the store's was the first
        events: list[tuple[str, dict[str, Any]]] = []
        if is_new and last:
            events.append((ROTATED, {}))
        if torn:
            events.append((TORN, {"bytes": torn}))
        if seq > found[0]:
            events.append((MISSING, {"last_found": found[0], "last_written": seq}))
        lines: list[bytes] = []
        for name, values in [*events, *wanted]:
            seq += 1
            line = {**values, "seq": seq, "time": datetime.now(UTC).isoformat(), "event": name, "previous": digest}
            digest = _hash(line)
            lines.append(_canonical({**line, "hash": digest}))
        if torn:
            os.ftruncate(fd, whole)
        _write(fd, b"".join(lines), whole)
        if is_new:
            os.fsync(folder)  # of the file's name
        return seq, digest

    def _end_of_older(self, folder: int) -> bytes:
        """The last line of the newest older file; empty if there is none."""
        for name in reversed(_older(folder)):
            fd = private.open_file(folder, name, os.O_RDONLY, os.path.join(self.folder, name))
            try:
                return _end(fd)[2]
            finally:
                os.close(fd)
        return b""


def verify(folder: str | os.PathLike[str]) -> Verdict:
    """Read the whole audit in `folder`, and compare its end with what the store there knows.

    The store may be behind (whoever wrote the last line was killed before it could tell), not ahead. Raises ResourceError
    if files belong to somebody else or cannot be read.
    """
    place = os.path.abspath(os.fspath(folder))
    with Store(place) as store:
        known = store.audit_end()  # before the lines are read: others go on writing
    path = os.path.join(place, NAME)
    try:
        with private.folder(place) as opened, _locked(opened, os.O_RDONLY, fcntl.LOCK_SH, path) as current:
            return _Reader(known).read(opened, place, current)
    except OSError as error:
        raise ResourceError(f"{path} cannot be read ({error.strerror}): see to the disk and its rights") from None


class _Reader:
    """Goes through the lines, oldest first, and stops at the first one that is broken."""

    def __init__(self, known: tuple[int, str] | None) -> None:
        self.known = known
        self.lines = 0
        self.seq, self.digest = 0, START

    def read(self, folder: int, place: str, current: int | None) -> Verdict:
        number = torn = 0
        names = [*_older(folder), *([NAME] if current is not None else [])]
        for name in names:
            number = 0
            fd = private.open_file(folder, name, os.O_RDONLY, os.path.join(place, name))
            with open(fd, "rb") as file:
                while raw := file.readline(LINE_BYTES):
                    number += 1
                    if name == NAME and not raw.endswith(b"\n") and not file.peek(1):
                        torn, number = len(raw), number - 1
                        break
                    why = self._broken(raw, name)
                    if why:
                        return Verdict(False, self.lines, name, number, why)
                    self.lines += 1
        if self.known is not None and self.known[0] > self.seq:
            return Verdict(False, self.lines, names[-1] if names else NAME, number + 1, "missing end")
        return Verdict(True, self.lines, torn=torn)

    def _broken(self, raw: bytes, name: str) -> str:
        """Why this line is broken, "" if it is not."""
        line = _parsed(raw)
        if line is None:
            return "json"
        digest = line.pop("hash")
        if _hash(line) != digest or (self.known is not None and self.known[0] == line["seq"] and self.known[1] != digest):
            return "hash"
        # Of the oldest file that is kept, those before it may have been rotated away.
        may_begin = self.lines == 0 and name == f"{NAME}.{KEPT}" and line["event"] == ROTATED
        if not may_begin and line["seq"] != self.seq + 1:
            return "seq"
        if not may_begin and line["previous"] != self.digest:
            return "previous"
        self.seq, self.digest = line["seq"], digest
        return ""


# -- lines ---------------------------------------------------------------------------------------------------------------


def _canonical(line: dict[str, Any]) -> bytes:
    """Raises ValueError for nan and inf."""
    return json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _hash(line: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(line).rstrip(b"\n")).hexdigest()


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The line, if it is one as we write them to the byte."""
    try:
        line = json.loads(raw)
        if not isinstance(line, dict) or _canonical(line) != raw:
            return None
    except (ValueError, RecursionError):
        return None
    kinds = {"seq": int, "time": str, "event": str, "previous": str, "hash": str}
    return line if all(type(line.get(name)) is kind for name, kind in kinds.items()) else None


def _position(raw: bytes) -> tuple[int, str]:
    """Number and hash of a line; what comes before the first one if it is none."""
    line = _parsed(raw)
    return (0, START) if line is None else (line["seq"], line["hash"])


def _fitting(fields: Mapping[str, object]) -> dict[str, Any]:
    plain = {name: to_plain(value) for name, value in fields.items()}
    text = json.dumps(plain)
    return plain if len(text) <= FIELD_BYTES else {"cut": text[: FIELD_BYTES // 2]}


# -- files ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: int, flags: int, kind: int, path: str) -> Iterator[int | None]:
    """The newest file, open and locked; None if it is not there and not made. Raises ResourceError."""
    while True:
        try:
            fd = private.open_file(folder, NAME, flags, path)
        except FileNotFoundError:
            yield None
            return
        try:
            with private.locked(fd, kind, path):
                if private.is_at(folder, NAME, fd):
                    yield fd
                    return
        finally:
            os.close(fd)


def _end(fd: int) -> tuple[int, int, bytes]:
    """Bytes of whole lines, bytes behind them, and the last whole line."""
    size = os.fstat(fd).st_size
    data = b""
    start = size
    while start and data.count(b"\n") < 2:
        step = min(start, LINE_BYTES)
        start -= step
        data = os.pread(fd, step, start) + data
    end = data.rfind(b"\n") + 1
    return start + end, len(data) - end, data[data.rfind(b"\n", 0, max(end - 1, 0)) + 1 : end]


def _write(fd: int, data: bytes, size: int) -> None:
    """All of it by one write(2), or nothing. Raises OSError."""
    try:
        written = os.write(fd, data)
    except OSError:
        os.ftruncate(fd, size)
        raise
    if written < len(data):
        os.ftruncate(fd, size)
        raise OSError(errno.ENOSPC, "the disk is full")
    os.fdatasync(fd)


def _told(store: Store, seq: int, digest: str) -> None:
    try:
        store.set_audit_end(seq, digest)
    except ResourceError as error:
        store.on_trouble(f"the end of the audit is not in the store: {escape_text(str(error), keep='')}")


def _older(folder: int) -> list[str]:
    """The older files that there are, oldest first. One may be missing in between, if a rotation was killed."""
    there = set(os.listdir(folder))
    return [name for number in range(KEPT, 0, -1) if (name := f"{NAME}.{number}") in there]


def _rotate(folder: int) -> None:
    """Make room for a new file. At every moment the order of the files is that of their lines."""
    there = set(_older(folder))
    free = next((number for number in range(1, KEPT) if f"{NAME}.{number}" not in there), KEPT)
    for number in range(free, 1, -1):
        os.rename(f"{NAME}.{number - 1}", f"{NAME}.{number}", src_dir_fd=folder, dst_dir_fd=folder)
    os.rename(NAME, f"{NAME}.1", src_dir_fd=folder, dst_dir_fd=folder)
