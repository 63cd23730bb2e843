"""EnhancedPluginFramework and `psie plugins run` on folders of good, broken and hostile plugins, with and without rights."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import linecache
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    EnhancedPluginFramework,
    IsolationConfig,
    IsolationLevel,
    PluginLimitsV2,
    PluginPermissionsV2,
    running,
    state,
)
from sandbox.errors import ResourceError, ResourceLimitExceededError, SandboxKilledError
from sandbox.plugins import files, signing, stage
from sandbox.plugins.framework import Load
from sandbox.recovery import audit, spool
from sandbox.recovery.store import Run, Store
from sandbox.version import __version__

from . import cli_harness, harness
from .cli_harness import Caller, Done

pytestmark = [pytest.mark.rootless, pytest.mark.timeout(60 * harness.PATIENCE)]

# More different system calls that every profile refuses than violation_threshold allows: the end of a main function.
AND_BREAK = """
    import ctypes
    for name in ("mount", "umount2", "unshare", "setns", "ptrace", "swapon"):
        getattr(ctypes.CDLL(None), name)(0, 0, 0, 0, 0)
"""


@dataclasses.dataclass(frozen=True)
class Plugin:
    """What is to become of a plugin of examples/plugins. `reason` is part of what is told."""

    outcome: str
    reason: str = ""
    result: Any = None


EXAMPLES = harness.REPOSITORY / "examples" / "plugins"
FOLDER = {
    "good": Plugin("ok", result="config"),
    "data": Plugin("ok", result="three"),
    "waits": Plugin("ok", result=42),
    "leak": Plugin("limit", "memory"),
    "spin": Plugin("limit", "the plugin ran longer than 1 s"),
    "fork": Plugin("violation", "passed the violation threshold"),
    "fill": Plugin("limit", "disk"),
    "scan": Plugin("violation", "passed the violation threshold"),
    "shadow": Plugin("violation", "open of /etc/shadow was refused"),
    "swap": Plugin("violation", "open of swap.py was refused"),
    "crash": Plugin("error", "the plugin was killed by SIGSEGV"),
    "breaks": Plugin("violation", "passed the violation threshold"),
}
WORST = ["breaks", "fork", "scan"]  # which are quarantined: shadow and swap have given up at once


@pytest.fixture
def caller(tmp_path: Path) -> Caller:
    """Whoever runs the tests. As root its records are kept in the test's folder too, by a mount that only it sees."""
    records = tmp_path / "records"
    records.mkdir()
    return cli_harness.remembering(cli_harness.privileged("standard", tmp_path), records)


@contextlib.contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[EnhancedPluginFramework]:
    """A framework on the folder "p" in `folder`, with its records beside it."""
    settings.setdefault("config", IsolationConfig(level=IsolationLevel.STANDARD))
    framework = EnhancedPluginFramework(str(folder / "p"), state_folder=folder / "state", **settings)
    try:
        yield framework
    finally:
        framework.close()


def write(folder: Path, sources: dict[str, str]) -> None:
    """Files of plugins in `folder`/p."""
    for name, source in sources.items():
        path = folder / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))


def write_example(folder: Path, name: str) -> None:
    """A plugin of examples/plugins, by its id."""
    for path in EXAMPLES.rglob("*"):
        place = path.relative_to(EXAMPLES)
        if path.is_file() and path.suffix != ".pyc" and place.parts[0].partition(".")[0] == name:
            write(folder, {str(place): path.read_text()})


def loads(framework: EnhancedPluginFramework, *ids: str) -> list[Load]:
    """All at once."""

    async def go() -> list[Load]:
        return await asyncio.gather(*map(framework.load, ids))

    return asyncio.run(go())


def load(framework: EnhancedPluginFramework, plugin_id: str, config: IsolationConfig | None = None) -> dict[str, Any]:
    return asyncio.run(framework.load_plugin_enhanced(plugin_id, config))


def told(done: Done) -> dict[str, dict[str, Any]]:
    return {each["plugin_id"]: each for each in json.loads(done.out)}


def outcomes(done: Done) -> dict[str, str]:
    """By plugin; a long reason goes on in further lines."""
    rows = [line.split() for line in done.out.splitlines()[1:] if line[1:2] != " "]
    return {row[1]: row[0] for row in rows}


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_folder_of_good_and_hostile_plugins(caller: Caller) -> None:
    for path in EXAMPLES.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            caller.write(f"p/{path.relative_to(EXAMPLES)}", path.read_text())
    before = {path: path.read_bytes() for path in (caller.folder / "p").rglob("*") if path.is_file()}

    caller.write("patient.toml", f"[limits]\nmax_execution_time_seconds = {30 * harness.PATIENCE}\n")
    done = caller.run("plugins", "run", "--config", "patient.toml", "p", "--json")
    assert done.status == 1, done
    found = told(done)
    assert sorted(found) == sorted(FOLDER)
    for name, plugin in FOLDER.items():
        assert found[name]["success"] is (plugin.outcome == "ok"), found[name]
        assert found[name]["result"] == plugin.result, name
        assert (found[name]["error"] is None) is (plugin.outcome == "ok"), name
        assert plugin.reason in (found[name]["error"] or ""), (name, found[name]["error"])
        assert found[name]["performance_metrics"]["seconds"] > 0
    assert {path: path.read_bytes() for path in (caller.folder / "p").rglob("*") if path.is_file()} == before

    done = caller.run("plugins", "run", "--config", "patient.toml", "p")
    assert done.status == 1
    again = {name: "quarantined" if name in WORST else plugin.outcome for name, plugin in FOLDER.items()}
    assert outcomes(done) == again, done.out

    listed = json.loads(caller.run("quarantine", "list", "--json").out)
    assert sorted(each["plugin_id"] for each in listed) == WORST
    kept = {path.name for path in (caller.folder / "records").rglob("evidence/*")}
    assert kept == {Path(each["evidence"]).name for each in listed}
    assert caller.run("quarantine", "release", "fork").status == 0
    assert outcomes(caller.run("plugins", "run", "--config", "patient.toml", "p", "fork")) == {"fork": "violation"}
    assert outcomes(caller.run("plugins", "run", "--config", "patient.toml", "p", "fork", "good")) == {
        "fork": "quarantined",
        "good": "ok",
    }
    assert caller.run("plugins", "run", "--config", "patient.toml", "p", "good", "waits").status == 0
    assert caller.run("audit", "verify").status == 0


def test_what_plugins_print_does_not_touch_the_table(caller: Caller) -> None:
    caller.write("p/loud.py", "def main():\n    print('printed')\n    raise ValueError('\\x1b[2J')")
    done = caller.run("plugins", "run", "p", "loud", "--json")
    assert told(done)["loud"]["error"] == "ValueError: \\x1b[2J"
    assert "printed" in done.err
    assert "\x1b" not in caller.run("plugins", "run", "p", "loud").out


def test_a_result_that_json_cannot_have_is_that_plugins_own_business(caller: Caller) -> None:
    caller.write("p/endless.py", "def main():\n    return 10**5000\n")
    caller.write("p/fine.py", "def main():\n    return 42\n")
    done = caller.run("plugins", "run", "p", "--json")
    assert done.status == 1
    assert told(done)["fine"]["result"] == 42
    assert "the result is no JSON" in told(done)["endless"]["error"]


def test_mistakes_on_the_command_line(caller: Caller) -> None:
    for words in (["gone"], ["p", "--level", "high"], ["p", "--config", "gone.toml"]):
        done = caller.run("plugins", "run", *words)
        assert (done.status, done.out) == (125, "")
        assert done.err.count("\n") == 1
    caller.write("p/one.py", "def main(): return 1")
    done = caller.run("plugins", "run", "p", "tow")
    assert done.status == 1
    assert "tow is no plugin of this folder" in done.out


# -- what is run -------------------------------------------------------------------------------------------------------


def test_plugins_at_every_level(level: IsolationLevel, tmp_path: Path) -> None:
    for name in ("good", "data", "waits"):
        write_example(tmp_path, name)
    with opened(tmp_path, config=IsolationConfig(level=level)) as framework:
        assert [found.id for found in framework.discover_plugins()] == ["data", "good", "waits"]
        for name in ("good", "data", "waits"):
            done = load(framework, name)
            assert (done["success"], done["error"], done["result"]) == (True, None, FOLDER[name].result)
            assert done["telemetry"]["plugin_id"] == name
            assert done["telemetry"]["cleanup_successful"]
            assert done["recovery"] == []
            assert not [each for each in done["violations"] if each["explanation"] is None or each["explanation"]["refused"]]
            metrics = done["performance_metrics"]
            assert 0 < metrics["start_ms"] < metrics["seconds"] * 1000
            assert metrics["peak_memory_mb"] > 1
        health = asyncio.run(framework.health_check_sandboxes())
        assert (health["ok"], health["error"]) == (True, None)
        assert "no_new_privs" in health["protections"]["enforced"]
    assert not Path(state.folder("run"), stage.FOLDER, stage.shelf()._name).exists()


WRAPPED = """
    import functools

    def wrap(function):
        return functools.wraps(function)(lambda *arguments: function(*arguments))

    @wrap
    def main(environment):
        return len(environment)
"""
LOADING = {
    "entry": (
        {
            "entry/main.py": "",
            "entry/lib/work.py": "def go(): return __name__",
            "entry/plugin.toml": 'entry_point = "lib.work:go"',
        },
        "lib.work",
    ),
    "json": ({"json.py": "import json\ndef main(): return json.dumps([1])"}, "[1]"),
    "shadows": (
        {
            "shadows/main.py": "async def main(): return 1",
            "shadows/asyncio.py": "raise SystemExit",
            "shadows/pickle.py": "1 / 0",
            "shadows/sandbox.py": "1 / 0",
        },
        1,
    ),
    "names": ({"names/main.py": "import main\ndef run(): return main.run is run"}, True),
    "wraps": ({"wraps.py": WRAPPED}, 7),
    "dash-ed": ({"dash-ed/__init__.py": "from .inner import v\ndef main(): return v", "dash-ed/inner.py": "v = 5"}, 5),
}


@pytest.mark.parametrize("name", LOADING)
def test_how_code_is_loaded(name: str, tmp_path: Path) -> None:
    sources, result = LOADING[name]
    write(tmp_path, sources)
    with opened(tmp_path) as framework:
        done = load(framework, name)
        assert (done["error"], done["result"]) == (None, result)


def test_a_plugin_without_file_access_has_its_own_files(level: IsolationLevel, tmp_path: Path) -> None:
    write_example(tmp_path, "data")
    permissions = PluginPermissionsV2(allow_file_access=False)
    with opened(tmp_path, config=IsolationConfig(level=level), permissions=permissions) as framework:
        (done,) = loads(framework, "data")
        assert (done.error, done.result) == (None, "three")


REFUSED = {
    "gone": ({}, "gone is no plugin of this folder"),
    "../p/one": ({}, "is no plugin id"),
    "x\0\x1b[2J": ({}, "is no plugin id"),
    "broken": ({"broken.py": "", "broken.toml": "[limits]\nmax_memory_mb = -5"}, "broken.toml, line 2: "),
    "digest": ({"digest.py": "", "digest.toml": f'sha256 = {{ "digest.py" = "{"0" * 64}" }}'}, "is not the file whose sha256"),
    "wants": ({"wants.py": "", "wants.toml": "[permissions]\nrequire_code_signing = true"}, "it is not signed"),
    "gen": ({"gen.py": "def main(): yield 1"}, "main is a generator: return a list instead"),
    "agen": ({"agen.py": "async def main(): yield 1"}, "main is a generator: return a list instead"),
    "nothing": ({"nothing.py": "x = 1"}, "has no function main or run or execute"),
    "syntax": ({"syntax.py": "def main(:"}, "SyntaxError"),
    "exits": ({"exits.py": "raise SystemExit(3)"}, "exited with status 3"),
    "value": ({"value.py": "def main(): return object()"}, "object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_or_broken_is_told_in_one_sentence(name: str, tmp_path: Path) -> None:
    sources, why = REFUSED[name]
    write(tmp_path, {"other.py": "", **sources})
    with opened(tmp_path) as framework:
        done = load(framework, name)
        assert (done["success"], done["result"]) == (False, None)
        assert why in done["error"]
        assert done["error"].isprintable()
        assert done["plugin_id"] == name
        (row,) = framework.get_plugin_performance_history(name)
        assert (row["outcome"], row["door"]) == ("refused" if done["sandbox_id"] == "" else "error", "framework")


def test_misuse_raises(tmp_path: Path) -> None:
    for wrong, kind in (({"config": 1}, TypeError), ({"limits": {}}, TypeError), ({"permissions": 1}, TypeError)):
        with pytest.raises(kind):
            EnhancedPluginFramework(str(tmp_path), state_folder=tmp_path / "state", **wrong)
    with pytest.raises(ValueError, match="cannot be opened as a plugin folder"):
        EnhancedPluginFramework(str(tmp_path / "gone"))
    with pytest.raises(TypeError):
        EnhancedPluginFramework(3)  # type: ignore[arg-type]
    write_example(tmp_path, "good")
    with opened(tmp_path) as framework:
        with pytest.raises(TypeError, match="plugin_id"):
            load(framework, 3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="config"):
            load(framework, "good", 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="not quarantined"):
            framework.release_plugin("good")


def test_a_manifest_gets_no_more_than_the_host_allows(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "greedy.py": "def main(env): return env['limits']['max_memory_mb'], env['config']['level'], env['permissions']",
            "greedy.toml": "[limits]\nmax_memory_mb = 4096\n[isolation]\nlevel = 'minimal'\n"
            "[permissions]\nallow_subprocess_execution = true\nallow_network_access = true\nallowed_hosts = ['*']",
        },
    )
    with opened(tmp_path, limits=PluginLimitsV2(max_memory_mb=64)) as framework:
        memory, level, permissions = load(framework, "greedy")["result"]
        assert (memory, level) == (64, "standard")
        assert not permissions["allow_subprocess_execution"]
        assert not permissions["allow_network_access"]
        assert load(framework, "greedy", IsolationConfig(level=IsolationLevel.STRICT))["result"][1] == "strict"


def test_settings_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    write(tmp_path, {"one.py": "def main(): return 1", "one.toml": "[isolation]\nenable_process_isolation = false"})
    config = IsolationConfig(level=IsolationLevel.STRICT, enable_process_isolation=False)
    with opened(tmp_path, config=config) as framework:
        done = load(framework, "one")
        assert not done["success"]
        assert "level strict needs a" in done["error"]
    blocked = PluginPermissionsV2(blocked_directories=["/etc"])
    with opened(tmp_path, config=IsolationConfig(level=IsolationLevel.MINIMAL), permissions=blocked) as framework:
        assert "blocked_directories needs a mount namespace" in load(framework, "one")["error"]


def test_changes_are_committed_when_a_plugin_has_succeeded_and_only_then(tmp_path: Path) -> None:
    granted = tmp_path / "granted"
    granted.mkdir()
    granted.chmod(0o777)
    text = "    with open({path!r}, 'w') as file: file.write('made')\n"
    write(tmp_path, {"good.py": "def main():\n" + text.format(path=str(granted / "good"))})
    write(tmp_path, {"bad.py": "def main():\n" + text.format(path=str(granted / "bad")) + AND_BREAK})
    write(tmp_path, {"fails.py": "def main():\n" + text.format(path=str(granted / "fails")) + "    1 / 0"})
    for name in ("good", "bad", "fails"):
        write(tmp_path, {f"{name}.json": json.dumps({"permissions": {"allowed_directories": [str(granted)]}})})
    with opened(tmp_path, permissions=PluginPermissionsV2(allowed_directories=[str(granted)])) as framework:
        assert [each.outcome for each in loads(framework, "good", "bad", "fails")] == ["ok", "violation", "error"]
        assert os.listdir(granted) == ["good"]
        (quarantined,) = framework.get_quarantined_plugins()
        evidence = Path(quarantined["evidence"])
        index = json.loads((evidence / "changes" / "index.json").read_text())
        assert str(granted / "bad") in json.dumps(index)


# -- swapping ----------------------------------------------------------------------------------------------------------


def test_only_what_was_checked_is_run(tmp_path: Path) -> None:
    """One version is signed, the other is not, and they are exchanged all the time."""
    trusted = tmp_path / "trusted"
    trusted.mkdir(mode=0o755)
    (trusted / "me.pub").write_text(signing.make_key(tmp_path / "key"))
    trusted.chmod(0o755)
    (trusted / "me.pub").chmod(0o644)
    source = "import os\ndef main():\n    with open(__file__) as file: return '{0}', '{0}' in file.read()"
    versions = [source.format("signed"), source.format("swapped")]
    write(tmp_path, {"one/main.py": versions[0]})
    folder = files.open_folder(tmp_path / "p")
    signing.write_signature(
        tmp_path / "p", files.read(folder, "one"), signing.sign(files.read(folder, "one"), str(tmp_path / "key"))
    )
    digest = files.read(folder, "one").sha256
    os.close(folder)
    stop = threading.Event()

    def swap() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            (tmp_path / "new").write_text(versions[number % 2])
            os.replace(tmp_path / "new", tmp_path / "p" / "one" / "main.py")

    permissions = PluginPermissionsV2(require_code_signing=True)
    swapping = threading.Thread(target=swap)
    with opened(tmp_path, permissions=permissions, trusted_keys=trusted) as framework:
        seen: dict[str, int] = {"ok": 0, "refused": 0}
        swapping.start()
        try:
            while min(seen.values()) < 20:
                for each in loads(framework, *["one"] * 10):
                    seen[each.outcome] += 1
                    assert (each.result, each.sha256) == (("signed", True), digest) or each.outcome == "refused", each
        finally:
            stop.set()
            swapping.join()


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_reply_ahead_of_violations_changes_nothing(tmp_path: Path) -> None:
    """A load is judged by all that the plugin has done, also after its value was there."""
    ahead = """
    import os, socket, stat
    from sandbox.engine import codec
    fd = next(fd for fd in range(3, 1024) if os.path.exists(f"/proc/self/fd/{fd}") and stat.S_ISSOCK(os.fstat(fd).st_mode))
    socket.socket(fileno=fd).send(b"V" + codec.encode(7))"""
    write(tmp_path, {"bad/main.py": f"def main():{ahead}{AND_BREAK}"})
    with opened(tmp_path) as framework:
        done = load(framework, "bad")
        assert done["success"] is False
        assert [each["plugin_id"] for each in framework.get_quarantined_plugins()] == ["bad"]


def test_quarantine_by_name_and_by_content(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"bad/main.py": f"print('last words', flush=True)\ndef main():{AND_BREAK}", "again/main.py": "def main(): return 1"},
    )
    with opened(tmp_path) as framework:
        assert load(framework, "bad")["success"] is False
        (quarantined,) = framework.get_quarantined_plugins()
        assert (quarantined["plugin_id"], quarantined["by"]) == ("bad", "framework")
        evidence = Path(quarantined["evidence"])
        assert (evidence / "output.txt").read_bytes().count(b"last words\n") == 1
        assert json.loads((evidence / "recipe.json").read_text())["level"] == "standard"
        check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
        assert subprocess.run(check, cwd=evidence, capture_output=True, check=False).returncode == 0
        shutil.copy(tmp_path / "p/bad/main.py", tmp_path / "p/again/main.py")
        done = load(framework, "again")
        assert done["error"].startswith("it is quarantined as bad, which it equals (")
        write(tmp_path, {"bad/main.py": "def main(): return 'mended'"})
        done = load(framework, "bad")
        assert done["error"].startswith("it is quarantined (")
        assert done["sandbox_id"] == ""
    with opened(tmp_path) as framework:  # a later one remembers
        assert framework.release_plugin("bad") == 1
        assert load(framework, "bad")["result"] == "mended"
        assert framework.get_quarantined_plugins() == []
    assert audit.verify(tmp_path / "state").ok


@pytest.mark.parametrize("name", ["one.py", "one/main.py", "one/__init__.py"])
def test_what_the_command_has_quarantined_is_no_plugin(tmp_path: Path, name: str) -> None:
    """By the digest of the file, which `psie run` knows, not that of a plugin."""
    source = "def main(): return 1"
    write(tmp_path, {name: source})
    with opened(tmp_path) as framework, Store(tmp_path / "state") as store:
        assert load(framework, "one")["result"] == 1
        store.quarantine("/elsewhere/two.py", hashlib.sha256(source.encode()).hexdigest(), "bad", [], "command")
        done = load(framework, "one")
        assert done["error"].startswith("it is quarantined as /elsewhere/two.py, which it equals (bad)")
        store.release("/elsewhere/two.py", "somebody")
        assert load(framework, "one")["result"] == 1
        store.quarantine("/else; where.py", hashlib.sha256(source.encode()).hexdigest(), "bad", [], "command")
        assert load(framework, "one")["error"].endswith("psie quarantine release '/else; where.py'")  # for a shell


def test_switches(tmp_path: Path) -> None:
    write(tmp_path, {"bad.py": f"def main():{AND_BREAK}", "good.py": "def main(): return 1"})
    config = IsolationConfig(level=IsolationLevel.STANDARD, quarantine_on_violation=False)
    with opened(tmp_path, config=config) as framework:
        assert [each.outcome for each in loads(framework, "bad", "bad")] == ["violation"] * 2
        assert framework.get_quarantined_plugins() == []
        assert len(framework.get_plugin_performance_history("bad")) == 2
    config = IsolationConfig(level=IsolationLevel.STANDARD, telemetry_enabled=False)
    with opened(tmp_path, config=config) as framework:
        assert [each.outcome for each in loads(framework, "bad", "good")] == ["violation", "ok"]
        assert len(framework.get_plugin_performance_history("bad")) == 2
        assert [each["plugin_id"] for each in framework.get_quarantined_plugins()] == ["bad"]


CURIOUS = """
    def main():
        for path in ("shadow", "gshadow", "passwd", "group", "sudoers", "hosts"):
            try:
                open(f"/etc/{path}", "a")
            except OSError:
                pass
        with open(%r, "w") as file:
            file.write("made")
        return "survived"
"""


def test_what_the_interpreter_tells_is_no_reason_for_quarantine(tmp_path: Path) -> None:
    """Harmless plugins look where they may not, and go on; hostile ones would not tell."""
    granted = tmp_path / "granted"
    granted.mkdir()
    granted.chmod(0o777)
    made = str(granted / "made")
    asked = json.dumps({"permissions": {"allowed_directories": [str(granted)]}})
    write(tmp_path, {"curious.py": CURIOUS % made, "curious.json": asked})
    permissions = PluginPermissionsV2(allowed_directories=[str(granted)])
    config = IsolationConfig(level=IsolationLevel.STANDARD, violation_threshold=3)
    with opened(tmp_path, config=config, permissions=permissions) as framework:
        (done,) = loads(framework, "curious")
        assert (done.outcome, done.result, len(done.violations)) == ("ok", "survived", 6)
        assert os.listdir(granted) == ["made"]
        assert framework.get_quarantined_plugins() == []


def test_of_a_quarantined_plugin_the_changes_are_evidence(tmp_path: Path) -> None:
    granted = tmp_path / "granted"
    granted.mkdir()
    granted.chmod(0o777)
    made = str(granted / "made")
    text = f"def main():\n    with open({made!r}, 'w') as file: file.write('made'){AND_BREAK}"
    write(tmp_path, {"bad.py": text, "bad.json": json.dumps({"permissions": {"allowed_directories": [str(granted)]}})})
    with opened(tmp_path, permissions=PluginPermissionsV2(allowed_directories=[str(granted)])) as framework:
        (done,) = loads(framework, "bad")
        assert (done.outcome, done.result) == ("violation", None)
        assert os.listdir(granted) == []
        (quarantined,) = framework.get_quarantined_plugins()
        index = Path(quarantined["evidence"], "changes", "index.json").read_text()
        assert made in index
        assert (Path(quarantined["evidence"]) / "changes" / "0").read_text() == "made"


@pytest.mark.parametrize("others", [{"one/helpers.py": "VALUE = 2"}, {}], ids=["with others", "alone"])
def test_a_file_is_quarantined_with_its_modules_or_alone(tmp_path: Path, others: dict[str, str]) -> None:
    """The same main file with other modules is another program: it is not refused for what the one has done."""
    source = "def main(): return 1"
    write(tmp_path, {"one/main.py": source, **others})
    with opened(tmp_path) as framework, Store(tmp_path / "state") as store:
        store.quarantine("/elsewhere.py", hashlib.sha256(source.encode()).hexdigest(), "bad", [], "command")
        assert load(framework, "one")["success"] is bool(others)


@pytest.mark.parametrize("name", ["pest2.py", "pest3/main.py", "pest4/__init__.py"])
def test_by_another_name_it_is_quarantined_still(tmp_path: Path, name: str) -> None:
    source = f"{textwrap.dedent(AND_BREAK)}def main(): return 1"
    write(tmp_path, {"pest.py": source, name: source})
    with opened(tmp_path) as framework:
        (done,) = loads(framework, "pest")
        assert done.quarantined
        other = load(framework, name.partition("/")[0].removesuffix(".py"))
        assert not other["success"]
        assert "it is quarantined as pest, which it equals" in other["error"]


@pytest.mark.parametrize("coding", ["rot13", "hex", "punycode", "undefined"])
def test_a_file_that_cannot_be_decoded_is_its_own_affair(tmp_path: Path, coding: str) -> None:
    write(tmp_path, {"odd.py": f"# coding: {coding}\nqrs znva(): erghea 1", "good.py": "def main(): return 1"})
    with opened(tmp_path) as framework:
        odd, good = loads(framework, "odd", "good")
        assert (odd.outcome, good.outcome) == ("error", "ok")
        assert odd.error is not None
        assert "internal error" not in odd.error
        with Store(tmp_path / "state") as store:
            assert sorted(run.outcome for run in store.runs()) == ["error", "ok"]


def test_a_traceback_loads_nothing_into_this_process(tmp_path: Path) -> None:
    """The plugin says itself in which line of which file it was."""
    source = f"""
    import linecache
    linecache.getlines = lambda *given, **more: []
    def main():
        exec(compile("\\n" * 1000 + "raise ValueError('no')", __file__, "exec"))
    TEXT = '{"x" * 100_000}'
    """
    write(tmp_path, {"fat.py": source})
    before = set(linecache.cache)
    with opened(tmp_path) as framework:
        assert "ValueError: no" in load(framework, "fat")["error"]
    assert not any("fat" in path for path in set(linecache.cache) - before)


def test_a_load_that_is_cancelled_is_recorded(tmp_path: Path) -> None:
    write(tmp_path, {"slow.py": "import time\ndef main(): time.sleep(60)"})

    async def main(framework: EnhancedPluginFramework) -> None:
        task = asyncio.create_task(framework.load("slow"))
        await harness.wait_for(lambda: framework.get_framework_telemetry()["sandboxes_open"] != {})
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with opened(tmp_path) as framework, Store(tmp_path / "state") as store:
        asyncio.run(main(framework))
        (run,) = store.runs()
        assert (run.plugin_id, run.outcome, run.reason) == ("slow", "error", "it was ended by CancelledError")


def test_who_uses_an_open_plugin_may_fail(tmp_path: Path) -> None:
    write(tmp_path, {"good.py": "def work(): return 1"})

    async def main(framework: EnhancedPluginFramework) -> None:
        async with framework.open_plugin("good") as plugin:
            assert await plugin.call("work") == 1
            raise LookupError("of the caller's own")

    with opened(tmp_path) as framework, Store(tmp_path / "state") as store:
        with pytest.raises(LookupError, match="of the caller's own"):
            asyncio.run(main(framework))
        (run,) = store.runs()
        assert (run.outcome, run.reason) == ("error", "of the caller's own")


def test_what_an_open_plugin_has_changed_is_kept_also_after_a_limit(tmp_path: Path) -> None:
    """That its user has handled: a fresh process goes on. What was killed from outside is not left without a word."""
    granted = tmp_path / "granted"
    granted.mkdir()
    if harness.ROOT:
        os.chown(granted, 4321, 4321)
    source = f"def work(name): open({str(granted)!r} + '/' + name, 'w').close()\ndef hang():\n while True: pass"
    write(tmp_path, {"works.py": source})
    (tmp_path / "p" / "works.json").write_text(json.dumps({"permissions": {"allowed_directories": [str(granted)]}}))

    async def killed(framework: EnhancedPluginFramework) -> None:
        async with framework.open_plugin("works") as plugin:
            await plugin.call("work", "three")
            (sandbox,) = [each for each in running.list_running() if each.owner_pid == os.getpid() and each.plugin]
            await asyncio.to_thread(running.kill, sandbox.id)

    async def main(framework: EnhancedPluginFramework) -> None:
        async with framework.open_plugin("works") as plugin:
            await plugin.call("work", "one")
            with pytest.raises(ResourceLimitExceededError):
                await plugin.call("hang")
            await plugin.call("work", "two")
        assert sorted(os.listdir(granted)) == ["one", "two"]
        with pytest.raises(SandboxKilledError, match="psie kill"):
            await killed(framework)
        assert sorted(os.listdir(granted)) == ["one", "two"]

    permissions = PluginPermissionsV2(allowed_directories=[str(granted)])
    limits = PluginLimitsV2(max_execution_time_seconds=1.0 * harness.PATIENCE)
    with opened(tmp_path, permissions=permissions, limits=limits) as framework:
        asyncio.run(main(framework))


def test_plugins_that_share_a_folder_wait_for_each_other(tmp_path: Path) -> None:
    granted = tmp_path / "granted"
    granted.mkdir()
    if harness.ROOT:
        os.chown(granted, 4321, 4321)
    source = "def main():\n for number in range(30): open(f'{folder}/{name}-{number}', 'w').write('x')"
    names = [f"plugin{number}" for number in range(6)]
    write(tmp_path, {f"{name}.py": f"folder, name = {str(granted)!r}, {name!r}\n{source}" for name in names})
    config = {"permissions": {"allowed_directories": [str(granted)]}}
    for name in names:
        (tmp_path / "p" / f"{name}.json").write_text(json.dumps(config))
    with opened(tmp_path, permissions=PluginPermissionsV2(allowed_directories=[str(granted)])) as framework:
        done = loads(framework, *names)
    assert [(load.outcome, load.error) for load in done] == [("ok", None)] * len(names)
    assert len(os.listdir(granted)) == 30 * len(names)


def test_what_may_be_read_may_lie_in_the_plugin_folder(tmp_path: Path) -> None:
    write(tmp_path, {"reads.py": f"def main(): return open({str(tmp_path / 'p' / 'shared' / 'data')!r}).read()"})
    shared = tmp_path / "p" / "shared"
    shared.mkdir()
    (shared / "data").write_text("for all")
    for above in (tmp_path, *tmp_path.parents[:2]):
        above.chmod(0o711)
    with opened(tmp_path, permissions=PluginPermissionsV2(readable_paths=[str(shared)])) as framework:
        assert load(framework, "reads")["result"] == "for all"


def test_what_cannot_be_recorded_has_not_succeeded(tmp_path: Path) -> None:
    write(tmp_path, {"good.py": "def main(): return 1"})
    with opened(tmp_path) as framework:
        assert load(framework, "good")["success"]
        (tmp_path / "state" / spool.NAME).chmod(0o666)
        done = load(framework, "good")
        assert (done["success"], done["result"]) == (False, None)
        assert "it ran, but that could not be recorded: " in done["error"]


def test_a_bound_that_is_none_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "many")
    with pytest.raises(ResourceError, match="PSIE_MAX_SANDBOXES is 'many'"):
        EnhancedPluginFramework(str(tmp_path), state_folder=tmp_path / "state")


def test_telemetry(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"good.py": "def main(): return 1", "bad.py": "import os\ndef main(): os.fork()", "fails.py": "def main(): 1 / 0"},
    )
    with opened(tmp_path) as framework:
        assert framework.get_framework_telemetry()["success_rate"] is None
        loads(framework, "good", "good", "bad", "fails")
        found = framework.get_framework_telemetry()
        assert (found["runs"], found["success_rate"], found["quarantined"]) == (4, 0.5, 0)
        assert found["outcomes"] == {"ok": 2, "violation": 1, "error": 1}
        assert found["violations"] == {"permission_denied": 1}
        assert found["plugins"]["good"]["runs"] == 2
        seconds = found["plugins"]["good"]["seconds"]
        assert 0 < seconds["p50"] <= seconds["p95"] <= seconds["p99"]
        assert found["sandboxes_open"] == {}
        assert found["pool"]["zygotes"] >= 1
        newest, older = framework.get_plugin_performance_history("good")
        assert newest["started"] >= older["started"]
        assert (newest["level"], newest["version"], newest["outcome"]) == ("standard", __version__, "ok")
        assert len(framework.get_plugin_performance_history("good", limit=1)) == 1


def test_telemetry_of_many_rows(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    now = time.time()
    rows = [Run(now - n, f"plugin{n % 50}", "", "standard", "ok", "framework", seconds=n / 1000) for n in range(10_000)]
    with opened(tmp_path) as framework, Store(tmp_path / "state") as store:
        store.add_runs(rows)
        found = framework.get_framework_telemetry()
        assert (found["runs"], found["success_rate"], len(found["plugins"])) == (10_000, 1.0, 50)


# -- many at once ------------------------------------------------------------------------------------------------------

MANY = """
import asyncio, sys
from sandbox import EnhancedPluginFramework, PluginLimitsV2

async def main():
    limits = PluginLimitsV2(max_memory_mb=32.0)  # so that there is room for others' sandboxes
    framework = EnhancedPluginFramework(sys.argv[1], limits=limits, state_folder=sys.argv[2])
    done = await asyncio.gather(*[framework.load_plugin_enhanced("good") for _ in range(int(sys.argv[3]))])
    wrong = [each["error"] for each in done if not each["success"]]
    sys.exit(f"{len(wrong)} failed: {wrong[:3]}" if wrong else 0)

asyncio.run(main())
"""


@pytest.mark.timeout(180 * harness.PATIENCE)
@pytest.mark.long
def test_two_hundred_at_once_from_two_processes(tmp_path: Path) -> None:
    write(tmp_path, {"good.py": "def main(): return 1"})
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(harness.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-c", MANY, str(tmp_path / "p"), str(tmp_path / "state"), "100"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) for _ in range(2)]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    with Store(tmp_path / "state") as store:
        assert len({run.id for run in store.runs(outcome="ok", limit=1000)}) == 200
    verdict = audit.verify(tmp_path / "state")
    assert (verdict.ok, verdict.lines >= 200) == (True, True)


@pytest.mark.usefixtures("own_ledger")
def test_places_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"good.py": "def main(): return 1"})
    monkeypatch.setenv("PSIE_MAX_SANDBOXES", "2")
    with opened(tmp_path) as framework:
        most = 0

        async def go() -> list[Load]:
            nonlocal most

            async def look() -> None:
                nonlocal most
                while True:
                    most = max(most, sum(framework.get_framework_telemetry()["sandboxes_open"].values()))
                    await asyncio.sleep(0)

            looking = asyncio.ensure_future(look())
            try:
                return await asyncio.gather(*[framework.load("good") for _ in range(20)])
            finally:
                looking.cancel()

        assert [each.outcome for each in asyncio.run(go())] == ["ok"] * 20
        assert 1 <= most <= 2


def test_a_cancelled_load_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"waits.py": "import time\ndef main(): time.sleep(60)"})
    shelf = Path(state.folder("run"), stage.FOLDER, stage.shelf()._name)
    with opened(tmp_path) as framework:

        async def go() -> None:
            for seconds in (0.0, 0.001, 0.003, 0.01, 0.3):
                task = asyncio.ensure_future(framework.load("waits"))
                await asyncio.sleep(seconds)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert not shelf.exists()

        asyncio.run(go())


# -- stages ------------------------------------------------------------------------------------------------------------

KEEPS = """
import sys, time
from sandbox.plugins import files, stage
staged = stage.shelf().take(files.read(files.open_folder(sys.argv[1]), "data"))
print(staged.root, flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def keeper(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a plugin staged, and where."""
    environment = {**os.environ, "PYTHONPATH": str(harness.REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", KEEPS, str(folder / "p")], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_stages_of_the_dead_are_swept_and_no_others(tmp_path: Path) -> None:
    write_example(tmp_path, "data")
    with keeper(tmp_path) as (process, root):
        assert (root / "data" / "words.txt").read_text() == "one two three\n"
        modes = {oct(path.stat().st_mode & 0o7777) for path in root.rglob("*") if path.is_file()}
        assert modes == {"0o444"}
        assert stage.sweep() == []
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert root.exists()
        assert stage.sweep() == [root.parent.name]
        assert not root.exists()


def test_the_command_sweeps_stages(tmp_path: Path, caller: Caller) -> None:
    write_example(tmp_path, "data")
    with keeper(tmp_path) as (process, root):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert "1 folders of staged plugins" in caller.run("gc").out
        assert not root.exists()


def test_equal_plugins_share_a_stage(tmp_path: Path) -> None:
    write_example(tmp_path, "data")
    folder = files.open_folder(tmp_path / "p")
    plugin = files.read(folder, "data")
    os.close(folder)
    shelf = stage.Shelf()
    first, second = shelf.take(plugin), shelf.take(plugin)
    assert first.root == second.root
    first.release()
    assert os.path.isdir(second.root)
    second.release()
    assert not os.path.exists(os.path.dirname(second.root))
