"""Tells, as JSON, what every level does on the host that it finds itself on: a value and protections, or the refusal.

Run as a script in a namespace that lacks something. Arguments: names of IsolationConfig's switches to be True.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from integration import harness, plugins
from sandbox import IsolationLevel, SandboxException


async def look(level: IsolationLevel, **config: Any) -> dict[str, Any]:
    try:
        async with harness.open_sandbox(level, config=config) as sandbox:
            seen = await sandbox.execute_plugin_safe(plugins.surroundings)
            return {"seen": seen, "protections": {item.name: item.to_dict() for item in sandbox.protections}}
    except SandboxException as error:
        fields = {name: getattr(error, name, None) for name in ("protection", "line", "mend")}
        return {"error": type(error).__name__, "text": str(error), **fields}


async def main() -> None:
    config = dict.fromkeys(sys.argv[1:], True)
    before = harness.snapshot()
    found = {level.value: await look(level, **config) for level in IsolationLevel}
    left: dict[str, list[str]] = {}

    def is_clean() -> bool:
        nonlocal left
        left = harness.news(before)
        return not left

    harness.wait_until(is_clean)  # later on a zygote that nobody needs may just be leaving, and its idle wardens after it
    print(json.dumps({"uid": os.getuid(), "levels": found, "left": left}))


asyncio.run(main())
