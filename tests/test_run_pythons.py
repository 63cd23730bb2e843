"""tools/run_pythons.py: which interpreters count, and what is said about one that is not there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "run_pythons.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_pythons", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path, said: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {said}\n")
    path.chmod(0o755)
    return str(path)


def test_what_counts(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.version(sys.executable) == sys.version_info[:3]
    assert tool.version(str(tmp_path / "nothing")) is None
    assert tool.version("/bin/false") is None
    assert tool.version(program(tmp_path / "old", "3 10 9 cpython 0")) is None
    assert tool.version(program(tmp_path / "another", "3 14 0 pypy 0")) is None
    assert tool.version(program(tmp_path / "without-gil", "3 14 0 cpython 1")) is None
    assert tool.version(program(tmp_path / "other-words", "hello")) is None


def test_the_newest_of_each_and_no_virtual_environment(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "ELSEWHERE", (f"{tmp_path}/more/*/bin/python3",))
    older = program(tmp_path / "a" / "bin" / "python3.13", "3 13 98 cpython 0")
    program(tmp_path / "a" / "bin" / "python3-config", "3 99 0 cpython 0")
    newer = program(tmp_path / "more" / "b" / "bin" / "python3", "3 13 100 cpython 0")
    program(tmp_path / "venv" / "bin" / "python3", "3 14 0 cpython 0")
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    folders = [str(tmp_path / name / "bin") for name in ("a", "venv")]
    monkeypatch.setenv("PATH", os.pathsep.join([*folders, "/usr/bin", "/bin"]))
    found = tool.found_here()
    assert found["3.13"] == newer != older
    assert found.get("3.14") != str(tmp_path / "venv" / "bin" / "python3")


def test_one_that_is_not_there() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "3.99"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no CPython 3.99 of 3.11 or later here" in done.stderr
