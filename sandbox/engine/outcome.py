"""What the end of a call means: from wait status, reply and violations to the documented exception or status.

The reason comes from the kernel (wait status, exhausted limits as errno) and from what psie itself did (deadline, output,
result); nothing is guessed from texts. Must not know asyncio or the command line.
"""

from __future__ import annotations

import _signal as signal  # signal.py would import enum
import errno
import os

from sandbox.engine import channel, failure
from sandbox.errors import (
    PluginExecutionError,
    ResourceError,
    ResourceLimitExceededError,
    SandboxException,
    SecurityViolationError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.engine.client import Call
    from sandbox.violations import SandboxViolation

# Errors of a plugin that a limit of ours causes: errno -> (limit, name in Recipe.limits).
LIMIT_ERRNO = {
    errno.EFBIG: ("file_size", "file_bytes"),
    errno.ENOSPC: ("disk", "disk_bytes"),
    errno.EDQUOT: ("disk", "disk_bytes"),
    errno.EMFILE: ("open_files", "open_files"),
}
MB = 1 << 20
NETWORK = {"socket", "socketpair", "accept", "accept4"}
FILES = {"mknod", "mknodat", "chmod", "fchmod", "fchmodat", "fchmodat2", "creat", "open", "openat"}
COUNTED = ("memory.events", "pids.events")  # files of a cgroup whose counts come with the end of a call
PERMISSION = {"fork", "vfork", "clone", "execve", "execveat"}


def describe_violation(fields: dict[str, str]) -> SandboxViolation:
    """A refused system call, as the supervisor tells it, or a refused import, as the interpreter does, in words."""
    from datetime import UTC, datetime

    from sandbox.seccomp.filter import syscall_name
    from sandbox.violations import SandboxViolation, SandboxViolationType

    if fields["nr"].endswith("_modules"):
        return describe_import(fields)
    if fields["nr"] == "file":
        return describe_file(fields)
    if "operation" in fields:
        return describe_network(fields)
    number = int(fields["nr"])
    name = syscall_name(number) if number >= 0 else "further system calls"
    if name in NETWORK:
        kind, severity, hint = SandboxViolationType.NETWORK_VIOLATION, "warning", "sockets are not permitted"
    elif name in PERMISSION:
        kind, severity, hint = (
            SandboxViolationType.PERMISSION_DENIED,
            "warning",
            "new processes are not permitted: allow_subprocess_execution (--allow-subprocess)",
        )
    elif name in FILES:
        kind, severity, hint = SandboxViolationType.FILESYSTEM_VIOLATION, "warning", "no device nodes, no set-user-ID files"
    else:
        kind, severity, hint = SandboxViolationType.SECURITY_BREACH, "critical", "no plugin has a reason for it"
    details = {
        "syscall": name,
        "arguments": [int(fields[f"arg{i}"]) for i in range(3)],
        "count": int(fields["count"]),
        "errno": "EPERM",
        "source": "kernel",
        "call": int(fields["call"]),
    }
    return SandboxViolation(
        type=kind, message=f"{name}() was refused: {hint}", timestamp=datetime.now(UTC), severity=severity, details=details
    )


def describe_network(fields: dict[str, str]) -> SandboxViolation:
    from datetime import UTC, datetime

    from sandbox.violations import SandboxViolation, SandboxViolationType

    record = activity(fields)
    kind = SandboxViolationType.RESOURCE_EXCEEDED if fields["excess"] == "1" else SandboxViolationType.NETWORK_VIOLATION
    text = f"{record['operation']}() of {wanted_of(record)} was refused: {record['reason']}"
    details = {name: record[name] for name in ("operation", "family", "type", "address", "port", "reason", "call")}
    details |= {"count": int(fields["count"]), "errno": "EPERM", "source": "kernel"}
    if fields["excess"] == "1":
        details["limit"] = "network_requests"
    return SandboxViolation(kind, text, datetime.now(UTC), "warning", details)


def activity(fields: dict[str, str]) -> dict[str, Any]:
    """One network operation as NetworkIsolationManager.get_network_activity() lists it."""
    from datetime import UTC, datetime

    from sandbox.text import escape_text

    return {
        "timestamp": datetime.fromtimestamp(float(fields.get("time", "0")), UTC).isoformat(),
        "operation": fields["operation"],
        "family": fields["family"],
        "type": fields["kind"],
        "address": escape_text(fields["address"], keep="") or None,
        "port": int(fields["port"]) or None,
        "allowed": fields["allowed"] == "1",
        "reason": escape_text(fields["reason"], keep=""),
        "pid": int(fields["pid"]),
        "call": int(fields["call"]),
    }


def wanted_of(record: dict[str, Any]) -> str:
    """Where to, or what kind of socket."""
    if record["address"] is None:
        return " ".join(filter(None, (record["family"], record["type"]))) or "a socket"
    if record["port"] is None:
        return f"{record['address']} ({record['family']})"
    return f"[{record['address']}]:{record['port']}" if ":" in record["address"] else f"{record['address']}:{record['port']}"


def describe_import(fields: dict[str, str]) -> SandboxViolation:
    from datetime import UTC, datetime

    from sandbox.text import escape_text
    from sandbox.violations import SandboxViolation, SandboxViolationType

    module, file, line = (escape_text(fields[name], keep="") for name in ("arg0", "file", "line"))
    which = "is blocked by" if fields["nr"] == "blocked_modules" else "is not in"
    text = f"the import of {module} was refused ({file}, line {line}): it {which} PluginPermissionsV2.{fields['nr']}"
    details = {
        "module": module,
        "file": file,
        "line": int(line) if line.isascii() and line.isdecimal() and len(line) < 9 else None,
        "count": int(fields["count"]),
        "source": "interpreter",
        "call": int(fields["call"]),
    }
    return SandboxViolation(SandboxViolationType.PERMISSION_DENIED, text, datetime.now(UTC), "warning", details)


def describe_file(fields: dict[str, str]) -> SandboxViolation:
    """What the interpreter says about a file that the kernel has refused it; the plugin could leave it out, or make it up."""
    from datetime import UTC, datetime

    from sandbox.text import escape_text
    from sandbox.violations import SandboxViolation, SandboxViolationType

    path, file, line = (escape_text(fields[name], keep="") for name in ("path", "file", "line"))
    where = f" ({file}, line {line})" if file else ""
    text = f"{fields['operation']} of {path} was refused: {fields['errno']}{where}"
    details = {
        "path": path,
        "operation": fields["operation"],
        "errno": fields["errno"],
        "file": file,
        "line": int(line) if line.isascii() and line.isdecimal() and len(line) < 9 else None,
        "count": int(fields["count"]),
        "source": "interpreter",
        "call": int(fields["call"]),
    }
    return SandboxViolation(SandboxViolationType.FILESYSTEM_VIOLATION, text, datetime.now(UTC), "warning", details)


def counted(call: Call) -> list[SandboxViolation]:
    """What the kernel has counted in a call that was too short to be watched."""
    seen = {name: value for name, value in (call.outcome or {}).items() if name.partition(" ")[0] in COUNTED}
    if not seen:
        return []
    from sandbox.monitor.watch import Thresholds, violations_of

    return violations_of(seen, Thresholds.of_recipe(call.sandbox.recipe))


def link_counters(call: Call) -> dict[str, int]:
    """Of the empty link of level maximum, as its init has read them."""
    names = ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets")
    return {name: int(call.outcome[name]) for name in names if call.outcome and name in call.outcome}


def exit_of(call: Call) -> tuple[int | None, int | None]:
    """(exit code, signal) of the worker; both None where it did not end by itself."""
    if call.outcome is None or "status" not in call.outcome:
        return None, None
    code = os.waitstatus_to_exitcode(int(call.outcome["status"]))
    return (code, None) if code >= 0 else (None, -code)


def judge(call: Call, violations: list[SandboxViolation]) -> SandboxException | None:
    """The exception that this end is, or None if the plugin ended by itself with a value or an exit status."""
    limits = call.sandbox.recipe.limits
    if call.error is not None:
        return call.error
    assert call.outcome is not None
    cause = call.outcome.get("cause", "exit")
    if cause == "timeout":
        seconds = limits["seconds"]
        return _limit("time", seconds, seconds, f"the plugin ran longer than {seconds:g} s")
    if cause == "memory":
        allowed, used = limits["memory_bytes"], int(call.outcome.get("used", "0"))
        text = f"the plugin was killed: used {used / MB:.1f} of {allowed / MB:g} MB"
        return _limit("memory", allowed, used, text)
    if call.cause == "output":
        return _limit(
            "output", limits["output_bytes"], None, f"the plugin wrote more than {limits['output_bytes']} bytes of output"
        )
    if call.cause == "result":
        return _limit(
            "result", limits["result_bytes"], call.reply_size, f"the reply is larger than {limits['result_bytes']} bytes"
        )
    if call.cause == "file_operations":
        allowed, used = call.sandbox.recipe.monitoring["max_file_operations"], call.file_operations
        return _limit("file_operations", allowed, used, f"the plugin did {used} file operations of {allowed} that it may do")
    if call.cause == "violations":
        return SecurityViolationError("the plugin passed the violation threshold and was killed", violations=violations)
    if cause == "supervisor":
        return ResourceError("the sandbox's supervisor has died, so the sandbox was killed: open a new one")
    code, number = exit_of(call)
    if number is not None or (cause == "killed" and code is None):
        return _killed(number or signal.SIGKILL, limits, violations)
    if call.reply_kind == channel.REPLY_ERROR and call.reply_complete:
        return plugin_error(call, violations)
    if call.reply_kind == channel.REPLY_UNFIT and call.reply_complete:
        return _unfit(call)
    return None


def _limit(name: str, allowed: float, used: float | None, text: str) -> ResourceLimitExceededError:
    return ResourceLimitExceededError(text, limit=name, allowed=allowed, used=used)


def _killed(number: int, limits: dict[str, float], violations: list[SandboxViolation]) -> SandboxException:
    if number == signal.SIGXCPU:
        seconds = limits["cpu_seconds"]
        return _limit("cpu", seconds, seconds, f"the plugin used more than {seconds:g} s of CPU")
    if number == signal.SIGSYS:
        return SecurityViolationError(
            "the plugin was killed by seccomp: it used a foreign system call ABI", violations=violations
        )
    from signal import Signals

    name = Signals(number).name if number in set(Signals) else f"signal {number}"
    return PluginExecutionError(f"the plugin was killed by {name}", signal=number)


def with_source(traceback_text: str, filename: str) -> str:
    """The traceback with the source lines of the caller's own `filename`, which the sandbox could not read."""
    import linecache

    lines = traceback_text.splitlines()
    shown = []
    for position, line in enumerate(lines):
        shown.append(line)
        following = lines[position + 1] if position + 1 < len(lines) else ""
        prefix = f'  File "{filename}", line '
        if line.startswith(prefix) and not following.startswith("    "):
            number = line[len(prefix) :].partition(",")[0]
            source = (
                linecache.getline(filename, int(number)).strip()
                if number.isascii() and number.isdecimal() and len(number) < 9
                else ""
            )
            if source:
                shown.append("    " + source)
    return "\n".join(shown)


def plugin_error(call: Call, violations: list[SandboxViolation]) -> SandboxException:
    """An exception of the plugin. What it says about itself is text from a sandbox; errno and MemoryError decide the class."""
    limits = call.sandbox.recipe.limits
    try:
        error = failure.decode(call.reply)
    except channel.Malformed:
        return PluginExecutionError("the plugin raised an exception that it does not describe", exception_type="?")
    if error.type.endswith("MemoryError"):
        return _limit(
            "memory", limits["memory_bytes"], None, f"the plugin wanted more memory than its limit allows ({error.type})"
        )
    if error.errno == errno.EAGAIN or (error.type, error.message) == ("RuntimeError", "can't start new thread"):
        allowed = limits["threads"] + limits["subprocesses"]  # the kernel says no more than that (fork(2), pthread_create(3))
        return _limit("pids", allowed, None, f"the plugin wanted more processes or threads than it may have: {error.message}")
    if error.errno in LIMIT_ERRNO:
        name, key = LIMIT_ERRNO[error.errno]
        return _limit(
            name, limits[key], None, f"the plugin passed its limit of {name} ({key} {limits[key]:g}): {error.message}"
        )
    if error.errno == errno.EPERM and violations and violations[-1].details.get("limit") == "network_requests":
        return _limit("network_requests", call.sandbox.recipe.network["max_requests"], None, violations[-1].message)
    if error.errno in (errno.EPERM, errno.EACCES, errno.EROFS) and violations:
        return SecurityViolationError(
            f"the plugin ended by a refused operation: {violations[-1].message}", violations=violations
        )
    return PluginExecutionError(
        f"{error.type}: {error.message}",
        exception_type=error.type,
        exception_message=error.message,
        traceback_text=with_source(error.traceback, call.source_file),
    )


def _unfit(call: Call) -> SandboxException:
    try:
        _, fields = channel.unpack(bytes(call.reply))
    except channel.Malformed:
        fields = {}
    used = fields.get("used", "")
    if used.isascii() and used.isdecimal() and len(used) < 16:
        allowed = call.sandbox.recipe.limits["result_bytes"]
        return _limit("result", allowed, int(used), f"the reply is larger than {allowed} bytes")
    return PluginExecutionError(fields.get("text", "the reply cannot travel"), exception_type="CodecError")
