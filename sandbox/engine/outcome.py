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
    from collections.abc import Sequence
    from typing import Any

    from sandbox.engine.client import Answer, Call, Sandbox
    from sandbox.recipe_data import Recipe
    from sandbox.violations import Explanation, SandboxViolation

# Errors of a plugin that a limit of ours causes: errno -> (limit, name in Recipe.limits).
LIMIT_ERRNO = {
    errno.EFBIG: ("file_size", "file_bytes"),
    errno.ENOSPC: ("disk", "disk_bytes"),
    errno.EDQUOT: ("disk", "disk_bytes"),
    errno.EMFILE: ("open_files", "open_files"),
}
BYTES = {"memory", "output", "result", "file_size", "disk"}  # limits whose settings are in MB
MB = 1 << 20
QUOTED = 8  # names in the message of an exception that may be those of files: of the kernel's refusals there are two at most
# What repr() makes of a text or bytes. Of other escapes the parser would warn, and quote a plugin's character as it is.
LITERAL = r"""b?'(?:[^'\\]|{0})*'|b?"(?:[^"\\]|{0})*\"""".replace(
    "{0}", r"\\(?:[\\'\"nrt]|x[\da-f]{2}|u[\da-f]{4}|U[\da-f]{8})"
)
PLACE = 200  # characters of a file's name, of which the end tells most
NETWORK = {"socket", "socketpair", "accept", "accept4"}
FILES = {"mknod", "mknodat", "chmod", "fchmod", "fchmodat", "fchmodat2", "creat", "open", "openat"}
COUNTED = ("memory.events", "pids.events")  # files of a cgroup whose counts come with the end of a call
PERMISSION = {"fork", "vfork", "clone", "execve", "execveat"}
# linux/sched.h: CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET
CLONE_NEW = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
# What a line of Python that makes a socket, or a process, calls; elsewhere it is the name of the system call itself.
SOCKET_NAMES = {"socket", "socketpair"}
PROCESS_NAMES = {"fork", "vfork", "forkpty", "fork_exec", "spawnvef"}
PROCESS_NAMES |= {"posix_spawn", "posix_spawnp", "execv", "execve", "exec_func"}


def describe_violation(fields: dict[str, str], sandbox: Sandbox) -> SandboxViolation:
    """A refused system call, as the supervisor tells it, or a refused import, as the interpreter does, in words."""
    from datetime import UTC, datetime

    from sandbox import explanations
    from sandbox.seccomp.filter import syscall_name
    from sandbox.violations import SandboxViolation, SandboxViolationType

    if fields["nr"].endswith("_modules"):
        return describe_import(fields, sandbox.recipe)
    if fields["nr"] == "file":
        return describe_file(fields, sandbox.recipe)
    if fields["nr"] == "name":
        return describe_name(fields, sandbox)
    if "operation" in fields:
        return describe_network(fields, sandbox)
    number = int(fields["nr"])
    name = syscall_name(number)
    arguments = [int(fields[f"arg{i}"]) for i in range(3)]
    if name in NETWORK:
        kind, severity, hint = SandboxViolationType.NETWORK_VIOLATION, "warning", "sockets are not permitted"
        explanation = explanations.socket(name, arguments)
    elif name in PERMISSION and not (name == "clone" and arguments[0] & CLONE_NEW):
        kind, severity, hint = (
            SandboxViolationType.PERMISSION_DENIED,
            "warning",
            "new processes are not permitted: allow_subprocess_execution (--allow-subprocess)",
        )
        explanation = explanations.processes(sandbox.recipe)
    elif name in FILES:
        kind, severity, hint = SandboxViolationType.FILESYSTEM_VIOLATION, "warning", "no device nodes, no set-user-ID files"
        explanation = explanations.kernel(name)
    else:
        kind, severity, hint = SandboxViolationType.SECURITY_BREACH, "critical", "no plugin has a reason for it"
        explanation = explanations.kernel(name)
    details = {
        "syscall": name,
        "arguments": arguments,
        "count": int(fields["count"]),
        "errno": "EPERM",
        "source": "kernel",
        "call": int(fields["call"]),
    }
    text = f"{name}() was refused: {hint}"
    return SandboxViolation(kind, text, datetime.now(UTC), severity, details, explanation=explanation)


def describe_network(fields: dict[str, str], sandbox: Sandbox) -> SandboxViolation:
    from datetime import UTC, datetime

    from sandbox import explanations
    from sandbox.violations import SandboxViolation, SandboxViolationType

    record, is_excess = activity(fields), fields["excess"] == "1"
    kind = SandboxViolationType.RESOURCE_EXCEEDED if is_excess else SandboxViolationType.NETWORK_VIOLATION
    what = f"{record['operation']}() of {wanted_of(record)}"
    text = f"{what} was refused: {record['reason']}"
    details = {name: record[name] for name in ("operation", "family", "type", "address", "port", "reason", "call")}
    details |= {"count": int(fields["count"]), "errno": "EPERM", "source": "kernel"}
    if is_excess:
        details["limit"] = "network_requests"
    explanation = explanations.network(record, what, sandbox, is_excess=is_excess)
    return SandboxViolation(kind, text, datetime.now(UTC), "warning", details, explanation=explanation)


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
        "pid": int(fields["pid"]) or None,
        "call": int(fields["call"]),
    }


def wanted_of(record: dict[str, Any]) -> str:
    """Where to, or what kind of socket."""
    if record["address"] is None:
        return " ".join(filter(None, (record["family"], record["type"]))) or "a socket"
    if record["port"] is None:
        return f"{record['address']} ({record['family']})"
    return f"[{record['address']}]:{record['port']}" if ":" in record["address"] else f"{record['address']}:{record['port']}"


def describe_import(fields: dict[str, str], recipe: Recipe) -> SandboxViolation:
    from datetime import UTC, datetime

    from sandbox import explanations
    from sandbox.text import escape_text
    from sandbox.violations import SandboxViolation, SandboxViolationType

    module, file, line = (escape_text(fields[name], keep="") for name in ("arg0", "file", "line"))
    number = line_number(line)
    which = "is blocked by" if fields["nr"] == "blocked_modules" else "is not in"
    text = f"the import of {module} was refused ({file}, line {line}): it {which} PluginPermissionsV2.{fields['nr']}"
    details = {
        "module": module,
        "file": file,
        "line": number,
        "count": int(fields["count"]),
        "source": "interpreter",
        "call": int(fields["call"]),
    }
    explanation = explanations.imported(fields["nr"], fields["arg0"], recipe, fields["file"], number)
    kind = SandboxViolationType.PERMISSION_DENIED
    return SandboxViolation(kind, text, datetime.now(UTC), "warning", details, explanation=explanation)


def locate(call: Call | Answer, violations: list[SandboxViolation], earlier: Sequence[SandboxViolation] = ()) -> None:
    """Tell the violation that ended the plugin where that was, if its exception was of a refused operation of that kind.

    The kernel does not know it: file and line are the interpreter's word, so the plugin's, and marked as such. What is no
    violation where a library goes on without it (a socket for datagrams) is one where the plugin has ended by it, and so is
    what the kernel refuses without a record, unless it is one of the `earlier` ones of a session, which are told once.
    """
    if call.reply_kind != channel.REPLY_ERROR or not call.reply_complete:
        return
    try:
        error = failure.decode(call.reply)
    except channel.Malformed:
        return
    if error.errno != errno.EPERM:
        return
    names = _names(call, error)
    if not any(names & operations(_operation(each)) for each in (*violations, *earlier)):
        violations += unrecorded(call, _line(call, error)) or (passing(call, names) if names or not violations else [])
    if not violations or not error.file:
        return
    from dataclasses import replace

    from sandbox.text import escape_text

    for violation in reversed(violations):
        if violation.explanation is not None and names & operations(_operation(violation)):
            file = escape_text(error.file[-PLACE:], keep="")
            violation.explanation = replace(violation.explanation, file=file, line=error.line or None)
            violation.details |= {"file": file, "line": error.line or None, "position": "interpreter"}
            return


def passing(call: Call | Answer, names: set[str]) -> list[SandboxViolation]:
    """What has ended the plugin and is no violation else, if the line has these names, or nothing is known of it."""
    if call.passing is None:
        return []
    found = describe_violation(call.passing, call.sandbox)
    return [found] if not names or names & operations(_operation(found)) else []


def unrecorded(call: Call | Answer, line: str) -> list[SandboxViolation]:
    """What has ended the plugin and was refused by the kernel without a record, as the line tells."""
    from datetime import UTC, datetime

    from sandbox import explanations
    from sandbox.violations import SandboxViolation, SandboxViolationType

    found = explanations.quiet(line, call.sandbox.recipe)
    if found is None:
        return []
    name, explanation = found
    details = {"syscall": name, "count": 1, "errno": "EPERM", "source": "interpreter", "call": call.number}
    text, kind = f"{name}() was refused: {explanation.reason}", SandboxViolationType.PERMISSION_DENIED
    return [SandboxViolation(kind, text, datetime.now(UTC), "warning", details, explanation=explanation)]


def repeated(answer: Answer, earlier: list[SandboxViolation]) -> list[SandboxViolation]:
    """Of a session: the refusal that an exception comes from, where its process has been refused the same before. Equal ones
    are told once for each process."""
    if answer.reply_kind != channel.REPLY_ERROR or not answer.reply_complete:
        return []
    try:
        error = failure.decode(answer.reply)
    except channel.Malformed:
        return []
    names, quoted = _names(answer, error), _quoted(error.message)
    for violation in reversed(earlier):
        # Where no line of the plugin's is on the way, it may be any.
        is_there = "path" in violation.details or not error.file or bool(names & operations(_operation(violation)))
        if _comes_from(error, quoted, violation) and (is_there or _operation(violation) == "resolve"):
            return [violation]
    return []


def _quoted(message: str) -> list[str]:
    """The names of files in an OSError's message, which are there as repr() gives them, escaped as those of a violation are."""
    import ast
    import re
    from itertools import islice

    from sandbox.text import escape_text

    found = []
    for each in islice(re.finditer(LITERAL, message), QUOTED):
        try:
            found.append(escape_text(os.fsdecode(ast.literal_eval(each.group())), keep=""))
        except (ValueError, SyntaxError):
            continue  # no repr()
    return found


def _comes_from(error: failure.Failure, quoted: list[str], violation: SandboxViolation) -> bool:
    """Whether an exception is of this kind of refusal: of this file, of a name, or of anything else that answers EPERM.
    `quoted` are the files in its message: there may be thousands of violations to compare them with."""
    path = str(violation.details.get("path") or "")
    if path:
        is_about = any(each == path or path.endswith("/" + each.removeprefix("./")) for each in quoted)
        return is_about and errno.errorcode.get(error.errno) == violation.details.get("errno")
    if _operation(violation) == "resolve":
        return error.type.endswith("gaierror")
    return error.errno == errno.EPERM and "module" not in violation.details  # a refused import has no errno


def _names(call: Call | Answer, error: failure.Failure) -> set[str]:
    """Those in the line of code that was refused something."""
    import re

    return {name.lstrip("_") for name in re.findall(r"\w+", _line(call, error))}


def _line(call: Call | Answer, error: failure.Failure) -> str:
    """The line of code that was refused something. The sandbox could not read the caller's own file: only that is read here."""
    return error.done or (_source_line(call.source_file, error.line) if error.file == call.source_file else "")


def _operation(violation: SandboxViolation) -> str:
    return str(violation.details.get("syscall") or violation.details.get("operation") or "")


def operations(name: str) -> set[str]:
    """The names that code has for a system call."""
    if name in NETWORK:
        return SOCKET_NAMES
    return PROCESS_NAMES if name in PERMISSION else {name}


def describe_name(fields: dict[str, str], sandbox: Sandbox) -> SandboxViolation:
    """A name that the interpreter has asked for; the plugin could leave it out, or make it up."""
    from datetime import UTC, datetime

    from sandbox import explanations
    from sandbox.text import escape_text
    from sandbox.violations import SandboxViolation, SandboxViolationType

    name, file, line = (escape_text(fields[key], keep="") for key in ("address", "file", "line"))
    number, port = line_number(line), int(fields["port"])
    where = f" ({file}, line {line})" if file else ""
    details = {
        "operation": "resolve",
        "address": name,
        "port": port or None,
        "reason": fields["reason"],
        "file": file,
        "line": number,
        "count": int(fields["count"]),
        "source": "interpreter",
        "call": int(fields["call"]),
    }
    explanation = explanations.name(fields["address"], port, sandbox.recipe, fields["file"], number)
    kind = SandboxViolationType.NETWORK_VIOLATION
    text = f"the name {name} was asked for{where}: {fields['reason']}"
    return SandboxViolation(kind, text, datetime.now(UTC), "warning", details, explanation=explanation)


def line_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else None


def describe_file(fields: dict[str, str], recipe: Recipe) -> SandboxViolation:
    """What the interpreter says about a file that the kernel has refused it; the plugin could leave it out, or make it up."""
    from datetime import UTC, datetime

    from sandbox import explanations
    from sandbox.text import escape_text
    from sandbox.violations import SandboxViolation, SandboxViolationType

    path, file, line = (escape_text(fields[name], keep="") for name in ("path", "file", "line"))
    number = line_number(line)
    where = f" ({file}, line {line})" if file else ""
    text = f"{fields['operation']} of {path} was refused: {fields['errno']}{where}"
    details = {
        "path": path,
        "operation": fields["operation"],
        "errno": fields["errno"],
        "file": file,
        "line": number,
        "count": int(fields["count"]),
        "source": "interpreter",
        "call": int(fields["call"]),
    }
    explanation = explanations.file(fields["path"], recipe, fields["file"], number)
    kind = SandboxViolationType.FILESYSTEM_VIOLATION
    return SandboxViolation(kind, text, datetime.now(UTC), "warning", details, explanation=explanation)


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


def no_reply(call: Call | None, who: str, instead_of: str) -> PluginExecutionError:
    """For what ended where a reply was awaited, and not for a reason that `judge` knows."""
    code = exit_of(call)[0] if call is not None else None
    if code is None:
        return PluginExecutionError(f"{who} was ended instead of {instead_of}: its caller was interrupted; call again")
    return PluginExecutionError(f"{who} exited with status {code} instead of {instead_of}", exit_code=code)


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
        if call.hidden:  # no setting allows that
            text = f"the plugin hid what it did in {call.hidden[:PLACE]} from the count of its file operations"
            return ResourceLimitExceededError(text, limit="file_operations", allowed=allowed)
        text = f"the plugin did {used} file operations of {allowed} that it may do"
        return _limit("file_operations", allowed, used, text)
    if call.cause == "violations":
        return SecurityViolationError("the plugin passed the violation threshold and was killed", violations=violations)
    if call.cause == "recovery" and call.recovered is not None:
        return _recovered(call.recovered, violations)
    if cause == "supervisor":
        return ResourceError("the sandbox's supervisor has died, so the sandbox was killed: open a new one")
    code, number = exit_of(call)
    if number is not None or (cause == "killed" and code is None):
        seen = (call.read_back or {}).get("limit/Max cpu time", "")  # the caller's own may be lower
        return _killed(
            number or signal.SIGKILL, {**limits, "cpu_seconds": float(seen)} if seen.isdecimal() else limits, violations
        )
    return reply_error(call, violations)


def reply_error(said: Call | Answer, violations: list[SandboxViolation]) -> SandboxException | None:
    """The exception that a complete reply is; None for a value."""
    if said.reply_kind == channel.REPLY_ERROR and said.reply_complete:
        return plugin_error(said, violations)
    if said.reply_kind == channel.REPLY_UNFIT and said.reply_complete:
        return _unfit(said)
    return None


def _limit(
    name: str, allowed: float, used: float | None, text: str, explanation: Explanation | None = None
) -> ResourceLimitExceededError:
    if explanation is None:
        from sandbox import explanations

        explanation = explanations.limited(name, allowed / MB if name in BYTES else allowed)
    return ResourceLimitExceededError(text, limit=name, allowed=allowed, used=used, explanation=explanation)


def _recovered(violation: SandboxViolation, violations: list[SandboxViolation]) -> SandboxException:
    """Recovery has ended the plugin, because of this violation."""
    from sandbox.violations import SandboxViolationType

    text = f"recovery ended the plugin: {violation.message}"
    explanation, details = violation.explanation, violation.details
    if violation.type in (SandboxViolationType.RESOURCE_EXCEEDED, SandboxViolationType.EXECUTION_TIMEOUT):
        name, allowed, used = str(details.get("limit", "")), details.get("allowed"), details.get("used")
        return ResourceLimitExceededError(text, limit=name, allowed=allowed, used=used, explanation=explanation)
    return SecurityViolationError(text, violations=violations, explanation=explanation)


def _killed(number: int, limits: dict[str, float], violations: list[SandboxViolation]) -> SandboxException:
    if number == signal.SIGXCPU:
        from sandbox import explanations

        seconds, explanation = limits["cpu_seconds"], explanations.limited("cpu time", limits["seconds"])
        return _limit("cpu", seconds, seconds, f"the plugin used more than {seconds:g} s of CPU", explanation)
    if number == signal.SIGSYS:
        return SecurityViolationError(
            "the plugin was killed by seccomp: it used a foreign system call ABI", violations=violations
        )
    from signal import Signals

    name = Signals(number).name if number in set(Signals) else f"signal {number}"
    return PluginExecutionError(f"the plugin was killed by {name}", signal=number)


def with_source(traceback_text: str, filename: str) -> str:
    """The traceback with the source lines of the caller's own `filename`, which the sandbox could not read."""
    lines = traceback_text.splitlines()
    shown = []
    for position, line in enumerate(lines):
        shown.append(line)
        following = lines[position + 1] if position + 1 < len(lines) else ""
        prefix = f'  File "{filename}", line '
        if line.startswith(prefix) and not following.startswith("    "):
            number = line[len(prefix) :].partition(",")[0]
            source = (
                _source_line(filename, int(number)).strip()
                if number.isascii() and number.isdecimal() and len(number) < 9
                else ""
            )
            if source:
                shown.append("    " + source)
    return "\n".join(shown)


def _source_line(filename: str, number: int) -> str:
    """Of a file of the caller's own; "" where it has none."""
    import linecache

    try:
        return linecache.getline(filename, number) if filename else ""
    except Exception:  # whatever decodes it
        return ""


def plugin_error(call: Call | Answer, violations: list[SandboxViolation]) -> SandboxException:
    """An exception of the plugin. What it says about itself is text from a sandbox; errno and MemoryError decide the class."""
    limits = call.sandbox.recipe.limits
    try:
        error = failure.decode(call.reply)
    except channel.Malformed:
        return PluginExecutionError("the plugin raised an exception that it does not describe", exception_type="?")
    if error.errno == errno.ENOMEM and error.type.endswith("MemoryError"):
        return _limit(
            "memory", limits["memory_bytes"], None, f"the plugin wanted more memory than its limit allows ({error.type})"
        )
    is_thread = (error.type, error.message) == ("RuntimeError", "can't start new thread")
    if is_thread or (error.errno == errno.EAGAIN and _names(call, error) & PROCESS_NAMES):
        allowed = limits["threads"] + limits["subprocesses"]  # the kernel says no more than that (fork(2), pthread_create(3))
        from sandbox import explanations

        recipe = call.sandbox.recipe
        is_counted = "memory" in (recipe.cgroup or {}).get("controllers", ())
        note = "" if is_counted or not is_thread else "or max_memory_mb: without a memory controller all of its stack counts"
        explanation = explanations.tasks(int(limits["threads"]), int(limits["subprocesses"]), note)
        text = f"the plugin wanted more processes or threads than it may have: {error.message}"
        return _limit("pids", allowed, None, text, explanation)
    name, key = LIMIT_ERRNO.get(error.errno, ("", ""))
    if name and not (name == "disk" and call.sandbox.recipe.workspace["kind"] == "folder"):  # that has no limit of ours
        return _limit(name, limits[key], None, f"the plugin passed its limit of {name}: {error.message}")
    if error.errno == errno.EPERM and violations and violations[-1].details.get("limit") == "network_requests":
        return _limit("network_requests", call.sandbox.recipe.network["max_requests"], None, violations[-1].message)
    names, quoted = _names(call, error), _quoted(error.message)
    fitting = [each for each in reversed(violations) if _comes_from(error, quoted, each)]
    if fitting:
        last = next((each for each in fitting if "path" in each.details or names & operations(_operation(each))), fitting[0])
        text = f"the plugin ended by a refused operation: {last.message}"
        return SecurityViolationError(text, violations=violations, explanation=last.explanation)
    return PluginExecutionError(
        f"{error.type}: {error.message}" if error.message else error.type,
        exception_type=error.type,
        exception_message=error.message,
        traceback_text=with_source(error.traceback, call.source_file),
    )


def _unfit(call: Call | Answer) -> SandboxException:
    try:
        _, fields = channel.unpack(bytes(call.reply))
    except channel.Malformed:
        fields = {}
    used = fields.get("used", "")
    if used.isascii() and used.isdecimal() and len(used) < 16:
        allowed = call.sandbox.recipe.limits["result_bytes"]
        return _limit("result", allowed, int(used), f"the reply is larger than {allowed} bytes")
    return PluginExecutionError(fields.get("text", "the reply cannot travel"), exception_type="CodecError")
