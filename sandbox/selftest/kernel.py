"""The system calls that a profile must refuse: denylist (all levels), allowlist (STRICT up), tight (MAXIMUM)."""

from __future__ import annotations

import os
import pty
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from sandbox.errors import SecurityViolationError
from sandbox.selftest.attacks import MAXIMUM, MINIMAL, STRICTER, Scene, Where, attack, attempt, calls, first_escape, syscall

NAMES = "seccomp: namespaces and mounts"
PROCESSES = "seccomp: other processes"
SURFACE = "seccomp: attack surface"
SOCKETS = "seccomp: sockets"
LISTED = "seccomp: allowlists"


# -- namespaces and mounts -----------------------------------------------------------------------------------------------


@attack(NAMES, scene=calls("unshare"))
def unshare(numbers: dict[str, int]) -> str:
    kinds = {"user": 0x10000000, "user+mnt": 0x10020000, "pid": 0x20000000, "net": 0x40000000}
    return first_escape({name: partial(syscall, numbers["unshare"], flags) for name, flags in kinds.items()})


@attack(NAMES, scene=calls("clone", "exit_group"))
def clone_user_namespace(numbers: dict[str, int]) -> str:
    import os

    def clone() -> int:
        pid = syscall(numbers["clone"], 0x10000000 | 17, 0)
        if pid == 0:
            syscall(numbers["exit_group"], 0)
        return os.waitpid(pid, 0)[1]

    return attempt(clone)


@attack(NAMES, scene=calls("clone3", "exit_group"))
def clone3_user_namespace(numbers: dict[str, int]) -> str:
    import ctypes
    import os

    def clone() -> int:
        arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
        pid = syscall(numbers["clone3"], ctypes.byref(arguments), ctypes.c_size_t(88))
        if pid == 0:
            syscall(numbers["exit_group"], 0)
        return os.waitpid(pid, 0)[1]

    return attempt(clone)


@attack(NAMES, scene=calls("setns"))
def join_a_namespace(numbers: dict[str, int]) -> str:
    """Of any process that /proc shows, and of itself."""
    import os

    def join(path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            syscall(numbers["setns"], fd, 0)
        finally:
            os.close(fd)

    return first_escape({name: partial(join, f"/proc/{name}/ns/uts") for name in ("self", "1", str(os.getppid()))})


@attack(NAMES, scene=calls("unshare", "mount", "umount2", "fsopen", "open_tree", "chroot", "pivot_root"))
def mounts(numbers: dict[str, int]) -> str:
    """In a mount namespace of its own where it gets one; as root without one it keeps its hands off the host."""
    import os

    try:
        syscall(numbers["unshare"], 0x00020000)
        os.mkdir("point")
        none: bytes | None = None
        syscall(numbers["mount"], b"none", b"/", none, 1 << 18 | 16384, none)
    except OSError:
        if os.getuid() == 0:
            return "stopped: EPERM"
        os.makedirs("point", exist_ok=True)
    return first_escape(
        {
            "mount": lambda: syscall(numbers["mount"], b"tmpfs", b"point", b"tmpfs", 0, None),
            "bind": lambda: syscall(numbers["mount"], b"/", b"point", None, 4096, None),
            "fsopen": lambda: syscall(numbers["fsopen"], b"tmpfs", 0),
            "open_tree": lambda: syscall(numbers["open_tree"], -100, b"/", 1),
            "chroot": lambda: syscall(numbers["chroot"], b"/"),
        }
    )


@attack(NAMES, scene=calls("unshare", "mount", "umount2"), refusals=("EINVAL",))
def uncover(numbers: dict[str, int]) -> str:
    """Take a mount off, to see what lies below: outside one of its own making, inside what covers the host's /proc."""
    import os

    try:
        syscall(numbers["unshare"], 0x00020000)
        syscall(numbers["mount"], b"none", b"/", None, 1 << 18 | 16384, None)
        os.mkdir("point")
        syscall(numbers["mount"], b"tmpfs", b"point", b"tmpfs", 0, None)
    except OSError:
        if os.getuid() == 0:
            return "stopped: EPERM"
        return first_escape(
            {path: partial(syscall, numbers["umount2"], path.encode(), 2) for path in ("/proc", "/proc/keys", "/tmp")}
        )
    return attempt(lambda: syscall(numbers["umount2"], b"point", 2))


# -- other processes -----------------------------------------------------------------------------------------------------


@attack(PROCESSES, scene=calls("ptrace"))
def trace_me(numbers: dict[str, int]) -> str:
    return attempt(lambda: syscall(numbers["ptrace"], 0, 0, 0, 0))


@attack(PROCESSES, scene=calls("process_vm_readv"))
def process_vm_readv(numbers: dict[str, int]) -> str:
    """Of itself, which the kernel always allows."""
    import ctypes
    import os

    source = ctypes.create_string_buffer(b"text", 8)
    target = ctypes.create_string_buffer(8)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(target), 8)
    remote = (ctypes.c_uint64 * 2)(ctypes.addressof(source), 8)
    arguments = (os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return attempt(lambda: syscall(numbers["process_vm_readv"], *arguments))


@attack(PROCESSES, scene=calls("pidfd_getfd", "kcmp"))
def own_descriptors_by_pidfd(numbers: dict[str, int]) -> str:
    import os

    def take() -> int:
        return syscall(numbers["pidfd_getfd"], os.pidfd_open(os.getpid()), 0, 0)

    return first_escape({"getfd": take, "kcmp": lambda: syscall(numbers["kcmp"], os.getpid(), os.getpid(), 2, 0, 0)})


# -- attack surface ------------------------------------------------------------------------------------------------------


@attack(SURFACE, scene=calls("add_key", "keyctl", "request_key"))
def keyrings(numbers: dict[str, int]) -> str:
    return first_escape(
        {
            "keyctl": lambda: syscall(numbers["keyctl"], 0, -3, 1),
            "add_key": lambda: syscall(numbers["add_key"], b"user", b"psie-escape", b"x", 1, -2),
        }
    )


@attack(SURFACE, scene=calls("io_uring_setup"))
def io_uring(numbers: dict[str, int]) -> str:
    import ctypes

    parameters = ctypes.create_string_buffer(256)
    return attempt(lambda: syscall(numbers["io_uring_setup"], 1, parameters))


@attack(SURFACE, scene=calls("bpf"))
def bpf(numbers: dict[str, int]) -> str:
    """A map of one element."""
    import ctypes

    attributes = (ctypes.c_uint32 * 32)(2, 4, 4, 1)
    return attempt(lambda: syscall(numbers["bpf"], 0, ctypes.byref(attributes), ctypes.c_size_t(72)))


@attack(SURFACE, scene=calls("perf_event_open"))
def perf(numbers: dict[str, int]) -> str:
    """Count the clock of this process in user mode."""
    import struct

    attributes = struct.pack("=IIQQQQQ", 1, 112, 0, 0, 0, 0, 1 << 5 | 1 << 6) + bytes(64)
    return attempt(lambda: syscall(numbers["perf_event_open"], attributes, 0, -1, -1, 0))


@attack(SURFACE, scene=calls("userfaultfd"))
def userfaultfd(numbers: dict[str, int]) -> str:
    return attempt(lambda: syscall(numbers["userfaultfd"], 0o2000000 | 1))


@attack(SURFACE, scene=calls("name_to_handle_at", "open_by_handle_at"), refusals=("ESTALE", "EOPNOTSUPP"))
def open_by_handle(numbers: dict[str, int]) -> str:
    """The root of the file system that holds the working directory, by number, past every path check."""
    import ctypes
    import os

    mount = os.open(".", os.O_RDONLY)

    def by_name() -> int:
        handle = ctypes.create_string_buffer(136)
        handle[0] = 128  # type: ignore[call-overload]
        number = ctypes.c_int()
        syscall(numbers["name_to_handle_at"], -100, b".", handle, ctypes.byref(number), 0)
        return syscall(numbers["open_by_handle_at"], mount, handle, os.O_RDONLY)

    def by_guess() -> int:
        handle = ctypes.create_string_buffer((8).to_bytes(4, "little") + (1).to_bytes(4, "little") + (2).to_bytes(8, "little"))
        return syscall(numbers["open_by_handle_at"], mount, handle, os.O_RDONLY)

    return first_escape({"name": by_name, "inode 2": by_guess})


@attack(SURFACE, scene=calls("seccomp", "prctl"))
def own_filter(numbers: dict[str, int]) -> str:
    """A filter that allows all, with a listener of the attacker's."""
    import ctypes
    import struct

    instruction = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))
    program = struct.pack("=HxxxxxxQ", 1, ctypes.addressof(instruction))
    syscall(numbers["prctl"], 38, 1, 0, 0, 0)
    return first_escape(
        {
            "listener": lambda: syscall(numbers["seccomp"], 1, 8, program),
            "seccomp": lambda: syscall(numbers["seccomp"], 1, 0, program),
            "prctl": lambda: syscall(numbers["prctl"], 22, 2, program),
        }
    )


@attack(SURFACE, scene=calls("personality"))
def no_address_randomisation(numbers: dict[str, int]) -> str:
    return attempt(lambda: syscall(numbers["personality"], 0x0040000))


@attack(SURFACE, scene=calls("inotify_init1", "inotify_init", "fanotify_init"), refusals=("EMFILE",))
def hold_every_file_watch(numbers: dict[str, int]) -> str:
    """They are charged to the host user, root too, who then has none left for anything else."""
    return first_escape(
        {
            "inotify_init1": lambda: syscall(numbers["inotify_init1"], 0),
            "inotify_init": lambda: syscall(numbers["inotify_init"]),
            "fanotify_init": lambda: syscall(numbers["fanotify_init"], 0x200, 0),
        }
    )


@attack(SURFACE, (MINIMAL, *STRICTER))
def ioctls_of_file_systems() -> str:
    """Some write to what was opened for reading: subvolumes and snapshots, versions of files, policies of encrypted folders.
    This one is harmless, and each file system has it. At STANDARD the mounts of the host's files are read-only."""
    import fcntl

    fd = os.open(os.__file__, os.O_RDONLY)
    try:
        return attempt(lambda: fcntl.ioctl(fd, 2, bytes(4)))  # FIGETBSZ
    finally:
        os.close(fd)


@attack(SURFACE, scene=calls("io_setup"))
def hold_contexts_of_asynchronous_io(numbers: dict[str, int]) -> str:
    """Their number is one for all the machine (fs.aio-max-nr), whatever the namespace; outside it takes only a few."""
    import ctypes

    context = ctypes.c_uint64()
    return attempt(lambda: syscall(numbers["io_setup"], 100, ctypes.byref(context)))


@attack(SURFACE, scene=calls("memfd_secret", "process_madvise", "vmsplice", "set_mempolicy", "syslog"))
def rarely_needed_calls(numbers: dict[str, int]) -> str:
    return first_escape(
        {
            "memfd_secret": lambda: syscall(numbers["memfd_secret"], 0),
            "set_mempolicy": lambda: syscall(numbers["set_mempolicy"], 0, None, 0),
            "syslog": lambda: syscall(numbers["syslog"], 10, None, 0),
        }
    )


@attack(SURFACE, scene=calls("prctl", "madvise"))
def settings_of_its_memory(numbers: dict[str, int]) -> str:
    """A table of the kernel's, of a gigabyte if that is asked for; the merging of equal pages of several processes; a core of
    the machine for itself."""
    import ctypes
    import mmap

    place = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(place))
    return first_escape(
        {
            "merge a place": lambda: syscall(numbers["madvise"], start, mmap.PAGESIZE, 12),  # MADV_MERGEABLE
            "merge": lambda: syscall(numbers["prctl"], 67, 0, 0, 0, 0),  # PR_SET_MEMORY_MERGE
            "core": lambda: syscall(numbers["prctl"], 62, 1, 0, 0, 0),  # PR_SCHED_CORE, PR_SCHED_CORE_CREATE
            "slots": lambda: syscall(numbers["prctl"], 78, 1, 16, 0, 0),  # PR_FUTEX_HASH, PR_FUTEX_HASH_SET_SLOTS
        }
    )


@attack(SURFACE)
def watch_a_folder_of_all() -> str:
    """dnotify tells of what others do in a folder that may only be read: fcntl(2), F_NOTIFY."""
    import fcntl
    import os

    def watch() -> int:
        fd = os.open(os.path.dirname(os.__file__), os.O_RDONLY | os.O_DIRECTORY)
        try:
            return fcntl.fcntl(fd, 1026, 1 | 1 << 31)  # DN_ACCESS, DN_MULTISHOT
        finally:
            os.close(fd)

    return attempt(watch)


@contextmanager
def terminal(where: Where) -> Iterator[Scene]:
    """A terminal of the caller's, in which somebody has just typed."""
    master, slave = pty.openpty()
    os.write(master, b"typed password\n")
    try:
        yield Scene({"path": os.ttyname(slave)})
    finally:
        os.close(master)
        os.close(slave)


@attack(SURFACE, scene=terminal, refusals=("EIO", "ENOTTY"))
def type_into_a_terminal(path: str) -> str:
    """TIOCSTI, also with bits that only a 64-bit comparison sees."""
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)

    def push(fd: int, request: int) -> None:
        if libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_char_p(b"x")):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def on_terminal() -> None:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        try:
            push(fd, 0x5412)
        finally:
            os.close(fd)

    return first_escape({"it": on_terminal, "stdin": lambda: push(0, 0x5412), "wide": lambda: push(0, 1 << 32 | 0x5412)})


@attack(SURFACE, scene=terminal)
def read_what_is_typed(path: str) -> str:
    """A read takes it away from whom it was typed for."""
    import os

    def read() -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            return os.read(fd, 100)
        finally:
            os.close(fd)

    return attempt(read)


if os.uname().machine == "x86_64":

    def machine_code(code: bytes) -> int:
        """Run it as a function without arguments."""
        import ctypes
        import mmap

        area = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        area.write(code)
        function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))
        result: int = function()
        return result

    @attack(SURFACE, ends=(SecurityViolationError,))
    def int80() -> str:
        """getpid() of i386: mov eax, 20; int 0x80; ret."""
        import errno

        value = machine_code(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
        return f"escaped: getpid() is {value}" if value > 0 else "stopped: " + errno.errorcode[-value]

    @attack(SURFACE, ends=(SecurityViolationError,))
    def x32() -> str:
        """getpid() of x32: mov eax, 0x40000027; syscall; ret."""
        import errno

        value = machine_code(b"\xb8\x27\x00\x00\x40\x0f\x05\xc3")
        return f"escaped: getpid() is {value}" if value > 0 else "stopped: " + errno.errorcode[-value]


# -- sockets -------------------------------------------------------------------------------------------------------------

_FAMILIES = {
    "udp": (2, 2, 0),
    "raw": (2, 3, 1),
    "unix": (1, 1, 0),
    "netlink": (16, 3, 0),
    "packet": (17, 3, 0),
    "alg": (38, 5, 0),
    "vsock": (40, 1, 0),
}
for _name, _numbers in _FAMILIES.items():

    @attack(SOCKETS, scene=calls("socket", arguments=_numbers), name=f"socket_{_name}")
    def socket(numbers: dict[str, int], arguments: tuple[int, int, int]) -> str:
        return attempt(lambda: syscall(numbers["socket"], *arguments))


@attack(SOCKETS, scene=calls("socketpair"))
def datagram_pair(numbers: dict[str, int]) -> str:
    """Could be connected to a socket of the host."""
    import ctypes

    pair = (ctypes.c_int * 2)()
    return attempt(lambda: syscall(numbers["socketpair"], 1, 2, 0, ctypes.byref(pair)))


# -- allowlists ----------------------------------------------------------------------------------------------------------


@attack(LISTED, STRICTER, scene=calls("munlockall"))
def calls_beyond_the_allowlist(numbers: dict[str, int]) -> str:
    return first_escape({"munlockall": lambda: syscall(numbers["munlockall"])})


@attack(LISTED, (MAXIMUM,), scene=calls("memfd_create", "eventfd2", "timerfd_create", "mlock", "splice"))
def calls_beyond_the_tight_list(numbers: dict[str, int]) -> str:
    return first_escape(
        {
            "memfd_create": lambda: syscall(numbers["memfd_create"], b"x", 0),
            "eventfd2": lambda: syscall(numbers["eventfd2"], 0, 0),
            "timerfd_create": lambda: syscall(numbers["timerfd_create"], 1, 0),
        }
    )


@attack("seccomp: new processes", scene=calls("vfork"))
def new_processes(numbers: dict[str, int]) -> str:
    """Where no subprocesses are permitted: fork, posix_spawn, exec."""
    import os

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        return os.waitpid(pid, 0)[0]

    program = os.readlink("/proc/self/exe")
    return first_escape(
        {
            "fork": fork,
            "spawn": lambda: os.waitpid(os.posix_spawn(program, ["python", "--version"], {}), 0),
            "exec": lambda: os.execve(program, ["python", "--version"], {}),
        }
    )


@attack("seccomp: threads", permissions={"allow_thread_creation": False}, ends=())
def new_threads() -> str:
    import threading

    try:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    except RuntimeError:
        return "stopped: EPERM"
    return "escaped: a thread"


@attack("seccomp: threads", scene=calls("close_range"), permissions={"allow_thread_creation": True})
def descriptors_of_a_threads_own(numbers: dict[str, int]) -> str:
    """Whoever looks at its process does not see them, and takes another one's by their number."""
    import os
    import threading

    said: list[str] = []
    opened: list[int] = []

    def hold() -> None:
        said.append(attempt(lambda: syscall(numbers["close_range"], 1 << 20, 1 << 20, 2)))  # CLOSE_RANGE_UNSHARE
        opened.append(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
        ready.set()
        done.wait()
        os.close(opened[0])

    ready, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    try:
        os.fstat(opened[0])
        return said[0] if said[0].startswith("stopped") else "failed: all threads have it"
    except OSError:
        return "escaped: one thread alone has it"
    finally:
        done.set()
        thread.join()


if os.uname().machine == "x86_64":

    @attack("seccomp: threads", scene=calls("clone"))
    def threads_around_the_filter(numbers: dict[str, int]) -> str:
        """Threads that share memory but have descriptors, or a folder and a umask, of their own: no library makes such."""
        import ctypes
        import mmap
        import os
        import time

        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        end = mmap.mmap(-1, 4096, private, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        end.write(b"\xb8\x3c\x00\x00\x00\x31\xff\x0f\x05")  # mov eax, 60; xor edi, edi; syscall: exit(0)
        libc = ctypes.CDLL(None, use_errno=True)
        stack = mmap.mmap(-1, 1 << 16, private)
        start, top = (ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in (end, stack))

        def clone(flags: int) -> None:
            # CLONE_VM, CLONE_SIGHAND, CLONE_THREAD
            if libc.clone(ctypes.c_void_p(start), ctypes.c_void_p(top + (1 << 15)), 0x10900 | flags, None) < 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            time.sleep(0.02)  # it is on the one stack that there is

        return first_escape(
            {
                "descriptors": lambda: clone(0x200),  # CLONE_FS alone
                "folder": lambda: clone(0x400),  # CLONE_FILES alone
                "both": lambda: clone(0),
            }
        )
