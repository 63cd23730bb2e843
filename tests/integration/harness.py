"""What the integration tests share: opening sandboxes, finding the engine's processes, and seeing that nothing is left.

The engine's processes carry the caller's `sys.path` on their command line, so a path that nobody else has marks those of
this test run: several runs can go side by side. Must not know what any single test is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import re
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, host, state
from sandbox.engine import board, immortal, service
from sandbox.engine.loop import PollLoop
from sandbox.engine.zygote import IDLE_WARDENS
from sandbox.ns import userids

from . import plugins

LEVELS = tuple(IsolationLevel)
ROOT = os.getuid() == 0
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
# What stands ready for the next caller is nobody's leftover, but looks like one: it has tests of its own.
os.environ["PSIE_STANDING"] = "0"
TOKEN = f"/nonexistent/psie-test-{os.getpid()}-{os.urandom(4).hex()}"
ID_REGION = userids.id_region(userids.IDS_PER_SLOT * (userids.MAX_SANDBOXES + 1)) if ROOT else 0
KTHREADD = 2  # the parent of the kernel's own threads
# What may take a second here may take several under emulation: every bound of time in these tests is multiplied by this.
PATIENCE = float(os.environ.get("PSIE_TEST_PATIENCE", "1"))
SETTLE = 5.0 * PATIENCE  # seconds that a loaded machine gets to bury what has been killed
KNOWS_FILES = True  # whether temporary files of this user can only be of the test that runs
SOON = 1.0 * PATIENCE  # seconds in which nothing is left of a sandbox whose caller was killed

if TOKEN not in sys.path:
    sys.path.append(TOKEN)

Settings = Mapping[str, Any]


def open_sandbox(
    level: IsolationLevel,
    *,
    limits: Settings | None = None,
    permissions: Settings | None = None,
    config: Settings | None = None,
    **more: Any,
) -> EnhancedPluginSandbox:
    """A sandbox that is still to be opened, with what differs from the defaults; of the CPU it may use more, because on a slow
    machine whatever a test does would come up against that limit, and be told of it."""
    return EnhancedPluginSandbox(
        PluginLimitsV2(**{"max_cpu_percent": 400.0, **(limits or {})}),
        PluginPermissionsV2(**(permissions or {})),
        IsolationConfig(level=level, **(config or {})),
        **more,
    )


def call(level: IsolationLevel, function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """`function(*args)` in a sandbox of its own."""

    async def main() -> Any:
        async with open_sandbox(level, **settings) as sandbox:
            return await sandbox.execute_plugin_safe(function, *args)

    return asyncio.run(main())


def wait_until(condition: Callable[[], object], seconds: float = SETTLE) -> bool:
    """Poll until `condition()` is true; False if it is not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


async def wait_for(condition: Callable[[], object], seconds: float = SETTLE) -> None:
    """Poll on an event loop until `condition()` is true. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


# -- processes ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    state: str
    name: str
    uid: int


def read_proc(pid: str | int, name: str) -> bytes:
    """The beginning of one file of /proc/PID, without Python's file objects: this is most of what a slow machine does here."""
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


STATUS = re.compile(
    rb"Name:\t(.*)\n(?:Umask:.*\n)?State:\t(.).*\nTgid:.*\nNgid:.*\nPid:.*\nPPid:\t(\d+)\nTracerPid:.*\nUid:\t(\d+)"
)


def all_processes() -> dict[int, Process]:
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                fields = STATUS.match(read_proc(entry, "status"))
                assert fields is not None
                name, state, parent, uid = fields.groups()
                found[int(entry)] = Process(int(entry), int(parent), state.decode(), name.decode(errors="replace"), int(uid))
    return found


def engine_processes(token: str = TOKEN, every: dict[int, Process] | None = None) -> dict[int, Process]:
    """The living processes that a caller with `token` in its sys.path has started through psie, directly or not."""
    marked = {}
    for pid, process in (every if every is not None else all_processes()).items():
        if process.parent in (0, KTHREADD):
            continue
        with contextlib.suppress(OSError):
            if token.encode() in read_proc(pid, "cmdline"):
                marked[pid] = process
    return marked


def roles(caller: int, token: str = TOKEN) -> dict[str, list[int]]:
    """The pids of the engine's processes by what they are, as the way they descend from `caller` tells.

    A warden without a call is "idle", be it with a sandbox or without.
    """
    marked = engine_processes(token)
    names = ("zygote", "warden", "idle", "supervisor", "init", "worker", "other")
    found: dict[str, list[int]] = {name: [] for name in names}
    parents = {process.parent for process in marked.values()}

    def role(pid: int) -> str:
        parent = marked[pid].parent
        if parent == caller:
            return "zygote"
        if parent not in marked:
            return "other"
        above = role(parent)
        if above == "zygote":
            return "warden" if pid in parents else "idle"
        if above == "warden":
            return "init" if pid in parents else "supervisor"
        return "worker" if above == "init" else "other"

    for pid in marked:
        found[role(pid)].append(pid)
    return found


async def settle(level: IsolationLevel, **settings: Any) -> None:
    """Wait until the zygote for this level, which has no other sandbox, has made all immortal, where its Python can. Then it
    has the warden that served us last, and one that is new; those of before have gone."""
    zygotes: list[int] = []
    is_settled = not immortal.is_possible()
    while not is_settled:
        async with open_sandbox(level, **settings) as sandbox:
            is_settled = await sandbox.execute_plugin_safe(plugins.is_settled)
            zygotes.append(zygote_of(sandbox))
    if len(zygotes) > 1:
        await wait_for(lambda: sum(each.parent == zygotes[-1] for each in engine_processes().values()) == 2)


def zygote_of(sandbox: EnhancedPluginSandbox) -> int:
    """The pid of its own: those of sandboxes before may still be there."""
    assert sandbox._sandbox is not None
    return sandbox._sandbox.zygote.pid


# -- what is left ------------------------------------------------------------------------------------------------------


def slot_is_free(number: int) -> bool:
    """Whether no process of any sandbox holds this place of the ledger: fcntl(2), F_OFD_GETLK."""
    try:
        fd = os.open(os.path.join(state.folder("run"), "locks"), os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        request = struct.pack("hhqqiq", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
        return bool(struct.unpack("hhqqiq", answer)[0] == fcntl.F_UNLCK)
    finally:
        os.close(fd)


def is_orphan(process: Process) -> bool:
    """Whether it has, or as a zombie had, the id of a sandbox that is no more. Only root's sandboxes have ids of their own."""
    number = (process.uid - ID_REGION) // userids.IDS_PER_SLOT
    return ROOT and 0 < number <= userids.SLOTS and slot_is_free(number)


def ownerless(folder: str) -> frozenset[str]:
    """The entries of `folder`, named by slots, that belong to no living sandbox."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return frozenset()
    numbers = {name: int(name.rpartition("-")[2]) for name in names if name.count("-") == 2}
    left = [name for name, number in numbers.items() if name == userids.name_of(number) and slot_is_free(number)]
    return frozenset(f"{folder}/{name}" for name in left if os.path.exists(f"{folder}/{name}"))


def own_fds() -> frozenset[str]:
    """This process's descriptors without those that the engine keeps for its zygotes."""
    running = service._service
    kept: set[int] = set()
    if running is not None:
        loop = running.loop
        kept = {loop.epoll.fileno(), loop.wake_reader, loop.wake_writer, loop.alarm}
        for zygote in list(running.zygotes.values()):
            kept |= {zygote.control.fileno(), zygote.pidfd, zygote.leaves}
    found = set()
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                found.add(f"{name} {os.readlink('/proc/self/fd/' + name)}")
    return frozenset(each for each in found if f"/memfd:{board.NAME} " not in each)  # a process has one for good


def foreign_files() -> frozenset[str]:
    """Entries of the shared temporary folders that belong to a sandbox's id, or without root to our own."""
    found = set()
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                with contextlib.suppress(OSError):
                    owner = entry.stat(follow_symlinks=False).st_uid
                    if entry.name.startswith(("pytest-of-", "psie-script-")):
                        continue  # pytest's own, and cli_harness's for all tests
                    if owner >= ID_REGION if ROOT else owner == os.getuid():
                        found.add(entry.path)
    return frozenset(found)


def idle_wardens(caller: int, engine: dict[int, Process]) -> set[int]:
    """The wardens without a call that a zygote may keep: no more than it is meant to."""
    parents = {process.parent for process in engine.values()}
    found: dict[int, list[int]] = {pid: [] for pid, process in engine.items() if process.parent == caller}
    for pid, process in engine.items():
        if process.parent in found and pid not in parents and process.state != "Z":
            found[process.parent].append(pid)
    return {pid for wardens in found.values() for pid in sorted(wardens)[:IDLE_WARDENS]}


def snapshot(*, zombies: bool = False) -> dict[str, frozenset[str]]:
    """Everything of ours that could be left behind; zygotes and idle wardens, which wait for the next sandbox, are not.

    With `zombies` also what has died, but was not waited for by whoever has inherited it.
    """
    own = os.getpid()
    every = all_processes()
    engine = engine_processes(TOKEN, every)
    idle = idle_wardens(own, engine)
    left = [process for process in engine.values() if process.parent != own and process.pid not in idle]
    left += [process for process in every.values() if process.state == "Z" and process.parent == own]
    left += [process for process in every.values() if is_orphan(process) and (zombies or process.state != "Z")]
    facts = host.facts()
    leaves = facts.cgroup_folder + "/psie" if facts.cgroup_kind in ("root", "delegated") else ""
    return {
        "processes": frozenset(f"{process.pid} {process.name} ({process.state})" for process in left),
        "mounts": frozenset(Path("/proc/self/mountinfo").read_text().splitlines()),
        "descriptors": own_fds(),
        "links": frozenset(name for _, name in socket.if_nameindex()),
        "cgroups": ownerless(leaves) if leaves else frozenset(),
        "workspaces": ownerless(os.path.join(state.folder("lib"), "work")),
        "temporary files": foreign_files() if KNOWS_FILES else frozenset(),
    }


def news(before: dict[str, frozenset[str]], *, zombies: bool = False) -> dict[str, list[str]]:
    """What is there now and was not before."""
    now = snapshot(zombies=zombies)
    return {kind: sorted(now[kind] - before[kind]) for kind in now if now[kind] - before[kind]}


@contextlib.contextmanager
def nothing_left(*, zombies: bool = False) -> Iterator[None]:
    """What is done inside leaves nothing behind."""
    before = snapshot(zombies=zombies)
    yield
    left: dict[str, list[str]] = {}

    def clean() -> bool:
        nonlocal left
        left = news(before, zombies=zombies)
        return not left

    assert wait_until(clean), f"left behind: {left}"


def interrupt_start(monkeypatch: pytest.MonkeyPatch, begin: Callable[[], object]) -> None:
    """Ctrl-C while Thread.start waits for the thread that it has begun: that ends, and without a traceback."""
    start, mistakes, before = threading.Thread.start, list[object](), set(threading.enumerate())

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading, "excepthook", mistakes.append)
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begin()
        assert wait_until(lambda: set(threading.enumerate()) <= before)
        assert mistakes == []


def interrupt_stop(monkeypatch: pytest.MonkeyPatch, stop: Callable[[], object]) -> None:
    """Ctrl-C when the caller, if anybody, has just closed the loop; then once more, without."""
    close = PollLoop.close

    def interrupted(loop: PollLoop) -> None:
        close(loop)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(PollLoop, "close", interrupted)
        stop()
    stop()


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process may open so many files, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 50, hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(count):
            os.close(held.pop())
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
