"""The quarantines in force, in one small file beside the store: `psie run` looks there, which cannot afford SQLite.

The store writes it, below its lock: with a new quarantine before that is committed, without a released one afterwards. So
at every moment it has all that are in force, and when the database proves damaged they are salvaged from it. No file: none.
Must be light, and must not know the store. Sources: rename(2), fsync(2).
"""

from __future__ import annotations

import marshal
import os
import sys
import zlib

from sandbox.errors import ResourceError
from sandbox.recovery import private

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

NAME = "quarantined"
NEW = "quarantined.new"
MAGIC = b"psie quarantined 1\n"
FIELDS = ("plugin_id", "sha256", "reason", "since", "by", "evidence")
_CHECK = 4  # bytes of the CRC-32
_MARSHAL = 4  # its version that every Python from 3.11 on reads
_LARGE = 1 << 20
MAIN_FILES = ("main.py", "__init__.py")  # of a plugin folder, whose digest is of its files' lines: sandbox.plugins.files


def read(place: str) -> list[dict[str, Any]] | None:
    """The quarantines in force, each with FIELDS; None: the file is damaged. Raises ResourceError for somebody else's file."""
    if not os.path.lexists(os.path.join(place, NAME)):
        return []
    path = os.path.join(place, NAME)
    try:
        with private.folder(place) as folder:
            fd = private.open_file(folder, NAME, os.O_RDONLY, path)
        with open(fd, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ResourceError(f"{path} cannot be read ({error.strerror}): see to the disk and its rights") from None
    return _parsed(content)


def _parsed(content: bytes) -> list[dict[str, Any]] | None:
    data = content[len(MAGIC) + _CHECK :]
    if content != MAGIC + _checksum(data) + data:
        return None
    try:
        entries = marshal.loads(data)
    except (ValueError, TypeError, EOFError):
        return None
    is_known = isinstance(entries, list) and all(isinstance(each, dict) and set(each) == set(FIELDS) for each in entries)
    return entries if is_known else None


def write(folder: int, entries: list[dict[str, Any]]) -> None:
    """The whole file or none of it, on disk when this returns. Only below the store's lock. Raises OSError."""
    data = marshal.dumps(entries, _MARSHAL)
    try:
        os.unlink(NEW, dir_fd=folder)
    except FileNotFoundError:
        pass
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(NEW, flags, 0o600, dir_fd=folder), "wb") as file:
        file.write(MAGIC + _checksum(data) + data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(NEW, NAME, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def find(entries: Iterable[dict[str, Any]], plugin_id: str, digest: str, parts: Iterable[str] = ()) -> dict[str, Any] | None:
    """The first of them that is of this file: of its path, or of its content, with what is beside it. Or of one of its `parts`
    (digests of files), alone as a file or as the whole of a plugin: that would be run as well."""
    known = plugin_id.encode("utf-8", "backslashreplace").decode()  # as the store has it
    alone = list(parts)
    for each in entries:
        of_part = {one for part in alone for one in _digests(part, each["plugin_id"])}
        if each["plugin_id"] == known or (each["sha256"] and each["sha256"] in {digest, *of_part}):
            return each
    return None


def _digests(digest: str, plugin_id: str) -> Iterable[str]:
    yield digest
    for name in (f"{plugin_id}.py", *MAIN_FILES):
        yield sha256(f"{digest}  {name}\n".encode("utf-8", "backslashreplace"))


def sha256(data: bytes) -> str:
    """In hex. hashlib loads OpenSSL, which costs 3 ms, and is worth it only for much."""
    if len(data) < _LARGE:
        try:
            digest: str = __import__("_sha2" if sys.version_info >= (3, 12) else "_sha256").sha256(data).hexdigest()
            return digest
        except ImportError:
            pass  # a Python that was built without
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECK, "little")
