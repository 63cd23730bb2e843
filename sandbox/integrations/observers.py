"""Observers of sandboxes: the one place where logging, OpenTelemetry and Prometheus learn what happens.

`EnhancedPluginSandbox` tells it, and so do executors, sessions and the framework, which open one. A call of which nobody wants
to hear pays for the question alone. Must not know who listens, nor import anything: it is loaded with the library.

An observer's methods are called one after the other on the thread where it happened: mostly the caller's event loop, some on
psie's own. They must be quick. What one raises is logged, and changes nothing for the call.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.sandbox import EnhancedPluginSandbox
    from sandbox.violations import SandboxViolation

CALL, SESSION, SESSION_CALL = "call", "session", "session call"  # kinds of ObservedCall


class ObservedCall:
    """A call, for its observers: what is known when it begins, and after its end the rest.

    Attributes:
        kind: "call" (a process of its own), "session" (the process of a session, from start to end) or "session call" (one
            request to it, which has no process of its own, so no peaks and no exit code).
        sandbox: it runs in.
        name: of the plugin or function; the plugin's, so escape it.
        started: time.time() of its beginning.
        seconds: until its value, or its error, was there; 0.0 before.
        peak_memory_mb, peak_cpu_percent: 0.0 where nobody has seen them.
    """

    kind = CALL
    sandbox: EnhancedPluginSandbox
    name = ""
    started = seconds = 0.0
    peak_memory_mb = peak_cpu_percent = 0.0

    @property
    def level(self) -> str:
        """minimal, standard, strict or maximum."""
        return self.sandbox.config.level.value

    @property
    def call_id(self) -> str:
        """The number of its process among those of its sandbox, which a session's calls share; "" where it has come to none."""
        raise NotImplementedError

    @property
    def outcome(self) -> str:
        """One of sandbox.recovery.store.OUTCOMES, or "cancelled"; "ok" as long as it runs."""
        raise NotImplementedError

    @property
    def reason(self) -> str:
        """How it ended, in words, which may quote the plugin: escape them."""
        raise NotImplementedError

    @property
    def exit_code(self) -> int | None:
        raise NotImplementedError

    @property
    def violations(self) -> list[SandboxViolation]:
        """Its own, and those of nobody's in particular that came meanwhile."""
        raise NotImplementedError

    @property
    def recovery(self) -> list[dict[str, Any]]:
        """The steps of recovery meanwhile, as EnhancedPluginSandbox.get_recovery_history has them."""
        raise NotImplementedError


class Observer:
    """What can be observed; each method does nothing until it is overridden."""

    def opened(self, sandbox: EnhancedPluginSandbox) -> None:
        """A sandbox stands; `sandbox.protections` are as read back."""

    def refused(self, sandbox: EnhancedPluginSandbox, error: BaseException) -> None:
        """One could not be opened."""

    def wants_calls(self) -> bool:
        """Asked at the beginning of each call: whether it is to be told of that and of its end. Must be quick."""
        return True

    def call_begins(self, call: ObservedCall) -> None:
        """In the caller's task."""

    def call_ended(self, call: ObservedCall) -> None:
        """It is over and all of it has gone, which may be a little after its value was there."""

    def violation(self, sandbox: EnhancedPluginSandbox, violation: SandboxViolation) -> None:
        """One was seen. Of one call those that it caught itself come at its end."""

    def recovered(self, step: dict[str, Any]) -> None:
        """A step of recovery, as SandboxRecoveryManager.get_recovery_history has it."""

    def closed(self, sandbox: EnhancedPluginSandbox, is_clean: bool) -> None:
        """A sandbox that was opened is closed; whether nothing of it is left."""


active: tuple[Observer, ...] = ()  # replaced, never changed: whoever goes through it may do so in any thread


def add(observer: Observer) -> None:
    """Have it told from now on. Raises TypeError if it is no Observer."""
    global active
    if not isinstance(observer, Observer):
        raise TypeError(f"observers.add: a {type(observer).__name__} is no Observer: derive it from Observer")
    if observer not in active:
        active = (*active, observer)


def remove(observer: Observer) -> None:
    """Tell it nothing more; fine if it was told nothing before."""
    global active
    active = tuple(each for each in active if each is not observer)


def want_calls() -> bool:
    """Whether anybody is to be told of a call that begins now."""
    for observer in active:  # noqa: SIM110  (any() is a generator more, in each call)
        if observer.wants_calls():
            return True
    return False


def tell(what: str, *arguments: object) -> None:
    """Call the method `what` of each observer. Those who tell look at `active` first."""
    for observer in active:
        try:
            getattr(observer, what)(*arguments)
        except Exception:
            import logging

            logging.getLogger("psie.observers").exception("%s.%s failed", type(observer).__name__, what)
