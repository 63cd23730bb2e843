"""`--report` of real runs: the page says what the result file says, and is there as a whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from sandbox.cli import report

from . import cli_harness, harness
from .cli_harness import READY, Caller, Done

BUSY = """
    import socket, time
    open("made", "w").write("x")
    try:
        socket.socket().connect(("192.0.2.1", 80))
    except OSError:
        pass
    time.sleep(1)
"""
SETTINGS = "[isolation]\nresource_check_interval_seconds = 0.1\n"


@pytest.fixture(params=["own-strict", "user-standard"])
def caller(request: pytest.FixtureRequest, tmp_path: Path) -> Caller:
    who, level = request.param.split("-")
    if who == "own":
        return cli_harness.privileged(level, tmp_path)
    return cli_harness.unprivileged(level, request.getfixturevalue("user"))


@pytest.fixture
def own(tmp_path: Path) -> Caller:
    return cli_harness.privileged("strict", tmp_path)


def assert_refused(done: Done, said: str) -> None:
    assert (done.status, done.out) == (125, "")
    assert done.err.count("\n") == 1
    assert said in done.err


def test_the_page_is_made_of_the_result_file(caller: Caller) -> None:
    caller.write("settings.toml", SETTINGS)
    done = caller.plugin(BUSY, options=["--config", "settings.toml", "--report", "out.html", "--result-file", "out.json"])
    assert done.status == 0, done
    result = json.loads((caller.folder / "out.json").read_text())
    page = (caller.folder / "out.html").read_text()
    assert page == report.page(result), "one source"
    assert (caller.folder / "out.html").stat().st_uid == caller.uid
    assert result["telemetry"]["resource_samples"]
    assert 0 < result["sampling"]["began_seconds"] < 5
    assert 1 <= result["seconds"] < 30
    assert {each["path"].rsplit("/", 1)[1] for each in result["file_operations"]} == {"made"}
    assert [each["address"] for each in result["network"] if each["operation"] == "connect"] == ["192.0.2.1"]
    for said in (result["sha256"], "192.0.2.1:80", "course memory", "read back from /proc/PID/status", caller.level):
        assert said in page, said


def test_of_a_call_and_of_a_short_run(own: Caller) -> None:
    path = own.write("plugin.py", "def main(): return 7")
    files = ("--report", "out.html", "--result-file", "out.json")
    done = own.run("call", "-q", "--level", "strict", *files, f"{path}:main")
    assert (done.status, done.out) == (0, "7\n")
    page = (own.folder / "out.html").read_text()
    assert f"{path}:main" in page
    samples = json.loads((own.folder / "out.json").read_text())["telemetry"]["resource_samples"]
    assert ("too short for a sample" in page) == (not samples)  # on a slow machine it is long enough


UNWATCHED = """
from sandbox.cli import main
from sandbox.engine.watching import SandboxWatch

def refuse(watch):
    if tries.pop():
        raise OSError(24, "Too many open files")
    return begin(watch)

tries, begin, SandboxWatch.begin = [False, *[True] * TIMES], SandboxWatch.begin, refuse
main()
"""


@pytest.mark.parametrize("times", [1, 100_000], ids=["for a moment", "for ever"])
def test_a_run_that_cannot_be_watched_goes_on(own: Caller, times: int) -> None:
    """It is tried again; where nothing comes of that, it is told. Above memory.high it would stand still."""
    settings = own.write("settings.toml", SETTINGS + "[limits]\nmemory_warning_threshold_mb = 50\n")
    path = own.write("plugin.py", "import time; held = bytearray(60 << 20); time.sleep(0.5); print('done')")
    options = ["--config", str(settings), "--report", "out.html", "--result-file", "out.json"]
    words = own.as_module().command("run", "--level", "strict", *options, path)
    place = words.index("-m")
    words[place : place + 2] = ["-c", UNWATCHED.replace("TIMES", str(times))]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=cli_harness.SECONDS, check=False, **own.surroundings({})
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done
    was_watched = times == 1
    assert ("it could not be watched, so there are no samples of what it used: " in done.stderr) is not was_watched
    result = json.loads((own.folder / "out.json").read_text())
    assert bool(result["telemetry"]["resource_samples"]) is was_watched
    assert ("it could not be watched" in (own.folder / "out.html").read_text()) is not was_watched


def test_of_a_run_that_is_ended(own: Caller) -> None:
    done = own.plugin("while True: pass", options=["--timeout", "0.3", "--report", "out.html"])
    assert done.status == 124
    page = (own.folder / "out.html").read_text()
    assert "stopped by a limit" in page
    assert "the plugin ran longer than 0.3 s" in page


def test_what_cannot_be_written_is_refused_before_anything_runs(own: Caller) -> None:
    path = own.write("plugin.py", "print('ran')")
    for target in ("missing/out.html", ".", "/dev/stdout", "/proc/self/fd/1"):
        assert_refused(own.run("run", "-q", "--report", target, path), f"--report {target}")
        assert_refused(own.run("run", "-q", "--result-file", target, path), f"--result-file {target}")
    assert_refused(own.run("run", "-q", "--report", "out", "--result-file", "./out", path), "--report out")
    assert os.listdir(own.folder) == ["plugin.py"]


def test_a_killed_command_leaves_the_old_page(own: Caller) -> None:
    old = own.write("out.html", "old")
    line = own.plugin_line("print('ready', flush=True)\nimport time\ntime.sleep(60)", options=["--report", str(old)])
    with own.start(*line) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == READY
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert harness.wait_until(cli_harness.engine_is_gone)
    assert old.read_text() == "old"
    assert sorted(os.listdir(own.folder)) == ["out.html", "plugin.py"]
