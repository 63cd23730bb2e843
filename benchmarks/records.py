"""`python -m benchmarks.records`: how long `psie history` and the statistics take when 10,000 runs are remembered.

`psie history` as a process, from its start to its end, and `Store.statistics` in this one: medians in ms, and whether the
target of 200 ms is met. Beside them what one record costs: a run (that waits in the spool), 1,000 of them as they become rows
and lines of the audit, a quarantine (on disk at once), a line of the audit (likewise).
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from sandbox import EnhancedPluginFramework, PluginLimitsV2
from sandbox.recovery import spool
from sandbox.recovery.audit import AuditLog
from sandbox.recovery.store import OUTCOMES, Run, Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ROUNDS = 30
RUNS, PLUGINS = 10_000, 50
TARGET = 200.0  # ms
LIMITS = vars(PluginLimitsV2())


def a_run(number: int) -> Run:
    chance = random.Random(number)
    return Run(
        time.time() - number,
        f"plugin-{number % PLUGINS}",
        "ab" * 32,
        "strict",
        chance.choice(OUTCOMES),
        "library",
        seconds=chance.expovariate(1),
        peak_memory_mb=chance.uniform(1, 500),
        violations=[{"type": "network_violation", "message": "x" * 200}] * chance.randrange(3),
    )


def median(work: Callable[[], object]) -> float:
    """Milliseconds."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


def record(folder: str) -> None:
    run: dict[str, Any] = {
        "plugin_id": "p",
        "sha256": "",
        "level": "strict",
        "outcome": "ok",
        "door": "library",
        "reason": "returned",
    }
    spool.append(folder, started=time.time(), limits=LIMITS, **run)


def moved(store: Store) -> float:
    """Milliseconds."""
    for _ in range(1000):
        record(store.folder)
    start = time.perf_counter()
    store.collect()
    return (time.perf_counter() - start) * 1000


def tell(name: str, milliseconds: float, *, target: bool = False) -> None:
    verdict = f"  (at most {TARGET:g} ms: {'met' if milliseconds <= TARGET else 'MISSED'})" if target else ""
    print(f"{name:<28}{milliseconds:9.2f} ms{verdict}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="psie-records-") as base:
        folder = os.path.join(base, "psie")
        os.mkdir(folder, 0o700)
        command = [sys.executable, "-m", "sandbox.cli", "history"]
        if os.getuid() == 0:  # root's records have a place that no variable changes
            os.makedirs("/var/lib/psie", mode=0o711, exist_ok=True)
            mounted = 'mount --bind "$0" /var/lib/psie && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mounted, folder, *command]
        environment = {**os.environ, "XDG_STATE_HOME": base}
        with Store(folder) as store:
            store.add_runs([a_run(number) for number in range(RUNS)])
            history = median(lambda: subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True))
            tell("psie history, as a process", history, target=True)
            tell(f"statistics of {RUNS:,} runs", median(store.statistics), target=True)
            framework = EnhancedPluginFramework(base, state_folder=folder)
            tell("telemetry of the framework", median(framework.get_framework_telemetry), target=True)
            framework.close()
            tell("one run recorded", median(lambda: record(folder)))
            tell("1,000 of them made rows", statistics.median(moved(store) for _ in range(5)))
            tell("one plugin quarantined", median(lambda: store.quarantine("bad", None, "", [], "benchmark")))
            log = AuditLog(store)
            tell("one line of the audit", median(lambda: log.append("event", plugin_id="bad")))


if __name__ == "__main__":
    main()
