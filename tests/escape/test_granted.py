"""Granted folders: no way out of them, and no way into them but for what is committed."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sandbox import CommitError
from sandbox.config import IsolationLevel
from sandbox.selftest import trial
from sandbox.selftest.attacks import NAMESPACED, ROOT, STRICTER, Where
from sandbox.selftest.granted import granted


@pytest.mark.parametrize("level", NAMESPACED)
def test_a_planted_link_does_not_lead_a_commit_out(level: IsolationLevel) -> None:
    """A folder becomes a link to another, and a file in it is changed: outside, that changes the other."""

    def plant(folder: str, target: str) -> None:
        import os

        os.mkdir(f"{folder}/sub")
        os.rmdir(f"{folder}/sub")
        os.symlink(target, f"{folder}/sub")
        try:
            with open(f"{folder}/sub/file", "w") as file:
                file.write("planted")
        except OSError:
            pass

    with granted(Where(inside=False, folder=Path())) as scene:
        plant(scene.arguments["folder"], scene.arguments["other"])
        assert scene.harm(), "the attack does not work outside"
    with granted(Where(inside=True, folder=Path())) as scene:

        async def go() -> None:
            async with trial.open_sandbox(level, permissions=scene.permissions) as one:
                await one.execute_plugin_safe(plant, scene.arguments["folder"], scene.arguments["other"])
                with pytest.raises(CommitError, match="leads out"):
                    await one.commit_changes()
                await one.commit_changes([each.path for each in one.changes() if not each.problem])

        trial.bounded(go())
        assert not scene.harm()
        assert not os.path.lexists(os.path.join(scene.arguments["folder"], "sub"))


@pytest.mark.parametrize("level", NAMESPACED)
def test_no_special_bit_is_committed(level: IsolationLevel) -> None:
    def share(folder: str) -> None:
        import os

        os.mkdir(f"{folder}/shared")
        os.chmod(f"{folder}/shared", 0o1777)

    with granted(Where(inside=True, folder=Path())) as scene:
        folder = Path(scene.arguments["folder"])

        async def go() -> None:
            async with trial.open_sandbox(level, permissions=scene.permissions) as one:
                await one.execute_plugin_safe(share, str(folder))
                await one.commit_changes()

        trial.bounded(go())
        assert stat.S_IMODE((folder / "shared").stat().st_mode) == 0o777


def look_for(word: str) -> list[str]:
    """Paths below the root with this word in them; what is the kernel's or the interpreter's is left out."""
    import os

    found = []
    for folder, folders, files in os.walk("/"):
        if folder.startswith(("/proc", "/sys", "/dev", "/usr", "/lib")):
            folders.clear()
        found += [f"{folder}/{name}" for name in (*folders, *files) if word in name]
    return found


@pytest.mark.long
@pytest.mark.parametrize("level", NAMESPACED)
def test_names_of_folders_are_no_other_sandboxs_business(level: IsolationLevel) -> None:
    """Sandboxes of one kind share a root: what one is granted leaves no name there, for those beside it or after it."""
    word = f"granted-{os.getpid()}-secret"
    places = ["/tmp", "/var/tmp", *([os.path.expanduser("~")] if ROOT else [])]

    async def names(**permissions: Any) -> list[str]:
        async with trial.open_sandbox(level, permissions=permissions) as one:
            found: list[str] = await one.execute_plugin_safe(look_for, word)
            return found

    async def go() -> None:
        folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix=word, dir=place)) for place in places]
        deep = [os.path.join(folder, word, "deeper") for folder in folders]
        for folder in deep:
            os.makedirs(folder)
        granted = {"allowed_directories": deep}
        async with trial.open_sandbox(level, permissions=granted) as one:
            assert len(await one.execute_plugin_safe(look_for, word)) >= len(deep)
            assert await names() == []
        assert await names() == []

    with ExitStack() as stack:
        trial.bounded(go(), 60.0)


@pytest.mark.long
@pytest.mark.parametrize("level", STRICTER)
def test_deep_folders_do_not_use_up_what_sandboxes_share(level: IsolationLevel, tmp_path: Path) -> None:
    async def go() -> None:
        for number in range(14):
            folder = tmp_path / str(number)
            for _ in range(5):
                folder = folder.joinpath(*"d" * 60)
            folder.mkdir(parents=True)
            async with trial.open_sandbox(level, permissions={"allowed_directories": [str(folder)]}) as one:
                assert await one.execute_plugin_safe(os.listdir, str(folder)) == []

    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    trial.bounded(go(), 60.0)
