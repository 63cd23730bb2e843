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
from sandbox.errors import ResourceLimitExceededError
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
