"""A plugin's folders, as the host opens them; and the workspace where it is a folder on disk (no mount namespace): its place in
a recipe, and the removal of a plugin's files.

What lies in such a folder is a plugin's, so nothing in it is followed or believed. Upper layers and stages of commits are
removed in the same way. Must be light: the zygote and the warden use it. Elsewhere the workspace is a tmpfs, a mount line like
others, and nothing has to be removed.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def readable(opened: Callable[[int], int], place: int | None = None) -> int:
    """What `opened(flags)` opens, a folder that is a plugin's, for reading; `place` is a descriptor of it as a place, where
    there is one. A plugin may have taken the right to look into it from everybody: its owner has it again then. Raises
    OSError."""
    fd = -1
    try:
        fd = opened(os.O_RDONLY)
        os.stat(".", dir_fd=fd)  # to read it is one right, to go in another
        return fd
    except PermissionError:
        if fd >= 0:
            os.close(fd)
        fd = opened(os.O_PATH) if place is None else os.dup(place)
        try:
            os.chmod(f"/proc/self/fd/{fd}", 0o700)
        finally:
            os.close(fd)
        return opened(os.O_RDONLY)


def open_upper(layers: int, number: int) -> int:
    """What a plugin has changed in a granted folder; `layers` is a descriptor of all. Raises OSError."""
    from sandbox.ns import syscalls as sc

    return readable(lambda how: sc.open_beneath(layers, f"{number}/upper", how | os.O_DIRECTORY))


def place(recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    """The recipe with the places of a workspace that is a folder on disk filled in."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{folder}", folder)
        if isinstance(value, (list, tuple)):
            return [fill(item) for item in value]
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        return value

    return {key: fill(value) for key, value in recipe.items()}


def remove_folder(parent: int, name: str) -> None:
    """Remove the folder `name` below the fd `parent`; links in it are removed, never followed.

    Folders inside it are moved up to its top one by one, so that a tree of any depth needs two fds and no recursion. As root
    it may lie where its owner still lives, who could put a link in a folder's place: no mode is changed by name then.
    """
    may_enter = os.geteuid() == 0
    try:
        top = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return
    try:
        os.fchmod(top, 0o700)
        mark, moved = os.urandom(16).hex(), 0  # a name that the plugin could not foresee
        while folders := unlink_files(top):
            for folder in folders:
                if not may_enter:
                    os.chmod(folder, 0o700, dir_fd=top)
                inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
                try:
                    os.fchmod(inner, 0o700)
                    for deeper in unlink_files(inner):
                        if not may_enter:
                            os.chmod(deeper, 0o700, dir_fd=inner)  # one that nobody may write cannot be moved
                        os.rename(deeper, f"{mark}-{moved}", src_dir_fd=inner, dst_dir_fd=top)
                        moved += 1
                finally:
                    os.close(inner)
                os.rmdir(folder, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def unlink_files(folder: int) -> list[str]:
    """Unlink all in the open folder that is no folder; returns the names of those."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=folder)
    return folders
