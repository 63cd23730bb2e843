"""How an attack is written down, staged, tried outside, tried inside, and judged.

An attack is a self-contained function that travels into the sandbox by value and returns "escaped: ..." or "stopped: ...".
Its `scene` prepares what it attacks on the host (a secret, a victim process, a listener), says with which arguments it is
called, and looks afterwards whether harm was done. A refusal that the attack does not expect, any other exception, and any
other answer fail the test: nothing counts as stopped that is not known to be.

Must not know single attacks: they are in the test modules, one per family.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from sandbox import EnhancedPluginSandbox, IsolationConfig, PluginLimitsV2, PluginPermissionsV2, transport
from sandbox.config import IsolationLevel
from sandbox.engine import service
from sandbox.errors import SandboxException
from sandbox.host import facts
from sandbox.seccomp.filter import known_syscalls
from sandbox.violations import SandboxViolation

T = TypeVar("T")

ROOT = os.getuid() == 0
LEVELS = tuple(IsolationLevel)
MINIMAL, STANDARD, STRICT, MAXIMUM = LEVELS
ALL = LEVELS
NAMESPACED = (STANDARD, STRICT, MAXIMUM)
STRICTER = (STRICT, MAXIMUM)
SYSCALLS = known_syscalls(os.uname().machine)
REFUSALS = frozenset(("EPERM", "EACCES", "ENOSYS", "ENOENT", "EROFS", "ESRCH"))
SECONDS = 10.0  # for any attempt outside

# What stands ready for the next caller would be counted as left open.
os.environ["PSIE_STANDING"] = "0"

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
    `outside_uid` is the id for the attempt outside where root's would prove nothing.
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
            )
        )
        return function

    return register


def matrix(module: str) -> pytest.MarkDecorator:
    """Parametrize a test by the attacks of one module and the levels that claim to stop them."""
    rows = [
        pytest.param(one, level, id=f"{one.name}-{level.value}")
        for one in REGISTRY
        if one.function.__module__ == module
        for level in one.levels
    ]
    return pytest.mark.parametrize(("one", "level"), rows)


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


# -- outside -------------------------------------------------------------------------------------------------------------

_SERVER = """
import os, pickle, signal, struct, sys, tempfile, traceback
sys.path[:] = {path!r}
import cloudpickle, subprocess  # a child that has given up its ids may not reach the interpreter
held = sys.argv[1]  # this text lies in the memory of every child, as a caller's secrets do
while True:
    head = sys.stdin.buffer.read(12)
    if not head:
        break
    size, uid = struct.unpack("=Qi", head)
    payload = sys.stdin.buffer.read(size)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm({seconds})
        folder = tempfile.mkdtemp()
        os.chmod(folder, 0o777)
        os.chdir(folder)
        if uid >= 0:
            os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
        try:
            function, arguments, keywords = pickle.loads(payload)
            text = function(*arguments, **keywords)
        except BaseException:
            text = "failed: " + traceback.format_exc()
        os.write(writer, (folder + "\\0" + text)[:60000].encode())
        os._exit(0)
    os.close(writer)
    data = b""
    while piece := os.read(reader, 65536):
        data += piece
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    data = data or b"\\0failed: ended by wait status %d" % status
    sys.stdout.buffer.write(struct.pack("=Q", len(data)) + data)
    sys.stdout.buffer.flush()
"""


class Outside:
    """A plain process of the caller's, which forks one child for each attack: nothing of psie protects anything there."""

    def __init__(self) -> None:
        # What a careless caller's children inherit:
        self.file = tempfile.NamedTemporaryFile("w+", prefix="psie-escape-")  # noqa: SIM115 - as long as the process
        self.file.write(SECRET)
        self.file.flush()
        os.set_inheritable(self.file.fileno(), True)
        os.environ["PSIE_ESCAPE_SECRET"] = SECRET
        code = _SERVER.format(path=sys.path, seconds=int(SECONDS))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, SECRET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
        )
        self.seen: dict[str, str] = {}

    def run(self, one: Attack, folder: Path) -> str:
        """The answer of the attack outside; the scene's look at the harm counts as well. Asked once per attack."""
        if one.name not in self.seen:
            with one.scene(Where(inside=False, folder=folder)) as scene:
                answer = self._ask(one, scene.arguments)
                harm = scene.harm()
            self.seen[one.name] = f"escaped: {harm}" if harm else answer
        return self.seen[one.name]

    def _ask(self, one: Attack, arguments: dict[str, Any]) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        payload = transport.pack(one.function, (), arguments, facts().path)
        uid = one.outside_uid if ROOT and one.outside_uid is not None else -1
        self.process.stdin.write(struct.pack("=Qi", len(payload), uid) + payload)
        self.process.stdin.flush()
        (size,) = struct.unpack("=Q", self.process.stdout.read(8))
        folder, _, answer = self.process.stdout.read(size).decode("utf-8", "replace").partition("\0")
        if folder:
            subprocess.run(["rm", "-rf", "--", folder], check=False)
        return answer

    def close(self) -> None:
        self.process.communicate()
        self.file.close()
        os.environ.pop("PSIE_ESCAPE_SECRET", None)


# -- inside --------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a call ended: its value or its exception, and the violations on record."""

    value: Any
    error: BaseException | None
    violations: list[SandboxViolation]


def sandbox(
    level: IsolationLevel,
    limits: dict[str, Any] | None = None,
    permissions: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **further: Any,
) -> EnhancedPluginSandbox:
    """A sandbox that counts, but does not end a call for, up to ten violations."""
    return EnhancedPluginSandbox(
        PluginLimitsV2(**{"max_execution_time_seconds": SECONDS, **(limits or {})}),
        PluginPermissionsV2(**(permissions or {})),
        IsolationConfig(level=level, **{"violation_threshold": 10, **(config or {})}),
        **further,
    )


def run_inside(
    function: Callable[..., Any],
    *arguments: Any,
    level: IsolationLevel,
    limits: dict[str, Any] | None = None,
    permissions: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **keywords: Any,
) -> Outcome:
    """One call in a sandbox of its own."""

    async def go() -> Outcome:
        async with sandbox(level, limits, permissions, config) as one:
            try:
                value, error = await one.execute_plugin_safe(function, *arguments, **keywords), None
            except SandboxException as raised:
                value, error = None, raised
            violations = one.get_violations()
            assert all(violation.explanation for violation in violations), "each says what would allow it, or that nothing does"
            return Outcome(value, error, violations)

    return bounded(go())


def bounded(work: Coroutine[Any, Any, T], seconds: float = 20.0) -> T:
    """Run a coroutine, but not for ever: an engine whose thread has died answers nobody.

    Such an engine is put away first, so that only the test that has killed it fails.
    """
    known = service._service
    if known is not None and not known.loop.thread.is_alive():
        service._service = None

    async def go() -> T:
        return await asyncio.wait_for(work, seconds)

    try:
        return asyncio.run(go())
    except TimeoutError:
        pytest.fail("the engine does not answer any more")


def still_works(level: IsolationLevel) -> None:
    """The engine that has just been attacked serves the next caller."""
    outcome = run_inside(lambda: "alive", level=level)
    assert outcome.error is None
    assert outcome.value == "alive"


def judge(one: Attack, outcome: Outcome, harm: str) -> str:
    """What stopped the attack, for the matrix. Fails the test where it was not stopped, or not by something known."""
    mark = "*" if outcome.violations else ""
    if harm:
        pytest.fail(f"{one.name}: escaped: {harm}; the attack itself said {outcome.value!r} {outcome.error!r}")
    if outcome.error is not None:
        if not isinstance(outcome.error, one.ends):
            pytest.fail(f"{one.name}: not a refusal, the attack broke: {outcome.error!r}")
        return getattr(outcome.error, "limit", None) or type(outcome.error).__name__.removesuffix("Error")
    answer = outcome.value
    if not isinstance(answer, str) or not answer.startswith("stopped: "):
        pytest.fail(f"{one.name}: {answer}")
    reasons = answer.removeprefix("stopped: ")
    unexpected = [word for word in reasons.split(",") if word.isupper() and word not in one.refusals]
    if unexpected:
        pytest.fail(f"{one.name}: stopped, but by {unexpected}, which is no refusal that was expected")
    return reasons + mark


class Matrix:
    """attack x level: what stopped it; beside each attack, why it is not applicable outside, if so."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], dict[str, str]] = {}
        self.not_applicable: dict[str, str] = {}

    def set(self, one: Attack, level: IsolationLevel, text: str) -> None:
        self.cells.setdefault((one.protection, one.name), {})[level.value] = text

    def to_plain(self) -> dict[str, Any]:
        return {
            "cells": [[*key, cells] for key, cells in self.cells.items()],
            "not_applicable": self.not_applicable,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Matrix:
        found = cls()
        found.cells = {(protection, name): cells for protection, name, cells in plain["cells"]}
        found.not_applicable = plain["not_applicable"]
        return found

    def lines(self) -> Iterator[str]:
        width = max((len(name) for _, name in self.cells), default=10) + 2
        heads = [level.value for level in LEVELS]
        yield f"{'attack':<{width}}" + "".join(f"{head:<22}" for head in heads)
        for protection in sorted({protection for protection, _ in self.cells}):
            yield f"-- {protection}"
            for (of, name), cells in sorted(self.cells.items()):
                if of == protection:
                    row = "".join(f"{cells.get(head, '')[:20]:<22}" for head in heads)
                    yield f"{name + (' (1)' if name in self.not_applicable else ''):<{width}}{row}".rstrip()
        for name, reason in sorted(self.not_applicable.items()):
            yield f"(1) {name}: does not work outside either: {reason}"


MATRIX = Matrix()
ROOTLESS: list[Matrix] = []
_closed: dict[IsolationLevel, str] = {}


def why_closed(level: IsolationLevel) -> str:
    """Why no sandbox of this level can be opened here; "" if it can. `test_levels` fails for it, the attacks only skip."""
    if level not in _closed:
        try:
            still_works(level)
            _closed[level] = ""
        except SandboxException as error:
            _closed[level] = str(error).splitlines()[0]
    return _closed[level]


def carry_out(one: Attack, level: IsolationLevel, outside: Outside, folder: Path) -> None:
    """The life of one cell of the matrix: outside, inside, judged."""
    if why_closed(level):
        MATRIX.set(one, level, "level is closed")
        pytest.skip(f"level {level.value} cannot be opened: {why_closed(level)}")
    answer = outside.run(one, folder)
    if answer.startswith("failed"):
        pytest.fail(f"{one.name} is broken outside: {answer}")
    if not answer.startswith("escaped"):
        MATRIX.not_applicable[one.name] = answer.splitlines()[0]
    MATRIX.set(one, level, "ESCAPED or broken")
    with one.scene(Where(inside=True, folder=folder)) as scene:
        outcome = run_inside(
            one.function,
            level=level,
            limits=one.limits,
            permissions={**one.permissions, **scene.permissions},
            config=one.config,
            **scene.arguments,
        )
        harm = scene.harm()
    MATRIX.set(one, level, judge(one, outcome, harm))


# -- scenes that several families use --------------------------------------------------------------------------------------


@contextmanager
def victim(where: Where) -> Iterator[Scene]:
    """A process of the caller's, with a secret in its environment and an open file. Harm: it is gone or stopped."""
    with tempfile.TemporaryFile() as held:
        process = subprocess.Popen(["sleep", "60"], env={"VICTIM": SECRET}, pass_fds=[held.fileno()])

        def harm() -> str:
            if process.poll() is not None:
                return f"the victim has ended: {process.returncode}"
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return "the victim is stopped or traced" if state in "Tt" else ""

        try:
            while Path(f"/proc/{process.pid}/comm").read_text().strip() != "sleep":
                os.sched_yield()
            numbers = {name: SYSCALLS[name] for name in ("tgkill", "process_vm_readv", "ptrace", "pidfd_getfd", "prlimit64")}
            yield Scene({"pid": process.pid, "numbers": numbers, "secret": scrambled(SECRET)}, harm)
        finally:
            process.kill()
            process.wait()


def scrambled(text: str) -> bytes:
    """The text in a form that does not hold it: an attack that searches memory must not find its own question."""
    return bytes(byte ^ 0x55 for byte in text.encode())


def place() -> Path | None:
    """A folder that everybody may write and that STANDARD shows read-only; only root can make one, and hands it down."""
    given_place = os.environ.get("PSIE_ESCAPE_PLACE")
    return Path(given_place) if given_place else None
