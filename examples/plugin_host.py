"""A program with plugins in a folder: each is loaded once and asked often, loaded anew when its files change, and kept out for
good once it has tried to break out.

    python examples/plugin_host.py             a folder of its own, with a plugin that changes and one that is hostile
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sandbox import (
    EnhancedPluginFramework,
    FilesystemWatchdog,
    IsolationConfig,
    IsolationLevel,
    PluginError,
    PluginExecutionError,
    PluginLimitsV2,
    SandboxException,
)
from sandbox.text import escape_text

# Whoever runs into one protection more than this is killed and quarantined.
CONFIG = IsolationConfig(level=IsolationLevel.STRICT, violation_threshold=1, quarantine_on_violation=True)


class Host:
    """`async with Host(folder) as host: await host.call("plugin", "function", argument)`."""

    def __init__(self, folder: str, state_folder: str | None = None) -> None:
        limits = PluginLimitsV2(max_memory_mb=64, max_execution_time_seconds=2)
        self.framework = EnhancedPluginFramework(folder, CONFIG, limits=limits, state_folder=state_folder)
        self.watchdog = FilesystemWatchdog(folder, CONFIG)
        self.sessions: dict[str, tuple[AsyncExitStack, Any]] = {}
        self.seen = 0  # file operations

    async def __aenter__(self) -> Self:
        if not self.watchdog.start_watching():
            raise RuntimeError(self.watchdog.reason)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for plugin_id in list(self.sessions):
            await self.unload(plugin_id)
        self.watchdog.stop_watching()
        self.framework.close()

    async def call(self, plugin_id: str, function: str, *arguments: object) -> Any:
        """What the plugin's function returns. Raises SandboxException; PluginError for one that is quarantined or broken."""
        await self.unload_changed()
        if plugin_id not in self.sessions:
            stack = AsyncExitStack()
            session = await stack.enter_async_context(self.framework.open_plugin(plugin_id))
            self.sessions[plugin_id] = stack, session
        try:
            return await self.sessions[plugin_id][1].call(function, *arguments)
        except PluginExecutionError:
            raise  # its own mistake: it goes on with what it has
        except SandboxException:
            await self.unload(plugin_id)  # it is judged now: see framework.get_quarantined_plugins()
            raise

    async def unload_changed(self) -> None:
        count, operations = self.watchdog.count, self.watchdog.get_file_operations()
        new, self.seen = operations[len(operations) - (count - self.seen) :] if count > self.seen else [], count
        for record in new:
            plugin_id = record["path"].split("/")[0].partition(".")[0]  # of ID.py, ID.toml and of what is in ID/
            await self.unload(plugin_id)

    async def unload(self, plugin_id: str) -> None:
        stack, _ = self.sessions.pop(plugin_id, (AsyncExitStack(), None))
        await stack.aclose()


COUNTER = """
COUNT = 0

def add(number):
    global COUNT
    COUNT += number
    return f"{GREETING}, {COUNT}"

GREETING = "one"
"""
HOSTILE = """
import os, socket

def add(number):
    for attempt in (os.fork, lambda: socket.socket(socket.AF_PACKET), lambda: socket.create_connection(("192.0.2.1", 80))):
        try:
            attempt()
        except OSError:
            pass
    return "nobody has noticed"
"""


async def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "plugins")
        folder.mkdir()
        (folder / "counter.py").write_text(COUNTER)
        (folder / "hostile.py").write_text(HOSTILE)
        async with Host(str(folder), f"{place}/state") as host:
            print(await host.call("counter", "add", 2), "|", await host.call("counter", "add", 3))
            (folder / "counter.py").write_text(COUNTER.replace("one", "two"))
            await asyncio.sleep(0.5)  # until the watchdog has seen it
            print(await host.call("counter", "add", 4))
            for _ in range(2):
                try:
                    print(await host.call("hostile", "add", 1))
                except (SandboxException, PluginError) as error:
                    print(f"{type(error).__name__}: {escape_text(str(error)).splitlines()[0]}")
            print("quarantined:", [row["plugin_id"] for row in host.framework.get_quarantined_plugins()])


if __name__ == "__main__":
    asyncio.run(main())
