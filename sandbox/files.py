"""The files of a workspace, read and written by the host while plugins may be at work there.

What lies in a workspace is a plugin's: a path is followed below its root only and through no link, and nothing but regular
files is opened. Must not know sandboxes: it is given an open folder. Source: openat2(2).
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, replace

from sandbox.errors import SHORT
from sandbox.ns import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class FileEntry:
    """One entry of a workspace.

    Attributes:
        path: relative to the workspace. Names are the plugin's: escape them before a person sees them.
        kind: "file", "folder", "link" or "other" (a FIFO, a socket).
        size: in bytes.
        hides: whether there may be entries in a folder that are not told, because the host cannot look into it: its path is
            longer than the kernel takes (PATH_MAX, path_resolution(7)), or the plugin has taken all rights from it.
    """

    path: str
    kind: str
    size: int
    hides: bool = False


def read(root: int, path: str, most: int) -> bytes:
    """The content of a regular file. Raises OSError: ELOOP for a link on the way, EFBIG for more than `most` bytes."""
    with open(opened(root, checked(path), os.O_RDONLY), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", path)
    return data


def write(root: int, path: str, data: bytes, owner: tuple[int, int] | None) -> None:
    """Make or replace a regular file and the folders on its way; as root they become the `owner`'s. Raises OSError."""
    above, _, name = checked(path).rpartition("/")
    folder = make_folders(root, above, owner)
    try:
        with open(opened(folder, name, os.O_WRONLY | os.O_CREAT), "wb") as file:
            os.ftruncate(file.fileno(), 0)
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            file.write(data)
    finally:
        os.close(folder)


def listed(root: int, path: str) -> list[FileEntry]:
    """Everything below the folder `path`, by path. A folder that the plugin takes away meanwhile has nothing in it, and one
    that cannot be looked into `hides`. Raises OSError, also where `path` itself cannot be looked into, or this process lacks
    a descriptor for one of them."""
    return sorted(walk(root, checked(path) if path else ""), key=lambda entry: entry.path)


def walk(root: int, path: str) -> Iterator[FileEntry]:
    entries, folders, hides = look_into(root, path)
    if hides:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    yield from entries
    while folders:
        folder = folders.pop()
        try:
            entries, inner, hides = look_into(root, folder.path)
        except OSError as error:
            if error.errno in SHORT:
                raise
            yield replace(folder, hides=error.errno not in GONE)
            continue
        yield replace(folder, hides=hides)
        yield from entries
        folders += inner


def look_into(root: int, path: str) -> tuple[list[FileEntry], list[FileEntry], bool]:
    """What lies in a folder: what is no folder, the folders, and whether there is more that may not be looked at."""
    entries: list[FileEntry] = []
    folders: list[FileEntry] = []
    hides = False
    fd = sc.open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in os.listdir(fd):
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            except PermissionError:  # the folder may be listed, not searched
                hides = True
                continue
            inner = f"{path}/{name}" if path else name
            entry = FileEntry(inner, KINDS.get(stat.S_IFMT(found.st_mode), "other"), found.st_size)
            (folders if entry.kind == "folder" else entries).append(entry)
    finally:
        os.close(fd)
    return entries, folders, hides


GONE = errno.ENOENT, errno.ENOTDIR, errno.ELOOP  # or something else is in its place by now
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}


def make_folders(root: int, path: str, owner: tuple[int, int] | None) -> int:
    """The open folder `path`, made as far as it is missing."""
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    for name in path.split("/") if path else ():
        try:
            try:
                os.mkdir(name, 0o755, dir_fd=folder)
                is_new = True
            except FileExistsError:
                is_new = False
            inner = sc.open_beneath(folder, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        finally:
            os.close(folder)
        folder = inner
        if is_new and owner is not None:
            os.fchown(folder, *owner)
    return folder


def opened(folder: int, path: str, flags: int) -> int:
    """A regular file."""
    fd = sc.open_beneath(folder, path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, mode=0o644 if flags & os.O_CREAT else 0)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return fd


def checked(path: str) -> str:
    """Raises ValueError for what is no path below the workspace."""
    if not isinstance(path, str) or not path or "\0" in path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is no path in the workspace: give one relative to it, without '..'")
    return "/".join(part for part in path.split("/") if part not in ("", "."))
