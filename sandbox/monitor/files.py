"""FilesystemWatchdog: what is done to the files below a folder, as inotify(7) tells it, and at least where it ended.

inotify watches single folders and loses what happens in a new one before it is watched; its queue can overflow. So what is
known of every file is kept (sandbox.monitor.tree): a new folder is watched and then looked through, and at an overflow and
at the end the whole tree is compared with what is known. What one misses, the other finds. The files may be a plugin's: no
link is followed, a folder is watched by its descriptor. Must not know sandboxes.

fanotify(7), which could watch a whole filesystem for root, is not used: it takes the process that writes more than twice the
time per file, and merges what is done to one file.
"""

from __future__ import annotations

import os
import stat
import threading

from inotify_simple import INotify, flags, parse_events

from sandbox.config import IsolationConfig
from sandbox.engine.loop import PollLoop
from sandbox.monitor.tree import ATTRIBUTES, CREATE, MODIFY, MOVE, OVERFLOW, FileTree, Known
from sandbox.ns import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandbox.engine.loop import Loop, Timer

NAMES = flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO  # that come and go in a folder
CONTENT = flags.CLOSE_WRITE | flags.ATTRIB  # of a file, or of all in a folder
RECORDS = 10_000  # kept; further ones are only counted
SECOND_HALF = 0.1  # seconds that the second half of a move may come after the first
AT_ONCE = 1 << 13  # bytes of events that are read before others on the loop have their turn: some 250
REST = 0.02  # seconds in which events are left to gather: each one that wakes us costs the process that caused it


class FileWatch(FileTree):
    """A tree whose operations are told as they happen, between `listen` and `quiet`.

    With `each_file` a file is watched for itself. Whoever uses the files pays less: what a folder's watch tells of the files
    in it makes each open(2) and read(2) of them dearer. It takes a watch for each file, and tells less: a file that is new and
    written at once is one operation, of a folder's own mode the next look tells.
    """

    def __init__(
        self,
        loop: Loop,
        root: int,
        on_operation: Callable[[dict[str, Any]], None],
        lower: int | None = None,
        *,
        each_file: bool = False,
    ) -> None:
        super().__init__(root, on_operation, lower)
        self.loop = loop
        self.each_file = each_file
        self.mask = flags.ONLYDIR | flags.EXCL_UNLINK | NAMES | (0 if each_file else CONTENT)
        self.watched: dict[int, str] = {}  # paths by watch descriptor
        self.descriptors: dict[str, int] = {}  # the other way round
        self.moved: tuple[int, str] | None = None  # cookie and path of the first half of a move
        self.notify: INotify | None = None
        self.timer: Timer | None = None  # while events gather
        self.folder: tuple[str, int] | None = None  # the one that events were read of last, open meanwhile

    def listen(self, *, report: bool = False) -> None:
        """From now on; with `report` tell as well what is different from what is known.

        Raises OSError where the host has no inotify instance left for this user.
        """
        self.notify = INotify(nonblocking=True)
        self.is_listening = True
        self.look(report=report)
        self._wait()

    def look(self, path: str = "", *, report: bool = True) -> None:
        super().look(path, report=report)
        self._close_folder()

    def know(self, path: str) -> None:
        super().know(path)
        self._close_folder()

    def catch_up(self) -> None:
        while self.read():
            pass

    def quiet(self, *, report: bool = True) -> None:
        """The last events and a last look; without `report` what is still to be told is not."""
        if self.notify is None:
            return
        if report:
            self.catch_up()
            self._flush_move()
        self._stop()
        self.look(report=report)

    def _stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.notify is not None:
            self.loop.remove_reader(self.notify.fileno())
            self.notify.close()
        self.notify, self.is_listening = None, False
        self._close_folder()
        self.watched.clear()
        self.descriptors.clear()
        self.moved = None

    def close(self, *, look: bool = True) -> None:
        if look:
            self.quiet()
        self._stop()
        super().close(look=False)

    # -- events ----------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """For the next event."""
        self.timer = None
        if self.notify is not None:
            self.loop.add_reader(self.notify.fileno(), self._told)

    def _told(self) -> None:
        """Read; if there is more, again when others have had their turn, else after a rest."""
        self.timer = None
        read = self.read()
        if self.notify is not None:
            self.loop.remove_reader(self.notify.fileno())
            again = self._told if read else self._wait
            self.timer = self.loop.call_later(REST if read < AT_ONCE / 2 else 0, again)

    def read(self) -> int:
        """Some of what the kernel has told: so many bytes."""
        if self.notify is None:
            return 0
        try:
            data = os.read(self.notify.fileno(), AT_ONCE)
        except BlockingIOError:
            return 0
        for event in parse_events(data):
            self._event(event.wd, event.mask, event.cookie, event.name)
        self._close_folder()
        if self.moved is not None:  # its second half may be a moment behind
            self.loop.call_later(SECOND_HALF, self._flush_move, self.moved)
        return len(data)

    def _event(self, watch: int, mask: int, cookie: int, name: str) -> None:
        if self.moved is not None and not (mask & flags.MOVED_TO and cookie == self.moved[0]):
            self._flush_move()
        if mask & flags.Q_OVERFLOW:
            self._tell(OVERFLOW, "", None)
            self.look()
            return
        above = self.watched.get(watch)
        if mask & flags.IGNORED and above is not None:
            del self.watched[watch]
            if self.descriptors.get(above) == watch:
                del self.descriptors[above]
        if above is None or not (name or (self.each_file and mask & CONTENT)):
            return  # a folder's own attributes are told by the one above it
        path = f"{above}/{name}" if above and name else above or name
        if mask & flags.MOVED_FROM:
            self.moved = cookie, path
        elif mask & flags.MOVED_TO and self.moved is not None:
            (_, old), self.moved = self.moved, None
            self._move(old, path)
        elif mask & flags.DELETE:
            self._left(path)
        elif mask & (flags.CREATE | flags.MOVED_TO):
            self._seen(path, CREATE)
        else:
            self._seen(path, ATTRIBUTES if mask & flags.ATTRIB else MODIFY)

    def _flush_move(self, moved: tuple[int, str] | None = None) -> None:
        """It has left the folder: for us it is gone. With `moved` only if no other move has come meanwhile."""
        if self.moved is not None and moved in (None, self.moved):
            (_, path), self.moved = self.moved, None
            self._left(path)
            self._close_folder()

    def _move(self, old: str, new: str) -> None:
        """With all below it. What it replaces goes without a word of its own."""
        self._close_folder()
        self._unwatch(new)
        self._forget(new)
        entry = self.known.get(old)
        for path, inner in self._forget(old):
            moved = new + path[len(old) :]
            self.known[moved] = inner
            if path in self.descriptors:
                watch = self.descriptors.pop(path)
                self.watched[watch], self.descriptors[moved] = moved, watch
        if entry is not None:
            self._learn(new, entry)
        self._tell(MOVE, new, entry, old)
        if self.lower is not None:
            found = self._lstat(self.root, old)
            if found is not None:
                self._learn(old, Known(found))  # the whiteout that it leaves behind

    def _left(self, path: str) -> None:
        """What is not known came and went before anybody looked, or was told already."""
        if path not in self.known:
            return
        if self.lower is not None and self._lstat(self.root, path) is not None:
            self._seen(path, CREATE)  # it has changed places with a whiteout, or the other way round
        else:
            self._gone(path)

    def _seen(self, path: str, operation: str) -> None:
        found = self._lstat_known(path)
        before, now = self.known.get(path), Known(found)
        if operation == ATTRIBUTES and self.each_file and (before is None or before.inode != now.inode):
            return  # that one of its names goes changes a file's own attributes
        if found is None and operation != CREATE:  # its end is an event to come
            self._tell(operation, path, before)
            return
        if operation == CREATE and before is not None and before.inode == now.inode:
            return  # a look through its folder was faster
        if before is None or self.lower is not None:
            self._compare(path, now, report=True)  # in an upper layer the kernel does much that the plugin did not
        else:
            self._learn(path, now)
            self._tell(operation, path, now)
        if now.is_folder and operation == CREATE:
            self.look(path)

    def _lstat_known(self, path: str) -> os.stat_result | None:
        """What is there now; of files in the same folder, one after the other, that one is opened once."""
        try:
            folder, name = self._open_folder(path)
            return os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return None

    def _open_folder(self, path: str) -> tuple[int, str]:
        """The folder that it lies in, which stays open until another one is wanted, and its name there."""
        above, _, name = path.rpartition("/")
        if self.folder is None or self.folder[0] != above:
            self._close_folder()
            self.folder = above, sc.open_beneath(self.root, above, os.O_PATH | os.O_DIRECTORY)
        return self.folder[1], name

    def _close_folder(self) -> None:
        if self.folder is not None:
            os.close(self.folder[1])
            self.folder = None

    def _enter(self, path: str) -> int:
        """Watches it as well."""
        fd = super()._enter(path)
        if fd >= 0 and self.notify is not None:
            try:
                watch = self.notify.add_watch(f"/proc/self/fd/{fd}", self.mask)
            except OSError:
                self.complete = False  # fs.inotify.max_user_watches
            else:
                self.watched[watch], self.descriptors[path] = path, watch
        return fd

    def _learn(self, path: str, now: Known, report: bool = True) -> None:
        """Watches a file as well. Where that cannot be - it may not be read, or fs.inotify.max_user_watches - looks tell."""
        before = self.known.get(path)
        super()._learn(path, now, report)
        if not self.each_file or self.notify is None:
            return
        if before is not None and before.inode != now.inode:
            self._unwatch(path)
        if stat.S_ISREG(now.mode) and path not in self.descriptors:
            try:
                folder, name = self._open_folder(path)
                watch = self.notify.add_watch(f"/proc/self/fd/{folder}/{name}", CONTENT | flags.DONT_FOLLOW)
            except OSError:
                return
            self.watched[watch], self.descriptors[path] = path, watch

    def _gone(self, path: str, report: bool = True) -> None:
        for inner, _ in self._below(path):
            self._unwatch(inner)
        super()._gone(path, report)

    def _unwatch(self, path: str) -> None:
        """What is told of what was there means nothing any more. The kernel ends the watch when it ends the file."""
        watch = self.descriptors.pop(path, None)
        if watch is not None and self.watched.get(watch) == path:
            del self.watched[watch]


class FilesystemWatchdog:
    """Monitors what is done to the files in a folder and below it, in a thread of its own.

    A record has `timestamp` (ISO 8601), `operation` ("create", "modify" when a file that was written to is closed, "delete",
    "move" with `from`, "attributes", and "overflow" when the kernel has lost some: the state after it is still told), `path`
    (relative, escaped), `is_directory` and `size` (bytes; of a deletion those that were there; None where nobody knows).
    Reading is not monitored. Safe to use from several threads.

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
                watch = FileWatch(loop, root, self._record)
                try:
                    watch.listen()
                except OSError:
                    watch.close()
                    raise
            except (OSError, ValueError) as error:
                self.reason = f"{self.sandbox_directory!r} cannot be watched: {getattr(error, 'strerror', None) or error}"
                return False
            self._watch = watch
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
