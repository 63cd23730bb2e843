"""The clock of a call, which its host and the warden have together: a timer of the kernel's (timerfd_create(2)).

The host sets it when a job is on its way; that is one system call, and wakes nobody. The warden is woken by it only when a call
has lasted for a while, which most do not, and reads from it when the call has begun. So no message tells of that which could
come late, or never: whatever becomes of the caller, the kernel keeps the time.
"""

from __future__ import annotations

import os
from time import monotonic

from sandbox.ns import syscalls as sc

FIRST_LOOK = 0.1  # seconds after which the warden is woken, or the time that a call may take, if that is less
INTERVAL = 1 << 30  # seconds until it would be woken again: by what is left of them it knows when it was set


class Clock:
    """One end. Raises OSError where there is no descriptor left."""

    def __init__(self, seconds: float, fd: int | None = None) -> None:
        """`seconds` is what a call may take; `fd` that of the other end, which is ours from now on."""
        self.fd = sc.timerfd_create() if fd is None else fd
        self.first_look = min(seconds, FIRST_LOOK)

    def begin(self) -> None:
        """The worker has something to do from now on."""
        sc.timerfd_settime(self.fd, monotonic() + self.first_look, INTERVAL)

    def rest(self) -> None:
        """It has nothing to do."""
        sc.timerfd_settime(self.fd, 0)

    def has_struck(self) -> bool:
        """Whether this is the first look at what is done now."""
        try:
            return bool(os.read(self.fd, 8))
        except BlockingIOError:
            return False  # it has been set anew meanwhile

    def began(self) -> float | None:
        """When the worker was given what it does now, by CLOCK_MONOTONIC; None if that is nothing."""
        left = sc.timerfd_gettime(self.fd)
        if not left:
            return None
        return monotonic() + left - self.first_look - (INTERVAL if left > self.first_look else 0)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
