"""What is known of the files below a folder, and what a look at them finds different.

The files may be a plugin's: no link is followed, each folder is opened from the root's descriptor, names are escaped. Light:
a short run is looked at once, at its end. Must not know sandboxes, nor who else may tell of operations (sandbox.monitor.files).
"""

from __future__ import annotations

import os
import stat

from sandbox.ns import syscalls as sc
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

DEPTH = 256

CREATE, MODIFY, DELETE, MOVE, ATTRIBUTES, OVERFLOW = "create", "modify", "delete", "move", "attributes", "overflow"


class Known:
    """What was last seen of one file."""

    is_folder = is_whiteout = False
    inode = mode = 0
    size: int | None = None
    content: tuple[int, int] | None = None  # None for what nobody has had a look at, and for folders
    names: set[str]  # of a folder: what is known in it

    def __init__(self, found: os.stat_result | None) -> None:
        """None for what an event has named and nobody found: it has gone on."""
        if found is None:
            return
        self.inode = found.st_ino
        self.mode = found.st_mode
        self.size = found.st_size
        # A folder's size and times change with what is in it, which is told by itself.
        if stat.S_ISDIR(found.st_mode):
            self.is_folder = True
            self.names = set()
        else:
            self.content = (found.st_mtime_ns, found.st_size)
            self.is_whiteout = stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


class FileTree:
    """The files below one open folder; `on_operation(record)` for each difference (see FilesystemWatchdog for the fields).

    With `lower` the folder is the upper layer of an overlay over that one: what only was copied up is no operation, a whiteout
    is a deletion. The kernel's overlayfs document says what lies in an upper layer.
    """

    def __init__(self, root: int, on_operation: Callable[[dict[str, Any]], None], lower: int | None = None) -> None:
        """Takes over `root` and `lower`, open folders. Nothing is known yet: see `look`."""
        self.root = root
        self.lower = lower
        self.on_operation = on_operation
        self.own: list[str] = []  # paths at which nothing is told, because the host itself is at work there
        self.complete = True  # False where a folder could not be looked into
        self.known: dict[str, Known] = {"": Known(os.fstat(root))}

    def close(self, *, look: bool = True) -> None:
        """With `look` tell what has changed since the last one."""
        if look:
            self.look()
        for fd in (self.root, self.lower):
            if fd is not None:
                os.close(fd)

    # A tree that listens knows more, see sandbox.monitor.files.

    is_listening = False

    def listen(self, *, report: bool = False) -> None:
        raise NotImplementedError

    def catch_up(self) -> None:
        return

    def quiet(self, *, report: bool = True) -> None:
        return

    # -- looks -------------------------------------------------------------------------------------------------------

    def look(self, path: str = "", *, report: bool = True) -> None:
        """Compare a folder and all below it with what is known; with `report` tell what is different."""
        todo = [path]
        while todo:
            above = todo.pop()
            fd = self._enter(above)
            if fd < 0:
                continue  # what is known in it stays so
            try:
                todo += self._look_into(above, fd, report)
            finally:
                os.close(fd)

    def _look_into(self, above: str, fd: int, report: bool) -> list[str]:
        """Returns the folders in it."""
        folders, present = [], set()
        for name in sorted(os.listdir(fd)):
            inner = f"{above}/{name}" if above else name
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            present.add(name)
            self._compare(inner, Known(found), report)
            if stat.S_ISDIR(found.st_mode):
                folders.append(inner)
        for name in sorted(self.known[above].names - present, reverse=True) if above in self.known else ():
            self._gone(f"{above}/{name}" if above else name, report)
        return folders

    def _enter(self, path: str) -> int:
        """A folder, open; -1 where it is none (any more), or cannot be looked into."""
        if path.count("/") > DEPTH:
            self.complete = False
            return -1
        try:
            return sc.open_beneath(self.root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return -1

    def _compare(self, path: str, now: Known, report: bool) -> None:
        before = self.known.get(path)
        self._learn(path, now, report)
        if not report or (before is not None and not before.inode):
            return  # an event has told of it already
        if before is None or (before.inode, before.is_folder) != (now.inode, now.is_folder):
            self._appeared(path, before, now)
        elif before.content != now.content:
            self._tell(MODIFY, path, now)
        elif before.mode != now.mode:
            self._tell(ATTRIBUTES, path, now)

    # -- what is known -----------------------------------------------------------------------------------------------

    def know(self, path: str) -> None:
        """Of what is there now, without a word."""
        found = self._lstat(self.root, path)
        if found is not None:
            self._learn(path, Known(found), report=False)

    def _learn(self, path: str, now: Known, report: bool = True) -> None:
        """A folder of which something else has taken the place takes with it what is known of it."""
        before = self.known.get(path)
        if before is not None and before.is_folder:
            if now.is_folder:
                now.names = before.names
            else:
                for name in sorted(before.names):
                    self._gone(f"{path}/{name}", report)
        self.known[path] = now
        above, _, name = path.rpartition("/")
        folder = self.known.get(above)
        if folder is not None and folder.is_folder:
            folder.names.add(name)

    def _below(self, path: str) -> Iterator[tuple[str, Known]]:
        """It and all that is known below it, folders first."""
        todo = [path]
        while todo:
            inner = todo.pop()
            entry = self.known.get(inner)
            if entry is not None:
                yield inner, entry
                if entry.is_folder:
                    todo += [f"{inner}/{name}" for name in entry.names]

    def _forget(self, path: str) -> list[tuple[str, Known]]:
        """It and all below it; returns what that was, folders first."""
        forgotten = list(self._below(path))
        for inner, _ in forgotten:
            del self.known[inner]
        above, _, name = path.rpartition("/")
        folder = self.known.get(above)
        if folder is not None and folder.is_folder:
            folder.names.discard(name)
        return forgotten

    # -- what is told ------------------------------------------------------------------------------------------------

    def _gone(self, path: str, report: bool = True) -> None:
        """A folder that was moved away or removed takes with it what is known of it."""
        for inner, entry in reversed(self._forget(path)):
            if report and not entry.is_whiteout:
                self._tell(DELETE, inner, entry)

    def _appeared(self, path: str, before: Known | None, now: Known) -> None:
        """Something new, or something else in the place of what was there. In an upper layer that is what it means below."""
        below = self._lstat(self.lower, path) if self.lower is not None and before is None else None
        if self.lower is not None and now.is_whiteout:
            if before is None or not before.is_whiteout:
                self._tell(DELETE, path, now)
        elif below is None or stat.S_IFMT(below.st_mode) != stat.S_IFMT(now.mode):
            self._tell(CREATE, path, now)
        elif not now.is_folder and (below.st_mtime_ns, below.st_size) != now.content:
            self._tell(MODIFY, path, now)
        elif stat.S_IMODE(below.st_mode) != stat.S_IMODE(now.mode):
            self._tell(ATTRIBUTES, path, now)

    def _lstat(self, root: int, path: str) -> os.stat_result | None:
        above, _, name = path.rpartition("/")
        try:
            if not above:
                return os.stat(name, dir_fd=root, follow_symlinks=False)
            fd = sc.open_beneath(root, above, os.O_PATH | os.O_DIRECTORY)
            try:
                return os.stat(name, dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(fd)
        except OSError:
            return None

    def _tell(self, operation: str, path: str, entry: Known | None, old: str | None = None) -> None:
        if path in self.own:
            return
        from datetime import UTC, datetime  # a plugin that touches no file does without

        is_there = entry is not None and not (operation == DELETE and entry.is_whiteout)
        record = {
            "timestamp": datetime.now(UTC).isoformat(),
            "operation": operation,
            "path": escape_text(path, keep=""),
            "is_directory": entry is not None and entry.is_folder,
            "size": entry.size if entry is not None and is_there else None,
        }
        if old is not None:
            record["from"] = escape_text(old, keep="")
        self.on_operation(record)
