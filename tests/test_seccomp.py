"""The seccomp profiles, loaded into real processes.

Two kinds of evidence: a child under the compiled filter tries things (and the same things are tried without one first),
and a small BPF machine runs the programs over all system calls and variants, also for a machine we are not on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import importlib.util
import itertools
import json
import mmap
import os
import re
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import state
from sandbox.ns.syscalls import prctl
from sandbox.seccomp import filter as profiles
from sandbox.seccomp import notifier
from sandbox.seccomp.load import load_filter

pytest.importorskip("pyseccomp")

MACHINES = ("x86_64", "aarch64")
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
AUDIT_ARCH_I386 = 0x40000003
PR_SET_NO_NEW_PRIVS = 38
ALL_VARIANTS = [
    dict(zip(profiles.FEATURES, permitted, strict=True))
    for permitted in itertools.product((False, True), repeat=len(profiles.FEATURES))
]
# What the host decides, not the caller. Most tests have it (without allow_metadata copying files fails); both have their own.
OF_THE_HOST = {"allow_metadata": True, "allow_uncounted_memory": True, "allow_truncate": True, "allow_ioctls": True}
VARIANTS = [permissions for permissions in ALL_VARIANTS if permissions.items() >= OF_THE_HOST.items()]
CLOSED = dict.fromkeys(profiles.FEATURES, False) | OF_THE_HOST
OPEN = dict.fromkeys(profiles.FEATURES, True)
THREADS = {**CLOSED, "allow_threads": True}
every_profile = pytest.mark.parametrize("profile", profiles.PROFILES)
only_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="an ABI of x86-64")

NUMBERS_OF = {machine: profiles.known_syscalls(machine) for machine in MACHINES}
NUMBERS = NUMBERS_OF[os.uname().machine]
MISSING = b"/proc/missing"  # where nobody can make anything
SO_PASSPIDFD, SO_PEERPIDFD = 76, 77  # asm-generic/socket.h
IPC_RMID, GETVAL = 0, 12  # linux/ipc.h, linux/sem.h
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_NODUMP_FL = 0x80086601, 0x40086602, 0x40  # linux/fs.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def call(name: str | int, *arguments: int | bytes | None) -> str:
    """A raw system call: "ok" or the name of its errno."""
    return "ok" if raw_call(name, *arguments) >= 0 else errno.errorcode[ctypes.get_errno()]


def raw_call(name: str | int, *arguments: int | bytes | None) -> int:
    number = NUMBERS[name] if isinstance(name, str) else name
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    values += [ctypes.c_long(0)] * (6 - len(values))
    result: int = _libc.syscall(ctypes.c_long(number), *values)
    return result


class Outcome:
    """What a child answered, and what its supervisor was told. `value` is JSON; a death is `signal`."""

    def __init__(self, value: Any, status: int, notified: list[str], notifications: list[notifier.Notification]) -> None:
        self.value = value
        self.signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        self.notified = notified
        self.notifications = notifications


def confined(action: Callable[[], Any], bpf: bytes | None) -> Outcome:
    """Run `action` in a child under the filter (or under none), with this process as its supervisor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            if bpf is not None:
                listener = load_filter(bpf, new_listener=True)
                socket.send_fds(theirs, [b"listener"], [listener])
                os.close(listener)
            else:
                theirs.send(b"none")
            try:
                text = json.dumps({"value": action()})
            except BaseException:
                text = json.dumps({"error": traceback.format_exc()})
            theirs.send(text.encode())
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        _message, descriptors, _flags, _address = socket.recv_fds(ours, 100, 1)
        answer, notifications = _supervise(ours, descriptors)
    _, status = os.waitpid(pid, 0)
    reply = json.loads(answer) if answer else {"value": None}
    assert "error" not in reply, reply["error"]
    return Outcome(reply["value"], status, [profiles.syscall_name(one.nr) for one in notifications], notifications)


def _supervise(channel: socket.socket, descriptors: list[int]) -> tuple[bytes, list[notifier.Notification]]:
    notifications: list[notifier.Notification] = []
    poll = select.poll()
    for descriptor in (channel.fileno(), *descriptors):
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _event in poll.poll(60_000):
            if descriptor == channel.fileno():
                for listener in descriptors:
                    os.close(listener)
                return channel.recv(1 << 20), notifications
            notification = notifier.receive(descriptor)
            if notification is not None:
                notifications.append(notification)
                assert notifier.is_valid(descriptor, notification)
                notifier.refuse(descriptor, notification)


def compiled(profile: str, permissions: dict[str, bool]) -> bytes:
    return _compiled(profile, tuple(permissions.items()))


@functools.cache
def _compiled(profile: str, permissions: tuple[tuple[str, bool], ...]) -> bytes:
    return profiles.compile_profile(profile, **dict(permissions))


def variant_name(permissions: dict[str, bool]) -> str:
    asked = [feature for feature in permissions if permissions[feature] and feature not in OF_THE_HOST]
    return "+".join(feature.removeprefix("allow_") for feature in asked) or "closed"


# Ordinary programs run ------------------------------------------------------------------------------------------------


def stdlib_basics() -> list[str]:
    import asyncio
    import decimal
    import hashlib
    import multiprocessing
    import random
    import shutil
    import sqlite3
    import tempfile
    import time
    import uuid
    import zlib

    done = []
    assert json.loads(json.dumps({"a": [1, 2.5, None]})) == {"a": [1, 2.5, None]}
    assert sorted(random.sample(range(1000), 1000)) == list(range(1000))
    assert zlib.decompress(zlib.compress(b"x" * 10_000)) == b"x" * 10_000
    assert len(hashlib.sha256(b"x").hexdigest()) == 64
    assert decimal.Decimal("0.1") * 3 == decimal.Decimal("0.3")
    assert uuid.uuid4().version == 4
    time.sleep(0.001)
    done.append("plain")
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "first")
        first.write_bytes(b"content" * 1000)
        shutil.copy2(first, Path(folder, "second"))
        os.symlink("first", f"{folder}/link")
        os.link(first, f"{folder}/hard")
        os.truncate(first, 10)
        shutil.copytree(folder, f"{folder}/copy", symlinks=True)
        os.rename(first, f"{folder}/third")
        os.chmod(f"{folder}/third", 0o640)
        assert len(list(os.scandir(folder))) == 5
        with open(f"{folder}/map", "w+b") as file:
            file.truncate(mmap.PAGESIZE)
            with mmap.mmap(file.fileno(), 0) as memory:
                memory[:3] = b"abc"
                memory.flush()
        database = sqlite3.connect(f"{folder}/base.db")
        with database:
            database.execute("create table t (a)")
            database.executemany("insert into t values (?)", [(n,) for n in range(100)])
        assert database.execute("select sum(a) from t").fetchone() == (4950,)
        database.close()
    assert sqlite3.connect(":memory:").execute("select 6 * 7").fetchone() == (42,)
    done.append("files")

    async def waits() -> int:
        results = await asyncio.gather(*(asyncio.sleep(0.001, n) for n in range(10)))
        return sum(results)

    assert asyncio.run(waits()) == 45
    done.append("asyncio")
    seen = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append("alarm"))
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    while not seen:
        time.sleep(0.001)
    receiver, sender = multiprocessing.Pipe()
    sender.send([1])
    assert receiver.recv() == [1]
    assert not os.isatty(receiver.fileno())
    assert len(os.sched_getaffinity(0)) >= 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0
    done.append("system")
    return done


def threads() -> int:
    import concurrent.futures
    import threading

    lock = threading.Lock()
    total = 0

    def add(number: int) -> None:
        nonlocal total
        with lock:
            total += number

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(100)))
    return total


@every_profile
@pytest.mark.parametrize("permissions", VARIANTS, ids=variant_name)
def test_the_standard_library_runs(profile: str, permissions: dict[str, bool]) -> None:
    def everything() -> list[Any]:
        done: list[Any] = list(stdlib_basics())
        if permissions["allow_threads"]:
            done.append(threads())
        if permissions["allow_subprocess"]:
            run = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, check=True, text=True)
            piped = subprocess.run("echo a b | wc -w", shell=True, capture_output=True, check=True, text=True)
            done += [run.stdout.strip(), piped.stdout.strip()]
            pid = os.fork()
            if pid == 0:
                os._exit(7)
            done.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return done

    outcome = confined(everything, compiled(profile, permissions))
    expected: list[Any] = ["plain", "files", "asyncio", "system"]
    expected += [4950] if permissions["allow_threads"] else []
    expected += ["42", "2", 7] if permissions["allow_subprocess"] else []
    assert outcome.value == expected
    assert outcome.notified == []  # nothing an ordinary program does counts as a violation


@pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="numpy is not installed")
@every_profile
def test_numpy_runs_with_threads(profile: str) -> None:
    """Imported and run under the filter, where its library starts its threads."""

    def product() -> list[Any]:
        os.environ["OPENBLAS_NUM_THREADS"] = "4"
        import numpy

        ones = numpy.ones((600, 600))
        correct = (ones @ ones).sum() == 600.0**3 and numpy.linalg.det(numpy.eye(9)) == 1.0
        return [bool(correct), len(os.listdir("/proc/self/task")) > 1]

    outcome = confined(product, compiled(profile, THREADS))
    assert outcome.value == [True, True]
    assert outcome.notified == []


@every_profile
def test_sockets_are_left_to_the_supervisor(profile: str) -> None:
    """All that makes one or gives it a place to go, and only that: with an address, or as TCP Fast Open."""

    def attempts() -> list[str]:
        one, other = socket.socketpair()
        fd = one.fileno()
        calls = [
            call("socket", socket.AF_INET, socket.SOCK_STREAM, 0),
            call("connect", fd, bytes(16), 16),
            call("bind", fd, bytes(16), 16),
            call("listen", fd, 1),
            call("sendto", fd, b"x", 1, 0, bytes(16), 16),
            call("sendto", fd, b"x", 1, 0, 1 << 32, 16),
            call("sendto", fd, b"x", 1, socket.MSG_FASTOPEN, None, 0),
            call("sendmsg", fd, bytes(56), socket.MSG_FASTOPEN),
        ]
        one.send(b"data")
        one.sendmsg([b"more"])
        return [*calls, call("accept", fd, None, None), other.recv(100).decode()]

    outcome = confined(attempts, compiled(profile, {**CLOSED, "sockets": True}))
    assert outcome.value == ["EPERM"] * 9 + ["datamore"]
    assert outcome.notified == ["socket", "connect", "bind", "listen", *["sendto"] * 3, "sendmsg"]
    without = confined(attempts, compiled(profile, CLOSED))
    assert without.value == outcome.value
    assert without.notified == ["socket", *["sendto"] * 3, "sendmsg"]


def options(fd: int) -> dict[str, str]:
    """Of a TCP socket: what an unprivileged process may set and ask."""
    one, tcp, ip, whole = (struct.pack("i", 1), 4), socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.SOL_SOCKET
    return {
        "nodelay": call("setsockopt", fd, tcp, socket.TCP_NODELAY, *one),
        "timeout": call("setsockopt", fd, whole, 20, struct.pack("qq", 1, 0), 16),
        "priority": call("setsockopt", fd, whole, 12, *one),
        "source route": call("setsockopt", fd, ip, 4, b"\x83\x07\x04\x01\x02\x03\x04\x00", 8),
        "device": call("setsockopt", fd, whole, 25, b"lo\0", 3),
        "fast open": call("setsockopt", fd, tcp, 30, *one),
        "interfaces": call("ioctl", fd, 0x8912, bytes(16)),
        "address": call("ioctl", fd, 0x8915, b"lo".ljust(40, b"\0")),
    }


@every_profile
def test_options_that_lead_elsewhere_are_refused(profile: str) -> None:
    with socket.socket() as outside, socket.socket() as inside:
        refused = {name for name, answer in options(outside.fileno()).items() if answer != "ok"}
        assert refused == (set() if os.geteuid() == 0 else {"source route"})
        outcome = confined(lambda: options(inside.fileno()), compiled(profile, CLOSED))
    assert {name for name, answer in outcome.value.items() if answer == "ok"} == {"nodelay", "timeout"}
    assert set(outcome.value.values()) == {"ok", "EPERM"}


# What is refused ------------------------------------------------------------------------------------------------------


def calls_to_refuse() -> dict[str, str]:
    """System calls that get past the kernel's front door for root, or fail there with another errno than EPERM and ENOSYS.

    Arguments are chosen to do no harm where nothing refuses them: bad descriptors, null pointers, empty paths.
    """
    return {
        "mount": call("mount", None, None, None, 0, None),
        "umount2": call("umount2", MISSING, 0),
        "pivot_root": call("pivot_root", MISSING, MISSING),
        "chroot": call("chroot", MISSING),
        "open_tree": call("open_tree", -1, b"nonexistent", 0),
        "move_mount": call("move_mount", -1, b"x", -1, b"x", 0),
        "fsopen": call("fsopen", b"nosuchfilesystem", 0),
        "fsconfig": call("fsconfig", -1, 99, None, None, 0),
        "fsmount": call("fsmount", -1, 0, 0),
        "fspick": call("fspick", -1, b"x", 0),
        "mount_setattr": call("mount_setattr", -1, b"x", 0, None, 0),
        "unshare": call("unshare", 0x200),  # CLONE_FS: no namespace, allowed to everybody
        "setns": call("setns", -1, 0),
        "ptrace": call("ptrace", 16, 0x7FFFFFFE),
        "process_vm_readv": call("process_vm_readv", 0x7FFFFFFE, None, 0, None, 0, 0),
        "process_vm_writev": call("process_vm_writev", 0x7FFFFFFE, None, 0, None, 0, 0),
        "pidfd_getfd": call("pidfd_getfd", -1, 0, 0),
        "kcmp": call("kcmp", 0x7FFFFFFE, 0x7FFFFFFE, 0, 0, 0),
        "io_uring_enter": call("io_uring_enter", -1, 0, 0, 0, None, 0),
        "io_uring_register": call("io_uring_register", -1, 0, None, 0),
        "add_key": call("add_key", None, None, None, 0, 0),
        "keyctl": call("keyctl", 0xFFFF),
        "request_key": call("request_key", None, None, None, 0),
        "bpf": call("bpf", 0xFFFF, None, 0),
        "perf_event_open": call("perf_event_open", None, 0, -1, -1, 0),
        "userfaultfd": call("userfaultfd", 0x7FFFFFFF),
        "open_by_handle_at": call("open_by_handle_at", -1, None, 0),
        "name_to_handle_at": call("name_to_handle_at", -1, b"x", None, None, 0),
        "fanotify_init": call("fanotify_init", 0xFFFFFFFF, 0),
        "acct": call("acct", MISSING),
        "quotactl": call("quotactl", 0, None, 0, None),
        "swapon": call("swapon", MISSING, 0),
        "sethostname": call("sethostname", None, 1 << 20),
        "clock_settime": call("clock_settime", 0xFFFF, None),
        "adjtimex": call("adjtimex", None),
        "syslog": call("syslog", 99, None, 0),
        "seccomp": call("seccomp", 99, 0, None),
        "move_pages": call("move_pages", 0, 0, None, None, None, 0xFFFF),
        "set_mempolicy": call("set_mempolicy", 0xFFFF, None, 0),
        "vmsplice": call("vmsplice", -1, None, 0, 0),
        "memfd_secret": call("memfd_secret", 0xFFFFFFFF),
        "shmget": call("shmget", 0x1234567, 0, 0),
        "shmat": call("shmat", 0x7FFFFFFF, None, 0),
        "shmctl": call("shmctl", 0x7FFFFFFF, 2, None),
        "msgget": call("msgget", 0x1234567, 0),
        "msgsnd": call("msgsnd", 0x7FFFFFFF, bytes(16), 1, 0),
        "msgrcv": call("msgrcv", 0x7FFFFFFF, None, 0, 0, 0),
        "msgctl": call("msgctl", 0x7FFFFFFF, 2, None),
        "semget": call("semget", 0x1234567, 1, 0),
        "semop": call("semop", 0x7FFFFFFF, bytes(6), 1),
        "semtimedop": call("semtimedop", 0x7FFFFFFF, bytes(6), 1, None),
        "semctl": call("semctl", 0x7FFFFFFF, 0, GETVAL),
        "mq_open": call("mq_open", b"nonexistent", 0, 0, None),
        "mq_unlink": call("mq_unlink", b"nonexistent"),
        "mq_timedsend": call("mq_timedsend", -1, b"x", 1, 0, None),
        "mq_timedreceive": call("mq_timedreceive", -1, None, 0, None, None),
        "mq_notify": call("mq_notify", -1, None),
        "mq_getsetattr": call("mq_getsetattr", -1, None, None),
        "setxattr": call("setxattr", MISSING, b"user.x", b"x", 1, 0),
        "lsetxattr": call("lsetxattr", MISSING, b"user.x", b"x", 1, 0),
        "fsetxattr": call("fsetxattr", -1, b"user.x", b"x", 1, 0),
        "removexattr": call("removexattr", MISSING, b"user.x"),
        "lremovexattr": call("lremovexattr", MISSING, b"user.x"),
        "fremovexattr": call("fremovexattr", -1, b"user.x"),
        "prctl PR_SET_DUMPABLE": call("prctl", 4, 99),
        "prctl PR_SET_SECCOMP": call("prctl", 22, 99),
        "prctl PR_SET_PDEATHSIG": call("prctl", 1, 9999),
        "prctl + 2**32": call("prctl", 1 | 1 << 32, 9999),
        "personality": call("personality", 0x0040000),
        "prlimit64 of another": call("prlimit64", 0x7FFFFFFE, 7, None, None),
        "sched_setaffinity of another": call("sched_setaffinity", 0x7FFFFFFE, 0, None),
        "clone CLONE_NEWUSER": call("clone", 0x10000000 | 0x200 | 0x800000, 0),  # with CLONE_FS: EINVAL
        "mknod S_IFCHR": call("mknodat", -1, b"x", stat.S_IFCHR | 0o600, 0x103),
        "fchmod S_ISUID": call("fchmod", -1, 0o4755),
        "fchmodat S_ISGID": call("fchmodat", -1, b"x", 0o2755),
        "openat S_ISUID": call("openat", -1, b"x", os.O_CREAT | os.O_WRONLY, 0o4755),
        "socket AF_VSOCK SOCK_RAW": call("socket", socket.AF_VSOCK, 3, 99),
        "setsockopt SO_ATTACH_FILTER": call("setsockopt", -1, 1, 26, None, 0),
        "setsockopt SO_PASSPIDFD": call("setsockopt", -1, socket.SOL_SOCKET, SO_PASSPIDFD, None, 0),
        "getsockopt SO_PEERPIDFD": call("getsockopt", -1, socket.SOL_SOCKET, SO_PEERPIDFD, None, None),
        "ioctl TIOCSTI": call("ioctl", -1, termios.TIOCSTI, b"x"),
        "ioctl TIOCSTI + 2**32": call("ioctl", -1, termios.TIOCSTI | 1 << 32, b"x"),
        "ioctl TIOCLINUX": call("ioctl", -1, 0x541C, b"\x03"),
        "ioctl TIOCSETD": call("ioctl", -1, termios.TIOCSETD, b"\0\0\0\0"),
    }


@every_profile
@pytest.mark.parametrize("permissions", [CLOSED, OPEN], ids=["closed", "open"])
def test_refused_calls_answer_eperm(profile: str, permissions: dict[str, bool]) -> None:
    outside = confined(calls_to_refuse, None).value
    inside = confined(calls_to_refuse, compiled(profile, permissions))
    if os.geteuid() == 0:
        assert {name for name, answer in outside.items() if answer == "EPERM"} == set()
    wrong = {name: answer for name, answer in inside.value.items() if answer != "EPERM"}
    if profile == "tight":  # these it simply does not have
        for name in ("personality", "sched_setaffinity of another", "mknod S_IFCHR"):
            assert wrong.pop(name, "ENOSYS") == "ENOSYS"
    assert wrong == {}
    assert {"mount", "unshare", "setns", "ptrace", "bpf", "keyctl", "clone", "socket", "ioctl", "fsopen", "fchmod"} <= set(
        inside.notified
    )
    assert not {"name_to_handle_at", "prctl", "fchmodat", "prlimit64", "adjtimex"} & set(inside.notified)


@every_profile
def test_io_uring_is_notified(profile: str) -> None:
    def attempt() -> str:
        return call("io_uring_setup", 0, None)

    assert confined(attempt, None).value not in ("EPERM", "ok")
    outcome = confined(attempt, compiled(profile, OPEN))
    assert (outcome.value, outcome.notified) == ("EPERM", ["io_uring_setup"])


@every_profile
def test_calls_for_which_libraries_have_another_way_are_absent(profile: str) -> None:
    def attempts() -> list[str]:
        return [call("clone3", None, 0), call("openat2", -1, b"x", None, 0), call(999), call(463 + 100), call(-1)]

    outside = confined(attempts, None).value
    assert outside[:2] == ["EINVAL", "EINVAL"]
    assert confined(attempts, compiled(profile, OPEN)).value == ["ENOSYS"] * 5


@every_profile
def test_numbers_newer_than_the_library_are_absent(profile: str) -> None:
    newer = max(NUMBERS.values()) + 1

    def attempts() -> list[str]:
        return [call(number, -1, -1, -1, -1, -1, -1) for number in range(newer, newer + 40)]

    outside = confined(attempts, None).value
    if set(outside) == {"ENOSYS"}:
        pytest.skip("the library knows all of this kernel's system calls")
    assert set(confined(attempts, compiled(profile, OPEN)).value) == {"ENOSYS"}


def all_families() -> dict[str, str]:
    families = {}
    for family in range(64):
        kinds = {call("socket", family, kind, 0) for kind in (1, 2, 3, 5)}
        families[str(family)] = "ok" if "ok" in kinds else " ".join(sorted(kinds))
    return families


@every_profile
@pytest.mark.parametrize("permissions", VARIANTS, ids=variant_name)
def test_socket_families(profile: str, permissions: dict[str, bool]) -> None:
    outside = confined(all_families, None).value
    if os.geteuid() == 0:
        assert {name for name, answer in outside.items() if "EPERM" in answer} == set()
    assert outside[str(int(socket.AF_UNIX))] == outside[str(int(socket.AF_NETLINK))] == "ok"
    inside = confined(all_families, compiled(profile, permissions))
    assert set(inside.value.values()) == {"EPERM"}
    assert set(inside.notified) == {"socket"}


@every_profile
def test_kinds_of_sockets(profile: str) -> None:
    def kinds() -> dict[str, str]:
        return {
            "raw": call("socket", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
            "ping": call("socket", socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
            "packet": call("socket", socket.AF_INET, 10, 0),
            "mptcp": call("socket", socket.AF_INET, socket.SOCK_STREAM, 262),
            "tcp": call("socket", socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, socket.IPPROTO_TCP),
            "vsock + 2**32": call("socket", socket.AF_VSOCK | 1 << 32, 1, 0),
            "pair": call("socketpair", socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, bytes(8)),
            "pair of packets": call("socketpair", socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, bytes(8)),
            "pair of datagrams": call("socketpair", socket.AF_UNIX, socket.SOCK_DGRAM, 0, bytes(8)),
            "raw pair": call("socketpair", socket.AF_UNIX, socket.SOCK_RAW, 0, bytes(8)),
            "TIPC pair": call("socketpair", 30, socket.SOCK_STREAM, 0, bytes(8)),
        }

    outside = confined(kinds, None).value
    assert outside["pair of datagrams"] == outside["raw pair"] == outside["tcp"] == "ok"
    if os.geteuid() == 0:
        assert outside["raw"] == "ok"
        assert "EPERM" not in outside.values()
    inside = confined(kinds, compiled(profile, CLOSED))
    assert {name for name, answer in inside.value.items() if answer == "ok"} == {"pair", "pair of packets"}
    assert set(inside.value.values()) == {"ok", "EPERM"}
    assert inside.notified.count("socket") == 6


@every_profile
def test_setuid_files_cannot_be_made(profile: str, tmp_path: Path) -> None:
    def attempts() -> dict[str, str]:
        answers = {}
        for kind, mode in (("plain", 0o755), ("setuid", 0o4755), ("setgid", 0o2755)):
            path = os.fsencode(tmp_path / f"{kind}-{os.getpid()}")
            answers[f"create {kind}"] = call("openat", -100, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
            answers[f"chmod {kind}"] = call("fchmodat", -100, os.fsencode(tmp_path), mode)
        answers["open"] = call("openat", -100, os.fsencode(tmp_path), os.O_RDONLY, 0o4755)  # no O_CREAT: no mode
        return answers

    assert set(confined(attempts, None).value.values()) == {"ok"}
    inside = confined(attempts, compiled(profile, CLOSED)).value
    assert {name for name, answer in inside.items() if answer == "ok"} == {"create plain", "chmod plain", "open"}


def file_state(path: Path) -> list[Any]:
    found = path.stat()
    return [found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, sorted(os.listxattr(path))]


@every_profile
def test_extended_attributes_cannot_be_changed(profile: str, tmp_path: Path) -> None:
    """Landlock lets them pass. Whoever copies files takes EPERM for a file system without them."""
    file = tmp_path / "file"
    file.write_bytes(b"")
    path = os.fsencode(file)

    def attempts() -> list[str]:
        with open(path, "rb") as opened:
            return [
                call("setxattr", path, b"user.set", b"x", 1, 0),
                call("lsetxattr", path, b"user.lset", b"x", 1, 0),
                call("fsetxattr", opened.fileno(), b"user.fset", b"x", 1, 0),
                call("removexattr", path, b"user.set"),
                call("lremovexattr", path, b"user.lset"),
            ]

    def copies() -> str:
        import shutil

        os.listxattr(path)
        shutil.copy2(file, tmp_path / "copy")
        return (tmp_path / "copy").name

    outside = confined(attempts, None).value
    if set(outside) == {"EOPNOTSUPP"}:
        pytest.skip("this file system has no user attributes")
    assert set(outside) == {"ok"}
    before = file_state(file)
    assert before[-1] == ["user.fset"]
    inside = confined(attempts, compiled(profile, OPEN))
    assert (set(inside.value), inside.notified) == ({"EPERM"}, [])
    assert confined(copies, compiled(profile, CLOSED)).value == "copy"
    assert file_state(file) == before


@every_profile
def test_metadata_of_files_the_caller_owns_stays_as_it_is(profile: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    path = os.fsencode(file)

    def attempts() -> dict[str, str]:
        """Through the C library, which takes whatever calls this machine has."""
        with open(path, "rb") as opened:
            fd = opened.fileno()
            flags = ctypes.c_long()
            answers = {}
            ways: dict[str, Callable[[], object]] = {
                "chmod": lambda: os.chmod(path, 0o600),
                "fchmod": lambda: os.fchmod(fd, 0o600),
                "chown": lambda: os.chown(path, os.getuid(), os.getgid()),
                "lchown": lambda: os.lchown(path, os.getuid(), os.getgid()),
                "fchown": lambda: os.fchown(fd, os.getuid(), os.getgid()),
                "utime": lambda: os.utime(path, (1, 1)),
                "futimes": lambda: os.utime(fd, (1, 1)),
                "chattr": lambda: (
                    fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags),
                    fcntl.ioctl(fd, FS_IOC_SETFLAGS, ctypes.c_long(flags.value | FS_NODUMP_FL)),
                ),
            }
            for name, way in ways.items():
                try:
                    way()
                    answers[name] = "ok"
                except OSError as error:
                    answers[name] = errno.errorcode[error.errno or 0]
        return answers

    def plain_work() -> str:
        import shutil

        (tmp_path / "made").mkdir()
        shutil.copyfile(path, tmp_path / "made" / "copy")
        os.rename(tmp_path / "made" / "copy", tmp_path / "made" / "other")
        content = (tmp_path / "made" / "other").read_text()
        shutil.rmtree(tmp_path / "made")
        return content

    file.write_bytes(b"content")
    file.chmod(0o640)
    before = file_state(file)
    inside = confined(attempts, compiled(profile, {**OPEN, "allow_metadata": False}))
    answers = inside.value
    assert answers.pop("chattr") in ("EPERM", "ENOTTY")  # the latter on a file system without flags
    assert (set(answers.values()), inside.notified) == ({"EPERM"}, [])
    assert file_state(file) == before
    outcome = confined(plain_work, compiled(profile, {**CLOSED, "allow_metadata": False}))
    assert (outcome.value, outcome.notified) == ("content", [])
    outside = confined(attempts, None).value
    assert outside.pop("chattr") in ("ok", "ENOTTY", "EOPNOTSUPP")
    assert set(outside.values()) == {"ok"}
    assert file_state(file) != before


@every_profile
def test_memory_that_nothing_counts(profile: str) -> None:
    """Refused where there is no memory controller; MAXIMUM does without in any case."""

    def attempts() -> list[str]:
        shared = [call("mmap", 0, mmap.PAGESIZE, mmap.PROT_READ, kind | mmap.MAP_ANONYMOUS, -1, 0) for kind in (1, 2)]
        return [call("memfd_create", b"x", 0), *shared]

    def plain_work() -> list[str]:
        return stdlib_basics()[:2]

    assert confined(attempts, None).value == ["ok", "ok", "ok"]
    assert confined(attempts, compiled(profile, CLOSED)).value == ["ENOSYS" if profile == "tight" else "ok", "ok", "ok"]
    refusing = compiled(profile, {**CLOSED, "allow_uncounted_memory": False})
    outcome = confined(attempts, refusing)
    assert (outcome.value, outcome.notified) == (["EPERM", "EPERM", "ok"], [])  # the last is MAP_PRIVATE
    outcome = confined(plain_work, refusing)
    assert (outcome.value, outcome.notified) == (["plain", "files"], [])


@every_profile
def test_locks_that_outlive_descriptors(profile: str, tmp_path: Path) -> None:
    """Those of processes are what programs use, and stay."""
    file = tmp_path / "file"
    file.write_bytes(b"content")

    def attempts() -> dict[str, str]:
        with open(file, "r+b") as opened:
            done = {"flock": call("flock", opened.fileno(), fcntl.LOCK_EX)}
            for place, (name, number) in enumerate((("F_SETLK", fcntl.F_SETLK), ("F_OFD_SETLK", 37), ("F_OFD_SETLKW", 38))):
                lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, place, 1, 0)
                done[name] = call("fcntl", opened.fileno(), number, lock)
            return done

    assert set(confined(attempts, None).value.values()) == {"ok"}
    outcome = confined(attempts, compiled(profile, OPEN))
    assert outcome.value == {"F_SETLK": "ok", "F_OFD_SETLK": "EPERM", "F_OFD_SETLKW": "EPERM", "flock": "ok"}
    assert outcome.notified == []


@every_profile
def test_who_waits_is_moved_within_its_process_only(profile: str) -> None:
    """As C libraries do."""

    def attempts() -> dict[str, str]:
        one, other = bytes(4), bytes(8)
        ways = {"FUTEX_WAKE": 1, "FUTEX_REQUEUE": 3, "FUTEX_CMP_REQUEUE": 4, "private": 3 | 128, "private, compared": 4 | 128}
        return {name: call("futex", one, operation, 0, 0, other, 0) for name, operation in ways.items()}

    assert set(confined(attempts, None).value.values()) == {"ok"}
    outcome = confined(attempts, compiled(profile, OPEN))
    assert [name for name, answer in outcome.value.items() if answer == "EPERM"] == ["FUTEX_REQUEUE", "FUTEX_CMP_REQUEUE"]
    assert outcome.notified == []


@every_profile
def test_ioctls_of_file_systems(profile: str, tmp_path: Path) -> None:
    """The denylist refuses them where the host's files are there as they are; the others in any case."""
    (tmp_path / "file").write_bytes(b"content")

    def attempts() -> dict[str, str]:
        with open(tmp_path / "file", "rb") as opened:
            numbers = {
                "FIGETBSZ": 2,
                "BTRFS_IOC_SUBVOL_CREATE": 0x5000940E,
                "FS_IOC_SETVERSION": 0x40087602,
                "FS_IOC_SET_ENCRYPTION_POLICY": 0x800C6613,
                "FIONREAD": termios.FIONREAD,
                "TIOCSTI": termios.TIOCSTI,
            }
            return {name: call("ioctl", opened.fileno(), number, bytes(4096)) for name, number in numbers.items()}

    outside = confined(attempts, None).value
    assert (outside["FIGETBSZ"], outside["FIONREAD"]) == ("ok", "ok")
    assert "EPERM" not in outside.values()
    closed = confined(attempts, compiled(profile, {**CLOSED, "allow_ioctls": profile != "denylist"}))
    passed = {name for name, answer in closed.value.items() if answer != "EPERM"}
    assert (passed, closed.notified) == ({"FIONREAD"}, ["ioctl"])  # TIOCSTI is told
    if profile == "denylist":
        opened = confined(attempts, compiled(profile, CLOSED)).value
        assert {name for name, answer in opened.items() if answer == "EPERM"} == {"TIOCSTI"}


@every_profile
def test_truncation_that_landlock_does_not_know(profile: str, tmp_path: Path) -> None:
    """Of a file that is open for writing Landlock has decided; a name, or a file open for less, is refused."""
    file = tmp_path / "file"

    def attempts() -> dict[str, str]:
        done = {"truncate": call("truncate", os.fsencode(file), 1)}
        for name, mode in (("read", os.O_RDONLY), ("neither", os.O_ACCMODE), ("write", os.O_WRONLY), ("both", os.O_RDWR)):
            done[name] = call("openat", -1, os.fsencode(file), mode | os.O_TRUNC | os.O_CLOEXEC)
        done["plain"] = call("openat", -1, os.fsencode(file), os.O_RDONLY)
        with open(file, "r+b") as opened:
            done["ftruncate"] = call("ftruncate", opened.fileno(), 1)
        return done

    file.write_bytes(b"content")
    assert set(confined(attempts, compiled(profile, CLOSED)).value.values()) == {"ok"}
    outcome = confined(attempts, compiled(profile, {**CLOSED, "allow_truncate": False}))
    refused = [name for name, answer in outcome.value.items() if answer == "EPERM"]
    assert (refused, outcome.notified) == (["truncate", "read", "neither"], [])
    assert set(outcome.value.values()) == {"ok", "EPERM"}


@every_profile
def test_ipc_objects_of_the_caller_are_out_of_reach(profile: str) -> None:
    """MINIMAL shares the caller's IPC namespace and perhaps its user id, and numbers are easily guessed."""
    queue = f"psie-test-{os.getpid()}".encode()
    segment = raw_call("shmget", 0, mmap.PAGESIZE, 0o600 | 0o1000)  # IPC_PRIVATE, IPC_CREAT
    semaphore = raw_call("semget", 0, 1, 0o600 | 0o1000)
    if min(segment, semaphore) < 0:
        pytest.skip("no System V objects here")

    def attempts() -> dict[str, str]:
        return {
            "shmat": call("shmat", segment, None, 0),
            "semctl": call("semctl", semaphore, 0, GETVAL),
            "mq_unlink": call("mq_unlink", queue),
        }

    try:
        os.close(raw_call("mq_open", queue, os.O_CREAT | os.O_RDWR, 0o600, None))
        inside = confined(attempts, compiled(profile, OPEN))
        assert (inside.value, inside.notified) == (dict.fromkeys(("shmat", "semctl", "mq_unlink"), "EPERM"), [])
        assert set(confined(attempts, None).value.values()) == {"ok"}
    finally:
        call("shmctl", segment, IPC_RMID, None)
        call("semctl", semaphore, 0, IPC_RMID)
        call("mq_unlink", queue)


@every_profile
def test_sockets_give_no_pidfd_of_the_caller(profile: str) -> None:
    """The job comes through a socket, which would hand out a pidfd of who made it, or of who sends through it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def attempts() -> list[str]:
        answers = []
        try:
            pidfd = theirs.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
            answers.append(pid_of(pidfd))
        except OSError as error:
            answers.append(errno.errorcode[error.errno or 0])
        try:
            theirs.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
            ours.send(b"message")
            _message, [(_level, _kind, data)], _flags, _address = theirs.recvmsg(100, 100)
            answers.append(pid_of(*struct.unpack("i", data)))
        except OSError as error:
            answers.append(errno.errorcode[error.errno or 0])
        answers.append(str(theirs.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)))
        return [*answers, str(os.getpid())]

    def pid_of(pidfd: int) -> str:
        text = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        return text.split("Pid:")[1].split()[0]

    *outside, sender = confined(attempts, None).value
    if "ENOPROTOOPT" in outside:
        pytest.skip("this kernel has no such options (they came with 6.5)")
    assert outside == [str(os.getpid()), sender, "5"]
    inside = confined(attempts, compiled(profile, OPEN))
    assert (inside.value[:-1], inside.notified) == (["EPERM", "EPERM", "5"], [])
    ours.close()
    theirs.close()


@every_profile
def test_without_subprocesses(profile: str) -> None:
    def attempts() -> list[Any]:
        answers: list[Any] = [threads()]
        try:
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            answers.append("forked")
        except OSError as error:
            answers.append(errno.errorcode[error.errno or 0])
        try:
            subprocess.run(["true"], check=True)
            answers.append("ran")
        except OSError as error:
            answers.append(errno.errorcode[error.errno or 0])
        answers.append(call("execve", MISSING, None, None))
        answers.append(call("execveat", -1, MISSING, None, None, 0))
        return answers

    assert confined(attempts, None).value == [4950, "forked", "ran", "ENOENT", "ENOENT"]
    outcome = confined(attempts, compiled(profile, THREADS))
    assert outcome.value == [4950, "EPERM", "EPERM", "EPERM", "EPERM"]
    assert set(outcome.notified) <= {"clone", "fork", "vfork", "execve", "execveat"}
    assert len(outcome.notified) >= 4


@every_profile
def test_without_threads(profile: str) -> None:
    def attempt() -> str:
        try:
            return str(threads())
        except RuntimeError as error:
            return str(error)

    assert confined(attempt, None).value == "4950"
    outcome = confined(attempt, compiled(profile, {**OPEN, "allow_threads": False}))
    assert (outcome.value, outcome.notified) == ("can't start new thread", [])


@every_profile
def test_others_are_left_alone(profile: str) -> None:
    """A process of the same user id would be within reach of these without a PID namespace."""
    victim = os.getpid()

    def attempts() -> dict[str, str]:
        limits = struct.pack("=qq", *resource.getrlimit(resource.RLIMIT_STACK))
        cpus = b"\xff" * 128
        return {
            "limit": call("prlimit64", victim, resource.RLIMIT_STACK, limits, None),
            "affinity": call("sched_setaffinity", victim, 128, cpus),
            "priority": call("setpriority", os.PRIO_PROCESS, victim, 0),
            "own limit": call("prlimit64", 0, resource.RLIMIT_STACK, limits, None),
            "own affinity": call("sched_setaffinity", 0, 128, cpus),
            "own priority": call("setpriority", os.PRIO_PROCESS, 0, 0),
        }

    assert set(confined(attempts, None).value.values()) == {"ok"}
    inside = confined(attempts, compiled(profile, CLOSED)).value
    assert (inside["limit"], inside["own limit"]) == ("EPERM", "ok")
    if profile != "tight":
        assert (inside["affinity"], inside["own affinity"]) == ("EPERM", "ok")
        assert (inside["priority"], inside["own priority"]) == ("EPERM", "ok")
    else:
        assert {inside[name] for name in inside if "limit" not in name} <= {"EPERM", "ENOSYS"}


@every_profile
def test_the_limit_of_core_dumps_stays(profile: str) -> None:
    """It may be asked for; whoever lowers it to 0 would have the host's handler started for a crash."""

    def attempts() -> dict[str, str]:
        place = ctypes.create_string_buffer(struct.pack("=qq", *resource.getrlimit(resource.RLIMIT_CORE)), 16)
        low, high = ctypes.addressof(place), 1 << 46
        return {
            "asked": call("prlimit64", 0, resource.RLIMIT_CORE, 0, low),
            "changed": call("prlimit64", 0, resource.RLIMIT_CORE, low, 0),
            "changed, high half": call("prlimit64", 0, resource.RLIMIT_CORE, high, 0),
            "changed, wide": call("prlimit64", 0, resource.RLIMIT_CORE + (1 << 32), low, 0),
            "old call": call("setrlimit", resource.RLIMIT_CORE, low),
        }

    outside = confined(attempts, None).value
    assert outside == {"asked": "ok", "changed": "ok", "changed, high half": "EFAULT", "changed, wide": "ok", "old call": "ok"}
    inside = confined(attempts, compiled(profile, CLOSED)).value
    assert inside.pop("asked") == "ok"
    assert set(inside.values()) <= {"EPERM", "ENOSYS"}


# Foreign ABIs ---------------------------------------------------------------------------------------------------------


@only_x86
@every_profile
def test_x32_kills(profile: str) -> None:
    x32_getpid = 0x40000000 | NUMBERS["getpid"]

    def attempt() -> str:
        return call(x32_getpid)

    assert confined(attempt, None).value in ("ok", "ENOSYS")
    for permissions in VARIANTS:
        assert confined(attempt, compiled(profile, permissions)).signal == signal.SIGSYS


def int80_getpid() -> bool:
    """mov eax, 20 (getpid on i386); int 0x80; ret"""
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return bool(function() == os.getpid())


@only_x86
@every_profile
def test_int80_kills(profile: str) -> None:
    outside = confined(int80_getpid, None)
    assert outside.value is True or outside.signal == signal.SIGSEGV  # the latter on a kernel without the i386 ABI
    for permissions in VARIANTS:
        inside = confined(int80_getpid, compiled(profile, permissions))
        assert inside.signal == (signal.SIGSYS if outside.value else signal.SIGSEGV)


# Notifications --------------------------------------------------------------------------------------------------------


def test_a_notification_says_who_and_what() -> None:
    def attempt() -> list[Any]:
        return [os.getpid(), call("unshare", 0x10000000)]

    outcome = confined(attempt, compiled("tight", CLOSED))
    (notification,) = outcome.notifications
    assert outcome.value == [notification.pid, "EPERM"]
    assert (notification.nr, notification.args[0]) == (NUMBERS["unshare"], 0x10000000)
    assert notification.arch == AUDIT_ARCH[os.uname().machine]
    assert "args=(268435456, " in repr(notification)


def test_a_dead_supervisor_still_refuses() -> None:
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            os.close(load_filter(compiled("tight", CLOSED), new_listener=True))
            theirs.send(call("unshare", 0).encode())
        finally:
            os._exit(0)
    assert channel.recv(100) == b"ENOSYS"
    os.waitpid(pid, 0)
    channel.close()
    theirs.close()


def test_a_caller_that_died_is_no_error() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            socket.send_fds(theirs, [b"x"], [load_filter(compiled("tight", CLOSED), new_listener=True)])
            call("unshare", 0)
        finally:
            os._exit(0)
    _message, (listener,), _flags, _address = socket.recv_fds(ours, 10, 1)
    notification = notifier.receive(listener)
    assert notification is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not notifier.is_valid(listener, notification)
    assert not notifier.refuse(listener, notification)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    assert poll.poll(5000) == [(listener, select.POLLHUP)]
    with pytest.raises(ValueError, match="errno"):
        notifier.refuse(listener, notification, 0)
    os.close(listener)
    ours.close()
    theirs.close()


def test_what_is_answered_is_not_answered_again() -> None:
    """A caller has its answer before it runs on: until then the kernel says EINPROGRESS, where both are on one processor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    pid = os.fork()
    if pid == 0:
        try:
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            socket.send_fds(theirs, [b"x"], [load_filter(compiled("tight", CLOSED), new_listener=True)])
            for _ in range(50):
                call("unshare", 0)
        finally:
            os._exit(0)
    try:
        _message, (listener,), _flags, _address = socket.recv_fds(ours, 10, 1)
        for _ in range(50):
            notification = notifier.receive(listener)
            assert notification is not None
            assert notifier.refuse(listener, notification)
            assert not notifier.refuse(listener, notification, errno.EINTR)
            assert not notifier.answer(listener, notification)
        os.close(listener)
    finally:
        os.sched_setaffinity(0, processors)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
        theirs.close()


def test_without_a_listener_everything_is_eperm() -> None:
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            prctl(PR_SET_NO_NEW_PRIVS, 1)
            result = load_filter(profiles.compile_profile("denylist", **CLOSED, notify=False), new_listener=False)
            answers = [result, call("unshare", 0), call("socket", 1, 1, 0), call("clone", 0x10000000), call("fork")]
            theirs.send(json.dumps(answers).encode())
        finally:
            os._exit(0)
    assert json.loads(channel.recv(1000)) == [-1, "EPERM", "EPERM", "EPERM", "EPERM"]
    os.waitpid(pid, 0)
    channel.close()
    theirs.close()


def test_load_refuses_what_is_no_program() -> None:
    for nonsense in (b"", b"1234567"):
        with pytest.raises(ValueError, match="not a BPF program"):
            load_filter(nonsense, new_listener=False)


def test_the_filter_keeps_out_further_filters() -> None:
    """A filter of the plugin's own could take over the listener, or hide a violation by answering first."""
    harmless = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)  # return SECCOMP_RET_ALLOW

    def attempt() -> str:
        try:
            load_filter(harmless, new_listener=False)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "loaded"

    assert confined(attempt, None).value == "loaded"
    assert confined(attempt, compiled("denylist", OPEN)).value == "EPERM"


# The programs, run by a machine of our own: every call, every variant, every architecture -------------------------------


def run_bpf(steps: list[tuple[int, int, int, int]], machine_arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """The value a classic BPF program returns for a struct seccomp_data; only what our programs use."""
    data = [number, machine_arch, 0, 0]  # in words of 32 bits, as BPF loads them
    for argument in (*arguments, *(0,) * (6 - len(arguments))):
        data += (argument & 0xFFFFFFFF, argument >> 32)
    accumulator = position = 0
    while True:
        code, on_true, on_false, value = steps[position]
        position += 1
        if code == 0x15:
            position += on_true if accumulator == value else on_false
        elif code == 0x25:
            position += on_true if accumulator > value else on_false
        elif code == 0x35:
            position += on_true if accumulator >= value else on_false
        elif code == 0x45:
            position += on_true if accumulator & value else on_false
        elif code == 0x20:
            accumulator = data[value // 4]
        elif code == 0x54:
            accumulator &= value
        elif code == 0x05:
            position += value
        else:
            assert code == 0x06
            return value


KILL_PROCESS, ERRNO_EPERM, ERRNO_ENOSYS, NOTIFY, ALLOW = 0x80000000, 0x00050001, 0x00050026, 0x7FC00000, 0x7FFF0000


def program_for(machine: str, profile: str, permissions: dict[str, bool]) -> Callable[..., int]:
    steps = _steps(machine, profile, tuple(name for name in profiles.FEATURES if permissions[name]))
    numbers = NUMBERS_OF[machine]

    def answer(name: str | int, *arguments: int, arch: int = AUDIT_ARCH[machine]) -> int:
        return run_bpf(steps, arch, numbers[name] if isinstance(name, str) else name, arguments)

    return answer


@functools.cache
def _steps(machine: str, profile: str, permitted: tuple[str, ...]) -> list[tuple[int, int, int, int]]:
    program = profiles._compile(profiles._Profile(profile), permitted, machine, True)
    return list(struct.iter_unpack("=HBBI", program))


@pytest.mark.parametrize("machine", MACHINES)
@every_profile
@pytest.mark.parametrize("permissions", VARIANTS, ids=variant_name)
def test_programs(machine: str, profile: str, permissions: dict[str, bool]) -> None:
    answer = program_for(machine, profile, permissions)
    numbers = NUMBERS_OF[machine]
    for foreign in (AUDIT_ARCH_I386, *(AUDIT_ARCH[other] for other in MACHINES if other != machine)):
        assert {answer(number, arch=foreign) for number in range(600)} == {KILL_PROCESS}
    if machine == "x86_64":
        assert {answer(0x40000000 + number) for number in range(600)} == {KILL_PROCESS}
    newest = max(numbers.values())
    assert {answer(number) for number in (*range(newest + 1, newest + 200), 0x3FFFFFFF, 0xFFFFFFFF)} == {ERRNO_ENOSYS}
    assert answer("read") == answer("exit_group") == answer("sendmsg") == answer("rt_sigreturn") == ALLOW
    assert answer("clone3") == answer("openat2") == ERRNO_ENOSYS
    for name in ("mount", "setns", "io_uring_setup", "keyctl", "bpf", "ptrace", "userfaultfd", "init_module", "fsopen"):
        assert answer(name) == NOTIFY, name
    for flags in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer("clone", flags | signal.SIGCHLD) == answer("clone", flags | 0x10F00) == NOTIFY
    assert answer("clone", 0x3D0F00) == (ALLOW if permissions["allow_threads"] else ERRNO_EPERM)
    processes = ALLOW if permissions["allow_subprocess"] else NOTIFY
    assert {answer("clone", signal.SIGCHLD), answer("clone", 0x4111), answer("execve")} == {processes}
    for family in range(0x100):
        assert answer("socket", family, 1, 0) == answer("socket", family, 3, 0) == NOTIFY
        assert (answer("socketpair", family, 1, 0) == ALLOW) == (family == socket.AF_UNIX)


@pytest.mark.parametrize("machine", MACHINES)
def test_each_profile_permits_less_than_the_one_before(machine: str) -> None:
    arguments = [(), (1, 1), (2, 1), (0x3D0F00,), (0, 0x5401), (15,), (0, 0, 0o644)]
    for permissions in VARIANTS:
        allowed = []
        for profile in profiles.PROFILES:
            answer = program_for(machine, profile, permissions)
            tried = itertools.product(NUMBERS_OF[machine], arguments)
            allowed.append({(name, given) for name, given in tried if answer(name, *given) == ALLOW})
        assert allowed[0] > allowed[1] > allowed[2]


@pytest.mark.long
@pytest.mark.parametrize("machine", MACHINES)
@every_profile
def test_a_permission_only_opens(machine: str, profile: str) -> None:
    arguments = [(), (1, 1), (2, 1), (2, 2, 17), (0x3D0F00,), (17,), (0, 0x8910), (0, FS_IOC_SETFLAGS)]
    looked_at = {name for rule in profiles._Profile(profile).rules for name in rule["syscalls"]}
    tried = [(name, given) for name in NUMBERS_OF[machine] for given in (arguments if name in looked_at else [()])]
    allowed = {}
    for permissions in ALL_VARIANTS:
        answer = program_for(machine, profile, permissions)
        allowed[tuple(permissions.values())] = {(name, given) for name, given in tried if answer(name, *given) == ALLOW}
    for less in allowed:
        for position, permitted in enumerate(less):
            if not permitted:
                assert allowed[less] <= allowed[(*less[:position], True, *less[position + 1 :])]


METADATA = (
    "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat".split()  # noqa: SIM905
)


@pytest.mark.parametrize("machine", MACHINES)
@every_profile
def test_without_metadata(machine: str, profile: str) -> None:
    names = [name for name in METADATA if name in NUMBERS_OF[machine]]
    refused = program_for(machine, profile, {**OPEN, "allow_metadata": False})
    allowed = program_for(machine, "denylist", OPEN)
    assert {name: refused(name, 0, 0o600, 0o600) for name in names} == dict.fromkeys(names, ERRNO_EPERM)
    assert {name: allowed(name, 0, 0o600, 0o600) for name in names} == dict.fromkeys(names, ALLOW)
    for request in (FS_IOC_SETFLAGS, 0x401C5820, 0x40806685):  # FS_IOC_FSSETXATTR, FS_IOC_ENABLE_VERITY
        assert refused("ioctl", 0, request) == refused("ioctl", 0, request | 1 << 32) == ERRNO_EPERM
        assert allowed("ioctl", 0, request) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
@every_profile
def test_only_what_a_profile_names_is_ever_allowed(machine: str, profile: str) -> None:
    """Whatever the library or the kernel know beside: their newer calls are refused until a profile decides on them."""
    arguments = [(), (1, 1), (2, 1), (0x3D0F00,), (0, 0x5401), (15,), (0, 0, 0o644)]
    answer = program_for(machine, profile, OPEN)
    allowed = {number for number in range(1024) for given in arguments if answer(number, *given) == ALLOW}
    names = {number: name for name, number in NUMBERS_OF[machine].items()}
    assert {names[number] for number in allowed} <= profiles._Profile(profile).allow


HEADER = Path("/usr/include", str(getattr(sys.implementation, "_multiarch", "")), "asm/unistd_64.h")


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not here: apt-get install linux-libc-dev")
def test_every_system_call_of_the_headers_is_decided() -> None:
    """In words, with a reason: what else this kernel has is refused, see test_numbers_newer_than_the_library_are_absent."""
    names = set(re.findall(r"#define __NR_(\w+)", HEADER.read_text()))
    assert len(names) > 300
    assert names - profiles._Profile("denylist").named_syscalls() == set()


def test_the_table_in_the_docs_is_the_profiles() -> None:
    root = Path(__file__).parents[1]
    made = subprocess.run([sys.executable, "tools/syscall_table.py"], cwd=root, capture_output=True, text=True, check=True)
    assert (root / "docs" / "syscalls.md").read_text() == made.stdout, "run: python tools/syscall_table.py >docs/syscalls.md"


# The data files -------------------------------------------------------------------------------------------------------


def test_names_exist() -> None:
    known = {name for numbers in NUMBERS_OF.values() for name in numbers}
    for profile in profiles.PROFILES:
        read = profiles._Profile(profile)
        assert read.named_syscalls() - known <= read.newer
        assert all(0 <= value < 1 << 32 for value in read.values(*read.constants))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "denylist"\n[allow]\na = ["raed"]', "no system calls of these names"),
        ('base = "denylist"\n[allow]\na = ["read", "read"]', "listed twice"),
        ('base = "denylist"\n[allow]\na = ["mount"]', "both allowed and refused"),
        ('base = "denylist"\n[allow]\na = ["read"]\n[refuse]\na = ["mount"]', "listed twice"),
        ('base = "denylist"\n[alow]\na = ["read"]', "unknown keys"),
        ('[allow]\n[[rule]]\nsyscalls = ["read"]\naction = "allow"', "unknown action"),
        ('[allow]\n[[rule]]\nsyscalls = ["read"]\naction = "pass"\nwhen = "allow_all"', "unknown feature"),
        ('[allow]\n[[rule]]\nsyscalls = ["read"]\naction = "pass"\nif = 1', "unknown key in the rule"),
        (
            '[allow]\n[[rule]]\nsyscalls = ["read"]\naction = "refuse"\nwhere = [{argument = 0, equal = [1]}]',
            "unknown condition",
        ),
        (
            '[allow]\n[[rule]]\nsyscalls = ["read"]\naction = "refuse"\nwhere = [{argument = 0, bits = ["X"]}]',
            "unknown constants",
        ),
        (
            '[allow]\n[[rule]]\nsyscalls = ["read"]\naction = "refuse"\nwhere = [{argument = 0, equals = ["X"]}]\n'
            '[constants]\nX = ["Y"]',
            "unknown constants",
        ),
    ],
)
def test_mistakes_in_a_profile_are_errors(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = profiles._data_path
    (tmp_path / "tight.toml").write_text(text)
    monkeypatch.setattr(profiles, "_data_path", lambda name: str(tmp_path / "tight.toml") if name == "tight" else real(name))
    with pytest.raises(ValueError, match=message):
        profiles.compile_profile("tight", **CLOSED)


def test_unknown_profiles_are_errors(cache: Path) -> None:
    with pytest.raises(ValueError, match="denylist, allowlist, tight"):
        profiles.compile_profile("../tight", **CLOSED)
    with pytest.raises(ValueError, match="denylist, allowlist, tight"):
        profiles.cached_profile("../tight", **CLOSED)
    assert list(cache.iterdir()) == []


def test_names_of_numbers() -> None:
    assert profiles.syscall_name(NUMBERS["mount"]) == "mount"
    assert profiles.syscall_name(9999) == "syscall_9999"


# The cache (its files have their tests in test_state.py) ------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of state.Cache, empty and nobody's but ours."""
    folder = tmp_path / "cache"
    folder.mkdir(0o700)
    monkeypatch.setattr(state, "folder", lambda kind: str(folder))
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The profiles that were really compiled."""
    done: list[str] = []
    real = profiles._compile

    def count(profile: Any, *rest: Any) -> bytes:
        done.append(profile.name)
        return real(profile, *rest)

    monkeypatch.setattr(profiles, "_compile", count)
    return done


def test_the_cache_returns_what_was_compiled(cache: Path, counted: list[str]) -> None:
    variants = [CLOSED, OPEN, THREADS, {**THREADS, "allow_metadata": False}, {**THREADS, "allow_uncounted_memory": False}]
    variants += [{**THREADS, "allow_truncate": False}, {**THREADS, "allow_ioctls": False}]
    for permissions in variants:
        for profile, notify in (("tight", True), ("tight", False), ("denylist", True)):
            expected = profiles.compile_profile(profile, **permissions, notify=notify)
            counted.clear()
            assert profiles.cached_profile(profile, **permissions, notify=notify) == expected
            assert profiles.cached_profile(profile, **permissions, notify=notify) == expected
            assert counted == [profile]
    assert len(list(cache.iterdir())) == 3 * len(variants)


def test_another_variant_under_the_same_name_is_not_taken(cache: Path, counted: list[str]) -> None:
    profiles.cached_profile("denylist", **OPEN)
    (stored,) = cache.iterdir()
    expected = profiles.cached_profile("tight", **CLOSED)
    (mine,) = set(cache.iterdir()) - {stored}
    mine.write_bytes(stored.read_bytes())
    counted.clear()
    assert [profiles.cached_profile("tight", **CLOSED) for _ in range(2)] == [expected] * 2
    assert counted == ["tight"]


def test_without_a_cache_it_is_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]) -> None:
    def refuse(kind: str) -> str:
        raise PermissionError(kind)

    monkeypatch.setattr(state, "folder", refuse)
    assert profiles.cached_profile("tight", **CLOSED) == profiles.cached_profile("tight", **CLOSED)
    assert counted == ["tight", "tight"]


def _other_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(state, "__version__", "9.9")


def _other_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profiles, "_library", lambda: "libseccomp 9")


def _other_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = profiles._data_path
    (tmp_path / "denylist.toml").write_text(Path(real("denylist")).read_text() + "# changed")
    monkeypatch.setattr(
        profiles, "_data_path", lambda name: str(tmp_path / "denylist.toml") if name == "denylist" else real(name)
    )


def _other_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "filter.py").write_text(Path(profiles.__file__).read_text() + "# changed")
    monkeypatch.setattr(profiles, "__file__", str(tmp_path / "filter.py"))


@pytest.mark.parametrize("upgrade", [_other_version, _other_library, _other_data, _other_code])
def test_an_upgrade_makes_the_cache_stale(
    tmp_path: Path,
    cache: Path,
    counted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    upgrade: Callable[[pytest.MonkeyPatch, Path], None],
) -> None:
    profiles.cached_profile("tight", **CLOSED)
    upgrade(monkeypatch, tmp_path)
    profiles.cached_profile("tight", **CLOSED)
    profiles.cached_profile("tight", **CLOSED)
    assert counted == ["tight", "tight"]


def test_another_machine_makes_the_cache_stale(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = profiles.cached_profile("tight", **CLOSED)
    other = next(machine for machine in MACHINES if machine != os.uname().machine)
    monkeypatch.setattr(os, "uname", lambda: type("uname", (), {"machine": other}))
    assert profiles.cached_profile("tight", **CLOSED) != here


def test_a_cache_hit_imports_nothing_heavy(tmp_path: Path) -> None:
    packages = [path for path in sys.path if path.endswith("site-packages")]
    heavy = "ctypes tomllib pyseccomp hashlib re enum typing subprocess functools contextlib tempfile json"
    code = (
        f"import sys\nsys.path += {packages!r}\n"
        f"from sandbox import state\nstate.folder = lambda kind: {str(tmp_path)!r}\n"
        "from sandbox.seccomp.filter import cached_profile\n"
        "cached_profile('tight', allow_subprocess=False, allow_threads=True, sockets=False)\n"
        f"print(*set({heavy!r}.split()) & set(sys.modules))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}

    def modules() -> list[str]:
        command = [sys.executable, "-S", "-c", code]
        folder = Path(__file__).parent.parent
        return subprocess.run(command, capture_output=True, check=True, text=True, cwd=folder, env=environment).stdout.split()

    assert {"pyseccomp", "tomllib", "ctypes"} <= set(modules())
    assert modules() == []


@pytest.mark.parametrize("module", ["load", "notifier", "landlock"])
def test_modules_for_the_sandbox_are_light(module: str) -> None:
    code = (
        f"import sys\nimport sandbox.seccomp.{module}\n"
        "print(*{'enum', 're', 'typing', 'dataclasses', 'json', 'pyseccomp', 'tomllib', 'subprocess'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, check=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert run.stdout.split() == []


def test_a_missing_library_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pyseccomp")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None if name == "seccomp" else "libc.so.6")
    with pytest.raises(ImportError, match="apt-get install libseccomp2"):
        profiles.compile_profile("tight", **CLOSED)


def test_terminal_input_cannot_be_faked(tmp_path: Path) -> None:
    """TIOCSTI on a real terminal (the kernel may refuse it by itself from 6.2, with another errno)."""
    leader, terminal = os.openpty()

    def attempt() -> str:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)  # one's own terminal: what the kernel would permit
        try:
            fcntl.ioctl(terminal, termios.TIOCSTI, b"x")
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "typed"

    outside = confined(attempt, None).value
    assert outside in ("typed", "EIO")
    outcome = confined(attempt, compiled("denylist", OPEN))
    assert (outcome.value, outcome.notified) == ("EPERM", ["ioctl"])
    assert confined(lambda: os.isatty(terminal), compiled("tight", CLOSED)).value is True
    os.close(leader)
    os.close(terminal)
