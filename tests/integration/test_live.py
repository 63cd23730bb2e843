"""What `psie run` shows a person: the live line on a real pseudo-terminal, as a terminal would draw it, and the summary."""

from __future__ import annotations

import dataclasses
import os
import re
import select
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest

from . import cli_harness, harness
from .cli_harness import Caller, Session

CLEAR = b"\r\x1b[K"
LIVE = re.compile(r"psie: \d+ s(/| of )30 s")
# What a terminal is told here: text, the ends of lines, "to the left edge", "erase to the right edge", colours.
TOLD = re.compile(rb"\r|\n|\x1b\[K|\x1b\[[0-9;]*m|[^\r\n\x1b]+|\x1b")

SEEN = re.compile(rb"psie: \d+ s(/| of )30 s")
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
LONG = 3 * harness.PATIENCE  # seconds in which a line is sure to come

# A plugin that goes on when something is typed: the test has seen the line by then.
SLOW = """
    import sys, time
    print("one", flush=True)
    sys.stdin.readline()
    print("two", flush=True)
    print("half", end="", flush=True)
    time.sleep(0.7)
    print(" whole", flush=True)
    sys.stdin.readline()
"""


class Screen:
    """A terminal that never scrolls: its lines, and every line that ever stood on it when something new came."""

    def __init__(self) -> None:
        self.lines = [""]
        self.column = 0
        self.stood: list[str] = []

    def show(self, data: bytes) -> None:
        for token in TOLD.findall(data):
            assert token != b"\x1b", data
            if token == b"\n":
                self.lines.append("")
                self.column = 0
            elif token == b"\r":
                self.stood.append(self.lines[-1])
                self.column = 0
            elif token == b"\x1b[K":
                self.lines[-1] = self.lines[-1][: self.column]
            elif not token.startswith(b"\x1b"):
                text = token.decode()
                line = self.lines[-1].ljust(self.column)
                self.lines[-1] = line[: self.column] + text + line[self.column + len(text) :]
                self.column += len(text)


def drawn(data: bytes) -> Screen:
    screen = Screen()
    screen.show(data)
    return screen


@pytest.fixture
def caller(tmp_path: Path) -> Caller:
    return cli_harness.privileged("standard", tmp_path)


def line_of(caller: Caller, source: str, *options: str) -> list[str]:
    """Without -q, which plugin_line gives."""
    path = caller.write("plugin.py", source)
    return ["run", "--level", caller.level, *options, str(path)]


def on_terminal(
    caller: Caller, source: str, *options: str, env: dict[str, str] | None = None, columns: int = 100, times: int = 0
) -> bytes:
    """All that is shown of a run whose three streams are the terminal. `times`: so often something is typed, each time when the
    live line has come."""
    if env:
        caller = dataclasses.replace(caller, environment={**caller.environment, **env})
    with Session(caller, *line_of(caller, source, *options)) as session:
        session.resize(24, columns)
        seen = b""
        for _ in range(times):
            seen += until_drawn(session)
            session.type(b"\r")
        while not ended(session):
            seen += cli_harness.read_some(session.master)
        assert session.status() == 0, seen
        return seen + session.rest()


def until_drawn(session: Session) -> bytes:
    """What comes up to a live line, and that."""
    seen = b""
    while not SEEN.search(COLOUR.sub(b"", seen)):
        assert not ended(session), seen
        seen += cli_harness.read_some(session.master)
    return seen


def ended(session: Session) -> bool:
    """Nothing is to be read, and the report of psie's end has come."""
    ready, _, _ = select.select([session.master, session.report], [], [], cli_harness.SECONDS)
    assert ready, "neither output nor an end"
    return session.master not in ready


def test_the_live_line_is_never_mixed_into_output(caller: Caller) -> None:
    seen = on_terminal(caller, SLOW, times=2)
    screen = drawn(seen)
    live = [line for line in screen.stood if LIVE.search(line)]
    assert live, seen
    assert all(line.startswith("psie: ") for line in live), "behind or before something else"
    assert any("memory" in line and "process" in line for line in live), live
    assert not [line for line in (*screen.stood, *screen.lines) if "half" in line and "psie" in line]
    shown = [line for line in screen.lines if not line.startswith("psie: weaker than")]
    assert shown == ["one", "", "two", "half whole", "", ""], "nothing of it stays"


def test_it_is_taken_away_before_what_comes_next(caller: Caller) -> None:
    """Every byte of output that follows a drawn line follows what erases it."""
    seen = on_terminal(caller, SLOW, env={"NO_COLOR": "1"}, times=2)
    assert b"\x1b[2m" not in seen
    assert b"\x1b[0m" not in seen
    pieces = seen.split(CLEAR)
    assert len(pieces) > 2
    for piece in pieces[1:]:
        if LIVE.match(piece.decode()):
            assert b"\n" not in piece, piece


QUIET = f"import time; print('x', flush=True); time.sleep({LONG})"


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "env"),
    [(("-q",), {}), (("--raw",), {}), ((), {"TERM": "dumb"})],
    ids=["quiet", "raw", "dumb"],
)
def test_where_there_is_none(caller: Caller, options: tuple[str, ...], env: dict[str, str]) -> None:
    """A raw plugin could be anywhere on the screen; Session sets TERM itself, so a dumb one is asked for by a script."""
    if env:
        assert_none(run_with_streams(caller, env, "terminal", "terminal"))
    else:
        assert_none(on_terminal(caller, QUIET, *options))


def assert_none(seen: bytes) -> None:
    assert b"x" in seen
    assert b"\x1b" not in seen
    assert not LIVE.search(seen.decode())


def run_with_streams(caller: Caller, env: dict[str, str], stdout: str, stderr: str) -> bytes:
    """What a terminal shows, and a pipe takes, of a run with these streams."""
    master, slave = os.openpty()
    where: dict[str, Any] = {"terminal": slave, "pipe": subprocess.PIPE, "null": subprocess.DEVNULL}
    try:
        streams = {"stdin": subprocess.DEVNULL, "stdout": where[stdout], "stderr": where[stderr]}
        surroundings = caller.surroundings({"env": {"TERM": "xterm", **env}})
        with subprocess.Popen(caller.command(*line_of(caller, QUIET)), **streams, **surroundings) as process:
            out, err = process.communicate(timeout=cli_harness.SECONDS)
            assert process.returncode == 0
        return cli_harness.read_rest(master) + (out or b"") + (err or b"")
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.long
def test_none_where_another_process_may_write_to_the_terminal(caller: Caller) -> None:
    assert_none(run_with_streams(caller, {}, "pipe", "terminal"))
    assert_none(run_with_streams(caller, {}, "terminal", "pipe"))


@pytest.mark.long
def test_it_is_there_where_only_stderr_is_a_terminal(caller: Caller) -> None:
    seen = run_with_streams(caller, {}, "null", "terminal")
    assert LIVE.search(drawn(seen).stood[-1]), seen
    assert seen.endswith(CLEAR)


@pytest.mark.long
def test_a_terminal_that_was_stopped_stops_nothing(caller: Caller) -> None:
    """By Ctrl-S, which tcflow(3) does as well."""
    master, slave = os.openpty()
    line = line_of(caller, f"import time; time.sleep({LONG})")
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": slave}
    try:
        with subprocess.Popen(caller.command(*line), **streams, **caller.surroundings({"env": {"TERM": "xterm"}})) as process:
            cli_harness.read_until(master, b" of 30 s")
            termios.tcflow(slave, termios.TCOOFF)
            assert process.wait(cli_harness.SECONDS) == 0
    finally:
        termios.tcflow(slave, termios.TCOON)
        os.close(master)
        os.close(slave)


def test_it_fits(caller: Caller) -> None:
    screen = drawn(on_terminal(caller, "import sys; sys.stdin.readline()", columns=34, times=1))
    live = [line for line in screen.stood if LIVE.search(line)]
    assert live
    assert max(map(len, live)) < 34


@pytest.mark.long
def test_what_a_plugin_writes_cannot_disturb_it(caller: Caller) -> None:
    hostile = f"""
        import os, time
        end = time.monotonic() + {LONG}
        while time.monotonic() < end:
            os.write(1, b"a\\rb\\x1b[K\\x1b[5A\\x08\\x1b[2Jc\\n")
            os.write(2, b"\\x1b]0;title\\x07d\\r\\n")
            time.sleep(0.05)
    """
    screen = drawn(on_terminal(caller, hostile))
    plain = {line for line in screen.lines if not line.startswith("psie: weaker than")}
    assert plain == {"a", r"b\x1b[K\x1b[5A\x08\x1b[2Jc", r"\x1b]0;title\x07d", ""}
    assert any(LIVE.match(line) for line in screen.stood)


@pytest.mark.long
def test_a_call_has_it_too(caller: Caller) -> None:
    path = caller.write("plugin.py", f"import time\ndef main():\n    time.sleep({LONG})\n    return 'value'")
    with Session(caller, "call", "--level", caller.level, f"{path}:main") as session:
        seen = session.until(b'"value"\r\n')
        assert session.status() == 0
    screen = drawn(seen)
    assert any(LIVE.match(line) for line in screen.stood)
    assert screen.lines[-2:] == ['"value"', ""]


# -- the summary --------------------------------------------------------------------------------------------------------


def test_the_summary_is_short_on_a_terminal(caller: Caller) -> None:
    seen = on_terminal(caller, "pass", "-v", columns=100).decode()
    summary = seen[seen.rindex("psie: \x1b[32mlevel") :]
    assert summary.count("\r\n") <= 5
    plain = re.sub(r"\x1b\[[0-9;]*m", "", summary).splitlines()
    assert max(map(len, plain)) <= 100
    assert re.search(r"^psie: enforced: own process, .* and \d+ more$", plain[1])


@pytest.mark.parametrize(
    ("env", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False), ({"FORCE_COLOR": ""}, False)],
)
def test_colours(caller: Caller, env: dict[str, str], coloured: bool) -> None:
    done = caller.plugin("pass", options=["-v"], env=env)
    assert ("\x1b[32mlevel standard, status 0, " in done.err) == coloured, done.err
    assert ("\x1b" in done.err) == coloured


def test_the_summary_says_what_was_used(caller: Caller) -> None:
    source = "open('a', 'w').write('x'); import socket\ntry: socket.socket().connect(('192.0.2.1', 80))\nexcept OSError: pass"
    lines = caller.plugin(source, options=["--summary", "--memory", "64M"]).err.splitlines()
    (used,) = (line for line in lines if line.startswith("psie: used: "))
    assert re.search(r"memory [\d.]+ of 64 MB, (CPU [\d.]+ of 50 %, )?1 change to files, \d network operations?$", used), used
