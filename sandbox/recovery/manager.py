"""SandboxRecoveryManager: recovery on request, for the violations of this process's sandboxes.

Must not know how a measure works: sandbox.recovery.measures does.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from datetime import UTC, datetime

from sandbox import sandbox as sandboxes
from sandbox.config import IsolationConfig
from sandbox.integrations import observers
from sandbox.violations import SandboxViolation, SandboxViolationType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.sandbox import EnhancedPluginSandbox

# What is over with the sandbox: nothing of it is left that could use too much, or run too long.
CONTAINED = (SandboxViolationType.RESOURCE_EXCEEDED, SandboxViolationType.EXECUTION_TIMEOUT)


class SandboxRecoveryManager:
    """Automatic recovery and rollback management.

    Args:
        config: auto_recovery_enabled, violation_threshold and quarantine_on_violation count; None: the defaults.
        state_folder: where quarantines are kept; None: psie's own.

    Raises:
        TypeError: `config` is no IsolationConfig.
    """

    def __init__(self, config: IsolationConfig | None = None, *, state_folder: str | os.PathLike[str] | None = None) -> None:
        if config is not None and not isinstance(config, IsolationConfig):
            raise TypeError(f"SandboxRecoveryManager: config is a {type(config).__name__}: give an IsolationConfig")
        self.config = config if config is not None else IsolationConfig()
        self.state_folder = state_folder
        self._history: list[dict[str, Any]] = []
        self._violations: Counter[str] = Counter()  # seen, by sandbox
        self._handled: list[SandboxViolation] = []
        self._taken: dict[str, int] = {}  # how many steps of a sandbox's history were looked at for ours

    async def auto_recovery_violation(self, violation: SandboxViolation) -> bool:
        """Attempt automatic recovery from a violation: what is done depends on what has happened.

        memory: the plugin stands still, what can be taken back is (memory.high, memory.reclaim), and it goes on; its limit
        ends it if it grows further. CPU: a fourth of its limit, and last in the queue, for 5 s. Processes: no further one, as
        long as its calls run. Files, and what they take of the disk: changes in allowed directories are discarded, when the
        calls that run have ended. Network: cut off for the rest of the sandbox's life. Time: SIGTERM, a grace period of 1 s
        at most, SIGKILL. Anything else: it stands still while evidence is kept, and is killed. So it is for every further
        violation of a sandbox beyond violation_threshold, and then its plugin is quarantined, with quarantine_on_violation:
        the one whose call it is of, or, where that is not known, the only one that has run there.

        Args:
            violation: one of a sandbox of this process, as its `details["sandbox_id"]` says; auto_recovery_attempted and
                resolved are set in it.

        Returns:
            True if it worked. Where the sandbox is closed, whether that has put an end to it: for RESOURCE_EXCEEDED and
            EXECUTION_TIMEOUT. False, without anything done, if auto_recovery_enabled is False.

        Raises:
            TypeError: `violation` is no SandboxViolation.
            ResourceError: a quarantine cannot be stored.
        """
        if not isinstance(violation, SandboxViolation):
            kind = type(violation).__name__
            raise TypeError(f"auto_recovery_violation: a {kind} is no violation: give one of sandbox.get_violations()")
        sandbox_id = str(violation.details.get("sandbox_id", ""))
        if not self.config.auto_recovery_enabled:
            return self._tell(violation, "none", False, "auto_recovery_enabled is False")
        sandbox = sandboxes.live.get(sandbox_id)
        self._handled.append(violation)
        self._violations[sandbox_id] += 1
        is_beyond = self._violations[sandbox_id] > self.config.violation_threshold
        before = len(sandbox.get_recovery_history()) if sandbox is not None else 0
        working = sandbox._recover(violation, end=is_beyond) if sandbox is not None else None
        if sandbox is None or working is None:
            violation.auto_recovery_attempted, violation.resolved = True, violation.type in CONTAINED
            note = "contained: the sandbox is gone" if violation.resolved else "the sandbox is gone: nothing is left to act on"
            return self._tell(violation, "none", violation.resolved, note)
        worked = await asyncio.wrap_future(working)
        steps = sandbox.get_recovery_history()
        self._history += steps[max(before, self._taken.get(sandbox_id, 0)) :]
        self._taken[sandbox_id] = len(steps)
        if is_beyond and self.config.quarantine_on_violation:
            await asyncio.to_thread(self._escalate, sandbox, violation)
        return worked

    def _escalate(self, sandbox: EnhancedPluginSandbox, violation: SandboxViolation) -> None:
        plugin_id = sandbox._plugin_of(violation)
        if not plugin_id:
            note = "nobody can tell whose violation it is: several plugins have run, or none"
            self._tell(violation, "quarantine", False, note)
        elif not self._is_quarantined(plugin_id):
            count, threshold = self._violations[sandbox.sandbox_id], self.config.violation_threshold
            self.quarantine_plugin(plugin_id, f"{count} violations, more than violation_threshold={threshold}")
            self._tell(violation, "quarantine", True, plugin_id)

    def _is_quarantined(self, plugin_id: str) -> bool:
        from sandbox.recovery.store import Store

        with Store(self.state_folder) as store:
            return store.is_quarantined(plugin_id) is not None

    def _tell(self, violation: SandboxViolation, action: str, success: bool, note: str) -> bool:
        step = {"timestamp": datetime.now(UTC).isoformat(), "sandbox_id": violation.details.get("sandbox_id", "")}
        what = {"violation": violation.to_dict(), "action": action, "before": {}, "after": {}, "success": success}
        self._history.append({**step, **what, "note": note})
        if observers.active:
            observers.tell("recovered", self._history[-1])
        return success

    def quarantine_plugin(self, plugin_id: str, reason: str) -> None:
        """Quarantine a problematic plugin, by its name: the framework and `psie run` refuse it until a person releases it.

        A name is the id of a plugin in any plugin folder, or the absolute path of a file; a function's means nothing to them.

        The violations that this manager has handled are kept with it.

        Raises:
            TypeError: an argument is no text.
            ValueError: `plugin_id` is empty.
            ResourceError: it cannot be stored.
        """
        for name, value in (("plugin_id", plugin_id), ("reason", reason)):
            if not isinstance(value, str):
                raise TypeError(f"quarantine_plugin: {name} is a {type(value).__name__}: give a text")
        from sandbox.recovery.audit import AuditLog
        from sandbox.recovery.store import Store

        with Store(self.state_folder) as store:
            violations = [violation.to_dict() for violation in self._handled]
            store.quarantine(plugin_id, None, reason, violations, "library")
            AuditLog(store).append("quarantine", plugin_id=plugin_id, sha256=None, reason=reason, by="library", evidence=None)

    def get_recovery_history(self) -> list[dict[str, Any]]:
        """What this manager has done, step by step, oldest first.

        A step has timestamp (ISO 8601), sandbox_id, violation (as SandboxViolation.to_dict gives it), action, before and after
        (what was measured, by name), success, and note: why it did not work, or what else is to be known.
        """
        return list(self._history)
