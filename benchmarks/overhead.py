"""`python -m benchmarks.overhead`: what a running plugin loses by its sandbox, per level, and what watching it costs.

The same function, two seconds or more of computing or of work on files, in a plain process and in a sandbox of each level,
in turn; limits that do not throttle, samples every 0.1 s. Times are taken inside the function: starts are the other
benchmark's. Prints medians and overheads in percent; then the cost of a cgroup leaf and of one sample.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, host, recipe
from sandbox.cgroups import leaf, place
from sandbox.monitor.sources import CgroupSource

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 5
LIMITS = PluginLimitsV2(
    max_memory_mb=512.0, max_cpu_percent=400.0, max_execution_time_seconds=120.0, max_disk_usage_mb=256.0, max_inodes=100_000
)


def compute(rounds: int) -> float:
    """Seconds of arithmetic, attribute access and memory traffic, as Python programs have them."""
    import time

    start = time.perf_counter()
    for _ in range(rounds):
        for _ in range(10):  # small enough that the allocator takes and gives back no pages on the way, which is luck
            table = {}
            for number in range(2_000):
                table[number] = (number * 7 + 3) % 1009
            sum(sorted(table.values()))
    return time.perf_counter() - start


def files(rounds: int) -> float:
    """Seconds of making, writing, reading, listing and removing small files in the current folder."""
    import os
    import time

    start = time.perf_counter()
    for _ in range(rounds):
        for number in range(100):
            with open(f"file-{number}", "w") as file:
                file.write("x" * 4000)
        for name in os.listdir("."):
            with open(name) as file:
                file.read()
            os.unlink(name)
    return time.perf_counter() - start


def plain(name: str, rounds: int, place: str) -> float:
    """The function in a plain Python, in a folder of `place`."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from benchmarks.overhead import {name}; print({name}({rounds}))"
    with tempfile.TemporaryDirectory(dir=place) as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout)


async def sandboxed(function: Callable[[int], float], rounds: int, level: IsolationLevel) -> float:
    config = IsolationConfig(level=level, resource_check_interval_seconds=0.1)
    async with EnhancedPluginSandbox(LIMITS, PluginPermissionsV2(max_file_size_mb=50.0), config) as sandbox:
        seconds: float = await sandbox.execute_plugin_safe(function, rounds)
        return seconds


def overheads() -> None:
    print(
        f"{'seconds, and percent more than plain Python':<44} {'plain':>8}", *(f"{each.value:>16}" for each in IsolationLevel)
    )
    # A workspace is a tmpfs, but at level minimal, which has no mount namespace, a folder on disk.
    places = {level: "/var/tmp" if level is IsolationLevel.MINIMAL else "/dev/shm" for level in IsolationLevel}
    for function in (compute, files):
        rounds = max(1, int(2.2 / (function_seconds(function) / 20)))
        times: dict[str, list[float]] = {name: [] for name in (*places.values(), *(level.value for level in IsolationLevel))}
        for _ in range(ROUNDS):
            for folder in set(places.values()):
                times[folder].append(plain(function.__name__, rounds, folder))
            for level in IsolationLevel:
                times[level.value].append(asyncio.run(sandboxed(function, rounds, level)))
        cells = []
        for level in IsolationLevel:
            seconds, base = statistics.median(times[level.value]), statistics.median(times[places[level]])
            cells.append(f"{seconds:7.2f} {100 * (seconds / base - 1):+6.1f} %")
        print(f"{function.__name__:<44} {statistics.median(times['/dev/shm']):8.2f}", *(f"{cell:>16}" for cell in cells))


def function_seconds(function: Callable[[int], float]) -> float:
    """Of 20 rounds, in this process."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            return function(20)
        finally:
            os.chdir(before)


def leaves() -> None:
    facts = host.facts()
    if facts.cgroup_kind not in ("root", "delegated"):
        print("no v2 tree here in which a leaf could be made by hand")
        return
    compiled = recipe.compile(IsolationConfig(), PluginLimitsV2(), PluginPermissionsV2(), facts)
    assert compiled.cgroup is not None
    settings, controllers = compiled.cgroup["settings"], compiled.cgroup["controllers"]
    parent = place.prepare(os.path.join(facts.cgroup_folder, place.FOLDER), controllers)
    made, removed = [], []
    for _ in range(50):
        start = time.perf_counter()
        fd = leaf.make(parent, "4093", settings)
        made.append((time.perf_counter() - start) * 1000)
        os.close(fd)
        start = time.perf_counter()
        leaf.remove(parent, "4093")
        removed.append((time.perf_counter() - start) * 1000)
    print(f"a leaf with {len(settings)} settings: made in {statistics.median(made):.2f} ms (at most 1.5)", end=", ")
    print(f"removed in {statistics.median(removed):.2f} ms; controllers: {', '.join(controllers) or 'none here'}")
    source = CgroupSource(leaf.make(parent, "4093", settings))
    source.read()
    start = time.process_time()
    for _ in range(500):
        source.read()
    print(f"a sample of it: {(time.process_time() - start) * 2:.3f} ms of CPU (at most 0.1)")
    source.close()
    leaf.remove(parent, "4093")
    os.close(parent)


if __name__ == "__main__":
    leaves()
    overheads()
