"""Where resource numbers come from: a cgroup that holds just what is watched, or the processes themselves.

A source is asked for a Reading; what has ended or is not there reads as None. Must not know limits or sandboxes.
"""

from __future__ import annotations

import os
import threading
from time import monotonic

from sandbox.cgroups.controllers import Cpu, Folder, Io, Memory, Tasks, V2Controller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    import psutil

    class Source(Protocol):
        """What a watch reads. `name` says what it is, for people."""

        name: str

        def read(self) -> Reading | None: ...
        def events(self) -> dict[str, int]: ...
        def event_files(self) -> list[str]: ...
        def pressure(self) -> int: ...
        def pids(self) -> list[int]: ...
        def close(self) -> None: ...


MB = 1 << 20
# Processes that waited for memory for a tenth of the time. Two seconds is the shortest window without CAP_SYS_RESOURCE.
STALL_USEC, STALL_WINDOW_USEC = 200_000, 2_000_000


class Reading:
    """Numbers at one moment; None where nobody counts them. Bytes, microseconds of CPU, counts; pressure in percent."""

    def __init__(self) -> None:
        self.when = monotonic()
        self.memory: int | None = None
        self.memory_peak: int | None = None
        self.cpu_usec: int | None = None
        self.throttled: int | None = None  # periods in which the CPU limit struck
        self.tasks: int | None = None
        self.processes: int | None = None
        self.io_read: int | None = None
        self.io_write: int | None = None
        self.memory_pressure: float | None = None


class CgroupSource:
    """A cgroup. Files of controllers that it does not have are left out."""

    def __init__(self, fd: int) -> None:
        """Takes over `fd`, an open cgroup folder."""
        self.folder = Folder(fd)
        self.name = "cgroup"
        self.memory, self.cpu, self.io = Memory(self.folder), Cpu(self.folder), Io(self.folder)
        self.tasks, self.core = Tasks(self.folder), V2Controller(self.folder)

    def has(self, controller: str) -> bool:
        return os.access(f"{self.folder.full_path}/{controller}.events", os.R_OK)

    def read(self) -> Reading | None:
        reading = Reading()
        try:
            reading.processes = len(self._pids())
        except OSError:
            return None  # it has been removed
        reading.memory = _get(lambda: self.memory.current)
        reading.memory_peak = _get(lambda: self.memory.peak)
        reading.tasks = _get(lambda: self.tasks.current)
        cpu = _get(lambda: self.cpu.stat) or {}
        reading.cpu_usec, reading.throttled = cpu.get("usage_usec"), cpu.get("nr_throttled")
        devices = _get(lambda: self.io.stat)
        if devices is not None:
            reading.io_read = sum(int(device.get("rbytes", 0)) for device in devices.values())
            reading.io_write = sum(int(device.get("wbytes", 0)) for device in devices.values())
        pressure = _get(lambda: self.memory.pressure) or {}
        if "some" in pressure:
            reading.memory_pressure = float(pressure["some"]["avg10"])
        return reading

    def events(self) -> dict[str, int]:
        """What the kernel has counted so far, as `memory.events high` and the like."""
        found = {}
        for name, read in (("memory.events", lambda: self.memory.events), ("pids.events", lambda: self.tasks.events)):
            for key, value in (_get(read) or {}).items():
                found[f"{name} {key}"] = value
        return found

    def event_files(self) -> list[str]:
        """Paths of the files that change when an event is counted."""
        names = ("memory.events", "pids.events", "cgroup.events")
        return [path for path in (f"{self.folder.full_path}/{name}" for name in names) if os.path.exists(path)]

    def pressure(self) -> int:
        """An fd that tells POLLPRI when what is in the cgroup has waited long for memory; -1 where nobody tells."""
        try:
            return self.folder.arm("memory.pressure", f"some {STALL_USEC} {STALL_WINDOW_USEC}")
        except OSError:
            return -1

    def pids(self) -> list[int]:
        return _get(self._pids) or []

    def _pids(self) -> list[int]:
        """Of the cgroup and of those right below it: a sandbox without a PID namespace has one for each call."""
        found: list[int] = self.core.pids
        if os.fstat(self.folder.fd).st_nlink == 2:
            return found  # nothing below: looking would take longer than all the rest
        for entry in os.scandir(self.folder.fd):
            if entry.is_dir(follow_symlinks=False):
                try:
                    with open(f"{self.folder.full_path}/{entry.name}/cgroup.procs") as file:
                        found += [int(pid) for pid in file]
                except OSError:
                    continue
        return found

    def warn_at(self, value: int) -> bool:
        """Set memory.high (bytes): an event is counted above it, and those above it are slowed down.

        Returns whether: not where more is used by now, for no event would tell more than a sample, and the kernel would have
        us reclaim memory.
        """
        used = _get(lambda: self.memory.current)
        if used is None or used >= value:
            return False
        setattr(self.memory, "high", value)  # noqa: B010  (a descriptor of an untyped package)
        return True

    def close(self) -> None:
        self.folder.close()


class ProcessSource:
    """Processes by psutil: what they have of their own, without what they share with others. Nobody counts events."""

    def __init__(self, pids: Callable[[], list[int]], close: Callable[[], None] = lambda: None, inherited: int = 0) -> None:
        """`pids()` tells the processes that are meant, each time; `inherited` are the bytes that each of them shares with the
        process that it is a fork of, and that count as its own where nobody knows better."""
        self.pids = pids
        self.inherited = inherited
        self.close = close
        self.name = "psutil"
        self.known: dict[int, psutil.Process] = {}  # of the last reading: making them again takes as long as asking them
        self.cpu_of: dict[int, float] = {}  # seconds, also of those that have ended since
        self.turn = threading.Lock()  # a monitor's thread reads, and whoever asks for the numbers of this moment

    def read(self) -> Reading | None:
        with self.turn:
            return self._read()

    def _read(self) -> Reading | None:
        pids = self.pids()
        if not pids:
            return None
        import psutil

        reading = Reading()
        memory = tasks = processes = io_read = io_write = 0
        before, self.known = self.known, {}
        for pid in pids:
            try:
                process = self.known[pid] = before.get(pid) or psutil.Process(pid)
                with process.oneshot():
                    info, times = process.memory_info(), process.cpu_times()
                    memory += max(0, info.rss - info.shared - self.inherited)
                    tasks += threads_of(pid)
                    self.cpu_of[pid] = times.user + times.system
                processes += 1
                counted = process.io_counters()
                io_read, io_write = io_read + counted.read_bytes, io_write + counted.write_bytes
            except (psutil.Error, OSError):
                continue  # it has ended, or is another user's
        if not processes:
            return None
        reading.memory, reading.tasks, reading.processes = memory, tasks, processes
        reading.cpu_usec = int(sum(self.cpu_of.values()) * 1e6)
        reading.io_read, reading.io_write = io_read, io_write
        return reading

    def events(self) -> dict[str, int]:
        return {}

    def event_files(self) -> list[str]:
        return []

    def pressure(self) -> int:
        return -1


class Nothing:
    """Stands for a source while nothing runs."""

    name = "nothing"

    def read(self) -> Reading | None:
        return None

    def events(self) -> dict[str, int]:
        return {}

    def event_files(self) -> list[str]:
        return []

    def pressure(self) -> int:
        return -1

    def pids(self) -> list[int]:
        return []

    def close(self) -> None:
        return


def describe(pids: list[int]) -> list[dict[str, Any]]:
    """The processes as plain data: pid, ppid, name, status, threads, started (a POSIX time). Names are the plugin's."""
    import psutil

    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                found.append(
                    {
                        "pid": pid,
                        "ppid": process.ppid(),
                        "name": process.name(),
                        "status": process.status(),
                        "threads": threads_of(pid),
                        "started": process.create_time(),
                    }
                )
        except (psutil.Error, OSError):
            continue
    return found


def threads_of(pid: int) -> int:
    """By proc_pid_stat(5). psutil looks for "Threads:" in the status file, where a process can have it as its name."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[17])


def _get(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, ValueError):
        return None  # no such controller, or the cgroup has gone
