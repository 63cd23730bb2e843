"""The network that a plugin may have: TCP to allowed hosts works as without psie, at every level, and all of it is told."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import json
import os
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    EnhancedPluginSandbox,
    IsolationLevel,
    ResourceLimitExceededError,
    SandboxException,
    SecurityViolationError,
    network,
)
from sandbox.violations import SandboxViolationType

from . import cli_harness, harness

rootless = pytest.mark.rootless
NAMESPACED = [level for level in IsolationLevel if level is not IsolationLevel.MINIMAL]
TWO = pytest.mark.parametrize("level", [IsolationLevel.MINIMAL, IsolationLevel.STRICT], ids=lambda level: level.value)


class Echo(socketserver.StreamRequestHandler):
    """Gives back each line in capitals."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class Store(socketserver.StreamRequestHandler):
    """Speaks as much of Redis's protocol as a client needs: whatever is asked for is `word`."""

    def handle(self) -> None:
        while head := self.rfile.readline():
            words = []
            for _ in range(int(head[1:])):
                words.append(self.rfile.read(int(self.rfile.readline()[1:])))
                self.rfile.readline()
            self.wfile.write(b"$4\r\nword\r\n" if words[0] == b"GET" else b"+OK\r\n")


class Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"page {self.path}".encode())

    def log_message(self, *_: object) -> None:
        pass


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


class Server6(Server):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def running(server: socketserver.TCPServer) -> Iterator[int]:
    """The port of a server while it runs."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    with server:
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def echo() -> Iterator[int]:
    with running(Server(("127.0.0.1", 0), Echo)) as port:
        yield port


@pytest.fixture
def store() -> Iterator[int]:
    with running(Server(("127.0.0.1", 0), Store)) as port:
        yield port


@pytest.fixture
def web() -> Iterator[int]:
    with running(ThreadingHTTPServer(("127.0.0.1", 0), Web)) as port:
        yield port


@pytest.fixture
def closed() -> Iterator[int]:
    """A port where nobody listens, and nobody else can begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def hole() -> Iterator[int]:
    """A port that answers nobody: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def reaching(level: IsolationLevel, *hosts: str, blocked: tuple[str, ...] = (), **more: Any) -> EnhancedPluginSandbox:
    """A sandbox whose plugin may go to `hosts`."""
    permissions = {"allow_network_access": True, "allowed_hosts": list(hosts), "blocked_hosts": list(blocked)}
    permissions |= more.pop("permissions", {})
    return harness.open_sandbox(level, permissions=permissions, **more)


def local(level: IsolationLevel, function: Callable[..., Any], *args: Any, hosts: tuple[str, ...] = (), **more: Any) -> Any:
    """`function(*args)` in a sandbox that may go to `hosts`, or to each port among `args`, on this machine."""
    allowed = hosts or tuple(f"127.0.0.1:{arg}" for arg in args if isinstance(arg, int))

    async def main() -> Any:
        async with reaching(level, *allowed, **more) as sandbox:
            return await sandbox.execute_plugin_safe(function, *args)

    return asyncio.run(main())


# -- clients ---------------------------------------------------------------------------------------------------------------


def test_http(level: IsolationLevel, web: int) -> None:
    def fetch(port: int) -> tuple[int, bytes, bytes]:
        import http.client
        import urllib.request

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/one")
        answer = connection.getresponse()
        first = answer.read()
        connection.close()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/two", timeout=5) as page:
            return answer.status, first, page.read()

    assert local(level, fetch, web) == (200, b"page /one", b"page /two")


def test_asyncio(level: IsolationLevel, echo: int) -> None:
    async def talk(port: int) -> list[bytes]:
        import asyncio

        async def one(word: bytes) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(word + b"\n")
            answer = await reader.readline()
            writer.close()
            await writer.wait_closed()
            return answer

        return list(await asyncio.gather(*(one(word) for word in (b"a", b"b", b"c"))))

    assert local(level, talk, echo) == [b"A\n", b"B\n", b"C\n"]


@TWO
def test_requests(level: IsolationLevel, web: int) -> None:
    pytest.importorskip("pip._vendor.requests", reason="this environment was made without pip, which carries it")

    def fetch(port: int) -> str:
        import importlib

        requests = importlib.import_module("pip._vendor.requests")
        return str(requests.get(f"http://127.0.0.1:{port}/three", timeout=5).text)

    assert local(level, fetch, web) == "page /three"


@TWO
def test_redis(level: IsolationLevel, store: int) -> None:
    """With its client where there is one, else by hand: pipelined commands, as a client sends them."""

    def by_hand(port: int) -> bytes:
        import socket

        with socket.create_connection(("127.0.0.1", port), 5) as sock, sock.makefile("rb") as answers:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\nb\r\n*2\r\n$3\r\nGET\r\n$1\r\na\r\n")
            return answers.readline() + answers.readline() + answers.readline()

    def by_client(port: int) -> bytes:
        import redis  # type: ignore[import-not-found, import-untyped, unused-ignore]

        with redis.Redis(host="127.0.0.1", port=port, protocol=2, socket_timeout=5) as client:
            client.set("a", "b")
            return bytes(client.get("a"))

    assert local(level, by_hand, store) == b"+OK\r\n$4\r\nword\r\n"
    if importlib.util.find_spec("redis"):
        assert local(level, by_client, store) == b"word"


@pytest.mark.parametrize("level", NAMESPACED, ids=lambda level: level.value)
def test_a_program(level: IsolationLevel, echo: int) -> None:
    def start(port: int) -> str:
        import subprocess
        import sys

        code = f"import socket; s = socket.create_connection(('127.0.0.1', {port})); s.send(b'word\\n'); print(s.recv(9))"
        return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout

    more: dict[str, Any] = {"permissions": {"allow_subprocess_execution": True}, "limits": {"max_subprocess_count": 2}}
    assert local(level, start, echo, **more) == "b'WORD\\n'\n"


@rootless
def test_ipv6(level: IsolationLevel) -> None:
    try:
        server = Server6(("::1", 0), Echo)
    except OSError:
        pytest.skip("this host has no ::1")

    def talk(port: int) -> list[object]:
        import socket

        with socket.create_connection(("::1", port), 5) as sock:
            sock.sendall(b"six\n")
            answer = sock.recv(9)
            peer = sock.getpeername()[0]
        with socket.socket(socket.AF_INET6) as other:
            return [answer, peer, other.connect_ex(("::ffff:127.0.0.1", port))]

    with running(server) as port:
        answer = local(level, talk, port, hosts=(f"[::1]:{port}",))
    assert answer == [b"SIX\n", "::1", errno.EPERM]


# -- as without psie -------------------------------------------------------------------------------------------------------


@rootless
def test_without_blocking(level: IsolationLevel, echo: int, closed: int) -> None:
    """EINPROGRESS, poll, SO_ERROR; also for a port where nobody listens."""

    def talk(port: int, closed: int) -> list[object]:
        import select
        import socket

        seen: list[object] = []
        for where in (port, closed):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
                seen.append(sock.connect_ex(("127.0.0.1", where)))
                poll = select.poll()
                poll.register(sock, select.POLLOUT)
                ready = poll.poll(5000)
                seen += [bool(ready[0][1] & select.POLLOUT), sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)]
                if where == port:
                    seen.append(sock.connect_ex(("127.0.0.1", where)))
                    seen.append(sock.connect_ex(("127.0.0.1", where)))
        return seen

    going, refused = [errno.EINPROGRESS, True, 0, 0, errno.EISCONN], [errno.EINPROGRESS, True, errno.ECONNREFUSED]
    assert talk(echo, closed) == going + refused
    assert local(level, talk, echo, closed) == going + refused


@TWO
def test_epoll_and_copies_from_before(level: IsolationLevel, echo: int) -> None:
    """What was made of a socket before it is connected is of the connected one."""

    def talk(port: int) -> tuple[int, int, bytes]:
        import os
        import select
        import socket

        with socket.socket() as sock, select.epoll() as epoll:
            copy = socket.socket(fileno=os.dup(sock.fileno()))
            with copy:
                sock.setblocking(False)
                epoll.register(sock, select.EPOLLOUT | select.EPOLLET)
                epoll.poll(0)  # not connected: EPOLLHUP
                sock.connect_ex(("127.0.0.1", port))
                events = epoll.poll(5)
                epoll.modify(sock, select.EPOLLIN)
                copy.send(b"word\n")
                return len(events), epoll.poll(5)[0][1], sock.recv(9)

    assert local(level, talk, echo) == talk(echo) == (1, 1, b"WORD\n")


@TWO
def test_errors(level: IsolationLevel, echo: int, closed: int) -> None:
    def attempts(port: int, closed: int) -> list[int]:
        import socket

        seen = []
        for family, where in (
            (socket.AF_INET, ("127.0.0.1", closed)),
            (socket.AF_INET, ("255.255.255.255", port)),
            (socket.AF_INET6, ("fe80::1", port)),
            (socket.AF_INET6, ("::ffff:127.0.0.1", closed)),
        ):
            with socket.socket(family) as sock:
                seen.append(sock.connect_ex(where))
        with socket.create_connection(("127.0.0.1", port)) as sock:
            seen.append(sock.connect_ex(("127.0.0.1", port)))
        return seen

    hosts = (f"127.0.0.1:{echo}", f"127.0.0.1:{closed}", f"255.255.255.255:{echo}", f"[fe80::/10]:{echo}")
    outside = attempts(echo, closed)
    assert outside[0] == errno.ECONNREFUSED
    assert outside[4] == errno.EISCONN
    assert local(level, attempts, echo, closed, hosts=hosts) == outside


@TWO
def test_addresses_of_a_wrong_size(level: IsolationLevel, echo: int) -> None:
    def attempts(port: int) -> list[str]:
        import ctypes
        import errno
        import socket

        libc = ctypes.CDLL(None, use_errno=True)
        address = b"\2\0" + port.to_bytes(2, "big") + socket.inet_aton("127.0.0.1") + bytes(200)
        seen = []
        for family, length in ((2, 3), (2, 8), (2, 15), (2, 129), (2, -1), (10, 16), (2, 128), (2, 16)):
            with socket.socket(family) as sock:
                failed = libc.connect(sock.fileno(), address, length)
                seen.append(errno.errorcode[ctypes.get_errno()] if failed else "connected")
        return seen

    expected = ["EINVAL"] * 5 + ["EAFNOSUPPORT", "connected", "connected"]
    outside = attempts(echo)
    assert outside[5] in ("EINVAL", "EAFNOSUPPORT")  # too short for IPv6 and of another family: which one counts
    outside[5] = expected[5]
    assert local(level, attempts, echo, config={"violation_threshold": 10}) == outside == expected


@TWO
def test_timeouts(level: IsolationLevel, hole: int) -> None:
    """Python's, and the kernel's own for a connect that blocks."""

    def wait(port: int) -> list[object]:
        import errno
        import socket
        import struct

        with socket.socket() as sock:
            sock.settimeout(0.1)
            try:
                sock.connect(("127.0.0.1", port))
            except TimeoutError:
                seen: list[object] = ["timed out"]
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 100_000))
            return [*seen, errno.errorcode[sock.connect_ex(("127.0.0.1", port))]]

    assert local(level, wait, hole) == wait(hole) == ["timed out", "EINPROGRESS"]


@TWO
def test_options_and_flags(level: IsolationLevel, echo: int) -> None:
    def options(port: int) -> list[object]:
        import fcntl
        import os
        import socket

        seen: list[object] = []
        for flags in (0, socket.SOCK_CLOEXEC, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM | flags) as sock:
                seen.append(bool(fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_NONBLOCK))
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 7)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            sock.connect(("127.0.0.1", port))
            for layer, option in (
                (socket.IPPROTO_TCP, socket.TCP_NODELAY),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                (socket.SOL_SOCKET, socket.SO_RCVBUF),
                (socket.SOL_SOCKET, socket.SO_TYPE),
                (socket.SOL_SOCKET, socket.SO_PROTOCOL),
            ):
                seen.append(sock.getsockopt(layer, option))
            return [*seen, sock.getpeername(), os.get_inheritable(sock.fileno())]

    assert local(level, options, echo) == options(echo)


def test_close_on_exec() -> None:
    """As the flag says, which Python's sockets always have."""

    def flags() -> list[int]:
        import ctypes
        import fcntl
        import socket

        libc = ctypes.CDLL(None)
        fds = [libc.socket(socket.AF_INET, socket.SOCK_STREAM | flag, 0) for flag in (0, socket.SOCK_CLOEXEC)]
        return [fcntl.fcntl(fd, fcntl.F_GETFD) for fd in fds]

    assert local(IsolationLevel.STRICT, flags, hosts=("127.0.0.1",)) == [0, 1]


# -- names -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> Iterator[int]:
    """A port whose server takes no further connection: the next one waits."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        first = socket.create_connection(server.getsockname())
        second = socket.socket()
        second.setblocking(False)
        second.connect_ex(server.getsockname())
        yield server.getsockname()[1]
        first.close()
        second.close()


@rootless
@TWO
def test_a_signal_interrupts_a_connect(level: IsolationLevel, silent: int) -> None:
    def alarmed(port: int) -> tuple[str, float]:
        import signal
        import socket
        import time

        def ring(number: int, frame: object) -> None:
            raise TimeoutError("rung")

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        start = time.monotonic()
        try:
            socket.socket().connect(("127.0.0.1", port))
        except TimeoutError as error:
            return str(error), time.monotonic() - start
        return "connected", 0.0

    said, seconds = local(level, alarmed, silent)
    assert said == "rung"
    assert seconds < 5 * harness.PATIENCE


def ask_after_a_signal(port: int) -> str:
    """What a connect comes to that goes on behind a signal's back."""
    import signal
    import socket

    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with socket.socket() as sock:
        try:
            sock.connect(("127.0.0.1", port))
        except ConnectionRefusedError:
            return "refused"
        return "connected"


@contextlib.contextmanager
def closing() -> Iterator[int]:
    """A port whose server takes nobody, and is closed after a while."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        with socket.create_connection(server.getsockname()), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(server.getsockname())
            timer = threading.Timer(0.7, server.close)
            timer.start()
            yield server.getsockname()[1]
            timer.join()


@TWO
@pytest.mark.long
def test_a_connect_that_was_interrupted_tells_its_end(level: IsolationLevel) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with closing() as port:
        assert ask_after_a_signal(port) == "refused"
    signal.signal(signal.SIGALRM, before)
    with closing() as port:
        assert local(level, ask_after_a_signal, port) == "refused"


@TWO
def test_a_connection_is_told_behind_any_number_of_questions(level: IsolationLevel, echo: int, web: int) -> None:
    """To connect what is connected is no request, and is told no more often than other operations."""

    def hide(first: int, second: int) -> list[int]:
        import socket

        with socket.create_connection(("127.0.0.1", first)) as sock:
            errors = {sock.connect_ex(("127.0.0.1", first)) for _ in range(1500)}
            socket.create_connection(("127.0.0.1", second)).close()
        return sorted(errors)

    async def main() -> list[dict[str, Any]]:
        limits = {"max_network_requests": 2}
        async with reaching(level, f"127.0.0.1:{echo}", f"127.0.0.1:{web}", limits=limits) as sandbox:
            assert await sandbox.execute_plugin_safe(hide, echo, web) == [errno.EISCONN]
            return sandbox.get_network_activity()

    told = [record["port"] for record in asyncio.run(main()) if record["operation"] == "connect"]
    assert told.count(web) == 1
    assert told.count(echo) < 1100


def test_whoever_may_ask_for_every_name_knows_whom_to_ask(level: IsolationLevel) -> None:
    def nameservers() -> list[str]:
        with open("/etc/resolv.conf") as file:
            return [line.split()[1] for line in file if line.startswith("nameserver")]

    assert local(level, nameservers, hosts=("*",)) == network._nameservers()


@rootless
@TWO
def test_nobody_waits_for_a_socket_that_lingers(level: IsolationLevel, echo: int) -> None:
    def options(port: int) -> list[object]:
        import socket
        import struct

        seen: list[object] = []
        with socket.create_connection(("127.0.0.1", port)) as sock:
            for wanted in ((1, 0), (0, 5), (1, 1)):
                try:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", *wanted))
                except OSError as error:
                    seen.append(error.errno)
                else:
                    seen.append(struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)))
            for value in (b"", bytes(7)):
                try:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)
                except OSError as error:
                    seen.append(error.errno)
        one, _ = socket.socketpair()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return seen

    assert local(level, options, echo) == [(1, 0), (0, 0), errno.EPERM, errno.EINVAL, errno.EINVAL]


@rootless
@TWO
def test_asking_for_a_connection_is_no_further_request(level: IsolationLevel, silent: int) -> None:
    def ask(port: int) -> list[int]:
        import socket

        with socket.socket() as sock:
            sock.setblocking(False)
            return [sock.connect_ex(("127.0.0.1", port)) for _ in range(15)]

    assert local(level, ask, silent) == [errno.EINPROGRESS, *[errno.EALREADY] * 14]


@rootless
@TWO
def test_no_record_is_lost_where_the_caller_is_busy(level: IsolationLevel, echo: int) -> None:
    def much(port: int) -> None:
        import socket

        for _ in range(500):
            socket.socket().close()
        socket.create_connection(("127.0.0.1", port)).close()
        try:
            socket.create_connection(("127.0.0.1", 1))
        except PermissionError:
            pass
        for _ in range(600):
            socket.socket().close()
        socket.create_connection(("127.0.0.1", port)).close()

    async def main() -> None:
        async with reaching(level, f"127.0.0.1:{echo}") as sandbox:
            call = asyncio.ensure_future(sandbox.execute_plugin_safe(much, echo))
            await asyncio.sleep(0)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:  # the engine's thread gets little of this interpreter meanwhile
                pass
            await call
            connects = [each for each in sandbox.get_network_activity() if each["operation"] == "connect"]
            assert [(each["port"], each["allowed"]) for each in connects] == [(echo, True), (1, False), (echo, True)]
            violations = sandbox.get_violations()  # on a slow machine also of CPU
            assert [each.type for each in violations].count(SandboxViolationType.NETWORK_VIOLATION) == 1

    asyncio.run(main())


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names that the host's resolver knows, beside which it knows none."""
    known: dict[str, list[str]] = {}
    monkeypatch.setattr(network, "_addresses", lambda name: known.get(name, []))
    return known


@rootless
def test_names(level: IsolationLevel, echo: int, names: dict[str, list[str]]) -> None:
    """Allowed ones are known inside, with all their addresses, in whatever case; others are not."""
    names["service.example"] = ["127.0.0.2", "127.0.0.1"]

    def talk(port: int) -> list[object]:
        import socket

        with socket.create_connection(("Service.EXAMPLE", port), 5) as sock:
            sock.sendall(b"word\n")
            seen: list[object] = [sock.recv(9), socket.gethostbyname("service.example")]
        found = socket.getaddrinfo("service.example", port, type=socket.SOCK_STREAM)
        seen.append(sorted(each[4][0] for each in found))
        for name in ("other.example", "evil.service.example"):
            try:
                socket.getaddrinfo(name, port)
            except socket.gaierror:
                seen.append(name)
        return seen

    own = f"SERVICE.example.:{echo}"
    with pytest.raises(SecurityViolationError, match="but not at port"):  # who answers for the name cannot open further ports
        local(level, talk, echo, hosts=("service.example:1", own, "127.0.0.0/8:1"))
    answer = local(level, talk, echo, hosts=("service.example:1", own, f"127.0.0.1:{echo}", f"127.0.0.2:{echo}"))
    assert answer[0] == b"WORD\n"
    assert answer[1] in names["service.example"]
    assert answer[2:] == [["127.0.0.1", "127.0.0.2"], "other.example", "evil.service.example"]


@pytest.mark.parametrize("level", NAMESPACED, ids=lambda level: level.value)
def test_the_hosts_file(level: IsolationLevel, names: dict[str, list[str]]) -> None:
    names["many.example"] = [f"8.8.{number}.1" for number in range(100)]
    names["private.example"] = ["10.0.0.1"]

    def look() -> tuple[str, int]:
        import socket

        with open("/etc/hosts") as file:
            return file.read(), len(socket.getaddrinfo("many.example", 80, type=socket.SOCK_STREAM))

    text, found = local(level, look, hosts=("many.example", "private.example", "unknown.example"))
    own = "127.0.0.1 localhost\n"
    assert text == own + "".join(f"{address} many.example\n" for address in names["many.example"])
    assert found == 100


def test_a_blocked_name_without_address_opens_nothing(names: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match=r"bad\.example in blocked_hosts has no address here"):
        local(IsolationLevel.MINIMAL, os.getpid, hosts=("*",), blocked=("bad.example",))


# -- what is told, and counted -----------------------------------------------------------------------------------------------


@rootless
def test_activity(level: IsolationLevel, echo: int, closed: int) -> None:
    def work(port: int, closed: int) -> None:
        import contextlib
        import socket

        with socket.socket() as sock:
            sock.connect(("127.0.0.1", port))
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.connect(("127.0.0.1", closed))
        with contextlib.suppress(OSError):
            socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", 7))
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.listen()
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.sendto(b"x", socket.MSG_FASTOPEN, ("192.0.2.7", 9))
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.sendmsg([b"x"], [], socket.MSG_FASTOPEN, ("192.0.2.8", 9))

    async def main() -> None:
        async with reaching(level, f"127.0.0.1:{echo}", config={"violation_threshold": 10}) as sandbox:
            await sandbox.execute_plugin_safe(work, echo, closed)
            records = sandbox.get_network_activity()
            violations = [violation.message for violation in sandbox.get_violations()]
            told = [(each["operation"], each["address"], each["port"], each["allowed"]) for each in records]
            made = ("socket", None, None, True)
            assert told == [
                *(made, ("connect", "127.0.0.1", echo, True)),
                *(made, ("connect", "127.0.0.1", closed, False)),
                ("socket", None, None, False),
                *(made, ("bind", "127.0.0.1", 7, False)),
                *(made, ("listen", None, None, False)),
                *(made, ("sendto", "192.0.2.7", 9, False)),
                *(made, ("sendmsg", "192.0.2.8", 9, False)),
            ]
            assert (records[0]["family"], records[0]["type"], records[4]["type"]) == ("AF_INET", "SOCK_STREAM", "SOCK_RAW")
            assert {each["call"] for each in records} == {1}
            assert sandbox.get_telemetry().network_operations_count == len(told)
            assert violations == [
                f"connect() of 127.0.0.1:{closed} was refused: 127.0.0.1 is allowed, but not at port {closed}",
                "socket() of AF_INET SOCK_RAW was refused: only TCP can be had",
                "bind() of 127.0.0.1:7 was refused: a plugin cannot listen, nor choose its own address",
                "listen() of a socket was refused: a plugin cannot listen",
                "sendto() of 192.0.2.7:9 was refused: data goes only over a connection that was made before",
                "sendmsg() of 192.0.2.8:9 was refused: data goes only over a connection that was made before",
            ]
            await sandbox.execute_plugin_safe(connect_often, echo, 1)
            assert sandbox.get_telemetry().network_operations_count == len(told) + 2
            assert sandbox.get_network_activity()[-1]["call"] == 2

    asyncio.run(main())


def connect_often(port: int, times: int) -> str:
    import socket

    for _ in range(times):
        socket.create_connection(("127.0.0.1", port)).close()
    return f"{times} times"


@rootless
def test_the_limit_of_requests(level: IsolationLevel, echo: int) -> None:
    """Of each call."""

    async def main() -> None:
        async with reaching(level, f"127.0.0.1:{echo}", limits={"max_network_requests": 3}) as sandbox:
            for _ in range(2):
                assert await sandbox.execute_plugin_safe(connect_often, echo, 3) == "3 times"
            with pytest.raises(ResourceLimitExceededError, match="max_network_requests is 3") as caught:
                await sandbox.execute_plugin_safe(connect_often, echo, 4)
            assert caught.value.limit == "network_requests"
            assert sandbox.get_violations()[-1].details["limit"] == "network_requests"

    asyncio.run(main())


@TWO
def test_a_refusal_is_an_error_of_its_own(level: IsolationLevel, echo: int) -> None:
    with pytest.raises(SecurityViolationError, match=f"127.0.0.1:{echo} was refused: it is not in allowed_hosts"):
        local(level, connect_often, echo, 1, hosts=("192.0.2.1",))


@rootless
def test_a_name_that_is_asked_for_is_told(level: IsolationLevel) -> None:
    """With its line, though there is nothing that the kernel could tell; by itself it is no reason to end a call."""

    def ask() -> int:
        import socket

        failed = 0
        for name in ("localhost", "127.0.0.1", "one.example", "two.example", "two.example", "three.example", "four.example"):
            try:
                socket.getaddrinfo(name, 8080)
            except OSError:
                failed += 1
        return failed

    def go(name: str) -> None:
        import socket

        socket.create_connection((name, 80))

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            assert await sandbox.execute_plugin_safe(ask) == 5
            told = [violation for violation in sandbox.get_violations() if violation.details.get("operation") == "resolve"]
            assert [violation.details["address"] for violation in told] == [
                f"{n}.example" for n in ("one", "two", "three", "four")
            ]
            assert told[1].details["line"] == ask.__code__.co_firstlineno + 6
            assert told[1].explanation is not None
            assert told[1].explanation.flag == "--allow-host two.example:8080"
            asked = [record for record in sandbox.get_network_activity() if record["operation"] == "resolve"]
            assert [(record["address"], record["allowed"]) for record in asked][:2] == [
                ("localhost", True),
                ("one.example", False),
            ]
            with pytest.raises(SecurityViolationError, match=r"the name five.example was asked for"):
                await sandbox.execute_plugin_safe(go, "five.example")

    asyncio.run(main())


def test_forged_names_are_bounded(level: IsolationLevel) -> None:
    def forge() -> None:
        import sys

        for number in range(1000):
            sys.audit("socket.getaddrinfo", f"\x1b[31m{number}" + "x" * 5000, number, 0, 0, 0)
            sys.audit("socket.getaddrinfo", object(), {}, 0)
        sys.audit("socket.gethostbyname")

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            await sandbox.execute_plugin_safe(forge)
            told = sandbox.get_violations()
            assert 0 < len(told) <= 256
            assert max(len(violation.message) for violation in told) < 2500
            assert all(violation.message.isprintable() for violation in told)

    asyncio.run(main())


@rootless
def test_what_a_library_does_without_is_a_violation_for_whom_it_ends(level: IsolationLevel) -> None:
    def datagrams(*, catch: bool) -> str:
        import socket

        try:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        except PermissionError:
            if not catch:
                raise
        return "went on"

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            assert await sandbox.execute_plugin_safe(datagrams, catch=True) == "went on"
            assert sandbox.get_violations() == []
            with pytest.raises(SecurityViolationError, match=r"socket\(\) of AF_INET SOCK_DGRAM was refused"):
                await sandbox.execute_plugin_safe(datagrams, catch=False)

    asyncio.run(main())


@rootless
def test_without_permission(level: IsolationLevel, echo: int) -> None:
    """There is a socket, but of no network; where nobody could read what it is wanted for, there is none."""
    can_be_read = harness.ROOT or level is not IsolationLevel.MINIMAL
    reason = f"127.0.0.1:{echo} was refused: the network is not permitted" if can_be_read else "sockets are not permitted"
    with pytest.raises(SecurityViolationError, match=reason):
        harness.call(level, connect_often, echo, 1)


@rootless
@TWO
def test_connects_end_with_their_call(level: IsolationLevel, hole: int, echo: int) -> None:
    """A call that leaves many of them behind takes nothing from the next one."""

    def hang(port: int) -> None:
        import socket
        import threading
        import time

        threading.stack_size(131072)
        for _ in range(70):
            threading.Thread(target=socket.socket().connect_ex, args=[("127.0.0.1", port)], daemon=True).start()
        time.sleep(60)

    async def main() -> None:
        limits = {"max_thread_count": 80, "max_execution_time_seconds": 0.7 * harness.PATIENCE, "max_open_files": 200}
        async with reaching(level, f"127.0.0.1:{echo}", f"127.0.0.1:{hole}", limits=limits) as sandbox:
            with pytest.raises(ResourceLimitExceededError, match="longer than"):
                await sandbox.execute_plugin_safe(hang, hole)
            (supervisor,) = harness.roles(os.getpid())["supervisor"]
            await harness.wait_for(lambda: len(os.listdir(f"/proc/{supervisor}/task")) == 1)
            assert await sandbox.execute_plugin_safe(connect_often, echo, 2) == "2 times"

    asyncio.run(main())


@rootless
@TWO
def test_the_supervisor_dies_while_it_connects(level: IsolationLevel, hole: int) -> None:
    """Its sandbox dies with it, and the connect."""

    def wait(port: int) -> None:
        import socket

        socket.create_connection(("127.0.0.1", port))

    async def main() -> None:
        async with reaching(level, f"127.0.0.1:{hole}") as sandbox:
            call = asyncio.create_task(sandbox.execute_plugin_safe(wait, hole))
            await harness.wait_for(lambda: harness.roles(os.getpid())["supervisor"])
            (supervisor,) = harness.roles(os.getpid())["supervisor"]
            await harness.wait_for(lambda: len(os.listdir(f"/proc/{supervisor}/task")) == 2)
            os.kill(supervisor, signal.SIGKILL)
            with pytest.raises(SandboxException, match="supervisor has died"):
                await call

    asyncio.run(main())


# -- the command -------------------------------------------------------------------------------------------------------------


@TWO
def test_the_command(level: IsolationLevel, echo: int, closed: int, tmp_path: Path) -> None:
    caller = cli_harness.privileged(level.value, tmp_path)
    result = tmp_path / "result.json"
    source = f"""
        import socket
        sock = socket.create_connection(("127.0.0.1", {echo}))
        sock.sendall(b"word\\n")
        print(sock.recv(9))
        print(socket.socket().connect_ex(("127.0.0.1", {closed})))
    """
    done = caller.plugin(source, options=["--allow-host", f"127.0.0.1:{echo}", "--result-file", str(result)])
    assert (done.status, done.out) == (0, f"b'WORD\\n'\n{errno.EPERM}\n"), done
    told = json.loads(result.read_text())
    connects = [each for each in told["network"] if each["operation"] == "connect"]
    assert [(each["address"], each["port"], each["allowed"]) for each in connects] == [
        ("127.0.0.1", echo, True),
        ("127.0.0.1", closed, False),
    ]
    assert told["telemetry"]["network_operations_count"] == len(told["network"]) == 4


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("a.de:0", "give a port from 1 to 65535"),
        ("http://a.de", "give host or host:port, without a scheme"),
        ("127.1", "give IPv4 as four decimal numbers (10.0.0.1), IPv6 as in ::1"),
        ("fe80::1%lo", "give the address without a zone"),
    ],
)
def test_a_host_that_is_none(host: str, sentence: str, tmp_path: Path) -> None:
    done = cli_harness.privileged("strict", tmp_path).plugin("pass", options=["--allow-host", host])
    assert done.status == 125
    assert f"--allow-host {host}: {sentence}" in done.err
