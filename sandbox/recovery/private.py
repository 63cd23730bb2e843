"""Folders and files that only we can have written, and locks that nobody waits for without end.

What psie keeps between runs is believed later, so a link, somebody else's file, or one that others may touch is refused, not
mended. Must not know what the files hold. Sources: open(2), flock(2).
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import contextmanager

from sandbox import state
from sandbox.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 10.0  # seconds that a lock is waited for
_PAUSE = 0.002  # seconds between two tries


def default_folder() -> str:
    """psie's own folder for what stays. Raises ResourceError where there is none."""
    try:
        return state.folder("lib")
    except OSError as error:
        raise ResourceError(
            f"{error.filename or error}: {error.strerror or 'set XDG_STATE_HOME to a folder of yours'}"
        ) from None


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


@contextmanager
def folder(path: str) -> Iterator[int]:
    """`open_folder` for the time of a `with`."""
    fd = open_folder(path)
    try:
        yield fd
    finally:
        os.close(fd)


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


@contextmanager
def locked(fd: int, kind: int, path: str) -> Iterator[None]:
    """flock(2) of `kind` (LOCK_SH, LOCK_EX), waited for up to PATIENCE. Raises ResourceError.

    Unlocked explicitly: a fork of another thread may have a copy of the descriptor, and would keep the lock.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                raise ResourceError(
                    f"{path} has been locked by another process for {PATIENCE:g} s: see what holds it (lslocks), then try again"
                ) from None
            time.sleep(_PAUSE)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
