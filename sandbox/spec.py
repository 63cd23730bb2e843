"""A recipe as the config.json of an OCI runtime (crun, runc, youki), with what such a runtime cannot do said beside it.

Must not run anything, nor decide what a level means: the recipe has. A line of a recipe that is not understood is an error,
so that nothing is left out without a word. Source: the OCI runtime specification, config.md and config-linux.md.
"""

from __future__ import annotations

import os

from sandbox.recipe import PLUGIN_ID
from sandbox.seccomp import filter as profiles

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from sandbox.host import HostFacts
    from sandbox.recipe_data import Recipe

VERSION = "1.1.0"  # of the specification: the first with defaultErrnoRet and linux.resources.unified
PLUGIN_FOLDER = "/plugin"
NAMESPACES = {"user": "user", "mnt": "mount", "pid": "pid", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup", "net": "network"}
ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
EPERM, ENOSYS = 1, 38
STACK = 8 << 20  # of a program, and so of each thread; the limit itself is how far it may be raised
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")  # which the runtime makes
OPEN_PROC = ("/proc/sys", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/sysrq-trigger")


class Spec:
    """A config.json and what belongs to it.

    Attributes:
        config: the document, plain data for JSON.
        lost: what the recipe has and an OCI runtime has not, a sentence each.
        folders, links, files: of the root file system, by path; links to their targets, files to their text.
        points: of mounts, by path: whether it is a folder.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.lost: list[str] = []
        self.folders: dict[str, int] = {}
        self.links: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.points: dict[str, bool] = {}
        self.mounts: list[dict[str, Any]] = []
        self.masked: list[str] = []

    def mount(self, target: str, kind: str, source: str, options: Sequence[str], *, is_folder: bool = True) -> None:
        self.mounts.append({"destination": target, "type": kind, "source": source, "options": list(options)})
        self.points[target] = is_folder
        if kind == "tmpfs":  # runc gives it the mode of the folder below it
            self.folders[target] = next((int(each[5:], 8) for each in options if each.startswith("mode=")), 0o755)


def spec_of(recipe: Recipe, facts: HostFacts, arguments: Sequence[str], plugin: tuple[str, bytes] | None = None) -> Spec:
    """The spec of a recipe.

    Args:
        recipe: of a level with a mount namespace.
        facts: of the host it was compiled for.
        arguments: of the interpreter, after the plugin's path.
        plugin: name and content of its file, which is then in the root file system; None for none.

    Raises ValueError where no OCI container can be what the recipe says.
    """
    if "mnt" not in recipe.namespaces or recipe.template is None:
        raise ValueError(
            f"level {recipe.level} has no mount namespace here, and an OCI container always has one: use level standard or more"
        )
    spec = Spec()
    for line in recipe.template["lines"]:
        show(spec, line)
    for line in recipe.call_mounts:
        show(spec, line)
    for source, target, flags in recipe.sandbox_mounts:
        bind(spec, source, target, flags)
    add_workspace(spec, recipe)
    add_granted(spec, recipe)
    words = [recipe.interpreter["executable"]]
    if plugin is not None:
        path = f"{PLUGIN_FOLDER}/{plugin[0]}"
        spec.files[path] = plugin[1]
        words += [path, *arguments]
    spec.lost += lost(recipe)
    spec.config = {
        "ociVersion": VERSION,
        "root": {"path": "rootfs", "readonly": True},
        "hostname": recipe.hostname,
        "process": process(recipe, facts, words),
        "mounts": sorted(spec.mounts, key=lambda mount: mount["destination"].rstrip("/").count("/")),  # parents first
        "linux": linux(spec, recipe, facts),
    }
    if not facts.root:
        spec.lost.append("without root one id can be mapped: the plugin has id 0 in its user namespace, and no capability")
    spec.config["annotations"] = {"psie.level": recipe.level, "psie.not-expressed": "; ".join(spec.lost)}
    return spec


# -- files ---------------------------------------------------------------------------------------------------------------


def show(spec: Spec, line: Sequence[Any]) -> None:
    """One mount line of a recipe (see sandbox.ns.mounts). Raises ValueError for one that is not known."""
    name, *given = line
    if name in ("bind", "bind_optional"):
        source, target, flags = given
        if target not in DEVICES and (name == "bind" or os.path.exists(source)):
            bind(spec, source, target, flags)
    elif name == "host_root":
        skip, flags = given
        for entry in sorted(os.listdir("/")):
            path = f"/{entry}"
            if entry not in skip and os.path.islink(path):
                spec.links[path] = os.readlink(path)
            elif entry not in skip:
                bind(spec, path, path, flags)
    elif name == "tmpfs":
        target, flags, options, _ = given  # what is kept below it is mounted after it
        spec.mount(target, "tmpfs", "tmpfs", [*flags.split(","), *options.split(",")])
    elif name == "scratch":
        _, options, places = given
        for path in places:
            spec.mount(path, "tmpfs", "tmpfs", ["nosuid", "nodev", *options.split(",")])
    elif name == "proc":
        spec.mount("/proc", "proc", "proc", ["nosuid", "nodev", "noexec", *(given[0].split(",") if given[0] else ())])
    elif name == "no_proc":
        spec.mount("/proc", "tmpfs", "tmpfs", ["ro", "nosuid", "nodev", "noexec", "size=4k", "mode=555"])
    elif name == "mask":
        spec.masked.append(given[0])
    elif name == "directory":
        spec.folders.setdefault(given[0], given[1])
    elif name == "symlink":
        target, path = given
        if not path.startswith("/dev/"):  # those the runtime makes
            spec.links[path] = target
    elif name == "file":
        spec.files[given[0]] = given[1].encode()
    elif name != "readonly":  # which root.readonly is; what is not root's in /dev nobody may change there
        raise ValueError(f"an OCI container has nothing for the line {name} of a recipe")


def bind(spec: Spec, source: str, target: str, flags: str) -> None:
    spec.mount(target, "bind", source, ["rbind", *flags.split(",")], is_folder=os.path.isdir(source))


def add_workspace(spec: Spec, recipe: Recipe) -> None:
    workspace = recipe.workspace
    owner = [f"size={workspace['bytes']}", f"nr_inodes={workspace['inodes']}", "mode=1777"]
    spec.mount(str(workspace["path"]), "tmpfs", "tmpfs", ["nosuid", "nodev", *owner])


def add_granted(spec: Spec, recipe: Recipe) -> None:
    for folder in recipe.granted:
        bind(spec, folder["path"], folder["path"], "ro,nosuid,nodev")
        if folder["kind"] != "read":
            spec.lost.append(f"changes that are kept aside and committed: {folder['path']} is read-only")


# -- the process ---------------------------------------------------------------------------------------------------------


def process(recipe: Recipe, facts: HostFacts, words: list[str]) -> dict[str, Any]:
    own = PLUGIN_ID if facts.root else 0
    sets = ("bounding", "effective", "inheritable", "permitted", "ambient")
    return {
        "terminal": False,
        "user": {"uid": own, "gid": own},
        "args": words,
        "env": [f"{name}={value}" for name, value in recipe.environment.items()],
        "cwd": recipe.workspace["path"],
        "capabilities": {name: [] for name in sets},
        "rlimits": [
            {"type": name, "soft": STACK if name == "RLIMIT_STACK" else value, "hard": value} for name, value in recipe.rlimits
        ],
        "noNewPrivileges": True,
    }


def linux(spec: Spec, recipe: Recipe, facts: HostFacts) -> dict[str, Any]:
    made: dict[str, Any] = {"namespaces": [{"type": NAMESPACES[name]} for name in recipe.namespaces]}
    if "user" in recipe.namespaces:
        made["uidMappings"], made["gidMappings"] = mappings(recipe, facts, facts.uid), mappings(recipe, facts, facts.gid)
    made["maskedPaths"] = spec.masked
    made["readonlyPaths"] = [path for path in OPEN_PROC if path not in spec.masked]
    made["rootfsPropagation"] = "private"
    resources = limits(recipe)
    if resources:
        made["resources"] = resources
    made["seccomp"] = seccomp(recipe)
    return made


def mappings(recipe: Recipe, facts: HostFacts, own: int) -> list[dict[str, int]]:
    """As root two ids that no user has, as psie's sandboxes have them: of who sets up, and of the plugin."""
    if not facts.root:
        return [{"containerID": 0, "hostID": own, "size": 1}]
    from sandbox.ns import userids

    # The last of psie's places, which it takes itself only where so many sandboxes are open.
    first = userids.id_region(userids.REGION) + userids.REGION - userids.IDS_PER_SLOT
    outside = recipe.ids["outside"] if recipe.ids["outside"] is not None else first + 1
    return [
        {"containerID": 0, "hostID": first, "size": 1},
        {"containerID": PLUGIN_ID, "hostID": outside, "size": 1},
    ]


def limits(recipe: Recipe) -> dict[str, Any]:
    """Those of the recipe's cgroup, as far as this host has the controllers: rlimits are in place of the others."""
    if recipe.cgroup is None:
        return {}
    unified = dict(recipe.cgroup["settings"])
    made: dict[str, Any] = {}
    if "memory.max" in unified:
        most = int(unified.pop("memory.max"))
        made["memory"] = {"limit": most, "swap": most + int(unified.pop("memory.swap.max", 0))}  # of both together
    if "pids.max" in unified:
        made["pids"] = {"limit": int(unified.pop("pids.max"))}
    if "cpu.max" in unified:
        quota, period = unified.pop("cpu.max").split()
        made["cpu"] = {"quota": int(quota), "period": int(period)}
    return {**made, "unified": unified} if unified else made


def lost(recipe: Recipe) -> list[str]:
    """What a runtime does not do."""
    seconds, has_access = recipe.limits["seconds"], recipe.network["access"] is not None
    found = ["the read-back of each protection before the plugin starts", "samples, violations, recovery and records"]
    if recipe.landlock is not None:
        found.append("Landlock: mounts alone keep the plugin from writing elsewhere")
    found.append("seccomp notifications: what is refused is not recorded, and answers EPERM or ENOSYS")
    if has_access:
        found.append("connections by a supervisor: it reaches no host at all, whatever was allowed")
    if recipe.network["mode"] == "veth":
        found.append("the empty veth: its network namespace has a loopback only")
    if not recipe.seccomp["allow_subprocess"]:
        found.append("execve(2) refused: it starts the interpreter, so the plugin may replace itself, not start others")
    found.append(f"the wall clock ({seconds:g} s): have the container killed, as by timeout(1)")
    found.append("limits of output, of the result, and of file operations")
    found.append("one disk limit for all: the workspace and each scratch folder have it for themselves")
    found.append("the death of the container with who started it")
    found.append("ids that nobody else has: give containers that run at once other ones (linux.uidMappings, gidMappings)")
    return found


# -- seccomp -------------------------------------------------------------------------------------------------------------

# Which arguments a system call may have, as cubes: {argument: (mask, value)}, all of whose masked bits are equal.
Cube = dict[int, tuple[int, int]]


def seccomp(recipe: Recipe) -> dict[str, Any]:
    """The recipe's profile. Rules of ours are in an order, and the first that fits decides; libseccomp knows no order, so
    that what they let pass is worked out, as sets of arguments of which no two overlap with another answer."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise ValueError(f"no seccomp profiles for {machine}: there are some for {', '.join(ARCHITECTURES)}")
    given = recipe.seccomp
    permitted = tuple(feature for feature in profiles.FEATURES if given[feature])
    profile = profiles._Profile(given["profile"])
    known = profiles.known_syscalls(machine)
    answers: dict[tuple[str, str], list[str]] = {}
    for name in sorted(profile.named_syscalls() & known.keys()):
        if name == "execve":  # by which the runtime starts the interpreter
            cubes: list[Cube] = [{}]
        else:
            cubes = allowed(profile, name, permitted)
        action = "allow" if cubes else refusal(profile, name, permitted)
        for cube in cubes or [{}]:
            answers.setdefault((action, repr(sorted(cube.items()))), []).append(name)
    rules = []
    for (action, cube_text), names in sorted(answers.items()):
        rules.append(rule(names, action, cube_text))
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "architectures": [ARCHITECTURES[machine]],
        "syscalls": rules,
    }


def rule(names: list[str], action: str, cube_text: str) -> dict[str, Any]:
    import ast

    made: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ALLOW" if action == "allow" else "SCMP_ACT_ERRNO"}
    if action != "allow":
        made["errnoRet"] = EPERM if action == "refuse" else ENOSYS
    tests = ast.literal_eval(cube_text)
    if tests:
        made["args"] = [
            {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"} for index, (mask, value) in tests
        ]
    return made


def refusal(profile: Any, name: str, permitted: tuple[str, ...]) -> str:
    """How a system call that never passes is answered: refuse or absent."""
    rules = profile.rules_for(name, permitted)
    if rules and not rules[0].get("where"):
        return "absent" if rules[0]["action"] == "absent" else "refuse"
    return "absent" if profile.actions.get(name) == profiles._LISTS["absent"] else "refuse"


def allowed(profile: Any, name: str, permitted: tuple[str, ...]) -> list[Cube]:
    """The arguments with which it passes; [{}] for all, [] for none."""
    tree = name in profile.allow and name not in profile.actions
    rest: list[Cube] = [{}]
    found: list[Cube] = []
    for each in profile.rules_for(name, permitted):
        fits = conditions(profile, each.get("where", []))
        if each["action"] == "pass" and tree:
            found += [both for one in rest for cube in fits if (both := common(one, cube)) is not None]
        for cube in fits:
            rest = [left for one in rest for left in without(one, cube)]
    return found + rest if tree else found


def conditions(profile: Any, where: Iterable[Mapping[str, Any]]) -> list[Cube]:
    """All of them together, as cubes that do not overlap."""
    fits: list[Cube] = [{}]
    for condition in where:
        shift = 32 if "half" in condition else 0
        index = condition["argument"]
        if "bits" in condition:
            bits = 0
            for value in profile.values(*condition["bits"]):
                bits |= value
            cubes, before = [], 0
            for position in range(32):
                bit = 1 << position
                if bits & bit:  # the lowest that is set
                    cubes.append({index: ((before | bit) << shift, bit << shift)})
                    before |= bit
        else:
            (mask,) = profile.values(condition.get("mask", 0xFFFFFFFF))
            values = sorted(set(profile.values(*condition["equals"])))
            cubes = [{index: (mask << shift, value << shift)} for value in values if value & ~mask == 0]
        fits = [both for one in fits for cube in cubes if (both := common(one, cube)) is not None]
    return fits


def common(one: Cube, other: Cube) -> Cube | None:
    """What is in both; None for nothing."""
    both = dict(one)
    for index, (mask, value) in other.items():
        has_mask, has_value = both.get(index, (0, 0))
        if (has_value ^ value) & has_mask & mask:
            return None
        both[index] = (has_mask | mask, has_value | value)
    return both


def without(one: Cube, other: Cube) -> list[Cube]:
    """`one` but what is in `other`, as cubes that do not overlap: in each a first bit differs."""
    if common(one, other) is None:
        return [one]
    left, same = [], dict(one)
    for index, (mask, value) in other.items():
        for position in range(64):
            bit = 1 << position
            has_mask, has_value = same.get(index, (0, 0))
            if not mask & bit or has_mask & bit:
                continue
            left.append({**same, index: (has_mask | bit, has_value | (~value & bit))})
            same[index] = (has_mask | bit, has_value | (value & bit))
    return left
