"""How an attack is written down and staged.

An attack is a self-contained function that travels into the sandbox by value and returns "escaped: ..." or "stopped: ...".
Its `scene` prepares what it attacks on the host (a secret, a victim process, a listener), says with which arguments it is
called, and looks afterwards whether harm was done. Must not know single attacks: they are in the other modules, one per
family, nor what comes of them: see trial.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox.config import IsolationLevel
from sandbox.errors import SandboxException
from sandbox.host import facts
from sandbox.seccomp.filter import known_syscalls

ROOT = os.getuid() == 0
LEVELS = tuple(IsolationLevel)
MINIMAL, STANDARD, STRICT, MAXIMUM = LEVELS
ALL = LEVELS
NAMESPACED = (STANDARD, STRICT, MAXIMUM)
STRICTER = (STRICT, MAXIMUM)
# Without root MINIMAL has the caller's id: only Landlock keeps signals in there, from ABI 6 (Linux 6.12).
SIGNALS_KEPT = ALL if facts().landlock_abi >= 6 else NAMESPACED
SYSCALLS = known_syscalls(os.uname().machine)
REFUSALS = frozenset(("EPERM", "EACCES", "ENOSYS", "ENOENT", "EROFS", "ESRCH"))
# What takes a second elsewhere takes several under emulation: every bound of time here and in the tests is multiplied by this.
PATIENCE = float(os.environ.get("PSIE_TEST_PATIENCE", "1"))
SECONDS = 10.0 * PATIENCE  # for any attempt
PLACE = "PSIE_ESCAPE_PLACE"
PREFIX = "psie-escape-"  # of what lies about meanwhile
SHOWN = ("/srv", "/opt", "/mnt")  # folders that STANDARD shows

# What a caller of psie has and a plugin must not get: an environment variable, an open file, a text in memory.
SECRET = "the caller's secret " + os.urandom(8).hex()


@dataclass
class Scene:
    """What an attack finds on the host: its arguments, further permissions that name what is there, and the look
    afterwards: "" or what harm was done."""

    arguments: dict[str, Any] = field(default_factory=dict)
    harm: Callable[[], str] = lambda: ""
    permissions: dict[str, Any] = field(default_factory=dict)


Stage = Callable[["Where"], AbstractContextManager[Scene]]


@dataclass(frozen=True)
class Where:
    """On which side an attack is about to run. `folder` is a fresh folder of the caller's, of no importance to anybody."""

    inside: bool
    folder: Path


@dataclass(frozen=True)
class Attack:
    """One row of the matrix. `levels` are those that claim to stop it (rootless, if different: `rootless_levels`).

    `ends` are exceptions by which the sandbox may end the attack, `refusals` further errnos that stop it.
    `outside_uid` is the id for the attempt outside where root's would prove nothing; `memory_mb` is what that attempt takes.
    `unsafe` says what it could do to somebody's host outside; a self-test leaves such an attack out.
    """

    name: str
    protection: str
    function: Callable[..., str]
    levels: tuple[IsolationLevel, ...]
    scene: Stage
    refusals: frozenset[str]
    ends: tuple[type[SandboxException], ...]
    limits: dict[str, Any]
    permissions: dict[str, Any]
    config: dict[str, Any]
    outside_uid: int | None
    memory_mb: int
    unsafe: str


REGISTRY: list[Attack] = []


def no_scene(where: Where) -> AbstractContextManager[Scene]:
    return nullcontext(Scene())


def given(**arguments: Any) -> Stage:
    """A scene of fixed arguments."""
    return lambda where: nullcontext(Scene(arguments))


def calls(*names: str, **arguments: Any) -> Stage:
    """A scene that hands the numbers of these system calls to the attack, as `numbers`."""
    return given(numbers={name: SYSCALLS[name] for name in names if name in SYSCALLS}, **arguments)


def attack(
    protection: str,
    levels: tuple[IsolationLevel, ...] = ALL,
    *,
    scene: Stage = no_scene,
    name: str = "",
    rootless_levels: tuple[IsolationLevel, ...] | None = None,
    refusals: tuple[str, ...] = (),
    ends: tuple[type[SandboxException], ...] = (),
    limits: dict[str, Any] | None = None,
    permissions: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    outside_uid: int | None = None,
    memory_mb: int = 0,
    unsafe: str = "",
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register the decorated function as an attack; see Attack."""

    def register(function: Callable[..., str]) -> Callable[..., str]:
        claimed = levels if ROOT or rootless_levels is None else rootless_levels
        REGISTRY.append(
            Attack(
                name or function.__name__,
                protection,
                function,
                claimed,
                scene,
                REFUSALS | set(refusals),
                ends,
                limits or {},
                permissions or {},
                config or {},
                outside_uid,
                memory_mb,
                unsafe,
            )
        )
        return function

    return register


# -- helpers that travel with an attack ----------------------------------------------------------------------------------


def attempt(action: Callable[[], object]) -> str:
    """ "escaped" with what the action returned, or "stopped" by which errno."""
    import errno

    try:
        value = action()
    except OSError as error:
        return "stopped: " + errno.errorcode.get(error.errno or 0, str(error))
    return f"escaped: {value!r}"[:300]


def first_escape(actions: Mapping[str, Callable[[], object]]) -> str:
    """Try all; the first that works is the answer, else the refusals that there were."""
    seen = []
    for name, action in actions.items():
        answer = attempt(action)
        if answer.startswith("escaped"):
            return f"escaped by {name}{answer.removeprefix('escaped')}"
        seen.append(answer.removeprefix("stopped: "))
    return "stopped: " + ",".join(dict.fromkeys(seen))


def syscall(number: int, *arguments: object) -> int:
    """syscall(2); raises OSError."""
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *values, *[ctypes.c_long(0)] * (6 - len(values)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def open_to_write(path: str) -> int:
    """Open a setting of the kernel's; nothing is written. A masked one opens as the null device: it is not there."""
    import os

    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    if os.fstat(fd).st_rdev == os.makedev(1, 3):
        raise FileNotFoundError(2, "masked")
    return fd


def socket_to_the_caller() -> socket.socket:
    """The one socket that a plugin finds among its descriptors; its number is not always the same."""
    import os
    import socket
    import stat

    for fd in range(3, 1024):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                return socket.socket(fileno=fd)
        except OSError:
            continue
    raise LookupError("no descriptor is a socket")


# -- scenes that several families use --------------------------------------------------------------------------------------


@contextmanager
def victim(where: Where) -> Iterator[Scene]:
    """A process of the caller's, with a secret in its environment and an open file. Harm: it is gone or stopped."""
    with (
        tempfile.TemporaryFile() as held,
        # It ends with us: nobody else can write to it.
        subprocess.Popen(["cat"], env={"VICTIM": SECRET}, stdin=subprocess.PIPE, pass_fds=[held.fileno()]) as process,
    ):

        def harm() -> str:
            if process.poll() is not None:
                return f"the victim has ended: {process.returncode}"
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return "the victim is stopped or traced" if state in "Tt" else ""

        try:
            while Path(f"/proc/{process.pid}/comm").read_text().strip() != "cat":
                os.sched_yield()
            numbers = {name: SYSCALLS[name] for name in ("tgkill", "process_vm_readv", "ptrace", "pidfd_getfd", "prlimit64")}
            yield Scene({"pid": process.pid, "numbers": numbers, "secret": scrambled(SECRET)}, harm)
        finally:
            process.kill()


def scrambled(text: str) -> bytes:
    """The text in a form that does not hold it: an attack that searches memory must not find its own question."""
    return bytes(byte ^ 0x55 for byte in text.encode())


def place() -> Path | None:
    """A folder that everybody may write and that STANDARD shows read-only; only root can make one, and hands it down."""
    given_place = os.environ.get(PLACE)
    return Path(given_place) if given_place else None


# -- where all of it lies about ------------------------------------------------------------------------------------------


@contextmanager
def shown_folder() -> Iterator[None]:
    """As root, meanwhile `place` is a folder that STANDARD shows: in the first of the host's rarely used ones that exists."""
    parent = next((parent for parent in SHOWN if os.path.isdir(parent)), None)
    if not ROOT or place() is not None or parent is None:
        yield
        return
    with held_folder(parent, 0o1777) as folder:
        os.environ[PLACE] = folder
        try:
            yield
        finally:
            del os.environ[PLACE]


@contextmanager
def scratch() -> Iterator[Path]:
    """Meanwhile temporary files of this process and its children lie in a folder of their own, which is removed."""
    before = os.environ.get("TMPDIR")
    with held_folder(tempfile.gettempdir(), 0o1777) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = None
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


@contextmanager
def held_folder(parent: str, mode: int) -> Iterator[str]:
    """A folder that `remove_stale` leaves alone as long as this process lives."""
    lock = -1
    while lock < 0:
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_SH)
            os.chmod(folder, mode)  # it may have been taken for a stale one before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale() -> None:
    """Remove what killed self-tests of this user have left."""
    for parent in (tempfile.gettempdir(), *SHOWN):
        with suppress(OSError):
            names = [entry.path for entry in os.scandir(parent) if entry.name.startswith(PREFIX)]
            for path in names:
                _remove_if_stale(path)


def _remove_if_stale(path: str) -> None:
    with suppress(OSError):  # no folder, somebody else's, or in use
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid == os.getuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
        finally:
            os.close(fd)
