"""Attacks by sockets: to reach what is not allowed, to see the host's network, to confuse the supervisor.

The plugin may connect to one listener of the host; another one must never see anybody.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from sandbox import network
from sandbox.selftest.attacks import NAMESPACED, SYSCALLS, Scene, Stage, Where, attack, attempt, first_escape, syscall

STARTS = {"allow_subprocess_execution": True}
ONE_MORE = {"max_subprocess_count": 2}


def serve(stack: ExitStack) -> int:
    """A listener that takes all who come, and its port."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))

    def take() -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    thread = threading.Thread(target=take)
    thread.start()
    stack.callback(thread.join)
    stack.callback(listener.shutdown, socket.SHUT_RDWR)
    return int(listener.getsockname()[1])


def forbidden(stack: ExitStack, kind: int = socket.SOCK_STREAM) -> tuple[int, Callable[[], str]]:
    """The port of a socket that nobody may reach, and the look whether somebody has."""
    target = stack.enter_context(socket.socket(socket.AF_INET, kind))
    target.bind(("127.0.0.1", 0))
    if kind == socket.SOCK_STREAM:
        target.listen(4096)
    target.setblocking(False)

    def harm() -> str:
        try:
            if kind == socket.SOCK_STREAM:
                target.accept()[0].close()
            else:
                target.recv(1)
        except BlockingIOError:
            return ""
        return "somebody has come to the forbidden socket"

    return int(target.getsockname()[1]), harm


def beside(hosts: Callable[[int, int], list[str]] | None = None, blocked: tuple[str, ...] = (), **more: Any) -> Stage:
    """An allowed listener at the port `good` and a forbidden one at `bad`; `hosts` makes the allowed hosts of both."""

    @contextmanager
    def scene(where: Where) -> Iterator[Scene]:
        with ExitStack() as stack:
            good = serve(stack)
            bad, harm = forbidden(stack)
            allowed = hosts(good, bad) if hosts else [f"127.0.0.1:{good}"]
            permissions = {"allow_network_access": True, "allowed_hosts": allowed, "blocked_hosts": list(blocked)}
            yield Scene({"good": good, "bad": bad, **more}, harm, permissions)

    return scene


def named(*answers: str) -> Stage:
    """A name is allowed at the forbidden port, and leads to one of `answers` after the other, each time it is asked for."""

    @contextmanager
    def scene(where: Where) -> Iterator[Scene]:
        left = list(answers)

        def addresses(name: str) -> list[str]:
            return [left.pop(0) if len(left) > 1 else left[0]]

        with (
            mock.patch.object(network, "_addresses", addresses),
            beside(lambda _, bad: [f"inside.example:{bad}"])(where) as found,
        ):
            yield found

    return scene


# -- other ways to say where to --------------------------------------------------------------------------------------------


@attack("allowed hosts", scene=beside(), limits={"max_network_requests": 1_000_000})
def rewritten_address(good: int, bad: int) -> str:
    """A second thread changes the address while the first one connects."""
    import ctypes
    import errno
    import socket
    import struct
    import threading
    import time

    def sockaddr(port: int) -> bytes:
        return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton("127.0.0.1") + bytes(8)

    def port_of_the_peer(sock: socket.socket) -> int:
        try:
            return int(sock.getpeername()[1])
        except OSError:
            return 0

    libc = ctypes.CDLL(None, use_errno=True)
    place = ctypes.create_string_buffer(sockaddr(good), 16)
    is_over = threading.Event()

    def rewrite() -> None:
        while not is_over.is_set():
            ctypes.memmove(place, sockaddr(bad), 16)
            ctypes.memmove(place, sockaddr(good), 16)

    other = threading.Thread(target=rewrite)
    other.start()
    seen: set[str] = set()
    end = time.monotonic() + 1
    while time.monotonic() < end or (len(seen) < 2 and time.monotonic() < end + 5):
        with socket.socket() as sock:
            seen.add(errno.errorcode[ctypes.get_errno()] if libc.connect(sock.fileno(), place, 16) else "connected")
            if port_of_the_peer(sock) == bad:
                seen.add("escaped")
                break
    is_over.set()
    other.join()
    if "escaped" in seen:
        return "escaped: connected to what is not allowed"
    return "stopped: EPERM" if seen == {"EPERM", "connected"} else f"failed: {seen}"


@attack("allowed hosts", scene=beside())
def other_notation(good: int, bad: int) -> str:
    """IPv4 as IPv6, and the addresses that stand for the machine itself."""
    import socket

    def to(family: int, host: str) -> Callable[[], object]:
        def connect() -> tuple[Any, ...]:
            with socket.socket(family) as sock:
                sock.connect((host, bad))
                return tuple(sock.getpeername())

        return connect

    ways = {host: to(socket.AF_INET, host) for host in ("127.0.0.1", "127.9.9.9", "0.0.0.0")}
    return first_escape({**ways, **{host: to(socket.AF_INET6, host) for host in ("::ffff:127.0.0.1", "::")}})


@attack("allowed hosts", scene=beside())
def reconnect(good: int, bad: int) -> str:
    """To what is allowed, then undone by AF_UNSPEC, then to what is not."""
    import ctypes
    import socket

    libc = ctypes.CDLL(None, use_errno=True)
    with socket.create_connection(("127.0.0.1", good)) as sock:
        undone = libc.connect(sock.fileno(), bytes(16), 16) == 0
        if undone:
            return attempt(lambda: sock.connect(("127.0.0.1", bad)))
        return attempt(lambda: socket.create_connection(("127.0.0.1", bad)))


@attack("allowed hosts", scene=beside(number=SYSCALLS["connect"]))
def upper_half(good: int, bad: int, number: int) -> str:
    """Arguments that the kernel reads as ints, with something in their upper half."""
    import socket
    import struct

    address = struct.pack("=H", socket.AF_INET) + struct.pack(">H", bad) + socket.inet_aton("127.0.0.1") + bytes(8)
    with socket.socket() as sock:
        return first_escape(
            {
                "descriptor": lambda: syscall(number, sock.fileno() + (1 << 32), address, 16),
                "length": lambda: syscall(number, sock.fileno(), address, 16 + (1 << 32)),
            }
        )


@attack("allowed hosts", scene=beside())
def fast_open(good: int, bad: int) -> str:
    """TCP Fast Open: data that goes out with the first packet, and so an address in the sending."""
    import socket

    def option() -> object:
        with socket.socket() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
            return sock.connect_ex(("127.0.0.1", bad))

    with socket.socket() as one, socket.socket() as two:
        return first_escape(
            {
                "sendto": lambda: one.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", bad)),
                "sendmsg": lambda: two.sendmsg([b"x"], [], socket.MSG_FASTOPEN, ("127.0.0.1", bad)),
                "option": option,
            }
        )


@contextmanager
def datagrams(where: Where) -> Iterator[Scene]:
    with ExitStack() as stack:
        bad, harm = forbidden(stack, socket.SOCK_DGRAM)
        yield Scene({"bad": bad}, harm, {"allow_network_access": True, "allowed_hosts": [f"127.0.0.1:{bad}"]})


@attack("TCP only", scene=datagrams)
def datagram(bad: int) -> str:
    """UDP, also to where TCP might go."""
    import socket

    def send() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            return sock.sendto(b"x", ("127.0.0.1", bad))

    return attempt(send)


@attack("TCP only", scene=beside())
def other_kinds(good: int, bad: int) -> str:
    """Sockets of the host's kernel that are no TCP."""
    import socket

    kinds = {"netlink": (16, 3, 0), "raw": (2, 3, 255), "packet": (17, 3, 0), "mptcp": (2, 1, 262), "unix": (1, 1, 0)}
    return first_escape({name: lambda kind=kind: socket.socket(*kind).close() for name, kind in kinds.items()})  # type: ignore[misc]


@contextmanager
def local_sockets(where: Where) -> Iterator[Scene]:
    """An abstract socket of the host's, of the caller's network namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0psie-test-" + str(id(listener)))
        listener.listen()
        listener.setblocking(False)

        def harm() -> str:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                return ""
            return "somebody has come to the abstract socket"

        yield Scene({"name": listener.getsockname()}, harm, {"allow_network_access": True, "allowed_hosts": ["127.0.0.0/8"]})


@attack("TCP only", scene=local_sockets)
def abstract_socket(name: bytes) -> str:
    """By a socket for it, and by one end of a pair."""
    import socket

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(name)

    one, _ = socket.socketpair()
    return first_escape({"own": connect, "pair": lambda: one.connect(name)}).replace("EISCONN", "EPERM")


# -- what a handed-in socket could do beside connecting --------------------------------------------------------------------


@attack("a socket of the host's", scene=beside())
def source_route(good: int, bad: int) -> str:
    """Another way to an allowed address: hops, interfaces, marks."""
    import socket

    with socket.socket() as four:
        return first_escape(
            {
                "IP_OPTIONS": lambda: four.setsockopt(0, 4, b"\x83\x07\x04\x7f\x00\x00\x01\x00"),
                "SO_BINDTODEVICE": lambda: four.setsockopt(1, 25, b"lo\0"),
                "SO_BINDTOIFINDEX": lambda: four.setsockopt(1, 62, 1),
                "IP_UNICAST_IF": lambda: four.setsockopt(0, 50, b"\0\0\0\1"),
                "TCP_ULP": lambda: four.setsockopt(6, 31, b"tls"),
                "SO_ATTACH_FILTER": lambda: four.setsockopt(1, 26, bytes(16)),
                "SO_DONTROUTE": lambda: four.setsockopt(1, 5, 1),
            }
        )


@attack("a socket of the host's", scene=beside())
def interfaces(good: int, bad: int) -> str:
    """Names and addresses of the host's interfaces, and a descriptor of its network namespace."""
    import fcntl
    import socket

    with socket.socket() as sock:
        asked = {"SIOCGIFNAME": 0x8910, "SIOCGIFADDR": 0x8915, "SIOCGIFHWADDR": 0x8927, "SIOCGIFINDEX": 0x8933}
        request = b"lo".ljust(16, b"\0") + b"\1".ljust(24, b"\0")
        first = first_escape(
            {name: lambda number=number: fcntl.ioctl(sock, number, request) for name, number in asked.items()}  # type: ignore[misc]
        )
        if first.startswith("escaped"):
            return first
        return attempt(lambda: fcntl.ioctl(sock, 0x894C))  # SIOCGSKNS


@attack("a socket of the host's", scene=beside())
def waiting_for_others(good: int, bad: int) -> str:
    """A listener among the host's."""
    import socket

    with socket.socket() as named_one, socket.socket() as nameless:
        return first_escape({"bind": lambda: named_one.bind(("127.0.0.1", 0)), "listen": lambda: nameless.listen()})


# -- other processes -------------------------------------------------------------------------------------------------------


@attack("allowed hosts", NAMESPACED, scene=beside(), permissions=STARTS, limits=ONE_MORE)
def passed_on(good: int, bad: int) -> str:
    """A socket that another process has made, connected where that one may not."""
    import os
    import socket

    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            here.close()
            made = socket.socket()
            socket.send_fds(there, [b"x"], [made.fileno()])
            there.recv(1)
        finally:
            os._exit(0)
    there.close()
    _, fds, _, _ = socket.recv_fds(here, 1, 1)
    with socket.socket(fileno=fds[0]) as sock:
        answer = attempt(lambda: sock.connect(("127.0.0.1", bad)))
    here.close()
    os.waitpid(pid, 0)
    return answer


@attack("allowed hosts", NAMESPACED, scene=beside(), permissions=STARTS, limits=ONE_MORE)
def program(good: int, bad: int) -> str:
    """A program, instead of the plugin."""
    import subprocess
    import sys

    code = f"""
import socket
socket.create_connection(('127.0.0.1', {good})).close()
try:
    socket.create_connection(('127.0.0.1', {bad}))
except PermissionError:
    print('refused')
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    if done.stderr:
        return "failed: " + done.stderr
    return "stopped: EPERM" if done.stdout == "refused\n" else "escaped: " + done.stdout


# -- names and lists -------------------------------------------------------------------------------------------------------


def to_loopback(good: int, bad: int) -> str:
    import socket

    return attempt(lambda: socket.create_connection(("127.0.0.1", bad), 5))


attack("allowed hosts", scene=named("127.0.0.1"), name="name_for_loopback")(to_loopback)
attack("allowed hosts", scene=named("::ffff:127.0.0.1"), name="name_for_mapped_loopback")(to_loopback)
attack("allowed hosts", scene=named("0.0.0.0"), name="name_for_this_host")(to_loopback)
attack("allowed hosts", scene=named("8.8.8.8", "127.0.0.1"), name="name_that_changes")(to_loopback)
attack("allowed hosts", scene=beside(lambda _, bad: [f"*:{bad}"]), name="every_public_host")(to_loopback)
attack("allowed hosts", scene=beside(lambda _, bad: [f"0.0.0.0/0:{bad}"], ("127.0.0.1",)), name="blocked")(to_loopback)
attack("allowed hosts", scene=beside(lambda _, bad: [f"127.0.0.1:{bad}"], ("::ffff:127.0.0.1",)), name="blocked_as_ipv6")(
    to_loopback
)
attack("allowed hosts", scene=beside(lambda _, bad: []), name="nothing_allowed")(to_loopback)
