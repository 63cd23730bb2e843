"""Sessions: a process of a sandbox that serves many calls, with what they leave behind kept from one to the next.

For plugins that are prepared once and asked often. A call is a message to a process that stands, under the same protections
and with the same time as any call; a fresh process for each call stays what psie does by itself. Must not know how a call is
made, nor how anything is enforced.
"""

from __future__ import annotations

import asyncio
import inspect
import types
from functools import partial

from sandbox import transport
from sandbox.engine import channel, codec, outcome
from sandbox.errors import PluginExecutionError, SandboxException
from sandbox.integrations import observers
from sandbox.remembered import Asked, Remembered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Any, Self

    from sandbox.engine.client import Answer, Call
    from sandbox.engine.service import Service
    from sandbox.sandbox import EnhancedPluginSandbox, _Run
    from sandbox.violations import SandboxViolation


class Conversation:
    """What the caller's loop and one process say to each other, by way of the engine's thread: one request at a time."""

    def __init__(self, tell: Callable[..., None], on_answer: Callable[[Answer], None]) -> None:
        """`tell(callback, *args)` calls back on the caller's loop."""
        self.tell = tell
        self.on_answer = on_answer
        self.run: _Run | None = None

    @property
    def violations(self) -> list[SandboxViolation]:
        return self.run.violations if self.run is not None else []

    def ask(self, service: Service, file: str, instruction: dict[str, object], payload: bytes) -> None:
        """On the caller's loop."""
        request = partial(self.request, file, instruction, payload)
        listener = self.run.listener if self.run is not None else None
        if listener is None or not listener.send(request, len(payload)):
            service.post(request)

    # In the engine's thread, or with its turn:

    def begin(self, run: _Run, instruction: dict[str, object], payload: bytes) -> None:
        self.run = run
        run.call.on_reply = lambda call: self._replied()
        run.call.begin_session(instruction, payload)

    def request(self, file: str, instruction: dict[str, object], payload: bytes) -> None:
        if self.run is not None and self.run.worker is not None:
            self.run.worker.streams.begin_anew()
            self.run.call.source_file = file
            self.run.call.request(instruction, payload)

    def may_take(self) -> bool:
        return True

    def take(self) -> None:
        """On the caller's loop, with the engine's turn: an answer has come there."""
        assert self.run is not None
        self.on_answer(self.run.call.next_reply())

    def end(self) -> None:
        if self.run is not None:
            self.run.call.end_session()

    def _replied(self) -> None:
        """What was refused and written on the way comes before the answer."""
        assert self.run is not None
        assert self.run.worker is not None
        call = self.run.call
        call.sandbox.drain_violations()
        self.run.worker.streams.catch_up()
        if not call.done and not call.cause:  # else it is being killed, and its end is the answer
            self.tell(self.on_answer, call.next_reply())


KNOWN = 256  # functions that a process has at once


class Known:
    """A function that a session has been asked for: how it travels, and what is known about it."""

    def __init__(self, number: int, function: Callable[..., Any]) -> None:
        self.number = number
        self.function = function  # held, so that nothing else gets its id
        self.file = getattr(getattr(function, "__code__", None), "co_filename", "")
        self.wants = transport.first_wish(function)
        # A closure or a bound object may have changed until the next call; what is global stays as it was.
        self.keeps = type(function) is types.FunctionType and function.__closure__ is None
        self.types: Mapping[str, type] | None = None
        self.has_travelled = False


class Session:
    """A process that serves many calls: `async with sandbox.session() as session: await session.call(function, ...)`.

    Calls are served one after the other, in the order in which they came. max_execution_time_seconds, max_output_mb and
    max_result_mb are for each call, the other limits and violation_threshold for the process. One that ends - because it
    crashed, a limit struck, a call was cancelled, or after max_calls - is replaced by a fresh one at the next call, which
    begins with setup_fn. The sandbox's workspace stays.

    A plain function travels once for each process: what it refers to is as it was then, and what it leaves in its globals is
    there at its next call; the process has the last 256 of them. Closures, bound methods and other callables travel each time.

    While the process lives, changes of granted folders can be neither looked at nor committed, as with any call that runs; if a
    violation has ended one of its calls, they are discarded at its end.
    """

    def __init__(
        self, sandbox: EnhancedPluginSandbox, setup_fn: Callable[[], Any] | None = None, *, max_calls: int | None = None
    ) -> None:
        if setup_fn is not None and not callable(setup_fn):
            raise TypeError(f"session: setup_fn is a {type(setup_fn).__name__}: give a function, or None")
        if max_calls is not None and (not isinstance(max_calls, int) or max_calls < 1):
            raise ValueError(f"session: max_calls is {max_calls}: give a whole number above 0, or None for no bound")
        self._sandbox = sandbox
        self._setup = setup_fn
        self._max_calls = max_calls
        self._turn = asyncio.Lock()
        self._known: dict[Any, Known] = {}
        self._conversation: Conversation | None = None
        self._process: asyncio.Task[Call] | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._ended_by: BaseException | None = None  # the last process, if not by itself
        self._calls = 0  # of this process
        self._is_open = False

    async def __aenter__(self) -> Self:
        """Start the process and have setup_fn called. Raises as `call` does."""
        self._check_loop()
        async with self._turn:
            if self._is_open:
                raise RuntimeError("the session is open already: open another one, by sandbox.session()")
            await self._start()
            self._is_open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """The process ends as a program does: its threads are joined, its atexit functions called."""
        self._is_open = False
        if asyncio._get_running_loop() is None:  # its coroutine is thrown away, as is its sandbox's
            return
        async with self._turn:
            await self._end()

    async def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run `function(*args, **kwargs)` in the session's process and return its value.

        If its first parameter is called `state` it gets what setup_fn returned first, if it is called `env` or `environment`
        what `execute_plugin_safe` gives there. An `async def` function is awaited inside, all of them on one event loop.

        Raises:
            PluginExecutionError: the function raised (the process goes on), or the process died.
            SecurityViolationError, ResourceLimitExceededError, SandboxInitializationError: as for `execute_plugin_safe`.
            RuntimeError: the session or the sandbox is not open, or belongs to another event loop.
        """
        return await self._ask(self._request, function, args, kwargs)

    async def _ask(self, make: Callable[..., tuple[str, dict[str, object], bytes, Mapping[str, type]]], *what: Any) -> Any:
        if not self._is_open:
            raise RuntimeError("the session is not open: use it inside `async with`")
        self._check_loop()
        async with self._turn:
            if self._process is not None and self._conversation is None:  # who has had it killed did not wait for its end
                await asyncio.wait([self._process])
            if self._process is None:
                await self._start()
            assert self._conversation is not None
            try:
                file, instruction, payload, types_ = make(*what)
                if not observers.want_calls():
                    return await self._answered_value(file, instruction, payload, types_)
                run = self._conversation.run
                with Asked(self._sandbox, name_of(what[0]), run.call if run is not None else None):
                    return await self._answered_value(file, instruction, payload, types_)
            except Exception:
                raise
            except BaseException:  # a signal's, at any place: what the process knows is not known
                if self._conversation is not None:
                    self._abandon()
                raise
            finally:
                if self._max_calls is not None and self._calls >= self._max_calls:
                    await self._end()

    async def _answered_value(
        self, file: str, instruction: dict[str, object], payload: bytes, types_: Mapping[str, type]
    ) -> Any:
        assert self._conversation is not None
        before = len(self._conversation.violations)
        assert self._sandbox._service is not None
        try:
            self._conversation.ask(self._sandbox._service, file, instruction, payload)
            answer = await self._answer()
        except BaseException:  # also a signal's, at any place
            self._abandon()
            raise
        self._calls += 1
        return self._value(answer, before, types_)

    def _check_loop(self) -> None:
        if self._sandbox._loop not in (None, asyncio.get_running_loop()):
            raise RuntimeError("a session belongs to the event loop on which its sandbox was opened: use it there")

    # -- the process -------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._sandbox._check_open()
        for known in self._known.values():
            known.has_travelled = False
        self._calls = 0
        self._conversation = Conversation(self._sandbox._tell, self._answered)
        self._process = asyncio.create_task(self._live(self._conversation))
        self._process.add_done_callback(self._over)
        try:
            self._value(await self._answer(), 0, {})
        except SandboxException:
            await self._end()
            raise

    async def _live(self, conversation: Conversation) -> Call:
        """From a worker that stands to its end."""
        name, file, instruction, payload = self._job()
        with Remembered(self._sandbox, name, observers.SESSION) as remembered:
            return await self._sandbox._execute(remembered, file, instruction, payload, conversation)

    async def _answer(self) -> Answer:
        """What the process says next. Raises what its end was, if it ends instead; who is cancelled has it killed."""
        process = self._process
        assert process is not None
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            return await self._waiting
        except BaseException as error:
            if self._abandon() and isinstance(error, asyncio.CancelledError):
                await asyncio.wait([process])
            raise
        finally:
            self._waiting = None

    def _abandon(self) -> bool:
        """Nobody waits for the answer any more: it would be taken for the next one's. So the process is killed, and the next
        call has a fresh one; whether there is one that has not just ended by itself."""
        process, self._waiting, self._conversation = self._process, None, None
        if process is not None:
            process.cancel()
        return process is not None

    def _answered(self, answer: Answer) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    def _over(self, process: asyncio.Task[Call]) -> None:
        """It has ended: whoever waits for an answer is told why, and nobody else, because the next call has a fresh one."""
        if process is self._process:
            self._process = None
        error = None if process.cancelled() else process.exception()
        self._ended_by = error or self._ended_by
        if self._waiting is not None and not self._waiting.done():
            ended = None if error or process.cancelled() else process.result()
            self._waiting.set_exception(error or outcome.no_reply(ended, "the session's process", "answering"))

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        conversation, self._conversation = self._conversation, None  # whoever calls next waits for its end
        if conversation is not None:
            self._sandbox._post(conversation.end)
        await asyncio.wait([process])

    def _value(self, answer: Answer, before: int, types_: Mapping[str, type]) -> Any:
        """The value that an answer is. Raises what it is else."""
        assert self._conversation is not None
        violations = self._conversation.violations[before:]
        if violations or answer.reply_kind != channel.REPLY_VALUE:
            told = len(violations)
            outcome.locate(answer, violations, self._conversation.violations[:before])
            self._conversation.violations.extend(violations[told:])
            violations = violations or outcome.repeated(answer, self._conversation.violations)
            error = outcome.reply_error(answer, violations)
            self._sandbox._taint(error)  # before the caller's handlers are told, which may raise
            if self._conversation.run is not None:
                self._sandbox._see_violations(self._conversation.run)
            if error is not None:
                raise error
        try:
            return codec.decode(answer.reply, max_bytes=len(answer.reply), types=types_)
        except codec.CodecError as error:
            raise PluginExecutionError(f"the reply of the plugin is not one: {error}", exception_type="CodecError") from None

    # -- what it is asked --------------------------------------------------------------------------------------------

    def _job(self) -> tuple[str, str, dict[str, object], bytes]:
        """(name, file, instruction, payload) of the process."""
        sandbox, setup = self._sandbox, self._setup
        assert sandbox.recipe is not None
        instruction = {**sandbox._instruction("session"), "module": "", "env": sandbox._environment()}
        payload = transport.pack(setup, (), {}, sandbox.recipe.interpreter["path"]) if setup is not None else b""
        return "session", getattr(getattr(setup, "__code__", None), "co_filename", ""), instruction, payload

    def _request(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, object], bytes, Mapping[str, type]]:
        """(file, instruction, payload, types of the reply)"""
        known = self._known_function(function)
        path = self._sandbox.recipe.interpreter["path"] if self._sandbox.recipe is not None else []
        plain = transport.is_plain(args, kwargs)
        instruction: dict[str, object] = {
            "function": known.number,
            "code": b"" if known.has_travelled else transport.pack(function, (), {}, path),
            "keeps": known.keeps,
            "wants": known.wants,
            "args": args if plain else (),
            "kwargs": kwargs if plain else {},
        }
        payload = b"" if plain else self._pickled(args, kwargs)
        known.has_travelled = known.keeps
        if known.types is None:
            known.types = transport.PlainTypes(function, ())
        return known.file, instruction, payload, known.types if plain else transport.PlainTypes(function, args)

    def _pickled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        path = self._sandbox.recipe.interpreter["path"] if self._sandbox.recipe is not None else []
        return transport.pack(dict, args, kwargs, path)

    def _known_function(self, function: Callable[..., Any]) -> Known:
        known = self._known.pop(id(function), None)
        if known is not None:
            self._known[id(function)] = known  # as the latest
            return known
        if not callable(function):
            raise TypeError(f"session.call: a {type(function).__name__} cannot be called: give a function")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            name = getattr(function, "__qualname__", function)
            raise PluginExecutionError(f"{name} is a generator: return a list instead", exception_type="TypeError")
        known = Known(len(self._known), function)
        if known.keeps:
            if len(self._known) == KNOWN:
                known.number = self._known.pop(next(iter(self._known))).number  # in whose place the process puts it
            self._known[id(function)] = known
        return known


class PluginSession(Session):
    """A plugin of a plugin folder that was loaded once and serves many calls: see EnhancedPluginFramework.open_plugin."""

    def __init__(
        self,
        sandbox: EnhancedPluginSandbox,
        plugin_id: str,
        source: bytes,
        job: Mapping[str, object],
        *,
        max_calls: int | None = None,
    ) -> None:
        """`source` and `job` are as for EnhancedPluginSandbox.execute_file."""
        super().__init__(sandbox, max_calls=max_calls)
        self._plugin_id = plugin_id
        self._source = source
        self._file = {name: job[name] for name in ("path", "folder", "module")}

    async def call(self, function: str, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Call a function of the plugin's module by its name; one whose first parameter is called `env` or `environment` gets
        the dict that `execute_plugin_safe` gives first.

        Raises as Session.call does.
        """
        if not isinstance(function, str):
            raise TypeError(f"call: a {type(function).__name__} is no name: give the name of a function of the plugin")
        return await self._ask(self._request, function, args, kwargs)

    def _job(self) -> tuple[str, str, dict[str, object], bytes]:
        _, _, instruction, _ = super()._job()
        return self._plugin_id, "", {**instruction, **self._file}, self._source

    def _request(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, dict[str, object], bytes, Mapping[str, type]]:
        plain = transport.is_plain(args, kwargs)
        instruction = {"name": function, "args": args if plain else (), "kwargs": kwargs if plain else {}}
        return "", instruction, b"" if plain else self._pickled(args, kwargs), {}


def name_of(function: Callable[..., Any] | str) -> str:
    """A function's, or that which a plugin's was asked for by."""
    return function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__name__)
