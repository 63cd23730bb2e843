"""What people use in psie's place, each doing the same work: Python run to its end, or a value handed in and out as JSON.

A peer that is not installed is left out. Must not know psie, nor what is measured.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
import venv
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ECHO = ("-I", "-c", "import json, sys; print(json.dumps(json.load(sys.stdin)))")

BUBBLEWRAP = "bubblewrap + python3"
NSJAIL = "nsjail + python3"
CRUN = "crun + python3"
SANDLOCK = "sandlock + python3 (no namespaces)"
PLAIN = "python3 -I (no isolation)"
POOL = "ProcessPoolExecutor(2) (no isolation)"
FLOOR = "C program, same namespaces, no Python (the floor)"
FORKS = "C program, the same, and forks that copy as many pages"
FORKED = "python3, a fork that waits (no isolation)"


@functools.cache
def bare_python() -> str:
    """Our interpreter in a virtual environment without packages: what .pth files of this machine would have it run at each
    start is no peer's cost. Not in /tmp, which peers replace."""
    folder = tempfile.TemporaryDirectory(prefix="psie-bench-", dir="/var/tmp")
    atexit.register(folder.cleanup)
    venv.create(folder.name, symlinks=True)
    return f"{folder.name}/bin/python"


class Peer:
    """Programs in something that isolates them, or that does not: `wrap` makes a command line into one that does so."""

    def __init__(self, name: str, wrap: Callable[[list[str]], list[str]]) -> None:
        self.name = name
        self.wrap = wrap

    def run(self, *arguments: str, python: str = "", stdin: str = "") -> str:
        """Python with these arguments, to its end; what it has written. Raises CalledProcessError."""
        command = self.wrap([python or bare_python(), *arguments])
        done = subprocess.run(command, check=True, input=stdin, capture_output=True, text=True)
        return done.stdout

    def call(self, value: object) -> Any:
        """A fresh Python is handed a value as JSON, and hands it back."""
        return json.loads(self.run(*ECHO, stdin=json.dumps(value)))

    @contextlib.contextmanager
    def standing(self) -> Iterator[int]:
        """A Python that waits; the id of the process that was started for it."""
        wait = "print(flush=True); input()"
        command = self.wrap([bare_python(), "-I", "-S", "-c", wait])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
            process.stdin.write(b"\n")
            process.stdin.close()


class SandlockPeer(Peer):
    """sandlock (PyPI): Landlock and seccomp, without namespaces; the host is readable, /tmp is writable."""

    def __init__(self) -> None:
        super().__init__(SANDLOCK, list)

    def run(self, *arguments: str, python: str = "", stdin: str = "") -> str:
        from sandlock import Sandbox, StdioMode

        sandbox = Sandbox(fs_readable=["/"], fs_writable=["/tmp"], max_memory="128M", clean_env=True)
        streams = {"stdin": StdioMode.PIPED, "stdout": StdioMode.PIPED, "stderr": StdioMode.NULL}
        with sandbox.popen([python or bare_python(), *arguments], **streams) as process:
            process.stdin.write(stdin.encode())
            process.stdin.close()
            output: bytes = process.stdout.read()
            result = process.wait()
        if not result.success:
            raise subprocess.CalledProcessError(result.exit_code, arguments)
        return output.decode()


class Crun:
    """crun(1) wants a bundle for each command: a folder with a config.json. Kept until the folder of all of them goes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.bundles: dict[tuple[str, ...], str] = {}

    def wrap(self, command: list[str]) -> list[str]:
        bundle = self.bundles.get(tuple(command))
        if bundle is None:
            bundle = self.bundles[tuple(command)] = tempfile.mkdtemp(dir=self.folder)
            Path(bundle, "config.json").write_text(json.dumps(crun_config(command)))
        return ["crun", "--cgroup-manager=disabled", "run", "--bundle", bundle, f"bench-{uuid.uuid4().hex}"]


def crun_config(command: list[str]) -> dict[str, Any]:
    """The host's files read-only, every namespace, no capabilities."""
    namespaces = ["user", "mount", "pid", "ipc", "uts", "cgroup", "network"]
    return {
        "ociVersion": "1.0.0",
        "root": {"path": "/", "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": command,
            "cwd": "/",
            "env": ["PATH=/usr/bin:/bin"],
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "hostname": "bench",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]},
        ],
        "linux": {
            "namespaces": [{"type": name} for name in namespaces],
            "uidMappings": [{"containerID": 0, "hostID": os.getuid(), "size": 1}],
            "gidMappings": [{"containerID": 0, "hostID": os.getgid(), "size": 1}],
        },
    }


def bubblewrap(command: list[str]) -> list[str]:
    """With every namespace, on a read-only host, as people run it."""
    binds: list[str] = []
    for path in dict.fromkeys((sys.prefix, sys.base_prefix, str(ROOT))):
        if path.startswith("/tmp/"):
            binds += ["--ro-bind", path, path]
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"),
        *("--tmpfs", "/tmp", *binds, *command),
    ]


def nsjail(command: list[str]) -> list[str]:
    """The same: every namespace is its default."""
    return ["nsjail", "--mode", "o", "--really_quiet", "--chroot", "/", "--tmpfsmount", "/tmp", "--", *command]


@contextlib.contextmanager
def available() -> Iterator[dict[str, Peer]]:
    """The peers that work here, by their names; of those that are there and do not it says so."""
    with tempfile.TemporaryDirectory(prefix="psie-bench-") as folder:
        found = [Peer(PLAIN, list)]
        for program, name, wrap in (
            ("bwrap", BUBBLEWRAP, bubblewrap),
            ("nsjail", NSJAIL, nsjail),
            ("crun", CRUN, Crun(folder).wrap),
        ):
            if shutil.which(program) is not None:
                found.append(Peer(name, wrap))
        with contextlib.suppress(ImportError):
            import sandlock  # noqa: F401

            found.append(SandlockPeer())
        working = {}
        for peer in found:
            try:
                assert peer.call(7) == 7
            except Exception as error:  # whatever a peer does
                told = getattr(error, "stderr", None) or error
                print(f"{peer.name} is left out, it does not work here: {told}".rstrip(), file=sys.stderr)
            else:
                working[peer.name] = peer
        yield working


class Floor:
    """The C program that does what the kernel has to do for a sandbox, and nothing else; `folders` are bound in it."""

    def __init__(self, program: str, folders: tuple[str, ...]) -> None:
        self.program = program
        self.folders = folders

    def rate(self, workers: int, seconds: float, pages: tuple[int, int, int] = (0, 0, 0)) -> float:
        """How many a second, of so many workers side by side; the first one of each is made however long it takes. `pages` of
        memory: of what is cloned, and those that init and worker write to."""
        command = [self.program, *map(str, (workers, seconds, *pages)), *self.folders]
        count, took = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        return int(count) / float(took)


@contextlib.contextmanager
def floor() -> Iterator[Floor | None]:
    """Compiled for as long as it is used; None where there is no compiler."""
    with tempfile.TemporaryDirectory(prefix="psie-floor-") as folder:
        program = f"{folder}/floor"
        try:
            subprocess.run(["gcc", "-O2", "-o", program, str(ROOT / "benchmarks" / "floor.c")], check=True)
            made = Floor(program, ("/usr", sys.base_prefix))
            made.rate(1, 0)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{FLOOR} is left out: {error}", file=sys.stderr)
            yield None
        else:
            yield made


# For each socket that it is handed a fork, which calls what comes there, code and arguments, and sends back what that returns.
FORKING = """
import gc, marshal, os, signal, socket, sys
gc.disable()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
control = socket.socket(fileno=int(sys.argv[1]))
Function = type(lambda: None)
gc.freeze()
while (received := socket.recv_fds(control, 1, 1))[0]:
    if os.fork() == 0:
        control.close()
        with socket.socket(fileno=received[1][0]) as job:
            while data := job.recv(65536):
                code, arguments = marshal.loads(data)
                job.send(marshal.dumps(Function(code, {})(*arguments)))
        os._exit(0)
    os.close(received[1][0])
"""


class Forking:
    """A small Python whose forks call what they are sent: what a call into another process takes without any isolation."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-I", "-S", "-c", FORKING, str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def fork(self) -> socket.socket:
        """A socket to a fresh one, which ends when that is closed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self.control, [b"."], [theirs.fileno()])
        ours.setblocking(False)
        return ours

    def close(self) -> None:
        self.control.close()
        self.process.wait()


def milliseconds(work: Callable[[], object]) -> float:
    """That it takes."""
    start = perf_counter()
    work()
    return (perf_counter() - start) * 1000
