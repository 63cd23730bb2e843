"""Code that is planted: for the interpreter of a later call, in place of a module, or in the caller's environment."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from typing import Any

import pytest

from escape import kit
from sandbox import EnhancedPluginFramework, IsolationConfig
from sandbox.config import IsolationLevel
from sandbox.selftest import trial
from sandbox.selftest.attacks import ALL, MINIMAL, PATIENCE, STRICT

MARK = "planted, and run"


def plant(mark: str) -> list[str]:
    """In the workspace, in /tmp and in the home: whatever an interpreter looks for by itself, and names of the library's."""
    import importlib.util
    import os
    import py_compile
    import sys
    import tempfile

    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    code = f"import builtins\nbuiltins.planted = {mark!r}\nWORD = {mark!r}\n"
    made = []
    for place in (os.getcwd(), os.path.expanduser("~"), tempfile.gettempdir()):
        site = f"{place}/.local/lib/{version}/site-packages"
        os.makedirs(site, exist_ok=True)
        for folder in (place, site):
            names = ("sitecustomize", "usercustomize", "json", "random", "colorsys", "_strptime", "cloudpickle", "sandbox")
            for name in names:
                path = f"{folder}/{name}.py"
                with open(path, "w") as file:
                    file.write(code)
                py_compile.compile(path, importlib.util.cache_from_source(path), doraise=True)
                made.append(path)
            for name in ("x.pth", "pyvenv.cfg", "python311._pth", "__pycache__.pth"):
                with open(f"{folder}/{name}", "w") as file:
                    file.write(f"import builtins; builtins.planted = {mark!r}\n")
    return made


def use() -> list[str]:
    """Import what was planted; says what of it is not the library's."""
    import builtins
    import importlib
    import os
    import sys
    import tempfile

    wrong = [] if not hasattr(builtins, "planted") else ["something was run before"]
    for name in ("json", "random", "colorsys", "_strptime"):
        module = importlib.import_module(name)
        wrong += [f"{name} from {module.__file__}"] if hasattr(module, "WORD") else []
    wrong += [name for name in ("sitecustomize", "usercustomize") if name in sys.modules]
    planted = ("", ".", os.getcwd(), os.path.expanduser("~"), tempfile.gettempdir())
    wrong += [path for path in sys.path if path in planted or "/.local/" in path]
    return wrong


@pytest.mark.parametrize("level", ALL)
def test_what_one_call_plants_the_next_does_not_run(level: IsolationLevel) -> None:
    """They share a workspace, which is their home; outside, an interpreter that looks there runs what is planted."""

    async def go() -> None:
        async with trial.open_sandbox(level, limits={"max_file_operations": 10**5}) as one:
            made = await one.execute_plugin_safe(plant, MARK)
            assert len(made) > 20
            assert await one.execute_plugin_safe(use) == []
            arguments = [sys.executable, "-c", "import json; print(json.WORD)"]
            variables = {**os.environ, "PYTHONPATH": str(one.temp_directory)}
            outside = subprocess.run(arguments, env=variables, capture_output=True, text=True, check=False)
            assert outside.stdout.strip() == MARK, outside.stderr

    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    trial.bounded(go())


CALLER = """
import asyncio, os, sys
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2

def look():
    import builtins, os, sys
    names = [name for name in ("sitecustomize", "usercustomize") if name in sys.modules]
    variables = sorted(name for name in os.environ if name.startswith("PYTHON"))
    return [hasattr(builtins, "planted"), names, variables, sys.flags.inspect]

async def go():
    config = IsolationConfig(level=IsolationLevel({level!r}))
    async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), config) as one:
        print(await one.execute_plugin_safe(look))

assert __builtins__.planted, "outside it is run"
asyncio.run(go())
"""


@pytest.mark.parametrize("level", [MINIMAL, STRICT])
def test_variables_of_the_callers_interpreter_do_not_reach_it(level: IsolationLevel, tmp_path: Path) -> None:
    """The caller's own Python obeys them; the zygote's, started by it, does not."""
    for name in ("sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(f"import builtins\nbuiltins.planted = {MARK!r}\n")
    (tmp_path / "startup.py").write_text("import builtins\nbuiltins.planted = True\n")
    repository = Path(__file__).resolve().parents[2]
    script = tmp_path / "caller.py"
    script.write_text(CALLER.format(level=level.value))
    paths = [str(tmp_path), str(repository), *(path for path in sys.path if path.endswith("-packages"))]
    planted = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSTARTUP": str(tmp_path / "startup.py"),
        "PYTHONWARNINGS": "error::X",
    }
    planted |= {
        "PYTHONBREAKPOINT": "os.abort",
        "PYTHONPLATLIBDIR": "lib",
        "PYTHONUSERBASE": str(tmp_path),
        "PYTHONHASHSEED": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **planted, "PSIE_STANDING": "0"},
        capture_output=True,
        text=True,
        timeout=20 * PATIENCE,
        check=False,
    )
    assert done.stdout.strip() == "[False, [], ['PYTHONDONTWRITEBYTECODE'], 0]", done.stderr


MAIN = """
import sys

def main():
    import builtins, colorsys, json, os, random, uuid
    import sandbox
    others = [module.__name__ for module in (colorsys, json, os, random, uuid) if hasattr(module, "WORD")]
    return [hasattr(builtins, "planted"), others, {1: 2.5, "x": (uuid.UUID(int=1), None)}]
"""


@pytest.mark.parametrize("level", ALL)
def test_a_plugin_folder_that_is_called_like_the_library(level: IsolationLevel, tmp_path: Path) -> None:
    """Its files bear names of the library's, which stay the library's, also for what the worker itself needs afterwards."""
    if kit.why_closed(level):
        pytest.skip(kit.why_closed(level))
    folder = tmp_path / "plugins" / "json"
    folder.mkdir(parents=True)
    for name in ("os", "json", "random", "uuid", "colorsys", "codec", "traceback", "pickle", "sitecustomize", "sandbox"):
        (folder / f"{name}.py").write_text(f"import builtins\nbuiltins.planted = True\nWORD = {MARK!r}\n")
    (folder / "sandbox.py").write_text("WORD = 'its own'\n")
    (folder / "main.py").write_text(textwrap.dedent(MAIN))

    async def go() -> Any:
        framework = EnhancedPluginFramework(
            str(tmp_path / "plugins"),
            IsolationConfig(level=level, quarantine_on_violation=False),
            state_folder=tmp_path / "state",
        )
        try:
            return await framework.load("json")
        finally:
            framework.close()

    load = trial.bounded(go())
    assert load.outcome == "ok", load.error
    assert load.result == [False, [], {1: 2.5, "x": (uuid.UUID(int=1), None)}]


def test_bytecode_of_the_library_cannot_be_planted() -> None:
    """Whoever could write there would have it run by every later zygote, with all that one may."""

    def write() -> list[str]:
        import os
        import sys

        written = []
        for place in sys.path:
            for path in (f"{place}/__pycache__", place, f"{place}/planted.pth"):
                try:
                    fd = os.open(path if path.endswith(".pth") else f"{path}/planted.pyc", os.O_WRONLY | os.O_CREAT)
                except OSError:
                    continue
                os.close(fd)
                written.append(path)
        return written

    async def go() -> list[object]:
        found = []
        for level in ALL:
            async with trial.open_sandbox(level) as one:
                found.append(await one.execute_plugin_safe(write))
        return found

    assert trial.bounded(asyncio.wait_for(go(), 15)) == [[]] * len(ALL)
