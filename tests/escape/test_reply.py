"""The reply path: what a plugin returns or raises, and what it writes where the reply goes, is at worst an error of its own.

Nothing of it may run on the host, hang it, fill it, or be taken for a sandbox's end. Bytes that no worker of psie's would
send are in test_host.py and, for the codec alone, in tests/test_codec.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from escape import kit
from sandbox.config import IsolationLevel
from sandbox.engine import channel
from sandbox.errors import PluginExecutionError, ResourceLimitExceededError, SandboxException
from sandbox.selftest import trial
from sandbox.selftest.attacks import ALL, MINIMAL, NAMESPACED, PATIENCE, ROOT, STRICT, place, socket_to_the_caller

LIMIT = 0.5 * PATIENCE  # seconds that the plugin has
BOUND = 4.0 * PATIENCE  # in which the host has answered
# The host's side is the same for all levels, and without root.
HOST_SIDE = [MINIMAL, STRICT] if ROOT else [STRICT]


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def answered(function: Callable[..., Any], *arguments: Any, level: IsolationLevel, **further: Any) -> trial.Outcome:
    """How the call ended; the host was neither held up nor filled, and serves the next one."""
    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")
    limits = {"max_execution_time_seconds": LIMIT, "max_result_mb": 2.0, **further.pop("limits", {})}
    memory, before = resident_mb(), time.monotonic()
    outcome = trial.run_inside(function, *arguments, level=level, limits=limits, **further)
    assert time.monotonic() - before < BOUND
    assert resident_mb() - memory < 100
    kit.still_works(level)
    return outcome


# -- values ----------------------------------------------------------------------------------------------------------------


def value_in_itself() -> object:
    value: list[object] = []
    value.append({"again": value})
    return value


def value_too_deep() -> object:
    value: object = ()
    for _ in range(100_000):
        value = (value,)
    return value


def value_too_wide() -> object:
    return [[]] * 10_000_000


def shared_value_that_doubles() -> object:
    """Small in memory, 2**40 entries when it is written out."""
    value: list[object] = [1]
    for _ in range(40):
        value = [value, value]
    return value


def class_that_lies() -> object:
    """Says that it is a dict, and would have its methods called."""

    class Liar:
        @property  # type: ignore[misc]
        def __class__(self) -> type:
            return dict

        def __len__(self) -> int:
            return 1 << 60

        def items(self) -> object:
            while True:
                pass

    return Liar()


def subclass_of_a_dict() -> object:
    """Its methods would run wherever it is walked."""

    class Hostile(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise SystemExit(9)

        def __iter__(self) -> Any:
            raise SystemExit(9)

    return Hostile(a=1)


def function_as_a_value() -> object:
    return open


def pickle_as_a_value() -> object:
    """Is data, and comes back as data: nobody loads it."""
    return b"cos\nsystem\n(S'touch /tmp/psie-escape-pickle'\ntR."


UNFIT = (value_in_itself, value_too_deep, value_too_wide, shared_value_that_doubles, class_that_lies, function_as_a_value)


@pytest.mark.parametrize("function", UNFIT)
@pytest.mark.parametrize("level", HOST_SIDE)
def test_a_value_that_is_no_data_is_an_error(function: Callable[[], object], level: IsolationLevel) -> None:
    limits = {"max_memory_mb": 512.0}
    outcome = answered(function, level=level, limits=limits)
    assert isinstance(outcome.error, (PluginExecutionError, ResourceLimitExceededError)), outcome


@pytest.mark.parametrize("level", ALL)
def test_a_subclass_comes_as_data_or_not_at_all(level: IsolationLevel) -> None:
    outcome = answered(subclass_of_a_dict, level=level)
    assert isinstance(outcome.error, PluginExecutionError) or type(outcome.value) is dict


@pytest.mark.parametrize("level", ALL)
def test_a_pickle_is_bytes(level: IsolationLevel) -> None:
    outcome = answered(pickle_as_a_value, level=level)
    assert outcome.value == pickle_as_a_value()
    assert not os.path.exists("/tmp/psie-escape-pickle")


@pytest.mark.parametrize("level", ALL)
def test_keys_that_are_not_equal_to_themselves(level: IsolationLevel) -> None:
    """NaN keys stay apart, or are refused; a lone surrogate comes back as it is, or is refused."""

    def keys() -> object:
        return {float("nan"): 1, float("nan"): 2, "\ud800": "\udfff"}

    outcome = answered(keys, level=level)
    if outcome.error is None:
        assert len(outcome.value) == 3
        assert outcome.value["\ud800"] == "\udfff"
    else:
        assert isinstance(outcome.error, PluginExecutionError)


@pytest.mark.parametrize("level", HOST_SIDE)
def test_a_flood_of_equal_hashes_does_not_hold_the_host_up(level: IsolationLevel) -> None:
    """The plugin may take its time to put such a dict together; the host would have to do it once more."""

    def flood() -> object:
        return {number * ((1 << 61) - 1): 1 for number in range(6000)}

    outcome = answered(flood, level=level)
    assert isinstance(outcome.error, (PluginExecutionError, ResourceLimitExceededError)), outcome


def array_of_dimensions(count: int) -> bytes:
    """The message of an array that has nothing but dimensions, the last of them 0. Their product takes a time that is the
    square of their number: seconds for 80,000."""
    from struct import pack

    counts = pack(f"={count + 3}I", 3, count, *(0xFFFFFFFF,) * (count - 1), 0, 0)
    return b"psi1" + pack("=6I", 1, len(counts), 0, 0, 3, 0) + b"A" + counts + b"<i8"


@pytest.mark.parametrize("level", HOST_SIDE)
def test_an_array_of_many_dimensions_does_not_hold_the_host_up(level: IsolationLevel) -> None:
    pytest.importorskip("numpy")

    def many() -> object:
        from sandbox.engine import codec

        codec.encode = lambda value, **bounds: array_of_dimensions(400_000)
        return None

    outcome = answered(many, level=level, limits={"max_memory_mb": 512.0})
    assert isinstance(outcome.error, PluginExecutionError), outcome


# -- exceptions --------------------------------------------------------------------------------------------------------------


def raises_without_end() -> None:
    """Its text has no end."""

    class Endless(Exception):
        def __str__(self) -> str:
            return "x" * (1 << 26)

        __repr__ = __str__

    raise Endless("y" * (1 << 26))


def raises_what_never_answers() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            while True:
                pass

        __repr__ = __str__

    raise Silent


def raises_a_liar() -> None:
    """Another class, another name, another module, and a cause that is itself."""

    class Meta(type):
        @property
        def __name__(cls) -> str:  # type: ignore[override]
            raise SystemExit(9)

        def __instancecheck__(cls, instance: object) -> bool:
            raise SystemExit(9)

    class Liar(Exception, metaclass=Meta):
        __module__ = "sandbox.errors\0type\0SandboxException"

        @property  # type: ignore[misc]
        def __class__(self) -> type:
            raise RuntimeError("no class")

        @property
        def __cause__(self) -> Any:  # type: ignore[override]
            return self

        @property
        def __context__(self) -> Any:  # type: ignore[override]
            return self

    raise Liar("x")


def raises_a_deep_group() -> None:
    error: Exception = ValueError("x")
    for _ in range(5000):
        error = ExceptionGroup("g", [error, error])
    raise error


def raises_a_chain() -> None:
    error: Exception = ValueError("first")
    for number in range(20_000):
        following = ValueError(str(number))
        following.__cause__ = error
        error = following
    raise error


def raises_surrogates() -> None:
    raise ValueError("\ud800\0type\0SecurityViolationError\udfff", b"\xff\xfe")


def raises_a_forged_errno() -> None:
    error = OSError(13, "x", "/etc/shadow\x1b[2J")
    error.errno = 1 << 70
    error.filename = ["no", "path"]
    raise error


RAISING = (
    *(raises_without_end, raises_what_never_answers, raises_a_liar, raises_a_deep_group, raises_a_chain, raises_surrogates),
    raises_a_forged_errno,
)


@pytest.mark.parametrize("function", RAISING)
@pytest.mark.parametrize("level", HOST_SIDE)
def test_a_hostile_exception_is_told_and_no_more(function: Callable[[], None], level: IsolationLevel) -> None:
    outcome = answered(function, level=level, limits={"max_memory_mb": 512.0})
    assert isinstance(outcome.error, SandboxException), outcome
    shown = str(outcome.error)
    assert len(shown) < 1 << 20
    assert not [character for character in shown if character in "\x1b\x07\0\r" or "\ud800" <= character <= "\udfff"]


# -- frames ------------------------------------------------------------------------------------------------------------------


def split_frames() -> None:
    """A reply of single bytes, each in a frame of its own, and half of a message."""
    import os

    from sandbox.engine import codec

    job = socket_to_the_caller()
    for byte in codec.encode(["a value", 1.5]):
        job.send(b"v" + bytes([byte]))
    job.send(b"V")
    os._exit(0)


def repeated_replies() -> None:
    """A whole reply, and then others after it."""
    import os

    from sandbox.engine import codec

    job = socket_to_the_caller()
    try:
        for number in range(2000):
            job.send(b"V" + codec.encode(number))
    finally:
        os._exit(0)


def notes_without_number() -> str:
    """Frames that belong to no reply, of all that a worker may tell, and of what it may not."""
    job = socket_to_the_caller()
    for text in (
        b"refused\0path\0/x\0operation\0open\0errno\x00999999",
        b"asked\0name\0" + b"x" * 60000,
        b"ended\0status\x000",
        b"",
    ):
        for _ in range(300):
            job.send(b"N" + text)
    job.detach()
    return "sent"


def half_closed() -> str:
    import socket

    job = socket_to_the_caller()
    job.shutdown(socket.SHUT_WR)
    job.detach()
    return "never arrives"


def stands_still_in_a_reply() -> None:
    """A reply that has begun, and does not go on."""
    import time

    socket_to_the_caller().send(b"v" + b"psi1")
    time.sleep(60)


def asks_for_memory_again_and_again() -> None:
    import os

    from sandbox.engine import channel

    job = socket_to_the_caller()
    for _ in range(3000):
        job.send(b"S" + channel.SIZE.pack(1 << 20))
    os._exit(0)


def asks_for_memory_in_nonsense() -> None:
    import os

    job = socket_to_the_caller()
    for data in (b"", b"\xff" * 7, b"\0" * 8, b"\xff" * 9, b"\xff" * 8):
        job.send(b"S" + data)
        job.send(b"s" + data)
    os._exit(0)


def memory_without_a_value() -> None:
    """It is there, and its last frame says nonsense."""
    import os

    from sandbox.engine import channel

    job = socket_to_the_caller()
    job.send(b"S" + channel.SIZE.pack(1 << 20))
    job.send(b"V\xff")
    os._exit(0)


FRAMES = (
    *(split_frames, repeated_replies, notes_without_number, half_closed, stands_still_in_a_reply),
    *(asks_for_memory_again_and_again, asks_for_memory_in_nonsense, memory_without_a_value),
)


@pytest.mark.parametrize("function", FRAMES)
@pytest.mark.parametrize("level", HOST_SIDE)
def test_frames_that_no_worker_sends(function: Callable[[], None], level: IsolationLevel) -> None:
    outcome = answered(function, level=level)
    if outcome.error is None:
        assert outcome.value in (["a value", 1.5], 0, "sent")
    else:
        assert isinstance(outcome.error, SandboxException)


def a_flood_of_notes() -> None:
    """As many as can be told of, each another, and never a reply."""
    import os

    job = socket_to_the_caller()
    try:
        for number in range(3000):
            job.send(b"N" + b"asked\0host\0h%d\0port\x0080\0count\x001" % number)
    finally:
        os._exit(0)


@pytest.mark.parametrize("level", HOST_SIDE)
def test_many_refusals_and_an_exception_of_many_names(level: IsolationLevel) -> None:
    """Which refused file an exception is about, its message tells: the host compares it with all of them."""

    def both() -> None:
        with socket_to_the_caller() as job:
            file = {"operation": "open", "errno": "13", "count": "1", "file": "f", "line": "1"}
            for number in range(1000):
                job.send(b"N" + channel.pack("refused", {**file, "path": f"/{number}"}))
            told = {"type": "E", "message": "''" * 4000, "traceback": "", "errno": "13", "file": "f", "line": "1", "done": ""}
            job.send(b"E" + channel.pack("failure", told))
        os._exit(1)

    outcome = answered(both, level=level)
    assert isinstance(outcome.error, PluginExecutionError), outcome
    assert outcome.error.exception_message.startswith("''")


@pytest.mark.parametrize("function", [split_frames, repeated_replies, asks_for_memory_again_and_again, a_flood_of_notes])
@pytest.mark.parametrize("level", HOST_SIDE)
def test_a_flood_does_not_come_to_the_callers_loop(
    function: Callable[[], None], level: IsolationLevel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame is read there; all others by the engine's thread."""
    read: list[int] = []
    receive = channel.receive_frame

    def counted(sock: Any) -> bytes:
        frame = receive(sock)  # raises where there is none
        read.append(threading.get_ident())
        return frame

    monkeypatch.setattr(channel, "receive_frame", counted)
    answered(function, level=level)
    in_loop = read.count(threading.get_ident())
    assert in_loop <= 2  # that call's, and one of the next call
    assert len(read) - in_loop > 20 or function is repeated_replies  # of those one is a value, which is all that is wanted


# -- large values, in memory that the host has given ---------------------------------------------------------------------------

VALUE = bytes(range(256)) * 400


def memory_for(size: int) -> tuple[Any, int]:
    """In a plugin: the socket to the caller, and the memory file that it gives for a value of so many bytes."""
    import socket

    from sandbox.engine import channel

    job = socket_to_the_caller()
    job.send(b"S" + channel.SIZE.pack(size))
    _, memory, _, _ = socket.recv_fds(job, 65536, 1)
    return job, memory[0]


def changes_it_afterwards() -> None:
    """Says that the value is complete, and goes on writing to it."""
    import contextlib
    import mmap
    import os

    import numpy

    from sandbox.engine import codec

    data = codec.encode(numpy.zeros(1 << 17, "u1"))
    job, memory = memory_for(len(data))
    with mmap.mmap(memory, len(data)) as mapped:
        mapped[:] = data
    job.send(b"V\0")
    number = 0
    while True:
        number = (number + 1) % 256
        with contextlib.suppress(OSError):
            os.pwrite(memory, bytes([number]) * 1000, 1000)
        with contextlib.suppress(OSError):
            os.ftruncate(memory, 0)


def keeps_it_mapped() -> None:
    import mmap

    from sandbox.engine import codec

    data = codec.encode(VALUE)
    job, memory = memory_for(len(data))
    mapped = mmap.mmap(memory, len(data))
    mapped[:] = data
    job.send(b"V\0")
    while True:
        mapped[100:107] = b"changed"


def runs_it() -> str:
    import os

    _, memory = memory_for(1 << 17)
    os.pwrite(memory, b"#!/proc/self/exe", 0)
    os.execve(f"/proc/self/fd/{memory}", ["x"], {})


def test_memory_that_nobody_seals_changes() -> None:
    """What the next two attacks try works on a file of the same kind, but for the seals."""
    memory = os.memfd_create("x")
    try:
        os.write(memory, VALUE)
        with mmap.mmap(memory, len(VALUE), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as seen:
            os.pwrite(memory, b"changed", 100)
            assert seen[100:107] == b"changed"
    finally:
        os.close(memory)


@pytest.mark.parametrize("level", ALL)
def test_a_value_does_not_change_once_it_is_there(level: IsolationLevel) -> None:
    """An array lies in the memory in which it came, and whoever wrote that is still alive. Where the kernel saw it written to
    at each look, memory is not sealed (fcntl(2), EBUSY), and that is no value: another attempt."""
    pytest.importorskip("numpy")
    for _ in range(10):
        outcome = answered(changes_it_afterwards, level=level, limits={"max_memory_mb": 512.0})
        if outcome.error is None:
            break
        assert isinstance(outcome.error, SandboxException)
    value = outcome.value
    before = value.copy()
    time.sleep(0.2)
    assert (value == before).all()


@pytest.mark.parametrize("level", ALL)
def test_a_value_that_could_change_is_none(level: IsolationLevel) -> None:
    assert isinstance(answered(keeps_it_mapped, level=level).error, SandboxException)


@pytest.mark.parametrize("level", ALL if ROOT else NAMESPACED)  # else none may be started at all
def test_memory_for_a_value_is_no_program(level: IsolationLevel) -> None:
    permissions, limits = {"allow_subprocess_execution": True}, {"max_subprocess_count": 3}
    error = answered(runs_it, level=level, permissions=permissions, limits=limits).error
    assert isinstance(error, SandboxException)
    assert "PermissionError" in str(error) or "refused" in str(error), error


# -- after the reply -----------------------------------------------------------------------------------------------------------


def replies_and_goes_on(forks: bool) -> None:
    """With a process, where it may have one, and a thread of its own."""
    import contextlib
    import os
    import threading

    from sandbox.engine import codec

    def work() -> None:
        number = 0
        while True:
            number += 1
            with open("count", "w") as file:
                file.write(str(number))

    if forks and os.fork() == 0:
        work()
    threading.Thread(target=work).start()
    with contextlib.suppress(OSError):
        socket_to_the_caller().send(b"V" + codec.encode(7))
    work()


@pytest.mark.parametrize("level", ALL)
@pytest.mark.long
def test_what_goes_on_after_the_reply_is_ended_before_anybody_looks(level: IsolationLevel) -> None:
    """The value comes at once; whoever looks at files, calls again or closes the sandbox finds nothing of the call alive."""

    async def go() -> None:
        may_fork = ROOT or level is not MINIMAL
        permissions = {"allow_subprocess_execution": may_fork}
        async with trial.open_sandbox(level, {"max_subprocess_count": 3 * may_fork}, permissions) as one:
            for _ in range(2):
                assert await one.execute_plugin_safe(replies_and_goes_on, may_fork) == 7
                before = one.read_file("count")
                await asyncio.sleep(0.1)
                assert one.read_file("count") == before
                assert await one.execute_plugin_safe(replies_and_goes_on, may_fork) == 7
                begun = time.monotonic()
                assert await one.execute_plugin_safe(count_that_stands) == "it stands"
                assert time.monotonic() - begun < BOUND

    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")
    begun = time.monotonic()
    asyncio.run(go())
    assert time.monotonic() - begun < 2 * BOUND


def count_that_stands() -> str:
    import time

    def content() -> str:
        with open("count") as file:
            return file.read()

    before = content()
    time.sleep(0.1)
    return "it stands" if content() == before else "it goes on"


def replies_and_writes(folder: str) -> None:
    """Its value is there before it has done most of what it does."""
    from sandbox.engine import codec

    socket_to_the_caller().send(b"V" + codec.encode(7))
    number = 0
    while True:
        number += 1
        with open(f"{folder}/count{number % 50}", "w") as file:
            file.write(str(number))


@pytest.mark.parametrize("level", ALL)
def test_file_operations_count_after_the_reply(level: IsolationLevel) -> None:
    async def go() -> None:
        async with trial.open_sandbox(level, {"max_file_operations": 100}) as one:
            assert await one.execute_plugin_safe(replies_and_writes, ".") == 7
            limits = [violation.details.get("limit") for violation in one.get_violations()]
            assert limits == ["file_operations"]
            assert one.get_telemetry().file_operations_count > 100

    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")
    trial.bounded(go())


@pytest.mark.parametrize("level", ALL)
def test_what_can_be_seen_unasked_changes_no_more_when_the_value_is_there(level: IsolationLevel) -> None:
    """Granted folders of the host, and the workspace for who has its path from before."""

    async def go(folder: Path) -> None:
        limits = {"max_execution_time_seconds": LIMIT}
        for granted in ([], [str(folder)]):
            async with trial.open_sandbox(level, limits, {"allowed_directories": granted}) as one:
                where = folder if granted else one.temp_directory
                with contextlib.suppress(SandboxException):
                    assert await one.execute_plugin_safe(replies_and_writes, granted[0] if granted else ".") == 7
                before = [path.read_bytes() for path in sorted(where.iterdir())]
                assert before or level is not MINIMAL
                await asyncio.sleep(0.1)
                assert [path.read_bytes() for path in sorted(where.iterdir())] == before

    if kit.why_closed(level):
        pytest.skip(f"level {level.value} cannot be opened: {kit.why_closed(level)}")
    with tempfile.TemporaryDirectory(dir=place()) as name:
        os.chmod(name, 0o777)
        trial.bounded(go(Path(name)))


@pytest.mark.parametrize("level", ALL if ROOT else NAMESPACED)
def test_a_second_process_at_the_reply(level: IsolationLevel) -> None:
    """A child writes frames of its own between those of the worker: one reply comes of it, or an error, and never a third."""

    def both() -> object:
        import os

        from sandbox.engine import codec

        if os.fork() == 0:
            job = socket_to_the_caller()
            try:
                while True:
                    job.send(b"V" + codec.encode("of the child"))
            finally:
                os._exit(0)
        return ["of the worker"] * 50_000

    permissions, limits = {"allow_subprocess_execution": True}, {"max_subprocess_count": 3}
    outcome = answered(both, level=level, permissions=permissions, limits=limits)
    if outcome.error is None:
        assert outcome.value in ("of the child", ["of the worker"] * 50_000)
    else:
        assert isinstance(outcome.error, SandboxException)
