"""FilesystemWatchdog: what it tells of a folder, and that the state it tells is the state that is there."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import FilesystemWatchdog, IsolationConfig
from sandbox.engine.loop import PollLoop
from sandbox.monitor import files
from sandbox.monitor.files import FileWatch
from sandbox.ns import syscalls as sc
from sandbox.text import escape_text

from . import harness

pytestmark = pytest.mark.rootless

SEEDS = range(8)

# Makes, writes, moves and removes files and folders at random below the current folder, as fast as it can.
CHURN = """
import os, random, shutil, sys
choose = random.Random(int(sys.argv[1]))
folders = ["."]
for number in range(1500):
    folder = choose.choice(folders)
    path = f"{folder}/{choose.randrange(40)}"
    try:
        what = choose.randrange(10)
        if what < 3:
            os.mkdir(path)
            folders.append(path)
        elif what < 6:
            with open(path, "w") as file:
                file.write("x" * choose.randrange(9))
        elif what < 7:
            os.unlink(path)
        elif what < 8:
            shutil.rmtree(path)
        else:
            os.rename(path, f"{choose.choice(folders)}/{choose.randrange(40)}")
    except OSError:
        pass
"""


def tree(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(above, name), folder) for above, inner, files in os.walk(folder) for name in inner + files
    }


def replayed(records: Iterable[dict[str, Any]], before: set[str] = frozenset()) -> set[str]:  # type: ignore[assignment]
    """The tree that the records lead to."""
    present = set(before)
    for record in records:
        path = record["path"]
        if record["operation"] == "create":
            present.add(path)
        elif record["operation"] == "delete":
            present.discard(path)
        elif record["operation"] == "move":
            old = record["from"]
            present = {each for each in present if each != path and not each.startswith(path + "/")}
            moved = {each for each in present if each == old or each.startswith(old + "/")}
            present = present - moved | {path + each[len(old) :] for each in moved} | {path}
    return present


@pytest.fixture
def loop() -> Iterator[PollLoop]:
    made = PollLoop()
    yield made
    made.close()


def test_each_kind_of_operation_is_told(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    watchdog = FilesystemWatchdog(str(tmp_path), IsolationConfig())
    assert watchdog.start_watching()
    assert not watchdog.start_watching()
    assert watchdog.reason == "it is watching already"
    (tmp_path / "new").write_text("content")
    (tmp_path / "old").chmod(0o600)
    (tmp_path / "new").rename(tmp_path / "renamed")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").unlink()
    watchdog.stop_watching()
    watchdog.stop_watching()
    records = watchdog.get_file_operations()
    assert [(each["operation"], each["path"]) for each in records if each["operation"] != "modify"] == [
        ("create", "new"),
        ("attributes", "old"),
        ("move", "renamed"),
        ("create", "folder"),
        ("delete", "old"),
    ]
    assert ("modify", "new") in [(each["operation"], each["path"]) for each in records]
    assert set(records[0]) == {"timestamp", "operation", "path", "is_directory", "size"}
    assert [each["is_directory"] for each in records if each["path"] == "folder"] == [True]
    assert watchdog.count == len(records)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_records_lead_to_the_tree_that_is_there(tmp_path: Path, seed: int) -> None:
    watchdog = FilesystemWatchdog(str(tmp_path), IsolationConfig())
    assert watchdog.start_watching()
    subprocess.run([sys.executable, "-c", CHURN, str(seed)], cwd=tmp_path, check=True)
    watchdog.stop_watching()
    assert replayed(watchdog.get_file_operations()) == tree(tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
def test_so_do_those_of_files_that_are_watched_one_by_one(tmp_path: Path, loop: PollLoop, seed: int) -> None:
    records: list[dict[str, Any]] = []
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), records.append, each_file=True)
    watch.listen()
    with subprocess.Popen([sys.executable, "-c", CHURN, str(seed)], cwd=tmp_path) as churn:
        loop.run_until(lambda: churn.poll() is not None)
    watch.close()
    assert replayed(records) == tree(tmp_path)
    sizes = {node.path: node.seen.size for node in watch._below(watch.top) if not node.seen.is_folder}
    assert sizes == {path: (tmp_path / path).stat().st_size for path in sizes}
    assert watch.size == len(tree(tmp_path)) + 1


def test_no_more_watches_than_it_may_have(tmp_path: Path, loop: PollLoop) -> None:
    """They are shared by all programs of a user. Beyond them looks tell, and that something may be missing is told."""
    records: list[dict[str, Any]] = []
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    watch = FileWatch(loop, fd, records.append, each_file=True, most=5)
    watch.listen()
    for number in range(10):
        (tmp_path / f"folder{number}").mkdir()
        (tmp_path / f"folder{number}" / "file").write_text("x")
    watch.catch_up()
    assert watch.notify is not None
    held = Path(f"/proc/self/fdinfo/{watch.notify.fileno()}").read_text().count("inotify wd:")
    assert held == 5
    watch.close()
    assert replayed(records) == tree(tmp_path)
    assert "overflow" in {record["operation"] for record in records}


def test_a_file_that_is_watched_for_itself(tmp_path: Path, loop: PollLoop) -> None:
    records: list[dict[str, Any]] = []
    (tmp_path / "old").write_text("old")
    (tmp_path / "read").write_text("old")
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), records.append, each_file=True)
    watch.listen()

    def told(*actions: Callable[[], object]) -> list[tuple[str, str, int | None]]:
        records.clear()
        for action in actions:
            action()
            watch.catch_up()
        return [(each["operation"], each["path"], each["size"]) for each in records]

    old, new = tmp_path / "old", tmp_path / "new"
    assert told((tmp_path / "read").read_text) == []
    assert told(lambda: old.write_text("1"), lambda: old.write_text("2")) == [("modify", "old", 1)] * 2
    assert told(lambda: new.write_text("new"), lambda: new.write_text("n")) == [("create", "new", 3), ("modify", "new", 1)]
    assert told(lambda: new.chmod(0o600)) == [("attributes", "new", 1)]
    assert told(lambda: old.rename(tmp_path / "moved"), lambda: (tmp_path / "moved").write_text("moved")) == [
        ("move", "moved", 1),
        ("modify", "moved", 5),
    ]
    assert told(new.unlink, lambda: new.write_text("again"), lambda: new.write_text("n")) == [
        ("delete", "new", 1),
        ("create", "new", 5),
        ("modify", "new", 1),
    ]
    assert told(lambda: (tmp_path / "moved").replace(new), lambda: new.write_text("replaced")) == [
        ("move", "new", 5),
        ("modify", "new", 8),
    ]
    told((tmp_path / "folder").mkdir)
    assert told(lambda: (tmp_path / "folder").chmod(0o700)) == []
    watch.close()
    assert [(each["operation"], each["path"]) for each in records] == [("attributes", "folder")]


def exchange(one: Path, other: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE"""
    here = os.open("/", os.O_PATH)
    try:
        sc.rename(here, str(one), here, str(other), sc.RENAME_EXCHANGE)
    finally:
        os.close(here)


@pytest.mark.parametrize("each_file", [False, True])
def test_what_changes_places_is_known_at_its_new_one(tmp_path: Path, loop: PollLoop, each_file: bool) -> None:
    records: list[dict[str, Any]] = []
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).write_text("x")
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), records.append, each_file=each_file)
    watch.listen()
    exchange(one, other)
    watch.catch_up()
    assert [(each["operation"], each["path"], each["from"]) for each in records] == [
        ("move", "other", "one"),
        ("move", "one", "other"),
    ]
    exchange(one / "other", other / "one")
    watch.catch_up()
    records.clear()
    (one / "other").write_text("1")
    (other / "one").write_text("2")
    watch.catch_up()
    assert [(each["operation"], each["path"]) for each in records] == [("modify", "one/other"), ("modify", "other/one")]
    records.clear()
    watch.close()
    assert records == []
    assert {node.path for node in watch._below(watch.top)} == {"", *tree(tmp_path)}


def test_one_of_a_files_names_goes(tmp_path: Path, loop: PollLoop) -> None:
    records: list[dict[str, Any]] = []
    (tmp_path / "first").write_text("x")
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), records.append, each_file=True)
    watch.listen()
    os.link(tmp_path / "first", tmp_path / "second")
    watch.catch_up()
    for gone, left in (("second", "first"), ("first", "third")):
        if left == "third":
            os.link(tmp_path / "first", tmp_path / "third")
            watch.catch_up()
        (tmp_path / gone).unlink()
        watch.catch_up()
        records.clear()
        (tmp_path / left).write_text(left)
        watch.catch_up()
        assert [(each["operation"], each["path"]) for each in records] == [("modify", left)]
    watch.close()


def test_who_never_stops_telling_does_not_keep_the_reader(tmp_path: Path, loop: PollLoop) -> None:
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), lambda record: None)
    watch.listen()
    read = watch.read

    def read_and_write() -> int:
        for number in range(200):
            (tmp_path / f"{number}").write_text("x")
        return read()

    watch.read = read_and_write  # type: ignore[method-assign]
    (tmp_path / "file").write_text("x")
    watch.catch_up()
    watch.close()


def test_a_folder_of_many_files_moves_at_the_price_of_one(tmp_path: Path, loop: PollLoop) -> None:
    records: list[dict[str, Any]] = []
    (tmp_path / "a").mkdir()
    for number in range(3000):
        (tmp_path / "a" / f"{number}").touch()
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), records.append, each_file=True)
    watch.listen()
    start = time.process_time()
    for _ in range(500):
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "b").rename(tmp_path / "a")
    watch.catch_up()
    assert len(records) == 1000
    assert time.process_time() - start < 2  # 3,000,000 entries were moved
    watch.close()


def test_folders_that_are_made_faster_than_they_can_be_watched(tmp_path: Path) -> None:
    watchdog = FilesystemWatchdog(str(tmp_path), IsolationConfig())
    assert watchdog.start_watching()
    for number in range(10):
        os.makedirs(tmp_path / "/".join(f"{number}-{depth}" for depth in range(80)))
    watchdog.stop_watching()
    made = [each["path"] for each in watchdog.get_file_operations() if each["operation"] == "create"]
    assert len(made) == len(set(made)) == 800


@pytest.mark.long
def test_an_overflow_is_told_and_nothing_of_the_state_is_missed(tmp_path: Path, loop: PollLoop) -> None:
    records: list[dict[str, Any]] = []
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), records.append)
    watch.listen()
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip(f"a queue of {most} events is not to be filled")
    (tmp_path / "early").write_text("x")
    for number in range(most):  # nobody reads
        (tmp_path / f"file-{number % 500}").touch()
        if number % 3 == 0:
            (tmp_path / f"file-{number % 500}").unlink()
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "file").write_text("x")
    watch.close()
    assert "overflow" in [each["operation"] for each in records]
    assert replayed(records) == tree(tmp_path)


@pytest.mark.timeout(30)
def test_folders_do_not_come_to_lie_in_each_other(tmp_path: Path, loop: PollLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event from before an overflow is read when the tree is known as it was later, and looks different once more: whoever
    times that well makes it seem that a folder has changed places with one that it lies in."""
    records: list[dict[str, Any]] = []
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip(f"a queue of {most} events is not to be filled")
    outer, inner, away = tmp_path / "a", tmp_path / "a" / "b" / "c", tmp_path / "away"
    inner.mkdir(parents=True)
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), records.append)
    watch.listen()
    assert watch.notify is not None
    for _ in range(most // 2 + 1):
        (tmp_path / "x").mkdir()
        (tmp_path / "x").rmdir()
    outer.rename(away)  # which is lost
    watch.read()  # so that there is room for what comes now
    (away / "b" / "c").rename(outer)
    outer.rename(away / "b" / "c")
    away.rename(outer)
    while int.from_bytes(fcntl.ioctl(watch.notify.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder) > 2 * files.AT_ONCE:
        watch.read()
    monkeypatch.setattr(files, "AT_ONCE", 32)  # bytes of one event
    while "overflow" not in [record["operation"] for record in records]:
        watch.read()
    outer.rename(away)
    inner.parent.mkdir(parents=True)
    away.rename(inner)
    watch.catch_up()
    watch.close()
    assert replayed(records, {"a", "a/b", "a/b/c"}) == tree(tmp_path)


def test_what_cannot_be_watched_is_compared(tmp_path: Path, loop: PollLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """fs.inotify.max_user_watches."""

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inotify_simple.INotify.add_watch", refuse)
    records: list[dict[str, Any]] = []
    watch = FileWatch(loop, os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), records.append)
    watch.listen()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    assert not watch.complete
    watch.close()
    assert [each["operation"] for each in records].count("overflow") == 1
    assert replayed(records) == {"folder", "folder/file"}


def test_no_link_is_followed_and_names_are_escaped(tmp_path: Path) -> None:
    outside, watched = tmp_path / "outside", tmp_path / "watched"
    outside.mkdir()
    watched.mkdir()
    watchdog = FilesystemWatchdog(str(watched), IsolationConfig())
    assert watchdog.start_watching()
    (watched / "link").symlink_to(outside)
    (outside / "file").write_text("x")
    (watched / "\x1b[31m\n").write_text("x")
    watchdog.stop_watching()
    paths = {each["path"] for each in watchdog.get_file_operations()}
    assert paths == {"link", escape_text("\x1b[31m\n", keep="")}


def test_one_that_is_short_of_descriptors_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """And can be started when there are some."""
    for count in range(10):
        watchdog = FilesystemWatchdog(str(tmp_path), IsolationConfig())
        with harness.nothing_left():
            with harness.descriptors_left(count):
                watches = watchdog.start_watching()
                assert watches or "Too many open files" in watchdog.reason
                assert count < 6 or watches
                watchdog.stop_watching()
            assert watchdog.start_watching()
            watchdog.stop_watching()


def test_where_it_cannot_watch_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = FilesystemWatchdog(str(tmp_path / "nowhere"), IsolationConfig())
    assert not watchdog.start_watching()
    assert "No such file" in watchdog.reason
    watchdog.stop_watching()
    off = FilesystemWatchdog(str(tmp_path), IsolationConfig(enable_filesystem_isolation=False))
    assert not off.start_watching()
    assert "enable_filesystem_isolation" in off.reason
    with pytest.raises(TypeError, match="give the path"):
        FilesystemWatchdog(None, IsolationConfig())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="IsolationConfig"):
        FilesystemWatchdog(str(tmp_path), None)  # type: ignore[arg-type]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    def refuse_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    for what, refusal, reason in (
        ("sandbox.monitor.files.INotify", refuse, "Too many open files"),
        ("sandbox.monitor.files.os.pipe2", refuse, "Too many open files"),
        ("threading.Thread.start", refuse_thread, "can't start new thread"),
    ):
        with harness.nothing_left(), monkeypatch.context() as patched:
            patched.setattr(what, refusal)
            full = FilesystemWatchdog(str(tmp_path), IsolationConfig())
            assert not full.start_watching()
            assert reason in full.reason
            full.stop_watching()
    assert full.start_watching()
    full.stop_watching()


def test_a_signals_exception_in_start_or_stop_closes_nothing_that_is_used_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = FilesystemWatchdog(str(tmp_path), IsolationConfig())
    harness.interrupt_start(monkeypatch, watchdog.start_watching)
    with harness.nothing_left():
        assert watchdog.start_watching()
        (tmp_path / "folder").mkdir()
        harness.interrupt_stop(monkeypatch, watchdog.stop_watching)
    assert [record["operation"] for record in watchdog.get_file_operations()] == ["create"]
