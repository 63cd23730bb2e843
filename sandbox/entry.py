"""What the script psie-python runs: the command, or the zygote that comes up beside it, whose imports cost less than others.

Python asks each folder for each module, which takes longer than to run what most of psie's modules have to do when they are
imported. Here it is known where they lie. Executed by its path, before there is a package; nothing else may import it.
"""

from __future__ import annotations

import gc
import os
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER, SourceFileLoader, _compile_bytecode  # type: ignore[attr-defined]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

ROOT = os.path.dirname(os.path.dirname(__file__))
CACHED = f".{sys.implementation.cache_tag}.pyc"
# As py_compile writes them, unless it is asked for hashes: PEP 552.
HEAD = MAGIC_NUMBER + b"\0\0\0\0"


class Loader(SourceFileLoader):
    """Of a module whose bytecode was found together with it."""

    code: CodeType | None = None

    def get_code(self, fullname: str) -> CodeType | None:
        """Only once: who asks again is told by Python."""
        code, self.code = self.code, None
        return code or super().get_code(fullname)


class Finder:
    """Finds psie's own modules that have bytecode which is up to date; all others are found, and compiled, as ever."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "sandbox" and not name.startswith("sandbox."):
            return None
        place = f"{ROOT}/{name.replace('.', '/')}"
        folder, _, last = place.rpartition("/")
        for source, cached in (
            (f"{place}.py", f"{folder}/__pycache__/{last}{CACHED}"),
            (f"{place}/__init__.py", f"{place}/__pycache__/__init__{CACHED}"),
        ):
            try:
                found = os.stat(source)
                fd = os.open(cached, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                data = os.read(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
            if data[:16] != HEAD + _word(int(found.st_mtime)) + _word(found.st_size):
                return None
            loader = Loader(name, source)
            loader.code = _compile_bytecode(memoryview(data)[16:], name, cached, source)
            spec = ModuleSpec(name, loader, origin=source, is_package=source.endswith("/__init__.py"))
            spec.cached, spec.has_location = cached, True
            if spec.submodule_search_locations is not None:
                spec.submodule_search_locations.append(place)
            return spec
        return None


def _word(number: int) -> bytes:
    return (number & 0xFFFFFFFF).to_bytes(4, "little")


gc.disable()  # nothing here lives long enough for a collection to pay
sys.meta_path.insert(0, Finder)
if sys.argv[1:2] == ["--zygote"]:
    from sandbox.engine import meeting

    caller = int(sys.argv[2])
    listener = meeting.listen(caller)  # before anything else: what it is to set up can wait there
    from sandbox.engine.zygote import come

    sys.meta_path.remove(Finder)  # the plugins' own imports are to be any Python's
    come(listener, caller)
else:
    from sandbox.cli import main

    main()
