"""Writes only to the workspace; the view of the files; private /tmp; /proc; what a plugin leaves behind on the disk."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sandbox.selftest.attacks import (
    NAMESPACED,
    SECRET,
    STRICTER,
    Scene,
    Where,
    attack,
    attempt,
    calls,
    first_escape,
    open_to_write,
    place,
)

WRITES = "writes only to the workspace"
VIEW = "view of the files"
PROC = "own /proc, masked"
PRIVATE = "private /tmp, /dev/shm"


# -- writing outside -----------------------------------------------------------------------------------------------------


@contextmanager
def open_folder(where: Where) -> Iterator[Scene]:
    """A folder of the caller's that everybody may write, with a file in it, where STANDARD shows it. Harm: any change."""
    with tempfile.TemporaryDirectory(prefix="files-", dir=place()) as name:
        folder = Path(name)
        folder.chmod(0o777)
        file = folder / "file"
        file.write_text("content")
        file.chmod(0o666)
        os.mkfifo(folder / "fifo", 0o666)
        (folder / "fifo").chmod(0o666)
        reader = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)

        def state() -> object:
            found = file.stat()
            entries = sorted(os.listdir(folder))
            attributes = os.listxattr(file)
            return (
                (found.st_mode, found.st_mtime_ns, found.st_uid, found.st_gid, found.st_nlink),
                (entries, attributes, file.read_text(), folder.stat().st_mode, folder.stat().st_mtime_ns),
                _drain(reader),
            )

        before = state()

        def harm() -> str:
            try:
                after = state()
            except OSError as error:
                return f"the file cannot be read any more: {error}"
            return "" if after == before else f"{before} became {after}"

        try:
            yield Scene({"folder": name}, harm)
        finally:
            os.close(reader)


def _drain(reader: int) -> bytes:
    try:
        return os.read(reader, 100)
    except BlockingIOError:
        return b""


@attack(WRITES, scene=open_folder)
def write_outside_unseen(folder: str) -> str:
    """With the interpreter's record of refusals taken away, or made to fail: it is no boundary."""
    import sys

    def write() -> None:
        with open(folder + "/file", "a") as file:
            file.write("evil")

    def without_monitoring() -> None:
        monitoring = getattr(sys, "monitoring", None)
        if monitoring is not None:
            for tool in range(6):
                monitoring.free_tool_id(tool)
        write()

    def without_records() -> None:
        import gc

        for each in gc.get_objects():
            if type(each).__name__ == "Refusals":
                each.places, each.below, each.report = ("/",), ("/",), None
        write()

    return first_escape({"monitoring": without_monitoring, "records": without_records})


@attack(WRITES, scene=open_folder, refusals=("EXDEV", "ENXIO"))
def write_outside(folder: str) -> str:
    import os

    here = os.getcwd()

    def link_in() -> None:
        os.symlink(folder + "/file", "link")
        with open("link", "a") as file:
            file.write("evil")

    def hard_link() -> None:
        os.link(folder + "/file", here + "/hard")
        with open(here + "/hard", "a") as file:
            file.write("evil")

    def move_in() -> None:
        with open("mine", "w"):
            os.rename("mine", folder + "/mine")

    return first_escape(
        {
            "append": lambda: open(folder + "/file", "a"),
            "truncate": lambda: os.truncate(folder + "/file", 0),
            "empty by reading": lambda: os.open(folder + "/file", os.O_RDONLY | os.O_TRUNC),
            "empty by neither": lambda: os.open(folder + "/file", os.O_ACCMODE | os.O_TRUNC),
            "create": lambda: open(folder + "/new", "x"),
            "unlink": lambda: os.unlink(folder + "/file"),
            "rename": lambda: os.rename(folder + "/file", folder + "/other"),
            "move in": move_in,
            "mkdir": lambda: os.mkdir(folder + "/sub"),
            "symlink": lambda: os.symlink("x", folder + "/link"),
            "by link": link_in,
            "by hard link": hard_link,
        }
    )


@attack(WRITES, scene=open_folder, refusals=("ENXIO",))
def write_into_a_pipe_of_the_host(folder: str) -> str:
    """A read-only mount does not stop this."""
    import os

    def write() -> int:
        fd = os.open(folder + "/fifo", os.O_WRONLY | os.O_NONBLOCK)
        try:
            return os.write(fd, b"evil")
        finally:
            os.close(fd)

    return attempt(write)


@attack(WRITES, scene=open_folder, refusals=("EOPNOTSUPP",))
def change_what_files_outside_say(folder: str) -> str:
    """Mode, times, group, attributes: Landlock knows none of them."""
    import os

    file = folder + "/file"
    return first_escape(
        {
            "chmod": lambda: os.chmod(file, 0o4777),
            "chmod 0": lambda: os.chmod(file, 0),
            "chown": lambda: os.chown(file, -1, os.getgid()),
            "utime": lambda: os.utime(file, (1, 1)),
            "setxattr": lambda: os.setxattr(file, "user.evil", b"1"),
            "chmod of the folder": lambda: os.chmod(folder, 0o700),
        }
    )


@attack(WRITES, scene=open_folder, refusals=("EBADF",))
def hold_up_who_writes(folder: str) -> str:
    """A lock that keeps others from writing needs the right to write; a lease only that the file is of one's own id."""
    import fcntl
    import os

    def lease() -> None:
        reader = os.open(folder + "/file", os.O_RDONLY)
        fcntl.fcntl(reader, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(reader, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    return first_escape({"lease": lease, "lock": lambda: fcntl.lockf(os.open(folder + "/file", os.O_RDWR), fcntl.LOCK_EX)})


@attack(WRITES, scene=open_folder)
def chmod_by_descriptor(folder: str) -> str:
    import os

    def by_descriptor() -> None:
        fd = os.open(folder + "/file", os.O_RDONLY)
        try:
            os.fchmod(fd, 0o777)
        finally:
            os.close(fd)

    def by_proc() -> None:
        fd = os.open(folder + "/file", os.O_RDONLY)
        try:
            os.chmod(f"/proc/self/fd/{fd}", 0o777)
        finally:
            os.close(fd)

    return first_escape({"fchmod": by_descriptor, "/proc/self/fd": by_proc})


@attack(WRITES)
def keys_of_encrypted_folders() -> str:
    """They are the file system's: added or taken away through any folder of it, for all of a user's processes."""
    import ctypes
    import fcntl
    import os

    folder = os.open("/usr", os.O_RDONLY)
    key = ctypes.create_string_buffer(128)
    key[0] = 2  # type: ignore[call-overload]  # FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER
    key[40] = 32  # type: ignore[call-overload]  # raw_size

    def remove() -> None:
        spec = ctypes.create_string_buffer(key.raw[:40], 64)  # as the kernel has named it
        fcntl.ioctl(folder, 0xC0406618, spec)

    def add() -> None:
        fcntl.ioctl(folder, 0xC0506617, key)
        attempt(remove)  # else the host would have it until that is unmounted

    return first_escape({"add": add, "remove": remove})


@contextmanager
def state_folder(where: Where) -> Iterator[Scene]:
    """psie's ledger: whoever locks it stops every further sandbox of this user."""
    from sandbox import state

    path = os.path.join(state.folder("run"), "locks")
    if not os.path.exists(path):
        Path(path).touch(0o200)
    yield Scene({"path": path if where.inside else str(_like(path, where.folder))})


def _like(path: str, folder: Path) -> Path:
    copy = folder / "locks"
    copy.touch(stat.S_IMODE(os.stat(path).st_mode))
    return copy


@attack(WRITES, scene=state_folder)
def lock_the_ledger(path: str) -> str:
    import fcntl
    import os
    import struct

    def lock() -> None:
        fd = os.open(path, os.O_WRONLY)
        request = struct.pack("hhqqiq", fcntl.F_WRLCK, os.SEEK_SET, 1 << 40, 1, 0, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)

    return attempt(lock)


@attack(WRITES)
def setuid_file() -> str:
    """In the workspace, where it would outlive the plugin."""
    import os

    def chmod() -> None:
        with open("program", "w"):
            os.chmod("program", 0o4755)

    return first_escape({"chmod": chmod, "create": lambda: os.close(os.open("other", os.O_CREAT | os.O_WRONLY, 0o4755))})


@attack(WRITES)
def device_node() -> str:
    """A null device: in a tmpfs of a user namespace even root's would not open."""
    import os
    import stat

    return attempt(lambda: os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3)))


@attack(WRITES, refusals=("EINVAL",))
def whiteout() -> str:
    """A character device, which a rename can leave behind: renameat2(2)."""
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)

    def rename() -> int:
        with open("white", "w"):
            pass
        try:
            if libc.renameat2(-100, b"white", -100, b"renamed", 4):  # AT_FDCWD, RENAME_WHITEOUT
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            return os.lstat("white").st_mode
        finally:
            for name in ("white", "renamed"):
                if os.path.lexists(name):
                    os.unlink(name)

    return attempt(rename)


@attack(PROC)
def kernel_settings() -> str:
    """Opened for writing only: nothing is written."""
    paths = ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches")
    return first_escape({path: partial(open_to_write, path) for path in paths})


@attack(PROC, rootless_levels=NAMESPACED)
def memory_of_the_kernel() -> str:
    """Readable by root outside; masked or absent inside."""
    import os

    def read(path: str) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, 16) or (_ for _ in ()).throw(FileNotFoundError(2, path))
        finally:
            os.close(fd)

    paths = ("/proc/kcore", "/proc/timer_list", "/proc/kmsg", "/dev/mem", "/dev/kmsg", "/dev/port")
    return first_escape({path: partial(read, path) for path in paths})


@attack(PROC, NAMESPACED, scene=calls("getpid"))
def keys_of_the_user(numbers: dict[str, int]) -> str:
    def read(path: str) -> str:
        with open(path) as file:
            return file.read() or (_ for _ in ()).throw(FileNotFoundError(2, path))

    return first_escape({path: partial(read, path) for path in ("/proc/keys", "/proc/key-users")})


# -- reading -------------------------------------------------------------------------------------------------------------


@contextmanager
def secret_in(folder: Path | None) -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="secret-", dir=folder) as name:
        os.chmod(name, 0o755)
        file = Path(name) / "secret"
        file.write_text(SECRET)
        file.chmod(0o644)
        yield Scene({"path": str(file), "pid": os.getpid()})


@attack(VIEW, NAMESPACED, scene=lambda where: secret_in(Path("/var/tmp")))
def read_what_standard_hides(path: str, pid: int) -> str:
    """/root, /home, /run and /var: by name, and by every detour that /proc and open folders offer."""
    import os

    def climb() -> str:
        fd = os.open("/", os.O_RDONLY)
        for _ in range(8):
            fd = os.open("..", os.O_RDONLY, dir_fd=fd)
        with open(os.open(path.lstrip("/"), os.O_RDONLY, dir_fd=fd)) as file:
            return file.read()

    def read(name: str) -> str:
        with open(name) as file:
            return file.read()

    detours: dict[str, Callable[[], object]] = {"name": lambda: read(path), "climbing": climb}
    for process in ["self", "thread-self", "1", str(pid), *(name for name in os.listdir("/proc") if name.isdigit())][:40]:
        detours[f"root of {process}"] = partial(read, f"/proc/{process}/root{path}")
        detours[f"cwd of {process}"] = partial(read, f"/proc/{process}/cwd/../../../../../..{path}")
        detours[f"task of {process}"] = partial(read, f"/proc/{process}/task/{process}/root{path}")
    return first_escape(detours)


@attack(VIEW, STRICTER, scene=lambda where: secret_in(place()))
def read_anything_but_libraries(path: str, pid: int) -> str:
    return attempt(lambda: open(path).read())


@attack(VIEW, STRICTER)
def read_the_hosts_settings() -> str:
    """Names of the host's users and groups, its mounts, its devices, its own files below /etc, what else lies in its folders.

    A folder on the way to something that is shown, as the interpreter is, may name that.
    """
    import os

    with open("/proc/self/mountinfo") as file:
        points = [line.split()[4] + "/" for line in file]

    def users() -> str:
        with open("/etc/passwd") as file:
            names = [line.split(":")[0] for line in file]
        if len(names) <= 2:
            raise FileNotFoundError(2, "only the plugin's own")
        return ",".join(names)

    def names(folder: str) -> list[str]:
        found = os.listdir(folder)
        others = [name for name in found if not any(point.startswith(f"{folder}/{name}/") for point in points)]
        if found and not others:
            raise FileNotFoundError(2, "only the way to what is shown")
        return others

    folders = {path: partial(names, path) for path in ("/home", "/sys/class/net", "/etc/ssh", "/boot", "/opt")}
    return first_escape({"users": users, **folders, "fstab": lambda: open("/etc/fstab").read()})


@attack(VIEW, NAMESPACED)
def write_into_the_template() -> str:
    """All sandboxes of a kind share one root: nothing of it may be writable. Outside only the working directory is tried."""
    import os

    own = ("/tmp", "/var/tmp", "/dev/shm", "/workspace", "/run")
    with open("/proc/self/mountinfo") as file:
        points = sorted({line.split()[4] for line in file})
    inside = os.getcwd() == "/workspace"
    folders = [*points, "/", "/etc", "/usr", "/root", "/home", "/var", "/usr/lib", "/bin"] if inside else [os.getcwd()]
    actions: dict[str, Callable[[], object]] = {}
    for folder in folders:
        if folder not in own and not folder.startswith("/proc") and os.path.isdir(folder):
            actions[f"create in {folder}"] = partial(open, folder + "/psie-escape", "x")
            actions[f"mode of {folder}"] = partial(os.chmod, folder, 0o777)
    return first_escape({**actions, "run": lambda: open("/run/x", "x")} if inside else actions)
