"""All calls are forks of one zygote: nothing of one is seen by the next, and none reaches the zygote.

What forks share - the seed of hashes, the layout of addresses - only sandboxes of one caller share, and not for ever.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from escape import kit
from sandbox import EnhancedPluginSandbox
from sandbox.config import IsolationLevel
from sandbox.engine import service
from sandbox.ns import processes
from sandbox.selftest import attacks, trial
from sandbox.selftest.attacks import ALL, MINIMAL, PATIENCE, ROOT, STRICT, scrambled
from sandbox.selftest.process import memory_of_the_caller

PRELOAD = ("numpy.random", "uuid", "ssl", "random", "tempfile", "secrets")


@pytest.fixture(params=ALL)
def level(request: pytest.FixtureRequest) -> IsolationLevel:
    found: IsolationLevel = request.param
    if kit.why_closed(found):
        pytest.skip(f"level {found.value} cannot be opened: {kit.why_closed(found)}")
    return found


async def call_each(level: IsolationLevel, functions: list[Callable[[], Any]], **config: Any) -> tuple[list[Any], list[Any]]:
    """What they return in one sandbox, one call each, and what they return in another sandbox after that."""
    found = []
    for _ in range(2):
        async with trial.open_sandbox(level, config=config) as one:
            found.append([await one.execute_plugin_safe(function) for function in functions])
    return found[0], found[1]


# -- random numbers ----------------------------------------------------------------------------------------------------------


def draw() -> dict[str, str]:
    """From every generator that modules keep."""
    import os
    import random
    import secrets
    import ssl
    import sys
    import tempfile
    import uuid

    found = {
        "random": repr(random.random()),
        "random, SystemRandom": repr(random.SystemRandom().random()),
        "uuid1": str(uuid.uuid1().clock_seq) + str(uuid.uuid1().time),
        "uuid4": str(uuid.uuid4()),
        "ssl": ssl.RAND_bytes(8).hex(),
        "secrets": secrets.token_hex(),
        "os": os.urandom(8).hex(),
        "tempfile": next(tempfile._get_candidate_names()),  # type: ignore[attr-defined]
    }
    if "numpy.random" in sys.modules:
        numpy = sys.modules["numpy"]
        found["numpy"] = repr(numpy.random.random())
        found["numpy, default_rng"] = repr(numpy.random.default_rng().random())
    return found


def has_numpy() -> bool:
    return subprocess.run([sys.executable, "-c", "import numpy"], capture_output=True, check=False).returncode == 0


@pytest.mark.long
def test_calls_draw_different_numbers(level: IsolationLevel) -> None:
    """Outside, two forks of a process that has imported numpy draw the same from it."""
    preload = PRELOAD if has_numpy() else PRELOAD[1:]
    if has_numpy():
        code = "import os, numpy.random\nfor _ in 1, 2:\n if not os.fork():\n  print(numpy.random.random()); break\n os.wait()"
        outside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert outside[0] == outside[1]
    (first, second), (third, _) = trial.bounded(call_each(level, [draw, draw], preload=preload))
    for name in first:
        assert len({first[name], second[name], third[name]}) == 3, name
    assert ("numpy" in first) == has_numpy()


# -- the state of a process --------------------------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    """Everything of this process that a call before might have changed."""
    import builtins
    import gc
    import os
    import resource
    import signal
    import stat
    import sys
    import threading

    umask = os.umask(0)
    os.umask(umask)
    descriptors = []
    for fd in range(256):
        try:
            descriptors.append(stat.S_IFMT(os.fstat(fd).st_mode))
        except OSError:
            continue
    handlers = {number: repr(signal.getsignal(number)) for number in range(1, 65) if number not in (32, 33)}
    with open("/proc/thread-self/stat") as file:
        stat_line = file.read()  # os.getpriority() is not to be had at every level
    with open("/proc/thread-self/comm") as comm, open("/proc/self/status") as status:
        lines = [line for line in status if line.startswith(("Sig", "Shd", "Threads", "Cpus_allowed:", "CoreDumping"))]
        name = comm.read()
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": umask,
        "descriptors": descriptors,
        "handlers": handlers,
        "status": [line for line in lines if not line.startswith("SigQ")],
        "timers": [signal.getitimer(which) for which in (0, 1, 2)],
        "modules": sorted(sys.modules),
        "path": list(sys.path),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), sys.getprofile() is None, sys.gettrace() is None],
        "finders": [str(type(each)) for each in (*sys.meta_path, *sys.path_hooks)],
        "builtins": sorted(vars(builtins)),
        "settings": [sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits(), gc.get_threshold()],
        "limits": [
            resource.getrlimit(which) for which in range(resource.RLIM_NLIMITS if hasattr(resource, "RLIM_NLIMITS") else 16)
        ],
        "priority": stat_line.rpartition(")")[2].split()[16],
        "threads": [thread.name for thread in threading.enumerate()],
        "name": name,
        "files": sorted(os.listdir()),
        "arguments": list(sys.argv),
    }


def disturb() -> int:
    """Change all of that; returns how many changes there were."""
    import builtins
    import colorsys
    import ctypes
    import gc
    import os
    import resource
    import signal
    import sys
    import threading
    import wave

    changes: list[Callable[[], object]] = [
        lambda: os.environ.update(PSIE_ESCAPE_LEFT="yes", PATH="/evil", LD_PRELOAD="/evil.so"),
        lambda: os.chdir("/"),
        lambda: os.umask(0o777),
        lambda: [os.pipe() for _ in range(10)],
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)),
        lambda: signal.setitimer(signal.ITIMER_REAL, 1000),
        lambda: sys.path.insert(0, "/evil"),
        lambda: sys.meta_path.insert(0, wave),  # type: ignore[arg-type]
        lambda: setattr(builtins, "open", colorsys.rgb_to_hsv),
        lambda: setattr(builtins, "left", "here"),
        lambda: setattr(sys, "excepthook", print),
        lambda: sys.setrecursionlimit(77_777),
        lambda: sys.setswitchinterval(7),
        lambda: gc.set_threshold(7, 7, 7),
        lambda: sys.set_int_max_str_digits(0),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
        lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        lambda: ctypes.CDLL(None).prctl(15, b"left", 0, 0, 0),
        lambda: threading.Thread(target=threading.Event().wait, daemon=True, name="left").start(),
        lambda: os.register_at_fork(after_in_child=lambda: setattr(builtins, "forked", True)),
        *(lambda number=number: signal.signal(number, signal.SIG_IGN) for number in (2, 10, 12, 14, 15, 17)),
    ]
    done = 0
    for change in changes:
        try:
            change()
            done += 1
        except (OSError, RuntimeError, ValueError):
            continue  # refused at this level
    return done


def test_nothing_of_a_call_is_left_for_the_next(level: IsolationLevel) -> None:
    """In the same sandbox, and in the next one of the same zygote. Outside, `disturb` changes most of what `state` sees."""
    (before, changes, after), (other, _, _) = trial.bounded(call_each(level, [state, disturb, state]))
    assert changes > 15
    assert after == before
    before["environment"].pop("HOME"), other["environment"].pop("HOME")  # MINIMAL: a folder of each sandbox's own
    if level is MINIMAL:
        for found in (before, other):
            found.pop("folder"), found["environment"].pop("TMPDIR"), found["environment"].pop("PWD", None)
    assert other == before


def test_the_state_that_is_compared_would_show_it() -> None:
    """Outside, in one process, the same changes are seen: what is compared is not blind."""
    code = "import sys; sys.path[:] = {path!r}\nfrom escape.test_hygiene import state, disturb\nimport colorsys, wave, ctypes\n"
    code += "one = state()\ndisturb()\nopen = __import__('io').open\n__builtins__.open = open\ntwo = state()\n"
    code += "print(*sorted(name for name in one if one[name] != two[name]))"
    done = subprocess.run([sys.executable, "-c", code.format(path=sys.path)], capture_output=True, text=True, check=False)
    seen = set(done.stdout.split())
    expected = {"environment", "folder", "umask", "descriptors", "handlers", "status", "timers", "path", "hooks", "finders"}
    assert expected | {"builtins", "settings", "limits", "threads", "name"} <= seen, done.stderr


def test_memory_of_a_call_is_not_in_the_next(level: IsolationLevel) -> None:
    """What one call was given, and what it held, is searched for by the next, in its sandbox and in another."""
    text = "given to one call " + os.urandom(8).hex()

    def hold(text: str) -> int:
        return len([text + str(number) for number in range(1000)])

    async def go() -> list[str]:
        async with trial.open_sandbox(level) as one, trial.open_sandbox(level) as other:
            await one.execute_plugin_safe(hold, text)
            found = [await each.execute_plugin_safe(memory_of_the_caller, scrambled(text)) for each in (one, other)]
            return [str(answer) for answer in found]

    assert trial.bounded(go()) == ["stopped: not there"] * 2


PLACE = "secret-" + os.urandom(6).hex()  # by which a folder and a host that another sandbox was given are known


@pytest.fixture
def granted_folder() -> Iterator[Path]:
    """To which every id finds its way."""
    with tempfile.TemporaryDirectory(prefix=PLACE, dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_one_sandbox_was_given_is_in_no_other_ones_memory(level: IsolationLevel, granted_folder: Path) -> None:
    """The settings of a sandbox, as far as they are its own, are not the next one's to read, while it stands and afterwards."""
    permissions: dict[str, Any] = {"allowed_directories": [str(granted_folder)], "allow_file_creation": True}
    if ROOT:
        permissions |= {"allow_network_access": True, "allowed_hosts": [f"{PLACE}.localhost", "127.0.0.1"]}

    async def go() -> list[str]:
        async with trial.open_sandbox(level, permissions=permissions) as one:
            found = [await one.execute_plugin_safe(memory_of_the_caller, scrambled(PLACE))]
            async with trial.open_sandbox(level) as other:
                found.append(await other.execute_plugin_safe(memory_of_the_caller, scrambled(PLACE)))
        async with trial.open_sandbox(level) as later:
            found.append(await later.execute_plugin_safe(memory_of_the_caller, scrambled(PLACE)))
        return [str(answer) for answer in found]

    own, *others = trial.bounded(go())
    assert own.startswith("escaped")  # its own it knows, so that what is looked for would be found
    assert others == ["stopped: not there"] * 2


# -- the zygote --------------------------------------------------------------------------------------------------------------


def zygotes() -> set[int]:
    running = service._service
    return {zygote.pid for zygote in running.zygotes.values() if not zygote.closed} if running is not None else set()


@contextmanager
def fresh_zygotes() -> Iterator[None]:
    """None of those that other tests have used, and none is left for them."""
    service.shut_down()
    try:
        yield
    finally:
        service.shut_down()


def hold_still(text: str) -> None:
    """Keep a text in memory until the host has looked."""
    import os
    import time

    held = [text + str(number) for number in range(100)]
    open("ready", "w").close()
    end = time.monotonic() + 8 * PATIENCE
    while not os.path.exists("go") and time.monotonic() < end:
        time.sleep(0.005)
    assert held


async def family(one: EnhancedPluginSandbox) -> dict[str, list[int]]:
    """The processes of a sandbox whose call has begun."""
    end = time.monotonic() + attacks.SECONDS
    while not any(entry.path == "ready" for entry in one.list_files()):
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
    (zygote,) = zygotes()
    wardens = processes.children(zygote)
    inits = [init for warden in wardens for init in processes.children(warden)]
    return {
        "zygote": [zygote],
        "warden": wardens,
        "init": inits,
        "worker": [pid for init in inits for pid in processes.children(init)],
    }


def holds(pid: int, text: bytes) -> bool:
    """Whether the text is anywhere in a process's memory, which root may read."""
    with open(f"/proc/{pid}/mem", "rb", 0) as memory, open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            words = line.split()
            if words[1].startswith("rw"):
                start, end = (int(part, 16) for part in words[0].split("-"))
                try:
                    if text in os.pread(memory.fileno(), end - start, start):
                        return True
                except OSError:
                    continue
    return False


@pytest.mark.skipif(not ROOT, reason="only root may read the memory of a zygote")
def test_nothing_of_a_plugin_reaches_the_zygote(level: IsolationLevel) -> None:
    """Neither code nor arguments: only the worker has them, which runs the plugin. So the template runs none of it."""
    text = "an argument " + os.urandom(8).hex()

    async def go() -> dict[str, list[bool]]:
        async with trial.open_sandbox(level) as one:
            task = asyncio.create_task(one.execute_plugin_safe(hold_still, text))
            found = await family(one)
            answer = {role: [holds(pid, text.encode()) for pid in pids] for role, pids in found.items()}
            one.write_file("go", b"")
            await task
            return answer

    with fresh_zygotes():
        answer = trial.bounded(go())
    assert answer.pop("worker") == [True]
    assert len(answer) == 3
    for role, found in answer.items():
        assert not any(found), role
        assert found, role


def sockets(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
    return {target for target in found if target.startswith("socket:")}


@pytest.mark.skipif(not ROOT, reason="only root may see the descriptors of a zygote")
def test_a_worker_has_no_way_to_the_zygote(level: IsolationLevel) -> None:
    """Its one socket is that of the call, whose other end the caller has; no process on the way up has it as well."""

    async def go() -> tuple[set[str], dict[str, set[str]]]:
        async with trial.open_sandbox(level) as one:
            task = asyncio.create_task(one.execute_plugin_safe(hold_still, ""))
            found = await family(one)
            (worker,) = found.pop("worker")
            own = sockets(worker)
            above = {role: set().union(*(sockets(pid) for pid in pids)) for role, pids in found.items()}
            one.write_file("go", b"")
            await task
            return own, above

    with fresh_zygotes():
        own, above = trial.bounded(go())
    assert len(own) == 1
    for role, theirs in above.items():
        assert not own & theirs, role
        assert theirs, role


def knock() -> list[str]:
    """Write to every descriptor but the standard ones, ask for descriptors of whoever is above, and signal them."""
    import os
    import signal
    import socket

    answers = []
    for fd in range(3, 64):
        try:
            os.fstat(fd)
        except OSError:
            continue
        sock = socket.socket(fileno=os.dup(fd))
        for message in (b"failed\0line\0x\0errno\x001\0path\0\0text\0x\0sandbox\0x", b"free", b"closed\0sandbox\0x\0left\0x"):
            sock.send(message, socket.MSG_DONTWAIT)
        sock.settimeout(0.1)
        try:
            answers.append(repr(sock.recv(100)))
        except TimeoutError:
            pass
    for pid in (os.getppid(), 1):
        for number in (signal.SIGUSR1, signal.SIGHUP):
            try:
                os.kill(pid, number) if pid != os.getppid() else None
            except OSError:
                continue
    return answers


def test_what_a_worker_says_the_zygote_does_not_hear(level: IsolationLevel) -> None:
    """Messages of the kinds that zygote and warden send: they arrive nowhere, nobody answers, and the zygote goes on."""
    with fresh_zygotes():

        async def go() -> tuple[set[int], trial.Outcome, set[int], object]:
            async with trial.open_sandbox(level) as one:
                before = zygotes()
                try:
                    outcome = trial.Outcome(await one.execute_plugin_safe(knock), None, one.get_violations())
                except Exception as error:
                    outcome = trial.Outcome([], error, one.get_violations())
                return before, outcome, zygotes(), await one.execute_plugin_safe(lambda: "alive")

        before, outcome, after, answer = trial.bounded(go())
    assert outcome.value == []
    assert before == after
    assert len(before) == 1
    assert answer == "alive"


def layout() -> tuple[int, int, int]:
    """The seed of hashes, an address of the interpreter's, and one of the heap's."""
    import sys

    return hash("psie"), id(int), id(sys)


def test_a_zygote_is_replaced(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forks share layout and seed, which a plugin may find out and another may use: so it serves only so many."""
    monkeypatch.setattr(service, "SANDBOXES_PER_ZYGOTE", 2)

    async def go() -> list[tuple[frozenset[int], Any]]:
        found = []
        for _ in range(5):
            async with trial.open_sandbox(level) as one:
                found.append((frozenset(zygotes()), await one.execute_plugin_safe(layout)))
        return found

    with fresh_zygotes():
        found = trial.bounded(go())
    pids, layouts = [pids for pids, _ in found], [layout for _, layout in found]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
    assert layouts[0] == layouts[1]
    assert layouts[2] == layouts[3]
    for one, other in ((0, 2), (2, 4)):
        assert layouts[one][0] != layouts[other][0]
        assert layouts[one][1:] != layouts[other][1:]


CALLER = """
import asyncio, sys
sys.path[:] = {path!r}
from escape.test_hygiene import layout, zygotes
from sandbox.config import IsolationLevel
from sandbox.selftest import trial

async def go():
    async with trial.open_sandbox(IsolationLevel({level!r})) as one:
        print(*sorted(zygotes()), *(await one.execute_plugin_safe(layout)))

asyncio.run(go())
"""


def test_a_zygote_serves_one_caller() -> None:
    """Two callers of one user share neither zygote nor seed nor layout; nor does a fork of a caller use its parent's."""
    code = CALLER.format(path=sys.path, level=STRICT.value)
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=2 * attacks.SECONDS)[0].split() for process in started)
    assert len(first) == len(second) == 4
    assert all(one != other for one, other in zip(first[:2], second[:2], strict=True))
    assert first[2:] != second[2:]
    kit.still_works(STRICT)
    mine = zygotes()
    assert mine
    assert not mine & {int(first[0]), int(second[0])}


def test_signals_that_the_caller_blocks_are_not_blocked(level: IsolationLevel, tmp_path: Path) -> None:
    """Or ignores: a zygote that has inherited it would pass it on to every plugin."""
    code = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [10, 12, 14, 15]); signal.signal(12, signal.SIG_IGN)\n"
    code += "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    code += (
        CALLER.format(path=sys.path, level=level.value).replace("layout)", "masks)").replace("import layout", "import masks")
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * attacks.SECONDS, check=False
    )
    assert done.stdout.split()[1:] == ["0000000000000000", "True"], done.stderr


def masks() -> tuple[str, bool]:
    import signal

    with open("/proc/self/status") as file:
        blocked = next(line.split()[1] for line in file if line.startswith("SigBlk"))
    return blocked, signal.getsignal(12) == signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
