"""On which line of a manifest a key stands: neither tomllib nor json tells.

For messages only: it is given text that has been parsed, and decides on nothing. It must not know what keys mean.
Sources: the TOML 1.0 specification, RFC 8259.
"""

from __future__ import annotations

import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

Path = tuple[str, ...]

_TOML = re.compile(
    r"""(?P<skip>[ \t\r]+|\#[^\n]*)
    |(?P<text>\"{3}(?:[^\\]|\\.)*?\"{3,5}|'{3}.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')
    |(?P<word>[A-Za-z0-9_-]+)
    |(?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)
_JSON = re.compile(r"""(?P<skip>[^"{}\[\],:\n]+)|(?P<text>"(?:[^"\\]|\\.)*")|(?P<mark>.)""", re.VERBOSE | re.DOTALL)


def toml_keys(text: str) -> Iterator[tuple[Path, int]]:
    """(path, line from 1 on) of each key and header of a TOML document. Keys in inline tables are left out: they stand on
    the line of their table."""
    table: Path = ()
    path: list[str] = []
    line, depth, in_key = 1, 0, True
    for found in _TOML.finditer(text):
        kind, token = found.lastgroup, found.group()
        if kind == "mark" and token == "\n" and depth <= 0:  # below 0 after [[table]]
            path, depth, in_key = [], 0, True
        elif in_key and kind in ("word", "text"):
            path.append(_unquoted(token))
        elif in_key and token == "]" and path:
            table = tuple(path)
            yield table, line
            in_key = False
        elif in_key and token == "=":
            yield (*table, *path), line
            in_key = False
        elif not in_key and kind == "mark":
            depth += (token in "[{") - (token in "]}")
        line += token.count("\n")


def _unquoted(token: str) -> str:
    """A key as it counts. TOML's escapes are JSON's, but for \\UXXXXXXXX: such a key is not found, and so has no line."""
    if token[0] != '"':
        return token.strip("'")
    try:
        return str(json.loads(token))
    except ValueError:
        return token


def json_keys(text: str) -> Iterator[tuple[Path, int]]:
    """(path, line from 1 on) of each key of a JSON document, as often as it is there; lists are no part of a path."""
    path: list[str] = []
    line, last = 1, ""
    for found in _JSON.finditer(text):
        kind, token = found.lastgroup, found.group()
        if kind == "text":
            last = token
        elif token == ":":
            key = str(json.loads(last, strict=False))
            path[-1:] = [key]
            yield tuple(path), line
        elif token == "{":
            path.append("")
        elif token == "}":
            path.pop()
        line += token.count("\n")
