"""The attempts that nearly all messages have, which are begun and ended the short way."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from dramatiq import Message, MessageProxy
from dramatiq.brokers.stub import StubBroker
from opentelemetry import context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dramatiq_jetstream.telemetry import attempt_spans, middleware, spans, usual_attempts
from dramatiq_jetstream.telemetry import conventions as c
from dramatiq_jetstream.telemetry.attempt_spans import AttemptSpan
from dramatiq_jetstream.telemetry.carrier import CARRIER_OPTION
from dramatiq_jetstream.telemetry.encoding import QuickSpanExporter, abridge, encode
from dramatiq_jetstream.telemetry.known import Known
from dramatiq_jetstream.telemetry.logs import current_log_fields
from dramatiq_jetstream.telemetry.metrics import Instruments
from dramatiq_jetstream.telemetry.middleware import TelemetryMiddleware
from dramatiq_jetstream.telemetry.quick_tracer import QuickTracer
from dramatiq_jetstream.telemetry.tallies import Tallies

HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Struck(BaseException):
    """What an asynchronous exception is like: it comes between any two lines."""


class Strike:
    """Raises at the n-th line of the modules under test, once."""

    FILES = tuple(module.__file__ for module in (usual_attempts, attempt_spans, middleware, spans))

    def __init__(self, line: int) -> None:
        self.left = line
        self.done = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line" and not self.done:
            self.left -= 1
            if self.left < 0:
                self.done = True
                raise Struck
        return self


class Worker:
    """Telemetry of a broker, and what Dramatiq's worker thread does with it for one message."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.broker = StubBroker(middleware=[])
        self.tallies = Tallies()
        meter = NoOpMeterProvider().get_meter("test")
        self.middleware = TelemetryMiddleware(
            self.broker,
            provider.get_tracer("test"),
            Instruments(meter, self.tallies, own_histograms=False),
            quick_tracer=QuickTracer.of(provider),
        )

    def process(self, strike: Strike | None = None, *, usual: bool = True) -> None:
        options = {CARRIER_OPTION: {"traceparent": HEADER}} if usual else {}
        proxy = MessageProxy(Message("q", "act", (), {}, options))
        try:
            sys.settrace(strike)
            try:
                self.middleware.before_process_message(self.broker, proxy)
                self.middleware.after_process_message(self.broker, proxy, result=None)
            finally:
                sys.settrace(None)
        except Struck as error:
            self.middleware.after_process_message(self.broker, proxy, exception=error)
        self.middleware.after_ack(self.broker, proxy)


def test_it_is_the_short_way_that_is_taken() -> None:
    worker = Worker()
    worker.process()
    (span,) = worker.exporter.get_finished_spans()
    assert isinstance(span, AttemptSpan)
    assert span.is_untouched
    assert span.message is None, "a span that waits for the exporter holds no message"
    counts, durations = worker.tallies.totals()
    assert list(counts.values()) == [1]
    assert [timed.count for timed in durations.values()] == [1]


@pytest.mark.parametrize("usual", [True, False])
def test_an_exception_between_any_two_lines_leaves_nothing_open(usual: bool) -> None:
    """Each line in turn: the span ends once, no context or log field stays, and the next message is as any."""
    line = 0
    while True:
        worker = Worker()
        strike = Strike(line)
        worker.process(strike, usual=usual)
        assert worker.middleware._thread.attempt is None, line
        assert not context.get_current(), line
        assert not current_log_fields(), line
        ended = len(worker.exporter.get_finished_spans())
        assert ended <= 1, line
        worker.process()
        assert len(worker.exporter.get_finished_spans()) == ended + 1, line
        if not strike.done:
            break
        line += 1
    assert line > 30, "it did strike"


@pytest.mark.parametrize("touched", [0, 1, 2])
def test_an_abridged_span_is_exported_as_the_span(touched: int) -> None:
    """Alone and among spans that somebody has touched, which wait as they are."""
    provider = TracerProvider(resource=Resource.create({"service.name": "t"}), shutdown_on_exit=False)
    tracer = QuickTracer.of(provider)
    assert tracer is not None
    assert tracer.starts_unasked()
    known = Known("process q", "q", {"a": "b"})
    ended: list[AttemptSpan] = []
    for number in range(3):
        span = AttemptSpan()
        span.start(tracer, known, HEADER, f"m{number}", 1)
        if number < touched:
            span.set_attribute("x", number)
        span.conclude(c.Outcome.DONE)
        ended.append(span)
    abridged = [abridge(span) for span in ended]
    assert [isinstance(item, tuple) for item in abridged] == [number >= touched for number in range(3)]
    assert ExportTraceServiceRequest.FromString(
        encode(abridged, tracer)
    ) == ExportTraceServiceRequest.FromString(encode(ended))


def test_an_exporter_has_abridged_what_comes_from_one_place() -> None:
    """An abridged span does not say which resource it belongs to, so there can be one only."""
    exporter = QuickSpanExporter()
    try:
        first, second = (QuickTracer.of(TracerProvider(shutdown_on_exit=False)) for _ in range(2))
        assert first is not None
        assert second is not None
        assert exporter.abridger(first) is abridge
        assert exporter.abridger(first) is abridge
        assert exporter.abridger(second) is None
    finally:
        exporter.shutdown()


def test_a_processor_of_another_exporter_gets_spans() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = QuickTracer.of(provider)
    assert tracer is not None
    assert tracer.starts_unasked()
    span = AttemptSpan()
    span.start(tracer, Known("process q", "q", {}), HEADER, "m", 1)
    span.conclude(c.Outcome.DONE)
    provider.force_flush()
    assert exporter.get_finished_spans() == (span,)
