"""Files that a plugin looks for where its sandbox shows none, as its interpreter sees it: for `psie learn` and `psie check`.

What a level hides is just not there, so no refusal tells of it. An audit hook (PEP 578), and os.stat, os.lstat and os.access
with a look beside them, tell of paths that are missing here, and of what is to be written outside of the places that may be.
Whether there is such a file on the host is for the host to look up; nothing is granted here. The record is the plugin's own
word: it can be made up, or left out, and programs that it starts are not seen, but for what their command lines name.
Imported into a worker only where somebody has asked for it. Must not import anything heavy, and must not raise.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident

from sandbox.engine.refusals import TEXT, WRITING, is_library

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Any

DISTINCT = 512  # different wishes that are told of
ARGUMENTS = 64  # of a command line that are looked at
READ, LIST, LOOK, WRITE, MAKE, DELETE, PROGRAM, NAMED = "read", "list", "look", "write", "make", "delete", "program", "named"
# Audit events, and which of their arguments are paths that are wanted how.
EVENTS: dict[str, tuple[tuple[int, str], ...]] = {
    "os.listdir": ((0, LIST),),
    "os.scandir": ((0, LIST),),
    "os.chdir": ((0, LOOK),),
    "os.mkdir": ((0, MAKE),),
    "os.remove": ((0, DELETE),),
    "os.rmdir": ((0, DELETE),),
    "os.rename": ((0, DELETE), (1, WRITE)),
    "os.link": ((0, READ), (1, WRITE)),
    "os.symlink": ((1, WRITE),),
    "os.truncate": ((0, WRITE),),
    "os.posix_spawn": ((0, PROGRAM),),
    "os.exec": ((0, PROGRAM),),
    "sqlite3.connect": ((0, WRITE),),  # which opens the file itself
}
OUTSIDE = (WRITE, MAKE, DELETE)  # told of wherever they are not allowed, whether there is something or not


class Wishes:
    """Tells `report` of the 1st, 2nd, 4th, 8th ... of equal wishes: wish, path, file, line, count."""

    def __init__(self, places: Sequence[str], report: Callable[[dict[str, object]], None], busy: set[int]) -> None:
        """`places`: the folders and files that may be written, as absolute paths. `busy`: threads in which psie's own code
        looks at files just now, which is no matter of the plugin's."""
        self.places = tuple(places)
        self.own = os.path.join(os.getcwd(), "")  # its workspace
        self.report = report
        self.counts: dict[tuple[str, str], int] = {}
        self.busy = busy
        self.lstat = os.lstat

    def watch(self) -> None:
        """From now on, in this process and those that it forks."""
        sys.addaudithook(self._event)
        for name in ("stat", "lstat", "access"):
            original = getattr(os, name)
            replaced = self._looking(original)
            for supported in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks, os.supports_effective_ids):
                if original in supported:
                    supported.add(replaced)
            setattr(os, name, replaced)

    def _looking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """It, with a word about a path that is not there. There is no audit event for it."""

        def look(path: Any, *args: Any, **named: Any) -> Any:
            if named.get("dir_fd") is None:
                self._want(LOOK, path)
            return original(path, *args, **named)

        look.__name__ = look.__qualname__ = original.__name__
        look.__doc__ = original.__doc__
        return look

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        try:
            if event == "open":
                path, _, flags = args
                self._want(WRITE if flags & WRITING else READ, path)
            elif event == "subprocess.Popen":
                self._command(args[0], args[1])
            else:
                for position, wish in EVENTS.get(event, ()):
                    self._want(wish, args[position])
        except BaseException:
            return  # the plugin's own event

    def _command(self, program: Any, arguments: Any) -> None:
        listed = [arguments] if isinstance(arguments, (str, bytes, os.PathLike)) else list(arguments)[:ARGUMENTS]
        self._want(PROGRAM, program if program is not None else listed[0])
        for argument in listed[1:]:
            text = os.fsdecode(argument)
            self._want(NAMED, text[text.find("/") :] if text.startswith("-") and "=/" in text else text)

    def _want(self, wish: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        thread = get_ident()
        if thread in self.busy:
            return
        self.busy.add(thread)
        try:
            text = os.fsdecode(path)
            if self._is_wish(wish, text):
                self._tell(wish, text)
        except BaseException:
            return  # somebody's own path class
        finally:
            self.busy.discard(thread)

    def _is_wish(self, wish: str, path: str) -> bool:
        if not path or "\0" in path:
            return False
        if wish == PROGRAM and "/" not in path:
            folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
            return all(self._is_missing(os.path.join(folder, path)) for folder in folders)
        if path[0] != "/":
            return wish in (READ, LIST) and self._is_missing(path)
        if wish in OUTSIDE:
            plain = os.path.normpath(path)
            if plain.startswith(self.own):
                return False
            # Of its own /tmp as well, if it is not for a file right there: the host's may have such a folder.
            return plain not in self.places and os.path.dirname(plain) not in self.places
        return self._is_missing(path)

    def _is_missing(self, path: str) -> bool:
        try:
            self.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
        return False

    def _tell(self, wish: str, path: str) -> None:
        key = wish, path[:TEXT]
        if key not in self.counts and len(self.counts) >= DISTINCT:
            return
        count = self.counts[key] = self.counts.get(key, 0) + 1
        if count & (count - 1) == 0:
            frame: FrameType | None = sys._getframe(2)
            while frame is not None and is_library(frame.f_code.co_filename):
                frame = frame.f_back
            where = {"file": frame.f_code.co_filename[:TEXT], "line": frame.f_lineno} if frame is not None else {}
            self.report({"wish": wish, "path": key[1], "count": count, **where})
