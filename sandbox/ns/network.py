"""The network side of a sandbox: loopback up, and at MAXIMUM an empty veth whose outer end lies in a helper namespace.

The helper namespace has no process: a netlink socket opened in it keeps it alive, and through that socket links are made.
The host's own network is never touched, neither as root nor rootless. The request is encoded by pyroute2 in
`sandbox.engine.nethelper`, once, and cached: here it only gets the pid of an init patched in.
Must not import pyroute2. Sources: rtnetlink(7), veth(4), network_namespaces(7), netdevice(7).
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os

from sandbox.engine import channel
from sandbox.ns import syscalls as sc

AF_NETLINK = 16
NETLINK_ROUTE = 0
NLMSG_ERROR = 2
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

INNER = "eth0"  # the link's end in the sandbox
COUNTERS = {"rx_bytes": 0, "rx_packets": 1, "tx_bytes": 8, "tx_packets": 9}  # columns of /proc/net/dev

# What nethelper encodes in place of the pid: no pid can be so large (pid_max is at most 2^22).
PID_PLACEHOLDER = 0x7EEDF00D


def visited_namespace() -> _socket.socket | None:
    """What `helper_namespace` returns, by a visit of our own; None where there would be no way back.

    Rootless the host's namespace belongs to a user namespace that is not ours, and supervisors connect from the host's. Whoever
    may go to where it is already may come back. Raises OSError; then we may be anywhere, and must end.
    """
    back = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            sc.setns(back, sc.CLONE_NEWNET)
        except OSError:
            return None
        sc.unshare(sc.CLONE_NEWNET)
        try:
            return _socket.socket(AF_NETLINK, _socket.SOCK_RAW, NETLINK_ROUTE)
        finally:
            sc.setns(back, sc.CLONE_NEWNET)
    finally:
        os.close(back)


def begin_helper() -> tuple[int, int, _socket.socket]:
    """Start what `helper_namespace` waits for: a child, as pid, pidfd and socket, that goes there and hands a socket back."""
    here, there = channel.pair()
    pid, pidfd = sc.clone3(sc.CLONE_NEWNET)
    if pid == 0:
        try:
            made = _socket.socket(AF_NETLINK, _socket.SOCK_RAW, NETLINK_ROUTE)
            channel.send_bytes(there, b"link", [made.fileno()])
        except OSError as error:
            channel.send_bytes(there, str(error.errno).encode())
        finally:
            os._exit(0)
    there.close()
    return pid, pidfd, here


def helper_namespace(pid: int, pidfd: int, here: _socket.socket) -> _socket.socket:
    """A netlink socket in a new network namespace that it alone keeps alive: the place of the outer ends."""
    said, fds, _ = channel.receive_bytes(here, 16, 1)
    here.close()
    os.close(pidfd)
    os.waitpid(pid, 0)
    if not fds:
        code = int(said or errno.ENOTRECOVERABLE)
        raise OSError(code, os.strerror(code) if said else "its maker has died")
    link_socket = _socket.socket(AF_NETLINK, _socket.SOCK_RAW, NETLINK_ROUTE, fds[0])
    os.set_inheritable(link_socket.fileno(), False)
    return link_socket


def add_link(link_socket: _socket.socket, request: bytes, pid: int) -> None:
    """Send the cached RTM_NEWLINK request with the network namespace of `pid` as the place of the inner end."""
    placeholder = PID_PLACEHOLDER.to_bytes(4, "little")
    if request.count(placeholder) != 1:
        raise ValueError("the cached link request is damaged")
    link_socket.send(request.replace(placeholder, pid.to_bytes(4, "little")))
    answer = link_socket.recv(4096)
    kind = int.from_bytes(answer[4:6], "little")
    code = -int.from_bytes(answer[16:20], "little", signed=True)
    if kind != NLMSG_ERROR or code:
        raise OSError(code, os.strerror(code), "veth")


def counters() -> dict[str, int]:
    """What has gone over the inner end of the link (proc_pid_net(5)); nothing where there is no /proc."""
    try:
        with open("/proc/self/net/dev") as file:
            values = next(line.split()[1:] for line in file if line.lstrip().startswith(INNER + ":"))
    except (OSError, StopIteration):
        return {}
    return {name: int(values[column]) for name, column in COUNTERS.items()}


def set_up(name: str) -> None:
    """Bring the interface `name` of this network namespace up (netdevice(7))."""
    _set_flags(name, up=True)


def set_down(name: str) -> bool:
    """Take it down; False where there is none. Raises OSError."""
    try:
        _set_flags(name, up=False)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return False
    return True


def _set_flags(name: str, *, up: bool) -> None:
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        request = name.encode().ljust(16, b"\0") + bytes(24)
        flags = int.from_bytes(fcntl.ioctl(control.fileno(), SIOCGIFFLAGS, request)[16:18], "little")
        flags = flags | IFF_UP if up else flags & ~IFF_UP
        fcntl.ioctl(control.fileno(), SIOCSIFFLAGS, request[:16] + flags.to_bytes(2, "little") + bytes(22))
    finally:
        control.close()
