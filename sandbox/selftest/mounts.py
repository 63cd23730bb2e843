"""The mount tree, and the ways around it: new mounts and other flags of old ones, namespaces by kept descriptors, old roots."""

from __future__ import annotations

from functools import partial

from sandbox.selftest.attacks import attack, attempt, calls, first_escape, syscall

MOUNTS = "seccomp: mounts one by one"
KEPT = "seccomp: namespaces by kept descriptors"
TREE = ("unshare", "mount")


def private_tree(numbers: dict[str, int]) -> None:
    """A mount tree of one's own where that can be had, in a user namespace of one's own without root; and a folder in it."""
    import os

    os.makedirs("point", exist_ok=True)
    try:
        syscall(numbers["unshare"], 0x00020000 | (0x10000000 if os.getuid() else 0))
        syscall(numbers["mount"], b"none", b"/", None, 1 << 18 | 16384, None)  # MS_PRIVATE, MS_REC
    except OSError:
        if os.getuid() == 0:
            raise  # what follows would be done to the host


@attack(MOUNTS, scene=calls(*TREE, "fsopen", "fsconfig", "fsmount", "move_mount"))
def new_file_system(numbers: dict[str, int]) -> str:
    """A tmpfs by the new mount API, from fsopen to move_mount."""

    def make() -> int:
        private_tree(numbers)
        context = syscall(numbers["fsopen"], b"tmpfs", 0)
        syscall(numbers["fsconfig"], context, 6, None, None, 0)  # FSCONFIG_CMD_CREATE
        tree = syscall(numbers["fsmount"], context, 0, 0)
        return syscall(numbers["move_mount"], tree, b"", -100, b"point", 4)  # MOVE_MOUNT_F_EMPTY_PATH

    def each() -> int:
        return syscall(numbers["fsmount"], 0, 0, 0)

    return first_escape({"whole": make, "fsopen": lambda: syscall(numbers["fsopen"], b"proc", 0), "fsmount": each})


@attack(MOUNTS, scene=calls(*TREE, "open_tree", "move_mount"))
def copy_of_a_tree(numbers: dict[str, int]) -> str:
    """open_tree(OPEN_TREE_CLONE) of / at another place, without what covers parts of it."""

    def copy() -> int:
        private_tree(numbers)
        tree = syscall(numbers["open_tree"], -100, b"/", 1)
        return syscall(numbers["move_mount"], tree, b"", -100, b"point", 4)

    return first_escape({"whole": copy, "plain": lambda: syscall(numbers["open_tree"], -100, b"/", 0)})


@attack(MOUNTS, scene=calls(*TREE, "mount_setattr", "open_tree_attr"))
def other_attributes(numbers: dict[str, int]) -> str:
    """Read-only, nosuid and nodev taken off /, recursively: in a tree of its own outside."""
    import struct

    cleared = struct.pack("=4Q", 0, 1 | 2 | 4, 0, 0)

    def clear(path: bytes) -> int:
        private_tree(numbers)
        return syscall(numbers["mount_setattr"], -100, path, 0, cleared, len(cleared))

    return first_escape({path.decode(): partial(clear, path) for path in (b"/", b"/proc", b"/dev", b"point")})


@attack(MOUNTS, scene=calls(*TREE))
def remount_writable(numbers: dict[str, int]) -> str:
    """MS_REMOUNT | MS_BIND without MS_RDONLY, of what is read-only inside."""

    def remount(path: bytes) -> int:
        private_tree(numbers)
        return syscall(numbers["mount"], b"none", path, None, 32 | 4096, None)

    return first_escape({path.decode(): partial(remount, path) for path in (b"/", b"/usr", b"/proc", b"/dev")})


@attack(MOUNTS, scene=calls(*TREE))
def mount_in_a_user_namespace(numbers: dict[str, int]) -> str:
    """A user namespace gives the capability, also to those who have none."""

    def make() -> int:
        syscall(numbers["unshare"], 0x10000000 | 0x00020000)
        return syscall(numbers["mount"], b"tmpfs", b"/tmp", b"tmpfs", 0, None)

    return attempt(make)


@attack(MOUNTS, scene=calls(*TREE, "umount2"), refusals=("EINVAL",))
def take_the_masks_off(numbers: dict[str, int]) -> str:
    """What covers files of /proc, and the mounts that cover one another. Outside a cover of its own making."""
    import os

    def uncover(path: str) -> int:
        return syscall(numbers["umount2"], path.encode(), 2)  # MNT_DETACH

    def own() -> int:
        private_tree(numbers)
        syscall(numbers["mount"], b"tmpfs", b"point", b"tmpfs", 0, None)
        return uncover("point")

    # With those of `own` these are ten refusals: after one more the sandbox could be ended before it has answered.
    masks = ("/proc/kcore", "/proc/kallsyms", "/proc", "/dev", "/run", "/tmp", "/dev/shm", "/workspace")
    inside = {path: partial(uncover, path) for path in masks} if os.getcwd() == "/workspace" else {}
    return first_escape({"own": own, **inside})


@attack(MOUNTS, scene=calls(*TREE, "pivot_root", "chroot", "umount2"), refusals=("EINVAL",))
def back_to_the_old_root(numbers: dict[str, int]) -> str:
    """chroot below the working directory and climb out of it (chroot(2)); or pivot_root into what is still open."""
    import os

    def climb() -> list[str]:
        private_tree(numbers)
        above = os.open(".", os.O_RDONLY)
        syscall(numbers["chroot"], b"point")
        os.fchdir(above)
        for _ in range(50):
            os.chdir("..")
        syscall(numbers["chroot"], b".")
        return os.listdir("/")

    def pivot() -> int:
        private_tree(numbers)
        syscall(numbers["mount"], b"tmpfs", b"point", b"tmpfs", 0, None)
        os.chdir("point")
        return syscall(numbers["pivot_root"], b".", b".")

    return first_escape({"chroot": climb, "pivot_root": pivot})


@attack(KEPT, scene=calls("setns", "unshare"), refusals=("EINVAL",))
def namespaces_by_kept_descriptors(numbers: dict[str, int]) -> str:
    """Descriptors of namespaces, and pidfds which stand for all of them, kept from before one leaves. Inside: of init."""
    import os

    def by_file(pid: int, kind: str) -> int:
        return syscall(numbers["setns"], os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), 0)

    def by_pidfd(pid: int, flags: int) -> int:
        return syscall(numbers["setns"], os.pidfd_open(pid), flags)

    actions = {}
    for pid in (os.getppid(), 1, os.getpid()):
        for kind in ("mnt", "net", "uts", "ipc", "cgroup", "pid", "user"):
            actions[f"{kind} of {pid}"] = partial(by_file, pid, kind)
        actions[f"mnt and net by a pidfd of {pid}"] = partial(by_pidfd, pid, 0x00020000 | 0x40000000)
    return first_escape(actions)


@attack(KEPT, scene=calls("unshare"))
def unshare_what_is_not_a_sandbox_s(numbers: dict[str, int]) -> str:
    """Time, which no sandbox has of its own, and what the threads of a process share: descriptors, folder, semaphores."""
    kinds = {"time": 0x80, "files": 0x400, "folder": 0x200, "semaphores": 0x40000}
    return first_escape({name: partial(syscall, numbers["unshare"], flag) for name, flag in kinds.items()})
