"""The engine's own loop: what it waits for, what epoll(7) refuses, and its timers."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue

import pytest

from sandbox.engine import loop as loops
from sandbox.engine import service
from sandbox.engine.loop import PollLoop


@pytest.fixture
def loop() -> Iterator[PollLoop]:
    made = PollLoop()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.mark.parametrize("what", ["file", "folder", "/dev/null", "/dev/zero", "path"])
def test_what_epoll_refuses_is_always_ready(loop: PollLoop, tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("text")
    path = {"file": tmp_path / "file", "folder": tmp_path, "path": tmp_path / "file"}.get(what, Path(what))
    fd = os.open(path, os.O_PATH if what == "path" else os.O_RDONLY)
    told: list[str] = []
    try:
        loop.add_reader(fd, told.append, "read")
        loop.run_once()
        loop.run_once()
        assert told == ["read", "read"]
        loop.add_writer(fd, told.append, "written")
        loop.run_once()
        assert told[2:] == ["read", "written"]
        assert loop.remove_reader(fd)
        loop.run_once()
        assert told[4:] == ["written"]
        assert loop.remove_writer(fd)
        assert not loop.remove_writer(fd)
        loop.run_once(0)
        assert len(told) == 5
    finally:
        os.close(fd)


def test_what_is_always_ready_takes_no_turn_from_others(
    loop: PollLoop, pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    told: list[str] = []
    with (tmp_path / "file").open() as file:
        loop.add_reader(file.fileno(), told.append, "file")
        loop.add_reader(pair[0].fileno(), told.append, "socket")
        loop.call_later(0, told.append, "timer")
        pair[1].send(b"x")
        loop.run_once()
        loop.remove_reader(file.fileno())
    assert sorted(told) == ["file", "socket", "timer"]
    told.clear()
    loop.run_once()
    assert told == ["socket"]


def test_readers_and_writers_of_one_descriptor(loop: PollLoop, pair: tuple[socket.socket, socket.socket]) -> None:
    fd = pair[0].fileno()
    told: list[str] = []
    loop.add_writer(fd, told.append, "write")
    loop.add_reader(fd, told.append, "read")
    loop.run_once()
    assert told == ["write"]
    pair[1].send(b"x")
    loop.remove_writer(fd)
    loop.run_once()
    assert told == ["write", "read"]
    loop.add_reader(fd, told.append, "read otherwise")
    loop.run_once()
    assert told[2:] == ["read otherwise"]
    loop.remove_reader(fd)
    pair[1].close()  # which is told of whatever is waited for
    loop.run_once(0)
    assert len(told) == 3


def test_what_could_not_be_registered_is_not_called(
    loop: PollLoop, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user has a bounded number of watches: fs.epoll.max_user_watches in epoll(7)."""
    fd = pair[0].fileno()
    told: list[str] = []

    class Full:
        def register(self, fd: int, mask: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        modify = register

    with monkeypatch.context() as patched:
        patched.setattr(loop, "epoll", Full())
        for add in (loop.add_reader, loop.add_writer):
            with pytest.raises(OSError, match="No space left"):
                add(fd, told.append, "never")
    assert not loop.remove_reader(fd)
    loop.add_writer(fd, told.append, "write")
    loop.run_once()
    assert told == ["write"]
    with monkeypatch.context() as patched:
        patched.setattr(loop, "epoll", Full())
        with pytest.raises(OSError, match="No space left"):
            loop.add_writer(fd, told.append, "never")
    loop.run_once()
    assert told == ["write", "write"]


def test_an_end_is_told_to_both(loop: PollLoop, pair: tuple[socket.socket, socket.socket]) -> None:
    told: list[str] = []
    loop.add_reader(pair[0].fileno(), told.append, "read")
    loop.add_writer(pair[0].fileno(), told.append, "write")
    pair[1].close()
    loop.run_once()
    assert told == ["read", "write"]


def test_a_number_that_another_has_now_is_not_told_of_what_was(loop: PollLoop) -> None:
    """Two are ready in one round; the first to be served closes the other and opens something of the same number."""
    pipes = [os.pipe() for _ in range(2)]
    new: list[tuple[int, int]] = []
    told: list[str] = []

    def served(other: int) -> None:
        told.append("old")
        for reader, _ in pipes:
            loop.remove_reader(reader)
        os.close(pipes[other][0])
        new.append(os.pipe())
        assert new[0][0] == pipes[other][0]
        loop.add_reader(new[0][0], told.append, "new")

    for number, (reader, writer) in enumerate(pipes):
        loop.add_reader(reader, served, 1 - number)
        os.write(writer, b"x")
    loop.run_once()
    loop.run_once(0)
    assert told == ["old"]
    os.write(new[0][1], b"x")
    loop.run_once()
    assert told == ["old", "new"]
    loop.remove_reader(new[0][0])
    for fd in {*pipes[0], *pipes[1], *new[0]}:
        os.close(fd)


def test_a_descriptor_that_a_fork_has_as_well(loop: PollLoop, pair: tuple[socket.socket, socket.socket]) -> None:
    told: list[str] = []
    copy = pair[0].dup()
    loop.add_reader(pair[0].fileno(), told.append, "read")
    loop.remove_reader(pair[0].fileno())
    pair[0].close()
    pair[1].send(b"x")
    loop.run_once(0)
    assert not told
    copy.close()


def test_a_closed_descriptor_was_never_waited_for(loop: PollLoop) -> None:
    assert not loop.remove_reader(12345)
    assert not loop.remove_writer(12345)


def test_timers_are_served_in_the_order_of_their_times(loop: PollLoop) -> None:
    told: list[int] = []
    for number in (3, 1, 2, 0):
        loop.call_later(number / 1000, told.append, number)
    loop.run_until(lambda: len(told) == 4)
    assert told == [0, 1, 2, 3]


def test_a_timer_of_a_timer_waits_for_the_next_round(loop: PollLoop, pair: tuple[socket.socket, socket.socket]) -> None:
    """Or who always has something more to do would keep everyone else from their turn."""
    told: list[str] = []

    def again() -> None:
        told.append("timer")
        loop.call_later(0, again)

    loop.call_later(0, again)
    loop.add_writer(pair[0].fileno(), told.append, "event")
    loop.run_once()
    loop.run_once()
    assert told == ["timer", "event"] * 2


def test_a_timer_that_fails_takes_no_other_with_it(loop: PollLoop) -> None:
    told: list[str] = []

    def fail() -> None:
        raise ValueError("of the test")

    loop.call_later(0, fail)
    loop.call_later(0.0001, told.append, "served")
    with pytest.raises(ValueError, match="of the test"):
        loop.run_until(lambda: bool(told))
    loop.run_until(lambda: bool(told))


def test_cancelled_timers_do_not_add_up(loop: PollLoop) -> None:
    kept = [loop.call_later(3600, print) for _ in range(10)]
    for _ in range(10_000):
        loop.call_later(60, print).cancel()
    assert len(loop.timers) <= loops.TIMERS + 1
    assert set(kept) <= set(loop.timers)
    told: list[int] = []
    loop.call_later(0, told.append, 1).cancel()
    loop.call_later(0.001, told.append, 2)
    loop.run_once()
    assert told == [2]


# -- the engine's thread, and those who do its work while it rests ---------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> service.ThreadLoop:
    """It is never ended: one for all tests."""
    return service.ThreadLoop()


def at_rest(engine: service.ThreadLoop, callback: Callable[..., object], *args: object) -> None:
    """Here, as soon as the thread has nothing to do."""
    deadline = time.monotonic() + 5
    while not engine.here(callback, *args):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_who_asks_while_it_rests_does_it_himself(engine: service.ThreadLoop) -> None:
    seen: list[threading.Thread] = []
    at_rest(engine, lambda: seen.append(threading.current_thread()))
    assert seen == [threading.current_thread()]


def test_a_timer_that_is_set_while_it_rests_is_served(engine: service.ThreadLoop) -> None:
    """The thread waits for nothing else; later ones, and earlier ones than those."""
    served: Queue[int] = Queue()
    at_rest(engine, lambda: [engine.call_later(delay, served.put, number) for number, delay in ((3, 0.2), (1, 0.01), (2, 0.1))])
    assert [served.get(timeout=5) for _ in range(3)] == [1, 2, 3]
    at_rest(engine, engine.call_later, 0.01, served.put, 4)
    assert served.get(timeout=5) == 4


def test_nobody_does_it_while_it_works_or_has_more_to_do(engine: service.ThreadLoop) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(5)

    engine.post(work)
    engine.post(ended.set)
    assert begun.wait(5)
    assert not engine.here(lambda: None)
    go_on.set()
    assert ended.wait(5)
    order: Queue[str] = Queue()

    def first() -> None:
        engine.post(order.put, "posted before")
        assert not engine.here(order.put, "too early")  # this is somebody's turn

    at_rest(engine, first)
    at_rest(engine, order.put, "then")
    assert [order.get(timeout=5) for _ in range(2)] == ["posted before", "then"]


def test_the_turn_is_given_back_by_who_fails(engine: service.ThreadLoop) -> None:
    def fails() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        at_rest(engine, fails)
    at_rest(engine, lambda: None)


def test_who_is_interrupted_as_he_begins_to_wait_is_told_so() -> None:
    """And nothing of a lock that he does not have."""
    condition = service.Condition()

    class Interrupted(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            condition.release()
            raise KeyboardInterrupt

    condition._waited = Interrupted()
    with pytest.raises(KeyboardInterrupt), condition:
        condition.wait()
    assert not condition._is_owned()  # type: ignore[attr-defined]


def test_what_is_registered_while_it_rests_is_heard(engine: service.ThreadLoop) -> None:
    """And hears nothing of what had its number before."""
    heard: Queue[bytes] = Queue()
    for number in range(50):
        reader, writer = os.pipe()
        at_rest(engine, engine.add_reader, reader, lambda fd=reader: heard.put(os.read(fd, 1)))
        os.write(writer, bytes([number]))
        assert heard.get(timeout=5) == bytes([number])
        at_rest(engine, engine.remove_reader, reader)
        os.close(reader)
        os.close(writer)
    assert heard.empty()
