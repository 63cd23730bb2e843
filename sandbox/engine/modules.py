"""allowed_modules and blocked_modules: a convenience inside the worker, never the boundary (that is the kernel).

Binds the imports that the plugin's own code makes; what the standard library and installed packages import among
themselves is free, or nothing but the smallest list would work. Imported only where a plugin has such a list.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType, ModuleType


TEXT = 1000  # characters of a name that are reported
OWN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")  # psie need not be installed as a library


class Finder:
    """First on sys.meta_path, and asked by `__import__`, which alone sees the import of a module that is loaded already."""

    def __init__(
        self, allowed: Sequence[str], blocked: Sequence[str], report: Callable[[dict[str, object]], None] = lambda fields: None
    ) -> None:
        """`report` is told of each refusal: module, the list that refuses it, file and line of the import.

        To be made before the plugin's own folder is on sys.path: what is there then are libraries.
        """
        self.allowed = frozenset(allowed)
        self.blocked = frozenset(blocked)
        self.libraries = (*(os.path.join(path, "") for path in sys.path), OWN, "<frozen")
        self.report = report
        self.original = builtins.__import__
        self.original_module = importlib.import_module

    def check(self, name: str, frame: FrameType) -> None:
        """Raise ModuleNotFoundError if the code of `frame` may not import `name`."""
        if frame.f_code.co_filename.startswith(self.libraries):
            return
        names = {name[:end] for end in (*(i for i, c in enumerate(name) if c == "."), len(name))}
        if names & self.blocked:
            self.refuse(name, "blocked_modules", frame)
            raise ModuleNotFoundError(f"module {name} is blocked by PluginPermissionsV2.blocked_modules", name=name)
        if self.allowed and not names & self.allowed:
            self.refuse(name, "allowed_modules", frame)
            raise ModuleNotFoundError(f"module {name} is not in PluginPermissionsV2.allowed_modules", name=name)

    def refuse(self, name: str, which: str, frame: FrameType) -> None:
        where = {"file": frame.f_code.co_filename[:TEXT], "line": frame.f_lineno}
        self.report({"module": name[:TEXT], "list": which, **where})

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(("<frozen importlib", importlib.__file__)):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename != __file__:
            self.check(name, frame)

    def import_(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level == 0:
            self.check(name, sys._getframe(1))
        return self.original(name, globals, locals, fromlist or (), level)

    def import_module(self, name: str, package: str | None = None) -> ModuleType:
        """In the place of importlib's, which asks nobody about a module that is loaded already."""
        if not name.startswith("."):
            self.check(name, sys._getframe(1))
        return self.original_module(name, package)


def bind_imports(allowed: Sequence[str], blocked: Sequence[str], report: Callable[[dict[str, object]], None]) -> None:
    finder = Finder(allowed, blocked, report)
    sys.meta_path.insert(0, finder)
    builtins.__import__ = finder.import_
    importlib.import_module = finder.import_module
