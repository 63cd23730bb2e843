"""What allows what: for all that a protection refuses, the setting that would permit it, and how that is said.

One table, RULES, and `explain`, which whoever records a violation asks; the functions below it are for what needs a look
at more than the table. Its claims are tried out in tests/integration/test_explanations.py, and a rule that names an
unknown field or option fails tests/test_explanations.py. It must not know how anything is detected or enforced. Imported
only where something was refused: a run without a violation does without it.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from dataclasses import dataclass, replace

from sandbox.engine.access import BITS, CUT_OFF, Access, carried, parse, plain, show
from sandbox.network import join, split
from sandbox.text import escape_text
from sandbox.violations import Explanation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from sandbox.engine.access import Address
    from sandbox.engine.client import Sandbox
    from sandbox.recipe_data import Recipe

    Setting = tuple[str, str, object]  # table of the TOML file, field, value

CLASSES = {"isolation": "IsolationConfig", "limits": "PluginLimitsV2", "permissions": "PluginPermissionsV2"}
GIVEN = object()  # in a rule: the value comes from whoever asks
SUBPROCESSES = 16  # as many as --allow-subprocess gives
PLACE = 200  # characters of a file's name that are kept
LISTED = 10  # a list of more entries is not written out


@dataclass(frozen=True)
class Rule:
    """Of one kind of refusal: the protection, its reason ({} stands for what the caller says) and what allows it.

    All of `settings` are needed together, the first gives its name; none of them: nothing allows it, and `note` says why.
    `flag` is an option of the command line, where {} stands for the value.
    """

    protection: str
    reason: str
    settings: tuple[Setting, ...] = ()
    flag: str | None = None
    note: str = ""


RULES: dict[str, Rule] = {
    # System calls, by what they are for.
    "processes": Rule(
        "seccomp",
        "seccomp refuses new processes",
        (("permissions", "allow_subprocess_execution", True), ("limits", "max_subprocess_count", SUBPROCESSES)),
        "--allow-subprocess",
    ),
    "sockets": Rule(
        "seccomp",
        "seccomp refuses sockets",
        (("permissions", "allow_network_access", True),),
        "--allow-host HOST",
        "where to is said by allowed_hosts; without root that takes user namespaces",
    ),
    "other sockets": Rule("seccomp", "seccomp refuses sockets other than for TCP", note="only TCP can be had"),
    "addresses": Rule(
        "seccomp", "seccomp refuses to send without a connection ({})", note="it could go anywhere, and only TCP can be had"
    ),
    "mounts": Rule("seccomp", "seccomp refuses changes of the mount tree ({})", note="the mount tree is the sandbox"),
    "namespaces": Rule("seccomp", "seccomp refuses new namespaces ({})", note="a plugin in its own has capabilities there"),
    "other processes": Rule(
        "seccomp", "seccomp refuses to read or steer another process ({})", note="no plugin has a reason for it"
    ),
    "no namespace": Rule("seccomp", "seccomp refuses keyrings and io_uring ({})", note="they do not respect namespaces"),
    "kernel programs": Rule(
        "seccomp", "seccomp refuses programs and probes inside the kernel ({})", note="no plugin has a reason for it"
    ),
    "kernel": Rule(
        "seccomp", "seccomp refuses to replace, extend or stop the kernel ({})", note="no plugin has a reason for it"
    ),
    "handles": Rule("seccomp", "seccomp refuses files by handle ({})", note="they pass every check of a path"),
    "files": Rule("seccomp", "seccomp refuses device nodes and set-user-ID files ({})", note="they may outlive the sandbox"),
    "ports": Rule("seccomp", "seccomp refuses hardware ports ({})", note="no plugin has a reason for it"),
    "terminals": Rule("seccomp", "seccomp refuses to type into a terminal ({})", note="the terminal is its caller's"),
    "other calls": Rule("seccomp", "seccomp refuses {}", note="no plugin has a reason for it"),
    # What the kernel refuses without a record: see QUIET.
    "capabilities": Rule("capabilities", "{} takes a capability, and a plugin has none"),
    "uncounted memory": Rule(
        "seccomp",
        "seccomp refuses memory without a file where there is no memory controller",
        note="nothing would count it; psie doctor says how to have a controller, and files in /dev/shm can be mapped",
    ),
    "buffers": Rule(
        "seccomp",
        "seccomp refuses to size the buffers of sockets where there is no memory controller",
        note="nothing would count them; psie doctor says how to have a controller",
    ),
    "attributes": Rule("seccomp", "seccomp refuses extended attributes", note="Landlock does not cover them"),
    "metadata": Rule(
        "seccomp",
        "seccomp refuses to change modes, owners and times of files",
        note="at level minimal without root they would be all of the caller's: take --level standard",
    ),
    "requests": Rule("seccomp", "seccomp refuses unusual requests to devices and files", note="no plugin has a use for them"),
    "locks": Rule(
        "seccomp", "seccomp refuses locks of open files", note="nothing counts them; fcntl.lockf and fcntl.flock can be had"
    ),
    # The network, as sandbox.engine.sockets decides on it.
    "connection": Rule(
        "network",
        "a connection to {} is not permitted",
        (("permissions", "allow_network_access", True), ("permissions", "allowed_hosts", GIVEN)),
        "--allow-host {}",
    ),
    "host": Rule(
        "allowed_hosts",
        "{} is not among the allowed hosts and ports",
        (("permissions", "allowed_hosts", GIVEN), ("permissions", "allow_network_access", True)),
        "--allow-host {}",
    ),
    "blocked host": Rule(
        "blocked_hosts",
        "{} is a blocked host",
        (
            ("permissions", "blocked_hosts", GIVEN),
            ("permissions", "allowed_hosts", GIVEN),
            ("permissions", "allow_network_access", True),
        ),
    ),
    "cut off": Rule("network", "{} was wanted after the sandbox was cut off from the network", note="open a new one"),
    "impossible connection": Rule("network", "{} was wanted in a way in which it is no connection"),
    "network": Rule("network", "psie refuses {}"),
    "network_requests": Rule(
        "network_requests", "a call may make {} connections", (("limits", "max_network_requests", GIVEN),)
    ),
    "file_operations": Rule(
        "limit of file operations", "a call may do {} file operations", (("limits", "max_file_operations", GIVEN),)
    ),
    # Modules and files.
    "allowed_modules": Rule(
        "allowed_modules", "the import of {} is not among the allowed ones", (("permissions", "allowed_modules", GIVEN),)
    ),
    "blocked_modules": Rule("blocked_modules", "the import of {} is blocked", (("permissions", "blocked_modules", GIVEN),)),
    "file": Rule(
        "view of the files",
        "{} is not the plugin's to do that with",
        (("permissions", "allowed_directories", GIVEN),),
        "--rw {}",
        "outside of granted folders and its own it may only read, and that as anybody may",
    ),
    "file creation": Rule(
        "writes only to the workspace", "{} may not be written", (("permissions", "allow_file_creation", True),)
    ),
    "deletion": Rule(
        "granted folders",
        "what was in a granted folder before may not be deleted",
        (("permissions", "allow_file_deletion", True),),
        "--allow-delete",
    ),
    # Limits: {} is what is allowed now, in the unit of the field.
    "memory": Rule("memory limit", "memory is limited to {} MB", (("limits", "max_memory_mb", GIVEN),), "--memory {}M"),
    "time": Rule("time limit", "time is limited to {} s", (("limits", "max_execution_time_seconds", GIVEN),), "--timeout {}"),
    "cpu": Rule("CPU limit", "the CPU rate is limited to {} % of one CPU", (("limits", "max_cpu_percent", GIVEN),), "--cpu {}"),
    "cpu time": Rule(
        "CPU limit",
        "CPU time is limited to what {} s allow",
        (("limits", "max_execution_time_seconds", GIVEN),),
        "--timeout {}",
    ),
    "threads": Rule("limit of processes", "threads are limited to {}", (("limits", "max_thread_count", GIVEN),), "--pids {}"),
    "tasks": Rule(
        "limit of processes",
        "processes and threads are limited to {}",
        (("limits", "max_subprocess_count", GIVEN),),
        "--pids {}",
    ),
    "file_size": Rule(
        "file size limit",
        "a file is limited to {} MB",
        (("permissions", "max_file_size_mb", GIVEN), ("limits", "max_file_size_mb", GIVEN)),
    ),
    "disk": Rule(
        "disk limit",
        "files are limited to {} MB",
        (("limits", "max_disk_usage_mb", GIVEN),),
        note="many small ones need more max_inodes",
    ),
    "open_files": Rule("limit of open files", "open files are limited to {}", (("limits", "max_open_files", GIVEN),)),
    "output": Rule("output limit", "output is limited to {} MB", (("limits", "max_output_mb", GIVEN),)),
    "result": Rule("result limit", "a result is limited to {} MB", (("limits", "max_result_mb", GIVEN),)),
}

# Which rule a system call that nothing allows falls under; the groups of [notify] in seccomp/denylist.toml.
CALLS = {
    "mounts": (
        "mount", "umount2", "pivot_root", "chroot", "open_tree", "open_tree_attr", "move_mount", "mount_setattr", "fsopen",
        "fsconfig", "fsmount", "fspick",
    ),
    "namespaces": ("unshare", "setns", "clone"),
    "other processes": ("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"),
    "no namespace": ("add_key", "keyctl", "request_key", "io_uring_setup"),
    "kernel programs": ("bpf", "perf_event_open", "userfaultfd"),
    "kernel": ("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "reboot"),
    "handles": ("open_by_handle_at",),
    "ports": ("iopl", "ioperm"),
    "files": (
        "mknod", "mknodat", "chmod", "fchmod", "fchmodat", "fchmodat2", "creat", "open", "openat",
        "renameat2",
    ),
    "terminals": ("ioctl",),
    "addresses": ("sendto", "sendmsg", "sendmmsg"),
}  # fmt: skip

# What Python calls in which the kernel refuses something without a record, and which rule that falls under. Of the same name
# there is much that is not refused: it counts only where an EPERM has come from it.
QUIET = {
    "metadata": ("chmod", "fchmod", "lchmod", "chown", "fchown", "lchown", "utime"),  # first, as the filter answers first
    "capabilities": (
        "chown", "fchown", "lchown", "nice", "setpriority", "sched_setscheduler", "sched_setparam", "sethostname",
        "clock_settime", "clock_settime_ns", "setuid", "seteuid", "setreuid", "setresuid", "setgid", "setegid", "setregid",
        "setresgid", "setgroups", "initgroups",
    ),
    "uncounted memory": ("memfd_create", "mmap"),
    "buffers": ("setsockopt",),
    "attributes": ("setxattr", "removexattr"),
    "requests": ("ioctl",),
    "locks": ("fcntl",),
}  # fmt: skip


def explain(
    key: str,
    what: object = "",
    values: Mapping[str, object] | None = None,
    *,
    word: str = "",
    file: str = "",
    line: int | None = None,
    note: str = "",
) -> Explanation:
    """The explanation by RULES[key]: `what` goes into its reason, `values` into its settings by their fields, `word` into
    its flag.

    Without the values that a rule wants, its setting is named, but not how to say it. `values` and `word` are written into
    code, so they are checked by the caller; all the rest may come from the plugin.
    """
    rule = RULES[key]
    given = values or {}
    settings = [(table, name, given.get(name) if value is GIVEN else value) for table, name, value in rule.settings]
    known = bool(settings) and all(value is not None for _, _, value in settings)
    tables = {table: [(name, value) for each, name, value in settings if each == table] for table, _, _ in settings}
    return Explanation(
        protection=rule.protection,
        reason=rule.reason.replace("{}", escape_text(_short(_shown(what)), keep="")),
        setting=f"{CLASSES[settings[0][0]]}.{settings[0][1]}" if settings else None,
        flag=rule.flag.replace("{}", word) if rule.flag is not None and (word or "{}" not in rule.flag) else None,
        toml="\n".join(_toml_table(table, pairs) for table, pairs in tables.items()) if known else None,
        file=escape_text(_short(file), keep="") or None,
        line=line,
        python=" and ".join(_python_call(table, pairs) for table, pairs in tables.items()) if known else None,
        note="; ".join(filter(None, (rule.note, escape_text(_short(note), keep="")))),
    )


def limited(name: str, allowed: float, *, refused: bool = True) -> Explanation:
    """Of a limit: `allowed` is what it allows now, in the unit of its field; it proposes twice as much."""
    field, value = RULES[name].settings[0][1], more(allowed)
    return replace(explain(name, float(allowed), {field: value}, word=_shown(value)), refused=refused)


def tasks(threads: int, subprocesses: int, note: str = "") -> Explanation:
    """Of the limit of processes and threads, which count together."""
    value = more(max(threads, subprocesses))
    if subprocesses:
        return explain("tasks", threads + subprocesses, {"max_subprocess_count": value}, word=str(value), note=note)
    return explain("threads", threads, {"max_thread_count": value}, word=str(value), note=note)


def processes(recipe: Recipe) -> Explanation:
    """Of a new process."""
    if "pid" in recipe.namespaces or recipe.cgroup is not None:
        return explain("processes")
    note = "level minimal could not end such processes here: that also takes --level standard, or --allow-degraded"
    return explain("processes", note=note)


SOCK_STREAM, SOCK_TYPE_MASK = 1, 0xF
IPPROTO_TCP = 6


def socket(name: str, arguments: Sequence[int]) -> Explanation:
    """Of a socket that the filter refuses, by the system call's first three arguments."""
    family, kind, protocol = (argument & 0xFFFFFFFF for argument in arguments)
    is_tcp = family in BITS and kind & SOCK_TYPE_MASK == SOCK_STREAM and protocol in (0, IPPROTO_TCP)
    return explain("sockets" if name == "socket" and is_tcp else "other sockets")


def network(record: Mapping[str, Any], what: str, sandbox: Sandbox, *, is_excess: bool) -> Explanation:
    """Of a refused network operation; `record` as sandbox.engine.outcome.activity describes it, `what` in words."""
    rules = sandbox.recipe.network
    if is_excess:
        return limited("network_requests", rules["max_requests"])
    if record["operation"] == "socket" and record["type"] == "SOCK_STREAM" and record["family"] in ("AF_INET", "AF_INET6"):
        return explain("other sockets" if rules["sockets"] else "sockets")
    if record["operation"] != "connect" or record["family"] not in ("AF_INET", "AF_INET6"):
        return explain("network", what, note=record["reason"])
    try:
        address, port = plain(parse(record["address"] or "")), record["port"] or 0
    except OSError:
        return explain("network", what, note=record["reason"])  # no address: nothing that a setting could allow
    if record["reason"] == CUT_OFF:
        return explain("cut off", what)
    if not port or Access(rules["access"], sandbox.resolved).decide(address, port)[0]:
        return explain("impossible connection", what)
    return connection(address, port, rules["access"], sandbox.resolved)


def connection(address: Address, port: int, access: Mapping[str, Any] | None, resolved: Mapping[str, Any]) -> Explanation:
    """Of a connection that the lists of hosts do not allow. `access` and `resolved` as in sandbox.engine.access."""
    own = join(show(address), port)
    if access is None:
        return explain("connection", own, {"allowed_hosts": [own]}, word=own)
    rest = [entry for entry in access["blocked"] if not _is_blocked(address, port, entry, resolved)]
    allowed, blocked = [[join(host, only) for host, only in entries] for entries in (access["allowed"], rest)]
    if not Access({**access, "blocked": rest}, resolved).decide(address, port)[0]:
        allowed.append(own)
    values = {"allowed_hosts": _listed(allowed), "blocked_hosts": _listed(blocked)}
    if len(rest) < len(access["blocked"]):
        return explain("blocked host", own, values)
    return explain("host", own, values, word=own)


def _is_blocked(address: Address, port: int, entry: Sequence[Any], resolved: Mapping[str, Any]) -> bool:
    """Whether this one entry of blocked_hosts is about it."""
    ((_, networks, only),) = Access({"allowed": [], "blocked": [entry], "ports": []}, resolved).blocked
    forms = (address, carried(address))
    return (networks is None or any(form in each for form in forms for each in networks)) and only in (0, port)


def kernel(name: str) -> Explanation:
    """Of a system call that no setting allows."""
    key = next((key for key, names in CALLS.items() if name in names), "other calls")
    return explain(key, name)


def quiet(line: str, recipe: Recipe) -> tuple[str, Explanation] | None:
    """Of an EPERM that has no record: what was refused of that which is called in the line that it came from, and why. None
    where that cannot be told, and where the line has raised it itself."""
    called = re.findall(r"(\w+)\s*\(", line)
    allowed = {
        "metadata": "allow_metadata",
        "uncounted memory": "allow_uncounted_memory",
        "buffers": "allow_uncounted_memory",
    }
    argument = {"locks": "F_OFD_", "buffers": "SO_SNDBUF"}
    if re.search(r"\braise\b", line):
        return None
    for key, known in QUIET.items():
        if recipe.seccomp.get(allowed.get(key, "")) or argument.get(key, "") not in line:
            continue
        for name in known:
            if name in called:
                return name, explain(key, name)
    return None


def imported(which: str, module: str, recipe: Recipe, file: str, line: int | None) -> Explanation:
    """Of a refused import. `which` is the list that refuses it: allowed_modules or blocked_modules."""
    parts = module.split(".")
    above = {".".join(parts[: end + 1]) for end in range(len(parts))}
    listed = list(recipe.modules[which.removesuffix("_modules")])
    wanted = [*listed, module] if which == "allowed_modules" else [each for each in listed if each not in above]
    is_module = all(part.isidentifier() for part in parts) and len(module) <= PLACE
    return explain(which, module, {which: _listed(wanted) if is_module else None}, file=file, line=line)


def name(host: str, port: int, recipe: Recipe, place: str, line: int | None) -> Explanation:
    """Of a host's name that was asked for, at a line of the plugin's own file `place`."""
    access = recipe.network["access"]
    try:
        known, _ = split(host)
    except ValueError:
        known = ""
    if known and access is not None and any(known == blocked for blocked, _ in access["blocked"]):
        return explain("blocked host", host, file=place, line=line)
    ports = access["ports"] if access is not None else (80, 443)
    own = join(known, 0 if port in (0, *ports) else port) if known else ""
    if access is None:
        return explain("connection", host, {"allowed_hosts": [own] if known else None}, word=own, file=place, line=line)
    allowed = [*(join(*entry) for entry in access["allowed"]), own]
    return explain("host", host, {"allowed_hosts": _listed(allowed) if known else None}, word=own, file=place, line=line)


def file(path: str, recipe: Recipe, place: str, line: int | None) -> Explanation:
    """Of a file that the plugin was refused, at a line of its own file `place`; proposes a folder where granting it helps."""
    if not any(access.startswith("write") and each == recipe.workspace["path"] for each, access in landlock_rules(recipe)):
        return explain("file creation", path, file=place, line=line)
    from sandbox.recipe import SYSTEM, under, ungrantable

    folder = os.path.dirname(path)
    is_plain = len(folder) <= PLACE and folder.isprintable() and not ungrantable(folder) and not under(folder, SYSTEM)
    proposed = folder if is_plain and os.access(folder, os.W_OK) else None
    values = {"allowed_directories": [proposed] if proposed else None}
    return explain("file", path, values, word=shlex.quote(proposed) if proposed else "", file=place, line=line)


def landlock_rules(recipe: Recipe) -> list[list[str]]:
    return recipe.landlock["rules"] if recipe.landlock is not None else []


def more(value: float) -> float:
    """A plain number well above `value`."""
    return math.ceil(value * 2) if value >= 1 else value * 2 or 1


def _short(text: str) -> str:
    """The end of it, which tells most of a path."""
    return text if len(text) <= PLACE else f"...{text[3 - PLACE :]}"


def _listed(entries: list[str]) -> list[str] | None:
    return entries if len(entries) <= LISTED else None


def _shown(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _python_call(table: str, pairs: list[tuple[str, object]]) -> str:
    arguments = (f"{name}={_shown(value) if isinstance(value, float) else repr(value)}" for name, value in pairs)
    return f"{CLASSES[table]}({', '.join(arguments)})"


def _toml_table(table: str, pairs: list[tuple[str, object]]) -> str:
    return "\n".join((f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in pairs)))


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_toml(each) for each in value)}]"
    if isinstance(value, str):
        import json

        return json.dumps(value, ensure_ascii=False)
    return _shown(value)
