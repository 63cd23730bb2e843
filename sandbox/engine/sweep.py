"""Removes what sandboxes have left that died together with their caller and their zygote: cgroups and workspace folders.

Both are named by places of the ledger. A place that nobody holds is taken while its leftovers are removed, so that no new
sandbox can get it meanwhile. Host side only.
"""

from __future__ import annotations

import os

from sandbox import state
from sandbox.cgroups import leaf
from sandbox.ns import userids, workspace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def leaves(folder: int) -> list[str]:
    """Remove the stale cgroups in the open folder of leaves; returns their names."""
    return _remove(folder, leaf.remove)


def workspaces() -> list[str]:
    """Remove the stale workspace folders of this user; returns their names."""
    path = os.path.join(state.folder("lib", writable=True), "work")
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        return _remove(folder, workspace.remove_folder)
    finally:
        os.close(folder)


def _remove(folder: int, remove: Callable[[int, str], None]) -> list[str]:
    removed = []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]  # a cgroup has dozens of files
    for name in names:
        slot = userids.hold(name)
        if slot is None:
            continue
        try:
            remove(folder, name)
            removed.append(name)
        except OSError:
            continue  # somebody else removes it at this moment, or it is not ours
        finally:
            slot.release(for_all=True)
    return removed
