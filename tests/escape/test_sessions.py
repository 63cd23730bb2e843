"""Sessions: a process that lives from call to call gets no further by that, and cannot hold up, fill or mislead the host."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from escape import kit
from sandbox import SandboxException
from sandbox.config import IsolationLevel
from sandbox.errors import PluginExecutionError, ResourceLimitExceededError
from sandbox.selftest import trial
from sandbox.selftest.attacks import ALL, MINIMAL, ROOT, SECRET, STRICT, given, scrambled, socket_to_the_caller
from sandbox.selftest.process import inherited_descriptors, memory_of_the_caller

# The host's side is the same for all levels, and without root.
HOST_SIDE = [MINIMAL, STRICT] if ROOT else [STRICT]


def talk(level: IsolationLevel, work: Callable[[Any], Coroutine[Any, Any, Any]], **limits: Any) -> Any:
    """`work(session)`, after which the engine serves the next caller as ever."""
    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")

    async def go() -> Any:
        settings = {"max_execution_time_seconds": 0.6, "max_cpu_percent": 400.0, **limits}
        async with trial.open_sandbox(level, settings) as one, one.session() as session:
            return await work(session)

    found = trial.bounded(go())
    kit.still_works(level)
    return found


def give_back(value: Any) -> Any:
    return value


def answer_ahead(count: int) -> str:
    """As the worker itself would, so often, and go on."""
    from sandbox.engine import codec

    job = socket_to_the_caller()
    for number in range(count):
        try:
            job.send(b"V" + codec.encode(f"forged {number}"))
        except OSError:
            break
    job.detach()
    return "done"


def flood() -> None:
    """In a thread, from now on."""
    import threading

    def send() -> None:
        from sandbox.engine import codec

        job = socket_to_the_caller()
        reply = b"V" + codec.encode("forged")
        while True:
            try:
                job.send(reply)
            except OSError:
                return

    threading.Thread(target=send, daemon=True).start()


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@pytest.mark.parametrize("level", HOST_SIDE)
def test_what_was_not_asked_for_is_no_answer(level: IsolationLevel) -> None:
    """A call takes one answer, be it a forged one; what comes beyond is kept for no later call."""

    async def work(session: Any) -> None:
        assert await session.call(answer_ahead, 3) == "forged 0"
        await asyncio.sleep(0.1)
        assert await session.call(give_back, "mine") == "mine"

    talk(level, work)


@pytest.mark.parametrize("level", HOST_SIDE)
def test_a_flood_of_answers_fills_nothing(level: IsolationLevel) -> None:
    """Who says much that nobody has asked for is not listened to any more, and a fresh process takes over."""

    async def work(session: Any) -> None:
        memory = resident_mb()
        await session.call(flood)
        await asyncio.sleep(0.5)
        assert resident_mb() - memory < 20
        for _ in range(3):
            try:
                await session.call(give_back, "mine")
            except SandboxException:
                continue
        assert await session.call(give_back, "mine") == "mine"

    talk(level, work)


@pytest.mark.parametrize("level", ALL)
def test_who_answers_and_goes_on_is_stopped_at_the_next_call(level: IsolationLevel) -> None:
    """Deaf to what can be ignored. While nothing is asked it may compute; it cannot keep a call from ending in time."""

    def answer_and_spin() -> None:
        import signal

        for number in range(1, signal.NSIG):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                continue
        answer_ahead(1)
        while True:
            pass

    async def work(session: Any) -> None:
        assert await session.call(answer_and_spin) == "forged 0"
        start = time.monotonic()
        with pytest.raises(ResourceLimitExceededError, match="ran longer"):
            await session.call(give_back, 1)
        assert time.monotonic() - start < 4
        assert await session.call(give_back, 1) == 1

    talk(level, work)


@pytest.mark.parametrize("level", HOST_SIDE)
@pytest.mark.parametrize("how", ["closes", "floods"])
def test_who_does_not_listen_is_to_blame(level: IsolationLevel, how: str) -> None:
    """And not the host, whose owner would look there for what it lacks: the socket of a session that lives is the plugin's."""

    def answer_and_be_deaf(how: str) -> None:
        from sandbox.engine import codec

        reply = b"V" + codec.encode("forged")
        job = socket_to_the_caller()
        for _ in range(1 if how == "closes" else 10_000):
            try:
                job.send(reply)
            except OSError:
                break
        job.close()
        while True:
            time.sleep(10)

    async def work(session: Any) -> None:
        assert await session.call(answer_and_be_deaf, how) == "forged"
        await asyncio.sleep(0.3)
        with pytest.raises(PluginExecutionError, match="has closed the socket"):
            await session.call(give_back, 1)
        assert await session.call(give_back, 1) == 1

    talk(level, work)


@pytest.mark.parametrize("level", ALL)
def test_a_session_holds_nothing_of_the_callers(level: IsolationLevel) -> None:
    """Neither its clock nor anything else that the host has for it; nor does its memory have what a caller's has."""
    os.environ["PSIE_ESCAPE_SECRET"] = SECRET
    question = given(secret=scrambled(SECRET))

    async def work(session: Any) -> list[str]:
        found = []
        for attack in (inherited_descriptors, memory_of_the_caller):
            with question(None) as scene:  # type: ignore[arg-type]
                found.append(await session.call(attack, **scene.arguments))
        return found

    try:
        assert talk(level, work, max_execution_time_seconds=10.0) == ["stopped: not there"] * 2
    finally:
        del os.environ["PSIE_ESCAPE_SECRET"]


@pytest.mark.parametrize("level", ALL)
def test_limits_are_not_renewed_by_calls(level: IsolationLevel) -> None:
    """Memory that calls leave behind adds up, to the limit of the process."""

    def hoard(megabytes: int) -> int:
        kept = globals().setdefault("kept", [])
        kept.append(bytearray(megabytes << 20))
        return len(kept)

    async def fill(session: Any) -> None:
        for _ in range(20):
            await session.call(hoard, 10)

    async def work(session: Any) -> None:
        with pytest.raises(SandboxException):
            await fill(session)
        assert await session.call(give_back, 1) == 1

    talk(level, work, max_memory_mb=64.0, max_execution_time_seconds=10.0)


def keep_memory() -> None:
    """From now on, keep each memory file that the host gives, and keep the host from taking it back."""
    import contextlib
    import fcntl
    import mmap
    import os
    import sys

    from sandbox.engine import channel

    receive, read, kept = channel.receive_instruction, channel.read_job, []

    def keep(memory: Any) -> None:
        for fd in memory:
            kept.append((os.dup(fd), mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)))
            for seals in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL):
                with contextlib.suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)

    def receive_and_keep(sock: Any, most: int = 16) -> Any:
        head, memory = receive(sock, most)
        keep(memory)
        return head, memory

    def read_and_keep(data: bytes, memory: Any = ()) -> Any:
        keep(memory)
        return read(data, memory)

    channel.receive_instruction = receive_and_keep  # type: ignore[assignment]
    channel.read_job = read_and_keep
    sys.kept_memory = kept  # type: ignore[attr-defined]


def kept_megabytes() -> tuple[int, float]:
    """How many files it has, and how much memory they hold, after a try to fill them again."""
    import contextlib
    import os
    import sys

    kept = sys.kept_memory  # type: ignore[attr-defined]
    for fd, _ in kept:
        with contextlib.suppress(OSError):
            os.pwrite(fd, b"x" * (1 << 16), 0)
        with contextlib.suppress(OSError):
            os.posix_fallocate(fd, 0, 1 << 20)
    return len(kept), sum(os.fstat(fd).st_blocks for fd, _ in kept) / 2048


@pytest.mark.parametrize("level", HOST_SIDE)
def test_memory_that_was_given_for_a_call_is_not_kept_for_the_next(level: IsolationLevel) -> None:
    """It is the host's: by large values and jobs, one call after the other, a session would fill it."""
    data = b"x" * (1 << 20)

    async def work(session: Any) -> None:
        await session.call(keep_memory)
        for _ in range(4):
            assert await session.call(give_back, data) == data
        assert await session.call(kept_megabytes) == (8, 0.0)
        assert await session.call(give_back, data) == data

    talk(level, work, max_execution_time_seconds=10.0)


@pytest.mark.parametrize("level", HOST_SIDE)
@pytest.mark.long
def test_a_value_of_a_session_does_not_change_once_it_is_there(level: IsolationLevel) -> None:
    """Nor does who takes its memory away while it is read do more than spoil a call."""
    pytest.importorskip("numpy")

    def changes_it() -> None:
        import contextlib
        import os
        import socket

        import numpy

        from sandbox.engine import channel, codec

        data = codec.encode(numpy.zeros(1 << 18, "u1"))
        job = socket_to_the_caller()
        job.send(b"S" + channel.SIZE.pack(len(data)))
        _, (memory,), _, _ = socket.recv_fds(job, 65536, 1)
        os.pwrite(memory, data, 0)

        def change() -> None:
            number = 0
            while True:
                number = (number + 1) % 256
                with contextlib.suppress(OSError):
                    os.pwrite(memory, bytes([number]) * 1000, 1000)
                if number == 200:
                    with contextlib.suppress(OSError):
                        os.ftruncate(memory, 4096)

        job.send(b"V\0")
        job.detach()
        change()

    async def work(session: Any) -> None:
        try:
            value = await session.call(changes_it)
        except SandboxException:
            return
        before = value.copy()
        await asyncio.sleep(0.2)
        assert (value == before).all()

    talk(level, work, max_execution_time_seconds=2.0, max_memory_mb=512.0)
