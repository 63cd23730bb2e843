"""Files of settings, run as people run them: beside a plugin, accepted, learned, shown by `psie explain --sources`; and what a
shell completes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from . import cli_harness, harness
from .cli_harness import Caller

PLUGIN = "import resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
DEFAULT = "50\n"  # max_open_files


@pytest.fixture
def caller(tmp_path: Path) -> Caller:
    """Whoever runs the tests, with records of its own."""
    (tmp_path / "work").mkdir()
    caller = cli_harness.remembering(cli_harness.privileged("standard", tmp_path / "work"), tmp_path)
    caller.write("plugin.py", PLUGIN)
    return caller


def shown(caller: Caller, *words: str) -> tuple[str, str]:
    done = caller.run("run", *words, "plugin.py")
    assert done.status == 0, done
    return done.out, "\n".join(line for line in done.err.splitlines() if "psie.toml" in line)


def test_a_file_beside_a_plugin(caller: Caller) -> None:
    assert shown(caller) == (DEFAULT, "")
    caller.write("psie.toml", "[limits]\nmax_open_files = 30\n")
    assert shown(caller) == ("30\n", "")
    path = caller.write("psie.toml", "[limits]\nmax_open_files = 60\n")
    got, said = shown(caller)
    assert got == DEFAULT
    assert said == (
        f"psie: {path} asks for more than it gets (max_open_files), and nobody has accepted it: read it, then psie trust {path}"
    )
    assert shown(caller, "-q") == (DEFAULT, "")
    done = caller.run("trust", "psie.toml")
    assert (done.status, done.err) == (
        0,
        f"psie: {path} counts from now on, until it is changed; it sets max_open_files = 60\n",
    )
    assert shown(caller) == ("60\n", "")
    assert caller.run("call", "-q", "plugin.py:main").status == 1  # there is none, but it was looked for
    caller.write("psie.toml", "[limits]\nmax_open_files = 61\n")
    got, said = shown(caller)
    assert (got, "nobody has accepted it" in said) == (DEFAULT, True)
    assert "changed since" in caller.run("trust", "--list").out
    assert caller.run("trust", "--forget", "psie.toml").err == "psie: psie.toml counts no more\n"
    assert caller.run("trust", "--list").out == "no file of settings was accepted\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trust"], "give the psie.toml"),
        (["trust", "missing/psie.toml"], "there is no such file: check the path"),
        (["trust", "folder/psie.toml"], "folder/psie.toml: this is no regular file: check the path"),
        (["trust", "--forget"], "give the psie.toml or pyproject.toml that is to count no more"),
        (["trust", "plugin.py"], "only psie.toml and pyproject.toml count beside a plugin"),
        (["trust", "pyproject.toml"], "has no table [tool.psie]"),
        (["trust", "wrong/psie.toml"], "did you mean max_memory_mb?"),
        (["trust", "--list", "psie.toml"], "--list takes no file"),
        (["run", "wrong/plugin.py"], "wrong/psie.toml: unknown key max_memroy_mb in [limits]: did you mean max_memory_mb?"),
        (["rnu", "plugin.py"], "run"),
        (["run", "--levle", "strict", "plugin.py"], "--level"),
        (["run", "--level", "stict", "plugin.py"], "did you mean strict"),
        (["completion", "tcsh"], "bash"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(caller: Caller, words: list[str], said: str) -> None:
    caller.write("pyproject.toml", "[project]\nname = 'x'\n")
    (caller.folder / "wrong").mkdir()
    (caller.folder / "folder" / "psie.toml").mkdir(parents=True)
    caller.write("wrong/psie.toml", "[limits]\nmax_memroy_mb = 3\n")
    caller.write("wrong/plugin.py", PLUGIN)
    done = caller.run(*words)
    assert (done.status, done.output, done.err.count("\n")) == (125, b"", 1), done
    assert said in done.err


def test_a_setting_that_no_sandbox_can_have_is_told_with_its_file_or_option(caller: Caller) -> None:
    caller.write("own.toml", "[permissions]\nreadable_paths = ['/gone/x']\n")
    (caller.folder / "rw" / "inner").mkdir(parents=True)
    for words, said in (
        (["--config", "own.toml"], "own.toml: [permissions] readable_paths: '/gone/x' does not exist: make it first, or check"),
        (["--rw", "rw", "--rw", "rw/inner"], f"--rw: '{caller.folder}/rw/inner' lies in '{caller.folder}/rw', which"),
    ):
        done = caller.run("run", "-q", *words, "plugin.py")
        assert (done.status, done.output, done.err.count("\n")) == (125, b"", 1), done
        assert done.err.startswith(f"psie: {said}")


def test_sources_are_what_a_run_uses(caller: Caller) -> None:
    caller.write("psie.toml", "[limits]\nmax_open_files = 30\nmax_memory_mb = 999\n")
    done = caller.run("explain", "--sources", "--json", "plugin.py", env={"SANDBOX_ISOLATION_LEVEL": "strict"})
    assert done.status == 0, done
    told = json.loads(done.out)
    found = {each["setting"]: (each["value"], each["source"]) for each in told["settings"]}
    assert found["level"] == ("strict", "SANDBOX_ISOLATION_LEVEL")
    assert found["max_open_files"] == (30, f"{caller.folder / 'psie.toml'}, not accepted: only less")
    assert found["max_memory_mb"] == (128, "default")
    assert len(told["notes"]) == 1
    table = caller.run("explain", "--sources", "plugin.py")
    assert "max_open_files" in table.out
    assert "asks for more than it gets (max_memory_mb)" in table.err
    result = caller.folder / "result.json"
    caller.run("run", "--result-file", str(result), "plugin.py", env={"SANDBOX_ISOLATION_LEVEL": "strict"})
    run = json.loads(result.read_text())
    assert (run["level"], run["limits"]["max_open_files"], run["limits"]["max_memory_mb"]) == ("strict", 30, 128)


def test_what_was_learned_counts_at_once(caller: Caller) -> None:
    caller.write("plugin.py", "import sys\nprint(open(sys.argv[1]).read())\n")
    (caller.folder / "data").mkdir()
    secret = caller.write("data/file", "the content")
    assert caller.run("run", "-q", "--level", "strict", "plugin.py", str(secret)).status != 0
    done = caller.run("learn", "--no-input", "plugin.py", str(secret))
    assert done.status == 0, done
    assert f"psie run plugin.py {secret}" in done.err
    assert "accepted" in caller.run("trust", "--list").out
    done = caller.run("run", "-q", "plugin.py", str(secret))
    assert (done.status, done.out) == (0, "the content\n"), done
    assert caller.run("check", "--run", "plugin.py", str(secret)).status == 0


COMPLETE = """
source /dev/stdin
COMP_WORDS=({words}) COMP_CWORD={number}
_psie_completion {command}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(caller: Caller, *words: str) -> list[str]:
    """What a real bash is told."""
    command = caller.folder / "psie"
    if not command.exists():
        command.symlink_to(caller.script)
    script = caller.run("completion", "bash")
    assert script.status == 0
    quoted = " ".join(f"'{word}'" for word in ("psie", *words))
    code = COMPLETE.format(words=quoted, number=len(words), command=command)
    done = subprocess.run(
        [*caller.prefix[:-1], "bash", "--norc", "-c", code],  # where its records are
        input=script.output,
        capture_output=True,
        cwd=caller.folder,
        env=caller.environment,
        check=True,
        timeout=60 * harness.PATIENCE,
    )
    return [line.partition(",")[2] or line for line in done.stdout.decode().split("\n") if line]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(caller: Caller) -> None:
    (caller.folder / "plugins").mkdir()
    for name in ("one.py", "two.py", "$(touch made).py", "one.toml"):
        caller.write(f"plugins/{name}", "def main(): open('made', 'w')\n")
    assert completed(caller, "r") == ["run"]
    assert "--level" in completed(caller, "run", "--le")
    assert completed(caller, "run", "--level", "m") == ["minimal", "maximum"]
    assert {"one", "two"} <= set(completed(caller, "plugins", "run", "plugins", ""))
    assert completed(caller, "plugins", "check", "plugins", "t") == ["two"]
    assert completed(caller, "quarantine", "release", "") == []
    assert not any((caller.folder / place / "made").exists() for place in (".", "plugins"))


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_their_script(caller: Caller, shell: str) -> None:
    script = caller.run("completion", shell)
    assert script.status == 0
    assert "_PSIE_COMPLETE" in script.out
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here: its script was only printed")
    subprocess.run([shell, "-n", "/dev/stdin"], input=script.output, check=True, timeout=60 * harness.PATIENCE)
