"""How the command and the zygote that the script `psie` has started beside it find each other: both sides of it.

The zygote listens as its first act, long before it has imported what it needs: what it is to set up can wait in the socket.
An abstract name of a socket is anyone's (unix(7)), so both look at who the other is. Must be light.
"""

from __future__ import annotations

import _socket
import errno
import os
import select

from sandbox.engine import channel

BACKLOG = 16  # connections that wait
SO_PEERPIDFD = 77  # asm-generic/socket.h, from Linux 6.5 on


def place(caller: int) -> bytes:
    """The name at which the zygote of the process `caller` listens."""
    return b"\0psie %d" % caller


def peer(sock: _socket.socket) -> tuple[int, int]:
    """pid and uid of the process at the other end, or of the one that had listened there."""
    found = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    return int.from_bytes(found[:4], "little"), int.from_bytes(found[4:8], "little")


def has_listened(sock: _socket.socket, pid: int, pidfd: int) -> bool:
    """Whether this process has, at the other end. Its number alone does not say so: a socket outlives who has listened there,
    who can know which process will have that number next."""
    number, uid = peer(sock)
    if number != pid:
        return False
    try:
        fd = sock.getsockopt(_socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return uid == os.geteuid()  # at least nobody else's
        if error.errno in (errno.EINVAL, errno.ESRCH):
            return False  # it has died
        raise
    try:
        return os.fstat(fd).st_ino == os.fstat(pidfd).st_ino  # from 6.9 on of one process only: pidfd_open(2)
    finally:
        os.close(fd)


def listen(caller: int) -> _socket.socket:
    """The zygote's side. Raises OSError where somebody else is in that place."""
    listener = channel.from_fd()
    listener.bind(place(caller))
    listener.listen(BACKLOG)
    return listener


def accept(listener: _socket.socket, caller: int, pidfd: int) -> _socket.socket | None:
    """The zygote's socket to the process `caller`; None if that has gone. Nobody else is listened to."""
    poll = select.poll()
    for fd in (pidfd, listener.fileno()):
        poll.register(fd, select.POLLIN)
    while pidfd not in dict(poll.poll()):
        fd, _ = listener._accept()  # type: ignore[attr-defined]  # socket.socket has it by another name
        sock = channel.from_fd(fd)
        if peer(sock)[0] == caller:  # which lives, and lived when this came
            return sock
        sock.close()
    return None


def connect(zygote: int, pidfd: int) -> _socket.socket | None:
    """The caller's socket to its zygote; None as long as that is not there."""
    sock = channel.from_fd()
    sock.setblocking(False)
    try:
        sock.connect(place(os.getpid()))
        if has_listened(sock, zygote, pidfd):
            sock.setblocking(True)
            return sock
    except (ConnectionRefusedError, BlockingIOError):  # it is not there yet, or others stand before us
        pass
    sock.close()
    return None
