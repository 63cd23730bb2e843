"""What a level means: compile(config, limits, permissions, host facts) -> Recipe. The one place that knows.

A recipe is one frozen, JSON-able value that lists every namespace, mount, cgroup setting, seccomp profile, Landlock rule,
rlimit and id mapping of a sandbox, and next to them its protections: what is promised, by which mechanism, and what this
host makes of it. Everything after it only carries it out. Where a level cannot be had, compile() refuses, before
anything starts. Must not do anything to the system but look at paths.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from sandbox import network
from sandbox.config import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, SecurityLevel
from sandbox.errors import SandboxInitializationError
from sandbox.recipe_data import ENFORCED, MISSING, OWN_PROCESSES, SUBSTITUTED, Protection, Recipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from sandbox.host import HostFacts

    Line = list[object]

MB = 1 << 20
PLUGIN_ID = 1000  # uid and gid of the plugin inside a user namespace
WORKSPACE = "/workspace"
PROBE = "/run/probe"  # in the scratch tmpfs, beside the folders that appear at SCRATCH
SCRATCH = ("/tmp", "/var/tmp", "/dev/shm")
CPU_WEIGHT = 50  # half of what others have by default, where there is not enough for all
GRACE_SECONDS = 1.0  # at most, from the SIGTERM at the end of a call's time to SIGKILL
# Of RLIMIT_CORE. Where core_pattern names a program, the kernel starts that as root of the host, outside of every namespace,
# with the memory of whatever has crashed. A limit of 0 is for files and does not stop it, 1 does: do_coredump(), fs/coredump.c.
NO_CORE = 1

OPEN_NAMESPACES = (
    "allow user namespaces (sysctl user.max_*_namespaces; psie doctor says what closes them here, and what mends it)"
)

NAMESPACE_NAMES = {
    "user": "user namespace",
    "mnt": "mount namespace",
    "pid": "PID namespace",
    "ipc": "IPC namespace",
    "uts": "UTS namespace",
    "cgroup": "cgroup namespace",
    "net": "network namespace",
}


@dataclass(frozen=True)
class Level:
    """One row set of the levels table."""

    namespaces: tuple[str, ...]
    view: str  # host, host-hidden, libraries, minimal
    seccomp: str
    network: str  # host, loopback, veth
    strict: bool  # an isolation that cannot be had is refused


_BASE = ("user", "mnt", "pid", "ipc", "uts", "cgroup")
LEVELS = {
    IsolationLevel.MINIMAL: Level((), "host", "denylist", "host", strict=False),
    IsolationLevel.STANDARD: Level(_BASE, "host-hidden", "denylist", "host", strict=False),
    IsolationLevel.STRICT: Level((*_BASE, "net"), "libraries", "allowlist", "loopback", strict=True),
    IsolationLevel.MAXIMUM: Level((*_BASE, "net"), "minimal", "tight", "veth", strict=True),
}
VIEWS = {
    "host": "the host's files, read-only by Landlock",
    "host-hidden": "the host's files, read-only; /root, /home, /run, /var, /tmp hidden",
    "libraries": "only interpreter, libraries, plugin",
    "minimal": "only interpreter, standard library, installed packages, shared libraries, plugin, in a tmpfs root",
}
PROFILES = ("denylist", "allowlist", "tight")
_SECURITY_PROFILE = {SecurityLevel.HIGH: "allowlist", SecurityLevel.MAXIMUM: "tight"}


def compile(
    config: IsolationConfig,
    limits: PluginLimitsV2,
    permissions: PluginPermissionsV2,
    host: HostFacts,
    *,
    read_only: Sequence[str] = (),
    strict: bool = True,
) -> Recipe:
    """The recipe for what a caller asks, on this host.

    `read_only` are host paths that the plugin may read, at the same paths. With `strict=False` nothing is refused: what
    would be is marked missing (for `psie explain`).

    Raises SandboxInitializationError, naming the protection, the reason and the mend, if the level cannot be had;
    ValueError if settings contradict each other or ask for what this version does not have.
    """
    config.validate()
    limits.validate()
    permissions.validate()
    shown = [os.path.realpath(path) for path in read_only] + readable_paths(permissions)
    return _Compiler(config, limits, permissions, host, shown, strict).recipe()


class _Compiler:
    def __init__(
        self,
        config: IsolationConfig,
        limits: PluginLimitsV2,
        permissions: PluginPermissionsV2,
        host: HostFacts,
        read_only: list[str],
        strict: bool,
    ) -> None:
        self.config = config
        self.limits = limits
        self.permissions = permissions
        self.host = host
        self.read_only = read_only
        self.strict = strict
        self.level = LEVELS[config.level]
        self.check_kernel()
        self.protections: list[Protection] = []
        self.check_contradictions()
        self.namespaces = self.choose_namespaces()
        self.granted = self.granted_folders()
        self.file_size = int(min(limits.max_file_size_mb, permissions.max_file_size_mb) * MB)
        self.subprocesses = limits.max_subprocess_count if permissions.allow_subprocess_execution else 0
        self.threads = limits.max_thread_count if permissions.allow_thread_creation else 1

    # -- protections -----------------------------------------------------------------------------------------------

    def add(self, name: str, mechanism: str, detail: str = "", expected: dict[str, str] | None = None) -> None:
        self.protections.append(Protection(name, ENFORCED, mechanism, detail, "", expected))

    def report(self, name: str, substitute: str, detail: str, mend: str = "") -> None:
        """What is not as the level says: substituted by something that is named, or missing."""
        state = SUBSTITUTED if substitute else MISSING
        self.protections.append(Protection(name, state, substitute or "none", detail, mend))

    def lacking(self, name: str, reason: str, mend: str, *, substitute: str = "") -> None:
        """An isolation that cannot be had: refused at STRICT and MAXIMUM unless allow_degraded, else reported."""
        if self.level.strict and not self.config.allow_degraded and self.strict:
            raise SandboxInitializationError(
                f"level {self.config.level.value} needs a {name}, which cannot be had: {reason}",
                protection=name,
                mend=f"{mend}, or accept less with allow_degraded=True (--allow-degraded)",
            )
        self.report(name, substitute, reason, mend)

    def limit(
        self, name: str, detail: str, controller: str, mechanism: str, substitute: str, expected: dict[str, str] | None = None
    ) -> None:
        """A resource limit: by the cgroup where there is the controller, else by the substitute, and said."""
        if controller in self.controllers():
            self.add(name, mechanism, detail)
            return
        mend = self.way_to_controllers(controller)
        if self.config.require_limits and self.strict:
            raise SandboxInitializationError(
                f"{name} cannot be limited by the kernel here: no {controller} controller in a cgroup v2 tree of ours",
                protection=name,
                mend=f"{mend}, or leave out require_limits (--require-limits)",
            )
        state = SUBSTITUTED if substitute else MISSING
        said = f"{detail}: no {controller} controller here"
        self.protections.append(Protection(name, state, substitute or "none", said, mend, expected))

    def way_to_controllers(self, controller: str = "") -> str:
        """What to change on this host for a cgroup leaf, and for `controller` in it."""
        if controller in self.host.cgroup_v1:
            return f"boot this host with {controller} in cgroup v2 (psie doctor shows how)"
        if self.host.cgroup_kind == "scope":
            names = " ".join(sorted({controller, "cpu", "memory", "pids"} - {""}))
            return f"have root set Delegate={names} for user@.service (systemctl edit user@.service)"
        if self.host.root:
            return (
                "give psie a cgroup v2 tree that it may write: in a container, its own (--cgroupns=private) with "
                "/sys/fs/cgroup mounted read-write and controllers in its cgroup.subtree_control"
            )
        return (
            "give this user a delegated cgroup v2 subtree: run psie by systemd-run --user --scope --property=Delegate=yes, "
            "or have root run loginctl enable-linger for it"
        )

    def controllers(self) -> tuple[str, ...]:
        """Those that a leaf gets; io only for a limit, where it has not been handed down anyway."""
        if not self.host.cgroup_kind:
            return ()
        found = self.host.controllers
        more = self.limits.max_io_mb_per_second is not None and self.host.io_controller and "io" not in found
        return (*found, "io") if more else found

    def check_kernel(self) -> None:
        """Without these calls no level works, whatever is allowed to be degraded."""
        if self.strict and self.host.missing_syscalls:
            raise SandboxInitializationError(
                f"Linux {self.host.kernel} does not have {', '.join(self.host.missing_syscalls)} (or a filter hides them)",
                protection="system calls",
                mend="run on Linux 6.1 or later, outside a container that filters them",
            )

    # -- refusals --------------------------------------------------------------------------------------------------

    def check_contradictions(self) -> None:
        permissions, config, limits = self.permissions, self.config, self.limits
        if permissions.require_code_signing:
            raise ValueError(
                "PluginPermissionsV2.require_code_signing is set, but a function or a single file has no signature: put the "
                "plugin into a plugin folder and run it with EnhancedPluginFramework, or leave it out"
            )
        if permissions.allow_subprocess_execution and limits.max_subprocess_count == 0:
            raise ValueError(
                "PluginPermissionsV2.allow_subprocess_execution is True but PluginLimitsV2.max_subprocess_count is 0: "
                "give the number of processes that may exist at once"
            )
        if permissions.sandbox_user is not None and not self.host.root:
            import pwd

            if permissions.sandbox_user != pwd.getpwuid(self.host.uid).pw_name:
                raise ValueError(
                    f"PluginPermissionsV2.sandbox_user is {permissions.sandbox_user!r}: only root can run as another user"
                )
        if permissions.blocked_directories and config.level is IsolationLevel.MINIMAL:
            raise ValueError(
                "PluginPermissionsV2.blocked_directories needs a mount namespace: level minimal grants reading of all of / "
                "by Landlock, which cannot take a folder out of it; use level standard"
            )

    def choose_namespaces(self) -> tuple[str, ...]:
        """The level's namespaces without those that the caller turned off or the host does not give."""
        config = self.config
        off: dict[str, str] = {}
        if not config.enable_process_isolation:
            off.update(dict.fromkeys(("pid", "ipc", "uts"), "enable_process_isolation is False"))
        if not config.enable_network_isolation:
            off["net"] = "enable_network_isolation is False"
        if not config.enable_filesystem_isolation:
            off["mnt"] = "enable_filesystem_isolation is False"
        if self.host.user_namespaces:
            reason = f"user namespaces are closed to us ({self.host.user_namespaces})"
            off.update(dict.fromkeys(NAMESPACE_NAMES, reason))
        chosen = []
        for name in self.level.namespaces:
            if name not in off:
                chosen.append(name)
                continue
            host_says = off[name].startswith("user namespaces")
            mend = OPEN_NAMESPACES if host_says else f"leave out {off[name].split()[0]}"
            self.lacking(NAMESPACE_NAMES[name], off[name], mend, substitute=self.namespace_substitute(name))
        return tuple(chosen)

    @staticmethod
    def namespace_substitute(name: str) -> str:
        return {
            "net": "seccomp refuses sockets",
            "pid": "seccomp refuses new processes; Landlock keeps signals in",
            "ipc": "",
            "user": "",
            "mnt": "Landlock restricts writing",
        }.get(name, "")

    # -- the parts -------------------------------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        host = self.host
        self.describe_process()
        landlock = self.landlock()
        seccomp = self.seccomp()
        self.describe_namespaces()
        template, call_mounts = self.mounts()
        workspace = self.workspace()
        self.describe_granted()
        self.describe_limits()
        return Recipe(
            level=self.config.level.value,
            namespaces=self.namespaces,
            outer_user_namespace=self.is_outside_mapped(),
            template=template,
            sandbox_mounts=self.attached(),
            call_mounts=call_mounts,
            workspace=workspace,
            granted=self.granted,
            network=self.network(),
            hostname="psie",
            ids=self.ids(),
            rlimits=self.rlimits(),
            landlock=landlock,
            seccomp=seccomp,
            cgroup=self.cgroup(),
            environment=self.environment(str(workspace["path"])),
            limits=self.limit_numbers(),
            interpreter={"executable": host.executable, "prefix": host.prefix, "path": list(host.path)},
            preload=self.config.preload,
            modules={"allowed": list(self.permissions.allowed_modules), "blocked": list(self.permissions.blocked_modules)},
            monitoring=self.monitoring(),
            protections=tuple(self.protections),
        )

    def describe_process(self) -> None:
        self.add("own process", "fork of a clean zygote", "own session, clean environment, no inherited fd, not dumpable")
        self.add("no_new_privs", "prctl(PR_SET_NO_NEW_PRIVS)", expected={"NoNewPrivs": "1"})
        nothing = "0" * 16
        caps = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapAmb"), nothing)
        if self.host.root or "user" in self.namespaces:
            self.add(
                "no capabilities",
                "all sets and the bounding set emptied, securebits locked",
                expected={**caps, "CapBnd": nothing},
            )
        else:
            self.add("no capabilities", "all sets emptied", "the bounding set is moot by no_new_privs", caps)
        if "user" in self.namespaces:
            self.add("unprivileged id", f"id {PLUGIN_ID} in its own user namespace", self.id_detail())
        elif self.host.root:
            self.add(
                "unprivileged id",
                "an allocated id that nobody else has" if not self.permissions.sandbox_user else self.id_detail(),
            )
        else:
            self.report("unprivileged id", "the caller's own id", "without a user namespace a user has only one id")

    def id_detail(self) -> str:
        if self.permissions.sandbox_user is not None and self.host.root:
            return f"outside the id of the user {self.permissions.sandbox_user}"
        return "outside an allocated id that nobody else has" if self.host.root else "outside the caller's own id"

    def landlock(self) -> dict[str, object] | None:
        abi = self.host.landlock_abi
        if abi < 1:
            self.lacking(
                "Landlock", "the kernel has none", "boot with lsm=landlock,... (Linux 5.13 or later)",
                substitute="read-only mounts" if "mnt" in self.namespaces else "",
            )  # fmt: skip
            return None
        own_mounts = "mnt" in self.namespaces
        rules = [[path, "write_file"] for path in self.writable_devices() if os.path.exists(path)]
        if not self.config.enable_filesystem_isolation:
            rules.append(["/", "write"])
        elif self.permissions.allow_file_access:
            rules += self.readable()
        else:
            rules += [[path, "read"] for path in (*self.libraries(), *self.read_only)]
        if self.permissions.allow_file_access and self.permissions.allow_file_creation:
            rules.append([WORKSPACE if own_mounts else "{folder}/files", "write"])
            if own_mounts:
                rules += [["/tmp", "write"], ["/var/tmp", "write"], ["/dev/shm", "write"]]
            rules += [[folder["path"], "write"] for folder in self.granted]

        detail = f"ABI {abi}" + ("" if abi >= 6 else "; abstract sockets and signals are left to namespaces and seccomp")
        if self.config.enable_filesystem_isolation:
            self.add("writes only to the workspace", "Landlock", detail)
            if abi < 3:
                substitute = "read-only mounts" if own_mounts else "seccomp refuses it but for files opened for writing"
                self.report("truncate(2)", substitute, f"Landlock ABI {abi} does not know truncation", "Linux 6.2 or later")
        else:
            self.lacking(
                "Landlock rule for files", "enable_filesystem_isolation is False", "leave out enable_filesystem_isolation"
            )
        if abi >= 6:
            self.add("no signals or abstract sockets out", "Landlock", f"ABI {abi}")
        elif "pid" in self.namespaces and "net" in self.namespaces:
            self.add("no signals or abstract sockets out", "PID and network namespaces", f"Landlock ABI {abi} has no scopes")
        else:
            signals = (
                "a PID namespace keeps signals in"
                if "pid" in self.namespaces
                else "signals to processes of the same id stay open"
            )
            reason = f"Landlock ABI {abi} has no scopes"
            self.report(
                "no signals or abstract sockets out", f"seccomp refuses sockets; {signals}", reason, "Linux 6.12 or later"
            )
        probe = (PROBE if own_mounts else "{folder}/probe") if self.config.enable_filesystem_isolation else None
        return {"abi": abi, "rules": rules, "deny_network": True, "scopes": True, "probe": probe}

    def writable_devices(self) -> list[str]:
        devices = ["/dev/null", "/dev/full", "/dev/tty"]
        if "memory" in self.controllers():
            devices.append(
                "/dev/zero"
            )  # mapped, it is memory without a file: see sandbox/seccomp/denylist.toml, allow_uncounted_memory
        return devices

    def truncation_is_open(self) -> bool:
        """Whether only the filter keeps files outside from being emptied: no read-only mounts, and a Landlock before ABI 3."""
        return "mnt" not in self.namespaces and self.config.enable_filesystem_isolation and 0 < self.host.landlock_abi < 3

    def readable(self) -> list[list[str]]:
        """Read rules for all that the view shows. Where that is the host itself, without its devices: whoever has the
        caller's id could read what is typed into the caller's terminals."""
        if "mnt" in self.namespaces:
            return [["/", "read"]]
        folders = [f"/{name}" for name in sorted(os.listdir("/")) if name != "dev" and not os.path.islink(f"/{name}")]
        random = [path for path in ("/dev/random", "/dev/urandom") if os.path.exists(path)]
        return [["/", "list"], *([path, "read"] for path in folders), *([path, "read_file"] for path in random)]

    def seccomp(self) -> dict[str, object]:
        wanted = _SECURITY_PROFILE.get(self.permissions.security_level, "denylist")
        profile = max(self.level.seccomp, wanted, key=PROFILES.index)
        subprocess = self.permissions.allow_subprocess_execution
        if subprocess and "pid" not in self.namespaces and not self.cgroup_leaf():
            if not self.config.allow_degraded and self.strict:
                raise SandboxInitializationError(
                    f"level {self.config.level.value} without a PID namespace or a cgroup cannot end the processes of a plugin",
                    protection="seccomp",
                    mend="use level standard, or leave out allow_subprocess_execution (--allow-subprocess)",
                )
            self.report("no process outlives the call", "", "no PID namespace and no cgroup leaf", "use level standard")
        detail = ", ".join(
            word
            for word, said in (
                ("new processes refused", not subprocess),
                ("threads refused", not self.permissions.allow_thread_creation),
                ("sockets only by the supervisor", self.has_sockets()),
                ("sockets refused", not self.has_sockets()),
                ("memfd_create and shared memory without a file refused", "memory" not in self.controllers()),
                ("truncate refused", self.truncation_is_open()),
                ("changes of mode, owner and times refused", "mnt" not in self.namespaces and not self.host.root),
            )
            if said
        )
        if not self.host.seccomp_notify:
            self.lacking("record of refused system calls", "the kernel has no SECCOMP_RET_USER_NOTIF", "Linux 5.0 or later")
        self.add(f"seccomp {profile}", "seccomp(2) filter", detail, {"Seccomp": "2"})
        return {
            "profile": profile,
            "allow_subprocess": subprocess,
            "allow_threads": self.permissions.allow_thread_creation,
            "sockets": self.has_sockets(),
            "allow_metadata": "mnt" in self.namespaces or self.host.root,
            "allow_uncounted_memory": "memory" in self.controllers(),
            "allow_truncate": not self.truncation_is_open(),
            "allow_ioctls": "mnt" in self.namespaces or profile != "denylist",  # the others have lists of their own
        }

    def describe_namespaces(self) -> None:
        for name in self.namespaces:
            self.add(
                NAMESPACE_NAMES[name],
                f"clone3(CLONE_NEW{'NS' if name == 'mnt' else name.upper()})",
                expected={f"ns/{name}": "own"},
            )
        mode = self.network_mode()
        if mode == "veth":
            self.add("network", "network namespace with an empty veth", "no address, no route; its outer end leads nowhere")
        elif mode == "loopback":
            self.add("network", "network namespace", "loopback only")
        elif not self.permissions.allow_network_access:
            self.add("network", "seccomp", "sockets lead nowhere" if self.has_sockets() else "sockets refused")
        if self.permissions.allow_network_access:
            self.describe_access()

    def has_sockets(self) -> bool:
        """Whether the supervisor can answer for sockets: it has to read the plugin's memory, and to reach its sockets."""
        return self.host.seccomp_notify and (self.host.root or self.is_outside_mapped())

    def is_outside_mapped(self) -> bool:
        """Whether the zygote runs in a user namespace of its own: rootless, where there are others, or for the network."""
        if self.host.root:
            return False
        return "user" in self.namespaces or (self.permissions.allow_network_access and not self.host.user_namespaces)

    def describe_access(self) -> None:
        hosts = self.permissions.allowed_hosts
        if not self.has_sockets():
            reason = "the kernel has no SECCOMP_RET_USER_NOTIF" if self.host.root else self.host.user_namespaces
            raise SandboxInitializationError(
                f"allow_network_access needs a supervisor that can read the plugin, which cannot be had: {reason}",
                protection="network access",
                mend=f"{OPEN_NAMESPACES}, run as root, or leave out allow_network_access",
            )
        ports = ", ".join(map(str, self.permissions.allowed_ports)) or "none"
        detail = f"TCP to {', '.join(hosts) or 'nowhere'}; ports of hosts without one: {ports}"
        self.add("network access", "connections made by the supervisor (seccomp notification)", detail)

    def network(self) -> dict[str, Any]:
        """`mode` is that of the namespace; where connections may go to is `access`, None for nowhere; `looks` says whether
        names in it have to be looked up when a sandbox opens."""
        permissions = self.permissions
        access: dict[str, Any] | None = None
        if permissions.allow_network_access:
            access = {
                "allowed": [list(network.split(host)) for host in permissions.allowed_hosts],
                "blocked": [list(network.split(host)) for host in permissions.blocked_hosts],
                "ports": list(permissions.allowed_ports),
            }
        return {
            "mode": self.network_mode(),
            "sockets": self.has_sockets(),
            "access": access,
            "looks": network.needs_look(access),
            "max_requests": self.limits.max_network_requests,
        }

    def network_mode(self) -> str:
        return self.level.network if "net" in self.namespaces else "host"

    def ids(self) -> dict[str, object]:
        """`plugin`: uid and gid as the worker has them in its own user namespace; where they lie outside is allocated."""
        uid: int | None = None
        if self.permissions.sandbox_user is not None and self.host.root:
            import pwd

            try:
                uid = pwd.getpwnam(self.permissions.sandbox_user).pw_uid
            except KeyError:
                raise ValueError(
                    f"PluginPermissionsV2.sandbox_user is {self.permissions.sandbox_user!r}: no such user: check the name"
                ) from None
            if uid == 0:
                raise ValueError("PluginPermissionsV2.sandbox_user is root: give an unprivileged user")
        return {"user_namespace": "user" in self.namespaces, "allocated": self.host.root, "outside": uid}

    # -- files -----------------------------------------------------------------------------------------------------

    def interpreter_paths(self) -> list[str]:
        """What a plugin's Python reads: prefixes, standard library, installed packages; the outermost folders only."""
        host = self.host
        wanted = [host.prefix, host.base_prefix, host.stdlib, *host.path]
        if self.level.view == "minimal" or host.base_prefix in ("/usr", "/"):
            version = os.path.basename(host.stdlib)
            wanted = [host.stdlib, *host.path, os.path.realpath(host.executable)]
            if host.prefix != host.base_prefix:
                wanted += [os.path.join(host.prefix, "bin"), os.path.join(host.prefix, "pyvenv.cfg")]
            library = os.path.dirname(host.stdlib)
            wanted += [os.path.join(library, f"lib{version}.so.1.0"), os.path.join(library, f"lib{version}.so")]
        return outermost(path for path in wanted if path not in ("/usr", "/") and os.path.exists(path))

    def libraries(self) -> list[str]:
        """The interpreter and the shared libraries, as paths that exist on this host."""
        shared = ["/usr/lib64", "/usr/share/zoneinfo"]
        if self.level.view == "minimal":
            shared += [f"/usr/lib/{self.host.multiarch}"] if self.host.multiarch else ["/usr/lib"]
        else:
            shared += ["/usr/lib", "/usr/local/lib", "/usr/share/locale"]
            if self.permissions.allow_subprocess_execution:
                shared += ["/usr/bin", "/usr/local/bin"]
        return outermost([*(path for path in shared if os.path.isdir(path)), *self.interpreter_paths()])

    def interpreter_links(self, shown: list[str]) -> list[Line]:
        """The symbolic links from sys.executable to the interpreter, as far as they are not in what is shown."""
        lines: list[Line] = []
        path = self.host.executable
        for _ in range(40):  # ELOOP, path_resolution(7)
            if not os.path.islink(path):
                break
            target = os.readlink(path)
            if not under(path, shown):
                lines.append(["symlink", target, path])
            path = os.path.normpath(os.path.join(os.path.dirname(path), target))
        return lines

    def attached(self) -> list[list[str]]:
        """The caller's folders and files that are not visible anyway: (source, target, flags)."""
        if "mnt" not in self.namespaces:
            return []
        away = hidden() if self.level.view == "host-hidden" else ("/",)
        return [[path, path, "ro,nosuid,nodev"] for path in outermost(self.read_only) if under(path, away)]

    def granted_folders(self) -> list[dict[str, str]]:
        """The allowed directories, each with what becomes of it (see sandbox.ns.granted). Raises ValueError."""
        if not self.permissions.allow_file_access:
            return []
        kind = "overlay" if "mnt" in self.namespaces else "direct"
        if kind == "overlay" and self.host.overlay:
            kind = "copy"
        if not self.permissions.allow_file_creation:
            kind = "read"
        paths = [path.rstrip("/") or "/" for path in dict.fromkeys(self.permissions.allowed_directories)]
        for path in paths:
            self.check_granted(path, [other for other in paths if other != path])
        return [{"path": path, "kind": kind} for path in paths]

    def check_granted(self, path: str, others: list[str]) -> None:
        where = f"PluginPermissionsV2.allowed_directories: {path!r}"
        reason = ungrantable(path)
        if reason:
            raise ValueError(f"{where} {reason}")
        for other in others:
            if under(path, (other,)):
                raise ValueError(f"{where} lies in {other!r}, which is granted as well: leave one of them out")

    def describe_granted(self) -> None:
        if not self.granted:
            return
        detail, kind = ", ".join(folder["path"] for folder in self.granted), self.granted[0]["kind"]
        if kind == "read":
            self.add("granted folders", "read-only mounts" if "mnt" in self.namespaces else "Landlock", detail)
        elif kind == "overlay":
            self.add("granted folders", "overlayfs: changes are kept aside until they are committed", detail)
        elif kind == "copy":
            self.report("granted folders", "a copy within the disk limit", f"{detail}; no overlay here: {self.host.overlay}")
        else:
            reason = f"{detail}: without a mount namespace they are written directly, no rollback"
            self.report("granted folders", "", reason, "use level standard")

    def workspace(self) -> dict[str, object]:
        size = int(self.limits.max_disk_usage_mb * MB)
        if "mnt" in self.namespaces:
            self.add("workspace", "tmpfs with size= and nr_inodes=", f"{size // MB} MB, {self.limits.max_inodes} inodes")
            return {"kind": "tmpfs", "path": WORKSPACE, "bytes": size, "inodes": self.limits.max_inodes}
        reason = "no mount namespace: no disk quota, no private /tmp, no rollback; TMPDIR is the workspace"
        self.report("workspace", "a folder on the host's disk", reason)
        return {"kind": "folder", "path": "{folder}/files", "bytes": size, "inodes": self.limits.max_inodes}

    def mounts(self) -> tuple[dict[str, object] | None, list[Line]]:
        """(template, lines of every call). See sandbox.ns.mounts for the operations."""
        if "mnt" not in self.namespaces:
            if self.host.landlock_abi and self.config.enable_filesystem_isolation:
                self.add("view of the files", "Landlock", VIEWS["host"])
            else:
                self.report("view of the files", "", "the host's files, as the plugin's id may read and write them")
            return self.template_for_reach(), []
        self.add("view of the files", "mount namespace, pivot_root(2)", VIEWS[self.level.view])
        detail = f"{self.limits.max_disk_usage_mb:g} MB together, besides the workspace"
        self.add("private /tmp, /var/tmp, /dev/shm, minimal /dev", "tmpfs per call", detail)
        lines: list[Line] = []
        access, resolver, kept = self.network()["access"], os.path.realpath(network.RESOLV_CONF), list[str]()
        if self.level.view == "host-hidden":
            lines.append(
                ["host_root", sorted(name.strip("/") for name in (*HIDDEN, "/dev", "/proc", "/sys", "/tmp")), "ro,nosuid,nodev"]
            )
            lines += [["directory", path, 0o755] for path in HIDDEN]
            lines += [["tmpfs", path, "nosuid,nodev", f"mode=755,{ELSEWHERE}", []] for path in elsewhere()]
            lines.append(["bind_optional", "/sys/devices/system/cpu", "/sys/devices/system/cpu", "ro,nosuid,nodev,noexec"])
            shown = [path for path in self.interpreter_paths() if under(path, hidden())]
            if network.wants_dns(access) and under(resolver, hidden()):  # a link there, as of systemd-resolved
                lines.append(["file", resolver, ""])
                lines += [["symlink", "/run", "/var/run"]] if os.path.islink("/var/run") else []  # by which some lead
                kept.append(resolver)
        else:
            for name in ("bin", "lib", "lib32", "lib64"):
                if os.path.islink("/" + name):
                    lines.append(["symlink", os.readlink("/" + name), "/" + name])
                elif os.path.isdir("/" + name) and name != "bin":
                    lines.append(["bind_optional", "/" + name, "/" + name, "ro,nosuid,nodev"])
            shown = self.libraries()
            lines += self.interpreter_links(shown)
            files = {**ETC, "/etc/hosts": network.hosts_file(access)}
            files |= {network.RESOLV_CONF: ""} if network.wants_dns(access) else {}
            lines += [["file", path, text] for path, text in files.items()]
            lines += [["bind_optional", path, path, "ro,nosuid,nodev,noexec"] for path in ETC_SHARED if os.path.exists(path)]
        lines += [["bind", path, path, "ro,nosuid,nodev"] for path in shown]
        lines.append(["tmpfs", "/dev", "nosuid,noexec", "mode=755,size=64k,nr_inodes=64", []])
        lines += [["bind_optional", path, path, "nosuid,noexec"] for path in DEVICES]
        lines += [["symlink", target, path] for path, target in DEVICE_LINKS.items()]
        lines += [["directory", path, 0o755] for path in ("/dev/shm", "/tmp", "/var/tmp", "/run", "/proc", WORKSPACE)]
        lines.append(["readonly", "/dev"])
        template: dict[str, object] = {"lines": lines, "pivot": True}

        kept += [*shown, *(target for _, target, _ in self.attached()), *(folder["path"] for folder in self.granted)]
        pid = "pid" in self.namespaces
        minimal = self.level.view == "minimal"
        call: list[Line] = [["proc", "subset=pid" if minimal else ""] if pid else ["no_proc"]]
        if pid and not minimal:
            call += [["mask", path] for path in PROC_MASKED]
        if self.host.fresh_proc and pid:
            reason = f"a fresh one cannot be mounted here ({self.host.fresh_proc}): none is stronger"
            self.report("own /proc", "no /proc at all", reason, "unmask /proc of this container")
        elif pid:
            self.add("own /proc", "proc of the PID namespace" + (", subset=pid" if minimal else ", sensitive files masked"))
        size, inodes = int(self.limits.max_disk_usage_mb * MB), self.limits.max_inodes
        places = {path: [each for each in kept if under(each, (path,))] for path in ("/run", *SCRATCH)}
        call.append(["scratch", "/run", f"mode=1777,size={size},nr_inodes={inodes}", places])
        call += [["mask", os.path.realpath(path)] for path in self.permissions.blocked_directories]
        call += [["readonly", path] for path in (elsewhere() if self.level.view == "host-hidden" else ())]
        call.append(["readonly", "/"])
        if self.permissions.blocked_directories:
            self.add("blocked folders", "empty read-only mounts", ", ".join(self.permissions.blocked_directories))
        return template, call

    def template_for_reach(self) -> dict[str, object] | None:
        """As root without a mount namespace: one all the same if the interpreter, or what the plugin may read, lies where
        the plugin's id cannot walk."""
        if not self.host.root:
            return None
        blocked: dict[str, list[str]] = {}
        for path in outermost([*self.interpreter_paths(), *self.read_only]):
            gate = unwalkable(path)
            if gate is not None:
                blocked.setdefault(gate, []).append(path)
        if not blocked and not self.granted:
            return None
        lines: list[Line] = []
        for gate, paths in sorted(blocked.items()):
            lines += [["tmpfs", gate, "nosuid,nodev", "mode=755,size=64k,nr_inodes=256", paths], ["readonly", gate]]
        if blocked:
            self.add(
                "reach of the interpreter",
                "a mount namespace shared by all calls",
                f"{', '.join(sorted(blocked))} hidden but for what is needed",
            )
        return {"lines": lines, "pivot": False}

    # -- limits ----------------------------------------------------------------------------------------------------

    def cgroup_leaf(self) -> bool:
        return bool(self.host.cgroup_kind)

    def cgroup(self) -> dict[str, object] | None:
        if not self.cgroup_leaf():
            return None
        memory: dict[str, object] = {
            "memory.max": int(self.limits.max_memory_mb * MB),
            "memory.swap.max": 0,
            "memory.oom.group": 1,
        }
        if self.config.enable_real_time_monitoring:
            # Whoever passes it is slowed down until the event reader, which warns, has raised it.
            memory["memory.high"] = int(self.limits.memory_warning_threshold_mb * MB)
        every: dict[str, dict[str, object]] = {
            "memory": memory,
            "pids": {"pids.max": OWN_PROCESSES + self.threads + self.subprocesses},  # for each call that runs
            "cpu": {"cpu.max": f"{int(self.limits.max_cpu_percent * 1000)} 100000", "cpu.weight": CPU_WEIGHT},
        }
        if self.limits.max_io_mb_per_second is not None:
            rate = int(self.limits.max_io_mb_per_second * MB)
            every["io"] = {"io.max": "\n".join(f"{disk} rbps={rate} wbps={rate}" for disk in disks())}
        controllers = self.controllers()
        settings = {name: str(value) for each in controllers for name, value in every.get(each, {}).items()}
        place = {"kind": self.host.cgroup_kind, "folder": self.host.cgroup_folder}
        return {**place, "controllers": list(controllers), "settings": settings}

    def describe_limits(self) -> None:
        limits = self.limits
        memory = int(limits.max_memory_mb * MB)
        if self.cgroup_leaf():
            places = {
                "root": "in the host's tree",
                "delegated": "in a subtree that is delegated to this user",
                "scope": "in a scope of the user's systemd",
            }
            detail = f"{places[self.host.cgroup_kind]}, killed as one by cgroup.kill"
            self.add("cgroup leaf", "cgroup v2, clone3(CLONE_INTO_CGROUP)", detail)
        else:
            self.lacking_limit(
                "cgroup leaf",
                "no cgroup v2 tree that we may write",
                self.way_to_controllers(),
                "all end with their PID namespace" if "pid" in self.namespaces else "",
            )
        self.limit(
            "memory", f"{limits.max_memory_mb:g} MB", "memory", "memory.max, swap 0, oom.group",
            "RLIMIT_DATA per process, and a look at all of it every 0.1 s",
            {"limit/Max data size": str(memory)},
        )  # fmt: skip
        tasks = self.tasks()
        self.limit(
            "processes and threads", f"{self.subprocesses} subprocesses, {self.threads} threads", "pids", "pids.max",
            "RLIMIT_NPROC" if tasks is not None else "",
            {"limit/Max processes": str(tasks)} if "user" in self.namespaces else {},
        )  # fmt: skip
        self.limit(
            "CPU", f"{limits.max_cpu_percent:g} % of one CPU", "cpu", "cpu.max",
            f"RLIMIT_CPU: {self.cpu_seconds()} s for each process, not the rate",
            {"limit/Max cpu time": str(self.cpu_seconds())},
        )  # fmt: skip
        if limits.max_io_mb_per_second is not None:
            detail = f"{limits.max_io_mb_per_second:g} MB a second read, and as much written, of each disk"
            self.limit("disk throughput", detail, "io", "io.max", "")
        self.add("wall clock", "the warden kills the call", f"{limits.max_execution_time_seconds:g} s")
        self.add(
            "open files", "RLIMIT_NOFILE", str(limits.max_open_files), {"limit/Max open files": str(limits.max_open_files)}
        )
        self.add("file size", "RLIMIT_FSIZE", f"{self.file_size / MB:g} MB", {"limit/Max file size": str(self.file_size)})
        self.add("output", "counted by the caller's side", f"{limits.max_output_mb:g} MB")
        self.add("result", "counted by the caller's side", f"{limits.max_result_mb:g} MB")
        self.describe_file_operations()
        if self.permissions.allow_network_access:
            self.add("network requests", "counted by the supervisor", f"{limits.max_network_requests} connections a call")

    def describe_file_operations(self) -> None:
        most, recording = self.limits.max_file_operations, self.recording()
        if recording == "none":
            detail = f"{most}: enable_filesystem_isolation is False, so they are not counted"
            self.protections.append(Protection("file operations", MISSING, "none", detail, by_host=False))
        elif recording == "looks":
            detail = f"{most} in a call: enable_real_time_monitoring is False, so only what has changed is counted"
            self.protections.append(
                Protection("file operations", SUBSTITUTED, "a look at the end of each call", detail, by_host=False)
            )
        else:
            places = "the workspace"
            if any(folder["kind"] in ("overlay", "copy") for folder in self.granted):
                places += " and granted folders"
            elif any(folder["kind"] == "direct" for folder in self.granted):
                places += ", not granted folders, where others work as well"
            detail = (
                f"{most} in a call, in {places}; of its first 50 ms what they have changed; "
                "reading is not counted, nor what is done in /tmp and the like"
            )
            self.add("file operations", "inotify, and a look at the end", detail)

    def recording(self) -> str:
        """How file operations are seen."""
        if not self.config.enable_filesystem_isolation:
            return "none"
        return "events" if self.config.enable_real_time_monitoring else "looks"

    def lacking_limit(self, name: str, reason: str, mend: str, substitute: str) -> None:
        if self.config.require_limits and self.strict:
            raise SandboxInitializationError(
                f"it cannot be had: {reason}",
                protection=name,
                mend=f"{mend}, or leave out require_limits (--require-limits)",
            )
        self.report(name, substitute, reason, mend)

    def tasks(self) -> int | None:
        """RLIMIT_NPROC counts the tasks of an id within its user namespace: a limit only where that id is the sandbox's own."""
        each = OWN_PROCESSES + self.threads + self.subprocesses
        if "user" in self.namespaces:
            return each
        if self.host.root and self.permissions.sandbox_user is None:
            return each  # times the calls that run: the id is that of all calls of the sandbox (see sandbox.engine.worker)
        return None

    def cpu_seconds(self) -> int:
        """CPU seconds that a process may use in all: what it could at its rate, but never less than one CPU for the whole
        time, so that the wall clock strikes first for a program that only spins."""
        seconds = self.limits.max_execution_time_seconds * max(1.0, self.limits.max_cpu_percent / 100)
        return int(seconds) + 2

    def rlimits(self) -> list[Line]:
        lines: list[Line] = [
            ["RLIMIT_CORE", NO_CORE],
            ["RLIMIT_NOFILE", self.limits.max_open_files],
            ["RLIMIT_FSIZE", self.file_size],
            ["RLIMIT_MEMLOCK", 65536],
            ["RLIMIT_MSGQUEUE", 0],
            ["RLIMIT_NICE", 0],
            ["RLIMIT_RTPRIO", 0],
            ["RLIMIT_SIGPENDING", 256],
        ]
        if "memory" not in self.controllers():
            lines.append(["RLIMIT_DATA", int(self.limits.max_memory_mb * MB)])
            lines.append(["RLIMIT_STACK", int(self.limits.max_memory_mb * MB)])  # a stack that grows is no data
        if "cpu" not in self.controllers():
            lines.append(["RLIMIT_CPU", self.cpu_seconds()])
        tasks = self.tasks()
        if "pids" not in self.controllers() and tasks is not None:
            lines.append(["RLIMIT_NPROC", tasks])
        return lines

    def limit_numbers(self) -> dict[str, float]:
        limits = self.limits
        return {
            "memory_bytes": int(limits.max_memory_mb * MB),
            "seconds": limits.max_execution_time_seconds,
            "output_bytes": int(limits.max_output_mb * MB),
            "result_bytes": int(limits.max_result_mb * MB),
            "file_bytes": self.file_size,
            "disk_bytes": int(limits.max_disk_usage_mb * MB),
            "cpu_percent": limits.max_cpu_percent,
            "cpu_seconds": self.cpu_seconds(),
            "open_files": limits.max_open_files,
            "threads": self.threads,
            "subprocesses": self.subprocesses,
        }

    def environment(self, workspace: str) -> dict[str, str]:
        """A clean, listed set: nothing of the caller's own environment."""
        if not self.permissions.allow_environment_variables:
            return {}
        temporary = "/tmp" if "mnt" in self.namespaces else workspace
        variables = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": workspace,
            "TMPDIR": temporary,
            "USER": "plugin",
            "LOGNAME": "plugin",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for name in THREAD_POOLS:
            variables[name] = str(self.threads)
        if network.wants_dns(self.network()["access"]):
            variables["RES_OPTIONS"] = "use-vc"  # resolv.conf(5): ask name servers over TCP
        return variables

    def monitoring(self) -> dict[str, object]:
        """Settings of the parts that watch a sandbox; those of later versions are carried along and listed."""
        config, limits = self.config, self.limits
        grace = min(GRACE_SECONDS, limits.max_execution_time_seconds / 10)
        return {
            "real_time": config.enable_real_time_monitoring,
            "telemetry": config.telemetry_enabled,
            "auto_recovery": config.auto_recovery_enabled,
            "grace_seconds": grace if config.auto_recovery_enabled else 0.0,
            "violation_threshold": config.violation_threshold,
            "quarantine": config.quarantine_on_violation,
            "watchdog_timeout_seconds": config.watchdog_timeout_seconds,
            "interval_seconds": config.resource_check_interval_seconds,
            "lifetime_minutes": config.max_sandbox_lifetime_minutes,
            "memory_warning_mb": limits.memory_warning_threshold_mb,
            "execution_warning_seconds": limits.execution_warning_threshold_seconds,
            "cpu_warning_percent": limits.cpu_warning_threshold_percent,
            "recording": self.recording(),
            "max_file_operations": limits.max_file_operations,
            "allow_file_deletion": self.permissions.allow_file_deletion,
        }


HIDDEN = ("/root", "/home", "/run", "/var")
ELSEWHERE = "size=64k,nr_inodes=4096"  # of what stands where one of them is a link to: the names of what is shown in it
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
DEVICE_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}
PROC_MASKED = ("/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/sysrq-trigger", "/proc/timer_list", "/proc/kallsyms")
ETC = {
    "/etc/passwd": f"root:x:0:0:root:/:/usr/sbin/nologin\nplugin:x:{PLUGIN_ID}:{PLUGIN_ID}:plugin:{WORKSPACE}:/bin/sh\n",
    "/etc/group": f"root:x:0:\nplugin:x:{PLUGIN_ID}:\n",
    "/etc/host.conf": "multi on\n",
    "/etc/hostname": "psie\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
ETC_SHARED = ("/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/alternatives", "/etc/ssl/certs")
THREAD_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def disks() -> list[str]:
    """Numbers (major:minor) of the host's disks that have a medium; what is made of files or memory has its limit there."""
    found = []
    for name in sorted(os.listdir("/sys/block")) if os.path.isdir("/sys/block") else []:
        if not name.startswith(("loop", "ram", "zram")):
            with open(f"/sys/block/{name}/dev") as number, open(f"/sys/block/{name}/size") as size:
                if int(size.read()):
                    found.append(number.read().strip())
    return found


def readable_paths(permissions: PluginPermissionsV2) -> list[str]:
    """Those of the permissions, as they are on this host. Raises ValueError for one that cannot be shown."""
    for path in permissions.readable_paths:
        reason = unshowable(path)
        if reason:
            raise ValueError(f"PluginPermissionsV2.readable_paths: {path!r} {reason}")
    if not permissions.allow_file_access:
        return []
    granted = [path.rstrip("/") for path in permissions.allowed_directories]  # which show it already
    return [path for path in (each.rstrip("/") for each in permissions.readable_paths) if not under(path, granted)]


def unshowable(path: str) -> str:
    """Why a file or folder cannot be shown to a plugin at its path, with the mend; "" if it can."""
    plain = path.rstrip("/") or "/"
    if not os.path.lexists(plain):
        return "does not exist: make it first, or check the path"
    if os.path.realpath(plain) != plain:
        return f"is, or leads through, a symbolic link: name {os.path.realpath(plain)}"
    if plain in ("/", WORKSPACE) or under(plain, ("/proc", "/sys", "/dev")) or plain in ("/run", "/tmp", "/var/tmp"):
        return "is the system's own, of which a sandbox has another: name files of yours"
    if not stat.S_ISDIR(os.lstat(plain).st_mode) and not stat.S_ISREG(os.lstat(plain).st_mode):
        return "is neither a file nor a directory: name what it is to read"
    return ""


# What nobody should let a plugin write to.
SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/sbin", "/sys", "/usr")


def ungrantable(path: str) -> str:
    """Why a folder cannot be granted, with the mend; "" if it can."""
    if not os.path.lexists(path):
        return "does not exist: make it first, or check the path"
    if os.path.realpath(path) != path:
        return f"is, or leads through, a symbolic link: grant {os.path.realpath(path)}"
    if not os.path.isdir(path):
        return "is no directory: grant the one that it lies in"
    if path == "/" or under(path, ("/proc", "/sys", "/dev")) or path in ("/run", "/tmp", "/var", "/var/tmp"):
        return "is the system's own, of which a sandbox has another: grant a directory of yours"
    return ""


def elsewhere() -> list[str]:
    """Where the hidden folders lie that are links to others: /home is on many hosts, and a plugin may know the other name."""
    hosts = [os.path.realpath(path) for path in (*HIDDEN, "/tmp")]
    return outermost(path for path in hosts if path != "/" and os.path.isdir(path) and not under(path, (*HIDDEN, "/tmp")))


def hidden() -> tuple[str, ...]:
    """The folders that level standard hides, by all of their names."""
    return (*HIDDEN, "/tmp", *elsewhere())


def under(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(os.path.join(folder, "")) for folder in folders)


def outermost(paths: Iterable[str]) -> list[str]:
    """`paths` without those that lie in another of them; in a stable order."""
    chosen: list[str] = []
    for path in sorted(set(paths)):
        if not under(path, chosen):
            chosen.append(path)
    return chosen


def unwalkable(path: str) -> str | None:
    """The first folder on the way to `path` that a foreign id may not pass."""
    current = ""
    for part in path.strip("/").split("/")[:-1]:
        current += "/" + part
        if not os.stat(current).st_mode & 0o001:
            return current
    return None
