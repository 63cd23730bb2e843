"""The resource watch of an open sandbox: for the library and for the command, on the loop that the sandbox is on.

Numbers come from the sandbox's cgroup where that has the memory controller, else from its processes by psutil.
Heavy imports: only a call that has run for client.WATCH_AFTER seconds is worth them.
"""

from __future__ import annotations

import os
from contextlib import suppress

from sandbox.monitor.sources import CgroupSource, Nothing, ProcessSource, Reading
from sandbox.monitor.watch import Thresholds, Watch, Watched
from sandbox.ns import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox.engine.client import Sandbox
    from sandbox.monitor.sources import Source


class SandboxWatch(Watch):
    """A Watch that holds its source only while something runs, and whose memory.high belongs to it: lifted when it has
    warned, since staying it would only slow the plugin down, and set again for the next run."""

    def __init__(self, sandbox: Sandbox) -> None:
        recipe = sandbox.recipe
        self.sandbox = sandbox
        super().__init__(sandbox.loop, Nothing(), Thresholds.of_recipe(recipe), float(recipe.monitoring["interval_seconds"]))
        self.high = int((recipe.cgroup or {}).get("settings", {}).get("memory.high", 0))

    def begin(self) -> Watched:
        if not self.running:
            if isinstance(self.source, Nothing):
                self.source = source_of(self.sandbox)
            self._set_high()
        try:
            return super().begin()
        except BaseException:
            if not self.running:
                self.close()
            raise

    def end(self, run: Watched) -> None:
        super().end(run)
        if not self.running:
            self.close()

    def close(self) -> None:
        super().close()
        self.source = Nothing()

    def start_reading(self) -> Reading | None:
        if isinstance(self.source, CgroupSource):
            return super().start_reading()
        return Reading()  # its processes are: asking psutil would take longer than many a call

    def passed_high(self) -> None:
        super().passed_high()
        self.sandbox.lift_high()

    def _set_high(self) -> None:
        if self.sandbox.high_is_lifted and isinstance(self.source, CgroupSource):
            with suppress(OSError):  # the cgroup has gone
                self.sandbox.high_is_lifted = not self.source.warn_at(self.high)


def source_of(sandbox: Sandbox) -> Source:
    """Raises OSError, and ImportError: psutil is a library, which wants a descriptor too."""
    counts = "memory" in (sandbox.recipe.cgroup or {}).get("controllers", ())
    shared = 0 if sandbox.leaf_fd >= 0 and counts else inherited(sandbox)  # before a descriptor is held
    if sandbox.leaf_fd >= 0:
        cgroup = CgroupSource(os.dup(sandbox.leaf_fd))
        return cgroup if counts else ProcessSource(cgroup.pids, cgroup.close, shared)

    def pids() -> list[int]:
        workers = [int(call.read_back["NSpid"].split()[0]) for call in sandbox.calls.values() if call.read_back]
        return [pid for worker in workers for pid in processes.tree(worker)]

    return ProcessSource(pids, inherited=shared)


def inherited(sandbox: Sandbox) -> int:
    """Bytes that each process of the sandbox has from its zygote."""
    zygote = ProcessSource(lambda: [sandbox.zygote.pid]).read()
    return (zygote.memory if zygote is not None else None) or 0
