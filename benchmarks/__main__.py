"""`python -m benchmarks`: start times and memory, psie and bubblewrap in turn, so that both see the same machine.

Run it as root and as a user. Prints medians (p50) and 95th percentiles in milliseconds, ratios of medians, and the
private memory of standing sandboxes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2
from sandbox.engine.service import shut_down

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
HELLO = str(ROOT / "examples" / "hello.py")
ROUNDS = 100
STANDING = 20
PAUSE = 0.03  # seconds


def bubblewrap(*command: str) -> list[str]:
    """The command in bubblewrap with every namespace, on a read-only host, as people run it."""
    binds: list[str] = []
    for path in dict.fromkeys((sys.prefix, sys.base_prefix, str(ROOT))):
        if path.startswith("/tmp/"):
            binds += ["--ro-bind", path, path]
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"),
        *("--tmpfs", "/tmp", *binds, sys.executable, *command),
    ]


def spawn(command: list[str]) -> float:
    """Milliseconds that the command takes, its output thrown away."""
    start = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return (perf_counter() - start) * 1000


def double(value: int) -> int:
    return value * 2


def new_sandbox(level: IsolationLevel) -> EnhancedPluginSandbox:
    return EnhancedPluginSandbox(PluginLimitsV2(max_memory_mb=64), PluginPermissionsV2(), IsolationConfig(level=level))


async def library(
    level: IsolationLevel, peer: Callable[[], float], *, standing: bool, pause: float = PAUSE
) -> dict[str, list[float]]:
    """Create, call and destroy in turn with the peer.

    With `standing`, as by default, a sandbox stands ready for each round: made in the pause, which is not counted, so
    "ready" is then the time to take one, not to make one. With pause 0 and no peer the rounds pay for the making, and
    without `standing` each round makes its own.
    """
    os.environ["PSIE_STANDING"] = str(int(standing))
    times: dict[str, list[float]] = {"ready": [], "call": [], "whole": [], "peer": []}
    for _ in range(ROUNDS + 3):
        start = perf_counter()
        async with new_sandbox(level) as sandbox:
            stood = perf_counter()
            assert await sandbox.execute_plugin_safe(double, 21) == 42
            replied = perf_counter()
        gone = perf_counter()
        for name, value in (("ready", stood - start), ("call", replied - stood), ("whole", gone - start)):
            times[name].append(value * 1000)
        if pause:
            await asyncio.sleep(pause)  # psie makes the next one ready: not at the peer's cost
            times["peer"].append(peer())
    return {name: values[3:] for name, values in times.items()}  # the first ones start the zygote


def uss(pid: int) -> tuple[int, int]:
    """(private bytes, proportional bytes) of a process (proc_pid_smaps(5))."""
    private = proportional = 0
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except ProcessLookupError:
        return 0, 0  # a child of ours that is no zygote any more and waits to be reaped
    for line in lines:
        name, _, rest = line.partition(":")
        if name in ("Private_Clean", "Private_Dirty"):
            private += int(rest.split()[0]) * 1024
        elif name == "Pss":
            proportional = int(rest.split()[0]) * 1024
    return private, proportional


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def zygotes() -> list[int]:
    """Our children that are zygotes: the engine's thread started them, so they are listed under that thread."""
    found: list[int] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


async def memory(level: IsolationLevel) -> tuple[float, float]:
    """(MB of a standing sandbox's own processes, MB of the zygote's share) with STANDING sandboxes open."""
    open_ones = [new_sandbox(level) for _ in range(STANDING)]
    await asyncio.gather(*(sandbox.__aenter__() for sandbox in open_ones))
    try:
        own = shared = 0
        for zygote in zygotes():
            wardens = children(zygote)
            todo = list(wardens)
            while todo:
                pid = todo.pop()
                own += uss(pid)[0]
                todo += children(pid)
            if wardens:
                shared += uss(zygote)[1]
        return own / STANDING / 2**20, shared / STANDING / 2**20
    finally:
        await asyncio.gather(*(sandbox.__aexit__(None, None, None) for sandbox in open_ones))


def row(name: str, values: list[float], peer: list[float] | None, wanted: str) -> None:
    p50, p95 = statistics.median(values), sorted(values)[int(len(values) * 0.95)]
    ratio = f"{p50 / statistics.median(peer):6.2f}" if peer else "     -"
    print(f"{name:<48} {p50:8.2f} {p95:8.2f} {ratio}   {wanted}")


def main() -> None:
    if shutil.which("bwrap") is None:
        sys.exit("bubblewrap is missing: apt-get install bubblewrap")
    root = os.getuid() == 0
    psie = str(Path(sys.executable).with_name("psie"))
    who = "as root" if root else "rootless"
    print(f"{who}, Linux {os.uname().release}, Python {sys.version.split()[0]}, {os.cpu_count()} CPUs")
    print(f"{'milliseconds':<48} {'p50':>8} {'p95':>8} {'ratio':>6}   wanted")

    at_most = "at most 6" if root else "at most 5"
    call_peer = bubblewrap("-I", "-c", "print(21 * 2)")
    for level in IsolationLevel:
        times = asyncio.run(library(level, lambda: spawn(call_peer), standing=True))
        strongest = level is IsolationLevel.MAXIMUM
        row(f"{level.value}: request to ready", times["ready"], None, at_most if strongest else "")
        row(f"{level.value}: create + call + destroy", times["whole"], times["peer"], "ratio at most 0.33" if strongest else "")
    row("maximum: a call alone", times["call"], None, "")
    rush = asyncio.run(library(IsolationLevel.MAXIMUM, lambda: 0.0, standing=True, pause=0))
    row("maximum, one right after the other: to ready", rush["ready"], None, at_most)
    row("maximum, one right after the other: all", rush["whole"], times["peer"], "(pays for the making of all)")
    alone = asyncio.run(library(IsolationLevel.MAXIMUM, lambda: spawn(call_peer), standing=False))
    row("maximum, PSIE_STANDING=0: request to ready", alone["ready"], None, "(as the first of a process)")
    row("maximum, PSIE_STANDING=0: all", alone["whole"], alone["peer"], "(the same)")
    row("bwrap --unshare-all python -I -c", times["peer"], times["peer"], "")

    run_peer = bubblewrap(HELLO)
    commands = {name: [psie, "run", HELLO, "--level", name, "--quiet"] for name in ("strict", "maximum")}
    runs: dict[str, list[float]] = {"peer": [], **{name: [] for name in commands}}
    for _ in range(ROUNDS // 2):
        runs["peer"].append(spawn(run_peer))
        for name, command in commands.items():
            runs[name].append(spawn(command))
    for name in commands:
        row(f"psie run examples/hello.py --level {name}", runs[name], runs["peer"], "ratio at most 3")
    row("bwrap --unshare-all python examples/hello.py", runs["peer"], runs["peer"], "")

    shut_down()  # what stands ready of the levels before would count
    own, shared = asyncio.run(memory(IsolationLevel.MAXIMUM))
    print(f"\nmemory of one of {STANDING} standing sandboxes at maximum: {own:.2f} MB private + {shared:.2f} MB of the zygote")
    print(f"{'':<48} {own + shared:8.2f} MB            at most 4 MB")


if __name__ == "__main__":
    main()
