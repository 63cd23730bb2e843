"""The exceptions, and the records they carry."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

import pytest

from sandbox.errors import (
    ManifestError,
    PluginError,
    PluginExecutionError,
    ResourceError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxInitializationError,
    SecurityViolationError,
)
from sandbox.sandbox import no_start
from sandbox.telemetry import SandboxTelemetry
from sandbox.violations import SandboxViolation, SandboxViolationType, to_plain

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def violation(message: str = "wrote to /etc") -> SandboxViolation:
    return SandboxViolation(SandboxViolationType.FILESYSTEM_VIOLATION, message, NOON)


EXAMPLES: list[SandboxException] = [
    SandboxException("base"),
    ResourceError("no cgroup"),
    SandboxInitializationError(
        "cannot be mounted", protection="own /proc", line="mount_proc", errno=errno.EPERM, path="/proc", mend="run it as root"
    ),
    PluginExecutionError(
        "it failed", exception_type="ValueError", exception_message="no", traceback_text="Traceback", exit_code=1, signal=9
    ),
    SecurityViolationError("it broke out", violations=[violation()]),
    ResourceLimitExceededError("out of memory", limit="max_memory_mb", allowed=128.0, used=130.5),
    PluginError("it.py is no regular file", path="it.py"),
    ManifestError("it.toml, line 3: no", path="it.toml", line=3),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_can_be_pickled_and_copied(error: SandboxException) -> None:
    error.add_note("a note")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert vars(other) == vars(error)
        assert other.args == error.args
        assert str(other) == str(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_all_errors_share_one_base_and_need_no_argument(error: SandboxException) -> None:
    assert isinstance(error, SandboxException)
    assert isinstance(type(error)(), type(error))
    assert str(type(error)("a\x1bb")).startswith("a\\x1bb")


def test_initialization_error_is_one_sentence() -> None:
    assert str(EXAMPLES[2]) == (
        "own /proc (line mount_proc): cannot be mounted (/proc: EPERM, Operation not permitted); run it as root"
    )
    assert str(SandboxInitializationError("no")) == "no"
    assert str(SandboxInitializationError("no", line=3)) == "line 3: no"
    assert str(SandboxInitializationError(errno=99999)).startswith("the sandbox could not be set up (errno 99999")
    assert "\n" not in str(SandboxInitializationError("a\nb", path="/x\ny", mend="c\nd"))


def test_execution_error_shows_the_escaped_traceback() -> None:
    error = PluginExecutionError("it\nfailed", traceback_text="Traceback:\n  \x1b[2Jx\u202e\n")
    assert str(error) == "it\\nfailed\n\nTraceback:\n  \\x1b[2Jx\\u202e"
    assert error.traceback_text == "Traceback:\n  \x1b[2Jx\u202e\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PluginExecutionError(exception_type="KeyError", exception_message="'a'"), "the plugin raised KeyError: 'a'"),
        (PluginExecutionError(exception_type="KeyError"), "the plugin raised KeyError"),
        (PluginExecutionError(signal=11), "the plugin was ended by signal 11"),
        (PluginExecutionError(exit_code=0), "the plugin exited with status 0"),
        (PluginExecutionError(), "the plugin failed"),
        (SecurityViolationError(violations=[violation("a"), violation("b\x1b")]), "a; b\\x1b"),
        (SecurityViolationError(), "the plugin broke a protection"),
        (ResourceLimitExceededError(), "the plugin exceeded a resource limit"),
        (ResourceLimitExceededError("x", limit="l", allowed=0), "x (l: 0 allowed)"),
        (EXAMPLES[5], "out of memory (max_memory_mb: 130.5 used, 128 allowed)"),
    ],
)
def test_sentences(error: SandboxException, text: str) -> None:
    assert str(error) == text


def test_violations_are_a_list_of_its_own() -> None:
    records = [violation()]
    error = SecurityViolationError("x", violations=iter(records))
    assert error.violations == records
    assert error.violations is not records


def test_times_are_kept_in_utc() -> None:
    berlin = timezone(timedelta(hours=2))
    record = SandboxViolation(SandboxViolationType.SECURITY_BREACH, "m", datetime(2024, 5, 1, 14, tzinfo=berlin))
    assert (record.timestamp, record.timestamp.tzinfo) == (NOON, UTC)
    local = SandboxTelemetry("s", "p", datetime(2024, 5, 1, 12), end_time=datetime(2024, 5, 1, 13))
    assert local.start_time == datetime(2024, 5, 1, 12).astimezone(UTC)
    assert local.start_time.tzinfo is UTC
    assert local.end_time is not None
    assert local.end_time.tzinfo is UTC


def test_wrong_records_are_refused() -> None:
    with pytest.raises(TypeError, match=r"SandboxViolation\.type is 'x'"):
        SandboxViolation("x", "m", NOON)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SandboxViolation\.timestamp is 'now'"):
        SandboxViolation(SandboxViolationType.SECURITY_BREACH, "m", "now")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SandboxTelemetry\.end_time is 3"):
        SandboxTelemetry("s", "p", NOON, 3)  # type: ignore[arg-type]


def test_violation_to_dict() -> None:
    assert violation().to_dict() == {
        "type": "filesystem_violation",
        "message": "wrote to /etc",
        "timestamp": "2024-05-01T12:00:00+00:00",
        "severity": "warning",
        "details": {},
        "resolved": False,
        "auto_recovery_attempted": False,
        "explanation": None,
    }


def test_telemetry_to_dict_is_strict_json() -> None:
    class Colour(Enum):
        RED = "red"

    endless: list[object] = []
    endless.append(endless)
    record = violation()
    details: dict[Any, Any] = {
        "path": PurePosixPath("/x"),
        "raw": b"\xff",
        3: {1},
        "when": NOON,
        "nan": float("nan"),
        "c": Colour.RED,
    }
    record.details = details
    telemetry = SandboxTelemetry("s", "p", NOON, violations=[record], resource_samples=[{"deep": endless}])
    plain = json.loads(json.dumps(telemetry.to_dict(), allow_nan=False))
    assert list(plain) == list(vars(telemetry))
    assert plain["start_time"] == "2024-05-01T12:00:00+00:00"
    assert plain["end_time"] is None
    assert plain["violations"][0]["details"] == {
        "path": "PurePosixPath('/x')",
        "raw": "\\xff",
        "3": [1],
        "when": "2024-05-01T12:00:00+00:00",
        "nan": "nan",
        "c": "red",
    }


@pytest.mark.parametrize("value", [None, True, 3, 2.5, "x", [1, [2]], {"a": {}}])
def test_plain_data_stays(value: object) -> None:
    assert to_plain(value) == value


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EPERM])
def test_what_the_host_has_no_more_of_is_no_fault_of_the_settings(number: int) -> None:
    error = no_start(OSError(number, os.strerror(number)))
    assert isinstance(error, SandboxInitializationError if number == errno.EPERM else ResourceError)
    assert os.strerror(number) in str(error)
