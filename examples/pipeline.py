"""A pipeline of steps that nobody has to trust: each in its own sandbox, which reads one folder and writes to another.

What a step has written is looked at before it is kept; else none of it is.

    python examples/pipeline.py
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandbox import (
    EnhancedPluginSandbox,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    SandboxException,
)
from sandbox.text import escape_text

CONFIG = IsolationConfig(level=IsolationLevel.STRICT)
LIMITS = PluginLimitsV2(max_memory_mb=64, max_execution_time_seconds=5)


@dataclass(frozen=True)
class Step:
    """`work(source, target)` reads files of one folder and writes to another; it may write files with these endings."""

    name: str
    work: Callable[[str, str], None]
    endings: tuple[str, ...]


class StepFailed(Exception):
    """The step's output folder is as it was."""


async def run_step(step: Step, source: Path, target: Path) -> list[str]:
    """The names of the files that it has left in `target`. Raises StepFailed."""
    target.mkdir()
    permissions = PluginPermissionsV2(allowed_directories=[str(target)])
    async with EnhancedPluginSandbox(LIMITS, permissions, CONFIG, read_only=[str(source)]) as sandbox:
        try:
            await sandbox.execute_plugin_safe(step.work, str(source), str(target))
            wrong = [change.path for change in sandbox.changes() if not change.path.endswith(step.endings)]
            if wrong:
                await sandbox.discard_changes()
                raise StepFailed(f"{step.name} has written {escape_text(', '.join(wrong))}: nothing of it is kept")
            kept = await sandbox.commit_changes()
        except SandboxException as error:
            raise StepFailed(f"{step.name}: {error}") from error
    return sorted(Path(change.path).name for change in kept)


async def run_pipeline(steps: list[Step], source: Path, place: Path) -> Path:
    """The folder of the last step's output. Raises StepFailed."""
    for number, step in enumerate(steps, 1):
        target = place / f"{number}-{step.name}"
        print(f"{step.name}: {', '.join(await run_step(step, source, target))}")
        source = target
    return source


def extract(source: str, target: str) -> None:
    for path in Path(source).glob("*.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        Path(target, f"{path.stem}.json").write_text(json.dumps(rows))


def add_up(source: str, target: str) -> None:
    for path in Path(source).glob("*.json"):
        total = sum(int(amount) for _, amount in json.loads(path.read_text()))
        Path(target, f"{path.stem}.txt").write_text(f"{total}\n")


def hostile(source: str, target: str) -> None:
    """Writes where it may not, and leaves what nobody has asked for."""
    try:
        Path(source, "left.json").write_text("[]")
    except OSError:
        Path(target, "run-me.sh").write_text("rm -rf /\n")


STEPS = [Step("extract", extract, (".json",)), Step("add-up", add_up, (".txt",))]


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "input").mkdir()
        (place / "input" / "march.csv").write_text("rent,700\nfood,300\n")
        result = await run_pipeline(STEPS, place / "input", place)
        print((result / "march.txt").read_text(), end="")
        try:
            await run_step(Step("hostile", hostile, (".json",)), result, place / "last")
        except StepFailed as error:
            print(error)
        print(f"left behind: {[path.name for path in (place / 'last').iterdir()]}")


if __name__ == "__main__":
    asyncio.run(main())
