"""A plugin's sockets: made by the supervisor, connected by the supervisor, and only there where a plugin may go.

The filter lets no process of a sandbox make, bind or connect a socket itself (a pair apart, which leads nowhere). What it
asks for arrives here as a notification: socket(2) is answered with a TCP socket of the supervisor's network namespace,
handed in by SECCOMP_IOCTL_NOTIF_ADDFD, and connect(2) is carried out here on that very socket (pidfd_getfd(2)), with an
address that was read once, from a copy. So options, flags, duplicates and poll(2) are as they always are. Where the network
is not permitted that namespace is an empty one of the supervisor's own, and nothing is ever connected. A socket of the
host's network can do nothing but connect by us: the filter refuses its other ways out (see the profiles, "Sockets").

Everything read from the plugin is hostile: bounded, and looked at once. Must not import anything heavy, and not know who
is told. Sources: seccomp_unotify(2), pidfd_getfd(2), ip(7), ipv6(7), unix(7), tcp(7).
"""

from __future__ import annotations

import _signal as signal
import _socket
import _thread
import errno
import os
import sys

from sandbox.engine import access
from sandbox.ns import native, processes
from sandbox.ns import syscalls as sc
from sandbox.seccomp import notifier

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Set
    from typing import Any

# The calls that the filter leaves to us, and where each has an address: argument of the pointer, argument of the length.
SOCKET, CONNECT, BIND, LISTEN = "socket", "connect", "bind", "listen"
ADDRESSED = {CONNECT: (1, 2), BIND: (1, 2), "sendto": (4, 5)}
MESSAGES = ("sendmsg", "sendmmsg")  # whose address is in a struct msghdr
OPERATIONS = (SOCKET, LISTEN, *ADDRESSED, *MESSAGES)
OPTION = "setsockopt"  # of which the filter leaves SO_LINGER to us
LINGER_BYTES = 8  # struct linger: int l_onoff; int l_linger, in seconds
UNDER_WAY = (1, 2)  # states of a connection, linux/tcp_states.h: TCP_ESTABLISHED, TCP_SYN_SENT
SOCKADDR_BYTES = 128  # struct sockaddr_storage
SO_OOBINLINE, SO_PEEK_OFF, SCM_MAX_FD = 10, 42, 253  # asm-generic/socket.h, net/scm.h
PIDFD_THREAD = os.O_EXCL  # linux/pidfd.h
MESSAGES_WAITING, LINE_BYTES = 1 << 17, 1 << 16  # of a Unix socket: more than its buffer holds, however large that may be made
WAITING = 64  # connects of one call that are under way at once

FAMILIES = {
    **{0: "AF_UNSPEC", 1: "AF_UNIX", 2: "AF_INET", 10: "AF_INET6", 16: "AF_NETLINK", 17: "AF_PACKET", 29: "AF_CAN"},
    **{30: "AF_TIPC", 31: "AF_BLUETOOTH", 38: "AF_ALG", 40: "AF_VSOCK", 44: "AF_XDP"},
}
KINDS = {1: "SOCK_STREAM", 2: "SOCK_DGRAM", 3: "SOCK_RAW", 4: "SOCK_RDM", 5: "SOCK_SEQPACKET", 6: "SOCK_DCCP"}
TYPE_MASK = 0xF
FLAGS = _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
IPPROTO_TCP = 6

ONLY_TCP = "only TCP can be had"
WAKE = signal.SIGUSR1  # what our threads are interrupted by
REASONS = {
    BIND: "a plugin cannot listen, nor choose its own address",
    LISTEN: "a plugin cannot listen",
    **dict.fromkeys(("sendto", *MESSAGES), "data goes only over a connection that was made before"),
}


class Wanted:
    """What a plugin wants of the network: an operation, and where to, as far as that could be read."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.family = ""
        self.kind = ""
        self.address = ""
        self.port = 0
        self.allowed = False
        self.reason = REASONS.get(operation, "")
        self.is_passing = False  # what C libraries try without anybody's will: no violation
        self.is_error = False  # what the kernel answers to everybody: none either
        self.is_counted = False  # one of max_network_requests
        self.is_excess = False  # one more than those

    def fields(self) -> dict[str, object]:
        return {
            "operation": self.operation,
            "family": self.family,
            "kind": self.kind,
            "address": self.address,
            "port": self.port,
            "allowed": int(self.allowed),
            "reason": self.reason,
            "passing": int(self.is_passing),
            "counted": int(self.is_counted),
            "excess": int(self.is_excess),
        }


class Connect:
    """One connect(2) that is under way. Compared by identity: it is held in sets."""

    def __init__(self, sock: _socket.socket, notification: notifier.Notification) -> None:
        self.sock = sock
        self.notification = notification
        self.thread = 0  # in which it waits
        self.lock = _thread.allocate_lock()
        self.is_over = False

    def interrupt(self) -> None:
        """Let it end by EINTR where a signal waits to be handled; the connection itself goes on, as connect(2) says."""
        if has_signal(self.notification.pid):
            with self.lock:
                if self.thread and not self.is_over:  # which is set before the thread ends
                    signal.pthread_kill(self.thread, WAKE)

    def ends(self) -> None:
        with self.lock:
            self.is_over = True


class Sockets:
    """The sockets of one sandbox. `network` is the recipe's, `resolved` the addresses of the names in it."""

    def __init__(self, network: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
        self.access = access.Access(network["access"], resolved)
        self.cut: access.Access | None = None  # what could be reached, until the sandbox was cut off
        self.most = int(network["max_requests"])
        self.can_make = bool(network["sockets"])
        self.operations = {sc.number(name): name for name in (OPERATIONS if self.can_make else (SOCKET,))}
        self.option = sc.number(OPTION)
        self.requests: dict[int, int] = {}  # connections per call
        self.counting = _thread.allocate_lock()
        self.is_apart = False  # whether we have left the host's network, or never need to
        self.waiting: dict[int, set[Connect]] = {}  # those under way, by call
        self.late: set[Connect] = set()  # those under way whose call has ended

    def handle(self, listener: int, notification: notifier.Notification, call: int, tell: Callable[[Wanted], bool]) -> bool:
        """Answer it if it is one of ours, else False. `tell` is called before the answer: False if a refusal is to wait."""
        if notification.nr == self.option:
            linger(listener, notification)
            return True
        operation = self.operations.get(notification.nr)
        if operation is None:
            return False
        wanted = Wanted(operation)
        refusal = errno.EPERM
        sock: _socket.socket | None = None
        try:
            if operation == SOCKET:
                sock = self._make(wanted, notification)
            else:
                self._where(wanted, notification)
                # How libraries find out whether this machine has IPv6, and do without.
                wanted.is_passing = operation == BIND and not wanted.port
                if operation == CONNECT:
                    sock = self._connectable(wanted, notification, call)
        except OSError as error:  # as the kernel answers it to everybody
            refusal = error.errno or errno.EPERM
            wanted.allowed, wanted.is_error = False, True
            wanted.reason = error.strerror or "it cannot be had"
        if not notifier.is_valid(listener, notification):
            return True  # its caller has died, and what was read was perhaps another's
        is_answered = tell(wanted)
        if sock is None and not is_answered:
            return True
        if sock is None:
            notifier.refuse(listener, notification, refusal)
        elif operation == SOCKET:
            self._hand_in(listener, notification, sock)
        else:
            self._connect(listener, notification, sock, wanted, call)
        return True

    def ended(self, call: int) -> None:
        """Nobody waits for its connects any more: they end as well, instead of when the network has given them up."""
        self.requests.pop(call, None)
        self.late |= self.waiting.pop(call, set())
        self.hurry()

    def cut_off(self, pids: list[int], trusted: Set[int] = frozenset()) -> int:
        """Nothing may be connected any more, and what the processes `pids` and those below them have connected is shut down,
        wherever they keep it; returns how many connections. They should stand still meanwhile. Unix sockets that one of the
        processes `trusted` has made are not looked into: messages of ours wait there."""
        self.cut = self.cut or self.access
        self.access = access.Access(None, {})
        self.is_apart = False
        seen: set[int] = set()
        below = (process for pid in pids for process in processes.tree(pid))
        return sum(shut_down(sock, seen, trusted) for process in below for sock in sockets_of(process))

    def are_waiting(self) -> bool:
        """Whether there is something to `hurry`."""
        return bool(self.late) or any(self.waiting.values())

    def hurry(self) -> None:
        """End the connects that are late, and answer those whose thread has a signal to handle.

        One that was only about to begin is not ended: it wants another time.
        """
        for connect in list(self.late):
            try:
                connect.sock.shutdown(_socket.SHUT_RDWR)
            except OSError:
                pass  # it has not begun, or is over
        for under_way in self.waiting.values():
            for connect in list(under_way):
                connect.interrupt()

    # -- socket(2) -------------------------------------------------------------------------------------------------

    def _make(self, wanted: Wanted, notification: notifier.Notification) -> _socket.socket | None:
        """A new one, if it is one for TCP. Raises OSError."""
        family, kind, protocol = (each & 0xFFFFFFFF for each in notification.args[:3])
        wanted.family = FAMILIES.get(family, str(family))
        wanted.kind = KINDS.get(kind & TYPE_MASK, str(kind & TYPE_MASK))
        is_ip = family in access.BITS
        is_tcp = is_ip and kind & ~FLAGS == _socket.SOCK_STREAM and protocol in (0, IPPROTO_TCP)
        if is_tcp and not self.can_make:
            wanted.reason = "sockets are not permitted"  # nobody could read what they are wanted for
            return None
        if is_tcp:
            self._stand_apart()
            sock = _socket.socket(family, kind & ~_socket.SOCK_CLOEXEC, protocol)
            wanted.allowed, wanted.reason = True, "where it may lead to is decided at connect"
            return sock
        wanted.reason = ONLY_TCP
        # getaddrinfo(3) tries these and does without: name servers and routes, nscd, the addresses of this machine.
        is_nscd = wanted.family == "AF_UNIX" and bool(kind & _socket.SOCK_NONBLOCK)
        wanted.is_passing = (is_ip and wanted.kind == "SOCK_DGRAM") or is_nscd or wanted.family == "AF_NETLINK"
        return None

    def _stand_apart(self) -> None:
        """Where nothing may be connected, not even a socket of the host's network is handed in."""
        if not self.is_apart and not self.access.is_open:
            sc.unshare(sc.CLONE_NEWNET)
        self.is_apart = True

    def _hand_in(self, listener: int, notification: notifier.Notification, sock: _socket.socket) -> None:
        try:
            close_on_exec = bool(notification.args[1] & _socket.SOCK_CLOEXEC)
            notifier.hand_in(listener, notification, sock.fileno(), close_on_exec=close_on_exec)
        except OSError as error:
            notifier.refuse(listener, notification, error.errno or errno.EMFILE)
        finally:
            sock.close()

    # -- addresses -------------------------------------------------------------------------------------------------

    def _where(self, wanted: Wanted, notification: notifier.Notification) -> None:
        """Read the address, once. Raises OSError."""
        arguments = notification.args
        if wanted.operation in ADDRESSED:
            pointer, length = (arguments[index] for index in ADDRESSED[wanted.operation])
        elif wanted.operation in MESSAGES:
            header = read_memory(notification.pid, arguments[1], 12)  # struct msghdr: void *msg_name; socklen_t msg_namelen
            pointer, length = int.from_bytes(header[:8], "little"), int.from_bytes(header[8:12], "little")
        else:
            return
        length &= 0xFFFFFFFF
        if not pointer or not length:
            return
        if length > SOCKADDR_BYTES:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._understand(wanted, read_memory(notification.pid, pointer, length))

    def _understand(self, wanted: Wanted, sockaddr: bytes) -> None:
        """struct sockaddr_in, sockaddr_in6, sockaddr_un; raises OSError for one that is too short."""
        family = int.from_bytes(sockaddr[:2], "little")
        wanted.family = FAMILIES.get(family, str(family))
        if family in access.BITS:
            start, end, least = (4, 8, 16) if family == access.AF_INET else (8, 24, 24)
            if len(sockaddr) < least:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            wanted.port = int.from_bytes(sockaddr[2:4], "big")
            wanted.address = access.show((family, int.from_bytes(sockaddr[start:end], "big")))
        elif wanted.family == "AF_UNIX":
            wanted.address = sockaddr[2:].rstrip(b"\0").decode("utf-8", "backslashreplace")

    # -- connect(2) ------------------------------------------------------------------------------------------------

    def _connectable(self, wanted: Wanted, notification: notifier.Notification, call: int) -> _socket.socket | None:
        """The socket that may be connected to what is wanted; None, with the reason, if it may not. Raises OSError."""
        if wanted.family not in ("AF_INET", "AF_INET6"):
            wanted.reason = ONLY_TCP
            return None
        address = access.parse(wanted.address)
        allowed, wanted.reason = (self.cut or self.access).decide(address, wanted.port)
        if allowed and self.cut is not None:
            wanted.is_passing, wanted.reason = True, access.CUT_OFF
        if not allowed or self.cut is not None:
            return None
        sock = socket_of(notification.pid, notification.args[0])
        is_new = not is_under_way(sock)  # else it asks what became of the last request
        if is_new and not self._count(call):
            sock.close()
            wanted.is_excess, wanted.reason = True, f"max_network_requests is {self.most}"
            return None
        refusal = 0
        if sock.family not in access.BITS or sock.type & TYPE_MASK != _socket.SOCK_STREAM:
            refusal = errno.EISCONN  # one of a pair: there are no others
        elif FAMILIES[sock.family] != wanted.family:
            refusal = errno.EAFNOSUPPORT
        elif len(self.waiting.get(call, ())) >= WAITING:
            refusal = errno.ENOBUFS
        if refusal:
            sock.close()
            raise OSError(refusal, os.strerror(refusal))
        wanted.allowed, wanted.is_counted = True, is_new
        return sock

    def _count(self, call: int) -> bool:
        """One connection more; False if there are too many."""
        with self.counting:
            self.requests[call] = min(self.requests.get(call, 0), self.most) + 1
            return self.requests[call] <= self.most

    def _connect(
        self, listener: int, notification: notifier.Notification, sock: _socket.socket, wanted: Wanted, call: int
    ) -> None:
        """connect(2), and its answer, in a thread: it may have to wait, and we must not."""
        under_way = self.waiting.setdefault(call, set())

        def connect() -> None:
            code = errno.EPERM
            try:
                before = sock.getsockname()
                code = connect_to(sock, wanted.address, wanted.port)
                # What was under way may have been ended just then, and begun anew: from another port.
                is_further = not wanted.is_counted and sock.getsockname() != before
                # Or cut off meanwhile, and perhaps before there was something to shut down.
                if not self.access.is_open or (is_further and not self._count(call)):
                    code = errno.EPERM
                    sock.shutdown(_socket.SHUT_RDWR)
            except OSError:
                pass  # it is not connected, or cannot be
            finally:
                this.ends()
                sock.close()
                under_way.discard(this)
                self.late.discard(this)
                if code:
                    notifier.refuse(own, notification, code)
                else:
                    notifier.answer(own, notification)
                os.close(own)

        this, own = Connect(sock, notification), -1
        under_way.add(this)
        try:
            own = os.dup(listener)  # it stays ours also when the call has ended meanwhile
            with this.lock:
                this.thread = _thread.start_new_thread(connect, ())
        except (OSError, RuntimeError):  # no further descriptor, no further thread
            under_way.discard(this)
            sock.close()
            if own >= 0:
                os.close(own)
            notifier.refuse(listener, notification, errno.ENOBUFS)


def connect_to(sock: _socket.socket, address: str, port: int) -> int:
    """connect(2); returns its errno, or 0. A signal interrupts it, and what becomes of the connection then can be asked of the
    socket, once: connect_ex() would wait on, and ask."""
    host, wide = _socket.inet_pton(sock.family, address), sock.family == _socket.AF_INET6
    start = sock.family.to_bytes(2, sys.byteorder) + port.to_bytes(2, "big")
    name = start + (bytes(4) + host + bytes(4) if wide else host + bytes(8))  # struct sockaddr_in6, sockaddr_in
    return native.get_errno() if _connect(sock.fileno(), name, len(name)) else 0


_connect = native.Program().waiting("connect")


def linger(listener: int, notification: notifier.Notification) -> None:
    """setsockopt(2) of SO_LINGER, read once and carried out here: socket(7). A time to wait is refused."""
    descriptor, _, _, pointer, length = notification.args[:5]
    refusal = errno.EPERM
    try:
        if length & 0xFFFFFFFF < LINGER_BYTES:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        value = read_memory(notification.pid, pointer, LINGER_BYTES)
        if not any(value[:4]) or not any(value[4:]):
            sock = socket_of(notification.pid, descriptor)
            try:
                if notifier.is_valid(listener, notification):
                    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, value)
            finally:
                sock.close()
            notifier.answer(listener, notification)
            return
    except OSError as error:
        refusal = error.errno or errno.EPERM
    notifier.refuse(listener, notification, refusal)


def is_under_way(sock: _socket.socket) -> bool:
    """Whether it is connected, or about to be."""
    try:
        return sock.getsockopt(IPPROTO_TCP, _socket.TCP_INFO, 1)[0] in UNDER_WAY
    except OSError:
        return False  # no TCP


def has_signal(thread: int) -> bool:
    """Whether a thread has a signal that it does not block and wants to handle, see proc_pid_status(5)."""
    masks = {}
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            for line in file:
                name, _, value = line.partition(b":")
                if name in (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigCgt"):
                    masks[name] = int(value, 16)
    except OSError:
        return False  # it has ended
    pending = masks.get(b"SigPnd", 0) | masks.get(b"ShdPnd", 0)
    return bool(pending & ~masks.get(b"SigBlk", 0) & masks.get(b"SigCgt", 0))


def read_memory(pid: int, address: int, length: int) -> bytes:
    """Bytes of the memory of a thread, see proc_pid_mem(5). Raises OSError: EFAULT where there is none."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, length, address)
    except (OverflowError, OSError):
        data = b""
    finally:
        os.close(fd)
    if len(data) < length:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return data


def socket_of(pid: int, fd: int) -> _socket.socket:
    """The socket that a thread has under the number `fd`. Raises OSError: EBADF, ENOTSOCK."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        process = os.pidfd_open(leader_of(pid))  # a thread that is not its process's first
    try:
        copy = sc.syscall("pidfd_getfd", process, fd & 0xFFFFFFFF, 0)
    finally:
        os.close(process)
    try:
        return _socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def sockets_of(pid: int) -> Iterator[_socket.socket]:
    """Every socket of a process, once for each descriptor. A thread may have descriptors of its own (CLONE_FILES)."""
    try:
        threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return  # it has ended
    for thread in threads:
        try:
            process = os.pidfd_open(thread, PIDFD_THREAD if thread != pid else 0)
        except OSError:
            continue  # it has ended; EINVAL before Linux 6.9
        try:
            for name in os.listdir(f"/proc/{pid}/task/{thread}/fd"):
                try:
                    if os.readlink(f"/proc/{pid}/task/{thread}/fd/{name}").startswith("socket:"):
                        yield _socket.socket(fileno=sc.syscall("pidfd_getfd", process, int(name), 0))
                except OSError:
                    continue  # closed meanwhile
        except OSError:
            continue  # it is not ours to read, and has no sockets then, or it has ended
        finally:
            os.close(process)


def maker_of(sock: _socket.socket) -> int:
    """The process that has made a pair of Unix sockets (SO_PEERCRED, unix(7)); 0 where there is none, or none to be seen."""
    return int.from_bytes(sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def shut_down(sock: _socket.socket, seen: set[int], trusted: Set[int]) -> int:
    """Shut a TCP socket down, for all who have it, and those that lie in messages of a Unix socket; closes ours. Returns how
    many were connected, or about to be. `seen` are the inodes of those that were looked at before; `trusted`: see `cut_off`."""
    try:
        inode = os.fstat(sock.fileno()).st_ino
        if inode in seen:
            return 0
        seen.add(inode)
        if sock.family == _socket.AF_UNIX:
            return 0 if maker_of(sock) in trusted else sum(shut_down(each, seen, trusted) for each in in_flight(sock))
        connected = is_under_way(sock)
        sock.shutdown(_socket.SHUT_RDWR)
        return connected
    except OSError:
        return 0  # it is not connected
    finally:
        sock.close()


def in_flight(sock: _socket.socket) -> Iterator[_socket.socket]:
    """The sockets in messages that a Unix socket has not received yet: unix(7), SO_PEEK_OFF in socket(7).

    What is in a stream stays there. A message that was sent with MSG_OOB is passed over by who looks, unless it counts as one
    of the others. So is a packet without a byte that somebody has looked at before: packets are taken out, and lost to who
    waits for them. Where messages have no end the sandbox has one.
    """
    look = _socket.MSG_PEEK if sock.type == _socket.SOCK_STREAM else 0
    is_inline = sock.getsockopt(_socket.SOL_SOCKET, SO_OOBINLINE)
    sock.setsockopt(_socket.SOL_SOCKET, SO_OOBINLINE, 1)
    sock.setsockopt(_socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        for _ in range(MESSAGES_WAITING):
            flags = look | _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
            data, ancillary, _, _ = sock.recvmsg(LINE_BYTES, _socket.CMSG_SPACE(4 * SCM_MAX_FD), flags)
            if not data and not ancillary and sock.type == _socket.SOCK_STREAM:
                return  # its other end has gone
            for _, kind, content in ancillary:
                for start in range(0, len(content) - 3, 4) if kind == _socket.SCM_RIGHTS else ():
                    fd = int.from_bytes(content[start : start + 4], sys.byteorder)
                    try:
                        yield _socket.socket(fileno=fd)
                    except OSError:
                        os.close(fd)  # none
        os._exit(1)
    except BlockingIOError:
        return
    finally:
        sock.setsockopt(_socket.SOL_SOCKET, SO_PEEK_OFF, -1)
        sock.setsockopt(_socket.SOL_SOCKET, SO_OOBINLINE, is_inline)


def process_of(thread: int) -> int:
    """The process that a thread belongs to; its own number where it has just ended."""
    try:
        return leader_of(thread)
    except (OSError, StopIteration):
        return thread


def leader_of(thread: int) -> int:
    with open(f"/proc/{thread}/status", "rb") as file:  # a thread's name may be no text
        return next(int(line.split()[1]) for line in file if line.startswith(b"Tgid:"))
