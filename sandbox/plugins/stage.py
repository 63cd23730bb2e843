"""Staged plugins: the bytes that were read and checked, as read-only files of psie's own, for as long as sandboxes use them.

A plugin's code wants its data files and packages at real paths, but the plugin folder can be changed between check and run.
So what was read is written into a folder below state.folder("run") that nobody else can write, and that folder is what a
sandbox sees. Each process has one of its own there, kept by flock(2) on it: the kernel lets go of the lock with the process,
and `sweep` removes what a dead one has left. It is there only while plugins are staged.

Host side. It must not know what is run, nor how.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections import Counter

from sandbox import state
from sandbox.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox.plugins.files import PluginFiles

FOLDER = "plugins"  # in state.folder("run")
TRIES = 100  # to make a folder of our own, of which another process' sweep may take each before it is locked


class Staged:
    """A plugin on the shelf.

    Attributes:
        root: the folder that a sandbox is given; it holds nothing else.
        name: of the plugin on the shelf.
    """

    def __init__(self, shelf: Shelf, root: str, name: str) -> None:
        self.root = root
        self.name = name
        self._shelf = shelf

    def release(self) -> None:
        """No sandbox of this use has it any more."""
        self._shelf.release(self.name)


class Shelf:
    """The staged plugins of this process. From any thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._users: Counter[str] = Counter()
        self._name = os.urandom(8).hex()  # always the same: equal paths make equal recipes, which are compiled once
        self._folder = ""
        self._fd = -1
        self._has_swept = False

    def take(self, plugin: PluginFiles) -> Staged:
        """Stage it, or use what is staged already: equal plugins of one id are one. Call `release` in the end.

        Raises ResourceError where it cannot be written.
        """
        name = f"{plugin.id}-{plugin.sha256}"
        with self._lock:
            try:
                if not self._users:
                    self._open()
                root = os.path.join(self._folder, name)
                if not self._users[name]:
                    self._write(plugin, root)
            except OSError as error:
                del self._users[name]
                self._close_unused()
                text = f"the plugin cannot be staged in {os.path.join(state.folder('run'), FOLDER)}: {error.strerror}"
                raise ResourceError(f"{text}: make room there, or set XDG_RUNTIME_DIR") from None
            self._users[name] += 1
        return Staged(self, root, name)

    def release(self, name: str) -> None:
        with self._lock:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)  # who removed it has done our work
            self._close_unused()

    def _write(self, plugin: PluginFiles, root: str) -> None:
        """All of it, or nothing."""
        draft = os.path.join(self._folder, ".draft")
        try:
            _make_folder(draft)
            above = draft
            if plugin.main != f"{plugin.id}.py":
                above = os.path.join(draft, plugin.id)
                _make_folder(above)
            folders = {""}
            for path, content in plugin.files.items():
                parts = path.split("/")[:-1]
                for depth in range(1, len(parts) + 1):
                    inner = "/".join(parts[:depth])
                    if inner not in folders:
                        folders.add(inner)
                        _make_folder(os.path.join(above, inner))
                _make_file(os.path.join(above, path), content)
            os.rename(draft, root)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def _open(self) -> None:
        base = os.path.join(state.folder("run"), FOLDER)
        try:
            _make_folder(base, 0o711)
        except FileExistsError:
            pass
        if not self._has_swept:
            self._has_swept = True
            sweep()
        for _ in range(TRIES):
            folder = os.path.join(base, self._name)
            try:
                _make_folder(folder, 0o711)
            except FileNotFoundError:
                continue  # taken between mkdir(2) and chmod(2)
            fd = _locked(folder)
            if fd is not None:
                self._folder, self._fd = folder, fd
                return
        raise OSError(0, "another process removes every folder that is made there")

    def _close_unused(self) -> None:
        if not self._users and self._fd >= 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1


def sweep() -> list[str]:
    """Remove what dead processes have left; returns the names of their folders."""
    base = os.path.join(state.folder("run"), FOLDER)
    removed = []
    for name in os.listdir(base) if os.path.isdir(base) else []:
        folder = os.path.join(base, name)
        fd = _locked(folder)
        if fd is not None:
            shutil.rmtree(folder)
            os.close(fd)
            removed.append(name)
    return removed


def _locked(folder: str) -> int | None:
    """An fd that holds the lock of a process' folder; None where another one has it, or has removed the folder."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(folder):
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return None


def _make_folder(path: str, mode: int = 0o755) -> None:
    os.mkdir(path, mode)
    os.chmod(path, mode)  # whatever the umask


def _make_file(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444)
    with open(fd, "wb", buffering=0) as file:
        os.fchmod(fd, 0o444)
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]


_shelf = Shelf()


def shelf() -> Shelf:
    """The shelf of this process; a forked child gets its own."""
    global _shelf
    if _shelf.pid != os.getpid():
        _shelf = Shelf()
    return _shelf
