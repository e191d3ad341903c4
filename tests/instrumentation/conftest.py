"""Fixtures of the instrumentation's tests: the SDK as it is, recording in memory, and every broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import dramatiq
import pytest
from dramatiq import Broker
from dramatiq.brokers.stub import StubBroker
from opentelemetry.instrumentation.dramatiq import DramatiqInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.broker.conformance.rigs import RabbitmqRig, RedisRig, Rig, StubRig
from tests.broker.conformance.workers import running
from tests.support.otlp import OtlpReceiver, Point, Span
from tests.support.polling import eventually


@pytest.fixture(autouse=True)
def _quick_consumer_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """An OTLP/HTTP receiver of the test's own."""
    with OtlpReceiver() as receiver:
        yield receiver


@dataclass
class Recorded:
    """OpenTelemetry's SDK, which keeps in memory what it would export."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader

    @property
    def all(self) -> list[Span]:
        """All spans that have ended so far, by the time they began."""
        return sorted(map(_span, self.exporter.get_finished_spans()), key=lambda span: span.start)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.all if span.name == name]

    def spans(self, *names: str) -> list[Span]:
        """Wait until the spans that have ended have exactly these names, in the order in which they began."""

        def ended() -> list[Span]:
            spans = self.all
            assert sorted(span.name for span in spans) == sorted(names)
            return spans

        return eventually(ended, timeout=40)

    def wait_until(self, condition: Callable[[list[Span]], Any]) -> list[Span]:
        eventually(lambda: condition(self.all), timeout=40)
        return self.all

    def points(self, metric: str, **attributes: Any) -> list[Point]:
        """The points of a metric whose attributes contain these (double underscores stand for dots)."""
        wanted = {name.replace("__", "."): value for name, value in attributes.items()}
        data = self.reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for one in scope.metrics
            if one.name == metric
            for point in _points(one)
            if wanted.items() <= point.attributes.items()
        ]


def _span(span: ReadableSpan) -> Span:
    assert span.context is not None
    assert span.start_time is not None
    assert span.end_time is not None
    return Span(
        name=span.name,
        kind=span.kind.name,
        trace_id=f"{span.context.trace_id:032x}",
        span_id=f"{span.context.span_id:016x}",
        parent_id="" if span.parent is None else f"{span.parent.span_id:016x}",
        attributes=dict(span.attributes or {}),
        exceptions=tuple(dict(e.attributes or {}) for e in span.events if e.name == "exception"),
        links=tuple((f"{one.context.trace_id:032x}", f"{one.context.span_id:016x}") for one in span.links),
        is_error=span.status.status_code is StatusCode.ERROR,
        start=span.start_time,
        end=span.end_time,
        resource=dict(span.resource.attributes),
        scope=span.instrumentation_scope.name if span.instrumentation_scope else "",
    )


def _points(metric: Metric) -> Iterator[Point]:
    for point in metric.data.data_points:
        value, total = (
            (point.count, point.sum) if isinstance(point, HistogramDataPoint) else (point.value, point.value)
        )
        yield Point(metric.name, metric.unit or "", dict(point.attributes or {}), value, total, {})


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    """Recorded that record in memory."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracer_provider = TracerProvider(shutdown_on_exit=False)
    tracer_provider.add_span_processor(SimpleSpanProcessor(exporter))
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    yield Recorded(tracer_provider, meter_provider, exporter, reader)
    tracer_provider.shutdown()
    meter_provider.shutdown()


@pytest.fixture
def instrument(recorded: Recorded) -> Iterator[Callable[..., DramatiqInstrumentor]]:
    """Instrument Dramatiq with these providers; undone at the end."""
    instrumentor = DramatiqInstrumentor()

    def instrument(**options: Any) -> DramatiqInstrumentor:
        instrumentor.instrument(
            tracer_provider=recorded.tracer_provider, meter_provider=recorded.meter_provider, **options
        )
        return instrumentor

    yield instrument
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()


@pytest.fixture
def telemetry(recorded: Recorded, instrument: Callable[..., DramatiqInstrumentor]) -> Recorded:
    """Dramatiq, instrumented."""
    instrument()
    return recorded


@pytest.fixture
def queue() -> str:
    """The name of a queue that no other test uses."""
    return f"q-{uuid4().hex[:12]}"


def _jetstream() -> type[Rig]:
    from tests.broker.conformance.jetstream import JetStreamRig

    return JetStreamRig


#: name -> (the fixture with the address of its server, its rig, messaging.system)
BROKERS: dict[str, tuple[str | None, Callable[[], type[Rig]], str]] = {
    "stub": (None, lambda: StubRig, "stub"),
    "redis": ("redis_url", lambda: RedisRig, "redis"),
    "rabbitmq": ("rabbitmq_url", lambda: RabbitmqRig, "rabbitmq"),
    "jetstream": ("nats_url", _jetstream, "nats"),
}


@dataclass
class Fleet:
    """One broker and what the tests do with it."""

    rig: Rig
    system: str

    @property
    def broker(self) -> Broker:
        return self.rig.broker

    def work(self, queue: str, **options: Any) -> None:
        """Run a worker until nothing of the queue is ready, delayed or in progress."""
        with running(self.broker, **options) as worker:
            self.rig.drain(queue, worker, timeout=20_000)


@pytest.fixture(params=list(BROKERS))
def fleet(request: pytest.FixtureRequest, telemetry: Recorded) -> Iterator[Fleet]:
    """Each broker in turn, made after Dramatiq was instrumented."""
    server, rig_class, system = BROKERS[request.param]
    url = request.getfixturevalue(server) if server else "memory:"
    rig = rig_class()(url, f"t{uuid4().hex[:12]}")
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(rig.broker)
    try:
        yield Fleet(rig, system)
    finally:
        dramatiq.broker.global_broker = before
        rig.close()


@pytest.fixture
def stub(telemetry: Recorded) -> Iterator[Fleet]:
    """Dramatiq's in-memory broker alone, for what does not depend on the broker."""
    rig = StubRig("memory:", "unused")
    before = dramatiq.broker.global_broker
    dramatiq.set_broker(rig.broker)
    try:
        yield Fleet(rig, "stub")
    finally:
        dramatiq.broker.global_broker = before
        rig.close()


def stub_broker(**options: Any) -> StubBroker:
    """A StubBroker whose dead letters do not fail the join."""
    return StubBroker(fail_fast_default=False, **options)
