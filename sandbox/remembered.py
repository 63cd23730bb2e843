"""One call of the library, as a run that is remembered: what `psie history` and the statistics have of it.

For EnhancedPluginSandbox; the framework and the command have records of their own. The engine's thread writes it, so it is
there when the sandbox has been closed. Where it cannot be recorded the call comes back all the same, and a warning of the
logger "psie" says so, once for a sandbox. Observers are told here that a call begins and ends. Must not know how a call is
made.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from time import monotonic, time

from sandbox.engine import outcome
from sandbox.errors import (
    ResourceError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxInitializationError,
    SecurityViolationError,
)
from sandbox.integrations import observers
from sandbox.recovery import private, spool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

    from sandbox.engine.client import Call
    from sandbox.sandbox import EnhancedPluginSandbox
    from sandbox.violations import SandboxViolation

DOOR = "library"
PATIENCE = 0.1  # seconds that the spool's lock is waited for: others' sandboxes wait meanwhile


class Remembered(observers.ObservedCall):
    """For the time of a `with` around a call; the row is made when that and the call have come to an end.

    Attributes:
        name: of the plugin.
        call: once there is one.
        peak_memory_mb, peak_cpu_percent: likewise.
    """

    def __init__(self, sandbox: EnhancedPluginSandbox, name: str, kind: str = observers.CALL) -> None:
        self.sandbox = sandbox
        self.name = name
        self.kind = kind
        self.call: Call | None = None
        self.peak_memory_mb = self.peak_cpu_percent = 0.0
        self.steps_before = 0
        self.is_observed = False
        self._error: BaseException | None = None
        self._missing = itertools.count(1, -1)  # ends, of two; counting cannot be interrupted by another thread

    def __enter__(self) -> Remembered:
        self.started, self.begun = time(), monotonic()
        self.before = len(self.sandbox._telemetry.violations)
        self.is_observed = observers.want_calls()
        if self.is_observed:
            self.steps_before = len(steps_of(self.sandbox))
            observers.tell("call_begins", self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._error, self.seconds = error, monotonic() - self.begun
        if self.call is None or not next(self._missing):
            self._write()

    def ends(self) -> None:
        """All of the call has gone."""
        if not next(self._missing):
            self._write()

    def _write(self) -> None:
        sandbox, error = self.sandbox, self._error
        if self.is_observed:
            observers.tell("call_ended", self)
        if not sandbox._is_recorded or not sandbox.config.telemetry_enabled:
            return
        assert sandbox.recipe is not None
        run = {
            "started": self.started,
            "plugin_id": self.name,
            "sha256": "",
            "level": sandbox.recipe.level,
            "outcome": outcome_of(error),
            "door": DOOR,
            "limits": sandbox._plain_limits,
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
            "peak_cpu_percent": self.peak_cpu_percent,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "violations": [each.to_dict() for each in self.violations],
            "sandbox_id": sandbox.sandbox_id,
        }
        try:
            sandbox._post(record, sandbox, run)
        except ResourceError:
            return  # a fork: the call has said so

    @property
    def call_id(self) -> str:
        return str(self._process.number) if self._process is not None else ""

    @property
    def outcome(self) -> str:
        return "cancelled" if isinstance(self._error, asyncio.CancelledError) else outcome_of(self._error)

    @property
    def reason(self) -> str:
        return reason_of(self._error)

    @property
    def exit_code(self) -> int | None:
        return outcome.exit_of(self.call)[0] if self.call is not None else None

    @property
    def violations(self) -> list[SandboxViolation]:
        call = self._process
        new = self.sandbox._telemetry.violations[self.before :]
        return [each for each in new if each.details.get("call") in (None, call.number if call is not None else None)]

    @property
    def _process(self) -> Call | None:
        return self.call

    @property
    def recovery(self) -> list[dict[str, Any]]:
        return steps_of(self.sandbox)[self.steps_before :]


class Asked(Remembered):
    """One request to a session's process: observed as any call, and remembered with that process."""

    def __init__(self, sandbox: EnhancedPluginSandbox, name: str, process: Call | None) -> None:
        super().__init__(sandbox, name, observers.SESSION_CALL)
        self._asked = process

    def _write(self) -> None:
        if self.is_observed:
            observers.tell("call_ended", self)

    @property
    def _process(self) -> Call | None:
        return self._asked


def steps_of(sandbox: EnhancedPluginSandbox) -> list[dict[str, Any]]:
    """As get_recovery_history has them, of calls that have gone: it would wait for those that have not."""
    return sandbox._recovery.history if sandbox._recovery is not None else []


def outcome_of(error: BaseException | None) -> str:
    """One of sandbox.recovery.store.OUTCOMES."""
    if error is None:
        return "ok"
    if isinstance(error, SecurityViolationError):
        return "violation"
    if isinstance(error, ResourceLimitExceededError):
        return "limit"
    return "refused" if isinstance(error, SandboxInitializationError) else "error"


def reason_of(error: BaseException | None) -> str:
    if error is None:
        return "returned"
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    text = str(error).splitlines()
    return text[0] if isinstance(error, SandboxException) and text else type(error).__name__


def record(sandbox: EnhancedPluginSandbox, run: dict[str, Any]) -> None:
    """In the engine's thread, which closes the sandbox no sooner: the caller need not wait for a file."""
    try:
        folder = private.default_folder()
        if spool.append(folder, patience=PATIENCE, **run):
            threading.Thread(target=collect, args=(folder,), daemon=True).start()
    except Exception as error:  # whatever it is, the call has come to its end
        if not sandbox._has_told:
            sandbox._has_told = True
            logging.getLogger("psie").warning("this run is not remembered: %s", error)


def collect(folder: str) -> None:
    """In a thread: make rows of what waits in the spool."""
    from sandbox.recovery.store import Store  # sqlite3: nobody who only calls has paid for it

    try:
        with Store(folder) as store:
            store.collect()
    except SandboxException as error:
        logging.getLogger("psie").warning("runs wait to be stored: %s", error)
