"""Plugins, arguments and replies as bad as they come: each ends in the documented error, in time, and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    IsolationLevel,
    PluginExecutionError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxInitializationError,
    SecurityViolationError,
    host,
)
from sandbox.engine import channel, codec
from sandbox.listener import Listener

from . import harness, hostile, plugins

rootless = pytest.mark.rootless

MB = 1 << 20
SECONDS = 10.0  # the time limit where a test is about another
SLACK = 2.0 * harness.PATIENCE  # what a loaded machine may take on top of a time limit


@dataclasses.dataclass(frozen=True)
class Case:
    """A plugin and its end: an error with these attributes, or, without an error, this value."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    error: type[SandboxException] | None = PluginExecutionError
    match: str = ""
    attributes: dict[str, object] = dataclasses.field(default_factory=dict)
    value: object = None
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    forks: int = 0
    private_disk: bool = False  # needs the workspace's own quota, which MINIMAL says it does not have


def limit(
    function: Callable[..., Any], name: str, *args: Any, forks: int = 0, private_disk: bool = False, **limits: Any
) -> Case:
    error = ResourceLimitExceededError
    return Case(function, args, error, attributes={"limit": name}, limits=limits, forks=forks, private_disk=private_disk)


def died(function: Callable[..., Any], number: int, *args: Any) -> Case:
    return Case(function, args, attributes={"signal": int(number), "exit_code": None})


SPEAK = channel.REPLY_VALUE
END = SPEAK.upper()  # an empty last frame
FORGED = SPEAK + codec.encode("forged")
NOTE = channel.NOTE.upper()
REFUSED = {"module": "json", "list": "blocked_modules", "file": "f", "line": "x" * 5000}
FORGED_NOTES = (
    NOTE,
    NOTE + b"\xff\0\xff",
    *(
        NOTE + channel.pack("refused", fields)
        for fields in ({}, {"module": "x"}, {"module": "", "list": "blocked_modules"}, {"module": "x", "list": "165"})
    ),
    NOTE + channel.pack("sealed", REFUSED),
    NOTE + channel.pack("refused", REFUSED),
)

CASES: dict[str, Case] = {
    # functions and replies that cannot travel
    "reply with a socket": Case(hostile.return_a_socket, match=r"""\["a"\]\[3\].*socket"""),
    "reply with a function": Case(hostile.return_function, match=r"""\["f"\]"""),
    "reply of 100 MB": limit(hostile.return_bytes, "result", 100 * MB, max_memory_mb=512),
    "reply nested 10,000 deep": Case(hostile.return_nested, (10_000,), match="deep|nest|level"),
    "reply that holds itself": Case(hostile.return_itself, match="deep|nest|level|itself"),
    # ends
    "os._exit": Case(hostile.exit_at_once, (3,), match="status 3", attributes={"exit_code": 3, "signal": None}),
    "os._exit with 0": Case(hostile.exit_at_once, (0,), match="status 0", attributes={"exit_code": 0, "signal": None}),
    "SystemExit with a text": Case(hostile.system_exit, ("text",), match="status 1", attributes={"exit_code": 1}),
    "SystemExit": Case(hostile.system_exit, (7,), match="status 7", attributes={"exit_code": 7}),
    "KeyboardInterrupt": Case(hostile.interrupt, attributes={"exception_type": "KeyboardInterrupt"}),
    "SIGSEGV": died(hostile.signal_itself, signal.SIGSEGV, int(signal.SIGSEGV)),
    "SIGKILL": died(hostile.signal_itself, signal.SIGKILL, int(signal.SIGKILL)),
    "SIGTERM": died(hostile.signal_itself, signal.SIGTERM, int(signal.SIGTERM)),
    "abort": died(hostile.abort, signal.SIGABRT),
    "null pointer": died(hostile.read_null, signal.SIGSEGV),
    # From 3.12 on Python counts the depth of C calls as well.
    "stack overflow": died(hostile.overflow_the_stack, signal.SIGSEGV)
    if sys.version_info < (3, 12)
    else Case(hostile.overflow_the_stack, match="RecursionError"),
    # descriptors
    "closes every fd": Case(hostile.close_every_fd),
    "garbage to every fd": Case(hostile.write_to_every_fd, (b"\xff" * 1000, b"\0"), None, value="after the garbage"),
    "frames to every fd": Case(hostile.write_to_every_fd, (SPEAK + b"garbage", END), match="reply of the plugin is not one"),
    # forged replies: what is no reply is none, what is one is the plugin's
    "forged rubbish": Case(hostile.forge, (SPEAK + b"rubbish", END), match="reply of the plugin is not one"),
    "forged pickle": Case(hostile.forge, (SPEAK + pickle.dumps(os.getcwd), END), match="reply of the plugin is not one"),
    "forged empty value": Case(hostile.forge, (SPEAK, END), match="reply of the plugin is not one"),
    "forged end of the socket": Case(hostile.forge, (b"",)),
    "forged end": Case(hostile.forge, (END,)),
    "forged error": Case(hostile.forge, (channel.REPLY_ERROR.upper() + b"\xff\xfe",)),
    "forged unfit": Case(hostile.forge, (channel.REPLY_UNFIT.upper() + b"\xff\0\xff",)),
    "forged kind": Case(hostile.forge, (b"?what", b"\0", b"\xff\xff"), None, value="the honest value"),
    "forged value": Case(hostile.forge, (FORGED, END), None, value="forged"),
    "forged second value": Case(hostile.forge, (FORGED, END, SPEAK + codec.encode("second"), END), None, value="forged"),
    "forged large frame": Case(hostile.forge, (SPEAK + bytes(100_000), END), match="reply of the plugin is not one"),
    "forged flood": limit(hostile.flood_the_job_socket, "result", SPEAK + bytes(60_000), max_result_mb=1),
    "forged flood of errors": Case(
        hostile.flood_the_job_socket,
        (channel.REPLY_ERROR + bytes(60_000),),
        ResourceLimitExceededError,
        limits={"max_execution_time_seconds": 1},
    ),
    "forged notes": Case(hostile.forge, FORGED_NOTES, None, value="the honest value"),
    "forged flood of notes": Case(
        hostile.flood_the_job_socket, (NOTE + channel.pack("refused", REFUSED),), SecurityViolationError, match="threshold"
    ),
    "forged flood of nothing": Case(hostile.flood_the_job_socket, (b"?",), match="BrokenPipeError|exited with status"),
    "takes python apart": Case(hostile.break_python),
    # processes
    "daemon": Case(hostile.leave_a_daemon, (), None, value="done", forks=4),
    "daemon that holds everything": Case(hostile.leave_a_daemon_that_holds_everything, (), None, value="done", forks=4),
    "fork without permission": Case(hostile.fork_bomb, (), SecurityViolationError, "not permitted"),
    "program without permission": Case(hostile.run_a_program, (), SecurityViolationError, "not permitted"),
    "fork bomb": limit(hostile.fork_bomb, "pids", forks=4),
    "stubborn fork bomb": limit(hostile.stubborn_fork_bomb, "time", forks=4, max_execution_time_seconds=1),
    "thread bomb": limit(hostile.thread_bomb, "pids"),
    "thread that does not end": Case(hostile.thread_that_does_not_end, (), None, value="done"),
    # amounts
    "prints 1 GB": limit(hostile.print_much, "output", 1024 * MB, max_output_mb=1),
    "memory at once": limit(hostile.take_memory_at_once, "memory"),
    "memory bit by bit": limit(hostile.take_memory_bit_by_bit, "memory"),
    # Without a controller nothing would count it.
    "shared memory": limit(hostile.take_shared_memory, "memory")
    if "memory" in host.facts().controllers
    else Case(hostile.take_shared_memory, (), SecurityViolationError, "no memory controller"),
    "fills the disk": limit(hostile.fill_the_disk, "disk", 64 * MB, private_disk=True, max_disk_usage_mb=8),
    "fills the disk with names": limit(hostile.fill_with_files, "disk", 400, private_disk=True, max_inodes=50),
    "large file": limit(hostile.write_one_file, "file_size", 16 * MB, max_file_size_mb=4),
    "large sparse file": limit(hostile.truncate_one_file, "file_size", 1 << 40, max_file_size_mb=4),
    "open files": limit(hostile.open_many_files, "open_files", 1000),
    # time
    "endless loop": limit(hostile.spin, "time", max_execution_time_seconds=0.4),
    "sleeps": limit(hostile.sleep, "time", 60.0, max_execution_time_seconds=0.4),
    "awaits for ever": limit(hostile.sleep_for_ever, "time", max_execution_time_seconds=0.4),
    "ignores signals": limit(hostile.ignore_signals, "time", max_execution_time_seconds=0.4),
    # exceptions
    "exception without text": Case(hostile.raise_mute, attributes={"exception_type": "integration.hostile.Mute"}),
    "exception of 32 MB": Case(hostile.raise_huge, match="ValueError: xxx", attributes={"exception_type": "ValueError"}),
    "exception with escapes": Case(hostile.raise_escapes, match="ValueError: ", attributes={"exception_type": "ValueError"}),
    "exception class with escapes": Case(hostile.raise_a_named_escape, match="text"),
    "exception with a long chain": Case(hostile.raise_a_chain, match="ValueError: 9999"),
    "exception group": Case(hostile.raise_group, attributes={"exception_type": "ExceptionGroup"}),
    "exception with a false errno": Case(hostile.raise_lying_errno, attributes={"exception_type": "OSError"}),
    # protections
    "many violations": Case(hostile.many_violations, (), SecurityViolationError, "threshold"),
    "unhandled violation": Case(hostile.unhandled_violation, (), SecurityViolationError, r"(connect|socket)\(\).* was refused"),
}  # fmt: skip


def can_fork(level: IsolationLevel) -> bool:
    return level is not IsolationLevel.MINIMAL or bool(host.facts().cgroup_kind)


def every_case() -> list[Any]:
    """Each case at each level; as a user without rights each at one, in turn."""
    return [
        pytest.param(level, name, id=f"{level.value}-{name}", marks=[pytest.mark.rootless] if number % 4 == row else [])
        for row, level in enumerate(harness.LEVELS)
        for number, name in enumerate(CASES)
    ]


def nothing_runs() -> bool:
    """Neither a worker nor what it has started."""
    found = harness.roles(os.getpid())
    return not found["worker"] and not found["other"]


def test_who_has_ended_the_socket_says_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the engine has ended the call before whoever waits for it has given the socket back."""
    stop = Listener.stop

    def late(listener: Listener) -> None:
        assert harness.wait_until(lambda: listener.call.done)
        stop(listener)

    monkeypatch.setattr(Listener, "stop", late)
    with pytest.raises(PluginExecutionError):
        harness.call(IsolationLevel.STRICT, hostile.forge, b"")


@pytest.mark.long
@pytest.mark.parametrize(("level", "name"), every_case())
def test_each_ends_in_its_error_in_time(level: IsolationLevel, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    if case.private_disk and level is IsolationLevel.MINIMAL:
        pytest.skip("level minimal says that it has no disk quota")
    limits = {"max_execution_time_seconds": SECONDS, **case.limits}
    permissions = {}
    if case.forks:
        limits["max_subprocess_count"] = case.forks
        permissions["allow_subprocess_execution"] = True
    error = case.error
    if case.forks and not can_fork(level):
        error = SandboxInitializationError

    async def main() -> Any:
        async with harness.open_sandbox(level, limits=limits, permissions=permissions) as sandbox:
            begin = time.monotonic()
            try:
                return await sandbox.execute_plugin_safe(case.function, *case.args)
            finally:
                assert time.monotonic() - begin < limits["max_execution_time_seconds"] + SLACK
                await harness.wait_for(nothing_runs)

    if error is None:
        assert asyncio.run(main()) == case.value
    else:
        with pytest.raises(error) as caught:
            asyncio.run(main())
        check_error(caught.value, case if error is case.error else Case(case.function, attributes={"protection": "seccomp"}))
    capsys.readouterr()


def check_error(error: SandboxException, case: Case) -> None:
    text = str(error)
    assert re.search(case.match, text), text
    assert {name: getattr(error, name) for name in case.attributes} == case.attributes
    assert len(text) < 1 << 20
    assert not any(character in text for character in "\x1b\x07\x00\u202e\r"), "it could drive a terminal"
    if isinstance(error, ResourceLimitExceededError):
        assert error.allowed is not None
    if isinstance(error, SecurityViolationError):
        assert error.violations


@rootless
def test_a_generator_function(level: IsolationLevel) -> None:
    with pytest.raises(PluginExecutionError, match="generator is a generator: return a list"):
        harness.call(level, hostile.generator)


# -- what cannot travel in ---------------------------------------------------------------------------------------------


def refuses_to_travel(level: IsolationLevel, function: Callable[..., Any], *args: Any, part: str) -> None:
    with pytest.raises(PluginExecutionError, match="cannot travel") as caught:
        harness.call(level, function, *args)
    assert part in str(caught.value)


@rootless
def test_a_function_with_a_lock(level: IsolationLevel) -> None:
    lock = threading.Lock()
    refuses_to_travel(level, lambda: lock.acquire(), part="'lock'")


@rootless
def test_a_function_with_a_socket(level: IsolationLevel) -> None:
    with socket.socket() as sock:
        refuses_to_travel(level, lambda: sock.fileno(), part="'sock'")


@rootless
def test_a_function_with_an_open_file(level: IsolationLevel) -> None:
    with tempfile.TemporaryFile("w+") as file:
        refuses_to_travel(level, lambda: file.read(), part="open file")


@rootless
def test_a_function_with_a_generator(level: IsolationLevel) -> None:
    items = hostile.generator()
    refuses_to_travel(level, lambda: list(items), part="generator")


@rootless
def test_arguments_that_cannot_travel(level: IsolationLevel) -> None:
    refuses_to_travel(level, plugins.give_back, threading.Lock(), part="args[0]")
    refuses_to_travel(level, plugins.give_back, hostile.generator(), part="args[0]")
    with socket.socket() as sock:
        refuses_to_travel(level, plugins.give_back, [sock], part="args[0]")


@rootless
def test_a_value_that_pickles_by_raising(level: IsolationLevel) -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise RuntimeError("never")

    refuses_to_travel(level, plugins.give_back, Stubborn(), part="never")


# -- after the bad, the good -------------------------------------------------------------------------------------------


@rootless
def test_a_sandbox_survives_bad_calls(level: IsolationLevel) -> None:
    """A call that went wrong is over; the next one in the same sandbox knows nothing of it."""

    async def main() -> None:
        limits = {"max_execution_time_seconds": 0.5, "max_output_mb": 1}
        async with harness.open_sandbox(level, limits=limits) as sandbox:
            bad: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
                (hostile.exit_at_once, (3,)),
                (hostile.signal_itself, (int(signal.SIGKILL),)),
                (hostile.close_every_fd, ()),
                (hostile.forge, (SPEAK + b"rubbish", END)),
                (hostile.take_memory_at_once, ()),
                (hostile.print_much, (8 * MB,)),
                (hostile.spin, ()),
                (hostile.unhandled_violation, ()),
                (hostile.return_nested, (10_000,)),
            ]
            for function, args in bad:
                with pytest.raises(SandboxException):
                    await sandbox.execute_plugin_safe(function, *args)
                assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1, function

    asyncio.run(main())


@rootless
def test_what_a_dying_plugin_said_is_not_lost(level: IsolationLevel, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PluginExecutionError):
        harness.call(level, hostile.exit_at_once, 3)
    assert capsys.readouterr().out == "before the end\n"
    with pytest.raises(PluginExecutionError):
        harness.call(level, hostile.system_exit, "the text")
    assert capsys.readouterr().err == "the text\n"


@rootless
def test_output_is_cut_at_its_limit(level: IsolationLevel, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResourceLimitExceededError) as caught:
        harness.call(level, hostile.print_much, 64 * MB, limits={"max_output_mb": 0.5})
    assert caught.value.allowed == MB // 2
    assert len(capsys.readouterr().out) == MB // 2


@rootless
def test_a_workspace_full_of_traps_is_removed(level: IsolationLevel) -> None:
    """Deep folders, folders without rights, links out of the workspace, pipes."""

    def traps() -> int:
        os.symlink("/etc", "link-out")
        os.symlink("..", "up")
        with contextlib.suppress(OSError):
            os.mkfifo("pipe")
        os.mkdir("shut")
        os.mkdir("shut/inner", 0)
        os.makedirs("closed/inner")
        with contextlib.suppress(PermissionError):
            os.chmod("closed", 0)
        for _ in range(250):
            os.mkdir("deep" * 20)
            os.chdir("deep" * 20)
        return 1

    # Where the caller has no more rights than the plugin, the folders without any may be taken for hiding.
    stopped = contextlib.nullcontext() if harness.ROOT else contextlib.suppress(ResourceLimitExceededError)
    with harness.nothing_left(), stopped:
        assert harness.call(level, traps) == 1
    assert Path("/etc/passwd").exists()
