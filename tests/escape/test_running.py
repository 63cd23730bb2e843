"""psie ps and psie kill believe no plugin: it makes no entry, cannot hide its sandbox, and gets nobody else killed.

Each attack is first carried out by a process that nothing holds, where it works: that of this user, who may do all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from escape import kit
from sandbox import running, state
from sandbox.config import IsolationLevel
from sandbox.engine import board, channel
from sandbox.errors import ResourceError
from sandbox.selftest import trial
from sandbox.selftest.attacks import LEVELS

SLOT = 4000  # of a ledger of 4096 places, which nobody has
FORGED = "f" * 16


@pytest.fixture(params=LEVELS, ids=lambda level: level.value)
def level(request: pytest.FixtureRequest) -> IsolationLevel:
    chosen: IsolationLevel = request.param
    if kit.why_closed(chosen):
        pytest.skip(f"level {chosen.value} cannot be opened: {kit.why_closed(chosen)}")
    return chosen


# -- an entry --------------------------------------------------------------------------------------------------------------


def forge(locks: str, slot: int, head: bytes, line: bytes, seconds: float) -> list[str]:
    """Look like a process that has a sandbox: its descriptors, its lock, its board. What was refused is left out, and told."""
    import fcntl
    import os
    import struct
    import time

    refused = []
    lock = -1
    try:
        lock = os.open(locks, os.O_WRONLY)
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, struct.pack("hhqqiq", fcntl.F_WRLCK, os.SEEK_SET, slot, 1, 0, 0))
    except OSError:
        refused.append("lock")
    try:
        made = os.memfd_create("psie sandboxes")
    except OSError:
        refused.append("board")
        made = os.open("psie sandboxes", os.O_RDWR | os.O_CREAT)
    os.pwrite(made, head[:16] + os.getpid().to_bytes(8, "little") + head[24:], 0)
    os.pwrite(made, line.replace(b"LOCKFD", str(max(lock, 0)).rjust(6, "0").encode()), 4096)
    print("ready", flush=True)
    time.sleep(seconds)
    return refused


def entry(**facts: Any) -> tuple[bytes, bytes]:
    """The head of a board, and a line of it for `forge`."""
    told = {
        "id": FORGED,
        "level": "strict",
        "door": "library",
        "since": board.now(),
        "zygote": 1,
        "slot": SLOT,
        "lock": "LOCKFD",
    }
    data = channel.pack(
        "sandbox", {**told, "place": "a-1-1", "memory": 1, "name": "", "warden": 0, "told": 0, "recipe": "", **facts}
    )
    line = bytearray(board.LINE)
    line[0] = board.RUNNING
    line[board.FACTS : board.FACTS + board.SIZE] = len(data).to_bytes(board.SIZE, "little")
    line[board.FACTS + board.SIZE : board.FACTS + board.SIZE + len(data)] = data
    return board.MAGIC + bytes(8) + (1).to_bytes(8, "little"), bytes(line)


def locks() -> str:
    return os.path.join(state.folder("run"), "locks")


@contextlib.contextmanager
def forger(*, child: str = "", **facts: Any) -> Iterator[tuple[int, int]]:
    """A process that nothing holds and that does so; (its pid, the pid of a child of it that runs the code `child`)."""
    source = "import sys, subprocess\n" + textwrap.dedent(source_of(forge))
    start = (
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}]).pid if {bool(child)} else 0\nprint(child, flush=True)\n"
    )
    rest = "head, line = eval(sys.stdin.readline())\nforge(sys.argv[1], int(sys.argv[2]), head, line, 60)\n"
    command = [sys.executable, "-c", source + start + rest, locks(), str(SLOT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pid = int(process.stdout.readline())
            given = {name: pid if value == "CHILD" else value for name, value in facts.items()}
            process.stdin.write(repr(entry(**given)) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ready\n"
            yield process.pid, pid
        finally:
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            process.kill()


def source_of(function: Callable[..., Any]) -> str:
    import inspect

    return inspect.getsource(function)


def ids() -> set[str]:
    return {each.id for each in running.list_running()}


@pytest.mark.long
def test_an_entry_that_a_plugin_makes(level: IsolationLevel) -> None:
    with forger() as (owner, _):
        (forged,) = [each for each in running.list_running() if each.id == FORGED]  # who may do all of it is believed
        assert forged.owner_pid == owner
    assert FORGED not in ids()
    head, line = entry()

    async def go() -> Any:
        async with trial.open_sandbox(level) as one:
            call = asyncio.create_task(one.execute_plugin_safe(forge, locks(), SLOT, head, line, 1.5))
            seen: set[str] = set()
            hidden: list[str] = []
            while not call.done():
                with running.Look() as look:
                    seen |= {each.id for each in look.sandboxes()}
                    hidden += look.not_shown()
                await asyncio.sleep(0.2)
            return await call, seen, hidden

    refused, seen, hidden = trial.bounded(go())
    assert "lock" in refused
    assert seen
    assert FORGED not in seen
    assert not [each for each in hidden if "containers" in each]
    kit.still_works(level)


def test_the_board_of_the_owner(level: IsolationLevel) -> None:
    """A plugin that could write to it would rewrite every entry of its caller."""
    board.own()

    def open_boards() -> list[str]:
        import os

        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc/self") else []):
            try:
                names = os.listdir(f"/proc/{pid}/fd")
            except OSError:
                continue
            for path in (f"/proc/{pid}/fd/{name}" for name in names):
                try:
                    if "psie sandboxes" in os.readlink(path):
                        os.close(os.open(path, os.O_RDWR))
                        found.append(path)
                except OSError:
                    continue
        return found

    assert any(path.startswith(f"/proc/{os.getpid()}/") for path in open_boards())
    outcome = trial.run_inside(open_boards, level=level)
    assert outcome.error is None
    assert outcome.value == []


# -- out of sight ----------------------------------------------------------------------------------------------------------


def hide(seconds: float) -> None:
    """Close all that there is, have another name, be in another session, and stop whom it can."""
    import ctypes
    import os
    import signal
    import time

    for attempt in (
        os.setsid,
        lambda: os.kill(os.getppid(), signal.SIGSTOP),
        lambda: os.closerange(20, 4096),
        lambda: ctypes.CDLL(None).prctl(15, b"\n) Z 1 1\0", 0, 0, 0),  # PR_SET_NAME
    ):
        try:
            attempt()
        except (OSError, AttributeError):
            continue
    time.sleep(seconds)


@pytest.mark.long
def test_a_sandbox_that_hides(level: IsolationLevel) -> None:
    with forger() as (owner, _):
        assert FORGED in ids()
        os.kill(owner, 9)  # an owner that has let go of its place is not shown
        os.waitid(os.P_PID, owner, os.WEXITED | os.WNOWAIT)
        assert FORGED not in ids()

    async def go() -> list[tuple[str, int]]:
        async with trial.open_sandbox(level) as one:
            call = asyncio.create_task(one.execute_plugin_safe(hide, 1.5))
            await asyncio.sleep(1.0)
            seen = [(each.state, len(each.processes())) for each in running.list_running() if each.sandbox_id == one.sandbox_id]
            with contextlib.suppress(Exception):
                await call
            return seen

    assert trial.bounded(go()) == [("running", 1)]
    kit.still_works(level)


# -- another's end ---------------------------------------------------------------------------------------------------------

# A process of the bystander's kind: it says when it is there, and goes on.
BYSTANDER = "import time; time.sleep(60)"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "KEEP_TRYING", 0.5)


@pytest.mark.usefixtures("impatient")
def test_a_warden_that_is_its_owners_is_killed() -> None:
    """So that the tests below refuse for their own reasons: all is true here, and so it works."""
    with forger(child=BYSTANDER, warden="CHILD", zygote="CHILD", told=board.now() + 10**12) as (_, child):
        with pytest.raises(ResourceError, match="has not cleaned up"):
            running.kill(FORGED)
        assert state_of(child) == "Z"


@pytest.mark.usefixtures("impatient")
def test_a_process_that_has_got_the_number_of_a_warden() -> None:
    """It is younger than what the owner has said of its warden."""
    with forger(child=BYSTANDER, warden="CHILD", zygote="CHILD", told=1) as (_, child):
        with pytest.raises(ResourceError, match="no warden"):
            running.kill(FORGED)
        assert state_of(child) in "SRD"


@pytest.mark.usefixtures("impatient")
def test_a_warden_that_is_somebody_elses_process() -> None:
    with subprocess.Popen([sys.executable, "-c", BYSTANDER]) as bystander:
        try:
            for zygote in (bystander.pid, os.getpid()):
                with forger(warden=bystander.pid, zygote=zygote, told=board.now() + 10**12):
                    with pytest.raises(ResourceError, match="no warden"):
                        running.kill(FORGED)
                    assert state_of(bystander.pid) in "SRD"
        finally:
            bystander.kill()


def test_a_warden_that_has_another_sandbox_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the kill its own has gone: it is let go on."""
    again = running.again
    with forger(child=BYSTANDER, warden="CHILD", zygote="CHILD", told=board.now() + 10**12) as (_, child):
        monkeypatch.setattr(running, "again", lambda owner, sandbox: None)
        running.kill(FORGED)
        monkeypatch.setattr(running, "again", again)
        end = time.monotonic() + 5
        while state_of(child) == "T" and time.monotonic() < end:
            time.sleep(0.01)
        assert state_of(child) in "SRD"
