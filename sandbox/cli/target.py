"""A file of the caller's that is written after a run, as a whole or not at all.

Its folder is opened before the run and held: a plugin may change what a --rw folder's names lead to while it runs, and must not
choose where the host writes. Must not know what is written. Sources: open(2) (O_TMPFILE), rename(2).
"""

from __future__ import annotations

import os
import stat

from sandbox.cli.inputs import UsageError

NO_PLACES = ("/dev/", "/proc/", "/sys/")  # where a rename would replace what is no file of anybody's


class Target:
    """`path` as the option `option` names it. Raises UsageError for what could not be written after the run."""

    def __init__(self, option: str, path: str) -> None:
        self.path = os.path.abspath(path)
        folder, self.name = os.path.split(self.path)
        if not os.path.isdir(folder):
            raise UsageError(f"{option} {path}: there is no folder {folder}: make it first")
        unfit = f"{option} {path}: this cannot be written: give a file in a folder of yours"
        if not self.name or self.path.startswith(NO_PLACES) or not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(unfit)
        self.folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            kind = stat.S_IFMT(os.stat(self.name, dir_fd=self.folder, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return
        except OSError as error:  # ENAMETOOLONG
            raise UsageError(f"{option} {path}: this cannot be written: {error.strerror}") from None
        if kind not in (stat.S_IFREG, stat.S_IFLNK):  # a link is replaced, not followed
            raise UsageError(unfit)

    def replaces(self, files: list[str]) -> bool:
        """Whether it is one of them, which are real paths. Where a link leads is no matter: only the link is replaced."""
        return os.path.join(os.path.realpath(os.path.dirname(self.path)), self.name) in files

    def write(self, text: str) -> None:
        """Replace the file. OSError, with its path, where that cannot be done; then the old one is still there."""
        temporary = f".{os.urandom(8).hex()}.tmp"
        try:
            self._fill(temporary, text.encode("utf-8", "backslashreplace"))
            os.replace(temporary, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        except OSError as error:
            try:
                os.unlink(temporary, dir_fd=self.folder)
            except OSError:
                pass
            raise OSError(error.errno, error.strerror, self.path) from None

    def _fill(self, name: str, data: bytes) -> None:
        """A file `name` with this content, which has no name before it is whole, where the file system can do that."""
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666, dir_fd=self.folder)
        except OSError:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, 0o666, dir_fd=self.folder), "wb") as file:
                file.write(data)
            return
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=self.folder, follow_symlinks=True)
