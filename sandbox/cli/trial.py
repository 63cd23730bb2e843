"""One run of a plugin that is only watched: nothing of it is kept, remembered or quarantined. For `psie learn`, `psie check`.

It is what `psie run` would do under the same settings, in a process of its own, whose end ends the sandbox. What granted
folders were changed is listed and left.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

from sandbox import host
from sandbox.cli import inputs, options
from sandbox.cli import run as run_command
from sandbox.cli.inputs import UsageError
from sandbox.cli.session import Session, in_words, say
from sandbox.errors import SandboxException

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from sandbox.engine import client

TAIL = 64 << 10  # bytes of the output that are kept to be shown
PATIENCE = 0.5  # seconds until it is said that nothing comes on standard input
INPUT_BYTES = 64 << 20  # of standard input that are kept, to be given to each run


@dataclass
class Result:
    """What came of a run.

    Attributes:
        failed: why there was none; then all the rest is empty.
        status: as `psie run` would have ended.
        reason: what ended it, in a sentence; "" if it ended by itself.
        limit: the limit that ended it; "" if none did.
        violations: as SandboxViolation.to_dict gives them.
        explanation: of what ended it, as Explanation.to_dict gives it.
        wishes: files that were looked for and not there: wish, path, count, file, line. The plugin's word.
        changes: kind and path of what it changed in granted folders, and why that could not be kept, if so.
        leads: names of hosts that were allowed, and addresses of them that do not count, as they are not public.
        unkept: why `psie run` would keep nothing of it; "" if it would, or there is nothing.
        seconds: from its start to its end.
        memory_mb, file_operations, network_requests: the most of it that was used at once, or in all.
        output_bytes: of stdout and stderr together.
        digest: of output and changes: two equal ones came from runs that did the same, as far as can be told from outside.
        tail: the last of its stderr.
    """

    failed: str = ""
    status: int = 125
    reason: str = ""
    limit: str = ""
    violations: list[dict[str, Any]] = field(default_factory=list)
    explanation: dict[str, Any] | None = None
    wishes: list[dict[str, str]] = field(default_factory=list)
    changes: list[list[str]] = field(default_factory=list)
    leads: list[list[str]] = field(default_factory=list)
    unkept: str = ""
    seconds: float = 0.0
    memory_mb: float = 0.0
    file_operations: int = 0
    network_requests: int = 0
    output_bytes: int = 0
    digest: str = ""
    tail: str = ""


class Trial(Session):
    """A session whose changes are looked at and left, and whose worker tells of the files that it misses."""

    modules = ("sandbox.engine.wishes",)
    changed: tuple[list[str], ...] = ()
    content = unkept = ""
    leads: tuple[list[str], ...] = ()

    def _resolve(self) -> dict[str, Any]:
        resolved = super()._resolve()
        self.leads = tuple(resolved.get("refused", ()))
        return resolved

    def _settle(self, sandbox: client.Sandbox) -> None:
        from sandbox.recovery.granted import GrantedChanges

        with GrantedChanges(sandbox) as granted:
            found = granted.found()
            self.content = repr([(change.kind, change.path, change.sha256) for change in found]) if found else ""
            self.changed = tuple([change.kind, change.path, change.problem or ""] for change in found)
            problem = next((f"{change.path}: {change.problem}" for change in found if change.problem), "")
            self.unkept = (self._failure() or problem) if found else ""

    def _start(self, sandbox: client.Sandbox, job: dict[str, object], payload: bytes) -> None:
        super()._start(sandbox, {**job, "wishes": True}, payload)
        assert self.call is not None
        self.call.wishes = {}


class Runner:
    """Runs one plugin again and again, each time under other settings.

    Args:
        path: of the plugin.
        arguments: its own.
        environment: as of --env.
        stdin: what each run reads.
        source: the plugin's file, if it was read already: a pipe can be read once.
    """

    def __init__(
        self,
        path: str,
        arguments: Sequence[str],
        environment: Sequence[str],
        stdin: bytes = b"",
        source: bytes | None = None,
    ) -> None:
        self.path = run_command.plugin_path(path)
        self.source = run_command.source_of(self.path) if source is None else source
        self.arguments = tuple(arguments)
        self.environment = tuple(environment)
        inputs.environment(self.environment)  # a mistake there is none of a run's
        self.stdin = stdin
        self.runs = 0

    def run(self, toml: str | None, level: str | None = None) -> Result:
        """Under the settings of this file's text alone, at its level or another: no variable of the environment counts. None:
        under those that `psie run` would have without --config."""
        self.runs += 1
        files = {name: os.memfd_create(f"psie {name}", os.MFD_CLOEXEC) for name in ("in", "out", "err", "result", "settings")}
        try:
            for name, content in (("in", self.stdin), ("settings", (toml or "").encode())):
                with open(f"/proc/self/fd/{files[name]}", "wb") as file:
                    file.write(content)
            child = os.fork()
            if child == 0:
                self._child(files, level, is_named=toml is not None)
            try:
                _, wait_status = os.waitpid(child, 0)
            except BaseException:  # perhaps as it has just been waited for: then its number may be another's
                with suppress(ChildProcessError):
                    if os.waitpid(child, os.WNOHANG)[0] == 0:
                        os.kill(child, signal.SIGKILL)
                        host.reap(child)
                raise
            result = self._result(files, os.waitstatus_to_exitcode(wait_status))
            # For a traceback Python looks at the plugin's file by its name, which may lead through a link.
            result.wishes = [wish for wish in result.wishes if wish["path"] != self.path]
            return result
        finally:
            for fd in files.values():
                os.close(fd)

    def _child(self, files: dict[str, int], level: str | None, *, is_named: bool) -> None:
        """Never returns. The files are in memory: whoever is killed leaves none behind."""
        status = 1
        try:
            from sandbox.ns import privileges

            privileges.die_with_parent()
            for number, name in enumerate(("in", "out", "err")):
                os.dup2(files[name], number)
            for name in [name for name in os.environ if is_named and name.startswith("SANDBOX_")]:
                del os.environ[name]
            told = self._inside(f"/proc/self/fd/{files['settings']}" if is_named else None, level)
            with open(f"/proc/self/fd/{files['result']}", "w", encoding="utf-8") as file:
                json.dump(told, file)
            status = 0
        finally:
            os._exit(status)

    def _inside(self, config: str | None, level: str | None) -> dict[str, Any]:
        given = {**options.defaults(options.RUN), "file": self.path, "args": self.arguments, "env": self.environment}
        given |= {"config": config, "level": level, "quiet": True}
        try:
            trial = Trial(given, None, read_only=run_command.siblings(self.path, self.source))
            begun = monotonic()
            status = trial.finish({"kind": "run", "path": self.path, "argv": list(self.arguments)}, self.source)
            trial.leave()
            return self._told(trial, status, monotonic() - begun)
        except (run_command.Failed, UsageError, SandboxException, ValueError, TypeError, ImportError) as error:
            return {"failed": str(error)}
        except OSError as error:
            return {"failed": in_words(error)}

    @staticmethod
    def _told(trial: Trial, status: int, seconds: float) -> dict[str, Any]:
        call, error = trial.call, trial.error
        assert call is not None
        explanation = getattr(error, "explanation", None)
        return {
            "status": status,
            "reason": str(error).splitlines()[0] if error is not None else "",
            "limit": getattr(error, "limit", "") or "",
            "violations": [violation.to_dict() for violation in trial.found],
            "explanation": explanation.to_dict() if explanation is not None else None,
            "wishes": list((call.wishes or {}).values()),
            "changes": list(trial.changed),
            "leads": list(trial.leads),
            "unkept": trial.unkept,
            "seconds": seconds,
            "memory_mb": trial.peak_memory_mb(),
            "file_operations": trial.recorder.count if trial.recorder is not None else 0,
            "network_requests": trial.connections,
            "digest": trial.content,
        }

    @staticmethod
    def _result(files: dict[str, int], ended: int) -> Result:
        import hashlib

        try:
            with open(f"/proc/self/fd/{files['result']}", encoding="utf-8") as file:
                told = json.load(file)
        except (OSError, ValueError):
            return Result(failed=f"the run did not come to its end (psie itself ended with {ended})")
        if "failed" in told:
            return Result(failed=told["failed"])
        digest, size = hashlib.sha256(told["digest"].encode("utf-8", "surrogatepass")), 0
        for name in ("out", "err"):
            with open(f"/proc/self/fd/{files[name]}", "rb") as file:
                data = file.read()
            size += len(data)
            digest.update(b"%d %s" % (len(data), data))
        told["changes"] = [list(change) for change in told["changes"]]
        return Result(
            **{**told, "output_bytes": size, "digest": digest.hexdigest(), "tail": data[-TAIL:].decode("utf-8", "replace")}
        )


def standard_input() -> bytes:
    """What there is on stdin, for every run; nothing from a terminal. Raises UsageError for more than can be kept."""
    import select
    import sys

    if sys.stdin is None or os.isatty(0):
        return b""
    if not select.select([0], [], [], PATIENCE)[0]:
        say("reading standard input to its end, to give it to each run: </dev/null gives none")
    data = sys.stdin.buffer.read(INPUT_BYTES + 1)
    if len(data) > INPUT_BYTES:
        raise UsageError(f"standard input is longer than {INPUT_BYTES >> 20} MB: give each run less, or </dev/null")
    return data
