"""What `site` does at an interpreter's start, done when something of it is first needed: `psie run` mostly needs none of it.

The script `psie` starts Python with -I -S. Must import nothing at its top: it is on the start path of the command.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Variables that say where packages lie.
VARIABLES = ("PYTHONPATH", "PYTHONNOUSERSITE")


class Finder:
    """The last of the finders: where no other has found a module, it may be an installed package."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        make_up()
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, path, target)


def begin() -> None:
    """To be called once, where the interpreter was started without `site`."""
    sys.meta_path.append(Finder)


def make_up() -> None:
    """sys.path and sys.prefix as an interpreter has them that was started with no option, but the caller's folder on it."""
    if Finder not in sys.meta_path:
        return
    sys.meta_path.remove(Finder)
    import site

    site.ENABLE_USER_SITE = not os.environ.get("PYTHONNOUSERSITE")
    site.main()
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.path.abspath(path) for path in own if path]


def places() -> list[str]:
    """Folders and files on which it depends where packages lie, after `make_up`."""
    site = sys.modules.get("site")
    if site is None:
        return []
    found = [*site.getsitepackages(), site.getusersitepackages()]
    return [*found, os.path.join(sys.prefix, "pyvenv.cfg")]
