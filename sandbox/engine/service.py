"""The engine of a process that uses psie as a library: one thread with a PollLoop, and the zygotes it keeps.

A thread of its own, so that sandboxes do not depend on the life of any event loop and can be used from several. The
caller's side posts functions into it and is called back in it; nothing else is shared. Not for the command line, which
runs its one loop itself.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque

from sandbox.engine.client import Zygote
from sandbox.engine.loop import PollLoop
from sandbox.engine.spawn import spawn_zygote
from sandbox.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandbox.recipe_data import Recipe

IDLE_SECONDS = 30.0  # a zygote without a sandbox for so long is let go
SANDBOXES_PER_ZYGOTE = 1000  # forks share hash seed and address layout: after so many a fresh one takes over
CALL_MODULES = ("cloudpickle", "traceback")


class ThreadLoop(PollLoop):
    """A PollLoop in a daemon thread; `post` may be called from any thread."""

    def __init__(self) -> None:
        super().__init__()
        self.posted: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.wake_reader, self.wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.add_reader(self.wake_reader, self._woken)
        self.thread = threading.Thread(target=self._serve, name="psie engine", daemon=True)
        self.thread.start()

    def post(self, callback: Callable[..., Any], *args: Any) -> None:
        self.posted.append((callback, args))
        try:
            os.write(self.wake_writer, b"\0")
        except BlockingIOError:
            pass  # it has enough reasons to wake already

    def _woken(self) -> None:
        os.read(self.wake_reader, 4096)
        while self.posted:
            callback, args = self.posted.popleft()
            callback(*args)

    def _serve(self) -> None:
        while True:
            try:
                self.run_once()
            except Exception:  # a mistake of ours in one sandbox's callback: the others go on
                sys.excepthook(*sys.exc_info())


class Service:
    """Zygotes by what they are made of. Every method but `post` runs in the engine's thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = ThreadLoop()
        self.zygotes: dict[str, Zygote] = {}

    def post(self, callback: Callable[..., Any], *args: Any) -> None:
        if os.getpid() != self.pid:
            raise ResourceError("this sandbox belongs to the process that opened it: after a fork open a new one")
        self.loop.post(callback, *args)

    def zygote(self, recipe: Recipe) -> Zygote:
        """A living zygote for this recipe's interpreter, preloads and template."""
        key = repr((recipe.template, recipe.interpreter, recipe.preload, recipe.outer_user_namespace, recipe.network["mode"]))
        zygote = self.zygotes.get(key)
        if zygote is None or zygote.closed or zygote.opened >= SANDBOXES_PER_ZYGOTE:
            if zygote is not None:
                self._retire(zygote)
            try:
                pid, control = spawn_zygote(
                    str(recipe.interpreter["executable"]), outer_user_namespace=recipe.outer_user_namespace
                )
            except FileNotFoundError as error:
                raise ResourceError(f"{error.filename} is missing: install util-linux") from None
            zygote = Zygote(self.loop, pid, control)
            zygote.set_up(recipe, CALL_MODULES)
            zygote.on_idle = self._idle
            self.zygotes[key] = zygote
        return zygote

    def _idle(self, zygote: Zygote) -> None:
        """Its last sandbox has gone: keep it a while, for the next."""
        opened = zygote.opened

        def let_go() -> None:
            if not zygote.sandboxes and zygote.opened == opened:
                zygote.close()

        if zygote in self.zygotes.values():
            self.loop.call_later(IDLE_SECONDS, let_go)
        else:
            zygote.close()

    def _retire(self, zygote: Zygote) -> None:
        """It gets no further sandbox, and goes with its last."""
        self.zygotes = {key: known for key, known in self.zygotes.items() if known is not zygote}
        if not zygote.sandboxes:
            zygote.close()


_service: Service | None = None
_lock = threading.Lock()


def service() -> Service:
    """The one service of this process; a forked child gets its own."""
    global _service
    with _lock:
        if _service is None or _service.pid != os.getpid():
            _service = Service()
        return _service
