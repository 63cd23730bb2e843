"""Granted folders: no way out of them, and no way into them but for what is committed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sandbox import CommitError
from sandbox.config import IsolationLevel
from sandbox.selftest import trial
from sandbox.selftest.attacks import NAMESPACED, Where
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
