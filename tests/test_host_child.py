"""Probes in a forked child: one that hangs is no end of waiting, and others that have the pipe keep nobody."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest

from sandbox import host


def refuse() -> None:
    raise PermissionError(1, "no")


def fail() -> None:
    raise ValueError("what")


def test_what_it_says() -> None:
    assert host.in_child(lambda: None) == ""
    assert host.in_child(refuse) == "no"
    assert "ValueError" in host.in_child(fail)


@pytest.mark.long
@pytest.mark.parametrize(("hanging", "told"), [(1, ""), (2, "the probe did not finish")])
def test_one_that_hangs_is_killed_and_another_one_is_tried(hanging: int, told: str) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, b"x" * hanging)

    def hang_if_told() -> None:
        try:
            os.read(reading, 1)
        except BlockingIOError:
            return
        time.sleep(600)

    try:
        assert host.in_child(hang_if_told, 1.0) == told
    finally:
        os.close(reading)
        os.close(writing)


def test_a_child_that_dies_has_not_finished() -> None:
    begun = time.monotonic()
    assert host.in_child(lambda: os._exit(0), 60) == "the probe did not finish"
    assert time.monotonic() - begun < 30


def test_who_else_has_the_pipe_does_not_matter() -> None:
    """As a process that another thread has forked meanwhile."""

    def leave_one() -> None:
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)

    begun = time.monotonic()
    assert host.in_child(leave_one, 60) == ""
    assert time.monotonic() - begun < 30


def test_a_signal_to_all_of_the_group_is_its_callers_alone() -> None:
    """As Ctrl-C on a terminal is: what a handler raises in the child could have it go on as a second caller."""

    def raised(number: int, frame: object) -> None:
        raise InterruptedError(number, "handled")

    before = signal.signal(signal.SIGUSR1, raised)
    try:
        assert host.in_child(lambda: signal.raise_signal(signal.SIGUSR1)) == ""
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_who_is_interrupted_waits_for_no_child_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(select, "poll", interrupted)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        host.in_child(lambda: time.sleep(20))
    assert time.monotonic() - begun < 15
