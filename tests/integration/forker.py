"""A caller that forks after it has used a sandbox; prints what the child could and could not do."""

from __future__ import annotations

import asyncio
import os
import sys

from integration import harness, plugins
from sandbox import IsolationLevel
from sandbox.ns import userids


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
        place = sandbox._sandbox.slot.name
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:  # lives on with copies of all that its parent has
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    held = userids.hold(place)
    print("place:", "taken" if held is None else "free")
    os.close(writer)
    os.waitpid(pid, 0)


asyncio.run(main(IsolationLevel(sys.argv[1])))
