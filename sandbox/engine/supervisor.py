"""The supervisor: answers the seccomp notifications of one sandbox, from outside it.

Every call that reaches it is one that the profile refuses and that is worth a record: it is refused with EPERM and told
to the caller as a violation; nothing is ever continued. A process of its own, so that a flood of notifications starves
nothing else. The warden starts it when the first notification waits: a plugin that is refused nothing needs none. When it
dies, the warden kills the sandbox. Must not import anything heavy.
"""

from __future__ import annotations

import errno
import os
import select
import sys

from sandbox.engine import channel
from sandbox.ns import privileges
from sandbox.seccomp import notifier

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import NoReturn

DISTINCT = 256  # different refused calls that are reported per call; the rest is counted under the last of them


class Record:
    """How often one system call with the same first argument was refused in one call."""

    def __init__(self) -> None:
        self.count = 0


class Supervisor:
    def __init__(self, warden: _socket.socket, violations: int) -> None:
        self.warden = warden
        self.violations = channel.from_fd(violations)
        self.violations.setblocking(False)
        self.listeners: dict[int, int] = {}  # listener fd -> number of the call
        self.records: dict[tuple[int, int, int], Record] = {}  # (call, nr, first argument)
        self.poll = select.poll()

    def record(self, call: int, notification: notifier.Notification) -> None:
        """Report the 1st, 2nd, 4th, 8th ... of equal refusals: a flood costs the caller nothing."""
        first = notification.args[0] & 0xFFFFFFFF
        key = call, notification.nr, first
        if key not in self.records and sum(known[0] == call for known in self.records) >= DISTINCT:
            key = call, -1, 0
        record = self.records.setdefault(key, Record())
        record.count += 1
        if record.count & (record.count - 1) == 0:
            self.report(key, record, notification)

    def report(self, key: tuple[int, int, int], record: Record, notification: notifier.Notification) -> None:
        fields = {"call": key[0], "nr": key[1], "pid": notification.pid, "count": record.count}
        fields.update({f"arg{i}": notification.args[i] for i in range(3)})
        try:
            channel.send(self.violations, "violation", fields)
        except BlockingIOError:
            pass  # the caller does not read: the next power of two tells the sum

    def serve(self) -> None:
        self.poll.register(self.warden.fileno(), select.POLLIN)
        while True:
            for fd, event in self.poll.poll():
                if fd == self.warden.fileno():
                    instruction, fds = channel.receive_instruction(self.warden, 1)
                    if instruction is None:
                        return
                    self.listeners[fds[0]] = int(instruction["call"])  # type: ignore[call-overload]
                    self.poll.register(fds[0], select.POLLIN)
                elif event & select.POLLIN:
                    notification = notifier.receive(fd)
                    if notification is not None:
                        self.record(self.listeners[fd], notification)
                        notifier.refuse(fd, notification, errno.EPERM)
                else:
                    self.forget(fd)

    def forget(self, listener: int) -> None:
        """Every process under the filter has gone."""
        call = self.listeners.pop(listener)
        self.poll.unregister(listener)
        os.close(listener)
        for key in [key for key in self.records if key[0] == call]:
            del self.records[key]


def run(warden: _socket.socket, violations: int, parent: int) -> NoReturn:
    """The life of a supervisor, in a fork of the warden."""
    try:
        privileges.die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        channel.keep_only([warden.fileno(), violations])
        Supervisor(warden, violations).serve()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)
