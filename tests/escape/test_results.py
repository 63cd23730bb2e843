"""Results on the disk: what the host reads and writes in a workspace is a plugin's, also while the plugin changes it."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from escape import kit
from sandbox import EnhancedPluginSandbox, SandboxException
from sandbox.config import IsolationLevel
from sandbox.selftest import attacks, trial
from sandbox.selftest.attacks import ALL, SECRET


@pytest.fixture(params=ALL)
def level(request: pytest.FixtureRequest) -> IsolationLevel:
    found: IsolationLevel = request.param
    if kit.why_closed(found):
        pytest.skip(f"level {found.value} cannot be opened: {kit.why_closed(found)}")
    return found


def opened(level: IsolationLevel) -> EnhancedPluginSandbox:
    return trial.open_sandbox(level, limits={"max_file_operations": 10**6, "max_open_files": 200})


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the caller's, which the host could read and must not."""
    file = tmp_path / "secret"
    file.write_text(SECRET)
    return file


def test_nothing_but_files_is_read(level: IsolationLevel, secret: Path) -> None:
    """Links to files, folders and /proc, folders, FIFOs; each is refused at once, and none is followed."""

    def leave(target: str) -> list[str]:
        import os

        os.symlink(target, "link")
        os.symlink(os.path.dirname(target), "folder-link")
        os.symlink("/proc/self/environ", "proc-link")
        os.symlink("link", "link-to-a-link")
        os.mkdir("folder")
        os.symlink("..", "folder/up")
        made = ["link", "folder-link/secret", "proc-link", "link-to-a-link", "folder", "folder/up/link"]
        try:
            os.mkfifo("fifo")
            made.append("fifo")
        except OSError:
            pass  # the tight profile has no such call
        return made

    async def go() -> None:
        async with opened(level) as one:
            names = await one.execute_plugin_safe(leave, str(secret))
            for name in names:
                before = time.monotonic()
                with pytest.raises((OSError, ValueError, SandboxException)):
                    one.read_file(name)
                assert time.monotonic() - before < 1
            for name in ("../files", "/etc/passwd", "folder/../../x", "a\0b", ""):
                with pytest.raises((OSError, ValueError, SandboxException)):
                    one.read_file(name)
            assert {entry.path for entry in one.list_files()} >= {"link", "folder", "folder/up"}
            assert not [entry for entry in one.list_files() if entry.path.startswith(("folder-link/", "folder/up/"))]

    trial.bounded(go())


def test_the_host_writes_through_no_link(level: IsolationLevel, secret: Path) -> None:
    def leave(target: str) -> None:
        import os

        os.symlink(target, "link")
        os.symlink(os.path.dirname(target), "folder")
        try:
            os.mkfifo("fifo")
        except OSError:
            pass

    async def go() -> None:
        async with opened(level) as one:
            await one.execute_plugin_safe(leave, str(secret))
            for name in ("link", "folder/secret", "folder/new", "fifo"):
                before = time.monotonic()
                try:
                    one.write_file(name, b"evil")
                except (OSError, ValueError, SandboxException):
                    pass
                assert time.monotonic() - before < 1

    trial.bounded(go())
    assert secret.read_text() == SECRET
    assert os.listdir(secret.parent) == ["secret"]


def test_a_file_that_changes_while_it_is_read(level: IsolationLevel, secret: Path) -> None:
    """By turns a file, a link to the caller's secret, a link to a folder, nothing: the host sees the file or an error."""

    def change(target: str) -> int:
        import os
        import time

        end, rounds = time.monotonic() + 8, 0
        os.mkdir("d")
        with open("d/secret", "w") as file:
            file.write("mine")
        while not os.path.exists("stop") and time.monotonic() < end:
            with open("new", "w") as file:
                file.write("mine")
            os.rename("new", "file")
            os.symlink(target, "new")
            os.rename("new", "file")
            os.rename("d", "away")
            os.symlink(os.path.dirname(target), "d")
            os.unlink("d")
            os.rename("away", "d")
            rounds += 1
            if rounds > 10:
                open("enough", "w").close()
        return rounds

    async def go() -> tuple[int, set[str]]:
        async with opened(level) as one:
            task = asyncio.create_task(one.execute_plugin_safe(change, str(secret)))
            seen: set[str] = set()
            found: set[str] = set()
            end = time.monotonic() + (0.3 if level is attacks.MINIMAL else 0.2)
            while time.monotonic() < end or (not (seen and "enough" in found) and time.monotonic() < end + 5):
                for name in ("file", "d/secret"):
                    try:
                        seen.add(one.read_file(name).decode())
                    except (OSError, SandboxException):
                        pass
                found = {entry.path for entry in one.list_files()}
                await asyncio.sleep(0)
            one.write_file("stop", b"")
            return await task, seen

    rounds, seen = trial.bounded(go())
    assert rounds > 10
    assert seen <= {"mine", ""}, seen
    assert seen


def test_files_without_content_or_end(level: IsolationLevel) -> None:
    """A sparse file larger than anybody's memory may be listed; read it is not, nor one that grows all the time."""

    def leave() -> int:
        with open("sparse", "wb") as file:
            try:
                file.truncate(1 << 25)
            except OSError:
                file.truncate(1 << 20)
            return file.seek(0, 2)

    async def go() -> None:
        async with opened(level) as one:
            size = await one.execute_plugin_safe(leave)
            assert {entry.path: entry.size for entry in one.list_files()}["sparse"] == size
            try:
                data = one.read_file("sparse")
            except (OSError, SandboxException):
                return
            assert len(data) == size

    trial.bounded(go())


def test_names_that_are_no_text(level: IsolationLevel) -> None:
    """Bytes that are no UTF-8, lines, escapes: they are listed, and read by the name that the list gives."""

    def leave() -> None:
        import os

        for name in (b"\xff\xfe", b"new\nline", b"\x1b]0;evil\x07", b"-rf", b" ", b"\xe2\x80\xae"):
            with open(os.getcwdb() + b"/" + name, "wb") as file:
                file.write(name)

    async def go() -> None:
        async with opened(level) as one:
            await one.execute_plugin_safe(leave)
            entries = [entry for entry in one.list_files() if entry.kind == "file"]
            assert len(entries) == 6
            for entry in entries:
                assert one.read_file(entry.path) == os.fsencode(entry.path)

    trial.bounded(go())


def test_no_device_and_no_program_of_root_is_left(level: IsolationLevel) -> None:
    """Whatever it tries, nothing in its workspace is a device, set-user-ID, or of another owner than its own."""

    def leave() -> None:
        import os

        for number, mode in enumerate((0o4755, 0o2755, 0o6777, 0o020666, 0o060666)):
            for make in (
                lambda path, mode=mode: os.mknod(path, mode, os.makedev(1, 3)),
                lambda path, mode=mode: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, mode & 0o7777)),
                lambda path, mode=mode: os.chmod(path, mode & 0o7777),
                lambda path, mode=mode: os.chown(path, 0, 0),
            ):
                try:
                    make(f"file{number}")  # type: ignore[no-untyped-call]
                except OSError:
                    continue

    def found(folder: Path) -> list[Any]:
        states = [os.lstat(folder / name) for name in os.listdir(folder)]
        owner = os.stat(folder).st_uid
        return [
            oct(each.st_mode)
            for each in states
            if each.st_mode & (stat.S_ISUID | stat.S_ISGID) or stat.S_IFMT(each.st_mode) != stat.S_IFREG or each.st_uid != owner
        ]

    async def go() -> list[Any]:
        async with opened(level) as one:
            await one.execute_plugin_safe(leave)
            assert one.list_files()
            return found(one.temp_directory)

    assert trial.bounded(go()) == []
