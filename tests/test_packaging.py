"""What is built and installed: the wheel and the source distribution hold what they should, the command starts from wherever an
installer has put it, the types reach a user's type checker, and the manual page is of these commands.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import click
import pytest

from sandbox.cli import app
from sandbox.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import asyncio

from plugin_sandbox_isolation_enhanced import EnhancedPluginSandbox as Same
from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, SandboxExecutor

same: type[EnhancedPluginSandbox] = Same


def double(number: int) -> int:
    return 2 * number


async def main() -> None:
    config = IsolationConfig(level=IsolationLevel.STRICT)
    async with EnhancedPluginSandbox(PluginLimitsV2(max_memory_mb=64), PluginPermissionsV2(), config) as sandbox:
        await sandbox.execute_plugin_safe(double, 2)
    with SandboxExecutor(level="strict") as executor:
        number: int = executor.submit(double, 2).result()
        print(number)


asyncio.run(main())
"""
WRONG = PROGRAM.replace("max_memory_mb=64", 'max_memory_mb="64"').replace("number: int =", "number: str =")


def build(target: str, source: Path, place: Path) -> Path:
    """The file that hatchling makes of a source folder."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(place)]
    subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
    (made,) = place.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that is in the source distribution."""
    archive = build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        file.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2, Debian 12's, has none
        file.extractall(place)
    return place / f"psie-{__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the source distribution, as everybody else builds it."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment, at a path with a space, with the wheel, and with links to what it depends on."""
    place = tmp_path_factory.mktemp("a place") / "virtual environment"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    site = next(place.glob("lib/python3*/site-packages"))
    for entry in os.scandir(dependencies()):
        if not entry.name.endswith(".pth") and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry.path)
    return place


def dependencies() -> str:
    spec = importlib.util.find_spec("_prctl")
    assert spec is not None
    assert spec.origin is not None
    return os.path.dirname(spec.origin)


def sources(folder: Path) -> set[str]:
    """Files of a folder, from its parent, without what running leaves."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder.parent)) for path in found}


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(f"psie-{__version__}.dist-info/METADATA").decode()
    information = {name for name in names if name.startswith(f"psie-{__version__}.dist-info/")}
    told = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert {name.partition("/")[2] for name in information} == told
    data = f"psie-{__version__}.data"
    beside = {f"{data}/scripts/psie", f"{data}/scripts/psie-python", f"{data}/data/share/man/man1/psie.1"}
    beside |= {"plugin_sandbox_isolation_enhanced.py", "plugin_sandbox_isolation_enhanced-stubs/__init__.pyi"}
    assert names - information == sources(ROOT / "sandbox") | beside
    assert {"sandbox/py.typed", "sandbox/seccomp/allowlist.toml"} <= names
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata


def test_the_source_distribution_holds_what_the_tests_need_and_no_results(sdist: Path) -> None:
    top = {entry.name for entry in os.scandir(sdist)}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    given = {name for name in settings["only-include"] if (ROOT / name).exists()}
    assert top == given | {".gitignore", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert sources(sdist / "sandbox") == sources(ROOT / "sandbox")
    assert sources(sdist / "tests") == sources(ROOT / "tests")
    assert not [path for path in sdist.rglob("*") if path.suffix in (".pyc", ".box") or path.name == "results"]


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
@pytest.mark.parametrize("option", ["", " -E"], ids=["pip", "pipx"])
def test_the_command_starts_from_where_it_was_installed(installed: Path, tmp_path: Path, linked: bool, option: str) -> None:
    """pip leaves spaces in the line that names the interpreter, pipx has an option behind it, and links to both scripts."""
    names = ("psie", "psie-python")
    program = installed / "bin" / "psie"
    script = installed / "bin" / "psie-python"
    line, _, rest = script.read_text().partition("\n")
    assert line == f"#!{installed}/bin/python"
    if linked:
        (tmp_path / "links").mkdir()
        for name in names:
            (tmp_path / "links" / name).symlink_to(installed / "bin" / name)
        program = tmp_path / "links" / "psie"
    plugin = tmp_path / "plugin.py"
    plugin.write_text("import sys; print('here', sys.argv[1:])")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": "/nowhere"}
    try:
        script.write_text(f"{line}{option}\n{rest}")
        for arguments, wanted in (
            (["--version"], f"psie {__version__}\n"),
            (["run", "--quiet", str(plugin), "a b"], "here ['a b']\n"),
        ):
            done = subprocess.run([program, *arguments], env=environment, cwd="/", capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (0, wanted, "")
    finally:
        script.write_text(f"{line}\n{rest}")


def test_where_the_script_names_a_shell_that_is_what_runs(installed: Path, tmp_path: Path) -> None:
    """As installers write it for a path that is too long for the kernel."""
    shutil.copy(installed / "bin" / "psie", tmp_path / "psie")
    script = tmp_path / "psie-python"
    source = (installed / "bin" / "psie-python").read_text().partition("\n")[2]
    script.write_text(f"#!/bin/sh\n'''exec' \"{installed}/bin/python\" \"$0\" \"$@\"\n' '''\n{source}")
    script.chmod(0o755)
    done = subprocess.run([tmp_path / "psie", "--version"], cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"psie {__version__}\n", "")


def test_a_changed_source_counts_and_not_its_bytecode(installed: Path) -> None:
    """Though the command does not ask Python where its own modules lie."""
    found = next((installed / "lib").glob("python3.*/site-packages/sandbox/version.py"))
    program = [str(installed / "bin" / "psie"), "--version"]
    text = found.read_text()
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == f"psie {__version__}\n"
    try:
        found.write_text(text.replace(__version__, f"{__version__}.changed"))
        for _ in range(2):  # compiled, and from what that has left
            done = subprocess.run(program, capture_output=True, text=True, check=True)
            assert done.stdout == f"psie {__version__}.changed\n"
    finally:
        found.write_text(text)


def test_the_types_reach_a_program_that_uses_it(installed: Path, tmp_path: Path) -> None:
    """A strict type checker sees them in the installed package, and finds the mistakes of one that uses it wrongly."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", "--no-pretty"]
    command += ["--python-executable", str(installed / "bin" / "python"), "program.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    lines = [number for number, line in enumerate(WRONG.splitlines(), 1) if line not in PROGRAM.splitlines()]
    assert [line.split(": error:")[0] for line in found] == [f"wrong.py:{number}" for number in lines], (
        done.stdout + done.stderr
    )
    assert "max_memory_mb" in found[0]


def test_version_is_answered_without_click(installed: Path) -> None:
    command = [f"{installed}/bin/python", "-X", "importtime", "-I", "-S", f"{installed}/bin/psie-python", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sandbox.version" in imported
    assert not imported & {"click", "rich", "asyncio", "re", "enum", "site", "importlib.metadata"}


# -- the manual page -----------------------------------------------------------------------------------------------------


def page() -> str:
    return (ROOT / "man" / "psie.1").read_text()


def test_the_manual_page_is_of_these_commands() -> None:
    done = subprocess.run(
        [sys.executable, "tools/man_page.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stderr}: make man"


def test_the_manual_page_names_every_command_and_option() -> None:
    """Whatever its tool makes of them."""
    text = page()

    def check(command: click.Command, words: str) -> None:
        if isinstance(command, click.Group):
            for name, one in command.commands.items():
                check(one, f"{words} {name}")
            return
        section = text.partition(f"\n.SS {words}\n")[2].partition("\n.S")[0]
        assert section, words
        for parameter in command.params:
            for name in parameter.opts if isinstance(parameter, click.Option) else ():
                assert name.replace("-", r"\-") in section, (words, name)

    check(app.group, "psie")


def test_the_manual_page_is_sound(tmp_path: Path) -> None:
    """As man(1) and mandoc(1) read it, whichever is here."""
    tried = 0
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    for command in (["man", "--warnings", "--local-file"], ["mandoc", "-T", "lint", "-W", "style"]):
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run(
            [*command, str(ROOT / "man" / "psie.1")], env=environment, capture_output=True, text=True, check=False
        )
        told = done.stderr if command[0] == "man" else done.stdout + done.stderr
        if "man-db" in told or "minimized" in told:
            continue  # a container's man that only says that there are no pages
        assert (done.returncode, told) == (0, "")
        tried += 1
    if not tried:
        pytest.skip("neither man nor mandoc is here")
