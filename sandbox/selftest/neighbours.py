"""Other processes, other sandboxes, the host's sockets, shared memory, names and networks."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sandbox.selftest.attacks import (
    NAMESPACED,
    PATIENCE,
    SECRET,
    SIGNALS_KEPT,
    STRICTER,
    SYSCALLS,
    Scene,
    Where,
    attack,
    attempt,
    calls,
    first_escape,
    given,
    place,
    syscall,
    victim,
)

SIGNALS = "no signals out"
FOREIGN = "other processes are closed"
IPC = "IPC namespace, or no System V and POSIX queues"
NAMESPACE = "namespaces of its own"
NETWORK = "network"


# -- signals -------------------------------------------------------------------------------------------------------------


@attack(SIGNALS, rootless_levels=SIGNALS_KEPT, scene=victim, refusals=("EINVAL",))
def signal_a_process(pid: int, numbers: dict[str, int], secret: bytes) -> str:
    import os
    import signal

    def group() -> None:
        """0 is a group outside our PID namespace, for which killpg(2) takes our own; 1, as in containers, all that we may."""
        theirs = os.getpgid(pid)
        os.killpg(theirs if theirs > 1 else pid, 0)

    return first_escape(
        {
            "0": lambda: os.kill(pid, 0),
            "kill": lambda: os.kill(pid, signal.SIGTERM),
            "tgkill": lambda: syscall(numbers["tgkill"], pid, pid, signal.SIGTERM),
            "group": group,
            "pidfd": lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGTERM),
        }
    )


@attack(SIGNALS, rootless_levels=SIGNALS_KEPT, scene=victim)
def signal_by_input(pid: int, numbers: dict[str, int], secret: bytes) -> str:
    """F_SETOWN names who gets a signal when there is something to read; F_SETSIG names which."""
    import fcntl
    import os
    import signal
    import time

    reader, writer = os.pipe()

    def own() -> None:
        fcntl.fcntl(reader, fcntl.F_SETOWN, pid)
        fcntl.fcntl(reader, 10, signal.SIGTERM)
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        os.write(writer, b"x")

    answer = attempt(own)
    time.sleep(0.02)
    return "stopped: asked, but not delivered" if answer.startswith("escaped") else answer


@attack(SIGNALS, rootless_levels=SIGNALS_KEPT, scene=lambda where: given(pid=os.getpid())(where))
def caller_by_its_socket(pid: int) -> str:
    """SO_PEERPIDFD on whatever sockets there are gives a pidfd of who made them, across PID namespaces."""
    import os
    import signal
    import socket as sockets
    import stat

    tried = {}
    found = []
    for fd in range(64):
        try:
            found += [fd] if stat.S_ISSOCK(os.fstat(fd).st_mode) else []
        except OSError:
            continue
    for fd in found:
        peer = sockets.socket(fileno=os.dup(fd))

        def send(peer: sockets.socket = peer) -> None:
            try:
                pidfd = peer.getsockopt(sockets.SOL_SOCKET, 77)
                signal.pidfd_send_signal(pidfd, 0)
            except OSError as error:
                if error.errno == 22:
                    raise PermissionError(1, "of another PID namespace") from None
                raise

        tried[str(fd)] = send
    return first_escape({**tried, "kill": lambda: os.kill(pid, 0)})


@attack(SIGNALS, rootless_levels=SIGNALS_KEPT)
def signal_everybody_above() -> str:
    """Parents beyond init: the warden, the zygote, the caller. (Init is the plugin's own, and ends with it.)"""
    import os

    def parent(pid: int) -> int:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])

    try:
        pid = parent(os.getppid())
    except OSError as error:
        return "stopped: EACCES" if error.errno in (1, 2, 13) else f"broken: {error!r}"
    if pid == 0:
        return "stopped: nobody above"
    seen = []
    while pid > 1:
        answer = attempt(partial(os.kill, pid, 0))
        if answer.startswith("escaped"):
            return f"escaped: {pid}"
        seen.append(answer.removeprefix("stopped: "))
        pid = parent(pid)
    return "stopped: " + ",".join(dict.fromkeys(seen))


# -- their memory and files ----------------------------------------------------------------------------------------------


@attack(FOREIGN, scene=victim, refusals=("EIO",))
def read_a_process(pid: int, numbers: dict[str, int], secret: bytes) -> str:
    import os

    def environ() -> None:
        with open(f"/proc/{pid}/environ", "rb") as file:
            if bytes(byte ^ 0x55 for byte in secret) not in file.read():
                raise FileNotFoundError(2, "not there")

    return first_escape(
        {
            "environ": environ,
            "mem": lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY),
            "mem, writing": lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR),
            "maps": lambda: open(f"/proc/{pid}/maps").read(1) or (_ for _ in ()).throw(PermissionError(13, "empty")),
            "fd": lambda: os.readlink(f"/proc/{pid}/fd/0"),
            "root": lambda: os.listdir(f"/proc/{pid}/root"),
            "cwd": lambda: os.readlink(f"/proc/{pid}/cwd"),
            "exe": lambda: os.readlink(f"/proc/{pid}/exe"),
        }
    )


@attack(FOREIGN, scene=victim)
def steer_a_process(pid: int, numbers: dict[str, int], secret: bytes) -> str:
    import ctypes
    import os

    def vm() -> int:
        buffer = ctypes.create_string_buffer(8)
        with open(f"/proc/{pid}/stat") as file:
            address = int(file.read().rpartition(")")[2].split()[25])  # start of the stack
        local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)
        remote = (ctypes.c_uint64 * 2)(address, 8)
        return syscall(numbers["process_vm_readv"], pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)

    return first_escape(
        {
            "ptrace": lambda: syscall(numbers["ptrace"], 0x4206, pid, 0, 0),
            "vm": vm,
            "getfd": lambda: syscall(numbers["pidfd_getfd"], os.pidfd_open(pid), 0, 0),
        }
    )


@attack(FOREIGN, scene=victim)
def slow_a_process(pid: int, numbers: dict[str, int], secret: bytes) -> str:
    import ctypes
    import os

    limit = (ctypes.c_uint64 * 2)(16, 16)
    return first_escape(
        {
            "limit": lambda: syscall(numbers["prlimit64"], pid, 7, ctypes.byref(limit), None),
            "nice": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
            "affinity": lambda: os.sched_setaffinity(pid, {0}),
            "oom": lambda: os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY),
            "name": lambda: os.open(f"/proc/{pid}/comm", os.O_WRONLY),
        }
    )


# -- shared memory and queues --------------------------------------------------------------------------------------------

IPC_CALLS = (
    "shmget",
    "shmat",
    "shmctl",
    "semget",
    "semctl",
    "semop",
    "msgget",
    "msgctl",
    "msgrcv",
    "msgsnd",
    "mq_open",
    "mq_unlink",
)
IPC_CREAT = 0o1000


@contextmanager
def queues(where: Where) -> Iterator[Scene]:
    """One of each kind, open to everybody. Harm: one of them is gone or changed."""
    call = {name: SYSCALLS[name] for name in IPC_CALLS}
    name = f"psie-escape-{os.getpid()}".encode()
    memory = syscall(call["shmget"], 0, 4096, IPC_CREAT | 0o666)
    semaphore = syscall(call["semget"], 0, 1, IPC_CREAT | 0o666)
    queue = syscall(call["msgget"], 0, IPC_CREAT | 0o666)
    made = syscall(call["mq_open"], name, os.O_CREAT | os.O_RDWR, 0o666, None)

    def removals() -> list[str]:
        answers = {
            "shm": attempt(lambda: syscall(call["shmctl"], memory, 0, None)),
            "sem": attempt(lambda: syscall(call["semctl"], semaphore, 0, 0, 0)),
            "msg": attempt(lambda: syscall(call["msgctl"], queue, 0, None)),
            "mq": attempt(lambda: syscall(call["mq_unlink"], name)),
        }
        return [kind for kind, answer in answers.items() if answer.startswith("stopped")]

    gone: list[str] | None = None

    def harm() -> str:
        nonlocal gone
        gone = removals()
        return f"the caller's {', '.join(gone)} was removed" if gone else ""

    try:
        yield Scene({"numbers": call, "ids": (memory, semaphore, queue), "name": name}, harm)
    finally:
        if gone is None:
            removals()
        os.close(made)


@attack(IPC, scene=queues, refusals=("EINVAL",))
def use_shared_memory(numbers: dict[str, int], ids: tuple[int, int, int], name: bytes) -> str:
    return attempt(lambda: syscall(numbers["shmat"], ids[0], 0, 0))


@attack(IPC, scene=queues, refusals=("EINVAL",))
def use_semaphores(numbers: dict[str, int], ids: tuple[int, int, int], name: bytes) -> str:
    return attempt(lambda: syscall(numbers["semctl"], ids[1], 0, 16, 7))


@attack(IPC, scene=queues, refusals=("EINVAL",))
def use_message_queues(numbers: dict[str, int], ids: tuple[int, int, int], name: bytes) -> str:
    return attempt(lambda: syscall(numbers["msgsnd"], ids[2], (1).to_bytes(8, "little") + b"evil", 4, 0o4000))


@attack(IPC, scene=queues, refusals=("EINVAL",))
def remove_queues(numbers: dict[str, int], ids: tuple[int, int, int], name: bytes) -> str:
    return first_escape(
        {
            "shmctl": lambda: syscall(numbers["shmctl"], ids[0], 0, None),
            "semctl": lambda: syscall(numbers["semctl"], ids[1], 0, 0, 0),
            "msgctl": lambda: syscall(numbers["msgctl"], ids[2], 0, None),
        }
    )


@attack(IPC, scene=queues)
def remove_a_posix_queue(numbers: dict[str, int], ids: tuple[int, int, int], name: bytes) -> str:
    return attempt(lambda: syscall(numbers["mq_unlink"], name))


@attack(IPC, scene=calls(*IPC_CALLS))
def make_what_outlives(numbers: dict[str, int]) -> str:
    """System V objects live until somebody removes them: outside this removes them at once."""

    def made(get: str, control: str, *arguments: int) -> int:
        found = syscall(numbers[get], *arguments)
        syscall(numbers[control], found, 0, 0)
        return found

    return first_escape(
        {
            "shm": lambda: made("shmget", "shmctl", 0, 4096, 0o1600),
            "sem": lambda: made("semget", "semctl", 0, 1, 0o1600),
            "msg": lambda: made("msgget", "msgctl", 0, 0o1600),
        }
    )


@contextmanager
def file_in_shared_memory(where: Where) -> Iterator[Scene]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="psie-escape-") as file:
        file.write(SECRET.encode())
        file.flush()
        os.chmod(file.name, 0o666)
        yield Scene({"path": file.name}, lambda: "" if Path(file.name).read_text() == SECRET else "it was written")


@attack(IPC, scene=file_in_shared_memory)
def write_posix_shared_memory(path: str) -> str:
    import os

    return attempt(lambda: os.open(path, os.O_RDWR))


@attack(IPC, NAMESPACED, scene=file_in_shared_memory)
def read_posix_shared_memory(path: str) -> str:
    return attempt(lambda: open(path).read())


WAITER = """
import ctypes, mmap, os, sys, threading
with open(sys.argv[1], "r+b") as file:
    place = mmap.mmap(file.fileno(), 4096)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # it ends with who has started it
print(flush=True)
ctypes.CDLL(None).syscall(int(sys.argv[2]), ctypes.byref(ctypes.c_uint32.from_buffer(place)), 0, 0, None)  # FUTEX_WAIT
"""


@contextmanager
def waiter(where: Where) -> Iterator[Scene]:
    """A process that waits, as for a semaphore, for a place in a file that the attacker may read."""
    path = where.folder / "semaphore"
    path.write_bytes(bytes(4096))
    path.chmod(0o644)
    numbers = {name: SYSCALLS[name] for name in ("futex", "futex_requeue") if name in SYSCALLS}
    command = [sys.executable, "-I", "-S", "-c", WAITER, str(path), str(numbers["futex"])]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as mapped:
        word = ctypes.addressof(ctypes.c_uint32.from_buffer(mapped))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()

            def harm() -> str:
                end = time.monotonic() + PATIENCE
                while process.poll() is None and time.monotonic() < end:
                    syscall(numbers["futex"], ctypes.c_void_p(word), 1, 1)  # FUTEX_WAKE
                    time.sleep(0.01)
                return "" if process.poll() is not None else "nobody can wake it any more"

            try:
                yield Scene({"path": str(path), "numbers": numbers}, harm, {"readable_paths": [str(path)]})
            finally:
                process.kill()


@attack(IPC, scene=waiter)
def keep_somebody_waiting(path: str, numbers: dict[str, int]) -> str:
    """Whoever waits for a place in a file can be moved to another place, by who may only read that file: futex(2)."""
    import ctypes
    import mmap
    import os
    import struct
    import time

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fd = os.open(path, os.O_RDONLY)
    start = libc.mmap(None, ctypes.c_size_t(4096), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    os.close(fd)
    own = ctypes.c_uint32(0)
    places = struct.pack("QQIIQQII", 0, start, 2, 0, 0, ctypes.addressof(own), 2, 0)  # struct futex_waitv: FUTEX2_SIZE_U32

    def move(number: int, *arguments: object) -> int:
        moved, end = 0, time.monotonic() + 2
        while not moved and time.monotonic() < end:  # it may not wait yet
            moved = syscall(number, *arguments)
        if not moved:
            raise RuntimeError("nobody waits")
        return moved

    one, other = ctypes.c_void_p(start), ctypes.byref(own)
    ways = {
        "requeue": lambda: move(numbers["futex"], one, 3, 0, ctypes.c_void_p(9), other, 0),  # FUTEX_REQUEUE
        "compare": lambda: move(numbers["futex"], one, 4, 0, ctypes.c_void_p(9), other, 0),  # FUTEX_CMP_REQUEUE
    }
    if "futex_requeue" in numbers:
        ways["new call"] = lambda: move(numbers["futex_requeue"], places, 0, 0, 9)
    return first_escape(ways)


# -- namespaces ----------------------------------------------------------------------------------------------------------


@attack(
    NAMESPACE,
    NAMESPACED,
    scene=lambda where: given(
        theirs={kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("user", "mnt", "pid", "ipc", "uts", "cgroup")}
    )(where),
)
def in_a_namespace_of_the_host(theirs: dict[str, int]) -> str:
    import os

    same = [kind for kind, inode in theirs.items() if os.stat(f"/proc/self/ns/{kind}").st_ino == inode]
    return f"escaped: {same}" if same else "stopped: all its own"


@attack(
    NAMESPACE,
    NAMESPACED,
    scene=lambda where: given(name=os.uname().nodename, namespace=os.stat("/proc/self/ns/uts").st_ino)(where),
)
def name_of_the_host(name: str, namespace: int) -> str:
    """Where the host has the name that every sandbox has, it is the namespace that tells whose it is."""
    import os
    import socket as sockets

    if name not in (os.uname().nodename, sockets.gethostname()):
        return "stopped: another name"
    if name == "psie" and os.stat("/proc/self/ns/uts").st_ino != namespace:
        return "stopped: every sandbox's own name"
    return "escaped: it is " + name


@attack(NAMESPACE, unsafe="it gives the host the name that it has")
def rename_the_host() -> str:
    import os
    import socket as sockets

    return attempt(lambda: sockets.sethostname(os.uname().nodename))


@attack(NAMESPACE, NAMESPACED, scene=victim)
def see_other_processes(pid: int, numbers: dict[str, int], secret: bytes) -> str:
    import os

    return first_escape({"stat": lambda: os.stat(f"/proc/{pid}"), "pidfd": lambda: os.pidfd_open(pid)})


@attack(NAMESPACE, NAMESPACED)
def control_groups() -> str:
    """The path of one's own group, and the tree of all."""
    import os

    def path() -> str:
        with open("/proc/self/cgroup") as file:
            found = next(line for line in file if line.startswith("0::")).strip()
        if found == "0::/":
            raise FileNotFoundError(2, "the root of its own")
        return found

    return first_escape({"path": path, "tree": lambda: os.listdir("/sys/fs/cgroup")})


# -- the network ---------------------------------------------------------------------------------------------------------


@contextmanager
def listeners(where: Where) -> Iterator[Scene]:
    """TCP on the loopback, an abstract socket and one with a path. Harm: somebody connected."""
    with (
        tempfile.TemporaryDirectory(prefix="socket-", dir=place()) as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract_log,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as named_log,
    ):
        os.chmod(folder, 0o755)
        name = f"psie-escape-{os.getpid()}"
        abstract.bind("\0" + name)
        named.bind(folder + "/socket")
        os.chmod(folder + "/socket", 0o777)
        abstract_log.bind("\0" + name + "-log")
        named_log.bind(folder + "/socket-log")
        os.chmod(folder + "/socket-log", 0o777)
        for listener in (tcp, abstract, named):
            listener.listen()
            listener.setblocking(False)

        def harm() -> str:
            for listener in (tcp, abstract, named):
                try:
                    connection, _ = listener.accept()
                except BlockingIOError:
                    continue
                connection.close()
                return f"somebody connected to {listener.getsockname()!r}"
            for log in (abstract_log, named_log):
                log.setblocking(False)
                try:
                    log.recv(1)
                except BlockingIOError:
                    continue
                return f"somebody wrote to {log.getsockname()!r}"
            return ""

        yield Scene({"port": tcp.getsockname()[1], "name": name, "path": folder + "/socket"}, harm)


@attack(NETWORK, scene=listeners)
def connect(port: int, name: str, path: str) -> str:
    import socket as sockets

    def to(family: int, address: object) -> None:
        with sockets.socket(family) as one:
            one.settimeout(2)
            one.connect(address)  # type: ignore[arg-type]

    return first_escape(
        {
            "tcp": lambda: to(sockets.AF_INET, ("127.0.0.1", port)),
            "abstract": lambda: to(sockets.AF_UNIX, "\0" + name),
            "path": lambda: to(sockets.AF_UNIX, path),
        }
    )


@attack(NETWORK, scene=listeners, refusals=("EISCONN", "EPROTOTYPE", "ECONNREFUSED", "EOPNOTSUPP", "EINVAL", "EPIPE"))
def rename_a_pair(port: int, name: str, path: str) -> str:
    """The only sockets to be had are pairs: send them, or their messages, somewhere else."""
    import socket as sockets

    def connect(kind: int, address: str) -> None:
        one, other = sockets.socketpair(sockets.AF_UNIX, kind)
        with one, other:
            one.connect(address)

    def send(kind: int, address: str) -> None:
        one, other = sockets.socketpair(sockets.AF_UNIX, kind)
        with one, other:
            one.sendto(b"x", address)
            other.setblocking(False)
            if other.recv(1):  # a pair of SOCK_SEQPACKET ignores the address
                raise PermissionError(1, "only the peer got it")

    actions = {}
    for kind in (sockets.SOCK_STREAM, sockets.SOCK_SEQPACKET, sockets.SOCK_DGRAM):
        for address in ("\0" + name, "\0" + name + "-log", path, path + "-log"):
            actions[f"connect {kind} {address}"] = partial(connect, kind, address)
            actions[f"send {kind} {address}"] = partial(send, kind, address)
    return first_escape(actions)


@attack(NETWORK, STRICTER, scene=listeners)
def list_the_hosts_sockets(port: int, name: str, path: str) -> str:
    def search(table: str, wanted: str) -> str:
        with open(table) as file:
            return next((line for line in file if wanted in line), "") or (_ for _ in ()).throw(FileNotFoundError(2, table))

    return first_escape(
        {"tcp": lambda: search("/proc/net/tcp", f"0100007F:{port:04X}"), "unix": lambda: search("/proc/net/unix", name)}
    )


@attack(NETWORK, STRICTER, scene=lambda where: given(inode=os.stat("/proc/self/ns/net").st_ino)(where))
def in_the_hosts_network(inode: int) -> str:
    import os

    return "escaped: the same" if os.stat("/proc/self/ns/net").st_ino == inode else "stopped: its own"
