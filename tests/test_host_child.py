"""Probes in a forked child: one that hangs is no end of waiting, and others that have the pipe keep nobody."""

from __future__ import annotations

import os
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
    assert host.in_child(lambda: os._exit(0)) == "the probe did not finish"


def test_who_else_has_the_pipe_does_not_matter() -> None:
    """As a process that another thread has forked meanwhile."""

    def leave_one() -> None:
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)

    begun = time.monotonic()
    assert host.in_child(leave_one, 60) == ""
    assert time.monotonic() - begun < 30
