"""Changes of a folder: found, committed as a whole or not at all, also when whoever does it is killed."""

from __future__ import annotations

import hashlib
import os
import random
import select
import shutil
import signal
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.errors import CommitError
from sandbox.ns import syscalls
from sandbox.recovery import changes, commit, private
from sandbox.recovery.changes import HOLES, Comparison, Difference, is_same, leads_out, unified
from sandbox.recovery.granted import described

ROUNDS = 50
CLOCK_REALTIME_COARSE = 5


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Journals of other tests' commits, and of this machine's, are none of ours."""
    lib = tmp_path / "state"
    lib.mkdir()
    monkeypatch.setattr("sandbox.state.folder", lambda kind: str(lib))
    return lib


class Case:
    """A folder and a copy of it that was worked on."""

    def __init__(self, place: Path) -> None:
        self.lower, self.upper = place / "lower", place / "upper"
        for side in (self.lower, self.upper):
            (side / "kept").mkdir(parents=True)
            (side / "gone" / "deep").mkdir(parents=True)
            (side / "same folder").mkdir()
            (side / "same folder" / "file").write_text("same")
            (side / "same").write_text("same")
            (side / "kept" / "changed").write_text("before")
            (side / "kept" / "bits").write_text("bits")
            (side / "gone" / "deep" / "file").write_text("file")
        os.link(self.lower / "same", place / "another name")
        self.since = 0

    def work(self) -> None:
        """One change of each kind."""
        (self.upper / "kept" / "changed").write_text("after")
        os.chmod(self.upper / "kept" / "bits", 0o600)
        (self.upper / "gone" / "deep" / "file").unlink()
        (self.upper / "gone" / "deep").rmdir()
        (self.upper / "gone").rmdir()
        (self.upper / "new" / "inner").mkdir(parents=True)
        (self.upper / "new" / "inner" / "file").write_text("inner")
        (self.upper / "new" / "link").symlink_to("inner/file")
        with open(self.upper / "new" / "sparse", "wb") as file:
            file.seek(1 << 20)
            file.write(b"end")
        (self.upper / b"line\nfeed \xff".decode("utf-8", "surrogateescape")).write_text("odd name")
        time.sleep(0.02)
        self.since = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)

    @contextmanager
    def opened(self, *, allow_deletion: bool = True) -> Iterator[commit.Folder]:
        lower, upper = (os.open(side, os.O_RDONLY | os.O_DIRECTORY) for side in (self.lower, self.upper))
        comparison = Comparison(upper, lower, hides=True, allow_deletion=allow_deletion)
        folder = commit.Folder(str(self.lower), lower, upper, comparison, self.since)
        try:
            yield folder
        finally:
            folder.close()

    def differences(self, *, allow_deletion: bool = True) -> list[Difference]:
        with self.opened(allow_deletion=allow_deletion) as folder:
            return list(folder.differences)

    def commit(self) -> None:
        with self.opened() as folder:
            commit.commit([folder])


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def tree(folder: Path) -> str:
    """A hash of all that is in a folder: names, kinds, modes, contents, targets."""
    seen = []
    for above, folders, files in os.walk(os.fsencode(folder)):
        for name in [*folders, *files]:
            path = os.path.join(above, name)
            found = os.lstat(path)
            content = b""
            if stat.S_ISREG(found.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(found.st_mode):
                content = os.readlink(path)
            mode = found.st_mode if not stat.S_ISLNK(found.st_mode) else 0
            seen.append((os.path.relpath(path, os.fsencode(folder)), mode, content))
    return hashlib.sha256(repr(sorted(seen)).encode()).hexdigest()


def test_every_kind_of_change_is_found(case: Case) -> None:
    assert case.differences() == []
    case.work()
    found = {(each.kind, each.path) for each in case.differences()}
    assert found == {
        ("modified", "kept/changed"),
        ("metadata", "kept/bits"),
        ("deleted", "gone"),
        *(("added", name) for name in ("new", "new/inner", "new/inner/file", "new/link", "new/sparse", "line\nfeed \udcff")),
    }
    assert [each.problem for each in case.differences()] == [""] * len(found)


def test_a_commit_makes_the_folder_what_the_plugin_left(case: Case, own_state: Path) -> None:
    case.work()
    case.commit()
    assert tree(case.lower) == tree(case.upper)
    assert os.stat(case.lower / "new" / "sparse").st_blocks < 100
    assert case.differences() == []
    assert os.listdir(own_state / "commits") == []


@pytest.mark.parametrize("first", ["file", "folder", "link"])
@pytest.mark.parametrize("second", ["file", "folder", "link"])
def test_a_thing_of_another_kind_takes_the_place(case: Case, first: str, second: str) -> None:
    def make(path: Path, kind: str, word: str) -> None:
        if kind == "folder":
            path.mkdir()
            (path / word).write_text(word)
        elif kind == "link":
            path.symlink_to(word)
        else:
            path.write_text(word)

    make(case.lower / "thing", first, "one")
    make(case.upper / "thing", second, "two")
    time.sleep(0.02)
    case.since = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
    case.commit()
    assert tree(case.lower) == tree(case.upper)


def test_what_cannot_be_committed_stops_all_of_it(case: Case) -> None:
    case.work()
    before = tree(case.lower)
    os.mkfifo(case.upper / "pipe")
    (case.upper / "out").symlink_to("../../etc/passwd")
    (case.upper / ".psie-0").write_text("x")
    problems = {each.path: each.problem for each in case.differences() if each.problem}
    assert set(problems) == {"pipe", "out", ".psie-0"}
    assert "FIFO" in problems["pipe"]
    assert "leads out" in problems["out"]
    with pytest.raises(CommitError, match="so nothing was") as caught:
        case.commit()
    assert caught.value.paths
    assert tree(case.lower) == before


def test_deleting_has_to_be_permitted(case: Case) -> None:
    case.work()
    problems = [(each.path, each.problem) for each in case.differences(allow_deletion=False) if each.problem]
    assert problems == [("gone", "deleting is not permitted (allow_file_deletion)")]


@pytest.mark.parametrize(
    "meddle",
    [
        lambda lower: (lower / "kept" / "changed").write_text("somebody else's"),
        lambda lower: (lower / "kept" / "bits").chmod(0o604),
        lambda lower: (lower / "gone" / "deep" / "file").write_text("somebody else's"),
        lambda lower: (lower / "gone" / "deep" / "more").write_text("somebody else's"),
        lambda lower: (lower / "no plugin has seen it").mkdir(),
        lambda lower: (lower / "gone" / "empty").mkdir(),
        lambda lower: (lower / "gone" / "deep" / "empty").mkdir(),
        lambda lower: (lower / "same folder").rename(lower / "gone" / "deep" / "moved"),
        lambda lower: (lower / "new").write_text("somebody else's"),
        lambda lower: ((lower / "kept").rename(lower / "moved"), (lower / "kept").symlink_to("moved")),
    ],
)
def test_what_has_changed_meanwhile_is_a_conflict(case: Case, meddle: object) -> None:
    case.work()
    with case.opened() as folder:
        assert callable(meddle)
        time.sleep(0.02)
        meddle(case.lower)
        before = tree(case.lower)
        with pytest.raises((CommitError, OSError)):
            commit.commit([folder])
        assert tree(case.lower) == before


def test_a_link_through_a_link_leads_nobody_knows_where(case: Case) -> None:
    for name, target in (("here", "."), ("chain", "here/here/same"), ("direct", "same")):
        (case.upper / name).symlink_to(target)
    assert [(each.path, bool(each.problem)) for each in case.differences()] == [
        ("chain", True),
        ("direct", False),
        ("here", False),
    ]


def test_what_takes_the_place_of_a_folder_is_shown(case: Case) -> None:
    shutil.rmtree(case.upper / "gone")
    (case.upper / "gone").write_text("instead\n")
    assert [(each.kind, each.path) for each in case.differences()] == [("deleted", "gone"), ("added", "gone")]


def test_a_file_of_another_user_is_not_replaced(case: Case) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, whom nothing else would stop")
    for name in ("same", "gone/deep/file"):
        os.chown(case.lower / name, 4321, 4321)
    case.work()
    (case.upper / "same").write_text("evil")
    before = tree(case.lower)
    assert [each.path for each in case.differences() if each.problem] == ["same"]
    (case.upper / "same").write_text("same")
    with pytest.raises(CommitError, match="another user"):
        case.commit()
    assert tree(case.lower) == before


def test_where_a_step_cannot_be_undone_nothing_is_thrown_away(
    case: Case, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.work()
    old, new = tree(case.lower), tree(case.upper)

    def fail(step: commit.Step, folder: int, stage: int) -> None:
        raise OSError(30, "Read-only file system", step.path)

    with monkeypatch.context() as patch:
        carry_on = commit.Step.do
        patch.setattr(commit.Step, "do", lambda step, *fds: carry_on(step, *fds) if step.kind != "mode" else fail(step, *fds))
        patch.setattr(commit.Step, "undo", fail)
        with pytest.raises(CommitError, match="psie gc"):
            case.commit()
        assert tree(case.lower) not in (old, new)
        assert "still unfinished" in commit.recover()[0]
        assert len(list((own_state / "commits").iterdir())) == 1
    assert "finished" in commit.recover()[0]
    assert tree(case.lower) == new


def test_where_nobody_can_look_nothing_is_thrown_away(case: Case, own_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of it this process has no descriptor left, or the disk fails: neither forward nor back."""
    case.work()
    old, new = tree(case.lower), tree(case.upper)
    done: list[commit.Step] = []

    def fail(folder: int, path: str, flags: int) -> int:
        raise OSError(24, "Too many open files", path)

    with monkeypatch.context() as patch:
        carry_on = commit.Step.do

        def do(step: commit.Step, folder: int, stage: int) -> None:
            if len(done) == 3:
                patch.setattr(syscalls, "open_beneath", fail)
            carry_on(step, folder, stage)
            done.append(step)

        patch.setattr(commit.Step, "do", do)
        with pytest.raises(CommitError, match="psie gc"):
            case.commit()
        assert tree(case.lower) not in (old, new)
        assert "still unfinished" in commit.recover()[0]
    assert "finished" in commit.recover()[0]
    assert tree(case.lower) == new


@pytest.mark.long
def test_one_commit_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.work()
    monkeypatch.setattr(private, "PATIENCE", 0.2)
    refused = pytest.raises(CommitError, match="another commit")
    with case.opened() as folder, case.opened() as other, commit.locked([folder]), refused:
        commit.commit([other])


def test_a_stage_that_the_folders_owner_has_replaced_is_not_used(case: Case) -> None:
    case.work()
    before = tree(case.lower)
    with case.opened() as folder:
        fake = case.lower / ".psie-0123"
        fake.mkdir(mode=0o755)
        with pytest.raises(OSError, match="replaced"):
            commit.open_stage(folder.lower, "0123")
        fake.rmdir()
    assert tree(case.lower) == before


def test_a_step_that_fails_undoes_the_others(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.work()
    before = tree(case.lower)
    done: list[commit.Step] = []
    carry_on = commit.Step.do

    def fail_late(step: commit.Step, folder: int, stage: int) -> None:
        if len(done) == 4:
            raise OSError(28, "No space left on device", step.path)
        carry_on(step, folder, stage)
        done.append(step)

    monkeypatch.setattr(commit.Step, "do", fail_late)
    with pytest.raises(CommitError, match="No space left"):
        case.commit()
    assert tree(case.lower) == before


@pytest.mark.long
def test_a_killed_commit_is_the_old_or_the_new_state(tmp_path: Path, own_state: Path) -> None:
    """At random moments of a commit, and of the recovery itself."""
    seen = set()
    one = Case(tmp_path / "one")
    one.work()
    start = time.monotonic()
    act_for(one.commit, 60.0)
    taken = time.monotonic() - start
    assert tree(one.lower) == tree(one.upper)
    for number in range(ROUNDS):
        case = Case(tmp_path / str(number))
        case.work()
        old, new = tree(case.lower), tree(case.upper)
        act_for(case.commit, taken * random.uniform(0, 1.2))
        act_for(commit.recover, taken * random.uniform(0, 0.3))
        commit.recover()
        state = tree(case.lower)
        assert state in (old, new), "neither the old nor the new state"
        assert list((own_state / "commits").glob("*")) == []
        seen.add(state == new)
    assert seen == {True, False}, "all of them were killed too early or too late: the test shows nothing"


def act_for(action: object, within: float) -> None:
    """Let a child act, but for so many seconds at most."""
    pid = os.fork()
    if pid == 0:
        try:
            assert callable(action)
            action()
        finally:
            os._exit(0)
    process = os.pidfd_open(pid)
    select.select([process], [], [], within)
    os.close(process)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def sparse(path: Path, size: int, *data: tuple[int, bytes]) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        for position, content in data:
            file.seek(position)
            file.write(content)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([], [], True),
        ([(5 << 30, b"x")], [(5 << 30, b"x")], True),
        ([(5 << 30, b"x")], [(5 << 30, b"y")], False),
        ([(5 << 30, b"x")], [], False),
        ([(1 << 30, b"\0")], [], True),
    ],
)
def test_holes_are_compared_without_reading_them(
    case: Case, one: list[tuple[int, bytes]], other: list[tuple[int, bytes]], same: bool
) -> None:
    """8 GiB of them, which reading would take longer than a test may."""
    sparse(case.upper / "file", 8 << 30, *one)
    sparse(case.lower / "file", 8 << 30, *other)
    with case.opened() as folder:
        assert is_same(folder.upper, folder.lower, "file") is same


@pytest.mark.long
def test_holes_that_would_take_too_long_are_not_hashed(case: Case) -> None:
    for number in range(3):
        sparse(case.upper / f"hole-{number}", HOLES // 2, (0, b"x"))
    sparse(case.upper / "large", 1 << 40)
    with case.opened() as folder:
        hashed = {os.path.basename(each.path): each.sha256 for each in described([folder])}
    assert {name for name, value in hashed.items() if value is None} == {"hole-2", "large"}
    expected = hashlib.sha256(b"x" + bytes(HOLES // 2 - 1)).hexdigest()
    assert hashed["hole-0"] == hashed["hole-1"] == expected
    case.commit()
    assert os.stat(case.lower / "large").st_size == 1 << 40
    assert os.stat(case.lower / "large").st_blocks < 100


def test_the_stage_of_another_commit_is_not_deleted(case: Case) -> None:
    (case.lower / ".psie-0011223344556677").mkdir()
    (case.lower / "kept" / "more").mkdir()
    with case.opened() as folder:  # an upper layer that hides all, but its top: what the plugin has removed there is a whiteout
        folder.comparison.hides = False
        os.mknod(case.upper / ".psie-0011223344556677", stat.S_IFCHR)
        (problem,) = {each.problem for each in folder.differences if each.path.startswith(".psie-")}
    assert "psie's own" in problem


@pytest.mark.parametrize("put", ["", "folder", "link"])
def test_a_folder_that_has_been_moved_away_is_not_written(case: Case, tmp_path: Path, put: str) -> None:
    case.work()
    moved, old = tmp_path / "moved", tree(case.lower)
    with case.opened() as folder:
        case.lower.rename(moved)
        if put == "folder":
            case.lower.mkdir()
        elif put == "link":
            case.lower.symlink_to(moved)
        with pytest.raises(CommitError, match="been removed" if not put else "in its place"):
            commit.commit([folder])
    assert tree(moved) == old
    assert not os.path.exists(tmp_path / "state" / "commits")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives capabilities to a program")
def test_capabilities_of_a_program_are_not_those_of_what_takes_its_place(case: Case, tmp_path: Path) -> None:
    """As after any other write to it, whoever commits: root takes them away as well by giving the file its owner."""
    program, made = case.lower / "kept" / "changed", tmp_path / "made"
    os.setxattr(program, "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))  # VFS_CAP_REVISION_2
    os.setxattr(program, "trusted.kept", b"x")
    folder = os.open(case.lower, os.O_RDONLY)
    try:
        with made.open("wb") as file:
            commit.copy_attributes(folder, "kept/changed", file.fileno())
    finally:
        os.close(folder)
    case.work()
    case.commit()
    assert program.read_text() == "after"
    for path in (made, program):
        assert "trusted.kept" in os.listxattr(path)
        assert "security.capability" not in os.listxattr(path)


def test_who_may_change_a_mode_gives_nobody_the_bits_of_its_owner(case: Case) -> None:
    os.chmod(case.lower / "kept" / "bits", 0o4755)
    os.chmod(case.lower / "kept", 0o2755)
    os.chmod(case.upper / "kept" / "bits", 0o777)
    os.chmod(case.upper / "kept", 0o2775)
    time.sleep(0.02)
    case.since = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
    case.commit()
    assert stat.S_IMODE(os.stat(case.lower / "kept" / "bits").st_mode) == 0o777
    assert stat.S_IMODE(os.stat(case.lower / "kept").st_mode) == 0o2775


def test_a_journal_that_is_none_stops_nobody(case: Case, own_state: Path) -> None:
    (own_state / "commits").mkdir()
    (own_state / "commits" / "0011").write_text("")
    (own_state / "commits" / "0022").write_text('{"folders": 1, "version": 1}')
    assert ["is damaged" in line for line in commit.recover()] == [True, True]


@pytest.mark.parametrize("then", ["gone", "a new one", "a file", "moved"])
def test_a_journal_goes_with_its_folder(case: Case, own_state: Path, then: str) -> None:
    """Where nothing had been done yet there is nothing to finish. What is there of other folders' stages is cleared away."""
    (own_state / "commits").mkdir()
    journal = commit.Journal("0011")
    other = case.lower.parent / "other"
    (other / ".psie-0011").mkdir(parents=True)
    folders = [(str(path), os.open(path, os.O_RDONLY)) for path in (case.lower, other)]
    journal.write(commit.CLEAR, folders, [])
    journal.close()
    for _, fd in folders:
        os.close(fd)
    os.rename(case.lower, case.lower.parent / "moved")
    if then == "gone":
        shutil.rmtree(case.lower.parent / "moved")
    elif then == "a new one":
        case.lower.mkdir()
    elif then == "a file":
        case.lower.write_text("")
    (line,) = commit.recover()
    assert "cleared away: where one has been moved to, .psie-0011 is still in it" in line
    assert os.listdir(own_state / "commits") == []
    assert os.listdir(other) == []


def test_what_is_half_done_in_a_folder_that_was_moved_names_its_mend(case: Case, own_state: Path) -> None:
    (own_state / "commits").mkdir()
    journal = commit.Journal("0011")
    lower = os.open(case.lower, os.O_RDONLY)
    journal.write(commit.APPLY, [(str(case.lower), lower)], [[]])
    journal.close()
    os.close(lower)
    os.rename(case.lower, case.lower.parent / "moved")
    case.lower.mkdir()
    (line,) = commit.recover()
    path = own_state / "commits" / "0011"
    assert f"still unfinished: another folder has its name; put the folder back, or remove {path}" in line
    case.lower.rmdir()
    os.rename(case.lower.parent / "moved", case.lower)
    assert ["finished" in line for line in commit.recover()] == [True]


def test_a_journal_outlives_another_number_of_the_device(case: Case, own_state: Path) -> None:
    """As after a boot."""
    case.work()
    new = tree(case.upper)
    stopped = os.fork()
    if stopped == 0:
        commit.carry_out = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        case.commit()
    os.waitpid(stopped, 0)
    (journal,) = (own_state / "commits").glob("*")
    assert str(os.stat(case.lower).st_dev) not in journal.read_text()
    assert "finished" in commit.recover()[0]
    assert tree(case.lower) == new


@pytest.mark.parametrize(
    ("path", "target", "out"),
    [
        ("link", "file", False),
        ("a/b/link", "../../file", False),
        ("a/link", "../../file", True),
        ("link", "..", True),
        ("link", "/etc", True),
        ("a/link", "./b/../c", True),  # b may be a link
        ("a/link", ".././b/c", False),
    ],
)
def test_where_links_lead(path: str, target: str, out: bool) -> None:
    assert leads_out(path, target) is out


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("a/" * 2046 + "a", False),  # nothing is there: it leads nowhere
        ("kept/changed/x", False),
        ("kept/changed", False),
        ("out/x/y", True),
        ("kept/out/" + "a/" * 1000 + "a", True),
        ("mine/x", True),
    ],
)
def test_a_link_through_a_link_is_seen_at_once(case: Case, monkeypatch: pytest.MonkeyPatch, target: str, problem: bool) -> None:
    """Of whichever side the other link is, and however long the way: a plugin may make thousands of them."""
    os.symlink("/etc", case.lower / "out")
    os.symlink("/etc", case.lower / "kept" / "out")
    os.symlink("/etc", case.upper / "mine")
    os.symlink(target, case.upper / "link")
    looks = []
    real = syscalls.open_beneath

    def look(folder: int, path: str, flags: int) -> int:
        looks.append(path)
        return real(folder, path, flags)

    monkeypatch.setattr(syscalls, "open_beneath", look)
    found = {each.path: each for each in case.differences()}
    assert bool(found["link"].problem) is problem
    assert len(looks) <= 2 * 2  # of two links


def test_a_diff_of_text_and_of_none() -> None:
    assert unified(b"one\ntwo\n", b"one\nthree", "/f").splitlines() == [
        "--- a/f", "+++ b/f", "@@ -1,2 +1,2 @@", " one", "-two", "+three", "\\ No newline at end of file",
    ]  # fmt: skip
    assert unified(None, b"new\n", "/f").startswith("--- /dev/null\n+++ b/f\n")
    assert unified(b"\0", b"x", "/f") == "Binary files a/f and b/f differ\n"
    assert unified(None, b"q\n", "/x\n@@ -1 +1 @@\n-old").count("\n") == 4, "a name makes no lines"


# -- what a person is shown -----------------------------------------------------------------------------------------------


def patched(old: list[str], diff: str) -> list[str]:
    """What a unified diff makes of these lines, each of which it has to name as it is."""
    made, place = [], 0
    for line in diff.splitlines(keepends=True)[2:]:
        if line.startswith("@@"):
            first, _, count = line.split()[1].removeprefix("-").partition(",")
            start = int(first) - (count != "0")
            made += old[place:start]
            place = start
        elif line[0] in " -":
            assert line[1:] == old[place]
            made += [line[1:]] if line[0] == " " else []
            place += 1
        else:
            assert line[0] == "+"
            made.append(line[1:])
    return made + old[place:]


@pytest.mark.parametrize("work", [0, 100, changes.DIFF_WORK])
def test_a_diff_leads_from_one_side_to_the_other(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "DIFF_WORK", work)
    chance = random.Random(5)
    for _ in range(300):
        old = [f"{chance.randrange(chance.choice((2, 5, 100)))}\n" for _ in range(chance.randrange(30))]
        new = list(old)
        for _ in range(chance.randrange(6)):
            place = chance.randrange(len(new) + 1)
            new[place : place + chance.randrange(2)] = [f"{chance.randrange(100)}\n"] * chance.randrange(2)
        diff = unified("".join(old).encode(), "".join(new).encode(), "/x")
        assert (patched(old, diff) if diff else old) == new
        assert bool(diff) == (old != new)


@pytest.mark.timeout(20)
@pytest.mark.long
def test_a_diff_is_there_soon_whatever_has_changed() -> None:
    """difflib alone would take hours."""
    old = [f"{number}\n" for number in range(200_000)]
    new = [f"{number}\n\n" for number in range(200_000)]
    diff = unified("".join(old).encode(), "".join(new).encode(), "/x")
    assert patched(old, diff) == "".join(new).splitlines(keepends=True)
