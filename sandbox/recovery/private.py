"""Folders and files that only we can have written, and locks that nobody waits for without end.

What psie keeps between runs is believed later, so a link, somebody else's file, or one that others may touch is refused, not
mended. Must not know what the files hold, and must be light: it is on the start path of `psie run`. Sources: open(2), flock(2).
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

from sandbox import state
from sandbox.errors import ResourceError

PATIENCE = 10.0  # seconds that a lock is waited for
_PAUSE = 0.002  # seconds between two tries


def default_folder() -> str:
    """psie's own folder for what stays. Raises ResourceError where there is none."""
    try:
        return state.folder("lib")
    except OSError as error:
        if error.filename is None:  # with its mend
            raise ResourceError(str(error)) from None
        raise ResourceError(f"{error.filename}: {error.strerror}: set XDG_STATE_HOME to a folder of yours") from None


def open_folder(path: str) -> int:
    """A descriptor of the folder at `path`, made with mode 0700 if it is missing. Raises ResourceError."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be used as a folder ({error.strerror}): give another, or set XDG_STATE_HOME"
        ) from None
    found = os.fstat(fd)
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        os.close(fd)
        raise ResourceError(f"{path} can be written by others: chown it to yourself and chmod go-w it, or set XDG_STATE_HOME")
    return fd


class folder:  # no function by contextlib, which costs 2 ms at the start
    """`open_folder` for the time of a `with`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> int:
        self.fd = open_folder(self.path)
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def check(found: os.stat_result, path: str) -> None:
    """Raises ResourceError unless this is a regular file of ours, under one name, that nobody else may open."""
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise ResourceError(f"{path} is a link, or no regular file: remove it")
    if found.st_uid != os.getuid():
        raise ResourceError(f"{path} belongs to another user: remove it, or chown it to yourself")
    if found.st_mode & 0o077:
        raise ResourceError(f"{path} is open to others: look whether it is still yours, then chmod 600 it")


def open_file(folder: int, name: str, flags: int, path: str) -> int:
    """A descriptor of the file `name` in the open `folder`; `path` is what to call it. New ones have mode 0600.

    Raises FileNotFoundError; ResourceError for what `check` refuses, or what cannot be opened.
    """
    try:
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        try:
            check(os.stat(name, dir_fd=folder, follow_symlinks=False), path)
        except FileNotFoundError:
            pass
        raise ResourceError(f"{path} cannot be opened ({error.strerror}): see to the disk and its rights") from None
    try:
        check(os.fstat(fd), path)
    except ResourceError:
        os.close(fd)
        raise
    return fd


def is_at(folder: int, name: str, fd: int) -> bool:
    """Whether the open file or folder still has its name: it was not renamed or removed while its lock was waited for."""
    try:
        return os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


class locked:
    """flock(2) of `kind` (LOCK_SH, LOCK_EX) for the time of a `with`, waited for up to PATIENCE. Raises ResourceError.

    Unlocked explicitly: a fork of another thread may have a copy of the descriptor, and would keep the lock.
    """

    def __init__(self, fd: int, kind: int, path: str) -> None:
        self.fd, self.kind, self.path = fd, kind, path

    def __enter__(self) -> None:
        since = time.monotonic()
        while not try_lock(self.fd, self.kind):
            pause(since, PATIENCE, self.path)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_UN)


def try_lock(fd: int, kind: int) -> bool:
    """Lock it if that can be done at once. Whoever has must unlock it with LOCK_UN."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def pause(since: float, patience: float, path: str) -> None:
    """Between two tries of a lock that is waited for `since`. Raises ResourceError after `patience` seconds."""
    if time.monotonic() > since + patience:
        raise ResourceError(
            f"{path} has been locked by another process for {patience:g} s: see what holds it (lslocks), then try again"
        )
    time.sleep(_PAUSE)
