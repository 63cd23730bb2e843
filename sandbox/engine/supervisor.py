"""The supervisor: answers the seccomp notifications of one sandbox, from outside it.

Two kinds reach it. What has to do with sockets is answered by sandbox.engine.sockets, which makes and connects those that a
plugin may have, and is told to the caller operation by operation. All else the profile refuses, and it is worth a record:
it is refused with EPERM. A refusal is told as a violation; nothing is ever continued, and whoever passes violation_threshold
is not answered any more. A process of its own, so that a flood of notifications starves nothing else. The warden starts it
when the first notification waits: a plugin that is refused nothing, and has no sockets, needs none. When it dies, the warden
kills the sandbox. Must not import anything heavy.
"""

from __future__ import annotations

import _signal as signal
import errno
import os
import select
import sys
from time import time

from sandbox.engine import channel, sockets
from sandbox.ns import privileges
from sandbox.seccomp import notifier

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any, NoReturn

DISTINCT = 256  # different refusals per call that are none of the plugin's making, and are told; offences end it before
HURRY_MS = 100  # between looks at connects whose call has ended, or whose thread has a signal to handle
ANSWERS = 20_000  # to one call, and so many more for each of its network requests: it is our time that they take, not its
ANSWERS_TO_REQUEST = 16
LOGGED = 1000  # new sockets, and other operations, that are told one by one per call; of further ones every power of two is


class Supervisor:
    def __init__(self, warden: _socket.socket, violations: int, threshold: int, own: sockets.Sockets) -> None:
        self.warden = warden
        self.threshold = threshold
        self.sockets = own
        self.violations = channel.from_fd(violations)
        self.violations.setblocking(False)
        # The warden and the caller: between them and a call there are sockets too, which its processes hold.
        self.trusted = {sockets.maker_of(sock) for sock in (self.warden, self.violations)} - {0}
        self.listeners: dict[int, int] = {}  # listener fd -> number of the call
        # How often, by (call, nr, what tells one refusal from another).
        self.records: dict[tuple[int, int, object], int] = {}
        self.offences: dict[int, int] = {}  # different ones per call that are the plugin's making
        self.passing: dict[int, int] = {}  # those that are not
        self.operations: dict[int, int] = {}  # network operations per call
        self.answers: dict[int, int] = {}  # that a call may still have
        self.told: dict[tuple[int, bool], int] = {}  # by call, and whether it was no more than a new socket
        self.poll = select.poll()

    def record(
        self, call: int, notification: notifier.Notification, what: object, more: dict[str, object] | None = None
    ) -> None:
        """Report the 1st, 2nd, 4th, 8th ... of equal refusals: a flood costs the caller nothing."""
        key = call, notification.nr, what
        if key not in self.records:
            counts = self.passing if more is not None and more["passing"] else self.offences
            if counts is self.passing and counts.get(call, 0) >= DISTINCT:
                return
            counts[call] = counts.get(call, 0) + 1
        count = self.records[key] = self.records.get(key, 0) + 1
        if count & (count - 1) == 0:
            fields: dict[str, object] = {"call": call, "nr": notification.nr, "pid": notification.pid, "count": count}
            fields["offences"] = self.offences.get(call, 0)
            fields.update({f"arg{i}": notification.args[i] for i in range(3)})
            self.send("violation", {**fields, **(more or {})})

    def network(self, call: int, notification: notifier.Notification, wanted: sockets.Wanted) -> bool:
        """Tell what the plugin wants of the network, and a refusal as a violation as well; whether to answer."""
        count = self.operations[call] = self.operations.get(call, 0) + 1
        if wanted.is_counted:
            self.answers[call] = self.answers.get(call, ANSWERS) + ANSWERS_TO_REQUEST
        kind = call, wanted.operation == sockets.SOCKET
        number = self.told[kind] = self.told.get(kind, 0) + 1
        if number <= LOGGED or number & (number - 1) == 0 or wanted.is_counted:  # of those there are max_network_requests
            pid = sockets.process_of(notification.pid)
            self.send("network", {"call": call, "pid": pid, "time": time(), "count": count, **wanted.fields()})
        if not wanted.allowed and not wanted.is_error:
            what = wanted.family, wanted.kind, wanted.address, wanted.port, wanted.is_passing
            self.record(call, notification, what, wanted.fields())
        return not self.is_beyond(call)

    def is_beyond(self, call: int) -> bool:
        """Whether its plugin has passed the threshold. The caller kills it, and until then it gets no further."""
        return self.offences.get(call, 0) > self.threshold

    def send(self, kind: str, fields: dict[str, object]) -> None:
        """Where the caller does not read, we wait, and with us the plugin: nothing is lost. The warden's end is ours."""
        while True:
            try:
                channel.send(self.violations, kind, fields)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.violations.fileno(), select.POLLOUT)
                poll.register(self.warden.fileno(), 0)
                if any(fd == self.warden.fileno() for fd, _ in poll.poll()):
                    os._exit(0)
            else:
                return

    def answer(self, listener: int, notification: notifier.Notification) -> None:
        call = self.listeners[listener]
        if self.is_beyond(call):
            return
        left = self.answers[call] = self.answers.get(call, ANSWERS) - 1
        if left >= 0 and self.sockets.handle(
            listener, notification, call, lambda wanted: self.network(call, notification, wanted)
        ):
            return
        self.record(call, notification, notification.args[0] & 0xFFFFFFFF)
        if not self.is_beyond(call):
            notifier.refuse(listener, notification, errno.EPERM)

    def serve(self) -> None:
        self.poll.register(self.warden.fileno(), select.POLLIN)
        while True:
            self.sockets.hurry()
            for fd, event in self.poll.poll(HURRY_MS if self.sockets.are_waiting() else None):
                if fd == self.warden.fileno():
                    instruction, fds = channel.receive_instruction(self.warden, 1)
                    if instruction is None:
                        return
                    if "cut_off" in instruction:
                        ended = self.sockets.cut_off(instruction["cut_off"], self.trusted)  # type: ignore[arg-type]
                        self.send("cut_off", {"call": 0, "connections": ended})
                        continue
                    self.listeners[fds[0]] = int(instruction["call"])  # type: ignore[call-overload]
                    self.poll.register(fds[0], select.POLLIN)
                elif event & select.POLLIN:
                    notification = notifier.receive(fd)
                    if notification is not None:
                        self.answer(fd, notification)
                else:
                    self.forget(fd)

    def forget(self, listener: int) -> None:
        """Every process under the filter has gone."""
        call = self.listeners.pop(listener)
        self.poll.unregister(listener)
        os.close(listener)
        self.sockets.ended(call)
        for counts in (self.operations, self.offences, self.passing, self.answers):
            counts.pop(call, None)
        for is_socket in (True, False):
            self.told.pop((call, is_socket), None)
        for key in [key for key in self.records if key[0] == call]:
            del self.records[key]


def run(
    warden: _socket.socket, violations: int, parent: int, recipe: dict[str, Any], resolved: dict[str, Any], *, is_cut_off: bool
) -> NoReturn:
    """The life of a supervisor, in a fork of the warden. `resolved`: what the names in the recipe's network stand for."""
    try:
        privileges.die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        channel.keep_only([warden.fileno(), violations])
        signal.signal(sockets.WAKE, lambda number, frame: None)
        own = sockets.Sockets(recipe["network"], resolved)
        if is_cut_off:
            own.cut_off([])
        Supervisor(warden, violations, recipe["violation_threshold"], own).serve()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)
