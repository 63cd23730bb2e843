"""Spans and metrics of sandboxed calls by the OpenTelemetry API: `instrument()`, of the extra psie[otel].

A span `psie.call` for each call, a child of the caller's current span, with violations and recovery steps as its events, and
`psie.session` for the process of a session; metrics `psie.calls`, `psie.call.duration` (s), `psie.call.memory.peak` (By),
`psie.violations`, `psie.recoveries` and `psie.sandboxes.open`. Attributes of metrics are bounded; what names a plugin or a
sandbox is in spans alone, escaped. Needs the API only: who exports what is the application's business.
"""

from __future__ import annotations

import weakref
from datetime import datetime

from sandbox.integrations import observers
from sandbox.integrations.logs import line
from sandbox.integrations.observers import SESSION, Observer
from sandbox.version import __version__

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import Status, StatusCode
except ImportError:
    raise ImportError(
        "sandbox.integrations.otel needs the OpenTelemetry API: pip install 'psie[otel]'", name="opentelemetry"
    ) from None

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

    from sandbox.integrations.observers import ObservedCall
    from sandbox.sandbox import EnhancedPluginSandbox
    from sandbox.violations import SandboxViolation

MB = 1 << 20
EVENTS = 64  # of violations, and as many of recovery, in one span: the SDK keeps 128
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BYTES = tuple(float(MB << power) for power in range(3, 14))  # 8 MB to 8 GB


class Telemetry(Observer):
    """The observer that `instrument` adds."""

    def __init__(self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None) -> None:
        self._tracer = trace.get_tracer("psie", __version__, tracer_provider)
        meter = metrics.get_meter("psie", __version__, meter_provider)
        self._calls = meter.create_counter("psie.calls", "{call}", "Sandboxed calls, by how they ended")
        self._duration = meter.create_histogram(
            "psie.call.duration", "s", "Until the value or the error of a call was there",
            explicit_bucket_boundaries_advisory=SECONDS,
        )  # fmt: skip
        self._memory = meter.create_histogram(
            "psie.call.memory.peak", "By", "Peak memory of the processes of a call",
            explicit_bucket_boundaries_advisory=BYTES,
        )  # fmt: skip
        self._violations = meter.create_counter("psie.violations", "{violation}", "Protections that plugins ran into")
        self._recoveries = meter.create_counter("psie.recoveries", "{step}", "Steps of recovery")
        self._open = meter.create_up_down_counter("psie.sandboxes.open", "{sandbox}", "Sandboxes that are open")
        self._spans: weakref.WeakKeyDictionary[ObservedCall, Span] = weakref.WeakKeyDictionary()

    def opened(self, sandbox: EnhancedPluginSandbox) -> None:
        self._open.add(1, {"psie.level": sandbox.config.level.value})

    def closed(self, sandbox: EnhancedPluginSandbox, is_clean: bool) -> None:
        self._open.add(-1, {"psie.level": sandbox.config.level.value})

    def violation(self, sandbox: EnhancedPluginSandbox, violation: SandboxViolation) -> None:
        self._violations.add(1, {"psie.level": sandbox.config.level.value, "psie.violation.type": violation.type.value})

    def recovered(self, step: dict[str, Any]) -> None:
        self._recoveries.add(1, {"psie.recovery.action": step["action"], "psie.recovery.success": bool(step["success"])})

    def call_begins(self, call: ObservedCall) -> None:
        attributes = {
            "psie.level": call.level,
            "psie.call.kind": call.kind,
            "psie.plugin.id": line(call.name),
            "psie.sandbox.id": line(call.sandbox.sandbox_id),
        }
        name = "psie.session" if call.kind == SESSION else "psie.call"
        self._spans[call] = self._tracer.start_span(name, attributes=attributes, start_time=nanoseconds(call.started))

    def call_ended(self, call: ObservedCall) -> None:
        self._measure(call)
        span = self._spans.pop(call, None)
        if span is None:  # it began before anybody observed
            return
        if span.is_recording():
            describe(span, call)
        span.end(nanoseconds(call.started + call.seconds))

    def _measure(self, call: ObservedCall) -> None:
        attributes = {"psie.level": call.level, "psie.outcome": call.outcome}
        if call.kind != SESSION:
            self._calls.add(1, attributes)
            self._duration.record(call.seconds, attributes)
        if call.peak_memory_mb:
            self._memory.record(int(call.peak_memory_mb * MB), attributes)


def describe(span: Span, call: ObservedCall) -> None:
    """What is known of a call after its end."""
    span.set_attributes({"psie.call.id": call.call_id, "psie.outcome": call.outcome, "psie.exit.reason": line(call.reason)})
    if call.exit_code is not None:
        span.set_attribute("psie.exit.code", call.exit_code)
    if call.peak_memory_mb:
        span.set_attribute("psie.memory.peak", int(call.peak_memory_mb * MB))
    if call.peak_cpu_percent:
        span.set_attribute("psie.cpu.peak", call.peak_cpu_percent)
    for violation in call.violations[:EVENTS]:
        found = {"psie.violation.type": violation.type.value, "psie.violation.message": line(violation.message)}
        span.add_event("psie.violation", found, nanoseconds(violation.timestamp.timestamp()))
    for step in call.recovery[:EVENTS]:
        done = {"psie.recovery.action": step["action"], "psie.recovery.success": bool(step["success"])}
        when = datetime.fromisoformat(step["timestamp"]).timestamp()
        span.add_event("psie.recovery", {**done, "psie.recovery.note": line(step["note"])}, nanoseconds(when))
    if call.outcome != "ok":
        span.set_attribute("error.type", call.outcome)
        span.set_status(Status(StatusCode.ERROR, line(call.reason)))


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


_telemetry: Telemetry | None = None


def instrument(*, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None) -> None:
    """Have spans and metrics made of every sandbox of this process from now on, by these providers or the global ones.

    A second time it changes nothing, until `uninstrument`.
    """
    global _telemetry
    if _telemetry is None:
        _telemetry = Telemetry(tracer_provider, meter_provider)
        observers.add(_telemetry)


def uninstrument() -> None:
    """Make no more of them; fine if none were made."""
    global _telemetry
    if _telemetry is not None:
        observers.remove(_telemetry)
        _telemetry = None


class PsieInstrumentor:
    """The same in the shape that `opentelemetry-instrument` looks for (entry point opentelemetry_instrumentor)."""

    def instrument(self, **given: Any) -> None:
        instrument(tracer_provider=given.get("tracer_provider"), meter_provider=given.get("meter_provider"))

    def uninstrument(self, **_: Any) -> None:
        uninstrument()

    def instrumentation_dependencies(self) -> Collection[str]:
        """None: it comes with what it instruments."""
        return ()
