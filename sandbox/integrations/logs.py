"""What psie says through the module `logging`: loggers below "psie", silent until somebody configures them.

Each record has its ids in its message and as attributes: sandbox_id, call_id and plugin_id ("" where there is none), and
level, outcome, violation_type or action where it is about one. All of it is one line of printable text, whatever a plugin is
called and says: it can neither begin a line of its own nor drive a terminal.

DEBUG is the life of sandboxes and calls' beginnings (psie.sandbox, psie.call), INFO how each call ended (psie.call), WARNING
violations (psie.violation), recoveries (psie.recovery), protections that are not as the level says, and sandboxes that could
not be opened (psie.sandbox); ERROR one of which something was left.
"""

from __future__ import annotations

import logging
import os

from sandbox.integrations.observers import SESSION, Observer
from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.integrations.observers import ObservedCall
    from sandbox.recipe_data import Recipe
    from sandbox.sandbox import EnhancedPluginSandbox
    from sandbox.violations import SandboxViolation

TEXT = 2_000  # characters of a plugin's in one line
DEGRADED = 1_000  # different reports of what is not as a level says, of which each is made once

logging.getLogger("psie").addHandler(logging.NullHandler())
sandbox_log = logging.getLogger("psie.sandbox")
call_log = logging.getLogger("psie.call")
violation_log = logging.getLogger("psie.violation")
recovery_log = logging.getLogger("psie.recovery")


def line(text: object) -> str:
    """A single line that is safe to show, of whatever a plugin may have a hand in; a long one is cut."""
    shown = escape_text(str(text), keep="")
    return shown if len(shown) <= TEXT else f"{shown[:TEXT]}..."


class Logs(Observer):
    """The observer that every sandbox has. A level that nobody listens to costs a look at it."""

    def __init__(self) -> None:
        self._degraded: set[str] = set()
        self._recipe: Recipe | None = None  # that was looked at last: equal settings have one and the same

    def opened(self, sandbox: EnhancedPluginSandbox) -> None:
        if sandbox_log.isEnabledFor(logging.DEBUG):
            level, extra = sandbox.config.level.value, ids(sandbox)
            sandbox_log.debug("sandbox %s: open at level %s", extra["sandbox_id"], level, extra={**extra, "level": level})
        recipe = sandbox.recipe
        if recipe is not None and recipe is not self._recipe and sandbox_log.isEnabledFor(logging.WARNING):
            self._recipe = recipe
            self._tell_degraded(sandbox, recipe)

    def _tell_degraded(self, sandbox: EnhancedPluginSandbox, recipe: Recipe) -> None:
        """Once for each difference, not for each sandbox: it is a matter of the host and the settings."""
        level, extra = sandbox.config.level.value, ids(sandbox)
        for protection in recipe.weakened:
            said = line(f"{protection.name} is {protection.state} ({protection.mechanism}): {protection.detail}")
            if f"{level} {said}" not in self._degraded and len(self._degraded) < DEGRADED:
                self._degraded.add(f"{level} {said}")
                sandbox_log.warning("level %s here: %s", level, said, extra={**extra, "level": level})

    def refused(self, sandbox: EnhancedPluginSandbox, error: BaseException) -> None:
        if sandbox_log.isEnabledFor(logging.WARNING):
            extra = ids(sandbox)
            sandbox_log.warning("sandbox %s: not opened: %s", extra["sandbox_id"], line(error), extra=extra)

    def wants_calls(self) -> bool:
        return call_log.isEnabledFor(logging.INFO)

    def call_begins(self, call: ObservedCall) -> None:
        if call_log.isEnabledFor(logging.DEBUG):
            extra = ids(call.sandbox, plugin=call.name)
            call_log.debug("sandbox %s: %s of %s begins", extra["sandbox_id"], call.kind, extra["plugin_id"], extra=extra)

    def call_ended(self, call: ObservedCall) -> None:
        if not call_log.isEnabledFor(logging.DEBUG if call.kind == SESSION else logging.INFO):
            return
        extra = ids(call.sandbox, call.call_id, call.name)
        peak = f", {call.peak_memory_mb:.1f} MB" if call.peak_memory_mb else ""
        call_log.log(
            logging.DEBUG if call.kind == SESSION else logging.INFO,
            "sandbox %s: %s %s of %s: %s after %.3f s%s: %s",
            extra["sandbox_id"], call.kind, extra["call_id"], extra["plugin_id"], call.outcome, call.seconds, peak,
            line(call.reason),
            extra={**extra, "level": call.level, "outcome": call.outcome},
        )  # fmt: skip

    def violation(self, sandbox: EnhancedPluginSandbox, violation: SandboxViolation) -> None:
        if violation_log.isEnabledFor(logging.WARNING):
            call = str(violation.details.get("call") or "")
            extra = ids(sandbox, call, sandbox._plugins.get(int(call), "") if call.isdecimal() else "")
            violation_log.warning(
                "sandbox %s: call %s of %s: %s: %s",
                extra["sandbox_id"], extra["call_id"] or "-", extra["plugin_id"] or "-", violation.type.value,
                line(violation.message),
                extra={**extra, "violation_type": violation.type.value},
            )  # fmt: skip

    def recovered(self, step: dict[str, Any]) -> None:
        if recovery_log.isEnabledFor(logging.WARNING):
            call = line(step["violation"]["details"].get("call") or "")
            extra = {"sandbox_id": line(step["sandbox_id"]), "call_id": call, "plugin_id": ""}
            what = "done" if step["success"] else "did not work"
            note = f": {line(step['note'])}" if step["note"] else ""
            text = "sandbox %s: recovery: %s %s%s"
            recovery_log.warning(
                text, extra["sandbox_id"], step["action"], what, note, extra={**extra, "action": step["action"]}
            )

    def closed(self, sandbox: EnhancedPluginSandbox, is_clean: bool) -> None:
        extra = ids(sandbox)
        if not is_clean:
            sandbox_log.error("sandbox %s: closed, but something of it is left", extra["sandbox_id"], extra=extra)
        elif sandbox_log.isEnabledFor(logging.DEBUG):
            sandbox_log.debug("sandbox %s: closed", extra["sandbox_id"], extra=extra)


def ids(sandbox: EnhancedPluginSandbox, call: object = "", plugin: str = "") -> dict[str, str]:
    return {"sandbox_id": line(sandbox.sandbox_id), "call_id": line(call), "plugin_id": line(plugin)}


def to_stderr() -> None:
    """For a command: what psie logs from the level of SANDBOX_LOG_LEVEL up goes to stderr. Without that variable only what is
    logged of psie's own troubles, because the rest is in what the command prints. Raises ConfigError."""
    from sandbox.config import log_level_from_env

    logger = logging.getLogger("psie")
    level = log_level_from_env()
    logger.setLevel(level)
    if not os.environ.get("SANDBOX_LOG_LEVEL", "").strip():
        for each in (sandbox_log, call_log, violation_log, recovery_log):
            each.setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("psie: %(levelname)s: %(message)s"))
    logger.addHandler(handler)
