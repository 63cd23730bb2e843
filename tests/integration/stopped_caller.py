"""A caller to be stopped: opens a sandbox with a lifetime of LIFETIME seconds and a granted folder, and tries to commit.

    stopped_caller.py LEVEL FOLDER

It says when it may be stopped, waits for FOLDER/../go without its event loop, and says what became of a commit and a call.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from integration import harness, plugins
from sandbox import IsolationLevel
from sandbox.engine import client

LIFETIME = 1.0 * harness.PATIENCE


async def main(level: IsolationLevel, folder: Path) -> None:
    permissions = {"allowed_directories": [str(folder)]}
    async with harness.open_sandbox(level, permissions=permissions) as sandbox:
        await sandbox.execute_plugin_safe(plugins.signal_and_sleep, str(folder / "made"), 0.0)
        print(harness.TOKEN, flush=True)
        while not folder.with_name("go").exists():
            time.sleep(0.01)
        for attempt in (sandbox.commit_changes(), sandbox.execute_plugin_safe(plugins.give_back, 1)):
            try:
                await attempt
                print("done", flush=True)
            except Exception as error:
                print(type(error).__name__, str(error).splitlines()[0], flush=True)


if __name__ == "__main__":
    client.Sandbox.lifetime = LIFETIME  # type: ignore[method-assign,assignment]
    asyncio.run(main(IsolationLevel(sys.argv[1]), Path(sys.argv[2])))
