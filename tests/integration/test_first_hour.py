"""What somebody meets who has never used psie: help in every form, mistyped commands, paths that the plugin does not see."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import cli_harness
from .cli_harness import Caller

LISTS = "import os, sys\nfor name in sys.argv[1:]:\n    print(os.listdir(name))\n"


@pytest.fixture(params=["own", "user"])
def caller(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Caller]:
    with cli_harness.called(request.param, "strict", tmp_path, request) as one:
        yield one


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Caller]:
    who = cli_harness.privileged("strict", tmp_path)
    yield who
    who.clean()


# -- help and mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["help"], ["--help"]),
        (["help", "run"], ["run", "--help"]),
        (["help", "quarantine", "show"], ["quarantine", "show", "--help"]),
        (["quarantine", "help", "show"], ["quarantine", "show", "--help"]),
        ([], ["--help"]),
    ],
)
def test_help_is_had_by_its_name(own: Caller, words: list[str], same: list[str]) -> None:
    asked, known = own.run(*words), own.run(*same)
    assert (asked.status, known.status) == (0, 0)
    assert asked.out.strip() == known.out.strip()
    assert asked.out.startswith("Usage: psie")


def test_the_list_of_commands_cuts_no_sentence(own: Caller) -> None:
    assert "..." not in own.run("--help").out.split("Commands:")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "no such command 'rnu': did you mean 'run'; see psie --help"),
        (["run", "--levl", "strict"], "no such option '--levl': did you mean '--level'; see psie run --help"),
        (["run", "plugin.py", "--allow-host"], "option '--allow-host' requires an argument; see psie run --help"),
        (["plugins", "rn"], "no such command 'rn': did you mean 'run'; see psie plugins --help"),
        (["run"], "missing argument 'FILE'; see psie run --help"),
        (["quarantine", "show"], "missing argument 'ID'; see psie quarantine show --help"),
        (["a plugin.py"], "no such command 'a plugin.py': to run this file, psie run 'a plugin.py'; see psie --help"),
        (["help", "nothing"], "no such command 'nothing'; see psie --help"),
        (["completion"], "missing argument '{bash|zsh|fish}': choose from: bash, zsh, fish; see psie completion --help"),
        (["run", "a plugin.py", "-x"], "no such option '-x'; options of the plugin's own come behind --; see psie run --help"),
        (
            ["check", "a plugin.py", "--jso"],
            "no such option '--jso': did you mean '--json'; options of the plugin's own come behind --; see psie check --help",
        ),
        (["call", "a plugin.py", "-x"], "no such option '-x'; see psie call --help"),
        (["audit", "verify", "x"], "got unexpected extra argument (x): leave it out; see psie audit verify --help"),
        (["history", "x" * 9000], f"got unexpected extra argument ({'x' * 169}...: leave it out; see psie history --help"),
        (["history", "x", "y"], "got unexpected extra arguments (x y): leave them out; see psie history --help"),
        (["spec", "gone.py"], "gone.py: there is no such file: check the path"),
        (["run", "--ro", "/gone", "a plugin.py"], "--ro /gone: there is no such file or folder: check the path"),
        (["run", "--cpu", "half", "a plugin.py"], "--cpu half: this is no number: give one, such as 50 or 0.5"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_mend(own: Caller, words: list[str], said: str) -> None:
    own.write("a plugin.py", "")
    done = own.run(*words)
    assert (done.status, done.out) == (125, "")
    assert done.err == f"psie: {said}\n"


# -- paths among the arguments -----------------------------------------------------------------------------------------------


def told(caller: Caller, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    """What psie says at the end of a run that fails, or does not."""
    caller.write("plugin.py", LISTS)
    done = caller.run("run", "--level", caller.level, *options, "plugin.py", *words)
    lines = [line.removeprefix("psie: ") for line in done.err.splitlines() if line.startswith("psie: ")]
    return [line for line in lines if not line.startswith("weaker than")]


def test_a_path_that_is_not_shown_is_named_with_what_shows_it(caller: Caller) -> None:
    folder = caller.write("some data/a.txt", "x").parent
    (line,) = told(caller, str(folder))
    assert line.startswith(f"the plugin does not see '{folder}': --ro '{folder}' lets it read")
    assert told(caller, str(folder), options=("--ro", str(folder))) == []


def test_a_relative_path_is_told_from_a_name_in_the_workspace(caller: Caller) -> None:
    folder = caller.write("data/a.txt", "x").parent
    (line,) = told(caller, "data")
    assert line.endswith(f"if {folder} is meant by data, show it with --ro data, and start the plugin here by --chdir .")
    (line,) = told(caller, "data", options=("--ro", "data"))
    assert line.endswith(f"if {folder} is meant by data, start the plugin here by --chdir .")
    assert told(caller, "data", options=("--ro", "data", "--chdir", ".")) == []
    (line,) = told(caller, "data", options=("--level", "minimal"))  # which sees it, but --chdir wants it to be named
    assert line.endswith(f"if {folder} is meant by data, show it with --ro data, and start the plugin here by --chdir .")
    assert told(caller, "data", options=("--level", "minimal", "--ro", "data", "--chdir", ".")) == []
    above = caller.write("other/plugin.py", "raise OSError").parent
    done = caller.run("run", "--chdir", str(above), "--ro", str(above), str(above / "plugin.py"), "data")
    assert "data" not in done.err.replace(str(above), ""), "it knows itself where it starts"


@pytest.mark.parametrize("level", ["minimal", "standard", "strict", "maximum"])
def test_it_starts_where_chdir_says_and_sees_only_what_is_shown(caller: Caller, level: str) -> None:
    data = caller.write("data/a.txt", "x")
    caller.write("data/b.txt", "y")
    script = caller.write("data/plugin.py", "import os\nprint(os.getcwd(), open('a.txt').read(), os.path.exists('b.txt'))\n")
    start = ["run", "-q", "--level", level, "--chdir", str(data.parent)]
    done = caller.run(*start, "--ro", str(data), str(script))
    assert done.out.startswith(f"{data.parent} x ")
    assert done.err == ""
    assert level == "minimal" or done.out.endswith(" False\n"), "minimal may show the host's files"
    caller.write("data/plugin.py", "open('new', 'w')")
    done = caller.run(*start, "--rw", str(data.parent), str(script))
    assert (done.status, done.err) == (0, "")
    assert (data.parent / "new").exists()


def test_what_is_refused_by_a_relative_name_is_told_whole(caller: Caller) -> None:
    assert last_words(caller, "import os; os.chdir('/usr'); open('new', 'w')").startswith("psie: /usr/new is not the plugin's")


@pytest.mark.parametrize(
    ("chdir", "said"),
    [
        ("gone", "--chdir gone: there is no such folder: check the path"),
        ("plugin.py", "--chdir plugin.py: there is no such folder: check the path"),
        ("other", "--chdir other: the plugin does not see it: show it with --ro other, or --rw other"),
        ("/", "--chdir /: a sandbox has its own /: give a folder of files"),
        ("/proc/self", "--chdir /proc/self: a sandbox has its own /proc/"),
    ],
)
def test_a_place_to_start_that_it_does_not_see_is_a_mistake(own: Caller, chdir: str, said: str) -> None:
    data = own.write("data/a.txt", "x").parent
    own.write("other/a.txt", "x")
    own.write("plugin.py", "print('it ran')")
    done = own.run("run", "--ro", str(data), "--chdir", chdir, "plugin.py")
    assert (done.status, done.out) == (125, "")
    assert done.err.startswith(f"psie: {said}")


def test_what_is_lost_with_the_working_directory_is_said(caller: Caller) -> None:
    writes = "for name in ('.hidden', 'a\x1b[31m', 'b', 'c'):\n    open(name, 'w')\n"
    for program, said in (
        (writes, ["not kept, with the plugin's working directory: a\\x1b[31m and 2 more; to keep files, --rw DIR --chdir DIR"]),
        ("open('.hidden', 'w')", []),
        ("pass", []),
    ):
        caller.write("plugin.py", program)
        done = caller.run("run", "--level", caller.level, "plugin.py")
        assert [line.removeprefix("psie: ") for line in done.err.splitlines() if "weaker" not in line] == said
        assert caller.run("run", "-q", "--level", caller.level, "plugin.py").err == ""


def test_settings_beside_it_are_named_where_something_was_refused(own: Caller) -> None:
    settings = own.write("psie.toml", "[limits]\nmax_memory_mb = 32\n")
    own.write("plugin.py", "x = bytearray(10**9)")
    done = own.run("run", "--level", own.level, "plugin.py")
    assert done.status == 137
    assert done.err.splitlines()[-1].startswith(f"psie: what holds here is also said by {settings}: ")


@pytest.mark.parametrize("command", ["spec", "explain", "levels"])
def test_nobody_is_told_of_a_reader_who_has_left(own: Caller, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            own.command(command), stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    told = [line for line in done.stderr.decode().splitlines() if not line.startswith("psie: not in an OCI container: ")]
    assert (done.returncode, told) == (1, [])


def test_nothing_is_said_of_what_is_no_file_or_of_a_good_end(caller: Caller) -> None:
    caller.write("data/a.txt", "x")
    assert told(caller, "gone", "/gone", "-") == []
    assert told(caller, "/usr/lib/nothing") == []
    assert told(caller) == []


def test_what_is_said_of_a_path_cannot_drive_a_terminal(own: Caller) -> None:
    own.write("\x1b[31mdata/a.txt", "x")
    (line,) = told(own, "\x1b[31mdata")
    assert "\x1b" not in line
    assert "31mdata" in line


def test_a_file_that_the_plugin_names_itself_is_named_too_unless_it_is_a_secret(caller: Caller) -> None:
    data, secret = caller.write("data/a.txt", "x"), caller.write("data/.ssh/id_rsa", "x")
    assert last_words(caller, f"open({str(data)!r})").startswith(
        f"psie: the plugin does not see {data}: --ro {data} lets it read"
    )
    assert last_words(caller, f"open({str(secret)!r})").startswith("FileNotFoundError: ")


# -- modules -----------------------------------------------------------------------------------------------------------------


def last_words(caller: Caller, source: str) -> str:
    caller.write("plugin.py", source)
    return caller.run("run", "--level", caller.level, "plugin.py").err.splitlines()[-1]


def test_a_module_that_is_not_there_is_told_where_from_it_would_be(caller: Caller) -> None:
    last = last_words(caller, "import psie_no_such_module.part")
    assert last.startswith(
        "psie: plugins have the packages of the Python that psie is installed in, where no psie_no_such_module"
    )
    assert last.endswith("-m pip install it")


def test_nothing_is_said_of_modules_where_that_is_not_why(own: Caller) -> None:
    assert last_words(own, "import os.nothing").startswith("ModuleNotFoundError: ")
    assert last_words(own, "raise ModuleNotFoundError('any text')") == "ModuleNotFoundError: any text"


# -- while one waits ---------------------------------------------------------------------------------------------------------


def test_the_selftest_counts_on_a_terminal_and_nowhere_else(own: Caller) -> None:
    words = ["selftest", "--level", "standard", "socket_udp"]
    assert "attacks tried" not in own.run(*words).err
    with cli_harness.Session(own, *words) as session:
        session.until(b"\rpsie: 1 attack tried ")
        session.until(b"\r\x1b[K")
        session.until(b"1 stopped, 0 NOT STOPPED")
