"""`python -m benchmarks.overhead`: what a running plugin loses by its sandbox, per level, and what watching it costs.

The same function, two CPU seconds or more of computing, of work on files, or of hardly anything but system calls, in a plain
process and in a sandbox of each level; limits that do not throttle, samples every 0.1 s. Times are CPU seconds, taken inside
the function: starts are the other benchmark's. Prints medians; before, the cost of a cgroup leaf, of a sample, of watching.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, host, recipe
from sandbox.cgroups import leaf, place
from sandbox.monitor.sources import CgroupSource

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 5
READY_SECONDS = 2.0  # until all stand and begin at once
LIMITS = PluginLimitsV2(
    max_memory_mb=512.0,
    max_cpu_percent=400.0,
    max_execution_time_seconds=120.0,
    max_disk_usage_mb=256.0,
    max_inodes=100_000,
    max_file_operations=10_000_000,
)


def compute(rounds: int, begin: float = 0.0) -> float:
    """CPU seconds of arithmetic, attribute access and memory traffic, as Python programs have them."""
    import time

    time.sleep(max(0.0, begin - time.monotonic()))
    start = time.process_time()
    for _ in range(rounds):
        for _ in range(10):  # small enough that the allocator takes and gives back no pages on the way, which is luck
            table = {}
            for number in range(2_000):
                table[number] = (number * 7 + 3) % 1009
            sum(sorted(table.values()))
    return time.process_time() - start


def documents(rounds: int, begin: float = 0.0) -> float:
    """CPU seconds of writing, renaming, listing, reading and removing files of 256 KB in the current folder."""
    import os
    import time

    text = "x" * (1 << 18)
    time.sleep(max(0.0, begin - time.monotonic()))
    start = time.process_time()
    for _ in range(rounds):
        for number in range(20):
            with open(f"draft-{number}", "w") as file:
                file.write(text)
            os.rename(f"draft-{number}", f"document-{number}")
        for name in os.listdir("."):
            with open(name) as file:
                file.read()
            os.unlink(name)
    return time.process_time() - start


def small_files(rounds: int, begin: float = 0.0) -> float:
    """CPU seconds of the same with 4 KB: hardly more than system calls, every one of which the kernel looks at."""
    import os
    import time

    time.sleep(max(0.0, begin - time.monotonic()))
    start = time.process_time()
    for _ in range(rounds):
        for number in range(100):
            with open(f"file-{number}", "w") as file:
                file.write("x" * 4000)
        for name in os.listdir("."):
            with open(name) as file:
                file.read()
            os.unlink(name)
    return time.process_time() - start


def walk(rounds: int, begin: float = 0.0) -> float:
    """CPU seconds of looking at, opening and reading a tree of 500 small files, that is made before."""
    import os
    import time

    for number in range(20):
        os.mkdir(f"folder-{number}")
        for each in range(25):
            with open(f"folder-{number}/{each}", "w") as file:
                file.write("x" * 4000)
    time.sleep(max(0.0, begin - time.monotonic()))
    start = time.process_time()
    for _ in range(rounds):
        for folder in os.listdir("."):
            for path in (f"{folder}/{name}" for name in os.listdir(folder)):
                size = os.stat(path).st_size
                with open(path, "rb") as source:
                    if len(source.read()) != size:
                        raise OSError(path)
    return time.process_time() - start


def confine() -> None:
    """Give up in this process what a worker of level strict gives up by Landlock and seccomp, and nothing else."""
    from sandbox.engine import client
    from sandbox.ns import privileges
    from sandbox.seccomp import landlock, load

    wire = client.wire_form(
        recipe.compile(IsolationConfig(level=IsolationLevel.STRICT), LIMITS, PluginPermissionsV2(), host.facts())
    )
    rules = [line for line in wire["landlock"]["rules"] if os.path.exists(line[0])] + [[os.getcwd(), "write"]]
    privileges.no_new_privs()
    wanted = {name: wire["landlock"][name] for name in ("abi", "deny_network", "scopes")}
    landlock.restrict(rules, **wanted)
    load.load_filter(wire["seccomp"]["bpf"], new_listener=True)


async def plain(name: str, rounds: int, begin: float, place: str, *, confined: bool = False) -> float:
    """The function in a plain Python, in a folder of `place`."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from benchmarks.overhead import {name}, confine; "
    code += ("confine(); " if confined else "") + f"print({name}({rounds}, {begin}))"
    with tempfile.TemporaryDirectory(dir=place) as folder:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=folder, stdout=subprocess.PIPE)
        output, _ = await process.communicate()
    return float(output)


async def sandboxed(
    function: Callable[[int, float], float], rounds: int, begin: float, level: IsolationLevel, limits: PluginLimitsV2 = LIMITS
) -> float:
    config = IsolationConfig(level=level, resource_check_interval_seconds=0.1)
    async with EnhancedPluginSandbox(limits, PluginPermissionsV2(max_file_size_mb=50.0), config) as sandbox:
        seconds: float = await sandbox.execute_plugin_safe(function, rounds, begin)
        return seconds


def overheads() -> None:
    """All at once on one CPU, which they share in slices of milliseconds: what slows the machine down meets all alike."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # A workspace is a tmpfs, but at level minimal, which has no mount namespace, a folder on disk.
    places = {level: "/var/tmp" if level is IsolationLevel.MINIMAL else "/dev/shm" for level in IsolationLevel}
    levels = list(IsolationLevel)
    print(f"{'CPU seconds, and percent more than plain':<42} {'plain':>8}", *(f"{each.value:>16}" for each in levels))

    async def together(function: Callable[[int, float], float], rounds: int) -> list[float]:
        begin = time.monotonic() + READY_SECONDS
        runs = [plain(function.__name__, rounds, begin, folder) for folder in dict.fromkeys(places.values())]
        return await asyncio.gather(*runs, *(sandboxed(function, rounds, begin, level) for level in levels))

    for function in (compute, documents, small_files):
        rounds = max(1, int(2.2 / (function_seconds(function) / 20)))
        seen = [asyncio.run(together(function, rounds)) for _ in range(ROUNDS)]
        cells = []
        for number, level in enumerate(levels):
            of_level, base = 2 + number, list(dict.fromkeys(places.values())).index(places[level])
            more = statistics.median(each[of_level] / each[base] - 1 for each in seen)
            cells.append(f"{statistics.median(each[of_level] for each in seen):7.2f} {100 * more:+6.1f} %")
        print(f"{function.__name__:<42} {statistics.median(each[1] for each in seen):8.2f}", *(f"{cell:>16}" for cell in cells))


def beside_plain(name: str, rounds: int, cpu_seconds: float) -> list[tuple[float, ...]]:
    """CPU seconds of one of the functions in a plain Python, in one that is confined as a worker, and at level strict, all at
    once on one CPU, `rounds` times.

    Binds its process to that CPU, so call it in one of its own.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    function = {"compute": compute, "walk": walk}[name]
    amount = max(1, int(cpu_seconds / (function_seconds(function) / 20)))
    limits = replace(LIMITS, max_cpu_percent=100.0, cpu_warning_threshold_percent=None)  # type: ignore[arg-type]

    async def together() -> tuple[float, ...]:
        begin = time.monotonic() + READY_SECONDS
        plains = [plain(name, amount, begin, "/dev/shm", confined=confined) for confined in (False, True)]
        return tuple(await asyncio.gather(*plains, sandboxed(function, amount, begin, IsolationLevel.STRICT, limits)))

    return [asyncio.run(together()) for _ in range(rounds)]


def watching() -> None:
    """What the caller's process does while a plugin computes, watched ten times a second, and while it does not watch."""
    rounds = max(1, int(2.2 / (function_seconds(compute) / 20)))
    used = {}
    for watched in (True, False):
        config = IsolationConfig(resource_check_interval_seconds=0.1, enable_real_time_monitoring=watched)

        async def call(config: IsolationConfig = config) -> float:
            async with EnhancedPluginSandbox(LIMITS, PluginPermissionsV2(), config) as sandbox:
                start, began = time.process_time(), time.perf_counter()
                await sandbox.execute_plugin_safe(compute, rounds)
                return (time.process_time() - start) / (time.perf_counter() - began)

        used[watched] = statistics.median(asyncio.run(call()) for _ in range(ROUNDS))
    print(f"watching ten times a second takes {100 * (used[True] - used[False]):.2f} % of a CPU from the caller")


def function_seconds(function: Callable[[int, float], float]) -> float:
    """Of 20 rounds, in this process."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            return function(20, 0.0)
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
    watching()
    overheads()
