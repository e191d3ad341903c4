"""Fixtures of the telemetry tests: a real receiver, an instrumentor that exports to it, and every broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import dramatiq
import pytest
from dramatiq import Broker
from dramatiq.brokers.stub import StubBroker
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from dramatiq_jetstream.telemetry import DramatiqInstrumentor
from tests.broker.conformance.rigs import RabbitmqRig, RedisRig, Rig, StubRig
from tests.broker.conformance.workers import running
from tests.support.otlp import OtlpReceiver, Span


@pytest.fixture(autouse=True)
def _quick_consumer_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """An OTLP/HTTP receiver of the test's own."""
    with OtlpReceiver() as receiver:
        yield receiver


@dataclass
class Providers:
    """OpenTelemetry's SDK, exporting to the receiver."""

    receiver: OtlpReceiver
    tracer_provider: TracerProvider
    meter_provider: MeterProvider

    def spans(self, *names: str) -> list[Span]:
        """All spans that were received, which must have exactly these names."""
        self.tracer_provider.force_flush()
        return self.receiver.wait_for(*names)

    def metrics(self) -> OtlpReceiver:
        """The receiver, after the metrics of this moment were exported to it."""
        self.meter_provider.force_flush()
        return self.receiver


@pytest.fixture
def providers(receiver: OtlpReceiver) -> Iterator[Providers]:
    """Providers that export to the receiver when they are told to."""
    tracer_provider = TracerProvider(shutdown_on_exit=False)
    tracer_provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(f"{receiver.url}/v1/traces"), schedule_delay_millis=50)
    )
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(f"{receiver.url}/v1/metrics"), export_interval_millis=float("inf")
    )
    meter_provider = MeterProvider([reader], shutdown_on_exit=False)
    yield Providers(receiver, tracer_provider, meter_provider)
    tracer_provider.shutdown()
    meter_provider.shutdown()


@pytest.fixture
def instrument(providers: Providers) -> Iterator[Callable[..., DramatiqInstrumentor]]:
    """Instrument Dramatiq with the providers; undone at the end."""
    instrumentor = DramatiqInstrumentor()

    def instrument(**options: Any) -> DramatiqInstrumentor:
        instrumentor.instrument(
            tracer_provider=providers.tracer_provider, meter_provider=providers.meter_provider, **options
        )
        return instrumentor

    yield instrument
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()


@pytest.fixture
def telemetry(providers: Providers, instrument: Callable[..., DramatiqInstrumentor]) -> Providers:
    """Dramatiq, instrumented."""
    instrument()
    return providers


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
def fleet(request: pytest.FixtureRequest, telemetry: Providers) -> Iterator[Fleet]:
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
def stub(telemetry: Providers) -> Iterator[Fleet]:
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
