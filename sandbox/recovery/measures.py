"""What is done about a violation in an open sandbox: measures that the kernel carries out, each told with what was before
and what is after.

Works in the engine's thread, a step at a time: a measure is a generator that yields the seconds until it goes on, so that
nothing is waited for. Both doors use it. Must not know asyncio, nor what is stored. Sources: the kernel's cgroup-v2
document, getrlimit(2), setpriority(2).
"""

from __future__ import annotations

import os
import resource
import signal
from contextlib import ExitStack, suppress
from datetime import UTC, datetime

from sandbox.cgroups import leaf
from sandbox.engine.watching import source_of
from sandbox.errors import SHORT
from sandbox.monitor.sources import CgroupSource
from sandbox.ns import processes
from sandbox.violations import SandboxViolationType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from concurrent.futures import Future
    from typing import Any

    from sandbox.engine.client import Call, Sandbox
    from sandbox.engine.loop import Loop, Timer
    from sandbox.violations import SandboxViolation

    Steps = Generator[float, None, bool]
    Finding = Future[dict[str, Any]]

MB = 1 << 20
SOON = 0.005  # seconds between two looks at what the kernel does at once
ANSWER = 2.0  # seconds that a part of the sandbox gets for an answer
BATCH = 64  # processes that are held at once
LOOKS = 3  # in a row that find nobody running
LOW = 0.9  # of the warning threshold: what memory is brought below while the plugin stands still
RECLAIM_BYTES = 8 * MB  # at a time, so that the engine's thread is soon free again
SETTLE_SECONDS, SETTLE_LOOK = 3.0, 0.1  # that memory is looked at after a measure, to tell whether it still grows
GROWS = 1 * MB
SHARE = 4  # of its CPU limit a plugin keeps a fourth ...
SLOW_SECONDS = 5.0  # ... for so long
NICEST = 19

DONE_BY_KERNEL = "memory.max"
FILES = ("disk", "file_size", "file_operations", "inodes")


def action_of(violation: SandboxViolation) -> str:
    """Which measure a violation calls for: memory, cpu, processes, files, network, time or end."""
    kind, limit = violation.type, str(violation.details.get("limit", ""))
    if kind is SandboxViolationType.RESOURCE_EXCEEDED:
        if limit.startswith("memory"):
            return "memory"
        if limit in FILES:
            return "files"
        return {"cpu": "cpu", "pids": "processes", "network_requests": "network"}.get(limit, "end")
    return {
        SandboxViolationType.FILESYSTEM_VIOLATION: "files",
        SandboxViolationType.NETWORK_VIOLATION: "network",
        SandboxViolationType.EXECUTION_TIMEOUT: "time",
    }.get(kind, "end")


def is_memory_warning(violation: SandboxViolation) -> bool:
    return violation.details.get("limit") == "memory" and violation.severity == "warning"


class Recovery:
    """The recoveries of one open sandbox, one after the other.

    `history` has a step for each thing done: timestamp (ISO 8601), sandbox_id, violation (as its to_dict gives it), action,
    before, after (both by name), success, and note, which says why where it was not. `discard()` and `evidence(violation)`
    are the owner's, and give a Future of what came of it; None where there is nothing to discard, or nothing is kept.
    """

    def __init__(self, sandbox: Sandbox, sandbox_id: str) -> None:
        self.sandbox = sandbox
        self.sandbox_id = sandbox_id
        self.history: list[dict[str, Any]] = []
        self.on_step: Callable[[dict[str, Any]], object] = lambda step: None
        self.discard: Callable[[], Finding | None] = lambda: None
        self.evidence: Callable[[SandboxViolation], Finding | None] = lambda violation: None
        self.waiting: list[tuple[SandboxViolation, Callable[[bool], object], str]] = []
        self.is_busy = False
        self.settings: dict[str, str] = {}  # of the cgroup, as they were before a measure
        self.slowed: Timer | None = None  # until its calls have all of their CPU again
        self.evidence_of: tuple[int, tuple[int, ...]] | None = None  # the calls that there were, and ran, when it was kept last
        self.squeezed: SandboxViolation | None = None  # the warning of memory that was acted on in the calls that run

    def recover(self, violation: SandboxViolation, then: Callable[[bool], object] = bool, *, end: bool = False) -> None:
        """Do what there is to be done about it, or with `end` end its calls; `then(worked)` is called when that is known."""
        self.waiting.append((violation, then, "end" if end else action_of(violation)))
        if not self.is_busy:
            self.is_busy = True
            self.sandbox.loop.call_later(0, self._next)

    def automatic(self, violation: SandboxViolation, offences: int) -> None:
        """A violation has just been seen, of `offences` so far that count. Memory is seen to at once, as it can be without
        harm; what else there is when violation_threshold is reached, which is the last warning before the end."""
        threshold = int(self.sandbox.recipe.monitoring["violation_threshold"])
        if is_memory_warning(violation) or (offences == threshold and action_of(violation) not in ("memory", "end")):
            self.recover(violation)

    def ended(self, call: Call, violations: Sequence[SandboxViolation] = ()) -> None:
        """A call has ended, with `violations`. What was set for it is set back after the last one."""
        if call.cause == "violations" and violations:
            allowed, note = self.sandbox.recipe.monitoring["violation_threshold"], "violation_threshold was passed"
            self._tell(violations[-1], "kill", {"violations": call.offences, "allowed": allowed}, {"calls": 0}, True, note)
        violation = self.squeezed
        if violation is not None and call.outcome is not None and call.outcome.get("cause") == "memory":
            after = {"used_mb": int(call.outcome.get("used", "0")) / MB, "ended_by": DONE_BY_KERNEL}
            before = {"limit_mb": self.sandbox.recipe.limits["memory_bytes"] / MB}
            self._tell(violation, "kill", before, after, True, "it went on to grow up to its limit")
            violation.resolved = False
        if not self._running():
            self.squeezed = None
            self._relieve()
            self._forget_slowed()

    # -- one after the other -----------------------------------------------------------------------------------------

    def _next(self) -> None:
        if not self.waiting:
            self.is_busy = False
            return
        violation, then, action = self.waiting.pop(0)
        violation.auto_recovery_attempted = True

        def finished(worked: bool) -> None:
            violation.resolved = worked
            then(worked)
            self._next()

        drive(self.sandbox.loop, self._steps(violation, action), finished)

    def _steps(self, violation: SandboxViolation, action: str) -> Steps:
        measures: dict[str, Callable[[SandboxViolation], Steps]] = {
            "memory": self._memory,
            "cpu": self._cpu,
            "processes": self._processes,
            "files": self._files,
            "network": self._network,
            "time": self._time,
            "end": self._end,
        }
        try:
            return (yield from measures[action](violation))
        except OSError as error:  # the sandbox is at its end, or the host does not let us
            self._tell(violation, action, {}, {}, False, error.strerror or str(error))
            return False

    def _tell(
        self,
        violation: SandboxViolation,
        action: str,
        before: dict[str, Any],
        after: dict[str, Any],
        success: bool,
        note: str = "",
    ) -> bool:
        step: dict[str, Any] = {
            "timestamp": datetime.now(UTC).isoformat(),
            "sandbox_id": self.sandbox_id,
            "violation": violation.to_dict(),
        }
        done: dict[str, Any] = {"action": action, "before": before, "after": after, "success": success, "note": note}
        step = {**step, **done}
        self.history.append(step)
        self.on_step(step)
        return success

    # -- what they are made of ---------------------------------------------------------------------------------------

    def _has(self, controller: str) -> bool:
        return self.sandbox.leaf_fd >= 0 and controller in (self.sandbox.recipe.cgroup or {}).get("controllers", ())

    def _get(self, name: str) -> str:
        return leaf.read(self.sandbox.leaf_fd, name).strip()

    def _set(self, name: str, value: str) -> None:
        """A setting of the cgroup, until `_relieve`."""
        self.settings.setdefault(name, self._get(name))
        leaf.write(self.sandbox.leaf_fd, name, value)

    def _relieve(self, *names: str) -> dict[str, str]:
        """Set these settings, or all, back to what they were."""
        restored = {name: self.settings.pop(name) for name in names or list(self.settings) if name in self.settings}
        for name, value in restored.items():
            try:
                leaf.write(self.sandbox.leaf_fd, name, value)
            except OSError:
                continue  # the cgroup has gone, and its settings with it
        return restored

    def _pids(self) -> list[int]:
        """Every process of the calls."""
        if self.sandbox.leaf_fd >= 0:
            source = CgroupSource(os.dup(self.sandbox.leaf_fd))
            try:
                return source.pids()
            finally:
                source.close()
        # Of an ended call the numbers may be somebody else's by now. What has left its worker is below init.
        standing = [call.read_back for call in self.sandbox.calls.values() if call.read_back and not call.done]
        inits = [int(read_back["init"]) for read_back in standing]
        return [pid for init in inits for pid in processes.tree(init) if pid != init]

    def _running(self, number: int = 0) -> list[Call]:
        """The calls that run; with a number only that one, if it does still."""
        running = [call for call in self.sandbox.calls.values() if call.is_running]
        return [call for call in running if call.number == number] if number else running

    def _freeze(self, violation: SandboxViolation) -> Steps:
        """Stop everything in the sandbox: cgroup.freeze, or where it has no cgroup SIGSTOP."""
        if self.sandbox.leaf_fd < 0:
            running = yield from self._halt()
            stopped, note = len(self._pids()) - running, "by SIGSTOP: there is no cgroup"
            return self._tell(violation, "freeze", {}, {"stopped": stopped}, bool(stopped) and not running, note)
        before = {"frozen": self._is_frozen()}
        after = {"frozen": not (yield from self._halt())}
        return self._tell(violation, "freeze", before, after, after["frozen"])

    def _halt(self) -> Generator[float, None, int]:
        """Stop everything until `_thaw`; how much of it still runs."""
        if self.sandbox.leaf_fd >= 0:
            leaf.write(self.sandbox.leaf_fd, "cgroup.freeze", "1")
            return int(not (yield from self._until(self._is_frozen, ANSWER)))
        running = looks = 0
        for _ in range(int(ANSWER / SOON)):  # who was still running may have woken others, or made one and ended
            running = sum(not processes.is_stopped(pid) for pid in self._pids())
            looks = 0 if running else looks + 1
            if looks == LOOKS:
                break
            self._signal_all(signal.SIGSTOP)
            yield SOON
        return running

    def _signal_all(self, number: int) -> None:
        """By descriptors older than a look in which the number is still ours; since the first it may be another one's."""
        pids = self._pids()
        for start in range(0, len(pids), BATCH):
            with ExitStack() as opened:
                pidfds = {}
                for pid in pids[start : start + BATCH]:
                    with suppress(ProcessLookupError):  # it has just ended, as below
                        try:
                            pidfds[pid] = os.pidfd_open(pid)
                            opened.callback(os.close, pidfds[pid])
                        except OSError as error:
                            if error.errno not in SHORT:
                                raise
                            os.kill(pid, number)  # else it would stay stopped because of us
                for pid in pidfds.keys() & set(self._pids()):
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfds[pid], number)

    def _is_frozen(self) -> bool:
        return "frozen 1" in self._get("cgroup.events")

    def _thaw(self) -> None:
        if self.sandbox.leaf_fd < 0:
            self._signal_all(signal.SIGCONT)
        else:
            leaf.write(self.sandbox.leaf_fd, "cgroup.freeze", "0")

    def _kill(self, violation: SandboxViolation, calls: list[Call]) -> Steps:
        for call in calls:
            call.recovered = call.recovered or violation
            call.kill("recovery")
        yield from self._until(lambda: all(call.done for call in calls), ANSWER)
        left = sum(not call.done for call in calls)
        return self._tell(violation, "kill", {"calls": len(calls)}, {"calls": left}, not left)

    def _until(self, condition: Callable[[], bool], seconds: float) -> Steps:
        for _ in range(int(seconds / SOON)):
            if condition():
                return True
            yield SOON
        return condition()

    def _wait(self, finding: Finding) -> Generator[float, None, dict[str, Any]]:
        """What the owner has found; not for longer than the sandbox lives, for an owner may do something else for ever."""
        while not finding.done():
            if self.sandbox.is_gone:
                return {"error": "the sandbox has gone meanwhile"}
            yield SOON
        if finding.cancelled():
            return {"error": "it was cancelled"}
        error = finding.exception()
        return finding.result() if error is None else {"error": str(error).partition("\n")[0]}

    # -- by what has happened ----------------------------------------------------------------------------------------

    def _memory(self, violation: SandboxViolation) -> Steps:
        """Stand still; what can be taken back is taken back, below the warning threshold if possible; then on. Who comes down,
        or at least grows no more, has been helped; the limit itself ends who goes on to grow."""
        if self._running():
            self.squeezed = violation
        source = source_of(self.sandbox)
        threshold = float(self.sandbox.recipe.monitoring["memory_warning_mb"]) * MB

        def used() -> float:
            reading = source.read()
            return float(reading.memory or 0) if reading is not None else 0.0

        try:
            yield from self._freeze(violation)
            try:
                yield from self._squeeze(violation, int(threshold * LOW), used)
            finally:
                self._thaw()
            thawed = used()
            self._tell(violation, "thaw", {}, {"memory_mb": thawed / MB}, True)
            last, end = thawed, int(SETTLE_SECONDS / SETTLE_LOOK)
            for _ in range(end):
                if last <= threshold:
                    break
                yield SETTLE_LOOK
                if not self._running():
                    break
                last = used()
            if not self._running():
                note = "its calls have ended"
                return self._tell(violation, "look", {"memory_mb": thawed / MB}, {"calls": 0}, True, note)
            came_down, note = last <= threshold, ""
            if not came_down:
                note = "it still grows" if last > thawed + GROWS else "it stays where it is, below its limit"
            seen = {"memory_mb": last / MB, "warning_mb": threshold / MB}
            return self._tell(violation, "look", {"memory_mb": thawed / MB}, seen, note != "it still grows", note)
        finally:
            source.close()

    def _squeeze(self, violation: SandboxViolation, low: int, used: Callable[[], float]) -> Steps:
        start = used()
        if not self._has("memory"):
            note = "no memory controller: nothing can be taken back"
            return self._tell(violation, "reclaim", {"memory_mb": start / MB}, {"memory_mb": start / MB}, False, note)
        before: dict[str, Any] = {"memory_mb": start / MB, "memory.high": self._get("memory.high")}
        note = ""
        while (more := int(used()) - low) > 0:
            try:
                leaf.write(self.sandbox.leaf_fd, "memory.reclaim", str(min(more, RECLAIM_BYTES)))
            except OSError as error:  # EAGAIN: what is left is in use; ENOENT: before Linux 5.19
                note = error.strerror or ""
                break
            yield 0
        self._set("memory.high", str(low))
        left = used()
        after = {"memory_mb": left / MB, "memory.high": self._get("memory.high")}
        self.settings["memory.high"] = "max"  # whoever runs on may use all of its limit
        self._relieve("memory.high")
        return self._tell(violation, "reclaim", before, after, left < start, note)

    def _cpu(self, violation: SandboxViolation) -> Steps:
        """A fourth of its limit, and last in the queue, for a while."""
        if not self._has("cpu"):
            try:
                yield from self._halt()  # else new ones come meanwhile
                pids = self._pids()
                threads = [int(thread) for pid in pids for thread in os.listdir(f"/proc/{pid}/task")]
                nice = min((os.getpriority(os.PRIO_PROCESS, thread) for thread in threads), default=0)
                for thread in threads:
                    os.setpriority(os.PRIO_PROCESS, thread, NICEST)
                are_told = [slow_session(pid) for pid in pids]
            finally:
                self._thaw()
            note = "by nice, for as long as they run: there is no cpu controller"
            if not all(are_told):
                note += "; towards other sessions, which have as much each (sched_autogroup_enabled), it changes nothing"
            return self._tell(violation, "slow down", {"nice": nice}, {"nice": NICEST}, bool(threads), note)
        names = ("cpu.max", "cpu.weight")
        before = {name: self._get(name) for name in names}
        quota, period = self.settings.get("cpu.max", before["cpu.max"]).split()  # of its limit, also when it is slow already
        self._set("cpu.max", f"{max(1000, int(quota) // SHARE)} {period}")
        self._set("cpu.weight", "1")
        after = {name: self._get(name) for name in names}

        def later() -> None:
            restored = self._relieve(*names)
            if restored:
                self._tell(violation, "relieve", after, restored, True)

        self._forget_slowed()
        self.slowed = self.sandbox.loop.call_later(SLOW_SECONDS, later)
        yield 0
        return self._tell(violation, "slow down", before, after, after != before)

    def _forget_slowed(self) -> None:
        """Its time is over, or begins anew."""
        if self.slowed is not None:
            self.slowed.cancel()
            self.slowed = None

    def _processes(self, violation: SandboxViolation) -> Steps:
        """No further process or thread of the calls that run now.

        By RLIMIT_NPROC of each process, from which its children have it, and not by pids.max: that is the whole sandbox's, and
        set anew whenever a call of it begins or ends.
        """
        try:
            running = yield from self._halt()  # else new ones come meanwhile, with the limit of old
            pids = self._pids()
            limits = []
            for pid in pids:
                with suppress(ProcessLookupError):  # it has just ended
                    limits.append(resource.prlimit(pid, resource.RLIMIT_NPROC, (0, 0)))
        finally:
            self._thaw()
        before = {"RLIMIT_NPROC": str(limits[0][0]) if limits else ""}
        after = {"RLIMIT_NPROC": "0", "processes": len(limits)}
        return self._tell(violation, "stop forks", before, after, bool(limits) and not running)

    def _files(self, violation: SandboxViolation) -> Steps:
        finding = self.discard()
        if finding is None:
            return self._tell(violation, "discard changes", {}, {}, False, "no folder was granted: there is nothing to discard")
        found = yield from self._wait(finding)
        before, after = found.get("before", {}), found.get("after", {})
        return self._tell(violation, "discard changes", before, after, "error" not in found, found.get("error", ""))

    def _network(self, violation: SandboxViolation) -> Steps:
        """While it stands still, so that no connection is passed on meanwhile."""
        before = {"calls": len(self._running())}
        cut = self.sandbox.cut

        def is_done() -> bool:
            return "links" in cut and ("connections" in cut or not cut["supervised"])

        if before["calls"]:
            yield from self._freeze(violation)
        try:
            self.sandbox.cut_off()
            yield from self._until(is_done, ANSWER)
        finally:
            self._thaw()
        after = {"links_down": cut.get("links", 0), "connections_ended": cut.get("connections", 0)}
        return self._tell(violation, "cut off", before, after, is_done(), "" if is_done() else "it does not answer")

    def _time(self, violation: SandboxViolation) -> Steps:
        """SIGTERM, a grace period, SIGKILL."""
        calls = self._running(violation.details.get("call", 0))
        for call in calls:
            call.recovered, call.cause = violation, call.cause or "recovery"
            call.signal(int(signal.SIGTERM))
        grace = max(float(self.sandbox.recipe.monitoring["grace_seconds"]), SOON)
        yield from self._until(lambda: all(call.done for call in calls), grace)
        left = [call for call in calls if not call.done]
        self._tell(violation, "terminate", {"calls": len(calls)}, {"calls": len(left), "seconds": grace}, not left)
        return (yield from self._kill(violation, left)) if left else True

    def _end(self, violation: SandboxViolation) -> Steps:
        """Stand still, while what it has left is kept as evidence, and be killed."""
        calls = self._running(violation.details.get("call", 0))
        try:
            try:
                yield from self._freeze(violation)
                yield from self._keep_evidence(violation)
            except Exception as error:  # it goes all the same, whatever is wrong
                self._tell(violation, "keep evidence", {}, {}, False, str(error))
            return (yield from self._kill(violation, calls))
        finally:
            self._thaw()  # other calls go on, or the next one begins

    def _keep_evidence(self, violation: SandboxViolation) -> Generator[float, None, None]:
        """Once for the same calls: of their many violations each would have a copy of all that they have left."""
        seen = self.sandbox.next_call, tuple(call.number for call in self._running())
        finding = self.evidence(violation) if seen != self.evidence_of else None
        if finding is not None:
            found = yield from self._wait(finding)
            note = found.get("error", "")
            self.evidence_of = seen if not note else self.evidence_of
            self._tell(violation, "keep evidence", {}, {"evidence": found.get("evidence")}, not note, note)


def drive(loop: Loop, steps: Steps, then: Callable[[bool], None]) -> None:
    """Go through `steps` on the loop, resting as long as they say."""
    try:
        pause = next(steps)
    except StopIteration as stop:
        then(bool(stop.value))
        return
    except Exception:  # a mistake of ours: nobody shall wait for it
        then(False)
        raise
    loop.call_later(pause, drive, loop, steps, then)


def slow_session(pid: int) -> bool:
    """Where each session has as much as any other, nice counts among its own processes only, and that of the session towards
    others (sched(7), autogroup). False where that is not ours to write: without root, of a process that is not dumpable."""
    try:
        with open(f"/proc/{pid}/autogroup", "w") as file:
            file.write(str(NICEST))
    except (FileNotFoundError, ProcessLookupError):  # there is no such thing here, or the process has just ended
        return True
    except OSError:
        return not is_by_session()
    return True


def is_by_session() -> bool:
    try:
        with open("/proc/sys/kernel/sched_autogroup_enabled") as file:
            return file.read().strip() != "0"
    except OSError:
        return False
