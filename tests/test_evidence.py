"""Evidence folders: whole or not there, whatever the names and sizes in them, and checked by sha256sum."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import ResourceError
from sandbox.ns import workspace
from sandbox.recovery import evidence
from sandbox.recovery.evidence import UNFINISHED, bundle, remove_unfinished
from sandbox.violations import SandboxViolation, SandboxViolationType

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
NAMES = ["/srv/project/a.txt", "../../etc/passwd", "a\nb  c\\", "\x1b[2J\udcff", "x" * 4000, "", "index.json", "/", "\0"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "evidence"


def make(here: Path, name: str = "case", **more: Any) -> Path:
    given: dict[str, Any] = {"changes": [], "violations": [], "samples": [], "recipe": {}, "output_tail": b""}
    return bundle(here, name, **{**given, **more})


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def assert_whole(made: Path) -> None:
    """As a person would check it; and every file is in the list."""
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    listed = sorted(line.removesuffix(": OK") for line in done.stdout.splitlines())
    assert listed == sorted(
        str(path.relative_to(made)) for path in made.rglob("*") if path.is_file() and path.name != "SHA256SUMS"
    )


def test_all_that_is_known(here: Path) -> None:
    violation = SandboxViolation(SandboxViolationType.SECURITY_BREACH, "no", datetime.now(UTC), details={"pid": 7})
    samples = [{"memory_mb": 1.5}, {"memory_mb": 2.5}]
    changes = [(name, name.encode("utf-8", "surrogatepass") * 3) for name in NAMES]
    made = make(
        here,
        changes=changes,
        violations=[violation],
        samples=samples,
        recipe={"level": "strict"},
        output_tail=b"\x1b[2Jlast\xff",
    )
    assert made == here / "case"
    assert_whole(made)
    assert read(made / "violations.json") == {"items": [violation.to_dict()], "left_out": 0}
    assert read(made / "samples.json") == {"items": samples, "left_out": 0}
    assert read(made / "recipe.json") == {"level": "strict"}
    assert (made / "output.txt").read_bytes() == b"\x1b[2Jlast\xff"
    index = read(made / "changes" / "index.json")
    assert [entry["path"] for entry in index["items"]] == NAMES
    for number, (_, content) in enumerate(changes):
        entry = index["items"][number]
        assert (made / "changes" / str(number)).read_bytes() == content
        assert (entry["number"], entry["size"], entry["is_kept"]) == (number, len(content), True)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert os.listdir(here) == ["case"]


def test_nobody_else_can_read_it(here: Path) -> None:
    before = os.umask(0)
    try:
        made = make(here, changes=[("a", b"a")])
    finally:
        os.umask(before)
    for path in (here, made, *made.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_it_has_an_end(here: Path) -> None:
    megabyte = b"x" * (1 << 20)
    contents = [megabyte * 20, megabyte * 60, megabyte * 10, b"small"]
    texts = [{"message": "y" * 10_000}] * 2000
    made = make(
        here,
        changes=[(str(number), content) for number, content in enumerate(contents)],
        violations=texts,
        samples=texts,
        recipe={"long": "z" * (9 << 20)},
        output_tail=megabyte * 9 + b"the end",
    )
    assert_whole(made)
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) <= evidence.TOTAL_BYTES
    for name in ("violations.json", "samples.json"):
        found = read(made / name)
        assert len(found["items"]) + found["left_out"] == len(texts)
        assert found["items"]
        assert found["left_out"] > 0
    assert read(made / "recipe.json") == {"left_out": "too long"}
    assert (made / "output.txt").read_bytes().endswith(b"xthe end")
    index = read(made / "changes" / "index.json")
    assert [entry["is_kept"] for entry in index["items"]] == [True, False, False, True]
    assert [entry["size"] for entry in index["items"]] == [len(content) for content in contents]
    assert index["items"][1]["sha256"] == hashlib.sha256(contents[1]).hexdigest()
    assert sorted(path.name for path in (made / "changes").iterdir()) == ["0", "3", "index.json"]


def test_many_changes_with_long_names(here: Path) -> None:
    count = evidence.CHANGES + 5
    made = make(here, changes=[("n" * 4000, b"")] * count)
    assert_whole(made)
    index = read(made / "changes" / "index.json")
    assert len(index["items"]) + index["left_out"] == count
    assert (made / "changes" / "index.json").stat().st_size < evidence.PART_BYTES + 1000
    assert len(list((made / "changes").iterdir())) == evidence.CHANGES + 1


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a\0b", "x" * 300])
def test_its_name_is_a_plain_name(here: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no plain name: give one"):
        make(here, name)
    assert not here.exists()


@pytest.mark.parametrize("what", ["bundle", "folder", "file", "link"])
def test_nothing_is_replaced(here: Path, what: str) -> None:
    if what == "bundle":
        make(here, output_tail=b"first")
    else:
        here.mkdir(0o700)
        if what == "folder":
            (here / "case").mkdir()
        elif what == "file":
            (here / "case").touch()
        else:
            (here / "case").symlink_to("away")
    with pytest.raises(ResourceError, match="is there already: give another name"):
        make(here, output_tail=b"second")
    assert os.listdir(here) == ["case"]
    assert what != "bundle" or (here / "case" / "output.txt").read_bytes() == b"first"


@pytest.mark.parametrize("how", ["writable", pytest.param("owner", marks=needs_root), "link"])
def test_a_folder_of_others_is_refused(here: Path, how: str) -> None:
    place = here
    here.mkdir(0o777 if how == "writable" else 0o700)
    if how == "writable":
        here.chmod(0o777)
    elif how == "owner":
        os.chown(here, NOBODY, NOBODY)
    else:
        place = here.parent / "link"
        place.symlink_to(here)
    with pytest.raises(ResourceError):
        make(place)
    assert os.listdir(here) == []


@pytest.mark.parametrize("what", ["link", "file"])
def test_an_unfinished_one_that_is_none_is_not_followed(here: Path, what: str) -> None:
    target = here.parent / "target"
    target.mkdir()
    (target / "kept").touch()
    here.mkdir(0o700)
    if what == "link":
        (here / UNFINISHED).symlink_to(target)
    else:
        (here / UNFINISHED).touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        make(here)
    assert (target / "kept").exists()


def test_a_killed_one_leaves_nothing_half_done(here: Path) -> None:
    contents = [(str(number), b"x" * 20_000) for number in range(300)]
    torn = 0
    for attempt in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                make(here, f"case-{attempt}", changes=contents)
            finally:
                os._exit(0)
        end = time.monotonic() + 10
        while not (here / UNFINISHED / "changes").exists() and not (here / f"case-{attempt}").exists():
            assert time.monotonic() < end
        time.sleep(attempt * 0.0005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        torn += (here / UNFINISHED).exists()
        for name in set(os.listdir(here)) - {UNFINISHED}:
            assert_whole(here / name)
        if attempt % 2:
            left = (here / UNFINISHED).exists()
            assert remove_unfinished(here) is left
            assert not (here / UNFINISHED).exists()
    assert torn >= 3  # else nothing was tried
    make(here, "last", changes=contents)
    assert_whole(here / "last")
    assert not (here / UNFINISHED).exists()
    assert remove_unfinished(here) is False


def test_several_at_once(here: Path) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            make(here, f"case-{number}", changes=[("a", bytes([number]))] * 20)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(os.listdir(here)) == [f"case-{number}" for number in range(8)]
    for number in range(8):
        assert_whole(here / f"case-{number}")
        assert (here / f"case-{number}" / "changes" / "19").read_bytes() == bytes([number])


# -- how long it is kept -----------------------------------------------------------------------------------------------


def aged(here: Path, name: str, days: float, size: int = 0) -> Path:
    made = make(here, name, output_tail=b"x" * size)
    then = time.time() - days * 86400
    os.utime(made, (then, then))
    return made


def test_it_goes_by_age_but_never_what_is_in_force(here: Path) -> None:
    kept = aged(here, "kept", 100)
    aged(here, "old", 100)
    aged(here, "young", 80)
    (here / "file").touch()
    (here / "link").symlink_to(kept)
    assert evidence.trim(here, [str(kept)]) == 1
    assert sorted(os.listdir(here)) == ["file", "kept", "link", "young"]
    assert_whole(kept)
    assert evidence.trim(here, [], max_age_days=1) == 2
    assert sorted(os.listdir(here)) == ["file", "link"]
    assert evidence.trim(here / "nowhere", []) == 0


def test_it_goes_by_size_the_oldest_first(here: Path) -> None:
    for number in range(6):
        aged(here, f"case-{number}", 10 - number, 100_000)
    make(here, "just now", output_tail=b"x" * 100_000)
    assert evidence.trim(here, [str(here / "case-0")], max_bytes=450_000) == 3
    assert sorted(os.listdir(here)) == ["case-0", "case-4", "case-5", "just now"]
    assert evidence.trim(here, [str(here / "case-0")], max_bytes=0) == 2
    assert sorted(os.listdir(here)) == ["case-0", "just now"]  # its quarantine may be on its way


def test_there_is_a_bound_on_all_of_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what is in force or young, which is not removed: hostile plugins shall not fill the disk with it."""
    make(here, "first", changes=[("a", b"x" * 5000)])
    monkeypatch.setattr(evidence, "MAX_BYTES", 5000)
    with pytest.raises(ResourceError, match=r"holds .* MB already: psie gc removes what is old"):
        make(here, "second")
    assert os.listdir(here) == ["first"]


def test_who_is_killed_while_it_is_removed_leaves_no_half(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aged(here, "old", 100)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "remove_folder", die)
        with pytest.raises(KeyboardInterrupt):
            evidence.trim(here, [])
    assert os.listdir(here) == [UNFINISHED]
    assert remove_unfinished(here)
    assert os.listdir(here) == []
