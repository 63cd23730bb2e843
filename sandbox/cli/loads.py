"""`psie plugins run`: runs plugins of a plugin folder with the framework, and tells what became of each.

What plugins print goes to stderr, so that stdout holds the table, or the JSON, alone; what they say is escaped.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import redirect_stdout

from sandbox.cli import endings, settings
from sandbox.cli.call import jsonable
from sandbox.cli.plugins import complain
from sandbox.errors import SandboxException
from sandbox.integrations import logs
from sandbox.plugins.framework import OK, EnhancedPluginFramework

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox.plugins.framework import Load


@endings.by_exception()
def run(
    folder: str, ids: tuple[str, ...], level: str | None, config: str | None, as_json: bool, trusted_keys: str | None
) -> int:
    try:
        logs.to_stderr()
        isolation, limits, permissions = settings.settings({"level": level, "config": config})
        framework = EnhancedPluginFramework(
            folder, isolation, limits=limits, permissions=permissions, trusted_keys=trusted_keys
        )
        wanted = list(dict.fromkeys(ids)) or [found.id for found in framework.discover_plugins()]
        with redirect_stdout(sys.stderr):
            loads = asyncio.run(load_all(framework, wanted))
        framework.close()
    except (SandboxException, ValueError, TypeError) as error:
        return complain(error)
    if as_json:
        documents = [told(load) for load in loads]
        print(json.dumps(documents, indent=2))
        return int(not all(each["success"] for each in documents))
    print_loads(loads)
    return int(any(load.outcome != OK for load in loads))


def told(load: Load) -> dict[str, Any]:
    """As JSON has it; a result that it cannot have is none, and an error of that plugin alone."""
    fields = load.to_dict()
    try:
        fields["result"] = jsonable(fields["result"])
        json.dumps(fields["result"])
    except ValueError as error:  # Python's bound on the digits of an int
        reason = f"the result is no JSON: {str(error).partition(';')[0]}"
        fields |= {"success": False, "result": None, "error": reason}
    return {name: jsonable(value) for name, value in fields.items()}


async def load_all(framework: EnhancedPluginFramework, ids: list[str]) -> list[Load]:
    """All at once: the framework sees to it that no more run than there is room for."""
    return await asyncio.gather(*map(framework.load, ids))


def print_loads(loads: list[Load]) -> None:
    from sandbox.cli.table import print_table

    rows = []
    for load in loads:
        reason = load.error or ""
        for step in load.recovery:
            if step["action"] == "retry":
                reason = f"{reason}; " if reason else ""
                reason += f"at the second try, with {step['after']['max_memory_mb']:g} MB"
        if load.quarantined:
            reason = f"{reason}; it is quarantined now" if load.error else f"it is quarantined now: {load.quarantined}"
        peak = load.telemetry.peak_memory_mb  # 0.0: nobody has seen it, as of one that was killed at once
        rows.append([load.outcome, load.plugin_id, f"{load.seconds:.2f}", f"{peak:.1f}" if peak else "", reason])
    print_table(["outcome", "plugin", "seconds", "peak MB", "reason"], rows)
