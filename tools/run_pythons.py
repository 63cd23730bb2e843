"""Run all tests once with each Python that is there, one after the other, each in one process; `make test-pythons`.

    python tools/run_pythons.py                       with those on PATH, of pyenv and of uv; the newest of each minor version
    python tools/run_pythons.py 3.13 /opt/py/bin/python3.14
    python tools/run_pythons.py --debian sid 3.14     with those of a Debian release, in a tree of its own, as root
    python tools/run_pythons.py 3.13 -- -k codec      what follows -- is for pytest

A virtual environment for each is kept in .pythons, trees in /var/cache/psie-roots (or $PSIE_ROOTS). The exit status is 0 if
all tests of all have passed. Tests of another user are skipped where such a one cannot reach the interpreter.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".pythons"
ELSEWHERE = ("~/.pyenv/versions/*/bin/python3", "~/.local/share/uv/python/cpython-*/bin/python3", "/opt/python*/bin/python3")
ASK = (
    "import sys, sysconfig; has_no_gil = sysconfig.get_config_var('Py_GIL_DISABLED') or 0; "
    "print(*sys.version_info[:3], sys.implementation.name, has_no_gil)"
)
NEEDED = (
    *(
        "ca-certificates",
        "gcc",
        "iproute2",
        "libc6-dev",
        "libcap-dev",
        "libseccomp2",
        "passwd",
        "procps",
        "python3",
        "util-linux",
    ),
    *("bubblewrap", "man-db", r"?name(^python3\.[0-9]+-venv$)", r"?name(^python3\.[0-9]+-dev$)"),
)
SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)


def floor() -> tuple[int, int]:
    """The oldest minor version that pyproject.toml names."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    major, minor = re.fullmatch(r">=(\d+)\.(\d+)", wanted).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def version(program: str) -> tuple[int, int, int] | None:
    """Of a CPython with a GIL that is not older than our floor; else None."""
    try:
        done = subprocess.run([program, "-I", "-c", ASK], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    words = done.stdout.split()
    if len(words) != 5 or not all(word.isdecimal() for word in words[:3]):
        return None
    found, name, without_gil = (int(words[0]), int(words[1]), int(words[2])), words[3], words[4]
    return found if name == "cpython" and without_gil == "0" and found[:2] >= floor() else None


def found_here() -> dict[str, str]:
    """Programs by minor version, as "3.12": the newest of each."""
    candidates = [
        path
        for folder in dict.fromkeys(os.environ.get("PATH", os.defpath).split(os.pathsep))
        if not folder.endswith("/shims")  # pyenv's run whichever version is chosen
        for path in sorted(glob.glob(f"{glob.escape(folder)}/python3*"))
        if re.fullmatch(r"python3(\.\d+)?", os.path.basename(path))
    ]
    for pattern in ELSEWHERE:
        candidates += glob.glob(os.path.expanduser(pattern))
    newest: dict[str, tuple[tuple[int, int, int], str]] = {}
    for program in dict.fromkeys(candidates):
        number = version(program)
        if number is not None and not is_virtual(program):
            name = f"{number[0]}.{number[1]}"
            if name not in newest or number > newest[name][0]:
                newest[name] = number, program
    return {name: program for name, (_, program) in newest.items()}


def is_virtual(program: str) -> bool:
    return os.path.exists(os.path.join(os.path.dirname(os.path.dirname(program)), "pyvenv.cfg"))


def in_debian(release: str) -> tuple[list[str], dict[str, str]]:
    """What to write before a command so that it runs in that release, and the programs there by minor version."""
    tree = Path(
        os.environ.get("PSIE_ROOTS", "/var/cache/psie-roots"), release
    )  # not below here: its files would have two names
    if not (tree / "usr/bin/python3").exists():
        subprocess.run(["tools/make-root", release, str(tree), *NEEDED], cwd=ROOT, check=True)
    programs = {
        path.name.removeprefix("python"): f"/usr/bin/{path.name}" for path in sorted(tree.glob("usr/bin/python3.*[0-9]"))
    }
    return ["tools/in-root", str(tree)], programs


def prepared(name: str, program: str, before: list[str]) -> str:
    """The interpreter of a virtual environment with psie and what its tests need. Raises CalledProcessError."""
    place = PLACE / "-".join(["venv", name, *(Path(word).name for word in before[1:])])
    python = f"{place}/bin/python"
    if not (place / "ready").exists():
        subprocess.run([*before, program, "-m", "venv", "--clear", str(place)], cwd=ROOT, check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", ".[test]"]
        subprocess.run([*before, *install], cwd=ROOT, check=True)
        (place / "ready").touch()
    return python


def default_signals() -> None:
    """What the tests send must do what it does, also where a shell has started this in the background."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_DFL)


def run_tests(python: str, before: list[str], further: list[str]) -> int:
    command = [*before, "nice", python, "-W", "default::DeprecationWarning", "-m", "pytest", "-q", *further]
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=default_signals).wait()


def main() -> int:
    words = sys.argv[1:]
    own, further = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--debian", metavar="RELEASE", help="of this Debian release instead of this machine")
    parser.add_argument("pythons", nargs="*", metavar="VERSION|PROGRAM", help="only these")
    given = parser.parse_args(own)
    before, programs = in_debian(given.debian) if given.debian else ([], found_here())
    for one in given.pythons:
        number = version(one) if "/" in one else None
        if number is not None:
            programs[one] = one
        elif one not in programs:
            parser.error(
                f"there is no CPython {one} of 3.{floor()[1]} or later here; there are {', '.join(programs) or 'none'}"
            )
    came: dict[str, str] = {}
    for name in given.pythons or sorted(programs, key=lambda text: int(text.split(".")[1])):
        label = name.strip("/").replace("/", "-")
        print(f"== Python {name}: {programs[name]}", flush=True)
        try:
            status = run_tests(prepared(label, programs[name], before), before, further)
        except subprocess.CalledProcessError as error:
            print(error, file=sys.stderr)
            came[name] = "could not be prepared"
        else:
            came[name] = "passed" if status == 0 else "FAILED"
    print("\n" + "\n".join(f"Python {name}: {word}" for name, word in came.items()))
    return 0 if came and set(came.values()) == {"passed"} else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
