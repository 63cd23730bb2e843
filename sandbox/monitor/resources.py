"""EnhancedResourceMonitor: the watch of a sandbox's resources, for any process of the caller's, in a thread of its own."""

from __future__ import annotations

import os
import select
import threading
from contextlib import ExitStack
from dataclasses import replace

from sandbox.cgroups import place
from sandbox.config import IsolationConfig, PluginLimitsV2
from sandbox.engine.client import mend_of
from sandbox.engine.loop import PollLoop
from sandbox.errors import SHORT, ResourceError
from sandbox.monitor.sources import CgroupSource, ProcessSource
from sandbox.monitor.thread import WatchThread
from sandbox.monitor.watch import Thresholds, Watch
from sandbox.ns import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
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
        self._thread: WatchThread | None = None
        self._stats: dict[str, Any] = {}
        self._violations: list[SandboxViolation] = []

    def start_monitoring(self, process_id: int | None = None) -> None:
        """Watch `process_id` (this process if None) and its descendants, until it ends or `stop_monitoring`.

        Raises:
            ResourceError: there is no such process, or no descriptor or thread is left for it.
            RuntimeError: it is monitoring already.
        """
        with self._lock:
            if self._thread is not None:
                raise RuntimeError("this monitor is running: stop_monitoring() first, or use another one")
            pid = os.getpid() if process_id is None else process_id
            if isinstance(pid, bool) or not isinstance(pid, int):
                raise TypeError(f"EnhancedResourceMonitor: process_id is a {type(pid).__name__}: give the pid of a process")
            with ExitStack() as undo:
                try:
                    self._begin(pid, undo)
                except (OSError, OverflowError, RuntimeError) as error:
                    raise ResourceError(why_not(pid, error)) from None

    def _begin(self, pid: int, undo: ExitStack) -> None:
        """`undo` closes what has been opened until something could not be; then the thread does, in which no signal's exception
        comes. Raises OSError, OverflowError, RuntimeError."""
        loop = PollLoop()
        undo.callback(loop.close)
        source = source_of(pid, os.pidfd_open(pid))
        watch = Watch(loop, source, Thresholds.of_limits(self.limits), self.config.resource_check_interval_seconds)
        undo.callback(watch.close)
        self._violations.clear()
        watch.counted = source.events()
        watch.on_sample = self._stats.update
        watch.on_violation = self._record
        run = watch.begin()
        watch.sample()

        def end() -> None:
            try:
                watch.end(run)
            finally:
                watch.close()

        self._thread = WatchThread("psie monitor", loop, undo, end)
        self.source, self._watch = source.name, watch

    def _record(self, violation: SandboxViolation) -> None:
        if violation.explanation is not None:  # nothing is enforced here, and no command started it
            violation.explanation = replace(violation.explanation, flag=None, refused=False)
        self._violations.append(violation)

    def stop_monitoring(self) -> None:
        """End the watch; the last numbers and violations stay. Does nothing where none runs."""
        with self._lock:
            if self._thread is None:
                return
            self._watch = None  # which the thread closes
            self._thread.stop()
            thread, self._thread = self._thread, None  # so that nothing is closed twice
            thread.close()

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

    Takes over `process`, its pidfd: its number may be another's when it has ended. Raises OSError.
    """

    def tree() -> list[int]:
        pids = processes.tree(pid)
        ended = select.poll()  # for this thread alone; select(2) knows no descriptors above 1023
        ended.register(process, select.POLLIN)
        return pids if not ended.poll(0) else []

    try:
        source = own_cgroup(pid, tree)
    except OSError:
        os.close(process)
        raise
    if source is None:
        return ProcessSource(tree, lambda: os.close(process))
    os.close(process)
    return source


def own_cgroup(pid: int, tree: Callable[[], list[int]]) -> CgroupSource | None:
    """The cgroup of a process, if that counts memory and has nothing but its `tree()`. Raises OSError."""
    path = place.own_path(pid)
    folder = place.mount_point() + path
    if path in ("", "/") or "/../" in path + "/":
        return None
    try:
        source = CgroupSource(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in SHORT:
            raise
        return None  # another cgroup namespace's path, or not ours to see
    with ExitStack() as undo:
        undo.callback(source.close)
        if source.has("memory") and set(source.pids()) <= set(tree()):
            undo.pop_all()
            return source
    return None


def why_not(pid: int, error: Exception) -> str:
    if isinstance(error, RuntimeError):  # "can't start new thread"
        return f"process {pid} cannot be monitored ({error}): raise the limit of processes (ulimit -u)"
    number = error.errno if isinstance(error, OSError) else None
    if number in SHORT:
        return f"process {pid} cannot be monitored ({os.strerror(number)}): {mend_of(number)}"
    return f"there is no process {pid} to monitor: give the pid of one that runs"
