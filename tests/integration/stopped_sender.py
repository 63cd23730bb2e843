"""A caller that stops itself as soon as a job is on its way; when it goes on it says which limit has struck.

stopped_sender.py LEVEL
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any

from integration import harness, plugins
from sandbox import IsolationLevel, ResourceLimitExceededError
from sandbox.engine import client

hand_over = client.Call._hand_over


def hand_over_and_stop(self: client.Call, *job: Any) -> None:
    hand_over(self, *job)
    print(harness.TOKEN, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.1)  # of another thread than the main one, which is stopped first


async def main(level: IsolationLevel) -> None:
    async with harness.open_sandbox(level, limits={"max_execution_time_seconds": 0.2 * harness.PATIENCE}) as sandbox:
        client.Call._hand_over = hand_over_and_stop  # type: ignore[method-assign,assignment]
        try:
            await sandbox.execute_plugin_safe(plugins.signal_and_sleep)
        except ResourceLimitExceededError as error:
            print(error.limit, flush=True)


if __name__ == "__main__":
    asyncio.run(main(IsolationLevel(sys.argv[1])))
