"""A caller to be killed: opens a sandbox, says when `count` calls are running in it, and never ends by itself."""

from __future__ import annotations

import asyncio
import sys

from integration import harness, plugins
from sandbox import IsolationLevel


async def main(level: IsolationLevel, count: int) -> None:
    async with harness.open_sandbox(level, limits={"max_thread_count": 50}) as sandbox:
        names = [f"started-{number}" for number in range(count)]
        calls = [asyncio.create_task(sandbox.execute_plugin_safe(plugins.signal_and_sleep, name)) for name in names]

        def stand() -> bool:
            """All are running, or one has failed already."""
            return any(call.done() for call in calls) or all((sandbox.temp_directory / name).exists() for name in names)

        await harness.wait_for(stand, 20 * harness.PATIENCE)
        if not any(call.done() for call in calls):
            print(harness.TOKEN, flush=True)
        await asyncio.gather(*calls)


asyncio.run(main(IsolationLevel(sys.argv[1]), int(sys.argv[2])))
