"""`psie history`: the runs that are remembered, newest first."""

from __future__ import annotations

import json

from sandbox.cli import records
from sandbox.cli.inputs import UsageError
from sandbox.cli.options import LEVELS
from sandbox.recovery.store import OUTCOMES, Run, Store

MOST = 1 << 31  # rows: SQLite knows no number that is much larger


def history(plugin: str | None, level: str | None, outcome: str | None, since: str | None, limit: int, as_json: bool) -> int:
    """Print them; 0 also where there are none."""

    def show(store: Store) -> int:
        for option, value, known in (("--level", level, LEVELS), ("--outcome", outcome, OUTCOMES)):
            if value is not None and value not in known:
                raise UsageError(f"{option} {value}: give one of {', '.join(known)}")
        if limit < 1:
            raise UsageError(f"--limit {limit}: give a number above 0")
        name = records.known_as(plugin, lambda each: bool(store.runs(each, limit=1))) if plugin is not None else None
        found = store.runs(name, level, outcome, records.since(since), min(limit, MOST))
        if as_json:
            print(json.dumps([run.to_dict() for run in found], indent=2))
        elif found:
            from sandbox.cli.table import print_table

            head = ["outcome", "started", "plugin", "level", "status", "seconds", "MB", "violations", "by", "reason"]
            print_table(head, [row(run) for run in found])
        else:
            print("no such run is remembered")
        return 0

    return records.with_store(show)


def row(run: Run) -> list[str]:
    status = "" if run.exit_code is None else str(run.exit_code)
    numbers = [f"{run.seconds:.3f}", f"{run.peak_memory_mb:.1f}" if run.peak_memory_mb else "", str(len(run.violations) or "")]
    return [run.outcome, records.shown_time(run.started), run.plugin_id, run.level, status, *numbers, run.door, run.reason]
