"""Watches a source on a loop: samples at an interval, events as the kernel counts them, warnings at thresholds.

Events come by inotify(7) on the cgroup's event files and by a PSI trigger, without polling. Must not know sandboxes: who
owns the watch is called back. Times are monotonic, so a clock that is set does not matter. Source of pressure: the
kernel's PSI document.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic

from sandbox import explanations
from sandbox.monitor.sources import MB, STALL_USEC, STALL_WINDOW_USEC, Reading, describe
from sandbox.telemetry import KEPT
from sandbox.violations import SandboxViolation, SandboxViolationType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from sandbox.config import PluginLimitsV2
    from sandbox.engine.loop import Loop, Timer
    from sandbox.monitor.sources import Source
    from sandbox.recipe_data import Recipe


THROTTLED = 5  # periods of 0.1 s in which the CPU limit struck: fewer are not worth a word
SHORTEST = 0.05  # seconds: the clock of CPU time is too coarse for a rate over less


class Thresholds:
    """What a watch compares with: limits and warning thresholds. MB of 2**20 bytes, percent of one CPU, seconds, tasks."""

    def __init__(
        self,
        *,
        memory: float,
        memory_warning: float,
        cpu: float,
        cpu_warning: float,
        seconds: float,
        seconds_warning: float,
        threads: int,
        subprocesses: int,
    ) -> None:
        self.memory, self.memory_warning = memory, memory_warning
        self.cpu, self.cpu_warning = cpu, cpu_warning
        self.seconds, self.seconds_warning = seconds, seconds_warning
        self.threads, self.subprocesses = threads, subprocesses

    @classmethod
    def of_limits(cls, limits: PluginLimitsV2) -> Thresholds:
        return cls(
            memory=limits.max_memory_mb,
            memory_warning=limits.memory_warning_threshold_mb,
            cpu=limits.max_cpu_percent,
            cpu_warning=limits.cpu_warning_threshold_percent,
            seconds=limits.max_execution_time_seconds,
            seconds_warning=limits.execution_warning_threshold_seconds,
            threads=limits.max_thread_count,
            subprocesses=limits.max_subprocess_count,
        )

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Thresholds:
        limits, monitoring = recipe.limits, recipe.monitoring
        return cls(
            memory=limits["memory_bytes"] / MB,
            memory_warning=monitoring["memory_warning_mb"],
            cpu=limits["cpu_percent"],
            cpu_warning=monitoring["cpu_warning_percent"],
            seconds=limits["seconds"],
            seconds_warning=monitoring["execution_warning_seconds"],
            threads=int(limits["threads"]),
            subprocesses=int(limits["subprocesses"]),
        )


class Watched:
    """Something that runs while a source is watched: one of the calls that go on in a sandbox at the same time."""

    def __init__(self) -> None:
        self.started = monotonic()
        self.is_late = False  # and that has been told


class Watch:
    """One source under `limits`. Between `begin` and `end` of any run it is looked at every `interval` seconds.

    `on_sample(sample)` with the fields of api-notes: timestamp (ISO 8601), elapsed_seconds, memory_mb, memory_peak_mb,
    cpu_percent (of one CPU, since the sample before), pids, threads, io_read_bytes, io_write_bytes, memory_pressure
    (percent, some, avg10); None where nobody counts it. `on_violation(violation)` once for each thing, time once for each
    run: what runs at the same time shares the source, and nobody can tell whose the memory or the processes were.
    """

    def __init__(self, loop: Loop, source: Source, limits: Thresholds, interval: float) -> None:
        self.loop = loop
        self.source = source
        self.limits = limits
        self.interval = interval
        self.on_sample: Callable[[dict[str, Any]], None] | None = None
        self.on_violation: Callable[[SandboxViolation], None] | None = None
        self.hierarchy: list[dict[str, Any]] = []
        self.peak_memory = 0  # bytes
        self.peak_cpu = 0.0  # percent
        self.seen_pids: set[int] = set()
        self.running: list[Watched] = []
        self.started = monotonic()
        self.first: Reading | None = None
        self.last: Reading | None = None
        self.counted: dict[str, int] = {}  # what has been told already
        self.told: dict[str, SandboxViolation] = {}  # since something runs
        self.notify: Any = None  # inotify_simple.INotify
        self.stalls: select.epoll | None = None  # of the PSI trigger: a loop's readers are not told of POLLPRI
        self.trigger = -1
        self.timer: Timer | None = None

    # -- a run -----------------------------------------------------------------------------------------------------

    def begin(self) -> Watched:
        """Something runs from now on, until `end` is given what this returns. Several things may run at once.

        What is raised here leaves the watch as it was.
        """
        run = Watched()
        self.running.append(run)
        if len(self.running) == 1:
            try:
                self._begin(run)
            except BaseException:
                self.running.remove(run)
                self._quiet()
                raise
        return run

    def _begin(self, run: Watched) -> None:
        self.started = run.started
        self.told.clear()
        self.first = self.last = self.start_reading()
        self._listen()
        self.look_at_events()
        if self.first is not None:  # what it has used before is above a threshold already, or not
            for violation in self.warnings(self.describe(self.first), passed=0.0):
                self._tell(violation)
        self.timer = self.loop.call_later(self.interval, self._tick)

    def start_reading(self) -> Reading | None:
        """What is used already when a run begins."""
        return self.source.read()

    def end(self, run: Watched) -> None:
        """`run` has ended. After the last one: a last look, and quiet."""
        self._tell_late(monotonic())  # no process need be left that could be looked at
        if len(self.running) > 1:
            self.running.remove(run)
            return
        self._look()
        self.running.remove(run)
        self.look_at_events()
        if self.last is not None and self.first is not None:
            throttled = (self.last.throttled or 0) - (self.first.throttled or 0)
            if throttled >= THROTTLED:
                self._tell(throttled_violation(throttled, self.limits.cpu))
        self._quiet()

    def close(self) -> None:
        self._quiet()
        self.source.close()

    def _listen(self) -> None:
        """Where the host has no inotify instance left for its user, events are seen at each sample instead."""
        files = self.source.event_files()
        if files:
            from inotify_simple import INotify, flags

            try:
                self.notify = INotify(nonblocking=True)
                for path in files:
                    self.notify.add_watch(path, flags.MODIFY)
            except OSError:
                if self.notify is not None:
                    self.notify.close()
                    self.notify = None
            else:
                self.loop.add_reader(self.notify.fileno(), self._notified)
        self.trigger = self.source.pressure()
        if self.trigger >= 0:
            try:
                self.stalls = select.epoll()
                self.stalls.register(self.trigger, select.EPOLLPRI)
            except OSError:
                if self.stalls is not None:
                    self.stalls.close()
                    self.stalls = None
                os.close(self.trigger)  # no descriptor left, or no watch of epoll's: samples tell the pressure still
                return
            self.loop.add_reader(self.stalls.fileno(), self._stalled)

    def _quiet(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.notify is not None:
            self.loop.remove_reader(self.notify.fileno())
            self.notify.close()
            self.notify = None
        if self.stalls is not None:
            self.loop.remove_reader(self.stalls.fileno())
            self.stalls.close()
            os.close(self.trigger)
            self.stalls = None

    def _notified(self) -> None:
        self.notify.read(timeout=0)
        self.look_at_events()

    def _stalled(self) -> None:
        """The loop has polled the trigger, which takes the event: only what is wrong with it is still to be seen."""
        if self.stalls is None:
            return
        if any(event & select.EPOLLERR for _, event in self.stalls.poll(0)):
            self.loop.remove_reader(self.stalls.fileno())  # the cgroup has gone
        else:
            self._tell(stalled_violation(self.limits.memory))

    def _look(self) -> None:
        """A sample, if one is to be had: not where this process lacks a descriptor just now, or psutil, imported late, does."""
        with suppress(OSError, ImportError):
            self.sample()

    def _tick(self) -> None:
        self._look()
        if self.notify is None:
            self.look_at_events()
        self.timer = self.loop.call_later(self.interval, self._tick)

    # -- what is seen ----------------------------------------------------------------------------------------------

    def sample(self) -> dict[str, Any] | None:
        """Look now; None where there is nothing (any more)."""
        reading = self.source.read()
        if reading is None:
            return None
        sample = self.describe(reading)
        passed = reading.when - self.last.when if self.last is not None else 0.0
        self.last = reading
        self.peak_memory = max(self.peak_memory, reading.memory_peak or 0, reading.memory or 0)
        self.peak_cpu = max(self.peak_cpu, sample["cpu_percent"] or 0.0)
        pids = set(self.source.pids())
        if pids - self.seen_pids:
            self.hierarchy += describe(sorted(pids - self.seen_pids))
            del self.hierarchy[:-KEPT]
        self.seen_pids = pids
        if self.on_sample is not None:
            self.on_sample(sample)
        for violation in self.warnings(sample, passed):
            self._tell(violation)
        self._tell_late(reading.when)
        return sample

    def _tell_late(self, now: float) -> None:
        for violation in self.late(now):
            if self.on_violation is not None:
                self.on_violation(violation)

    def describe(self, reading: Reading) -> dict[str, Any]:
        cpu = None
        if reading.cpu_usec is not None and self.last is not None and self.last.cpu_usec is not None:
            passed = reading.when - self.last.when
            if passed > SHORTEST:
                cpu = max(0.0, (reading.cpu_usec - self.last.cpu_usec) / passed / 1e4)
        return {
            "timestamp": datetime.now(UTC).isoformat(),
            "elapsed_seconds": reading.when - self.started,
            "memory_mb": _mb(reading.memory),
            "memory_peak_mb": _mb(reading.memory_peak),
            "cpu_percent": cpu,
            "pids": reading.processes,
            "threads": reading.tasks,
            "io_read_bytes": reading.io_read,
            "io_write_bytes": reading.io_write,
            "memory_pressure": reading.memory_pressure,
        }

    def warnings(self, sample: dict[str, Any], passed: float) -> list[SandboxViolation]:
        """What of the sample lies above a threshold or a limit. `passed`: seconds since the one before it."""
        limits, found = self.limits, []
        memory, cpu = sample["memory_mb"], sample["cpu_percent"]
        if memory is not None and memory > limits.memory:
            found.append(_exceeded("memory", memory, limits.memory, "MB", "critical"))
        elif memory is not None and memory > limits.memory_warning:
            found.append(_exceeded("memory", memory, limits.memory_warning, "MB", of=limits.memory))
        # Everything that runs uses all of a CPU for a moment.
        if cpu is not None and cpu > limits.cpu_warning and passed > self.interval / 2:
            found.append(_exceeded("cpu", cpu, limits.cpu_warning, "% of a CPU", of=limits.cpu))
        return found

    def late(self, now: float) -> list[SandboxViolation]:
        """A warning for each run that has passed the warning threshold of time by `now` and was not told before."""
        limits, found = self.limits, []
        for run in self.running:
            elapsed = now - run.started
            if elapsed > limits.seconds_warning and not run.is_late:
                run.is_late = True
                kind = SandboxViolationType.EXECUTION_TIMEOUT
                found.append(_exceeded("time", elapsed, limits.seconds_warning, "s", of=limits.seconds, kind=kind))
        return found

    def look_at_events(self) -> None:
        """What the kernel has counted since the last look."""
        before, now = self.counted, self.source.events()
        self.counted = before | now  # what could not be read just now has been told all the same
        new = {name: value - before.get(name, 0) for name, value in now.items()}
        for violation in violations_of(new, self.limits):
            self._tell(violation)
        if new.get("memory.events high", 0) > 0:
            self.passed_high()

    def passed_high(self) -> None:
        """The kernel has counted that memory.high, the warning threshold, was passed."""

    def _tell(self, violation: SandboxViolation) -> None:
        """Once for each thing in a run; what is counted further goes into the one that was told."""
        key = f"{violation.details['limit']} {violation.severity}"
        earlier = self.told.get(key)
        if earlier is None:
            self.told[key] = violation
            if self.on_violation is not None:
                self.on_violation(violation)
        elif violation.details.get("source") == "pids.events":
            counted = pids_violation(earlier.details["count"] + violation.details["count"], self.limits)
            earlier.message, earlier.details = counted.message, counted.details


def violations_of(counted: Mapping[str, int | str], limits: Thresholds) -> list[SandboxViolation]:
    """What the kernel's counts (`memory.events high`, `pids.events max`) are as violations."""
    found = []
    if int(counted.get("memory.events high", 0)) > 0:
        found.append(_exceeded("memory", None, limits.memory_warning, "MB", of=limits.memory))
    refused = int(counted.get("pids.events max", 0))
    if refused > 0:
        found.append(pids_violation(refused, limits))
    return found


def pids_violation(refused: int, limits: Thresholds) -> SandboxViolation:
    allowed = limits.threads + limits.subprocesses
    text = f"the kernel refused {refused} new processes or threads: {allowed} are allowed"
    details = {"limit": "pids", "allowed": allowed, "count": refused, "source": "pids.events"}
    explanation = explanations.tasks(limits.threads, limits.subprocesses)
    kind = SandboxViolationType.RESOURCE_EXCEEDED
    return SandboxViolation(kind, text, datetime.now(UTC), "warning", details, explanation=explanation)


def throttled_violation(periods: int, percent: float) -> SandboxViolation:
    text = f"cpu: the kernel held the plugin back in {periods} periods of 0.1 s: the limit is {percent:g} % of a CPU"
    details = {"limit": "cpu", "allowed": percent, "count": periods, "source": "cpu.stat"}
    explanation = explanations.limited("cpu", percent, refused=False)
    kind = SandboxViolationType.RESOURCE_EXCEEDED
    return SandboxViolation(kind, text, datetime.now(UTC), "info", details, explanation=explanation)


def stalled_violation(allowed: float) -> SandboxViolation:
    stalled, window = STALL_USEC / 1e6, STALL_WINDOW_USEC / 1e6
    text = f"memory: the plugin waited for memory for more than {stalled:g} of {window:g} s: more would make it faster"
    details = {"limit": "memory pressure", "threshold": stalled, "window": window, "source": "memory.pressure"}
    explanation = explanations.limited("memory", allowed, refused=False)
    kind = SandboxViolationType.RESOURCE_EXCEEDED
    return SandboxViolation(kind, text, datetime.now(UTC), "info", details, explanation=explanation)


def _exceeded(
    limit: str,
    used: float | None,
    threshold: float,
    unit: str,
    severity: str = "warning",
    *,
    of: float | None = None,
    kind: SandboxViolationType = SandboxViolationType.RESOURCE_EXCEEDED,
) -> SandboxViolation:
    seen = f"{used:.1f} {unit}" if used is not None else "it"
    text = f"{limit}: {seen} is above {'the warning threshold of ' if of is not None else ''}{threshold:g} {unit}"
    if of is not None:
        text += f" (the limit is {of:g})"
    allowed = of if of is not None else threshold
    details = {"limit": limit, "threshold": threshold, "used": used, "allowed": allowed}
    explanation = explanations.limited(limit, allowed, refused=of is None)
    return SandboxViolation(kind, text, datetime.now(UTC), severity, details, explanation=explanation)


def _mb(number: int | None) -> float | None:
    return None if number is None else number / MB
