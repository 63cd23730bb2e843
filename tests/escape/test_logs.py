"""What psie logs of a plugin is one line of printable text: it begins no line of its own, and drives no terminal."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Iterator

import pytest

from escape import kit
from sandbox import SandboxException
from sandbox.config import IsolationLevel
from sandbox.integrations import logs
from sandbox.selftest import trial
from sandbox.selftest.attacks import ALL

FORGED = "CRITICAL root: the disk is on fire"
BAD = f"x\n{FORGED}\r\x1b[2J\x1b]0;title\x07\u202e\u2028"
# All that a host may put into its lines: what came from a plugin is in the attributes as well.
FORMAT = "%(levelname)s %(name)s: %(message)s [%(sandbox_id)s %(call_id)s %(plugin_id)s]"


@pytest.fixture(params=ALL)
def level(request: pytest.FixtureRequest) -> IsolationLevel:
    found: IsolationLevel = request.param
    if kit.why_closed(found):
        pytest.skip(f"level {found.value} cannot be opened: {kit.why_closed(found)}")
    return found


@pytest.fixture
def lines() -> Iterator[Callable[[], list[str]]]:
    """What a host's log file has, line by line as a reader of it sees them."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT, defaults={"sandbox_id": "", "call_id": "", "plugin_id": ""}))
    logger = logging.getLogger("psie")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield lambda: stream.getvalue().splitlines()
    logger.removeHandler(handler)
    logger.setLevel(before)


def raises(text: str) -> None:
    raise ValueError(text)


def names_itself(text: str) -> None:
    raise type(text, (Exception,), {})(text)


def wants_a_file(text: str) -> None:
    try:
        open("/etc/" + text, "w").close()
    except OSError:
        pass


def attack(level: IsolationLevel) -> None:
    """By its exceptions, their names, the paths it wants, and the name of the function."""

    def evil(text: str) -> None:
        raise ValueError(text)

    evil.__qualname__ = BAD

    async def main() -> None:
        async with trial.open_sandbox(level) as sandbox:
            for function in (raises, names_itself, wants_a_file, evil):
                try:
                    await sandbox.execute_plugin_safe(function, BAD)
                except SandboxException:
                    continue

    asyncio.run(main())


def is_forged(lines: list[str]) -> bool:
    starts = ("DEBUG psie.", "INFO psie.", "WARNING psie.")
    return any(not line.startswith(starts) or not line.isprintable() for line in lines)


def test_no_line_is_forged(level: IsolationLevel, lines: Callable[[], list[str]]) -> None:
    attack(level)
    written = lines()
    assert sum(FORGED in line for line in written) >= 5
    assert not is_forged(written), written


def test_it_would_be_without_the_escape(
    level: IsolationLevel, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same attack, where nothing is escaped: else the test above could not fail."""
    monkeypatch.setattr(logs, "escape_text", lambda text, keep="": text)
    attack(level)
    assert is_forged(lines())
    assert any(line.startswith(FORGED) for line in lines())
