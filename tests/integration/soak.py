"""Many calls at mixed levels, some of them hostile, while parts of psie are killed: nothing is lost, nothing is left.

    cd tests && python -m integration.soak --calls 20000 --callers 8

Every call has an outcome that is known beforehand: its value, or one of the documented errors; where a part was killed
meanwhile also that. It says how much memory and how many descriptors this process has had on the way, and exits with
status 1 where something is wrong. A test runs a short one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sandbox import (
    IsolationLevel,
    PluginExecutionError,
    ResourceError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxInitializationError,
    SecurityViolationError,
)

from . import harness, hostile

HOSTILE_SHARE, KILL_SHARE = 0.05, 0.002  # of the calls, and kills for each call
CALLS_OF_A_SANDBOX = 6  # at most
LIMITS = {"max_execution_time_seconds": 1.0, "max_memory_mb": 64.0, "max_output_mb": 1.0, "max_cpu_percent": 400.0}
# What ends a call, or a sandbox that is about to open, when a part is killed.
BY_A_KILL = (ResourceError, SandboxInitializationError, PluginExecutionError)


def echo(value: Any) -> Any:
    return value


def write_and_read(text: str) -> str:
    with open("file", "w") as file:
        file.write(text)
    with open("file") as file:
        return file.read()


@dataclass(frozen=True)
class Hostile:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    ends: tuple[type[SandboxException], ...]


HOSTILE = (
    Hostile(hostile.exit_at_once, (3,), (PluginExecutionError,)),
    Hostile(hostile.signal_itself, (9,), (PluginExecutionError,)),
    Hostile(hostile.read_null, (), (PluginExecutionError,)),
    Hostile(hostile.forge, (b"v\0\0", b"\xff" * 9, b""), (PluginExecutionError, SecurityViolationError)),
    Hostile(hostile.print_much, (1 << 22,), (ResourceLimitExceededError,)),
    Hostile(hostile.many_violations, (), (SecurityViolationError,)),
    Hostile(hostile.take_memory_at_once, (), (ResourceLimitExceededError,)),
    Hostile(hostile.spin, (), (ResourceLimitExceededError,)),
    Hostile(hostile.return_a_socket, (), (PluginExecutionError,)),
    Hostile(hostile.raise_huge, (), (PluginExecutionError,)),
)


@dataclass
class Soak:
    """One run. `wrong` has every outcome that was not to be expected."""

    calls: int
    chance: random.Random
    begun: int = 0
    kills: int = 0
    killed_at: float = float("-inf")
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    looks: list[tuple[int, float, int]] = field(default_factory=list)

    async def caller(self) -> None:
        """Opens one sandbox after the other."""
        while self.begun < self.calls and not self.wrong:
            level = self.chance.choice(tuple(IsolationLevel))
            count = min(self.chance.randint(1, CALLS_OF_A_SANDBOX), self.calls - self.begun)
            self.begun += count
            done, started = 0, time.monotonic()
            try:
                async with harness.open_sandbox(level, limits=LIMITS) as sandbox:
                    for _ in range(count):
                        started = time.monotonic()
                        await self.one(sandbox)
                        done += 1
            except SandboxException as error:
                self.judge_kill(error, started)
                self.outcomes["ended by a kill"] += count - done

    async def one(self, sandbox: Any) -> None:
        started = time.monotonic()
        if self.chance.random() < HOSTILE_SHARE:
            wanted = self.chance.choice(HOSTILE)
            try:
                value = await sandbox.execute_plugin_safe(wanted.function, *wanted.args)
                self.wrong.append(f"{wanted.function.__name__} came back with {value!r:.80}")
            except wanted.ends:
                self.outcomes["hostile, stopped"] += 1
            except SandboxException as error:
                self.judge_kill(error, started)
                raise
            return
        function = self.chance.choice((echo, write_and_read))
        value = f"value {self.chance.random()}"
        try:
            got = await sandbox.execute_plugin_safe(function, value)
        except SandboxException as error:
            self.judge_kill(error, started)
            raise
        if got != value:
            self.wrong.append(f"{function.__name__}({value!r}) is {got!r:.80}")
        self.outcomes["good"] += 1

    def judge_kill(self, error: SandboxException, started: float) -> None:
        """It has to be one that a kill explains, and there has to have been one."""
        if not isinstance(error, BY_A_KILL) or self.killed_at < started - harness.SETTLE:
            self.wrong.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    async def killer(self) -> None:
        """Kills a part of the engine now and then: whichever."""
        while True:
            await asyncio.sleep(0.05)
            due = int(self.begun * KILL_SHARE) - self.kills
            if due > 0:
                found = [pid for pids in harness.roles(os.getpid()).values() for pid in pids]
                if found:
                    self.kills += 1
                    self.killed_at = time.monotonic()
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.chance.choice(found), signal.SIGKILL)

    async def run(self, callers: int) -> None:
        killer = asyncio.create_task(self.killer())
        looker = asyncio.create_task(self.look())
        await asyncio.gather(*(self.caller() for _ in range(callers)))
        for task in (killer, looker):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.looks.append((self.begun, memory_mb(), len(harness.own_fds())))

    async def look(self) -> None:
        step = max(1, self.calls // 10)
        while True:
            if self.begun >= step * (len(self.looks) + 1):
                self.looks.append((self.begun, memory_mb(), len(harness.own_fds())))
            await asyncio.sleep(0.2)


def memory_mb() -> float:
    """What this process has of its own, proc_pid_statm(5)."""
    with open("/proc/self/statm") as file:
        _, resident, shared = map(int, file.read().split()[:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def soak(calls: int, callers: int, seed: int) -> Soak:
    """Run it, and see that nothing is left."""
    run = Soak(calls, random.Random(seed))
    quiet = (contextlib.redirect_stdout, contextlib.redirect_stderr)
    with harness.nothing_left(zombies=True), open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        for redirect in quiet:
            stack.enter_context(redirect(nowhere))
        asyncio.run(run.run(callers))
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    started = time.monotonic()
    run = soak(given.calls, given.callers, given.seed)
    seconds = time.monotonic() - started
    print(f"{run.begun} calls, {run.kills} kills, {seconds:.0f} s, {run.begun / seconds:.0f} calls a second, seed {given.seed}")
    print(", ".join(f"{name}: {count}" for name, count in run.outcomes.most_common()))
    for count, memory, descriptors in run.looks:
        print(f"after {count:6} calls: {memory:6.1f} MB, {descriptors} descriptors")
    for each in run.wrong:
        print(f"WRONG: {each}")
    return int(bool(run.wrong))


if __name__ == "__main__":
    sys.exit(main())
