"""A caller to be killed: with a sandbox open it stops its zygote and asks for `count` more.

It says when all are asked for, and for how many of them a folder or a cgroup was made by then.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from integration import harness, plugins
from sandbox import IsolationLevel
from sandbox.engine import service


async def main(level: IsolationLevel, count: int) -> None:
    async with harness.open_sandbox(level) as sandbox:
        await sandbox.execute_plugin_safe(plugins.give_back, 1)
        (zygote,) = service.service().zygotes.values()
        os.kill(harness.zygote_of(sandbox), signal.SIGSTOP)
        before = set(zygote.sandboxes)
        more = [asyncio.create_task(harness.open_sandbox(level).__aenter__()) for _ in range(count)]
        await harness.wait_for(lambda: len(zygote.sandboxes) == len(before) + count)
        asked = [each for name, each in list(zygote.sandboxes.items()) if name not in before]
        print(harness.TOKEN, sum(bool(each.leaf or each.folder) for each in asked), flush=True)
        await asyncio.gather(*more)


asyncio.run(main(IsolationLevel(sys.argv[1]), int(sys.argv[2])))
