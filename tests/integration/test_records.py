"""What psie keeps between runs, as several processes, killed ones and people at a command line use it."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.recovery import audit, evidence
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
    assert_refused(caller.run("quarantine", "export", "bad", caller.folder / "no" / "such"), "No such file")
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
        (["history", "--limit", "many"], ["many", "psie --help"]),
        (["quarantine", "release"], ["ID", "psie --help"]),
        (["quarantine", "lock"], ["lock", "psie --help"]),
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
