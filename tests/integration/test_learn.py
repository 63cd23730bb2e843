"""`psie learn` and `psie check` as people run them: what is granted, what is kept, what is written, and that it then works."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox.cli import trial

from . import cli_harness, harness
from .cli_harness import Caller, Done

EXAMPLE = harness.REPOSITORY / "examples" / "wordcount.py"


@pytest.fixture(params=["own", "user"])
def caller(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Caller]:
    """Whoever runs the tests, and a user without rights."""
    with cli_harness.called(request.param, "strict", tmp_path, request) as one:
        yield one


@pytest.fixture
def own(tmp_path: Path) -> Caller:
    return cli_harness.privileged("strict", tmp_path)


@contextmanager
def listening() -> Iterator[tuple[int, list[float]]]:
    """A port of this machine, and when somebody has connected to it."""
    seen: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                seen.append(time.monotonic())
                connection.sendall(b"hello\n")
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], seen
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def texts(caller: Caller) -> tuple[Path, Path, Path]:
    """The example, a folder of three texts, and a place for its result."""
    plugin = caller.write("plugin/wordcount.py", EXAMPLE.read_text())
    for number in range(3):
        caller.write(f"texts/{number}.txt", "one two three\n")
    return plugin, caller.folder / "texts", caller.write("out/.keep", "").parent / "result.json"


def learned(caller: Caller, plugin: Path, *words: str | Path, status: int = 0) -> tuple[dict[str, Any], Done]:
    """What `psie learn --dry-run` prints."""
    done = caller.run("learn", "--dry-run", *words[: words.index("--")] if "--" in words else words, plugin, *after(words))
    assert done.status == status, done.err
    return tomllib.loads(done.out), done


def after(words: tuple[str | Path, ...]) -> tuple[str | Path, ...]:
    return words[words.index("--") :] if "--" in words else ()


def test_the_example_is_learned_proved_and_works(caller: Caller) -> None:
    plugin, folder, result = texts(caller)
    done = caller.run("learn", plugin, "--", folder, result)
    assert done.status == 0, done.err
    assert not result.exists()  # nothing of what it did while it was learned
    written = plugin.parent / "psie.toml"
    assert sorted(os.listdir(plugin.parent)) == ["psie.toml", "wordcount.py"]
    document = tomllib.loads(written.read_text())
    assert document["isolation"] == {"level": "strict"}
    assert document["permissions"] == {
        "readable_paths": [str(folder)],
        "allowed_directories": [str(result.parent)],
        "allow_subprocess_execution": True,
    }
    assert document["limits"]["max_subprocess_count"] == 2
    assert "the plugin's word" in written.read_text()
    assert "seen by the kernel" in written.read_text()
    assert done.err.count("WARNING") == 2

    run = caller.run("run", "-q", "--config", written, plugin, folder, result)
    assert (run.status, run.out) == (0, "9 words in 3 files\n"), run.err
    assert json.loads(result.read_text()) == {"0.txt": 3, "1.txt": 3, "2.txt": 3}
    for entry in document["permissions"]:  # it is the smallest: without any one of them it does not work
        fewer = {**document, "permissions": {name: value for name, value in document["permissions"].items() if name != entry}}
        lines = [
            line
            for table in fewer
            for line in (f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in fewer[table].items()))
        ]
        less = caller.write("less.toml", "\n".join(lines) + "\n")
        run = caller.run("run", "-q", "--config", less, plugin, folder, result)
        assert (run.status, run.out) != (0, "9 words in 3 files\n")  # without the folder it counts 0 words in 0 files


def test_a_level_that_shows_no_programs_is_given_the_one_it_needs(own: Caller) -> None:
    plugin, folder, result = texts(own)
    document, _ = learned(own, plugin, "--level", "maximum", "--", folder, result)
    assert document["permissions"]["readable_paths"] == [str(folder), os.path.realpath("/usr/bin/wc")]


def test_databases_are_learned_and_no_cache_of_bytecode(caller: Caller) -> None:
    lines = "import sqlite3, sys, helper\nbase = sqlite3.connect(sys.argv[1] + '/base')\nbase.execute('create table t(a)')\n"
    plugin = caller.write("p/plugin.py", lines)
    caller.write("p/helper.py", "x = 1\n")
    folder = caller.write("out/.keep", "").parent
    document, _ = learned(caller, plugin, "--", folder)
    assert document["permissions"] == {"allowed_directories": [str(folder)]}
    done = caller.run("run", "-q", "--rw", plugin.parent, "--rw", folder, plugin, folder)
    assert (done.status, done.err) == (0, "")
    assert sorted(os.listdir(plugin.parent)) == ["helper.py", "plugin.py"]


def test_a_file_that_is_there_is_not_replaced(own: Caller) -> None:
    plugin = own.write("p/plugin.py", "print(1)\n")
    there = own.write("p/psie.toml", "[limits]\nmax_memory_mb = 64\n")
    done = own.run("learn", plugin)
    assert (done.status, done.err.count("\n")) == (125, 1)
    assert "--force" in done.err
    assert there.read_text() == "[limits]\nmax_memory_mb = 64\n"
    assert own.run("learn", "--force", plugin).status == 0
    assert tomllib.loads(there.read_text())["permissions"] == {}
    assert own.run("learn", "--output", own.folder / "p/other.toml", plugin).status == 0
    assert sorted(os.listdir(own.folder / "p")) == ["other.toml", "plugin.py", "psie.toml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--level", "minimal"], "--level minimal"),
        (["--level", "strictt"], "did you mean strict"),
        (["--output", "/nonexistent/x.toml"], "cannot be written"),
        (["--output", "/"], "this is a directory"),
        (["--output", "/dev/null", "--force"], "--output /dev/null: this is no file of yours"),
        (["--output", ""], "this is a directory"),
        (["--memory", "5M"], "--memory is 5.0"),
        (["--status", "300"], "--status 300"),
        (["--allow-file", "/nonexistent"], "--allow-file /nonexistent: there is no such file or folder: check the path"),
        (["--allow-file", "/"], "--allow-file /: that is more"),
        (["--allow-host", "a b"], "--allow-host a b"),
        (["--memory", "1T"], "--memory 1T"),
        (["--env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
    ],
)
def test_a_mistake_is_one_sentence(own: Caller, words: list[str], said: str) -> None:
    done = own.run("learn", *words, own.write("plugin.py", "print(1)\n"))
    assert done.status == 125
    assert said in done.err
    assert done.err.startswith("psie: ")
    assert done.err.count("\n") == 1, "nothing was run"
    assert os.listdir(own.folder) == ["plugin.py"]


def test_without_consent_nothing_is_written(caller: Caller) -> None:
    secret = caller.write("elsewhere/data.txt", "of the caller\n")
    plugin = caller.write("p/plugin.py", f"print(open({str(secret)!r}).read())\n")
    done = caller.run("learn", plugin)
    assert done.status == 1
    assert f"not granted: read {secret}" in done.err
    assert os.listdir(plugin.parent) == ["plugin.py"]
    document, _ = learned(caller, plugin, "--allow-file", secret)
    assert document["permissions"] == {"readable_paths": [str(secret)]}
    document, _ = learned(caller, plugin, "--allow-files")
    assert document["permissions"] == {"readable_paths": [str(secret)]}


def test_what_it_can_do_without_is_left_out(own: Caller) -> None:
    needed, optional = own.write("a/needed", "x\n"), own.write("a/optional", "x\n")
    plugin = own.write(
        "plugin.py",
        f"""\
        import os
        os.path.exists({str(optional)!r})
        print(open({str(needed)!r}).read())
        """,
    )
    document, _ = learned(own, plugin, "--allow-files")
    assert document["permissions"]["readable_paths"] == [str(needed)]
    document, _ = learned(own, plugin, "--allow-files", "--keep-all")
    assert document["permissions"]["readable_paths"] == [str(needed), str(optional)]
    plugin.write_text(f"import os\n{plugin.read_text()}print(os.urandom(8))\n")
    document, done = learned(own, plugin, "--allow-files")
    assert document["permissions"]["readable_paths"] == [str(needed), str(optional)]
    assert "output is another each time" in done.out


def test_deletions_and_changes_are_learned_and_not_done(own: Caller) -> None:
    old = own.write("out/old", "x")
    plugin = own.write("plugin.py", "import os, sys\nos.remove(sys.argv[1] + '/old')\nos.mkdir(sys.argv[1] + '/new')\n")
    document, _ = learned(own, plugin, "--", old.parent)
    assert document["permissions"] == {"allowed_directories": [str(old.parent)], "allow_file_deletion": True}
    assert os.listdir(old.parent) == ["old"]


@pytest.mark.long
def test_folders_that_it_would_make_are_seen(own: Caller) -> None:
    """os.makedirs begins at the first folder that it does not see, and that is above what it is about."""
    inner = own.write("out/deep/old", "x").parent
    source = "import os, sys\nos.makedirs(sys.argv[1] + '/new', exist_ok=True)\nopen(sys.argv[1] + '/new/x', 'w').close()\n"
    plugin = own.write("plugin.py", source)
    for options in ([], ["--allow-files"]):
        document, _ = learned(own, plugin, *options, "--", inner)
        assert document["permissions"] == {"allowed_directories": [str(inner)]}
    plugin.write_text(source.replace("sys.argv[1]", repr(str(inner))))
    document, _ = learned(own, plugin, "--allow-files")
    assert document["permissions"] == {"allowed_directories": [str(inner)]}


def test_what_would_not_be_kept_did_not_work(own: Caller) -> None:
    """psie run keeps nothing of a run in which something was refused, so it would not have worked under what was learned."""
    out = own.write("out/old", "x").parent
    source = "import os, sys\nopen(sys.argv[1] + '/new', 'w').close()\ntry:\n    os.fork()\nexcept OSError:\n    pass\n"
    done = own.run("learn", "--dry-run", "--no-subprocess", own.write("plugin.py", source), "--", out)
    assert (done.status, done.out) == (1, ""), done.err
    assert "would not be kept: a violation was recorded" in done.err


def test_a_host_is_learned_if_it_is_allowed(caller: Caller) -> None:
    source = "import socket, sys\nprint(socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5).recv(9))\n"
    plugin = caller.write("plugin.py", source)
    with listening() as (port, seen):
        assert caller.run("learn", "--dry-run", "--allow-network", plugin, "--", str(port)).status == 1
        assert not seen
        document, done = learned(caller, plugin, "--allow-host", f"127.0.0.1:{port}", "--", str(port))
        assert seen
        assert document["permissions"] == {"allow_network_access": True, "allowed_hosts": [f"127.0.0.1:{port}"]}
        assert "private address" in done.err


def test_limits_are_measured_and_hold(own: Caller) -> None:
    plugin = own.write("plugin.py", "import time\nx = bytearray(150 << 20)\nprint('x' * (3 << 20))\ntime.sleep(0.2)\n")
    document, _ = learned(own, plugin)
    assert 300 <= document["limits"]["max_memory_mb"] <= 420
    assert document["limits"]["max_output_mb"] >= 12
    done = own.run("learn", "--dry-run", "--memory", "64M", plugin)
    assert done.status == 1
    assert "--memory changes that" in done.err


def test_limits_that_are_passed_are_raised(own: Caller) -> None:
    """Threads and files; stacks of threads are more address space than memory, which some hosts limit in its place.

    The stacks are of a size that leaves some memory where one more does not fit: with next to none left malloc still finds a
    place, but after so many system calls that a traceback takes seconds.
    """
    source = """\
        import threading
        threading.stack_size(12 << 20)
        files = [open(f"{number}", "w") for number in range(60)]
        gate = threading.Barrier(8)
        threads = [threading.Thread(target=gate.wait, args=(20,), daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("done")
        """
    plugin = own.write("plugin.py", source)
    done = own.run("learn", plugin)
    assert done.status == 0, done.err
    limits = tomllib.loads((own.folder / "psie.toml").read_text())["limits"]
    assert limits["max_thread_count"] >= 9
    assert limits["max_open_files"] > 60
    assert own.run("run", "-q", "--config", own.folder / "psie.toml", plugin).out == "done\n"


def test_standard_input_is_given_to_each_run(own: Caller) -> None:
    plugin = own.write("plugin.py", "import sys\nsys.exit(sys.stdin.read() != 'abc')\n")
    assert own.run("learn", "--dry-run", plugin, stdin=b"abc").status == 0
    done = own.run("learn", "--dry-run", plugin, stdin=b"abd")
    assert done.status == 1
    assert "--status 1" in done.err
    assert own.run("learn", "--dry-run", "--status", "1", plugin, stdin=b"abd").status == 0


def test_a_question_is_asked_on_a_terminal(own: Caller) -> None:
    data = own.write("elsewhere/data.txt", "x\n")
    plugin = own.write("plugin.py", f"print(open({str(data)!r}).read())\n")
    for answer, status in (("y", 0), ("n", 1)):
        with cli_harness.Session(own, "learn", "--output", str(own.folder / f"{answer}.toml"), str(plugin)) as session:
            session.until(f"may it read {data}".encode())
            session.type(f"{answer}\n".encode())
            assert session.status() == status
    assert (own.folder / "y.toml").exists()
    assert not (own.folder / "n.toml").exists()


def test_nothing_is_left_of_one_that_was_killed(own: Caller) -> None:
    plugin = own.write("p/plugin.py", "import time\ntime.sleep(60)\n")
    before = set(os.listdir("/tmp"))
    with own.as_module().start("learn", str(plugin)) as process:
        assert harness.wait_until(lambda: bool(harness.engine_processes(cli_harness.TOKEN)))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert harness.wait_until(cli_harness.engine_is_gone)
    assert os.listdir(plugin.parent) == ["plugin.py"]
    assert not {name for name in set(os.listdir("/tmp")) - before if "psie" in name and "learn" in name}
    assert own.run("gc").status == 0  # an empty cgroup is left where all that would have removed it was killed as well


@pytest.mark.long
def test_nothing_is_remembered_or_quarantined(own: Caller, tmp_path: Path) -> None:
    own = cli_harness.remembering(own, tmp_path)
    source = """\
        import ctypes
        libc = ctypes.CDLL(None)
        for number in range(150, 180):  # pivot_root, chroot, mount, reboot and their like on x86-64; others elsewhere
            libc.syscall(number, 0, 0, 0)
        """
    plugin = own.write("plugin.py", source)
    own.run("learn", "--dry-run", plugin)
    own.run("check", "--run", plugin)
    assert json.loads(own.run("history", "--json").out) == []
    assert json.loads(own.run("quarantine", "list", "--json").out) == []
    assert own.run("run", "-q", plugin).status == 126  # which is what it would have come to


# -- psie check --------------------------------------------------------------------------------------------------------


def test_check_reads_and_runs_nothing(caller: Caller) -> None:
    plugin = caller.write(
        "plugin.py", f"import subprocess\nopen({str(caller.folder / 'made')!r}, 'w')\nsubprocess.run(['true'])\n"
    )
    done = caller.run("check", "--json", plugin)
    told = json.loads(done.out)
    assert (done.status, told["method"], told["level"]) == (1, "guess", "standard")
    assert [(row["place"], set(row["levels"].values())) for row in told["refused"]] == [
        ("plugin.py, line 2", {"refused"}),
        ("plugin.py, line 3", {"refused"}),
    ]
    assert told["works"] == dict.fromkeys(("minimal", "standard", "strict", "maximum"), False)
    assert not (caller.folder / "made").exists()
    assert "a guess" in caller.run("check", plugin).err
    allowing = caller.write(
        "all.toml",
        f"""\
        [permissions]
        allow_subprocess_execution = true
        allowed_directories = [{str(caller.folder)!r}]
        [limits]
        max_subprocess_count = 2
        """,
    )
    assert caller.run("check", "--config", allowing, plugin).status == 0


def test_check_knows_what_a_level_shows(own: Caller) -> None:
    plugin = own.write("plugin.py", "open('/etc/passwd')\nopen('/etc/fstab')\nopen('/var/log/dpkg.log')\n")
    told = json.loads(own.run("check", "--json", "--level", "strict", plugin).out)
    shown = {row["place"]: row["levels"] for row in told["refused"]}
    for line, path in enumerate(("/etc/passwd", "/etc/fstab", "/var/log/dpkg.log"), 1):
        for level in ("standard", "strict", "maximum"):
            probe = own.write("probe.py", f"import os, sys\nsys.exit(not os.path.exists({path!r}))\n")
            is_there = own.run("run", "-q", "--level", level, probe).status == 0
            verdict = shown.get(f"plugin.py, line {line}", {}).get(level, "ok")
            assert (verdict == "ok") == is_there, (path, level)


def test_check_runs_at_each_level(caller: Caller) -> None:
    plugin, folder, result = texts(caller)
    done = caller.run("check", "--run", "--json", plugin, folder, result)
    told = json.loads(done.out)
    assert (done.status, told["method"]) == (1, "run")
    assert set(told["ended"]) == {"minimal", "standard", "strict", "maximum"}
    rows = {row["what"]: row["levels"] for row in told["refused"]}
    assert any("reads" in what and levels.get("strict") == "hidden" for what, levels in rows.items())
    assert any("writes" in what and levels.get("strict") == "refused" for what, levels in rows.items())
    assert not result.exists()
    good = caller.run("check", "--run", "--level", "strict", caller.write("good.py", "print(1)\n"))
    assert good.status == 0, good.err
    assert "status 0" in good.out


def test_check_says_what_is_wrong(own: Caller) -> None:
    plugin = own.write("plugin.py", "print(1\n")
    done = own.run("check", plugin)
    assert (done.status, "line 1" in done.out) == (1, True)
    assert own.run("check", "/nonexistent").status == 125
    assert own.run("check", plugin, "argument").status == 125
    assert own.run("check", own.write("good.py", "print(1)\n")).status == 0


def test_an_interrupt_that_comes_as_a_run_has_ended_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C on a terminal ends the run as well: it was told as "No such process", with the status of a failure of psie's."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text("")
    wait = os.waitpid

    def interrupted(pid: int, options: int) -> tuple[int, int]:
        waited = wait(pid, options)
        if sys._getframe(1).f_globals["__name__"] == trial.__name__:  # others wait as well
            raise KeyboardInterrupt
        return waited

    runner = trial.Runner(str(plugin), (), ())
    monkeypatch.setattr(os, "waitpid", interrupted)
    with harness.nothing_left(), pytest.raises(KeyboardInterrupt):
        runner.run(None)
