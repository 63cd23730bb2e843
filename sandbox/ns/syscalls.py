"""System calls that Python 3.11 does not have, one small function each, as ctypes calls them.

Every function raises OSError with the path it was given. Numbers are not typed in: libseccomp's own table gives them
for the machine we run on. Constants carry the kernel's names. Must not know what a sandbox is.

Sources: the man pages of section 2 of the same names, linux/mount.h, linux/sched.h, linux/prctl.h.
"""

from __future__ import annotations

import _signal as signal  # signal.py would import enum, which nothing else on this side needs
import os
import sys
from _struct import Struct  # struct.py adds nothing but a file

from sandbox.ns import native

CLONE_FILES = 0x00000400
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_PIDFD = 0x00001000
CLONE_INTO_CGROUP = 0x200000000
CLOSE_RANGE_UNSHARE = 2

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MNT_DETACH = 2

PROT_READ = 1
PROT_WRITE = 2
MAP_PRIVATE = 2
MAP_FAILED = 2 * sys.maxsize + 1  # (void *) -1

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
MOVE_MOUNT_F_EMPTY_PATH = 0x00000004
MOUNT_ATTR_RDONLY = 0x00000001
MOUNT_ATTR_NOSUID = 0x00000002
MOUNT_ATTR_NODEV = 0x00000004
MOUNT_ATTR_NOEXEC = 0x00000008
MOUNT_ATTR_IDMAP = 0x00100000

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RENAME_NOREPLACE = 1 << 0
RENAME_EXCHANGE = 1 << 1

CLOCK_MONOTONIC = 1
TFD_TIMER_ABSTIME = 1
ITIMERSPEC = Struct("@4l")  # interval and moment, in seconds and nanoseconds each

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
PR_SET_CHILD_SUBREAPER = 36

_libc = native.Program()
_libc.syscall.restype = native.c_long
_numbers: dict[str, int] = {}


def number(name: str) -> int:
    """The number of the system call `name` on this machine, from libseccomp (seccomp_syscall_resolve_name(3))."""
    if name not in _numbers:
        import ctypes

        try:
            library = ctypes.CDLL("libseccomp.so.2")
        except OSError:
            raise OSError("libseccomp.so.2 is missing: install it (Debian, Ubuntu: apt-get install libseccomp2)") from None
        resolved = library.seccomp_syscall_resolve_name(name.encode())
        if resolved < 0:
            raise OSError(f"this libseccomp does not know the system call {name}: install a newer one")
        _numbers[name] = resolved
    return _numbers[name]


def know(numbers: dict[str, int]) -> None:
    """What `resolve` has found here before: to load the library again takes a third of a millisecond."""
    _numbers.update(numbers)


def resolved(*names: str) -> dict[str, int]:
    return {name: number(name) for name in names}


def resolve(*names: str) -> None:
    """Look the numbers up now, while the library can still be reached (a later root may not have it)."""
    for name in names:
        number(name)


def check(result: int, path: str | None = None) -> int:
    if result < 0:
        code = native.get_errno()
        raise OSError(code, os.strerror(code), path)
    return result


def syscall(name: str, *arguments: object, what: str | None = None) -> int:
    """syscall(2) by name; integers are passed as longs, bytes as pointers. `what` becomes the error's filename."""
    values = [native.c_long(value) if isinstance(value, int) else value for value in arguments]
    return check(_libc.syscall(native.c_long(number(name)), *values), what)


def prctl(option: int, argument: int = 0, argument3: int = 0) -> int:
    return check(_libc.prctl(option, native.c_ulong(argument), native.c_ulong(argument3), native.c_ulong(0), native.c_ulong(0)))


def clone3(flags: int, cgroup_fd: int | None = None) -> tuple[int, int]:
    """clone3(2) as a fork with namespace flags: (pid, pidfd) in the parent, (0, -1) in the child.

    For single-threaded processes only, and for children that run nothing but psie's own code: CPython's fork hooks are
    left out, which would cost 0.6 ms a child, and glibc's cached thread id is stale. Before anything foreign runs, fork
    once more, by `fork`.
    """
    pidfd = native.c_int(-1)
    if cgroup_fd is not None:
        flags |= CLONE_INTO_CGROUP
    fields = (flags | CLONE_PIDFD, native.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup_fd or 0)
    arguments = (native.c_uint64 * 11)(*fields)
    pid = syscall("clone3", native.byref(arguments), native.sizeof(arguments))
    if pid == 0:
        return 0, -1
    os.set_inheritable(pidfd.value, False)
    return pid, pidfd.value


def fork() -> int:
    """fork(2) by the C library, whose own handlers run and whose thread id is right in the child; but without CPython's.

    A child that may stand idle for long calls `after_fork` when it is needed, and before anything foreign runs. For
    single-threaded processes only.
    """
    return check(_libc.fork())


def after_fork() -> None:
    """What CPython does in the child of os.fork(): its own state made new, then the functions of os.register_at_fork().

    It lets go of locks there that it has taken before the fork: from 3.13 on it aborts where they are not held.
    """
    _libc.PyOS_BeforeFork()
    _libc.PyOS_AfterFork_Child()


def map_privately(fd: int, size: int) -> memoryview:
    """The first `size` bytes of a file, by mmap(2): what is changed in them is changed for this process alone.

    Unlike with mmap.mmap no descriptor stays open for it, however long it is used.
    """
    import ctypes
    import weakref

    _libc.mmap.restype = ctypes.c_void_p
    address = _libc.mmap(None, ctypes.c_size_t(size), PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, ctypes.c_long(0))
    if address == MAP_FAILED:
        check(-1)
    memory = (ctypes.c_char * size).from_address(address)
    unmap = weakref.finalize(memory, _libc.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size))
    unmap.atexit = False  # who uses it may do so later
    return memoryview(memory).cast("B")


def unshare_descriptors(first: int) -> None:
    """close_range(2): a table of descriptors of our own, with copies of those below `first` and none of the others."""
    syscall("close_range", first, 0xFFFFFFFF, CLOSE_RANGE_UNSHARE)


def unshare(flags: int) -> None:
    check(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    check(_libc.setns(fd, kind))


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() if kind else None,
            native.c_ulong(flags),
            data.encode() if data else None,
        ),
        target,
    )


def umount(target: str, flags: int = MNT_DETACH) -> None:
    check(_libc.umount2(os.fsencode(target), flags), target)


def pivot_root(new: str, old: str) -> None:
    syscall("pivot_root", os.fsencode(new), os.fsencode(old), what=new)


def open_tree(path: str, flags: int, directory: int = AT_FDCWD) -> int:
    return syscall("open_tree", directory, os.fsencode(path), flags | OPEN_TREE_CLOEXEC, what=path)


def move_mount(tree: int, target: str) -> None:
    syscall("move_mount", tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH, what=target)


def mount_setattr(tree: int, attributes: int, *, recursive: bool, what: str, user_namespace: int = 0) -> None:
    """Set mount attributes on the (detached) mount that `tree` refers to, and on all below it if `recursive`.

    With MOUNT_ATTR_IDMAP the ids of its files are those of `user_namespace`, an fd, as mount_setattr(2) says.
    """
    mount_attr = (native.c_uint64 * 4)(attributes, 0, 0, user_namespace)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    syscall("mount_setattr", tree, b"", flags, native.byref(mount_attr), native.sizeof(mount_attr), what=what)


def timerfd_create() -> int:
    """A descriptor that can be read from a moment on, by CLOCK_MONOTONIC; timerfd_create(2)."""
    return check(_libc.timerfd_create(CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK))


def timerfd_settime(fd: int, moment: float, interval: int = 0) -> None:
    """`moment` as time.monotonic has it, in seconds, 0 for none; and every `interval` seconds after that, if there is one."""
    seconds, rest = divmod(int(moment * 1e9), 1_000_000_000)
    check(_libc.timerfd_settime(fd, TFD_TIMER_ABSTIME, ITIMERSPEC.pack(interval, 0, seconds, rest), None))


def timerfd_gettime(fd: int) -> float:
    """Seconds until it can be read next; 0 for never."""
    current = (native.c_long * 4)()
    check(_libc.timerfd_gettime(fd, native.byref(current)))
    _, _, seconds, rest = current
    return float(seconds + rest / 1e9)


def open_beneath(folder: int, path: str, flags: int, *, mode: int = 0) -> int:
    """openat2(2) of a path that must stay in the file system and below the fd `folder`, with no symbolic link on it."""
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
    open_how = (native.c_uint64 * 3)(flags | os.O_CLOEXEC, mode, resolve)
    arguments = (os.fsencode(path or "."), native.byref(open_how), native.sizeof(open_how))
    return syscall("openat2", folder, *arguments, what=path)


def open_without_links(path: str) -> int:
    """openat2(2) of an absolute path, as O_PATH; ELOOP if there is a symbolic link on it."""
    open_how = (native.c_uint64 * 3)(os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_NO_SYMLINKS)
    return syscall("openat2", AT_FDCWD, os.fsencode(path), native.byref(open_how), native.sizeof(open_how), what=path)


def rename(old_folder: int, old: str, new_folder: int, new: str, flags: int) -> None:
    """renameat2(2)"""
    syscall("renameat2", old_folder, os.fsencode(old), new_folder, os.fsencode(new), flags, what=new)


def pidfd_send_signal(pidfd: int, number_: int) -> None:
    """Send a signal through a pidfd; a process that is gone already is no error."""
    try:
        signal.pidfd_send_signal(pidfd, number_)
    except ProcessLookupError:
        return
