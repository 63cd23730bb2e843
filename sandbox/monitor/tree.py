"""What is known of the files below a folder, and what a look at them finds different.

The files may be a plugin's: no link is followed, each folder is opened from the root's descriptor, names are escaped, and what
cannot be looked into is told. Light: a short run is looked at once, at its end. Must not know sandboxes, nor who else may
tell of operations (sandbox.monitor.files).
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox.errors import SHORT
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

DEPTH = 256  # folders in folders; a plugin could make them until a path fills the memory
PIECE = 1000  # characters, of up to 4 bytes, of a path that are opened at once: PATH_MAX is 4096 bytes
# What keeps a look from a folder for now, as what this process is SHORT of does: it has just gone, or been moved away.
GONE = errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.EXDEV

CREATE, MODIFY, DELETE, MOVE, ATTRIBUTES = "create", "modify", "delete", "move", "attributes"
OVERFLOW, HIDDEN = "overflow", "hidden"  # what says that operations are missing


class Seen:
    """What was last seen of one file."""

    is_folder = is_whiteout = False
    inode = mode = 0
    size: int | None = None
    content: tuple[int, int] | None = None  # None for what nobody has had a look at, and for folders

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
        else:
            self.content = (found.st_mtime_ns, found.st_size)
            self.is_whiteout = stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


class Node:
    """One name in the tree, and what is known of it. A folder that is moved takes what is in it along."""

    __slots__ = ("above", "inner", "is_hidden", "name", "seen", "watch")

    def __init__(self, name: str, above: Node | None, seen: Seen) -> None:
        self.name = name
        self.above = above
        self.seen = seen
        self.inner: dict[str, Node] = {}
        self.is_hidden = False  # a folder that could not be looked into, which has been told
        self.watch = -1  # of sandbox.monitor.files

    @property
    def path(self) -> str:
        """Below the root; "" for the root."""
        names: list[str] = []
        node = self
        while node.above is not None:
            names.append(node.name)
            node = node.above
        return "/".join(reversed(names))


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
        self.top = Node("", None, Seen(os.fstat(root)))
        self.size = 1  # nodes

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

    def unwatch(self, node: Node) -> None:
        return

    # -- looks -------------------------------------------------------------------------------------------------------

    def look(self, folder: Node | None = None, *, report: bool = True) -> None:
        """Compare a folder (the root if None) and all below it with what is known; with `report` tell what is different."""
        todo = [folder or self.top]
        while todo:
            node = todo.pop()
            fd = self._enter(node, report)
            if fd < 0:
                continue  # what is known in it stays so
            try:
                todo += self._look_into(node, fd, report)
            finally:
                os.close(fd)

    def _look_into(self, folder: Node, fd: int, report: bool) -> list[Node]:
        """Returns the folders in it."""
        folders, present = [], set()
        try:
            names = sorted(os.listdir(fd))
        except OSError as error:
            self._missed(folder, error, report)
            return []
        for name in names:
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:  # as where it may be listed, not searched
                self._missed(folder, error, report)
                return []
            present.add(name)
            node = self._compare(folder, name, Seen(found), report)
            if node.seen.is_folder:
                folders.append(node)
        for name in sorted(folder.inner.keys() - present, reverse=True):
            self._gone(folder.inner[name], report)
        folder.is_hidden = False
        return folders

    def _enter(self, folder: Node, report: bool) -> int:
        """A folder, open; -1 where it is none (any more), or cannot be looked into."""
        path = folder.path
        if path.count("/") > DEPTH:
            self._hide(folder, report)
            return -1
        try:
            return self._open(self.root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self._missed(folder, error, report)
            return -1

    def _missed(self, folder: Node, error: OSError, report: bool) -> None:
        """It cannot be looked into: the next look tells, or nobody can, as where its mode or its disk does not let us."""
        if error.errno not in SHORT + GONE:
            self._hide(folder, report)

    def _hide(self, folder: Node, report: bool) -> None:
        """What is done below it from now on is not seen: that much is told, once."""
        if not folder.is_hidden:
            folder.is_hidden = True
            if report:
                self._tell(HIDDEN, folder.path, folder.seen)

    def _open(self, root: int, path: str, flags: int) -> int:
        """A folder below `root`, however long its path is. Raises OSError."""
        if not path:
            return os.open(".", flags | os.O_CLOEXEC, dir_fd=root)  # itself: nothing on the way that could lead elsewhere
        from sandbox.ns import syscalls as sc  # with ctypes, for which a short run without folders has no time

        if len(path) <= PIECE:
            return sc.open_beneath(root, path, flags)
        fd = os.dup(root)
        while path:
            end = path.rfind("/", 0, PIECE) if len(path) > PIECE else len(path)
            piece, path = path[:end], path[end + 1 :]
            try:
                inner = sc.open_beneath(fd, piece, flags if not path else os.O_PATH | os.O_DIRECTORY)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def _compare(self, folder: Node, name: str, now: Seen, report: bool) -> Node:
        known = folder.inner.get(name)
        before = known.seen if known is not None else None
        node = self._learn(folder, name, now, report)
        if not report or (before is not None and not before.inode):
            return node  # an event has told of it already
        if before is None or (before.inode, before.is_folder) != (now.inode, now.is_folder):
            self._appeared(node, before)
        elif before.content != now.content:
            self._tell(MODIFY, node.path, now)
        elif before.mode != now.mode:
            self._tell(ATTRIBUTES, node.path, now)
        return node

    # -- what is known -----------------------------------------------------------------------------------------------

    def find(self, path: str) -> Node | None:
        node: Node | None = self.top
        for name in path.split("/") if path else ():
            node = node.inner.get(name) if node is not None else None
        return node

    def know(self, path: str) -> None:
        """Of what is there now, without a word."""
        above, _, name = path.rpartition("/")
        folder, found = self.find(above), self._lstat(self.root, path)
        if folder is not None and found is not None:
            self._learn(folder, name, Seen(found), report=False)

    def _learn(self, folder: Node, name: str, now: Seen, report: bool = True) -> Node:
        """A folder of which something else has taken the place takes with it what is known of it."""
        node = folder.inner.get(name)
        if node is None:
            node = folder.inner[name] = Node(name, folder, now)
            self.size += 1
            return node
        if not now.is_folder:
            for inner in sorted(node.inner):
                self._gone(node.inner[inner], report)
        if node.seen.inode != now.inode:
            self.unwatch(node)
        node.seen = now
        return node

    def _below(self, node: Node) -> Iterator[Node]:
        """It and all that is known below it, folders first."""
        todo = [node]
        while todo:
            each = todo.pop()
            yield each
            todo += each.inner.values()

    def _forget(self, node: Node) -> list[Node]:
        """It and all below it; returns what that was, folders first."""
        forgotten = list(self._below(node))
        assert node.above is not None
        del node.above.inner[node.name]
        self.size -= len(forgotten)
        for each in forgotten:
            self.unwatch(each)
        return forgotten

    # -- what is told ------------------------------------------------------------------------------------------------

    def _gone(self, node: Node, report: bool = True) -> None:
        """A folder that was moved away or removed takes with it what is known of it."""
        for each in reversed(self._forget(node)):
            if report and not each.seen.is_whiteout:
                self._tell(DELETE, each.path, each.seen)

    def _appeared(self, node: Node, before: Seen | None) -> None:
        """Something new, or something else in the place of what was there. In an upper layer that is what it means below."""
        now, path = node.seen, node.path
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
            fd = self._open(root, above, os.O_PATH | os.O_DIRECTORY)
            try:
                return os.stat(name, dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(fd)
        except OSError:
            return None

    def _tell(self, operation: str, path: str, seen: Seen | None, old: str | None = None) -> None:
        if path in self.own:
            return
        from datetime import UTC, datetime  # a plugin that touches no file does without

        is_there = seen is not None and not (operation == DELETE and seen.is_whiteout)
        record = {
            "timestamp": datetime.now(UTC).isoformat(),
            "operation": operation,
            "path": escape_text(path, keep=""),
            "is_directory": seen is not None and seen.is_folder,
            "size": seen.size if seen is not None and is_there else None,
        }
        if old is not None:
            record["from"] = escape_text(old, keep="")
        self.on_operation(record)
