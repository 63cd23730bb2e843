"""The supervisor's end of seccomp notifications: receive one, refuse it, or answer it for what was done on its behalf.

A supervisor polls the listener: POLLIN means receive(), POLLHUP that no process is under the filter any more. This
module never lets a notified call continue: its arguments can change between the look and the call, so that would be no
decision (seccomp_unotify(2), "Caveats"). It must not know what the system calls mean; it passes on numbers. Light imports.

Source: linux/seccomp.h.
"""

from __future__ import annotations

import errno as _errno
import fcntl
import os
import struct

_SECCOMP_NOTIF = struct.Struct("=QIIiIQ6Q")  # id, pid, flags; seccomp_data: nr, arch, instruction_pointer, args
_SECCOMP_NOTIF_RESP = struct.Struct("=QqiI")  # id, val, error, flags
_SECCOMP_NOTIF_ADDFD = struct.Struct("=QIIII")  # id, flags, srcfd, newfd, newfd_flags

# SECCOMP_IOWR(0, struct seccomp_notif), SECCOMP_IOWR(1, struct seccomp_notif_resp), SECCOMP_IOW(2, __u64),
# SECCOMP_IOW(3, struct seccomp_notif_addfd)
SECCOMP_IOCTL_NOTIF_RECV = 0xC0502100
SECCOMP_IOCTL_NOTIF_SEND = 0xC0182101
SECCOMP_IOCTL_NOTIF_ID_VALID = 0x40082102
SECCOMP_IOCTL_NOTIF_ADDFD = 0x40182103
SECCOMP_ADDFD_FLAG_SEND = 1 << 1


class Notification:
    """One call that waits for an answer.

    `pid` is the thread that makes it, in the supervisor's PID namespace (0 if it is not visible there); `nr` the system
    call's number on the architecture `arch` (an AUDIT_ARCH_ value); `args` its six arguments, of which pointers are
    addresses in the caller and hostile.
    """

    __slots__ = ("arch", "args", "id", "nr", "pid")

    def __init__(self, id: int, pid: int, nr: int, arch: int, args: tuple[int, ...]) -> None:
        self.id = id
        self.pid = pid
        self.nr = nr
        self.arch = arch
        self.args = args

    def __repr__(self) -> str:
        return f"Notification(id={self.id:#x}, pid={self.pid}, nr={self.nr}, arch={self.arch:#x}, args={self.args})"


def receive(listener: int) -> Notification | None:
    """The next waiting call, or None if its caller died first or a signal came in between: poll again.

    Blocks while there is none, even on a non-blocking descriptor: call it after POLLIN.
    """
    request = bytearray(_SECCOMP_NOTIF.size)  # the kernel insists on zeroes
    try:
        fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, request)
    except OSError as error:
        if error.errno in (_errno.ENOENT, _errno.EINTR):
            return None
        raise
    identifier, pid, _flags, nr, arch, _instruction_pointer, *args = _SECCOMP_NOTIF.unpack(request)
    return Notification(identifier, pid, nr, arch, tuple(args))


def is_valid(listener: int, notification: Notification) -> bool:
    """Whether the call still waits: what was read from /proc/<pid> before that is about the process that made it."""
    try:
        fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, struct.pack("=Q", notification.id))
    except OSError as error:
        if error.errno == _errno.ENOENT:
            return False
        raise
    return True


def refuse(listener: int, notification: Notification, errno: int = _errno.EPERM) -> bool:
    """Let the call fail with `errno`; False if its caller is gone, or has an answer already."""
    if errno <= 0:
        raise ValueError(f"a refusal needs an errno, not {errno}")  # 0 would be an invented success
    return _send(listener, _SECCOMP_NOTIF_RESP.pack(notification.id, 0, -errno, 0))


def _send(listener: int, response: bytes) -> bool:
    while True:
        try:
            fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, response)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in (_errno.ENOENT, _errno.EINPROGRESS):
                return False
            raise
        return True


def answer(listener: int, notification: Notification, value: int = 0) -> bool:
    """Let the call return `value`, for what was done on its behalf; False if its caller is gone, or has an answer already."""
    return _send(listener, _SECCOMP_NOTIF_RESP.pack(notification.id, value, 0, 0))


def hand_in(listener: int, notification: Notification, fd: int, *, close_on_exec: bool) -> bool:
    """Put a copy of `fd` into the caller's process and let the call return its number; False if the caller is gone.

    Raises OSError, and the call still waits: EMFILE where the process may have no further descriptor.
    """
    flags = os.O_CLOEXEC if close_on_exec else 0
    request = _SECCOMP_NOTIF_ADDFD.pack(notification.id, SECCOMP_ADDFD_FLAG_SEND, fd, 0, flags)
    try:
        fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, request)
    except OSError as error:
        if error.errno in (_errno.ENOENT, _errno.EINPROGRESS):
            return False
        raise
    return True
