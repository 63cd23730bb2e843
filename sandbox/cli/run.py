"""`psie run FILE`: run a file in a sandbox as `python FILE ARGS` would.

The order of the imports is part of the design: a zygote is started before anything else is imported.
"""

from __future__ import annotations

import os
import sys

from sandbox.engine import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any

FAILED = 125
SIBLINGS = 200  # files and packages beside the plugin that it may import


class Failed(Exception):
    """psie itself cannot do it: one sentence, status 125."""


def run(given: dict[str, Any]) -> int:
    """Run it and return the exit status."""
    started = spawn_early(given["level"])
    from sandbox.cli import session

    try:
        return session.run(given, started)
    except Failed as failure:
        return session.complain(failure)


def spawn_early(level: str | None) -> tuple[int, _socket.socket, bool] | None:
    """A zygote before the recipe is known: its one question is whether it needs an outer user namespace."""
    level = level or os.environ.get("SANDBOX_ISOLATION_LEVEL") or "standard"
    outer = os.getuid() != 0 and level.lower() != "minimal"
    try:
        return (*spawn.spawn_zygote(sys.executable, outer_user_namespace=outer), outer)
    except FileNotFoundError:
        return None  # the host's facts will say so


def plugin_path(file: str) -> str:
    """The absolute path of the plugin. Raises Failed for what is no readable file."""
    if not os.path.exists(file):
        raise Failed(f"{file}: there is no such file: check the path")
    if os.path.isdir(file):
        raise Failed(f"{file} is a directory: give the Python file in it")
    return os.path.abspath(file)


def source_of(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Failed(f"{path} cannot be read: {error.strerror}") from None


def siblings(path: str) -> list[str]:
    """What the plugin may import from beside it: modules and packages; not whatever else lies in that folder."""
    folder = os.path.dirname(os.path.realpath(path))
    found = [os.path.realpath(path)]
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_module = entry.name.endswith((".py", ".so")) and entry.is_file()
                if is_module or os.path.isfile(os.path.join(entry.path, "__init__.py")):
                    found.append(entry.path)
                if len(found) > SIBLINGS:
                    return found[:1]
    except OSError:
        return found[:1]
    return found
