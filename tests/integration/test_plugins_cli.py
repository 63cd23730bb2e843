"""`psie plugins`, run as its callers run it: with and without rights, on folders of good, broken and hostile plugins."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import cli_harness
from .cli_harness import Caller, Done

SECRET_FILE = "executed"


@pytest.fixture(params=["own", "user"])
def caller(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Caller]:
    """Whoever runs the tests, and a user without rights."""
    if request.param == "own":
        yield cli_harness.privileged("standard", tmp_path)
        return
    somebody = cli_harness.unprivileged("standard", request.getfixturevalue("user"))
    yield somebody
    somebody.clean()


@pytest.fixture
def folder(caller: Caller) -> Path:
    """A plugin folder "p" with a file, a folder with a manifest, and a broken one."""
    caller.write("p/one.py", "def main(): return 1\n")
    caller.write("p/two/main.py", "from lib import work\n")
    caller.write("p/two/lib/work.py", "def start(): return 2\n")
    caller.write("p/two/plugin.toml", 'name = "The second"\nversion = "2.0"\nentry_point = "lib.work:start"\n')
    caller.write("p/broken.py", "")
    caller.write("p/broken.toml", "[limits]\n\nmax_memory_mb = -5\n")
    return caller.folder / "p"


def plugins(caller: Caller, *words: str) -> Done:
    return caller.run("plugins", *words)


def rows(done: Done) -> dict[tuple[str, str], tuple[str, str]]:
    """(state, detail) by plugin and check."""
    lines = [line.split(None, 3) for line in done.out.splitlines()[1:]]
    return {(line[1], line[2]): (line[0], line[3].strip()) for line in lines if len(line) == 4}


def assert_refused(done: Done, *parts: str) -> None:
    """One sentence, status 125, no output."""
    assert (done.status, done.out) == (125, ""), done
    assert done.err.startswith("psie: ")
    assert done.err.count("\n") == 1
    assert done.err[:-1].isprintable()
    for part in parts:
        assert part in done.err, done.err


def trust(caller: Caller) -> None:
    """A key "author", which the folder "trusted" trusts."""
    made = plugins(caller, "keygen", "author")
    assert (made.status, made.err) == (0, ""), made
    caller.write("trusted/me.pub", made.out)
    for path in (caller.folder / "trusted", caller.folder / "trusted" / "me.pub"):
        path.chmod(path.stat().st_mode & ~0o022)


def test_list(caller: Caller, folder: Path) -> None:
    done = plugins(caller, "list", "p")
    assert (done.status, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[:2] for line in lines if line[0] in ("ok", "wrong")] == [["wrong", "broken"], ["ok", "one"], ["ok", "two"]]
    assert "broken.toml, line 3: [limits] max_memory_mb is -5: give a number" in done.out
    assert "The second" in done.out
    as_json = json.loads(plugins(caller, "list", "p", "--json").out)
    assert [each["id"] for each in as_json] == ["broken", "one", "two"]
    assert as_json[2] == {
        "id": "two",
        "path": "p/two",
        "name": "The second",
        "version": "2.0",
        "description": "",
        "error": None,
    }
    assert as_json[0]["error"].startswith("broken.toml, line 3: ")


def test_check_sign_and_check_again(caller: Caller, folder: Path) -> None:
    done = plugins(caller, "check", "p")
    assert done.status == 1
    found = rows(done)
    assert found["broken", "manifest"][0] == "wrong"
    assert found["two", "manifest"] == ("ok", "two/plugin.toml")
    assert found["two", "syntax"][0] == found["two", "files"][0] == "ok"
    assert found["one", "signature"][0] == found["one", "manifest"][0] == "absent"
    assert plugins(caller, "check", "p", "two").status == 0  # not signed, and nobody wants it to be

    trust(caller)
    assert stat.S_IMODE((caller.folder / "author").stat().st_mode) == 0o600
    signed = plugins(caller, "sign", "p", "two", "--key", "author")
    assert (signed.status, signed.err) == (0, "")
    assert signed.out.startswith("signed two (sha256 ")
    assert signed.out.endswith("): two/plugin.sig\n")
    done = plugins(caller, "check", "p", "two", "--trusted-keys", "trusted")
    assert done.status == 0
    assert rows(done)["two", "signature"] == ("ok", "by the trusted key me")
    assert plugins(caller, "check", "p", "two").status == 1  # psie's own folder does not trust that key

    caller.write("p/two/main.py", "from lib import work, more\n")
    done = plugins(caller, "check", "p", "two", "--trusted-keys", "trusted")
    assert done.status == 1
    state, why = rows(done)["two", "signature"]
    assert (state, why[:21]) == ("wrong", "no trusted key has si")


def test_what_is_too_large_is_not_compiled_outside_of_a_sandbox(caller: Caller, folder: Path) -> None:
    """A syntax tree takes six hundred times the memory of its text."""
    caller.write("p/one.py", "x=1\n" * 300_000)
    done = plugins(caller, "check", "p", "one")
    assert (done.status, rows(done)["one", "syntax"][0]) == (1, "wrong")
    assert "is larger than 1 MB" in done.out
    done = caller.run("check", "p/one.py")
    assert (done.status, "is larger than 1 MB" in done.out) == (1, True), done


def test_a_manifest_can_want_a_signature(caller: Caller, folder: Path) -> None:
    caller.write("p/one.toml", "[permissions]\nrequire_code_signing = true\n")
    done = plugins(caller, "check", "p", "one")
    assert (done.status, rows(done)["one", "signature"][0]) == (1, "wrong")
    trust(caller)
    assert plugins(caller, "sign", "p", "one", "--key", "author").status == 0
    assert plugins(caller, "check", "p", "one", "--trusted-keys", "trusted").status == 0


def test_digests(caller: Caller, folder: Path) -> None:
    caller.write("p/one.json", json.dumps({"sha256": {"one.py": "0" * 64}}))
    done = plugins(caller, "check", "p", "one")
    assert (done.status, rows(done)["one", "digests"][0]) == (1, "wrong")
    trust(caller)
    assert_refused(
        plugins(caller, "sign", "p", "one", "--key", "author"), "one.py is not the file whose sha256 is in the manifest"
    )


SYNTAX = [
    ("def main(:\n", "line 1: "),
    ("x = 1\n\n\x00", "one.py is no text, because there is a null byte in it: give a Python file"),
    ("\x7fELF\2\1\1\0" + "x" * (1 << 20), "one.py is a compiled program (ELF): give a Python file"),
    ("# coding: no-such-encoding\n", "encoding"),
    ("x = " + "(" * 500, "too many nested parentheses"),
    ("x = " + "-" * 200_000 + "1", "nested too deeply"),
    ("x = '\x1b[2J", "unterminated string literal"),
]


@pytest.mark.parametrize(("source", "why"), SYNTAX, ids=range(len(SYNTAX)))
def test_what_does_not_compile(caller: Caller, folder: Path, source: str, why: str) -> None:
    (folder / "one.py").write_bytes(source.encode())
    done = plugins(caller, "check", "p", "one")
    assert (done.status, done.err) == (1, "")
    state, detail = rows(done)["one", "syntax"]
    assert state == "wrong"
    assert why in detail
    assert "\x1b" not in done.out


def test_nothing_of_a_plugin_is_run(caller: Caller, folder: Path) -> None:
    source = f"open({str(caller.folder / SECRET_FILE)!r}, 'w')\nx = 1 is 1\n"
    caller.write("p/one.py", source)
    caller.write("p/two/__init__.py", source)
    caller.write("p/json.py", source)
    caller.write("p/two/tomllib.py", source)
    trust(caller)
    for words in (["list", "p"], ["check", "p"], ["sign", "p", "two", "--key", "author"]):
        for where in (caller.folder, folder, folder / "two"):
            words[1] = os.path.relpath(folder, where)
            key = [os.path.relpath(caller.folder / "author", where) if word == "author" else word for word in words]
            done = caller.run("plugins", *key, cwd=where)
            assert done.status in (0, 1), done
            assert done.err == ""  # nor is a warning of the compiler's shown
    assert not (caller.folder / SECRET_FILE).exists()
    assert not list(folder.rglob("__pycache__"))


def test_hostile_texts_are_escaped(caller: Caller, folder: Path) -> None:
    for text in ("\x1b[2J\u202e", "[red]x[/red]", "\\[/x]", "[/]"):
        caller.write("p/one.json", json.dumps({"description": text, "version": "[bold]"}))
        done = plugins(caller, "list", "p")
        assert (done.status, done.err) == (0, "")
        assert "\x1b" not in done.out
        assert "\u202e" not in done.out
        assert "[bold]" in done.out
        assert text in done.out or not text.isprintable()
    caller.write("p/one.json", "{}")
    os.rename(os.fsencode(folder / "one.json"), os.fsencode(folder) + b"/\xff\x1b]0;title\x07.py")
    for words in (["list", "p"], ["check", "p"], ["list", "p", "--json"]):
        done = plugins(caller, *words)
        assert done.err == ""
        assert "\x1b" not in done.out
        assert "title" in done.out


def test_mistakes(caller: Caller, folder: Path) -> None:
    assert_refused(plugins(caller, "list", "gone"), "gone cannot be opened as a plugin folder (No such file or directory)")
    assert_refused(plugins(caller, "list", "p/one.py"), "Not a directory")
    assert_refused(plugins(caller, "check", "p", "tow"), "tow is no plugin of p: did you mean two?")
    assert_refused(plugins(caller, "check", "p", "../p/one"), "is no plugin of p")
    assert_refused(plugins(caller, "check", "p", "x\x1b[2J" * 1000), "is no plugin of p")
    assert_refused(
        plugins(caller, "sign", "p", "one", "--key", "gone"), "gone cannot be read (No such file or directory): check the path"
    )
    assert_refused(plugins(caller, "sign", "p", "one"), "--key")
    assert_refused(plugins(caller, "sign", "p", "broken", "--key", "gone"), "broken.toml, line 3: ")
    assert_refused(plugins(caller, "lst", "p"), "lst")
    trust(caller)
    assert_refused(plugins(caller, "keygen", "author"), "author is there already")
    assert_refused(
        plugins(caller, "keygen", "gone/author"),
        "gone/author cannot be made (No such file or directory): give a file in a folder of yours",
    )
    (caller.folder / "author").chmod(0o644)
    assert_refused(plugins(caller, "sign", "p", "one", "--key", "author"), "chmod 600 it")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_ended_leaves_no_plugin_behind(caller: Caller, number: signal.Signals) -> None:
    """As they were read, they lie in a folder of psie's."""
    caller.write("p/waits.py", "import time\n\ndef main():\n    print(__file__, flush=True)\n    time.sleep(20)\n")
    with caller.start("plugins", "run", str(caller.folder / "p")) as process:
        assert process.stderr is not None
        place = process.stderr.readline().decode().strip()
        while not place.endswith("/waits.py"):  # what is weaker on this host
            place = process.stderr.readline().decode().strip()
        assert os.path.exists(place)
        process.send_signal(number)
        process.communicate(timeout=cli_harness.SECONDS)
        assert process.returncode == 128 + number
    assert not os.path.exists(place)


def test_running_says_where_signatures_are_wanted(caller: Caller) -> None:
    caller.write("p.toml", "[permissions]\nrequire_code_signing = true\n")
    path = caller.write("plugin.py", "print('ran')")
    assert_refused(caller.run("run", "--config", "p.toml", path), "require_code_signing", "EnhancedPluginFramework")
