"""NetworkIsolationManager: one network namespace for several sandboxes, and one record of what they want of the network.

Where a connection may go to is each sandbox's own permission, and decided in its supervisor. Must not know plugins.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import weakref

from sandbox import host
from sandbox.config import IsolationConfig, IsolationLevel
from sandbox.engine import channel, client, spawn
from sandbox.errors import ResourceError
from sandbox.ns import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RECORDS = 10_000  # kept; the oldest go
SECONDS = 5.0  # that a holder may take to stand


class Holder:
    """A network namespace, by a descriptor, and the process that it belongs to."""

    def __init__(self, *, has_link: bool) -> None:
        """Raises OSError or ResourceError where it cannot be had."""
        self.made_by = os.getpid()
        self.in_user_namespace = not host.facts().root
        request = client.link_request() if has_link else None
        self.pid, control = spawn.spawn_holder(sys.executable, user_namespace=self.in_user_namespace)
        self.control, self.pidfd = control, -1
        try:
            self.pidfd = os.pidfd_open(self.pid)
            channel.instruct(control, {"link": request})
            poll = select.poll()
            poll.register(control.fileno(), select.POLLIN)
            data, fds, _ = channel.receive_bytes(control, channel.MESSAGE, 1) if poll.poll(SECONDS * 1000) else (b"", [], 0)
            if not fds:
                fields = channel.unpack(data)[1] if data else {}
                raise ResourceError(f"no network namespace can be made: {fields.get('text', 'its process has ended')}")
            self.namespace = fds[0]
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        os.close(self.namespace)
        self._end()

    def _end(self) -> None:
        if os.getpid() != self.made_by:  # a fork, whose parent still has it
            self.control.close()
            client.close_fds([self.pidfd] if self.pidfd >= 0 else [])
            return
        client.hang_up(self.control)
        if self.pidfd >= 0:
            sc.pidfd_send_signal(self.pidfd, signal.SIGKILL)  # it may be stopped
            os.close(self.pidfd)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass  # somebody in this process waits for all children


class NetworkIsolationManager:
    """Gives the sandboxes that it is passed to (`EnhancedPluginSandbox(..., network=manager)`) one network namespace that they
    share, with nothing in it but the loopback and at level maximum an empty link, and records what they want of the network.

    A sandbox without a manager has a network namespace of its own for each call, which is more: share one only where
    something is to be seen or measured together. The calling process stays in its own network.

    Args:
        config: the level decides about the link; with `enable_network_isolation=False` there is nothing to enable.

    Attributes:
        reason: why enable_isolation returned False.

    Raises:
        TypeError: `config` is no IsolationConfig.
    """

    def __init__(self, config: IsolationConfig) -> None:
        if not isinstance(config, IsolationConfig):
            raise TypeError(f"NetworkIsolationManager: config is a {type(config).__name__}: give a IsolationConfig")
        self.config = config
        self.reason = ""
        self._holder: Holder | None = None
        self._dropped: weakref.finalize[..., Any] | None = None
        self._records: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def enable_isolation(self) -> bool:
        """Make the namespace. False, with `reason`, where that cannot be; True also where it is there already."""
        with self._lock:
            if self._holder is not None:
                return True
            if not self.config.enable_network_isolation:
                self.reason = "enable_network_isolation is False"
                return False
            try:
                self._holder = holder = Holder(has_link=self.config.level is IsolationLevel.MAXIMUM)
            except (OSError, ResourceError) as error:
                self.reason = getattr(error, "strerror", None) or str(error)
                return False
            self._dropped = weakref.finalize(self, holder.close)
            self._dropped.atexit = False  # it ends with this process in any case
            self.reason = ""
            return True

    def disable_isolation(self) -> None:
        """Let go of the namespace, if there is one: it vanishes with the last sandbox that is in it, its link at once. So does
        one whose manager nobody has any more."""
        with self._lock:
            if self._holder is not None and self._dropped is not None:
                self._dropped.detach()
                self._holder.close()
                self._holder = None

    def get_network_activity(self) -> list[dict[str, Any]]:
        """What its sandboxes have wanted of the network, oldest first: the last 10,000 records, each as
        EnhancedPluginSandbox.get_network_activity has it, and `sandbox_id`."""
        return list(self._records)

    @property
    def holder(self) -> Holder:
        """Raises RuntimeError where nothing is enabled."""
        if self._holder is None:
            raise RuntimeError("this NetworkIsolationManager has no network: call enable_isolation() first")
        return self._holder

    def record(self, sandbox_id: str, activity: dict[str, Any]) -> None:
        """One operation of a sandbox, from its event loop."""
        self._records.append({**activity, "sandbox_id": sandbox_id})
        del self._records[:-RECORDS]
