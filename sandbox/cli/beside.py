"""The settings beside a plugin's file: `psie.toml`, and `pyproject.toml` if it has a table [tool.psie].

Whoever made the plugin may have made them. So they count as settings only if a person has accepted them as they are (see
sandbox.trusted); else they can only make what the plugin gets less. What is there is opened as hostile: a link or a FIFO is no
file of settings. Must be light: it is on the start path of `psie run`.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

OWN, PROJECT = "psie.toml", "pyproject.toml"
MARK = b"[tool.psie"
MOST = 1 << 20  # bytes


class Found:
    """A file of settings beside a plugin: `path`, `content`, and whether a person `is_accepted` it."""

    def __init__(self, path: str, content: bytes) -> None:
        from sandbox import trusted  # most plugins have no such file

        self.path = path
        self.content = content
        self.is_accepted = trusted.is_accepted(path, content)

    @property
    def name(self) -> str:
        """How its messages begin: what a person knows it by."""
        shown = shown_path(self.path)
        return f"{shown}, [tool.psie]" if self.is_project else shown

    @property
    def is_project(self) -> bool:
        return os.path.basename(self.path) == PROJECT

    def says_something(self) -> bool:
        """Whether it is there for psie. A pyproject.toml that is no TOML is none of our business, unless it looks like that."""
        if not self.is_project or MARK in self.content:
            return True
        if b"psie" not in self.content:
            return False
        from sandbox.config import ConfigError

        try:
            return "psie" in self._document().get("tool", {})
        except (ConfigError, TypeError):
            return False

    def _document(self) -> dict[str, Any]:
        from sandbox import config

        return config.parse_toml(self.name, config.decoded(self.name, self.content))

    def tables(self) -> dict[str, dict[str, Any]]:
        """What it says, checked. Raises ConfigError."""
        from sandbox import config

        document = self._document()
        if self.is_project:
            tools = document.get("tool", {})
            document = tools.get("psie", {}) if isinstance(tools, dict) else {}
            if not isinstance(document, dict):
                raise config.ConfigError(f"{self.name} is no table: give it [tool.psie.limits] and the like")
        try:
            return config.tables_of(self.name, document)
        except config.ConfigError as error:
            raise config.ConfigError(self._as_named_here(str(error))) from None

    def _as_named_here(self, text: str) -> str:
        """A sentence about tables, which in a pyproject.toml have longer names: under others nobody would look at them."""
        for table in ("isolation", "limits", "permissions") if self.is_project else ():
            text = text.replace(f"[{table}]", f"[tool.psie.{table}]")
        return text


def shown_path(path: str) -> str:
    from sandbox.text import escape_text

    return escape_text(path, keep="")


def find(given: Mapping[str, Any]) -> list[Found]:
    """Those that count for these options, the weaker first; none with --config, which takes their place.

    Raises ConfigError for one that cannot be read, ResourceError for damaged records of what was accepted.
    """
    file = given.get("file") or str(given.get("target") or "").rpartition(":")[0]
    if given.get("config") is not None or not file:
        return []
    folder = os.path.dirname(os.path.abspath(file))
    found = []
    for name in (PROJECT, OWN):
        path = os.path.join(folder, name)
        content = read(path, file)
        if content is not None:
            each = Found(path, content)
            if each.says_something():
                found.append(each)
    return found


def read(path: str, plugin: str | None = None) -> bytes | None:
    """The bytes of a regular file; None where there is none.

    Of somebody who is neither we nor root nor the owner of the `plugin`, it is nobody's: in a folder such as /tmp others could
    stop whatever they like by it.
    """
    try:
        status = os.lstat(path)
        if plugin is not None and status.st_uid not in (0, os.getuid(), os.stat(plugin).st_uid):
            return None
        if stat.S_ISLNK(status.st_mode) and os.path.basename(path) == OWN:
            raise refusal(path, "it is a link: remove it, or name what it leads to with --config")
        if not stat.S_ISREG(status.st_mode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if os.path.basename(path) == PROJECT:
            return None  # it is there for others
        raise refusal(path, error.strerror or "") from None
    if not os.path.samestat(os.fstat(fd), status):  # another one by now
        os.close(fd)
        return None
    with open(fd, "rb") as file:
        return file.read(MOST + 1)


def refusal(path: str, reason: str) -> Exception:
    from sandbox.config import ConfigError

    return ConfigError(f"{shown_path(path)} cannot be read: {reason}")
