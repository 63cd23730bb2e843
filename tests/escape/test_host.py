"""Attacks on the caller's side: forged replies, descriptors, texts for a terminal. A confused host is an escaped plugin."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from escape import kit
from sandbox.config import IsolationLevel
from sandbox.errors import PluginExecutionError, SandboxException
from sandbox.selftest import attacks, trial
from sandbox.selftest.attacks import ALL, MINIMAL, socket_to_the_caller


def forge(frames: list[bytes]) -> None:
    """Speak on the job socket as psie's own worker would, and leave before that one can."""
    import os

    job = socket_to_the_caller()
    for frame in frames:
        job.send(frame)
    os._exit(0)


def flat(**fields: bytes) -> bytes:
    return b"".join(b"\0" + name.encode() + b"\0" + value for name, value in fields.items())


DIGITS = b"9" * 5000
FORGED = {
    "an errno of 5000 digits": [b"e" + flat(type=b"OSError", message=b"x", errno=DIGITS), b"."],
    "a size of 5000 digits": [b"u" + flat(text=b"x", used=DIGITS), b"."],
    "an errno in other digits": [b"e" + flat(type=b"OSError", message=b"x", errno="²".encode()), b"."],
    "a size in other digits": [b"u" + flat(text=b"x", used="²".encode()), b"."],
    "a line number of 5000 digits": [
        b"e" + flat(type=b"E", message=b"x", traceback=b'  File "%s", line %s, in x\n' % (os.fsencode(__file__), DIGITS)),
        b".",
    ],
    "no text": [b"e\xff\xfe", b"."],
    "no fields": [b"e", b"."],
    "an odd field": [b"e\0type", b"."],
    "no head": [b"vgarbage", b"."],
    "columns that do not fit": [b"vpsi1" + b"\xff" * 24, b"."],
    "a pickle": [b"vcos\nsystem\n(S'true'\ntR.", b"."],
    "no end": [b"v"],
    "only an end": [b"."],
    "an end, then more": [b".", b"vmore"],
    "two kinds": [b"v", b"e", b"u", b"."],
    "an unknown kind": [b"\0\0\0", b"."],
    "an empty frame": [b"", b"."],
    "a frame that is too long": [b"v" + bytes(100_000), b"."],
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_reply_is_an_error_of_the_plugin(name: str) -> None:
    """The documented exception, whatever the bytes are; at one level: the host's side is the same for all."""
    outcome = trial.run_inside(forge, FORGED[name], level=MINIMAL)
    assert isinstance(outcome.error, SandboxException)
    kit.still_works(MINIMAL)


@pytest.mark.parametrize("level", ALL)
def test_descriptors_do_not_reach_the_host(level: IsolationLevel) -> None:
    """By SCM_RIGHTS over the only socket: the host takes none, and keeps none open."""

    def send() -> str:
        import array
        import os
        import socket

        job = socket_to_the_caller()
        fds = array.array("i", [os.open("/dev/null", os.O_RDONLY) for _ in range(10)])
        for _ in range(50):
            job.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            job.sendmsg([b"?"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        job.detach()
        return "sent"

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    before = _null_descriptors()
    outcome = trial.run_inside(send, level=level)
    assert outcome.value == "sent" or isinstance(outcome.error, PluginExecutionError)
    assert _null_descriptors() <= before
    kit.still_works(level)


def _null_descriptors() -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return links.count("/dev/null")


@pytest.mark.parametrize("level", ALL)
def test_a_hundred_calls_leave_nothing_open(level: IsolationLevel) -> None:
    """Also those that crash, are refused, or are killed."""

    def crash(kind: int) -> int:
        import os
        import signal

        if kind == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == 2:
            os._exit(3)
        if kind == 3:
            socket_to_the_caller().close()
        return kind

    async def go() -> None:
        async with trial.open_sandbox(level) as one:
            for number in range(40):
                try:
                    await one.execute_plugin_safe(crash, number % 4)
                except SandboxException:
                    continue

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    kit.still_works(level)
    fds, threads = open_here()
    trial.bounded(go())
    end = time.monotonic() + attacks.SECONDS  # a thread may be storing what runs there have been
    while open_here()[0] > fds or open_here()[1] > threads:
        assert time.monotonic() < end, (open_here(), (fds, threads))
        time.sleep(0.05)


def open_here() -> tuple[int, int]:
    """How many descriptors and threads this process has."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize("level", ALL)
def test_texts_of_the_plugin_cannot_drive_a_terminal(level: IsolationLevel) -> None:
    """The names, messages and tracebacks that it makes up are escaped in what is shown."""

    def fail() -> None:
        hostile = "\x1b]0;evil\x07\x1b[2J\x9b31m\u202egnp\r\n"
        kind = type("E" + hostile, (Exception,), {})
        raise kind(hostile)

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    outcome = trial.run_inside(fail, level=level)
    assert isinstance(outcome.error, PluginExecutionError)
    shown = str(outcome.error)
    assert not [character for character in shown if character in "\x1b\x07\x9b\u202e\r"]


@pytest.mark.parametrize("level", ALL)
def test_exceptions_do_not_run_on_the_host(level: IsolationLevel, tmp_path: Path) -> None:
    """An exception that would do something when it is unpickled, shown or compared is text on the host."""
    mark = tmp_path / "ran"

    def fail(path: str) -> None:
        class Trap(Exception):
            def __reduce__(self) -> tuple[object, tuple[str, str]]:
                return open, (path, "w")

            def __str__(self) -> str:
                raise SystemExit(7)

        raise Trap

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    outcome = trial.run_inside(fail, str(mark), level=level)
    assert isinstance(outcome.error, PluginExecutionError)
    assert not mark.exists()


@pytest.mark.parametrize("level", ALL)
def test_replies_that_are_not_data_are_refused(level: IsolationLevel, tmp_path: Path) -> None:
    """An object whose pickle would open a file on the host."""
    mark = tmp_path / "ran"

    def answer(path: str) -> object:
        class Trap:
            def __reduce__(self) -> tuple[object, tuple[str, str]]:
                return open, (path, "w")

        return [{"deep": Trap()}]

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    outcome = trial.run_inside(answer, str(mark), level=level)
    assert isinstance(outcome.error, PluginExecutionError)
    assert not mark.exists()
