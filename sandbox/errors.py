"""The exceptions a caller of psie can meet.

Each carries its facts as attributes and says them in one sentence as its `str`, which is safe for a terminal; where a
setting would have allowed it, a second line says so. All of them can be pickled and copied. This module must not know how
a sandbox works: it only gives failures their names.
(A wrong setting is no sandbox error: see `sandbox.config.ConfigError`, `ValueError` and `TypeError`.)
"""

from __future__ import annotations

import errno
import os

from sandbox.text import escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox.violations import Explanation, SandboxViolation

# What this process is short of: such a failure tells nothing of the host, or of the files that it was about.
SHORT = errno.EMFILE, errno.ENFILE, errno.ENOMEM


class SandboxException(Exception):
    """Base exception for sandbox operations."""

    def __str__(self) -> str:
        return escape_text(super().__str__())


class SandboxInitializationError(SandboxException):
    """Raised when a sandbox fails to initialize. No plugin code has run.

    Attributes:
        protection: name of the protection that cannot be had, if it is about one.
        line: the set-up line that failed, by name or number.
        errno: the kernel's answer, as a number of the module `errno`.
        path: the file or folder it is about.
        mend: what the caller can do about it.
    """

    def __init__(
        self,
        message: str = "",
        *,
        protection: str | None = None,
        line: str | int | None = None,
        errno: int | None = None,
        path: str | None = None,
        mend: str | None = None,
    ) -> None:
        super().__init__(message)
        self.protection = protection
        self.line = line
        self.errno = errno
        self.path = path
        self.mend = mend

    def __str__(self) -> str:
        place = self.protection or ""
        if self.line is not None:
            place = f"{place} (line {self.line})" if place else f"line {self.line}"
        facts = [str(self.path)] if self.path is not None else []
        if self.errno is not None:
            facts.append(_errno_text(self.errno))
        message = str(self.args[0]) if self.args else ""
        sentence = ": ".join(part for part in (place, message) if part) or "the sandbox could not be set up"
        if facts:
            sentence += f" ({': '.join(facts)})"
        if self.mend:
            sentence += f"; {self.mend}"
        return escape_text(sentence, keep="")


class ResourceError(SandboxException):
    """Raised when a resource of the host that a sandbox needs is not to be had."""


class SandboxKilledError(SandboxException):
    """Raised when a person has ended the sandbox from outside, as by `psie kill`.

    Attributes:
        by: who has, and with what.
    """

    def __init__(self, message: str = "", *, by: str = "") -> None:
        super().__init__(message)
        self.by = by

    def __str__(self) -> str:
        return escape_text(str(self.args[0]) if self.args else "the sandbox was killed from outside", keep="")


class PluginExecutionError(SandboxException):
    """Raised when plugin execution encounters an error.

    Attributes:
        exception_type: class name of the plugin's exception; "" when it ended without one.
        exception_message: its message, as the plugin gave it (not escaped).
        traceback_text: its traceback as text (not escaped); the `str` of this error holds it escaped.
        exit_code: exit status of the plugin's process, if it exited.
        signal: number of the signal that ended it, if one did.
    """

    def __init__(
        self,
        message: str = "",
        *,
        exception_type: str = "",
        exception_message: str = "",
        traceback_text: str = "",
        exit_code: int | None = None,
        signal: int | None = None,
    ) -> None:
        super().__init__(message)
        self.exception_type = exception_type
        self.exception_message = exception_message
        self.traceback_text = traceback_text
        self.exit_code = exit_code
        self.signal = signal

    def __str__(self) -> str:
        message = escape_text(str(self.args[0]) if self.args else "", keep="") or self._default_message()
        if not self.traceback_text:
            return message
        return f"{message}\n\n{escape_text(self.traceback_text).rstrip()}"

    def _default_message(self) -> str:
        if self.exception_type:
            said = f": {self.exception_message}" if self.exception_message else ""
            return escape_text(f"the plugin raised {self.exception_type}{said}", keep="")
        if self.signal is not None:
            return f"the plugin was ended by signal {self.signal}"
        if self.exit_code is not None:
            return f"the plugin exited with status {self.exit_code}"
        return "the plugin failed"


class SecurityViolationError(SandboxException):
    """Raised when a security violation is detected.

    Attributes:
        violations: the records of what the plugin ran into, oldest first.
        explanation: of the violation that the message is about, if it is about one.
    """

    def __init__(
        self, message: str = "", *, violations: Iterable[SandboxViolation] = (), explanation: Explanation | None = None
    ) -> None:
        super().__init__(message)
        self.violations: list[SandboxViolation] = list(violations)
        self.explanation = explanation

    def __str__(self) -> str:
        message = str(self.args[0]) if self.args else ""
        if not message:
            message = "; ".join(violation.message for violation in self.violations) or "the plugin broke a protection"
        return escape_text(message, keep="") + _mend(self.explanation)


class CommitError(SandboxException):
    """Raised when changes of granted folders are not committed; then none of them was.

    Attributes:
        paths: the files or folders that are the reason.
    """

    def __init__(self, message: str = "", *, paths: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.paths: list[str] = list(paths)

    def __str__(self) -> str:
        return escape_text(str(self.args[0]) if self.args else "the changes were not committed", keep="")


class PluginError(SandboxException):
    """Raised when the files or the signature of a plugin in a plugin folder are not fit to be run. Nothing of it has run.

    Attributes:
        path: the file or folder that is the reason, beneath the plugin folder; not escaped.
    """

    def __init__(self, message: str = "", *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path

    def __str__(self) -> str:
        return escape_text(str(self.args[0]) if self.args else "the plugin is not fit to be run", keep="")


class ManifestError(PluginError):
    """Raised when the manifest of a plugin is wrong.

    Attributes:
        path: the manifest's name; not escaped.
        line: where in it, from 1 on; None where it is about the whole of it.
    """

    def __init__(self, message: str = "", *, path: str | None = None, line: int | None = None) -> None:
        super().__init__(message, path=path)
        self.line = line


class ResourceLimitExceededError(SandboxException):
    """Raised when resource limits are exceeded.

    Attributes:
        limit: name of the limit, e.g. "max_memory_mb".
        allowed: what the limit allowed, in the limit's own unit.
        used: what was used when it struck, in the same unit; None where the kernel does not say.
        explanation: which setting raises it, and how.
    """

    def __init__(
        self,
        message: str = "",
        *,
        limit: str = "",
        allowed: float | None = None,
        used: float | None = None,
        explanation: Explanation | None = None,
    ) -> None:
        super().__init__(message)
        self.limit = limit
        self.allowed = allowed
        self.used = used
        self.explanation = explanation

    def __str__(self) -> str:
        message = (str(self.args[0]) if self.args else "") or "the plugin exceeded a resource limit"
        numbers = [
            f"{value:,.12g} {word}" for value, word in ((self.used, "used"), (self.allowed, "allowed")) if value is not None
        ]
        facts = ": ".join(part for part in (self.limit, ", ".join(numbers)) if part)
        return escape_text(f"{message} ({facts})" if facts else message, keep="") + _mend(self.explanation)


def _mend(explanation: Explanation | None) -> str:
    """The second line: what would have allowed it, where anything does."""
    return f"\n{explanation.text()}" if explanation is not None and explanation.setting is not None else ""


def _errno_text(number: int) -> str:
    return f"{errno.errorcode.get(number, f'errno {number}')}, {os.strerror(number)}"
