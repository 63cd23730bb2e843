"""The spool: what is appended becomes a row once, whoever writes, moves or is killed meanwhile, and whatever is damaged."""

from __future__ import annotations

import fcntl
import json
import marshal
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import ResourceError
from sandbox.recovery import audit, private, spool
from sandbox.recovery.store import Store
from sandbox.version import __version__

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
KILLS = 100


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    folder.mkdir(0o700)
    return folder


def append(here: Path, identity: str, **more: Any) -> bool:
    given = {"started": time.time(), "plugin_id": "p", "sha256": "", "level": "strict", "outcome": "ok", "door": "library"}
    return spool.append(str(here), **{**given, "sandbox_id": identity, **more})


def ids(here: Path, told: list[str] | None = None) -> list[str]:
    """Of all rows, oldest first."""
    with Store(here, on_trouble=(told if told is not None else []).append) as store:
        return [run.sandbox_id for run in store.runs(limit=1_000_000)][::-1]


def audited(here: Path) -> Counter[str]:
    """How often the audit has each run."""
    lines = [json.loads(line) for path in here.glob(f"{audit.NAME}*") for line in path.read_text().splitlines()]
    return Counter(line["sandbox_id"] for line in lines if line["event"] == "run")


def forked(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was(here: Path) -> None:
    violations = [{"type": "security_breach", "message": "no \udcff", "details": {"count": 3, "big": 1 << 80}}]
    more = {"seconds": 1.5, "peak_memory_mb": 20.25, "peak_cpu_percent": 99.0, "exit_code": 137, "limits": {"a": None}}
    assert append(here, "1", violations=violations, reason="killed", **more) is False
    with Store(here) as store:
        (found,) = store.runs()
    assert {name: getattr(found, name) for name in more} == more
    assert (found.sandbox_id, found.reason, found.version) == ("1", "killed", __version__)
    assert found.violations == violations
    (line,) = [json.loads(line) for line in (here / audit.NAME).read_text().splitlines()]
    assert (line["event"], line["run_id"], line["door"], line["outcome"]) == ("run", found.run_id, "library", "ok")
    assert audit.verify(here).ok
    assert sorted(name for name in os.listdir(here) if name.startswith("runs.")) == []


def test_runs_come_in_their_order_and_statistics_see_them(here: Path) -> None:
    for number in range(3):
        append(here, str(number), started=time.time() + number)
    assert ids(here) == ["0", "1", "2"]
    for number in range(3, 5):
        append(here, str(number), started=time.time() + number)
    with Store(here) as store:
        assert store.statistics()["p"].runs == 5
        append(here, "5")
        store.trim()
        assert not spool.waits(str(here))


def test_a_plugin_cannot_fill_the_disk(here: Path) -> None:
    violations = [{"type": "filesystem_violation", "message": "x" * 900}] * 5000
    append(here, "1", violations=violations, reason="r" * 100_000, plugin_id="p" * 100_000)
    assert (here / spool.NAME).stat().st_size < 1 << 17
    with Store(here) as store:
        (found,) = store.runs()
        assert store.statistics()[found.plugin_id].violations == {"filesystem_violation": 5000}
    assert 0 < len(found.violations) < 100
    assert (len(found.reason), len(found.plugin_id)) == (spool.TEXT, spool.TEXT)


def test_it_says_once_that_much_waits(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MUCH_BYTES", 4000)
    said = [append(here, str(number)) for number in range(40)]
    size = (here / spool.NAME).stat().st_size
    assert sum(said) == size // 4000
    assert size // 4000 >= 2


def test_it_has_an_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(here, "1")
    monkeypatch.setattr(spool, "MOST_BYTES", 10)
    with pytest.raises(ResourceError, match=r"runs\.spool is full: psie history"):
        append(here, "2")
    assert ids(here) == ["1"]


def test_to_import_it_is_light() -> None:
    source = "import sys; from sandbox.recovery import spool, in_force; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", source], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    heavy = {"sqlite3", "json", "re", "contextlib", "dataclasses", "hashlib", "datetime", "logging", "enum", "typing"}
    assert "sandbox.recovery.spool" in loaded.stdout.split()
    assert heavy.isdisjoint(loaded.stdout.split())


# -- whose file it is --------------------------------------------------------------------------------------------------


def test_nobody_else_can_read_it(here: Path) -> None:
    before = os.umask(0)
    try:
        append(here / "new", "1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((here / "new" / spool.NAME).stat().st_mode) == 0o600


@pytest.mark.parametrize("name", [spool.NAME, spool.TAKEN])
@pytest.mark.parametrize("how", ["mode", pytest.param("owner", marks=needs_root), "second name", "link", "fifo", "folder"])
def test_what_others_could_have_made_is_refused(here: Path, name: str, how: str) -> None:
    append(here, "1")
    path, target = here / name, here.parent / "target"
    if name == spool.TAKEN:
        (here / spool.NAME).rename(path)
    if how == "mode":
        path.chmod(0o620)
    elif how == "owner":
        os.chown(path, NOBODY, NOBODY)
    elif how == "second name":
        os.link(path, target)
    else:
        content = path.read_bytes()
        path.unlink()
        if how == "link":
            target.write_bytes(content)
            path.symlink_to(target)
        elif how == "fifo":
            os.mkfifo(path, 0o600)
        else:
            path.mkdir()
    if name == spool.NAME:
        with pytest.raises(ResourceError, match=str(path)):
            append(here, "2")
    if how != "fifo":  # that has no size, so nothing waits in it
        with Store(here) as store, pytest.raises(ResourceError, match=str(path)):
            store.runs()
    assert not (here / audit.NAME).exists()


def test_where_nothing_can_be_written(here: Path) -> None:
    append(here, "1")
    size = (here / spool.NAME).stat().st_size

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        for text in ("disk is full", "cannot be written"):  # some of it fitted, and none
            with pytest.raises(ResourceError, match=text):
                append(here, "torn")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        append(here, "2")

    assert status_of(forked(work)) == 0
    told: list[str] = []
    assert ids(here, told) == ["1", "2"]
    assert [line.endswith("100 bytes of it were no record of a run") for line in told] == [True]


def test_a_lock_of_others_is_not_waited_for_without_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "PATIENCE", 0.1)
    append(here, "1")
    with open(here / spool.NAME, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match=r"runs\.spool has been locked"):
            append(here, "2")
    assert ids(here) == ["1"]


def test_a_writer_does_not_wait_for_what_is_being_moved(here: Path) -> None:
    append(here, "1")
    seen: list[float] = []

    def move(records: list[dict[str, Any]]) -> None:
        if not seen:
            start = time.monotonic()
            append(here, "2")
            seen.append(time.monotonic() - start)

    assert spool.take(str(here), move) == 0
    assert seen[0] < 0.5
    assert not spool.waits(str(here))


# -- damage ------------------------------------------------------------------------------------------------------------


def test_what_is_damaged_is_skipped_and_told(here: Path) -> None:
    path = here / spool.NAME
    sizes = []
    for number in range(20):
        append(here, str(number))
        sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    starts = [0, *sizes]
    chance = random.Random(5)
    for victim in range(20):
        data = bytearray(whole)
        data[chance.randrange(starts[victim], sizes[victim])] ^= 0xFF
        found, bad = spool.records(bytes(data))
        assert [record["sandbox_id"] for record in found] == [str(number) for number in range(20) if number != victim]
        assert bad == sizes[victim] - starts[victim]
    for cut in range(0, len(whole), 97):  # torn anywhere, and others have gone on
        found, bad = spool.records(whole[:cut] + whole)
        assert len(found) == 20 + sum(size <= cut for size in sizes)
        assert bad == cut - max(start for start in starts if start <= cut)
    path.write_bytes(b"x" * 10 + whole[: sizes[0]] + bytes(50) + whole[sizes[0] : sizes[4] - 1])
    told: list[str] = []
    assert ids(here, told) == ["0", "1", "2", "3"]
    assert len(told) == 1
    assert str(path) in told[0]


def frame(payload: bytes) -> bytes:
    size, check = (number.to_bytes(4, "little") for number in (len(payload), zlib.crc32(payload)))
    return spool.MAGIC + size + check + payload


def test_a_plugins_words_are_no_record_where_its_own_is_torn(here: Path) -> None:
    forged = frame(marshal.dumps({"sandbox_id": "forged"}, 4))
    assert spool.records(b"torn" + forged + b"torn")[0] == [{"sandbox_id": "forged"}]  # so would raw bytes be
    words = [forged.decode("latin-1"), forged.decode("utf-8", "surrogateescape")]
    details = {"arguments": [int.from_bytes(forged[start : start + 8], "little") for start in range(0, 24, 4)]}
    append(here, "1", violations=[{"type": word, "message": word, "details": details} for word in words], reason=words[1])
    data = (here / spool.NAME).read_bytes()
    assert len(spool.records(data)[0]) == 1
    for start in range(1, len(data)):
        assert spool.records(data[start:]) == ([], len(data) - start)


@pytest.mark.parametrize("payload", [b"", b"\x00" * 50, marshal.dumps([1], 4), marshal.dumps("text", 4)])
def test_what_is_framed_but_no_run_is_left_out(here: Path, payload: bytes) -> None:
    append(here, "1")
    with open(here / spool.NAME, "ab") as file:
        file.write(frame(payload) + frame(marshal.dumps({"outcome": "fine"}, 4)) + frame(marshal.dumps({"later": 1}, 4)))
    append(here, "2")
    told: list[str] = []
    assert ids(here, told) == ["1", "2"]
    assert len(told) == 3  # bytes that are none, and two that are no runs
    assert ids(here) == ["1", "2"]


# -- at once, and killed -----------------------------------------------------------------------------------------------


def test_several_processes_write_while_others_move(here: Path) -> None:
    writers, each = 4, 150

    def write(number: int) -> None:
        for step in range(each):
            append(here, f"{number}-{step}", violations=[{"type": "t", "message": "m" * (step * 20)}])

    def move() -> None:
        for _ in range(30):
            with Store(here) as store:
                store.runs(limit=1)

    pids = [forked(lambda number=number: write(number)) for number in range(writers)]  # type: ignore[misc]
    pids += [forked(move) for _ in range(2)]
    assert [status_of(pid) for pid in pids] == [0] * len(pids)
    told: list[str] = []
    expected = Counter(f"{number}-{step}" for number in range(writers) for step in range(each))
    assert Counter(ids(here, told)) == expected
    assert audited(here) == expected
    assert audit.verify(here).ok
    assert told == []


@pytest.mark.long
@pytest.mark.timeout(300)
def test_killed_at_any_moment_no_run_is_lost_or_doubled(here: Path) -> None:
    """Writers and who moves their records, one of them killed each time; what was acknowledged is a row, once."""
    chance = random.Random()
    acknowledged: set[str] = set()
    moments: Counter[str] = Counter()

    def write(prefix: str, out: int) -> None:
        number = 0
        while True:
            number += 1
            append(here, f"{prefix}-{number}", reason="r" * chance.randrange(4000))
            os.write(out, f"{prefix}-{number}\n".encode())
            time.sleep(chance.uniform(0, 0.001))

    def move() -> None:
        while True:
            with Store(here) as store:
                store.collect()

    for attempt in range(KILLS):
        reading, writing = os.pipe()
        victims = [forked(lambda attempt=attempt, writing=writing: write(f"{attempt}", writing)), forked(move)]  # type: ignore[misc]
        os.close(writing)
        if attempt % 2:
            victims.reverse()
        time.sleep(chance.uniform(0, 0.04))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
            assert status_of(pid) == -signal.SIGKILL
            moments["taken" if (here / spool.TAKEN).exists() else "not"] += 1
            time.sleep(chance.uniform(0, 0.005))
        with open(reading, "rb") as file:
            acknowledged |= set(file.read().decode().split())
    assert len(acknowledged) > KILLS
    assert moments["taken"] >= 3  # else nobody was killed while moving
    found = Counter(ids(here, []))
    assert acknowledged <= found.keys()
    assert set(found.values()) == {1}
    assert len(found) <= len(acknowledged) + KILLS  # one at most was written, but not acknowledged
    assert acknowledged <= audited(here).keys()
    assert audit.verify(here).ok
    assert not spool.waits(str(here))


@pytest.mark.parametrize("after", ["rows", "audit"])
def test_killed_before_the_spool_is_emptied_nothing_is_doubled(here: Path, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    for number in range(5):
        append(here, str(number))
    whole = (here / spool.NAME).read_bytes()
    with Store(here) as store, monkeypatch.context() as patch:
        if after == "rows":
            patch.setattr(audit.AuditLog, "append_all", die)
            with pytest.raises(KeyboardInterrupt):
                store.collect()
        else:
            store.collect()
            (here / spool.TAKEN).write_bytes(whole)
            (here / spool.TAKEN).chmod(0o600)
    append(here, "5")
    assert ids(here) == ["0", "1", "2", "3", "4", "5"]
    assert set(audited(here)) == {"0", "1", "2", "3", "4", "5"}


def die(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_store_meanwhile_loses_none_that_wait(here: Path) -> None:
    append(here, "1")
    (here / "psie.db").write_bytes(b"no database" * 1000)
    (here / "psie.db").chmod(0o600)
    told: list[str] = []
    assert ids(here, told) == ["1"]
    assert len(told) == 1
