"""Calls that do what they should, at every level: what travels in and out, what stays, what is told."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import datetime
import decimal
import fractions
import functools
import importlib
import io
import math
import os
import pathlib
import resource
import sys
import threading
import time
import uuid
from array import array as Array
from typing import Any

import pytest

from sandbox import (
    EnhancedPluginSandbox,
    IsolationConfig,
    IsolationLevel,
    PluginExecutionError,
    PluginLimitsV2,
    PluginPermissionsV2,
    ResourceError,
    SandboxExecutor,
    SandboxInitializationError,
    SandboxTelemetry,
    SandboxViolation,
    SandboxViolationType,
    network,
)
from sandbox.engine import channel, client
from sandbox.engine.loop import PollLoop
from sandbox.engine.recording import Recorder
from sandbox.engine.streams import Streams
from sandbox.recovery import private
from sandbox.recovery.store import Store

from . import harness, plugins

pytestmark = pytest.mark.rootless

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -(1 << 200),
    1.5,
    math.nan,
    -math.inf,
    -0.0,
    1 + 2j,
    "",
    "text \0 \N{SNOWMAN} \ud800",
    b"\0\xff",
    bytearray(b"ab"),
    [],
    [1, "a", [2.5, None]],
    (1,),
    {"a": 1, 2: (3, 4), None: {}, (1, "x"): b""},
    {1, "a"},
    frozenset({(1, 2)}),
    datetime.datetime(2024, 2, 29, 12, 30, 1, 5, datetime.UTC),
    datetime.datetime(2024, 2, 29, 12, 30, fold=1),
    datetime.date(1, 1, 1),
    datetime.time(23, 59, 59, 999999),
    datetime.timedelta(days=-1, microseconds=1),
    decimal.Decimal("1.10"),
    fractions.Fraction(1, 3),
    uuid.UUID(int=5),
    pathlib.PurePosixPath("/a/b"),
    pathlib.Path("c"),
    plugins.Color.BLUE,
    plugins.Point(1, 2.5),
]


def same(a: Any, b: Any) -> bool:
    """Equal in type and value all through; nan is nan, and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    return bool(a == b)


def test_values_round_trip(level: IsolationLevel) -> None:
    back = harness.call(level, plugins.give_back, VALUES)
    assert len(back) == len(VALUES)
    for value, seen in zip(VALUES, back, strict=True):
        assert same(value, seen), (value, seen)


def test_arrays_round_trip(level: IsolationLevel) -> None:
    numpy = pytest.importorskip("numpy")
    arrays = [numpy.arange(6, dtype="<i2").reshape(2, 3), numpy.zeros(0), numpy.float32(1.5), numpy.array(["a", "bc"])]
    for array, seen in zip(arrays, harness.call(level, plugins.give_back, arrays, limits={"max_memory_mb": 512}), strict=True):
        assert type(array) is type(seen)
        assert array.dtype == seen.dtype
        assert array.shape == seen.shape
        assert (array == seen).all()


@pytest.mark.parametrize("size", [channel.SMALL, channel.FRAME, channel.FRAME + 1, (4 << 20) - 100, 4 << 20, (4 << 20) + 1])
def test_a_large_value_round_trips(level: IsolationLevel, size: int) -> None:
    value = os.urandom(size)
    assert harness.call(level, plugins.give_back, value, limits={"max_file_size_mb": 1.0}) == value


@pytest.mark.long
def test_a_hundred_megabytes_go_each_way(level: IsolationLevel) -> None:
    value = bytes(100 << 20)
    assert harness.call(level, plugins.give_back, value, limits={"max_memory_mb": 512.0, "max_result_mb": 101.0}) == value


def test_a_large_array_is_not_copied(level: IsolationLevel) -> None:
    """It lies in the memory in which it came, and can be changed all the same."""
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(1 << 18, dtype="f8").reshape(512, 512)
    seen = harness.call(level, plugins.give_back, array, limits={"max_memory_mb": 512.0})
    assert (seen == array).all()
    owner = seen
    while isinstance(owner, numpy.ndarray) and owner.base is not None:
        owner = owner.base
    assert isinstance(owner, memoryview)  # not an array of its own
    assert seen.flags.aligned
    seen[0, 0] = 7
    assert seen[0, 0] == 7


def test_arguments(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            run = sandbox.execute_plugin_safe
            assert await run(plugins.keywords, 1, 2, 3, word="x") == (1, (2, 3), {"word": "x"})
            assert await run(lambda text: text.upper(), "abc") == "ABC"
            assert await run(functools.partial(plugins.keywords, 1, named="y")) == (1, (), {"named": "y"})
            assert await run(len, [1, 2]) == 2
            assert await run(plugins.Point(1, 2.0).__eq__, plugins.Point(1, 2.0)) is True

    asyncio.run(main())


def test_environment_as_first_parameter(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level, sandbox_id="mine", limits={"max_thread_count": 3}) as sandbox:
            env = await sandbox.execute_plugin_safe(plugins.with_env, word="x")
            keys = ("sandbox_id", "temp_directory", "data_directory", "logs_directory", "config", "limits", "permissions")
            assert set(env) == {*keys, "word"}
            assert env["sandbox_id"] == "mine"
            assert env["word"] == "x"
            assert env["config"]["level"] == level.value
            assert env["limits"]["max_thread_count"] == 3
            assert env["permissions"]["allow_network_access"] is False
            assert all(type(env[key]) is dict for key in ("config", "limits", "permissions"))
            assert await sandbox.execute_plugin_safe(plugins.with_environment) == sorted(keys)
            assert await sandbox.execute_plugin_safe(plugins.with_other_name, 5) == 5
            names = await sandbox.execute_plugin_safe(plugins.write_where_it_says)
            assert {"data_directory", "logs_directory"} <= set(names)

    asyncio.run(main())


def test_async_function(level: IsolationLevel) -> None:
    assert harness.call(level, plugins.awaited, 7) == 7


def test_output_goes_to_the_callers_streams(level: IsolationLevel, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.call(level, plugins.speak, 3) == plugins.NOTE
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == sorted(["out 0", "out 1", "out 2", "bare \\xff"])
    assert err.splitlines() == ["err 0", "err 1", "err 2"]


def test_output_of_a_call_that_is_found_gone() -> None:
    """What is too much ends the call, and where the warden has just died that is the end of the streams as well, at once."""
    heard: list[bytes] = []
    loop = PollLoop()
    streams = Streams(loop, 4, lambda: streams.finish(), (heard.append, heard.append), None)
    os.write(streams.inside[1], b"123456")
    loop.run_once(0)
    assert b"".join(heard) == b"1234"
    assert not loop.readers
    loop.close()


def test_workspace_is_kept_between_calls_and_gone_after(level: IsolationLevel) -> None:
    async def main() -> tuple[pathlib.Path, int]:
        async with harness.open_sandbox(level) as sandbox:
            folder = sandbox.temp_directory
            assert isinstance(folder, pathlib.Path)
            assert await sandbox.execute_plugin_safe(plugins.save, "kept", "one") == ["kept"]
            assert await sandbox.execute_plugin_safe(plugins.load, "kept") == "one"
            assert (folder / "kept").read_text() == "one"
            assert [path.name for path in folder.iterdir()] == ["kept"]
            (folder / "from-host").write_text("two")
            (folder / "from-host").chmod(0o644)
            assert await sandbox.execute_plugin_safe(plugins.load, "from-host") == "two"
            found = (folder / "kept").stat().st_ino, (folder / "kept").stat().st_dev
        with pytest.raises(RuntimeError, match="not open"):
            _ = sandbox.temp_directory
        kept = folder / "kept"
        return kept, 0 if not kept.exists() else int((kept.stat().st_ino, kept.stat().st_dev) == found)

    kept, is_same = asyncio.run(main())
    assert not is_same, f"{kept} is still there"


def test_a_workspace_belongs_to_one_opening(level: IsolationLevel) -> None:
    assert harness.call(level, plugins.save, "first", "") == ["first"]
    assert harness.call(level, plugins.save, "second", "") == ["second"]


def test_concurrent_calls_in_one_sandbox(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            calls = [sandbox.execute_plugin_safe(plugins.meet, str(number), 8) for number in range(8)]
            assert len(await asyncio.gather(*calls)) == 8

    asyncio.run(main())


@pytest.mark.long
def test_a_storm_of_calls_waits_its_turn(level: IsolationLevel) -> None:
    """More than the warden's socket holds, and workers than would fit at once; the first that came are served first."""
    count, begun = 400, []

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:

            async def call(number: int) -> object:
                answer = await sandbox.execute_plugin_safe(plugins.give_back, number)
                begun.append(number)
                return answer

            assert await asyncio.gather(*map(call, range(count))) == list(range(count))
            assert sandbox.get_violations() == []  # each of them has all of the zygote's memory, which is there once
            late = [position - number for position, number in enumerate(begun)]
            assert max(map(abs, late)) < 4 * client.COMING_UP

    asyncio.run(main())


def test_calls_that_wait_their_turn_are_cancelled_and_closed_as_any(level: IsolationLevel) -> None:
    async def main() -> None:
        sandbox = harness.open_sandbox(level)
        await sandbox.__aenter__()
        tasks = [asyncio.create_task(sandbox.execute_plugin_safe(plugins.give_back, number)) for number in range(100)]
        await tasks[0]
        for task in tasks[50:90]:
            task.cancel()
        seen = await asyncio.gather(*tasks[:90], return_exceptions=True)
        assert seen[:50] == list(range(50))
        assert {type(each) for each in seen[50:]} == {asyncio.CancelledError}
        waiting = [asyncio.create_task(sandbox.execute_plugin_safe(plugins.give_back, number)) for number in range(100)]
        await asyncio.sleep(0)  # each has asked for its turn
        assert await sandbox.cleanup_sandbox()
        seen = await asyncio.gather(*tasks[90:], *waiting, return_exceptions=True)
        assert "was closed" in str(seen[-1])
        assert all(isinstance(each, int) or "closed" in str(each) for each in seen), [str(each) for each in seen]
        assert not any(harness.roles(os.getpid())[role] for role in ("warden", "init", "worker"))

    asyncio.run(main())


def test_concurrent_calls_do_not_mix(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as a, harness.open_sandbox(level) as b:
            both = [box.execute_plugin_safe(plugins.give_back, number) for number in range(10) for box in (a, b)]
            assert await asyncio.gather(*both) == [number for number in range(10) for _ in "ab"]
            failing = a.execute_plugin_safe(plugins.fail, "mine")
            good = b.execute_plugin_safe(plugins.give_back, "good")
            seen = await asyncio.gather(failing, good, return_exceptions=True)
            assert isinstance(seen[0], PluginExecutionError)
            assert seen[1] == "good"

    asyncio.run(main())


def test_own_modules_travel_by_value(
    level: IsolationLevel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    base, top = f"base_{level.value}", f"top_{level.value}"
    (tmp_path / f"{base}.py").write_text("FACTOR = 3\ndef times(x):\n    return x * FACTOR\n")
    (tmp_path / f"{top}.py").write_text(
        f"from {base} import times\nimport {base}\ndef run(x):\n    return times(x) + {base}.FACTOR\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    request.addfinalizer(lambda: [sys.modules.pop(name, None) for name in (base, top)])
    assert harness.call(level, importlib.import_module(top).run, 4) == 15


def test_packages_without_an_init_file_travel_too(
    level: IsolationLevel, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    package, top = f"namespace_{level.value}", f"uses_namespace_{level.value}"
    (tmp_path / package / "inner").mkdir(parents=True)
    (tmp_path / package / "inner" / "module.py").write_text("def seven():\n    return 7\n")
    lines = f"import {package}.inner.module\ndef run():\n    return {package}.inner.module.seven()\n"
    (tmp_path / f"{top}.py").write_text(lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = (package, f"{package}.inner", f"{package}.inner.module", top)
    request.addfinalizer(lambda: [sys.modules.pop(name, None) for name in made])
    run = importlib.import_module(top).run
    assert harness.call(level, run) == 7
    del sys.modules[package]  # as some test runners do
    assert harness.call(level, plugins.give_back, 1) == 1


def shape_of(view: memoryview) -> tuple[str, str, Any, Any, bool]:
    return type(view).__name__, view.format, view.shape, view.tolist(), view.readonly


def test_a_memoryview_shows_inside_what_it_shows_outside(level: IsolationLevel) -> None:
    table = memoryview(bytearray(range(6))).cast("B", (2, 3))
    views = [memoryview(b"ab"), memoryview(Array("i", [1, 2, 3])), table, memoryview(b"abcdef")[::2]]
    for view in views:
        assert harness.call(level, shape_of, view) == shape_of(view)
    numbers = memoryview((ctypes.c_int * 3)(1, 2, 3))
    assert harness.call(level, shape_of, numbers)[1:4] == ("i", (3,), [1, 2, 3])
    assert harness.call(level, shape_of, memoryview(Array("i")))[3] == []


@functools.lru_cache(maxsize=10)
def fibonacci(number: int) -> int:
    return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)


def uses_cached(number: int) -> tuple[int, int, str]:
    return fibonacci(number), fibonacci.cache_info().hits, fibonacci.__name__


def test_functions_with_a_cache_travel(level: IsolationLevel) -> None:
    """With an empty one."""
    fibonacci(9)
    assert harness.call(level, fibonacci, 30) == 832_040
    assert harness.call(level, uses_cached, 30) == (832_040, 28, "fibonacci")
    assert harness.call(level, functools.cache(lambda value: value + 1), 4) == 5


def test_preload(level: IsolationLevel) -> None:
    assert harness.call(level, plugins.loaded, "colorsys") is False
    assert harness.call(level, plugins.loaded, "colorsys", config={"preload": ("colorsys",)}) is True


def test_preload_of_what_is_not_there(level: IsolationLevel) -> None:
    with pytest.raises(SandboxInitializationError, match=r"no_such_module.*; install it"):
        harness.call(level, plugins.loaded, "x", config={"preload": ("no_such_module",)})


def test_environment_variables(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "caller's")
    seen = harness.call(level, plugins.variables, environment={"EXTRA": "yes"})
    assert "MY_SECRET" not in seen
    assert seen["EXTRA"] == "yes"
    assert os.environ.get("HOME") != seen["HOME"]
    none = harness.call(level, plugins.variables, permissions={"allow_environment_variables": False})
    assert set(none) <= {"LC_CTYPE"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PORT": 8080}, "a int at 'PORT'"),
        ({8080: "PORT"}, "a int at 8080"),
        *(({name: "x"}, "cannot have") for name in ("", "A=B", "A\0B", "\ud800")),
        ({"A": "x\0"}, "cannot have"),
    ],
)
def test_what_no_environment_can_have(environment: Any, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        harness.open_sandbox(IsolationLevel.STRICT, environment=environment)
    with pytest.raises((TypeError, ValueError), match=said):
        SandboxExecutor(environment=environment)


def test_a_value_of_the_callers_is_passed_on_as_it_is(level: IsolationLevel) -> None:
    seen = harness.call(level, plugins.variables, environment={"PLACE": "http://host/{folder}/x"})
    assert seen["PLACE"] == "http://host/{folder}/x"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", None])
def test_text_that_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, encoding: str | None) -> None:
    """A character may lie across two reads; and what is shown fits whatever stands for stdout."""

    class Shown:
        def __init__(self) -> None:
            self.text = ""
            self.encoding = encoding

        def write(self, text: str) -> None:
            self.text += text.encode(encoding).decode(encoding) if encoding else text

    def speaks() -> None:
        os.write(1, b"x" + "\u20ac".encode() * 100_000 + b"\xe2\x82")

    shown = Shown()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", shown)
        harness.call(IsolationLevel.STRICT, speaks)
    sign = "\u20ac" if encoding in ("utf-8", None) else "\\u20ac"
    assert shown.text == "x" + sign * 100_000 + "\\xe2\\x82"


def test_a_handler_that_raises_costs_no_record() -> None:
    class Broken:
        def on_violation_detected(self, violation: SandboxViolation) -> None:
            raise ValueError("of the handler")

    def three_refused() -> None:
        import socket

        for port in (1, 2, 3):
            with contextlib.suppress(OSError), socket.create_connection(("192.0.2.1", port)):
                pass

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STRICT, monitoring_handler=Broken()) as sandbox:
            for _ in range(2):
                with pytest.raises(ValueError, match="of the handler"):
                    await sandbox.execute_plugin_safe(three_refused)
            assert len(sandbox.get_violations()) == 6

    asyncio.run(main())


class BrokenAtTheEnd:
    def on_sandbox_cleanup(self, telemetry: SandboxTelemetry) -> None:
        raise ValueError("of the handler")


@pytest.mark.parametrize("raised", [None, KeyError("of the body"), asyncio.CancelledError()], ids=["", "error", "cancelled"])
def test_what_a_handler_raises_at_the_end_hides_nothing(raised: BaseException | None) -> None:
    told: list[BaseException] = []
    sandbox = harness.open_sandbox(IsolationLevel.STRICT, monitoring_handler=BrokenAtTheEnd())

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        async with sandbox:
            if raised is not None:
                raise raised

    with harness.nothing_left(), pytest.raises(ValueError if raised is None else type(raised)):
        asyncio.run(main())
    assert [str(error) for error in told] == ([] if raised is None else ["of the handler"])
    assert sandbox.get_telemetry().cleanup_successful


def test_the_end_is_told_also_where_a_call_still_has_to_be_that_a_handler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after a value may be told only when the sandbox is closed."""
    handler = Handler()
    sandbox = harness.open_sandbox(IsolationLevel.STRICT, monitoring_handler=handler)

    def see_ends(self: EnhancedPluginSandbox) -> None:
        raise ValueError("of a violation")

    async def main() -> None:
        async with sandbox:
            monkeypatch.setattr(EnhancedPluginSandbox, "_see_ends", see_ends)

    with pytest.raises(ValueError, match="of a violation"):
        asyncio.run(main())
    monkeypatch.undo()
    assert handler.seen == [sandbox.get_telemetry()]


def test_a_keyword_may_be_called_self(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            assert await sandbox.execute_plugin_safe(plugins.keywords, 1, self="x") == (1, (), {"self": "x"})
            assert await sandbox.execute_plugin_safe(plugin_function=plugins.keywords, first=1) == (1, (), {})
            bound = functools.partial(plugins.keywords, plugin_function="x")
            assert await sandbox.execute_plugin_safe(bound, 1) == (1, (), {"plugin_function": "x"})

    asyncio.run(main())


class Awaitable:
    async def __call__(self, value: int) -> int:
        return value + 1


def test_an_object_may_be_called_as_a_coroutine(level: IsolationLevel) -> None:
    assert harness.call(level, Awaitable(), 1) == 2


def test_what_stands_for_stdout_may_be_closed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is shown then, and nothing is said of each piece of what is not."""
    closed = io.StringIO()
    closed.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert harness.call(IsolationLevel.STRICT, plugins.speak, 3)
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_an_exception_of_the_plugin(level: IsolationLevel) -> None:
    with pytest.raises(PluginExecutionError, match="ValueError: no way") as caught:
        harness.call(level, plugins.fail, "no way")
    assert caught.value.exception_type == "ValueError"
    assert caught.value.exception_message == "no way"
    assert "in fail" in caught.value.traceback_text
    assert "raise ValueError(text)" in caught.value.traceback_text
    assert caught.value.traceback_text.rstrip() in str(caught.value)
    assert "sandbox/engine" not in caught.value.traceback_text


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class OddErrno(OSError):
    @property
    def errno(self) -> int:  # type: ignore[override]
        raise ValueError("no number")


class Closed(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("nobody looks at me")


class SharedMemoryError(Exception):
    """Of another kind of memory than that which is limited."""


ODD_ERRORS = [
    (FrozenError, (404,), "FrozenError: 404"),
    (OddErrno, ("x",), "OddErrno: x"),
    (Closed, ("y",), "Closed: y"),
    (SharedMemoryError, ("segment not found",), "SharedMemoryError: segment not found"),
]


def raise_odd(number: int) -> None:
    kind, args, _ = ODD_ERRORS[number]
    raise kind(*args)


@pytest.mark.parametrize("number", range(len(ODD_ERRORS)), ids=[kind.__name__ for kind, *_ in ODD_ERRORS])
def test_an_exception_that_does_not_let_itself_be_handled_arrives_as_any(level: IsolationLevel, number: int) -> None:
    async def main() -> None:
        async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(level=level)) as sandbox:
            with pytest.raises(PluginExecutionError) as caught:
                await sandbox.execute_plugin_safe(raise_odd, number)
            assert ODD_ERRORS[number][2] in str(caught.value).splitlines()[0]
            shown = "<the traceback cannot be shown>" if ODD_ERRORS[number][0] is Closed else "in raise_odd"
            assert shown in caught.value.traceback_text
            async with sandbox.session() as session:
                pid = await session.call(os.getpid)
                with pytest.raises(PluginExecutionError, match=ODD_ERRORS[number][2]):
                    await session.call(raise_odd, number)
                assert await session.call(os.getpid) == pid

    asyncio.run(main())


def exit_with(code: object) -> None:
    sys.exit(code)  # type: ignore[arg-type]


class NoWords:
    def __str__(self) -> str:
        raise ValueError("none")


EXITS = {"huge": (2**70, 255), "negative": (-1, 255), "256": (256, 0), "no words": (NoWords(), 1)}


@pytest.mark.parametrize(("code", "status"), EXITS.values(), ids=EXITS)
def test_odd_exit_codes_are_the_interpreters(level: IsolationLevel, code: object, status: int) -> None:
    with pytest.raises(PluginExecutionError, match=f"exited with status {status}") as caught:
        harness.call(level, exit_with, code)
    assert "sandbox/engine" not in str(caught.value)


def test_cancelling_kills_the_call(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            task = asyncio.create_task(sandbox.execute_plugin_safe(plugins.signal_and_sleep))
            await harness.wait_for((sandbox.temp_directory / "started").exists)
            assert len(harness.roles(os.getpid())["worker"]) == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await harness.wait_for(lambda: not harness.roles(os.getpid())["worker"])
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1

    asyncio.run(main())


def test_a_timeout_of_the_callers_kills_the_call(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await sandbox.execute_plugin_safe(plugins.signal_and_sleep)
            await harness.wait_for(lambda: not harness.roles(os.getpid())["worker"])

    asyncio.run(main())


def test_one_after_the_other_in_different_event_loops(level: IsolationLevel) -> None:
    assert [harness.call(level, plugins.give_back, number) for number in range(2)] == [0, 1]


def test_several_threads_each_with_its_loop(level: IsolationLevel) -> None:
    seen: list[int] = []
    barrier = threading.Barrier(4)

    def use(number: int) -> None:
        barrier.wait()
        seen.append(harness.call(level, plugins.give_back, number))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [0, 1, 2, 3]


def test_an_open_sandbox_in_another_loop(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:

            def elsewhere() -> Any:
                return asyncio.run(sandbox.execute_plugin_safe(plugins.give_back, "there"))

            assert await asyncio.to_thread(elsewhere) == "there"
            assert await sandbox.execute_plugin_safe(plugins.give_back, "here") == "here"

    asyncio.run(main())


def test_only_an_open_sandbox_can_be_used(level: IsolationLevel) -> None:
    async def main() -> None:
        sandbox = harness.open_sandbox(level)
        with pytest.raises(RuntimeError, match="not open"):
            await sandbox.execute_plugin_safe(plugins.give_back, 1)
        async with sandbox:
            with pytest.raises(RuntimeError, match="opened before"):
                await sandbox.__aenter__()
            with pytest.raises(TypeError, match="cannot be called"):
                await sandbox.execute_plugin_safe(5)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="not open"):
            await sandbox.execute_plugin_safe(plugins.give_back, 1)
        assert await sandbox.cleanup_sandbox() is True

    asyncio.run(main())


def test_of_two_that_open_one_sandbox_at_once_one_is_refused(level: IsolationLevel) -> None:
    """Else there are two, of which only one is ever closed."""

    async def main() -> None:
        sandbox = harness.open_sandbox(level)
        first, second = await asyncio.gather(sandbox.__aenter__(), sandbox.__aenter__(), return_exceptions=True)
        assert first is sandbox
        assert "opened before" in str(second)
        assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1
        assert await sandbox.cleanup_sandbox() is True

    with harness.nothing_left():
        asyncio.run(main())


def test_cleanup_by_hand(level: IsolationLevel) -> None:
    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            task = asyncio.create_task(sandbox.execute_plugin_safe(plugins.signal_and_sleep))
            await harness.wait_for((sandbox.temp_directory / "started").exists)
            assert await sandbox.cleanup_sandbox() is True
            with pytest.raises(Exception, match="closed"):
                await task
            assert sandbox.get_telemetry().cleanup_successful
            assert await sandbox.cleanup_sandbox() is True

    asyncio.run(main())


def test_closed_before_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """While something is looked up for it; the same one can be opened then, as after an opening that failed."""
    permissions = {"allow_network_access": True, "allowed_hosts": ["localhost:1"]}
    resolve, looks = network.resolve, threading.Event()

    def slowly(access: Any) -> Any:
        looks.set()
        time.sleep(0.3)
        return resolve(access)

    async def main() -> None:
        sandbox = harness.open_sandbox(IsolationLevel.STRICT, permissions=permissions)
        with monkeypatch.context() as patch:
            patch.setattr(network, "resolve", slowly)
            opening = asyncio.create_task(sandbox.__aenter__())
            await harness.wait_for(looks.is_set)
            assert await sandbox.cleanup_sandbox()
            with pytest.raises(ResourceError, match="was closed"):
                await opening
        async with sandbox:
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1

    asyncio.run(main())


def test_a_mistake_of_the_recorders_is_told_to_the_caller(level: IsolationLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("of the recorder")

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            with monkeypatch.context() as patch:
                patch.setattr(Recorder, "begin", fail)
                with pytest.raises(SandboxInitializationError, match="of the recorder"):
                    await sandbox.execute_plugin_safe(plugins.give_back, 1)
            assert await sandbox.execute_plugin_safe(plugins.give_back, 1) == 1

    asyncio.run(main())


def test_a_close_that_is_cancelled_is_told_all_the_same(level: IsolationLevel) -> None:
    async def one(handler: Handler, done: asyncio.Event) -> None:
        async with harness.open_sandbox(level, monitoring_handler=handler) as sandbox:
            await sandbox.execute_plugin_safe(plugins.awaited, 7)
            done.set()

    async def main() -> None:
        for _ in range(5):
            handler, done = Handler(), asyncio.Event()
            task = asyncio.create_task(one(handler, done))
            await done.wait()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await harness.wait_for(lambda: handler.seen)  # noqa: B023

    asyncio.run(main())


class Handler:
    def __init__(self) -> None:
        self.seen: list[object] = []
        self.threads: set[int] = set()

    def on_violation_detected(self, violation: SandboxViolation) -> None:
        self.seen.append(violation)
        self.threads.add(threading.get_ident())

    def on_sandbox_cleanup(self, telemetry: SandboxTelemetry) -> None:
        self.seen.append(telemetry)
        self.threads.add(threading.get_ident())


def test_telemetry(level: IsolationLevel) -> None:
    async def main() -> None:
        begin = datetime.datetime.now(datetime.UTC)
        sandbox = harness.open_sandbox(level, sandbox_id="measured")
        early = sandbox.get_telemetry()
        assert (early.sandbox_id, early.plugin_id, early.end_time, early.exit_code) == ("measured", "", None, None)
        async with sandbox:
            await sandbox.execute_plugin_safe(plugins.give_back, 1)
            telemetry = sandbox.get_telemetry()
            assert telemetry.plugin_id == "give_back"
            assert telemetry.end_time is not None
            assert begin <= telemetry.start_time <= telemetry.end_time <= datetime.datetime.now(datetime.UTC)
            assert 1 < telemetry.peak_memory_mb < 128
            assert (telemetry.exit_code, telemetry.exit_reason) == (0, "returned")
            assert not telemetry.cleanup_successful
            with pytest.raises(PluginExecutionError):
                await sandbox.execute_plugin_safe(plugins.fail, "no way")
            later = sandbox.get_telemetry()
            assert later.end_time is not None
            assert later.end_time > telemetry.start_time
            assert "ValueError" in later.exit_reason
            assert later.plugin_id == "fail"
        assert sandbox.get_telemetry().cleanup_successful
        assert sandbox.get_telemetry().violations == []

    asyncio.run(main())


def test_a_violation_is_recorded(level: IsolationLevel) -> None:
    async def main() -> None:
        handler = Handler()
        config = {"enable_real_time_monitoring": False}  # on a slow machine there could be warnings as well
        async with harness.open_sandbox(level, config=config, monitoring_handler=handler) as sandbox:
            assert await sandbox.execute_plugin_safe(plugins.connect_out) == "PermissionError"
            (violation,) = sandbox.get_violations()
            assert violation.type is SandboxViolationType.NETWORK_VIOLATION
            if harness.ROOT or level is not IsolationLevel.MINIMAL:
                assert violation.message.startswith("connect() of 192.0.2.1:9 was refused")
                assert (violation.details["address"], violation.details["port"]) == ("192.0.2.1", 9)
            else:  # nobody can read the address there, so there is no socket either
                assert violation.message.startswith("socket() of AF_INET SOCK_STREAM was refused")
            assert sandbox.get_telemetry().violations == [violation]
            assert handler.seen == [violation]
        assert handler.seen == [violation, sandbox.get_telemetry()]
        assert handler.threads == {threading.get_ident()}

    asyncio.run(main())


def reply_and_sleep() -> None:
    import contextlib
    import socket
    import time

    from sandbox.engine import codec

    for fd in range(3, 100):
        with contextlib.suppress(OSError):
            socket.socket(fileno=fd).send(b"V" + codec.encode(1))
            break
    time.sleep(0.2)


def test_a_loop_that_ends_before_the_call_has_gone_loses_no_row(level: IsolationLevel) -> None:
    async def open_and_call() -> EnhancedPluginSandbox:
        sandbox = await harness.open_sandbox(level).__aenter__()
        assert await sandbox.execute_plugin_safe(reply_and_sleep) == 1
        return sandbox

    sandbox = asyncio.run(open_and_call())

    def has_row() -> bool:
        with Store(private.default_folder()) as store:
            store.collect()
            return sandbox.sandbox_id in [run.sandbox_id for run in store.runs(limit=1000)]

    assert harness.wait_until(has_row)
    assert sandbox.get_telemetry().exit_code == 0
    asyncio.run(sandbox.cleanup_sandbox())


def test_a_handler_that_raises_loses_no_row(level: IsolationLevel) -> None:
    class Broken:
        def on_violation_detected(self, violation: SandboxViolation) -> None:
            raise ValueError("of the handler")

    async def main() -> str:
        async with harness.open_sandbox(level, monitoring_handler=Broken()) as sandbox:
            with pytest.raises(ValueError, match="of the handler"):
                await sandbox.execute_plugin_safe(plugins.connect_out)
            return sandbox.sandbox_id

    identity = asyncio.run(main())
    with Store(private.default_folder()) as store:
        store.collect()
        assert [run.sandbox_id for run in store.runs(limit=1000)].count(identity) == 1


NAMESPACES = ("user", "mnt", "pid", "ipc", "uts", "cgroup", "net")


def test_protections(level: IsolationLevel) -> None:
    """What the report says is what the plugin finds."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            protections = {protection.name: protection for protection in sandbox.protections}
            seen = await sandbox.execute_plugin_safe(plugins.identity)
        assert {protection.state for protection in protections.values()} <= {"enforced", "substituted", "missing"}
        for name in ("own process", "no_new_privs", "no capabilities", "wall clock", "open files", "output", "result"):
            assert protections[name].state == "enforced", name
        assert any(name.startswith("seccomp ") for name in protections)
        own = {name for name in NAMESPACES if seen["namespaces"][name] != os.readlink(f"/proc/self/ns/{name}")}
        expected: set[str] = set()
        if level is not IsolationLevel.MINIMAL:
            expected = {"user", "mnt", "pid", "ipc", "uts", "cgroup"}
            assert protections["private /tmp, /var/tmp, /dev/shm, minimal /dev"].state == "enforced"
            assert (seen["uid"], seen["pid"]) == (1000, 2)
        if level in (IsolationLevel.STRICT, IsolationLevel.MAXIMUM):
            expected |= {"net"}
        if level is IsolationLevel.MINIMAL and harness.ROOT:
            own -= {"mnt"}  # for the reach of the interpreter
        assert own == expected
        names = {"user": "user", "mnt": "mount", "pid": "PID", "ipc": "IPC", "uts": "UTS", "cgroup": "cgroup", "net": "network"}
        for name in expected:
            assert protections[f"{names[name]} namespace"].state == "enforced"
        for protection in protections.values():
            assert set(protection.to_dict()) >= {"name", "state", "mechanism", "detail"}
            if protection.state != "enforced":
                assert protection.detail, protection.name

    asyncio.run(main())


BASIC = """
async def basic_example():
    config = IsolationConfig(level=IsolationLevel.STANDARD)
    limits = PluginLimitsV2(max_memory_mb=128)
    permissions = PluginPermissionsV2()
    
    sandbox = EnhancedPluginSandbox(limits, permissions, config)
    
    async with sandbox:
        result = await sandbox.execute_plugin_safe(my_plugin_function)
        telemetry = sandbox.get_telemetry()
"""  # noqa: W293  (as written in the reference)

ADVANCED = """
async def monitoring_example():
    config = IsolationConfig(
        level=IsolationLevel.STRICT,
        enable_real_time_monitoring=True,
        resource_check_interval_seconds=0.5,
        violation_threshold=2
    )
    
    sandbox = EnhancedPluginSandbox(limits, permissions, config)
    
    async with sandbox:
        result = await sandbox.execute_plugin_safe(my_plugin)
        violations = sandbox.get_violations()
        
        if violations:
            print(f"Detected {len(violations)} violations")
"""  # noqa: W293

RECOVERY = """
async def recovery_example():
    recovery_manager = SandboxRecoveryManager()
    
    # Handle violations
    for violation in violations:
        success = await recovery_manager.auto_recovery_violation(violation)
        if not success:
            recovery_manager.quarantine_plugin(plugin_id, "Auto-recovery failed")
"""  # noqa: W293


def example(text: str, **given: object) -> Any:
    """The one function of an example of the API reference, with the names that it leaves open."""
    names: dict[str, Any] = dict(given)
    exec("from plugin_sandbox_isolation_enhanced import *", names)
    before = set(names)
    exec(text, names)
    (name,) = set(names) - before
    return names[name]


def executed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The values that sandboxes have returned: the examples keep theirs to themselves."""
    values: list[Any] = []
    original = EnhancedPluginSandbox.execute_plugin_safe

    async def execute(self: EnhancedPluginSandbox, function: Any, *args: Any, **kwargs: Any) -> Any:
        values.append(await original(self, function, *args, **kwargs))
        return values[-1]

    monkeypatch.setattr(EnhancedPluginSandbox, "execute_plugin_safe", execute)
    return values


def test_basic_example_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = executed(monkeypatch)
    asyncio.run(example(BASIC, my_plugin_function=plugins.my_plugin_function)())
    assert values == [42]


def test_advanced_example_of_the_reference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    values = executed(monkeypatch)
    given = {"limits": PluginLimitsV2(), "permissions": PluginPermissionsV2()}
    asyncio.run(example(ADVANCED, my_plugin=plugins.my_plugin, **given)())
    assert values == ["done"]
    asyncio.run(example(ADVANCED, my_plugin=plugins.connect_out, **given)())
    assert capsys.readouterr().out == "Detected 1 violations\n"


def test_recovery_example_of_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """The sandbox is closed by then, so nothing is left to recover: it ends in quarantine."""
    values = executed(monkeypatch)
    monkeypatch.setattr(private, "default_folder", lambda: str(tmp_path / "state"))

    async def main() -> list[SandboxViolation]:
        async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig()) as sandbox:
            await sandbox.execute_plugin_safe(plugins.connect_out)
        return sandbox.get_violations()

    violations = asyncio.run(main())
    asyncio.run(example(RECOVERY, violations=violations, plugin_id="p")())
    with Store() as store:
        (found,) = store.quarantined()
    assert (found.plugin_id, found.reason, len(values)) == ("p", "Auto-recovery failed", 1)
    assert found.violations[0]["type"] == "network_violation"


def test_positional_construction() -> None:
    async def main() -> None:
        async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), IsolationConfig(), "named") as sandbox:
            assert sandbox.sandbox_id == "named"

    asyncio.run(main())


def import_what_is_blocked() -> int:
    refused = 0
    for _ in range(3):
        try:
            import statistics  # noqa: F401
        except ImportError:
            refused += 1
    try:
        from http.client import HTTPConnection  # noqa: F401
    except ImportError:
        refused += 1
    import json

    return refused if json.loads("1") else 0


def test_a_name_that_is_computed_is_an_import_as_well(level: IsolationLevel) -> None:
    def compute(name: str) -> str:
        import importlib

        return importlib.import_module(name).__name__

    async def main() -> list[SandboxViolation]:
        async with harness.open_sandbox(level, permissions={"blocked_modules": ["wave", "os"]}) as sandbox:
            for name in ("wave", "os"):  # one that is loaded already
                with pytest.raises(PluginExecutionError, match="blocked_modules"):
                    await sandbox.execute_plugin_safe(compute, name)
            assert await sandbox.execute_plugin_safe(compute, "json.decoder") == "json.decoder"
            return sandbox.get_violations()

    violations = asyncio.run(main())
    assert [violation.details["module"] for violation in violations] == ["wave", "os"]
    assert {violation.details["file"] for violation in violations} == {__file__}


def test_a_refused_import_is_a_violation(level: IsolationLevel) -> None:
    async def main() -> list[SandboxViolation]:
        permissions = {"blocked_modules": ["statistics", "http"]}
        async with harness.open_sandbox(level, permissions=permissions) as sandbox:
            assert await sandbox.execute_plugin_safe(import_what_is_blocked) == 4
            return sandbox.get_violations()

    first, second = asyncio.run(main())
    assert (first.type, first.details["module"], first.details["count"]) == (
        SandboxViolationType.PERMISSION_DENIED,
        "statistics",
        3,
    )
    assert second.details["module"] == "http.client"
    assert first.details["source"] == "interpreter"
    line = import_what_is_blocked.__code__.co_firstlineno + 4
    assert (first.details["file"], first.details["line"]) == (__file__, line)
    assert "PluginPermissionsV2.blocked_modules" in first.message


def test_a_large_value_without_a_descriptor_for_it(level: IsolationLevel) -> None:
    """The caller has none left when its worker asks for memory; the sandbox serves the next call."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            assert await sandbox.execute_plugin_safe(bytes, 1) == b"\0"
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            task = asyncio.create_task(sandbox.execute_plugin_safe(plugins.large_after_a_while, 1 << 20))
            await harness.wait_for(lambda: "ready" in {entry.path for entry in sandbox.list_files()})
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
            try:
                with pytest.raises(ResourceError, match="raise the limit of open files"):
                    await task
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert len(await sandbox.execute_plugin_safe(bytes, 1 << 20)) == 1 << 20

    asyncio.run(main())


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_caller_whose_loop_is_busy_gets_its_value(level: IsolationLevel, size: int) -> None:
    """The worker does not wait for it: also where its value needs memory of the host's, its time is not used up by that."""
    seconds = 0.5 * harness.PATIENCE

    async def main() -> None:
        async with harness.open_sandbox(level, limits={"max_execution_time_seconds": seconds}) as sandbox:
            task = asyncio.create_task(sandbox.execute_plugin_safe(bytes, size))
            await asyncio.sleep(0)
            time.sleep(2 * seconds)
            assert await task == bytes(size)
            async with sandbox.session() as session:
                request = asyncio.create_task(session.call(bytes, size))
                await asyncio.sleep(0)
                time.sleep(2 * seconds)
                assert await request == bytes(size)
                assert await session.call(bytes, 2) == bytes(2)

    asyncio.run(main())


def test_a_loop_that_watches_no_descriptors() -> None:
    """asyncio.AbstractEventLoop leaves it to a loop whether it can."""

    class Loop(asyncio.SelectorEventLoop):
        def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
            raise NotImplementedError

    async def main() -> None:
        async with harness.open_sandbox(IsolationLevel.STANDARD) as sandbox:
            for number in range(2):
                assert await sandbox.execute_plugin_safe(plugins.give_back, number) == number
            async with sandbox.session() as session:
                assert await session.call(plugins.give_back, 2) == 2

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main())


def test_a_worker_that_goes_while_its_caller_is_busy(level: IsolationLevel) -> None:
    """Its value is there still, and its socket is closed once it has been."""

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox:
            for number in range(3):
                task = asyncio.create_task(sandbox.execute_plugin_safe(plugins.give_back, number))
                await asyncio.sleep(0)
                time.sleep(0.2)
                assert await task == number
                await asyncio.sleep(0)

    asyncio.run(main())


def test_what_is_printed_comes_before_the_value(level: IsolationLevel, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the caller is quicker than the thread that reads it."""

    def speaks(number: int) -> int:
        print("number", number, flush=True)
        return number

    def speaks_and_fails(number: int) -> None:
        print("number", number)
        raise ValueError("at last")

    async def main() -> None:
        async with harness.open_sandbox(level) as sandbox, sandbox.session() as session:
            for number in range(5):
                assert await sandbox.execute_plugin_safe(speaks, number) == number
                assert capsys.readouterr().out == f"number {number}\n"
                assert await session.call(speaks, number) == number
                assert capsys.readouterr().out == f"number {number}\n"
                with pytest.raises(PluginExecutionError, match="at last"):
                    await session.call(speaks_and_fails, number)
                assert capsys.readouterr().out == f"number {number}\n"

    asyncio.run(main())
