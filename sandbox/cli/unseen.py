"""What `psie run` says, when the plugin has failed, of files and modules that it does not see: the common first hurdles.

Imported only after a failure. Says nothing of places of which it is not certain that they are hidden.
"""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import sys

from sandbox.recipe import hidden
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandbox.errors import SandboxException
    from sandbox.recipe_data import Recipe

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/dev", "/proc", "/sys", "/workspace")  # shown in part
MOST = 3  # arguments that are spoken of


def lines(arguments: Sequence[str], recipe: Recipe, shown: Sequence[str], start: str | None) -> list[str]:
    """A sentence with the mend for each argument that is a file or folder here and not there.

    `shown`: --ro paths; `start`: where --chdir lets it start, which makes relative names its own business.
    """
    named = [*shown, *(grant["path"] for grant in recipe.granted)]  # below which --chdir may lead, whatever the level shows
    shown = [*named, *(str(mount[1]) for mount in recipe.sandbox_mounts)]
    told = []
    for argument in dict.fromkeys(arguments):
        text = argument.partition("=")[2] if argument.startswith("-") else argument
        path = os.path.realpath(text)
        if not text or not os.path.exists(path):
            continue
        is_hidden = hides(recipe.level, path) and not is_below(path, shown)
        if text.startswith("/") and is_hidden:
            told.append(f"the plugin does not see {quoted(path)}: {ways(path)}")
        elif not text.startswith("/") and start is None:
            told.append(relative(text, path, is_hidden, is_named=is_below(path, named)))
    return told[:MOST]


def relative(text: str, path: str, is_hidden: bool, *, is_named: bool) -> str:
    """How the plugin comes to `path`, which it may have meant by a relative name."""
    if is_below(path, [os.getcwd()]):
        way = f"{'' if is_named else f'show it with --ro {quoted(text)}, and '}start the plugin here by --chdir ."
    else:
        way = f"give it as {quoted(path)}" + (f", and show it: {ways(path)}" if is_hidden else "")
    return f"the plugin's working directory is a private workspace: if {quoted(path)} is meant by {quoted(text)}, {way}"


def wanted(error: SandboxException) -> list[str]:
    """The file that the plugin has ended by not finding. Its own word: no secret is spoken of, whatever it asks for."""
    from sandbox.learn import secret, secret_within

    missing = re.fullmatch(r"\[Errno 2\] No such file or directory: '([^']+)'", getattr(error, "exception_message", ""))
    if getattr(error, "exception_type", "") != "FileNotFoundError" or missing is None or "\\" in missing[1]:
        return []
    path = os.path.realpath(missing[1])
    return [] if secret(path) or (os.path.isdir(path) and secret_within(path)) else [missing[1]]


def module(error: SandboxException) -> str:
    """Where a module would have come from that was not found; "" if that is not how the plugin ended."""
    missing = re.fullmatch(r"No module named '([\w.]+)'", getattr(error, "exception_message", ""))
    if getattr(error, "exception_type", "") != "ModuleNotFoundError" or missing is None:
        return ""
    name = missing[1].partition(".")[0]
    if name in installed():
        return ""
    python = quoted(sys.executable)
    return f"plugins have the packages of the Python that psie is installed in, where no {name} is: {python} -m pip install it"


def installed() -> set[str]:
    """Names of all that can be imported by its first name; nothing is imported for that."""
    return {found.name for found in pkgutil.iter_modules()} | sys.stdlib_module_names


def ways(path: str) -> str:
    """Of a file not its folder: that may be a whole home."""
    change = f", --rw {quoted(path)} change files" if os.path.isdir(path) else ""
    return f"--ro {quoted(path)} lets it read{change}; psie learn finds what it needs"


def quoted(path: str) -> str:
    return escape_text(shlex.quote(path), keep="")


def hides(level: str, path: str) -> bool:
    """Whether a level surely hides it, as long as nothing grants it."""
    if level == "minimal":
        return False
    if level == "standard":
        return is_below(path, hidden())
    return not is_below(path, (*SYSTEM, sys.base_prefix, sys.prefix))


def is_below(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)
