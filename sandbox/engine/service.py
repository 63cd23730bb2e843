"""The engine of a process that uses psie as a library: one thread with a PollLoop, and the zygotes it keeps.

A thread of its own, so that sandboxes do not depend on the life of any event loop and can be used from several. The
caller's side posts functions into it and is called back in it; nothing else is shared. Not for the command line, which
runs its one loop itself.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from _thread import RLock
from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from time import monotonic

from sandbox.engine import board
from sandbox.engine import loop as loops
from sandbox.engine.client import GRACE, VALUE_MODULES, Call, Sandbox, Zygote, close_fds, mend_of
from sandbox.engine.loop import PollLoop, PollTimer
from sandbox.engine.spawn import settings, spawn_zygote
from sandbox.engine.streams import Streams
from sandbox.errors import ResourceError, SandboxException
from sandbox.ns import syscalls as sc
from sandbox.ns import userids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from sandbox.monitor.network import Holder
    from sandbox.recipe_data import Recipe

    T = TypeVar("T")

IDLE_SECONDS = 30.0  # a recipe that was not used for so long has nothing standing ready any more
REFILL_SECONDS = 0.1  # after a use, or when the used one has gone: so that the refill takes no time from the call
RUSH_READY = 2  # sandboxes of a recipe that is asked for again within REFILL_SECONDS: they are made beside its calls
MOST_READY = 16  # sandboxes of a recipe that stand ready unasked, for so many callers at once as there have been
MEMORY_SHARE = 4  # and what they claim is at most this part of what sandboxes of this user may
AGE_SECONDS = 600.0  # one that has stood for longer is not given to anybody
SANDBOXES_PER_ZYGOTE = 1000  # forks share hash seed and address layout: after so many a fresh one takes over
CALL_MODULES = (*VALUE_MODULES, "cloudpickle", "traceback")


class Condition(RLock):  # type: ignore[misc]  # a class as any, whatever typeshed says
    """As threading.Condition, whose `with` is one step: a signal's exception cannot come between and leave it locked,
    upon which the engine's thread, and so every sandbox of this process, would wait for ever."""

    _waited: threading.Condition | None = None

    def wait(self, timeout: float | None = None) -> bool:
        self._waited = self._waited or threading.Condition(self)
        try:
            return self._waited.wait(timeout)
        except BaseException:  # a signal's: as it has just let go of the lock, who leaves `with` would raise that in its place
            if not self._is_owned():  # type: ignore[attr-defined]
                self.acquire()
            raise

    def notify_all(self) -> None:
        if self._waited is not None:
            self._waited.notify_all()


class EngineFuture(Future["T"]):
    """What the engine's thread sets and another one waits for, by `result`: concurrent.futures.wait locks
    as an Event does."""

    def __init__(self) -> None:
        super().__init__()
        self._condition = Condition()  # type: ignore[assignment]


class ThreadLoop(PollLoop):
    """A PollLoop in a daemon thread; `post` and `here` may be called from any thread.

    What is the loop's, and all that its callbacks work with, is for whoever has the turn: the thread, except while it waits for
    events. Another one that would have to wake it for a trifle does that itself, which takes less time than to wake a thread.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.posted: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.wakes_at = float("-inf")  # when the thread does so at the latest, while it waits
        self.thread = threading.Thread(target=self._serve, name="psie engine", daemon=True)
        try:
            with ExitStack() as undo:
                super().__init__()
                undo.callback(self.close)
                self.wake_reader, self.wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                undo.callback(close_fds, (self.wake_reader, self.wake_writer))
                self.alarm = sc.timerfd_create()  # for timers of those who have the turn while the thread waits
                undo.callback(os.close, self.alarm)
                self.add_reader(self.wake_reader, self._woken)
                self.add_reader(self.alarm, self._alarmed)
                try:
                    self.thread.start()
                except RuntimeError:
                    raise
                except BaseException:  # a signal's: by now the thread may be there, and then it waits for ever, for nobody
                    undo.pop_all()
                    raise
                undo.pop_all()
        except (OSError, RuntimeError) as error:  # "can't start new thread"
            mend = mend_of(error.errno or 0) if isinstance(error, OSError) else "raise the limit of processes (ulimit -u)"
            raise ResourceError(f"psie's own thread could not be started ({error}): {mend}") from None

    def post(self, callback: Callable[..., Any], *args: Any) -> None:
        try:
            self.posted.append((callback, args))
        finally:  # also where a signal's exception comes between
            try:
                os.write(self.wake_writer, b"\0")
            except BlockingIOError:
                pass  # it has enough reasons to wake already

    def here(self, callback: Callable[..., Any], *args: Any) -> bool:
        """Call back now, in the thread that asks, if nothing else goes on or waits to be done; False otherwise.

        It is for what is short, and waits for nothing.
        """
        if self.posted or self.turn.locked():
            return False
        with self.turn:  # so that no signal's exception can come between: to wait for it here, for once, does no harm
            if self.posted:
                return False  # what has been posted before comes first
            callback(*args)
            return True

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> PollTimer:
        timer = super().call_later(delay, callback, *args)
        if timer.when < self.wakes_at:
            self.wakes_at = timer.when
            sc.timerfd_settime(self.alarm, monotonic() + delay)
        return timer

    def _wait(self, wait: float | None) -> list[tuple[int, int]]:
        self.wakes_at = loops.monotonic() + wait if wait is not None else float("inf")
        self.turn.release()
        try:
            return super()._wait(wait)
        finally:
            self.turn.acquire()
            self.wakes_at = float("-inf")

    def _alarmed(self) -> None:
        try:
            os.read(self.alarm, 8)
        except BlockingIOError:
            pass  # it has been set anew meanwhile

    def is_here(self) -> bool:
        """Whether this is its thread, which must wait for nothing that it has to do itself."""
        return threading.current_thread() is self.thread

    def _woken(self) -> None:
        os.read(self.wake_reader, 4096)
        while self.posted:
            callback, args = self.posted.popleft()
            try:
                callback(*args)
            except Exception:  # a mistake of ours: what others have posted still counts
                sys.excepthook(*sys.exc_info())

    def _serve(self) -> None:
        self.turn.acquire()
        while True:
            try:
                self.run_once()
            except Exception:  # a mistake of ours in one sandbox's callback: the others go on
                sys.excepthook(*sys.exc_info())


class Worker:
    """A worker from its start to its end, with its streams; whoever uses it sets the callbacks. In the engine's thread.

    `on_stands(error)` when it has been sealed and read back, or could not be; `on_output(fd, data)`; `on_violation`;
    `on_done()` when all of it has gone. A worker may stand before it has a user: nothing of a plugin has run by then.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.stands = False
        self.since = monotonic()
        self.error: SandboxException | None = None
        self.on_stands: Callable[[SandboxException | None], None] | None = None
        self.on_output: Callable[[int, bytes], None] | None = None
        self.on_violation: Callable[[dict[str, str]], None] | None = None
        self.on_done: Callable[[], None] | None = None
        limit = int(sandbox.recipe.limits["output_bytes"])
        sinks = (lambda data: self._output(1, data), lambda data: self._output(2, data))
        self.streams = Streams(sandbox.loop, limit, lambda: self.call.kill("output"), sinks, None)
        try:
            self.call: Call = sandbox.call(self.streams.inside)
        except BaseException:
            self.streams.finish()
            raise
        self.streams.close_inside()
        self.sources = select.poll()  # of what may have to be told before a value is
        for fd in (sandbox.violations.fileno(), *self.streams.sinks):
            if fd >= 0:
                self.sources.register(fd, select.POLLIN)
        self.call.on_sealed = self._sealed
        self.call.on_done = self._done
        self.call.on_violation = self._violation
        if self.call.done:
            self._done(self.call)

    def _output(self, fd: int, data: bytes) -> None:
        if self.on_output is not None:
            self.on_output(fd, data)

    def _violation(self, call: Call, fields: dict[str, str]) -> None:
        if self.on_violation is not None:
            self.on_violation(fields)

    def _sealed(self, call: Call) -> None:
        self.stands = True
        if self.on_stands is not None:
            self.on_stands(None)

    def _done(self, call: Call) -> None:
        self.streams.finish()
        if not self.stands:
            self.error = call.error or ResourceError("the worker ended before it stood: see psie explain")
            if self.on_stands is not None:
                self.on_stands(self.error)
        if self.on_done is not None:
            self.on_done()


class Stock:
    """What stands ready of one recipe, and how it is asked for."""

    def __init__(self, recipe: Recipe, wire: dict[str, Any]) -> None:
        self.recipe = recipe
        self.wire = wire
        self.ready: deque[Worker] = deque()
        self.used_at = float("-inf")
        self.rush = False  # whether the last two uses came one right after the other
        self.in_use = 0  # sandboxes
        self.most_in_use = 0  # since it was idle last
        self.asked_for = 0  # by `prewarm`
        self.waiting: list[tuple[int, Callable[[int], None]]] = []  # who has asked for how many, until they stand
        self.grows = False  # one more is to be begun at once
        self.idle: PollTimer | None = None
        memory = int(recipe.limits["memory_bytes"]) * MEMORY_SHARE
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.bound = max(1, min(MOST_READY, userids.bounds(total)[1] // memory))

    def missing(self) -> int:
        """How many more should stand ready now: as many as were in use at once, one where there was one caller after the
        other, and two where those come one right after the other."""
        rush = self.rush and monotonic() - self.used_at < REFILL_SECONDS
        wanted = max(RUSH_READY if rush else 1, self.most_in_use if self.most_in_use > 1 else 0)
        return max(min(wanted, self.bound), self.asked_for) - len(self.ready)

    def take(self) -> Worker | None:
        """The one that has stood for longest, or is about to stand. From any thread."""
        for worker in sorted(self.ready.copy(), key=lambda worker: not worker.stands):
            try:
                self.ready.remove(worker)
            except ValueError:
                continue  # another thread has it
            except BaseException:  # a signal's: nobody has it
                self.ready.append(worker)
                raise
            return worker
        return None

    def begins(self) -> None:
        self.in_use += 1
        self.most_in_use = max(self.most_in_use, self.in_use)

    def take_all(self) -> list[Worker]:
        return list(iter(self.take, None))

    def remove(self, worker: Worker) -> None:
        if worker in self.ready:
            self.ready.remove(worker)
        self.tell()

    def tell(self) -> None:
        """Whoever waits, if so many stand or no more will: to be called whenever one stands, fails, goes or is taken."""
        if not self.waiting:
            return
        ready = self.ready.copy()  # from which other threads take
        standing = sum(worker.stands for worker in ready)
        is_growing = self.grows or any(not worker.stands and worker.error is None for worker in ready)
        waiting, self.waiting = self.waiting, []
        for count, then in waiting:
            if standing < count and is_growing:
                self.waiting.append((count, then))
            else:
                then(standing)


class Service:
    """Zygotes by what they are made of, and for each recipe in use sandboxes that stand ready for the next callers.

    Only a sandbox that needs nothing of its caller's folders, and no look at what names stand for now, can stand ready; its
    fresh workspace is part of it. It is made off the critical path, used once, and let go after IDLE_SECONDS without a use,
    and its zygote with it. With PSIE_STANDING=0 in the environment none stands ready.
    Every method but `post`, `here` and `take` runs in the engine's thread, or for it: see ThreadLoop.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        board.use_memory()
        self.loop = ThreadLoop()
        self.zygotes: dict[str, Zygote] = {}
        self.giving_way = 0  # sandboxes that stood ready and go, so that there is room
        self.waiting_for_room: list[Callable[[], None]] = []
        self.stocks: dict[int, Stock] = {}  # of the recipes in use, by the identity of their wire form

    def post(self, callback: Callable[..., Any], *args: Any) -> None:
        self._check_process()
        self.loop.post(callback, *args)

    def here(self, callback: Callable[..., Any], *args: Any) -> bool:
        """As ThreadLoop.here."""
        self._check_process()
        return self.loop.here(callback, *args)

    def _check_process(self) -> None:
        if os.getpid() != self.pid:
            raise ResourceError("this sandbox belongs to the process that opened it: after a fork open a new one")

    def open(self, recipe: Recipe, wire: dict[str, Any], resolved: dict[str, Any], holder: Holder | None = None) -> Worker:
        """A worker in a new sandbox of its own; `resolved` is of its network access, see sandbox.network.resolve, `holder`
        the network that it shares.

        Raises ResourceError, SandboxInitializationError or OSError where not even a start can be made.
        """
        worker = self._new(recipe, wire, resolved, holder)
        if holder is None:
            self.touch(recipe, wire)
        return worker

    def prewarm(self, recipe: Recipe, wire: dict[str, Any], count: int, then: Callable[[int], None]) -> None:
        """Have `count` sandboxes of a recipe stand ready, until it has not been used for long; `then(how many stand)` when all
        of them do, or no more can be had."""
        stock = self._stock(recipe, wire)
        stock.asked_for = count
        stock.waiting.append((count, then))
        self._keep(stock)
        self._fill(stock)

    def take(self, wire: dict[str, Any]) -> Worker | None:
        """A sandbox that stands ready for this recipe, if there is one. From any thread; call `touch` afterwards."""
        stock = self.stocks.get(id(wire))
        worker = stock.take() if stock is not None else None
        if worker is not None:
            try:
                is_old = monotonic() - worker.since > AGE_SECONDS
                is_lost = worker.sandbox.zygote.closed  # with it, which its sandboxes are told one after the other
                if is_old or is_lost or worker.sandbox.error is not None or worker.call.done:
                    self.post(worker.sandbox.close)
                    return None
            except BaseException:  # a signal's: nobody has it
                self.post(worker.sandbox.close)
                raise
        return worker

    def _new(self, recipe: Recipe, wire: dict[str, Any], resolved: dict[str, Any], holder: Holder | None = None) -> Worker:
        network = holder.namespace if holder is not None else None
        zygote = self._zygote(recipe, holder.pid if holder is not None and holder.in_user_namespace else 0)
        sandbox = Sandbox(zygote, recipe, wire, os.urandom(8).hex(), resolved, network)
        try:
            return Worker(sandbox)
        except BaseException:
            sandbox.close()
            raise

    def touch(self, recipe: Recipe, wire: dict[str, Any]) -> None:
        """This recipe is in use: have the next one of it ready soon, and none when it has not been used for long."""
        stock = self._stock(recipe, wire)
        now = monotonic()
        stock.rush = now - stock.used_at < REFILL_SECONDS
        stock.used_at = now
        stock.begins()
        stock.tell()
        self._keep(stock)
        self.loop.call_later(0 if stock.rush else REFILL_SECONDS, self._fill, stock)

    def _stock(self, recipe: Recipe, wire: dict[str, Any]) -> Stock:
        stock = self.stocks.get(id(wire))
        if stock is None:
            stock = self.stocks[id(wire)] = Stock(recipe, wire)
        return stock

    def _keep(self, stock: Stock) -> None:
        """It is let go when it has not been used for long from now on."""
        if stock.idle is not None:
            stock.idle.cancel()
        stock.idle = self.loop.call_later(IDLE_SECONDS, self._let_go, stock)

    def refill(self, wire: dict[str, Any]) -> None:
        """A sandbox of this recipe has gone: now is a good time to make the next one ready."""
        stock = self.stocks.get(id(wire))
        if stock is not None:
            stock.in_use = max(0, stock.in_use - 1)
            self._fill(stock)

    def _fill(self, stock: Stock) -> None:
        """Make one more sandbox ready, if it is wanted, and then the next."""
        stock.grows = False
        try:
            stock.grows = self._add(stock)
        finally:
            stock.tell()
        if stock.grows:
            self.loop.call_later(0, self._fill, stock)

    def _add(self, stock: Stock) -> bool:
        """Make one more sandbox ready; False if none is wanted, or can be had."""
        recipe = stock.recipe
        is_bound = bool(recipe.sandbox_mounts or recipe.granted) or recipe.network["looks"]
        if os.environ.get("PSIE_STANDING", "1") == "0" or is_bound:
            return False
        if stock.missing() <= 0 or self.stocks.get(id(stock.wire)) is not stock:
            return False
        try:
            worker = self._new(recipe, stock.wire, {})
        except (SandboxException, OSError):
            return False  # the next caller makes its own, and is told why if that fails
        if worker.sandbox.is_gone:
            return False  # with its zygote, at this moment: nobody would tell of it again
        worker.sandbox.line.tell(board.STANDING)
        worker.sandbox.on_gone = lambda: stock.remove(worker)
        worker.on_stands = lambda error: stock.tell()
        stock.ready.append(worker)
        return True

    def give_way(self, then: Callable[[], None]) -> bool:
        """Let go of all that stands ready, because a bound is reached; `then` is called when it has gone.

        False if there was nothing.
        """
        waiting = [worker for stock in self.stocks.values() for worker in stock.take_all()]
        for stock in self.stocks.values():
            stock.tell()
        self.giving_way += len(waiting)
        if not self.giving_way:
            return False
        self.waiting_for_room.append(then)

        def gone() -> None:
            self.giving_way -= 1
            if self.giving_way == 0:
                told, self.waiting_for_room = self.waiting_for_room, []
                for each in told:
                    each()

        for worker in waiting:
            worker.sandbox.on_gone = gone
            worker.sandbox.close()
        return True

    def _let_go(self, stock: Stock) -> None:
        del self.stocks[id(stock.wire)]
        for worker in stock.take_all():
            worker.sandbox.close()
        stock.tell()
        for zygote in list(self.zygotes.values()):
            self._let_idle_go(zygote)

    def _zygote(self, recipe: Recipe, beside: int = 0) -> Zygote:
        """A living zygote for this recipe's interpreter, preloads and template, in the user namespace of `beside`."""
        made_of = (recipe.template, recipe.interpreter, recipe.preload, recipe.outer_user_namespace, recipe.network["mode"])
        key = repr((*made_of, recipe.environment, any(recipe.modules.values()), beside))
        zygote = self.zygotes.get(key)
        if zygote is None or zygote.closed or zygote.error is not None or zygote.opened >= SANDBOXES_PER_ZYGOTE:
            if zygote is not None:
                del self.zygotes[key]
                self._let_idle_go(zygote)
            try:
                pid, control = spawn_zygote(
                    str(recipe.interpreter["executable"]), outer_user_namespace=recipe.outer_user_namespace, beside=beside
                )
            except FileNotFoundError as error:
                raise ResourceError(f"{error.filename} is missing: install util-linux") from None
            zygote = Zygote(self.loop, pid, control)
            try:
                zygote.set_up(settings(recipe, CALL_MODULES, spare=True))
            except BaseException:
                zygote.close()
                raise
            zygote.on_idle = self._let_idle_go
            self.zygotes[key] = zygote
        return zygote

    def _let_idle_go(self, zygote: Zygote) -> None:
        """Close a zygote without sandboxes, unless recipes of it may be used again soon."""
        if not zygote.sandboxes and (not self.stocks or zygote not in self.zygotes.values()):
            zygote.close()

    def status(self) -> dict[str, int]:
        """How many sandboxes stand ready, of how many recipes in use, and how many zygotes there are."""
        ready = sum(len(stock.ready) for stock in self.stocks.values())
        zygotes = sum(not zygote.closed for zygote in self.zygotes.values())
        return {"ready": ready, "recipes": len(self.stocks), "zygotes": zygotes}

    def shut_down(self, then: Callable[[], None]) -> None:
        """Let go of what stands ready, and of zygotes that nobody uses; `then` is called when what stood ready has gone."""
        for stock in self.stocks.values():
            if stock.idle is not None:
                stock.idle.cancel()

        def gone() -> None:
            for zygote in list(self.zygotes.values()):
                self._let_idle_go(zygote)
            then()

        waiting = self.give_way(gone)
        self.stocks.clear()
        if not waiting:
            gone()


_service: Service | None = None
_lock = threading.Lock()


def _forget_parent() -> None:
    """In a fork: another thread of the parent's may have had the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_parent)


def service() -> Service:
    """The one service of this process; a forked child gets its own."""
    global _service
    with _lock:
        if _service is None or _service.pid != os.getpid():
            _service = Service()
        return _service


def status() -> dict[str, int]:
    """As Service.status says; nothing has been started for it."""
    running = _service
    if running is None or running.pid != os.getpid():
        return {"ready": 0, "recipes": 0, "zygotes": 0}
    told: EngineFuture[dict[str, int]] = EngineFuture()
    running.post(lambda: told.set_result(running.status()))
    return told.result(GRACE)


def shut_down() -> None:
    """Let go of every ready sandbox and every zygote of this process that nobody uses, and wait until they have gone.

    Nothing needs it: they go by themselves when they are idle, and with the process. It is for those who count.
    """
    if _service is None or _service.pid != os.getpid():
        return
    gone: EngineFuture[None] = EngineFuture()
    _service.post(_service.shut_down, lambda: gone.set_result(None))
    with suppress(TimeoutError):
        gone.result(GRACE)
