"""Writes only to the workspace; the view of the files; private /tmp; /proc; what a plugin leaves behind on the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from escape import kit
from sandbox import recipe
from sandbox.config import IsolationLevel
from sandbox.errors import ResourceLimitExceededError, SandboxInitializationError
from sandbox.recipe_data import Recipe
from sandbox.selftest import trial
from sandbox.selftest.attacks import (
    ALL,
    MINIMAL,
    NAMESPACED,
    ROOT,
    SECRET,
    first_escape,
    place,
)

# -- what needs more than one call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", NAMESPACED)
def test_temporary_files_are_private(level: IsolationLevel) -> None:
    """Neither the host nor the next call nor another sandbox sees them."""

    def leave() -> list[str]:
        made = []
        for folder in ("/tmp", "/var/tmp", "/dev/shm"):
            with open(folder + "/psie-escape-left", "x"):
                made.append(folder + "/psie-escape-left")
        return made

    def find(paths: list[str]) -> list[str]:
        import os

        return [path for path in paths if os.path.exists(path)]

    async def go() -> None:
        async with trial.open_sandbox(level) as one, trial.open_sandbox(level) as other:
            made = await one.execute_plugin_safe(leave)
            assert len(made) == 3
            assert find(made) == []
            assert await one.execute_plugin_safe(find, made) == []
            assert await other.execute_plugin_safe(find, made) == []

    _unless_closed(level)
    trial.bounded(go())


@pytest.mark.skipif(not ROOT, reason="only root can make a link in /")
@pytest.mark.parametrize("is_link", [False, True])
def test_what_a_hidden_folder_is_a_link_to_is_hidden(is_link: bool) -> None:
    """/home is one on many hosts. Without the link the file is one of the host's that level standard shows."""
    folder, link = place(), f"/psie-escape-{os.getpid()}"
    if folder is None:
        pytest.skip("this host has no folder for what standard shows")
    target = folder / f"target-{os.getpid()}"
    secret, granted = target / "secret", target / "granted"
    granted.mkdir(parents=True)
    for path in (secret, granted / "file"):
        path.write_text(SECRET)
        path.chmod(0o644)

    def look(secret: str, granted: str) -> list[object]:
        import os

        return [os.path.exists(secret), open(granted + "/file").read(), open(granted + "/new", "w").write("x")]

    level, permissions = IsolationLevel.STANDARD, {"allowed_directories": [str(granted)], "allow_file_creation": True}
    hides = mock.patch.object(recipe, "HIDDEN", (*recipe.HIDDEN, link)) if is_link else contextlib.nullcontext()
    try:
        os.symlink(target, link)
        _unless_closed(level)
        limits = {"max_output_mb": 1.5 + is_link}  # a recipe of its own
        with hides:
            done = trial.run_inside(look, str(secret), str(granted), level=level, limits=limits, permissions=permissions)
    finally:
        os.unlink(link)
        shutil.rmtree(target)
    assert done.value == [not is_link, SECRET, 1], done


AUTOMOUNTER = """
import ctypes, fcntl, os, struct, sys
mount = ctypes.CDLL(None).mount
folder = os.fsencode(sys.argv[1])
os.setpgid(0, 0)
reader, writer = os.pipe()
options = f"fd={writer},pgrp={os.getpgrp()},minproto=5,maxproto=5,indirect"
if mount(b"psie-escape", folder, b"autofs", 0, options.encode()):
    sys.exit(1)
os.close(writer)
control = os.open(folder, os.O_RDONLY)
print("mounted", flush=True)
while packet := os.read(reader, 304):  # struct autofs_v5_packet, linux/auto_fs.h
    (token,), (length,) = struct.unpack_from("I", packet, 8), struct.unpack_from("I", packet, 40)
    name = packet[44 : 44 + length]
    if name == b"there":
        os.mkdir(folder + b"/there")
        mount(b"psie-escape", folder + b"/there", b"tmpfs", 0, b"size=64k,mode=755")
        open(folder + b"/there/file", "w").close()
    print(os.fsdecode(name), flush=True)
    fcntl.ioctl(control, 0x9360 if name == b"there" else 0x9361, token)  # AUTOFS_IOC_READY, AUTOFS_IOC_FAIL
"""


@pytest.mark.skipif(not ROOT, reason="only root can mount for others")
def test_an_automounter_is_asked_nothing() -> None:
    """It is a program of the host, which may look for a host of the name that it is asked for (autofs(5), -hosts)."""
    folder = place()
    if folder is None:
        pytest.skip("this host has no folder for what standard shows")
    served = folder / f"served {os.getpid()}"
    served.mkdir()

    def look(served: str) -> list[bool]:
        import os

        return [os.path.exists(f"{served}/{name}") for name in ("there/file", "secret.example")]

    with subprocess.Popen([sys.executable, "-c", AUTOMOUNTER, str(served)], stdout=subprocess.PIPE, text=True) as automounter:
        assert automounter.stdout is not None
        try:
            if not automounter.stdout.readline():
                pytest.skip("this kernel has no autofs")
            assert look(str(served)) == [True, False]
            assert [automounter.stdout.readline() for _ in range(2)] == ["there\n", "secret.example\n"]
            _unless_closed(IsolationLevel.STANDARD)
            fresh = {"preload": ("colorsys",)}  # else a zygote may be taken that has never seen that folder
            done = trial.run_inside(look, str(served), level=IsolationLevel.STANDARD, config=fresh)
            assert done.value == [True, False], done  # what is mounted is there
            os.path.exists(served / "last")
            assert automounter.stdout.readline() == "last\n"
        finally:
            subprocess.run(["umount", "--lazy", "--recursive", str(served)], check=False)
            automounter.kill()
            served.rmdir()


@pytest.mark.parametrize("level", ALL)
def test_workspaces_are_private(level: IsolationLevel) -> None:
    """A sandbox beside it cannot reach a workspace, not even with the help of its owner, who opens all modes."""

    def leave() -> str:
        import os

        with open("left", "w") as file:
            file.write("data of one")
        for path, mode in ((".", 0o777), ("..", 0o777), ("left", 0o666)):
            try:
                os.chmod(path, mode)
            except OSError:
                continue  # not its own, or no modes at all may be changed
        return os.path.realpath("left")

    def change(path: str) -> str:
        import os

        if os.path.realpath("left") == path:
            return "stopped: another folder of the same name" if not os.path.exists(path) else "escaped: it is there"
        return first_escape({"write": lambda: open(path, "a"), "unlink": lambda: os.unlink(path)})

    async def go() -> str:
        async with trial.open_sandbox(level) as one, trial.open_sandbox(level) as other:
            path = await one.execute_plugin_safe(leave)
            answer = await other.execute_plugin_safe(change, path)
            assert (one.temp_directory / "left").read_text() == "data of one"
            return str(answer)

    _unless_closed(level)
    assert trial.bounded(go()).startswith("stopped")


@pytest.mark.parametrize("level", NAMESPACED)
def test_a_source_that_is_swapped_leads_nowhere(level: IsolationLevel) -> None:
    """Between the look at a path and its mount somebody makes a link of it, to what lies behind a closed folder: whoever
    may write beside a plugin's files."""
    from sandbox import recipe

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        mine, closed = Path(name, "mine"), Path(name, "closed")
        for folder, text in ((mine, "of the plugin"), (closed / "inner", SECRET)):
            folder.mkdir(parents=True)
            (folder / "file").write_text(text)
        closed.chmod(0o700)
        compile_recipe = recipe.compile
        swaps = True

        def compile_and_swap(*arguments: Any, **keywords: Any) -> Recipe:
            made = compile_recipe(*arguments, **keywords)
            if swaps:
                mine.rename(mine.with_name("moved"))
                mine.symlink_to(closed / "inner")
            return made

        async def read() -> object:
            async with trial.open_sandbox(level, read_only=(str(mine),)) as one:
                return await one.execute_plugin_safe(lambda path: open(path).read(), f"{mine}/file")

        _unless_closed(level)
        with mock.patch.object(recipe, "compile", compile_and_swap):
            with pytest.raises(SandboxInitializationError, match="symbolic link"):
                trial.bounded(read())
            assert mine.joinpath("file").read_text() == SECRET  # by the path itself it is reached
            mine.unlink()
            mine.with_name("moved").rename(mine)
            swaps = False
            assert trial.bounded(read()) == "of the plugin"


def make_a_mess(target: str) -> str:
    """Deep trees, closed folders, names that are none, links to a folder of the host's."""
    import os

    here = os.getcwd()
    os.symlink(target, "link")
    os.makedirs("closed/inner")
    os.symlink(target, "closed/inner/link")
    os.symlink("/", "closed/root")
    for name in ("new\nline", "\x1b]0;evil\x07", "-rf", " ", ".psie-1", ".psie-2", "a" * 255):
        os.mkdir(name)
    os.mkdir(os.fsencode(here) + b"/\xff\xfe")
    os.makedirs(".psie-1/.psie-1/.psie-2")
    try:
        os.mkfifo("fifo")
    except OSError:
        pass  # the tight profile has no such call
    os.mkdir("shut", 0)
    for path in ("closed/inner", "closed"):
        try:
            os.chmod(path, 0)
        except OSError:
            break  # no modes at all may be changed
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")
    os.symlink(target, "link")
    return here


@pytest.mark.alone  # another process's next sandbox may have the same folder
@pytest.mark.parametrize("level", ALL)
def test_nothing_is_left_and_nothing_else_is_taken(level: IsolationLevel, tmp_path: Path) -> None:
    """The host's cleaning follows no link, and no tree is too deep or too closed for it."""
    (tmp_path / "precious").write_text("of the caller")
    _unless_closed(level)

    async def go() -> Path:
        async with trial.open_sandbox(level) as one:
            with contextlib.suppress(ResourceLimitExceededError):  # for a tree too deep to be watched, if it is seen in time
                await one.execute_plugin_safe(make_a_mess, str(tmp_path))
            return Path(os.path.realpath(one.temp_directory))

    before = time.monotonic()
    folder = trial.bounded(go())
    try:
        assert time.monotonic() - before < 8
        assert (tmp_path / "precious").read_text() == "of the caller"
        if level is MINIMAL:
            assert not os.path.lexists(folder)
            assert not os.path.lexists(folder.parent)
        kit.still_works(level)
    finally:
        if level is MINIMAL and folder.name == "files":  # what is left keeps every further sandbox from opening
            subprocess.run(["chmod", "-R", "u+rwx", str(folder.parent)], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", "--", str(folder.parent)], check=False)


@pytest.mark.parametrize("level", ALL)
def test_a_call_does_not_follow_links_of_the_one_before(level: IsolationLevel, tmp_path: Path) -> None:
    """The working directory is the workspace, also where the plugin before tried to make something else of it."""

    def replace() -> str:
        import os

        return first_escape(
            {"rename": lambda: os.rename(os.getcwd(), os.getcwd() + "-gone"), "rmdir": lambda: os.rmdir(os.getcwd())}
        )

    def where() -> str:
        import os

        return os.getcwd()

    async def go() -> tuple[str, str, str]:
        async with trial.open_sandbox(level) as one:
            before = await one.execute_plugin_safe(where)
            answer = await one.execute_plugin_safe(replace)
            return before, answer, await one.execute_plugin_safe(where)

    _unless_closed(level)
    before, answer, after = trial.bounded(go())
    assert answer.startswith("stopped")
    assert before == after


def _unless_closed(level: IsolationLevel) -> None:
    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")
