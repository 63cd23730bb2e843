"""What psie keeps between runs, as several processes, killed ones and people at a command line use it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import pwd
import random
import re
import shlex
import signal
import sqlite3
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import EnhancedPluginFramework, IsolationLevel, PluginExecutionError, ResourceError, SecurityViolationError, state
from sandbox.cli import remembered
from sandbox.plugins import files
from sandbox.recovery import audit, evidence, in_force, private, spool
from sandbox.recovery.audit import AuditLog, verify
from sandbox.recovery.store import NAME, Run, Store

from . import cli_harness, harness
from .cli_harness import Caller, Done

pytestmark = pytest.mark.rootless

KILLS = 100


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "psie"
    folder.mkdir(0o700)
    return folder


def a_run(identity: str, **more: Any) -> Run:
    values = {"started": time.time(), "plugin_id": "p", "sha256": "", "level": "strict", "outcome": "ok", "door": "library"}
    return Run(**{**values, "sandbox_id": identity, **more})


def assert_intact(here: Path) -> None:
    with contextlib.closing(sqlite3.connect(here / NAME)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert not [name for name in os.listdir(here) if "corrupt" in name]


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does `work`, and exits with 0 if that raises nothing."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


# -- several processes -----------------------------------------------------------------------------------------------------


def test_two_processes_with_100_threads_each_lose_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the audit's file is rotated away under those that wait for it."""
    monkeypatch.setattr(audit, "ROTATE_BYTES", 15_000)
    monkeypatch.setattr(private, "PATIENCE", 10 * private.PATIENCE * harness.PATIENCE)  # on a busy machine 200 take their time

    def work(process: int) -> None:
        store = Store(here)
        log = AuditLog(store)
        failed = []

        def one(number: int) -> None:
            try:
                store.add_runs([a_run(f"{process}-{number}")])
                log.append("event", number=number, process=process)
            except BaseException as error:
                failed.append(error)
                raise

        threads = [threading.Thread(target=one, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed

    pids = [forked(lambda process=process: work(process)) for process in range(2)]  # type: ignore[misc]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    expected = {f"{process}-{number}" for process in range(2) for number in range(100)}
    with Store(here) as store:
        assert {run.sandbox_id for run in store.runs(limit=1000)} == expected
    verdict = verify(here)
    assert verdict.ok, verdict
    lines = [json.loads(line) for path in here.glob(f"{audit.NAME}*") for line in path.read_text().splitlines()]
    assert len(lines) == verdict.lines
    assert {f"{line['process']}-{line['number']}" for line in lines if line["event"] == "event"} == expected
    assert len(list(here.glob(f"{audit.NAME}*"))) > 2
    assert_intact(here)


def write_without_end(here: Path, prefix: str, out: int) -> None:
    """Runs, quarantines, audit lines; each is told on `out` when it is said to be kept."""
    store = Store(here)
    log = AuditLog(store)
    number = 0
    while True:
        number += 1
        store.add_runs([a_run(f"{prefix}-{number}")])
        os.write(out, f"run {prefix}-{number}\n".encode())
        store.quarantine(f"{prefix}-{number}", None, "", [], "test")
        os.write(out, f"quarantine {prefix}-{number}\n".encode())
        log.append("event", name=f"{prefix}-{number}")
        os.write(out, f"audit {prefix}-{number}\n".encode())


@pytest.mark.long
@pytest.mark.timeout(60 * harness.PATIENCE)
def test_killed_at_any_moment_nothing_is_lost(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "ROTATE_BYTES", 100_000)
    Store(here).close()
    chance = random.Random()
    kept: dict[str, set[str]] = {"run": set(), "quarantine": set(), "audit": set()}
    for attempt in range(KILLS):
        reading, writing = os.pipe()
        pid = forked(lambda attempt=attempt, writing=writing: write_without_end(here, str(attempt), writing))  # type: ignore[misc]
        os.close(writing)
        said = b""
        wanted = chance.randrange(1, 12) if attempt % 4 else 0  # every fourth one may be killed while it opens the files
        while said.count(b"\n") < wanted:
            data = os.read(reading, 65536)
            assert data, "the child has ended by itself"
            said += data
        time.sleep(chance.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        with open(reading, "rb") as file:
            said += file.read()
        for line in said.decode().splitlines():
            kind, name = line.split()
            kept[kind].add(name)
        assert verify(here).ok, attempt
    assert min(map(len, kept.values())) > KILLS / 4
    with Store(here) as store:
        assert kept["run"] <= {run.sandbox_id for run in store.runs(limit=1_000_000)}
        assert kept["quarantine"] <= {each.plugin_id for each in store.quarantined()}
        AuditLog(store).append("after all")
    verdict = verify(here)
    assert (verdict.ok, verdict.torn) == (True, 0)
    lines = [json.loads(line) for path in here.glob(f"{audit.NAME}*") for line in path.read_text().splitlines()]
    assert kept["audit"] <= {line.get("name") for line in lines}
    assert_intact(here)


@pytest.mark.long
def test_killed_while_it_is_made_it_is_made_the_next_time(here: Path) -> None:
    chance = random.Random()
    unfinished = 0
    for attempt in range(KILLS):
        place = here / str(attempt)
        pid = forked(lambda place=place: write_without_end(place, "", os.open(os.devnull, os.O_WRONLY)))  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.006))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        unfinished += not (place / audit.NAME).exists()
        with Store(place) as store:
            store.add_runs([a_run("after all")])
            assert store.runs(limit=1)[0].sandbox_id == "after all"
        assert_intact(place)
        assert verify(place).ok
    assert unfinished  # else nothing was tried


# -- the commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def caller(here: Path) -> Caller:
    """Whoever runs the tests, with records of its own."""
    return cli_harness.remembering(cli_harness.privileged("standard", here.parent), here.parent)


@pytest.fixture
def store(here: Path) -> Iterator[Store]:
    with Store(here) as opened:
        yield opened


def assert_refused(done: Done, *parts: str) -> None:
    assert (done.status, done.output) == (125, b""), done
    assert done.err.startswith("psie: ")
    assert done.err.count("\n") == 1
    assert done.err[:-1].isprintable()
    for part in parts:
        assert part in done.err


HOSTILE = "\x1b[2J[red]x[/bold]\\[/]\n"
SHOWN = "\\x1b[2J[red]x[/bold]\\[/]\\n"


def test_history(caller: Caller, store: Store) -> None:
    assert caller.run("history").out == "no such run is remembered\n"
    assert json.loads(caller.run("history", "--json").out) == []
    now = time.time()
    store.add_runs([a_run(str(number), started=now - 3600 * number, plugin_id=f"plugin-{number}") for number in range(5)])
    store.add_runs([a_run("bad", started=now - 10, plugin_id=HOSTILE, level="maximum", outcome="violation", exit_code=126)])
    done = caller.run("history")
    assert (done.status, done.err) == (0, "")
    assert re.findall(r"plugin-\d", done.out) == [f"plugin-{number}" for number in range(5)]
    assert SHOWN in done.out
    assert all(line.isprintable() for line in done.out.splitlines())

    def found(*words: str) -> list[str]:
        done = caller.run("history", "--json", *words)
        assert (done.status, done.err) == (0, "")
        return [run["sandbox_id"] for run in json.loads(done.out)]

    assert found() == ["0", "bad", "1", "2", "3", "4"]
    assert found("--limit", "2") == ["0", "bad"]
    assert len(found("--limit", "9" * 30)) == 6
    assert found("--plugin", "plugin-3") == ["3"]
    assert found("--level", "maximum") == found("--outcome", "violation") == ["bad"]
    assert found("--since", "90m") == ["0", "bad", "1"]
    assert found("--since", time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now - 9000))) == ["0", "bad", "1", "2"]
    assert found("--since", "2999-01-01") == []


def test_quarantine_is_listed_and_shown(caller: Caller, store: Store) -> None:
    assert caller.run("quarantine", "list").out == "no plugin is quarantined\n"
    violations = [{"type": "security_breach", "message": f"broke out {HOSTILE}"}]
    store.quarantine(HOSTILE, "aa" * 32, f"three {HOSTILE}", violations, "manager")
    store.quarantine("other", None, "why", [], "manager")
    store.release("other", "somebody")
    listed = caller.run("quarantine", "list")
    assert (listed.status, listed.err) == (0, "")
    assert SHOWN in listed.out
    assert "other" not in listed.out
    assert "by somebody" in caller.run("quarantine", "list", "--all").out
    names = [each["plugin_id"] for each in json.loads(caller.run("quarantine", "list", "--json", "--all").out)]
    assert names == ["other", HOSTILE]
    shown = caller.run("quarantine", "show", HOSTILE)
    assert (shown.status, shown.err) == (0, "")
    for part in ("aa" * 32, f"three {SHOWN}", f"broke out {SHOWN}", "manager"):
        assert part in shown.out
    assert json.loads(caller.run("quarantine", "show", HOSTILE, "--json").out)["violations"] == violations
    assert_refused(caller.run("quarantine", "show", "nobody\n"), "nobody\\n is not quarantined", "list --all")


def test_a_file_is_known_by_its_path_however_it_is_given(caller: Caller, store: Store) -> None:
    path = caller.write("pest.py", "pass")
    store.quarantine(str(path), None, "why", [], "manager")
    store.add_runs([a_run("1", plugin_id=str(path))])
    for given in ("pest.py", "./pest.py", str(path)):
        assert json.loads(caller.run("quarantine", "show", given, "--json").out)["plugin_id"] == str(path)
        assert [run["plugin_id"] for run in json.loads(caller.run("history", "--plugin", given, "--json").out)] == [str(path)]
    done = caller.run("quarantine", "release", "pest.py")
    assert (done.status, done.err) == (0, f"psie: {path}: 1 quarantine released\n")


def test_a_name_that_is_no_text_is_released_as_itself_and_as_it_is_told(caller: Caller, store: Store) -> None:
    path = caller.write(os.fsdecode(b"pe\nst \xff.py"), FINE)
    for given in (str(path), path.name, ""):
        store.quarantine(str(path), None, "why", [], "manager")
        refused = caller.run("run", "-q", path)
        assert_refused(refused, "is quarantined since")
        words = shlex.split(refused.err)[-4:]
        assert words[:3] == ["psie", "quarantine", "release"]
        assert caller.run("quarantine", "show", given or words[3]).status == 0
        assert caller.run("quarantine", "release", given or words[3]).status == 0
    assert caller.run("run", "-q", path).out == "fine\n"


def test_a_release_is_audited(caller: Caller, store: Store, here: Path) -> None:
    store.quarantine("bad", None, "why", [], "manager")
    done = caller.run("quarantine", "release", "bad", env={"LOGNAME": "forged", "USER": "forged"})
    assert (done.status, done.out) == (0, "")
    assert "1 quarantine released" in done.err
    (released,) = store.quarantined(include_released=True)
    try:
        expected = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as test_rootless.py runs it
        expected = f"user {os.getuid()}"
    assert released.released_by == expected
    (line,) = [json.loads(line) for line in (here / audit.NAME).read_text().splitlines()]
    assert (line["event"], line["plugin_id"], line["by"]) == ("quarantine-release", "bad", expected)
    again = caller.run("quarantine", "release", "bad")
    assert (again.status, again.out) == (1, "")
    assert "not quarantined" in again.err
    assert len((here / audit.NAME).read_text().splitlines()) == 1


def test_the_evidence_is_exported(caller: Caller, store: Store, here: Path) -> None:
    made = evidence.bundle(
        here / "evidence", "case", changes=[("/a", b"a")], violations=[], samples=[], recipe={}, output_tail=b"last words"
    )
    store.quarantine("bad", "aa" * 32, "why", [], "manager", evidence=made)
    target = caller.folder / "out"
    done = caller.run("quarantine", "export", "bad", target)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert json.loads((target / "quarantine.json").read_text())["plugin_id"] == "bad"
    assert (target / "output.txt").read_bytes() == b"last words"
    assert target.stat().st_mode & 0o777 == 0o700
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=target, check=True)
    assert_refused(caller.run("quarantine", "export", "bad", target), "is there already")
    assert_refused(caller.run("quarantine", "export", "bad", target.parent / "no" / "such"), "make that first")
    assert not (target.parent / "no").exists()


def test_an_export_without_evidence(caller: Caller, store: Store, here: Path) -> None:
    store.quarantine("bad", None, "why", [], "manager")
    target = caller.folder / "out"
    done = caller.run("quarantine", "export", "bad", target)
    assert done.status == 0
    assert "quarantine.json alone" in done.err
    assert os.listdir(target) == ["quarantine.json"]
    store.quarantine("gone", None, "why", [], "manager", evidence=here / "nowhere")
    other = caller.folder / "other"
    assert_refused(caller.run("quarantine", "export", "gone", other), "not there any more")
    assert_refused(caller.run("quarantine", "export", "bad", caller.folder / "no" / "such"), "make that first")
    assert_refused(caller.run("quarantine", "export", "nobody", other), "nobody")
    assert not other.exists()


def test_the_audit_is_verified(caller: Caller, store: Store, here: Path) -> None:
    done = caller.run("audit", "verify")
    assert (done.status, done.out, done.err) == (0, "the audit is whole: 0 lines\n", "")
    log = AuditLog(store)
    for number in range(5):
        log.append("event", number=number)
    assert caller.run("audit", "verify").out == "the audit is whole: 5 lines\n"
    path = here / audit.NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b"{")
    assert "5 lines; 1 bytes of a line that was not finished" in caller.run("audit", "verify").out
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    done = caller.run("audit", "verify")
    assert (done.status, done.err) == (1, "")
    assert re.fullmatch(r"the audit is broken at line 5 of \S+/audit\.jsonl: the lines from here on are missing\n", done.out)
    path.write_bytes(whole.replace(b'"number":2', b'"number":7'))
    done = caller.run("audit", "verify", "--json")
    assert done.status == 1
    verdict = json.loads(done.out)
    assert (verdict["ok"], verdict["file"], verdict["line"], verdict["why"]) == (False, audit.NAME, 3, "hash")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["history", "--level", "high"], ["--level high", "minimal, standard, strict, maximum"]),
        (["history", "--outcome", "\x1b"], ["--outcome \\x1b", "ok, error, limit, violation, refused"]),
        (["history", "--since", "yesterday"], ["--since yesterday", "24h"]),
        (["history", "--since", "99999-01-01"], ["--since 99999-01-01", "24h"]),
        (["history", "--limit", "0"], ["--limit 0", "above 0"]),
        (["history", "--limit", "many"], ["many", "psie history --help"]),
        (["quarantine", "release"], ["ID", "psie quarantine release --help"]),
        (["quarantine", "lock"], ["lock", "psie quarantine --help"]),
    ],
)
def test_mistakes(caller: Caller, words: list[str], parts: list[str]) -> None:
    assert_refused(caller.run(*words), *parts)


def test_a_damaged_store_is_said_and_set_aside(caller: Caller, here: Path) -> None:
    (here / NAME).write_bytes(b"x" * 10_000)
    (here / NAME).chmod(0o600)
    done = caller.run("history")
    assert (done.status, done.out) == (0, "no such run is remembered\n")
    assert done.err.count("\n") == 1
    (aside,) = [name for name in os.listdir(here) if "corrupt" in name]
    assert aside in done.err
    done = caller.run("history")
    assert (done.status, done.err) == (0, "")


def test_a_newer_store_is_refused(caller: Caller, store: Store, here: Path) -> None:
    with contextlib.closing(sqlite3.connect(here / NAME)) as connection:
        connection.execute("PRAGMA user_version = 99")
    for words in (["history"], ["quarantine", "list"], ["quarantine", "release", "x"], ["audit", "verify"]):
        assert_refused(caller.run(*words), "version 99", "upgrade psie", "XDG_STATE_HOME")


def test_a_store_of_others_is_refused(caller: Caller, store: Store, here: Path) -> None:
    store.add_runs([a_run("1")])
    (here / NAME).chmod(0o644)
    assert_refused(caller.run("history"), NAME, "chmod 600")


def test_what_a_killed_bundle_has_left_is_removed(caller: Caller, here: Path) -> None:
    left = here / evidence.FOLDER / evidence.UNFINISHED
    (left / "changes").mkdir(parents=True, mode=0o700)
    left.parent.chmod(0o700)
    (left / "changes" / "0").touch()
    done = caller.run("gc")
    assert (done.status, done.err) == (0, "")
    assert "removed evidence that was not finished\n" in done.out
    assert os.listdir(left.parent) == []
    assert "evidence" not in caller.run("gc").out


# -- every run is a row ----------------------------------------------------------------------------------------------------

FINE = "print('fine')"
# Refused by every profile, and survived: more different ones than violation_threshold.
BREAK_OFTEN = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    print("begun", flush=True)
    open("left behind", "w").write("by the plugin")
    for name in ("mount", "umount2", "unshare", "setns", "ptrace", "swapon", "swapoff", "acct", "reboot"):
        getattr(libc, name)(0, 0, 0, 0, 0)
    print("survived")
"""


def rows(caller: Caller, *words: str) -> list[dict[str, Any]]:
    """Newest first."""
    found: list[dict[str, Any]] = json.loads(caller.run("history", "--json", *words).out)
    return found


def quarantined(caller: Caller) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(caller.run("quarantine", "list", "--json").out)
    return found


def test_the_command_leaves_rows(caller: Caller) -> None:
    path = caller.write("plugin.py", FINE)
    assert caller.run("run", "-q", path, "--memory", "64M").status == 0
    assert caller.plugin("import sys; sys.exit(3)").status == 3
    assert caller.plugin("while True: pass", options=["--timeout", "0.5"]).status == 124
    assert caller.plugin("import os; os.fork()").status == 126
    assert caller.call("def main(): return 7").out == "7\n"
    assert caller.call("def main(): return object()").status == 1
    found = rows(caller)[::-1]
    assert [(row["outcome"], row["exit_code"]) for row in found] == [
        ("ok", 0),
        ("error", 3),
        ("limit", 124),
        ("violation", 126),
        ("ok", 0),
        ("error", 1),
    ]
    assert [row["plugin_id"] for row in found] == [str(path)] * 4 + [f"{path}:main"] * 2
    first = found[0]
    assert first["sha256"] == hashlib.sha256(FINE.encode()).hexdigest()
    assert (first["level"], first["door"], first["limits"]["max_memory_mb"]) == ("standard", "command", 64.0)
    assert 0 < first["seconds"] < 60
    assert 1 < first["peak_memory_mb"] < 64
    assert "longer than 0.5 s" in found[2]["reason"]
    assert [each["type"] for each in found[3]["violations"]] == ["permission_denied"]
    assert len({row["run_id"] for row in found}) == len(found)
    assert caller.run("audit", "verify").out == f"the audit is whole: {len(found)} lines\n"


def test_what_never_ran_is_no_row_but_a_refusal_is(caller: Caller) -> None:
    path = caller.write("plugin.py", FINE)
    for words in (["gone.py"], ["--level", "high", str(path)], ["--memory", "much", str(path)], ["--rw", "gone", str(path)]):
        assert caller.run("run", *words).status == 125
    assert rows(caller) == []
    assert caller.run("run", "-q", path, "--require-limits", "--cpu", "1").status in (0, 125)
    (row,) = rows(caller)
    assert row["outcome"] in ("ok", "refused")


def test_without_telemetry_nothing_is_written(caller: Caller, here: Path) -> None:
    path = caller.write("plugin.py", FINE)
    caller.write("off.toml", "[isolation]\ntelemetry_enabled = false\n")
    assert caller.run("run", "-q", "--config", "off.toml", path).out == "fine\n"
    assert caller.run("run", "-q", path, env={"SANDBOX_TELEMETRY_ENABLED": "0"}).out == "fine\n"
    assert not (here / spool.NAME).exists()
    assert rows(caller) == []


def test_where_no_row_can_be_written_the_run_comes_back(caller: Caller, here: Path) -> None:
    path = caller.write("plugin.py", FINE)
    (here / spool.NAME).touch(0o666)
    (here / spool.NAME).chmod(0o666)
    done = caller.run("run", "-q", path)
    assert (done.status, done.out, done.err) == (0, "fine\n", "")
    done = caller.run("run", path)
    assert (done.status, done.out) == (0, "fine\n")
    (line,) = [line for line in done.err.splitlines() if "not remembered" in line]
    assert spool.NAME in line
    assert "chmod 600" in line


def test_a_full_spool_is_moved_by_whoever_fills_it(caller: Caller, here: Path) -> None:
    now = time.time()
    filler: dict[str, Any] = {
        "started": now,
        "plugin_id": "filler",
        "sha256": "",
        "level": "strict",
        "outcome": "ok",
        "door": "library",
    }
    while not (here / spool.NAME).exists() or (here / spool.NAME).stat().st_size < spool.MUCH_BYTES - 400:
        spool.append(str(here), **filler, reason="r" * 50)
    path = caller.write("plugin.py", FINE)
    done = caller.run("run", "-q", path)
    assert (done.status, done.out, done.err) == (0, "fine\n", "")
    assert not (here / spool.NAME).exists()
    assert rows(caller, "--limit", "1")[0]["plugin_id"] == str(path)


def test_the_library_leaves_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    place = str(tmp_path / "own")
    monkeypatch.setattr(private, "default_folder", lambda: place)

    def double(value: int) -> int:
        return value * 2

    def fork() -> None:
        os.fork()

    def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD, sandbox_id="mine") as sandbox:
            assert await sandbox.execute_plugin_safe(double, 21) == 42
            with pytest.raises(SecurityViolationError):
                await sandbox.execute_plugin_safe(fork)
            with pytest.raises(PluginExecutionError):
                await sandbox.execute_plugin_safe(fail)
            with pytest.raises(TypeError):
                await sandbox.execute_plugin_safe(7)  # type: ignore[arg-type]  # no run
            task = asyncio.ensure_future(sandbox.execute_plugin_safe(time.sleep, 60))
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.wait([task])
        with pytest.raises(RuntimeError):
            await sandbox.execute_plugin_safe(double, 21)
        async with harness.open_sandbox(IsolationLevel.STANDARD, config={"telemetry_enabled": False}) as sandbox:
            await sandbox.execute_plugin_safe(double, 21)

    asyncio.run(main())
    with Store(place) as store:
        found = store.runs()[::-1]
    assert [run.outcome for run in found] == ["ok", "violation", "error", "error"]
    assert [run.plugin_id.rpartition(".")[2] for run in found] == ["double", "fork", "fail", "sleep"]
    assert [run.reason for run in found if run.outcome != "violation"] == ["returned", "ValueError: no", "cancelled"]
    assert {(run.door, run.sandbox_id, run.sha256, run.level) for run in found} == {("library", "mine", "", "standard")}
    assert [len(run.violations) for run in found] == [0, 1, 0, 0]
    assert all(run.peak_memory_mb > 1 for run in found[:3])
    assert found[0].limits["max_memory_mb"] == 128.0
    assert found[3].seconds >= 0.25
    assert verify(place).ok

    (Path(place) / spool.NAME).mkdir()
    assert harness.call(IsolationLevel.STANDARD, double, 4) == 8
    told = [(record.name, record.levelno) for record in caplog.records if record.name == "psie"]  # beside its violation
    assert told == [("psie", logging.WARNING)]
    assert "not remembered" in caplog.text


def test_the_framework_leaves_its_own_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "own")
    monkeypatch.setattr(private, "default_folder", lambda: place)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "good.py").write_text("def main(): return 1")
    framework = EnhancedPluginFramework(str(tmp_path / "p"))
    assert asyncio.run(framework.load_plugin_enhanced("good"))["success"]
    assert asyncio.run(framework.health_check_sandboxes())["ok"]
    framework.close()
    with Store(place) as store:
        (run,) = store.runs()
    assert (run.plugin_id, run.door, run.outcome) == ("good", "framework", "ok")


# -- quarantined files -----------------------------------------------------------------------------------------------------


def test_the_command_quarantines_what_passes_the_threshold(caller: Caller, here: Path) -> None:
    forgiving = {"SANDBOX_QUARANTINE_ENABLED": "0"}
    for _ in range(2):  # unprotected it runs as often as it likes
        assert caller.plugin(BREAK_OFTEN, env=forgiving).out == "begun\n"
    done = caller.plugin(BREAK_OFTEN)
    path = str(caller.folder / "plugin.py")
    assert (done.status, done.out) == (126, "begun\n")
    assert done.err.splitlines()[-1] == (f"psie: {path} is quarantined now: look into it, then psie quarantine release {path}")
    (entry,) = quarantined(caller)
    assert (entry["plugin_id"], entry["by"]) == (path, "command")
    assert entry["sha256"] == hashlib.sha256((caller.folder / "plugin.py").read_bytes()).hexdigest()
    assert "violation threshold" in entry["reason"]
    assert len(entry["violations"]) == 4  # one more than the default threshold, and no further one was answered
    made = here / "evidence" / Path(entry["evidence"]).name
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=made, check=True)
    assert (made / "output.txt").read_bytes() == b"begun\n"
    index = json.loads((made / "changes" / "index.json").read_text())
    assert [each["path"] for each in index["items"]] == ["workspace/left behind"]
    assert json.loads((made / "recipe.json").read_text())["level"] == "standard"

    done = caller.plugin(BREAK_OFTEN)
    assert_refused(done, path, "is quarantined since 2", "violation threshold", f"psie quarantine release {path}")
    assert rows(caller, "--limit", "1")[0]["outcome"] == "refused"
    assert caller.run("quarantine", "release", path).status == 0
    assert caller.plugin(FINE).out == "fine\n"
    events = [json.loads(line)["event"] for line in (here / audit.NAME).read_text().splitlines()]
    assert events.count("quarantine") == events.count("quarantine-release") == 1
    assert caller.run("audit", "verify").status == 0


def test_of_a_pipe_only_the_content_is_quarantined(caller: Caller) -> None:
    bad = textwrap.dedent(BREAK_OFTEN).encode()
    assert caller.run("run", "-q", "/dev/stdin", stdin=bad).status == 126
    (entry,) = quarantined(caller)
    assert entry["plugin_id"] == f"/dev/stdin:{hashlib.sha256(bad).hexdigest()[:16]}"
    assert_refused(caller.run("run", "-q", "/dev/stdin", stdin=bad), "is quarantined", f"release {entry['plugin_id']}")
    assert_refused(caller.plugin(BREAK_OFTEN), "is quarantined")
    assert caller.run("run", "-q", "/dev/stdin", stdin=FINE.encode()).out == "fine\n"


def test_quarantined_files_are_refused(caller: Caller, store: Store) -> None:
    path = caller.write("plugin.py", FINE)
    copy, other = caller.write("sub/a copy.py", FINE), caller.write("other.py", "print('other')")
    digest = hashlib.sha256(FINE.encode()).hexdigest()
    for each in (path, copy, other):
        assert caller.run("run", "-q", each).status == 0

    store.quarantine(str(path), None, "it \x1b[2J lies", [], "somebody")  # the path alone
    assert_refused(caller.run("run", "-q", path), str(path), "it \\x1b[2J lies", f"psie quarantine release {path}")
    assert_refused(caller.run("call", "-q", f"{path}:main"), "is quarantined since")
    assert_refused(caller.run("run", "-q", "./sub/../plugin.py"), str(path))
    assert caller.run("run", "-q", copy).status == 0
    path.write_text("print('mended')")
    assert_refused(caller.run("run", "-q", path), "is quarantined")
    store.release(str(path), "somebody")
    assert caller.run("run", "-q", path).out == "mended\n"

    store.quarantine(str(copy), digest, "bad", [], "somebody")  # the content under any name
    path.write_text(FINE)
    assert_refused(caller.run("run", "-q", path), f"as {copy}, which it equals", f"psie quarantine release '{copy}'")
    assert caller.run("run", "-q", other).out == "other\n"
    assert caller.run("quarantine", "release", copy).status == 0
    assert caller.run("run", "-q", path).out == "fine\n"

    store.quarantine("plugin", files.digest({"plugin.py": FINE.encode()}), "bad plugin", [], "framework")
    assert_refused(caller.run("run", "-q", copy), "as plugin, which it equals", "psie quarantine release plugin")
    store.release("plugin", "somebody")
    assert caller.run("run", "-q", copy).out == "fine\n"


def test_a_file_is_quarantined_with_what_is_beside_it(caller: Caller, store: Store) -> None:
    """An imitation of its main file with other modules gets nobody quarantined, and none runs as a module of another."""
    honest = caller.write("honest/main.py", "from helpers import work\nwork()\n")
    caller.write("honest/helpers.py", "def work(): print('honest')\n")
    evil = caller.write("evil/main.py", "from helpers import work\nwork()\n")
    caller.write("evil/helpers.py", textwrap.dedent(f"def work():\n{textwrap.indent(textwrap.dedent(BREAK_OFTEN), '    ')}\n"))
    assert caller.run("run", "-q", honest).out == "honest\n"
    assert caller.run("run", "-q", evil).status == 126
    assert_refused(caller.run("run", "-q", evil), "is quarantined")
    assert caller.run("run", "-q", honest).out == "honest\n"
    for name in ("main.py", "helpers.py"):
        caller.write(f"copy/{name}", (caller.folder / "evil" / name).read_text())
    assert_refused(caller.run("run", "-q", caller.folder / "copy/main.py"), f"as {evil}, which it equals")

    start = caller.write("start.py", BREAK_OFTEN)
    wrapped = caller.write("wrapped/wrap.py", "import start\n")
    caller.write("wrapped/start.py", BREAK_OFTEN)
    assert caller.run("run", "-q", start).status == 126
    assert_refused(caller.run("run", "-q", wrapped), f"as {start}, which it equals")


@pytest.mark.parametrize("damaged", ["store", "file", "emptied"])
def test_damage_ends_no_quarantine(caller: Caller, store: Store, here: Path, damaged: str) -> None:
    path = caller.write("plugin.py", FINE)
    assert caller.run("run", "-q", path).out == "fine\n"
    store.quarantine(str(path), None, "bad", [], "somebody")
    store.close()
    name = NAME if damaged == "store" else in_force.NAME
    (here / name).write_bytes(b"x" * 10_000 if damaged != "emptied" else b"")
    assert_refused(caller.run("run", "-q", path), "is quarantined")
    listed = caller.run("quarantine", "list", "--json")
    assert [each["plugin_id"] for each in json.loads(listed.out)] == [str(path)]
    assert ("still are" in listed.err) is (damaged == "store")
    for _ in range(2):
        assert_refused(caller.run("run", "-q", path), "is quarantined")
    assert caller.run("quarantine", "release", path).status == 0
    assert caller.run("run", "-q", path).out == "fine\n"


def test_records_that_cannot_be_believed_stop_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link in their place, say, to another disk: what is quarantined there must not run because nobody looks."""
    os.symlink(tmp_path, tmp_path / "psie")

    def folder(kind: str) -> str:
        with monkeypatch.context() as other:
            other.setattr(os, "getuid", lambda: 12345)
            other.setenv("XDG_STATE_HOME", str(tmp_path))
            return state.folder(kind)

    monkeypatch.setattr(remembered, "folder", folder)
    run = remembered.Remembered({}, "plugin", "plugin.py", b"", [], print)
    with pytest.raises(ResourceError, match="remove it, or set XDG_RUNTIME_DIR"):
        run.refuse_quarantined()


def test_a_file_of_quarantines_that_others_could_have_made_stops_every_run(caller: Caller, store: Store, here: Path) -> None:
    path = caller.write("plugin.py", FINE)
    store.quarantine("other", None, "bad", [], "somebody")
    (here / in_force.NAME).chmod(0o666)
    assert_refused(caller.run("run", "-q", path), in_force.NAME, "chmod 600")


def test_old_evidence_goes_by_the_command(caller: Caller, store: Store, here: Path) -> None:
    then = time.time() - (evidence.MAX_AGE_DAYS + 1) * 86400
    for name in ("kept", "old"):
        made = evidence.bundle(here / evidence.FOLDER, name, changes=[], violations=[], samples=[], recipe={}, output_tail=b"")
        os.utime(made, (then, then))
    store.quarantine("bad", None, "", [], "somebody", evidence=here / evidence.FOLDER / "kept")
    store.add_runs([a_run("1", started=then)])
    assert "removed 1 old runs and 1 folders of old evidence\n" in caller.run("gc").out
    assert os.listdir(here / evidence.FOLDER) == ["kept"]
    assert "old evidence" not in caller.run("gc").out
