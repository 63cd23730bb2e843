"""A caller that forks after it has used a sandbox; prints what the child could and could not do."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from integration import harness, plugins
from sandbox import IsolationLevel


async def main(level: IsolationLevel) -> None:
    async with harness.open_sandbox(level) as sandbox:
        await sandbox.execute_plugin_safe(plugins.give_back, 1)
        pid = os.fork()
        if pid == 0:
            asyncio.events._set_running_loop(None)
            try:
                asyncio.run(sandbox.execute_plugin_safe(plugins.give_back, 2))
            except Exception as error:
                print("inherited:", type(error).__name__, error)
            print("own:", harness.call(level, plugins.give_back, 3), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        print("parent:", await sandbox.execute_plugin_safe(plugins.give_back, 4))
        assert sandbox._sandbox is not None
        lock = sandbox._sandbox.slot.fd
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:  # lives on with copies of all that its parent has
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        copy = Path(f"/proc/{pid}/fdinfo/{lock}")
        assert "lock:" in copy.read_text(), "the fork has no copy of the lock that keeps the place"
    # Not by claiming the place: any other sandbox of this user may have it by now.
    print("place:", "taken" if "lock:" in copy.read_text() else "free")
    os.close(writer)
    os.waitpid(pid, 0)


asyncio.run(main(IsolationLevel(sys.argv[1])))
