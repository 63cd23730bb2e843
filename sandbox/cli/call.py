"""`psie call FILE:FUNCTION`: one function of a file, its reply as JSON on stdout."""

from __future__ import annotations

import itertools
import json
import marshal
import math
import os
import sys

from sandbox.cli import forget
from sandbox.cli import run as run_command
from sandbox.cli.inputs import UsageError
from sandbox.cli.session import Session, guarded, remember, say
from sandbox.engine import channel, codec
from sandbox.engine.client import VALUE_MODULES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.engine.client import Call


def call(given: dict[str, Any]) -> int:
    """Run it and return the exit status: 0, or as for `psie run`."""

    def work() -> int:
        file, colon, function = given["target"].rpartition(":")
        if not colon or not function.isidentifier():
            raise UsageError(f"{given['target']}: give FILE:FUNCTION, as in plugin.py:main")
        path = run_command.plugin_path(file)
        source = run_command.source_of(path)
        args = [from_json(f"--arg {text}", text) for text in given["arg"]]
        kwargs = keywords(given["kwarg"])

        def job(session: Session) -> dict[str, object]:
            return {
                "kind": "function",
                "path": path,
                "folder": os.path.dirname(path),
                "module": os.path.splitext(os.path.basename(path))[0].replace(".", "_"),  # else of a package
                "functions": [function],
                "env": None,
                "args": args,
                "kwargs": kwargs,
                "max_bytes": int(session.recipe.limits["result_bytes"]),
            }

        return remember(given, None, f"{path}:{function}", path, source, job, Calling)

    return guarded(work)


def from_json(where: str, text: str) -> object:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where}: this is no JSON ({error}): quote a text, as in '\"text\"'") from None
    except RecursionError:
        raise UsageError(f"{where[:60]}...: this is nested too deeply") from None
    try:
        marshal.dumps(value)  # as it travels, for which less depth is enough since Python 3.12
    except ValueError:
        raise UsageError(f"{where[:60]}...: this is nested too deeply") from None
    return value


def keyword(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--kwarg {text}: give NAME=JSON")
    return name, from_json(f"--kwarg {text}", value)


def keywords(texts: tuple[str, ...]) -> dict[str, object]:
    found: dict[str, object] = {}
    for text in texts:
        name, value = keyword(text)
        if name in found:
            raise UsageError(f"--kwarg {text}: {name} has a value already: give it once")
        found[name] = value
    return found


class Calling(Session):
    """A session whose worker sends a value."""

    modules = VALUE_MODULES

    def reply(self) -> int:
        assert self.call is not None
        return print_reply(self.call)


def print_reply(call: Call) -> int:
    if call.reply_kind in (channel.REPLY_ERROR, channel.REPLY_UNFIT):
        return 1  # it has been told
    if call.reply_kind != channel.REPLY_VALUE or not call.reply_complete:
        raise run_command.Failed("the plugin ended without a reply")
    value = codec.decode(call.reply, max_bytes=call.reply_limit)
    try:
        text = json.dumps(jsonable(value), allow_nan=False, ensure_ascii=os.isatty(1))
    except ValueError as error:  # Python's bound on the digits of an int
        say(f"the result is no JSON: {str(error).partition(';')[0]}")
        return 1
    try:
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")  # \ud800 is JSON's own escape
        sys.stdout.buffer.flush()
    except OSError as error:
        forget(1)
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "standard output") from None
    return 0


def name_of(key: object) -> str:
    """A key as JSON has it."""
    return json.dumps(key) if key is None or isinstance(key, (bool, int)) else str(key)


def jsonable(value: object) -> object:
    """What JSON does not have: sets become lists, bytes base64, arrays nested lists, nan and infinity null, the rest text.

    Raises ValueError for a dict of which two keys become the same name, and for what would be more than fits into memory.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        named = {name_of(key): jsonable(item) for key, item in value.items()}
        if len(named) < len(value):
            raise ValueError("two keys of a dict become the same name")
        return named
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [jsonable(item) for item in sorted(value, key=repr)]
    if isinstance(value, (bytes, bytearray)):
        import base64

        return base64.b64encode(value).decode()
    if isinstance(value, codec.DataclassRecord):
        return jsonable(value.fields)
    if isinstance(value, codec.EnumRecord):
        return jsonable(value.value)
    tolist: Any = getattr(value, "tolist", None)  # numpy
    if tolist is None:
        return str(value)
    # Rows of no items cost a plugin nothing: four billion in a reply of 40 bytes.
    rows = math.prod(itertools.takewhile(bool, getattr(value, "shape", ())))
    if not getattr(value, "size", 1) and rows > codec.MAX_NODES:
        raise ValueError(f"an array of no items has {rows} rows")
    return jsonable(tolist())
