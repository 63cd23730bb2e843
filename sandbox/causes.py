"""Why a host cannot do what a sandbox needs, told apart, each with the commands that mend it.

Each function of CHECKS looks at one thing and gives None where there is nothing to mend. It looks through `Seen`: what was
probed, and the host's files below a folder. Which level suffers from what is not decided here: the recipes say so, see
sandbox.doctor. Must not change anything.

Sources: user_namespaces(7), namespaces(7), cgroups(7), proc(5), kernel/nsproxy.c, the kernel's sysctl/user.rst and
admin-guide/LSM, apparmor.d(5), loginctl(1), systemd.resource-control(5), docker-run(1), podman-run(1).
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import shlex
from dataclasses import dataclass, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sandbox.errors import SandboxInitializationError
    from sandbox.host import HostFacts

SYS_ADMIN = 21  # CAP_SYS_ADMIN: capability.h
FLOOR = (6, 1)  # the oldest Linux that psie is made and tested for
NEWEST_LANDLOCK = (6, 12)  # from here on it has all that a recipe uses
REBOOT = "needs a reboot"
LOWERS = "lowers the security of this host"
OUTSIDE = "is done where the container is started"
YOURS = "is for you to decide"


@dataclass(frozen=True)
class Command:
    """One program to run, as root or not; `lines` are its standard input."""

    argv: tuple[str, ...]
    lines: tuple[str, ...] = ()
    root: bool = True

    def shell(self, *, as_root: bool) -> str:
        """As it is typed into a shell."""
        text = ("sudo " if self.root and not as_root else "") + shlex.join(self.argv)
        return f"printf '%s\\n' {shlex.join(self.lines)} | {text}" if self.lines else text


@dataclass(frozen=True)
class Mend:
    """What would mend a cause. It is applied only if nothing is said `against` that, and it is made of programs alone."""

    what: str
    commands: tuple[Command | str, ...]  # a text is for a shell, or a file, of the reader's
    against: str = ""

    @property
    def safe(self) -> bool:
        return not self.against and all(isinstance(each, Command) for each in self.commands)

    def shown(self, *, as_root: bool) -> list[str]:
        return [each if isinstance(each, str) else each.shell(as_root=as_root) for each in self.commands]


@dataclass(frozen=True)
class Cause:
    """Why something is missing. `opening`: where a sandbox could not be opened, this is why, whatever its recipe says."""

    text: str
    mends: tuple[Mend, ...] = ()
    opening: bool = False


@dataclass(frozen=True)
class Files:
    """The host's files, below `root`: another folder for tests of kernels that are not here."""

    root: str = "/"

    def path(self, path: str) -> str:
        return os.path.join(self.root, path.lstrip("/"))

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.path(path))

    def text(self, path: str) -> str:
        """Its content; "" where it cannot be read."""
        try:
            with open(self.path(path), errors="replace") as file:
                return file.read().strip()
        except OSError:
            return ""

    def sysctl(self, name: str) -> str:
        return self.text("/proc/sys/" + name.replace(".", "/"))


@dataclass(frozen=True)
class Seen:
    """What the causes are looked for in."""

    uid: int
    user: str  # its name
    files: Files
    facts: HostFacts | None = None  # None: without libseccomp nothing can be probed
    no_library: str = ""  # why not
    packages: tuple[tuple[str, str], ...] = ()  # Python packages that cannot be imported, and what that says
    step: str = ""  # the first step to a sandbox's namespaces that fails, see sandbox.doctor.namespace_steps
    error: int = 0  # its errno
    landlock_errno: int = 0
    trials: tuple[SandboxInitializationError, ...] = ()  # why sandboxes could not be opened
    environ: Mapping[str, str] | None = None
    executable: str = ""
    script: str = ""  # bin/psie
    folders: tuple[tuple[str, str, str], ...] = ()  # kind, path, why it cannot be used ("" if it can)
    descriptors: tuple[int, int] = (0, 0)  # RLIMIT_NOFILE's hard limit, and what a sandbox wants
    processes: tuple[int, int] = (0, 0)  # RLIMIT_NPROC's soft limit (-1: none), and how many tasks the user has
    inotify: int = 0  # errno of inotify_init(2)

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    @property
    def kernel(self) -> tuple[int, int]:
        release = self.facts.kernel if self.facts is not None else os.uname().release
        found = re.match(r"(\d+)\.(\d+)", release)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def failed(self, *numbers: int) -> SandboxInitializationError | None:
        """The first sandbox that could not be opened for one of these errnos."""
        return next((each for each in self.trials if each.errno in numbers), None)

    def may_mount(self) -> bool:
        """Whether CAP_SYS_ADMIN is in our effective set: proc(5), CapEff."""
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", self.files.text("/proc/self/status"), re.MULTILINE)
        return found is None or bool(int(found[1], 16) >> SYS_ADMIN & 1)

    def filtered(self) -> bool:
        """Whether a seccomp filter is on us: proc(5), Seccomp."""
        return bool(re.search(r"^Seccomp:\s*2$", self.files.text("/proc/self/status"), re.MULTILINE))

    def systemd(self) -> bool:
        return self.files.exists("/run/systemd/system")

    def container(self) -> str:
        """docker, podman or kubernetes; "" for none, or one that cannot be told."""
        environ = self.environ or {}
        if "KUBERNETES_SERVICE_HOST" in environ or self.files.exists("/var/run/secrets/kubernetes.io"):
            return "kubernetes"
        if self.files.exists("/run/.containerenv") or environ.get("container") == "podman":
            return "podman"
        return "docker" if self.files.exists("/.dockerenv") else ""


# -- mends that several causes share ---------------------------------------------------------------------------------------


def sysctl(name: str, value: str, what: str, against: str = "") -> Mend:
    """Set now, and for every boot."""
    place = f"/etc/sysctl.d/60-psie-{name.rpartition('.')[2]}.conf"
    commands = (Command(("tee", place), (f"{name} = {value}",)), Command(("sysctl", "-w", f"{name}={value}")))
    return Mend(what, commands, against)


def kernel_parameter(parameter: str, what: str) -> Mend:
    """By a file of GRUB's, as Debian and Ubuntu read them."""
    line = f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {parameter}"'
    name = parameter.partition("=")[0].rpartition(".")[2]
    place = f"/etc/default/grub.d/60-psie-{name}.cfg"
    commands = (
        Command(("mkdir", "-p", "/etc/default/grub.d")),
        Command(("tee", place), (line,)),
        Command(("update-grub",)),
        Command(("reboot",)),
    )
    return Mend(f"{what} (with another boot loader than GRUB: add {parameter} to the kernel's parameters)", commands, REBOOT)


# What a container needs for `seccomp` and the like. In Kubernetes /proc is unmasked only with own user namespaces.
CONTAINERS = {
    "docker": {
        "seccomp": "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined IMAGE",
        "user": "docker run --user 1000 --security-opt seccomp=unconfined --security-opt apparmor=unconfined IMAGE",
        "apparmor": "docker run --security-opt apparmor=unconfined IMAGE",
        "proc": "docker run --security-opt systempaths=unconfined IMAGE",
        "cgroup": "docker run --cgroupns=private --security-opt writable-cgroups=true IMAGE",
    },
    "podman": {
        "seccomp": "podman run --security-opt seccomp=unconfined IMAGE",
        "user": "podman run --user 1000 --security-opt seccomp=unconfined IMAGE",
        "apparmor": "podman run --security-opt apparmor=unconfined IMAGE",
        "proc": "podman run --security-opt unmask=ALL IMAGE",
        "cgroup": "podman run --cgroupns=private --security-opt unmask=/sys/fs/cgroup IMAGE",
    },
    "kubernetes": {
        "seccomp": "in the container's securityContext: seccompProfile: {type: Unconfined}",
        "user": "in the container's securityContext: runAsUser: 1000, seccompProfile: {type: Unconfined}",
        "apparmor": "in the container's securityContext: appArmorProfile: {type: Unconfined}",
        "proc": "in the pod's spec: hostUsers: false; in the container's securityContext: procMount: Unmasked",
        "cgroup": "give the container a writable /sys/fs/cgroup of its own (containerd: cgroup_writable = true)",
    },
}


def container_mends(seen: Seen, need: str, what: str) -> tuple[Mend, ...]:
    """For the container that we are in; for each kind where that cannot be told."""
    kinds = [seen.container()] if seen.container() else list(CONTAINERS)
    return tuple(Mend(f"{what} ({kind})", (CONTAINERS[kind][need],), OUTSIDE) for kind in kinds)


def unopened(seen: Seen, reason: str) -> Cause:
    """Of a level that did not open although nothing that we look at is missing."""
    if seen.is_root and not seen.may_mount() and "EPERM" in reason:
        text = f"{reason}: this root has no CAP_SYS_ADMIN, as in containers; any other user has, in a user namespace of its own"
        return Cause(text, container_mends(seen, "user", "starts the container as a user"))
    if seen.filtered() and re.search("EPERM|EACCES|ENOSYS", reason):
        text = f"{reason}: most likely the seccomp filter that is on this process, as containers have it"
        return Cause(text, container_mends(seen, "seccomp", "starts the container without that filter"))
    return Cause(reason)


INSTALL = {
    "debian": ("apt-get", "install", "--yes"),
    "ubuntu": ("apt-get", "install", "--yes"),
    "fedora": ("dnf", "install", "--assumeyes"),
    "rhel": ("dnf", "install", "--assumeyes"),
    "suse": ("zypper", "--non-interactive", "install"),
    "arch": ("pacman", "-S", "--noconfirm"),
    "alpine": ("apk", "add"),
}


def install(seen: Seen, names: Mapping[str, str], what: str) -> Mend:
    """A package by this distribution's own program; `names` by that program, "" for all others: os-release(5)."""
    release = seen.files.text("/etc/os-release")
    words = " ".join(re.findall(r'^ID(?:_LIKE)?="?([^"\n]*)', release, re.MULTILINE)).split()
    program = next((INSTALL[word] for word in words if word in INSTALL), None)
    package = names.get(program[0] if program else "", names[""])
    if program is None:
        return Mend(what, (f"install the package {package}",), YOURS)
    return Mend(what, (Command((*program, package)),))


# -- the checks ------------------------------------------------------------------------------------------------------------


def libseccomp(seen: Seen) -> Cause | None:
    if not seen.no_library:
        return None
    mend = install(seen, {"": "libseccomp", "apt-get": "libseccomp2"}, "installs the C library that compiles the filters")
    return Cause(seen.no_library.partition(":")[0], (mend,), opening=True)


def packages(seen: Seen) -> Cause | None:
    if not seen.packages:
        return None
    said = "; ".join(f"{name}: {reason}" for name, reason in seen.packages)
    names = (name for name, _ in seen.packages)
    again = Command((seen.executable, "-m", "pip", "install", "--force-reinstall", "--no-cache-dir", *names), root=False)
    return Cause(said, (Mend("installs them again, built for this host", (again,), YOURS),), opening=True)


def programs(seen: Seen) -> Cause | None:
    """Rootless the engine is started by these (sandbox.engine.spawn)."""
    from sandbox.engine.spawn import NSENTER, UNSHARE

    missing = [path for path in (UNSHARE, NSENTER) if not seen.files.exists(path)]
    if not missing:
        return None
    mend = install(seen, {"": "util-linux"}, "installs what starts the engine in a user namespace")
    return Cause(f"{' and '.join(missing)} of util-linux: not there", (mend,), opening=not seen.is_root)


def kernel(seen: Seen) -> Cause | None:
    assert seen.facts is not None
    missing = ", ".join(seen.facts.missing_syscalls)
    if seen.kernel < FLOOR:
        lacks = f"; it lacks {missing}" if missing else ""
        text = f"Linux {seen.facts.kernel} is older than {FLOOR[0]}.{FLOOR[1]}, the oldest that psie is tested on{lacks}"
        return Cause(text, (newer_kernel(FLOOR),), opening=bool(missing))
    if not missing:
        return None
    by = "a seccomp filter on this process hides them, as containers have it" if seen.filtered() else "something hides them"
    mends = container_mends(seen, "seccomp", "starts the container without that filter")
    return Cause(f"Linux {seen.facts.kernel} has them, but {missing} cannot be called here: {by}", mends, opening=True)


def newer_kernel(version: tuple[int, int]) -> Mend:
    text = f"install Linux {version[0]}.{version[1]} or later (Debian 12: linux-image-amd64 of bookworm-backports), and boot it"
    return Mend("boots a newer kernel", (text,), REBOOT)


def user_namespaces(seen: Seen) -> Cause | None:
    """Why the steps to a sandbox's namespaces fail (host.probe has done the same as a whole), or a sandbox that is opened."""
    if seen.step:
        return closed_namespaces(seen)
    error = seen.failed(errno.ENOSPC)
    if error is None or (error.path is not None and not str(error.line).startswith(COPIES)):
        return None
    cause = quota_cause(seen, lowest_quota(seen), f"a sandbox could not be opened ({error.line}: ENOSPC)")
    return replace(cause, opening=True)


# The set-up that copies mounts: for a moment each copy is a mount namespace, so a path in its error is not that of a full disk.
COPIES = "template: "
QUOTAS = ("user", "mnt", "pid", "ipc", "uts", "cgroup", "net")


def lowest_quota(seen: Seen) -> str:
    values = {name: seen.files.sysctl(f"user.max_{name}_namespaces") for name in QUOTAS}
    return min((name for name in QUOTAS if values[name].isdecimal()), key=lambda name: int(values[name]), default="user")


def quota_cause(seen: Seen, quota: str, happened: str) -> Cause:
    name = f"user.max_{quota}_namespaces"
    value = seen.files.sysctl(name)
    if value == "0":
        text = f"{name} is 0: nobody may make one"
    else:
        text = f"{happened}: {name} is {value or 'unknown'}, and used up here or in a user namespace around this one"
    threads = seen.files.sysctl("kernel.threads-max")
    wanted = max(int(threads) // 2 if threads.isdecimal() else 0, 2 * int(value) if value.isdecimal() else 0)
    mend = sysctl(
        name, str(wanted), f"allows {wanted} of them for each user, as Linux does unless told otherwise (now: {value})"
    )
    return Cause(text, (mend,))


def closed_namespaces(seen: Seen) -> Cause:
    files, number = seen.files, seen.error
    said = f"{seen.step}: {errno.errorcode.get(number, number)}"
    if number in (errno.ENOSPC, errno.EUSERS):
        return quota_cause(seen, next((name for name in QUOTAS if f" {name} " in f" {seen.step} "), "user"), said)
    if number in (errno.EPERM, errno.EACCES):
        if not seen.is_root and files.sysctl("kernel.unprivileged_userns_clone") == "0":
            what = "lets every user of this host make user namespaces, as Linux does unless told otherwise"
            mend = sysctl("kernel.unprivileged_userns_clone", "1", what, LOWERS)
            return Cause("kernel.unprivileged_userns_clone is 0: only root may make user namespaces (Debian)", (mend,))
        if not seen.is_root and files.sysctl("kernel.apparmor_restrict_unprivileged_userns") == "1":
            return apparmor_restriction(seen)
        if seen.filtered():
            text = f"a seccomp filter on this process refuses to make namespaces ({said}), as Docker's and Podman's do"
            return Cause(text, container_mends(seen, "seccomp", "starts the container without that filter"))
        profile = confinement(seen)
        if profile:
            text = f"the AppArmor profile {profile}, which confines this process, refuses it ({said})"
            if seen.container() or profile.startswith(("docker-", "containers-", "cri-")):
                return Cause(text, container_mends(seen, "apparmor", "starts the container without that profile"))
            return Cause(text, (Mend("runs psie unconfined", ("aa-exec -p unconfined -- psie doctor",), YOURS),))
        if in_chroot(files):
            text = f"this process is in a chroot, where Linux makes no user namespaces ({said})"
            return Cause(
                text, (Mend("enters by a mount namespace", ("unshare --mount, pivot_root instead of chroot",), YOURS),)
            )
    if number == errno.EINVAL:
        return Cause(f"this kernel has no user namespaces (CONFIG_USER_NS; {said})", (newer_kernel(FLOOR),))
    advice = f"ask who runs this host what confines user {seen.user}: a security module, or what psie was started by"
    return Cause(f"the kernel refuses it and does not say why ({said})", (Mend("finds out", (advice,), YOURS),))


def confinement(seen: Seen) -> str:
    """The AppArmor profile that we are in; "" for none."""
    current = seen.files.text("/proc/self/attr/apparmor/current") or seen.files.text("/proc/self/attr/current")
    return "" if current in ("", "unconfined") or current.endswith("(unconfined)") else current.partition(" ")[0]


def in_chroot(files: Files) -> bool:
    """Below a chroot no mount is at /: the kernel shows only those below a process's root (proc(5), mountinfo)."""
    points = [line.split()[4] for line in files.text("/proc/self/mountinfo").splitlines() if len(line.split()) > 4]
    return bool(points) and "/" not in points


def apparmor_restriction(seen: Seen) -> Cause:
    """Ubuntu's. A profile that is `unconfined` but for a name, and may make user namespaces, is what it wants of programs."""
    one = [profile("psie", seen.script)] if seen.script else []
    mends = (
        *one,
        profile("psie-python", os.path.realpath(seen.executable)),
        sysctl(
            "kernel.apparmor_restrict_unprivileged_userns",
            "0",
            "lets every program of every user make user namespaces",
            LOWERS,
        ),
    )
    return Cause(
        "kernel.apparmor_restrict_unprivileged_userns is 1: programs without an AppArmor profile that allows it "
        "have no use of user namespaces (Ubuntu)",
        mends,
    )


def profile(name: str, program: str) -> Mend:
    lines = (
        "abi <abi/4.0>,",
        "include <tunables/global>",
        f'profile {name} "{program}" flags=(unconfined) {{',
        "  userns,",
        "}",
    )
    who = "the command psie alone" if name == "psie" else f"all that {program} runs, psie as a library too"
    commands = (
        Command(("tee", f"/etc/apparmor.d/{name}"), lines),
        Command(("apparmor_parser", "-r", f"/etc/apparmor.d/{name}")),
    )
    return Mend(f"lets {who} make user namespaces", commands, "loosens AppArmor for that program")


def own_proc(seen: Seen) -> Cause | None:
    assert seen.facts is not None
    if not seen.facts.fresh_proc or seen.facts.user_namespaces:
        return None
    lines = [line.split() for line in seen.files.text("/proc/self/mountinfo").splitlines()]
    covered = sorted({fields[4] for fields in lines if len(fields) > 4 and fields[4].startswith("/proc/")})
    if not covered:
        return Cause(f"the kernel mounts no fresh /proc here ({seen.facts.fresh_proc}); a sandbox has none at all then")
    some = ", ".join(covered[:5]) + (" ..." if len(covered) > 5 else "")
    text = f"parts of /proc are masked ({some}), as containers have it: the kernel lets nobody mount a fresh one beside it"
    return Cause(text, container_mends(seen, "proc", "starts the container with /proc unmasked"))


def overlay(seen: Seen) -> Cause | None:
    assert seen.facts is not None
    if not seen.facts.overlay or seen.facts.user_namespaces:
        return None
    if "overlay" not in seen.files.text("/proc/filesystems").split():
        place = "/etc/modules-load.d/psie.conf"
        commands = (Command(("modprobe", "overlay")), Command(("tee", place), ("overlay",)))
        mend = Mend("loads the kernel's module, now and at every boot", commands)
        return Cause(f"the file system overlay is not loaded ({seen.facts.overlay})", (mend,))
    if seen.kernel < (6, 6):
        text = f"before Linux 6.6 a tmpfs, the upper layer, has no attributes that a user may set ({seen.facts.overlay})"
        return Cause(text, (newer_kernel((6, 6)),))
    return Cause(f"the kernel mounts no overlay here ({seen.facts.overlay})")


def cgroups(seen: Seen) -> Cause | None:
    """Of a leaf, and of the controllers memory, pids and cpu in it."""
    assert seen.facts is not None
    facts = seen.facts
    wanted = ("memory", "pids", "cpu")
    missing = [name for name in wanted if name not in facts.controllers]
    if facts.cgroup_kind and not missing:
        return None
    if not facts.cgroup:
        if facts.cgroup_v1:
            return Cause("cgroups are version 1 here, and no cgroup v2 tree is mounted", (unified(seen),))
        commands = (Command(("mount", "-t", "cgroup2", "none", "/sys/fs/cgroup")),)
        return Cause(
            "no cgroup v2 tree is mounted at /sys/fs/cgroup", (Mend("mounts it, until the next boot", commands, YOURS),)
        )
    in_v1 = [name for name in missing if name in facts.cgroup_v1]
    if in_v1:
        text = f"cgroups are hybrid: {', '.join(in_v1)} in version 1 hierarchies, so that the v2 tree cannot have them"
        return Cause(text, (unified(seen),))
    if seen.is_root:
        return cgroups_of_root(seen, missing)
    return cgroups_of_user(seen, missing)


def unified(seen: Seen) -> Mend:
    if seen.systemd():
        return kernel_parameter("systemd.unified_cgroup_hierarchy=1", "boots with one cgroup v2 tree")
    what = "keeps the kernel's controllers out of version 1; no systemd runs here: what mounts cgroups must mount version 2"
    return kernel_parameter("cgroup_no_v1=all", what)


def cgroups_of_root(seen: Seen, missing: list[str]) -> Cause:
    assert seen.facts is not None
    tree = seen.facts.cgroup
    if not seen.facts.cgroup_kind:
        what = "gives the container a cgroup v2 tree of its own that it may write"
        return Cause(f"{tree} cannot be written, not even by root", container_mends(seen, "cgroup", what))
    there = seen.files.text(tree + "/cgroup.controllers").split()
    busy = [name for name in missing if name in there]
    if busy:
        move = f"mkdir {tree}/init; for pid in $(cat {tree}/cgroup.procs); do echo $pid >{tree}/init/cgroup.procs; done"
        text = f"{', '.join(busy)}: {tree} has processes of its own, and so cannot give its children controllers"
        return Cause(text, (Mend("moves them into a cgroup below", (move,), YOURS),))
    what = "hands these controllers down from the host (no systemd unit or container above may leave them out)"
    advice = f"the cgroup above: echo '{' '.join('+' + name for name in missing)}' >cgroup.subtree_control"
    return Cause(f"{tree} has no controller {', '.join(missing)}", (Mend(what, (advice,), OUTSIDE),))


def cgroups_of_user(seen: Seen, missing: list[str]) -> Cause:
    assert seen.facts is not None
    tree, uid = seen.facts.cgroup, seen.uid
    who = shlex.quote(seen.user)
    manager = f"user@{uid}.service"
    if not seen.systemd():
        folder = f"{tree}/psie-{uid}"
        enable = " ".join("+" + name for name in missing if name in seen.files.text(tree + "/cgroup.controllers").split())
        commands: list[Command | str] = [
            Command(("mkdir", "-p", f"{folder}/shell")),
            *([Command(("tee", f"{tree}/cgroup.subtree_control"), (enable,))] if enable else []),
            Command(("chown", "-R", str(uid), folder)),
            f"echo $$ | sudo tee {folder}/shell/cgroup.procs    # in the shell that psie is started from",
        ]
        text = f"no cgroup is delegated to user {seen.user}, and no systemd runs here that would do it"
        return Cause(text, (Mend("makes one, until the next boot", tuple(commands), YOURS),))
    if not seen.facts.cgroup_kind:
        if not seen.files.exists(f"/run/user/{uid}"):
            mend = Mend(
                f"keeps a systemd of {seen.user}'s own running, also when nobody is logged in",
                (Command(("loginctl", "enable-linger", seen.user)),),
            )
            return Cause(f"no cgroup is delegated to user {seen.user}: it has no systemd session", (mend,))
        if not seen.files.exists(f"/run/user/{uid}/bus"):
            mend = install(seen, {"": "dbus", "apt-get": "dbus-user-session"}, "gives each user's systemd a bus to be asked on")
            return Cause(f"the systemd of user {seen.user} has no bus (/run/user/{uid}/bus) to be asked for a cgroup", (mend,))
        start = Mend(f"starts the systemd of {seen.user}", (Command(("systemctl", "start", manager)),))
        return Cause(f"no cgroup of {manager} that user {seen.user} may write, though its bus is there", (start,))
    place = "/etc/systemd/system/user@.service.d"
    commands = [
        Command(("mkdir", "-p", place)),
        Command(("tee", f"{place}/60-psie.conf"), ("[Service]", "Delegate=cpu cpuset io memory pids")),
        Command(("systemctl", "daemon-reload")),
    ]
    then = (
        f"hands the controllers down to every user's systemd, from its next start on (log out; or: systemctl restart {manager})"
    )
    return Cause(f"the cgroup delegated to {who} has no controller {', '.join(missing)}", (Mend(then, tuple(commands)),))


def landlock(seen: Seen) -> Cause | None:
    assert seen.facts is not None
    abi = seen.facts.landlock_abi
    if abi >= 6:
        return None
    if abi >= 1:
        lacks = ["no scopes for signals and abstract sockets (Linux 6.12)"]
        lacks += ["no TCP rules (6.7)"] if abi < 4 else []
        lacks += ["no truncate(2) (6.2)"] if abi < 3 else []
        return Cause(
            f"Linux {seen.facts.kernel} has Landlock ABI {abi}: {', '.join(reversed(lacks))}", (newer_kernel(NEWEST_LANDLOCK),)
        )
    modules = seen.files.text("/sys/kernel/security/lsm")
    built = kernel_option(seen, "CONFIG_SECURITY_LANDLOCK")
    if seen.landlock_errno == errno.EOPNOTSUPP or (built == "y" and seen.landlock_errno != errno.EPERM):
        text = (
            f"Landlock is built into this kernel but not switched on (the active security modules are {modules or 'unknown'})"
        )
        others = [name for name in (modules or kernel_option(seen, "CONFIG_LSM")).split(",") if name and name != "landlock"]
        if not others:  # a list without those that are active would switch them off
            advice = "add landlock to the kernel parameter lsm=, before all that /sys/kernel/security/lsm lists"
            return Cause(text, (Mend("boots with Landlock", (advice,), REBOOT),))
        return Cause(text, (kernel_parameter(f"lsm={','.join(['landlock', *others])}", "boots with Landlock"),))
    if seen.landlock_errno == errno.EPERM or (seen.filtered() and seen.kernel >= FLOOR and built != ""):
        text = "a seccomp filter on this process refuses Landlock's system calls"
        return Cause(text, container_mends(seen, "seccomp", "starts the container without that filter"))
    text = "this kernel is built without Landlock (CONFIG_SECURITY_LANDLOCK)"
    return Cause(text, (newer_kernel(FLOOR),))


def kernel_option(seen: Seen, name: str) -> str:
    """Its value in the running kernel's configuration, "" for none; "" too where that is not to be had."""
    text = seen.files.text(f"/boot/config-{seen.facts.kernel if seen.facts else ''}")
    if not text:
        try:
            with gzip.open(seen.files.path("/proc/config.gz"), "rt", errors="replace") as file:
                text = file.read()
        except (OSError, EOFError):
            return ""
    found = re.search(rf'^{name}="?([^"\n]*)', text, re.MULTILINE)
    return found[1] if found else ""


def notifications(seen: Seen) -> Cause | None:
    assert seen.facts is not None
    if seen.facts.seccomp_notify:
        return None
    known = seen.files.sysctl("kernel.seccomp.actions_avail")
    if not known:
        text = (
            "/proc/sys/kernel/seccomp/actions_avail cannot be read: this kernel has no seccomp filters, or /proc/sys is masked"
        )
        return Cause(text, container_mends(seen, "proc", "starts the container with /proc unmasked"))
    text = f"this kernel's seccomp has no user notifications (it knows {known})"
    return Cause(text, (newer_kernel(FLOOR),))


def host_ids(seen: Seen) -> Cause | None:
    assert seen.facts is not None
    if not seen.is_root or seen.facts.root:
        return None
    text = (
        "this root has no host ids to give to sandboxes (the user namespace maps few): psie does here what it does for a user"
    )
    advice = "map more ids into the container (docker: userns-remap; podman: --uidmap; lxc: lxc.idmap), 65536 at least"
    return Cause(text, (Mend("gives each sandbox an id of its own", (advice,), OUTSIDE),))


def folders(seen: Seen) -> Cause | None:
    broken = [(kind, path, reason) for kind, path, reason in seen.folders if reason]
    if broken:
        kind, path, reason = broken[0]
        variable = {"run": "XDG_RUNTIME_DIR", "cache": "XDG_CACHE_HOME", "lib": "XDG_STATE_HOME"}[kind]
        mend = Mend("takes another folder", (f"export {variable}=/a/folder/of/yours",), YOURS)
        return Cause(f"{path} cannot be used: {reason}", (mend,), opening=kind != "cache")
    lost = [path for kind, path, _ in seen.folders if kind == "lib" and path == f"/tmp/psie-{seen.uid}-lib"]
    if lost:
        text = f"history and quarantines are kept in {lost[0]}, which a reboot may empty: {seen.user} has no home it can write"
        return Cause(text, (Mend("takes another folder", ("export XDG_STATE_HOME=/a/folder/of/yours",), YOURS),))
    return None


def noexec(seen: Seen) -> Cause | None:
    """It matters where plugins lie in our folders: staged ones (compiled modules), and the workspace at level minimal."""
    usable = [path for kind, path, reason in seen.folders if not reason and kind != "cache"]
    closed = [path for path in usable if os.statvfs(path).f_flag & os.ST_NOEXEC]
    if not closed:
        return None
    text = f"{', '.join(closed)}: mounted noexec, so compiled modules of plugin folders, or programs there, cannot be loaded"
    mends = (
        Mend("takes other folders", ("export XDG_RUNTIME_DIR=/a/folder/of/yours XDG_STATE_HOME=/another",), YOURS),
        *(Mend("mounts it with exec", (Command(("mount", "-o", "remount,exec", mount_of(path))),), LOWERS) for path in closed),
    )
    return Cause(text, mends)


def mount_of(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def rlimits(seen: Seen) -> Cause | None:
    hard, wanted = seen.descriptors
    folder = "/etc/security/limits.d"
    if 0 <= hard < wanted or seen.failed(errno.EMFILE):
        lines = tuple(f"{seen.user} {kind} nofile {max(1024, wanted)}" for kind in ("soft", "hard"))
        mend = Mend("raises it from the next login on", (Command(("tee", f"{folder}/60-psie-nofile.conf"), lines),))
        return Cause(f"RLIMIT_NOFILE is {hard}: sandboxes want {wanted} and more", (mend,), opening=True)
    if seen.failed(errno.EAGAIN):
        most, now = seen.processes
        lines = tuple(f"{seen.user} {kind} nproc {max(4096, 2 * now)}" for kind in ("soft", "hard"))
        mend = Mend("raises it from the next login on", (Command(("tee", f"{folder}/60-psie-nproc.conf"), lines),))
        return Cause(f"RLIMIT_NPROC is {most}, and user {seen.user} has {now} processes and threads", (mend,), opening=True)
    return None


def inotify(seen: Seen) -> Cause | None:
    if not seen.inotify:
        return None
    now = seen.files.sysctl("fs.inotify.max_user_instances")
    wanted = str(2 * int(now) if now.isdecimal() and int(now) >= 64 else 128)
    what = f"allows {wanted} for each user (now: {now or 'unknown'})"
    text = (
        f"no inotify instance is to be had ({errno.errorcode.get(seen.inotify, seen.inotify)}): fs.inotify.max_user_instances"
    )
    return Cause(text, (sysctl("fs.inotify.max_user_instances", wanted, what),))


@dataclass(frozen=True)
class Check:
    """`protections` are those, by their names in a recipe, that fail by this; none where it is about all or about no level."""

    name: str
    purpose: str
    find: Callable[[Seen], Cause | None]
    protections: tuple[str, ...] = ()


BEFORE = (  # nothing else can be known before these
    Check("libseccomp", "compiles the seccomp filters, and knows this machine's system calls", libseccomp),
    Check("Python packages", "psie's dependencies, as far as the engine needs them", packages),
    Check("util-linux", "starts the engine in a user namespace, rootless", programs),
    Check("state folders", "hold the ledger of sandboxes, workspaces, history and quarantines", folders),
    Check("rlimits", "the engine's own processes and descriptors", rlimits),
)
CHECKS = (
    Check("kernel", "has the system calls that sandboxes are made with", kernel, ("system calls",)),
    Check(
        "user namespaces",
        "all other namespaces and mounts of a sandbox are made in one",
        user_namespaces,
        (
            *(f"{name} namespace" for name in ("user", "mount", "PID", "IPC", "UTS", "cgroup", "network")),
            "network access",
            "workspace",
            "granted folders",
        ),
    ),
    Check("own /proc", "a sandbox sees its own processes, and no others", own_proc, ("own /proc",)),
    Check("overlayfs", "keeps changes in granted folders aside until they are committed", overlay, ("granted folders",)),
    Check(
        "cgroup v2",
        "limits memory, processes and CPU, and kills a sandbox as one",
        cgroups,
        ("cgroup leaf", "memory", "processes and threads", "CPU", "no process outlives the call"),
    ),
    Check(
        "Landlock",
        "confines writing to the workspace, whatever the file permissions say",
        landlock,
        ("Landlock", "writes only to the workspace", "truncate(2)", "no signals or abstract sockets out"),
    ),
    Check(
        "seccomp notifications",
        "tell what was refused, and let the supervisor connect sockets",
        notifications,
        ("record of refused system calls", "network access"),
    ),
    Check("host ids", "as root each sandbox has ids that nobody else has", host_ids),
    Check("exec in psie's folders", "plugins bring compiled modules, or make programs", noexec),
    Check("inotify", "records file operations and reads the cgroups' events", inotify, ("file operations",)),
)
