"""The settings beside a plugin's file: `psie.toml`, and `pyproject.toml` if it has a table [tool.psie].

Whoever made the plugin may have made them. So they count as settings only if a person has accepted them as they are (see
sandbox.trusted); else they can only make what the plugin gets less. What is there is opened as hostile: a link or a FIFO is no
file of settings. Must be light: it is on the start path of `psie run`.
"""

from __future__ import annotations

import os
import stat

from sandbox import trusted

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
        self.path = path
        self.content = content
        self.is_accepted = trusted.is_accepted(path, content)

    @property
    def name(self) -> str:
        """How its messages begin: what a person knows it by."""
        from sandbox.text import escape_text

        shown = escape_text(self.path, keep="")
        return f"{shown}, [tool.psie]" if os.path.basename(self.path) == PROJECT else shown

    def tables(self) -> dict[str, dict[str, Any]]:
        """What it says, checked. Raises ConfigError."""
        from sandbox import config

        document: Mapping[str, Any] = config.parse_toml(self.name, config.decoded(self.name, self.content))
        if os.path.basename(self.path) == PROJECT:
            document = document.get("tool", {}).get("psie", {})
            if not isinstance(document, dict):
                raise config.ConfigError(f"{self.name} is no table: give it [tool.psie.limits] and the like")
        return config.tables_of(self.name, document)


def find(given: Mapping[str, Any]) -> list[Found]:
    """Those that count for these options, the weaker first; none with --config, which takes their place.

    Raises ConfigError for one that cannot be read, ResourceError for damaged records of what was accepted.
    """
    file = given.get("file") or str(given.get("target") or "").rpartition(":")[0]
    if given.get("config") or not file:
        return []
    folder = os.path.dirname(os.path.abspath(file))
    found = []
    for name in (PROJECT, OWN):
        path = os.path.join(folder, name)
        content = read(path)
        if content is not None and (name == OWN or MARK in content):
            found.append(Found(path, content))
    return found


def read(path: str) -> bytes | None:
    """The bytes of a regular file; None where there is none, or only somebody else's, which is none of ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if os.path.basename(path) == PROJECT:
            return None  # it may be there for others
        from sandbox.config import ConfigError
        from sandbox.text import escape_text

        reason = "it is a link: remove it, or name what it leads to with --config" if os.path.islink(path) else error.strerror
        raise ConfigError(f"{escape_text(path, keep='')} cannot be read: {reason}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.getuid()):
        os.close(fd)
        return None
    with open(fd, "rb") as file:
        return file.read(MOST + 1)
