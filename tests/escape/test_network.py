"""Attacks by sockets: to reach what is not allowed, to see the host's network, to confuse the supervisor.

The plugin may connect to one listener of the host; another one must never see anybody.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from escape import kit
from sandbox.config import IsolationLevel
from sandbox.errors import PluginExecutionError, SecurityViolationError
from sandbox.selftest import trial
from sandbox.selftest.attacks import (
    LEVELS,
    MINIMAL,
    STRICT,
)
from sandbox.selftest.network import serve

# -- the supervisor --------------------------------------------------------------------------------------------------------


def nameless_thread(good: int) -> str:
    """Connect in a thread whose name is no text."""
    import ctypes

    seen = []

    def connect() -> None:
        ctypes.CDLL(None).prctl(15, b"\xff\n\xfeTgid:\t1", 0, 0, 0)  # PR_SET_NAME
        socket.create_connection(("127.0.0.1", good)).close()
        seen.append("connected")

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join()
    return seen[0]


def swapped_descriptor(good: int) -> str:
    """Another thread puts a file, a pair and nothing in the place of the socket."""
    import ctypes
    import os
    import time

    libc = ctypes.CDLL(None)
    address = socket.AF_INET.to_bytes(2, "little") + good.to_bytes(2, "big") + socket.inet_aton("127.0.0.1") + bytes(8)
    places = [os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_PATH), socket.socketpair()[0].detach()]
    target = os.dup(places[0])
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            for place in places:
                os.dup2(place, target)
            with socket.socket() as sock:
                os.dup2(sock.fileno(), target)

    other = threading.Thread(target=swap)
    other.start()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        libc.connect(target, address, 16)
    is_over.set()
    other.join()
    socket.create_connection(("127.0.0.1", good)).close()
    return "connected"


def nonsense(good: int) -> str:
    """Arguments that no program has."""
    import ctypes

    libc = ctypes.CDLL(None)
    pointers = [0, 1, 1 << 47, 1 << 63, (1 << 64) - 1]
    with socket.socket() as sock:
        for pointer in pointers:
            for length in (0, 1, 16, 128, 129, -1):
                libc.connect(sock.fileno(), ctypes.c_void_p(pointer), length)
            libc.sendmsg(sock.fileno(), ctypes.c_void_p(pointer), socket.MSG_FASTOPEN)
        for number in (-1, 1 << 30):
            libc.connect(number, bytes(16), 16)
        sock.connect(("127.0.0.1", good))
    return "connected"


def no_descriptors(good: int) -> str:
    """As many sockets as there may be, and one more."""

    held = []
    try:
        while True:
            held.append(socket.socket())
    except OSError as error:
        if error.errno != 24:  # EMFILE
            raise
    held.pop().close()
    socket.create_connection(("127.0.0.1", good)).close()
    return "connected"


@pytest.mark.parametrize("function", [nameless_thread, swapped_descriptor, nonsense, no_descriptors])
@pytest.mark.parametrize("level", [MINIMAL, STRICT])
def test_the_supervisor_goes_on(function: Callable[[int], str], level: IsolationLevel) -> None:
    with ExitStack() as stack:
        good = serve(stack)
        outcome = trial.run_inside(
            function,
            good,
            level=level,
            limits={"max_network_requests": 1_000_000, "max_open_files": 64},
            permissions={"allow_network_access": True, "allowed_hosts": [f"127.0.0.1:{good}"]},
        )
    assert outcome.error is None
    assert outcome.value == "connected"


def many_that_are_no_offence() -> list[int]:
    """Different ones; returns the errors."""
    found = []
    for number in range(300):
        with socket.socket() as sock:
            try:
                sock.bind((f"10.0.{number >> 8}.{number & 255}", 0))
            except OSError as error:
                found.append(error.errno or 0)
    return found


def then_offences(first: Callable[[], object]) -> str:
    first()
    for number in range(50):
        with socket.socket() as sock:
            try:
                sock.connect(("192.0.2.1", 1000 + number))
            except OSError:
                continue
    return "went on"


@pytest.mark.parametrize("level", [MINIMAL, STRICT])
def test_what_is_no_offence_hides_none(level: IsolationLevel) -> None:
    """Neither from the threshold nor from the record."""
    given = {"allow_network_access": True, "allowed_hosts": ["192.0.2.2"]}
    outcome = trial.run_inside(many_that_are_no_offence, level=level, permissions=given)
    assert outcome.error is None
    assert set(outcome.value) == {1}  # EPERM
    outcome = trial.run_inside(then_offences, many_that_are_no_offence, level=level, permissions=given)
    assert isinstance(outcome.error, SecurityViolationError)
    assert [each.details["port"] for each in outcome.violations] == list(range(1000, 1001 + trial.THRESHOLD))


@pytest.mark.parametrize("level", LEVELS)
def test_a_plugin_that_dies_while_it_connects(level: IsolationLevel) -> None:
    """In a flood of connects; the next caller is served."""

    def die(good: int) -> None:
        import os
        import time

        def connect() -> None:
            while True:
                socket.create_connection(("127.0.0.1", good)).close()

        for _ in range(3):
            threading.Thread(target=connect, daemon=True).start()
        time.sleep(0.1)
        os._exit(3)

    with ExitStack() as stack:
        good = serve(stack)
        permissions = {"allow_network_access": True, "allowed_hosts": [f"127.0.0.1:{good}"]}
        outcome = trial.run_inside(die, good, level=level, limits={"max_network_requests": 10**6}, permissions=permissions)
        assert isinstance(outcome.error, PluginExecutionError)
    kit.still_works(level)
