"""A mutation loop on the host's side of the channel: frames and messages as hostile processes of a sandbox would send them.

Valid messages are taken apart, mixed, damaged and sent through real sockets into a call (frames and notes of a worker), a
sandbox (warden and supervisor) and a zygote's owner. Nothing may be raised, nothing may grow without bound, no descriptor
may stay; what was received must still be judged as one of the documented ends. `tests/test_fuzz.py` runs it for a moment;

    python -m tests.fuzz_channel --seconds 600 [--seed 1]

for as long as you like. A finding names the seed and the number of its round, which happen again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

from sandbox import IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2, host, recipe
from sandbox.engine import board, channel, client, codec, failure, outcome
from sandbox.engine.loop import PollLoop
from sandbox.errors import SandboxException
from sandbox.ns import userids
from sandbox.recipe_data import Recipe

MESSAGES = 40  # in a round
REPLY_BYTES = 1 << 17

JUNK = (
    *("", "0", "-1", "1", "99999999", "9" * 30, "9" * 5000, "1e9", "nan", "inf", "²", "١٢", "0x10", " 1", "1_000", "None"),
    *("\x1b[2J", "\n", "é" * 2000, "x" * 20000, "/etc/passwd", "..", "local host", "::1", "allowed_modules", "blocked_modules"),
    *("-9" * 9, "4294967296", "18446744073709551616", "True", "file", "name", "open", "resolve", "connect", "AF_INET"),
)

NETWORK = {
    **{"operation": "connect", "family": "AF_INET", "kind": "SOCK_STREAM", "address": "10.0.0.1", "port": "80"},
    **{"allowed": "0", "reason": "it is not in allowed_hosts", "passing": "0", "excess": "0"},
}
VIOLATION = {"call": "1", "nr": "161", "arg0": "1", "arg1": "2", "arg2": "3", "pid": "7", "count": "1", "offences": "1"}
SUPERVISOR: list[tuple[str, dict[str, str]]] = [
    ("violation", VIOLATION),
    ("violation", {**VIOLATION, "nr": "41", **NETWORK}),
    ("network", {"call": "1", "pid": "7", "time": "1.5", "count": "1", **NETWORK}),
    ("cut_off", {"call": "0", "connections": "2"}),
]
WARDEN: list[tuple[str, dict[str, str]]] = [
    ("opened", {"granted": ""}),
    ("renewed", {}),
    ("cut_off", {"links": "1", "supervised": "1"}),
    ("failed", {"call": "0", "line": "call: mount", "errno": "1", "path": "/x", "text": "no"}),
    ("failed", {"call": "1", "line": "call: mount", "errno": "1", "path": "/x", "text": "no"}),
    ("sealed", {"call": "1", "NoNewPrivs": "1", "Seccomp": "2", "probe": "EACCES", "notes": ""}),
    ("ended", {"call": "1", "cause": "exit", "used": "0", "status": "0", "maxrss_kb": "9000", "utime": "0.1", "stime": "0.1"}),
    ("ended", {"call": "1", "cause": "memory", "used": "9", "status": "9", "memory.events oom_kill": "1"}),
]
ZYGOTE: list[tuple[str, dict[str, str]]] = [
    ("ready", {}),
    ("failed", {"sandbox": "fuzzed", "line": "sandbox: tmpfs", "errno": "12", "path": "", "text": "no"}),
    ("failed", {"sandbox": "", "line": "zygote: preload", "errno": "0", "path": "", "text": "no"}),
    ("closed", {"sandbox": "fuzzed", "left": ""}),
    ("closed", {"sandbox": "another", "left": "/x: no"}),
]
NOTES: list[tuple[str, dict[str, str]]] = [
    ("refused", {"module": "os", "list": "blocked_modules", "file": "x.py", "line": "3"}),
    ("refused", {"operation": "open", "path": "/etc/x", "errno": "13", "file": "x.py", "line": "3", "count": "1"}),
    ("asked", {"host": "example.org", "port": "80", "count": "1", "file": "x.py", "line": "3"}),
]
RESOLVED = {"names": {}, "allowed": {"example.org": ["93.184.215.14"]}, "nameservers": [], "files": {}}
TOO_LARGE = {"text": "it is too large", "allowed": "10", "used": "20"}
EVERY = [*SUPERVISOR, *WARDEN, *ZYGOTE, *NOTES, ("unfit", TOO_LARGE)]


class Zygote(client.Zygote):
    """The owner's side of a zygote that is nothing but a process that waits: no signal is sent to it."""

    def __init__(self, loop: PollLoop, pid: int) -> None:
        control, self.inside = channel.pair()
        super().__init__(loop, pid, control)
        self.teach = lambda wire: 1  # type: ignore[method-assign]

    def _signal(self, number: int) -> None:
        return

    def _instruct(self, instruction: dict[str, object], fds: Any) -> None:
        return

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.loop.remove_reader(self.control.fileno())
            self.control.close()
            self.inside.close()
            os.close(self.pidfd)
            self.pidfd = -1


class Side:
    """One sandbox with one call as its caller sees them, and the ends of the sockets that the sandbox would have."""

    def __init__(self, plan: Recipe, pid: int) -> None:
        self.loop = PollLoop()
        self.zygote = Zygote(self.loop, pid)
        before = channel.pair
        self.inside: list[Any] = []

        def pair(*, blocking: bool = True) -> Any:
            ours, theirs = before(blocking=blocking)
            self.inside.append(channel.from_fd(os.dup(theirs.fileno())))
            return ours, theirs

        channel.pair = pair
        try:
            self.sandbox = client.Sandbox(self.zygote, plan, {}, "fuzzed", RESOLVED)
            with open(os.devnull, "rb") as null:
                self.call = self.sandbox.call([null.fileno()] * 3)
        finally:
            channel.pair = before
        self.hub, self.violations, self.job = self.inside
        self.found: list[object] = []
        self.sandbox.on_network = lambda fields: self.found.append(outcome.activity(fields))
        self.call.on_violation = lambda call, fields: self.found.append(outcome.describe_violation(fields, call.sandbox))
        self.call.has_job = True

    def hear(self) -> None:
        """Let the host read all that waits."""
        for _ in range(100):
            self.loop.run_once(0)
            if not self.loop.epoll.poll(0):
                return

    def judge(self, dice: random.Random) -> None:
        """What became of the call, as a caller is told: a documented exception, or a value by the codec."""
        call = self.call
        if call.outcome is None and call.error is None:
            call.outcome = {"cause": "exit", "status": "0"}
        violations = [outcome.describe_violation(fields, self.sandbox) for fields in call.violations.values()]
        outcome.locate(call, violations)
        end = outcome.judge(call, violations)
        assert end is None or isinstance(end, SandboxException)
        assert end is None or str(end)
        if call.reply_kind == channel.REPLY_VALUE:
            with contextlib.suppress(codec.CodecError):
                codec.decode(call.reply, max_bytes=REPLY_BYTES)

    def check(self) -> None:
        call = self.call
        assert len(call.reply) <= max(REPLY_BYTES, channel.REPLY_TEXT)
        assert call.strays <= client.STRAYS + 1
        assert len(call.violations) <= client.NOTES + MESSAGES
        assert all(len(value) <= channel.MESSAGE for fields in call.violations.values() for value in fields.values())

    def close(self) -> None:
        self.sandbox.close()
        self.sandbox.gone()
        self.zygote.close()
        for sock in self.inside:
            sock.close()
        self.loop.close()


def mutated(dice: random.Random, messages: list[tuple[str, dict[str, str]]]) -> bytes:
    """A message like one of these, but for what is wrong with it."""
    kind, fields = dice.choice(messages if dice.random() < 0.9 else EVERY)
    fields = dict(fields)
    for _ in range(dice.choice((0, 0, 1, 1, 2, 5))):
        way = dice.randrange(4)
        if way == 0 and fields:
            del fields[dice.choice(list(fields))]
        elif way == 1 and fields:
            fields[dice.choice(list(fields))] = dice.choice(JUNK)
        elif way == 2:
            other = dice.choice(EVERY)[1]
            if other:
                name = dice.choice(list(other))
                fields[name] = dice.choice((other[name], dice.choice(JUNK)))
        else:
            kind = dice.choice((*JUNK, dice.choice(EVERY)[0]))
    data = bytearray(channel.pack(kind, fields)[: channel.MESSAGE + dice.choice((0, 0, 10))])
    if dice.random() < 0.2:
        damage(dice, data)
    return bytes(data) or b"\0"


def damage(dice: random.Random, data: bytearray) -> None:
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(data) + 1)
        way = dice.randrange(3)
        if way == 0:
            del data[at : at + dice.randrange(1, 9)]
        elif way == 1:
            data[at:at] = dice.randbytes(dice.randrange(1, 9))
        else:
            data[at : at + 1] = dice.choice((b"\0", b"\xff", b"\0\0", b"\xed\xa0\x80"))


def frame(dice: random.Random) -> bytes:
    kinds = channel.REPLY_VALUE, channel.REPLY_ERROR, channel.REPLY_UNFIT, channel.REPLY_SIZE, channel.NOTE, dice.randbytes(1)
    kind = dice.choice(kinds)
    way = dice.randrange(5)
    if kind == channel.NOTE and way:
        data = mutated(dice, NOTES)
    elif kind == channel.REPLY_VALUE and way:
        value = [dice.choice(({"a": 1}, 2.5, "text", [1, 2], None, b"raw")) for _ in range(dice.randrange(4))]
        data = codec.encode(value)
    elif kind == channel.REPLY_SIZE and way:
        data = channel.SIZE.pack(dice.choice((0, 1, channel.FRAME, channel.FRAME + 1, REPLY_BYTES, REPLY_BYTES + 1, 1 << 63)))
    elif kind == channel.REPLY_VALUE and dice.random() < 0.3:
        data = bytes([dice.choice((0, 1, channel.ALIGNMENT - 1, channel.ALIGNMENT))])
    elif kind == channel.REPLY_ERROR and way:
        data = failure.encode(dice.choice((ValueError("no"), PermissionError(1, "no"), MemoryError(), OSError(28, "full"))))
    elif kind == channel.REPLY_UNFIT and way:
        data = mutated(dice, [("unfit", TOO_LARGE)])
    else:
        data = dice.randbytes(dice.choice((0, 1, 100, channel.FRAME - 1, channel.FRAME)))
    if way == 1 and data:
        changed = bytearray(data)
        damage(dice, changed)
        data = bytes(changed)
    return (kind.upper() if dice.random() < 0.3 else kind) + data[: channel.FRAME + 1]


def play(seed: str, plan: Recipe, pid: int) -> int:
    """One round: a sandbox and some messages. Returns how many were sent; raises what the host's side raises."""
    dice = random.Random(seed)
    side = Side(plan, pid)
    sent = 0
    try:
        fast = dice.random() < 0.5  # one kind of sender or all
        senders = [
            (side.job, partial(frame, dice)),
            (side.violations, partial(mutated, dice, SUPERVISOR)),
            (side.hub, partial(mutated, dice, WARDEN)),
            (side.zygote.inside, partial(mutated, dice, ZYGOTE)),
        ]
        if fast:
            senders = [senders[dice.randrange(4)]]
        for _ in range(MESSAGES):
            sock, make = dice.choice(senders)
            data, fds = make(), [0] * dice.choice((0, 0, 0, 0, 1, 2, 3))
            with contextlib.suppress(OSError, ValueError):  # the host does not listen any more, or the queue is full
                sock.setblocking(False)
                channel.send_bytes(sock, data, fds)
                sent += 1
            if dice.random() < 0.7:
                side.hear()
                side.check()
        side.hear()
        side.check()
        side.judge(dice)
    finally:
        side.close()
    return sent


@contextlib.contextmanager
def prepared() -> Iterator[tuple[Recipe, int]]:
    """A recipe that needs nothing of the host, a process that stands for a zygote, and a ledger of our own."""
    limits = PluginLimitsV2(max_result_mb=REPLY_BYTES / (1 << 20))
    permissions = PluginPermissionsV2(allow_network_access=True, allowed_hosts=["example.org"], blocked_modules=["os"])
    config = IsolationConfig(level=IsolationLevel.STANDARD, allow_degraded=True)
    plan = recipe.compile(config, limits, permissions, host.facts())
    plan = Recipe(**{**plan.__dict__, "cgroup": None})
    ledger: Any = userids
    before = ledger.state
    with tempfile.TemporaryDirectory(prefix="psie-fuzz-") as folder, subprocess.Popen(["sleep", "infinity"]) as process:
        ledger.state = SimpleNamespace(folder=lambda kind: folder)
        try:
            yield plan, process.pid
        finally:
            ledger.state = before
            process.kill()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def run(seconds: float, seed: str) -> tuple[int, int, list[str]]:
    """(rounds, messages, findings) of so many seconds; a finding is its seed and traceback. The same seed plays the same."""
    rounds = messages = 0
    findings: list[str] = []
    end = time.monotonic() + seconds
    with prepared() as (plan, pid):
        board.own()  # a process has one for good
        usual = descriptors()
        while time.monotonic() < end and len(findings) < 10:
            name = f"{seed}:{rounds}"
            rounds += 1
            begun = time.monotonic()
            try:
                messages += play(name, plan, pid)
                assert descriptors() == usual, "descriptors stay"
                assert time.monotonic() - begun < 5, "it takes long"
            except Exception:
                findings.append(f"round {name}\n{traceback.format_exc()}")
                usual = descriptors()
    return rounds, messages, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", default="1")
    given = parser.parse_args()
    rounds, messages, findings = run(given.seconds, given.seed)
    for finding in findings:
        print(finding)
    print(f"{rounds} rounds, {messages} messages, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
