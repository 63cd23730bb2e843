"""Which plugins lie in a plugin folder. One that is broken is listed with what is wrong, and hides no other.

Reads names and manifests only; whoever runs or checks a plugin reads all of it by files.read. Host side.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sandbox.errors import PluginError
from sandbox.plugins import files, manifest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox.plugins.manifest import Manifest

MOST_NAMES = 100_000  # in a plugin folder


@dataclass(frozen=True)
class Found:
    """One plugin of a folder.

    Attributes:
        id: its id; where it is none, the name as it stands there: then `error` says so. Escape it before a person sees it.
        path: of the file or folder, beneath the plugin folder's path as it was given.
        manifest: what it says of itself; None where that is wrong.
        error: what is wrong, None if nothing is: a PluginError or ManifestError.
    """

    id: str
    path: str
    manifest: Manifest | None = None
    error: PluginError | None = None


def discover(plugin_dir: str | os.PathLike[str]) -> list[Found]:
    """All plugins in a folder, by id.

    What begins with a dot, `__pycache__`, files that do not end in .py, and folders without a main file, manifest or
    signature are no plugins.

    Raises:
        PluginError: the folder itself cannot be read.
    """
    folder = files.open_folder(plugin_dir)
    try:
        names = os.listdir(folder)
        if len(names) > MOST_NAMES:
            files.refuse(os.fspath(plugin_dir), f"holds more than {MOST_NAMES:,} names: give a folder of plugins")
        paths: dict[str, str] = {}
        for name in sorted(names):
            if name.startswith(".") or name == "__pycache__":
                continue
            if name.endswith(".py"):
                paths.setdefault(name.removesuffix(".py"), name)
            elif files.is_folder_plugin(folder, name):
                paths[name] = name
        return [_found(folder, plugin_id, os.path.join(plugin_dir, paths[plugin_id])) for plugin_id in sorted(paths)]
    finally:
        os.close(folder)


def _found(folder: int, plugin_id: str, path: str) -> Found:
    try:
        said = files.read_manifest(folder, plugin_id)
        return Found(plugin_id, path, manifest.parse(plugin_id, *said) if said else manifest.Manifest(plugin_id))
    except PluginError as error:
        return Found(plugin_id, path, error=error)
