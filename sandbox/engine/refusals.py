"""Refused file accesses, and names of hosts that are asked for, as the interpreter sees them: a record for people, made
inside the worker, never the boundary.

The kernel refuses; this only tells of it, with the line of the plugin that wanted it, and a plugin can silence or forge it.
An exception is certain: one that leaves the plugin, and from Python 3.12 on every one that its code meets (sys.monitoring,
RAISE, which costs nothing while nothing is raised). An audit hook (PEP 578) knows what was wanted, but runs before the kernel
has answered: it remembers that, and where exceptions cannot be seen it asks the kernel about what plainly leads out of the
folders that may be written. Refused is what answers EACCES, EPERM or EROFS outside of those; what is hidden is just not there.
Must not import anything heavy, and must not raise.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType, FrameType, TracebackType
    from typing import Any

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
DISTINCT = 256  # different refusals that are told of
TEXT = 1000  # characters of a path that are told
CHAIN = 16  # exceptions, each the cause of the next
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TOOL = 4  # sys.monitoring: a number that it names for nobody

# Audit events whose first argument is a path, and what is told of them.
OPERATIONS = {
    "open": "open",
    "os.chdir": "chdir",
    "os.chmod": "chmod",
    "os.chown": "chown",
    "os.link": "link",
    "os.listdir": "listdir",
    "os.mkdir": "mkdir",
    "os.remove": "unlink",
    "os.rename": "rename",
    "os.rmdir": "rmdir",
    "os.scandir": "listdir",
    "os.setxattr": "setxattr",
    "os.symlink": "symlink",
    "os.truncate": "truncate",
    "os.utime": "utime",
}
NAMES = ("socket.getaddrinfo", "socket.gethostbyname")  # audit events whose first argument is a host's name
OTHER = "access"  # stat(2), readlink(2) and their like, for which there is no event
OWN = os.path.join(os.path.dirname(__file__), "")
LIBRARIES = (os.path.join(os.path.dirname(os.__file__), ""), OWN, "<frozen")
PACKAGES = ("/site-packages/", "/dist-packages/")


class Refusals:
    """Tells `report` of the 1st, 2nd, 4th, 8th ... of equal refusals: path, operation, errno, file, line, count."""

    def __init__(
        self,
        places: list[str],
        report: Callable[[dict[str, object]], None],
        asked: Callable[[dict[str, object]], None],
        read_only: Sequence[str] = (),
    ) -> None:
        """`places`: the folders and files that may be written, as absolute paths, but for what is below one of `read_only`.
        `asked` is told of a host's name as `report` of a refusal: host, port, file, line, count."""
        self.places = tuple(places)
        self.below = tuple(os.path.join(place, "") for place in places)
        self.read_only = tuple(os.path.join(path, "") for path in read_only)
        self.report = report
        self.asked = asked
        self.counts: dict[tuple[str, str, int], int] = {}  # by operation, path, errno; or "", host, port
        self.last: list[Any] = ["", ()]  # the last event and its arguments; another thread's if it is about another path
        self.busy: set[int] = set()  # threads that are in here
        self.sees_exceptions = False

    def watch(self) -> None:
        """From now on, in this process and those that it forks."""
        self.sees_exceptions = self._watch_exceptions()
        sys.addaudithook(self._hook())

    def _watch_exceptions(self) -> bool:
        monitoring: Any = getattr(sys, "monitoring", None)
        if monitoring is None:
            return False
        try:
            monitoring.use_tool_id(TOOL, "psie")
        except ValueError:
            return False  # a preload has it
        monitoring.register_callback(TOOL, monitoring.events.RAISE, self._raised)
        monitoring.set_events(TOOL, monitoring.events.RAISE)
        return True

    def _hook(self) -> Callable[[str, tuple[Any, ...]], None]:
        """Every file that is opened passes through it: it does as little as can be done."""
        operations, last, below, candidate, name = OPERATIONS, self.last, self.below, self._candidate, self._name

        def remember(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" or event in operations:
                last[0] = event
                last[1] = args
            elif event in NAMES:
                name(args)

        def remember_and_ask(event: str, args: tuple[Any, ...]) -> None:
            if event == "open":
                last[0] = event
                last[1] = args
                try:
                    path, _, flags = args
                    # What is relative is so to the workspace, for nearly everybody.
                    if not flags & WRITING or (type(path) is str and (path[0] != "/" or path.startswith(below))):
                        return
                except Exception:
                    return  # the plugin's own event
                candidate(event, args)
            elif event in operations:
                last[0] = event
                last[1] = args
                candidate(event, args)
            elif event in NAMES:
                name(args)

        return remember if self.sees_exceptions else remember_and_ask

    # -- exceptions --------------------------------------------------------------------------------------------------

    def _raised(self, code: CodeType, offset: int, error: BaseException) -> None:
        """An exception is in a frame: of the plugin's, the first that it comes to is the one that wanted the access."""
        if issubclass(type(error), OSError) and not is_library(code.co_filename):
            traceback = error.__traceback__
            if traceback is not None and innermost(traceback) is traceback:
                self._tell_of(error, code.co_filename, traceback.tb_lineno)

    def uncaught(self, error: BaseException) -> None:
        """An exception has left the plugin: it, or one that it came from, may be a refusal."""
        seen: set[int] = set()
        link: BaseException | None = error
        while link is not None and id(link) not in seen and len(seen) < CHAIN:
            seen.add(id(link))
            if issubclass(type(link), OSError):
                frame = innermost(link.__traceback__)
                if frame is None:
                    self._tell_of(link, "", 0)
                elif not self.sees_exceptions:
                    self._tell_of(link, frame.tb_frame.f_code.co_filename, frame.tb_lineno, again=False)
            link = link.__cause__ or link.__context__

    def _tell_of(self, error: Any, file: str, line: int, *, again: bool = True) -> None:
        """Without `again` only of what has not been told of before."""
        thread = get_ident()
        if thread in self.busy:
            return
        self.busy.add(thread)
        try:
            if error.errno in REFUSED and isinstance(error.filename, (str, bytes, os.PathLike)):
                path = text_of(error.filename)
                event, (wanted, *_) = self.last[0], self.last[1] or (None,)
                known = isinstance(wanted, (str, bytes, os.PathLike)) and text_of(wanted) == path
                # chroot(2) and its like answer EPERM, and the kernel's side has told of them.
                if known or error.errno != errno.EPERM:
                    operation = OPERATIONS[event] if known else OTHER
                    if again or (operation, path, error.errno) not in self.counts:
                        self._tell(operation, path, error.errno, file, line)
        except BaseException:
            return  # an attribute of its error is the plugin's own code
        finally:
            self.busy.discard(thread)

    # -- before there is an answer -----------------------------------------------------------------------------------

    def _candidate(self, event: str, args: tuple[Any, ...]) -> None:
        """The kernel is asked for something that has no effect: whoever may not do that may not do what the plugin wants."""
        thread = get_ident()
        if thread in self.busy or event not in ASKED or not args or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        self.busy.add(thread)
        try:
            frame, wanted = sys._getframe(2), text_of(args[0])
            if os.path.isabs(wanted) and not wanted.startswith(self.below) and not is_library(frame.f_code.co_filename):
                number = ASKED[event](wanted, args)
                if number in REFUSED:
                    self._tell(OPERATIONS[event], wanted, number, frame.f_code.co_filename, frame.f_lineno)
        except BaseException:
            return  # nothing is known then
        finally:
            self.last[:] = event, args  # not what was asked meanwhile
            self.busy.discard(thread)

    # -- names of hosts ----------------------------------------------------------------------------------------------

    def _name(self, args: tuple[Any, ...]) -> None:
        """Whoever asks for a name wants to go there; what is no name needs no resolver."""
        thread = get_ident()
        if thread in self.busy:
            return
        self.busy.add(thread)
        try:
            host, port = args[0], args[1] if len(args) > 1 else 0
            host = host.decode("ascii", "replace") if isinstance(host, bytes) else host
            if isinstance(host, str) and not host.isascii():
                host = host.encode("idna").decode("ascii")  # as the resolver is asked then
            if isinstance(host, str) and host and ":" not in host and not host.rpartition(".")[2].isdecimal():
                key = "", host[:TEXT], int(port or 0)
                count = self._count(key)
                if count:
                    frame: FrameType | None = sys._getframe(2)
                    while frame is not None and is_library(frame.f_code.co_filename):
                        frame = frame.f_back
                    where = {"file": frame.f_code.co_filename[:TEXT], "line": frame.f_lineno} if frame is not None else {}
                    self.asked({"host": key[1], "port": key[2], "count": count, **where})
        except BaseException:
            return  # a port by its name, or the plugin's own event
        finally:
            self.busy.discard(thread)

    # -- telling -----------------------------------------------------------------------------------------------------

    def _tell(self, operation: str, path: str, number: int, file: str, line: int) -> None:
        real = os.path.realpath(path)
        if (real in self.places or real.startswith(self.below)) and not real.startswith(self.read_only):
            return  # there it is a matter of the file's own mode
        path = os.path.join(os.getcwd(), path)  # one that is absolute stays as it is
        count = self._count((operation, path[:TEXT], number))
        if count:
            where = {"file": file[:TEXT], "line": line, "count": count}
            self.report({"path": path[:TEXT], "operation": operation, "errno": number, **where})

    def _count(self, key: tuple[str, str, int]) -> int:
        """How often that was by now, if it is to be told, else 0."""
        if key not in self.counts and len(self.counts) >= DISTINCT:
            return 0
        count = self.counts[key] = self.counts.get(key, 0) + 1
        return count if count & (count - 1) == 0 else 0


def text_of(path: str | bytes | os.PathLike[Any]) -> str:
    return os.fsdecode(path)


def is_library(file: str) -> bool:
    """Whether code of this file is the interpreter's, a package's or psie's: what it handles is no matter of the plugin's."""
    return file.startswith(LIBRARIES) or any(part in file for part in PACKAGES)


def innermost(traceback: TracebackType | None) -> TracebackType | None:
    """The last entry that is the plugin's own."""
    found = None
    while traceback is not None:
        if not is_library(traceback.tb_frame.f_code.co_filename):
            found = traceback
        traceback = traceback.tb_next
    return found


def answer(path: str, flags: int) -> int:
    """The errno of an open(2), or 0."""
    try:
        os.close(os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as error:
        return error.errno or 0
    return 0


def mode_of(path: str) -> int:
    """As lstat(2) gives it; 0 where there is nothing."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def make_in(folder: str) -> int:
    """What the making of a file in a folder answers: of one without a name, which goes with its descriptor."""
    return answer(folder, os.O_TMPFILE | os.O_WRONLY)


def real_parent(path: str) -> tuple[str, str]:
    folder, name = os.path.split(path.rstrip("/"))
    return os.path.realpath(folder), name


def ask_open(path: str, args: tuple[Any, ...]) -> int:
    real = os.path.realpath(path)
    mode = mode_of(real)
    if mode == 0:
        return make_in(os.path.dirname(real)) if args[2] & os.O_CREAT else 0
    number = answer(real, os.O_WRONLY) if stat.S_ISREG(mode) else 0
    if number and args[2] & (os.O_CREAT | os.O_TRUNC) and make_in(os.path.dirname(real)) == errno.EROFS:
        return errno.EROFS  # which the kernel looks at first then
    return number


def ask_make(path: str, args: tuple[Any, ...]) -> int:
    folder, name = real_parent(path)
    return make_in(folder) if mode_of(os.path.join(folder, name)) == 0 else 0


def ask_remove(path: str, args: tuple[Any, ...]) -> int:
    folder, name = real_parent(path)
    mode = mode_of(os.path.join(folder, name))
    return make_in(folder) if mode and not stat.S_ISDIR(mode) else 0


# What can be asked about. Another path argument than the first, or two folders that may lie in two mounts, cannot.
ASKED: dict[str, Callable[[str, tuple[Any, ...]], int]] = {"open": ask_open, "os.mkdir": ask_make, "os.remove": ask_remove}
