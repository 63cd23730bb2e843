"""How `psie run` starts: by a script, with a zygote that comes up beside the command. A plugin sees what it ever saw."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.engine import meeting, spawn

from . import cli_harness, harness
from .cli_harness import READY, Caller

WHO = ["own-minimal", "own-strict", "own-maximum", "user-minimal", "user-standard"]


@pytest.fixture(params=WHO)
def caller(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    who, level = request.param.split("-")
    if who == "own":
        caller = cli_harness.privileged(level, tmp_path_factory.mktemp("start"))
    else:
        caller = cli_harness.unprivileged(level, request.getfixturevalue("user"))
    yield caller
    caller.clean()


@pytest.fixture
def strict(tmp_path: Path) -> Caller:
    return cli_harness.privileged("strict", tmp_path)


def all_gone() -> bool:
    return not harness.engine_processes(cli_harness.TOKEN)


STATE = """
    import builtins, gc, json, os, resource, signal, sys
    umask = os.umask(0o22)
    try:
        lines = [line for line in open("/proc/self/status") if line.startswith(("SigBlk", "SigCgt", "Shd", "Threads", "Cap"))]
    except OSError:
        lines = []
    print(json.dumps([
        [str(sys.flags), sys.argv, sys.warnoptions, sys._xoptions, sys.executable, sys.prefix, sys.getrecursionlimit()],
        sys.path, sorted(sys.modules), sorted(vars(builtins)), sorted(vars(sys)),
        [str(type(each)) for each in (*sys.meta_path, *sys.path_hooks)],
        {number: repr(signal.getsignal(number)) for number in signal.valid_signals()},
        lines,
        [[each.encoding, each.errors, each.mode, each.line_buffering] for each in (sys.stdin, sys.stdout, sys.stderr)],
        [sys.getfilesystemencoding(), __import__("_locale").setlocale(0, None), gc.isenabled(), gc.get_threshold(), umask],
        {name: value for name, value in os.environ.items() if name not in ("HOME", "TMPDIR")},
        [resource.getrlimit(number) for number in range(16)], sorted(map(int, os.listdir("/proc/self/fd"))) if lines else [],
    ], default=repr))
"""


def test_a_plugin_sees_what_it_sees_without_the_script(caller: Caller) -> None:
    caller.plugin("pass")  # and none of both compiles a recipe
    seen = [json.loads(each.plugin(STATE).out) for each in (caller, caller.as_module())]
    seen[0][1] = [place for place in seen[0][1] if cli_harness.TOKEN not in place]  # the links to the packages
    code = "import sys; print(*sys.modules)"
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        loaded = [subprocess.check_output([sys.executable, "-I", "-S", *each]) for each in (["-c", code], [file.name])]
    by_option = {name.decode() for name in set(loaded[0].split()) - set(loaded[1].split())}  # from 3.13 on there are some
    seen[1][2] = [name for name in seen[1][2] if name in seen[0][2] or name not in by_option]
    for number, (one, other) in enumerate(zip(*seen, strict=True)):
        assert one == other, number


# Reads all of its own memory: run by itself with `python`, where it finds what it looks for, and as a plugin. It knows each
# word in two halves, so that it does not find its own.
SEARCH = """
    import ctypes, sys

    def pieces():
        with open("/proc/self/maps") as maps:
            places = [line.split(maxsplit=5) for line in maps]
        for place, rights, _, _, _, *name in places:
            if rights.startswith("r") and not "".join(name).startswith("[v"):
                start, end = (int(each, 16) for each in place.split("-"))
                for at in range(start, end, 1 << 20):
                    yield ctypes.string_at(at, min(end - at, 1 << 20))

    def contains(piece, half, rest):
        at = piece.find(half)
        while at >= 0 and piece[at + len(half) : at + len(half) + len(rest)] != rest:
            at = piece.find(half, at + 1)
        return at >= 0

    found, read = set(), 0
    for piece in pieces():
        read += len(piece)
        for half, rest in zip(sys.argv[1::2], sys.argv[2::2]):
            if any(contains(piece, half.encode(code), rest.encode(code)) for code in ("utf-8", "utf-16-le", "utf-32-le")):
                found.add(half)
    print([read >> 20, *sorted(found)])
"""
SECRETS = {"variable": ("qzx-vari", "able-7351"), "path": ("qzx-pa", "th-7352"), "option": ("qzx-opt", "ion-7353")}


def test_nothing_of_the_caller_is_in_a_plugins_memory(caller: Caller) -> None:
    """Nothing of its environment and of its command line; where the same code runs outside it finds it all."""
    whole = {name: "".join(halves) for name, halves in SECRETS.items()}
    halves = [half for each in SECRETS.values() for half in each]
    variables = {"SECRET": whole["variable"], "PATH": f"{caller.environment['PATH']}:/{whole['path']}"}
    outside = [sys.executable, "-c", textwrap.dedent(SEARCH), *halves]
    environment = {**caller.environment, **variables, "OPTION": whole["option"]}
    done = subprocess.run(outside, env=environment, capture_output=True, text=True, check=True)
    size, *found = ast.literal_eval(done.stdout)
    assert size > 5
    assert found == sorted(first for first, _ in SECRETS.values())
    for options in ((), ("--result-file", str(caller.folder / f"{whole['option']}.json"))):
        size, *found = ast.literal_eval(caller.plugin(SEARCH, *halves, options=options, env=variables).out)
        assert size > 5
        assert not found


def test_it_is_found_by_a_link_and_by_its_name(strict: Caller, tmp_path: Path) -> None:
    plugin = strict.write("plugin.py", "print('here')")
    link = tmp_path / "programs" / "psie"
    link.parent.mkdir()
    link.symlink_to(strict.script)
    environment = {**strict.environment, "PATH": f"{link.parent}:{strict.environment['PATH']}"}
    for program, folder in (("psie", "/"), ("programs/psie", tmp_path), (str(link), "/")):
        line = [program, "run", "-q", str(plugin)]
        done = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("here\n", "")


def test_there_is_one_zygote(caller: Caller) -> None:
    """And below it what belongs to the call: an init and a worker. One of another kind than was needed has gone."""
    path = caller.write("plugin.py", "import time\nprint('ready', flush=True)\ntime.sleep(60)")
    with caller.start("run", "-q", "--level", caller.level, str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == READY
        found = harness.engine_processes(cli_harness.TOKEN)
        children = [pid for pid, each in found.items() if each.parent == process.pid and each.state != "Z"]
        assert len(children) == 1, found
        assert len(found) == 4, found
    assert harness.wait_until(all_gone, harness.SOON), harness.engine_processes(cli_harness.TOKEN)


@pytest.mark.parametrize("arguments", [["--nonsense"], ["/nonexistent.py"], ["--help"], []], ids=repr)
def test_a_mistake_leaves_no_zygote(caller: Caller, arguments: list[str]) -> None:
    done = caller.run("run", *arguments)
    assert done.status == (0 if arguments == ["--help"] else 125), done
    assert harness.wait_until(all_gone, harness.SOON), harness.engine_processes(cli_harness.TOKEN)


def test_whenever_it_is_killed_nothing_is_left(caller: Caller) -> None:
    path = caller.write("plugin.py", "import time\ntime.sleep(60)")
    for milliseconds in range(0, 40, 2):
        with caller.start("run", "-q", "--level", caller.level, str(path)) as process:
            time.sleep(milliseconds / 1000)
            process.kill()
        assert harness.wait_until(all_gone, harness.SOON), (milliseconds, harness.engine_processes(cli_harness.TOKEN))


@contextlib.contextmanager
def about_to_run(caller: Caller, source: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that becomes `psie run` when it is told so, so that its pid is known before."""
    line = caller.command(*caller.plugin_line(source))
    shell = ["sh", "-c", 'read line && exec "$@"', "sh", *line]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(shell, env=caller.environment, cwd=caller.folder, **streams) as process:  # type: ignore[call-overload]
        yield process


def test_somebody_else_at_the_meeting_point(strict: Caller) -> None:
    """Whoever has taken the name before is no caller of a zygote, and the command goes without that zygote."""
    with about_to_run(strict, "print('here')") as process, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.bind(meeting.place(process.pid))
        stranger.listen()
        stranger.settimeout(harness.SOON)
        output, errors = process.communicate(b"\n", timeout=cli_harness.SECONDS)
        assert (output, errors, process.returncode) == (b"here\n", b"", 0)
        with contextlib.suppress(TimeoutError):
            visitor, _ = stranger.accept()
            assert visitor.recv(1) == b""  # it was there, and has told nothing
            visitor.close()
    assert harness.wait_until(all_gone, harness.SOON)


@pytest.mark.skipif(os.geteuid() != 0, reason="the process has to be another user's")
def test_who_has_died_at_the_meeting_point_is_no_zygote() -> None:
    """Anybody can leave a socket there that was listened to by a process with the number that the zygote will have."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.bind(meeting.place(os.getpid()))
        died = os.fork()
        if died == 0:
            os.setuid(65534)
            stranger.listen()
            os._exit(0)
        os.waitpid(died, 0)
        pidfd = os.pidfd_open(os.getpid())  # of somebody else, as whoever has that number by now
        try:
            assert meeting.connect(died, pidfd) is None
        finally:
            os.close(pidfd)


def test_a_zygote_that_dies_when_it_has_listened_is_not_the_one() -> None:
    """As one that never came: it has been told what to set up, and nothing else."""
    caller = os.getpid()
    zygote = os.fork()
    if zygote == 0:
        listener = meeting.listen(caller)
        meeting.accept(listener, caller, os.pidfd_open(caller))
        os._exit(1)
    early = spawn.Early(zygote, outer=False)
    assert harness.wait_until(early.is_there, harness.SOON)
    os.waitid(os.P_PID, zygote, os.WEXITED | os.WNOWAIT)
    early.set_up({})
    assert early.connection() is None
    early.leave()


def test_strangers_who_come_to_the_meeting_point(strict: Caller) -> None:
    with about_to_run(strict, "print('here')") as process:
        visitors: list[socket.socket] = []
        is_over = threading.Event()

        def visit() -> None:
            while not is_over.is_set() and len(visitors) < 5:
                visitor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                try:
                    visitor.connect(meeting.place(process.pid))
                    visitors.append(visitor)
                except OSError:
                    visitor.close()

        thread = threading.Thread(target=visit)
        thread.start()
        output, errors = process.communicate(b"\n", timeout=cli_harness.SECONDS)
        is_over.set()
        thread.join()
        assert (output, errors, process.returncode) == (b"here\n", b"", 0)
        for visitor in visitors:
            with contextlib.suppress(ConnectionResetError):
                assert visitor.recv(1) == b""
            visitor.close()


def test_however_many_strangers_come_the_caller_is_heard() -> None:
    """A zygote that left after so many would take the run with it that it has been told of already."""
    caller = os.getpid()
    listener, pidfd = meeting.listen(caller), os.pidfd_open(caller)
    stranger = os.fork()
    if stranger == 0:
        for _ in range(2000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
                visitor.connect(meeting.place(caller))
        os._exit(0)

    def come() -> None:
        os.waitpid(stranger, 0)
        assert harness.wait_until(lambda: meeting.connect(caller, pidfd), harness.SOON)

    thread = threading.Thread(target=come)
    thread.start()
    control = meeting.accept(listener, caller, pidfd)
    thread.join()
    assert control is not None
    for each in (control, listener):
        each.close()
    os.close(pidfd)


def test_a_zygote_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "MEETING_SECONDS", 0.1)
    with subprocess.Popen(["sleep", "60"]) as stopped:
        early = spawn.Early(stopped.pid, outer=False)
        assert early.connection() is None
        early.leave()


def test_nothing_that_its_start_had_open_can_be_closed_by_a_plugin(strict: Caller) -> None:
    """By an object that has lost its descriptor to something else."""
    source = """
        import _socket, sys

        frame, found = sys._getframe(), set()
        while frame is not None:
            found |= {each.fileno() for each in (frame.f_globals | frame.f_locals).values() if isinstance(each, _socket.socket)}
            frame = frame.f_back
        print(3 in found)
    """
    assert strict.plugin(source).out == "False\n"


@pytest.mark.parametrize("promise", ["1 ", "0 ", "x", "", "999999999 ", "own"])
def test_a_promise_of_a_zygote_that_is_none(strict: Caller, promise: str) -> None:
    path = strict.write("plugin.py", "print('here')")
    with subprocess.Popen(["sleep", "60"]) as bystander:
        words = promise.replace("own", f"{bystander.pid} ")
        line = [*strict.prefix, "-I", "-S", strict.script + "-python", "run", "-q", "--level", "strict", str(path)]
        environment = {**strict.environment, "PSIE_ZYGOTE": words}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=cli_harness.SECONDS)
        assert done.stdout == "here\n"
        assert bystander.poll() is None
        bystander.kill()


def test_packages_of_the_callers_are_seen(strict: Caller, tmp_path: Path) -> None:
    """Though the interpreter has not looked for them, and the recipe of the run before does not know them."""
    place = tmp_path / "more" / "site-packages"
    place.mkdir(parents=True)
    (place / "psie_test_late.py").touch()
    source = "try:\n    import psie_test_late\n    print('seen')\nexcept ImportError:\n    print('not there')"
    for _ in range(2):
        assert strict.plugin(source).out == "not there\n"
        assert strict.plugin(source, env={"PYTHONPATH": str(place)}).out == "seen\n"


def test_where_the_packages_are_elsewhere_it_does_without_that_zygote(strict: Caller, tmp_path: Path) -> None:
    """A script that was copied away from its packages finds them as any Python does, and runs nothing of `site` in a zygote."""
    for name in ("psie", "psie-python"):
        copied = tmp_path / name
        copied.write_bytes(Path(strict.script).with_name(name).read_bytes())
        copied.chmod(0o755)
    if subprocess.run([sys.executable, "-I", "-c", "import sandbox"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("psie is not installed for this Python")
    plugin = strict.write("plugin.py", "print('here')")
    line = [str(tmp_path / "psie"), "run", "-q", str(plugin)]
    done = subprocess.run(line, env=strict.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "here\n", "")


def test_a_source_tree_that_is_not_installed_says_so(tmp_path: Path) -> None:
    for name in ("psie", "psie-python"):
        shutil.copy(harness.REPOSITORY / "bin" / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    not_installed = f"psie: psie is not installed for {python}: pip install it, or in a clone make .venv/ready\n"
    for words in (["run", "x.py"], ["--help"]):
        path = f"{python.parent}:/usr/bin:/bin"
        done = subprocess.run([tmp_path / "psie", *words], env={"PATH": path}, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (125, "", not_installed)


@pytest.mark.parametrize("words", [["run", "x.py"], ["--help"]])
def test_an_interpreter_that_is_missing_or_nobody_may_run_is_said(tmp_path: Path, words: list[str]) -> None:
    shutil.copy(harness.REPOSITORY / "bin" / "psie", tmp_path / "psie")
    script = tmp_path / "psie-python"
    interpreter = tmp_path / "my python"
    for is_there in (False, True):
        if is_there:
            interpreter.write_text("")
        script.write_text(f"#!{interpreter}\n")
        script.chmod(0o755)
        done = subprocess.run([tmp_path / "psie", *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (125, "")
        assert done.stderr.startswith(f"psie: the interpreter {interpreter} is missing, or you may not run it: ")
        assert done.stderr.count("\n") == 1


def test_a_script_that_stands_alone_says_so(tmp_path: Path) -> None:
    script = tmp_path / "psie"
    script.write_bytes((harness.REPOSITORY / "bin" / "psie").read_bytes())
    script.chmod(0o755)
    done = subprocess.run([script, "run", "x.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr == f"psie: {script}-python is missing or no program: install psie again\n"
