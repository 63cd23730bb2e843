"""An exception of a plugin on its way out: four texts, cut to size at both ends.

Apart from the codec of values because `psie run` needs only this. Both sides use it; what it decodes is hostile.
"""

from __future__ import annotations

from sandbox.engine import channel

MAX_NAME = 1 << 10  # characters of the class's name
MAX_MESSAGE = 8 << 10  # characters of the message
MAX_TRACEBACK = 64 << 10  # characters of the formatted traceback


class Failure:
    """An exception as text: class name, message, formatted traceback, and errno for an OSError (else 0)."""

    def __init__(self, type: str, message: str, traceback: str, errno: int) -> None:
        self.type = type
        self.message = message
        self.traceback = traceback
        self.errno = errno


def encode(error: BaseException) -> bytes:
    """The bytes of an exception. Never raises for what the exception does."""
    try:
        message = str(error)
    except BaseException:  # its __str__ is the plugin's
        message = "<unprintable>"
    try:
        traceback = _format(error)
    except BaseException:
        traceback = "<the traceback cannot be shown>"
    errno = getattr(error, "errno", None) if isinstance(error, OSError) else None
    cls = type(error)
    name = cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"
    fields = {
        "type": _cut(name, MAX_NAME),
        "message": _cut(message, MAX_MESSAGE),
        "traceback": _cut(traceback, MAX_TRACEBACK),
        "errno": errno if type(errno) is int and 0 < errno < 4096 else 0,
    }
    return channel.pack("failure", fields)


def decode(data: bytes | bytearray) -> Failure:
    """The exception in hostile bytes, as short as `encode` makes it. Raises channel.Malformed."""
    kind, fields = channel.unpack(bytes(data))
    if kind != "failure" or list(fields) != ["type", "message", "traceback", "errno"]:
        raise channel.Malformed("no description of an exception")
    number = fields["errno"]
    errno = int(number) if number.isascii() and number.isdecimal() and len(number) < 5 else 0
    texts = (_cut(fields["type"], MAX_NAME), _cut(fields["message"], MAX_MESSAGE), _cut(fields["traceback"], MAX_TRACEBACK))
    return Failure(*texts, errno)


def _cut(text: str, longest: int) -> str:
    """At most `longest` characters: the start, and of the end three times as much, for there is the cause."""
    text = str.__getitem__(text, slice(None))  # exactly str: a __str__ may give a subclass
    if len(text) <= longest:
        return text
    mark = f"\n[... {len(text) - longest} characters or more left out ...]\n"
    start = longest // 4
    return text[:start] + mark + text[start + len(mark) - longest :]


def _format(error: BaseException) -> str:
    """The traceback with the plugin's frames only, of the exception and of those that it came from."""
    from traceback import StackSummary, TracebackException

    own = __file__.rpartition("/")[0] + "/"
    shown = TracebackException.from_exception(error)
    todo: list[TracebackException | None] = [shown]
    while todo:
        part = todo.pop()
        if part is not None:
            part.stack = StackSummary.from_list([frame for frame in part.stack if not frame.filename.startswith(own)])
            todo += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ())]
    return "".join(shown.format())
