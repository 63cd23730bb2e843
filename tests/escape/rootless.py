"""Runs the attacks once more as an unprivileged user, when this session is root's: the second half of the matrix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from escape import kit
from sandbox.selftest import attacks

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 240 * attacks.PATIENCE  # beside two other processes of tests
HEAVY = ("mypy", "numpy", "ruff")  # packages that no attack needs
NEEDED = "import pytest, pytest_timeout, cloudpickle, prctl, pyseccomp, sandbox"


class Session:
    """A pytest session of an id that nobody has, with a home of its own."""

    def __init__(self) -> None:
        self.uid = 60100 + os.getpid() % 4000
        self.home = tempfile.mkdtemp(prefix="psie-rootless-")
        os.chown(self.home, self.uid, self.uid)
        os.chmod(self.home, 0o700)
        self.repository, packages = (
            self._reachable(place, parts)
            for place, parts in (
                (REPOSITORY, ("sandbox", "tests", "tools", "pyproject.toml")),
                (Path(sysconfig.get_path("purelib")), ()),
            )
        )
        self.report = Path(self.home) / "report.json"
        self.environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": self.home,
            "TMPDIR": "/tmp",
            "XDG_RUNTIME_DIR": self.home,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": f"{self.repository}:{packages}",
            "PSIE_ESCAPE_REPORT": str(self.report),
            "PSIE_TEST_PATIENCE": str(attacks.PATIENCE),
            **({"PSIE_ESCAPE_PLACE": str(attacks.place())} if attacks.place() else {}),
        }
        self.process: subprocess.Popen[str] | None = None
        self.reason = ""

    def _reachable(self, place: Path, parts: tuple[str, ...]) -> Path:
        """`place` itself if anybody may walk to it, else a copy of its `parts` (or of all) in the home."""
        if all(folder.stat().st_mode & 0o001 for folder in (place, *place.parents)):
            return place
        copy = Path(self.home) / "copies" / place.name  # apart: a clone is called psie, as psie's own folder in a home is
        for part in parts or [entry.name for entry in place.iterdir() if not entry.name.startswith(HEAVY)]:
            source = place / part
            copy.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, copy / part)
        return copy

    def interpreter(self) -> str | None:
        """One that the id can run, with everything that is needed."""
        for executable in (sys.executable, "/usr/bin/python3"):
            try:
                found = self._popen([executable, "-c", NEEDED])
            except OSError as error:
                self.reason = f"{executable}: {error}"
                continue
            _, self.reason = found.communicate()
            if found.returncode == 0:
                return executable
        return None

    def _popen(self, arguments: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            arguments,
            user=self.uid,
            group=self.uid,
            extra_groups=[],
            env=self.environment,
            cwd=self.repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start(self, *, is_quick: bool) -> None:
        executable = self.interpreter()
        if executable is not None:
            options = ["-q", "-rf", "--tb=line", "-p", "no:cacheprovider", "--color=no", f"--basetemp={self.home}/pytest"]
            options += ["--quick"] if is_quick else []
            self.process = self._popen([executable, "-m", "pytest", *options, "tests/escape"])

    def result(self) -> tuple[int, str]:
        """(exit status, output) of the session; its matrix is kept for the summary."""
        assert self.process is not None
        output, errors = self.process.communicate(timeout=SECONDS)
        if self.report.exists():
            kit.ROOTLESS.append(kit.Matrix.from_plain(json.loads(self.report.read_text())))
        return self.process.returncode, output + errors

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        subprocess.run(
            ["rm", "-rf", "--", self.home], check=False
        )  # shutil.rmtree() cannot remove the deep trees of a failed test


_session: Session | None = None


def start(*, is_quick: bool) -> None:
    global _session
    if attacks.ROOT and _session is None:
        _session = Session()
        _session.start(is_quick=is_quick)


def current() -> Session | None:
    return _session


def stop() -> None:
    global _session
    if _session is not None:
        _session.close()
        _session = None
