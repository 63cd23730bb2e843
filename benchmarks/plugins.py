"""`python -m benchmarks.plugins`: what it costs that a plugin runs from files that cannot be swapped.

Medians in ms, for a small plugin of four files: reading and hashing it, writing it into psie's folder and removing it there
(together at most 2 ms), and, at each level, a sandbox without a plugin folder beside a whole load with the framework.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

from sandbox import EnhancedPluginFramework, EnhancedPluginSandbox, IsolationConfig, IsolationLevel
from sandbox.config import PluginLimitsV2, PluginPermissionsV2
from sandbox.plugins import files, stage

ROUNDS = 50
TARGET = 2.0  # ms
SOURCES = {
    "main.py": "from parts.work import value\n\ndef main():\n    return value()\n",
    "data.txt": "one two three\n",
    "parts/__init__.py": "",
    "parts/work.py": "def value():\n    return 1\n",
}


def staging(folder: str) -> None:
    seconds: dict[str, list[float]] = {"read and hashed": [], "staged": [], "removed": []}
    opened = files.open_folder(folder)
    for _ in range(ROUNDS):
        moments = [perf_counter()]
        plugin = files.read(opened, "small")
        moments.append(perf_counter())
        staged = stage.shelf().take(plugin)
        moments.append(perf_counter())
        staged.release()
        moments.append(perf_counter())
        for name, start, end in zip(seconds, moments, moments[1:], strict=False):
            seconds[name].append((end - start) * 1000)
    os.close(opened)
    for name, values in seconds.items():
        print(f"{name:<28}{statistics.median(values):9.2f} ms")
    both = statistics.median(map(sum, zip(seconds["staged"], seconds["removed"], strict=True)))
    print(f"{'staged and removed':<28}{both:9.2f} ms  (at most {TARGET:g} ms: {'met' if both <= TARGET else 'MISSED'})")


async def loading(folder: str, records: str, level: IsolationLevel) -> None:
    """Neither has a sandbox that stands ready."""
    config = IsolationConfig(level=level)
    framework = EnhancedPluginFramework(folder, config, state_folder=records)
    plain, loads = [], []
    for _ in range(ROUNDS):
        start = perf_counter()
        async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), config) as sandbox:
            await sandbox.execute_plugin_safe(int)
        plain.append((perf_counter() - start) * 1000)
        start = perf_counter()
        done = await framework.load_plugin_enhanced("small")
        loads.append((perf_counter() - start) * 1000)
        assert done["success"], done["error"]
    framework.close()
    print(f"{level.value:<10} a call {statistics.median(plain):7.2f} ms    a load {statistics.median(loads):7.2f} ms")


def main() -> None:
    os.environ["PSIE_STANDING"] = "0"
    with tempfile.TemporaryDirectory(prefix="psie-plugins-") as base:
        for name, source in SOURCES.items():
            path = Path(base, "p", "small", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        staging(f"{base}/p")
        for level in IsolationLevel:
            asyncio.run(loading(f"{base}/p", f"{base}/records", level))


if __name__ == "__main__":
    main()
