"""EnhancedPluginSandbox: the life of one sandbox, seen from the caller's event loop.

Thin: the recipe says what a sandbox is, `sandbox.engine` makes it, this class turns its callbacks into awaitables, its
ends into exceptions and its records into telemetry. Must not know how anything is enforced.
"""

from __future__ import annotations

import asyncio
import codecs
import concurrent.futures
import errno
import logging
import os
import sys
import uuid
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from time import monotonic

from sandbox import files, host, network, recipe, state, transport
from sandbox.config import IsolationConfig, PluginLimitsV2, PluginPermissionsV2
from sandbox.engine import board, channel, client, codec, outcome
from sandbox.engine.recording import Recorder
from sandbox.engine.service import EngineFuture, Service, Worker, service
from sandbox.errors import (
    SHORT,
    CommitError,
    PluginExecutionError,
    ResourceError,
    SandboxException,
    SandboxInitializationError,
    SecurityViolationError,
)
from sandbox.integrations import logs, observers
from sandbox.listener import Listener
from sandbox.recipe_data import confirm
from sandbox.recovery.commit import journals, recover
from sandbox.recovery.granted import GrantedChanges, deletion_violation, refuse_direct
from sandbox.remembered import Remembered
from sandbox.session import Conversation, Session
from sandbox.telemetry import KEPT, SandboxTelemetry
from sandbox.text import TerminalEscaper
from sandbox.violations import SandboxViolation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Any, TextIO, TypeVar

    from sandbox.files import FileEntry
    from sandbox.recovery.changes import FileChange

    T = TypeVar("T")
    K = TypeVar("K")
    V = TypeVar("V")

    from sandbox.engine.loop import Timer
    from sandbox.engine.recording import Recorded
    from sandbox.engine.watching import SandboxWatch
    from sandbox.monitor.network import Holder, NetworkIsolationManager
    from sandbox.monitor.watch import Watched
    from sandbox.parcels import Parcel
    from sandbox.recipe_data import Protection, Recipe
    from sandbox.recovery.measures import Recovery

MB = 1 << 20
TAIL_BYTES = 64 << 10  # of the output that are kept
LOOK_AGAIN = 0.005  # seconds
ACTIVITIES = 10_000  # network operations that are kept; further ones are only counted
LINGER = 1.0  # seconds that the process of a call may go on after its reply, then it is killed


observers.add(logs.Logs())

# The open sandboxes of this process, for SandboxRecoveryManager: a violation tells in which one it was.
live: weakref.WeakValueDictionary[str, EnhancedPluginSandbox] = weakref.WeakValueDictionary()


class EnhancedPluginSandbox:
    """A sandbox for untrusted functions: `async with` opens it, `execute_plugin_safe` runs one call in it.

    Args:
        limits: resource limits, see PluginLimitsV2 for units.
        permissions: what the plugin may do.
        config: level and switches.
        sandbox_id: a name of yours; made up if None.
        monitoring_handler: an object with any of on_resource_sample(sample), on_violation_detected(violation) and
            on_sandbox_cleanup(telemetry), called on the caller's event loop. A sample is as in sandbox.monitor.watch.Watch.
            What one raises comes out of the call, or of the end of `async with` unless the body has raised itself; where nobody
            waits for it the loop's exception handler has it. The sandbox goes all the same.
        environment: further environment variables of the plugin; the caller's own are never passed on by themselves.
        network: a NetworkIsolationManager whose network, enabled before, it shares; None for one of its own.
        read_only: host paths that the plugin may read, at the same paths, beside what its level shows.

    Each call has a fresh process in fresh namespaces; the workspace is kept between the calls of one `async with`.
    Calls may run at the same time. What the plugin prints goes to sys.stdout and sys.stderr, escaped on a terminal.
    """

    def __init__(
        self,
        limits: PluginLimitsV2,
        permissions: PluginPermissionsV2,
        config: IsolationConfig,
        sandbox_id: str | None = None,
        *,
        monitoring_handler: object = None,
        environment: Mapping[str, str] | None = None,
        network: NetworkIsolationManager | None = None,
        read_only: Sequence[str] = (),
    ) -> None:
        for name, value, kind in (
            ("limits", limits, PluginLimitsV2),
            ("permissions", permissions, PluginPermissionsV2),
            ("config", config, IsolationConfig),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"EnhancedPluginSandbox: {name} is a {type(value).__name__}: give a {kind.__name__}")
        if sandbox_id is not None and (not isinstance(sandbox_id, str) or not sandbox_id or "\0" in sandbox_id):
            raise ValueError("EnhancedPluginSandbox: sandbox_id is not a text: give a name, or None for one made up")
        self.limits = limits
        self.permissions = permissions
        self.config = config
        self.sandbox_id = sandbox_id if sandbox_id is not None else f"sandbox-{uuid.uuid4().hex[:12]}"
        self.environment = checked_environment("EnhancedPluginSandbox", environment)
        self.monitoring_handler = monitoring_handler
        self.network = network
        if isinstance(read_only, str):
            raise TypeError("EnhancedPluginSandbox: read_only is a str: give a list of paths")
        self.read_only = tuple(read_only)
        self.recipe: Recipe | None = None
        self._read_back: dict[str, str] = {}
        self._telemetry = SandboxTelemetry(sandbox_id=self.sandbox_id, plugin_id="", start_time=datetime.now(UTC))
        self._service: Service | None = None
        self._sandbox: client.Sandbox | None = None
        self._wire: dict[str, Any] = {}
        self._opened = 0.0
        self._is_opening = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()  # by the engine's thread, to the loop
        self._standby: _Run | None = None
        self._gone: concurrent.futures.Future[None] | None = None
        self._watch: SandboxWatch | None = None  # the engine thread's
        self._counted: dict[str, int] = {}  # before there was one
        self._recorder: Recorder | None = None  # likewise
        self._running = 0  # calls
        self._ending: dict[_Run, Remembered] = {}  # calls that have replied, and have not gone yet
        self._busy = ""  # what goes on with granted folders meanwhile
        self._tainted = ""  # the violation for which changes of granted folders are not kept
        self._deletions: set[str] = set()  # in granted folders, told already
        self._resolved: dict[str, Any] = {}  # what names in allowed_hosts stood for when it was opened
        self._recovery: Recovery | None = None  # likewise
        self._activity: list[dict[str, Any]] = []
        self._operations: dict[str, int] = {}  # of the network, by call
        self._output_tail = bytearray()
        self._is_told = False  # its observers that it is open
        self._is_given_up = False  # before there was a sandbox that could be closed
        self._waits_for_room = False
        self._door = "library"  # by which it was opened, for those who look from outside
        self._is_recorded = True  # each call: not where whoever uses it does that
        self._returns_early = True  # a call, with its value: not where what it does later could be seen, or has to be judged
        self._has_told = False  # that they cannot be
        self._plain_limits: dict[str, Any] = {}  # as they were when it was opened
        self._call_instruction: dict[str, object] = {}  # once it is open
        self._plugins: dict[int, str] = {}  # names, by call
        self._was_beyond = False  # whether a call was killed for more violations than the threshold
        self._on_taint: Callable[[GrantedChanges], None] | None = None  # sees the changes before they are discarded

    # -- life --------------------------------------------------------------------------------------------------------

    @classmethod
    async def prewarm(
        cls, count: int, limits: PluginLimitsV2, permissions: PluginPermissionsV2, config: IsolationConfig
    ) -> int:
        """Have `count` sandboxes with these settings stand ready, so that those who open so many at once need not wait.

        They are kept ready until they have not been used for half a minute. Returns how many stand: fewer where a bound on
        sandboxes or their memory is reached, none where settings name what is the caller's (allowed_directories, host names),
        or with PSIE_STANDING=0. Raises as `__aenter__`, and ValueError.
        """
        return await asyncio.wrap_future(prewarmed(count, limits, permissions, config))

    async def __aenter__(self) -> EnhancedPluginSandbox:
        """Open the sandbox; its first worker then stands sealed and read back.

        Raises:
            SandboxInitializationError: the level cannot be had here, or a line of the set-up failed.
            ResourceError: a bound on sandboxes or their memory would be passed, or a resource of the host is missing.
            ValueError: settings contradict each other.
            RuntimeError: it has been opened before, or `network` is not enabled.
        """
        if self._sandbox is not None or self._is_opening:
            raise RuntimeError(f"sandbox {self.sandbox_id} has been opened before: use a new EnhancedPluginSandbox")
        self._is_opening = True
        try:
            await self._opens()
        except SandboxException as error:
            if observers.active:
                observers.tell("refused", self, error)
            raise
        finally:
            self._is_opening = False
        if observers.active:
            self._is_told = True
            observers.tell("opened", self)
        return self

    async def _opens(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._gone, self._is_given_up = None, False
        holder = self.network.holder if self.network is not None else None
        self.recipe, wire, self._plain_limits = compiled(self.config, self.limits, self.permissions, self.read_only)
        if holder is not None and holder.in_user_namespace and not self.recipe.outer_user_namespace:
            raise SandboxInitializationError(
                "without root a sandbox of level minimal has no user namespace from which it could join a network",
                protection="network namespace",
                mend="use level standard, or leave out network",
            )
        if any(folder["kind"] != "read" for folder in self.recipe.granted):
            self._returns_early = False
        if self.recipe.granted and journals():
            await asyncio.to_thread(recover)
        if self.recipe.network["looks"]:
            self._resolved = await asyncio.to_thread(network.resolve, self.recipe.network["access"])
        if self._is_given_up:
            raise ResourceError(client.CLOSED)
        self._telemetry.start_time, self._opened = datetime.now(UTC), monotonic()
        self._service = service()
        self._gone = promise()
        self._standby = _Run(self)
        try:
            if holder is not None or not self._take(wire, self._standby):
                self._service.post(self._open, wire, self._standby, holder)
            await self._standby.stands()
            self._call_instruction = self._instruction("call")
            self._service.post(self._recording_opens)
            live[self.sandbox_id] = self
            self._read_back = self._standby.call.read_back or {}
        except BaseException:
            await self._close_after_error()
            raise

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """Close the sandbox: running calls are killed, the workspace goes, and nothing is left."""
        if exc_val is None:
            await self._close()
        else:
            await self._close_after_error()

    async def _close_after_error(self) -> None:
        """Close it and raise nothing in place of what is raised already, which may be a cancellation."""
        if running_loop() is None:  # its coroutine is thrown away, and its loop has gone: nobody can wait
            with suppress(ResourceError):  # a fork
                self._post(self._shut)
            return
        try:
            await self._close()
        except Exception as error:
            told = {"message": f"sandbox {self.sandbox_id}: raised when it was closed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(told)

    async def cleanup_sandbox(self) -> bool:
        """Close the sandbox now; True when nothing of it is left (also when it was closed before)."""
        return await self._close()

    def _take(self, wire: dict[str, Any], standby: _Run) -> bool:
        """Take a worker that stands ready, without a visit to the engine's thread; False if there is none."""
        assert self._service is not None
        assert self.recipe is not None
        worker = self._service.take(wire)
        if worker is None:
            return False
        self._wire = wire
        self._sandbox = worker.sandbox
        self._attach(worker.sandbox)
        standby.use(worker)
        self._service.post(self._service.touch, self.recipe, wire)
        self._service.post(worker.sandbox.begin_lifetime)
        if worker.sandbox.is_gone:
            self._finished()
        return True

    def _open(self, wire: dict[str, Any], standby: _Run, holder: Holder | None, *, again: bool = True) -> None:
        """In the engine's thread: open the sandbox and start its first worker."""
        assert self._service is not None
        assert self.recipe is not None
        self._waits_for_room = False
        if self._is_given_up:  # while room was made for it
            self._refuse(standby, ResourceError(client.CLOSED))
            return
        try:
            worker = self._service.open(self.recipe, wire, self._resolved, holder)
        except Exception as raised:  # whatever it is, the caller waits for a word
            error = no_start(raised)
            is_short = isinstance(error, ResourceError)
            self._waits_for_room = is_short and again
            if self._waits_for_room and self._service.give_way(lambda: self._open(wire, standby, holder, again=False)):
                return  # what stood ready for others has gone to make room
            self._refuse(standby, error)
            return
        self._sandbox = worker.sandbox
        self._wire = wire
        self._attach(worker.sandbox)
        worker.sandbox.begin_lifetime()
        standby.use(worker)
        if self._sandbox.is_gone:
            self._finished()

    def _attach(self, opened: client.Sandbox) -> None:
        opened.line.know(name=self.sandbox_id[: board.NAME_LENGTH], door=self._door)
        opened.line.tell(board.OPEN)
        opened.on_gone = self._finished
        opened.on_network = lambda fields: self._tell(self._network_operation, fields)

    def _refuse(self, standby: _Run, error: SandboxException) -> None:
        standby.refuse(error)
        self._finished()

    def _post(self, callback: Callable[..., Any], *args: Any) -> None:
        assert self._service is not None
        self._service.post(callback, *args)

    def _finished(self) -> None:
        """In the engine's thread: all of it has gone."""
        assert self._gone is not None
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._recorder is not None:
            self._recorder.close(look=False)
        if not self._gone.done():
            self._gone.set_result(None)
        if self._sandbox is not None and self._service is not None:
            self._service.loop.call_later(0, self._service.refill, self._wire)

    def _recording_begins(self, call: client.Call) -> Recorded | None:
        """In the engine's thread: a call is about to be sent its job."""
        self._recording_opens()
        return self._recorder.begin(call) if self._recorder is not None else None

    def _recording_opens(self) -> None:
        """In the engine's thread: what lies in the workspace is known before a call is waited for."""
        if self._sandbox is None or self._sandbox.closing or self._sandbox.recipe.monitoring["recording"] == "none":
            return
        if self._recorder is None:
            self._recorder = Recorder(self._sandbox)
            self._recorder.on_violation = self._seen
        self._recorder.open()

    def _recording_catches_up(self) -> None:
        """In the engine's thread: a call has a value, and what it has done until now counts."""
        if self._recorder is not None:
            self._recorder.catch_up()

    def _recording_ends(self, run: Recorded) -> None:
        """In the engine's thread: the call has ended."""
        if self._recorder is not None:
            self._recorder.end(run)

    def _watch_begins(self) -> Watched | None:
        """In the engine's thread: a call has run for a while."""
        if self._sandbox is None or self._sandbox.closing:
            return None
        if self._recorder is not None:
            self._recorder.watch()
        if self._watch is None:
            from sandbox.engine.watching import SandboxWatch

            self._watch = SandboxWatch(self._sandbox)
            self._watch.on_sample = lambda sample: self._tell(self._sampled, sample)
            self._watch.on_violation = self._seen
            self._watch.counted = self._counted
        return self._watch.begin()

    def _watch_ends(self, run: Watched) -> None:
        """In the engine's thread: the call has ended, its cgroup is there still."""
        if self._watch is not None:
            self._watch.end(run)

    def _count(self, seen: Mapping[str, Any]) -> None:
        """In the engine's thread: what a call that nobody watched has counted is no news for the next watch."""
        counted = self._watch.counted if self._watch is not None else self._counted
        for name, value in seen.items():
            if name.partition(" ")[0] in outcome.COUNTED:
                counted[name] = counted.get(name, 0) + int(value)

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        """Call back on the caller's loop, one after the other."""
        assert self._loop is not None
        self._told.append((callback, args))
        try:
            self._loop.call_soon_threadsafe(self._hear)
        except RuntimeError:
            self._told.clear()  # it is closed: nobody listens any more

    def _hear(self) -> None:
        """On the caller's loop: what has been told so far."""
        while self._told:
            callback, args = self._told.popleft()
            callback(*args)

    def _sampled(self, sample: dict[str, Any]) -> None:
        if self.config.telemetry_enabled:
            self._telemetry.resource_samples.append(sample)
            del self._telemetry.resource_samples[:-KEPT]
        self._notify("on_resource_sample", sample)

    def _seen(self, violation: SandboxViolation) -> None:
        """In the engine's thread: a violation that is none of one call alone."""
        self._react(violation)
        self._tell(self._violated, violation)

    def _violated(self, *violations: SandboxViolation) -> None:
        """All are on record before the first is told: a handler may raise."""
        for violation in violations:
            violation.details["sandbox_id"] = self.sandbox_id
            self._telemetry.violations.append(violation)
            if observers.active:
                observers.tell("violation", self, violation)
        for violation in violations:
            self._notify("on_violation_detected", violation)

    def _network_operation(self, fields: dict[str, str]) -> None:
        if fields["operation"] != "resolve":  # those come from the interpreter, and go nowhere
            count = int(fields["count"])
            self._telemetry.network_operations_count += count - self._operations.get(fields["call"], 0)
            remember(self._operations, fields["call"], count)
        record = outcome.activity(fields)
        if len(self._activity) < ACTIVITIES:
            self._activity.append(record)
        if self.network is not None:
            self.network.record(self.sandbox_id, record)

    @property
    def _longest(self) -> float:
        """Seconds after which even the zygote has been killed, if something was not done."""
        return self.config.watchdog_timeout_seconds + 3 * client.GRACE

    @property
    def _endings(self) -> list[_Run]:
        """Calls that have replied and have not gone yet; none in a fork of the caller, where nobody is told that they go."""
        if self._service is None or os.getpid() != self._service.pid:
            return []
        return list(self._ending)

    async def _ends(self) -> None:
        """Wait until calls that have replied have gone."""
        for run in self._endings:
            await run.ends()

    def _see_ends(self) -> None:
        """The same for who cannot wait otherwise: it takes some milliseconds."""
        if self._service is not None and self._service.loop.is_here():
            return
        for run in self._endings:
            run.wait_for_end(self._longest)
            if running_loop() is self._loop:
                self._hear()
            self._ended(run)

    def _tell_end(self, run: _Run) -> None:
        assert self._loop is not None
        if self._loop.is_closed():
            self._ended(run)  # it is remembered all the same
        else:
            self._tell(self._ended, run)

    def _ended(self, run: _Run) -> None:
        """All of a call that had replied before has gone."""
        remembered = self._ending.pop(run, None)
        if remembered is not None:
            self._record(run, remembered)

    async def _close(self) -> bool:
        if self._gone is None or self._service is None:
            self._is_given_up = self._is_opening
            return True

        try:
            try:
                await self._ends()
            finally:
                self._service.post(self._shut)
            clean = True
            try:
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._gone)), self._longest)
            except TimeoutError:
                clean = False
        except asyncio.CancelledError:
            self._gone.add_done_callback(lambda _: self._tell(self._has_gone, True))  # it goes all the same
            raise
        self._has_gone(clean)
        return clean

    def _shut(self) -> None:
        """In the engine's thread: end it. Whoever opened it may have been interrupted by a signal's exception, at any place."""
        assert self._gone is not None
        if self._sandbox is None:
            self._is_given_up = True
            if not self._waits_for_room:
                self._finished()
            return
        self._sandbox.on_gone = self._finished
        try:
            if self._recorder is not None:
                self._recorder.close(look=not self._sandbox.closing)
        finally:
            self._sandbox.close()
            if self._sandbox.is_gone and not self._gone.done():
                self._finished()

    def _has_gone(self, clean: bool) -> None:
        try:
            self._see_ends()
        finally:  # a handler may raise
            self._count_operations()
            if not self._telemetry.cleanup_successful:
                self._telemetry.cleanup_successful = clean
                if self._is_told:
                    self._is_told = False
                    observers.tell("closed", self, clean)
                self._notify("on_sandbox_cleanup", self._telemetry)

    # -- calls -------------------------------------------------------------------------------------------------------

    async def execute_plugin_safe(self, /, plugin_function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `plugin_function(*args, **kwargs)` in the sandbox and return its value.

        If its first parameter is called `env` or `environment` it gets a dict first: sandbox_id, temp_directory,
        data_directory, logs_directory, config, limits, permissions. An `async def` function is awaited inside. What can
        come back is listed in `sandbox.engine.codec`. Cancelling the awaiting task kills the call. A keyword of its own that is
        called plugin_function goes with it in a functools.partial.

        The value comes when it is there. Its process and all below it then have a second to be gone; whoever looks at the
        workspace, telemetry or records, calls again or closes the sandbox sees the state after its end. Where it may change
        granted folders, or `temp_directory` has been asked for, the value comes after that end.

        Raises:
            PluginExecutionError: the plugin raised, or died, or something cannot travel in or out.
            SecurityViolationError: a protection ended it, or violation_threshold was passed.
            ResourceLimitExceededError: a limit struck; `.limit` says which.
            SandboxInitializationError: a fresh worker could not be set up.
            RuntimeError: the sandbox is not open.
        """
        return await self._call(plugin_function, args, kwargs)

    async def _call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same, also for a keyword that is called plugin_function."""
        self._check_open()
        instruction, parcel, payload = self._job(function, args, kwargs)
        with Remembered(self, parcel.name) as remembered:
            call = await self._execute(remembered, parcel.file, instruction, payload)
            return self._value(call, transport.PlainTypes(function, args))

    def session(self, setup_fn: Callable[[], Any] | None = None, *, max_calls: int | None = None) -> Session:
        """A process that serves many calls, with its state kept between them: `async with sandbox.session() as session`.

        Args:
            setup_fn: is called first, in each process that the session has; what it returns goes to functions whose first
                parameter is called `state`.
            max_calls: after so many calls a fresh process takes over; None: never.

        See Session. Raises TypeError, ValueError.
        """
        return Session(self, setup_fn, max_calls=max_calls)

    async def execute_file(self, name: str, source: bytes, job: Mapping[str, object]) -> Any:
        """Load a file that the sandbox sees as a module, call a function of it, and return its value.

        Args:
            name: of the plugin, for the telemetry.
            source: content of the file, which is what is executed.
            job: `path` of the file, `folder` for sys.path, `module` (its name), `functions` of which the first that there is
                is called. It gets the dict that `execute_plugin_safe` gives if its first parameter is called env or
                environment, and nothing else.

        Raises as `execute_plugin_safe` does.
        """
        self._check_open()
        instruction = {**self._instruction("function"), **job, "env": self._environment(), "args": [], "kwargs": {}}
        with Remembered(self, name) as remembered:
            call = await self._execute(remembered, "", instruction, source)
            return self._value(call, {})

    def _check_open(self) -> None:
        sandbox = self._sandbox
        is_closed = sandbox is None or (sandbox.is_gone and sandbox.error is None)  # with an error each call is told that
        if is_closed or self.recipe is None:
            raise RuntimeError(f"sandbox {self.sandbox_id} is not open: use it inside `async with`")
        if self._busy:
            raise RuntimeError(f"sandbox {self.sandbox_id}: {self._busy}: wait until that is done")

    async def _execute(
        self,
        remembered: Remembered,
        file: str,
        instruction: dict[str, object],
        payload: bytes,
        conversation: Conversation | None = None,
    ) -> client.Call:
        """Run a job to its end, of a session if there is a conversation; changes of granted folders are discarded if that is
        a violation."""
        self._running += 1
        try:
            return await self._run_job(remembered, file, instruction, payload, conversation)
        except SecurityViolationError as error:
            self._taint(error)
            raise
        finally:
            self._running -= 1
            if self._tainted and not self._running and self._has_layers():
                await self._busy_with("changes are being discarded", self._discard_tainted())
                self._tainted = ""

    def _taint(self, error: SandboxException | None) -> None:
        """A call has ended so."""
        if isinstance(error, SecurityViolationError):
            self._tainted = str(error).splitlines()[0]

    async def _discard_tainted(self) -> None:
        if self._on_taint is not None:
            with self._in_engine(lambda: GrantedChanges(self._opened_sandbox())) as granted:
                await asyncio.to_thread(self._on_taint, granted)
        await self._renew(keep=False)

    async def _run_job(
        self,
        remembered: Remembered,
        file: str,
        instruction: dict[str, object],
        payload: bytes,
        conversation: Conversation | None,
    ) -> client.Call:
        if self._ending:
            await self._ends()  # limits of a worker are reckoned by the calls that there are when it starts
        run, self._standby = self._standby or _Run(self), None
        self._telemetry.plugin_id = remembered.name
        try:
            if run.worker is None and not run.has_stood:
                self._post(run.start)
            if not run.has_stood:
                await run.stands()
        except BaseException:  # also a signal's, at any place
            with suppress(ResourceError):  # a fork
                self._post(run.give_up)
            raise
        remembered.call = run.call
        remember(self._plugins, run.call.number, remembered.name)
        run.call.sandbox.line.is_about(remembered.name)
        run.call.source_file = file
        try:
            await run.execute(instruction, payload, conversation)
        finally:
            if run.has_value:
                self._ending[run] = remembered
                run.then(lambda: self._tell_end(run))
            else:
                outcome.locate(run.call, run.violations)
                try:
                    self._record(run, remembered)
                except Exception:  # a handler's of the caller's, who is told that in place of how the call ended
                    self._taint(outcome.judge(run.call, run.violations) if run.call.outcome is not None else None)
                    raise
        if run.has_value:
            return run.call
        self._was_beyond = self._was_beyond or run.call.cause == "violations"
        error = outcome.judge(run.call, run.violations)
        is_violation = isinstance(error, SecurityViolationError)
        if self._has_layers() and not self.permissions.allow_file_deletion and not is_violation and self._running == 1:
            await self._see_deletions()
        if error is not None:
            self._telemetry.exit_reason = str(error).splitlines()[0]
            raise error
        return run.call

    def _job(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, object], Parcel, bytes]:
        if not callable(function):
            raise TypeError(f"execute_plugin_safe: a {type(function).__name__} cannot be called: give a function")
        assert self.recipe is not None
        path = self.recipe.interpreter["path"]
        parcel = transport.parcel(function, path)
        if parcel.wish == "env":
            args = (self._environment(), *args)
        is_plain = transport.is_plain(args, kwargs)
        plain = (args, kwargs) if is_plain else None
        if not self._call_instruction:
            self._call_instruction = self._instruction("call")
        payload = transport.sealed(parcel, function, path) if is_plain else transport.pack(function, args, kwargs, path)
        what = {"coroutine": parcel.is_coroutine, "plain": plain, "alone": is_plain and parcel.stands_alone}
        return {**self._call_instruction, **what}, parcel, payload

    def _instruction(self, kind: str) -> dict[str, object]:
        """What every job of this sandbox says."""
        assert self.recipe is not None
        own = {name: value.replace("{folder}", self._folder()) for name, value in self.recipe.environment.items()}
        wanted = {**own, **self.environment}
        return {
            "kind": kind,
            "cwd": self._workspace_path(),
            "environment": wanted if wanted != self.recipe.environment else None,
            "allowed_modules": self.recipe.modules["allowed"],
            "blocked_modules": self.recipe.modules["blocked"],
            "hosts": network.for_python(self.recipe, self._resolved),
            "max_bytes": int(self.recipe.limits["result_bytes"]),
        }

    def _workspace_path(self) -> str:
        """As the plugin sees it."""
        assert self.recipe is not None
        return str(self.recipe.workspace["path"]).replace("{folder}", self._folder())

    def _folder(self) -> str:
        return (self._sandbox.folder if self._sandbox is not None else None) or ""

    def _environment(self) -> dict[str, Any]:
        assert self.recipe is not None
        workspace = self._workspace_path()
        temporary = "/tmp" if "mnt" in self.recipe.namespaces else workspace
        return {
            "sandbox_id": self.sandbox_id,
            "temp_directory": temporary,
            "data_directory": workspace,
            "logs_directory": workspace,
            "config": _plain(asdict(self.config)),
            "limits": _plain(asdict(self.limits)),
            "permissions": _plain(asdict(self.permissions)),
        }

    def _value(self, call: client.Call, types: Mapping[str, type]) -> Any:
        if call.reply_kind != channel.REPLY_VALUE or not call.reply_complete:
            self._telemetry.exit_reason = "no reply"
            raise outcome.no_reply(call, "the plugin", "returning")
        try:
            value = codec.decode(call.reply, max_bytes=call.reply_limit, types=types)
        except codec.CodecError as error:
            raise PluginExecutionError(f"the reply of the plugin is not one: {error}", exception_type="CodecError") from None
        self._telemetry.exit_reason = "returned"
        return value

    def _record(self, run: _Run, remembered: Remembered) -> None:
        """Of a call that has ended. Where a handler of the caller's raises, it is remembered all the same."""
        try:
            self._measure(run, remembered)
            self._see_violations(run)
        finally:
            remembered.ends()

    def _measure(self, run: _Run, remembered: Remembered) -> None:
        telemetry = self._telemetry
        telemetry.end_time = telemetry.start_time + timedelta(seconds=monotonic() - self._opened)  # a clock may be set
        seen = run.call.outcome or {}
        telemetry.exit_code = outcome.exit_of(run.call)[0]
        peaks = [int(seen.get("maxrss_kb", 0)) / 1024, float(seen.get("used", 0)) / MB]
        remembered.peak_memory_mb = max(peaks)
        watch = self._watch
        if watch is not None:
            peaks.append(watch.peak_memory / MB)
            if run._watched is not None:  # else it has seen other calls
                remembered.peak_memory_mb, remembered.peak_cpu_percent = max(peaks), watch.peak_cpu
            telemetry.peak_cpu_percent = max(telemetry.peak_cpu_percent, watch.peak_cpu)
            if self.config.telemetry_enabled:
                telemetry.process_hierarchy = list(watch.hierarchy)
        for name, value in outcome.link_counters(run.call).items():
            telemetry.link_counters[name] = telemetry.link_counters.get(name, 0) + value
        self._count_operations()
        if run._watched is None:
            self._violated(*outcome.counted(run.call))
        telemetry.peak_memory_mb = max(telemetry.peak_memory_mb, *peaks)

    def _count_operations(self) -> None:
        if self._recorder is not None:
            self._telemetry.file_operations_count = self._recorder.count

    def _see_violations(self, run: _Run) -> None:
        known = {id(violation) for violation in self._telemetry.violations}
        self._violated(*(violation for violation in run.violations if id(violation) not in known))

    def _notify(self, name: str, value: object) -> None:
        handler = getattr(self.monitoring_handler, name, None)
        if handler is None:
            return
        if running_loop() is None and self._loop is not None and not self._loop.is_closed():
            self._tell(handler, value)  # another thread has looked
        else:
            handler(value)

    # -- recovery ----------------------------------------------------------------------------------------------------

    def get_recovery_history(self) -> list[dict[str, Any]]:
        """What has been done about violations so far, step by step, oldest first, by itself (auto_recovery_enabled) or by a
        SandboxRecoveryManager: each as SandboxRecoveryManager.get_recovery_history has it."""
        self._see_ends()
        return list(self._recovery.history) if self._recovery is not None else []

    def _recover(self, violation: SandboxViolation, *, end: bool = False) -> concurrent.futures.Future[bool] | None:
        """Begin to do what there is to be done about a violation, or with `end` to end its calls for it.

        For SandboxRecoveryManager. Returns a Future of whether that worked; None where the sandbox is not open.
        """
        if self._service is None or self._sandbox is None or self._sandbox.closing:
            return None
        worked: EngineFuture[bool] = EngineFuture()
        worked.set_running_or_notify_cancel()

        def begin() -> None:
            if self._sandbox is None or self._sandbox.closing:
                worked.set_result(False)
            else:
                self._recoveries(self._sandbox).recover(violation, worked.set_result, end=end)

        self._post(begin)
        return worked

    def _plugin_of(self, violation: SandboxViolation) -> str:
        """The plugin whose call a violation was in, or the only one that there was; "" where that cannot be told."""
        names = set(self._plugins.values())
        if str(violation.details.get("call", "")).isdecimal():
            names = {self._plugins.get(int(violation.details["call"]), "")}
        return names.pop() if len(names) == 1 else ""

    def _recoveries(self, sandbox: client.Sandbox) -> Recovery:
        """In the engine's thread."""
        if self._recovery is None:
            from sandbox.recovery.measures import Recovery

            self._recovery = Recovery(sandbox, self.sandbox_id)
            self._recovery.on_step = lambda step: observers.tell("recovered", step)
            self._recovery.discard = lambda: self._on_loop(self._discard) if self._has_layers() else None
            if self.config.telemetry_enabled:
                self._recovery.evidence = lambda violation: self._on_loop(self._keep_evidence, violation)
        return self._recovery

    def _react(self, violation: SandboxViolation, offences: int = 0) -> None:
        """In the engine's thread: `violation` has just been seen, of `offences` in its call."""
        if self.config.auto_recovery_enabled and self._sandbox is not None and not self._sandbox.closing:
            self._recoveries(self._sandbox).automatic(violation, offences)

    def _on_loop(
        self, work: Callable[..., Coroutine[Any, Any, dict[str, Any]]], *args: Any
    ) -> concurrent.futures.Future[dict[str, Any]] | None:
        """Have `work(*args)` done on the caller's loop; None where that is closed."""
        assert self._loop is not None
        if self._loop.is_closed():
            return None
        return asyncio.run_coroutine_threadsafe(work(*args), self._loop)

    async def _discard(self) -> dict[str, Any]:
        """Have changes of granted folders discarded: now, or when the calls that run have ended.

        A commit that goes on cannot be stopped: what there is after it is discarded, not what a later call will change.
        """
        while self._busy:
            await asyncio.sleep(LOOK_AGAIN)
        if self._running:
            self._tainted = self._tainted or "recovery discards them"
            return {"before": {"are_kept": True}, "after": {"are_kept": False}}
        before = await asyncio.to_thread(self._changed)
        await self.discard_changes()
        return {"before": before, "after": await asyncio.to_thread(self._changed)}

    def _changed(self) -> dict[str, Any]:
        with self._in_engine(lambda: GrantedChanges(self._opened_sandbox())) as granted, self._workspace() as root:
            room = os.fstatvfs(root)
            return {"changes": len(granted.found()), "quota_mb": room.f_blocks * room.f_frsize / MB}

    async def _keep_evidence(self, violation: SandboxViolation) -> dict[str, Any]:
        from sandbox.recovery import records

        found = records.Evidence()
        found.samples = list(self._telemetry.resource_samples)
        found.recipe = self.recipe.to_dict() if self.recipe is not None else {}
        found.output_tail = self.output_tail

        def keep() -> str:
            if self._has_layers():
                with self._in_engine(lambda: GrantedChanges(self._opened_sandbox())) as granted:
                    found.take_granted(granted)
            found.take_workspace(self)
            return found.keep(self.sandbox_id, [*self._telemetry.violations, violation])

        return {"evidence": await asyncio.to_thread(keep)}

    # -- files -------------------------------------------------------------------------------------------------------

    def changes(self) -> list[FileChange]:
        """What calls have changed in the allowed directories so far: nothing of it is in those yet (from level standard up).

        Raises:
            RuntimeError: the sandbox is not open, or a call is running.
        """
        with self._granted() as granted:
            return granted.found()

    def diff(self, path: str) -> str:
        """A unified diff of one changed file; `path` as in `changes`. Names and lines are the plugin's: escape them.

        Raises:
            ValueError: nothing has changed there.
            RuntimeError: as for `changes`.
        """
        with self._granted() as granted:
            return granted.diff(path)

    async def commit_changes(self, paths: Iterable[str] | None = None) -> list[FileChange]:
        """Make the changes in the allowed directories real: all, or those at and below `paths`; returns them.

        All or nothing: also when this process is killed in the middle, after which `psie gc`, or the next sandbox with
        granted folders, finishes or undoes it. The other changes are kept for later.

        Raises:
            CommitError: one cannot be committed (a link that leads out, a FIFO, a deletion that is not permitted), or a
                file has been changed on the host meanwhile, or a violation ended a call. Then nothing was committed.
            ValueError: nothing has changed at one of `paths`.
            RuntimeError: as for `changes`.
        """
        if self._tainted:
            raise CommitError(f"a violation ended a call, so its changes are not kept: {self._tainted}")
        granted = self._granted()
        try:
            self._refuse_direct()
        except CommitError:
            granted.close()
            raise
        return await self._busy_with("changes are being committed", self._commit(granted, paths))

    def _refuse_direct(self) -> None:
        if self.recipe is not None and any(folder["kind"] == "direct" for folder in self.recipe.granted):
            refuse_direct()

    async def _commit(self, granted: GrantedChanges, paths: Iterable[str] | None) -> list[FileChange]:
        told = await asyncio.to_thread(carry_out, granted, None if paths is None else list(paths))
        await self._renew(keep=paths is not None)
        return told

    async def _busy_with(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """No call begins meanwhile; a cancellation waits for the end of it, because it cannot be stopped half-way."""

        self._busy = what

        async def act() -> T:
            try:
                return await work
            finally:
                self._busy = ""

        return await finished(act())

    async def discard_changes(self) -> None:
        """Forget what was changed in the allowed directories.

        Raises:
            CommitError: at level minimal, where they were written directly.
            RuntimeError: as for `changes`.
        """
        self._granted().close()
        self._refuse_direct()
        await self._busy_with("changes are being discarded", self._renew(keep=False))
        self._tainted = ""

    def read_file(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """The content of a regular file of the workspace; `path` is relative to it.

        Raises:
            OSError: there is none, a link is on the way (ELOOP), or it is larger than `max_bytes` (EFBIG), which is
                max_file_size_mb if None.
            ValueError: `path` leads out of the workspace.
            RuntimeError: the sandbox is not open.
        """
        with self._workspace() as root:
            most = max_bytes if max_bytes is not None else int(self._limit("file_bytes"))
            return files.read(root, path, most)

    def write_file(self, path: str, data: bytes | str) -> None:
        """Make or replace a file of the workspace, and the folders on its way; text becomes UTF-8.

        Raises:
            OSError: a link is on the way (ELOOP), it is no regular file, there is no room (ENOSPC, max_disk_usage_mb), or
                `data` is larger than max_file_size_mb (EFBIG).
            TypeError: `data` is neither bytes nor text.
            ValueError, RuntimeError: as for `read_file`.
        """
        if not isinstance(data, (str, bytes, bytearray, memoryview)):
            raise TypeError(f"write_file: data is a {type(data).__name__}: give bytes or a text")
        content = data.encode() if isinstance(data, str) else bytes(data)
        with self._workspace() as root, self._unrecorded(files.checked(path)):
            if len(content) > self._limit("file_bytes"):
                raise OSError(errno.EFBIG, f"larger than {self._limit('file_bytes'):g} bytes (max_file_size_mb)", path)
            assert self._sandbox is not None
            uid, gid = self._sandbox.owner
            files.write(root, path, content, (uid, gid) if os.getuid() == 0 else None)

    def list_files(self, path: str = "") -> list[FileEntry]:
        """Everything in the workspace, or in a folder of it, sorted by path; a folder that cannot be looked into `hides`.

        Raises:
            OSError: there is no such folder, it cannot be looked into, or this process lacks a descriptor for one in it.
            ValueError, RuntimeError: as for `read_file`.
        """
        with self._workspace() as root:
            return files.listed(root, path)

    def _limit(self, name: str) -> float:
        return self.recipe.limits[name] if self.recipe is not None else 0.0

    def _has_layers(self) -> bool:
        return self._sandbox is not None and self._sandbox.layers is not None and not self._sandbox.closing

    def _granted(self) -> GrantedChanges:
        """Descriptors, taken where the sandbox cannot be closed meanwhile."""
        if self._sandbox is None or self._sandbox.closing:
            raise RuntimeError(f"sandbox {self.sandbox_id} is not open: it has no changes")
        if self._running or self._busy:
            what = self._busy or "a call is running"
            raise RuntimeError(f"sandbox {self.sandbox_id}: {what}: changes can be looked at when that is done")
        return self._in_engine(lambda: GrantedChanges(self._opened_sandbox()))

    @contextmanager
    def _workspace(self) -> Iterator[int]:
        """A descriptor of the workspace's root."""
        self._see_ends()
        root = self._in_engine(lambda: self._opened_sandbox().open_workspace())
        try:
            yield root
        finally:
            os.close(root)

    @contextmanager
    def _unrecorded(self, path: str) -> Iterator[None]:
        """What is done at `path` in the workspace is no operation of a plugin's."""
        recorder = self._recorder
        if recorder is None:
            yield
            return
        self._in_engine(lambda: recorder.host_writes(path))
        try:
            yield
        finally:
            self._in_engine(lambda: recorder.host_has_written(path))

    def _opened_sandbox(self) -> client.Sandbox:
        """For the engine's thread. Its lifetime counts before the timer for it has been served: this process may have been
        stopped, and go on with what was posted meanwhile."""
        if self._sandbox is None or self._sandbox.closing or not self._sandbox.seconds_left():
            raise RuntimeError(f"sandbox {self.sandbox_id} is not open: use it inside `async with`")
        return self._sandbox

    def _in_engine(self, action: Callable[[], T]) -> T:
        """Its result, from the engine's thread, which never waits for ours; what it does not begin in time is not done."""
        if self._service is None:
            raise RuntimeError(f"sandbox {self.sandbox_id} is not open: use it inside `async with`")
        future: EngineFuture[T] = EngineFuture()

        def act() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        self._service.post(act)
        try:
            return future.result(client.GRACE)
        except TimeoutError:
            if future.cancel():
                raise
            return future.result()

    async def _renew(self, *, keep: bool) -> None:
        """Have the granted folders attached anew; where the sandbox comes to its end meanwhile, that is the same."""
        if not self._has_layers():
            return
        self._standby = None  # it has the folders as they were
        renewed = promise()
        assert self._gone is not None

        def begin() -> None:
            sandbox = self._sandbox
            if sandbox is None or sandbox.closing:
                renewed.set_result(None)
                return
            if self._recorder is not None:
                self._recorder.close(look=True)
            sandbox.on_renewed = lambda: None if renewed.done() else renewed.set_result(None)
            sandbox.renew(keep=keep)

        self._in_engine(begin)
        waiting = [asyncio.wrap_future(future) for future in (renewed, self._gone)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        self._deletions.clear()

    async def _see_deletions(self) -> None:
        """What was deleted in granted folders without permission: a violation each, and it will not be committed."""
        try:
            granted = self._in_engine(lambda: GrantedChanges(self._opened_sandbox()))
        except RuntimeError:
            return  # it has come to its end meanwhile, which its caller is to be told of: nothing is committed any more
        for path in await finished(asyncio.to_thread(deletions, granted)):
            if path not in self._deletions:
                self._deletions.add(path)
                self._violated(deletion_violation(path))

    # -- what is known -----------------------------------------------------------------------------------------------

    def get_telemetry(self) -> SandboxTelemetry:
        """What was measured so far. Works before, between and after calls."""
        self._see_ends()
        self._count_operations()
        return self._telemetry

    def get_file_operations(self) -> list[dict[str, Any]]:
        """What calls have done so far to the files of the workspace and of allowed directories, oldest first.

        At most 10,000 records, as those of FilesystemWatchdog; `path` (and `from`) is absolute, as the plugin has it, and
        escaped. Of the first 0.05 seconds of a call, and of all of it with enable_real_time_monitoring=False, only what they
        have changed is recorded. A file that is made and written at once is one operation. Not recorded: reading, /tmp and the
        other scratch folders, what `write_file` has written, and at level minimal the allowed directories, where others work
        as well. Empty with enable_filesystem_isolation=False or telemetry_enabled=False.
        """
        self._see_ends()
        return list(self._recorder.records) if self._recorder is not None else []

    def get_violations(self) -> list[SandboxViolation]:
        """The violations so far, oldest first."""
        self._see_ends()
        return list(self._telemetry.violations)

    def get_network_activity(self) -> list[dict[str, Any]]:
        """What calls have wanted of the network so far, oldest first: at most 10,000 records.

        A record has `timestamp` (ISO 8601), `operation` (socket, connect, bind, listen, sendto, sendmsg, sendmmsg), `family`
        (AF_INET), `type` (of a new socket: SOCK_STREAM), `address` and `port` (None where there are none), `allowed`,
        `reason`, `pid` (on the host) and `call` (its number). They come from the kernel (seccomp_unotify(2)): the plugin
        can neither leave one out nor forge one. Of sendmsg and sendmmsg those with MSG_FASTOPEN are there, which alone could
        go somewhere. Of more than 1,000 sockets of a call, and as many other operations, every power of two is there, and every
        connection that was made.

        Records with the operation "resolve" come from the plugin's interpreter, which can leave them out and forge them: names
        of hosts that it has asked for (`address`, without `pid`).
        """
        self._see_ends()
        return list(self._activity)

    @property
    def output_tail(self) -> bytes:
        """The last 64 KB of what calls have written to stdout and stderr. The plugin's: escape them."""
        return bytes(self._output_tail)

    @property
    def protections(self) -> tuple[Protection, ...]:
        """The protections with their states, as read back from the running sandbox; none before it was opened."""
        if self.recipe is None or not self._read_back:
            return ()
        return confirm(self.recipe.protections, {**self._read_back, "shares_network": "yes" if self.network else ""})

    @property
    def temp_directory(self) -> Path:
        """The workspace as a path that this process can use while the sandbox is open. Raises RuntimeError otherwise."""
        if self._sandbox is None or self._sandbox.closing:
            raise RuntimeError(f"sandbox {self.sandbox_id} is not open: it has no workspace")
        self._returns_early = False  # whoever has the path looks there unasked
        self._see_ends()
        if self._sandbox.folder is not None:
            return Path(self._sandbox.folder) / "files"
        return Path(f"/proc/{os.getpid()}/fd/{self._sandbox.workspace}")


def prewarmed(
    count: int, limits: PluginLimitsV2, permissions: PluginPermissionsV2, config: IsolationConfig
) -> concurrent.futures.Future[int]:
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"prewarm: count is {count!r}: give a whole number above 0")
    made, wire, _ = compiled(config, limits, permissions)
    standing: EngineFuture[int] = EngineFuture()
    standing.set_running_or_notify_cancel()
    service().post(service().prewarm, made, wire, count, standing.set_result)
    return standing


def remember(of_calls: dict[K, V], call: K, value: V) -> None:
    """Of a call; of calls that are long past nobody asks any more."""
    of_calls[call] = value
    if len(of_calls) > KEPT:
        del of_calls[next(iter(of_calls))]


def carry_out(granted: GrantedChanges, paths: list[str] | None) -> list[FileChange]:
    with granted:
        return granted.commit(paths)


def deletions(granted: GrantedChanges) -> list[str]:
    with granted:
        return [os.path.join(each.path, one.path) for each in granted.folders for one in each.differences if one.upper is None]


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Its result; a cancellation waits for its end, because it cannot be stopped half-way."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class _Run:
    """One worker and its call, between the caller's loop and the engine's thread."""

    def __init__(self, owner: EnhancedPluginSandbox) -> None:
        self.owner = owner
        self.worker: Worker | None = None
        self.violations: list[SandboxViolation] = []
        self._sealed = promise()
        self.has_stood = False
        self._loop: asyncio.AbstractEventLoop | None = None  # on which it is executed
        self._returned: asyncio.Future[None] | None = None  # there, when it has a value, or at its end
        self.listener: Listener | None = None  # there
        self.has_value = False  # before its end
        self._is_given_up = False
        self._done = promise()
        self._lingers: Timer | None = None
        self._watched: Watched | None = None
        self._recorded: Recorded | None = None
        self._watch_timer: Timer | None = None
        self._unwatched = ""  # why it could not be watched when that was tried last
        self._raw: dict[tuple[str, str], SandboxViolation] = {}
        self._escapers = {1: TerminalEscaper(), 2: TerminalEscaper()}
        self._decoders = {fd: codecs.getincrementaldecoder("utf-8")("backslashreplace") for fd in (1, 2)}
        self._has_shown: set[int] = set()

    @property
    def call(self) -> client.Call:
        assert self.worker is not None
        return self.worker.call

    async def stands(self) -> None:
        """Wait for the sealed worker. Raises what kept it from standing."""
        if not self._sealed.done():
            await asyncio.wrap_future(self._sealed)
        self._sealed.result()

    async def execute(self, instruction: dict[str, object], payload: bytes, conversation: Conversation | None) -> None:
        """Send the job and wait for its value, or for the end of everything; a cancelled caller kills it first."""
        service = self.owner._service
        assert service is not None
        assert self.worker is not None
        self._loop = asyncio.get_running_loop()
        self._returned = self._loop.create_future()
        taken = (self._may_take, self._take) if conversation is None else (conversation.may_take, conversation.take)
        self.listener = Listener(service, self.worker, self._loop, *taken)
        send = partial(self._send, instruction, payload, conversation)
        try:
            if not self.listener.send(send, len(payload)):
                service.post(send)
            await self._returned
        except GeneratorExit:  # its loop has gone, or is that of a process which is no more
            with suppress(ResourceError):
                service.post(self.call.kill, "cancelled")
            raise
        except BaseException as error:  # also a signal's, at any place
            service.post(self.call.kill, "cancelled")
            if isinstance(error, asyncio.CancelledError):
                await self.ends()
            raise
        finally:
            if not self._loop.is_closed():
                self._loop.call_soon(self.listener.stop)  # when the caller has its value

    # On the caller's loop, with the engine's turn:

    def _may_take(self) -> bool:
        """Whether nothing has to be told before a value: see `_on_reply`."""
        recorder = self.owner._recorder
        is_quiet = recorder is None or recorder.is_quiet()
        return self.owner._returns_early and not self.violations and is_quiet and not self.call.is_overdue()

    def _take(self) -> None:
        """A value has come here, with one wake in place of two."""
        self._returns()
        self._wake()

    def _wake(self) -> None:
        if self._returned is not None and not self._returned.done():
            self._returned.set_result(None)

    async def ends(self) -> None:
        """Wait for the end of everything."""
        await asyncio.wrap_future(self._done)

    def wait_for_end(self, seconds: float) -> None:
        """The same, at most for so long, without an event loop."""
        with suppress(TimeoutError):
            self._done.result(seconds)

    def then(self, callback: Callable[[], None]) -> None:
        """Call back at the end of everything, from whichever thread."""
        self._done.add_done_callback(lambda _: callback())

    def show(self, fd: int, data: bytes, *, is_last: bool = False) -> None:
        """On the caller's loop: the plugin's output to sys.stdout or sys.stderr, escaped on a terminal."""
        self.owner._output_tail += data
        del self.owner._output_tail[:-TAIL_BYTES]
        stream: TextIO | None = sys.stdout if fd == 1 else sys.stderr
        if stream is None or getattr(stream, "closed", False):
            return
        is_terminal, flush = getattr(stream, "isatty", None), getattr(stream, "flush", None)  # it may be anybody's
        shown = self._escapers[fd].feed(data) if is_terminal is not None and is_terminal() else data
        text = self._decoders[fd].decode(shown, final=is_last)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if text and codecs.lookup(encoding).name != "utf-8":
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        if text:
            stream.write(text)
        if flush is not None:
            flush()

    # In the engine's thread, or with its turn:

    def _send(self, instruction: dict[str, object], payload: bytes, conversation: Conversation | None) -> None:
        if self.call.done:
            self._tell_caller()
            return
        try:
            self._recorded = self.owner._recording_begins(self.call)
        except Exception as error:  # whatever it is, the caller waits for a word
            self.call.kill("failed")
            self.call.fail(no_start(error))
            return
        if conversation is None:
            self.call.on_reply = self._on_reply
            self.call.send_job(instruction, payload)
        else:
            conversation.begin(self, instruction, payload)
        recipe = self.call.sandbox.recipe
        if not self.call.done and recipe.monitoring["real_time"]:
            self._watch_timer = self.call.loop.call_later(client.WATCH_AFTER, self._watch)

    def _watch(self) -> None:
        """What is lacking for it now - a descriptor - may be there a little later. The counters are read at the end anyway."""
        try:
            self._watched = self.owner._watch_begins()
        except (OSError, ImportError) as error:
            self._unwatched = str(error)
            self.call.sandbox.lift_high()
            interval = float(self.call.sandbox.recipe.monitoring["interval_seconds"])
            self._watch_timer = self.call.loop.call_later(interval, self._watch)

    def refuse(self, error: SandboxException) -> None:
        self._on_stands(error)

    def start(self) -> None:
        """A further worker in the owner's open sandbox."""
        assert self.owner._sandbox is not None
        self.owner._sandbox.in_turn(self._start)

    def _start(self) -> None:
        if self._is_given_up:
            return
        assert self.owner._sandbox is not None
        try:
            worker = Worker(self.owner._sandbox)
        except Exception as error:  # whatever it is, the caller waits for a word
            self.refuse(no_start(error))
            return
        self.use(worker)

    def give_up(self) -> None:
        """Nobody waits for this worker any more."""
        self._is_given_up = True
        if self.worker is not None:
            self.worker.call.kill("cancelled")

    def use(self, worker: Worker) -> None:
        self.worker = worker
        worker.on_stands = self._on_stands
        worker.on_done = self._on_done
        worker.on_output = self._on_output
        worker.on_violation = self._on_violation
        if worker.stands or worker.error is not None:
            self._on_stands(worker.error)
        if worker.call.done:
            self._on_done()

    def _on_stands(self, error: SandboxException | None) -> None:
        if self._sealed.done():
            return
        if error is None:
            self.has_stood = True
            self._sealed.set_result(None)
        else:
            self._sealed.set_exception(error)

    def _on_output(self, fd: int, data: bytes) -> None:
        self._has_shown.add(fd)
        self.owner._tell(self.show, fd, data)

    def _on_reply(self, call: client.Call) -> None:
        """A value is there, and what it has cost until now is counted: its caller need not wait for the end, unless there is
        more to be told, or somebody could see what it does meanwhile."""
        assert self.worker is not None
        call.sandbox.drain_violations()
        self.worker.streams.catch_up()
        if call.reply_kind != channel.REPLY_VALUE or self.violations or call.cause or call.done:
            return
        if not self.owner._returns_early or call.is_overdue():
            return  # whether it came in time its end says
        self.owner._recording_catches_up()
        if not call.cause:
            self._returns()
            self._tell_caller()

    def _returns(self) -> None:
        """Its value may be had; what is left of it gets no more than this."""
        self._lingers = self.call.loop.call_later(LINGER, self.call.kill, "returned")
        self.has_value = True

    def _tell_caller(self) -> None:
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # it is closed: nobody waits any more, or gives the socket back
                self.call.give_back()

    def _on_done(self) -> None:
        for key, fields in self.call.violations.items():
            if key in self._raw:
                self._raw[key].details["count"] = int(fields["count"])
        for timer in (self._watch_timer, self._lingers):
            if timer is not None:
                timer.cancel()
        for fd in self._has_shown:
            self.owner._tell(partial(self.show, fd, b"", is_last=True))
        try:
            if self._recorded is not None:
                self.owner._recording_ends(self._recorded)
            if self._watched is not None:
                self.owner._watch_ends(self._watched)
            else:
                self.owner._count(self.call.outcome or {})
                if self._unwatched:
                    logging.getLogger("psie").warning("a call could not be watched, it has no samples: %s", self._unwatched)
            if self.owner._recovery is not None:
                self.owner._recovery.ended(self.call, self.violations)
        finally:
            if not self._done.done():
                self._done.set_result(None)
            self._tell_caller()

    def _on_violation(self, fields: dict[str, str]) -> None:
        violation = outcome.describe_violation(fields, self.call.sandbox)
        self._raw[fields["nr"], fields["arg0"]] = violation
        self.violations.append(violation)
        self.owner._react(violation, self.call.offences if fields["nr"] not in client.TOLD else 0)


def checked_environment(who: str, environment: Mapping[str, str] | None) -> dict[str, str]:
    """A copy. Raises TypeError or ValueError for what no process can have in its environment (environ(7))."""
    if not isinstance(environment or {}, Mapping):
        raise TypeError(f"{who}: environment is a {type(environment).__name__}: give a dict of texts")
    for name, value in (environment or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            kind = type(value if isinstance(name, str) else name).__name__
            raise TypeError(f"{who}: environment has a {kind} at {name!r}: give texts")
        try:
            is_possible = b"\0" not in os.fsencode(name + value) and name != "" and "=" not in name
        except UnicodeEncodeError:
            is_possible = False
        if not is_possible:
            mend = "a name is not empty and has no '=', and neither it nor its value has a NUL or half a character"
            raise ValueError(f"{who}: environment cannot have {name!r} like that: {mend}")  # the value may be a secret
    return dict(environment or {})


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that we are called on."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def promise() -> EngineFuture[None]:
    """A Future that its waiter cannot cancel: the engine's thread always may set it."""
    future: EngineFuture[None] = EngineFuture()
    future.set_running_or_notify_cancel()
    return future


def no_start(error: Exception) -> SandboxException:
    """What kept a sandbox or a worker from starting, as one of the documented exceptions."""
    if isinstance(error, SandboxException):
        return error
    if isinstance(error, OSError):
        text = f"a sandbox could not be opened: {error.strerror or error}"
        mend = client.mend_of(error.errno or 0)
        if error.errno in (*SHORT, errno.ENOSPC):
            return ResourceError(f"{text}; {mend}")
        return SandboxInitializationError(text, line="caller: start", errno=error.errno, path=error.filename, mend=mend)
    return SandboxInitializationError(f"a sandbox could not be opened: {type(error).__name__}: {error}")


_compiled: dict[str, tuple[Recipe, dict[str, Any], dict[str, Any]]] = {}
COMPILED = 64  # different settings of a process whose recipes are kept


def compiled(
    config: IsolationConfig, limits: PluginLimitsV2, permissions: PluginPermissionsV2, read_only: tuple[str, ...] = ()
) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    """The recipe for these settings, its wire form, and the limits as plain data; equal settings have one and the same.

    Raises what compile() does, and ResourceError.
    """
    key = repr((config, limits, permissions, read_only, state.distrusted))
    if key not in _compiled:
        if len(_compiled) >= COMPILED:
            _compiled.clear()
        try:
            facts = host.facts()
        except OSError as error:
            if error.errno not in SHORT:
                raise
            raise no_start(error) from None
        made = recipe.compile(config, limits, permissions, facts, read_only=read_only)
        _compiled[key] = made, client.wire_form(made), _plain(asdict(limits))
    return _compiled[key]


def _plain(value: Any) -> Any:
    """Enums as their values, tuples as lists: a settings dataclass as plain data."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
