"""Other processes, other sandboxes, the host's sockets, shared memory, names and networks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration import harness, plugins

from escape import kit
from sandbox.config import IsolationLevel
from sandbox.engine import service, warden
from sandbox.selftest import families, trial  # noqa: F401 - registers the attacks
from sandbox.selftest.attacks import (
    ALL,
    PATIENCE,
    REGISTRY,
    ROOT,
    SIGNALS_KEPT,
    first_escape,
    scrambled,
)

# -- other sandboxes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ALL)
def test_another_sandbox_is_closed(level: IsolationLevel) -> None:
    """Its worker can be neither signalled nor read, though the attacker is told its pid and may have the same id.

    Signals of the same id reach it where neither a PID namespace nor Landlock keeps them in, which psie says.
    """
    keeps_signals = ROOT or level in SIGNALS_KEPT

    def stand() -> str:
        import os
        import time

        with open("pid.new", "w") as file:
            file.write(str(os.getpid()))
        os.rename("pid.new", "pid")
        end = time.monotonic() + 8 * PATIENCE
        while not os.path.exists("stop") and time.monotonic() < end:
            time.sleep(0.005)
        return "lived"

    def assault(pid: int, path: str) -> str:
        import os
        import signal

        if os.getpid() < 10:  # a PID namespace: the pid means somebody else here
            return "stopped: not visible"
        signals = {"kill": lambda: os.kill(pid, signal.SIGKILL), "stop": lambda: os.kill(pid, signal.SIGSTOP)}
        return first_escape(
            {
                "mem": lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY),
                "environ": lambda: open(f"/proc/{pid}/environ").read(),
                "fd": lambda: os.readlink(f"/proc/{pid}/fd/3"),
                "write": lambda: open(path + "/stop", "w"),
                **(signals if keeps_signals else {}),
            }
        )

    async def go() -> tuple[str, str]:
        async with trial.open_sandbox(level) as one, trial.open_sandbox(level) as other:
            standing = asyncio.create_task(one.execute_plugin_safe(stand))
            while not (one.temp_directory / "pid").exists():
                await asyncio.sleep(0.005)
            pid = int((one.temp_directory / "pid").read_text())
            answer = await other.execute_plugin_safe(assault, pid, os.path.realpath(one.temp_directory))
            (one.temp_directory / "stop").touch()
            return answer, await standing

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    answer, lived = trial.bounded(go())
    assert answer.startswith("stopped"), answer
    assert lived == "lived"


@pytest.mark.parametrize("level", ALL)
def test_names_of_other_sandboxes_are_not_in_memory(level: IsolationLevel) -> None:
    """All are forks of one process: what that one was told about a sandbox must not be readable in the next."""
    from sandbox.selftest.process import memory_of_the_caller

    async def go() -> str:
        name = "of another caller " + os.urandom(8).hex()
        async with trial.open_sandbox(level, sandbox_id=name) as one, trial.open_sandbox(level) as other:
            await one.execute_plugin_safe(lambda: None)
            return str(await other.execute_plugin_safe(memory_of_the_caller, scrambled(name)))

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    assert trial.bounded(go()).startswith("stopped")


@pytest.mark.skipif(ROOT, reason="root may have as many descriptors under way as it likes, and no sandbox has its id")
@pytest.mark.parametrize("level", ALL)
def test_descriptors_under_way_keep_no_sandbox_from_opening(level: IsolationLevel) -> None:
    """Those of a user are counted together, and who has a lower limit than that can send none: psie sends them all the time."""

    def hold() -> str:
        import os
        import socket
        import time

        ours, theirs = socket.socketpair()
        held = 0
        try:
            while True:
                socket.send_fds(ours, [b"x"], [0] * 250)
                held += 250
        except OSError as error:
            told = f"{held} until {error.strerror}"
        with open("held.new", "w") as file:
            file.write(told)
        os.rename("held.new", "held")
        end = time.monotonic() + 8 * PATIENCE
        while not os.path.exists("stop") and time.monotonic() < end:
            time.sleep(0.005)
        theirs.close()
        return told

    async def go() -> tuple[str, int]:
        async with trial.open_sandbox(level, {"max_open_files": 1024}) as one:
            holding = asyncio.create_task(one.execute_plugin_safe(hold))
            while not (one.temp_directory / "held").exists():
                await asyncio.sleep(0.005)
            ours, theirs = socket.socketpair()
            with ours, theirs, pytest.raises(OSError, match=os.strerror(errno.ETOOMANYREFS)):
                socket.send_fds(ours, [b"x"], [0])
            async with trial.open_sandbox(level) as other:
                answer = await other.execute_plugin_safe(lambda: 1)
            (one.temp_directory / "stop").touch()
            return await holding, answer

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
    try:
        held, answer = trial.bounded(go())
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(1024, before[1]), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert answer == 1, held


@contextlib.contextmanager
def many_locks_on(processor: int, places: int) -> Iterator[None]:
    """A process of the host's that has so many record locks, which the kernel lists with those of this processor."""
    with tempfile.TemporaryFile() as file:
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.sched_setaffinity(0, {processor})
            fcntl.lockf(file, fcntl.LOCK_EX, 2 * places, 0)
            for place in range(2 * places - 2, 0, -2):
                fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
            os.write(told, b"x")
            signal.pause()
        os.close(told)
        try:
            assert os.read(ready, 1) == b"x"
            yield
        finally:
            os.close(ready)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@contextlib.contextmanager
def all_on(processor: int) -> Iterator[None]:
    """Whatever this process does, and what it starts meanwhile."""
    before = os.sched_getaffinity(0)
    service.shut_down()  # a zygote that is there has been started already
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {processor})
    try:
        yield
    finally:
        service.shut_down()
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), before)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="the locks of each processor are listed in turn, and here is one")
@pytest.mark.parametrize("name", ["locks_of_many_places", "locks_of_mapped_files"])
@pytest.mark.parametrize("level", ALL)
@pytest.mark.long
def test_locks_of_others_hide_none(level: IsolationLevel, name: str, tmp_path: Path) -> None:
    """/proc/locks has those of the first processor first, and takes long: many that are not the plugin's are no way past it."""
    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    first, *_, last = sorted(os.sched_getaffinity(0))
    one = next(known for known in REGISTRY if known.name == name)
    with many_locks_on(first, 20_000), all_on(last):
        assert trial.attempt_inside(one, level, tmp_path) == "memory"


def test_locks_are_counted_where_nobody_may_look_at_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user at level minimal, whose plugin is not to be looked into by any process of his."""
    monkeypatch.setattr(warden, "names_in", lambda folder: [])
    assert warden.locks_of([7], ["7"] * warden.LOCKS) == warden.LOCKS


@pytest.mark.long
def test_locks_of_others_keep_no_warden_busy() -> None:
    """To list them takes long, and each user of this host may have many."""
    per_second = os.sysconf("SC_CLK_TCK")

    def seconds_of(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / per_second

    async def main() -> float:
        async with harness.open_sandbox(IsolationLevel.MINIMAL) as sandbox:
            running = asyncio.create_task(sandbox.execute_plugin_safe(plugins.signal_and_sleep))
            await asyncio.sleep(0.5)
            (busy,) = harness.roles(os.getpid())["warden"]
            before = seconds_of(busy)
            await asyncio.sleep(2)
            used = seconds_of(busy) - before
            running.cancel()
            await asyncio.wait([running])
            return used

    with many_locks_on(min(os.sched_getaffinity(0)), 20_000):
        assert asyncio.run(main()) < 0.25


@pytest.mark.parametrize("level", ALL)
def test_locks_of_a_process_with_threads_are_counted_once(level: IsolationLevel) -> None:
    """All of its threads show them, where they have its descriptors in common."""
    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))

    def hold_some() -> int:
        import fcntl
        import tempfile
        import threading
        import time

        for _ in range(3):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        with tempfile.TemporaryFile() as file:
            fcntl.lockf(file, fcntl.LOCK_EX, 2 * 4000, 0)
            for place in range(2 * 4000 - 2, 0, -2):
                fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
            time.sleep(1.5)
        return 4000

    with many_locks_on(min(os.sched_getaffinity(0)), 20_000):
        assert harness.call(level, hold_some) == 4000


def many_entries_of_epoll(seconds: float) -> str:
    """Of each file by many numbers; and the epoll is open many times: of each descriptor /proc tells megabytes."""
    told = select.epoll()
    files = [os.pipe()[0] for _ in range(150)]
    numbers = range(400, 600)
    for file in files:
        for number in numbers:
            os.dup2(file, number)
            told.register(number)
    for number in range(600, 990):
        os.dup2(told.fileno(), number)
    time.sleep(seconds)
    return "escaped: it has had all the time"


@pytest.mark.parametrize("level", ALL)
@pytest.mark.long
def test_locks_of_others_delay_no_deadline(level: IsolationLevel) -> None:
    """While there are many, psie looks at what the plugin has open, which must not take long."""
    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    limits = {"max_execution_time_seconds": 3 * PATIENCE, "max_open_files": 1000}
    with many_locks_on(min(os.sched_getaffinity(0)), 20_000):
        began = time.monotonic()
        outcome = trial.run_inside(many_entries_of_epoll, 15 * PATIENCE, level=level, limits=limits)
        took = time.monotonic() - began
    assert getattr(outcome.error, "limit", None) == "time", outcome
    assert took < 6 * PATIENCE
