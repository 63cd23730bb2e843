"""`python -m benchmarks.recording`: what a plugin loses by the record of its files, per level, of its own CPU time.

10,000 files made, opened again and looked at with stat(2) in the workspace, and hardly anything but computing, with the record
(inotify, audit hook, exceptions) and without (enable_real_time_monitoring=False), in turns. Times are CPU seconds, taken inside
the function. Prints the mean of the fastest third of each way, and whether the targets are met: at most 10 % for files, 1 % for
computing. Last what the caller pays for it: CPU seconds of its process.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks.overhead import compute
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 15
FILES = 10_000
COMPUTING = 300
LIMITS = PluginLimitsV2(
    max_memory_mb=512.0,
    max_cpu_percent=400.0,
    max_execution_time_seconds=120.0,
    max_disk_usage_mb=256.0,
    max_inodes=100_000,
    max_file_operations=10_000_000,
)
TARGETS = {"files": 10.0, "compute": 1.0}  # percent


def files(count: int) -> float:
    """CPU seconds of `count` files made, opened and looked at, after a rest in which whoever watches has begun to."""
    import os
    import time

    time.sleep(0.1)
    start = time.process_time()
    for number in range(count):
        with open(f"file-{number}", "w") as file:
            file.write("x")
    for number in range(count):
        with open(f"file-{number}") as file:
            file.read()
    for number in range(count):
        os.stat(f"file-{number}")
    return time.process_time() - start


def arithmetic(rounds: int) -> float:
    """CPU seconds of computing, after the same rest."""
    import time

    time.sleep(0.1)
    return compute(rounds)


async def measured(
    function: Callable[[int], float], amount: int, level: IsolationLevel, *, recording: bool
) -> tuple[float, float]:
    """CPU seconds of the plugin, and of the caller meanwhile."""
    config = IsolationConfig(level=level, enable_real_time_monitoring=recording, resource_check_interval_seconds=60.0)
    async with EnhancedPluginSandbox(LIMITS, PluginPermissionsV2(), config) as sandbox:
        start = time.process_time()
        seconds = await sandbox.execute_plugin_safe(function, amount)
        return seconds, time.process_time() - start


def fastest(seconds: list[float]) -> float:
    """Of the rounds that were least disturbed."""
    return statistics.mean(sorted(seconds)[: len(seconds) // 3])


def compared(name: str, function: Callable[[int], float], amount: int, level: IsolationLevel) -> None:
    """Each round both ways, the first way alternating."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    caller: dict[bool, list[float]] = {True: [], False: []}
    for number in range(ROUNDS):
        for recording in (True, False) if number % 2 else (False, True):
            inside, outside = asyncio.run(measured(function, amount, level, recording=recording))
            seconds[recording].append(inside)
            caller[recording].append(outside)
    without, recorded = fastest(seconds[False]), fastest(seconds[True])
    more = 100 * (recorded / without - 1)
    middle = 100 * (statistics.median(seconds[True]) / statistics.median(seconds[False]) - 1)
    verdict = f"at most {TARGETS[name]:g} %: {'met' if more <= TARGETS[name] else 'MISSED'}"
    print(
        f"{name:<8} {level.value:<9} {without:7.3f} s without, {recorded:7.3f} s with: {more:+5.1f} % ({verdict}); "
        f"medians {middle:+5.1f} %; the caller {fastest(caller[True]) - fastest(caller[False]):+.3f} s",
        flush=True,
    )


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for level in IsolationLevel:
        compared("files", files, FILES, level)
        compared("compute", arithmetic, COMPUTING, level)
