"""Running `psie` as its callers do: as a process, with pipes or on a pseudo-terminal, as root or as a user without rights.

Must not know what any single test is about.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from sandbox import host, state

from . import harness
from .unprivileged import User

TOKEN = (
    harness.TOKEN + "-cli"
)  # marks the engine's processes of these commands; those of the library's tests are not among them
SECRET = "hunter2-of-the-caller"
SECONDS = 20.0 * harness.PATIENCE  # that any command may take on a loaded machine
READY = b"ready\n"  # what a plugin prints when a test may go on


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command has left: its status and what it wrote."""

    status: int
    output: bytes
    errors: bytes
    seconds: float

    @property
    def out(self) -> str:
        return self.output.decode()

    @property
    def err(self) -> str:
        return self.errors.decode()


@dataclasses.dataclass(frozen=True)
class Caller:
    """Somebody who runs `psie`: who, at which level, from which folder."""

    level: str
    folder: Path
    prefix: tuple[str, ...]
    environment: dict[str, str]
    uid: int
    script: str = ""  # `psie` as it is installed; else it is run as a module

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    @property
    def has_processes(self) -> bool:
        """Whether plugins can be allowed some. At level minimal it takes root, or a cgroup, to end them."""
        return self.level != "minimal" or self.is_root or bool(host.facts().cgroup_kind)

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of the caller's in its folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(textwrap.dedent(content).encode() if isinstance(content, str) else content)
        for made in (path, *path.parents):
            if made == self.folder:
                break
            os.chown(made, self.uid, self.uid if self.uid else 0)
        return path

    def run(self, *arguments: str | Path, **how: Any) -> Done:
        """`psie ARGUMENTS`, to its end."""
        started = time.monotonic()
        stdin = how.pop("stdin", b"")
        given: dict[str, Any] = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
        done = subprocess.run(
            self.command(*arguments),
            **given,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **self.surroundings(how)},
            timeout=SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout or b"", done.stderr or b"", time.monotonic() - started)

    def plugin(self, source: str | bytes, *arguments: str, options: Sequence[str] = (), **how: Any) -> Done:
        """`psie run` of a file with this source, at the caller's level, without the warning."""
        return self.run(*self.plugin_line(source, *arguments, options=options), **how)

    def plugin_line(self, source: str | bytes, *arguments: str, options: Sequence[str] = ()) -> list[str]:
        path = self.write("plugin.py", source)
        return ["run", "-q", "--level", self.level, *options, str(path), *arguments]

    def call(self, source: str, *arguments: str, function: str = "main", options: Sequence[str] = (), **how: Any) -> Done:
        """`psie call` of one function of a file with this source."""
        path = self.write("plugin.py", source)
        words = ["call", "-q", "--level", self.level, *options, f"{path}:{function}"]
        return self.run(*words, *(word for argument in arguments for word in ("--arg", argument)), **how)

    @contextlib.contextmanager
    def start(self, *arguments: str, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
        """`psie ARGUMENTS`, running; killed at the end if it still does."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(self.command(*arguments), **{**streams, **self.surroundings(how)}) as process:
            try:
                yield process
            finally:
                process.kill()

    def command(self, *arguments: str | Path) -> list[str]:
        program = [*self.prefix[:-1], self.script] if self.script else [*self.prefix, "-m", "sandbox.cli"]
        return [*program, *map(str, arguments)]

    def as_module(self) -> Caller:
        """The same one, with the command in an interpreter that it may give options to."""
        return dataclasses.replace(self, script="")

    def surroundings(self, how: dict[str, Any]) -> dict[str, Any]:
        """Arguments of Popen: `how`, where `env` adds to the caller's own environment."""
        return {"cwd": self.folder, **how, "env": {**self.environment, **how.get("env", {})}}

    def clean(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


# Several tests, and several runs of the tests, have the same plugin: what one is quarantined for would be refused in the next.
FORGIVING = {"SANDBOX_QUARANTINE_ENABLED": "0"}


def remembering(caller: Caller, place: Path) -> Caller:
    """The same one with records of its own in `place`/psie: as root they are mounted where root's are, which it alone sees."""
    environment = {name: value for name, value in caller.environment.items() if name not in FORGIVING}
    records = place / "psie"
    records.mkdir(0o700, exist_ok=True)
    if not caller.is_root:
        return dataclasses.replace(caller, environment={**environment, "XDG_STATE_HOME": str(place)})
    cover = 'mount --bind "$0" "$1" && shift && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", cover, str(records), state.folder("lib"), *caller.prefix)
    return dataclasses.replace(caller, environment=environment, prefix=prefix)


def install(place: Path, interpreter: str, packages: str | Path, repository: Path) -> str:
    """The script `psie`, as an editable install leaves it in a virtual environment at `place`, with links to these packages."""
    site = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    programs = place / "bin"
    for folder in (site, programs):
        folder.mkdir(parents=True)
    for entry in os.scandir(packages):
        if not entry.name.endswith(".pth"):
            (site / entry.name).symlink_to(entry.path)
    (site / "_editable_impl_psie.pth").write_text(str(repository))
    for name in ("psie", "psie-python"):
        source = (harness.REPOSITORY / "bin" / name).read_text()
        (programs / name).write_text(source.replace("#!python\n", f"#!{interpreter}\n"))
        (programs / name).chmod(0o755)
    return str(programs / "psie")


@functools.cache
def own_script() -> str:
    base = Path(tempfile.mkdtemp(prefix="psie-script-"))
    atexit.register(shutil.rmtree, base)
    base.chmod(0o755)
    return install(base / TOKEN.lstrip("/"), sys.executable, packages(), harness.REPOSITORY)


def packages() -> str:
    """The folder with what psie depends on."""
    spec = importlib.util.find_spec("_prctl")
    assert spec is not None
    assert spec.origin is not None
    return os.path.dirname(spec.origin)


def privileged(level: str, folder: Path) -> Caller:
    """The one who runs the tests: root, mostly."""
    names = ("PATH", "HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_STATE_HOME")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(harness.REPOSITORY), TOKEN]))
    more = {"LANG": "C.UTF-8", "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "API_TOKEN": SECRET}
    return Caller(level, folder, (sys.executable,), {**environment, **FORGIVING, **more}, os.getuid(), own_script())


def unprivileged(level: str, user: User) -> Caller:
    folder = user.home / "cli"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chown(folder, user.uid, user.uid)
    path = os.pathsep.join(filter(None, [user.path, str(user.repository), TOKEN]))
    environment = {**user.environment(), **FORGIVING, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "API_TOKEN": SECRET}
    place = user.home / TOKEN.lstrip("/")
    script = place / "bin" / "psie"
    if not script.exists():
        install(place, user.interpreter, user.path or packages(), user.repository)
    return Caller(level, folder, tuple(user.command(user.interpreter)), environment, user.uid, str(script))


@contextlib.contextmanager
def called(who: str, level: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Caller]:
    """Whoever runs the tests ("own"), or a user without rights ("user")."""
    one = privileged(level, folder) if who == "own" else unprivileged(level, request.getfixturevalue("user"))
    yield one
    one.clean()


def read_until(fd: int, wanted: bytes, seen: bytes = b"", seconds: float = SECONDS) -> bytes:
    """Read from `fd` behind `seen` until `wanted` has come; AssertionError, with what has, if it ends or takes too long."""
    end = time.monotonic() + seconds
    while wanted not in seen:
        left = end - time.monotonic()
        assert left > 0, f"{wanted!r} has not come: {seen!r}"
        if select.select([fd], [], [], left)[0]:
            data = read_some(fd)
            assert data, f"{wanted!r} has not come before the end: {seen!r}"
            seen += data
    return seen


def read_some(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # EIO: nobody has the other side of the terminal any more
        return b""


def read_rest(fd: int) -> bytes:
    """All that there is now: for a terminal whose writers have ended."""
    seen = b""
    while select.select([fd], [], [], 0)[0]:
        data = read_some(fd)
        if not data:
            break
        seen += data
    return seen


def engine_is_gone() -> bool:
    return not harness.engine_processes(TOKEN)


class Session:
    """`psie` on a terminal of a session of its own, whose leader is no part of psie."""

    def __init__(self, caller: Caller, *arguments: str, stdin: str = "-") -> None:
        self.master, slave = os.openpty()
        self.report, report = os.pipe()
        wait, self.release = os.pipe()
        leader = [sys.executable, "-I", "-S", str(harness.HERE / "cli_leader.py"), str(report), str(wait), stdin]
        self.resize(24, 80)
        self.leader = subprocess.Popen(
            [*leader, *caller.command(*arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            pass_fds=(report, wait),
            start_new_session=True,
            cwd=caller.folder,
            env={**caller.environment, "TERM": "xterm"},
        )
        self.seen = b""
        self.before = termios.tcgetattr(slave)
        for fd in (slave, report, wait):
            os.close(fd)
        self.pid = int(read_until(self.report, b"\n"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.release)
        with contextlib.suppress(ProcessLookupError):
            if self.leader.poll() is None and self.pid:
                os.kill(self.pid, signal.SIGKILL)
        self.leader.wait(SECONDS)
        os.close(self.master)
        os.close(self.report)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def until(self, wanted: bytes) -> bytes:
        """What comes up to `wanted`; what has come behind it is kept for the next time."""
        head, _, self.seen = read_until(self.master, wanted, self.seen).partition(wanted)
        return head + wanted

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self.master)

    def status(self) -> int:
        """Wait for psie's end: its status, negative for a signal."""
        status = int(read_until(self.report, b"\n"))
        self.pid = 0
        return status

    def rest(self) -> bytes:
        return read_rest(self.master)
