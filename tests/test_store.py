"""The store: what is kept and found again, whose file is refused, and what becomes of damaged, newer and older ones."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import ResourceError
from sandbox.recovery import evidence, in_force, private
from sandbox.recovery import store as store_module
from sandbox.recovery.store import BESIDE, DOORS, MIGRATIONS, NAME, OUTCOMES, Percentiles, Run, Store

REPOSITORY = Path(__file__).parents[1]
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
START = time.time() - 7200  # of old runs the store keeps none for long
LEVELS = ("minimal", "standard", "strict", "maximum")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    folder.mkdir(0o700)
    return folder


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def store(here: Path, told: list[str]) -> Iterator[Store]:
    with Store(here, on_trouble=told.append) as opened:
        yield opened


def a_run(number: int = 0, **more: Any) -> Run:
    values = {"started": START + number, "plugin_id": "p", "sha256": "", "level": "strict", "outcome": "ok", "door": "library"}
    return Run(**{**values, "sandbox_id": str(number), **more})


def ids(runs: list[Run]) -> list[str]:
    return [run.sandbox_id for run in runs]


def elsewhere(here: Path, source: str, *words: str) -> str:
    """Run `source` in a process of its own, with a store "store" in the folder."""
    head = f"import sys\nfrom sandbox.recovery.store import MIGRATIONS, Run, Store\nhere = {str(here)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", head + source, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was(store: Store) -> None:
    violations = [{"type": "security_breach", "message": "no", "details": {"count": 3}}]
    given: dict[str, Any] = {
        "limits": {"max_memory_mb": 128.0},
        "seconds": 1.5,
        "peak_memory_mb": 20.25,
        "peak_cpu_percent": 99.0,
    }
    run = a_run(sha256="AB" * 32, exit_code=137, reason="killed", violations=violations, version="0.1", **given)
    store.add_runs([run])
    (found,) = store.runs()
    assert found == Run(**{**vars(run), "sha256": "ab" * 32, "id": 1})
    assert json.loads(json.dumps(found.to_dict()))["violations"] == violations


def test_runs_are_found_by_what_they_are(store: Store) -> None:
    every = [
        a_run(
            number, plugin_id=f"p{number % 3}", level=LEVELS[number % 4], outcome=OUTCOMES[number % 5], door=DOORS[number % 3]
        )
        for number in range(120)
    ]
    store.add_runs(random.Random(1).sample(every, len(every)))
    newest = every[::-1]
    assert ids(store.runs(limit=1000)) == ids(newest)
    assert ids(store.runs()) == ids(newest[:100])
    assert ids(store.runs(limit=3)) == ["119", "118", "117"]
    assert store.runs(limit=0) == []
    assert ids(store.runs(plugin="p1", limit=1000)) == ids([run for run in newest if run.plugin_id == "p1"])
    assert ids(store.runs(level="strict", limit=1000)) == ids([run for run in newest if run.level == "strict"])
    assert ids(store.runs(since=START + 100, limit=1000)) == ids(newest[:20])
    both = [run for run in newest if run.outcome == "limit" and run.plugin_id == "p2" and run.started >= START + 50]
    assert both
    assert ids(store.runs("p2", outcome="limit", since=START + 50, limit=1000)) == ids(both)
    assert store.runs(plugin="p") == []
    with pytest.raises(ValueError, match="limit is -1"):
        store.runs(limit=-1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("outcome", "fine"), ("door", "window"), ("seconds", math.nan), ("started", math.inf), ("peak_memory_mb", -math.inf)],
)
def test_nonsense_is_no_run(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^Run\.{field} is .*: give "):
        a_run(**{field: value})


def test_all_runs_of_a_call_or_none(store: Store) -> None:
    with pytest.raises(ResourceError):
        store.add_runs([a_run(1), a_run(2, exit_code=object())])
    assert store.runs() == []
    store.add_runs([])
    store.add_runs([a_run(3)])
    assert ids(store.runs()) == ["3"]


def test_hostile_text_is_kept_as_text(store: Store) -> None:
    names = ["'; DROP TABLE runs; --", "a\0b", "\udcff", "\x1b[2J", "é" * 300, ""]
    store.add_runs([a_run(number, plugin_id=name, reason=name) for number, name in enumerate(names)])
    for number, name in enumerate(names[:-1]):
        assert ids(store.runs(plugin=name)) == [str(number)]
    assert store.runs(plugin="\udcff")[0].plugin_id == "\\udcff"
    assert len(store.runs()) == len(names)


def test_a_plugin_cannot_fill_the_disk(store: Store) -> None:
    violations = [{"type": "filesystem_violation", "message": "x" * 900}] * 5000
    store.add_runs([a_run(reason="r" * 100_000, violations=violations)])
    (found,) = store.runs()
    assert 0 < len(json.dumps(list(found.violations))) <= store_module.VIOLATION_BYTES
    assert len(found.reason) == store_module.TEXT
    assert store.statistics()["p"].violations == {"filesystem_violation": 5000}  # they count all the same


def test_trimmed_by_age_and_by_number(store: Store) -> None:
    now = time.time()
    store.add_runs([a_run(number, started=now - number * 86400) for number in range(20)])
    assert store.trim(max_age_days=9.5) == (10, 0)
    assert ids(store.runs()) == [str(number) for number in range(10)]
    assert store.trim(max_rows=4) == (6, 0)
    assert ids(store.runs()) == ["0", "1", "2", "3"]
    assert store.trim() == (0, 0)


def test_old_runs_go_by_themselves(here: Path) -> None:
    old = time.time() - (store_module.MAX_AGE_DAYS + 1) * 86400
    for number in range(store_module.TRIM_EVERY // 100 - 1):  # also where no process adds many
        with Store(here) as store:
            store.add_runs([a_run(number, started=old) for _ in range(100)])
    with Store(here) as store:
        assert len(store.runs(limit=10_000)) == store_module.TRIM_EVERY - 100
        store.add_runs([a_run(1, started=time.time()) for _ in range(150)])
        assert len(store.runs(limit=10_000)) == 150


def test_statistics_of_10_000_runs(store: Store) -> None:
    chance = random.Random(7)
    every = [
        a_run(
            number,
            plugin_id=f"p{number % 7}",
            outcome=chance.choice(OUTCOMES),
            seconds=chance.expovariate(1),
            peak_memory_mb=chance.uniform(1, 500),
            violations=[{"type": chance.choice(["network_violation", "permission_denied"])}] * chance.randrange(3),
        )
        for number in range(10_000)
    ]
    store.add_runs(every)
    assert len(store.runs(limit=20_000)) == 10_000
    for since, chosen in ((None, every), (START + 5000, every[5000:])):
        found = store.statistics(since)
        assert list(found) == [f"p{number}" for number in range(7)]
        for plugin, statistics in found.items():
            own = [run for run in chosen if run.plugin_id == plugin]
            assert statistics.runs == len(own)
            assert statistics.outcomes == Counter(run.outcome for run in own)
            assert statistics.violations == Counter(each["type"] for run in own for each in run.violations)
            assert_ranks(statistics.seconds, [run.seconds for run in own])
            assert_ranks(statistics.peak_memory_mb, [run.peak_memory_mb for run in own])


def assert_ranks(found: Percentiles, values: list[float]) -> None:
    """By the definition: the smallest value that at least so many percent do not exceed."""
    for percent, value in ((50, found.p50), (95, found.p95), (99, found.p99)):
        assert value in values
        assert sum(each <= value for each in values) * 100 >= percent * len(values)
        assert sum(each < value for each in values) * 100 < percent * len(values)


def test_statistics_of_nothing_and_of_one(store: Store) -> None:
    assert store.statistics() == {}
    store.add_runs([a_run(seconds=2.0, peak_memory_mb=3.0)])
    found = store.statistics()["p"]
    assert (found.seconds, found.peak_memory_mb) == (Percentiles(2.0, 2.0, 2.0), Percentiles(3.0, 3.0, 3.0))
    assert (found.outcomes, found.violations) == ({"ok": 1}, {})


# -- quarantine ----------------------------------------------------------------------------------------------------------


def test_a_quarantine_is_of_the_name_and_of_the_content(store: Store) -> None:
    violations = [{"type": "security_breach", "message": "no"}]
    made = store.quarantine("bad", "AA" * 32, "three violations", violations, "manager", evidence=Path("/somewhere"))
    assert (made.plugin_id, made.sha256, made.evidence, made.released) == ("bad", "aa" * 32, "/somewhere", None)
    assert made.violations == violations
    assert abs(made.since - time.time()) < 60
    assert store.is_quarantined("bad") == made
    assert store.is_quarantined(sha256="Aa" * 32) == made
    assert store.is_quarantined("renamed", "aa" * 32) == made
    assert store.is_quarantined("bad", "bb" * 32) == made
    assert store.is_quarantined("good", "bb" * 32) is None
    assert store.quarantined() == [made]


@pytest.mark.parametrize("unknown", [None, ""])
def test_an_unknown_content_is_not_another_unknown_content(store: Store, unknown: str | None) -> None:
    store.quarantine("bad", unknown, "", [], "manager")
    assert store.is_quarantined("good", unknown) is None
    found = store.is_quarantined("bad", unknown)
    assert found is not None
    assert found.sha256 is None
    with pytest.raises(ValueError, match="nothing to look for"):
        store.is_quarantined("", unknown)
    with pytest.raises(ValueError, match="plugin_id is empty"):
        store.quarantine("", unknown, "", [], "manager")


def test_a_release_ends_all_of_that_name(store: Store) -> None:
    first, second = (store.quarantine("bad", digest * 32, "", [], "manager") for digest in ("aa", "bb"))
    other = store.quarantine("other", "aa" * 32, "", [], "manager")
    assert store.is_quarantined("bad") == second
    assert store.release("bad", "somebody") == 2
    assert store.is_quarantined("bad") is None
    assert store.is_quarantined(sha256="aa" * 32) == other
    assert store.quarantined() == [other]
    every = store.quarantined(include_released=True)
    assert [each.id for each in every] == [other.id, second.id, first.id]
    assert [each.released_by for each in every] == [None, "somebody", "somebody"]
    assert every[1].released is not None
    assert every[1].released >= second.since
    with pytest.raises(ValueError, match=r"'bad' is not quarantined: psie quarantine list"):
        store.release("bad", "somebody")


def test_a_quarantine_is_on_disk_at_once(store: Store) -> None:
    def synchronous() -> int:
        assert store._connection is not None
        found: int = store._connection.execute("PRAGMA synchronous").fetchone()[0]
        return found

    normal, full = 1, 2  # as pragma.html has them
    store.add_runs([a_run()])
    assert synchronous() == normal
    store.quarantine("bad", None, "", [], "manager")
    assert synchronous() == full
    store.add_runs([a_run()])
    store.release("bad", "somebody")
    assert synchronous() == full


def test_the_audits_end_only_goes_on(store: Store) -> None:
    assert store.audit_end() is None
    for seq in (9, 10, 3, 10):
        store.set_audit_end(seq, f"hash {seq}")
    assert store.audit_end() == (10, "hash 10")


# -- whose file it is ----------------------------------------------------------------------------------------------------

FILES = (NAME, *(NAME + suffix for suffix in BESIDE), store_module.LOCK)


def test_nobody_else_can_read_it(here: Path) -> None:
    before = os.umask(0)
    try:
        with Store(here) as store:
            store.add_runs([a_run()])
            made = os.listdir(here)
            assert sorted(made) == sorted(set(FILES) - {f"{NAME}-journal"})
            assert {stat.S_IMODE((here / name).stat().st_mode) for name in made} == {0o600}
        with Store(here / "new" / "folder"):
            assert stat.S_IMODE((here / "new" / "folder").stat().st_mode) == 0o700
    finally:
        os.umask(before)


def spoil(path: Path, how: str) -> None:
    path.touch(0o600)
    if how == "mode":
        path.chmod(0o640)
    elif how == "owner":
        os.chown(path, NOBODY, NOBODY)
    elif how == "second name":
        os.link(path, path.parent.parent / "second name")
    else:
        path.unlink()
        if how == "link":
            path.symlink_to(path.parent.parent / "target")
        elif how == "fifo":
            os.mkfifo(path, 0o600)
        else:
            path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["mode", pytest.param("owner", marks=needs_root), "second name", "link", "fifo", "folder"])
def test_what_others_could_have_made_is_refused(here: Path, name: str, how: str) -> None:
    Store(here).close()
    spoil(here / name, how)
    words = {"mode": "chmod 600 it", "owner": "belongs to another user"}.get(how, "remove it")
    with pytest.raises(ResourceError, match=words) as caught:
        Store(here)
    assert str(here / name) in str(caught.value)
    assert not (here.parent / "target").exists()


@pytest.mark.parametrize("how", ["writable", pytest.param("owner", marks=needs_root), "link", "file"])
def test_a_folder_of_others_is_refused(here: Path, how: str) -> None:
    given = here
    if how == "writable":
        here.chmod(0o770)
    elif how == "owner":
        os.chown(here, NOBODY, NOBODY)
    elif how == "link":
        given = here.parent / "link"
        given.symlink_to(here)
    else:
        given = here / "file"
        given.touch()
    with pytest.raises(ResourceError, match="XDG_STATE_HOME"):
        Store(given)
    assert not (here / NAME).exists()


# -- damage --------------------------------------------------------------------------------------------------------------


def aside(here: Path) -> list[str]:
    return sorted(name for name in os.listdir(here) if ".corrupt-" in name)


def damage(path: Path, start: int = 0) -> None:
    """By another process: closing the file in this one would drop SQLite's locks."""
    source = "import sys\nwith open(sys.argv[1], 'r+b') as file:\n    file.seek(START)\n    file.write(b'x' * SIZE)"
    source = source.replace("START", str(start)).replace("SIZE", str(path.stat().st_size - start))
    subprocess.run([sys.executable, "-c", source, str(path)], check=True, timeout=60)


def test_a_damaged_file_is_set_aside_at_the_start(here: Path, told: list[str]) -> None:
    (here / NAME).write_bytes(b"this is no database, but long enough to be one" * 100)
    (here / NAME).chmod(0o600)
    with Store(here, on_trouble=told.append) as store:
        store.add_runs([a_run()])
        assert ids(store.runs()) == ["0"]
        (name,) = aside(here)
        assert (here / name).read_bytes().startswith(b"this is no database")
        assert len(told) == 1
        assert name in told[0]
        assert str(here) in told[0]
    with Store(here, on_trouble=told.append) as store:
        assert ids(store.runs()) == ["0"]
    assert len(told) == 1


@pytest.mark.parametrize("writes", [False, True])
def test_a_damaged_file_is_set_aside_later(here: Path, told: list[str], writes: bool) -> None:
    with Store(here) as store:
        store.add_runs([a_run(number) for number in range(2000)])
        store.quarantine("bad", None, "", [], "manager")
        assert len(store.runs(limit=3000)) == 2000
    with Store(here, on_trouble=told.append) as store:
        damage(here / NAME, 4096)
        if writes:
            store.add_runs([a_run(1)])
        assert ids(store.runs()) == (["1"] if writes else [])
        store.quarantine("other", None, "", [], "manager")
        assert [each.plugin_id for each in store.quarantined()] == ["other", "bad"]
    assert len(told) == 1
    assert "the plugins that were quarantined still are" in told[0]
    assert all(re_name.startswith("psie.db.corrupt-2") for re_name in aside(here))
    assert len([name for name in aside(here) if not name.endswith(BESIDE)]) == 1


def test_its_log_goes_with_it(here: Path, told: list[str]) -> None:
    killed = "import os\nstore = Store(here)\nstore.quarantine('bad', None, '', [], 'x')\nos.kill(os.getpid(), 9)"
    subprocess.run(
        [sys.executable, "-c", f"from sandbox.recovery.store import Store\nhere = {str(here)!r}\n{killed}"],
        cwd=REPOSITORY,
        timeout=60,
        check=False,
    )
    log = (here / (NAME + "-wal")).read_bytes()
    assert log
    with Store(here, on_trouble=told.append) as store:
        assert store.is_quarantined("bad")
        damage(here / NAME)
        damage(here / (NAME + "-wal"), 32)
        elsewhere(here, "store = Store(here)\nstore.add_runs([])")
        assert store.is_quarantined("bad")  # it is in the file of those in force as well
    assert [name for name in aside(here) if name.endswith("-wal")]


def test_what_was_set_aside_by_another_is_not_used_any_more(here: Path, store: Store, told: list[str]) -> None:
    store.add_runs([a_run(1)])
    said = elsewhere(
        here,
        "told = []\n"
        "damaged = Store(here, on_trouble=told.append)\n"
        "error = 'as if'\n"
        "print(len(damaged._set_aside(error)))\n"
        "damaged.add_runs([Run(5.0, 'p', '', 'strict', 'ok', 'library', sandbox_id='2')])\n",
    )
    assert said == "1\n"
    assert store._set_aside("seen before the other was ready") == []
    assert ids(store.runs()) == ["2"]
    store.add_runs([a_run(3, started=6.0)])
    assert ids(store.runs()) == ["3", "2"]
    assert told == []
    assert elsewhere(here, "print([run.sandbox_id for run in Store(here).runs()])") == "['3', '2']\n"


def test_two_at_once_set_it_aside_once(here: Path) -> None:
    (here / NAME).write_bytes(b"x" * 5000)
    (here / NAME).chmod(0o600)
    source = (
        f"import sys\nfrom sandbox.recovery.store import Store, Run\nsys.stdin.read(1)\n"
        f"told = []\nstore = Store({str(here)!r}, on_trouble=told.append)\n"
        "store.add_runs([Run(1.0, 'p', '', 'strict', 'ok', 'library')])\nprint(len(told))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", source], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"x")
        process.stdin.flush()
    told = [int(process.communicate(timeout=60)[0]) for process in started]
    assert sum(told) == 1
    assert len(aside(here)) == 1
    with Store(here) as store:
        assert len(store.runs()) == len(started)


def test_by_default_the_log_is_told(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / NAME).write_bytes(b"x" * 5000)
    (here / NAME).chmod(0o600)
    Store(here).close()
    assert [(record.name, record.levelno) for record in caplog.records] == [("psie", logging.WARNING)]
    assert aside(here)[0] in caplog.text


def test_a_removed_file_is_made_again(here: Path, store: Store) -> None:
    store.add_runs([a_run(1)])
    for name in os.listdir(here):
        (here / name).unlink()
    store.add_runs([a_run(2)])
    assert ids(store.runs()) == ["2"]
    with Store(here) as other:
        assert ids(other.runs()) == ["2"]


def test_a_damaged_cell_does_not_hide_a_quarantine(here: Path, store: Store) -> None:
    store.quarantine("bad", None, "", [{"type": "x"}], "manager")
    with sqlite3.connect(here / NAME) as connection:
        connection.execute("UPDATE quarantine SET violations = '[{', reason = CAST(X'ff41' AS TEXT)")
    connection.close()
    found = store.is_quarantined("bad")
    assert found is not None
    assert (found.violations, found.reason) == ([], "�A")


# -- versions ------------------------------------------------------------------------------------------------------------

NEWER = "MIGRATIONS.append(('ALTER TABLE runs ADD COLUMN later TEXT', 'CREATE TABLE later (x)'))\n"


def user_version(here: Path) -> int:
    connection = sqlite3.connect(here / NAME)
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.close()
    return version


def test_a_newer_file_is_refused_and_kept(here: Path) -> None:
    elsewhere(here, NEWER + "Store(here).add_runs([Run(1.0, 'p', '', 'strict', 'ok', 'library')])")
    with pytest.raises(ResourceError) as caught:
        Store(here)
    for part in (f"version {len(MIGRATIONS) + 1}", f"knows {len(MIGRATIONS)}", str(here), "upgrade psie", "XDG_STATE_HOME"):
        assert part in str(caught.value)
    assert aside(here) == []
    assert elsewhere(here, NEWER + "print(len(Store(here).runs()))") == "1\n"


def test_an_older_process_does_not_write_into_a_newer_file(here: Path, store: Store) -> None:
    store.add_runs([a_run(1)])
    before = store.quarantine("bad", None, "", [], "manager")
    added = "store.add_runs([Run(9.0, 'new', '', 'strict', 'ok', 'library')])"
    elsewhere(here, f"{NEWER}store = Store(here)\nassert len(store.runs()) == 1\n{added}")
    assert user_version(here) == len(MIGRATIONS) + 1
    refused = (
        lambda: store.add_runs([a_run(2)]),
        lambda: store.quarantine("worse", None, "", [], "manager"),
        lambda: store.release("bad", "somebody"),
        store.runs,
        store.quarantined,
    )
    for use in refused:
        with pytest.raises(ResourceError, match="upgrade psie"):
            use()
    counted = elsewhere(
        here, NEWER + "store = Store(here)\nprint(len(store.runs()), [each.id for each in store.quarantined()])"
    )
    assert counted == f"2 [{before.id}]\n"


def test_an_older_file_is_migrated_as_a_whole(here: Path) -> None:
    with Store(here) as store:
        store.add_runs([a_run(number) for number in range(10)])
    broken = "MIGRATIONS.append(('CREATE TABLE later (x)', 'CREATE TABLE runs (x)'))\n"
    said = elsewhere(here, broken + "try:\n    Store(here)\nexcept Exception as error:\n    print(type(error).__name__, error)")
    assert said.startswith("ResourceError ")
    assert user_version(here) == len(MIGRATIONS)  # all steps or none
    assert elsewhere(here, NEWER + "print(len(Store(here).runs()))") == "10\n"
    assert user_version(here) == len(MIGRATIONS) + 1


# -- who uses it at once -------------------------------------------------------------------------------------------------


def in_threads(count: int, work: Any) -> None:
    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_threads(store: Store) -> None:
    def work(number: int) -> None:
        for step in range(10):
            store.add_runs([a_run(number * 10 + step)])
            assert store.runs(limit=1)

    in_threads(8, work)
    assert sorted(map(int, ids(store.runs(limit=1000)))) == list(range(80))


@pytest.mark.long
def test_forks_go_on_with_files_of_their_own(here: Path, store: Store) -> None:
    """Also while another thread is at work: a fork must not believe that it has its parent's locks."""
    store.add_runs([a_run(0)])
    end = threading.Event()
    written = 1

    def write() -> None:
        nonlocal written
        while not end.is_set():
            store.add_runs([a_run(written)])
            written += 1

    writer = threading.Thread(target=write)
    writer.start()
    children = 40
    try:
        for number in range(children):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    inherited = [name for name in os.listdir("/proc/self/fd") if NAME in readlink(f"/proc/self/fd/{name}")]
                    store.add_runs([a_run(100_000 + number)])
                    status = 0 if inherited == [] and store.runs(limit=1) else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        end.set()
        writer.join()
    expected = {str(number) for number in [*range(written), *range(100_000, 100_000 + children)]}
    assert set(ids(store.runs(limit=1_000_000))) == expected
    store.close()
    connection = sqlite3.connect(here / NAME)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def readlink(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def test_nobody_waits_without_end(here: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "PATIENCE", 0.1)
    with open(here / store_module.LOCK, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert store.runs() == []  # who only reads need not wait
        with pytest.raises(ResourceError, match=r"psie\.lock has been locked .* try again"):
            store.add_runs([a_run()])
    store.add_runs([a_run()])


def test_where_nothing_can_be_written_nothing_is(here: Path) -> None:
    said = elsewhere(
        here,
        "import resource\n"
        "store = Store(here)\n"
        "store.add_runs([Run(1.0, 'p', '', 'strict', 'ok', 'library')])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "for attempt in range(2):\n"
        "    try:\n"
        "        store.add_runs([Run(2.0, 'p' * 3000, '', 'strict', 'ok', 'library') for _ in range(100)])\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, len(store.runs()))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "store.add_runs([Run(3.0, 'p', '', 'strict', 'ok', 'library')])\n"
        "print(len(store.runs()))\n",
    )
    assert said == "ResourceError 1\nResourceError 1\n2\n"
    assert aside(here) == []


# -- quarantines in force, in the file beside it ---------------------------------------------------------------------------


def names_in_force(here: Path) -> list[str]:
    found = in_force.read(str(here))
    assert found is not None
    return [each["plugin_id"] for each in found]


def test_the_file_has_what_is_in_force(here: Path, store: Store) -> None:
    assert not (here / in_force.NAME).exists()
    for name in ("a", "b", "c"):
        store.quarantine(name, "aa" * 32, f"why {name}", [{"type": "x"}], "manager", evidence=Path("/somewhere"))
    store.release("b", "somebody")
    assert names_in_force(here) == ["c", "a"]
    (newest, _) = store.quarantined()
    entry = (in_force.read(str(here)) or [])[0]
    assert entry == {name: getattr(newest, name) for name in in_force.FIELDS}


def test_a_new_database_has_what_was_in_force(here: Path, told: list[str]) -> None:
    with Store(here) as store:
        before = [store.quarantine(name, "aa" * 32, name, [], "manager", evidence=Path("/e")) for name in ("a", "b", "c")]
        store.release("b", "somebody")
    for name in (NAME, NAME + "-wal"):
        (here / name).unlink(missing_ok=True)
    (here / NAME).write_bytes(b"x" * 5000)
    (here / NAME).chmod(0o600)
    with Store(here, on_trouble=told.append) as store:
        again = store.quarantined(include_released=True)
        assert [{**each.to_dict(), "id": 0} for each in again] == [{**before[at].to_dict(), "id": 0} for at in (2, 0)]
        assert "the plugins that were quarantined still are" in told[0]
        assert store.release("a", "somebody") == 1
    with Store(here) as store:
        assert [each.plugin_id for each in store.quarantined()] == ["c"]
    assert names_in_force(here) == ["c"]


def test_who_is_killed_in_between_leaves_it_quarantined(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way in the file is first, on the way out it is last."""
    with Store(here) as store:
        store.quarantine("a", None, "", [], "manager")
        with monkeypatch.context() as patch:
            patch.setattr(in_force, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                store.release("a", "somebody")  # committed, and still in the file
    assert names_in_force(here) == ["a"]
    with Store(here) as store:
        assert store.quarantined() == []
        assert names_in_force(here) == []

        written = in_force.write

        def killed_afterwards(*arguments: Any) -> None:
            written(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(in_force, "write", killed_afterwards)
            with pytest.raises(KeyboardInterrupt):
                store.quarantine("b", None, "", [], "manager")  # in the file, and never committed
        assert store.quarantined() == []
    with Store(here) as store:
        assert [each.plugin_id for each in store.quarantined()] == names_in_force(here) == ["b"]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_or_missing_file_is_written_anew(here: Path, told: list[str]) -> None:
    with Store(here) as store:
        store.quarantine("a", None, "", [], "manager")
    (here / in_force.NAME).write_bytes(b"damaged")
    Store(here).close()
    assert names_in_force(here) == ["a"]
    (here / in_force.NAME).unlink()
    Store(here).close()
    assert names_in_force(here) == ["a"]
    (here / in_force.NAME).write_bytes(b"damaged")
    (here / NAME).write_bytes(b"x" * 5000)
    with Store(here, on_trouble=told.append) as store:
        assert store.quarantined() == []
    assert "which plugins were quarantined is lost" in told[0]


def test_where_the_file_cannot_be_written_nothing_is_quarantined(here: Path, store: Store) -> None:
    (here / in_force.NAME).mkdir()
    with pytest.raises(ResourceError):
        store.quarantine("a", None, "", [], "manager")
    assert store.quarantined() == []


def test_old_evidence_goes_with_old_runs(here: Path, store: Store) -> None:
    made = []
    for name in ("old", "kept", "new"):
        path = evidence.bundle(here / evidence.FOLDER, name, changes=[], violations=[], samples=[], recipe={}, output_tail=b"")
        made.append(path)
        if name != "new":
            then = time.time() - (evidence.MAX_AGE_DAYS + 1) * 86400
            os.utime(path, (then, then))
    store.quarantine("bad", None, "", [], "manager", evidence=made[1])
    assert store.trim() == (0, 1)
    assert sorted(os.listdir(here / evidence.FOLDER)) == ["kept", "new"]
    store.release("bad", "somebody")
    store.trim()
    assert os.listdir(here / evidence.FOLDER) == ["new"]
