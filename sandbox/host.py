"""What this host and this user can do, probed once.

The facts are the second input of `sandbox.recipe.compile`. Probing forks a few children and costs some 20 ms, so the
facts are cached per boot, user, namespaces and interpreter; `probe()` is the plain truth, `facts()` the cached one.
Must not know what a level means.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace

from sandbox import state
from sandbox.cgroups import place
from sandbox.errors import SHORT, ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

SYSCALLS = (
    "clone3",
    "openat2",
    "open_tree",
    "move_mount",
    "mount_setattr",
    "pidfd_getfd",
    "close_range",
    "landlock_restrict_self",
)


PROBE_TRIES = 2


@dataclass(frozen=True)
class HostFacts:
    """One host as one user sees it. Every field is plain data, so that the facts can be stored and shown as JSON.

    `user_namespaces`, `fresh_proc` and `overlay` hold "" where the thing works and otherwise the reason why not.
    """

    root: bool  # and with ids to give away: see _is_root
    uid: int
    gid: int
    kernel: str
    machine: str
    user_namespaces: str
    fresh_proc: str
    overlay: str
    missing_syscalls: tuple[str, ...]
    landlock_abi: int
    seccomp_notify: bool
    cgroup: str  # mount point of the v2 tree, "" where there is none
    cgroup_kind: str  # of the place for leaves, see sandbox.cgroups.place: root, delegated or scope; "" for none
    cgroup_folder: str  # of the place
    controllers: tuple[str, ...]  # those that a leaf of ours gets
    io_controller: bool  # whether it can have this one too: it is handed down when a limit needs it, since it has its cost
    cgroup_v1: tuple[str, ...]  # controllers that v1 hierarchies have, and v2 therefore cannot
    memory_bytes: int
    executable: str
    prefix: str
    base_prefix: str
    stdlib: str
    multiarch: str
    path: tuple[str, ...]  # sys.path of a sandbox: the standard library and installed packages

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def library_path() -> tuple[str, ...]:
    """The entries of sys.path that are interpreter or installed packages; a caller's own folders are not a plugin's."""
    roots = [
        os.path.join(root, "") for root in dict.fromkeys((sys.prefix, sys.base_prefix, os.path.expanduser("~/.local/lib")))
    ]
    stdlib = os.path.dirname(os.__file__)
    chosen = []
    for entry in sys.path:
        entry = os.path.abspath(entry) if entry else ""
        inside = entry.startswith(tuple(roots)) and (entry.startswith(stdlib) or os.path.basename(entry).endswith("-packages"))
        if entry and entry not in chosen and (inside or os.path.basename(entry) in ("site-packages", "dist-packages")):
            chosen.append(entry)
    return tuple(entry for entry in chosen if os.path.exists(entry)) or (stdlib,)


def in_child(action: Callable[[], None], seconds: float = 10.0) -> str:
    """Run `action` in a forked child; "" if it returned, else the text of its OSError. It has so many seconds for it.

    A fork of a process with threads may find a lock taken that nobody in it will ever release: then it is killed, and another
    one is tried. Raises OSError where it was short of descriptors, which tells nothing of the host.
    """
    for _ in range(PROBE_TRIES):
        told = _forked(action, seconds)
        if told and told[0]:
            raise OSError(told[0], os.strerror(told[0]))
        if told:
            return told[1:].decode()
    return "the probe did not finish"


def _forked(action: Callable[[], None], seconds: float) -> bytes:
    """What a child says of `action`, after a byte that is 0, or what it was SHORT of; nothing if it did not in time."""

    def tell() -> None:
        text, short = b"the probe did not finish", 0
        try:
            action()
            text = b""
        except OSError as error:
            text = (error.strerror or str(error)).encode()
            short = error.errno if error.errno in SHORT else 0
        except BaseException as error:
            text = repr(error).encode()
        finally:
            telling.write(bytes([short]) + text)

    reader, writer = os.pipe()
    with open(reader, "rb", 0) as told, open(writer, "wb", 0) as telling:
        os.set_blocking(reader, False)
        try:
            with forked(tell):
                telling.close()
                # Its word, not the pipe's end: others may have been forked meanwhile, and keep that open.
                waiting = select.poll()
                waiting.register(reader, select.POLLIN)
                if not waiting.poll(seconds * 1000):
                    raise TimeoutError
                return told.read(65536) or b""
        except TimeoutError:
            return b""


@contextmanager
def forked(action: Callable[[], None]) -> Iterator[None]:
    """A child that does `action`; at the end it is waited for, or killed where something is raised.

    Every signal is blocked in it: one that comes to both, as Ctrl-C on a terminal does, would be handled in it too, and what a
    handler raises there has a second caller go on.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    pid = 0
    try:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            pid = os.fork()
            if pid == 0:
                try:
                    action()
                finally:
                    os._exit(1)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield
        reap(pid)
    except BaseException:
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            reap(pid)
        raise


def reap(pid: int) -> None:
    """Wait for a child that ends now; where SIGCHLD is ignored nobody needs to, and nobody can: wait(2)."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return


def _enter_user_namespace(flags: int) -> None:
    from sandbox.ns import syscalls as sc

    uid, gid = os.getuid(), os.getgid()
    sc.unshare(sc.CLONE_NEWUSER | flags)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _probe_user_namespaces() -> None:
    """With network, IPC, UTS, cgroup and mount namespaces inside, as a sandbox wants them, and a mount that works."""
    from sandbox.ns import syscalls as sc

    _enter_user_namespace(sc.CLONE_NEWNS | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS | sc.CLONE_NEWCGROUP | sc.CLONE_NEWNET)
    sc.mount("none", "/", None, sc.MS_REC | sc.MS_PRIVATE)
    sc.mount("tmpfs", "/sys", "tmpfs", sc.MS_NOSUID)


def _probe_fresh_proc() -> None:
    from sandbox.ns import syscalls as sc

    _enter_user_namespace(sc.CLONE_NEWNS | sc.CLONE_NEWPID)
    reason = in_child(lambda: sc.mount("proc", "/proc", "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC), 3.0)
    if reason:
        raise OSError(errno.EPERM, reason)


def _probe_overlay() -> None:
    """As it is made for a granted folder: by the host's root, or in a user namespace with the overlay's own attributes in
    the user's name space (which a tmpfs has from Linux 6.6 on)."""
    from sandbox.ns import syscalls as sc

    as_root = _is_root()
    if as_root:
        sc.unshare(sc.CLONE_NEWNS)
    else:
        _enter_user_namespace(sc.CLONE_NEWNS)
    sc.mount("none", "/", None, sc.MS_REC | sc.MS_PRIVATE)
    sc.mount("tmpfs", "/sys", "tmpfs", sc.MS_NOSUID)
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir("/sys/" + name)
    options = "lowerdir=/sys/lower,upperdir=/sys/upper,workdir=/sys/work"
    sc.mount("overlay", "/sys/merged", "overlay", 0, options if as_root else options + ",userxattr")
    os.setxattr("/sys/upper", f"{'trusted' if as_root else 'user'}.overlay.probe", b"y")


def _missing_syscalls() -> tuple[str, ...]:
    """Those that answer ENOSYS. Arguments that cannot succeed tell "there" from "not there"."""
    from sandbox.ns import syscalls as sc

    missing = []
    for name in SYSCALLS:
        try:
            sc.syscall(name, -1, 0, 0, 0, 0)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                missing.append(name)
    return tuple(missing)


def _is_root() -> bool:
    """Root that has ids to give away. In a container that maps few ids it is a user like any other."""
    from sandbox.ns import userids

    if os.getuid() != 0:
        return False
    try:
        userids.id_region(userids.REGION)
    except ResourceError:
        return False
    return True


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _seccomp_notify() -> bool:
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail") as file:
            return "user_notif" in file.read().split()
    except OSError:
        return False


def _sysctl_hints() -> str:
    """Why user namespaces may be closed here: the settings that distributions use for it."""
    hints = []
    for path, closed in (
        ("/proc/sys/user/max_user_namespaces", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        try:
            with open(path) as file:
                if file.read().strip() == closed:
                    hints.append(f"{path[len('/proc/sys/') :].replace('/', '.')} is {closed}")
        except OSError:
            continue
    return ", ".join(hints)


def probe() -> HostFacts:
    """Find out everything now. Raises OSError if libseccomp is missing, or this process is short of descriptors."""
    from sandbox.seccomp import landlock

    uname = os.uname()
    kind, folder, controllers = place.find()
    user_namespaces = in_child(_probe_user_namespaces)
    if user_namespaces and (hints := _sysctl_hints()):
        user_namespaces = f"{user_namespaces}: {hints}"
    return HostFacts(
        root=_is_root(),
        uid=os.getuid(),
        gid=os.getgid(),
        kernel=uname.release,
        machine=uname.machine,
        user_namespaces=user_namespaces,
        fresh_proc=in_child(_probe_fresh_proc) if not user_namespaces else "no user namespace to mount it in",
        overlay=in_child(_probe_overlay) if not user_namespaces else "no user namespace to mount it in",
        missing_syscalls=_missing_syscalls(),
        landlock_abi=landlock.abi(),
        seccomp_notify=_seccomp_notify(),
        cgroup=place.mount_point(),
        cgroup_kind=kind,
        cgroup_folder=folder,
        controllers=controllers,
        io_controller=bool(kind) and "io" in place.words(folder + "/cgroup.controllers"),
        cgroup_v1=place.legacy(),
        memory_bytes=_memory_bytes(),
        executable=sys.executable,
        prefix=sys.prefix,
        base_prefix=sys.base_prefix,
        stdlib=os.path.dirname(os.__file__),
        multiarch=getattr(sys.implementation, "_multiarch", ""),
        path=library_path(),
    )


def facts() -> HostFacts:
    """The facts of this boot, user, namespaces and interpreter, from the cache if they are there.

    Raises OSError as probe().
    """
    import json

    cache = state.Cache("facts")
    key = json.loads(json.dumps(state.host_key()))
    stored = cache.read("facts.json")
    if stored is not None:
        try:
            content = json.loads(stored)
            if content["key"] == key and set(content["facts"]) == {field.name for field in fields(HostFacts)}:
                values: dict[str, Any] = {
                    name: tuple(value) if isinstance(value, list) else value for name, value in content["facts"].items()
                }
                return HostFacts(**values)
        except (ValueError, KeyError, TypeError):
            pass  # damaged or of another version: probed again and overwritten
    found = probe()
    cache.write("facts.json", json.dumps({"key": key, "facts": found.to_dict()}).encode())
    return found


def ideal() -> HostFacts:
    """Those of this host, if it could do everything: root, with all that a recipe can use."""
    return replace(
        facts(),
        root=True,
        user_namespaces="",
        fresh_proc="",
        overlay="",
        missing_syscalls=(),
        landlock_abi=7,
        seccomp_notify=True,
        cgroup="/sys/fs/cgroup",
        cgroup_kind="root",
        cgroup_folder="/sys/fs/cgroup",
        controllers=("memory", "pids", "cpu"),
    )
