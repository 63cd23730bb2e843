"""What observers of sandboxes are told, by logging, OpenTelemetry and Prometheus: each through its own library, for real."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from sandbox import (
    EnhancedPluginFramework,
    IsolationConfig,
    IsolationLevel,
    PluginExecutionError,
    ResourceLimitExceededError,
    SandboxExecutor,
    SandboxInitializationError,
)
from sandbox.integrations import observers, otel, prometheus
from sandbox.integrations.observers import ObservedCall, Observer
from sandbox.recovery.store import Run, Store

from . import harness

STRICT = IsolationLevel.STRICT
FORGED = "x\nWARNING root forged\x1b[2J"


def double(number: int) -> int:
    return 2 * number


def fail(text: str) -> None:
    raise ValueError(text)


def refused(name: str) -> str:
    """Catches what it is refused."""
    try:
        open(f"/etc/{name}", "w").close()
    except OSError as error:
        return type(error).__name__
    return "written"


def spin() -> None:
    while True:
        pass


class Seen(Observer):
    """All that an observer is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.calls: list[ObservedCall] = []

    def opened(self, sandbox: Any) -> None:
        self.told.append(("opened", sandbox.sandbox_id))

    def refused(self, sandbox: Any, error: BaseException) -> None:
        self.told.append(("refused", type(error).__name__))

    def call_begins(self, call: ObservedCall) -> None:
        self.told.append(("begins", call.name))

    def call_ended(self, call: ObservedCall) -> None:
        self.told.append(("ended", call.name))
        self.calls.append(call)

    def violation(self, sandbox: Any, violation: Any) -> None:
        self.told.append(("violation", violation.type.value))

    def recovered(self, step: dict[str, Any]) -> None:
        self.told.append(("recovered", step["action"]))

    def closed(self, sandbox: Any, is_clean: bool) -> None:
        self.told.append(("closed", is_clean))


@pytest.fixture
def seen() -> Iterator[Seen]:
    observer = Seen()
    observers.add(observer)
    yield observer
    observers.remove(observer)


async def story(level: IsolationLevel = STRICT, **settings: Any) -> None:
    """A call that returns, one that raises, one that is refused something, and a session of two."""
    async with harness.open_sandbox(level, sandbox_id="story", **settings) as sandbox:
        assert await sandbox.execute_plugin_safe(double, 4) == 8
        with pytest.raises(PluginExecutionError):
            await sandbox.execute_plugin_safe(fail, FORGED)
        assert await sandbox.execute_plugin_safe(refused, FORGED) != "written"
        async with sandbox.session() as session:
            assert await session.call(double, 5) == 10
            with pytest.raises(PluginExecutionError):
                await session.call(fail, "no")


# -- observers -------------------------------------------------------------------------------------------------------------


def test_told_in_order(seen: Seen) -> None:
    asyncio.run(story())
    names = [what for what, _ in seen.told]
    assert names[0] == "opened"
    assert names[-1] == "closed"
    assert names.count("violation") == 1
    assert [(call.kind, call.name, call.outcome) for call in seen.calls if call.kind != "session"] == [
        ("call", "double", "ok"),
        ("call", "fail", "error"),
        ("call", "refused", "ok"),
        ("session call", "double", "ok"),
        ("session call", "fail", "error"),
    ]
    (process,) = [call for call in seen.calls if call.kind == "session"]
    assert process.outcome == "ok"
    assert process.exit_code == 0
    assert process.peak_memory_mb > 0
    first = seen.calls[0]
    assert (first.level, first.reason, first.violations) == ("strict", "returned", [])
    assert first.seconds > 0
    assert first.call_id.isdecimal()
    (violation,) = next(call for call in seen.calls if call.name == "refused").violations
    assert violation.type.value == "filesystem_violation"


def test_time_is_over_and_recovered(seen: Seen) -> None:
    with pytest.raises(ResourceLimitExceededError):
        harness.call(STRICT, spin, limits={"max_execution_time_seconds": 0.3})
    (call,) = seen.calls
    assert call.outcome == "limit"
    assert ("closed", True) in seen.told


def test_cancelled(seen: Seen) -> None:
    async def main() -> None:
        async with harness.open_sandbox(STRICT) as sandbox:
            task = asyncio.create_task(sandbox.execute_plugin_safe(spin))
            while ("begins", "spin") not in seen.told:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert [(call.name, call.outcome) for call in seen.calls] == [("spin", "cancelled")]


def test_refused_sandbox(seen: Seen) -> None:
    with pytest.raises(SandboxInitializationError):
        harness.call(STRICT, double, 1, config={"enable_network_isolation": False})
    assert seen.told == [("refused", "SandboxInitializationError")]


def test_executor_and_framework_are_observed(seen: Seen, tmp_path: Path) -> None:
    with SandboxExecutor(1, level="strict") as executor:
        assert executor.submit(double, 3).result() == 6
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "one.py").write_text("def main():\n    return 1\n")
    framework = EnhancedPluginFramework(str(tmp_path / "plugins"), IsolationConfig(level=STRICT))
    assert asyncio.run(framework.load_plugin_enhanced("one"))["result"] == 1
    framework.close()
    assert [(call.name, call.outcome) for call in seen.calls] == [("double", "ok"), ("one", "ok")]
    assert [what for what, _ in seen.told].count("closed") == 2


def test_one_that_raises_changes_nothing(seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def call_begins(self, call: ObservedCall) -> None:
            raise RuntimeError("mine")

    broken = Broken()
    observers.add(broken)
    try:
        assert harness.call(STRICT, double, 2) == 4
    finally:
        observers.remove(broken)
    assert [(record.name, record.message) for record in caplog.records] == [("psie.observers", "Broken.call_begins failed")]
    assert ("ended", "double") in seen.told


def test_only_observers() -> None:
    with pytest.raises(TypeError, match="is no Observer"):
        observers.add(object())  # type: ignore[arg-type]


# -- logging -----------------------------------------------------------------------------------------------------------------


def test_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="psie")
    asyncio.run(story())
    said = {(record.name, record.levelname) for record in caplog.records}
    assert {("psie.sandbox", "DEBUG"), ("psie.call", "DEBUG"), ("psie.call", "INFO"), ("psie.violation", "WARNING")} <= said
    ended = [record for record in caplog.records if record.name == "psie.call" and record.levelname == "INFO"]
    assert [vars(record)["outcome"] for record in ended] == ["ok", "error", "ok", "ok", "error"]
    for record in ended:
        fields = vars(record)
        assert fields["sandbox_id"] == "story"
        assert fields["call_id"].isdecimal()
        assert fields["plugin_id"] in ("double", "fail", "refused")
        for name in ("sandbox_id", "call_id", "plugin_id"):
            assert fields[name] in record.message


def test_silent_unless_configured(tmp_path: Path) -> None:
    """A process that has never heard of logging: nothing on stderr, also of a violation and of degraded protections."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import asyncio
            from sandbox import EnhancedPluginSandbox, IsolationConfig, IsolationLevel, PluginLimitsV2, PluginPermissionsV2

            def refused():
                try:
                    open("/etc/no", "w")
                except OSError:
                    return "refused"

            async def main():
                config = IsolationConfig(level=IsolationLevel.STRICT, telemetry_enabled=False)
                async with EnhancedPluginSandbox(PluginLimitsV2(), PluginPermissionsV2(), config) as sandbox:
                    print(await sandbox.execute_plugin_safe(refused), len(sandbox.get_violations()))

            asyncio.run(main())
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        capture_output=True,
        text=True,
        check=True,
        cwd=harness.REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
    )
    assert (done.stdout, done.stderr) == ("refused 1\n", "")


@pytest.mark.parametrize("level", ["", "INFO", "lots"])
def test_the_level_of_the_environment(level: str, tmp_path: Path) -> None:
    """SANDBOX_LOG_LEVEL is for `psie plugins run`, whose table says the rest."""
    (tmp_path / "one.py").write_text(
        "def main():\n    try:\n        open('/etc/no', 'w')\n    except OSError:\n        return 1\n"
    )
    env = {**os.environ, "SANDBOX_LOG_LEVEL": level, "SANDBOX_TELEMETRY_ENABLED": "0"}
    words = [sys.executable, "-m", "sandbox.cli", "plugins", "run", str(tmp_path), "--level", "strict"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=harness.REPOSITORY, env=env)
    if level == "lots":
        assert done.returncode == 125
        assert "SANDBOX_LOG_LEVEL" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert ("psie: WARNING: " in done.stderr) == (level == "INFO")
    assert ("call 1 of one: ok after" in done.stderr) == (level == "INFO")


# -- OpenTelemetry -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def telemetry() -> Iterator[tuple[TracerProvider, InMemorySpanExporter, InMemoryMetricReader]]:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider(metric_readers=[reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    otel.instrument(tracer_provider=tracers, meter_provider=meters)
    yield tracers, exporter, reader
    otel.uninstrument()
    meters.shutdown()
    tracers.shutdown()


def points(reader: InMemoryMetricReader) -> dict[str, list[NumberDataPoint | HistogramDataPoint]]:
    data = reader.get_metrics_data()
    assert data is not None
    found: dict[str, list[Any]] = {}
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                found.setdefault(metric.name, []).extend(metric.data.data_points)
    return found


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_spans(telemetry: tuple[TracerProvider, InMemorySpanExporter, InMemoryMetricReader]) -> None:
    tracers, exporter, _ = telemetry

    async def main() -> None:
        with trace.get_tracer("caller", tracer_provider=tracers).start_as_current_span("request"):
            await story()

    asyncio.run(main())
    spans = {(span.name, attributes(span).get("psie.plugin.id"), attributes(span).get("psie.call.kind")): span
             for span in exporter.get_finished_spans()}  # fmt: skip
    request = spans.pop(("request", None, None))
    assert set(spans) == {
        ("psie.call", "double", "call"),
        ("psie.call", "fail", "call"),
        ("psie.call", "refused", "call"),
        ("psie.call", "double", "session call"),
        ("psie.call", "fail", "session call"),
        ("psie.session", "session", "session"),
    }
    for span in spans.values():
        assert span.parent is not None
        assert request.context is not None
        assert span.parent.span_id == request.context.span_id
        assert attributes(span)["psie.sandbox.id"] == "story"
        assert attributes(span)["psie.level"] == "strict"
        assert span.end_time is not None
        assert span.start_time is not None
        assert span.end_time > span.start_time
    good, bad = spans["psie.call", "double", "call"], spans["psie.call", "fail", "call"]
    assert good.status.is_ok
    assert attributes(good)["psie.exit.code"] == 0
    assert attributes(good)["psie.memory.peak"] > 1 << 20
    assert bad.status.status_code is trace.StatusCode.ERROR
    assert attributes(bad)["error.type"] == "error"
    assert "forged" in str(bad.status.description)
    assert not any(char in str(bad.status.description) for char in "\n\x1b")
    (event,) = spans["psie.call", "refused", "call"].events
    assert event.name == "psie.violation"
    assert (event.attributes or {})["psie.violation.type"] == "filesystem_violation"


def test_a_submitters_span_is_the_parent(
    telemetry: tuple[TracerProvider, InMemorySpanExporter, InMemoryMetricReader],
) -> None:
    """An executor runs calls in a thread of its own, of several callers side by side."""
    tracers, exporter, _ = telemetry
    tracer = trace.get_tracer("caller", tracer_provider=tracers)
    with SandboxExecutor(1, level="minimal") as executor:
        futures = []
        for number in (1, 2):
            with tracer.start_as_current_span(f"request {number}"):
                futures.append(executor.submit(double, number))
        assert [future.result() for future in futures] == [2, 4]
    spans = exporter.get_finished_spans()
    parents = {span.context.span_id for span in spans if span.name.startswith("request") and span.context is not None}
    calls = [span.parent.span_id for span in spans if span.name == "psie.call" and span.parent is not None]
    assert len(calls) == 2
    assert set(calls) == parents


def test_otel_metrics(telemetry: tuple[TracerProvider, InMemorySpanExporter, InMemoryMetricReader]) -> None:
    _, _, reader = telemetry

    async def main() -> None:
        async with harness.open_sandbox(STRICT):
            assert [point.value for point in points(reader)["psie.sandboxes.open"]] == [1]  # type: ignore[union-attr]
        await story()

    asyncio.run(main())
    found = points(reader)
    calls = {(point.attributes or {})["psie.outcome"]: point.value for point in found["psie.calls"]}  # type: ignore[union-attr]
    assert calls == {"ok": 3, "error": 2}
    for name, count in (("psie.call.duration", 5), ("psie.call.memory.peak", 4)):
        assert sum(point.count for point in found[name] if isinstance(point, HistogramDataPoint)) == count
    assert [point.value for point in found["psie.sandboxes.open"]] == [0]  # type: ignore[union-attr]
    assert [point.value for point in found["psie.violations"]] == [1]  # type: ignore[union-attr]


def test_instrumentor_is_found() -> None:
    (entry,) = [each for each in entry_points(group="opentelemetry_instrumentor") if each.name == "psie"]
    instrumentor = entry.load()()
    before = observers.active
    instrumentor.instrument(skip_dep_check=True)
    instrumentor.instrument()
    try:
        assert len(observers.active) == len(before) + 1
    finally:
        instrumentor.uninstrument()
    assert observers.active == before
    assert list(instrumentor.instrumentation_dependencies()) == []


# -- Prometheus --------------------------------------------------------------------------------------------------------------


def test_prometheus_metrics() -> None:
    registry = CollectorRegistry()
    metrics = prometheus.CallMetrics(registry)
    try:
        asyncio.run(story())
        with pytest.raises(SandboxInitializationError):
            harness.call(STRICT, double, 1, config={"enable_network_isolation": False})
        value = registry.get_sample_value
        assert value("psie_calls_total", {"level": "strict", "outcome": "ok"}) == 3
        assert value("psie_calls_total", {"level": "strict", "outcome": "error"}) == 2
        assert value("psie_call_duration_seconds_count", {"level": "strict", "outcome": "ok"}) == 3
        assert value("psie_call_memory_peak_bytes_count", {"level": "strict"}) == 4
        assert value("psie_violations_total", {"level": "strict", "type": "filesystem_violation"}) == 1
        assert value("psie_sandboxes_refused_total", {"level": "strict"}) == 1
        assert value("psie_sandboxes_open", {"level": "strict"}) == 0
        assert b"double" not in generate_latest(registry)
    finally:
        metrics.close()
    assert list(registry.collect()) == []


def test_plugins_as_a_label() -> None:
    registry = CollectorRegistry()
    metrics = prometheus.CallMetrics(registry, plugins=True)
    try:
        harness.call(STRICT, double, 1)
        assert registry.get_sample_value("psie_calls_total", {"level": "strict", "outcome": "ok", "plugin": "double"}) == 1
    finally:
        metrics.close()


def test_state_of_the_host(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with Store(folder) as store:
        seen = [{"type": "network_violation"}, {"type": "network_violation"}]
        many = [("a\nb", "ok", []), ("a\nb", "ok", []), ("c", "violation", seen)]
        store.add_runs(
            [
                Run(
                    plugin_id=name,
                    sha256="",
                    level="strict",
                    outcome=outcome,
                    started=1e9,
                    door="command",
                    violations=violations,
                )
                for name, outcome, violations in many
            ]
        )
        store.quarantine("c", None, "because", [], "test")
    registry = CollectorRegistry()
    registry.register(prometheus.StateCollector(folder))
    text = generate_latest(registry).decode()
    assert 'psie_remembered_runs{outcome="ok"} 2.0\n' in text
    assert 'psie_remembered_runs{outcome="violation"} 1.0\n' in text
    assert 'psie_remembered_violations{type="network_violation"} 2.0\n' in text
    assert "psie_quarantined_plugins 1.0\n" in text
    assert "psie_state_readable 1.0\n" in text
    named = CollectorRegistry()
    named.register(prometheus.StateCollector(folder, plugins=True))
    assert 'psie_remembered_runs{outcome="ok",plugin="a\\\\nb"} 2.0\n' in generate_latest(named).decode()


def test_a_state_that_cannot_be_read(tmp_path: Path) -> None:
    """A scrape goes on without it, and says so."""
    place = tmp_path / "file"
    place.write_text("no folder")
    registry = CollectorRegistry()
    registry.register(prometheus.StateCollector(place))
    assert "psie_state_readable 0.0\n" in generate_latest(registry).decode()
    assert "psie_quarantined" not in generate_latest(registry).decode()


@pytest.mark.parametrize(
    ("module", "library", "extra"), [("otel", "opentelemetry", "otel"), ("prometheus", "prometheus_client", "prometheus")]
)
def test_without_the_extra(module: str, library: str, extra: str) -> None:
    program = f"import sys; sys.modules[{library!r}] = None; import sandbox.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=harness.REPOSITORY)
    assert done.returncode == 1
    assert f"pip install 'psie[{extra}]'" in done.stderr.splitlines()[-1]
