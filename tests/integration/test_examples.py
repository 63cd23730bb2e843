"""The programs in examples/: each does what it says, with friendly input and with hostile."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from sandbox import PluginError, PluginExecutionError, SecurityViolationError

from . import harness

EXAMPLES = harness.REPOSITORY / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"psie_example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    return module


@pytest.mark.parametrize("name", ["plugin_host", "code_runner", "pipeline"])
def test_it_runs_as_its_docstring_says(name: str, tmp_path: Path) -> None:
    wanted = {
        "plugin_host": ["one, 2 | one, 5", "two, 4", "PluginError: hostile: it is quarantined", "quarantined: ['hostile']"],
        "code_runner": [
            "value 4.5, printed 'the mean of",
            "  value 3,",
            "  value 'given up',",
            "  value 1048576,",
            "  value 2,",
        ],
        "pipeline": ["extract: march.json", "add-up: march.txt", "1000", "run-me.sh: nothing of it is kept", "left behind: []"],
    }
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(harness.REPOSITORY)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = iter(done.stdout.splitlines())
    missing = [text for text in wanted[name] if not any(text in line for line in lines)]  # in this order
    assert not missing, done.stdout
    assert "Traceback" not in done.stderr


# -- the plugin host -----------------------------------------------------------------------------------------------------


def test_a_plugin_host_loads_anew_what_has_changed_and_only_that(tmp_path: Path) -> None:
    module = example("plugin_host")
    folder = tmp_path / "plugins"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.py").write_text(module.COUNTER)
    (folder / "slip.py").write_text("def add(number): return number / 0")

    async def go() -> None:
        async with module.Host(str(folder), str(tmp_path / "state")) as host:
            for _ in range(2):
                last = [await host.call(name, "add", 1) for name in ("one", "two")]
            assert last == ["one, 2", "one, 2"]
            (folder / "one.py").write_text(module.COUNTER.replace('"one"', '"new"'))
            while host.watchdog.count == host.seen:
                await asyncio.sleep(0.01)
            while (answer := await host.call("one", "add", 1)) != "new, 1":  # the watchdog may have seen it cut short alone
                assert answer.startswith("one") or answer == "new, 2"
                await asyncio.sleep(0.05)
            assert await host.call("two", "add", 1) == "one, 3"
            with pytest.raises(PluginExecutionError, match="division by zero"):
                await host.call("slip", "add", 1)
            assert "slip" in host.sessions
            with pytest.raises(PluginError):
                await host.call("../one", "add", 1)
        assert host.sessions == {}

    asyncio.run(asyncio.wait_for(go(), 30 * harness.PATIENCE))


def test_a_plugin_host_keeps_a_hostile_plugin_out_until_it_is_released(tmp_path: Path) -> None:
    module = example("plugin_host")
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "hostile.py").write_text(module.HOSTILE)

    async def go() -> None:
        async with module.Host(str(folder), str(tmp_path / "state")) as host:
            with pytest.raises(SecurityViolationError):
                await host.call("hostile", "add", 1)
            with pytest.raises(PluginError, match="quarantined"):
                await host.call("hostile", "add", 1)
        async with module.Host(str(folder), str(tmp_path / "state")) as host:
            with pytest.raises(PluginError, match="quarantined"):
                await host.call("hostile", "add", 1)
            assert host.framework.release_plugin("hostile") == 1
            with pytest.raises(SecurityViolationError):
                await host.call("hostile", "add", 1)

    asyncio.run(go())


# -- the code runner -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_code_runner_tells_value_print_and_refusal() -> None:
    module = example("code_runner")
    array = asyncio.run(module.run_code("print('\\x1b[2J')\nnp.arange(3) * 2"))
    assert array.value.tolist() == [0, 2, 4]
    assert array.printed == "\\x1b[2J\n"
    assert asyncio.run(module.run_code("x = 1")) == module.Outcome()
    assert "SyntaxError" in asyncio.run(module.run_code("x =")).refusal
    caught = asyncio.run(module.run_code("import os\ntry: os.fork()\nexcept OSError: pass\nnothing"))
    assert "NameError" in caught.refusal
    assert "new processes" in caught.refusal
    limited = asyncio.run(module.run_code("while True: pass"))
    assert "max_execution_time_seconds=" in limited.refusal


def test_a_code_runner_feeds_the_refusal_back_and_gives_up() -> None:
    module = example("code_runner")
    prompts: list[str] = []

    def model(prompt: str) -> str:
        prompts.append(prompt)
        return "open('/workspace/../etc/shadow')"

    outcome = asyncio.run(module.solve("a task", model, attempts=2))
    assert "shadow" in outcome.refusal
    assert prompts[0] == "a task"
    assert prompts[1].startswith("a task\nYour code did not run:\n")
    assert len(prompts) == 2


# -- the endpoint -----------------------------------------------------------------------------------------------------------


def test_an_endpoint_answers_scripts_and_explains_what_is_wrong_with_them() -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    module = example("script_endpoint")
    cases: dict[str, tuple[int, str, str]] = {
        "result = sum(numbers)": (200, "", ""),
        "result = {1, 2}": (422, "the script failed", "not JSON serializable"),
        "result = float('nan')": (422, "the script failed", "JSON"),
        "result = nothing": (422, "the script failed", "NameError"),
        "while True: pass": (408, "timeout", "max_execution_time_seconds="),
        "bytearray(2**28)": (413, "limit of memory", "max_memory_mb="),
        "import socket; socket.create_connection(('192.0.2.1', 80))": (403, "not permitted", "192.0.2.1:80"),
        "import os; os._exit(3)": (422, "the script failed", "status 3"),
    }
    with testclient.TestClient(module.app) as client, ThreadPoolExecutor(len(cases)) as pool:

        def ask(code: str) -> Any:
            return client.post("/run", json={"code": code, "arguments": {"numbers": [1, 2, 3]}})

        for code, answer in zip(cases, pool.map(ask, cases), strict=True):  # at the same time
            status, kind, detail = cases[code]
            assert answer.status_code == status, (code, answer.text)
            if status == 200:
                assert answer.json() == {"result": 6}
            else:
                assert answer.json()["error"] == kind
                assert detail in answer.json()["detail"]
        assert client.post("/run", json={"code": 7}).status_code == 422
        module.app.state.running = module.MOST
        assert ask("result = 1").status_code == 429


# -- the pipeline ------------------------------------------------------------------------------------------------------------


def look_around(source: str, target: str) -> None:
    """A step that reads and writes wherever it can."""
    found: dict[str, str] = {}
    beside = Path(source).parent
    actions: dict[str, Callable[[], object]] = {
        "its input": lambda: Path(source, "data.json").read_text(),
        "to its input": lambda: Path(source, "data.json").write_text("changed"),
        "input of the first step": lambda: (beside / "input" / "data.csv").read_text(),
        "beside its output": lambda: Path(f"{target}-more").mkdir(),
        "to its output": lambda: Path(target, "seen.json").write_text("first"),
    }
    for name, action in actions.items():
        try:
            action()
            found[name] = "yes"
        except OSError as error:
            found[name] = "no" if error.errno else "?"
    Path(target, "seen.json").write_text(json.dumps(found))


def test_a_pipelines_step_reaches_its_two_folders_alone(tmp_path: Path) -> None:
    module = example("pipeline")
    place = tmp_path / "place"
    for name in ("input", "1"):
        (place / name).mkdir(parents=True)
    (place / "input" / "data.csv").write_text("a,1\n")
    (place / "1" / "data.json").write_text("[]")
    kept = asyncio.run(module.run_step(module.Step("look", look_around, (".json",)), place / "1", place / "2"))
    assert kept == ["seen.json"]
    assert sorted(path.name for path in place.iterdir()) == ["1", "2", "input"]
    assert (place / "1" / "data.json").read_text() == "[]"
    in_its_own = not harness.ROOT and place.is_relative_to("/tmp")  # there it may write, and it goes with the step
    assert json.loads((place / "2" / "seen.json").read_text()) == {
        "its input": "yes",
        "to its input": "no",
        "input of the first step": "no",
        "beside its output": "yes" if in_its_own else "no",
        "to its output": "yes",
    }


def test_a_pipelines_step_that_writes_what_nobody_wants_or_fails_leaves_nothing(tmp_path: Path) -> None:
    module = example("pipeline")
    (tmp_path / "input").mkdir()

    def fails(source: str, target: str) -> None:
        Path(target, "half.json").write_text("[")
        raise ValueError("half way")

    for number, work in enumerate((module.hostile, fails)):
        target = tmp_path / str(number)
        with pytest.raises(module.StepFailed):
            asyncio.run(module.run_step(module.Step("bad", work, (".json",)), tmp_path / "input", target))
        assert list(target.iterdir()) == []
    assert list((tmp_path / "input").iterdir()) == []
