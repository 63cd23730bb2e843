"""Metrics of sandboxes for Prometheus, of the extra psie[prometheus]: `CallMetrics` of the calls of this process, and
`StateCollector` of what psie remembers on this host, for an exporter.

Labels are bounded (level, outcome, type, action); plugins are named only where that is asked for. Served by prometheus_client,
which has exporters for a port, WSGI, ASGI and the textfile collector.
"""

from __future__ import annotations

import weakref
from collections import Counter as Tally

from sandbox.config import IsolationLevel
from sandbox.errors import SandboxException
from sandbox.integrations import observers
from sandbox.integrations.logs import line
from sandbox.integrations.observers import SESSION, Observer

try:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector
except ImportError:
    raise ImportError(
        "sandbox.integrations.prometheus needs prometheus_client: pip install 'psie[prometheus]'", name="prometheus_client"
    ) from None

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from typing import Any

    from prometheus_client import CollectorRegistry, Metric

    from sandbox.integrations.observers import ObservedCall
    from sandbox.sandbox import EnhancedPluginSandbox
    from sandbox.violations import SandboxViolation

MB = 1 << 20
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BYTES = tuple(float(MB << power) for power in range(3, 14))  # 8 MB to 8 GB


class CallMetrics(Observer):
    """Counters and histograms of every sandbox of this process, from now on until `close`.

    Args:
        registry: where they are registered; prometheus_client's own if it is left out.
        plugins: whether psie_calls_total has the label `plugin`. Only where there are few: each is a time series more.

    Raises:
        ValueError: `registry` has them already.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, plugins: bool = False) -> None:
        self._registry = registry
        self._plugins = plugins
        more = ("plugin",) if plugins else ()
        self._calls = Counter(
            "psie_calls", "Sandboxed calls, by how they ended.", ("level", "outcome", *more), registry=registry
        )
        self._duration = Histogram(
            "psie_call_duration_seconds", "Until the value or the error of a call was there.", ("level", "outcome"),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._memory = Histogram(
            "psie_call_memory_peak_bytes", "Peak memory of the processes of a call.", ("level",), buckets=BYTES,
            registry=registry,
        )  # fmt: skip
        self._violations = Counter(
            "psie_violations", "Protections that plugins ran into.", ("level", "type"), registry=registry
        )
        self._recoveries = Counter("psie_recoveries", "Steps of recovery.", ("action", "success"), registry=registry)
        self._refused = Counter("psie_sandboxes_refused", "Sandboxes that could not be opened.", ("level",), registry=registry)
        self._open = Gauge("psie_sandboxes_open", "Sandboxes that are open.", ("level",), registry=registry)
        for each in IsolationLevel:
            self._refused.labels(each.value)
            self._open.labels(each.value)
        self._known: weakref.WeakSet[EnhancedPluginSandbox] = weakref.WeakSet()
        observers.add(self)

    def close(self) -> None:
        """Observe nothing more, and take the metrics out of the registry."""
        observers.remove(self)
        for each in (
            *(self._calls, self._duration, self._memory, self._violations),
            *(self._recoveries, self._refused, self._open),
        ):
            self._registry.unregister(each)

    def opened(self, sandbox: EnhancedPluginSandbox) -> None:
        self._known.add(sandbox)
        self._open.labels(sandbox.config.level.value).inc()

    def closed(self, sandbox: EnhancedPluginSandbox, is_clean: bool) -> None:
        if sandbox in self._known:
            self._known.discard(sandbox)
            self._open.labels(sandbox.config.level.value).dec()

    def refused(self, sandbox: EnhancedPluginSandbox, error: BaseException) -> None:
        self._refused.labels(sandbox.config.level.value).inc()

    def call_ended(self, call: ObservedCall) -> None:
        if call.kind != SESSION:
            more = (line(call.name),) if self._plugins else ()
            self._calls.labels(call.level, call.outcome, *more).inc()
            self._duration.labels(call.level, call.outcome).observe(call.seconds)
        if call.peak_memory_mb:
            self._memory.labels(call.level).observe(call.peak_memory_mb * MB)

    def violation(self, sandbox: EnhancedPluginSandbox, violation: SandboxViolation) -> None:
        self._violations.labels(sandbox.config.level.value, violation.type.value).inc()

    def recovered(self, step: dict[str, Any]) -> None:
        self._recoveries.labels(step["action"], str(bool(step["success"])).lower()).inc()


class StateCollector(Collector):
    """What psie's state folder has, looked at anew for each scrape: remembered runs, their violations, quarantines.

    They are gauges, not counters: old runs are forgotten. `REGISTRY.register(StateCollector())` has them exported.

    Args:
        state_folder: psie's own if None. It is open to its owner alone, so an exporter runs as that user.
        plugins: whether psie_remembered_runs has the label `plugin`.
    """

    def __init__(self, state_folder: str | os.PathLike[str] | None = None, *, plugins: bool = False) -> None:
        self._folder = state_folder
        self._plugins = plugins

    def describe(self) -> Iterator[Metric]:
        """Names alone, so that to register it is no look at the disk."""
        yield GaugeMetricFamily("psie_state_readable", "")

    def collect(self) -> Iterator[Metric]:
        from sandbox.recovery.store import Store

        readable = GaugeMetricFamily("psie_state_readable", "Whether psie's state folder could be read for this scrape.")
        try:
            with Store(self._folder) as store:
                statistics, quarantined = store.statistics(), len(store.quarantined())
        except (SandboxException, OSError):
            readable.add_metric((), 0)
            yield readable
            return
        readable.add_metric((), 1)
        runs: Tally[tuple[str, ...]] = Tally()
        violations: Tally[str] = Tally()
        for plugin, found in statistics.items():
            violations.update(found.violations)
            for outcome, number in found.outcomes.items():
                runs[(outcome, line(plugin)) if self._plugins else (outcome,)] += number
        labels = ("outcome", "plugin") if self._plugins else ("outcome",)
        remembered = GaugeMetricFamily("psie_remembered_runs", "Runs that psie remembers.", labels=labels)
        for values, number in sorted(runs.items()):
            remembered.add_metric(values, number)
        of_runs = GaugeMetricFamily("psie_remembered_violations", "Violations in these runs.", labels=("type",))
        for kind, number in sorted(violations.items()):
            of_runs.add_metric((line(kind),), number)
        in_force = GaugeMetricFamily("psie_quarantined_plugins", "Plugins that are quarantined.")
        in_force.add_metric((), quarantined)
        yield from (readable, remembered, of_runs, in_force)
