"""An exception of a plugin on its way out: a few texts, cut to size at both ends.

Apart from the codec of values because `psie run` needs only this. Both sides use it; what it decodes is hostile.
"""

from __future__ import annotations

import os
from errno import EAGAIN, ENOMEM, EPERM

from sandbox.engine import channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from traceback import StackSummary

MAX_NAME = 1 << 10  # characters of the class's name
MAX_MESSAGE = 8 << 10  # characters of the message
MAX_TRACEBACK = 64 << 10  # characters of the formatted traceback
MAX_PLACE = 1 << 10  # characters of a file's name, and of what was done there


class Failure:
    """An exception as text: class name, message, formatted traceback, and errno: of an OSError its own, of a MemoryError
    ENOMEM, else 0.

    Of a refused operation (EPERM), or what a limit has refused (EAGAIN), also file and line of the innermost frame that is no
    library's, and what was done there: the line's text, or of the library's innermost frame its module, function and line.
    """

    def __init__(self, type: str, message: str, traceback: str, errno: int, file: str, line: int, done: str) -> None:
        self.type = type
        self.message = message
        self.traceback = traceback
        self.errno = errno
        self.file = file
        self.line = line
        self.done = done


def encode(error: BaseException) -> bytes:
    """The bytes of an exception. Never raises for what the exception does."""
    try:
        message = str(error)
    except BaseException:  # its __str__ is the plugin's
        message = "<unprintable>"
    cls, name, errno = type(error), "<a class without a name>", None
    file, line, done = "", 0, ""
    try:
        name = cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"
        name = _cut(name, MAX_NAME)
        errno = error.errno if isinstance(error, OSError) else ENOMEM if isinstance(error, MemoryError) else None
    except BaseException:  # so are its attributes
        pass
    try:
        traceback, stack = _format(error)
        if errno in (EPERM, EAGAIN) and stack:
            file, line, done = _place(stack)
    except BaseException:
        traceback = "<the traceback cannot be shown>"
    fields = {
        "type": name,
        "message": _cut(message, MAX_MESSAGE),
        "traceback": _cut(traceback, MAX_TRACEBACK),
        "errno": errno if type(errno) is int and 0 < errno < 4096 else 0,
        "file": file[:MAX_PLACE],
        "line": line,
        "done": done[:MAX_PLACE],
    }
    return channel.pack("failure", fields)


def decode(data: bytes | bytearray | memoryview) -> Failure:
    """The exception in hostile bytes, as short as `encode` makes it. Raises channel.Malformed."""
    kind, fields = channel.unpack(bytes(data))
    if kind != "failure" or list(fields) != ["type", "message", "traceback", "errno", "file", "line", "done"]:
        raise channel.Malformed("no description of an exception")
    errno, line = (_number(fields[name], digits) for name, digits in (("errno", 4), ("line", 8)))
    texts = (_cut(fields["type"], MAX_NAME), _cut(fields["message"], MAX_MESSAGE), _cut(fields["traceback"], MAX_TRACEBACK))
    return Failure(*texts, errno, fields["file"][:MAX_PLACE], line, fields["done"][:MAX_PLACE])


def _number(text: str, digits: int) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= digits else 0


def _cut(text: str, longest: int) -> str:
    """At most `longest` characters: the start, and of the end three times as much, for there is the cause."""
    text = str.__getitem__(text, slice(None))  # exactly str: a __str__ may give a subclass
    if len(text) <= longest:
        return text
    mark = f"\n[... {len(text) - longest} characters or more left out ...]\n"
    start = longest // 4
    return text[:start] + mark + text[start + len(mark) - longest :]


def _format(error: BaseException) -> tuple[str, StackSummary]:
    """The traceback with the plugin's frames only, of the exception and of those that it came from; the frames of it."""
    from traceback import StackSummary, TracebackException

    own = __file__.rpartition("/")[0] + "/"
    shown = TracebackException.from_exception(error)
    todo: list[TracebackException | None] = [shown]
    while todo:
        part = todo.pop()
        if part is not None:
            part.stack = StackSummary.from_list([frame for frame in part.stack if not frame.filename.startswith(own)])
            todo += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ())]
    return "".join(shown.format()), shown.stack


def _place(stack: StackSummary) -> tuple[str, int, str]:
    """As in Failure: file, line, what was done there."""
    library = os.path.dirname(os.__file__) + "/"
    own = [
        frame
        for frame in stack
        if not frame.filename.startswith((library, "<frozen"))
        and "/site-packages/" not in frame.filename
        and "/dist-packages/" not in frame.filename
    ]
    inner = stack[-1]
    if not own:
        return "", 0, ""
    done = inner.line or ""
    if inner is not own[-1]:
        done = f"{inner.filename.rpartition('/')[2].removesuffix('.py')} {inner.name} {done}"
    return own[-1].filename, own[-1].lineno or 0, done
