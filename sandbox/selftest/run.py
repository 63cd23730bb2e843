"""The self-test: every attack that is safe to try on somebody's host, outside a sandbox and inside, at one level."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sandbox.config import IsolationLevel
from sandbox.errors import SandboxException
from sandbox.selftest import attacks, families, trial
from sandbox.selftest.attacks import REGISTRY, ROOT, Attack
from sandbox.selftest.outside import Outside

PASS, FAIL, NOT_APPLICABLE = "PASS", "FAIL", "NOT APPLICABLE"

# Nothing of it belongs among the runs of a user's plugins.
CONFIG = {"telemetry_enabled": False, "quarantine_on_violation": False}


@dataclass(frozen=True)
class Result:
    """What came of one attack.

    Attributes:
        verdict: PASS: it works outside and was stopped inside; FAIL: it was not stopped, or not by what is known to stop it;
            NOT APPLICABLE: it was not tried, or its failing inside says nothing.
        attack: its name.
        protection: what claims to stop it.
        reason: by what it was stopped (errnos, a limit, an exception), or why it was not, or why it does not apply.
        recorded: whether psie has it on record as a violation.
    """

    verdict: str
    attack: str
    protection: str
    reason: str
    recorded: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(level: IsolationLevel, names: Collection[str] = ()) -> Iterator[Result]:
    """Try all attacks at `level`, or those of these names, as whoever calls this.

    Raises ValueError for a name that no attack has, SandboxException if no sandbox of the level can be opened here.
    """
    chosen = [one for one in REGISTRY if one.function.__module__.startswith(families.__package__)]
    if names:
        unknown = sorted(set(names) - {one.name for one in chosen})
        if unknown:
            near = difflib.get_close_matches(unknown[0], [one.name for one in chosen], 1)
            hint = f"did you mean {near[0]}?" if near else "psie selftest without names shows all of them"
            raise ValueError(f"no attack is called {unknown[0]!r}: {hint}")
        chosen = [one for one in chosen if one.name in names]
    trial.run_inside(str, level=level, config=CONFIG)
    attacks.remove_stale()
    with attacks.scratch() as folder, attacks.shown_folder():
        outside = Outside()
        try:
            for number, one in enumerate(sorted(chosen, key=lambda one: one.protection)):
                own = folder / str(number)
                own.mkdir()
                yield result_of(one, level, outside, own)
        finally:
            outside.close()


def result_of(one: Attack, level: IsolationLevel, outside: Outside, folder: Path) -> Result:
    reason = why_not(one, level)
    if reason:
        return Result(NOT_APPLICABLE, one.name, one.protection, reason)
    answer = outside.run(one, folder)
    try:
        stopped = trial.attempt_inside(one, level, folder, CONFIG)
    except trial.Escaped as escape:
        return Result(FAIL, one.name, one.protection, str(escape).removeprefix(f"{one.name}: "))
    except SandboxException as error:
        reason = f"the sandbox that it needs is refused here: {str(error).splitlines()[0]}"
        return Result(NOT_APPLICABLE, one.name, one.protection, reason)
    if not answer.startswith("escaped"):
        last = answer.splitlines()[-1]
        return Result(NOT_APPLICABLE, one.name, one.protection, f"it does not work outside a sandbox either: {last}")
    return Result(PASS, one.name, one.protection, stopped.removesuffix("*"), stopped.endswith("*"))


def why_not(one: Attack, level: IsolationLevel) -> str:
    """Why it is not tried; "" if it is."""
    if level not in one.levels:
        return f"level {level.value} does not claim to stop it{'' if ROOT else ' for a caller without root'}"
    if one.unsafe:
        return f"not safe outside a sandbox: {one.unsafe}"
    if available_mb() < 4 * one.memory_mb:
        return f"outside a sandbox it takes {one.memory_mb} MB, and this host has no more than {available_mb()} MB free"
    return ""


def available_mb() -> int:
    """MemAvailable of /proc/meminfo: proc_meminfo(5)."""
    with open("/proc/meminfo") as file:
        return next((int(line.split()[1]) >> 10 for line in file if line.startswith("MemAvailable:")), 0)
