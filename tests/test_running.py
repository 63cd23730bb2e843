"""What a process tells of its sandboxes, and how that is read: every word bounded, none able to break what is beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox import running
from sandbox.cli import running as command
from sandbox.engine import board
from sandbox.monitor.sources import Reading

FACTS: dict[str, Any] = {
    "id": "0123456789abcdef",
    "level": "strict",
    "door": "library",
    "since": 5,
    "zygote": 6,
    "slot": 7,
    "lock": 8,
}


@pytest.fixture(params=[False, True], ids=["written", "mapped"])
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[board.Board]:
    """A board of this process's, beside the one that it has."""
    made = board.Board()
    monkeypatch.setattr(board, "_board", made)
    if request.param:
        made.map()
    yield made
    if made.memory is not None:
        made.memory.close()
    os.close(made.fd)


def read(made: board.Board) -> running.Owner:
    return running.Owner(os.getpid(), os.pidfd_open(os.getpid()), os.dup(made.fd), os.getuid())


def line(**facts: Any) -> board.Line:
    return board.Line({**FACTS, "place": "a-1-7", "memory": 9, **facts})


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel had said that this process has the place."""
    monkeypatch.setattr(running.Owner, "holds", lambda self, slot, fd: (slot, fd) == (7, 8))


def seen(made: board.Board) -> list[running.RunningSandbox]:
    owner = read(made)
    try:
        assert owner.has_board(os.getpid())
        return owner.sandboxes()
    finally:
        owner.close()


@pytest.mark.usefixtures("believed")
def test_what_is_told_is_read(own: board.Board) -> None:
    told = line()
    told.is_about("/srv/plugin.py")
    told.know(name="mine", door="executor")
    (found,) = seen(own)
    assert (found.id, found.sandbox_id, found.plugin) == ("0123456789abcdef", "mine", "/srv/plugin.py")
    assert (found.level, found.door, found.state, found.memory_limit) == ("strict", "executor", "open", 9)
    for state in (board.RUNNING, board.IDLE, board.CLOSING, board.RUNNING):
        told.tell(state)
    assert seen(own)[0].state == "closing"  # from which no way leads back
    told.forget()
    assert seen(own) == []
    line().forget()
    assert own.count == 1  # a line is used again


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("name", ["\0\1\2\0", "\x1b[2J", "\udcff" * 500, "x" * 5000, "sandbox\0id\0" + "f" * 16, "\n\u202e"])
def test_no_name_breaks_a_line(own: board.Board, name: str) -> None:
    told, other = line(), line(id="f" * 16)
    told.is_about(name)
    told.know(name=name[: board.NAME_LENGTH])
    other.is_about("other")
    found = {each.id: each for each in seen(own)}
    assert found["f" * 16].plugin == "other"
    assert len(found) == 2
    shown = command.safe({"plugin": found[FACTS["id"]].plugin, "sandbox_id": found[FACTS["id"]].sandbox_id})
    assert all(text.isprintable() for text in shown.values())


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize(
    "facts", [{"slot": -1}, {"slot": "7" * 30}, {"id": "../../etc"}, {"id": "\x1b" * 16}, {"zygote": "x"}, {"lock": "\u0668"}]
)
def test_nonsense_is_no_sandbox(own: board.Board, facts: dict[str, Any]) -> None:
    line(**facts)
    assert seen(own) == []


def test_nobody_is_believed_without_the_lock(own: board.Board) -> None:
    fd = os.memfd_create("locks")
    line(lock=fd)
    assert seen(own) == []
    os.close(fd)


def test_a_fork_tells_of_its_own(own: board.Board) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(board.own() is own)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_process_without_memory_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(board, "_board", None)
    monkeypatch.setattr(os, "memfd_create", fail)
    told = line()
    told.opened(1, None)  # type: ignore[arg-type]
    told.tell(board.RUNNING)
    assert told.mark() == ""
    told.forget()


@pytest.mark.usefixtures("believed")
def test_an_id_is_found_by_its_beginning(own: board.Board) -> None:
    for number, name in (("aa11", "one"), ("aa22", "two"), ("bb33", "aa")):
        line(id=number * 4).know(name=name)
    made = seen(own)
    line_of_two = running.chosen(made, "aa2")
    assert line_of_two.id == "aa22" * 4
    for wrong in ("aa", "", "cc", "\x1b[2J"):
        with pytest.raises(running.NotRunning) as raised:
            running.chosen(made, wrong)
        assert "\x1b" not in str(raised.value)


def test_rates_are_of_two_looks() -> None:
    before, now = Reading(), Reading()
    before.when, now.when = 1.0, 3.0
    before.cpu_usec, now.cpu_usec = 0, 1_000_000
    before.memory, now.memory = 5 << 20, 1 << 20
    assert command.rates(before, now) == ["50", "-2 MB"]
    assert command.rates(None, now) == ["", ""]
    now.cpu_usec = None
    assert command.rates(before, now)[0] == ""
