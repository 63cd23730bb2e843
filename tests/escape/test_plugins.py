"""Plugins of a plugin folder: one sees nothing of another's, and leaves nothing behind for a later run."""

from __future__ import annotations

import asyncio
import inspect
import io
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest

from escape import kit
from escape.kit import MATRIX, matrix
from sandbox import EnhancedPluginFramework, IsolationConfig, PluginLimitsV2, PluginPermissionsV2
from sandbox.config import IsolationLevel
from sandbox.selftest import attacks, trial
from sandbox.selftest.attacks import ALL, NAMESPACED, SECRET, Attack, Scene, Where, attack, first_escape, scrambled

NEIGHBOURS = "plugin folders: one sees nothing of another's"
LATER = "plugin folders: nothing is left for a later run"

# Has a secret among its files and in its workspace, and runs while it is attacked.
VICTIM = """
import os, time

def main():
    with open(os.path.join(os.path.dirname(__file__), "secret.txt")) as file:
        secret = file.read()
    with open("secret-in-the-workspace", "w") as file:
        file.write(secret)
    print("victim is ready", flush=True)
    time.sleep(30)
"""
# What it returns is what nobody has planted.
INNOCENT = """
import os
import helper

def main():
    return helper.WORD, sorted(os.listdir()), sorted(os.listdir(os.path.dirname(__file__)))
"""
AS_IT_SHOULD_BE: tuple[str, list[str], list[str]] = ("helper", [], ["helper.py", "main.py"])


@contextmanager
def plugins(where: Where) -> Iterator[Scene]:
    """A plugin folder with the victim and the innocent one, where STANDARD shows it if that can be. Harm: it has changed."""
    with tempfile.TemporaryDirectory(prefix="plugins-", dir=attacks.place()) as name:
        folder = Path(name)
        folder.chmod(0o755)
        sources = {
            "victim/main.py": VICTIM,
            "victim/secret.txt": SECRET,
            "innocent/main.py": INNOCENT,
            "innocent/helper.py": "WORD = 'helper'",
        }
        for path, source in sources.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(source)

        def harm() -> str:
            found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"attacker/main.py"}
            same = found == sources.keys() and all((folder / path).read_text() == text for path, text in sources.items())
            return "" if same else f"the plugin folder holds {sorted(found)}"

        yield Scene({"folder": name, "secret": scrambled(SECRET)}, harm)


@attack(NEIGHBOURS, NAMESPACED, scene=plugins)
def read_what_is_another_ones(folder: str, secret: bytes) -> str:
    import os

    wanted = bytes(byte ^ 0x55 for byte in secret)
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    places = [folder, here, "/run/psie", "/tmp", "/var/tmp", "/dev/shm", "/workspace"]
    pids = [name for name in os.listdir("/proc") if name.isdecimal()] if os.path.isdir("/proc") else []
    places += [f"/proc/{pid}/{name}" for pid in pids for name in ("cwd", "root/workspace", "root/tmp")]
    for place in places:
        for above, folders, names in os.walk(place):
            folders[:] = folders[:100]
            for name in names[:1000]:
                try:
                    with open(os.path.join(above, name), "rb") as file:
                        if wanted in file.read(1 << 16):
                            return f"escaped: {above}/{name}"
                except OSError:
                    continue
    return "stopped: not to be found"


@attack(LATER, ALL, scene=plugins, refusals=("EBUSY",))
def change_its_own_files(folder: str, secret: bytes) -> str:
    import os

    here = os.path.dirname(os.path.abspath(__file__))
    return first_escape(
        {
            "write": lambda: os.open(__file__, os.O_WRONLY),
            "truncate": lambda: os.truncate(__file__, 0),
            "mode": lambda: os.chmod(__file__, 0o777),
            "make": lambda: os.open(f"{here}/new.py", os.O_WRONLY | os.O_CREAT),
            "folder": lambda: os.mkdir(f"{here}/new"),
            "link": lambda: os.symlink("/etc", f"{here}/link"),
            "beside": lambda: os.open(f"{os.path.dirname(here)}/new.py", os.O_WRONLY | os.O_CREAT),
            "rename": lambda: os.rename(here, f"{here}-moved"),
            "remove": lambda: os.unlink(__file__),
        }
    )


@attack(LATER, ALL, scene=plugins)
def plant_modules_and_bytecode(folder: str, secret: bytes) -> str:
    """Also in its workspace and in /tmp, which it may write: those must not be there for anybody later."""
    import importlib.util
    import os
    import py_compile
    import site
    import tempfile

    here = os.path.dirname(os.path.abspath(__file__))
    for place in (os.getcwd(), tempfile.gettempdir(), os.path.expanduser("~")):
        try:
            with open(f"{place}/helper.py", "w") as file:
                file.write("WORD = 'planted'")
            py_compile.compile(f"{place}/helper.py")
        except OSError:
            continue

    def plant(path: str) -> object:
        try:
            os.mkdir(os.path.dirname(path))  # and none above it: in its own /tmp that would be nobody's but its own
        except OSError:
            pass  # it is there, or what follows tells
        return os.open(path, os.O_WRONLY | os.O_CREAT)

    places = [here, os.path.dirname(here), f"{folder}/innocent"]
    paths = [f"{place}/helper.py" for place in places[:2]]
    paths += [importlib.util.cache_from_source(f"{place}/helper.py") for place in places]
    paths += [f"{place}/planted-by-a-plugin.pth" for place in site.getsitepackages()]
    return first_escape({path: lambda path=path: plant(path) for path in paths})  # type: ignore[misc]


def write_attacker(one: Attack, scene: Scene) -> Path:
    """The attack as a plugin of the scene's folder; returns its file."""
    parts = [textwrap.dedent(inspect.getsource(each)) for each in (attacks.attempt, first_escape)]
    own = inspect.getsource(one.function)
    call = f"def main():\n    return {one.function.__name__}(**{scene.arguments!r})\n"
    path = Path(scene.arguments["folder"], "attacker", "main.py")
    path.parent.mkdir()
    text = "\n".join(["from __future__ import annotations", *parts, own[own.index("\ndef ") :], call])
    path.write_text(text)
    return path


def answer_outside(one: Attack, folder: Path) -> str:
    """What it says where nothing protects anything: in a process of its own, in a copy that goes with the scene."""
    with one.scene(Where(inside=False, folder=folder)) as scene:
        path = write_attacker(one, scene)
        code = f"import runpy; print(runpy.run_path({str(path)!r})['main']())"
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        remove_planted()
        return done.stdout.strip() or f"failed: {done.stderr}"


def remove_planted() -> None:
    import site

    for place in site.getsitepackages():
        Path(place, "planted-by-a-plugin.pth").unlink(missing_ok=True)


async def run_beside_the_victim(framework: EnhancedPluginFramework) -> tuple[trial.Outcome, object]:
    """What the attacker says while the victim runs, and what the innocent one returns afterwards."""
    with redirect_stdout(io.StringIO()) as printed:
        victim = asyncio.ensure_future(framework.load("victim"))
        async with asyncio.timeout(attacks.SECONDS):
            while "victim is ready" not in printed.getvalue():
                await asyncio.sleep(0.01)
    load = await framework.load("attacker")
    innocent = await framework.load("innocent")
    assert not victim.done(), victim.result()
    victim.cancel()
    await asyncio.wait([victim])
    assert load.outcome == "ok", load.error
    return trial.Outcome(load.result, None, load.telemetry.violations), innocent.result


@matrix(__name__)
def test_attack(one: Attack, level: IsolationLevel, tmp_path: Path) -> None:
    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")
    answer = answer_outside(one, tmp_path)
    assert answer.startswith("escaped"), answer
    MATRIX.set(one, level, "ESCAPED or broken")
    with one.scene(Where(inside=True, folder=tmp_path)) as scene:
        write_attacker(one, scene)
        framework = EnhancedPluginFramework(
            scene.arguments["folder"],
            IsolationConfig(level=level, violation_threshold=10, quarantine_on_violation=False),
            limits=PluginLimitsV2(max_execution_time_seconds=attacks.SECONDS),
            permissions=PluginPermissionsV2(),
            state_folder=tmp_path / "state",
        )
        outcome, innocent = trial.bounded(run_beside_the_victim(framework), 2 * attacks.SECONDS)
        framework.close()
        harm = scene.harm() or ("" if innocent == AS_IT_SHOULD_BE else f"the next plugin found {innocent}")
    MATRIX.set(one, level, trial.judge(one, outcome, harm))
