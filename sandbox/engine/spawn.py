"""Starting a zygote: the one thing that can begin before anybody knows a recipe. And a holder, in the same way.

The command line starts one as its first act and imports the rest while the new interpreter comes up. Must be light.
"""

from __future__ import annotations

import _signal as signal
import _socket
import fcntl
import os
import select
import sys

from sandbox.engine import channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# util-linux; C programs, because an interpreter more would cost 10 ms
UNSHARE, NSENTER = "/usr/bin/unshare", "/usr/bin/nsenter"
BACKLOG = 16  # connections that wait
STRANGERS = 1000  # of whom nothing is wanted, and after whom the zygote is not waited for
FIRST_FREE = 10  # fds of ours that posix_spawn shall copy lie above those it copies to
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def spawn_zygote(executable: str, *, outer_user_namespace: bool, beside: int = 0) -> tuple[int, _socket.socket]:
    """(pid, control socket) of a new zygote. An outer user namespace is a new one, or that of the process `beside`.

    Raises FileNotFoundError if util-linux is missing.
    """
    wrapper: list[str] = []
    if outer_user_namespace and beside:
        wrapper = [NSENTER, f"--user=/proc/{beside}/ns/user", "--preserve-credentials"]
    elif outer_user_namespace:
        wrapper = [UNSHARE, "--user", "--map-root-user"]
    return _spawn([*wrapper, executable], "zygote")


def spawn_holder(executable: str, *, user_namespace: bool) -> tuple[int, _socket.socket]:
    """(pid, control socket) of a new holder (sandbox.engine.holder). Raises FileNotFoundError if util-linux is missing."""
    wrapper = [UNSHARE, "--net", *(["--user", "--map-root-user"] if user_namespace else [])]
    return _spawn([*wrapper, executable], "holder")


def _spawn(command: list[str], module: str) -> tuple[int, _socket.socket]:
    """(pid, control socket) of a Python that runs a module of the engine, with nothing but its two fds and /dev/null.

    With PSIE_DEBUG in the environment its errors go to our stderr.
    """
    control, inside = channel.pair()
    code = (
        f"import gc, sys; gc.disable(); sys.path[:0] = {[ROOT, *sys.path]!r}; from sandbox.engine.{module} import main; main()"
    )
    arguments = [*command, "-I", "-S", "-c", code]
    high: list[int] = []  # of control socket and caller, where posix_spawn does not overwrite them
    try:
        high.append(fcntl.fcntl(inside.fileno(), fcntl.F_DUPFD_CLOEXEC, FIRST_FREE))
        caller = os.pidfd_open(os.getpid())
        try:
            high.append(fcntl.fcntl(caller, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE))
        finally:
            os.close(caller)
        actions: list[tuple[Any, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
        ]
        if not os.environ.get("PSIE_DEBUG"):
            actions.append((os.POSIX_SPAWN_DUP2, 0, 2))
        # Signals that the caller blocks or ignores would be blocked or ignored in every worker.
        pid = os.posix_spawn(arguments[0], arguments, ENVIRONMENT, file_actions=actions, setsigmask=(), setsigdef=SIGNALS)
    except BaseException:
        control.close()
        raise
    finally:
        inside.close()
        for fd in high:
            os.close(fd)
    return pid, control


class Early:
    """A zygote of the command's that is on its way before anybody knows a recipe."""

    def __init__(self, pid: int, control: _socket.socket | None = None, *, outer: bool) -> None:
        """Raises OSError if it is gone already."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.control = control
        self.outer = outer  # whether it is in an outer user namespace
        self.listener: _socket.socket | None = None

    def listen(self) -> bool:
        """Be where it looks for us, if nobody else is."""
        self.listener = channel.from_fd()
        try:
            self.listener.bind(channel.meeting_point(os.getpid()))
            self.listener.listen(BACKLOG)
        except OSError:
            return False
        return True

    def connection(self) -> _socket.socket | None:
        """The control socket, as soon as there is one; None if it has died. Nobody else is listened to."""
        if self.listener is None:
            return self.control
        poll = select.poll()
        for fd in (self.pidfd, self.listener.fileno()):
            poll.register(fd, select.POLLIN)
        for _ in range(STRANGERS):
            if self.pidfd in dict(poll.poll()):
                break
            fd, _ = self.listener._accept()  # type: ignore[attr-defined]  # socket.socket has it by another name
            sock = channel.from_fd(fd)
            if channel.peer(sock) == self.pid:
                self.control = sock
                break
            sock.close()
        self.listener.close()
        return self.control

    def leave(self) -> None:
        """It is not the one that is needed."""
        for sock in (self.control, self.listener):
            if sock is not None:
                sock.close()
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # SIGCHLD is ignored
        os.close(self.pidfd)


def promised() -> Early | None:
    """The zygote that the script `psie` has started, as a child of what has become this process."""
    pid, _, wrapper = os.environ.pop("PSIE_ZYGOTE", "").partition(" ")
    try:
        if not pid.isdecimal() or os.waitpid(int(pid), os.WNOHANG)[0]:
            return None
        return Early(int(pid), outer=bool(wrapper))
    except OSError:
        return None  # it has ended, or is no child of ours
