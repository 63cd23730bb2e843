"""Orders system calls of psie's engine to fail: see faulty.c, which is built here and loaded into zygotes that tests start.

Zygotes inherit it to their wardens, inits, workers and supervisors. Must not know what a test expects of a failure.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.engine import service
from sandbox.ns import syscalls as sc

HERE = Path(__file__).parent
CALLS = 1024  # as in faulty.c
HEAD = struct.Struct("=6i")  # call, error, skip, hits, hitter, ran
COUNTS = struct.Struct(f"={CALLS}i")
NONE = -1


class Injector:
    """The orders, in memory that is shared with every process that was started through `loaded`."""

    def __init__(self, folder: Path) -> None:
        """Raises CalledProcessError, FileNotFoundError without gcc."""
        self.library = folder / "faulty.so"
        source = HERE / "faulty.c"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", self.library, source, "-ldl"], check=True)
        self.file = folder / "orders"
        self.file.write_bytes(HEAD.pack(NONE, 0, 0, 0, 0, 0) + bytes(COUNTS.size))
        with self.file.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)
        self.counts: tuple[int, ...] | None = None  # as they were when `rest` was called first

    def close(self) -> None:
        self.memory.close()

    def fail(self, call: str, error: int, skip: int = 0) -> None:
        """The next `call` fails with `error`, after `skip` more that succeed; all counts start again."""
        self.count_anew()
        self._write(NONE, error, skip)
        self.memory[:4] = struct.pack("=i", sc.number(call))

    def rest(self) -> None:
        """Nothing fails from now on, and nothing more is counted."""
        if self.counts is None:
            self.counts = COUNTS.unpack_from(self.memory, HEAD.size)
        self.memory[:4] = struct.pack("=i", NONE)

    def count_anew(self) -> None:
        """All counts start again, until `rest`."""
        self.counts = None
        self._write(NONE, 0, 0)
        self.memory[HEAD.size :] = bytes(COUNTS.size)

    def _write(self, call: int, error: int, skip: int) -> None:
        self.memory[:4] = struct.pack("=i", NONE)
        self.memory[: HEAD.size] = HEAD.pack(call, error, skip, 0, 0, self.ran)

    @property
    def hits(self) -> int:
        return int(HEAD.unpack_from(self.memory)[3])

    @property
    def ran(self) -> int:
        """How often `plugin` has run so far."""
        return int(HEAD.unpack_from(self.memory)[5])

    def count(self, call: str) -> int:
        """How often it was called before `rest`."""
        assert self.counts is not None
        return self.counts[sc.number(call)]

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Zygotes that start meanwhile have it; those before and after have not."""
        spawn = os.posix_spawn
        more = {"LD_PRELOAD": str(self.library), "FAULTY_ORDERS": str(self.file)}

        def spawn_with(path: Any, arguments: Any, environment: Any, **options: Any) -> int:
            return spawn(path, arguments, {**environment, **more}, **options)

        service.shut_down()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "posix_spawn", spawn_with)
            try:
                yield
            finally:
                service.shut_down()


def plugin(value: int) -> int:
    """Counts itself where the injector's library is loaded, and shows that it has run."""
    import ctypes

    ctypes.CDLL(None).faulty_plugin_runs()
    return value


class Table:
    """Faults and what came of them, counted: a row for each fault, a column for each way in which it happened."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, Counter[str]]] = {}

    def add(self, fault: str, way: str, came: str) -> None:
        self.cells.setdefault(fault, {}).setdefault(way, Counter())[came] += 1

    def lines(self) -> list[str]:
        width = max(map(len, self.cells), default=0)
        rows = []
        for fault, ways in sorted(self.cells.items()):
            told = (
                f"{way}: " + ", ".join(f"{count} {came}" for came, count in sorted(counts.items()))
                for way, counts in sorted(ways.items())
            )
            rows.append(f"{fault:{width}}  {'; '.join(told)}")
        return rows


TABLE = Table()


def refused_plugin(value: int) -> int:
    """As `plugin`, and has a supervisor started by a call that is refused."""
    import contextlib
    import ctypes
    import os

    with contextlib.suppress(OSError):
        os.chroot("/")
    ctypes.CDLL(None).faulty_plugin_runs()
    return value


class HostFault:
    """Makes a function of the caller's own process fail once, where the engine's thread calls it."""

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.name = name
        self.count = 0
        self.hits = 0
        self._error = 0
        self._skip = -1  # nothing fails

    def fail(self, error: int, skip: int) -> None:
        self.count = self.hits = 0
        self._error, self._skip = error, skip

    def rest(self) -> None:
        self._skip = -1

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        original = getattr(self.module, self.name)

        def replacement(*args: Any, **options: Any) -> Any:
            if threading.current_thread().name == "psie engine":
                self.count += 1
                if self._skip >= 0 and self.count == self._skip + 1:
                    self.hits += 1
                    raise OSError(self._error, os.strerror(self._error))
            return original(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.module, self.name, replacement)
            yield
