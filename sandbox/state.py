"""Where psie keeps things on the host: caches, the ledger of running sandboxes, workspace folders.

As root under /run, /var/cache and /var/lib, as a user under the XDG folders (XDG Base Directory Specification). Nothing
is believed that another user could have written. Must be light: it is on the start path of the command.
"""

from __future__ import annotations

import os
import stat
import sys

from sandbox.version import __version__

CACHE_FILE_BYTES = 1 << 20
_CHECKSUM_BYTES = 8
_PRIME = (1 << 61) - 1


def folder(kind: str, *, writable: bool = False) -> str:
    """The folder for `kind` ("run", "cache", "lib"), made if it is missing, owned by us and writable by nobody else.

    Records that are there count also while they cannot be written, but for a user who wants a folder that is `writable`.

    Raises PermissionError, with the mend, if another user owns it, other OSErrors if it cannot be made.
    """
    path = {"run": "/run/psie", "cache": "/var/cache/psie", "lib": "/var/lib/psie"}[kind]
    if not _is_for_root(path, kind):
        home = os.path.expanduser("~")
        base = {
            "run": os.environ.get("XDG_RUNTIME_DIR", ""),
            "cache": os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"),
            "lib": os.environ.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state"),
        }[kind]
        own = os.path.join(base, "psie")
        is_used = bool(base) and (_usable(base) or (kind == "lib" and not writable and _is_kept(own)))
        path = own if is_used else f"/tmp/psie-{os.getuid()}-{kind}"
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        try:
            os.makedirs(path, mode=0o711, exist_ok=True)
        except FileExistsError:
            pass  # no folder: refused below
        found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        what = "belongs to another user" if found.st_uid != os.getuid() else "is no folder"
        raise PermissionError(f"{path} {what}: remove it, or set XDG_RUNTIME_DIR, XDG_CACHE_HOME and XDG_STATE_HOME")
    if found.st_mode & 0o022:
        os.chmod(path, 0o711)
    return path


def _is_for_root(path: str, kind: str) -> bool:
    """Whether this process is root, and may write there. (Root of a user namespace may be nobody to these folders.) Records
    that are there count also while they cannot be written: what is quarantined stays so on a disk that is read-only now."""
    if os.getuid() != 0:
        return False
    try:
        found = os.lstat(path)
    except OSError:
        return os.access(os.path.dirname(path), os.W_OK)
    return os.access(path, os.W_OK) or (kind == "lib" and found.st_uid == 0)


def _is_kept(path: str) -> bool:
    """Whether there are records already, or what was put in their place, which is refused then."""
    return os.path.isabs(path) and os.path.lexists(path)


def _usable(base: str) -> bool:
    """Is there, or can there be, a folder of ours at `base`? A relative path does not count, as the specification says."""
    if not os.path.isabs(base):
        return False
    while not os.path.lexists(base):
        base = os.path.dirname(base)
    return os.path.isdir(base) and os.access(base, os.W_OK) and os.lstat(base).st_uid == os.getuid()


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class Cache:
    """Small files (up to CACHE_FILE_BYTES) of one kind that can be made again at any time. Nothing here is ever an error: a
    cache that cannot be used costs time, not function.

    A file counts only if nobody else could have written it, it is whole, and it was stored by this version of psie under
    this name and this key: a damaged, foreign, older or missing one is simply not there. The key is what the content
    depends on; it lies in the file, so that two keys may share a name.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        try:
            self.folder: str | None = folder("cache")
        except OSError:
            self.folder = None  # a read-only disk, or somebody else's folder

    def read(self, name: str, key: bytes = b"") -> bytes | None:
        """What was stored under `name` and `key`."""
        try:
            with _Opened(self.folder) as opened:
                fd = os.open(self._file(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=opened)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or not _is_ours(found) or found.st_size > CACHE_FILE_BYTES:
                    return None
                content = os.read(fd, found.st_size)
            finally:
                os.close(fd)
        except OSError:
            return None
        head = self._head(name, key)
        data = content[len(head) + _CHECKSUM_BYTES :]
        return data if content == head + checksum(head + data) + data else None

    def write(self, name: str, data: bytes, key: bytes = b"") -> None:
        """Store `data` under `name` and `key`, instead of what was there.

        The temporary name is fixed, so that a writer that was killed leaves nothing that stays. Of two writers at once one
        may rename the other's unfinished file: a reader sees that by its checksum, and its own writer finishes it.
        """
        temporary = self._file(name) + ".new"
        head = self._head(name, key)
        try:
            with _Opened(self.folder) as opened:
                try:
                    os.unlink(temporary, dir_fd=opened)
                except FileNotFoundError:
                    pass
                fd = os.open(
                    temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=opened
                )
                with os.fdopen(fd, "wb") as file:
                    file.write(head + checksum(head + data) + data)
                os.rename(temporary, self._file(name), src_dir_fd=opened, dst_dir_fd=opened)
        except OSError:
            pass

    def remove(self, name: str) -> None:
        """Remove what is stored under `name`, whatever its key."""
        self._unlink(self._file(name))

    def trim(self, most: int) -> None:
        """Remove all of this kind if there are more than `most`."""
        names = os.listdir(self.folder) if self.folder is not None else []
        if sum(name.startswith(self.kind + "-") for name in names) > most:
            self.clear()

    def clear(self) -> None:
        """Remove all of this kind."""
        try:
            with _Opened(self.folder) as opened:
                files = os.listdir(opened)
        except OSError:
            return
        for file in files:
            if file.startswith(self._file("")):
                self._unlink(file)

    def _unlink(self, file: str) -> None:
        try:
            with _Opened(self.folder) as opened:
                os.unlink(file, dir_fd=opened)
        except OSError:
            pass

    def _file(self, name: str) -> str:
        return f"{self.kind}-{name}"

    def _head(self, name: str, key: bytes) -> bytes:
        return b"psie %s %s %d\n%s\n" % (__version__.encode(), self._file(name).encode(), len(key), key)


class _Opened:
    """A descriptor of the folder at `path` for the time of a `with`. OSError if others could have written there."""

    def __init__(self, path: str | None) -> None:
        if path is None:
            raise FileNotFoundError("there is no folder for the cache")
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if not _is_ours(os.fstat(self.fd)):
            os.close(self.fd)
            raise PermissionError(f"{path} can be written by others")

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def checksum(data: bytes) -> bytes:
    """It shows damage, not malice. By arithmetic: where zlib is no part of the interpreter to load it costs 0.2 ms."""
    return (int.from_bytes(data + b"\1", "little") % _PRIME).to_bytes(_CHECKSUM_BYTES, "little")


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


distrusted = 0  # how often in this process


def distrust() -> None:
    """What was believed about the host has just proved wrong: probe again next time."""
    global distrusted
    distrusted += 1
    Cache("facts").clear()
    Cache("recipes").clear()
