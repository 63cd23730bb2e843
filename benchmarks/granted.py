"""`python -m benchmarks.granted`: what a granted folder of 100,000 files adds to the start of a sandbox, per level.

Medians of opening a sandbox and closing it again, with the folder and without, in turn; nothing stands ready in either case.
At level minimal the folder is written directly, from standard on it is the lower layer of an overlay.
"""

from __future__ import annotations

import os

os.environ["PSIE_STANDING"] = "0"  # before the engine looks: what stands ready would hide what is measured

import asyncio
import statistics
import tempfile
import time
from typing import TYPE_CHECKING

from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 60
FOLDERS, FILES = 100, 1000


def fill(root: str) -> None:
    for number in range(FOLDERS):
        folder = f"{root}/{number}"
        os.mkdir(folder)
        for name in range(FILES):
            os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY, 0o644))


async def open_seconds(level: IsolationLevel, folders: list[str | Path]) -> float:
    permissions = PluginPermissionsV2(allowed_directories=[str(folder) for folder in folders])
    start = time.perf_counter()
    async with EnhancedPluginSandbox(PluginLimitsV2(), permissions, IsolationConfig(level=level)):
        return time.perf_counter() - start


async def measure(level: IsolationLevel, root: str) -> tuple[float, float]:
    """Median milliseconds: without the folder, and with it."""
    seen: dict[bool, list[float]] = {False: [], True: []}
    for round_ in range(ROUNDS + 3):
        for with_folder in (False, True) if round_ % 2 else (True, False):
            seconds = await open_seconds(level, [root] if with_folder else [])
            if round_ >= 3:  # the first ones start the zygotes
                seen[with_folder].append(seconds)
    without, with_ = (statistics.median(seen[each]) * 1000 for each in (False, True))
    return without, with_


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="psie-granted-") as root:
        fill(root)
        print(
            f"Opening a sandbox with a granted folder of {FOLDERS * FILES:,} files: median of {ROUNDS}, ms; limit: without + 1"
        )
        print(f"{'':10}{'without':>10}{'with':>10}{'more':>10}")
        for level in IsolationLevel:
            without, with_ = asyncio.run(measure(level, root))
            print(f"{level.value:10}{without:10.2f}{with_:10.2f}{with_ - without:10.2f}")


if __name__ == "__main__":
    main()
