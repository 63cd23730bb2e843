"""One run of the command, as it is remembered: refused where its file is quarantined, and a row, or a quarantine, in the end.

On the start path of `psie run`: what can be done while the plugin runs is done then, and what only a refusal, a violation or a
full spool needs is imported there.
"""

from __future__ import annotations

import os
from time import localtime, monotonic, strftime, time

from sandbox.cli.run import SOURCE_BYTES, Failed, read_text
from sandbox.errors import (
    ResourceError,
    ResourceLimitExceededError,
    SandboxException,
    SandboxInitializationError,
    SecurityViolationError,
)
from sandbox.state import folder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from sandbox.cli.session import Session
    from sandbox.engine.client import Sandbox
    from sandbox.files import FileEntry
    from sandbox.recovery.records import Evidence

DOOR = BY = "command"
QUARANTINED = "quarantined"  # as sandbox.recovery.in_force calls its file


class Quarantined(Failed):
    """The file is quarantined, so it is not run."""


class Remembered:
    """One run of a file.

    Args:
        given: the command's options.
        plugin_id: what its row calls it.
        path: of the file, by which it is quarantined.
        source: its content.
        beside: paths of the modules and packages beside it that it can import.
        say: prints one line.
    """

    def __init__(
        self,
        given: dict[str, Any],
        plugin_id: str,
        path: str,
        source: bytes,
        beside: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        self.given = given
        self.plugin_id = plugin_id
        self.path = path
        self.source = source
        self.beside = beside
        self.say = say
        self.started, self.begun = time(), monotonic()
        self.session: Session | None = None
        self.is_written = False
        self.sha256 = ""  # of all that is run: of the file alone, or with what is beside it
        self.parts: list[str] = []  # digests of each of its files

    def refuse_quarantined(self) -> None:
        """Raises Quarantined; ResourceError where the records are there, but cannot be believed."""
        try:
            place = folder("lib")
        except OSError as error:
            if error.errno is None:  # something is there that is not to be believed
                raise ResourceError(str(error)) from None
            return  # nobody has been able to keep anything there
        if not os.path.lexists(os.path.join(place, QUARANTINED)):
            return
        from sandbox.recovery import in_force

        entries = in_force.read(place)
        if entries is None:
            entries = self._ask_store()
        if not entries:
            return
        self.hash()
        found = in_force.find(entries, self.path, self.sha256, self.parts)
        if found is not None:
            from shlex import quote

            name = found["plugin_id"]
            is_own = name == self.path.encode("utf-8", "backslashreplace").decode()
            which = "" if is_own else f" as {name}, which it equals,"
            since = strftime("%Y-%m-%d %H:%M:%S", localtime(found["since"]))
            raise Quarantined(
                f"{self.path} is quarantined{which} since {since} ({found['reason']}): look into it, "
                f"then psie quarantine release {quote(name)}"
            )

    def hash(self) -> None:
        """And import what the row needs; called while the plugin runs."""
        from sandbox.recovery import in_force, spool  # noqa: F401

        if self.sha256:
            return
        own, lines = in_force.sha256(self.source), []
        for name, data in modules(self.beside):
            digest = in_force.sha256(data)
            self.parts.append(digest)
            lines.append(f"{digest}  {name}\n".encode("utf-8", "backslashreplace"))
        # The same main file with other modules is another program, and no reason to refuse this one.
        self.parts += [] if lines else [own]
        self.sha256 = in_force.sha256(b"".join([own.encode(), b"\n", *sorted(lines)])) if lines else own

    def _ask_store(self) -> list[dict[str, Any]]:
        """Where the file of quarantines is damaged; to open the store writes it anew."""
        from sandbox.recovery.store import Store

        with Store(on_trouble=self.say) as store:
            return [each.to_dict() for each in store.quarantined()]

    def failed(self, error: BaseException) -> None:
        """psie could not run it, or not to the end. A mistake on the command line is no run."""
        if not isinstance(error, (Quarantined, SandboxException)) and (self.session is None or self.session.call is None):
            return
        outcome = "refused" if isinstance(error, (Quarantined, SandboxInitializationError)) else "error"
        self._write(outcome, (str(error) or type(error).__name__).splitlines()[0], None)  # a MemoryError says nothing

    def ended(self, status: int) -> None:
        """It has come to its end; quarantines it if it has passed violation_threshold."""
        session = self.session
        assert session is not None
        if session.evidence is not None:
            self._quarantine(session.evidence, str(session.error))
        self._write(outcome_of(session, status), reason_of(session, status), status)

    def _quarantine(self, evidence: Evidence, reason: str) -> None:
        from shlex import quote

        from sandbox.recovery.records import Records

        assert self.session is not None
        violations = [each.to_dict() for each in self.session.found]
        self.hash()
        # Of a pipe only the content: through /dev/stdin the next one comes as well.
        name = self.path if os.path.isfile(self.path) else f"{self.path}:{self.sha256[:16]}"
        try:
            records = Records(None, BY, self.say)
            records.quarantine(name, self.sha256, reason, violations, evidence)
            records.close()
        except ResourceError as error:
            self.say(f"{self.path} could not be quarantined: {error}")
            return
        self.say(f"{self.path} is quarantined now: look into it, then psie quarantine release {quote(name)}")

    def _write(self, outcome: str, reason: str, status: int | None) -> None:
        if self.is_written:
            return
        self.is_written = True
        session = self.session
        facts = session.facts() if session is not None else self._asked()
        if not facts.pop("telemetry"):
            return
        self.hash()
        from sandbox.recovery import private, spool

        try:
            place = private.default_folder()
            is_much = spool.append(
                place,
                started=self.started,
                plugin_id=self.plugin_id,
                sha256=self.sha256,
                outcome=outcome,
                door=DOOR,
                seconds=monotonic() - self.begun,
                exit_code=status,
                reason=reason,
                violations=[each.to_dict() for each in session.found] if session is not None else [],
                **facts,
            )
            if is_much:
                from sandbox.recovery.store import Store

                with Store(place, on_trouble=self.say) as store:
                    store.collect()
        except ResourceError as error:
            if not self.given["quiet"]:
                self.say(f"this run is not remembered: {error}")

    def _asked(self) -> dict[str, Any]:
        """What is known of a run that never had a recipe."""
        from dataclasses import asdict

        from sandbox.cli import settings
        from sandbox.violations import to_plain

        try:
            config, limits, _ = settings.settings(self.given)
        except (ValueError, TypeError, SandboxException):  # mistakes, for which there is no row
            return {"telemetry": False}
        return {"telemetry": config.telemetry_enabled, "level": config.level.value, "limits": to_plain(asdict(limits))}


def modules(paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each Python file of modules and packages beside a plugin's file."""
    for path in paths:
        if not os.path.isdir(path):
            yield os.path.basename(path), read_text(path, SOURCE_BYTES)
            continue
        for place, _, names in os.walk(path):
            for name in names:
                if name.endswith((".py", ".so")):
                    file = os.path.join(place, name)
                    yield os.path.relpath(file, os.path.dirname(path)), read_text(file, SOURCE_BYTES)


def outcome_of(session: Session, status: int) -> str:
    """One of sandbox.recovery.store.OUTCOMES."""
    if isinstance(session.error, SecurityViolationError):
        return "violation"
    if isinstance(session.error, ResourceLimitExceededError):
        return "limit"
    return "ok" if status == 0 else "error"


def reason_of(session: Session, status: int) -> str:
    error = session.error or (session.settled.error if session.settled is not None else None)
    if error is not None:
        return str(error).splitlines()[0]
    if session.ended_by is not None:
        return f"psie was ended by signal {session.ended_by}"
    return f"exited with status {status}"


class Workspace:
    """The files of an open sandbox's workspace, for Evidence."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.root = sandbox.open_workspace()

    def list_files(self) -> list[FileEntry]:
        from sandbox import files

        return files.listed(self.root, "")

    def read_file(self, path: str, *, max_bytes: int) -> bytes:
        from sandbox import files

        return files.read(self.root, path, max_bytes)


def evidence_of(session: Session, sandbox: Sandbox) -> Evidence | None:
    """Of a run that was killed for passing violation_threshold, while its sandbox is open; None of others."""
    if session.call is None or session.call.cause != "violations" or not session.recipe.monitoring["quarantine"]:
        return None
    from sandbox.recovery.granted import GrantedChanges
    from sandbox.recovery.records import Evidence

    evidence = Evidence()
    evidence.samples = list(session.samples)
    evidence.recipe = session.recipe.to_dict()
    evidence.output_tail = bytes(session.output_tail)
    try:
        if sandbox.layers is not None:
            with GrantedChanges(sandbox) as granted:
                evidence.take_granted(granted)
        workspace = Workspace(sandbox)
        try:
            evidence.take_workspace(workspace)
        finally:
            os.close(workspace.root)
    except OSError:
        pass  # the sandbox has gone: what there is has to do
    return evidence
