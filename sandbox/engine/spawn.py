"""Starting a zygote, which can begin before anybody knows a recipe, and what it is told first. And a holder, in the same way.

The command line starts one as its first act, or has one started beside it, tells it what to set up as soon as it has a recipe,
and imports the rest meanwhile. Must be light.
"""

from __future__ import annotations

import _signal as signal
import _socket
import fcntl
import os
import select
import sys
from time import monotonic

from sandbox.engine import channel, meeting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from sandbox.recipe_data import Recipe

# util-linux; C programs, because an interpreter more would cost 10 ms
UNSHARE, NSENTER = "/usr/bin/unshare", "/usr/bin/nsenter"
MEETING = 1  # milliseconds between two attempts to reach a zygote
MEETING_SECONDS = 5.0  # until it is not waited for: it has been stopped, or strangers stand before it all the time
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


def settings(
    recipe: Recipe,
    modules: Sequence[str],
    *,
    spare: bool = False,
    single: bool = False,
    calls: Mapping[str, int] | None = None,
) -> dict[str, object]:
    """What a zygote prepares once.

    With `spare` it always has a warden ready for the next sandbox; with `single` there will be one sandbox, whose warden
    it is itself. `calls` are the numbers of system calls that it need not look up.
    """
    return {
        "path": recipe.interpreter["path"],
        "prefix": recipe.interpreter["prefix"],
        "modules": [*modules, *(["sandbox.engine.modules"] if any(recipe.modules.values()) else []), *recipe.preload],
        "environment": recipe.environment,
        "link": recipe.network["mode"] == "veth",
        "template": recipe.template,
        "spare": spare,
        "single": single,
        "calls": dict(calls or {}),
    }


class Early:
    """A zygote of the command's that is on its way before anybody knows a recipe."""

    def __init__(self, pid: int, control: _socket.socket | None = None, *, outer: bool) -> None:
        """Raises OSError if it is gone already."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.control = control
        self.outer = outer  # whether it is in an outer user namespace
        self.is_set_up = False

    def is_there(self) -> bool:
        """Whether it listens by now; then there is a control socket."""
        if self.control is None:
            self.control = meeting.connect(self.pid, self.pidfd)
        return self.control is not None

    def set_up(self, settings: dict[str, object]) -> None:
        """Tell it, if it listens already, what to do as soon as it is ready."""
        if not self.is_there():
            return
        assert self.control is not None
        fd = channel.in_memory(settings)
        try:
            channel.instruct(self.control, {}, [fd])
            self.is_set_up = True
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died, which shows
        finally:
            os.close(fd)

    def connection(self) -> _socket.socket | None:
        """The control socket, as soon as there is one; None if it has died, or does not come."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        end = monotonic() + MEETING_SECONDS
        while not self.is_there() and monotonic() < end and not poll.poll(MEETING):
            pass
        return None if poll.poll(0) else self.control

    def leave(self) -> None:
        """It is not the one that is needed."""
        if self.control is not None:
            self.control.close()
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
