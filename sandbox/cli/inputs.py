"""The options of a run that name things of the caller: variables and paths. Checked at every run, so light."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

OWN_PLACES = ("/", "/run", "/tmp", "/var/tmp", "/workspace")  # a sandbox has its own


class UsageError(ValueError):
    """A mistake on the command line: one sentence with the mend. Status 125."""


def environment(entries: tuple[str, ...]) -> dict[str, str]:
    """--env NAME=VALUE, or --env NAME for one of the caller's own."""
    variables = {}
    for entry in entries:
        name, has_value, value = entry.partition("=")
        if not name:
            raise UsageError(f"--env {entry}: give NAME or NAME=VALUE")
        if not has_value:
            if name not in os.environ:
                raise UsageError(f"--env {name}: there is no such variable in your environment: give {name}=VALUE")
            value = os.environ[name]
        variables[name] = value
    return variables


def absolute(option: str, path: str) -> str:
    """An empty path would be the working directory, which nobody has named: a variable that is not set, say."""
    if not path:
        raise UsageError(f"{option} is empty: give a path, or leave it out")
    return os.path.realpath(path)


def absent(path: str, what: str, mend: str = "check the path") -> str:
    """Why nothing was found at `path`, with the mend."""
    try:
        os.stat(path)
    except PermissionError:
        return "you may not look into a folder that it lies in: see to the rights of that one"
    except (OSError, ValueError):
        pass
    return f"there is no such {what}: {mend}"


def refuse_own(option: str, path: str, full: str) -> None:
    if full in OWN_PLACES or full.split("/")[1] in ("proc", "sys", "dev"):
        raise UsageError(f"{option} {path}: a sandbox has its own {full}: give a folder of files")


def writable(paths: tuple[str, ...]) -> tuple[str, ...]:
    """--rw folders, absolute; each must be there, and the caller must be able to change it."""
    found = []
    for path in paths:
        full = absolute("--rw", path)
        if not os.path.exists(full):
            raise UsageError(f"--rw {path}: {absent(full, 'folder', 'make it first, or check the path')}")
        if not os.path.isdir(full):
            raise UsageError(f"--rw {path}: this is no folder: give the one that it lies in")
        refuse_own("--rw", path, full)
        if not os.access(full, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(f"--rw {path}: you may not change it yourself: chmod it, or leave it out")
        found.append(full)
    return tuple(found)


def readable(paths: tuple[str, ...]) -> list[str]:
    """--ro paths, absolute; each must be there and readable, and something that can be shown in a sandbox."""
    found = []
    for path in paths:
        full = absolute("--ro", path)
        if not os.path.exists(full):
            raise UsageError(f"--ro {path}: {absent(full, 'file or folder')}")
        if not os.access(full, os.R_OK):
            raise UsageError(f"--ro {path}: you may not read it yourself: chmod it, or leave it out")
        refuse_own("--ro", path, full)
        found.append(full)
    return found


def start(path: str | None, shown: Sequence[str]) -> str | None:
    """--chdir DIR, absolute; `shown`: the --ro and --rw paths. What lies on the way to one of them is there too."""
    if path is None:
        return None
    full = absolute("--chdir", path)
    if not os.path.isdir(full):
        raise UsageError(f"--chdir {path}: {absent(full, 'folder')}")
    refuse_own("--chdir", path, full)
    if not any(f"{each}/".startswith(full + "/") or full.startswith(each + "/") for each in shown):
        raise UsageError(f"--chdir {path}: the plugin does not see it: show it with --ro {path}, or --rw {path}")
    return full
