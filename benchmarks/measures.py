"""Each measure: what psie and its peers do in turn, in the same rounds, and what is wanted of it.

A round has each contender once, and another one begins each time, so that all see the same machine. What comes back from a
sandbox is checked. Must not know how a table or a plot looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import multiprocessing
import os
import resource
import signal
import statistics
import struct
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from benchmarks import overhead, peers
from benchmarks.results import Figures
from sandbox import (
    EnhancedPluginSandbox,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    SandboxExecutor,
)
from sandbox.engine import warden
from sandbox.engine.service import CALL_MODULES, shut_down
from sandbox.engine.zygote import WORTHWHILE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
    from concurrent.futures import Future
    from typing import Any

    from benchmarks.peers import Floor, Peer

    Contender = Callable[[], Awaitable[float]]  # one sample

HELLO = str(peers.ROOT / "examples" / "hello.py")
STRICT, MAXIMUM = IsolationLevel.STRICT, IsolationLevel.MAXIMUM
PAUSE = 0.03  # seconds between two samples: what one leaves to do is not the next one's cost
CALLERS = 8
AT_WORK = 0.002  # seconds after which a processor has not gone to sleep yet, and its caches are not others'
PAGE = os.sysconf("SC_PAGE_SIZE")
FLOORS = peers.FLOOR, peers.FORKS


@dataclass
class Bench:
    """What the measures share."""

    quick: bool
    peers: dict[str, Peer] = field(default_factory=dict)
    floor: Floor | None = None

    def rounds(self, full: int, quick: int) -> int:
        return quick if self.quick else full


# -- tools ---------------------------------------------------------------------------------------------------------------


async def in_turn(
    rounds: int, contenders: dict[str, Contender], pause: float = PAUSE, warm_up: int = 1
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(-warm_up, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            value = await contenders[name]()
            if number >= 0:
                samples[name].append(value)
            await asyncio.sleep(pause)
    return samples


def blocking(sample: Callable[[], float]) -> Contender:
    async def contender() -> float:
        return sample()

    return contender


def timed(work: Callable[[], object]) -> Contender:
    return blocking(lambda: peers.milliseconds(work))


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def pool() -> Iterator[ProcessPoolExecutor]:
    """Of two processes that are warm."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as executor:
        assert list(executor.map(echo, range(20))) == list(range(20))
        yield executor


def echo(value: int) -> int:
    return value


def product() -> float:
    import numpy

    return float((numpy.arange(100.0).reshape(10, 10) @ numpy.ones((10, 10)))[9, 9])


PRODUCT = 945.0
PRODUCT_SOURCE = "import numpy; print(float((numpy.arange(100.0).reshape(10, 10) @ numpy.ones((10, 10)))[9, 9]))"


def same(value: object, expected: object) -> None:
    if value != expected:
        raise AssertionError(f"{value!r} came back in place of {expected!r}")


def new_sandbox(level: IsolationLevel, memory_mb: float = 64, preload: tuple[str, ...] = ()) -> EnhancedPluginSandbox:
    config = IsolationConfig(level=level, preload=preload)
    return EnhancedPluginSandbox(PluginLimitsV2(max_memory_mb=memory_mb), PluginPermissionsV2(), config)


async def warm_call(function: Callable[..., Any], *args: Any, expected: object, pause: float = PAUSE, **settings: Any) -> float:
    """Milliseconds of the first call of a sandbox that is open: its worker stands by."""
    async with new_sandbox(MAXIMUM, **settings) as sandbox:
        await asyncio.sleep(pause)
        start = perf_counter()
        value = await sandbox.execute_plugin_safe(function, *args)
        took = (perf_counter() - start) * 1000
    same(value, expected)
    return took


# -- the time of one -----------------------------------------------------------------------------------------------------


async def call(bench: Bench) -> Figures:
    ours = "psie, maximum: in a warm sandbox"
    at_work, forked_at_work = (f"{name}, of a caller at work" for name in (ours, peers.FORKED))
    figures = Figures("call", "A call that echoes an int", "ms", ours)
    loop = asyncio.get_running_loop()
    job = marshal.dumps((echo.__code__, (7,)))
    standing = environment(PSIE_STANDING="0")  # else it is made ready at a peer's cost
    with pool() as executor, contextlib.closing(peers.Forking()) as forking, standing:

        async def forked(pause: float) -> float:
            with forking.fork() as sock:
                for _ in range(2):  # what it does for the first time takes longer
                    await asyncio.sleep(pause)
                    start = perf_counter()
                    sock.send(job)
                    answer = await loop.sock_recv(sock, 100)
                    took = (perf_counter() - start) * 1000
            same(marshal.loads(answer), 7)
            return took

        async def pooled() -> float:
            start = perf_counter()
            same(await loop.run_in_executor(executor, echo, 7), 7)
            return (perf_counter() - start) * 1000

        contenders: dict[str, Contender] = {
            ours: lambda: warm_call(echo, 7, expected=7),
            at_work: lambda: warm_call(echo, 7, expected=7, pause=AT_WORK),
            peers.POOL: pooled,
            peers.FORKED: lambda: forked(PAUSE),
            forked_at_work: lambda: forked(AT_WORK),
        }
        for name, peer in bench.peers.items():
            contenders[name] = timed(lambda peer=peer: same(peer.call(7), 7))  # type: ignore[misc]
        figures.samples = await in_turn(bench.rounds(150, 10), contenders)
    what, most = "a call into a warm maximum sandbox", 0.6
    for after, name, floor in ((AT_WORK, at_work, forked_at_work), (PAUSE, ours, peers.FORKED)):
        shown = f"{what}, {after * 1000:.0f} ms after other work"
        figures.want(shown, figures.median(name), "at most", most, "ms", figures.median(floor))
    figures.want(f"the same, of {peers.BUBBLEWRAP}", figures.ratio(ours, peers.BUBBLEWRAP), "at most", 1 / 25)
    figures.want(f"the same, of {peers.POOL}", figures.ratio(ours, peers.POOL), "at most", 3)
    return figures


async def start(bench: Bench) -> Figures:
    ours = "psie, maximum: one stands ready"
    ready = "psie, maximum: one stands ready, until it is open"
    figures = Figures("start", "Create, call, destroy", "ms", ours)

    async def whole(level: IsolationLevel, memory_mb: float = 64) -> float:
        start = perf_counter()
        async with new_sandbox(level, memory_mb) as sandbox:
            same(await sandbox.execute_plugin_safe(echo, 7), 7)
        return (perf_counter() - start) * 1000

    async def opened() -> float:
        start = perf_counter()
        async with new_sandbox(MAXIMUM) as sandbox:
            took = (perf_counter() - start) * 1000
            same(await sandbox.execute_plugin_safe(echo, 7), 7)
        return took

    contenders: dict[str, Contender] = {ours: lambda: whole(MAXIMUM), ready: opened}
    for level in list(IsolationLevel)[:3]:
        contenders[f"psie, {level.value}: one stands ready"] = lambda level=level: whole(level)  # type: ignore[misc]
    of_peers: dict[str, Contender] = {}
    for name, peer in bench.peers.items():
        of_peers[name] = timed(lambda peer=peer: same(peer.call(7), 7))  # type: ignore[misc]
    if bench.floor is not None:
        floor = bench.floor
        of_peers[peers.FLOOR] = blocking(lambda: 1000 / floor.rate(1, 0.05))
    rounds = bench.rounds(60, 5)
    figures.samples = await in_turn(rounds, contenders | of_peers, warm_up=2)
    shut_down()  # what stands ready would be taken
    with environment(PSIE_STANDING="0"):
        none: dict[str, Contender] = {
            f"psie, {level.value}: none stands ready": lambda level=level: whole(level)  # type: ignore[misc]
            for level in IsolationLevel
        }
        for name, values in (await in_turn(rounds, none | of_peers)).items():
            figures.samples.setdefault(name, []).extend(values)
    most = 6 if os.getuid() == 0 else 5
    figures.want("a maximum sandbox, until it is open", figures.median(ready), "at most", most, "ms")
    figures.want(f"the whole, of {peers.BUBBLEWRAP}", figures.ratio(ours, peers.BUBBLEWRAP), "at most", 0.33)
    return figures


async def run(bench: Bench) -> Figures:
    ours = "psie run, strict"
    figures = Figures("run", "examples/hello.py, the whole process", "ms", ours)
    psie = peers.Peer("psie", list)
    command = str(Path(sys.executable).with_name("psie"))

    def hello(output: str) -> None:
        if not output.startswith("hello from hello.py"):
            raise AssertionError(output)

    contenders: dict[str, Contender] = {}
    for level in (STRICT, MAXIMUM):
        arguments = ("run", HELLO, "--level", level.value, "-q")
        contenders[f"psie run, {level.value}"] = timed(
            lambda arguments=arguments: hello(psie.run(*arguments, python=command))  # type: ignore[misc]
        )
    for name, peer in bench.peers.items():
        contenders[name] = timed(lambda peer=peer: hello(peer.run("-I", HELLO)))  # type: ignore[misc]
    figures.samples = await in_turn(bench.rounds(60, 5), contenders)
    for level, most in ((STRICT, 1.5), (MAXIMUM, 1.8)):
        ratio = figures.ratio(f"psie run, {level.value}", peers.BUBBLEWRAP)
        figures.want(f"psie run --level {level.value}, of {peers.BUBBLEWRAP}", ratio, "at most", most)
    return figures


async def numpy(bench: Bench) -> Figures:
    ours = 'psie, maximum: in a warm sandbox, preload=("numpy",)'
    figures = Figures("numpy", "A plugin that imports numpy and multiplies two small arrays", "ms", ours)

    def there(peer: Peer) -> None:
        same(float(peer.run("-I", "-c", PRODUCT_SOURCE, python=sys.executable)), PRODUCT)

    with environment(PSIE_STANDING="0"):
        contenders: dict[str, Contender] = {
            ours: lambda: warm_call(product, expected=PRODUCT, memory_mb=256, preload=("numpy",)),
        }
        for name, peer in bench.peers.items():
            contenders[name] = timed(lambda peer=peer: there(peer))  # type: ignore[misc]
        figures.samples = await in_turn(bench.rounds(30, 3), contenders)
    figures.want(f"with numpy preloaded, of {peers.BUBBLEWRAP}", figures.ratio(ours, peers.BUBBLEWRAP), "at most", 1 / 50)
    return figures


# -- how many a second ---------------------------------------------------------------------------------------------------


class Completions:
    """Counts what is completed in a time that begins when all callers are busy, and what stood ready before is used up."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin = perf_counter() + 0.1 + 0.2 * seconds
        self.end = self.begin + seconds
        self.moments: list[float] = []

    def goes_on(self) -> bool:
        return perf_counter() < self.end

    def rate(self) -> float:
        return sum(self.begin <= moment < self.end for moment in self.moments) / self.seconds


def thread_rate(call: Callable[[int], object], callers: int, seconds: float) -> float:
    """Calls a second of so many threads, each of which makes one after the other."""
    done = Completions(seconds)

    def caller() -> None:
        number = 0
        while done.goes_on():
            same(call(number), number)
            done.moments.append(perf_counter())
            number += 1

    with ThreadPoolExecutor(callers) as threads:
        for future in [threads.submit(caller) for _ in range(callers)]:
            future.result()
    return done.rate()


def executor_rate(callers: int, seconds: float) -> float:
    """Calls a second, each in a fresh sandbox, of an executor that always has so many to do."""
    done = Completions(seconds)
    wrong: list[object] = []

    def over(future: Future[int], number: int) -> None:
        done.moments.append(perf_counter())
        if future.exception() is not None or future.result() != number:
            wrong.append(future.exception() or future.result())

    limits = PluginLimitsV2(max_memory_mb=64)
    with SandboxExecutor(callers, level=STRICT, limits=limits, max_waiting=callers) as executor:
        number = 0
        while done.goes_on() and not wrong:
            number += 1
            executor.submit(echo, number).add_done_callback(lambda future, number=number: over(future, number))  # type: ignore[misc]
    if wrong:
        raise AssertionError(f"{wrong[0]!r} came back in place of a number")
    return done.rate()


async def throughput(bench: Bench) -> Figures:
    ours = "psie, strict: SandboxExecutor"
    figures = Figures("throughput", f"Fresh sandboxes with a call in each, {CALLERS} callers", "a second", ours)
    figures.axes = ("callers at once", "calls a second, each in something fresh")
    rates: dict[str, Callable[[int, float], float]] = {ours: executor_rate}
    for name, peer in bench.peers.items():
        rates[name] = lambda callers, seconds, peer=peer: thread_rate(peer.call, callers, seconds)  # type: ignore[misc]
    if bench.floor is not None:
        rates[peers.FLOOR] = bench.floor.rate
        if os.getuid() == 0:  # who alone may know which pages are one and the same
            rates[peers.FORKS] = partial(bench.floor.rate, pages=await forked_pages())

    def contenders(callers: int, seconds: float) -> dict[str, Contender]:
        made: dict[str, Contender] = {}
        for name, each in rates.items():
            workers = min(callers, 2) if name in FLOORS else callers
            made[name] = blocking(lambda each=each, workers=workers: each(workers, seconds))  # type: ignore[misc]
        return made

    pause = 0.3 if bench.quick else 1.0  # namespaces go in the background
    figures.samples = await in_turn(bench.rounds(5, 3), contenders(CALLERS, 1.0 if bench.quick else 4.0), pause, warm_up=0)
    for callers in (1, 2, 4):
        seen = await in_turn(1, contenders(callers, 0.5 if bench.quick else 3.0), pause, warm_up=0)
        for name, values in seen.items():
            if name not in FLOORS or callers <= 2:
                figures.curves.setdefault(name, []).append((callers, values[0]))
    for name in figures.samples:
        if name not in FLOORS:
            figures.curves[name].append((CALLERS, figures.median(name) or 0.0))
    for what, other, bound in (
        (f"fresh strict sandboxes, of {peers.BUBBLEWRAP}", peers.BUBBLEWRAP, 4.0),
        ("the same, of the C program with two workers", peers.FLOOR, 0.4),
    ):
        figures.want(what, figures.ratio(ours, other), "at least", bound, floor=figures.ratio(peers.FORKS, other))
    return figures


async def session(bench: Bench) -> Figures:
    ours = "psie, maximum: one session"
    figures = Figures("session", "Calls that echo an int, one caller", "a second", ours)
    seconds = 0.2 if bench.quick else 1.0
    loop = asyncio.get_running_loop()

    async def calls(one: Callable[[int], Awaitable[Any]]) -> float:
        begin, count = perf_counter(), 0
        while perf_counter() - begin < seconds:
            for _ in range(20):
                same(await one(count), count)
                count += 1
        return count / (perf_counter() - begin)

    async with new_sandbox(MAXIMUM) as sandbox, sandbox.session() as opened:
        with pool() as executor:
            contenders: dict[str, Contender] = {
                ours: lambda: calls(lambda value: opened.call(echo, value)),
                peers.POOL: lambda: calls(lambda value: loop.run_in_executor(executor, echo, value)),
            }
            figures.samples = await in_turn(bench.rounds(10, 3), contenders)
    figures.want("calls into one session", figures.median(ours), "at least", 3000, "a second")
    figures.want(f"the same, of {peers.POOL}", figures.ratio(ours, peers.POOL), "at least", 0.5)
    return figures


# -- how much and how many -----------------------------------------------------------------------------------------------


def memory_of(pid: int) -> tuple[int, int]:
    """(private bytes, proportional bytes) of a process (proc_pid_smaps(5)); nothing of one that has ended."""
    private = proportional = 0
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    for line in lines:
        name, _, rest = line.partition(":")
        if name in ("Private_Clean", "Private_Dirty"):
            private += int(rest.split()[0]) * 1024
        elif name == "Pss":
            proportional = int(rest.split()[0]) * 1024
    return private, proportional


def children(pid: int) -> list[int]:
    """Of all threads of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def tree_private(pid: int) -> int:
    """Bytes of a process and of all below it."""
    return memory_of(pid)[0] + sum(tree_private(child) for child in children(pid))


def frames(pid: int) -> dict[int, int]:
    """The page frame behind each page of a process (proc_pid_pagemap(5)), for root."""
    found = {}
    with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, _, end = line.split()[0].partition("-")
            first, count = int(start, 16) // PAGE, (int(end, 16) - int(start, 16)) // PAGE
            pagemap.seek(first * 8)
            for number, (entry,) in enumerate(struct.iter_unpack("=Q", pagemap.read(count * 8)), first):
                if entry >> 63:  # present
                    found[number] = entry & ((1 << 55) - 1)
    return found


async def forked_pages() -> tuple[int, int, int]:
    """Pages of memory of a zygote; of the init and of the worker of a sandbox that stands ready those that are not one with
    the pages of what it is a fork of: so many were copied."""
    shut_down()
    before = set(children(os.getpid()))
    with environment(PSIE_STANDING="0"):
        await settle_zygote(STRICT)
        async with many_open(1, STRICT):
            await asyncio.sleep(0.2)
            (zygote,) = set(children(os.getpid())) - before
            ((warden, init),) = ((warden, init) for warden in children(zygote) for init in children(warden))
            (worker,) = children(init)
            lines = Path(f"/proc/{zygote}/status").read_text().splitlines()
            anonymous = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
            of_warden, of_init, of_worker = map(frames, (warden, init, worker))
    shut_down()
    copies = [len(mine.items() - theirs.items()) for mine, theirs in ((of_init, of_warden), (of_worker, of_init))]
    return anonymous // PAGE, copies[0], copies[1]


async def settle_zygote(level: IsolationLevel) -> None:
    """It has had so many sandboxes that it has made what it has immortal, if its Python knows that."""
    async with many_open(WORTHWHILE, level):
        await asyncio.sleep(0.3)


@contextlib.asynccontextmanager
async def many_open(count: int, level: IsolationLevel) -> AsyncIterator[list[EnhancedPluginSandbox]]:
    sandboxes = [new_sandbox(level, 16) for _ in range(count)]
    try:
        for sandbox in sandboxes:
            await sandbox.__aenter__()
        yield sandboxes
    finally:
        await asyncio.gather(*(sandbox.__aexit__(None, None, None) for sandbox in sandboxes))


async def psie_memory(count: int) -> float:
    """MB of each of `count` warm sandboxes: what is theirs alone, and their part of what the zygote has."""
    shut_down()
    before = set(children(os.getpid()))
    await settle_zygote(MAXIMUM)
    async with many_open(count, MAXIMUM) as sandboxes:
        await asyncio.sleep(0.2)
        own = shared = 0
        for zygote in set(children(os.getpid())) - before:
            shared += memory_of(zygote)[1]
            for warden in children(zygote):
                own += tree_private(warden) if children(warden) else 0  # one without an init waits for the next sandbox
        for sandbox in (sandboxes[0], sandboxes[-1]):
            same(await sandbox.execute_plugin_safe(echo, 7), 7)
    return (own + shared) / count / 2**20


# A zygote with the modules of psie's, and forks of forks as a warden, an init and a worker are, of which none does anything;
# nor do the modules' handlers of forks, which psie puts off too.
IDLE = """
import gc, os, signal, sys
path, count, modules = sys.argv[1:]
sys.path[:] = path.split(os.pathsep)
gc.disable()
os.register_at_fork = lambda **hooks: None
for module in modules.split():
    __import__(module)
gc.freeze()
for _ in range(int(count)):
    if os.fork() == 0:
        if os.fork() == 0:
            os.fork()
        break
else:
    print("they are there", flush=True)
signal.pause()
"""


def idle_memory(count: int) -> float:
    """MB of each of `count` such chains, reckoned as psie_memory does."""
    modules = " ".join(("sandbox.engine.zygote", warden.SUPERVISOR, "ctypes", *CALL_MODULES))
    command = [sys.executable, "-I", "-S", "-c", IDLE, os.pathsep.join(filter(None, sys.path)), str(count), modules]
    chain: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as zygote:
        try:
            assert zygote.stdout is not None
            assert zygote.stdout.readline()
            while len(chain) < 3 * count:
                time.sleep(0.01)
                chain = below(zygote.pid)
            time.sleep(0.2)
            used = tree_private(zygote.pid) - memory_of(zygote.pid)[0] + memory_of(zygote.pid)[1]
        finally:
            for pid in [*reversed(chain), zygote.pid]:
                os.kill(pid, signal.SIGKILL)
    return used / count / 2**20


def below(pid: int) -> list[int]:
    """All processes below one, each before those below it."""
    return [each for child in children(pid) for each in (child, *below(child))]


def peer_memory(peer: Peer, count: int) -> float:
    with contextlib.ExitStack() as stack:
        standing = [stack.enter_context(peer.standing()) for _ in range(count)]
        return sum(tree_private(pid) for pid in standing) / count / 2**20


async def memory(bench: Bench) -> Figures:
    ours, theirs = "psie, maximum", "bubblewrap + python3 -I -S"
    figures = Figures("memory", "Own memory of each of 20 that stand warm", "MB", ours)
    figures.axes = ("how many stand", "MB, all together")
    with environment(PSIE_STANDING="0"):
        for count in (1, 20) if bench.quick else (1, 5, 10, 20, 40):
            contenders: dict[str, Contender] = {ours: lambda count=count: psie_memory(count)}  # type: ignore[misc]
            for name in (peers.BUBBLEWRAP, peers.PLAIN):
                if name in bench.peers:
                    shown = theirs if name == peers.BUBBLEWRAP else "python3 -I -S (no isolation)"
                    peer = bench.peers[name]
                    contenders[shown] = blocking(lambda peer=peer, count=count: peer_memory(peer, count))  # type: ignore[misc]
            seen = await in_turn(bench.rounds(3, 1), contenders, warm_up=0)
            for shown, values in seen.items():
                figures.curves.setdefault(shown, []).append((count, sorted(values)[len(values) // 2] * count))
            if count == 20:
                figures.samples = seen
    shut_down()
    what, floor = "a warm sandbox with a twentieth of the zygote", idle_memory(20)
    figures.want(what, figures.median(ours), "at most", 2, "MB", floor=floor)
    return figures


async def standing(bench: Bench) -> Figures:
    """Of so many that stand at once: how long each took to make, and how long all take to go.

    Memory that a virtual machine has not used for a while is given to it by its host page by page, which takes 3 to 10 us each,
    whoever writes there first: more than all that the making of a sandbox costs. So another process has it, and gives back as
    much as one takes just before that is made.
    """
    count = bench.rounds(1000, 100)
    tenth = count // 10
    first, last = f"psie, strict: each of the first {tenth}", f"psie, strict: each of the last {tenth}"
    figures = Figures("standing", f"The making of {count:,} that stand at once", "ms", last)
    figures.axes = ("how many stand already", "ms for one more")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    shut_down()
    before = set(children(os.getpid()))
    places = str(count + 50)
    bounds = environment(PSIE_STANDING="0", PSIE_MAX_SANDBOXES=places, PSIE_MAX_MEMORY_MB=str((count + 50) * 16))
    try:
        with bounds:
            took, gone = await stand(count)
        shut_down()
        await asyncio.sleep(1)
        left = [
            pid for pid in set(children(os.getpid())) - before if memory_of(pid) != (0, 0)
        ]  # one that waits to be reaped has none
        same(left, [])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    figures.samples = {last: took[-tenth:], first: took[:tenth]}
    figures.curves = {"psie, strict": list(enumerate(took))}
    figures.want(f"the last {tenth} of {count:,}, of the first {tenth}", figures.ratio(last, first), "at most", 1.3)
    figures.want(f"until all {count:,} have gone", gone, "at most", 3, "s")
    return figures


MEGABYTES_EACH = 6  # more than a sandbox takes, with what the kernel has for it
USE_MEMORY = """
import mmap, sys
pieces = [mmap.mmap(-1, int(sys.argv[2]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(int(sys.argv[1]))]
for piece in pieces:
    for page in range(0, len(piece), mmap.PAGESIZE):
        piece[page] = 1
print(end=".", flush=True)
while sys.stdin.read(1):
    pieces[-1:] = []
    print(end=".", flush=True)
"""


@contextlib.contextmanager
def used_memory(count: int) -> Iterator[Callable[[], None]]:
    """A process that has written to each page of `count` pieces of memory, of MEGABYTES_EACH, or of as many as there are. What
    is yielded has it give one back."""
    free, size = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), MEGABYTES_EACH << 20
    command = [sys.executable, "-I", "-S", "-c", USE_MEMORY, str(min(count, free * 4 // 5 // size)), str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        source, sink = process.stdout, process.stdin
        source.read(1)

        def give_back() -> None:
            sink.write(b".")
            source.read(1)

        try:
            yield give_back
        finally:
            sink.close()


async def stand(count: int) -> tuple[list[float], float]:
    """(milliseconds that each took to make, seconds until all had gone)"""
    async with new_sandbox(STRICT, 16) as sandbox:  # starts the zygote
        same(await sandbox.execute_plugin_safe(echo, 7), 7)
    took = []
    sandboxes = [new_sandbox(STRICT, 16) for _ in range(count)]
    try:
        with used_memory(count) as give_back:
            for sandbox in sandboxes:
                give_back()
                begin = perf_counter()
                await sandbox.__aenter__()
                took.append((perf_counter() - begin) * 1000)
        for number, sandbox in enumerate(sandboxes[:: max(1, count // 50)]):
            same(await sandbox.execute_plugin_safe(echo, number), number)
    finally:
        begin = perf_counter()
        clean = await asyncio.gather(*(sandbox.cleanup_sandbox() for sandbox in sandboxes))
        gone = perf_counter() - begin
    same(all(clean), True)
    return took, gone


# -- what a plugin loses -------------------------------------------------------------------------------------------------


async def beside(bench: Bench, name: str, what: str, function: str, most: float) -> Figures:
    ours, theirs, floor = "psie, strict, watched every 0.1 s", "python3", "python3 with the same Landlock rules and filter"
    figures = Figures(name, f"CPU time of {what}", "s", ours)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        work = process.submit(overhead.beside_plain, function, bench.rounds(7, 1), bench.rounds(20, 5) / 10)
        seen = await asyncio.wrap_future(work)
    figures.samples = dict(zip((theirs, floor, ours), map(list, zip(*seen, strict=True)), strict=True))
    of_floor, of_ours = (statistics.median(each[i] / each[0] for each in seen) for i in (1, 2))
    figures.want(f"{what}, of python3", of_ours, "at most", most, floor=of_floor)
    return figures


async def cpu(bench: Bench) -> Figures:
    return await beside(bench, "cpu", "computing", "compute", 1.01)


async def files(bench: Bench) -> Figures:
    return await beside(bench, "files", "stat, open and read in a tree", "walk", 1.10)


MEASURES: dict[str, Callable[[Bench], Coroutine[Any, Any, Figures]]] = {
    each.__name__: each for each in (call, throughput, session, start, run, numpy, memory, standing, cpu, files)
}
