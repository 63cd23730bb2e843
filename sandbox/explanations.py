"""What allows what: for all that a protection refuses, the setting that would permit it, and how that is said.

One table, RULES, and `explain`, which whoever records a violation asks; the functions below it are for what needs a look
at more than the table. Its claims are tried out in tests/integration/test_explanations.py, and a rule that names an
unknown field or option fails tests/test_explanations.py. It must not know how anything is detected or enforced. Imported
only where something was refused: a run without a violation does without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sandbox.text import escape_text
from sandbox.violations import Explanation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

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
    "sockets": Rule("seccomp", "seccomp refuses sockets", note="network access is not part of this version"),
    "other sockets": Rule(
        "seccomp", "seccomp refuses sockets other than TCP and UDP", note="many of them do not respect namespaces"
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
    "ports": Rule("seccomp", "seccomp refuses hardware ports ({})", note="no plugin has a reason for it"),
    "terminals": Rule("seccomp", "seccomp refuses to type into a terminal ({})", note="the terminal is its caller's"),
    "other calls": Rule("seccomp", "seccomp refuses {}", note="no plugin has a reason for it"),
    # Modules and files.
    "allowed_modules": Rule(
        "allowed_modules", "the import of {} is not among the allowed ones", (("permissions", "allowed_modules", GIVEN),)
    ),
    "blocked_modules": Rule("blocked_modules", "the import of {} is blocked", (("permissions", "blocked_modules", GIVEN),)),
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
    "terminals": ("ioctl",),
}  # fmt: skip


def explain(
    key: str, what: object = "", value: object = None, *, file: str = "", line: int | None = None, note: str = ""
) -> Explanation:
    """The explanation by RULES[key]. `what` goes into its reason, `value` into its settings and its flag.

    Without the value that a rule wants, its setting is named, but not how to say it. Everything may come from the plugin
    except `value`, which is written into code.
    """
    rule = RULES[key]
    settings = [(table, name, value if given is GIVEN else given) for table, name, given in rule.settings]
    known = bool(settings) and all(each is not None for _, _, each in settings)
    return Explanation(
        protection=rule.protection,
        reason=rule.reason.replace("{}", escape_text(_number(what) if isinstance(what, float) else str(what), keep="")),
        setting=f"{CLASSES[settings[0][0]]}.{settings[0][1]}" if settings else None,
        flag=rule.flag.replace("{}", _toml(value)) if rule.flag is not None and known else None,
        toml="\n".join(f"[{table}]\n{name} = {_toml(each)}" for table, name, each in settings) if known else None,
        file=escape_text(_short(file), keep="") or None,
        line=line,
        python=" and ".join(f"{CLASSES[table]}({name}={_python(each)})" for table, name, each in settings) if known else None,
        note="; ".join(filter(None, (rule.note, note))),
    )


def limited(name: str, allowed: float, *, refused: bool = True) -> Explanation:
    """Of a limit: `allowed` is what it allows now, in the unit of its field; it proposes twice as much."""
    return replace(explain(name, float(allowed), more(allowed)), refused=refused)


def tasks(threads: int, subprocesses: int) -> Explanation:
    """Of the limit of processes and threads, which count together."""
    value = more(max(threads, subprocesses))
    return explain("tasks", threads + subprocesses, value) if subprocesses else explain("threads", threads, value)


def processes(recipe: Recipe) -> Explanation:
    """Of a new process."""
    if "pid" in recipe.namespaces or recipe.cgroup is not None:
        return explain("processes")
    note = "level minimal could not end such processes here: that also takes --level standard, or --allow-degraded"
    return explain("processes", note=note)


AF_INET, AF_INET6 = 2, 10
SOCK_STREAM, SOCK_DGRAM, SOCK_TYPE_MASK = 1, 2, 0xF
IPPROTO_TCP, IPPROTO_UDP = 6, 17


def socket(name: str, arguments: Sequence[int]) -> Explanation:
    """Of a system call of the network, by its first three arguments."""
    family, kind, protocol = (argument & 0xFFFFFFFF for argument in arguments)
    ordinary = (
        family in (AF_INET, AF_INET6)
        and kind & SOCK_TYPE_MASK in (SOCK_STREAM, SOCK_DGRAM)
        and protocol in (0, IPPROTO_TCP, IPPROTO_UDP)
    )
    return explain("sockets" if ordinary or name not in ("socket", "socketpair") else "other sockets")


def kernel(name: str) -> Explanation:
    """Of a system call that no setting allows."""
    key = next((key for key, names in CALLS.items() if name in names), "other calls")
    return explain(key, name)


def imported(which: str, module: str, recipe: Recipe, file: str, line: int | None) -> Explanation:
    """Of a refused import. `which` is the list that refuses it: allowed_modules or blocked_modules."""
    parts = module.split(".")
    above = {".".join(parts[: end + 1]) for end in range(len(parts))}
    listed = list(recipe.modules[which.removesuffix("_modules")])
    wanted = [*listed, module] if which == "allowed_modules" else [each for each in listed if each not in above]
    is_module = all(part.isidentifier() for part in parts) and len(module) <= PLACE
    return explain(
        which, _short(module), wanted if is_module and len(wanted) <= LISTED else None, file=file, line=line
    )  # fmt: skip


def more(value: float) -> float:
    """A plain number well above `value`."""
    return math.ceil(value * 2) if value >= 1 else value * 2 or 1


def _short(text: str) -> str:
    """The end of it, which tells most of a path."""
    return text if len(text) <= PLACE else f"...{text[3 - PLACE :]}"


def _number(value: float) -> str:
    return f"{value:.12g}"


def _python(value: object) -> str:
    return _number(value) if isinstance(value, float) else repr(value)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(each) for each in value)}]"
    if isinstance(value, str):
        import json

        return json.dumps(value, ensure_ascii=False)
    return _number(value) if isinstance(value, float) else str(value)
