"""Which files of settings a person has accepted: `psie.toml` or `pyproject.toml` beside a plugin, which whoever made the plugin
may have made as well.

Accepted is a path with a content: a file that has changed since, or lies elsewhere, is not. Kept in psie's state folder, a file
for each, open to nobody else. Must be light: it is on the start path of `psie run`.
"""

from __future__ import annotations

import os

from sandbox.errors import ResourceError
from sandbox.recovery import private
from sandbox.recovery.in_force import sha256

FOLDER = "trusted"
MOST = 64 << 10  # bytes of one entry


class Accepted:
    """A file that was accepted: `path`, absolute, `sha256` of its content in hex, and `name` of the entry."""

    def __init__(self, name: str, digest: str, path: str) -> None:
        self.name = name
        self.sha256 = digest
        self.path = path


def _place() -> str:
    return os.path.join(private.default_folder(), FOLDER)


def _is_missing(place: str) -> bool:
    """Not so where nobody can tell: opening it says why."""
    try:
        os.stat(place)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _name(path: str) -> str:
    return sha256(os.fsencode(path))


def accept(path: str, content: bytes) -> None:
    """From now on the file at `path` with this `content` counts as a person's own settings. Raises ResourceError."""
    path = os.path.abspath(path)
    place = _place()
    with private.folder(place) as folder:
        name = _name(path)
        temporary = f"{name}.new"  # always the same, so that a writer that was killed leaves nothing that stays
        fd = private.open_file(folder, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.path.join(place, temporary))
        try:
            with open(fd, "wb") as file:
                file.write(f"{sha256(content)}\n".encode() + os.fsencode(path))
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            os.unlink(temporary, dir_fd=folder)
            raise ResourceError(f"{place} takes nothing ({error.strerror}): see to the disk and its rights") from None


def is_accepted(path: str, content: bytes) -> bool:
    """Whether a person has accepted this content at this path. Raises ResourceError for records that others could have made."""
    path = os.path.abspath(path)
    place = _place()
    if not os.path.isdir(place):
        return False
    with private.folder(place) as folder:
        found = _read(folder, _name(path), place)
    return found is not None and (found.path, found.sha256) == (path, sha256(content))


def accepted() -> list[Accepted]:
    """All that were accepted, by path. Raises ResourceError."""
    place = _place()
    if _is_missing(place):
        return []
    with private.folder(place) as folder:
        found = [_read(folder, name, place) for name in os.listdir(folder)]
    return sorted((each for each in found if each is not None), key=lambda each: each.path)


def forget(path: str) -> bool:
    """It counts no more. False if it was not accepted. Raises ResourceError."""
    place = _place()
    if _is_missing(place):
        return False
    with private.folder(place) as folder:
        try:
            os.unlink(_name(os.path.abspath(path)), dir_fd=folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ResourceError(f"{place} cannot be changed ({error.strerror}): see to the disk and its rights") from None
    return True


def _read(folder: int, name: str, place: str) -> Accepted | None:
    try:
        fd = private.open_file(folder, name, os.O_RDONLY, os.path.join(place, name))
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        digest, newline, path = file.read(MOST).partition(b"\n")
    text = os.fsdecode(path)
    if not newline or _name(text) != name:  # the rest of a writer that was killed
        return None
    return Accepted(name, digest.decode("ascii", "replace"), text)
