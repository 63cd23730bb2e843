"""HTML in which nothing is forgotten to be escaped: a text is a text until a function of this module has made markup of it.

Must not know what is shown.
"""

from __future__ import annotations

import html

from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST = 2000  # characters of one text: a plugin may write any number
WITHOUT_END = ("meta",)


class Markup(str):
    """HTML that is ready to be shown."""

    __slots__ = ()


def text(value: object) -> Markup:
    """As part of a page: nothing in it is markup, or drives or reorders anything; what is too long is cut, and that is said."""
    if isinstance(value, Markup):
        return value
    said = str(value)
    more = len(said) - LONGEST
    if more > 0:
        said = f"{said[:LONGEST]} ... and {more:,} more characters"
    return Markup(html.escape(escape_text(said, keep="")))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Attributes that are None are left out; `class_` is class, an underscore elsewhere a hyphen."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{quoted(value)}"' for key, value in attributes.items() if value is not None
    )
    end = "" if name in WITHOUT_END else f"{joined(children)}</{name}>"
    return Markup(f"<{name}{given}>{end}")


def quoted(value: object) -> str:
    """In an attribute nothing is markup yet."""
    return html.escape(escape_text(str(value), keep=""))


def joined(parts: Iterable[object]) -> Markup:
    return Markup("".join(map(text, parts)))
