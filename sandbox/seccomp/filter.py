"""From a profile's data file to the BPF program that the kernel runs before every system call of a sandbox.

Runs on the host only; a sandbox is given the finished bytes (load.py loads them). libseccomp resolves names and builds
the search tree; this module reads the data files, puts the checks of arguments in front of that tree, and keeps finished
programs in a cache. It must not know who loads a program or what becomes of a notification.

A program has two parts, one behind the other:

1. The gate: for the few system calls whose arguments matter, the rules of the profile in order, the first that fits
   decides. libseccomp has no order among rules with overlapping arguments, no "otherwise", and compares 64 bits where the
   kernel reads 32; so these checks are assembled here. (runc patches libseccomp's programs in the same way.)
2. The tree from libseccomp: one action per system call, ENOSYS for what is not listed. A foreign system call ABI (i386
   through int 0x80, x32) kills the process: no program that got this far makes such a call by accident.

A notified call of a sandbox that has no listener, or whose supervisor has died, answers ENOSYS: refused as well.

The kernel's side: seccomp(2), Documentation/userspace-api/seccomp_filter.rst, linux/filter.h, linux/seccomp.h.
"""

from __future__ import annotations

import errno
import os
import sys

from sandbox import state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

PROFILES = ("denylist", "allowlist", "tight")
FEATURES = (
    "allow_subprocess",
    "allow_threads",
    "sockets",
    "allow_metadata",
    "allow_uncounted_memory",
    "allow_truncate",
    "allow_ioctls",
)

SECCOMP_RET_USER_NOTIF = 0x7FC00000
SECCOMP_RET_ERRNO = 0x00050000

BPF_MAXINSNS = 4096
_INSTRUCTION_BYTES = 8

_FOLDER = os.path.dirname(__file__)
_PROGRAM_LIMIT_BYTES = BPF_MAXINSNS * _INSTRUCTION_BYTES
_names_by_number: dict[int, str] = {}


def compile_profile(
    profile: str,
    *,
    allow_subprocess: bool,
    allow_threads: bool,
    sockets: bool,
    allow_metadata: bool = True,
    allow_uncounted_memory: bool = True,
    allow_truncate: bool = True,
    allow_ioctls: bool = True,
    notify: bool = True,
) -> bytes:
    """The BPF program of `profile` (one of PROFILES) in the variant for these permissions, for this machine.

    `sockets` says that the supervisor answers for sockets: makes, connects and refuses them.
    With `notify=False` the calls that a supervisor would record answer plain EPERM: for hosts where a sandbox can have
    no listener (the kernel permits one per process, seccomp(2) EBUSY).

    Raises ImportError, with the mend, where pyseccomp or libseccomp is missing, ValueError for an unknown profile or a
    mistake in a data file.
    """
    permitted = _permitted(
        allow_subprocess, allow_threads, sockets, allow_metadata, allow_uncounted_memory, allow_truncate, allow_ioctls
    )
    return _compile(_Profile(profile), permitted, os.uname().machine, notify)


def cached_profile(
    profile: str,
    *,
    allow_subprocess: bool,
    allow_threads: bool,
    sockets: bool,
    allow_metadata: bool = True,
    allow_uncounted_memory: bool = True,
    allow_truncate: bool = True,
    allow_ioctls: bool = True,
    notify: bool = True,
) -> bytes:
    """As compile_profile(), but kept in the cache for the next process (state.Cache: one that cannot be used is no error).

    A cached program counts only if it was made from the same data, by the same code and library, for the same machine.
    """
    if profile not in PROFILES:
        raise ValueError(f"no seccomp profile {profile!r}: there are {', '.join(PROFILES)}")
    permitted = _permitted(
        allow_subprocess, allow_threads, sockets, allow_metadata, allow_uncounted_memory, allow_truncate, allow_ioctls
    )
    variant = "-".join([profile, *(name.removeprefix("allow_") for name in permitted), *(["notify"] if notify else [])])
    cache = state.Cache("bpf")
    key = f"{variant} {_identity()}".encode()
    program = cache.read(variant, key)
    if program is None:
        program = _compile(_Profile(profile), permitted, os.uname().machine, notify)
        cache.write(variant, program, key)
    return program


def syscall_name(number: int) -> str:
    """The name of a system call of this machine, as libseccomp knows it, or "syscall_<number>"."""
    if number not in _names_by_number:
        try:
            pyseccomp = _import_pyseccomp()
            _names_by_number[number] = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, number).decode()
        except (ImportError, ValueError):  # a filter from the cache needs no library
            return f"syscall_{number}"
    return _names_by_number[number]


def _permitted(*allowed: bool) -> tuple[str, ...]:
    flags = zip(FEATURES, allowed, strict=True)
    return tuple(feature for feature, is_permitted in flags if is_permitted)


# What a data file says ------------------------------------------------------------------------------------------------

_LISTS = {
    "refuse": SECCOMP_RET_ERRNO | errno.EPERM,
    "notify": SECCOMP_RET_USER_NOTIF,
    "absent": SECCOMP_RET_ERRNO | errno.ENOSYS,
}


class _Profile:
    """A profile and its base, read and checked. Anything not understood is an error: a typo must not open a door."""

    def __init__(self, name: str) -> None:
        if name not in PROFILES:
            raise ValueError(f"no seccomp profile {name!r}: there are {', '.join(PROFILES)}")
        self.name = name
        data = _raw(name)
        known_keys = {"base", "allow", "allow_like", "newer", "rule", "constants", *_LISTS}
        self._check(not data.keys() - known_keys, f"unknown keys {sorted(data.keys() - known_keys)}")

        base = _Profile(data["base"]) if "base" in data else None
        self.newer: set[str] = {*data.get("newer", []), *(base.newer if base else ())}
        self.constants: dict[str, int | list[str]] = {**(base.constants if base else {}), **data.get("constants", {})}
        self.actions: dict[str, int] = dict(base.actions) if base else {}
        self.allow = set(self._unique(data["allow"]))
        if "allow_like" in data:
            self.allow.update(self._unique(_raw(data["allow_like"])["allow"]))
        for kind, action in _LISTS.items():
            for syscall in self._unique(data.get(kind, {})):
                self._check(syscall not in self.actions, f"{syscall} is listed twice")
                self.actions[syscall] = action
        both = self.allow & self.actions.keys()
        self._check(not both, f"both allowed and refused: {sorted(both)}")
        self.rules: list[dict[str, Any]] = [*(base.rules if base else []), *data.get("rule", [])]
        for rule in self.rules:
            self._check_rule(rule)

    def named_syscalls(self) -> set[str]:
        """Every system call that the profile mentions."""
        return self.allow | self.actions.keys() | {name for rule in self.rules for name in rule["syscalls"]}

    def rules_for(self, syscall: str, permitted: tuple[str, ...]) -> list[dict[str, Any]]:
        """The rules that hold for `syscall` in this variant, up to the first without conditions."""
        found = []
        for rule in self.rules:
            if syscall not in rule["syscalls"]:
                continue
            if ("when" in rule and rule["when"] not in permitted) or ("unless" in rule and rule["unless"] in permitted):
                continue
            found.append(rule)
            if not rule.get("where"):
                break
        return found

    def values(self, *constants: int | str) -> list[int]:
        """The numbers that are meant, of a name for a list each of it."""
        found: list[int] = []
        for constant in constants:
            value = self.constants[constant] if isinstance(constant, str) else constant
            if isinstance(value, list):
                found += self.values(*value)
            else:
                self._check(0 <= value <= 0xFFFFFFFF, f"{constant} does not fit 32 bits")
                found.append(value)
        return found

    def _unique(self, groups: dict[str, list[str]]) -> list[str]:
        names = [name for group in groups.values() for name in group]
        self._check(len(names) == len(set(names)), f"listed twice: {sorted({n for n in names if names.count(n) > 1})}")
        return names

    def _check_rule(self, rule: dict[str, Any]) -> None:
        self._check(not rule.keys() - {"syscalls", "where", "action", "when", "unless"}, f"unknown key in the rule {rule}")
        self._check(rule["action"] in ("pass", *_LISTS), f"unknown action in the rule {rule}")
        self._check({rule.get("when"), rule.get("unless")} <= {None, *FEATURES}, f"unknown feature in the rule {rule}")
        for condition in rule.get("where", []):
            tests = condition.keys() - {"argument", "half"}
            self._check(tests in ({"equals"}, {"bits"}, {"equals", "mask"}), f"unknown condition {condition}")
            self._check(condition.get("half", "high") == "high", f"unknown half in {condition}")
            constants = [*condition.get("equals", []), *condition.get("bits", []), condition.get("mask", 0)]
            for name in list(constants):
                meant = self.constants.get(name)
                constants += meant if isinstance(meant, list) else []
            unknown = [name for name in constants if isinstance(name, str) and name not in self.constants]
            self._check(not unknown, f"unknown constants {unknown}")

    def _check(self, holds: bool, mistake: str) -> None:
        if not holds:
            raise ValueError(f"seccomp profile {self.name}: {mistake}")


def _raw(profile: str) -> dict[str, Any]:
    """What the data file of a profile says."""
    import tomllib

    with open(_data_path(profile), "rb") as file:
        return tomllib.load(file)


def _data_path(profile: str) -> str:
    return os.path.join(_FOLDER, f"{profile}.toml")


# From a profile to a program ------------------------------------------------------------------------------------------


def _compile(profile: _Profile, permitted: tuple[str, ...], machine: str, notify: bool) -> bytes:
    """The program for `machine` ("x86_64" or "aarch64"), which need not be the one we run on."""
    pyseccomp = _import_pyseccomp()
    architectures = {"x86_64": pyseccomp.Arch.X86_64, "aarch64": pyseccomp.Arch.AARCH64}
    if machine not in architectures:
        raise ValueError(f"no seccomp profiles for {machine}: there are some for {', '.join(architectures)}")
    known = {other: known_syscalls(other) for other in architectures}
    numbers = known[machine]
    unknown = profile.named_syscalls() - {name for names in known.values() for name in names} - profile.newer
    profile._check(not unknown, f"no system calls of these names: {sorted(unknown)}")

    actions = dict(profile.actions)
    gate = _Gate(architectures[machine])
    for syscall in sorted({name for rule in profile.rules for name in rule["syscalls"]} & numbers.keys()):
        rules = profile.rules_for(syscall, permitted)
        if rules and not rules[0].get("where"):  # nothing about arguments: the tree can say it
            if rules[0]["action"] != "pass":
                actions[syscall] = _LISTS[rules[0]["action"]]
        elif rules:
            gate.add(numbers[syscall], rules, profile, notify)
    for syscall in profile.allow:
        actions.setdefault(syscall, pyseccomp.ALLOW)
    tree = {name: action for name, action in actions.items() if name in numbers}
    program = gate.assemble() + _tree(architectures[machine], tree, notify)
    if len(program) > _PROGRAM_LIMIT_BYTES:
        raise ValueError(
            f"seccomp profile {profile.name} needs {len(program) // 8} instructions, the kernel takes {BPF_MAXINSNS}"
        )
    return program


def known_syscalls(machine: str) -> dict[str, int]:
    """Name and number of every system call that libseccomp knows on `machine` ("x86_64" or "aarch64")."""
    pyseccomp = _import_pyseccomp()
    architecture = {"x86_64": pyseccomp.Arch.X86_64, "aarch64": pyseccomp.Arch.AARCH64}[machine]
    found = {}
    for number in range(1024):  # the kernel has about 470, and gives new ones the next number on all machines
        try:
            found[pyseccomp.resolve_syscall(architecture, number).decode()] = number
        except ValueError:
            continue
    return found


def _tree(architecture: int, actions: dict[str, int], notify: bool) -> bytes:
    """libseccomp's program: one action for each name, ENOSYS for the rest, death for a foreign ABI."""
    pyseccomp = _import_pyseccomp()
    pyseccomp.set_api(5)  # notifications; the library would otherwise ask the kernel, and fail inside a container
    absent = pyseccomp.ERRNO(errno.ENOSYS)
    tree = pyseccomp.SyscallFilter(absent)
    tree.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    tree.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)  # a binary tree
    if architecture != pyseccomp.system_arch():
        tree.add_arch(architecture)
        tree.remove_arch(pyseccomp.system_arch())
    for name, action in sorted(actions.items()):
        if action != absent:  # the library refuses rules that repeat the default
            tree.add_rule(_without_notify(action, notify), pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))
    descriptor = os.memfd_create("psie-seccomp", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        tree.export_bpf(file)
        file.seek(0)
        return file.read()


def _without_notify(action: int, notify: bool) -> int:
    return SECCOMP_RET_ERRNO | errno.EPERM if action == SECCOMP_RET_USER_NOTIF and not notify else action


# linux/bpf_common.h: class | size | mode, or class | operation | source
_LD_W_ABS = 0x00 | 0x00 | 0x20
_AND_K = 0x04 | 0x50 | 0x00
_JA = 0x05 | 0x00 | 0x00
_JEQ_K = 0x05 | 0x10 | 0x00
_JGE_K = 0x05 | 0x30 | 0x00
_JSET_K = 0x05 | 0x40 | 0x00
_RET_K = 0x06 | 0x00

# linux/seccomp.h, struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]
_OFFSET_NR = 0
_OFFSET_ARCH = 4
_OFFSET_ARGS = 16


class _Gate:
    """Assembles the rules about arguments. A call that no rule refuses leaves at the end, where the tree begins.

    The low half of an argument lies first: both machines are little-endian.
    """

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture
        self._blocks: list[tuple[int, list[_Instruction]]] = []

    def add(self, number: int, rules: list[dict[str, Any]], profile: _Profile, notify: bool) -> None:
        block: list[_Instruction] = []
        for rule in rules:
            test = [step for condition in rule.get("where", []) for step in self._condition(condition, profile)]
            if rule["action"] == "pass":
                act = _Instruction(_JA, 0, "tree")
            else:
                act = _Instruction(_RET_K, _without_notify(_LISTS[rule["action"]], notify))
            block += _resolve([*test, act], next_rule=len(test) + 1)
        block.append(_Instruction(_JA, 0, "tree"))
        self._blocks.append((number, block))

    def assemble(self) -> bytes:
        """The gate's bytes: nothing for another architecture, otherwise a search for the system call among the guarded ones."""
        import struct

        program = [
            _Instruction(_LD_W_ABS, _OFFSET_ARCH),
            _Instruction(_JEQ_K, self._architecture, on_true=1),
            _Instruction(_JA, 0, "tree"),
            _Instruction(_LD_W_ABS, _OFFSET_NR),
        ]
        program += self._search(sorted(self._blocks, key=lambda numbered: numbered[0]))
        for position, step in enumerate(program):
            if step.target == "tree":
                step.value = len(program) - position - 1
        return b"".join(struct.pack("=HBBI", step.code, step.on_true, step.on_false, step.value) for step in program)

    def _search(self, blocks: list[tuple[int, list[_Instruction]]]) -> list[_Instruction]:
        """By halves: openat and ioctl are guarded, and programs call them often."""
        if not blocks:
            return []
        if len(blocks) == 1:
            ((number, block),) = blocks
            return [_Instruction(_JEQ_K, number, on_true=1), _Instruction(_JA, 0, "tree"), *block]
        middle = len(blocks) // 2
        lower, upper = self._search(blocks[:middle]), self._search(blocks[middle:])
        return [_Instruction(_JGE_K, blocks[middle][0], on_false=1), _Instruction(_JA, len(lower)), *lower, *upper]

    def _condition(self, condition: dict[str, Any], profile: _Profile) -> Iterator[_Instruction]:
        """One condition: goes on behind itself if it holds, to the label "next rule" if not."""
        half = 4 if "half" in condition else 0
        yield _Instruction(_LD_W_ABS, _OFFSET_ARGS + 8 * condition["argument"] + half)
        if "mask" in condition:
            (mask,) = profile.values(condition["mask"])
            yield _Instruction(_AND_K, mask)
        if "bits" in condition:
            bits = 0
            for value in profile.values(*condition["bits"]):
                bits |= value
            yield _Instruction(_JSET_K, bits, "next rule")
        else:
            values = profile.values(*condition["equals"])
            for position, value in enumerate(values[:-1]):
                yield _Instruction(_JEQ_K, value, on_true=len(values) - 1 - position)
            yield _Instruction(_JEQ_K, values[-1], "next rule")


class _Instruction:
    """struct sock_filter, and where to jump when that is not yet known."""

    __slots__ = ("code", "on_false", "on_true", "target", "value")

    def __init__(self, code: int, value: int, target: str = "", *, on_true: int = 0, on_false: int = 0) -> None:
        self.code = code
        self.value = value
        self.target = target
        self.on_true = on_true
        self.on_false = on_false


def _resolve(steps: list[_Instruction], next_rule: int) -> list[_Instruction]:
    """Give the jumps to "next rule" their distance; a jump on a condition reaches 255 instructions."""
    for position, step in enumerate(steps):
        if step.target == "next rule":
            step.on_false = next_rule - position - 1
        if max(step.on_true, step.on_false) > 255:
            raise ValueError("a rule of a seccomp profile is too long for one jump")
    return steps


def _import_pyseccomp() -> Any:
    try:
        import pyseccomp
    except ImportError:
        raise ImportError("system call filters need the package pyseccomp: pip install pyseccomp", name="pyseccomp") from None
    except (OSError, RuntimeError):
        raise ImportError(
            "system call filters need libseccomp.so.2: install it (Debian, Ubuntu: apt-get install libseccomp2)",
            name="libseccomp",
        ) from None
    return pyseccomp


# What a cached program depends on --------------------------------------------------------------------------------------


def _identity() -> str:
    """What a program depends on beside its variant and psie's version: this code, its data, the library, the machine."""
    import zlib

    checksum = 0
    for path in (__file__, *(_data_path(profile) for profile in PROFILES)):
        with open(path, "rb") as file:
            checksum = zlib.crc32(file.read(), checksum)
    return f"{checksum:08x} {os.uname().machine} {_library()}"


def _library() -> str:
    """Which libseccomp there is, without loading it: loading costs more than everything else on a cache hit."""
    if "LD_LIBRARY_PATH" not in os.environ:
        triplet = getattr(sys.implementation, "_multiarch", "")
        for folder in (f"/lib/{triplet}", f"/usr/lib/{triplet}", "/lib64", "/usr/lib64", "/lib", "/usr/lib"):
            path = f"{folder}/libseccomp.so.2"
            try:
                found = os.stat(path)
            except OSError:
                continue
            return f"{os.path.realpath(path)} {found.st_size} {found.st_mtime_ns}"
    import ctypes

    pyseccomp = _import_pyseccomp()
    pyseccomp._libseccomp.seccomp_version.restype = ctypes.POINTER(ctypes.c_uint * 3)
    return ".".join(str(part) for part in pyseccomp._libseccomp.seccomp_version().contents)
