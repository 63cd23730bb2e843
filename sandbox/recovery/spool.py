"""The spool: every run that has ended, through whichever door, as one record at the end of one file, until it becomes a row.

To open the store costs a start of `psie run` 6 ms; to append a record here costs some ten microseconds. The store moves what
waits into rows when it is asked for runs, or when whoever appends is told that it is much. A record is a magic, the length
and the CRC-32 of what follows, and marshal of plain data; what is damaged is skipped up to the next magic.

Writers append by one write(2) below flock(LOCK_SH). Who moves renames the file away below flock(LOCK_EX), so that they go on
with a new one and wait for nothing, and removes it when its records are rows. Each record has an id of its own that the store
takes once: whoever is killed in between, the next one moves all of the file again. Must be light, and must not know SQLite.
Sources: write(2), flock(2), rename(2).
"""

from __future__ import annotations

import fcntl
import marshal
import os
import time
import zlib

from sandbox.errors import ResourceError
from sandbox.recovery import private
from sandbox.version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

NAME = "runs.spool"
TAKEN = "runs.taken"  # what is being moved
# A plugin's words are in the records, and must not look like one where another is torn: marshal writes text as UTF-8, which
# has no byte 0xff, and between two of them there is no room for a number that could be the rest.
MAGIC = b"\xffpsie-run-1\xff"
_HEAD = len(MAGIC) + 8
_MARSHAL = 4  # its version that every Python from 3.11 on reads
MUCH_BYTES = 512 << 10
MOST_BYTES = 64 << 20  # where nobody can move them
VIOLATION_BYTES = 1 << 16  # that a run keeps: a plugin can make many, and long ones
TEXT = 4000  # characters of a name or a reason


def append(folder: str, *, violations: Sequence[dict[str, Any]] = (), patience: float | None = None, **fields: Any) -> bool:
    """Record a run that has ended: the fields of sandbox.recovery.store.Run as plain data, but id, run_id and version.

    `patience`: seconds that a lock is waited for; None: private.PATIENCE.

    True, once every MUCH_BYTES: so much waits now that `Store(folder).collect()` should be called. Raises ResourceError: then
    nothing is recorded.
    """
    types: dict[str, int] = {}
    for violation in violations:
        kind = str(violation.get("type", ""))
        types[kind] = types.get(kind, 0) + 1
    kept, left = [], VIOLATION_BYTES
    for violation in violations:
        left -= len(marshal.dumps(violation, _MARSHAL))
        if left < 0:
            break
        kept.append(violation)
    for name in ("plugin_id", "reason"):
        fields[name] = fields.get(name, "")[:TEXT]
    fields |= {"violations": kept, "violation_types": types, "run_id": os.urandom(8).hex(), "version": __version__}
    payload = marshal.dumps(fields, _MARSHAL)
    size, check = (number.to_bytes(4, "little") for number in (len(payload), zlib.crc32(payload)))
    return _write(folder, MAGIC + size + check + payload, private.PATIENCE if patience is None else patience)


def _write(place: str, record: bytes, patience: float) -> bool:
    path = os.path.join(place, NAME)
    since = time.monotonic()
    with private.folder(place) as folder:
        while True:
            try:
                fd = private.open_file(folder, NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, path)
            except FileNotFoundError:
                raise ResourceError(f"{path} cannot be made: its folder is being removed") from None
            try:
                if private.try_lock(fd, fcntl.LOCK_SH):
                    try:
                        if private.is_at(folder, NAME, fd):
                            return _append(fd, record, path)
                    finally:
                        fcntl.flock(fd, fcntl.LOCK_UN)
                else:
                    private.pause(since, patience, path)
            finally:
                os.close(fd)


def _append(fd: int, record: bytes, path: str) -> bool:
    size = os.fstat(fd).st_size
    if size > MOST_BYTES:
        raise ResourceError(f"{path} is full: psie history moves what is in it into the store, or says why it cannot")
    try:
        written = os.write(fd, record)
    except OSError as error:
        raise ResourceError(f"{path} cannot be written ({error.strerror}): see to the disk and its rights") from None
    if written < len(record):  # others may have appended behind it: it stays, as a damaged one
        raise ResourceError(f"{path} cannot be written (the disk is full): see to the disk")
    return size // MUCH_BYTES < (size + written) // MUCH_BYTES


def waits(place: str) -> bool:
    """Whether there is something to move."""
    for name in (NAME, TAKEN):
        try:
            if os.stat(os.path.join(place, name), follow_symlinks=False).st_size:
                return True
        except FileNotFoundError:
            continue
    return False


def take(place: str, move: Callable[[list[dict[str, Any]]], None], *, at_once: int = 1000) -> int:
    """Hand all records that wait to `move`, oldest first, `at_once` or fewer at a time; how many bytes were no record.

    A record is gone when `move` has had all those of its file; until then it comes again, so `move` must know it by its
    `run_id`. One process at a time. Raises ResourceError, and what `move` raises.
    """
    damaged = 0
    try:
        with private.folder(place) as folder, private.locked(folder, fcntl.LOCK_EX, place):
            while True:
                try:
                    fd = private.open_file(folder, TAKEN, os.O_RDONLY, os.path.join(place, TAKEN))
                except FileNotFoundError:
                    if _set_apart(folder, os.path.join(place, NAME)):
                        continue
                    return damaged
                with open(fd, "rb") as file:
                    found, bad = records(file.read())
                for start in range(0, len(found), at_once):
                    move(found[start : start + at_once])
                os.unlink(TAKEN, dir_fd=folder)
                damaged += bad
    except OSError as error:
        raise ResourceError(f"{os.path.join(place, NAME)} cannot be moved ({error.strerror}): see to the disk") from None


def _set_apart(folder: int, path: str) -> bool:
    """Rename the spool, for which nobody may be writing to it; False if there is nothing in it."""
    try:
        fd = private.open_file(folder, NAME, os.O_RDONLY, path)
    except FileNotFoundError:
        return False
    try:
        with private.locked(fd, fcntl.LOCK_EX, path):
            if not os.fstat(fd).st_size:
                return False
            os.rename(NAME, TAKEN, src_dir_fd=folder, dst_dir_fd=folder)
            return True
    finally:
        os.close(fd)


def records(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The whole records, and how many bytes belong to none."""
    found: list[dict[str, Any]] = []
    good = at = 0
    while (at := data.find(MAGIC, at)) >= 0:
        record, size = _record(data, at)
        if record is not None:
            found.append(record)
            good += size
        at += size
    return found, len(data) - good


def _record(data: bytes, at: int) -> tuple[dict[str, Any] | None, int]:
    """The record that begins there and its length; None and the length of the magic if it is damaged."""
    size, check = (int.from_bytes(data[at + start : at + start + 4], "little") for start in (len(MAGIC), len(MAGIC) + 4))
    payload = data[at + _HEAD : at + _HEAD + size]
    if len(payload) == size and zlib.crc32(payload) == check:
        try:
            record = marshal.loads(payload)
        except (ValueError, TypeError, EOFError):
            record = None
        if isinstance(record, dict):
            return record, _HEAD + size
    return None, len(MAGIC)
