"""Limits and their substitutes: memory, processes, time, disk, files, output, replies, and floods of all of them."""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any

from sandbox.errors import PluginExecutionError, ResourceLimitExceededError
from sandbox.host import facts
from sandbox.selftest.attacks import (
    ALL,
    NAMESPACED,
    PATIENCE,
    ROOT,
    attack,
    attempt,
    calls,
    first_escape,
    given,
    syscall,
)

MEMORY = "memory"
PROCESSES = "processes and threads"
DISK = "disk and files"
TIME = "time"
OUTPUT = "output and replies"

SMALL = {"max_memory_mb": 64.0}
LIMIT = (ResourceLimitExceededError,)
SEVERAL: dict[str, Any] = {
    "limits": {**SMALL, "max_subprocess_count": 16, "max_thread_count": 4},
    "permissions": {"allow_subprocess_execution": True, "allow_thread_creation": True},
    "rootless_levels": NAMESPACED,  # without a cgroup MINIMAL has no processes
    "ends": LIMIT,
    "memory_mb": 256,
}


# -- memory --------------------------------------------------------------------------------------------------------------


@attack(MEMORY, limits=SMALL, ends=LIMIT, memory_mb=256)
def private_memory() -> str:
    try:
        block = bytearray(256 << 20)
    except MemoryError:
        return "stopped: no more"
    return f"escaped: {len(block) >> 20} MB"


@attack(MEMORY, limits=SMALL, ends=(*LIMIT, PluginExecutionError), refusals=("ENOMEM", "ENOSPC"), memory_mb=256)
def shared_memory() -> str:
    """RLIMIT_DATA does not count it."""
    import mmap

    def take() -> int:
        area = mmap.mmap(-1, 256 << 20)
        for start in range(0, len(area), 4096):
            area[start] = 1
        return len(area) >> 20

    return attempt(take)


@attack(MEMORY, limits=SMALL, ends=(*LIMIT, PluginExecutionError), refusals=("ENOMEM", "ENOSPC"), memory_mb=256)
def shared_memory_that_is_not_mapped() -> str:
    """It stays where it is, and no file of /proc says whose it is."""
    import mmap

    def take(fd: int) -> int:
        area = mmap.mmap(fd, 256 << 20)
        for start in range(0, len(area), 1 << 20):
            for page in range(start, start + (1 << 20), 4096):
                area[page] = 1
            area.madvise(mmap.MADV_DONTNEED, start, 1 << 20)
        time.sleep(0.3)  # somebody may look
        return sum(area[::4096]) >> 8

    return first_escape({"no file": lambda: take(-1), "/dev/zero": lambda: take(os.open("/dev/zero", os.O_RDWR))})


@attack(MEMORY, limits=SMALL, ends=(*LIMIT, PluginExecutionError), refusals=("ENOMEM", "ENOSPC", "EFBIG"), memory_mb=256)
def memory_files() -> str:

    def take() -> int:
        total = 0
        for _ in range(32):
            fd = os.memfd_create("x")
            for _ in range(8):
                total += os.write(fd, bytes(1 << 20))
        return total >> 20

    return attempt(take)


@attack(MEMORY, limits=SMALL, ends=(*LIMIT, PluginExecutionError), refusals=("ENOMEM",), memory_mb=512)
def page_tables() -> str:
    """Of memory that is only read: all of it is one page of zeroes, but each 2 MB of addresses take a page of the kernel's."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = 1 << 38
    # PROT_READ; MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    start = libc.mmap(None, ctypes.c_size_t(size), 1, 0x4022, -1, ctypes.c_long(0))
    if start in (None, (1 << 64) - 1):
        code = ctypes.get_errno()
        return attempt(lambda: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 15)  # MADV_NOHUGEPAGE
    for place in range(start, start + size, 1 << 21):
        ctypes.c_char.from_address(place).value  # noqa: B018 - reading it is what takes the memory
    time.sleep(0.3)  # somebody may look
    return f"escaped: {size >> 29} MB"


@attack(MEMORY, **SEVERAL, scene=calls("exit", title=b"psie"))
@attack(
    MEMORY,
    name="memory_behind_a_name",  # what is no line's end to the kernel may be one to whoever reads it
    **SEVERAL,
    scene=calls("exit", title=b"\x0cRssAnon:\t0"),
)
@attack(MEMORY, name="memory_behind_a_name_that_is_no_text", **SEVERAL, scene=calls("exit", title=b"\xff"))
def memory_of_a_thread_that_stays(numbers: dict[str, int], title: bytes) -> str:
    """The first thread of a process ends, and with it what /proc says of the process's memory; another one goes on. In several
    processes, each of which has less than it may."""
    import ctypes
    import threading

    reader, writer = os.pipe()

    def take() -> None:
        block = bytearray(32 << 20)
        time.sleep(0.5)
        os.write(writer, bytes(block[:1]))
        os._exit(0)

    for _ in range(8):
        if not os.fork():
            threading.Thread(target=take).start()
            ctypes.CDLL(None).prctl(15, title, 0, 0, 0)  # PR_SET_NAME
            syscall(numbers["exit"], 0)
    os.close(writer)
    told = sum(len(os.read(reader, 1)) for _ in range(8))
    return "escaped: 256 MB" if told == 8 else f"stopped: {told} of 8 had memory"


@attack(MEMORY, **SEVERAL)
def memory_in_place_of_what_was_inherited() -> str:
    """What a process shares with those of psie does not count; a new program shares nothing, and has as much of its own."""
    (told, tell), (end, ends) = os.pipe(), os.pipe()
    size = 4 << 20
    lines = f"block = bytearray({size})", f"for place in range(0, {size}, 4096): block[place] = 1"
    code = "\n".join(("import os", *lines, f"os.write({tell}, b'x')", f"os.read({end}, 1)"))
    for fd in (tell, end):
        os.set_inheritable(fd, True)
    for _ in range(16):
        if not os.fork():
            try:
                os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", code])
            finally:
                os._exit(1)
    os.set_blocking(told, False)
    count, has_died = 0, False
    while count < 16 and not has_died:  # all at once: on a slow machine the first would be over before the last begins
        time.sleep(0.05)
        try:
            count += len(os.read(told, 16))
        except BlockingIOError:
            has_died = os.waitpid(-1, os.WNOHANG)[0] != 0
    time.sleep(0.5)
    os.close(ends)
    return "escaped: more than 80 MB" if count == 16 else f"stopped: {count} of 16"


@attack(
    MEMORY,
    () if "memory" in facts().controllers else ALL,  # the controller counts them
    scene=calls("landlock_create_ruleset", "landlock_add_rule"),
    limits=SMALL,
    ends=LIMIT,
)
def rules_of_landlock(numbers: dict[str, int]) -> str:
    """Each is memory of the kernel's, and there may be 65,535 of ports for each descriptor. Outside it takes those of one."""
    import struct

    attributes = struct.pack("=2Q", 0, 3)  # handled_access_net: LANDLOCK_ACCESS_NET_BIND_TCP, LANDLOCK_ACCESS_NET_CONNECT_TCP

    def take() -> int:
        ruleset = syscall(numbers["landlock_create_ruleset"], attributes, len(attributes), 0)
        for port in range(1000):
            syscall(numbers["landlock_add_rule"], ruleset, 2, struct.pack("=QQ", 1, port), 0)
        return port

    return attempt(take)


@attack(MEMORY)
def locks_of_open_files() -> str:
    """Each is memory of the kernel's that no limit counts, and a mapping keeps all those of a file. Outside it takes a few."""
    import fcntl
    import mmap
    import struct

    def take() -> int:
        fd = os.open("locks", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"x")
        for place in range(0, 2000, 2):
            fcntl.fcntl(fd, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, place, 1, 0))  # F_OFD_SETLK
        mapped = mmap.mmap(fd, 1)
        os.close(fd)
        return place // 2 + len(mapped)

    try:
        return attempt(take)
    finally:
        os.unlink("locks")


@attack(MEMORY, limits=SMALL, ends=LIMIT)
def locks_of_many_places() -> str:
    """Each second byte of a file can have a lock of its own, if one of all of it is taken away piece by piece."""
    import fcntl
    import time

    most = 12_000
    fd = os.open("places", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX, 2 * most, 0)
        for place in range(2 * most - 2, 0, -2):
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, place)
        time.sleep(2)
        return f"escaped: {most} locks"
    finally:
        os.close(fd)
        os.unlink("places")


@attack(MEMORY, limits=SMALL, ends=LIMIT)
def locks_of_mapped_files() -> str:
    """A mapping keeps the lock of a file that is closed (flock(2)): nothing tells of it with a descriptor."""
    import ctypes
    import fcntl

    most = 12_000
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    with open("mapped", "wb") as file:
        file.write(b"x")
    try:
        for _ in range(most):
            fd = os.open("mapped", os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_SH)
            start = libc.mmap(None, ctypes.c_size_t(1), 1, 2, fd, ctypes.c_long(0))  # PROT_READ; MAP_PRIVATE
            os.close(fd)
            if start in (None, (1 << 64) - 1):
                return "failed: no more mappings"
        time.sleep(2)
        return f"escaped: {most} locks"
    finally:
        os.unlink("mapped")


@attack(
    MEMORY,
    () if "memory" in facts().controllers else ALL,  # the controller counts them, as what they are: that is less than allowed
    **{
        **SEVERAL,
        "limits": {**SEVERAL["limits"], "max_memory_mb": 128.0},
        "rootless_levels": () if "memory" in facts().controllers else NAMESPACED,
    },
)
def mappings_of_several_processes() -> str:
    """Each is memory of the kernel's, and in no sum of a process's; fork copies all of them, and copies no memory."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    count = 30_000
    # PROT_READ; MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    start = libc.mmap(None, ctypes.c_size_t(count * 4096), 1, 0x4022, -1, ctypes.c_long(0))
    for place in range(start, start + count * 4096, 8192):
        if libc.mprotect(ctypes.c_void_p(place), ctypes.c_size_t(4096), 3):  # PROT_READ, PROT_WRITE
            return "failed: no more mappings"
    reader, writer = os.pipe()
    for _ in range(8):
        if not os.fork():
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    time.sleep(1 + PATIENCE)  # to list them takes a while
    return f"escaped: {9 * count} mappings"


@attack(MEMORY, () if "memory" in facts().controllers else ALL)
def stacks_that_grow() -> str:
    """MAP_GROWSDOWN is no data for RLIMIT_DATA."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p

    def take() -> int:
        start = libc.mmap(None, ctypes.c_size_t(1 << 30), 3, 0x122, -1, ctypes.c_long(0))  # PROT_READ, PROT_WRITE
        if start in (None, (1 << 64) - 1):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(1 << 30))
        return 1

    return attempt(take)


@attack(MEMORY, () if "memory" in facts().controllers else ALL, limits=SMALL)
def a_larger_stack() -> str:
    """The first thread's grows as it is used, up to a limit that anybody may raise, and is no data for RLIMIT_DATA either."""

    def raise_() -> int:
        before = resource.getrlimit(resource.RLIMIT_STACK)
        try:
            resource.setrlimit(resource.RLIMIT_STACK, (256 << 20, before[1]))
        except ValueError:
            raise PermissionError(1, "not allowed to exceed maximum limit") from None
        resource.setrlimit(resource.RLIMIT_STACK, before)
        return 256 << 20

    return attempt(raise_)


@attack(MEMORY, refusals=("EMFILE",))
def large_pipes() -> str:
    """What lies in pipes is no process's memory, and their pages are counted for the host user, for whom there are few."""
    import fcntl

    _, writer = os.pipe()
    return attempt(lambda: fcntl.fcntl(writer, 1031, 1 << 20))  # F_SETPIPE_SZ


@attack(MEMORY, () if "memory" in facts().controllers else ALL)  # the controller counts them
def large_buffers_of_sockets() -> str:
    """What is sent and not received yet is no process's memory: each end holds as much as its buffer. Outside it takes one."""
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

        def take() -> int:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            return ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

        told = attempt(take)
        after = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        return told if after <= before or told.startswith("escaped") else f"escaped: {after} bytes"


@attack(MEMORY)
def pages_of_files_in_sockets() -> str:
    """A byte that is not copied keeps its page, also when the file is emptied: by a pipe into a socket, or at once."""
    import socket

    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    with ours, theirs, open("pages", "wb+", buffering=0) as file:
        os.unlink("pages")
        file.write(bytes(1 << 16))
        try:
            return first_escape(
                {
                    "splice": lambda: os.splice(file.fileno(), writer, 1, offset_src=0),
                    "sendfile": lambda: os.sendfile(ours.fileno(), file.fileno(), 0, 1),
                }
            )
        finally:
            os.close(reader)
            os.close(writer)


@attack(MEMORY)
def huge_pages() -> str:
    """Set aside for the whole machine (vm.nr_hugepages), where they are; shared ones are in no limit's sum."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p

    def take(flags: int, fd: int = -1) -> int:
        start = libc.mmap(None, ctypes.c_size_t(2 << 20), 3, flags, fd, ctypes.c_long(0))  # PROT_READ, PROT_WRITE
        if start in (None, (1 << 64) - 1):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(start)

    return first_escape(
        {
            "shared": lambda: take(0x40021),  # MAP_SHARED, MAP_ANONYMOUS, MAP_HUGETLB
            "private": lambda: take(0x40022),
            "file": lambda: take(1, os.memfd_create("x", 4)),  # MFD_HUGETLB
        }
    )


@attack(
    MEMORY,
    limits={**SMALL, "max_disk_usage_mb": 50.0},
    ends=(*LIMIT, PluginExecutionError),
    refusals=("ENOMEM", "ENOSPC", "EDQUOT"),
    levels=NAMESPACED,
)
def memory_behind_temporary_files() -> str:
    """The disk limit, once in each private tmpfs: together they are no more than the limit either."""

    total = 0
    folders = ("/tmp", "/var/tmp", "/dev/shm", os.getcwd()) if os.getcwd() == "/workspace" else (os.getcwd(),)
    try:
        for folder in folders:
            for number in range(10):
                with open(f"{folder}/{number}", "wb", buffering=0) as file:
                    for _ in range(8):
                        total += file.write(bytes(1 << 20))
                if total > 60 << 20:
                    return f"escaped: {total >> 20} MB"
    except OSError as error:
        if error.errno != 28:
            raise
        if folder == folders[-1]:
            return "stopped: ENOSPC"
    for folder in folders[1:]:
        try:
            with open(folder + "/more", "wb", buffering=0) as file:
                for _ in range(9):
                    total += file.write(bytes(1 << 20))
        except OSError:
            continue
    return f"escaped: {total >> 20} MB" if total > 60 << 20 else "stopped: ENOSPC"


@attack(
    MEMORY,
    () if "memory" in facts().controllers else NAMESPACED,  # the controller counts them
    limits={"max_memory_mb": 24.0, "max_inodes": 100_000, "max_file_operations": 1_000_000},
    ends=LIMIT,
    memory_mb=64,
)
def memory_behind_empty_files() -> str:
    """Each is a kilobyte of the kernel's, and no block of a tmpfs."""
    import shutil

    count = 26_000
    folder = "/dev/shm" if os.getcwd() == "/workspace" else os.getcwd()
    os.mkdir(folder + "/empty")
    try:
        for number in range(count):
            os.close(os.open(f"{folder}/empty/{number}", os.O_CREAT | os.O_WRONLY))
        time.sleep(0.5)
        return f"escaped: {count} files"
    finally:
        if folder != os.getcwd():  # which goes as a whole
            shutil.rmtree(folder + "/empty")


# -- processes and threads -----------------------------------------------------------------------------------------------


@attack(PROCESSES, limits={"max_thread_count": 4}, rootless_levels=NAMESPACED)
def many_threads() -> str:
    import threading

    stop = threading.Event()
    threads = []
    try:
        for _ in range(30):
            thread = threading.Thread(target=stop.wait)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        return "stopped: no more"
    finally:
        stop.set()
    return f"escaped: {len(threads)} threads"


@attack(
    PROCESSES,
    permissions={"allow_subprocess_execution": True},
    limits={"max_subprocess_count": 3, "max_thread_count": 2},
    rootless_levels=NAMESPACED,
    refusals=("EAGAIN",),
)
def fork_bomb() -> str:

    children = []
    try:
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                os.read(os.pipe()[0], 1)
                os._exit(0)
            children.append(pid)
    except OSError as error:
        return "stopped: EAGAIN" if error.errno == 11 else f"broken: {error!r}"
    finally:
        for pid in children:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    return f"escaped: {len(children)} processes"


# -- disk and files ------------------------------------------------------------------------------------------------------


@attack(DISK, limits={"max_file_size_mb": 1.0}, ends=LIMIT, refusals=("EFBIG",))
def large_file() -> str:
    def write() -> int:
        with open("large", "wb") as file:
            return file.write(bytes(4 << 20))

    return attempt(write)


@attack(DISK, NAMESPACED, limits={"max_disk_usage_mb": 4.0}, ends=LIMIT, refusals=("ENOSPC",))
def full_disk() -> str:
    def write() -> None:
        for number in range(8):
            with open(f"file{number}", "wb") as file:
                file.write(bytes(1 << 20))

    return attempt(write)


@attack(DISK, NAMESPACED, limits={"max_inodes": 100}, ends=LIMIT, refusals=("ENOSPC",))
def many_files() -> str:
    def write() -> None:
        for number in range(300):
            open(f"file{number}", "w").close()

    return attempt(write)


@attack(DISK, limits={"max_open_files": 50}, ends=LIMIT, refusals=("EMFILE",))
def many_open_files() -> str:

    return attempt(lambda: len([os.open("/dev/null", os.O_RDONLY) for _ in range(200)]))


@attack(DISK, limits={"max_file_operations": 200}, ends=LIMIT)
def many_file_operations() -> str:
    """On few files: no limit of what lies there strikes. At first so fast that they are over before anybody watches."""

    def work() -> int:
        for number in range(3000):
            name = f"file{number % 7}"
            open(name, "w").close()
            os.rename(name, "other")
            os.unlink("other")
            if number % 300 == 0:
                time.sleep(0.03)
        return number

    return attempt(work)


@attack(DISK, limits={"max_file_operations": 200}, ends=LIMIT)
def many_file_operations_in_folders() -> str:
    """In folders that are new each time, and gone again before they can be watched, as far as that is quick enough."""

    def work() -> int:
        for number in range(2000):
            os.makedirs(f"{number}/inner")
            open(f"{number}/inner/file", "w").close()
            if number % 200 == 0:
                time.sleep(0.03)
        return number

    return attempt(work)


@attack(DISK, limits={"max_file_size_mb": 1.0}, ends=LIMIT, refusals=("EFBIG", "ENOSPC", "EOPNOTSUPP"))
def sparse_file() -> str:
    """It takes no room, and yet whoever copies it or reads it has a terabyte."""

    fd = os.open("sparse", os.O_RDWR | os.O_CREAT)
    return first_escape(
        {
            "ftruncate": lambda: os.ftruncate(fd, 1 << 40),
            "truncate": lambda: os.truncate("sparse", 1 << 40),
            "pwrite": lambda: os.pwrite(fd, b"x", 1 << 40),
            "fallocate": lambda: os.posix_fallocate(fd, 0, 4 << 20),
        }
    )


@attack(DISK, limits={"max_open_files": 50}, refusals=("EMFILE", "ETOOMANYREFS", "EAGAIN"))
def open_files_in_messages() -> str:
    """Descriptors that wait in messages are open, and in no process's table."""
    import socket

    one, other = socket.socketpair()
    other.setblocking(False)
    one.setblocking(False)
    fd = os.open("/dev/null", os.O_RDONLY)

    def send() -> int:
        for _ in range(120):
            socket.send_fds(one, [b"x"], [fd])
        return 120

    return attempt(send)


@attack(TIME, refusals=("EAGAIN",))
def timers_and_queued_signals() -> str:
    """Both are kept by the kernel for the user, whose other programs would have none (RLIMIT_SIGPENDING)."""
    import ctypes
    import signal

    libc = ctypes.CDLL(None, use_errno=True)

    def timers() -> int:
        identity = ctypes.c_void_p()
        for _ in range(600):
            if libc.timer_create(1, None, ctypes.byref(identity)):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        return 600

    def signals() -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
        for _ in range(600):
            if libc.sigqueue(os.getpid(), int(signal.SIGRTMIN), None):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
        return 600

    return first_escape({"timers": timers, "signals": signals})


@attack(PROCESSES)
def higher_priority() -> str:
    """Before all others: a negative nice value, the real-time classes, the first place at the disk."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def scheduler(policy: int, priority: int) -> None:
        value = ctypes.c_int(priority)
        if libc.sched_setscheduler(0, policy, ctypes.byref(value)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    return first_escape(
        {
            "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
            "fifo": lambda: scheduler(1, 1),
            "round robin": lambda: scheduler(2, 1),
        }
    )


@attack(DISK, refusals=("EINVAL",))
def raise_a_limit() -> str:
    """Also by the value that the kernel takes for no limit."""

    def raise_(which: int, hard: int) -> None:
        try:
            resource.setrlimit(which, (hard, hard))
        except ValueError:
            raise PermissionError(1, "not allowed to raise maximum limit") from None

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return first_escape(
        {
            "files": lambda: raise_(resource.RLIMIT_NOFILE, hard + 1),
            "core": lambda: raise_(resource.RLIMIT_CORE, -1),
            "core, lower": lambda: raise_(resource.RLIMIT_CORE, 0),
        }
    )


@attack(
    DISK,
    ALL if ROOT else NAMESPACED,
    scene=given(program=sys.executable),
    permissions={"allow_subprocess_execution": True},
    limits={"max_subprocess_count": 3, "max_file_size_mb": 500.0},
    unsafe="the host keeps a core dump of it, and may tell its makers of a crash",
)
def core_dump_of_a_program(program: str) -> str:
    """A program is dumpable again, whatever the plugin itself is; who takes its dump may be a program of the host's root."""
    import resource
    import signal

    try:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        pass
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    pid = os.posix_spawn(program, [program, "-I", "-S", "-c", code], {})
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGSEGV:
        return f"failed: it ended by {status:#x}"
    return "escaped: it has left a core dump" if os.WCOREDUMP(status) else "stopped: no dump"
