"""EnhancedResourceMonitor: the watch of a sandbox's resources, for any process of the caller's, in a thread of its own."""

from __future__ import annotations

import os
import select
import threading
from dataclasses import replace

from sandbox.cgroups import place
from sandbox.config import IsolationConfig, PluginLimitsV2
from sandbox.engine.loop import PollLoop
from sandbox.errors import ResourceError
from sandbox.monitor.sources import CgroupSource, ProcessSource
from sandbox.monitor.watch import Thresholds, Watch, Watched
from sandbox.ns import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.monitor.sources import Source
    from sandbox.violations import SandboxViolation


class EnhancedResourceMonitor:
    """Real-time resource monitoring of a process.

    Numbers come from the process's cgroup if that holds nothing but it and its descendants, else from psutil, which loses
    sight of daemons; `source` says which ("cgroup" or "psutil"). It watches and reports: limits are enforced by sandboxes.
    Safe to use from several threads.

    Args:
        limits: thresholds and limits that are compared with.
        config: `resource_check_interval_seconds` between samples.

    Raises:
        TypeError: an argument is of another class.
    """

    def __init__(self, limits: PluginLimitsV2, config: IsolationConfig) -> None:
        for name, value, kind in (("limits", limits, PluginLimitsV2), ("config", config, IsolationConfig)):
            if not isinstance(value, kind):
                raise TypeError(f"EnhancedResourceMonitor: {name} is a {type(value).__name__}: give a {kind.__name__}")
        self.limits = limits
        self.config = config
        self.source = ""
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._loop: PollLoop | None = None
        self._run: Watched | None = None
        self._thread: threading.Thread | None = None
        self._stop = (-1, -1)
        self._stats: dict[str, Any] = {}
        self._violations: list[SandboxViolation] = []

    def start_monitoring(self, process_id: int | None = None) -> None:
        """Watch `process_id` (this process if None) and its descendants, until it ends or `stop_monitoring`.

        Raises:
            ResourceError: there is no such process.
            RuntimeError: it is monitoring already.
        """
        with self._lock:
            if self._thread is not None:
                raise RuntimeError("this monitor is running: stop_monitoring() first, or use another one")
            pid = os.getpid() if process_id is None else process_id
            if isinstance(pid, bool) or not isinstance(pid, int):
                raise TypeError(f"EnhancedResourceMonitor: process_id is a {type(pid).__name__}: give the pid of a process")
            try:
                process = os.pidfd_open(pid)
            except (OSError, OverflowError):
                raise ResourceError(f"there is no process {pid} to monitor: give the pid of one that runs") from None
            source = source_of(pid, process)
            self.source = source.name
            self._violations.clear()
            loop = self._loop = PollLoop()
            self._watch = Watch(loop, source, Thresholds.of_limits(self.limits), self.config.resource_check_interval_seconds)
            self._watch.counted = source.events()
            self._watch.on_sample = self._stats.update
            self._watch.on_violation = self._record
            self._stop = os.pipe2(os.O_CLOEXEC)
            stopped = threading.Event()
            loop.add_reader(self._stop[0], stopped.set)
            self._run = self._watch.begin()
            self._watch.sample()
            self._thread = threading.Thread(
                target=loop.run_until, args=(stopped.is_set,), name="psie monitor", daemon=True
            )  # fmt: skip
            self._thread.start()

    def _record(self, violation: SandboxViolation) -> None:
        if violation.explanation is not None:  # nothing is enforced here, and no command started it
            violation.explanation = replace(violation.explanation, flag=None, refused=False)
        self._violations.append(violation)

    def stop_monitoring(self) -> None:
        """End the watch; the last numbers and violations stay. Does nothing where none runs."""
        with self._lock:
            if self._thread is None or self._watch is None or self._run is None or self._loop is None:
                return
            os.write(self._stop[1], b"\0")
            self._thread.join()
            self._watch.end(self._run)
            self._watch.close()
            self._loop.close()
            for fd in self._stop:
                os.close(fd)
            self._thread = self._watch = self._run = self._loop = None

    def get_current_stats(self) -> dict[str, Any]:
        """Numbers of this moment, or the last ones where nothing runs: see sandbox.monitor.watch.Watch for the fields.

        Empty before `start_monitoring`.
        """
        with self._lock:
            reading = self._watch.source.read() if self._watch is not None else None
            if self._watch is not None and reading is not None:
                return self._watch.describe(reading)
            return dict(self._stats)

    def check_violations(self) -> list[SandboxViolation]:
        """The violations since `start_monitoring`, oldest first: limits and thresholds passed, each once."""
        return list(self._violations)


def source_of(pid: int, process: int) -> Source:
    """The process's cgroup if nothing else is in it, else the process and its descendants.

    Takes over `process`, its pidfd: its number may be another's when it has ended.
    """

    ended = select.poll()  # select(2) knows no descriptors above 1023, which a process with many sandboxes has
    ended.register(process, select.POLLIN)

    def tree() -> list[int]:
        pids = processes.tree(pid)
        return pids if not ended.poll(0) else []

    path = place.own_path(pid)
    folder = place.mount_point() + path
    if path not in ("", "/") and "/../" not in path + "/":
        try:
            source = CgroupSource(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError:
            pass  # another cgroup namespace's path, or not ours to see
        else:
            if source.has("memory") and set(source.pids()) <= set(tree()):
                os.close(process)
                return source
            source.close()
    return ProcessSource(tree, lambda: os.close(process))
