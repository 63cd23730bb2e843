"""FilesystemWatchdog: what is done to the files below a folder, as inotify(7) tells it, and at least where it ended.

inotify watches single folders and loses what happens in a new one before it is watched; its queue can overflow. So what is
known of every file is kept (sandbox.monitor.tree): a new folder is watched and then looked through, and at an overflow and
at the end the whole tree is compared with what is known. What one misses, the other finds. The files may be a plugin's: no
link is followed, a folder is watched by its descriptor. Must not know sandboxes.

fanotify(7), which could watch a whole filesystem for root, is not used: it takes the process that writes more than twice the
time per file, and merges what is done to one file.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
import termios
import threading
from contextlib import ExitStack, suppress

from inotify_simple import INotify, flags, parse_events

from sandbox.config import IsolationConfig
from sandbox.engine.loop import PollLoop
from sandbox.monitor.thread import WatchThread
from sandbox.monitor.tree import ATTRIBUTES, CREATE, MODIFY, MOVE, OVERFLOW, FileTree, Node, Seen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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
        most: int | None = None,
    ) -> None:
        """`most` watches, of those that all of a user's programs share (fs.inotify.max_user_watches); then looks tell."""
        super().__init__(root, on_operation, lower)
        self.most = most
        self.loop = loop
        self.each_file = each_file
        self.mask = flags.ONLYDIR | flags.EXCL_UNLINK | NAMES | (0 if each_file else CONTENT)
        self.watched: dict[int, list[Node]] = {}  # by watch descriptor: a file with several names has one for all of them
        self.complete = True  # False where a folder is not watched: then looks alone tell
        self.moved: tuple[int, Node, str] | None = None  # the first half of a move: cookie, folder, name
        self.exchanged: tuple[Node, str, Node, str] | None = None  # the move that is still to be told of two that are one
        self.notify: INotify | None = None
        self.timer: Timer | None = None  # while events gather
        self.folder: tuple[Node, int] | None = None  # the one that events were read of last, open meanwhile

    def listen(self, *, report: bool = False) -> None:
        """From now on; with `report` tell as well what is different from what is known.

        Raises OSError where the host has no inotify instance left for this user.
        """
        self.notify = INotify(nonblocking=True)
        self.look(report=report)
        self.is_listening = True
        self._wait()

    def look(self, folder: Node | None = None, *, report: bool = True) -> None:
        super().look(folder, report=report)
        self._close_folder()

    def know(self, path: str) -> None:
        super().know(path)
        self._close_folder()

    def catch_up(self) -> None:
        """Read what has been told by now; who goes on telling does not keep us here."""
        if self.notify is None:
            return
        left = int.from_bytes(fcntl.ioctl(self.notify.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)
        while left > 0:
            read = self.read()
            if not read:
                return
            left -= read

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
        for nodes in self.watched.values():
            for node in nodes:
                node.watch = -1
        self.watched.clear()
        self.moved = self.exchanged = None

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
        elif mask & flags.IGNORED:
            for node in self.watched.pop(watch, ()):
                node.watch = -1
        elif name:
            folder = next((node for node in self.watched.get(watch, ()) if node.seen.is_folder), None)
            if folder is not None:
                self._in_folder(folder, name, mask, cookie)
        elif self.each_file and mask & CONTENT:  # else it is a folder's own attributes, which the one above it tells
            files = [node for node in self.watched.get(watch, ()) if not node.seen.is_folder]
            if files:
                file = files[0] if len(files) == 1 else self._still_there(files)
                assert file.above is not None
                self._seen(file.above, file.name, ATTRIBUTES if mask & flags.ATTRIB else MODIFY)

    def _in_folder(self, folder: Node, name: str, mask: int, cookie: int) -> None:
        if mask & flags.MOVED_FROM:
            self.moved = cookie, folder, name
        elif mask & flags.MOVED_TO and self.moved is not None:
            (_, old_folder, old), self.moved = self.moved, None
            self._move(old_folder, old, folder, name)
        elif mask & flags.DELETE:
            self._left(folder, name)
        elif mask & (flags.CREATE | flags.MOVED_TO):
            self._seen(folder, name, CREATE)
        else:
            self._seen(folder, name, ATTRIBUTES if mask & flags.ATTRIB else MODIFY)

    def _still_there(self, files: list[Node]) -> Node:
        """The one of a file's names that it still has."""
        for node in files:
            assert node.above is not None
            found = self._lstat_in(node.above, node.name)
            if found is not None and found.st_ino == node.seen.inode:
                return node
        return files[-1]

    def _flush_move(self, moved: tuple[int, Node, str] | None = None) -> None:
        """It has left the folder: for us it is gone. With `moved` only if no other move has come meanwhile."""
        if self.moved is not None and moved in (None, self.moved):
            (_, folder, name), self.moved = self.moved, None
            self._left(folder, name)
            self._close_folder()

    def _move(self, old_folder: Node, old: str, new_folder: Node, new: str) -> None:
        """With all below it. What it replaces goes without a word of its own."""
        old_path = f"{old_folder.path}/{old}" if old_folder.above is not None else old
        if self.exchanged == (old_folder, old, new_folder, new):  # the nodes have changed places already
            self.exchanged = None
            node = new_folder.inner.get(new)
            if node is not None and not node.seen.is_whiteout:
                self._tell(MOVE, node.path, node.seen, old_path)
            return
        self.exchanged = None
        node, other = old_folder.inner.get(old), new_folder.inner.get(new)
        goes_into_itself = node is not None and any(each is node for each in ancestors(new_folder))
        if goes_into_itself or (other is not None and any(each is other for each in ancestors(old_folder))):
            self.look()  # an event is missing: none does so, nor takes what is in one its place
            return
        if node is not None and other is not None and node is not other and self._is_at(old_folder, old, other):
            place(other, old_folder, old)
            place(node, new_folder, new)
            self.exchanged = new_folder, new, old_folder, old
            self._tell(MOVE, node.path, node.seen, old_path)
            return
        if other is not None and other is not node:
            self._forget(other)
        if node is not None:
            del old_folder.inner[old]
            place(node, new_folder, new)
        else:  # it came before anybody looked
            node = self._learn(new_folder, new, Seen(self._lstat_in(new_folder, new)))
        self._tell(MOVE, node.path, node.seen, old_path)
        if node.seen.is_folder and node.watch < 0:
            self.look(node)
        if self.lower is not None:
            found = self._lstat_in(old_folder, old)
            if found is not None:
                self._learn(old_folder, old, Seen(found))  # the whiteout that it leaves behind

    def _is_at(self, folder: Node, name: str, node: Node) -> bool:
        found = self._lstat_in(folder, name)
        return found is not None and found.st_ino == node.seen.inode

    def _left(self, folder: Node, name: str) -> None:
        """What is not known came and went before anybody looked, or was told already."""
        node = folder.inner.get(name)
        if node is None:
            return
        if self.lower is not None and self._lstat_in(folder, name) is not None:
            self._seen(folder, name, CREATE)  # it has changed places with a whiteout, or the other way round
        else:
            self._gone(node)

    def _seen(self, folder: Node, name: str, operation: str) -> None:
        found = self._lstat_in(folder, name)
        node, now = folder.inner.get(name), Seen(found)
        before = node.seen if node is not None else None
        if operation == ATTRIBUTES and self.each_file and (before is None or before.inode != now.inode):
            return  # that one of its names goes changes a file's own attributes
        if found is None and operation != CREATE:  # its end is an event to come
            path = f"{folder.path}/{name}" if folder.above is not None else name
            self._tell(operation, path, before)
            return
        if operation == CREATE and before is not None and before.inode == now.inode:
            return  # a look through its folder was faster
        if before is None or self.lower is not None:
            node = self._compare(folder, name, now, report=True)  # in an upper layer the kernel does much that nobody asked for
        else:
            node = self._learn(folder, name, now)
            self._tell(operation, node.path, now)
        if now.is_folder and operation == CREATE:
            self.look(node)

    def _lstat_in(self, folder: Node, name: str) -> os.stat_result | None:
        """What is there now."""
        try:
            return os.stat(name, dir_fd=self._open_folder(folder), follow_symlinks=False)
        except OSError:
            return None

    def _open_folder(self, folder: Node) -> int:
        """Stays open until another one is wanted: events come folder by folder. Raises OSError."""
        if self.folder is None or self.folder[0] is not folder:
            self._close_folder()
            self.folder = folder, self._open(self.root, folder.path, os.O_PATH | os.O_DIRECTORY)
        return self.folder[1]

    def _close_folder(self) -> None:
        if self.folder is not None:
            os.close(self.folder[1])
            self.folder = None

    # -- watches -----------------------------------------------------------------------------------------------------

    def _enter(self, folder: Node, report: bool) -> int:
        """Watches it as well."""
        fd = super()._enter(folder, report)
        is_missed = fd >= 0 and self.notify is not None and not self._watch(folder, f"/proc/self/fd/{fd}", self.mask)
        if is_missed and self.complete:
            self.complete = False
            self._tell(OVERFLOW, "", None)
        return fd

    def _learn(self, folder: Node, name: str, now: Seen, report: bool = True) -> Node:
        """Watches a file as well. Where that cannot be - it may not be read, or there are too many - looks tell."""
        node = super()._learn(folder, name, now, report)
        if self.each_file and self.notify is not None and node.watch < 0 and stat.S_ISREG(now.mode):
            try:
                opened = self._open_folder(folder)
            except OSError:
                return node
            # A folder may have taken its place by now, whose watch must not be less than it was.
            self._watch(node, f"/proc/self/fd/{opened}/{name}", CONTENT | flags.DONT_FOLLOW | flags.MASK_ADD)
        return node

    def _watch(self, node: Node, path: str, mask: int) -> bool:
        assert self.notify is not None
        if self.most is not None and node.watch < 0 and len(self.watched) >= self.most:
            return False
        try:
            watch = self.notify.add_watch(path, mask)
        except OSError:
            return False
        if watch != node.watch:
            self.unwatch(node)
            node.watch = watch
            self.watched.setdefault(watch, []).append(node)
        return True

    def unwatch(self, node: Node) -> None:
        """What is told of what was there means nothing any more."""
        nodes = self.watched.get(node.watch)
        if nodes is not None:
            nodes[:] = [each for each in nodes if each is not node]
            if not nodes:
                del self.watched[node.watch]
                if self.notify is not None:
                    with suppress(OSError):  # the kernel has ended it with the file
                        self.notify.rm_watch(node.watch)
        node.watch = -1


def place(node: Node, folder: Node, name: str) -> None:
    node.above, node.name = folder, name
    folder.inner[name] = node


def ancestors(node: Node | None) -> Iterator[Node]:
    """It and the folders that it lies in."""
    while node is not None:
        yield node
        node = node.above


class FilesystemWatchdog:
    """Monitors what is done to the files in a folder and below it, in a thread of its own.

    A record has `timestamp` (ISO 8601), `operation` ("create", "modify" when a file that was written to is closed, "delete",
    "move" with `from`, "attributes"; where some are missing "overflow", when the kernel has lost them or has no watch left and
    looks alone tell the state, or "hidden", for a folder that cannot be looked into any more, or lies more than 256 deep),
    `path` (relative, escaped), `is_directory` and `size` (bytes; of a deletion those that were there; None where nobody knows).
    What is done again to the same file within a few hundredths of a second is one operation. Reading is not monitored. Safe to
    use from several threads.

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
        self._thread: WatchThread | None = None

    def start_watching(self) -> bool:
        """Watch from now on. False, with `reason`, where that cannot be, or goes on already."""
        with self._lock:
            if self._thread is not None:
                self.reason = "it is watching already"
                return False
            if not self.config.enable_filesystem_isolation:
                self.reason = "enable_filesystem_isolation is False"
                return False
            try:
                with ExitStack() as undo:
                    self._begin(undo)
            except (OSError, ValueError, RuntimeError) as error:  # the last: "can't start new thread"
                self.reason = f"{self.sandbox_directory!r} cannot be watched: {getattr(error, 'strerror', None) or error}"
                return False
            self.reason = ""
            return True

    def _begin(self, undo: ExitStack) -> None:
        """`undo` closes what has been opened until something could not be; then the thread does, in which no signal's exception
        comes. Raises OSError, ValueError, RuntimeError."""
        loop = PollLoop()
        undo.callback(loop.close)
        root = os.open(self.sandbox_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        watch = FileWatch(loop, root, self._record)
        undo.callback(watch.close, look=False)
        watch.listen()
        self._thread = WatchThread("psie watchdog", loop, undo, watch.close)

    def stop_watching(self) -> None:
        """End it, after a last look at everything. Does nothing where nothing is watched."""
        with self._lock:
            if self._thread is None:
                return
            self._thread.stop()
            thread, self._thread = self._thread, None  # so that nothing is closed twice
            thread.close()

    def get_file_operations(self) -> list[dict[str, Any]]:
        """The records so far, oldest first."""
        return list(self._records)

    def _record(self, record: dict[str, Any]) -> None:
        self.count += 1
        if len(self._records) < RECORDS:
            self._records.append(record)
