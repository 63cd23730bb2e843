"""Where psie keeps things on the host: caches, the ledger of running sandboxes, workspace folders.

As root under /run, /var/cache and /var/lib, as a user under the XDG folders (XDG Base Directory Specification). Nothing
is believed that another user could have written. Must be light: it is on the start path of the command.
"""

from __future__ import annotations

import os
import stat
import sys
import zlib

from sandbox.version import __version__


def folder(kind: str) -> str:
    """The folder for `kind` ("run", "cache", "lib"), made if it is missing, owned by us and writable by nobody else.

    Raises PermissionError if another user owns it.
    """
    if os.getuid() == 0:
        path = {"run": "/run/psie", "cache": "/var/cache/psie", "lib": "/var/lib/psie"}[kind]
    else:
        home = os.path.expanduser("~")
        base = {
            "run": os.environ.get("XDG_RUNTIME_DIR", ""),
            "cache": os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"),
            "lib": os.environ.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state"),
        }[kind]
        path = os.path.join(base, "psie") if base and _usable(base) else f"/tmp/psie-{os.getuid()}-{kind}"
    os.makedirs(path, mode=0o711, exist_ok=True)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(
            f"{path} belongs to another user: remove it, or set XDG_RUNTIME_DIR, XDG_CACHE_HOME and XDG_STATE_HOME"
        )
    if found.st_mode & 0o022:
        os.chmod(path, 0o711)
    return path


def _usable(base: str) -> bool:
    """Is there, or can there be, a folder of ours at `base`?"""
    while not os.path.isdir(base):
        base = os.path.dirname(base)
    return os.access(base, os.W_OK) and os.lstat(base).st_uid == os.getuid()


class Cache:
    """Small files that can be made again at any time: a damaged, foreign or missing one is simply not there."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        try:
            self.folder: str | None = folder("cache")
        except OSError:
            self.folder = None  # a read-only or full disk costs time, not function

    def _path(self, name: str) -> str:
        return os.path.join(self.folder or "", f"{self.kind}-{name}")

    def read(self, name: str) -> bytes | None:
        if self.folder is None:
            return None
        try:
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                return None
            data = file.read(1 << 20)
        return data[4:] if data[:4] == zlib.crc32(data[4:]).to_bytes(4, "little") else None

    def write(self, name: str, data: bytes) -> None:
        if self.folder is None:
            return
        temporary = f"{self._path(name)}.{os.getpid()}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(zlib.crc32(data).to_bytes(4, "little") + data)
            os.rename(temporary, self._path(name))
        except OSError:
            self.folder = None

    def clear(self) -> None:
        """Remove all of this kind."""
        for name in os.listdir(self.folder) if self.folder is not None else ():
            if name.startswith(self.kind + "-"):
                self.remove(name[len(self.kind) + 1 :])

    def remove(self, name: str) -> None:
        if self.folder is not None:
            try:
                os.unlink(self._path(name))
            except OSError:
                self.folder = None


def host_key() -> list[object]:
    """What cached facts and recipes depend on: a contained or upgraded psie must not believe another one's."""
    key: list[object] = [__version__, os.getuid(), os.getgid(), sys.executable, sys.path]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/cgroup", "/proc/sys/user/max_user_namespaces"):
        try:
            with open(path, "rb", 0) as file:
                key.append(file.read().decode())
        except OSError:
            key.append(None)
    for name in ("user", "mnt", "pid", "net"):
        try:
            key.append(os.readlink("/proc/self/ns/" + name))
        except OSError:
            key.append(None)
    return key


def distrust() -> None:
    """What was believed about the host has just proved wrong: probe again next time."""
    Cache("facts").clear()
    Cache("recipes").clear()
