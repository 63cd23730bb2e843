"""What is measured of a sandbox and of any process: samples, warnings, telemetry, and the monitor on its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import (
    EnhancedResourceMonitor,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    ResourceError,
    ResourceLimitExceededError,
    SandboxTelemetry,
    SandboxViolation,
    SandboxViolationType,
)
from sandbox.engine.loop import PollLoop
from sandbox.engine.service import shut_down
from sandbox.engine.watching import SandboxWatch
from sandbox.monitor.resources import source_of
from sandbox.monitor.sources import Nothing, ProcessSource, Reading, describe
from sandbox.monitor.watch import Thresholds, Watch, Watched

from . import harness
from .test_bad_input import can_fork

pytestmark = pytest.mark.rootless
HELD_MB = 59  # what holds 60 is seen with, at least: a worker may give back a little of what it was forked with
FIELDS = {
    *("timestamp", "elapsed_seconds", "memory_mb", "memory_peak_mb", "cpu_percent", "pids", "threads"),
    *("io_read_bytes", "io_write_bytes", "memory_pressure"),
}
CONFIG: dict[str, Any] = {"resource_check_interval_seconds": 0.1}


def hold_and_spin(megabytes: int, seconds: float) -> int:
    import time

    held = bytearray(megabytes << 20)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return len(held)


class Handler:
    def __init__(self) -> None:
        self.samples: list[dict[str, Any]] = []
        self.violations: list[SandboxViolation] = []

    def on_resource_sample(self, sample: dict[str, Any]) -> None:
        self.samples.append(sample)

    def on_violation_detected(self, violation: SandboxViolation) -> None:
        self.violations.append(violation)


def watched(level: IsolationLevel, seconds: float, **config: Any) -> tuple[Handler, SandboxTelemetry]:
    """A call that holds 60 MB and spins, with a warning threshold for each thing."""
    handler = Handler()

    async def main() -> SandboxTelemetry:
        limits = {
            "memory_warning_threshold_mb": 50.0,
            "max_cpu_percent": 100.0,
            "cpu_warning_threshold_percent": 5.0,
            "execution_warning_threshold_seconds": 0.2,
        }
        sandbox = harness.open_sandbox(level, limits=limits, config={**CONFIG, **config}, monitoring_handler=handler)
        async with sandbox:
            assert await sandbox.execute_plugin_safe(hold_and_spin, 60, seconds) == 60 << 20
            return sandbox.get_telemetry()

    return handler, asyncio.run(main())


def test_a_call_is_sampled_and_warned_about(level: IsolationLevel) -> None:
    handler, telemetry = watched(level, 1.2)
    assert len(handler.samples) >= 3
    assert handler.samples == telemetry.resource_samples
    for sample in handler.samples:
        assert set(sample) == FIELDS
    elapsed = [sample["elapsed_seconds"] for sample in handler.samples]
    assert elapsed == sorted(elapsed)
    assert max(sample["memory_mb"] for sample in handler.samples) > HELD_MB
    assert max(sample["pids"] for sample in handler.samples) >= 1
    assert telemetry.peak_memory_mb > HELD_MB
    assert 5 < telemetry.peak_cpu_percent < 250
    assert [each["name"] for each in telemetry.process_hierarchy]
    kinds = {(violation.type, violation.details["limit"]) for violation in handler.violations}
    exceeded, timeout = SandboxViolationType.RESOURCE_EXCEEDED, SandboxViolationType.EXECUTION_TIMEOUT
    assert {(exceeded, "memory"), (exceeded, "cpu"), (timeout, "time")} <= kinds
    said = [(violation.details["limit"], violation.severity) for violation in handler.violations]
    assert len(said) == len(set(said)), "each is said once"
    assert [violation.message for violation in telemetry.violations] == [violation.message for violation in handler.violations]


def test_without_monitoring_there_are_no_samples(level: IsolationLevel) -> None:
    handler, telemetry = watched(level, 0.4, enable_real_time_monitoring=False)
    assert not handler.samples
    assert not telemetry.resource_samples
    assert telemetry.peak_memory_mb > HELD_MB


def test_a_call_that_ends_before_it_is_looked_at_again_is_warned_about(level: IsolationLevel) -> None:
    handler, _ = watched(level, 0.6, resource_check_interval_seconds=60.0)
    late = [violation for violation in handler.violations if violation.details["limit"] == "time"]
    assert [violation.type for violation in late] == [SandboxViolationType.EXECUTION_TIMEOUT]


def hold_and_make_files(megabytes: int) -> None:
    held = bytearray(megabytes << 20)
    for place in range(0, len(held), 4096):
        held[place] = 1
    time.sleep(0.2)
    for number in range(1000):
        with open(f"file-{number}", "w"):
            time.sleep(0.005)


def test_of_a_call_that_psie_ends_the_memory_is_told(level: IsolationLevel) -> None:
    async def main() -> float:
        limits = {"max_file_operations": 20}
        async with harness.open_sandbox(level, limits=limits, config={"resource_check_interval_seconds": 60.0}) as sandbox:
            with pytest.raises(ResourceLimitExceededError, match="file operations"):
                await sandbox.execute_plugin_safe(hold_and_make_files, 60)
            return sandbox.get_telemetry().peak_memory_mb

    assert HELD_MB < asyncio.run(main()) < 120


def fork_one_after_the_other(count: int) -> None:
    for _ in range(count):
        if os.fork() == 0:
            time.sleep(0.25)
            os._exit(0)
        os.wait()


@pytest.mark.long
def test_of_ever_new_processes_the_last_are_kept(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """So of the samples: a plugin could fill the memory of its caller."""
    monkeypatch.setattr("sandbox.sandbox.KEPT", 4)
    monkeypatch.setattr("sandbox.monitor.watch.KEPT", 4)

    async def main() -> None:
        limits, permissions = {"max_subprocess_count": 4}, {"allow_subprocess_execution": True}
        async with harness.open_sandbox(level, limits=limits, permissions=permissions, config=CONFIG) as sandbox:
            await sandbox.execute_plugin_safe(fork_one_after_the_other, 8)
            telemetry = sandbox.get_telemetry()
        pids = [each["pid"] for each in telemetry.process_hierarchy]
        assert len(pids) == len(telemetry.resource_samples) == 4
        assert len(set(pids)) == 4

    if not can_fork(level):
        pytest.skip("it has no processes at this level here")
    asyncio.run(main())


def test_without_telemetry_nothing_is_stored(level: IsolationLevel) -> None:
    handler, telemetry = watched(level, 0.5, telemetry_enabled=False)
    assert handler.samples
    assert not telemetry.resource_samples
    assert not telemetry.process_hierarchy


# -- the monitor on its own --------------------------------------------------------------------------------------------


def monitor(**limits: Any) -> EnhancedResourceMonitor:
    return EnhancedResourceMonitor(PluginLimitsV2(**limits), IsolationConfig(**CONFIG))


def test_a_monitor_watches_a_process_and_its_children() -> None:
    child = "x = bytearray(50 << 20); input()"
    code = f"import subprocess, sys; print('up', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            watch = monitor(max_memory_mb=40.0, execution_warning_threshold_seconds=0.1)
            assert watch.get_current_stats() == {}
            watch.start_monitoring(process.pid)
            with pytest.raises(RuntimeError, match="stop_monitoring"):
                watch.start_monitoring(process.pid)
            assert watch.source in ("cgroup", "psutil")
            assert harness.wait_until(lambda: (watch.get_current_stats()["memory_mb"] or 0) > 50)
            assert set(watch.get_current_stats()) == FIELDS
            assert watch.get_current_stats()["pids"] == 2
            expected = {("memory", "critical"), ("time", "warning")}
            assert harness.wait_until(lambda: expected <= {(v.details["limit"], v.severity) for v in watch.check_violations()})
            (critical,) = [v for v in watch.check_violations() if v.severity == "critical"]
            assert critical.details["allowed"] == 40.0
        finally:
            process.kill()
    time.sleep(0.25)  # it has ended: the monitor goes on and finds nothing
    watch.stop_monitoring()
    watch.stop_monitoring()
    assert watch.get_current_stats()["pids"] in (1, 2), "the last numbers stay; both do not end at the same moment"
    watch.start_monitoring()
    assert harness.wait_until(lambda: watch.get_current_stats()["memory_mb"] > 1)
    watch.stop_monitoring()


def test_a_monitor_does_not_follow_a_number_to_another_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ended:
        process = os.pidfd_open(ended.pid)
    source = source_of(os.getpid(), process)  # as if our number had been its before
    assert source.name == "psutil"
    assert source.pids() == []
    assert source.read() is None
    source.close()


def test_a_name_does_not_pass_for_a_number_of_threads() -> None:
    """The name stands in the status file before the number, and only its newlines are escaped."""
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'Threads:\\t7777', 0, 0, 0); print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert psutil.Process(process.pid).num_threads() == 7777
        reading = ProcessSource(lambda: [process.pid]).read()
        assert reading is not None
        assert reading.tasks == 1
        assert describe([process.pid])[0]["threads"] == 1
        process.kill()


def test_a_monitor_says_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="give a PluginLimitsV2"):
        EnhancedResourceMonitor(None, IsolationConfig())  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match="there is no process"):
        monitor().start_monitoring(1 << 22)
    for wrong in (True, "1", 1.5):
        with pytest.raises(TypeError, match=r"process_id is a .*: give the pid of a process"):
            monitor().start_monitoring(wrong)  # type: ignore[arg-type]


def refuse_descriptor(*_: object, **__: object) -> None:
    raise OSError(24, "Too many open files")


def refuse_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("what", "refuse", "mend"),
    [
        ("os.pidfd_open", refuse_descriptor, "Too many open files.*ulimit -n"),
        ("os.pipe2", refuse_descriptor, "Too many open files.*ulimit -n"),
        ("threading.Thread.start", refuse_thread, "can't start new thread.*ulimit -u"),
    ],
    ids=["pidfd", "pipe", "thread"],
)
def test_what_a_monitor_lacks_is_told_and_leaves_nothing(
    what: str, refuse: Callable[..., None], mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = monitor()
    with harness.nothing_left(), monkeypatch.context() as patched:
        patched.setattr(what, refuse)
        with pytest.raises(ResourceError, match=mend):
            lacking.start_monitoring()
        lacking.stop_monitoring()
    lacking.start_monitoring()
    lacking.stop_monitoring()


def test_a_monitor_leaves_nothing() -> None:
    with harness.nothing_left():
        for _ in range(3):
            watch = monitor()
            watch.start_monitoring(os.getpid())
            watch.stop_monitoring()


def test_a_signals_exception_in_start_or_stop_closes_nothing_that_is_used_and_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = monitor()
    harness.interrupt_start(monkeypatch, watch.start_monitoring)
    with harness.nothing_left():
        watch.start_monitoring()
        harness.interrupt_stop(monkeypatch, watch.stop_monitoring)
    assert watch.get_current_stats()["pids"] >= 1


def test_a_monitor_that_is_short_of_descriptors_says_so_and_leaves_nothing() -> None:
    """And can be started when there are some; of a cgroup it reads more files than of processes."""
    shut_down()  # sandboxes that are made to stand ready take descriptors, too
    enough: list[int] = []
    for count in range(20):
        watch, said = monitor(), ""
        with harness.nothing_left():
            with harness.descriptors_left(count):
                try:
                    watch.start_monitoring(os.getppid())
                    enough.append(count)
                except ResourceError as error:
                    said = str(error)
                watch.stop_monitoring()
            assert not said or "(Too many open files): raise the limit of open files" in said
            watch.start_monitoring(os.getppid())
            watch.stop_monitoring()
    assert min(enough) >= 2
    assert {"psutil": set(range(12, 20)), "cgroup": set(range(15, 20))}[watch.source] <= set(enough)


def test_several_threads_may_ask_for_the_numbers_of_this_moment() -> None:
    """While the monitor's own looks as well."""
    watch, mistakes = monitor(), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        watch.start_monitoring()

        def ask() -> None:
            try:
                for _ in range(200):
                    assert watch.get_current_stats()["pids"] >= 1
                    watch._watch.source.pids()  # type: ignore[union-attr]  # as at each sample
            except Exception as mistake:
                mistakes.append(mistake)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        watch.stop_monitoring()
    assert mistakes == []


# -- the watch, with a source that says what we want ----------------------------------------------------------------------


class Source:
    """Numbers and counts as a cgroup with all controllers would give them."""

    name = "test"

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.memory, self.throttled = 1 << 20, 0

    def read(self) -> Reading | None:
        reading = Reading()
        reading.memory, reading.cpu_usec, reading.throttled = self.memory, 0, self.throttled
        return reading

    def events(self) -> dict[str, int]:
        return dict(self.counts)

    def event_files(self) -> list[str]:
        return []

    def pressure(self) -> int:
        return -1

    def pids(self) -> list[int]:
        return []

    def close(self) -> None:
        return


def test_what_the_kernel_counts_is_told_once_a_run() -> None:
    source, told = Source(), list[SandboxViolation]()
    watch = Watch(PollLoop(), source, Thresholds.of_limits(PluginLimitsV2()), 1.0)
    watch.on_violation = told.append
    run = watch.begin()
    source.counts = {"memory.events high": 3, "memory.events max": 0, "pids.events max": 2}
    watch.look_at_events()
    source.counts |= {"memory.events high": 9, "pids.events max": 7}
    watch.look_at_events()
    source.throttled = 5
    watch.end(run)
    assert [(v.details["limit"], v.severity) for v in told] == [("memory", "warning"), ("pids", "warning"), ("cpu", "info")]
    assert told[1].details["count"] == 7, "all of the run, in the one that was told at the first"
    assert "refused 7 new" in told[1].message
    assert told[2].details["count"] == 5
    told.clear()
    watch.end(watch.begin())
    assert not told, "what was counted in the run before is no news"
    counts, source.counts = source.counts, {}
    run = watch.begin()  # its files cannot be read just now
    source.counts = counts
    watch.end(run)
    assert not told, "nor after a look that has seen nothing"


def test_each_of_several_runs_is_warned_about_when_its_own_time_comes() -> None:
    source, told = Source(), list[SandboxViolation]()
    limits = PluginLimitsV2(execution_warning_threshold_seconds=0.2, max_execution_time_seconds=1.0)
    watch = Watch(PollLoop(), source, Thresholds.of_limits(limits), 1.0)
    watch.on_violation = told.append
    first = watch.begin()
    time.sleep(0.25)
    second = watch.begin()
    watch.sample()
    assert [v.details["limit"] for v in told] == ["time"], "the second has only begun"
    watch.end(first)
    watch.sample()
    assert len(told) == 1
    time.sleep(0.25)
    watch.end(second)
    assert [v.details["limit"] for v in told] == ["time", "time"]


def test_without_an_inotify_instance_events_are_seen_at_each_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host's user has 128 of them, and others may have taken all."""
    monkeypatch.setattr("inotify_simple.INotify", refuse_descriptor)
    source, told, loop = Source(), list[SandboxViolation](), PollLoop()
    monkeypatch.setattr(source, "event_files", lambda: [str(tmp_path)])
    watch = Watch(loop, source, Thresholds.of_limits(PluginLimitsV2()), 0.01)
    watch.on_violation = told.append
    run = watch.begin()
    source.counts = {"pids.events max": 2}
    loop.run_once(1.0)
    assert [v.details["limit"] for v in told] == ["pids"]
    watch.end(run)


def test_a_watch_that_could_not_begin_is_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the next thing that runs would be taken for one that runs beside it, and nobody would look."""
    source, told, loop = Source(), list[SandboxViolation](), PollLoop()
    monkeypatch.setattr(source, "event_files", lambda: [str(tmp_path)])
    watch = Watch(loop, source, Thresholds.of_limits(PluginLimitsV2()), 1.0)
    watch.on_violation = told.append
    before = os.listdir("/proc/self/fd")
    trigger, other = os.pipe()
    with monkeypatch.context() as patched:
        patched.setattr(source, "pressure", lambda: trigger)
        patched.setattr(loop, "call_later", refuse_descriptor)
        with pytest.raises(OSError, match="Too many open files"):
            watch.begin()
    os.close(other)
    assert os.listdir("/proc/self/fd") == before
    run = watch.begin()
    source.counts = {"pids.events max": 2}
    watch.end(run)
    assert [v.details["limit"] for v in told] == ["pids"]


def test_a_sandboxs_watch_that_could_not_begin_holds_nothing(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            assert sandbox._sandbox is not None
            watch = SandboxWatch(sandbox._sandbox)
            monkeypatch.setattr(watch, "_listen", refuse_descriptor)
            with pytest.raises(OSError, match="Too many open files"):
                watch.begin()
            assert isinstance(watch.source, Nothing)

    asyncio.run(main())


@pytest.mark.parametrize("lasts", [False, True])
def test_a_call_that_cannot_be_watched_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], lasts: bool
) -> None:
    """It is tried again; where nothing comes of that, it is told. Above memory.high it would stand still."""
    tried, begin = list[SandboxWatch](), SandboxWatch.begin

    def refuse(watch: SandboxWatch) -> Watched:
        tried.append(watch)
        if lasts or len(tried) == 1:
            refuse_descriptor()
        return begin(watch)

    monkeypatch.setattr(SandboxWatch, "begin", refuse)
    with caplog.at_level("WARNING", "psie"):
        _, telemetry = watched(IsolationLevel.STRICT, 0.5)
    assert len(tried) > 1
    assert bool(telemetry.resource_samples) is not lasts
    assert ("could not be watched" in caplog.text) is lasts
    assert "Traceback" not in capfd.readouterr().err


def test_a_sample_that_is_not_to_be_had_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source, loop = Source(), PollLoop()
    watch = Watch(loop, source, Thresholds.of_limits(PluginLimitsV2()), 0.01)
    samples: list[object] = []
    watch.on_sample = samples.append
    run = watch.begin()
    with monkeypatch.context() as patched:
        patched.setattr(source, "pids", refuse_descriptor)
        end = time.monotonic() + 0.05
        loop.run_until(lambda: time.monotonic() > end)
        assert samples == []
    loop.run_until(lambda: bool(samples))
    monkeypatch.setattr(source, "pids", refuse_descriptor)
    watch.end(run)
    assert watch.running == []
    loop.close()


def test_without_a_watch_of_epolls_samples_tell_the_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user has a bounded number of them: fs.epoll.max_user_watches in epoll(7)."""

    class Full:
        def register(self, fd: int, mask: int) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            closed.append(self)

    source, loop, closed = Source(), PollLoop(), list[Full]()
    trigger, other = os.pipe()
    monkeypatch.setattr(source, "pressure", lambda: trigger)
    watch = Watch(loop, source, Thresholds.of_limits(PluginLimitsV2()), 1.0)
    with monkeypatch.context() as patched:
        patched.setattr("select.epoll", Full)
        run = watch.begin()
    watch.end(run)
    os.close(other)
    assert len(closed) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(trigger)
