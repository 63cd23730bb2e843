"""A user without rights, for tests that run as root: an id that nobody has, and what it needs to run psie."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import harness

HEAVY = ("mypy*", "numpy*", "ruff*", "__pycache__")


@dataclasses.dataclass(frozen=True)
class User:
    """An unprivileged id with a home, an interpreter with psie's dependencies, and a repository that it can read."""

    uid: int
    home: Path
    interpreter: str
    path: str
    repository: Path

    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "USER": "somebody",
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": self.path,
            "PSIE_TEST_PATIENCE": str(harness.PATIENCE),
        }

    def command(self, *arguments: str) -> list[str]:
        become = ["setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), "--clear-groups"]
        return [*become, *arguments]

    def run(
        self, *arguments: str, seconds: float = 60 * harness.PATIENCE, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as this user, in its repository, with a clean environment."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.repository,
            env={**self.environment(), **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )


def reachable(path: str | Path) -> bool:
    """Whether anybody may walk to `path` and read it, also through links on the way."""
    with contextlib.suppress(OSError):
        place = Path(os.path.abspath(path))
        targets = {place, place.resolve()}
        readable = all(target.stat().st_mode & 0o004 for target in targets)
        return readable and all(folder.stat().st_mode & 0o001 for target in targets for folder in target.parents)
    return False


def find_interpreter(home: Path) -> tuple[str, str] | None:
    """(executable, PYTHONPATH): the running one if others may use it, else a like one of the system with our packages."""
    if all(map(reachable, (sys.executable, sys.base_prefix, os.__file__, pytest.__file__))):
        return sys.executable, ""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (f"/usr/bin/python{version}", "/usr/bin/python3", f"/usr/local/bin/python{version}"):
        if not reachable(candidate):
            continue
        ask = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() == version:
            break
    else:
        return None
    packages = sysconfig.get_paths()["platlib"]
    if not reachable(packages):
        copied = home / "site-packages"
        shutil.copytree(packages, copied, ignore=shutil.ignore_patterns(*HEAVY))
        packages = str(copied)
    return candidate, packages


@contextlib.contextmanager
def temporary_user() -> Iterator[User]:
    """Such a user; skips where there is no interpreter for it. Its home goes with it."""
    uid = 61_000 + os.getpid() % 4_000
    home = Path(tempfile.mkdtemp(prefix="integration-"))
    try:
        home.chmod(0o755)
        found = find_interpreter(home)
        if found is None:
            pytest.skip("no Python of this version that another user may run")
        repository = harness.REPOSITORY
        if not reachable(repository / "sandbox" / "__init__.py"):
            repository = home / "repository"
            for part in (
                "bin",
                "docs",
                "examples",
                "sandbox",
                "tests",
                "README.md",
                "pyproject.toml",
                "plugin_sandbox_isolation_enhanced.py",
            ):
                source = harness.REPOSITORY / part
                copy = shutil.copytree if source.is_dir() else shutil.copy2
                repository.mkdir(exist_ok=True)
                copy(source, repository / part)
        for name in ("tmp", "run"):
            (home / name).mkdir(mode=0o700)
            os.chown(home / name, uid, uid)
        os.chown(home, uid, uid)
        yield User(uid, home, found[0], found[1], repository)
    finally:
        shutil.rmtree(home)
