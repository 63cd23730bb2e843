"""An attack's trial: it is tried inside a sandbox, and what came of it is judged.

A refusal that the attack does not expect, any other exception, and any other answer count as an escape: nothing is taken for
stopped that is not known to be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle

import sandbox.selftest
from sandbox import EnhancedPluginSandbox, IsolationConfig, PluginLimitsV2, PluginPermissionsV2
from sandbox.config import IsolationLevel
from sandbox.engine import service
from sandbox.errors import SandboxException
from sandbox.selftest.attacks import SECONDS, Attack, Where
from sandbox.violations import SandboxViolation

T = TypeVar("T")

THRESHOLD = 10  # violations that a call may have

# The sandbox has the library, but it is the attack that has to travel, with what it needs of it.
cloudpickle.register_pickle_by_value(sandbox.selftest)


class Escaped(AssertionError):
    """An attack was not stopped, or not by what is known to stop it; or it broke, which proves nothing."""


@dataclass
class Outcome:
    """How a call ended: its value or its exception, and the violations on record."""

    value: Any
    error: BaseException | None
    violations: list[SandboxViolation]


def open_sandbox(
    level: IsolationLevel,
    limits: dict[str, Any] | None = None,
    permissions: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **further: Any,
) -> EnhancedPluginSandbox:
    """A sandbox that counts, but does not end a call for, up to THRESHOLD violations."""
    return EnhancedPluginSandbox(
        PluginLimitsV2(**{"max_execution_time_seconds": SECONDS, **(limits or {})}),
        PluginPermissionsV2(**(permissions or {})),
        IsolationConfig(level=level, **{"violation_threshold": THRESHOLD, **(config or {})}),
        **further,
    )


def run_inside(
    function: Any,
    *arguments: Any,
    level: IsolationLevel,
    limits: dict[str, Any] | None = None,
    permissions: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **keywords: Any,
) -> Outcome:
    """One call in a sandbox of its own."""

    async def go() -> Outcome:
        async with open_sandbox(level, limits, permissions, config) as one:
            try:
                value, error = await one.execute_plugin_safe(function, *arguments, **keywords), None
            except SandboxException as raised:
                value, error = None, raised
            violations = one.get_violations()
            if not all(violation.explanation for violation in violations):
                raise Escaped("a violation does not say what would allow it, or that nothing does")
            return Outcome(value, error, violations)

    return bounded(go())


def bounded(work: Coroutine[Any, Any, T], seconds: float = 2 * SECONDS) -> T:
    """Run a coroutine, but not for ever: an engine whose thread has died answers nobody.

    Such an engine is put away first, so that only the attack that has killed it counts. Raises Escaped.
    """
    known = service._service
    if known is not None and not known.loop.thread.is_alive():
        service._service = None

    async def go() -> T:
        return await asyncio.wait_for(work, seconds)

    try:
        return asyncio.run(go())
    except TimeoutError:
        raise Escaped("the engine does not answer any more") from None


def attempt_inside(one: Attack, level: IsolationLevel, folder: Path, config: dict[str, Any] | None = None) -> str:
    """Run the attack in a sandbox: what stopped it, with a star if that is on record as a violation. Raises Escaped."""
    with one.scene(Where(inside=True, folder=folder)) as scene:
        outcome = run_inside(
            one.function,
            level=level,
            limits=one.limits,
            permissions={**one.permissions, **scene.permissions},
            config={**one.config, **(config or {})},
            **scene.arguments,
        )
        harm = scene.harm()
    return judge(one, outcome, harm)


def judge(one: Attack, outcome: Outcome, harm: str) -> str:
    """What stopped the attack. Raises Escaped where it was not stopped, or not by something known."""
    mark = "*" if outcome.violations else ""
    if harm:
        raise Escaped(f"{one.name}: escaped: {harm}; the attack itself said {outcome.value!r} {outcome.error!r}")
    if outcome.error is not None:
        if not isinstance(outcome.error, one.ends):
            raise Escaped(f"{one.name}: not a refusal, the attack broke: {outcome.error!r}")
        return getattr(outcome.error, "limit", None) or type(outcome.error).__name__.removesuffix("Error")
    answer = outcome.value
    if not isinstance(answer, str) or not answer.startswith("stopped: "):
        raise Escaped(f"{one.name}: {answer}")
    reasons = answer.removeprefix("stopped: ")
    unexpected = [word for word in reasons.split(",") if word.isupper() and word not in one.refusals]
    if unexpected:
        raise Escaped(f"{one.name}: stopped, but by {unexpected}, which is no refusal that was expected")
    return reasons + mark
