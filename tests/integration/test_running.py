"""psie ps, top, kill and inspect: sandboxes of other processes, by every door, at every level, as root and as a user."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import IsolationLevel, SandboxExecutor, SandboxKilledError, running
from sandbox.engine import service
from sandbox.recovery import private
from sandbox.recovery.store import Store

from . import cli_harness, harness
from .cli_harness import READY, Caller
from .unprivileged import User

SLEEPER = """
    import time
    print("ready", flush=True)
    time.sleep(60)
"""


def sleep() -> None:
    import time

    time.sleep(60)


def ours() -> dict[str, running.RunningSandbox]:
    """Those of this process, by the names that they have here."""
    return {each.sandbox_id: each for each in running.list_running() if each.owner_pid == os.getpid()}


# -- the library -----------------------------------------------------------------------------------------------------------


@pytest.mark.rootless
def test_from_its_opening_to_its_end_by_a_person(level: IsolationLevel) -> None:
    async def main() -> None:
        sandbox = harness.open_sandbox(level)
        async with sandbox:
            seen = ours()[sandbox.sandbox_id]
            assert (seen.state, seen.plugin, seen.level, seen.door) == ("open", "", level.value, "library")
            assert await sandbox.execute_plugin_safe(int, "42") == 42
            await harness.wait_for(lambda: ours()[sandbox.sandbox_id].state == "idle")
            assert ours()[sandbox.sandbox_id].to_dict()["processes"] == 0
            call = asyncio.create_task(sandbox.execute_plugin_safe(sleep))
            await harness.wait_for(lambda: ours()[sandbox.sandbox_id].state == "running")
            seen = ours()[sandbox.sandbox_id]
            told = seen.to_dict()
            assert (told["plugin"], told["processes"], told["owner_pid"]) == ("sleep", 1, os.getpid())
            assert told["memory_bytes"] > 0
            killed = await asyncio.to_thread(running.kill, seen.id[:12])
            assert killed.id == seen.id
            with pytest.raises(SandboxKilledError, match=r"was killed by .* \(psie kill\)") as raised:
                await call
            assert raised.value.by.endswith(" (psie kill)")
            with pytest.raises(SandboxKilledError):  # so does who calls again
                await sandbox.execute_plugin_safe(int, "42")
            assert sandbox.sandbox_id not in ours()
            with pytest.raises(running.NotRunning):
                running.find(seen.id)
        with Store(private.default_folder()) as store:
            assert any("psie kill" in run.reason for run in store.runs("sleep", None, None, None, 100))

    asyncio.run(main())


@pytest.mark.rootless
def test_protections_are_read_back_now(level: IsolationLevel) -> None:
    """As the engine has read them back when the worker stood, by the same function."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            found = await asyncio.to_thread(running.inspect, ours()[sandbox.sandbox_id].id)
            assert found.recipe == sandbox.recipe
            from_here = set() if harness.ROOT else {"Uid", "Gid", "Groups", "uid_map"}  # the warden is in a user namespace
            same = found.read_back.keys() - from_here
            assert {name: found.read_back[name] for name in same} == {name: sandbox._read_back[name] for name in same}
            expected = {each.name for each in found.recipe.protections if each.expected}
            assert {each.protection.name for each in found.protections if each.now == running.HOLDS} == expected
            json.dumps(found.to_dict())
            assert await sandbox.execute_plugin_safe(int, "42") == 42
            await sandbox._ends()
            idle = await asyncio.to_thread(running.inspect, ours()[sandbox.sandbox_id].id)
            assert {each.now for each in idle.protections if each.protection.expected} == {running.UNSEEN}

    asyncio.run(main())


def test_a_protection_that_does_not_hold_is_told() -> None:
    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            found = running.inspect(ours()[sandbox.sandbox_id].id)
            seen = {**found.read_back, "NoNewPrivs": "0"}
            changed = running.Inspection(found.sandbox, found.recipe, seen, {})
            (differs,) = [each for each in changed.protections if each.now == running.DIFFERS]
            assert "NoNewPrivs=0, not 1" in differs.protection.detail

    asyncio.run(main())


def test_a_session_is_idle_between_its_calls() -> None:
    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STRICT) as sandbox, sandbox.session() as session:
            assert await session.call(int, "7") == 7
            await harness.wait_for(lambda: ours()[sandbox.sandbox_id].state == "idle")
            assert ours()[sandbox.sandbox_id].to_dict()["processes"] == 1
            call = asyncio.create_task(session.call(sleep))
            await harness.wait_for(lambda: ours()[sandbox.sandbox_id].state == "running")
            await asyncio.to_thread(running.kill, sandbox.sandbox_id)
            with pytest.raises(SandboxKilledError):
                await call

    asyncio.run(main())


def test_executors_and_what_stands_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSIE_STANDING", "1")
    service.shut_down()  # what was opened just before by other tests would have more of them made
    try:
        with SandboxExecutor(1, level="strict") as executor:
            executor.prewarm(1)
            (standing,) = [each for each in ours().values() if each.state == "standing by"]
            future = executor.submit(sleep)
            assert harness.wait_until(lambda: any(each.state == "running" for each in ours().values()))
            (busy,) = [each for each in ours().values() if each.state == "running"]
            assert (busy.id, busy.door) == (standing.id, "executor")
            running.kill(busy.id)
            with pytest.raises(SandboxKilledError):
                future.result()
            assert harness.wait_until(lambda: any(each.state == "standing by" for each in ours().values()))
            for each in ours().values():
                if each.state == "standing by":  # nobody's: nobody is told
                    running.kill(each.id)
            assert executor.submit(int, "3").result() == 3
    finally:
        service.shut_down()


def test_only_the_one_that_is_meant_ends() -> None:
    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STRICT) as one, harness.open_sandbox(IsolationLevel.STRICT) as other:
            await asyncio.to_thread(running.kill, one.sandbox_id)
            assert await other.execute_plugin_safe(int, "5") == 5
            with pytest.raises(SandboxKilledError):
                await one.execute_plugin_safe(int, "5")

    asyncio.run(main())


# -- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["own-minimal", "own-strict", "user-minimal", "user-maximum"])
def caller(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Caller]:
    who, _, level = request.param.partition("-")
    if who == "own":
        yield cli_harness.privileged(level, tmp_path)
        return
    user: User = request.getfixturevalue("user")
    somebody = cli_harness.unprivileged(level, user)
    yield somebody
    somebody.clean()


@contextlib.contextmanager
def plugin(caller: Caller) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """One that runs, and what `psie ps` says of it."""
    with caller.start(*caller.plugin_line(SLEEPER)) as process:
        assert process.stdout is not None
        cli_harness.read_until(process.stdout.fileno(), READY)
        (found,) = [each for each in listed(caller) if each["owner_pid"] == process.pid]
        yield process, found


def listed(caller: Caller) -> list[dict[str, Any]]:
    done = caller.run("ps", "--json")
    assert done.status == 0, done.err
    found: list[dict[str, Any]] = json.loads(done.out)["sandboxes"]
    return found


def test_a_command_is_seen_looked_into_and_killed(caller: Caller) -> None:
    with plugin(caller) as (process, found):
        assert found["plugin"].endswith("/plugin.py"[-30:])
        assert (found["state"], found["level"], found["door"], found["processes"]) == ("running", caller.level, "command", 1)
        assert found["uid"] == caller.uid
        table = caller.run("ps").out
        assert found["id"] in table
        assert "running" in table
        inspected = caller.run("inspect", "--json", found["id"][:12])
        assert inspected.status == 0, inspected.out + inspected.err
        told = json.loads(inspected.out)
        assert {each["now"] for each in told["protections"]} == {"holds", "as set up"}
        assert told["recipe"]["level"] == caller.level
        killed = caller.run("kill", found["id"][:12])
        assert killed.status == 0, killed.err
        assert found["id"] in killed.out
        _, errors = process.communicate(timeout=cli_harness.SECONDS)
        assert process.returncode == 128 + signal.SIGTERM
        assert b"was killed by " in errors
        assert b"(psie kill)" in errors
    assert found["id"] not in {each["id"] for each in listed(caller)}


@pytest.fixture
def own(tmp_path: Path) -> Caller:
    return cli_harness.privileged("strict", tmp_path)


def test_nothing_is_shown_of_an_owner_that_was_killed(own: Caller) -> None:
    with plugin(own) as (process, found):
        process.kill()
        process.wait()
        assert found["id"] not in {each["id"] for each in listed(own)}
        assert own.run("kill", found["id"]).status == 125
    assert harness.wait_until(cli_harness.engine_is_gone)


def test_root_sees_others_and_they_do_not_see_root(as_root: None, own: Caller, user: User) -> None:
    somebody = cli_harness.unprivileged("standard", user)
    with plugin(own) as (_, roots), plugin(somebody) as (process, theirs):
        assert {roots["id"], theirs["id"]} <= {each["id"] for each in listed(own)}
        done = somebody.run("ps")
        assert theirs["id"] in done.out
        assert roots["id"] not in done.out
        assert "other users are not shown" in done.err
        refused = somebody.run("kill", roots["id"])
        assert refused.status == 125
        assert "no such sandbox" in refused.err
        assert own.run("inspect", theirs["id"]).status == 125  # their words are no recipe
        assert own.run("kill", theirs["id"]).status == 0
        process.wait(cli_harness.SECONDS)
    somebody.clean()


def test_all_at_once(user: User) -> None:
    """Of a user who has no others: --all would end those of other tests."""
    somebody = cli_harness.unprivileged("standard", user)
    with plugin(somebody) as (one, _), plugin(somebody) as (other, _):
        assert somebody.run("kill").status == 125
        assert somebody.run("kill", "--all", "abc").status == 125
        done = somebody.run("kill", "--all")
        assert (done.status, done.out.count("killed ")) == (0, 2)
        assert {each.wait(cli_harness.SECONDS) for each in (one, other)} == {128 + signal.SIGTERM}
    assert somebody.run("kill", "--all").out == "no sandbox runs\n"
    somebody.clean()


@pytest.mark.parametrize(
    "arguments",
    [
        ("kill", "zz"),
        ("inspect", "zz"),
        ("top", "-n", "0"),
        ("top", "-n", "nan"),
        ("top", "-n", "1e99"),
        ("top", "-n", "x"),
    ],
)
def test_bad_input_is_one_sentence(own: Caller, arguments: tuple[str, ...]) -> None:
    done = own.run(*arguments)
    assert done.status == 125
    assert done.err.startswith("psie: ")
    assert done.err.count("\n") == 1


def test_top_prints_one_table_where_there_is_no_terminal(own: Caller) -> None:
    with plugin(own) as (_, found):
        done = own.run("top", "-n", "0.2")
        assert done.status == 0
        (row,) = [line for line in done.out.splitlines() if found["id"] in line]
        assert "CPU %" in done.out
        assert row.split()[-2].isdecimal()


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_top_prints_one_table_on_a_terminal_that_can_no_more(own: Caller, term: str) -> None:
    master, slave = pty.openpty()
    try:
        done = own.run("top", "-n", "0.2", stdin=slave, stdout=slave, env={"TERM": term})
        assert (done.status, done.err) == (0, "")
        seen = cli_harness.read_until(master, b"\n")
        assert b"\x1b" not in seen
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("how", ["q", "SIGINT", "SIGQUIT"])
def test_top_on_a_terminal_ends_and_leaves_it_as_it_was(own: Caller, how: str) -> None:
    with plugin(own) as (_, found):
        master, slave = pty.openpty()
        before = termios.tcgetattr(slave)
        command = [sys.executable, "-m", "sandbox.cli", "top", "-n", "0.2"]
        environment = {**own.environment, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
        with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True) as top:
            try:
                cli_harness.read_until(master, found["id"].encode())
                if how == "q":
                    os.write(master, b"q")
                else:
                    top.send_signal(signal.Signals[how])
                cli_harness.read_until(master, b"\x1b[?1049l")  # the screen that was there before
                assert top.wait(cli_harness.SECONDS) == 0
                assert termios.tcgetattr(slave) == before
            finally:
                top.kill()
                os.close(master)
                os.close(slave)


def test_a_hostile_name_drives_no_terminal(own: Caller) -> None:
    path = own.write("\x1b[2Jx\u202e.py", SLEEPER)
    with own.start("run", "-q", str(path)) as process:
        assert process.stdout is not None
        cli_harness.read_until(process.stdout.fileno(), READY)
        for arguments in (("ps",), ("ps", "--json"), ("top", "--once")):
            out = own.run(*arguments).out
            assert str(process.pid) in out
            assert "\x1b" not in out
            assert "\u202e" not in out


def test_an_owner_that_cannot_be_looked_at_is_not_passed_over(user: User) -> None:
    """A process that nobody of its user may trace: prctl(PR_SET_DUMPABLE)."""
    somebody = cli_harness.unprivileged("standard", user)
    source = """
        import asyncio, ctypes, sys
        from sandbox import EnhancedPluginSandbox, IsolationConfig, PluginLimitsV2, PluginPermissionsV2

        async def main():
            async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig()):
                ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
                print("ready", flush=True)
                sys.stdin.readline()

        asyncio.run(main())
    """
    file = somebody.write("owner.py", source)
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**somebody.environment, "PSIE_STANDING": "0"}}
    with subprocess.Popen([*somebody.prefix, str(file)], **streams) as owner:  # type: ignore[call-overload]
        try:
            cli_harness.read_until(owner.stdout.fileno(), READY)
            assert "of 1 more sandboxes of this user the owner cannot be looked at" in somebody.run("ps").err
        finally:
            owner.stdin.close()
            owner.wait(cli_harness.SECONDS)
    assert "more sandboxes" not in somebody.run("ps").err
    somebody.clean()
