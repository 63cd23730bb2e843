"""Granted folders and the workspace: what a plugin can do there, what is seen of it, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    CommitError,
    EnhancedPluginSandbox,
    FileChange,
    IsolationLevel,
    SandboxInitializationError,
    SandboxViolation,
    SecurityViolationError,
    host,
)
from sandbox.seccomp.filter import known_syscalls

from . import harness

pytestmark = pytest.mark.rootless
NAMESPACED = [level for level in IsolationLevel if level is not IsolationLevel.MINIMAL]
namespaced = pytest.mark.parametrize("level", NAMESPACED, ids=lambda level: level.value)
UNSHARE = known_syscalls(os.uname().machine)["unshare"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Some files of the caller's, older than a clock tick. As root they are another user's, whom psie is to work for."""
    place = tmp_path / "granted"
    (place / "sub").mkdir(parents=True)
    (place / "gone" / "deep").mkdir(parents=True)
    for name in ("text", "sub/old", "gone/deep/file"):
        (place / name).write_text(f"{name}\n")
    (place / "private").write_text("private\n")
    (place / "private").chmod(0o600)
    if harness.ROOT:
        for path in (place, *place.rglob("*")):
            os.chown(path, 4321, 4322)
        for above in (tmp_path, *tmp_path.parents[:2]):
            above.chmod(0o711)
    time.sleep(0.02)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def granted(level: IsolationLevel, folder: Path, *, delete: bool = True, **permissions: Any) -> EnhancedPluginSandbox:
    allowed = {"allowed_directories": [str(folder)], "allow_file_deletion": delete, **permissions}
    return harness.open_sandbox(level, permissions=allowed)


def tree(folder: Path) -> str:
    """Names, kinds, modes, owners and contents."""
    seen = []
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(found.st_mode) else b""
        seen.append((str(path), found.st_mode, found.st_uid, found.st_gid, content))
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def work(folder: str) -> list[str]:
    """A change of every kind."""
    import os
    import shutil

    with open(f"{folder}/text", "a") as file:
        file.write("more\n")
    with open(f"{folder}/private") as file:
        assert file.read() == "private\n"
    os.chmod(f"{folder}/private", 0o640)
    os.rename(f"{folder}/sub/old", f"{folder}/sub/new")
    shutil.rmtree(f"{folder}/gone")
    os.makedirs(f"{folder}/made/here")
    with open(f"{folder}/made/here/file", "w") as file:
        file.write("made\n")
    os.symlink("here/file", f"{folder}/made/link")
    return sorted(os.listdir(folder))


CHANGED = {
    ("modified", "text"),
    ("metadata", "private"),
    ("deleted", "sub/old"),
    ("added", "sub/new"),
    ("deleted", "gone"),
    ("added", "made"),
    ("added", "made/here"),
    ("added", "made/here/file"),
    ("added", "made/link"),
}


def kinds(changes: list[FileChange], folder: Path) -> set[tuple[str, str]]:
    return {(change.kind, os.path.relpath(change.path, folder)) for change in changes}


@namespaced
def test_changes_are_listed_and_committed(level: IsolationLevel, folder: Path) -> None:
    async def main() -> None:
        before = tree(folder)
        async with granted(level, folder) as sandbox:
            assert sandbox.changes() == []
            assert await sandbox.execute_plugin_safe(work, str(folder)) == ["made", "private", "sub", "text"]
            assert tree(folder) == before, "nothing of it is real yet"
            changes = sandbox.changes()
            assert kinds(changes, folder) == CHANGED
            (text,) = [change for change in changes if change.path.endswith("/text")]
            assert text.size == len("text\nmore\n")
            assert text.sha256 == hashlib.sha256(b"text\nmore\n").hexdigest()
            assert "+more" in sandbox.diff(text.path).splitlines()
            assert kinds(await sandbox.commit_changes(), folder) == CHANGED
            assert sandbox.changes() == []
            assert sorted(await sandbox.execute_plugin_safe(os.listdir, str(folder))) == ["made", "private", "sub", "text"]

    asyncio.run(main())
    assert (folder / "text").read_text() == "text\nmore\n"
    assert (folder / "made" / "link").read_text() == "made\n"
    assert not (folder / "gone").exists()
    assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o640
    owner = folder.stat()
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in folder.rglob("*")} == {(owner.st_uid, owner.st_gid)}


@namespaced
def test_changes_are_forgotten(level: IsolationLevel, folder: Path) -> None:
    async def main() -> None:
        async with granted(level, folder) as sandbox:
            await sandbox.discard_changes()  # of nothing
            await sandbox.execute_plugin_safe(work, str(folder))
            await sandbox.discard_changes()
            assert sandbox.changes() == []
            assert "gone" in await sandbox.execute_plugin_safe(os.listdir, str(folder))
            await sandbox.execute_plugin_safe(work, str(folder))

    before = tree(folder)
    asyncio.run(main())
    assert tree(folder) == before


@namespaced
def test_some_changes_are_committed_and_the_others_kept(level: IsolationLevel, folder: Path) -> None:
    async def main() -> None:
        async with granted(level, folder) as sandbox:
            await sandbox.execute_plugin_safe(work, str(folder))
            with pytest.raises(ValueError, match="nothing has changed"):
                await sandbox.commit_changes([str(folder / "nowhere")])
            wanted = [str(folder / "made" / "here" / "file"), str(folder / "text")]
            first = {("added", "made"), ("added", "made/here"), ("added", "made/here/file"), ("modified", "text")}
            assert kinds(await sandbox.commit_changes(wanted), folder) == first
            assert kinds(sandbox.changes(), folder) == CHANGED - first
            assert (folder / "gone").exists()
            assert kinds(await sandbox.commit_changes(), folder) == CHANGED - first

    asyncio.run(main())


@namespaced
@pytest.mark.parametrize("delete", [True, False])
def test_a_violation_forgets_what_was_changed(level: IsolationLevel, folder: Path, delete: bool) -> None:
    def attack(folder: str, number: int) -> None:
        import ctypes

        with open(f"{folder}/text", "w") as file:
            file.write("evil")
        for _ in range(50):
            ctypes.CDLL(None).syscall(number, 0x10000000)
        raise PermissionError(1, "Operation not permitted")

    async def main() -> None:
        async with granted(level, folder, delete=delete) as sandbox:
            with pytest.raises(SecurityViolationError):
                await sandbox.execute_plugin_safe(attack, str(folder), UNSHARE)
            assert sandbox.changes() == []

    before = tree(folder)
    asyncio.run(main())
    assert tree(folder) == before


@namespaced
def test_deleting_without_permission_is_a_violation_and_not_committed(level: IsolationLevel, folder: Path) -> None:
    def delete(folder: str) -> None:
        import os

        with open(f"{folder}/own", "w") as file:
            file.write("x")
        os.unlink(f"{folder}/own")
        os.replace(f"{folder}/sub/old", f"{folder}/text")

    async def main() -> None:
        async with granted(level, folder, delete=False) as sandbox:
            await sandbox.execute_plugin_safe(delete, str(folder))
            (violation,) = sandbox.get_violations()
            assert violation.details["path"] == str(folder / "sub" / "old")
            with pytest.raises(CommitError, match="allow_file_deletion"):
                await sandbox.commit_changes()
            await sandbox.commit_changes([str(folder / "text")])

    asyncio.run(main())
    assert (folder / "text").read_text() == (folder / "sub" / "old").read_text() == "sub/old\n"


@namespaced
def test_what_cannot_be_committed(level: IsolationLevel, folder: Path) -> None:
    def leave(folder: str) -> None:
        import contextlib
        import os

        with contextlib.suppress(OSError):  # unknown to the tight profile
            os.mkfifo(f"{folder}/pipe")
        os.symlink("/etc/passwd", f"{folder}/absolute")
        os.symlink("sub/../../..", f"{folder}/upward")
        with open(os.fsencode(folder) + b"/line\nfeed \xff\x1b[31m", "w") as file:
            file.write("odd")
        os.link(f"{folder}/text", f"{folder}/hard")
        with open(f"{folder}/sparse", "wb") as file:
            file.truncate(8 << 20)

    async def main() -> None:
        async with granted(level, folder) as sandbox:
            await sandbox.execute_plugin_safe(leave, str(folder))
            problems = {os.path.basename(each.path): each.problem for each in sandbox.changes() if each.problem}
            assert set(problems) - {"pipe"} == {"absolute", "upward"}
            assert ("pipe" in problems) is (level is not IsolationLevel.MAXIMUM)
            with pytest.raises(CommitError) as caught:
                await sandbox.commit_changes()
            assert "\x1b" not in str(caught.value)
            assert not (folder / "sparse").exists()
            await sandbox.commit_changes([change.path for change in sandbox.changes() if not change.problem])

    asyncio.run(main())
    assert (folder / "sparse").stat().st_size == 8 << 20
    assert (folder / "sparse").stat().st_blocks < 100
    assert (folder / "hard").read_text() == "text\n"
    assert os.path.exists(os.fsencode(folder) + b"/line\nfeed \xff\x1b[31m")


@namespaced
def test_who_takes_all_rights_from_the_folder_itself_keeps_nobody_out(level: IsolationLevel, folder: Path) -> None:
    """The granted folder, and the workspace: the call is told nothing, and whoever looks then can."""

    def close(folder: str) -> None:
        with open(f"{folder}/made", "w") as file:
            file.write("made")
        open("mine", "w").close()
        os.chmod(folder, 0)
        os.chmod(".", 0)

    async def main() -> None:
        async with granted(level, folder) as sandbox:
            await sandbox.execute_plugin_safe(close, str(folder))
            assert [entry.path for entry in sandbox.list_files()] == ["mine"]
            assert ("added", "made") in kinds(sandbox.changes(), folder)
            await sandbox.execute_plugin_safe(os.chmod, ".", 0)
            assert await sandbox.execute_plugin_safe(os.listdir, ".") == ["mine"]
            await sandbox.commit_changes()
        assert (folder / "made").read_text() == "made"

    mode = folder.stat().st_mode
    asyncio.run(main())
    assert folder.stat().st_mode == mode


@pytest.mark.parametrize("level", [IsolationLevel.STRICT])
def test_a_folder_that_cannot_be_looked_into_is_a_reason(level: IsolationLevel, folder: Path) -> None:
    if harness.ROOT:
        pytest.skip("root looks into every folder; tests/integration/test_rootless.py runs it as a user")
    (folder / "closed").mkdir(mode=0)

    async def main() -> None:
        async with granted(level, folder) as sandbox:
            await sandbox.execute_plugin_safe(os.rmdir, str(folder / "closed"))
            with pytest.raises(CommitError, match=r"the changes were not committed: .*closed: Permission denied"):
                await sandbox.commit_changes()
        assert (folder / "closed").exists()

    asyncio.run(main())


@namespaced
def test_a_file_that_the_caller_changes_meanwhile_is_a_conflict(level: IsolationLevel, folder: Path) -> None:
    async def main() -> None:
        async with granted(level, folder) as sandbox:
            await sandbox.execute_plugin_safe(work, str(folder))
            time.sleep(0.02)
            (folder / "text").write_text("the caller's own")
            with pytest.raises(CommitError, match="has been changed since"):
                await sandbox.commit_changes()
            assert (folder / "gone").exists()

    asyncio.run(main())


def open_to_all(path: str) -> None:
    os.chmod(path, 0o666)


@namespaced
def test_a_mode_is_not_that_of_a_files_other_names(level: IsolationLevel, folder: Path, tmp_path: Path) -> None:
    """A hard link of the caller's: what lies outside of the folder keeps its mode, and its content."""
    outside = folder.parent / "elsewhere"
    outside.write_text("secret\n")
    outside.chmod(0o600)
    os.link(outside, folder / "linked")
    if harness.ROOT:
        os.chown(outside, folder.stat().st_uid, folder.stat().st_gid)

    async def main() -> None:
        async with granted(level, folder) as sandbox:
            await sandbox.execute_plugin_safe(open_to_all, str(folder / "linked"))
            await sandbox.commit_changes()

    asyncio.run(main())
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "linked").stat().st_mode) == 0o666
    assert (folder / "linked").read_text() == outside.read_text() == "secret\n"


def count_up(path: str) -> None:
    with open(path, "r+") as file:
        number = int(file.read())
        file.seek(0)
        file.write(str(number + 1))


@namespaced
def test_what_the_caller_wrote_just_before_is_no_conflict(level: IsolationLevel, folder: Path) -> None:
    """From Linux 6.13 on the times of files may be finer than the kernel's coarse clock."""

    async def main() -> None:
        for number in range(10):
            (folder / "text").write_text(str(number))
            async with granted(level, folder) as sandbox:
                await sandbox.execute_plugin_safe(count_up, str(folder / "text"))
                await sandbox.commit_changes()
            assert (folder / "text").read_text() == str(number + 1)

    asyncio.run(main())


def test_read_only_folders(level: IsolationLevel, folder: Path) -> None:
    def look(folder: str) -> tuple[str, list[str]]:
        import os

        answers = []
        for action in (
            lambda: os.open(f"{folder}/text", os.O_WRONLY),
            lambda: os.mkdir(f"{folder}/x"),
            lambda: os.unlink(f"{folder}/text"),
        ):
            try:
                action()
                answers.append("worked")
            except OSError:
                answers.append("refused")
        with open(f"{folder}/private") as file:
            return file.read(), answers

    async def main() -> None:
        async with granted(level, folder, allow_file_creation=False) as sandbox:
            assert await sandbox.execute_plugin_safe(look, str(folder)) == ("private\n", ["refused"] * 3)

    asyncio.run(main())


def test_minimal_writes_directly_and_says_so(folder: Path) -> None:
    def write(folder: str) -> None:
        import os

        os.makedirs(f"{folder}/made/here")
        with open(f"{folder}/made/here/file", "w") as file, open(f"{folder}/private") as private:
            file.write(private.read())

    async def main() -> None:
        async with granted(IsolationLevel.MINIMAL, folder) as sandbox:
            await sandbox.execute_plugin_safe(write, str(folder))
            (protection,) = [each for each in sandbox.protections if each.name == "granted folders"]
            assert (protection.state, "no rollback" in protection.detail) == ("missing", True)
            assert sandbox.changes() == []
            with pytest.raises(CommitError, match="written directly"):
                await sandbox.commit_changes()

    asyncio.run(main())
    assert (folder / "made" / "here" / "file").read_text() == "private\n"
    owner = folder.stat()
    assert {path.lstat().st_uid for path in folder.rglob("*")} == {owner.st_uid}


@namespaced
def test_the_disk_limit_holds_for_changes_too(level: IsolationLevel, folder: Path) -> None:
    def fill(folder: str) -> int:
        written = 0
        try:
            for number in range(20):
                with open(f"{folder}/{number}", "wb") as file:
                    written += file.write(bytes(1 << 20))
        except OSError as error:
            if error.errno != 28:
                raise
        return written >> 20

    async def main() -> None:
        allowed = {"allowed_directories": [str(folder)]}
        sandbox = harness.open_sandbox(level, limits={"max_disk_usage_mb": 8.0}, permissions=allowed)
        async with sandbox:
            assert await sandbox.execute_plugin_safe(fill, str(folder)) in (6, 7, 8)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda place: place / "nowhere", "does not exist"),
        (lambda place: place / "text", "no directory"),
        (lambda place: place / "link", "symbolic link"),
        (lambda place: Path("/"), "system's own|lies in '/'"),
        (lambda place: Path("/proc/self"), "symbolic link|system's own"),
        (lambda place: place / "sub", "lies in"),
    ],
)
def test_what_cannot_be_granted(folder: Path, make: Any, reason: str) -> None:
    (folder / "link").symlink_to("sub")

    async def main() -> None:
        allowed = {"allowed_directories": [str(folder), str(make(folder))]}
        async with harness.open_sandbox(IsolationLevel.STRICT, permissions=allowed):
            pass

    with pytest.raises(ValueError, match=reason):
        asyncio.run(main())


@namespaced
def test_without_an_overlay_there_is_a_copy(level: IsolationLevel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from sandbox import sandbox as sandbox_module

    facts = dataclasses.replace(host.facts(), overlay="imitated")
    monkeypatch.setattr(host, "facts", lambda: facts)
    sandbox_module._compiled.clear()

    async def main() -> None:
        async with granted(level, folder) as sandbox:
            (protection,) = [each for each in sandbox.protections if each.name == "granted folders"]
            assert (protection.state, "imitated" in protection.detail) == ("substituted", True)
            await sandbox.execute_plugin_safe(work, str(folder))
            assert kinds(sandbox.changes(), folder) == CHANGED
            await sandbox.discard_changes()
            assert sandbox.changes() == []
            await sandbox.execute_plugin_safe(work, str(folder))
            assert kinds(await sandbox.commit_changes(), folder) == CHANGED

    asyncio.run(main())
    sandbox_module._compiled.clear()
    assert not (folder / "gone").exists()


@namespaced
def test_a_copy_that_does_not_fit_says_so(level: IsolationLevel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from sandbox import sandbox as sandbox_module

    facts = dataclasses.replace(host.facts(), overlay="imitated")
    monkeypatch.setattr(host, "facts", lambda: facts)
    sandbox_module._compiled.clear()
    (folder / "large").write_bytes(bytes(6 << 20))

    async def main() -> None:
        allowed = {"allowed_directories": [str(folder)]}
        async with harness.open_sandbox(level, limits={"max_disk_usage_mb": 4.0}, permissions=allowed):
            pass

    with pytest.raises(SandboxInitializationError, match="larger than the disk limit"):
        asyncio.run(main())
    sandbox_module._compiled.clear()


@pytest.mark.parametrize("in_session", [False, True])
def test_what_a_violation_ended_is_discarded_also_where_a_handler_raises(folder: Path, *, in_session: bool) -> None:
    class Broken:
        def on_violation_detected(self, violation: SandboxViolation) -> None:
            raise ValueError("of the handler")

    def write_and_connect(path: str) -> None:
        import socket

        with open(f"{path}/new", "w") as file:
            file.write("new")
        socket.create_connection(("192.0.2.1", 443))

    async def call(sandbox: EnhancedPluginSandbox) -> None:
        if not in_session:
            await sandbox.execute_plugin_safe(write_and_connect, str(folder))
            return
        async with sandbox.session() as session:
            await session.call(write_and_connect, str(folder))

    async def main() -> list[FileChange]:
        async with granted(IsolationLevel.STANDARD, folder) as sandbox:
            sandbox.monitoring_handler = Broken()
            with pytest.raises(ValueError, match="of the handler"):
                await call(sandbox)
            return sandbox.changes()

    assert asyncio.run(main()) == []


def test_at_level_minimal_nothing_is_discarded(folder: Path) -> None:
    async def main() -> None:
        async with granted(IsolationLevel.MINIMAL, folder) as sandbox:
            with pytest.raises(CommitError, match="written directly"):
                await sandbox.discard_changes()

    asyncio.run(main())


@namespaced
def test_while_a_call_runs_changes_are_nobodys_business(level: IsolationLevel, folder: Path) -> None:
    def linger(folder: str) -> None:
        import time

        with open(f"{folder}/begun", "w"):
            pass
        time.sleep(0.4)

    async def main() -> None:
        async with granted(level, folder) as sandbox:
            task = asyncio.create_task(sandbox.execute_plugin_safe(linger, str(folder)))
            await asyncio.sleep(0.1)
            with pytest.raises(RuntimeError, match="a call is running"):
                sandbox.changes()
            with pytest.raises(RuntimeError, match="a call is running"):
                await sandbox.commit_changes()
            await task
            committing = asyncio.create_task(sandbox.commit_changes())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="being committed"):
                await sandbox.execute_plugin_safe(linger, str(folder))
            assert kinds(await committing, folder) == {("added", "begun")}

    asyncio.run(main())


# -- the workspace -------------------------------------------------------------------------------------------------------


def test_the_host_reads_and_writes_the_workspace(level: IsolationLevel) -> None:
    def inside() -> list[str]:
        import contextlib
        import os

        os.makedirs("deep/er")
        os.symlink("/etc/passwd", "link")
        os.symlink("deep", "folder")
        with contextlib.suppress(OSError):  # unknown to the tight profile
            os.mkfifo("pipe")
        with open("large", "wb") as file:
            file.truncate(5 << 20)
        with open("given/file") as given:
            return [given.read(), str(os.stat("given/file").st_uid == os.getuid())]

    async def main() -> None:
        async with harness.open_sandbox(level, limits={"max_file_size_mb": 6.0}) as sandbox:
            sandbox.write_file("given/file", "from the host")
            assert await sandbox.execute_plugin_safe(inside) == ["from the host", "True"]
            entries = {entry.path: (entry.kind, entry.size) for entry in sandbox.list_files()}
            assert entries["given/file"] == ("file", len("from the host"))
            assert [entries[name][0] for name in ("deep/er", "link", "large")] == ["folder", "link", "file"]
            assert entries.get("pipe", ("other", 0))[0] == "other"
            assert [entry.path for entry in sandbox.list_files("given")] == ["given/file"]
            assert sandbox.read_file("given/file") == b"from the host"
            for path in ("link", "folder/er", "pipe", "deep", "nowhere"):
                with pytest.raises(OSError, match=path):
                    sandbox.read_file(path)
            for path in ("link", "link/x", "folder/x", "deep", "large/x", *(["pipe"] if "pipe" in entries else [])):
                with pytest.raises(OSError, match=r"Errno"):
                    sandbox.write_file(path, "x")
            for path in ("../x", "/etc/passwd", "", "a\0b"):
                with pytest.raises(ValueError, match="no path in the workspace"):
                    sandbox.read_file(path)
            with pytest.raises(OSError, match="larger than 1000"):
                sandbox.read_file("large", max_bytes=1000)
            with pytest.raises(OSError, match="max_file_size_mb"):
                sandbox.write_file("much", bytes(7 << 20))
            with pytest.raises(TypeError, match="data is a int"):
                sandbox.write_file("number", 5)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="not open"):
            sandbox.read_file("given/file")

    asyncio.run(main())


# -- the command ---------------------------------------------------------------------------------------------------------

PLUGIN = """
import os, sys
folder, status = sys.argv[1], int(sys.argv[2])
with open(f"{folder}/text", "a") as file:
    file.write("more\\n")
os.makedirs(f"{folder}/made/here")
with open(f"{folder}/made/here/file", "w") as file:
    file.write("\\x1b[31mred")
if status == 99:
    import ctypes
    ctypes.CDLL(None).syscall(int(sys.argv[3]), 0x10000000)
    status = 0
sys.exit(status)
"""


def psie(*arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(harness.REPOSITORY), harness.TOKEN])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    line = [sys.executable, "-m", "sandbox.cli", *arguments]
    return subprocess.run(
        line, capture_output=True, text=True, env=environment, stdin=stdin, check=False, timeout=60 * harness.PATIENCE
    )


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    return str(path)


def run(level: IsolationLevel, folder: Path, plugin: str, status: int, *options: str) -> subprocess.CompletedProcess[str]:
    return psie(
        *("run", "-q", "--level", level.value, "--rw", str(folder), *options, plugin, str(folder), str(status), str(UNSHARE))
    )


@namespaced
def test_a_run_that_ends_well_is_kept_and_no_other(level: IsolationLevel, folder: Path, plugin: str) -> None:
    before = tree(folder)
    done = run(level, folder, plugin, 3)
    assert (done.returncode, done.stderr) == (3, "psie: 4 changes not committed: the plugin ended with status 3\n")
    done = run(level, folder, plugin, 99)
    assert (done.returncode, done.stderr) == (0, "psie: 4 changes not committed: a violation was recorded\n")
    done = run(level, folder, plugin, 0, "--dry-run")
    assert done.returncode == 0
    assert "dry run: 4 changes" in done.stderr
    assert "~ text" in done.stderr
    assert "\n+more\n" in done.stderr
    assert "\x1b" not in done.stderr
    assert tree(folder) == before
    done = run(level, folder, plugin, 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "text").read_text() == "text\nmore\n"
    assert (folder / "made" / "here" / "file").exists()


SIGNALLED = """
import os, sys
from sandbox.recovery.granted import GrantedChanges

number, name = int(sys.argv.pop(1)), sys.argv.pop(1)
real = getattr(GrantedChanges, name)

def struck(self):
    if name == "commit":
        os.kill(os.getpid(), number)
    value = real(self)
    if name == "found":
        os.kill(os.getpid(), number)
    return value

setattr(GrantedChanges, name, struck)
from sandbox.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["found", "commit"])
def test_a_signal_after_the_plugins_end(folder: Path, plugin: str, moment: str, number: signal.Signals) -> None:
    """Before the commit has begun it keeps it from that; afterwards all of it is done, and said."""
    before = tree(folder)
    line = ("run", "-q", "--level", "strict", "--rw", str(folder), plugin, str(folder), "0", str(UNSHARE))
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(int(number)), moment, *line],
        cwd=harness.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * harness.PATIENCE,
    )
    assert done.returncode == 128 + number
    if moment == "found":
        assert done.stderr == f"psie: 4 changes not committed: psie was ended by {number.name}\n"
        assert tree(folder) == before
    else:
        assert done.stderr == "psie: 4 changes committed all the same: that had begun\n"
        assert (folder / "text").read_text() == "text\nmore\n"


def test_of_a_long_diff_the_beginning_is_shown(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.py"
    path.write_text("import sys\nfor n in range(20): open(f'{sys.argv[1]}/{n}', 'w').write('line\\n' * 100_000)\n")
    limits = ("--memory", "256M", "--level", "strict", "--timeout", str(30 * harness.PATIENCE))
    done = psie("run", "-q", *limits, "--rw", str(folder), "--dry-run", str(path), str(folder))
    assert done.returncode == 0
    assert done.stderr.count("\n+line") < 5001
    assert "more lines of" in done.stderr
    assert "dry run: 20 changes" in done.stderr


def test_in_a_diff_no_line_is_hidden(folder: Path, tmp_path: Path) -> None:
    """What ends lines for Python, and for str.splitlines(), is shown as what it is."""
    path = tmp_path / "hides.py"
    path.write_text(
        "import sys\nopen(sys.argv[1] + '/text', 'w', newline='').write('# tidy\\rimport os\\x0bmore\\u2028last\\n')\n"
    )
    done = psie("run", "-q", "--level", "strict", "--rw", str(folder), "--dry-run", str(path), str(folder))
    assert done.returncode == 0
    assert "\n+# tidy\\rimport os\\x0bmore\\u2028last\n" in done.stderr


def test_deleting_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "delete.py"
    path.write_text("import os, sys\nos.unlink(sys.argv[1] + '/text')\n")
    line = ("run", "-q", "--level", "strict", "--rw", str(folder))
    done = psie(*line, str(path), str(folder))
    assert done.returncode == 125
    assert "deleting is not permitted" in done.stderr
    assert (folder / "text").exists()
    assert psie(*line, "--allow-delete", str(path), str(folder)).returncode == 0
    assert not (folder / "text").exists()


def test_mistakes_on_the_command_line(folder: Path, plugin: str) -> None:
    done = run(IsolationLevel.MINIMAL, folder, plugin, 0, "--dry-run")
    assert (done.returncode, "level minimal" in done.stderr) == (125, True)
    done = run(IsolationLevel.STRICT, folder, plugin, 0, "--ask")
    assert (done.returncode, "no terminal" in done.stderr) == (125, True)
    for option in ("--dry-run", "--ask"):
        done = psie("run", option, plugin)
        assert (done.returncode, f"{option}: there is no folder" in done.stderr) == (125, True)
    done = psie("run", "--rw", str(folder / "nowhere"), plugin)
    assert (done.returncode, "there is no such folder" in done.stderr) == (125, True)
    done = psie("run", "--rw", str(folder), "--rw", str(folder / "sub"), plugin)
    assert (done.returncode, "lies in" in done.stderr) == (125, True)


ATTACH = """
import os, sys
from sandbox.ns import mounts
host = mounts.own_namespace()
mounts.build_template([], pivot=False)
before = os.listdir("/proc/self/fd")
try:
    mounts.attach_from(host, [(sys.argv[1], "/proc/" + name, "") for name in ("nowhere/a", "b", "c")])
except mounts.LineFailed as failure:
    print(failure.line, len(os.listdir("/proc/self/fd")) - len(before))
"""


@pytest.mark.usefixtures("as_root")
def test_what_cannot_be_attached_is_let_go(folder: Path) -> None:
    """A warden serves others after a sandbox that it could not set up: whatever mount it kept nobody could unmount."""
    done = subprocess.run([sys.executable, "-c", ATTACH, folder], cwd=harness.REPOSITORY, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"sandbox: bind {folder} 0\n", "")
