"""What came of a run, as plain data: the one source of --result-file and --report.

Imported where one of them is asked for, when the run is over. Must not know how it is shown.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from time import monotonic

from sandbox.cli.remembered import outcome_of, reason_of
from sandbox.engine import outcome
from sandbox.recipe_data import MISSING, OWN_PROCESSES
from sandbox.telemetry import SandboxTelemetry
from sandbox.version import __version__
from sandbox.violations import to_plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from sandbox.cli.session import Session
    from sandbox.errors import SandboxException
    from sandbox.recipe_data import Protection
    from sandbox.violations import SandboxViolation

# Where sandbox.engine.warden reads what a protection is expected to show.
PLACES = (("ns/", "/proc/PID/ns"), ("limit/", "/proc/PID/limits"), ("", "/proc/PID/status"))
# What psie counts while the plugin runs: the kernel has no such limit.
BY_PSIE = ("wall clock", "output", "result", "network requests", "file operations")


def result_of(
    session: Session, status: int, error: SandboxException | None, violations: Sequence[SandboxViolation]
) -> dict[str, Any]:
    """The content of --result-file; docs/report.md tells its keys."""
    call, remembered, recipe, recorder = session.call, session.remembered, session.recipe, session.recorder
    assert call is not None
    assert remembered is not None
    remembered.hash()
    reason = str(error).splitlines()[0] if error is not None else reason_of(session, status)
    telemetry = telemetry_of(session, reason, violations).to_dict()
    watch = session.watch
    result = {
        "psie": __version__,
        "kernel": os.uname().release,
        "uid": os.getuid(),
        "plugin": remembered.plugin_id,
        "sha256": remembered.sha256,
        "exit_code": status,
        "outcome": outcome_of(session, status),
        "reason": reason,
        "level": recipe.level,
        "began": datetime.fromtimestamp(session.job_time, UTC).isoformat(),
        "seconds": session.seconds,
        "limits": to_plain(session.limits),
        "max_tasks": OWN_PROCESSES + int(recipe.limits["threads"] + recipe.limits["subprocesses"]),
        "sampling": {
            "enabled": bool(recipe.monitoring["real_time"]),
            "interval_seconds": float(recipe.monitoring["interval_seconds"]),
            "began_seconds": watch.started - session.job_sent if watch is not None else None,
        },
        "protections": protections_of(session.protections(), call.read_back),
        "violations": telemetry["violations"],
        "telemetry": telemetry,
        "network": [outcome.activity(fields) for fields in session.activity],
        "file_operations": list(recorder.records) if recorder is not None else [],
    }
    if session.recovery is not None:
        result["recovery"] = session.recovery.history
    if session.settled is not None:
        changes = [dict(vars(change)) for change in session.settled.found]
        result |= {"changes": changes, "committed": session.settled.is_committed}
    return result


def telemetry_of(session: Session, reason: str, violations: Sequence[SandboxViolation]) -> SandboxTelemetry:
    call, watch = session.call, session.watch
    assert call is not None
    start = datetime.fromtimestamp(session.start, UTC)
    return SandboxTelemetry(
        sandbox_id=call.sandbox.name,
        plugin_id=os.path.basename(session.given.get("file") or session.given.get("target", "")),
        start_time=start,
        end_time=start + timedelta(seconds=monotonic() - session.begun),
        peak_memory_mb=session.peak_memory_mb(),
        peak_cpu_percent=watch.peak_cpu if watch else 0.0,
        network_operations_count=session.network_operations,
        file_operations_count=session.recorder.count if session.recorder else 0,
        resource_samples=session.samples,
        process_hierarchy=watch.hierarchy if watch else [],
        violations=list(violations),
        exit_code=outcome.exit_of(call)[0],
        exit_reason=reason,
        cleanup_successful=call.sandbox.is_gone,
        link_counters=outcome.link_counters(call),
    )


def protections_of(protections: Sequence[Protection], read_back: Mapping[str, str] | None) -> list[dict[str, str]]:
    return [{**protection.to_dict(), "checked": checked(protection, read_back)} for protection in protections]


def checked(protection: Protection, read_back: Mapping[str, str] | None) -> str:
    """How it is known that a protection held, in a clause."""
    if read_back is None:
        return "not checked: no plugin process came to stand"
    if protection.state == MISSING:
        return "nothing to check"
    if protection.expected:
        found = {next(place for prefix, place in PLACES if name.startswith(prefix)) for name in protection.expected}
        return f"read back from {' and '.join(sorted(found))} before the plugin began"
    if protection.name == "writes only to the workspace" and read_back.get("probe", "none") != "none":
        return "tried: a write elsewhere, possible a moment before, was refused"
    if protection.name in BY_PSIE:
        return "counted by psie while the plugin ran"
    return "by its set-up: a step of that which fails ends the sandbox"
