"""One sandbox for the command line, from its options to its exit status, on a loop of its own.

Must not import click, asyncio or anything else that the start path cannot afford; what only an ending needs (violations
in words, the result file, the report) is imported there, and the live line when a run has lasted for a second. The engine's
client is imported while the zygote sets itself up, which has been told what to do before: so nothing here may need it earlier.
"""

from __future__ import annotations

import _signal as signal  # signal.py would import enum
import errno
import os
import stat
import sys
from itertools import islice
from time import monotonic, time

from sandbox.cli import cached, inputs, remembered
from sandbox.cli import run as run_command
from sandbox.engine import channel, spawn
from sandbox.errors import SHORT, ResourceLimitExceededError, SandboxException, SandboxKilledError, SecurityViolationError
from sandbox.recipe_data import Protection, confirm
from sandbox.text import TerminalEscaper, escape_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from typing import Any

    from sandbox.cli.changes import Settled
    from sandbox.cli.live import Live
    from sandbox.cli.target import Target
    from sandbox.cli.terminal import Terminal
    from sandbox.engine import client
    from sandbox.engine.loop import PollLoop
    from sandbox.engine.recording import Recorder
    from sandbox.engine.streams import Streams
    from sandbox.engine.watching import SandboxWatch
    from sandbox.recovery.granted import GrantedChanges
    from sandbox.recovery.measures import Recovery
    from sandbox.recovery.records import Evidence
    from sandbox.violations import SandboxViolation

# What a line discipline echoes for an erased character: harmless, and unreadable when escaped.
ERASE, ERASE_ESCAPED = b"\b \b", b"\\x08 \\x08"
GONE = errno.EPIPE, errno.EIO  # a pipe without a reader, a terminal that has been closed
MB = 1 << 20
FAILED = run_command.FAILED
TIMED_OUT = 124
VIOLATED = 126
OUT_OF_MEMORY = 137
KILLED = 128 + int(signal.SIGTERM)  # by a person, from outside
OUTPUT_EXCEEDED = 128 + int(signal.SIGXFSZ)
TAIL_BYTES = 64 << 10  # of the output that are evidence
MOST = 100  # files of a working directory that are looked at
LIVE_AFTER = 1.0  # seconds that a plugin must have run to be worth a line


def say(text: str) -> None:
    """One line on stderr, safe for a terminal."""
    try:
        sys.stderr.write(f"psie: {escape_text(text, keep='')}\n")
        sys.stderr.flush()
    except OSError:
        return  # nobody listens


def complain(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):
        raise error  # nobody reads any more, which is no mistake of anybody's: sandbox.cli.written
    from sandbox.cli import NOWHERE, is_nowhere

    is_lost = isinstance(error, FileNotFoundError) and error.filename is None and is_nowhere()
    say(NOWHERE if is_lost else str(error))
    return FAILED


def run(given: dict[str, Any], started: spawn.Early | None) -> int:
    """`psie run`. Returns the exit status."""

    def work() -> int:
        path = run_command.plugin_path(given["file"])
        source = run_command.source_of(path)

        def job(_: Session) -> dict[str, object]:
            return {"kind": "run", "path": path, "argv": list(given["args"])}

        return remember(given, started, path, path, source, job)

    return guarded(work)


def guarded(work: Callable[[], int]) -> int:
    """The status of `work`; one sentence and 125 for what it raises."""
    try:
        return work()
    except (run_command.Failed, SandboxException, ValueError, TypeError, ImportError) as error:
        return complain(error)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename is None:
            return complain(error)
        return complain(run_command.Failed(in_words(error)))


def in_words(error: OSError) -> str:
    """What the system has refused, in one sentence."""
    if error.strerror is None:
        return str(error)  # one of ours, with its mend
    from sandbox.engine import client

    mend = client.MENDS[error.errno] if error.errno in SHORT else "see to its rights" if error.errno == errno.EACCES else ""
    return f"{error.filename or 'the sandbox'}: {error.strerror}{mend and f': {mend}'}"


def remember(
    given: dict[str, Any],
    started: spawn.Early | None,
    plugin_id: str,
    path: str,
    source: bytes,
    job: Callable[[Session], dict[str, object]],
    kind: type[Session] | None = None,
) -> int:
    """A run from the look at the quarantines to its row."""
    files = run_command.siblings(path, source)
    run = remembered.Remembered(given, plugin_id, path, source, files[1:], say)
    session: Session | None = None
    try:
        run.refuse_quarantined()
        session = run.session = (kind or Session)(given, started, read_only=files)
        session.remembered, session.meanwhile = run, run.hash
        status = session.finish(job(session), source) or session.reply()
        run.ended(status)
    except Exception as error:
        run.failed(error)
        raise
    finally:
        if session is not None:
            session.leave()
    return status


class Session:
    """A recipe, a zygote, one sandbox, one call."""

    modules: tuple[str, ...] = ()  # of psie's that a worker needs for this file, and a sandbox may not see

    def __init__(self, given: dict[str, Any], started: spawn.Early | None, *, read_only: list[str]) -> None:
        self.given = given = {**given, "rw": inputs.writable(given.get("rw", ()))}
        self.start, self.begun = time(), monotonic()
        self.environment = inputs.environment(given["env"])
        folders = inputs.readable(given["ro"])
        self.directory = inputs.start(given["chdir"], [*folders, *self.given["rw"]])
        self.result_file, self.report = (target(option, given, read_only) for option in ("--result-file", "--report"))
        if self.result_file is not None and self.report is not None and self.result_file.path == self.report.path:
            raise inputs.UsageError(f"--report {given['report']}: this is the result file too: give another one")
        self.recipe, self.wire, self.limits, self.numbers, self.notes = cached.recipe_for(given, [*read_only, *folders])
        self.settled: Settled | None = None  # what became of changes in granted folders
        self._check_granted()
        self.zygote, self.loop = self._zygote(started)
        self.sandbox: client.Sandbox | None = None  # until it has gone
        self.call: client.Call | None = None
        self.streams: Streams | None = None
        self.terminal: Terminal | None = None
        self.violations: dict[tuple[str, str], dict[str, str]] = {}
        self.flushes: list[Callable[[], None]] = []  # what the escapers hold back
        self.watch: SandboxWatch | None = None
        self.unwatched = ""  # why it could not be watched when that was tried last
        self.recorder: Recorder | None = None  # of file operations
        self.watched: list[SandboxViolation] = []  # by both
        self.recovery: Recovery | None = None
        self.is_discarded = False  # what it changed in granted folders
        self.samples: list[dict[str, Any]] = []
        self.activity: list[dict[str, str]] = []  # what it wanted of the network, as the supervisor says
        self.network_operations = 0
        self.connections = 0
        self.hosts: dict[str, list[str]] = {}
        self.interrupts = 0
        self.ended_by: int | None = None
        self.is_committing = False
        self.reader_gone = False
        self.remembered: remembered.Remembered | None = None  # as what it is
        self.live: Live | None = None
        self.shown_last = b"\n"  # on a terminal: where a line has ended psie may draw one of its own
        self.job_sent, self.job_time = 0.0, self.start  # monotonic, and of the clock
        self.seconds = 0.0  # that the plugin has run
        self.meanwhile: Callable[[], None] = lambda: None  # what there is time for while the plugin runs
        self.output_tail = bytearray()
        self.evidence: Evidence | None = None
        self.error: SandboxException | None = None  # what its end was, and all that it ran into
        self.found: list[SandboxViolation] = []
        self.lost: list[str] = []  # what it has written to the workspace, which goes with the sandbox

    def _zygote(self, started: spawn.Early | None) -> tuple[client.Zygote, PollLoop]:
        """The one that was started early, if it was started as this recipe needs it. It is told what to set up."""
        outer = self.recipe.outer_user_namespace

        def another() -> spawn.Early:
            executable = str(self.recipe.interpreter["executable"])
            return spawn.Early(*spawn.spawn_zygote(executable, outer_user_namespace=outer), outer=outer)

        settings = spawn.settings(self.recipe, self.modules, single=True, calls=self.numbers)
        if started is not None and started.outer != outer:
            started.leave()
            started = None
        started = started or another()
        started.set_up(settings)
        from sandbox.engine import client
        from sandbox.engine.loop import PollLoop

        control = started.connection()
        if control is None:  # it has died, or does not come
            started.leave()
            started = another()
            control = started.control
            assert control is not None
        loop = PollLoop()
        zygote = client.Zygote(loop, started.pid, control, is_warden=True)
        if not started.is_set_up:
            zygote.set_up(settings)
        return zygote, loop

    def finish(self, job: dict[str, object], payload: bytes) -> int:
        """Set up, run, begin to tear down; the exit status."""
        from sandbox.engine import client

        name, plugin = (
            os.urandom(8).hex(),
            self.remembered.plugin_id if self.remembered is not None else str(self.given.get("file") or ""),
        )
        resolved = self._resolve()
        sandbox = client.Sandbox(self.zygote, self.recipe, self.wire, name, resolved, plugin=plugin, door="command")
        self.sandbox = sandbox
        sandbox.on_network = self._network_operation
        sandbox.begin_lifetime()
        self.warn()
        try:
            self._start(sandbox, job, payload)
            from sandbox.engine import clock, outcome, recording  # noqa: F401  (needed soon; now there is time)

            self.meanwhile()
            self.loop.run_until(lambda: bool(self.call and self.call.done))
            self.seconds = monotonic() - self.job_sent if self.job_sent else 0.0
        finally:
            if self.live is not None:
                self.live.end()
            if self.streams is not None:
                self.streams.finish()
            if self.terminal is not None:
                self.terminal.close()
            for flush in self.flushes:
                flush()
            try:
                self.evidence = remembered.evidence_of(self, sandbox)
                self.lost = self._written(sandbox)
                if sandbox.layers is not None and self.call is not None and self.call.done:
                    self._settle(sandbox)
            finally:
                if self.recorder is not None:
                    self.recorder.close(look=False)
                sandbox.close()
        return self._status()

    def leave(self) -> None:
        """Wait until all of its sandbox has gone."""
        sandbox, self.sandbox = self.sandbox, None
        if sandbox is not None:
            self.loop.run_until(lambda: sandbox.is_gone)
            self.zygote.close()

    def reply(self) -> int:
        """What there is to do with what a plugin has returned that has ended well; the exit status."""
        return 0

    def _written(self, sandbox: client.Sandbox) -> list[str]:
        """What lies in its working directory at the end, of MOST entries; hidden files are not counted as its work.

        Nothing for somebody who has given it a place for files.
        """
        if self.given["quiet"] or "raw" not in self.given or self.directory is not None or self.given["rw"]:
            return []
        try:
            root = sandbox.open_workspace()
        except OSError:
            return []  # a sandbox that never came up, or is gone
        try:
            with os.scandir(root) as entries:
                return sorted(entry.name for entry in islice(entries, MOST) if not entry.name.startswith("."))
        finally:
            os.close(root)

    def _resolve(self) -> dict[str, Any]:
        """What names in allowed_hosts stand for now; what does not help is said."""
        if not self.recipe.network["looks"]:
            return {}
        from sandbox import network

        resolved = network.resolve(self.recipe.network["access"])
        if not self.given["quiet"]:
            for name in resolved.get("unknown", ()):
                say(f"{name} has no address here: the plugin cannot reach it")
            for name, address in resolved.get("refused", ()):
                say(f"{name} leads to {address}, which is not public: to allow that, --allow-host {address}")
        self.hosts = network.for_python(self.recipe, resolved)
        return resolved

    def _network_operation(self, fields: dict[str, str]) -> None:
        if fields["operation"] != "resolve":
            self.network_operations = int(fields["count"])
            self.connections += fields.get("counted") == "1"
        if self.result_file is not None or self.report is not None:
            self.activity.append(fields)

    def _check_granted(self) -> None:
        """Before anything runs: what dead runs have left half-done there, and options that make no sense here."""
        looks = [option for option in ("--dry-run", "--ask") if self.given.get(option[2:].replace("-", "_"))]
        if not self.recipe.granted:
            if looks:
                raise inputs.UsageError(f"{looks[0]}: there is no folder that it may change: give one with --rw FOLDER")
            return
        from sandbox.recovery import commit

        for line in commit.recover():
            say(line)
        if looks and self.recipe.granted[0]["kind"] == "direct":
            raise inputs.UsageError(f"{looks[0]}: level minimal writes to folders directly: use level standard or above")
        if self.given.get("ask") and not os.isatty(2):
            raise inputs.UsageError("--ask: there is no terminal to ask on: look with --dry-run, then run without it")

    def _settle(self, sandbox: client.Sandbox) -> None:
        from sandbox.cli import changes

        assert self.call is not None
        dry_run, ask = bool(self.given.get("dry_run")), bool(self.given.get("ask"))
        self.settled = changes.settle(sandbox, self._failure, self._commit, dry_run=dry_run, ask=ask)

    def _commit(self, granted: GrantedChanges) -> None:
        """What has begun comes to its end, whatever signal comes."""
        self.is_committing = True
        try:
            granted.commit()
        finally:
            self.is_committing = False

    def _failure(self) -> str:
        """Why nothing is kept of what it changed; "" after a good end."""
        from sandbox.engine import outcome

        assert self.call is not None
        if self.call.offences:
            return "a violation was recorded"
        if self.ended_by is not None:
            from signal import Signals

            return f"psie was ended by {Signals(self.ended_by).name}"
        if self.is_discarded:
            return "recovery discards them"
        if self.call.cause or outcome.judge(self.call, []) is not None:
            return "the plugin did not come to its own end"
        code, _ = outcome.exit_of(self.call)
        return "" if code == 0 else f"the plugin ended with status {code}"

    def protections(self) -> tuple[Protection, ...]:
        """As they came out of the read-back; as compiled where no worker ever stood."""
        read_back = self.call.read_back if self.call is not None else None
        return confirm(self.recipe.protections, read_back) if read_back is not None else self.recipe.protections

    def warn(self) -> None:
        for note in () if self.given["quiet"] else self.notes:
            say(note)
        if self.recipe.weakened and not self.given["quiet"]:
            listed = "; ".join(f"{protection.name}: {protection.mechanism}" for protection in self.recipe.weakened)
            say(f"weaker than on a host with everything (psie doctor says why): {listed}")

    # -- running -----------------------------------------------------------------------------------------------------

    def _start(self, sandbox: client.Sandbox, job: dict[str, object], payload: bytes) -> None:
        with_input = "raw" in self.given and not is_background(0)
        tty = with_input and os.isatty(0) and os.isatty(1)
        if tty:
            from sandbox.cli.terminal import Terminal

            self.terminal = Terminal(
                self.loop,
                self._output(1, terminal=True),
                limit=int(self.recipe.limits["output_bytes"]),
                on_interrupts=self._interrupt_again,
                on_end=self._input_ended,
                on_excess=lambda: self._kill("output"),
            )
            inside = self.terminal.inside
        else:
            from sandbox.engine.streams import Streams

            limit = int(self.recipe.limits["output_bytes"])
            first = 1 if "raw" in self.given else 2  # `psie call` keeps stdout for the reply
            sinks = (self._output(first), self._output(2))
            self.streams = Streams(self.loop, limit, lambda: self._kill("output"), sinks, 0 if with_input else None)
            inside = self.streams.inside
        self._catch_signals()
        self.call = call = sandbox.call(inside, tty=tty)
        if self.ended_by is not None:
            self._kill("interrupt")  # a signal that came when there was no call yet
        (self.terminal or self.streams).close_inside()  # type: ignore[union-attr]
        workspace = str(self.recipe.workspace["path"]).replace("{folder}", sandbox.folder or "")
        environment = {name: value.replace("{folder}", sandbox.folder or "") for name, value in self.recipe.environment.items()}
        environment["TERM"] = os.environ.get("TERM", "dumb") if self.given.get("raw") else "dumb"
        instruction = {
            **job,
            "cwd": self.directory or workspace,
            "environment": {**environment, **self.environment},
            "allowed_modules": self.recipe.modules["allowed"],
            "blocked_modules": self.recipe.modules["blocked"],
            "hosts": self.hosts,
        }

        from sandbox.engine.client import WATCH_AFTER

        def send(sealed: client.Call) -> None:
            self.job_sent, self.job_time = monotonic(), time()
            sealed.send_job(instruction, payload)
            if self.terminal is not None:
                self.terminal.begun = True
            if self.recipe.monitoring["real_time"]:
                self.loop.call_later(WATCH_AFTER, self._begin_watch)
            if self._may_show():
                self.loop.call_later(LIVE_AFTER, self._begin_live)

        sandbox.on_opened = lambda: self._begin_recording(call)
        call.on_sealed = send
        call.on_violation = self._violation

    def _may_show(self) -> bool:
        """Is there a terminal for a live line that nobody writes to but us? A reader of our output may, and a raw plugin."""
        if self.given["quiet"] or self.given.get("raw") or not os.isatty(2):
            return False
        return "raw" not in self.given or not is_pipe(1)

    def _begin_live(self) -> None:
        if self.call is None or self.call.done or os.environ.get("TERM", "dumb") == "dumb":
            return
        from sandbox.cli.live import Live

        self.live = Live(self)

    def _begin_recording(self, call: client.Call) -> None:
        """Of what it does to files."""
        if self.recipe.monitoring["recording"] == "none":
            return
        from sandbox.engine.recording import Recorder

        recorder = self.recorder = Recorder(call.sandbox)
        recorder.on_violation = self._seen
        run = recorder.begin(call)
        call.on_done = lambda _: recorder.end(run)

    def _begin_watch(self) -> None:
        """Of a plugin that runs for a while: what it uses, and what the kernel counts."""
        if self.call is None or self.call.done or self.call.sandbox.closing:
            return
        try:
            from sandbox.engine.watching import SandboxWatch

            if self.recorder is not None:
                self.recorder.watch()
            watch = SandboxWatch(self.call.sandbox)
            watch.on_violation = self._seen
            watch.on_sample = self._sampled
            run, recorded = watch.begin(), self.call.on_done
        except (OSError, ImportError) as error:  # what is lacking now may be there a little later
            self.unwatched = str(error)
            self.call.sandbox.lift_high()
            self.loop.call_later(float(self.recipe.monitoring["interval_seconds"]), self._begin_watch)
            return
        self.watch = watch

        def end(call: client.Call) -> None:
            watch.end(run)
            watch.close()
            if recorded is not None:
                recorded(call)

        self.call.on_done = end

    def _sampled(self, sample: dict[str, Any]) -> None:
        from sandbox.telemetry import KEPT

        self.samples.append(sample)
        del self.samples[:-KEPT]

    def _violation(self, call: client.Call, fields: dict[str, str]) -> None:
        from sandbox.engine import client

        threshold = self.recipe.monitoring["violation_threshold"]
        if call.offences == threshold and fields["nr"] not in client.TOLD:
            from sandbox.engine import outcome

            self._react(outcome.describe_violation(fields, call.sandbox), call.offences)

    def _seen(self, violation: SandboxViolation) -> None:
        """A violation that no system call tells of."""
        self.watched.append(violation)
        self._react(violation)

    def _react(self, violation: SandboxViolation, offences: int = 0) -> None:
        if self.call is not None and self.recipe.monitoring["auto_recovery"]:
            self._recoveries(self.call.sandbox).automatic(violation, offences)

    def _recoveries(self, sandbox: client.Sandbox) -> Recovery:
        if self.recovery is None:
            from sandbox.recovery.measures import Recovery

            self.recovery = Recovery(sandbox, "run")
            self.recovery.discard = self._discard
        return self.recovery

    def _discard(self) -> Future[dict[str, Any]] | None:
        """Of a run nothing is committed before its end: it is enough that nothing will be."""
        from concurrent.futures import Future

        if self.call is None or self.call.sandbox.layers is None:
            return None
        self.is_discarded = True
        found: Future[dict[str, Any]] = Future()
        found.set_result({"before": {"are_kept": True}, "after": {"are_kept": False}})
        return found

    def _kill(self, cause: str) -> None:
        if self.call is not None:
            self.call.kill(cause)

    def _output(self, fd: int, *, terminal: bool = False) -> Callable[[bytes], None]:
        """A sink that writes to `fd`, escaped if that is a terminal. `terminal`: what comes is a line discipline's."""
        is_shown = os.isatty(fd)
        escaper = None if self.given.get("raw") or not is_shown else TerminalEscaper()

        def write(data: bytes) -> None:
            self.output_tail += data
            del self.output_tail[:-TAIL_BYTES]
            if escaper is not None:
                data = escaper.feed(data)
                if terminal:
                    data = data.replace(ERASE_ESCAPED, ERASE)
            put(data)

        def put(data: bytes) -> None:
            if is_shown and data:
                self.shown_last = data[-1:]
                if self.live is not None:
                    self.live.clear()
            view = memoryview(data)
            try:
                while view and not self.reader_gone:
                    view = view[write_some(fd, view) :]
            except OSError as error:
                if error.errno not in GONE:
                    error.filename = f"standard {'output' if fd == 1 else 'error'}"
                    raise
                self.reader_gone = True
                self._kill("reader")
            if is_shown and self.live is not None:
                self.live.restore()

        if escaper is not None:
            self.flushes.append(lambda: put(escaper.flush()))
        return write

    def _interrupt_again(self) -> None:
        self._end(signal.SIGINT)

    def _input_ended(self) -> None:
        """Of a terminal: it is in the background now, where the input has ended, or it has been closed."""
        if not is_background(0):
            self._end(signal.SIGHUP)

    def _end(self, number: int) -> None:
        """Kill the call; if even that leads to nothing, leave: the zygote sees it and ends everything, stopped or not."""
        from sandbox.engine.client import GRACE

        self.ended_by = number
        self._kill("interrupt")

        def leave(_: int, frame: object) -> None:
            if self.is_committing:
                signal.alarm(int(GRACE))
                return
            self.zygote.wake()
            os._exit(128 + number)

        signal.signal(signal.SIGALRM, leave)
        signal.alarm(int(GRACE))

    def _catch_signals(self) -> None:
        """Ctrl-C once for the plugin, twice to kill; the others end the sandbox. What is ignored, as by nohup, stays so.

        Where no plugin runs yet that could take it, the first Ctrl-C is the end, too.
        """

        def interrupt(number: int, frame: object) -> None:
            self.interrupts += 1
            if self.interrupts == 1 and self.call is not None and self.call.is_running:
                self.call.signal(signal.SIGINT)
            else:
                self._interrupt_again()

        def end(number: int, frame: object) -> None:
            self._end(number)

        signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # in the background a terminal's input ends instead of stopping us
        for number, handler in (
            (signal.SIGINT, interrupt),
            (signal.SIGTERM, end),
            (signal.SIGHUP, end),
            (signal.SIGQUIT, end),
        ):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _status(self) -> int:
        from sandbox.engine import outcome

        assert self.call is not None
        violations = [outcome.describe_violation(fields, self.call.sandbox) for fields in self.call.violations.values()]
        outcome.locate(self.call, violations)
        if self.recovery is not None or self.call.cause == "violations":
            self._recoveries(self.call.sandbox).ended(self.call, violations)
        error = outcome.judge(self.call, violations)
        status = self._exit_code(error)
        unasked = self.call.reply_kind == channel.REPLY_UNFIT and not self._is_unfit()
        if self.call.cause == "interrupt" or self.reader_gone or unasked:
            error = None
        if error is not None and (status != 1 or self._is_unfit() or not is_plain_exception(error)):
            say(str(error).splitlines()[0])
        if self.settled is not None:
            if self.settled.error is not None:
                say(str(self.settled.error))
                status = TIMED_OUT if isinstance(self.settled.error, ResourceLimitExceededError) else FAILED
            elif self.settled.said:
                say(self.settled.said)
            violations += self.settled.violations()
        violations += [*self.watched, *([] if self.watch is not None else outcome.counted(self.call))]
        self.error, self.found = error, violations
        if not self.given["quiet"]:
            if self.unwatched and self.watch is None:
                say(f"it could not be watched, so there are no samples of what it used: {self.unwatched}")
            self._explain(violations, error)
            if status == 1 and error is not None and "raw" in self.given:
                self._tell_unseen(error)
            if self.lost:
                more = f" and {len(self.lost) - 1} more" if self.lost[1:] else ""
                say(f"not kept, with the plugin's working directory: {self.lost[0]}{more}; to keep files, --rw DIR --chdir DIR")
        if self.result_file is not None or self.report is not None:
            self._write(status, error, violations)
        if self.given["summary"]:
            from sandbox.cli import summary

            summary.show(self, status)
        return status

    def _write(self, status: int, error: SandboxException | None, violations: list[SandboxViolation]) -> None:
        from sandbox.cli import results

        self.leave()  # whether that was clean is told too
        result = results.result_of(self, status, error, violations)
        if self.result_file is not None:
            import json

            self.result_file.write(json.dumps(result, indent=2) + "\n")
        if self.report is not None:
            from sandbox.cli import report

            self.report.write(report.page(result))

    def facts(self) -> dict[str, Any]:
        """What its row has of it, and `telemetry`: whether it is to have one."""
        return {
            "telemetry": self.recipe.monitoring["telemetry"],
            "level": self.recipe.level,
            "limits": self.limits,
            "peak_memory_mb": self.peak_memory_mb(),
            "peak_cpu_percent": self.watch.peak_cpu if self.watch is not None else 0.0,
            "sandbox_id": self.call.sandbox.name if self.call is not None else "",
        }

    def peak_memory_mb(self) -> float:
        seen = (self.call.outcome if self.call is not None else None) or {}
        return max(int(seen.get("maxrss_kb", 0)) / 1024, self.watch.peak_memory / MB if self.watch is not None else 0.0)

    def _explain(self, violations: list[SandboxViolation], error: SandboxException | None) -> None:
        if not violations and getattr(error, "explanation", None) is None:
            return
        from sandbox.cli import beside, refusals

        for line in refusals.lines(violations, error):
            say(line)
        files = ", ".join(found.name for found in beside.find(self.given))
        if files:
            say(f"what holds here is also said by {files}: psie explain --sources FILE shows which settings")

    def _tell_unseen(self, error: SandboxException) -> None:
        """Of an exception that may be one about a module, or about files among its arguments."""
        from sandbox.cli import unseen

        missing = unseen.module(error)
        if missing:
            say(missing)
            return
        names = [*self.given["args"], *unseen.wanted(error)]
        shown = [os.path.realpath(path) for path in self.given["ro"]]
        for line in unseen.lines(names, self.recipe, shown, self.directory):
            say(line)

    def _is_unfit(self) -> bool:
        """A reply was wanted, and what the function returned cannot travel."""
        return "raw" not in self.given and self.call is not None and self.call.reply_kind == channel.REPLY_UNFIT

    def _exit_code(self, error: SandboxException | None) -> int:
        from sandbox.engine import outcome

        assert self.call is not None
        if self.ended_by is not None:
            return 128 + int(self.ended_by)
        if self.reader_gone:
            return 128 + int(signal.SIGPIPE)
        code, number = outcome.exit_of(self.call)
        if isinstance(error, SecurityViolationError):
            return VIOLATED
        if isinstance(error, ResourceLimitExceededError):
            known = {"memory": OUT_OF_MEMORY, "output": OUTPUT_EXCEEDED, "cpu": 128 + int(signal.SIGXCPU)}
            known |= {"time": TIMED_OUT, "lifetime": TIMED_OUT}
            return known.get(error.limit, code or 1)
        if isinstance(error, SandboxKilledError):
            return KILLED
        if self.call.error is not None or self.call.outcome is None:
            return FAILED
        if number is not None:
            return 128 + number
        if self._is_unfit():
            return 1
        if self.interrupts and getattr(error, "exception_type", "") == "KeyboardInterrupt":
            return 128 + int(signal.SIGINT)
        if self.call.outcome.get("cause") == "killed":
            return 128 + int(signal.SIGKILL)
        return code if code is not None else FAILED


def is_plain_exception(error: SandboxException) -> bool:
    """An exception of the plugin that its own traceback on stderr has told already."""
    return bool(getattr(error, "exception_type", ""))


def is_background(fd: int) -> bool:
    """Is this a terminal that belongs to other processes just now? Reading or setting it would stop this one."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:  # ENOTTY, EIO: no terminal, or none any more
        return False


def is_pipe(fd: int) -> bool:
    """What goes there may come out on the terminal, by another process."""
    return not os.isatty(fd) and stat.S_IFMT(os.fstat(fd).st_mode) not in (stat.S_IFREG, stat.S_IFCHR)


def target(option: str, given: dict[str, Any], plugin: list[str]) -> Target | None:
    """The file that an option names, if it was given; none of the plugin's, which would be lost."""
    path = given[option.lstrip("-").replace("-", "_")]
    if path is None:
        return None
    from sandbox.cli.target import Target

    found = Target(option, path)
    if found.replaces(plugin):
        raise inputs.UsageError(f"{option} {path}: this is a file of the plugin: give another one")
    return found


def write_some(fd: int, view: memoryview) -> int:
    """One write(2); waits where the caller's descriptor is non-blocking."""
    try:
        return os.write(fd, view)
    except BlockingIOError:
        import select

        select.select([], [fd], [])
        return 0
