"""Messages of traces that are not recorded: no span is made for them, and what they lead to is not recorded either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq import Message
from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.dramatiq import CARRIER_OPTION, DramatiqInstrumentor
from opentelemetry.instrumentation.dramatiq.unsampled import follows_unsampled_parents, unsampled_sender
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_ON,
    ParentBased,
    ParentBasedTraceIdRatio,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)

from tests.broker.conformance.workers import running
from tests.instrumentation.conftest import Recorded, stub_broker

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNSAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-00"

Work = Callable[..., Recorded]


class DeciderOfItsOwn(ParentBased):
    """Describes itself as its base class does, and samples what it likes."""

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        return ALWAYS_ON.should_sample(*args, **kwargs)


@pytest.fixture
def work(queue: str) -> Iterator[tuple[Work, list[Any]]]:
    """Runs an actor, which sends a message, for a message with a given carrier; and what the actor found."""
    found: list[Any] = []

    def work(carrier: dict[str, str], sampler: Sampler = DEFAULT_ON, **options: Any) -> Recorded:
        exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
        provider = TracerProvider(sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        meters = MeterProvider([reader], shutdown_on_exit=False)
        DramatiqInstrumentor().instrument(tracer_provider=provider, meter_provider=meters, **options)
        broker = stub_broker()

        @dramatiq.actor(queue_name=queue, broker=broker)
        def act() -> None:
            found.append(trace.get_current_span().get_span_context())
            noop.send()

        @dramatiq.actor(queue_name=queue, broker=broker)
        def noop() -> None:
            found.append(trace.get_current_span().get_span_context())

        broker.queues[queue].put(Message(queue, "act", (), {}, {CARRIER_OPTION: carrier}).encode())
        with running(broker, threads=1):
            broker.join(queue, timeout=30_000)
        return Recorded(provider, meters, exporter, reader)

    yield work, found
    DramatiqInstrumentor().uninstrument()
    assert not context.get_current()


@pytest.mark.parametrize(
    "carrier", [{"traceparent": UNSAMPLED}, {"traceparent": UNSAMPLED, "baggage": "a=b"}]
)
def test_what_is_not_sampled_stays_so(
    work: tuple[Work, list[Any]], queue: str, carrier: dict[str, str]
) -> None:
    """No span of the message nor of what its actor sends; the trace goes on, and metrics count."""
    run, found = work
    recorded = run(carrier)
    assert recorded.all == []
    assert [f"{one.trace_id:032x}" for one in found] == [TRACE_ID] * 2
    assert not any(one.trace_flags.sampled for one in found)
    done = recorded.points("messaging.process.duration", dramatiq__outcome="done")
    assert sum(point.value for point in done) == 2
    assert sum(point.value for point in recorded.points("messaging.client.consumed.messages")) == 2


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (ALWAYS_ON, {}),
        (ParentBased(ALWAYS_ON, remote_parent_not_sampled=ALWAYS_ON), {}),
        (DEFAULT_ON, {"link_parents": True}),
    ],
    ids=["always on", "remote on", "links"],
)
def test_a_sampler_that_wants_it_gets_it(
    work: tuple[Work, list[Any]], queue: str, sampler: Sampler, options: dict[str, bool]
) -> None:
    """The sampler decides: one that records what its sender did not is asked."""
    run, _ = work
    names = [span.name for span in run({"traceparent": UNSAMPLED}, sampler, **options).all]
    assert names[0] == f"process {queue}"


@pytest.mark.parametrize(
    ("sampler", "follows"),
    [
        (DEFAULT_ON, True),
        (ParentBased(TraceIdRatioBased(0.1)), True),
        (ParentBasedTraceIdRatio(0.1), True),
        (DeciderOfItsOwn(ALWAYS_ON), False),
        (ParentBased(ALWAYS_ON, remote_parent_not_sampled=ALWAYS_ON), False),
        (ParentBased(ALWAYS_ON, remote_parent_not_sampled=TraceIdRatioBased(0.1)), False),
        (ALWAYS_ON, False),
        (ALWAYS_OFF, False),
    ],
)
def test_only_samplers_that_follow_are_not_asked(sampler: Sampler, follows: bool) -> None:
    """Known from what the sampler says of itself."""
    assert follows_unsampled_parents(TracerProvider(sampler, shutdown_on_exit=False)) is follows
    assert not follows_unsampled_parents(trace.NoOpTracerProvider())


@pytest.mark.parametrize(
    "header",
    [
        UNSAMPLED,
        f"00-{TRACE_ID}-{SPAN_ID}-02",
        f"00-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-03",
        f"01-{TRACE_ID}-{SPAN_ID}-00",
        f"00-{'0' * 32}-{SPAN_ID}-00",
        f"00-{TRACE_ID}-{'0' * 16}-00",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-00",
        f"00-{TRACE_ID}-{SPAN_ID}-00-more",
        "",
        "nonsense",
    ],
)
def test_a_header_is_read_as_the_propagator_reads_it(header: str) -> None:
    """What is taken for an unsampled sender is the same span that the general way finds."""
    general = trace.get_current_span(propagate.extract({"traceparent": header}, Context())).get_span_context()
    sender = unsampled_sender({"traceparent": header})
    if sender is None:
        assert not general.is_valid or general.trace_flags.sampled or not header.startswith("00-")
    else:
        assert sender.get_span_context() == general
        assert sender.get_span_context().is_remote


@pytest.mark.parametrize(
    "carrier", [None, {}, {"traceparent": 5}, {"tracestate": "a=b"}, "text", [UNSAMPLED]]
)
def test_nothing_else_is_taken_for_a_sender(carrier: object) -> None:
    """The general way looks at whatever is unusual."""
    assert unsampled_sender(carrier) is None
