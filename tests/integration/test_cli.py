"""The command line, run as its callers run it: statuses, streams, options, mistakes, hostile plugins, terminals, calls."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import zipapp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import IsolationLevel, host
from sandbox.recipe_data import Recipe
from sandbox.selftest.attacks import SYSCALLS
from sandbox.version import __version__

from . import cli_harness, harness
from .cli_harness import READY, SECRET, Caller, Done, Session, read_until

LEVELS = [level.value for level in IsolationLevel]
EVERYWHERE = [*(("own", level) for level in LEVELS), ("user", "standard")]
TWICE = [("own", "strict"), ("user", "standard")]


@pytest.fixture(scope="session")
def cli_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: recipes are cached by path."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(params=EVERYWHERE, ids="-".join)
def everywhere(request: pytest.FixtureRequest, cli_folder: Path) -> Iterator[Caller]:
    """Every level as whoever runs the tests, and the commonest without rights."""
    who, level = request.param
    with cli_harness.called(who, level, cli_folder, request) as caller:
        yield caller


@pytest.fixture(params=TWICE, ids="-".join)
def twice(request: pytest.FixtureRequest, cli_folder: Path) -> Iterator[Caller]:
    """With and without rights: for what depends less on the level."""
    who, level = request.param
    with cli_harness.called(who, level, cli_folder, request) as caller:
        yield caller


@pytest.fixture
def caller(cli_folder: Path) -> Iterator[Caller]:
    """For what does not depend on the level."""
    caller = cli_harness.privileged("standard", cli_folder)
    yield caller
    caller.clean()


@pytest.fixture
def somebody(request: pytest.FixtureRequest, cli_folder: Path) -> Iterator[Caller]:
    """A user without rights."""
    with cli_harness.called("user", "standard", cli_folder, request) as caller:
        yield caller


def assert_refused(done: Done, *parts: str) -> None:
    """One sentence on stderr that names what is wrong and what to do, status 125, no output."""
    assert done.status == 125, done
    assert done.output == b""
    assert done.err.startswith("psie: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    for part in parts:
        assert part in done.err, done.err


# -- psie run: what a program can see -----------------------------------------------------------------------------------


SURROUNDINGS = """
    import json, os, sys
    try:
        kernel_says = open("/proc/self/environ").read()
    except PermissionError:
        kernel_says = ""
    print(json.dumps([__name__, __file__, sys.argv, os.getcwd(), dict(os.environ), kernel_says]))
"""


def test_a_program_sees_what_python_would_show_it(everywhere: Caller) -> None:
    done = everywhere.plugin(SURROUNDINGS, "one", "-")
    assert done.status == 0, done
    assert done.errors == b""
    name, file, argv, folder, environment, kernel_says = json.loads(done.out)
    path = str(everywhere.folder / "plugin.py")
    assert name == "__main__"
    assert file == path
    assert argv == [path, "one", "-"]
    assert folder != str(everywhere.folder)
    assert SECRET not in json.dumps([environment, kernel_says])
    assert "API_TOKEN" not in environment


def test_arguments_arrive_as_they_were_given(twice: Caller) -> None:
    source = "import os, sys\nsys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    given = ["one", "", "two words", "ü", "a\nb", "--level", "-q", "--", "-"]
    done = twice.plugin(source, "--", *given)
    assert (done.status, done.errors) == (0, b"")
    assert done.out.split("\0") == given


def test_options_before_and_after_the_file(caller: Caller) -> None:
    path = str(caller.write("plugin.py", "import sys; print(sys.argv[1:])"))
    result = caller.folder / "result.json"
    assert_refused(caller.run("run", "one", path), "one", "no such file")
    for words in (
        ["--level=strict", "-q", path, "a", "b"],
        [path, "--level", "strict", "a", "-q", "b"],
        ["-q", path, "a", "--level=strict", "--", "b"],
        ["--level", "minimal", path, "--level", "strict", "-q", "a", "b"],  # the last one counts
    ):
        done = caller.run("run", f"--result-file={result}", *words)
        assert (done.status, done.out, done.err) == (0, "['a', 'b']\n", "")
        assert json.loads(result.read_text())["level"] == "strict"
    done = caller.run("run", "-q", "--", path, "--level", "none", "--raw")
    assert (done.status, done.out, done.err) == (0, "['--level', 'none', '--raw']\n", "")


def test_a_relative_path_counts_from_the_callers_folder(caller: Caller) -> None:
    path = caller.write("below/plugin.py", "import sys; print(__file__, sys.argv[0])")
    done = caller.run("run", "-q", "below/plugin.py")
    assert (done.out, done.err) == (f"{path} {path}\n", "")


def test_stdin_is_a_pipe(everywhere: Caller) -> None:
    content = os.urandom(300_000)
    source = "import sys; data = sys.stdin.buffer.read(); sys.stdout.buffer.write(data[::-1])"
    done = everywhere.plugin(source, stdin=content)
    assert (done.status, done.errors) == (0, b"")
    assert done.output == content[::-1]


def test_stdin_is_a_file(twice: Caller) -> None:
    with open(twice.write("input.txt", "first\nsecond\n")) as stdin:
        done = twice.plugin("import sys\nprint(input(), sys.stdin.read(), sys.stdin.seekable())", stdin=stdin)
    assert (done.status, done.out, done.err) == (0, "first second\n False\n", ""), "the caller's own file stays outside"


@pytest.mark.parametrize("closed", [0, 1, 2, 3])
def test_a_closed_standard_stream(caller: Caller, closed: int) -> None:
    """As /dev/null: 0, 1, 2, or with 3 all of them. What is open works."""
    source = """
        import os, stat, sys
        assert not any(stat.S_ISSOCK(os.fstat(fd).st_mode) for fd in range(3)), "a socket of psie's is inside"
        print("out", repr(sys.stdin.read()))
        print("err", file=sys.stderr)
        sys.exit(7)
    """
    line = caller.plugin_line(source)
    redirections = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]
    shell = ["sh", "-c", f'exec "$@" {redirections[closed]}', "sh", *caller.command(*line)]
    done = subprocess.run(
        shell, env=caller.environment, capture_output=True, timeout=cli_harness.SECONDS, check=False, input=b"text"
    )
    assert done.returncode == 7, done
    assert done.stdout == (b"" if closed in (1, 3) else b"out ''\n" if closed == 0 else b"out 'text'\n")
    assert done.stderr == (b"" if closed in (2, 3) else b"err\n")


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-", "<&- 2>&-"])
def test_what_psie_says_to_a_closed_stream_is_lost(caller: Caller, closed: str) -> None:
    """And goes nowhere else: stdout may hold a reply alone."""
    path = caller.write("plugin.py", "def main():\n    return 7\nif __name__ == '__main__':\n    print('out')")
    lines = {
        ("run", "--level", "strict", "--timeout", "9", str(path)): (0, b"out\n"),
        ("run", "--level", "high", str(path)): (125, b""),
        ("call", "--level", "strict", f"{path}:main"): (0, b"7\n"),
        ("explain", "--level", "high"): (125, b""),
        ("kill", "nobody"): (125, b""),
    }
    for line, (status, out) in lines.items():
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *caller.command(*line)]
        done = subprocess.run(
            shell, env=caller.environment, cwd=caller.folder, capture_output=True, timeout=cli_harness.SECONDS, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (status, b"" if ">&- " in closed else out, b""), line


@pytest.mark.parametrize(
    "line", [("levels",), ("explain",), ("--version",), ("--help",), ("ps",), ("completion", "bash"), ("doctor",)]
)
def test_a_full_disk_behind_stdout(caller: Caller, line: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = caller.run(*line, stdout=full)
    assert (done.status, done.err) == (125, "psie: standard output cannot be written: No space left on device\n")


@pytest.mark.parametrize("command", ["spec", "learn"])
def test_what_a_command_has_made_and_stdout_does_not_take(caller: Caller, command: str) -> None:
    """It is no failure of a sandbox."""
    options = ["--dry-run"] if command == "learn" else []
    line = [command, *options, str(caller.write("plugin.py", "print('out')"))]
    with open("/dev/full", "wb") as full:
        done = caller.run(*line, stdout=full)
    assert done.status == 125
    assert [text for text in done.err.splitlines() if "space" in text] == [
        "psie: standard output cannot be written: No space left on device"
    ]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        done = caller.run(*line, stdout=nobody)
    assert done.status == 1
    assert "pipe" not in done.err.lower()


@pytest.mark.parametrize("file", ["nope.py", "folder", "-", ""])
def test_explain_looks_at_its_file(caller: Caller, file: str) -> None:
    (caller.folder / "folder").mkdir()
    assert_refused(caller.run("explain", file), file)
    assert_refused(caller.run("explain", "--json", file), file)


def test_an_argument_that_is_nested_too_deeply(caller: Caller) -> None:
    assert_refused(caller.call("def main(x): pass", "[" * 5000 + "]" * 5000), "nested too deeply")


@pytest.mark.parametrize("damage", ["file", "link", "work"])
def test_gc_where_the_state_is_no_folder(somebody: Caller, tmp_path: Path, damage: str) -> None:
    state = somebody.folder / "state"
    (state / "psie").mkdir(parents=True)
    if damage == "work":
        (state / "psie" / "work").write_text("")
    else:
        (state / "psie").rmdir()
        (state / "psie").write_text("") if damage == "file" else (state / "psie").symlink_to("nowhere")
    for made in (state, state / "psie", *(state / "psie").glob("*")):
        os.lchown(made, somebody.uid, somebody.uid)
    done = somebody.run("gc", env={"XDG_STATE_HOME": str(state)})
    assert_refused(done, str(state / "psie"))
    assert ("is no folder" in done.err) is (damage != "work")
    if damage != "work":
        assert somebody.run("history", env={"XDG_STATE_HOME": str(state)}).err == done.err


@pytest.mark.parametrize("what", ["run folder that is no folder", "work folder without rights"])
def test_a_folder_of_psies_own_that_cannot_be_used_is_said_with_the_mend(somebody: Caller, what: str) -> None:
    folder = somebody.folder / "own"
    (folder / "psie").mkdir(parents=True)
    if what.startswith("run"):
        (folder / "psie").rmdir()
        (folder / "psie").write_text("")
        variable, mend = "XDG_RUNTIME_DIR", "psie is no folder: remove it, or set XDG_RUNTIME_DIR"
    else:
        (folder / "psie").chmod(0)
        variable, mend = "XDG_STATE_HOME", "psie/work: Permission denied: see to its rights"
    for made in (folder, folder / "psie"):
        os.chown(made, somebody.uid, somebody.uid)
    path = somebody.write("plugin.py", "print('out')")
    assert_refused(somebody.run("run", "-q", "--level", "minimal", path, env={variable: str(folder)}), mend)
    assert_refused(somebody.run("gc", env={variable: str(folder)}), mend)
    (folder / "psie").chmod(0o700)


@pytest.mark.parametrize("line", [["run"], ["check"], ["learn", "--dry-run"]], ids=lambda line: line[0])
def test_a_zipapp_is_told_from_a_broken_file(caller: Caller, line: list[str]) -> None:
    caller.write("app/__main__.py", "print('out')")
    zipapp.create_archive(caller.folder / "app", caller.folder / "app.pyz", "/usr/bin/python3")
    assert_refused(caller.run(*line, "app.pyz"), "app.pyz is a zip archive: unpack it")


NO_TEXT = {
    "compiled Python: give the .py file": importlib.util.MAGIC_NUMBER + bytes(12) + b"\xe3",
    "a text in UTF-16: save it as UTF-8": "print(1)".encode("utf-16"),
    "a compiled program (ELF): give a Python file": b"\x7fELF\2\1\1\0",
    "a PDF document: give a Python file": b"%PDF-1.7\n\0",
    "no text, because there is a null byte in it: give": b"print(1)\r\n\0",
}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("kind", NO_TEXT)
def test_what_is_no_text_is_told_for_what_it_is(caller: Caller, command: str, kind: str) -> None:
    (caller.folder / "plugin.py").write_bytes(NO_TEXT[kind])
    assert_refused(caller.run(command, "plugin.py"), f"plugin.py is {kind}")


def test_accepted_files_that_cannot_be_read_or_forgotten(somebody: Caller) -> None:
    """Nothing is said of what nobody can tell."""
    state = {"XDG_STATE_HOME": str(somebody.folder / "state")}
    (somebody.folder / "state").mkdir()
    os.chown(somebody.folder / "state", somebody.uid, somebody.uid)
    own = somebody.write("psie.toml", "[limits]\nmax_open_files = 60\n")
    assert somebody.run("trust", own, env=state).status == 0
    records = somebody.folder / "state" / "psie"
    (records / "trusted").chmod(0o500)
    assert_refused(somebody.run("trust", "--forget", own, env=state), "trusted cannot be changed (Permission denied)")
    records.chmod(0)
    for line in (["--list"], ["--forget", own]):
        assert_refused(somebody.run("trust", *line, env=state), "trusted cannot be used as a folder (Permission denied)")
    records.chmod(0o700)
    (records / "trusted").chmod(0o700)
    assert somebody.run("trust", "--forget", own, env=state).status == 0


def test_too_few_open_files_for_psie_itself(caller: Caller) -> None:
    path = caller.write("plugin.py", "print('out')")
    shell = ["sh", "-c", 'ulimit -n 20; exec "$@"', "sh", *caller.command("run", "-q", path)]
    done = subprocess.run(
        shell, env=caller.environment, cwd=caller.folder, capture_output=True, timeout=cli_harness.SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"Too many open files: raise the limit of open files (ulimit -n), or close" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_what_one_may_not_look_at_is_told_from_what_is_not_there(somebody: Caller, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    (locked / "inner").mkdir(parents=True)
    (locked / "x.py").touch()
    somebody.write("plugin.py", "pass").chmod(0o755)
    tmp_path.chmod(0o755)
    locked.chmod(0o600)
    inner, script = str(locked / "inner"), str(locked / "x.py")
    for words in (["run", script], ["call", f"{script}:main"], ["check", script], ["explain", script]):
        assert_refused(somebody.run(*words), "may not look into a folder that it lies in")
    for options in (["--ro", script], ["--rw", inner], ["--ro", ".", "--chdir", inner]):
        assert_refused(somebody.run("run", *options, "plugin.py"), "may not look into a folder that it lies in")
    (somebody.folder / "mine.py").touch(0o600)
    assert_refused(somebody.run("run", "mine.py"), "mine.py cannot be read (Permission denied): see to its rights")


def test_a_full_disk_behind_the_plugins_output(caller: Caller) -> None:
    with open("/dev/full", "wb") as full:
        done = caller.plugin("print('out')", stdout=full)
    assert (done.status, done.err) == (125, "psie: standard output: No space left on device\n")
    path = caller.write("plugin.py", "def main(): return 1")
    with open("/dev/full", "wb") as full:
        done = caller.run("call", "-q", f"{path}:main", stdout=full)
    assert (done.status, done.err) == (125, "psie: standard output: No space left on device\n")


def test_a_working_directory_that_is_gone(caller: Caller) -> None:
    path = caller.write("plugin.py", "print('out')")
    for line, status in ((("run", "-q", str(path)), 0), (("run", "-q", "--ro", ".", str(path)), 125), (("spec", "x"), 125)):
        shell = ["sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh", *caller.command(*line)]
        done = subprocess.run(
            shell, env=caller.environment, cwd=caller.folder, capture_output=True, timeout=cli_harness.SECONDS, check=False
        )
        assert done.returncode == status, done
        if status:
            said = done.stderr.decode().splitlines()[-1]  # the shell in psie may have complained before
            assert said == "psie: the working directory is gone: cd to one that is there"


@pytest.mark.parametrize("level", LEVELS)
def test_a_plugin_from_a_pipe_has_nothing_beside_it(caller: Caller, level: str) -> None:
    """Though numbers that it names are those of psie's open files."""
    numbers = "print(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)\n"
    done = caller.run("run", "-q", "--level", level, "/dev/stdin", stdin=numbers.encode())
    assert (done.status, done.out, done.err) == (0, "0 1 2 3 4 5 6 7 8 9\n", "")


def test_a_check_of_a_pipe_runs_what_was_read(caller: Caller) -> None:
    done = caller.run("check", "--run", "/dev/stdin", stdin=b"raise SystemExit(3)")
    assert (done.status, done.out.count("status 3")) == (1, 4)


@pytest.mark.parametrize("name", ["plugin", "plugin-1.2.py", "a.b.c"])
def test_a_call_does_not_mind_the_files_name(caller: Caller, name: str) -> None:
    path = caller.write(name, "def main(): return 1")
    done = caller.run("call", "-q", "--level", caller.level, f"{path}:main")
    assert (done.status, done.out, done.err) == (0, "1\n", "")


def test_an_exception_without_words_is_told_by_its_kind(caller: Caller) -> None:
    path = caller.write("plugin.py", "def main(): raise ValueError")
    out = caller.folder / "out.json"
    assert caller.run("call", "-q", "--result-file", str(out), f"{path}:main").status == 1
    assert json.loads(out.read_text())["reason"] == "ValueError"


def test_names_in_a_locale_without_unicode(caller: Caller, tmp_path: Path) -> None:
    """Files are bytes; what is said is UTF-8."""
    if not shutil.which("localedef") or not os.path.isdir("/usr/share/i18n/locales"):
        pytest.skip("this host has nothing to make a locale of (Debian: apt-get install locales)")
    subprocess.run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", tmp_path / "de_DE.ISO-8859-1"], check=False)
    env = {"LOCPATH": str(tmp_path), "LC_ALL": "de_DE.ISO-8859-1"}
    python = [sys.executable, "-c", "import locale; print(locale.getpreferredencoding())"]
    own = subprocess.run(python, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    assert own.stdout == "ISO-8859-1\n"
    path = caller.write("caf\u00e9 \u263a.py", "import sys\nprint(ascii(__file__), ascii(sys.argv[1:]))")
    done = caller.run("run", "-q", "--level", "strict", "--ro", str(path), str(path), "\u263a", env=env)
    assert (done.status, done.err) == (0, ""), done
    assert done.out == ascii(str(path)) + " " + ascii(["\u263a"]) + "\n"
    done = caller.run("check", str(path), env=env)
    assert (done.status, "caf\u00e9" in done.err) == (0, True), done


@pytest.mark.long
@pytest.mark.parametrize("line", [("history",), ("levels",), ("run", "--level", "high", "x")], ids=lambda line: line[0])
def test_an_early_interrupt_is_no_traceback(caller: Caller, line: tuple[str, ...]) -> None:
    """At whatever moment of psie's start it comes; before that it is Python's to say something."""
    for delay in range(20):
        with caller.start(*line) as process:
            time.sleep(delay / 100)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=cli_harness.SECONDS)
        assert b"/sandbox/" not in err


def test_output_and_errors_are_apart_and_byte_exact(everywhere: Caller) -> None:
    source = """
        import os
        os.write(1, bytes(range(256)) * 300)
        os.write(2, bytes(reversed(range(256))) * 300)
        os.write(1, b"no newline at the end \\r")
    """
    done = everywhere.plugin(source)
    assert done.status == 0
    assert done.output == bytes(range(256)) * 300 + b"no newline at the end \r"
    assert done.errors == bytes(reversed(range(256))) * 300


ENDINGS = {
    "end": ("print('x')", 0, ""),
    "exit-7": ("import sys; sys.exit(7)", 7, ""),
    "exit-none": ("import sys; sys.exit()", 0, ""),
    "exit-256": ("import sys; sys.exit(256 + 3)", 3, ""),
    "exit-text": ("raise SystemExit('a text')", 1, "a text\n"),
    "_exit": ("import os; os._exit(3)", 3, ""),
    "SIGSEGV": ("import ctypes; ctypes.string_at(0)", 139, None),
    "SIGKILL": ("import os; os.kill(os.getpid(), 9)", 137, None),
    "SIGABRT": ("import os; os.abort()", 134, None),
    "SIGINT": ("raise KeyboardInterrupt", 130, None),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_status_is_the_programs(twice: Caller, ending: str) -> None:
    source, status, errors = ENDINGS[ending]
    done = twice.plugin(source)
    assert done.status == status, done
    assert done.output == (b"x\n" if ending == "end" else b"")
    if errors is not None:
        assert done.err == errors
    elif ending != "SIGINT":
        assert ending in done.err
    assert "sandbox" not in done.err, done.err


def test_an_uncaught_exception_is_shown_as_python_shows_it(everywhere: Caller) -> None:
    source = "def inner():\n    return {}['key']\n\nprint('before')\ninner()\n"
    done = everywhere.plugin(source)
    assert (done.status, done.out) == (1, "before\n")
    path = everywhere.folder / "plugin.py"
    python = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.err == python.stderr
    assert "return {}['key']" in done.err


def test_an_uncaught_interrupt_is_shown_without_frames_of_psie(twice: Caller) -> None:
    done = twice.plugin("def inner():\n    raise KeyboardInterrupt\n\ninner()\n")
    assert done.status == 130
    assert done.err.startswith("Traceback (most recent call last):\n"), done.err
    assert "\nKeyboardInterrupt\n" in done.err
    assert re.findall(r'File "([^"]*)"', done.err) == [str(twice.folder / "plugin.py")] * 2


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (b"print('before')\nx = = 1\n", "x = = 1"),
        (b"print('before')\nif True:\nx = 1\n", "x = 1"),
    ],
    ids=["syntax", "indentation"],
)
def test_a_file_that_is_no_python_is_shown_with_its_line(twice: Caller, source: bytes, shown: str) -> None:
    done = twice.plugin(source)
    assert (done.status, done.output) == (1, b"")
    path = twice.folder / "plugin.py"
    python = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.err == python.stderr
    assert shown in done.err


def test_a_file_that_is_not_utf_8_is_shown_with_its_line(twice: Caller) -> None:
    done = twice.plugin(b"print('before')\nname = '\xe4'\n")
    assert (done.status, done.output) == (1, b"")
    assert "SyntaxError" in done.err
    assert "line 2" in done.err
    assert str(twice.folder / "plugin.py") in done.err
    assert "psie: " not in done.err


def test_a_file_with_another_declared_encoding_runs(twice: Caller) -> None:
    done = twice.plugin("# coding: latin-1\nprint('ä' == chr(0xe4))\n".encode("latin-1"))
    assert (done.out, done.err) == ("True\n", "")


def test_modules_and_packages_beside_the_file(everywhere: Caller) -> None:
    everywhere.write("helper.py", "import deeper\nvalue = deeper.value + 1\n")
    everywhere.write("deeper.py", "value = 40")
    everywhere.write("package/__init__.py", "from .inner import value\n")
    everywhere.write("package/inner.py", "value = 'inner'\n")
    everywhere.write("secret.txt", SECRET)
    done = everywhere.plugin("import helper\nimport package\nprint(helper.value, package.value, package.__file__)")
    assert (done.status, done.out, done.err) == (0, f"41 inner {everywhere.folder}/package/__init__.py\n", "")


def test_what_else_lies_beside_the_file_is_not_shown(everywhere: Caller) -> None:
    everywhere.write("secret.txt", SECRET)
    everywhere.write("other.py", f"value = '{SECRET}'")
    if everywhere.level == "minimal" and not everywhere.is_root:
        pytest.skip("the README says so: without root the plugin reads what its caller reads")
    source = """
        import os
        folder = os.path.dirname(__file__)
        for name in ("secret.txt", "oth" + "er.py"):
            try:
                print(open(os.path.join(folder, name)).read())
            except OSError as error:
                print(type(error).__name__)
    """
    done = everywhere.plugin(source)
    assert done.status == 0
    assert SECRET not in done.out


def test_threads_and_atexit_functions_are_finished(twice: Caller) -> None:
    source = """
        import atexit, sys, threading, time
        atexit.register(print, "atexit")
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
        sys.stdout.write("main ")
    """
    done = twice.plugin(source)
    assert (done.status, done.out, done.err) == (0, "main thread\natexit\n", "")


def test_env_passes_on_what_is_named(everywhere: Caller) -> None:
    source = "import os; print([os.environ.get(name) for name in ('GIVEN', 'EMPTY', 'PASSED', 'API_TOKEN', 'HOME')])"
    options = ["--env", "GIVEN=a=b c", "--env=EMPTY=", "--env", "PASSED", "--env", "HOME=/elsewhere"]
    done = everywhere.plugin(source, options=options, env={"PASSED": "on"})
    assert (done.out, done.err) == ("['a=b c', '', 'on', None, '/elsewhere']\n", "")


def test_ro_shows_a_file_and_a_folder(everywhere: Caller) -> None:
    file = everywhere.write("shown/file.txt", "of the file")
    inner = everywhere.write("folder/inner/data.txt", "of the folder")
    hidden = everywhere.write("shown/hidden.txt", SECRET)
    source = f"""
        print(open({str(file)!r}).read(), open({str(inner)!r}).read())
        for path in ({str(file)!r}, {str(inner.parent / "new.txt")!r}):
            try:
                open(path, "w")
            except OSError as error:
                print("not written")
        try:
            print(open({str(hidden)!r}).read())
        except OSError as error:
            print("not read")
    """
    done = everywhere.plugin(source, options=["--ro", "shown/file.txt", "--ro", str(everywhere.folder / "folder")])
    # At level minimal without root the plugin has the caller's id, and can read what the caller can.
    own_id = everywhere.level == "minimal" and not everywhere.is_root
    beside = SECRET if own_id else "not read"
    assert (done.status, done.out, done.err) == (0, f"of the file of the folder\nnot written\nnot written\n{beside}\n", "")
    assert file.read_text() == "of the file"
    assert not (inner.parent / "new.txt").exists()


# -- limits, and what is told of them -----------------------------------------------------------------------------------


def result_of(caller: Caller, source: str, *options: str, status: int = 0, **how: Any) -> dict[str, Any]:
    """Run it and read its result file."""
    path = caller.folder / "result.json"
    done = caller.plugin(source, options=["--result-file", str(path), *options], **how)
    assert done.status == status, done
    result: dict[str, Any] = json.loads(path.read_text())
    assert result["exit_code"] == status
    assert sorted(entry.name for entry in caller.folder.iterdir() if "result" in entry.name) == ["result.json"]
    return result


def detail(result: dict[str, Any], protection: str) -> str:
    """Mechanism and detail of one protection."""
    (found,) = (item for item in result["protections"] if item["name"] == protection)
    return f"{found['mechanism']}; {found['detail']}"


def test_limits_from_options(everywhere: Caller) -> None:
    result = result_of(everywhere, "pass", "--memory", "64M", "--timeout", "7", "--cpu", "20", "--pids", "3")
    assert "64 MB" in detail(result, "memory") or "64 MB" in str(result)
    assert "7 s" in detail(result, "wall clock")
    assert "20 %" in detail(result, "CPU")
    assert "0 subprocesses, 3 threads" in detail(result, "processes and threads")


@pytest.mark.parametrize(("given", "said"), [("1G", "1024 MB"), ("65536K", "64 MB"), ("96", "96 MB"), ("0.125g", "128 MB")])
def test_sizes_of_memory(caller: Caller, given: str, said: str) -> None:
    assert said in detail(result_of(caller, "pass", "--memory", given), "memory")


THREADS = """
    import threading, sys
    event = threading.Event()
    started = []
    try:
        for _ in range(8):
            thread = threading.Thread(target=event.wait)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        print(error)
    event.set()
    print(len(started))
"""


def test_pids_bounds_threads(twice: Caller) -> None:
    done = twice.plugin(THREADS, options=["--pids", "3"])
    assert done.status == 0, done
    error, count = done.out.splitlines()
    assert error == "can't start new thread"
    assert 1 <= int(count) <= 3
    assert twice.plugin(THREADS, options=["--pids", "20"]).out == "8\n"


SUBPROCESS = """
    import subprocess, sys
    done = subprocess.run([sys.executable, "-S", "-c", "print(6 * 7)"], capture_output=True, text=True)
    print(done.stdout, done.stderr)
"""


def test_allow_subprocess(everywhere: Caller) -> None:
    done = everywhere.plugin(SUBPROCESS, options=["--allow-subprocess"])
    if everywhere.has_processes:
        assert (done.status, done.out.split(), done.err) == (0, ["42"], "")
    else:
        assert_refused(done, "without a PID namespace or a cgroup", "--allow-subprocess")
    done = everywhere.plugin(SUBPROCESS)
    assert done.status == 126, done
    assert "--allow-subprocess" in done.err


def test_the_result_file_tells_everything(everywhere: Caller) -> None:
    result = result_of(everywhere, "import sys; sys.exit(7)", status=7)
    assert sorted(result) == [
        *("began", "exit_code", "file_operations", "kernel", "level", "limits", "max_tasks", "network", "outcome", "plugin"),
        *("protections", "psie", "reason", "sampling", "seconds", "sha256", "telemetry", "uid", "violations"),
    ]
    assert result["plugin"] == str(everywhere.folder / "plugin.py")
    assert result["sha256"] == hashlib.sha256((everywhere.folder / "plugin.py").read_bytes()).hexdigest()
    assert (result["level"], result["reason"], result["violations"]) == (everywhere.level, "exited with status 7", [])
    assert result["telemetry"]["plugin_id"] == "plugin.py"
    assert result["telemetry"]["exit_code"] == 7
    assert result["telemetry"]["cleanup_successful"] is True
    assert result["telemetry"]["peak_memory_mb"] > 1
    assert result["telemetry"]["start_time"] < result["telemetry"]["end_time"]
    states = {}
    for protection in result["protections"]:
        assert {"name", "state", "mechanism", "detail"} <= protection.keys()
        assert protection["state"] in ("enforced", "substituted", "missing")
        states[protection["name"]] = protection["state"]
    assert states["own process"] == states["no_new_privs"] == states["no capabilities"] == "enforced"
    if everywhere.level != "minimal":
        assert states["PID namespace"] == states["mount namespace"] == "enforced"


def test_the_result_file_tells_of_an_exception(twice: Caller) -> None:
    result = result_of(twice, "raise ValueError('wrong')", status=1)
    assert result["reason"] == "ValueError: wrong"


BOMB = """
import os, signal
try:
    while os.fork():
        pass
    signal.pause()
except BlockingIOError:
    print("refused")
"""


def test_the_result_file_tells_what_the_kernel_counted(caller: Caller) -> None:
    """Also in a run that is too short to be watched."""
    if "pids" not in host.facts().controllers:
        pytest.skip("no pids controller of ours here: make vm-test has one")
    caller.write("settings.toml", "[limits]\nmax_subprocess_count = 3\nmax_thread_count = 1\n")
    result = result_of(caller, BOMB, "--allow-subprocess", "--level", "strict", "--config", "settings.toml")
    (counted,) = [each for each in result["violations"] if each["details"]["limit"] == "pids"]
    assert counted["details"]["count"] == 1
    assert result["telemetry"]["violations"] == result["violations"]


def test_the_result_file_replaces_an_older_one_and_is_the_callers(caller: Caller) -> None:
    path = caller.write("result.json", "old")
    result = result_of(caller, "pass", "--level", "maximum")
    assert result["level"] == "maximum"
    assert path.stat().st_uid == caller.uid


def test_summary(twice: Caller) -> None:
    done = twice.plugin("import sys; sys.exit(7)", options=["--summary"])
    lines = done.err.splitlines()
    assert done.status == 7
    assert 2 <= len(lines) <= 5
    assert all(line.startswith("psie: ") for line in lines)
    assert lines[0].startswith(f"psie: level {twice.level}, status 7, ")
    assert "no_new_privs" in lines[1]
    assert lines[1].startswith("psie: enforced: ")


def test_the_warning_names_the_substitutes(twice: Caller) -> None:
    path = str(twice.write("plugin.py", "print('x')"))
    explained = json.loads(twice.run("explain", "--level", twice.level, "--json").out)
    weakened = [item for item in explained["protections"] if item["state"] == "substituted"]
    done = twice.run("run", "--level", twice.level, path)
    assert done.out == "x\n"
    assert done.err.count("\n") == (1 if weakened else 0), done.err
    for item in weakened:
        assert f"{item['name']}: {item['mechanism']}" in done.err
    for quiet in ("-q", "--quiet"):
        assert twice.run("run", quiet, "--level", twice.level, path).err == ""


def test_require_limits(twice: Caller) -> None:
    facts = host.facts()
    own = twice.is_root or os.getuid() != 0  # the facts are those of whoever runs the tests
    if own and facts.cgroup_kind and {"memory", "pids", "cpu"} <= set(facts.controllers):
        pytest.skip("this host enforces every limit")
    done = twice.plugin("print('x')", options=["--require-limits"])
    assert_refused(done, "cgroup", "--require-limits")


def test_a_config_file(caller: Caller) -> None:
    caller.write(
        "settings.toml",
        """
        [isolation]
        level = "strict"
        [limits]
        max_memory_mb = 64
        max_execution_time_seconds = 9
        [permissions]
        blocked_modules = ["statistics"]
        """,
    )
    path = caller.write("plugin.py", "import sys\nprint('in')\nimport statistics")
    result = caller.folder / "result.json"
    done = caller.run("run", "-q", "--config", "settings.toml", "--timeout", "8", "--result-file", result, path)
    assert (done.status, done.out) == (1, "in\n")
    assert "ImportError" in done.err or "ModuleNotFoundError" in done.err
    told = json.loads(result.read_text())
    assert told["level"] == "strict"
    assert "64 MB" in detail(told, "memory")
    assert "8 s" in detail(told, "wall clock")  # an option is stronger than the file
    caller.write("settings.toml", '[isolation]\nlevel = "maximum"\n')  # the same path, another content
    done = caller.run("run", "-q", "--config", "settings.toml", "--result-file", result, path)
    assert done.status == 0, done
    assert json.loads(result.read_text())["level"] == "maximum"


def test_variables(caller: Caller) -> None:
    path = caller.write("plugin.py", "pass")
    caller.write("settings.toml", "[limits]\nmax_memory_mb = 64\n")
    result = caller.folder / "result.json"
    variables = {
        "SANDBOX_ISOLATION_LEVEL": "strict",
        "SANDBOX_DEFAULT_MEMORY_MB": "96",
        "SANDBOX_DEFAULT_TIMEOUT_SECONDS": "9",
    }
    line = ["run", "-q", "--result-file", str(result), str(path)]
    assert caller.run(*line, env=variables).status == 0
    told = json.loads(result.read_text())
    assert told["level"] == "strict"
    assert "96 MB" in detail(told, "memory")
    assert "9 s" in detail(told, "wall clock")
    assert caller.run(*line, "--config", "settings.toml", "--level", "minimal", env=variables).status == 0
    told = json.loads(result.read_text())
    assert told["level"] == "minimal"
    assert "64 MB" in detail(told, "memory")
    assert "9 s" in detail(told, "wall clock")
    assert_refused(caller.run(*line, env={"SANDBOX_ISOLATION_LEVEL": "stict"}), "SANDBOX_ISOLATION_LEVEL", "strict")
    assert_refused(caller.run(*line, env={"SANDBOX_DEFAULT_MEMORY_MB": "much"}), "SANDBOX_DEFAULT_MEMORY_MB")


# -- mistakes -----------------------------------------------------------------------------------------------------------


MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no file": (["run"], ("FILE", "--help")),
    "standard input": (["run", "-"], ("-: there is no such file", "/dev/stdin")),
    "missing file": (["run", "missing.py"], ("missing.py", "no such file")),
    "folder": (["run", "."], ("directory", "give the Python file")),
    "level": (["run", "--level", "strct", "plugin.py"], ("strct", "did you mean strict", "minimal, standard")),
    "level unlike any": (["run", "--level", "xyz", "plugin.py"], ("xyz", "minimal, standard, strict, maximum")),
    "negative memory": (["run", "--memory", "-5M", "plugin.py"], ("--memory",)),
    "no memory": (["run", "--memory", "0", "plugin.py"], ("--memory",)),
    "memory in words": (["run", "--memory", "much", "plugin.py"], ("--memory much",)),
    "memory in terabytes": (["run", "--memory", "5T", "plugin.py"], ("--memory 5T", "K, M or G")),
    "empty memory": (["run", "--memory", "", "plugin.py"], ("--memory",)),
    "memory not a number": (["run", "--memory", "nan", "plugin.py"], ("--memory",)),
    "endless memory": (["run", "--memory", "inf", "plugin.py"], ("--memory",)),
    "negative timeout": (["run", "--timeout", "-1", "plugin.py"], ("--timeout",)),
    "timeout not a number": (["run", "--timeout", "nan", "plugin.py"], ("--timeout",)),
    "timeout in words": (["run", "--timeout", "soon", "plugin.py"], ("--timeout soon",)),
    "no cpu": (["run", "--cpu", "0", "plugin.py"], ("--cpu",)),
    "cpu in words": (["run", "--cpu", "all", "plugin.py"], ("--cpu all",)),
    "no pids": (["run", "--pids", "0", "plugin.py"], ("--pids",)),
    "half pids": (["run", "--pids", "1.5", "plugin.py"], ("--pids 1.5", "whole number")),
    "very negative pids": (["run", "--pids", "--5", "plugin.py"], ("--pids --5", "whole number")),
    "report over the plugin": (["run", "--report", "plugin.py", "plugin.py"], ("--report plugin.py", "give another one")),
    "result over the plugin": (
        ["run", "--result-file", "./plugin.py", "plugin.py"],
        ("--result-file ./plugin.py", "of the plugin"),
    ),
    "empty plugin": (["run", ""], ("the name of the plugin is empty", "give the path")),
    "missing ro": (["run", "--ro", "missing", "plugin.py"], ("--ro missing", "no such")),
    "ro of proc": (["run", "--ro", "/proc", "plugin.py"], ("--ro /proc",)),
    "ro below proc": (["run", "--ro", "/proc/self/fd", "plugin.py"], ("--ro /proc/self/fd",)),
    "ro of all": (["run", "--ro", "/", "plugin.py"], ("--ro /",)),
    "empty ro": (["run", "--ro", "", "plugin.py"], ("--ro is empty", "give a path")),
    "empty rw": (["run", "--rw", "", "plugin.py"], ("--rw is empty", "give a path")),
    "empty chdir": (["run", "--chdir", "", "plugin.py"], ("--chdir is empty", "give a path")),
    "empty config": (["run", "--config", "", "plugin.py"], ("the name of the settings file is empty: give the path",)),
    "check of a variable": (["check", "--env", "A=1", "plugin.py"], ("--env", "give --run too")),
    "plugins nowhere": (["plugins", "run", "nowhere"], ("psie: nowhere cannot be opened as a plugin folder", "check the path")),
    "check of a pipe": (["check", "--run", "--config", "/dev/stdin", "plugin.py"], ("--config /dev/stdin", "a regular file")),
    "unknown option": (["run", "--levle", "strict", "plugin.py"], ("--levle", "--level")),
    "option without its value": (["run", "plugin.py", "--level"], ("--level",)),
    "flag with a value": (["run", "--raw=yes", "plugin.py"], ("--raw",)),
    "env without a name": (["run", "--env", "=value", "plugin.py"], ("--env", "NAME=VALUE")),
    "env that is not there": (["run", "--env", "MISSING", "plugin.py"], ("--env MISSING", "MISSING=VALUE")),
    "result without folder": (["run", "--result-file", "missing/out.json", "plugin.py"], ("--result-file", "missing")),
    "result is a folder": (["run", "--result-file", ".", "plugin.py"], ("--result-file",)),
    "missing config": (["run", "--config", "missing.toml", "plugin.py"], ("missing.toml",)),
    "config of garbage": (["run", "--config", "plugin.py", "plugin.py"], ("plugin.py",)),
    "config with unknown key": (["run", "--config", "unknown.toml", "plugin.py"], ("unknown.toml", "max_memroy_mb")),
    "call of no function": (["call", "plugin.py"], ("plugin.py", "FILE:FUNCTION")),
    "call of garbage": (["call", "plugin.py:1x"], ("plugin.py:1x", "FILE:FUNCTION")),
    "call of nothing": (["call"], ("FILE:FUNCTION",)),
    "call of a missing file": (["call", "missing.py:main"], ("missing.py", "no such file")),
    "call with bad json": (["call", "--arg", "{x}", "plugin.py:main"], ("--arg {x}", "JSON")),
    "call with bad keyword": (["call", "--kwarg", "1x=2", "plugin.py:main"], ("--kwarg 1x=2", "NAME=JSON")),
    "call with bad json keyword": (["call", "--kwarg", "x=", "plugin.py:main"], ("--kwarg x=", "JSON")),
    "call with a keyword twice": (
        ["call", "--kwarg", "x=1", "--kwarg", "x=2", "plugin.py:main"],
        ("--kwarg x=2: x has a value already: give it once",),
    ),
    "command": (["rnu", "plugin.py"], ("rnu", "--help")),
    "explain of no level": (["explain", "--level", "strct"], ("strct", "did you mean strict")),
    "selftest of no level": (["selftest", "--level", "strct"], ("strct", "did you mean strict")),
    "selftest of no attack": (["selftest", "unshaer"], ("unshaer", "did you mean unshare")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(caller: Caller, mistake: str) -> None:
    caller.write("plugin.py", "print('has run')")
    caller.write("unknown.toml", "[limits]\nmax_memroy_mb = 5\n")
    words, parts = MISTAKES[mistake]
    assert_refused(caller.run(*words), *parts)
    assert harness.wait_until(cli_harness.engine_is_gone)


def test_an_unreadable_file_is_one_sentence(somebody: Caller) -> None:
    path = somebody.write("plugin.py", "print('has run')")
    path.chmod(0)
    assert_refused(somebody.run("run", path), str(path), "cannot be read", "ermission")
    path.chmod(0o600)
    shown = somebody.write("shown.txt", "text")
    shown.chmod(0)
    assert_refused(somebody.run("run", "--ro", shown, path), f"--ro {shown}", "read")
    (somebody.folder / "closed").mkdir(0o700)
    assert_refused(somebody.run("run", "--result-file", "closed/out.json", path), "--result-file closed/out.json")


def test_a_file_of_a_terabyte_is_one_sentence(caller: Caller) -> None:
    path = caller.write("plugin.py", "")
    os.truncate(path, 1 << 40)
    assert_refused(caller.run("run", path), str(path))


def test_a_name_with_escapes_is_shown_safely(caller: Caller) -> None:
    done = caller.run("run", "x\x1b[31m\n.py")
    assert_refused(done, "\\x1b[31m")
    assert "\x1b" not in done.err


# -- hostile plugins ----------------------------------------------------------------------------------------------------


def test_a_gigabyte_of_output(twice: Caller) -> None:
    done = twice.plugin("import os\nblock = b'x' * 65536\nfor _ in range(16384): os.write(1, block)")
    assert done.status == 153, done.err
    assert done.output == b"x" * (16 << 20)
    assert done.err.count("\n") == 1
    assert "output" in done.err
    assert done.seconds < 10 * harness.PATIENCE


@pytest.mark.parametrize("stream", [1, 2])
def test_output_counts_on_both_streams(caller: Caller, stream: int) -> None:
    source = f"import os\nblock = b'x' * 65536\nfor number in range(512): os.write({stream} if number % 2 else 1, block)"
    done = caller.plugin(source)
    assert done.status == 153
    assert done.output.count(b"x") + done.errors.count(b"x") >= 16 << 20
    assert len(done.output) <= 16 << 20


def test_an_endless_loop(twice: Caller) -> None:
    done = twice.plugin("while True: pass", options=["--timeout", "1"])
    assert done.status == 124
    assert done.err.count("\n") == 1
    assert "longer than 1 s" in done.err
    assert 1 <= done.seconds < 1 + 3 * harness.PATIENCE


BOMBS = {
    "heap": "blocks = []\nwhile True: blocks.append(bytearray(8 << 20))",
    "at once": "bytearray(1 << 34)",
    "files": "import time\nfor n in range(30): open(f'/tmp/{n}', 'wb').write(bytes(3 << 20))\ntime.sleep(1)\nprint('held')",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_memory_bomb(twice: Caller, bomb: str) -> None:
    done = twice.plugin(BOMBS[bomb], options=["--memory", "64M", "--timeout", "20"])
    assert done.status == 137, done
    assert "memory" in done.err.splitlines()[-1]
    assert done.output == b""


CONNECT = "import socket\nsocket.create_connection(('192.0.2.1', 9))"  # 192.0.2.0/24 is nobody's (RFC 5737)


def test_a_refused_connection_that_ends_it_is_a_violation(everywhere: Caller) -> None:
    result = result_of(everywhere, CONNECT, status=126)
    if everywhere.level == "minimal" and not everywhere.is_root:  # nobody could read where to
        assert "socket() of AF_INET SOCK_STREAM was refused" in result["reason"]
        return
    assert [item["details"]["address"] for item in result["violations"]] == ["192.0.2.1"]
    assert result["violations"][0]["type"] == "network_violation"
    assert "connect() of 192.0.2.1:9 was refused" in result["reason"]
    assert [(each["operation"], each["port"], each["allowed"]) for each in result["network"]] == [
        ("socket", None, True),
        ("connect", 9, False),
    ]
    assert result["telemetry"]["network_operations_count"] == 2


def test_a_refused_connection_that_is_caught_is_told_but_not_the_end(twice: Caller) -> None:
    source = CONNECT.replace("socket.create", "try: socket.create") + "\nexcept OSError: print('caught')"
    result = result_of(twice, source, status=0)
    assert [item["details"]["address"] for item in result["violations"]] == ["192.0.2.1"]


DAEMON = """
    import os, signal, sys, time
    if os.fork() == 0:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            os.write(1, b"daemon ")
            time.sleep(600)
        os._exit(0)
    os.wait()
    print("parent")
"""


def test_a_daemon_does_not_outlive_its_plugin(everywhere: Caller) -> None:
    if not everywhere.has_processes:
        pytest.skip("there it cannot be had: see test_allow_subprocess")
    done = everywhere.plugin(DAEMON, options=["--allow-subprocess"])
    assert done.status == 0, done
    assert "parent\n" in done.out
    assert done.seconds < 5 * harness.PATIENCE
    assert harness.wait_until(cli_harness.engine_is_gone, harness.SOON)


def test_a_plugin_that_closes_every_fd(twice: Caller) -> None:
    done = twice.plugin("import os\nprint('before', flush=True)\nos.closerange(0, 4096)\nos._exit(5)")
    assert (done.status, done.out, done.err) == (5, "before\n", "")


def test_a_plugin_that_closes_every_fd_and_lives_on_is_ended_by_the_clock(caller: Caller) -> None:
    source = "import os, time\nos.closerange(0, 4096)\ntime.sleep(600)"
    done = caller.plugin(source, options=["--timeout", "1"])
    assert done.status == 124, done


GARBAGE = """
    import os
    for fd in range(3, 64):
        for _ in range(20):
            try:
                os.write(fd, os.urandom(2000))
            except OSError:
                break
    print("done")
"""


def test_a_plugin_that_writes_garbage_to_every_fd(twice: Caller) -> None:
    done = twice.plugin(GARBAGE)
    assert (done.status, done.out) == (0, "done\n")
    assert "Traceback" not in done.err


def on_a_terminal(caller: Caller, source: str, *options: str, stream: str = "stdout") -> bytes:
    """What a terminal shows that is only one stream of the command."""
    master, slave = os.openpty()
    try:
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        done = caller.plugin(source, options=options, **{stream: slave})
        assert done.status == 0, done
        return cli_harness.read_rest(master)
    finally:
        os.close(master)
        os.close(slave)


HOSTILE_TEXT = """
    import os
    os.write({fd}, b"a\\x1b[31mb\\x07\\x9b\\xc2\\x9bc\\r")
    os.write({fd}, "d\\u202ee\\n".encode())
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_a_terminal_shows_is_escaped(caller: Caller, stream: str) -> None:
    source = HOSTILE_TEXT.format(fd=1 if stream == "stdout" else 2)
    shown = on_a_terminal(caller, source, stream=stream)
    assert b"\x1b" not in shown
    assert b"\x07" not in shown
    assert b"\x9b" not in shown
    assert "\u202e".encode() not in shown
    assert shown.startswith(b"a\\x1b[31mb\\x07")
    assert shown.endswith(b"e\n")
    assert shown.count(b"\n") == 2
    raw = on_a_terminal(caller, source, "--raw", stream=stream)
    assert raw == b"a\x1b[31mb\x07\x9b\xc2\x9bc\r" + "d\u202ee\n".encode()


@pytest.mark.parametrize("last", [b"x\r", b"x\xc3", b"x\xe2\x80"], ids=["return", "half of two", "two thirds"])
def test_what_the_escaper_held_back_is_shown_at_the_end(caller: Caller, last: bytes) -> None:
    shown = on_a_terminal(caller, f"import os; os.write(1, {last!r})")
    assert shown.startswith(b"x")
    assert len(shown) > 1, "the last character has been lost"


# -- signals, readers that leave, killed commands -----------------------------------------------------------------------


WAITING = """
    import sys, time
    print("ready", flush=True)
    while True:
        time.sleep(0.1)  # for a signal that comes before Python has begun to sleep (it is handled after the sleep)
"""


def fd_of(stream: Any) -> int:
    number: int = stream.fileno()
    return number


def test_a_reader_that_leaves_ends_it_quietly(twice: Caller) -> None:
    line = twice.plugin_line("while True: print('y' * 100)")
    with twice.start(*line) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 10) == b"y" * 10
        process.stdout.close()
        assert process.wait(10) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("words", [["levels"], ["explain", "--json"], ["quarantine", "list"], ["history"]], ids=" ".join)
def test_a_reader_of_a_table_that_leaves_is_no_failure(twice: Caller, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody:
        done = twice.run(*words, stdout=nobody)
    assert (done.status, done.errors) == (1, b"")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_signal_ends_it(twice: Caller, name: str) -> None:
    number = getattr(signal, name)
    with twice.start(*twice.plugin_line(WAITING, options=["--result-file", "result.json"])) as process:
        read_until(fd_of(process.stdout), READY)
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert harness.wait_until(cli_harness.engine_is_gone, harness.SOON)
    result = json.loads((twice.folder / "result.json").read_text())
    assert result["reason"] == f"psie was ended by signal {int(number)}"


HANDLER = """
    import os, signal, time
    def handler(number, frame):
        os.write(1, b"interrupted\\n")  # print cannot be interrupted by itself
    signal.signal(signal.SIGINT, handler)
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


def test_an_interrupt_reaches_the_plugin_and_a_second_one_kills(everywhere: Caller) -> None:
    with everywhere.start(*everywhere.plugin_line(HANDLER)) as process:
        read_until(fd_of(process.stdout), READY)
        process.send_signal(signal.SIGINT)
        read_until(fd_of(process.stdout), b"interrupted\n")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""


def is_pythons_own(status: int, said: bytes) -> bool:
    """Whether the interrupt came before anything of psie's had begun, as on a slow machine: Python ends by it then, or tells it
    and goes on (status 0: "Failed checking if argv[0] is an import path entry")."""
    return status in (0, 1) and b"KeyboardInterrupt" in said and b"/sandbox/" not in said


def test_no_interrupt_is_lost_while_a_sandbox_comes_up(caller: Caller) -> None:
    """Whoever is there to take it: the command alone, a worker that is set up, or the plugin."""
    for milliseconds in range(12, 66, 2):
        with caller.start(*caller.plugin_line("import time\ntime.sleep(5)")) as process:
            time.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
        assert is_pythons_own(process.returncode, errors) or process.returncode in (130, -signal.SIGINT), (milliseconds, errors)
        assert b"/sandbox/" not in errors, milliseconds


def test_an_interrupted_call_is_told_from_one_that_failed(twice: Caller) -> None:
    path = twice.write("plugin.py", WAITING + "\n    def main():\n        pass\n")
    with twice.start("call", "-q", "--level", twice.level, f"{path}:main") as process:
        read_until(fd_of(process.stderr), READY)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_doctor_leaves_nothing_whenever_it_ends(caller: Caller, tmp_path: Path, number: signal.Signals) -> None:
    for tenths in range(1, 9, 2):
        with caller.start("doctor", env={"TMPDIR": str(tmp_path)}) as process:
            time.sleep(tenths / 10)
            process.send_signal(number)
            process.communicate(timeout=cli_harness.SECONDS)
        assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_the_plugin_does_not_handle(twice: Caller) -> None:
    with twice.start(*twice.plugin_line(WAITING)) as process:
        read_until(fd_of(process.stdout), READY)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        errors = process.stderr.read().decode()
        assert "KeyboardInterrupt" in errors
        assert "plugin.py" in errors
        assert "sandbox" not in errors


def test_a_killed_command_leaves_nothing(everywhere: Caller) -> None:
    if not everywhere.has_processes:
        pytest.skip("without processes of its own it leaves none: see test_allow_subprocess")
    with everywhere.start(*everywhere.plugin_line(DAEMON + "    time.sleep(600)\n", options=["--allow-subprocess"])) as process:
        read_until(fd_of(process.stdout), b"daemon")
        assert not cli_harness.engine_is_gone()
        process.kill()
        process.wait()
        assert harness.wait_until(cli_harness.engine_is_gone, harness.SOON), harness.engine_processes(cli_harness.TOKEN)


def test_a_killed_command_leaves_no_stopped_zygote(everywhere: Caller) -> None:
    with everywhere.start(*everywhere.plugin_line("print('ready', flush=True)\nimport time\ntime.sleep(600)")) as process:
        read_until(fd_of(process.stdout), READY)
        own = [pid for pid, each in harness.engine_processes(cli_harness.TOKEN).items() if each.parent == process.pid]
        (zygote,) = map(os.pidfd_open, own)
        try:
            signal.pidfd_send_signal(zygote, signal.SIGSTOP)
            process.kill()
            process.wait()
            assert harness.wait_until(cli_harness.engine_is_gone, harness.SOON), harness.engine_processes(cli_harness.TOKEN)
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(zygote, signal.SIGCONT)
            os.close(zygote)


def test_a_plugin_whose_parts_are_stopped_still_ends(caller: Caller) -> None:
    """SIGSTOP of the worker itself: the clock is not its own."""
    done = caller.plugin("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", options=["--timeout", "1"])
    assert done.status == 124


# -- a terminal ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[("own", "maximum"), ("own", "minimal"), ("user", "standard")], ids="-".join)
def at_terminal(request: pytest.FixtureRequest, cli_folder: Path) -> Iterator[Caller]:
    who, level = request.param
    with cli_harness.called(who, level, cli_folder, request) as caller:
        yield caller


CONVERSATION = """
    import os, sys
    print([os.isatty(fd) for fd in (0, 1, 2)], tuple(os.get_terminal_size()))
    name = input("name? ")
    print("hello", name)
    with open("/dev/tty", "w") as terminal:
        terminal.write("by name")
    sys.exit(7)
"""


def test_a_conversation(at_terminal: Caller) -> None:
    with Session(at_terminal, *at_terminal.plugin_line(CONVERSATION)) as session:
        seen = session.until(b"name? ")
        assert b"[True, True, True] (80, 24)\r\n" in seen
        session.type(b"Wrold\x7f\x7f\x7f\x7forld\r")
        seen = session.until(b"hello World\r\n")
        assert b"W" in seen.partition(b"hello")[0], "what is typed is echoed"
        session.until(b"by name")
        assert session.status() == 7
        assert session.settings() == session.before


def test_the_terminal_is_raw_meanwhile_and_restored_after_a_kill(at_terminal: Caller) -> None:
    with Session(at_terminal, *at_terminal.plugin_line(WAITING)) as session:
        session.until(b"ready")
        assert session.settings() != session.before
        os.kill(session.pid, signal.SIGTERM)
        assert session.status() == 143
        assert session.settings() == session.before
    assert harness.wait_until(cli_harness.engine_is_gone, harness.SOON)


WINDOW = """
    import os, signal
    def handler(number, frame):
        os.write(1, b"now %d %d\\n" % os.get_terminal_size())
    signal.signal(signal.SIGWINCH, handler)
    print("ready", *os.get_terminal_size(), flush=True)
    while True:
        signal.pause()
"""


def test_the_window_size_follows(at_terminal: Caller) -> None:
    with Session(at_terminal, *at_terminal.plugin_line(WINDOW)) as session:
        session.until(b"ready 80 24")
        session.resize(50, 132)
        session.until(b"now 132 50")
        session.type(b"\x03")
        assert session.status() == 130
        assert session.settings() == session.before


def test_ctrl_c_reaches_the_plugin(at_terminal: Caller) -> None:
    source = """
        import time
        for _ in range(2):
            try:
                print("ready", flush=True)
                while True:
                    time.sleep(0.1)
            except KeyboardInterrupt:
                print("caught", flush=True)
        print("goes on")
    """
    with Session(at_terminal, *at_terminal.plugin_line(source)) as session:
        session.until(b"ready")
        session.type(b"\x03")
        session.until(b"caught\r\nready")
        session.type(b"x\x03")  # not twice in a row
        session.until(b"caught\r\ngoes on")
        assert session.status() == 0
        assert session.settings() == session.before


def test_ctrl_c_twice_kills(at_terminal: Caller) -> None:
    source = (
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready', flush=True)\nwhile True: signal.pause()"
    )
    with Session(at_terminal, *at_terminal.plugin_line(source)) as session:
        session.until(b"ready")
        session.type(b"\x03\x03")
        assert session.status() == 130
        assert session.settings() == session.before


def test_no_ctrl_c_is_lost_while_a_sandbox_comes_up(at_terminal: Caller) -> None:
    for milliseconds in range(12, 66, 2):
        with Session(at_terminal, *at_terminal.plugin_line("import time\ntime.sleep(5)")) as session:
            time.sleep(milliseconds / 1000)
            session.type(b"\x03")
            status, said = session.status(), session.rest()
            assert is_pythons_own(status, said) or status in (130, -signal.SIGINT), (milliseconds, status, said)
            assert b"/sandbox/" not in said, milliseconds


def test_ctrl_d_ends_the_input(at_terminal: Caller) -> None:
    source = "import sys\nprint('ready', flush=True)\nprint(repr(sys.stdin.read()))"
    with Session(at_terminal, *at_terminal.plugin_line(source)) as session:
        session.until(b"ready")
        session.type(b"text\r\x04")
        session.until(b"'text\\n'")
        assert session.status() == 0


def test_a_terminal_shows_escapes_only_if_raw(caller: Caller) -> None:
    source = "print('a\\x1b[31mb')"
    with Session(caller, *caller.plugin_line(source)) as session:
        session.until(b"a\\x1b[31mb\r\n")
        assert session.status() == 0
    with Session(caller, *caller.plugin_line(source, options=["--raw"])) as session:
        session.until(b"a\x1b[31mb\r\n")
        assert session.status() == 0


def test_output_counts_on_a_terminal_too(caller: Caller) -> None:
    source = "import os\nblock = b'x' * 65536\nfor _ in range(1024): os.write(1, block)"
    with Session(caller, *caller.plugin_line(source, options=["--timeout", "15"])) as session:
        shown = 0
        while not select.select([session.report], [], [], 0)[0]:
            if select.select([session.master, session.report], [], [], 10)[0]:
                shown += len(session.rest())
        assert session.status() == 153
        assert shown <= (16 << 20) + 1000
        assert session.settings() == session.before


def test_ctrl_c_where_only_the_output_is_a_terminal(at_terminal: Caller) -> None:
    """The interrupt goes to all of the foreground: psie passes it on, and its own processes must not mind."""
    source = """
        import time
        try:
            print("ready", flush=True)
            while True:
                time.sleep(0.1)
        except KeyboardInterrupt:
            print("caught", flush=True)
    """
    with Session(at_terminal, *at_terminal.plugin_line(source), stdin="/dev/null") as session:
        session.until(b"ready")
        assert session.settings() == session.before
        session.type(b"\x03")
        session.until(b"caught")
        assert session.status() == 0


def test_a_lost_terminal_ends_it(caller: Caller) -> None:
    """A closed window: the other side of the terminal goes, and SIGHUP comes."""
    line = caller.command(*caller.plugin_line(WAITING))
    pid, master = pty.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.execve(line[0], line, caller.environment)
        os._exit(99)
    read_until(master, b"ready")
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert harness.wait_until(cli_harness.engine_is_gone, harness.SOON)


def test_in_the_background_it_runs_on(at_terminal: Caller) -> None:
    """`psie run plugin.py &`: it may write, its input has ended, and nothing stops it."""
    source = "import sys\nprint('read', repr(sys.stdin.read()), flush=True)"
    with Session(at_terminal, *at_terminal.plugin_line(source), stdin="background") as session:
        session.until(b"read ''")
        assert session.status() == 0
        assert session.settings() == session.before


def test_what_is_ignored_stays_so(caller: Caller) -> None:
    """`nohup psie run plugin.py`."""
    how = {"stdin": subprocess.PIPE, "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    source = "print('ready', flush=True)\nprint(input())"
    with caller.start(*caller.plugin_line(source), **how) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        read_until(process.stdout.fileno(), b"ready")
        process.send_signal(signal.SIGHUP)
        process.stdin.write(b"on\n")
        process.stdin.close()
        assert process.wait(cli_harness.SECONDS) == 0


# -- psie call ----------------------------------------------------------------------------------------------------------


def test_a_call_prints_its_reply_alone(everywhere: Caller) -> None:
    source = """
        import os
        print("while loading")
        def main(number, *, name, factor=2):
            print("while running")
            os.write(2, b"to stderr\\n")
            return {"number": number * factor, "name": name, "nothing": None, "list": [1.5, True]}
    """
    options = ["--kwarg", 'name="ü x"', "--kwarg", "factor=3"]
    done = everywhere.call(source, "14", options=options)
    assert done.status == 0, done
    assert done.output.count(b"\n") == 1
    assert json.loads(done.out) == {"number": 42, "name": "ü x", "nothing": None, "list": [1.5, True]}
    assert sorted(done.err.splitlines()) == ["to stderr", "while loading", "while running"]


def test_a_call_that_raises(everywhere: Caller) -> None:
    done = everywhere.call("def main():\n    raise ValueError('wrong')\n")
    assert (done.status, done.output) == (1, b"")
    path = everywhere.folder / "plugin.py"
    expected = (
        f'Traceback (most recent call last):\n  File "{path}", line 2, in main\n'
        "    raise ValueError('wrong')\nValueError: wrong\n"
    )
    assert done.err == expected


def test_an_async_function_is_awaited(twice: Caller) -> None:
    done = twice.call("import asyncio\nasync def main(x):\n    await asyncio.sleep(0.001)\n    return x + 1\n", "41")
    assert (done.status, done.out, done.err) == (0, "42\n", "")


REPLIES = {
    "set": ("{3, 1, 2}", [1, 2, 3]),
    "frozenset": ("frozenset({'b', 'a'})", ["a", "b"]),
    "bytes": ("b'\\x00\\xff'", "AP8="),
    "bytearray": ("bytearray(b'ab')", "YWI="),
    "tuple": ("(1, (2, 3))", [1, [2, 3]]),
    "text": ("'\\u00fc\\n\\x1b'", "ü\n\x1b"),
    "large": ("10 ** 30", 10**30),
    "path": ("__import__('pathlib').PurePosixPath('/x')", "/x"),
    "decimal": ("__import__('decimal').Decimal('1.50')", "1.50"),
    "time": ("__import__('datetime').date(2020, 1, 2)", "2020-01-02"),
    "complex": ("1+2j", "(1+2j)"),
    "number keys": ("{1: 'a', None: 'b'}", {"1": "a", "null": "b"}),
}


@pytest.mark.parametrize("reply", REPLIES)
def test_replies_as_json(caller: Caller, reply: str) -> None:
    source, expected = REPLIES[reply]
    done = caller.call(f"def main(): return {source}")
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == expected


def test_replies_of_classes_of_the_plugin(caller: Caller) -> None:
    source = """
        import dataclasses, enum
        @dataclasses.dataclass
        class Point:
            x: int
            tags: tuple
        class Colour(enum.Enum):
            RED = "red"
        def main(): return [Point(1, ("a",)), Colour.RED]
    """
    done = caller.call(source)
    assert (done.status, json.loads(done.out or "null"), done.err) == (0, [{"x": 1, "tags": ["a"]}, "red"], "")


def test_a_key_that_json_does_not_have(caller: Caller) -> None:
    """A tuple as a key: its text, as for other values that JSON does not have, or one sentence. Never a traceback."""
    done = caller.call("def main(): return {(1, 2): 3}")
    assert "Traceback" not in done.err
    if done.status:
        assert_refused(done, "key")
    else:
        assert json.loads(done.out) == {"(1, 2)": 3}


def test_at_every_level_its_folder_for_temporary_files_is_there(caller: Caller) -> None:
    lines = "import os, tempfile\nwith tempfile.TemporaryFile() as file: print(tempfile.gettempdir(), os.environ['HOME'])"
    done = caller.plugin(f"{lines}\nprint(os.path.isdir(os.environ.get('TMPDIR', '/tmp')))")
    assert done.out.split()[-1] == "True", done
    assert "{" not in done.out


def test_two_keys_that_become_one(caller: Caller) -> None:
    done = caller.call("def main(): return {1: 2, '1': 3}")
    assert (done.status, done.out) == (1, "")
    assert "two keys of a dict become the same name" in done.err


def test_rows_without_items_do_not_fill_the_memory(caller: Caller) -> None:
    """A list for each of four billion, which a plugin need not have: the array is nothing but its shape."""
    pytest.importorskip("numpy")
    array = "import numpy\ndef main(): return numpy.empty(({}, 2, 0))"
    assert caller.call(array.format(3)).out == "[[[], []], [[], []], [[], []]]\n"
    done = caller.call(array.format("2**32 - 1"))
    assert (done.status, done.out) == (1, "")
    assert "the result is no JSON: an array of no items has 8589934590 rows" in done.err


@pytest.mark.parametrize("limit", ["-n 256", "-f 1000", "-t 20", "-t 1"])
def test_what_the_callers_own_limits_are_lower_than(caller: Caller, limit: str) -> None:
    """Then those hold, and nothing is wrong with the sandbox."""
    path = caller.write("plugin.py", "print('ran')")
    caller.write("limits.toml", "[limits]\nmax_open_files = 5000\nmax_file_size_mb = 50\n")
    line = caller.command("run", "-q", "--level", caller.level, "--config", "limits.toml", path)
    shell = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", *line]
    done = subprocess.run(shell, env=caller.environment, cwd=caller.folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_lone_surrogates_in_a_reply(caller: Caller) -> None:
    """JSON has an escape for them; UTF-8 does not."""
    done = caller.call("def main(): return 'a\\udc80'")
    assert (done.status, done.err, done.output) == (0, "", b'"a\\udc80"\n')


def test_nan_is_no_json(caller: Caller) -> None:
    """What other readers of JSON refuse is not printed as if it were: null, or its text."""
    done = caller.call("def main(): return [float('nan'), float('inf')]")
    assert done.status == 0, done

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    json.loads(done.out, parse_constant=refuse)


def test_a_reply_that_cannot_travel(twice: Caller) -> None:
    source = "class Thing: pass\ndef main(): return {'a': [1, Thing()]}"
    done = twice.call(source)
    assert done.status in (1, 125), done
    assert done.output == b""
    assert done.err.startswith("psie: ")
    assert done.err.count("\n") == 1
    assert "Thing" in done.err
    assert "['a'][1]" in done.err or '["a"][1]' in done.err


def test_a_reply_that_is_a_socket(caller: Caller) -> None:
    """At this level a socket cannot be made: so one that is made without the kernel."""
    source = "import _socket\nclass Socket(_socket.socket): pass\ndef main(): return Socket.__new__(Socket)"
    done = caller.call(source)
    assert done.status in (1, 125), done
    assert done.output == b""
    assert "Socket" in done.err
    assert "Traceback" not in done.err


def test_a_reply_that_is_too_large(twice: Caller) -> None:
    done = twice.call("def main(): return b'x' * (17 << 20)")
    assert done.status not in (0, None)
    assert done.output == b""
    assert done.err.startswith("psie: ")
    assert done.err.count("\n") == 1
    assert "larger than" in done.err


def test_a_function_that_is_not_there(caller: Caller) -> None:
    done = caller.call("def main(): pass", function="man")
    assert (done.status, done.output) == (1, b"")
    assert "has no function man" in done.err


def test_a_call_that_exits(caller: Caller) -> None:
    done = caller.call("import sys\ndef main(): sys.exit(7)")
    assert (done.status, done.output) == (7, b"")
    done = caller.call("import os\ndef main(): os._exit(0)")
    assert_refused(done, "without a reply")


def test_limits_hold_for_a_call(caller: Caller) -> None:
    assert caller.call("def main():\n while True: pass", options=["--timeout", "1"]).status == 124
    assert caller.call("def main(): return len(bytearray(1 << 34))").status == 137
    assert caller.call("import socket\ndef main(): socket.create_connection(('192.0.2.1', 9))").status == 126


def test_a_call_whose_reader_has_left(caller: Caller) -> None:
    path = caller.write("plugin.py", "def main(): return 'x' * 1000000")
    with caller.start("call", "-q", f"{path}:main") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(10) in (0, 141)
        assert process.stderr.read() == b""


# -- the other commands -------------------------------------------------------------------------------------------------


def test_explain(somebody: Caller, caller: Caller) -> None:
    for who in (caller, somebody):
        done = who.run("explain")
        assert (done.status, done.err) == (0, "")
        name = "root" if who.is_root else f"user {who.uid}"
        assert re.findall(r"^level (\w+) as (.*), Linux", done.out, re.M) == [(level, name) for level in LEVELS]
        one = who.run("explain", "--level", "strict")
        assert one.out.strip() in done.out
        assert "seccomp allowlist" in one.out
        assert "denylist" not in one.out


def test_explain_as_json_is_what_runs(twice: Caller) -> None:
    done = twice.run("explain", "--level", twice.level, "--json")
    assert (done.status, done.err) == (0, "")
    data = json.loads(done.out)
    refused = data.pop("refused")
    assert data["level"] == twice.level
    assert json.loads(json.dumps(Recipe.from_dict(data).to_dict())) == data
    assert refused == ""
    result = result_of(twice, "pass")
    assert [(item["name"], item["mechanism"]) for item in result["protections"]] == [
        (item["name"], item["mechanism"]) for item in data["protections"]
    ]


def test_explain_all_levels_as_json(caller: Caller) -> None:
    data = json.loads(caller.run("explain", "--json").out)
    assert [item["level"] for item in data] == LEVELS


def test_explain_with_a_config(caller: Caller) -> None:
    caller.write("settings.toml", '[isolation]\nlevel = "maximum"\n[limits]\nmax_memory_mb = 77\n')
    done = caller.run("explain", "--config", "settings.toml")
    assert done.out.startswith("level maximum as ")
    assert "77 MB" in done.out


def test_levels(caller: Caller) -> None:
    done = caller.run("levels")
    assert (done.status, done.err) == (0, "")
    assert done.out.split()[:5] == ["protection", *LEVELS]
    (row,) = [line.split() for line in done.out.splitlines() if line.startswith(" seccomp ")]
    assert row == ["seccomp", "denylist", "denylist", "allowlist", "tight"]


def test_version(caller: Caller) -> None:
    for words in (["--version"], ["--version", "run"]):
        done = caller.run(*words)
        assert (done.status, done.out, done.err) == (0, f"psie {__version__}\n", "")


def test_help(caller: Caller) -> None:
    done = caller.run("--help")
    assert (done.status, done.err) == (0, "")
    assert all(f"\n  {name} " in done.out for name in ("run", "call", "explain", "levels"))
    assert caller.run("-h").out == done.out
    for name, words in (("run", ["FILE", "--level", "--raw", "-q", "126"]), ("call", ["FILE:FUNCTION", "--kwarg"])):
        done = caller.run(name, "--help")
        assert (done.status, done.err) == (0, "")
        assert all(word in done.out for word in words), done.out
    assert caller.run().status in (0, 125)


# -- how light it is ----------------------------------------------------------------------------------------------------

HEAVY = {
    "site",
    "click",
    "asyncio",
    "dataclasses",
    "pyroute2",
    "psutil",
    "json",
    "cloudpickle",
    "re",
    "enum",
    "typing",
    "rich",
    "logging",
}


def imported(caller: Caller) -> set[str]:
    path = caller.write("plugin.py", "print('x')")
    start = [*caller.prefix, "-I", "-S", "-X", "importtime", caller.script + "-python"]  # as the script does it
    words = [*start, "run", "-q", "--level", caller.level, str(path)]
    # On a slow machine the plugin could run for long enough to be watched, which is not the start.
    around = caller.surroundings({"env": {"SANDBOX_MONITORING_ENABLED": "no"}})
    done = subprocess.run(words, capture_output=True, text=True, timeout=cli_harness.SECONDS, check=True, **around)
    assert done.stdout == "x\n"
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_a_second_run_imports_nothing_heavy(twice: Caller) -> None:
    imported(twice)
    for _ in range(3):  # a set-up that fails in another process of this user has all recipes forgotten
        modules = imported(twice)
        if not modules & HEAVY:
            break
    assert "sandbox.cli.session" in modules
    assert not modules & HEAVY


def test_a_changed_option_is_not_taken_from_the_cache(caller: Caller) -> None:
    for level in (*LEVELS, *reversed(LEVELS)):
        assert result_of(caller, "pass", "--level", level)["level"] == level
    for size in ("64M", "65M", "64M"):
        assert size[:2] + " MB" in detail(result_of(caller, "pass", "--memory", size), "memory")


def test_the_callers_terminal_stays_outside(caller: Caller) -> None:
    """Stdin a terminal and stdout not: the plugin gets what is typed, and nothing that it could write to or set."""
    source = """
        import os, stat, sys
        print(os.isatty(0), stat.S_ISFIFO(os.fstat(0).st_mode))
        try:
            os.write(0, b"owned")
        except OSError as error:
            print(error.strerror)
        print(input())
    """
    master, slave = os.openpty()
    try:
        os.write(master, b"typed\n")
        done = caller.plugin(source, stdin=slave)
    finally:
        os.close(slave)
        os.close(master)
    assert (done.status, done.out) == (0, "False True\nBad file descriptor\ntyped\n")


def test_links_beside_the_file_lead_nowhere(caller: Caller) -> None:
    caller.write("secret.txt", "value = 'secret'")
    os.symlink(caller.folder / "secret.txt", caller.folder / "helper.py")
    os.mkfifo(caller.folder / "queue.py")
    done = caller.plugin("import queue\nimport helper\nprint(helper.value)", "--level", "strict")
    assert done.status == 1
    assert "No module named 'helper'" in done.err


def test_arguments_of_any_size(caller: Caller) -> None:
    done = caller.plugin("import sys\nprint([len(each) for each in sys.argv[1:]])", "--", "a" * 100_000, "b" * 100_000)
    assert (done.status, done.out) == (0, "[100000, 100000]\n")


# -- psie selftest -------------------------------------------------------------------------------------------------------


def test_selftest(everywhere: Caller) -> None:
    """A few attacks; tests/escape has all of them. Some fail at every level, one only where it is claimed."""
    names = ["unshare", "fork_bomb", "write_outside", "symbols_of_the_kernel", "replace_the_kernel"]
    done = everywhere.run("selftest", "--level", everywhere.level, "--json", *names)
    found = json.loads(done.out)
    verdicts = {each["attack"]: each["verdict"] for each in found["attacks"]}
    assert (done.status, found["failed"], found["level"]) == (0, 0, everywhere.level), found
    assert set(verdicts) == set(names)
    assert verdicts["unshare"] == "PASS"
    assert verdicts["write_outside"] == "PASS"
    assert verdicts["replace_the_kernel"] == "NOT APPLICABLE"
    if everywhere.level == "minimal":
        assert verdicts["symbols_of_the_kernel"] == "NOT APPLICABLE"
    assert found["passed"] == list(verdicts.values()).count("PASS")
    shown = everywhere.run("selftest", "--level", everywhere.level, "unshare")
    assert re.search(r"PASS +seccomp: namespaces and mounts +unshare +EPERM\*", shown.out)
    assert "1 stopped, 0 NOT STOPPED, 0 not applicable" in shown.err


def test_selftest_is_no_run_of_a_plugin(cli_folder: Path, tmp_path: Path) -> None:
    caller = cli_harness.remembering(cli_harness.privileged("strict", cli_folder), tmp_path)
    assert caller.run("selftest", "unshare").status == 0
    assert json.loads(caller.run("history", "--json").out) == []


@pytest.fixture
def temporary(tmp_path: Path) -> dict[str, dict[str, str]]:
    """How a command is started whose temporary files are to lie in tmp_path, whoever starts it."""
    tmp_path.chmod(0o777)
    for folder in (tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o011)
    return {"env": {"TMPDIR": str(tmp_path)}}


def test_a_killed_selftest_leaves_nothing_to_the_next(
    twice: Caller, temporary: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Its folder is removed by the next one, as long as nobody is in it."""
    with twice.start("selftest", "--level", twice.level, **temporary) as process:
        assert harness.wait_until(lambda: len(list(tmp_path.glob("psie-escape-*/*"))) > 5, 4 * harness.SETTLE)
        (left,) = tmp_path.iterdir()
        assert twice.run("selftest", "--level", twice.level, "unshare", **temporary).status == 0
        assert left.exists()  # it is held
        process.kill()
        process.wait()
    assert left.exists()
    assert twice.run("selftest", "--level", twice.level, "unshare", **temporary).status == 0
    assert list(tmp_path.iterdir()) == []


LOOP = """
    def whole():
        signal.raise_signal(number)
        print("whole")

    async def work():
        asyncio.get_running_loop().call_soon(whole)
        try:
            await asyncio.sleep(60)
        finally:
            print("tidied up")

    asyncio.run(work())
"""
LOST = """
    try:
        signal.raise_signal(number)
    finally:
        raise ValueError("of what was in its middle")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize(("body", "said"), [(LOOP, b"whole\ntidied up\n"), (LOST, b"")], ids=["loop", "lost"])
def test_the_end_of_a_command_by_a_signal_says_nothing(number: signal.Signals, body: str, said: bytes) -> None:
    """Nor does it interrupt what an event loop does, which who tidies up would wait for: psie selftest, doctor, plugins run."""
    code = f"""
import asyncio, signal
from sandbox.cli import endings

number = {int(number)}

@endings.by_exception()
def command():
    {body}
command()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=cli_harness.SECONDS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, said, b"")


def test_a_killed_selftest_takes_along_whom_it_attacks(twice: Caller, temporary: dict[str, dict[str, str]]) -> None:
    def victims() -> list[int]:
        """That wait: one that is about to would end of itself, because nobody reads what it says."""
        found = []
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error, OSError):
                if "FUTEX" in "".join(child.cmdline()):
                    found += [child.pid] if harness.read_proc(child.pid, "syscall").split()[0] == number else []
        return found

    def is_stopped_beside_one() -> bool:
        if victims():
            process.send_signal(signal.SIGSTOP)
            assert harness.wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
            if victims():
                return True
            process.send_signal(signal.SIGCONT)
        return False

    number = b"%d" % SYSCALLS["futex"]
    with twice.start("selftest", "--level", twice.level, "keep_somebody_waiting", **temporary) as process:
        assert harness.wait_until(is_stopped_beside_one, 4 * harness.SETTLE)
        (victim,) = map(os.pidfd_open, victims())
        process.kill()
    assert select.select([victim], [], [], harness.SETTLE)[0]
    os.close(victim)


def test_a_killed_selftest_takes_along_what_it_tries_outside(
    twice: Caller, temporary: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    def outside() -> list[int]:
        """The process where attacks are tried, and the one that it has forked for this attack; not those of other tests."""
        found = []
        for pid in set(harness.engine_processes()) - before:
            with contextlib.suppress(OSError):
                found += [pid] if b"import cloudpickle" in harness.read_proc(pid, "cmdline") else []
        return found

    def is_at_it() -> bool:
        """The latter has got to the attack itself."""
        with contextlib.suppress(OSError):
            return any(os.readlink(f"/proc/{pid}/cwd").startswith(f"{tmp_path}/") for pid in outside())
        return False

    before = set(harness.engine_processes())
    with twice.start("selftest", "--level", twice.level, "page_tables", **temporary) as process:
        assert harness.wait_until(is_at_it, 4 * harness.SETTLE)
        stopped = outside()  # so that they do not end of themselves
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        process.kill()
    try:
        assert len(stopped) == 2
        assert harness.wait_until(lambda: not outside())
    finally:
        for pid in outside():
            os.kill(pid, signal.SIGKILL)
