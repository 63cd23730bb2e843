"""A plugin that comes with settings of its own: they get it nothing that nobody has accepted. Each attack is first shown to
work with the same file named by --config."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration import cli_harness
from integration.cli_harness import Caller

from escape import kit
from sandbox.config import IsolationLevel

SECRET = "of-the-caller-alone"
ATTACK = """
import os, socket, subprocess, sys
secret, folder, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
def attempt(name, action):
    try:
        action()
        print("done:", name, flush=True)
    except Exception as error:
        print("refused:", name, type(error).__name__, flush=True)
attempt("read", lambda: open(secret).read())
attempt("write", lambda: open(os.path.join(folder, "made"), "w").close())
attempt("connect", lambda: socket.create_connection(("127.0.0.1", port), 5))
attempt("start", lambda: subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True))
"""
NAMES = ("read", "write", "connect", "start")
WISHES = """
[{prefix}isolation]
level = "{level}"
[{prefix}limits]
max_subprocess_count = 8
[{prefix}permissions]
allow_network_access = true
allowed_hosts = ["127.0.0.1:{port}"]
allow_subprocess_execution = true
allowed_directories = ["{folder}"]
readable_paths = ["{secret}"]
"""


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    server.accept()[0].close()
                except TimeoutError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        over.set()
        thread.join()


@pytest.fixture
def caller(tmp_path: Path) -> Caller:
    (tmp_path / "plugin").mkdir()
    return cli_harness.remembering(cli_harness.privileged("strict", tmp_path / "plugin"), tmp_path)


def test_a_plugins_own_settings_get_it_nothing(caller: Caller, tmp_path: Path, port: int) -> None:
    if kit.why_closed(IsolationLevel.STRICT):
        pytest.skip(f"level strict cannot be opened: {kit.why_closed(IsolationLevel.STRICT)}")
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    folder = tmp_path / "folder"
    folder.mkdir()
    caller.write("plugin.py", ATTACK)
    line = ("plugin.py", str(secret), str(folder), str(port))
    wishes = {"level": "strict", "port": port, "folder": folder, "secret": secret}
    named = tmp_path / "named.toml"
    named.write_text(WISHES.format(prefix="", **wishes))
    works = caller.run("run", "--config", str(named), "--level", "strict", *line)
    assert works.out.split("\n")[:-1] == [f"done: {name}" for name in NAMES], works
    assert os.listdir(folder) == ["made"]
    os.remove(folder / "made")
    for name, prefix in (("psie.toml", ""), ("pyproject.toml", "tool.psie.")):
        for level in ("strict", "minimal"):
            caller.write(name, WISHES.format(prefix=prefix, **{**wishes, "level": level}))
            fails = caller.run("run", "--level", "strict", *line)
            assert [text.split()[:2] for text in fails.out.splitlines()] == [["refused:", name] for name in NAMES], fails
            assert "nobody has accepted it" in fails.err
            assert os.listdir(folder) == []
        os.remove(caller.folder / name)


def test_a_plugin_accepts_nothing_itself(caller: Caller, tmp_path: Path) -> None:
    """Where it may write to the folder that it lies in, its settings are others afterwards, and count no more."""
    if kit.why_closed(IsolationLevel.STRICT):
        pytest.skip(f"level strict cannot be opened: {kit.why_closed(IsolationLevel.STRICT)}")
    source = "import sys\nopen(sys.argv[1] + '/psie.toml', 'w').write('[limits]\\nmax_open_files = 999\\n')\n"
    caller.write("plugin.py", source)
    caller.write("psie.toml", "[limits]\nmax_open_files = 60\n")
    assert caller.run("trust", "psie.toml").status == 0
    done = caller.run("run", "--rw", str(caller.folder), "plugin.py", str(caller.folder))
    assert done.status == 0, done
    assert "999" in (caller.folder / "psie.toml").read_text()
    caller.write("shows.py", "import resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n")
    done = caller.run("run", "shows.py")
    assert done.out == "50\n"
    assert "nobody has accepted it" in done.err


def test_settings_in_an_import_path_are_no_settings(caller: Caller) -> None:
    """What lies where the command is run does not matter: only what lies beside the plugin."""
    (caller.folder / "elsewhere").mkdir()
    caller.write("elsewhere/plugin.py", "import resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n")
    caller.write("psie.toml", "[limits]\nmax_open_files = 20\n")
    assert caller.run("run", "-q", "elsewhere/plugin.py").out == "50\n"
