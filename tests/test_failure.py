"""Exceptions as text: what a plugin's exception looks like outside, whatever it does."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.engine import channel, codec, failure


class StrangeStr(str):
    """A str that is none."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: object) -> str:
        return "never"


def raised(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def divide() -> float:
    return 1 / int("0")


def chained() -> None:
    try:
        divide()
    except ZeroDivisionError as error:
        raise KeyError("k") from error


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Verbose(Exception):
    def __str__(self) -> str:
        return StrangeStr("x" * 1_000_000)


def test_an_error_as_text() -> None:
    record = failure.decode(failure.encode(raised(divide)))
    assert (record.type, record.message, record.errno) == ("ZeroDivisionError", "division by zero", 0)
    assert "in divide" in record.traceback
    assert 'return 1 / int("0")' in record.traceback


def test_the_cause_is_part_of_the_traceback() -> None:
    record = failure.decode(failure.encode(raised(chained)))
    assert record.type == "KeyError"
    assert record.traceback.index("ZeroDivisionError") < record.traceback.index("direct cause") < record.traceback.index("'k'")


def test_frames_of_the_engine_are_hidden() -> None:
    def fail_inside() -> None:
        codec.decode(b"", max_bytes=10)

    record = failure.decode(failure.encode(raised(fail_inside)))
    assert record.type == "sandbox.engine.codec.CodecError"
    assert "in fail_inside" in record.traceback
    assert "codec.py" not in record.traceback.replace("test_codec.py", "")


def test_errno() -> None:
    record = failure.decode(failure.encode(raised(lambda: Path("/nowhere/at/all").read_text())))
    assert (record.type, record.errno) == ("FileNotFoundError", 2)


def test_errors_that_misbehave() -> None:
    record = failure.decode(failure.encode(Unprintable()))
    assert record.message == "<unprintable>"
    assert record.type.endswith("Unprintable")
    record = failure.decode(failure.encode(Verbose()))
    assert len(record.message) == failure.MAX_MESSAGE
    assert type(record.message) is str
    assert len(record.traceback) == failure.MAX_TRACEBACK
    assert "left out" in record.message

    def forever(depth: int) -> int:
        return forever(depth + 1)

    record = failure.decode(failure.encode(raised(lambda: forever(0))))
    assert record.type == "RecursionError"
    assert "previous line repeated" in record.traceback.lower()


def forged(**changes: object) -> bytes:
    fields = {"type": "E", "message": "m", "traceback": "t", "errno": 2, "file": "f", "line": 3, "done": "d"}
    return channel.pack("failure", fields | changes)


def test_forged_failures() -> None:
    record = failure.decode(forged())
    assert (record.type, record.message, record.traceback, record.errno) == ("E", "m", "t", 2)
    long = failure.decode(forged(message="m" * 50_000, type="t" * 5000, traceback="b" * 200_000))
    assert (len(long.message), len(long.type), len(long.traceback)) == (
        failure.MAX_MESSAGE,
        failure.MAX_NAME,
        failure.MAX_TRACEBACK,
    )
    for number in ("-1", "1" * 5000, "\u0661", "", "x", "2.5"):
        assert failure.decode(forged(errno=number)).errno == 0
        assert failure.decode(forged(line=number)).line == 0
    long = failure.decode(forged(file="f" * 50_000, done="d" * 50_000))
    assert (len(long.file), len(long.done)) == (failure.MAX_PLACE, failure.MAX_PLACE)


def refuse() -> None:
    raise PermissionError(errno.EPERM, "no")


def test_the_place_of_a_refused_operation() -> None:
    record = failure.decode(failure.encode(raised(refuse)))
    assert (record.file, record.line) == (__file__, refuse.__code__.co_firstlineno + 1)
    assert record.done == 'raise PermissionError(errno.EPERM, "no")'
    record = failure.decode(failure.encode(raised(lambda: Path("/proc/self/status").chmod(0o777))))
    assert record.file == __file__
    assert " chmod os.chmod(self" in record.done
    record = failure.decode(failure.encode(raised(divide)))
    assert (record.file, record.line, record.done) == ("", 0, "")


@pytest.mark.parametrize(
    "data",
    [b"", b"failure", b"failure\0type\0E", forged(more=1), forged() + b"\0odd", b"\xff\xfe", b"unfit" + forged()[7:]],
)
def test_what_is_no_failure_is_refused(data: bytes) -> None:
    with pytest.raises(channel.Malformed):
        failure.decode(data)


def test_texts_that_cannot_be_encoded_travel_escaped() -> None:
    record = failure.decode(failure.encode(ValueError("a\0b\ud800c")))
    assert record.message == "a\\0b\\ud800c"
