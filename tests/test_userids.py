"""The ledger: several processes at once, kills at any moment, older versions beside ours, and what a claim costs."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox.ns import userids
from sandbox.ns.userids import NoPlaceError, Slot

MB = 1 << 20
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a ledger of our own."""
    monkeypatch.setattr(userids, "state", SimpleNamespace(folder=lambda kind: str(tmp_path)))
    return tmp_path


@pytest.fixture
def slots(folder: Path) -> Iterator[list[Slot]]:
    """They are released at the end."""
    kept: list[Slot] = []
    yield kept
    for slot in kept:
        slot.release()


def records(folder: Path) -> list[int]:
    """High-water mark, and what each slot is recorded with."""
    content = (folder / "ledger").read_bytes()
    return list(struct.unpack(f"={len(content) // 8}Q", content))


def claim_all(told: Connection, memory: int) -> None:
    """As many slots as there are; held until the other end of the pipe is closed."""
    held: list[Slot] = []
    try:
        while True:
            held.append(userids.claim(memory, 1 << 50))
    except NoPlaceError:
        told.send([slot.number for slot in held])
    try:
        told.recv()
    except EOFError:
        os._exit(0)


def test_processes_that_claim_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "90")
    pipes = [FORK.Pipe() for _ in range(3)]
    others = [FORK.Process(target=claim_all, args=(theirs, MB), daemon=True) for _, theirs in pipes]
    for other in others:
        other.start()
    for _, theirs in pipes:
        theirs.close()
    claimed = [ours.recv() for ours, _ in pipes]
    assert sorted(number for numbers in claimed for number in numbers) == list(range(1, 91))
    assert records(folder) == [90] + [MB] * 90
    for other, (ours, _) in zip(others, pipes, strict=True):
        other.kill()
        ours.close()
        other.join()


@pytest.mark.parametrize("bound", ["sandboxes", "memory"])
def test_what_was_killed_does_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch, slots: list[Slot], bound: str) -> None:
    """Its records are still there; they are believed only as long as there is room beside them."""
    monkeypatch.setenv("PSIE_MAX_SANDBOXES" if bound == "sandboxes" else "PSIE_MAX_MEMORY_MB", "20")
    ours, theirs = FORK.Pipe()
    other = FORK.Process(target=claim_all, args=(theirs, MB), daemon=True)
    other.start()
    theirs.close()
    assert ours.recv() == list(range(1, 21))
    with pytest.raises(NoPlaceError, match="20 sandboxes" if bound == "sandboxes" else "claim 20 MB"):
        userids.claim(MB, 1 << 50)
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    ours.close()
    assert sum(map(bool, records(folder)[1:])) == 20
    slots += [userids.claim(MB, 1 << 50) for _ in range(20)]
    assert [slot.number for slot in slots] == list(range(1, 21))
    with pytest.raises(NoPlaceError):
        userids.claim(MB, 1 << 50)


def test_what_was_released_by_all_has_no_record(folder: Path, slots: list[Slot]) -> None:
    slots += [userids.claim(MB, 1 << 50) for _ in range(3)]
    slots[1].release(for_all=True)
    slots[2].release()  # perhaps a fork has it still
    assert records(folder) == [3, MB, 0, MB]
    slots.append(userids.claim(2 * MB, 1 << 50))
    assert slots[-1].number == 2
    assert records(folder) == [3, MB, 2 * MB, MB]
    slots.append(userids.claim(MB, 1 << 50))
    assert slots[-1].number == 4


def test_a_fork_that_has_a_slot_counts(folder: Path, monkeypatch: pytest.MonkeyPatch, slots: list[Slot]) -> None:
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "1")
    slot = userids.claim(MB, 1 << 50)
    copy = os.dup(slot.fd)
    slot.release()
    with pytest.raises(NoPlaceError):
        userids.claim(MB, 1 << 50)
    os.close(copy)
    slots.append(userids.claim(MB, 1 << 50))


def test_a_slot_is_not_forgotten_in_another_ledger(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, slots: list[Slot]
) -> None:
    slots.append(userids.claim(MB, 1 << 50))
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setattr(userids, "state", SimpleNamespace(folder=lambda kind: str(other)))
    slots.append(userids.claim(MB, 1 << 50))
    assert [slot.number for slot in slots] == [1, 1]
    slots[0].release(for_all=True)
    assert records(folder) == records(other) == [1, MB]


def test_a_ledger_that_cannot_be_written_to_keeps_no_slot(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slots: list[Slot]
) -> None:
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "1")
    slot = userids.claim(MB, 1 << 50)
    copy = os.dup(slot.fd)

    def fail() -> int:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(userids, "_open_ledger", fail)
        slot.release(for_all=True)
    assert records(folder) == [1, MB]
    slots.append(userids.claim(MB, 1 << 50))
    os.close(copy)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, b"\xff" * 80, struct.pack("=3Q", 9, 1, 0)])
def test_a_damaged_ledger(folder: Path, slots: list[Slot], content: bytes) -> None:
    """It cannot say who lives: the locks do."""
    (folder / "ledger").write_bytes(content)
    slots += [userids.claim(MB, 1 << 50) for _ in range(3)]
    assert len({slot.number for slot in slots}) == 3


def test_a_claim_does_not_look_at_each_slot(folder: Path, monkeypatch: pytest.MonkeyPatch, slots: list[Slot]) -> None:
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "1000")
    slots += [userids.claim(MB, 1 << 50) for _ in range(300)]
    looks: list[int] = []
    lock = userids._lock

    def counted(fd: int, kind: int, start: int) -> bool:
        looks.append(start)
        return lock(fd, kind, start)

    monkeypatch.setattr(userids, "_lock", counted)
    slots[100].release(for_all=True)
    slots[7].release(for_all=True)
    looks.clear()
    slots += [userids.claim(MB, 1 << 50) for _ in range(3)]
    assert [slot.number for slot in slots[-3:]] == [8, 101, 301]
    assert len(looks) == 3 * 3  # the mutex, the slot, the mutex


# -- an older psie -------------------------------------------------------------------------------------------------------


def older_choose(fd: int, ledger: int, memory: int, most: int, allowed: int) -> int:
    """As an earlier version chose: a look at each slot up to the high-water mark, and no record was ever removed."""
    content = os.pread(ledger, 8 * (userids.SLOTS + 1), 0)
    claims = list(struct.unpack(f"={len(content) // 8}Q", content))
    high = min(claims[0], len(claims) - 1) if claims else 0
    free = [number for number in range(1, high + 1) if userids._lock(fd, fcntl.F_WRLCK, number)]
    alive = sorted(set(range(1, high + 1)) - set(free))
    chosen = free[0] if free else high + 1
    for number in free[1:]:
        userids._lock(fd, fcntl.F_UNLCK, number)
    if len(alive) >= most or sum(claims[number] for number in alive) + memory > allowed:
        raise NoPlaceError("no place")
    assert free or userids._lock(fd, fcntl.F_WRLCK, chosen)
    os.pwrite(ledger, struct.pack("=Q", memory), chosen * 8)
    os.pwrite(ledger, struct.pack("=Q", max([*alive, chosen])), 0)
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_versions_beside_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch, slots: list[Slot], seed: int) -> None:
    """Whoever claims, and however a sandbox has ended: nobody gets a place that is taken, the bounds are kept, and nobody is
    refused a place that there is."""
    dice = random.Random(seed)
    most, allowed = 12, 40
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", str(most))
    monkeypatch.setenv("PSIE_MAX_MEMORY_MB", str(allowed))
    choices: list[Callable[..., Any]] = [userids._choose, older_choose]
    alive: dict[int, tuple[Slot, int]] = {}
    for _ in range(300):
        if alive and dice.random() < 0.45:
            slot, _ = alive.pop(dice.choice(list(alive)))
            slot.release(for_all=dice.random() < 0.5)
            continue
        memory = dice.choice((1, 2, 3, 8))
        monkeypatch.setattr(userids, "_choose", dice.choice(choices))
        fits = len(alive) < most and sum(each for _, each in alive.values()) + memory <= allowed
        try:
            slot = userids.claim(memory * MB, 1 << 50)
        except NoPlaceError:
            assert not fits
        else:
            slots.append(slot)
            assert fits
            assert slot.number not in alive
            alive[slot.number] = slot, memory
