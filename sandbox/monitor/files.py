"""FilesystemWatchdog: what is done to the files below a folder, as inotify(7) tells it, and at least where it ended.

inotify watches single folders and loses what happens in a new one before it is watched; its queue can overflow. So what is
known of every file is kept: a new folder is watched and then looked through, and at an overflow and at the end the whole
tree is compared with what is known. What one misses, the other finds. The files may be a plugin's: no link is followed, a
folder is watched by its descriptor, and names are escaped. Must not know sandboxes.
"""

from __future__ import annotations

import os
import stat
import threading
from datetime import UTC, datetime

from inotify_simple import INotify, flags

from sandbox.config import IsolationConfig
from sandbox.engine.loop import PollLoop
from sandbox.ns import syscalls as sc
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandbox.engine.loop import Loop

CHANGES = flags.CREATE | flags.DELETE | flags.CLOSE_WRITE | flags.MOVED_FROM | flags.MOVED_TO | flags.ATTRIB
MASK = CHANGES | flags.ONLYDIR | flags.EXCL_UNLINK
RECORDS = 10_000  # kept; further ones are only counted
DEPTH = 256
SECOND_HALF = 0.1  # seconds that the second half of a move may come after the first

CREATE, MODIFY, DELETE, MOVE, ATTRIBUTES, OVERFLOW = "create", "modify", "delete", "move", "attributes", "overflow"


class Known:
    """What was last seen of one file."""

    is_folder = False
    inode = mode = 0
    size: int | None = None
    content: tuple[int, int] | None = None  # None for what nobody has had a look at, and for folders

    def __init__(self, found: os.stat_result | None) -> None:
        """None for what an event has named and nobody found: it has gone on."""
        if found is None:
            return
        self.is_folder = stat.S_ISDIR(found.st_mode)
        self.inode = found.st_ino
        self.mode = found.st_mode
        self.size = found.st_size
        # A folder's size and times change with what is in it, which is told by itself.
        self.content = None if self.is_folder else (found.st_mtime_ns, found.st_size)


class FileWatch:
    """The files below one open folder. `on_operation(record)` for each operation; see FilesystemWatchdog for the fields."""

    def __init__(self, loop: Loop, root: int, on_operation: Callable[[dict[str, Any]], None]) -> None:
        """Takes over `root`, an open folder. Raises OSError where the host has no inotify instance left."""
        self.loop = loop
        self.root = root
        self.on_operation = on_operation
        self.known: dict[str, Known] = {}
        self.watched: dict[int, str] = {}  # paths by watch descriptor
        self.complete = True  # False where a folder could not be watched: what happens in it is seen by comparing only
        self.moved: tuple[int, str] | None = None  # cookie and path of the first half of a move
        self.notify = INotify(nonblocking=True)
        self._look_through("", report=False)
        self.loop.add_reader(self.notify.fileno(), self.read)

    def close(self) -> None:
        """The last events, a last look, and quiet."""
        self.read()
        self._flush_move()
        self.compare()
        self.loop.remove_reader(self.notify.fileno())
        self.notify.close()
        os.close(self.root)

    # -- events ----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Everything that the kernel has told so far."""
        for event in self.notify.read(timeout=0):
            self._event(event.wd, event.mask, event.cookie, event.name)
        if self.moved is not None:  # its second half may be a moment behind
            self.loop.call_later(SECOND_HALF, self._flush_move, self.moved)

    def _event(self, watch: int, mask: int, cookie: int, name: str) -> None:
        if self.moved is not None and not (mask & flags.MOVED_TO and cookie == self.moved[0]):
            self._flush_move()
        if mask & flags.Q_OVERFLOW:
            self._tell(OVERFLOW, "", None)
            self.compare()
            return
        above = self.watched.get(watch)
        if mask & flags.IGNORED:
            self.watched.pop(watch, None)
        if above is None or not name:
            return  # a folder's own attributes are told by the one above it
        path = f"{above}/{name}" if above else name
        if mask & flags.MOVED_FROM:
            self.moved = cookie, path
        elif mask & flags.MOVED_TO and self.moved is not None:
            (_, old), self.moved = self.moved, None
            self._move(old, path)
        elif mask & flags.DELETE:
            self._gone(path)
        elif mask & (flags.CREATE | flags.MOVED_TO):
            self._seen(path, CREATE)
        else:
            self._seen(path, ATTRIBUTES if mask & flags.ATTRIB else MODIFY)

    def _flush_move(self, moved: tuple[int, str] | None = None) -> None:
        """It has left the folder: for us it is gone. With `moved` only if no other move has come meanwhile."""
        if self.moved is not None and moved in (None, self.moved):
            (_, path), self.moved = self.moved, None
            self._gone(path)

    def _move(self, old: str, new: str) -> None:
        """With all below it. What it replaces goes without a word of its own."""
        for path in [path for path in self.known if is_below(path, new)]:
            del self.known[path]
        for path in [path for path in self.known if is_below(path, old)]:
            self.known[new + path[len(old) :]] = self.known.pop(path)
        for watch, path in self.watched.items():
            if is_below(path, old):
                self.watched[watch] = new + path[len(old) :]
        self._tell(MOVE, new, self.known.get(new), old)

    def _gone(self, path: str) -> None:
        """A folder that was moved away or removed takes with it what is known of it."""
        before = self.known.get(path)
        if before is None:
            return  # it came and went before anybody looked, or was told already
        for inner in sorted((inner for inner in self.known if is_below(inner, path)), reverse=True):
            entry = self.known.pop(inner)
            self._tell(DELETE, inner, entry)

    def _seen(self, path: str, operation: str) -> None:
        found = self._lstat(path)
        before, now = self.known.get(path), Known(found)
        if found is None and operation != CREATE:  # its end is an event to come
            self._tell(operation, path, before)
            return
        if operation == CREATE and before is not None and before.inode == now.inode:
            return  # a look through its folder was faster
        if before is None and operation != CREATE:
            operation = CREATE
        self.known[path] = now
        self._tell(operation, path, now)
        if now.is_folder and operation == CREATE:
            self._look_through(path, report=True)

    # -- looks -----------------------------------------------------------------------------------------------------

    def _look_through(self, path: str, *, report: bool) -> None:
        """Watch a folder, then everything in it, and know of it; with `report` tell what was not known before."""
        todo = [path]
        while todo:
            above = todo.pop()
            fd = self._watch(above)
            if fd < 0:
                continue
            try:
                for name in os.listdir(fd):
                    inner = f"{above}/{name}" if above else name
                    try:
                        now = Known(os.stat(name, dir_fd=fd, follow_symlinks=False))
                    except FileNotFoundError:
                        continue
                    before = self.known.get(inner)
                    if before is None or before.inode != now.inode:
                        self.known[inner] = now
                        if report:
                            self._tell(CREATE, inner, now)
                    if now.is_folder:
                        todo.append(inner)
            finally:
                os.close(fd)

    def _watch(self, path: str) -> int:
        """A watched folder, open; -1 where it is none (any more), or cannot be looked into."""
        if path.count("/") > DEPTH:
            self.complete = False
            return -1
        try:
            fd = sc.open_beneath(self.root, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return -1
        try:
            self.watched[self.notify.add_watch(f"/proc/self/fd/{fd}", MASK)] = path
        except OSError:
            self.complete = False  # fs.inotify.max_user_watches
        return fd

    def compare(self) -> None:
        """Tell what is different from what is known: what no event has told."""
        present: set[str] = set()
        todo = [""]
        while todo:
            above = todo.pop()
            fd = self._watch(above)
            if fd < 0:
                continue
            try:
                for name in os.listdir(fd):
                    inner = f"{above}/{name}" if above else name
                    try:
                        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    present.add(inner)
                    self._compare_one(inner, Known(found))
                    if stat.S_ISDIR(found.st_mode):
                        todo.append(inner)
            finally:
                os.close(fd)
        for path in sorted(set(self.known) - present, reverse=True):
            self._tell(DELETE, path, self.known.pop(path))

    def _compare_one(self, path: str, now: Known) -> None:
        before = self.known.get(path)
        self.known[path] = now
        if before is None or (before.inode, before.is_folder) != (now.inode, now.is_folder):
            self._tell(CREATE, path, now)
        elif before.content != now.content:
            self._tell(MODIFY, path, now)
        elif before.mode != now.mode:
            self._tell(ATTRIBUTES, path, now)

    def _lstat(self, path: str) -> os.stat_result | None:
        above, _, name = path.rpartition("/")
        try:
            fd = sc.open_beneath(self.root, above, os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return None
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except OSError:
            return None
        finally:
            os.close(fd)

    def _tell(self, operation: str, path: str, entry: Known | None, old: str | None = None) -> None:
        record = {
            "timestamp": datetime.now(UTC).isoformat(),
            "operation": operation,
            "path": escape_text(path, keep=""),
            "is_directory": entry is not None and entry.is_folder,
            "size": entry.size if entry is not None else None,
        }
        if old is not None:
            record["from"] = escape_text(old, keep="")
        self.on_operation(record)


def is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


class FilesystemWatchdog:
    """Monitors what is done to the files in a folder and below it, in a thread of its own.

    A record has `timestamp` (ISO 8601), `operation` ("create", "modify" when a file that was written to is closed, "delete",
    "move" with `from`, "attributes", and "overflow" when the kernel has lost some: the state after it is still told), `path`
    (relative, escaped), `is_directory` and `size` (bytes; None where nothing is left). Reading is not monitored. Safe to use
    from several threads.

    Args:
        sandbox_directory: any folder of the caller's.
        config: with `enable_filesystem_isolation=False` nothing is watched.

    Attributes:
        reason: why start_watching returned False.
        count: operations so far, also those beyond the 10,000 records that are kept.

    Raises:
        TypeError: an argument is of another class.
    """

    def __init__(self, sandbox_directory: str, config: IsolationConfig) -> None:
        if not isinstance(sandbox_directory, (str, os.PathLike)):
            kind = type(sandbox_directory).__name__
            raise TypeError(f"FilesystemWatchdog: sandbox_directory is a {kind}: give the path of a folder")
        if not isinstance(config, IsolationConfig):
            raise TypeError(f"FilesystemWatchdog: config is a {type(config).__name__}: give a IsolationConfig")
        self.sandbox_directory = os.fspath(sandbox_directory)
        self.config = config
        self.reason = ""
        self.count = 0
        self._records: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._watch: FileWatch | None = None
        self._thread: threading.Thread | None = None
        self._stop = (-1, -1)

    def start_watching(self) -> bool:
        """Watch from now on. False, with `reason`, where that cannot be, or goes on already."""
        with self._lock:
            if self._thread is not None:
                self.reason = "it is watching already"
                return False
            if not self.config.enable_filesystem_isolation:
                self.reason = "enable_filesystem_isolation is False"
                return False
            loop = PollLoop()
            try:
                root = os.open(self.sandbox_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    self._watch = FileWatch(loop, root, self._record)
                except OSError:
                    os.close(root)
                    raise
            except (OSError, ValueError) as error:
                self.reason = f"{self.sandbox_directory!r} cannot be watched: {getattr(error, 'strerror', None) or error}"
                return False
            self._stop = os.pipe2(os.O_CLOEXEC)
            stopped = threading.Event()
            loop.add_reader(self._stop[0], stopped.set)
            run = threading.Thread(target=loop.run_until, args=(stopped.is_set,), name="psie watchdog", daemon=True)
            self._thread = run
            run.start()
            self.reason = ""
            return True

    def stop_watching(self) -> None:
        """End it, after a last look at everything. Does nothing where nothing is watched."""
        with self._lock:
            if self._thread is None or self._watch is None:
                return
            os.write(self._stop[1], b"\0")
            self._thread.join()
            self._watch.close()
            for fd in self._stop:
                os.close(fd)
            self._thread = self._watch = None

    def get_file_operations(self) -> list[dict[str, Any]]:
        """The records so far, oldest first."""
        return list(self._records)

    def _record(self, record: dict[str, Any]) -> None:
        self.count += 1
        if len(self._records) < RECORDS:
            self._records.append(record)
