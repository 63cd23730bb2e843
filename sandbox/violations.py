"""The record that a plugin ran into a protection, and why that protection was there.

Only the records: who detects, counts or acts on a violation is not known here, nor what allows what (that is
sandbox.explanations).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:
    Any = object  # so that typing.get_type_hints works without typing being loaded here

_MAX_DEPTH = 32


class SandboxViolationType(Enum):
    """Types of sandbox violations."""

    RESOURCE_EXCEEDED = "resource_exceeded"
    FILESYSTEM_VIOLATION = "filesystem_violation"
    NETWORK_VIOLATION = "network_violation"
    EXECUTION_TIMEOUT = "execution_timeout"
    PERMISSION_DENIED = "permission_denied"
    SECURITY_BREACH = "security_breach"


@dataclass(frozen=True)
class Explanation:
    """Why something was refused, and what would have allowed it.

    Attributes:
        protection: what refused it, such as "seccomp" or "memory limit".
        reason: that in a clause, such as "seccomp refuses new processes".
        setting: the field that allows it, such as "PluginLimitsV2.max_memory_mb"; None: no setting does.
        flag: the option of `psie run` or `psie call` that does, with its value; None: there is none.
        toml: the lines of a file for `load_config` or --config that do; None: they cannot be given.
        file: where in the plugin it was, if the interpreter knew: that is the plugin's word. Escaped.
        line: of that file.
        python: how to say the setting in Python; None: it cannot be given.
        note: what else is to be known; without a setting, why there is none.
        refused: False for a warning: then nothing was refused, and nothing ended by it.
    """

    protection: str
    reason: str
    setting: str | None = None
    flag: str | None = None
    toml: str | None = None
    file: str | None = None
    line: int | None = None
    python: str | None = None
    note: str = ""
    refused: bool = True

    def text(self) -> str:
        """The explanation in one sentence on one line, safe for a terminal."""
        from sandbox.text import escape_text

        sentence = self.reason if self.refused else f"only a warning, nothing was refused: {self.reason}"
        sentence += f": {self._mend()}"
        if self.note:
            sentence += f"; {self.note}"
        if self.file:
            sentence += f" ({self.file}, line {self.line})" if self.line is not None else f" ({self.file})"
        return escape_text(sentence, keep="")

    def _mend(self) -> str:
        if self.setting is None:
            return "no setting and no level allows it"
        ways = [way for way in (self.flag, self.python or self.setting) if way]
        if self.toml is not None:
            ways.append(f"in a --config file {_one_line(self.toml)}")
        listed = ", or ".join(filter(None, [", ".join(ways[:-1]), ways[-1]]))
        return f"allow {'more' if '.max_' in self.setting else 'it'} with {listed}"

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain data that `json.dumps` takes: the fields, and the sentence as "text"."""
        return {**vars(self), "text": self.text()}


def _one_line(toml: str) -> str:
    parts, table = [], ""
    for line in toml.splitlines():
        if line.startswith("["):
            table = f"{line} "
        else:
            parts.append(table + line)
            table = ""
    return ", ".join(parts)


@dataclass
class SandboxViolation:
    """One violation.

    Attributes:
        type: what kind it is.
        message: one sentence; it may quote the plugin, so escape it before showing it.
        timestamp: when it was seen; kept in UTC. A datetime without a zone is taken as local time.
        severity: "warning" unless the detector says otherwise.
        details: further facts. A `count` is told again whenever it has doubled: it may be up to twice as many by the end.
        resolved: whether a recovery settled it.
        auto_recovery_attempted: whether one was tried.
        explanation: which protection it was and what would allow it; None where the detector does not say.

    Raises:
        TypeError: `type` is not a SandboxViolationType, or `timestamp` is not a datetime.
    """

    type: SandboxViolationType
    message: str
    timestamp: datetime
    severity: str = "warning"
    details: dict[str, Any] = field(default_factory=dict)
    resolved: bool = False
    auto_recovery_attempted: bool = False
    explanation: Explanation | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.type, SandboxViolationType):
            raise TypeError(f"SandboxViolation.type is {self.type!r}: give a member of SandboxViolationType")
        self.timestamp = to_utc("SandboxViolation.timestamp", self.timestamp)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data that `json.dumps` takes: the type by its value, the time in ISO 8601."""
        return {
            "type": self.type.value,
            "message": self.message,
            "timestamp": self.timestamp.isoformat(),
            "severity": self.severity,
            "details": to_plain(self.details),
            "resolved": self.resolved,
            "auto_recovery_attempted": self.auto_recovery_attempted,
            "explanation": None if self.explanation is None else self.explanation.to_dict(),
        }


def to_utc(where: str, value: datetime) -> datetime:
    """`value` in UTC; one without a zone is taken as local time.

    Raises:
        TypeError: it is not a datetime; `where` names the field.
    """
    if not isinstance(value, datetime):
        raise TypeError(f"{where} is {value!r}: give a datetime, such as datetime.now(UTC)")
    return value if value.tzinfo is UTC else value.astimezone(UTC)


def to_plain(value: object, _depth: int = 0) -> Any:
    """`value` as data for strict JSON: datetimes become ISO 8601, enums their values, bytes text, sets and tuples lists.

    nan and inf become text, as JSON has no number for them. Anything unknown becomes its `repr`; below 32 levels,
    so also for a value that holds itself, "..." stands.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Enum):
        return to_plain(value.value, _depth + 1)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        return number if number - number == 0 else str(number)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "backslashreplace")
    if _depth >= _MAX_DEPTH:
        return "..."
    if isinstance(value, SandboxViolation):
        return to_plain(value.to_dict(), _depth + 1)
    if isinstance(value, dict):
        return {_key(key): to_plain(item, _depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item, _depth + 1) for item in value]
    return repr(value)


def _key(key: object) -> str:
    plain = to_plain(key, _MAX_DEPTH)
    return plain if isinstance(plain, str) else str(plain)
