"""What was made quicker gives the same result as OpenTelemetry's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricsData, ResourceMetrics
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, DEFAULT_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dramatiq_jetstream.telemetry import conventions as c
from dramatiq_jetstream.telemetry.attempt_spans import AttemptSpan
from dramatiq_jetstream.telemetry.carrier import extract_headers, is_sampled, read_sampled
from dramatiq_jetstream.telemetry.encoding import MAX_TEMPLATES, encode
from dramatiq_jetstream.telemetry.histograms import HistogramFeed
from dramatiq_jetstream.telemetry.known import Known
from dramatiq_jetstream.telemetry.quick_spans import QuickSpan
from dramatiq_jetstream.telemetry.quick_tracer import QuickTracer
from dramatiq_jetstream.telemetry.tallies import Tallies

REMOTE = SpanContext(7, 8, True, TraceFlags(TraceFlags.SAMPLED), TraceState([("vendor", "x")]))
UNSAMPLED = SpanContext(7, 8, True, TraceFlags(0))


class Pipeline:
    """The SDK's tracer and ours on one provider."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(
            sampler, Resource.create({"service.name": "t"}), shutdown_on_exit=False
        )
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        quick = QuickTracer.of(self.provider)
        assert quick is not None
        self.theirs = self.provider.get_tracer(c.SCOPE, c.version(), c.SCHEMA_URL)
        self.ours = quick

    def both(
        self, parent: SpanContext | None, links: list[Link] | None = None, *, in_context: bool = True
    ) -> tuple[Span, Span]:
        """A span of each, whose parent we are given in a context or by itself."""
        empty = context = Context()
        if parent is not None:
            context = trace.set_span_in_context(NonRecordingSpan(parent), context)
        attributes = {"a": "b", "n": 1}
        theirs = self.theirs.start_span(
            "process q", context, SpanKind.CONSUMER, attributes=attributes, links=links
        )
        known, kind = Known("process q", "q", {}), SpanKind.CONSUMER
        if in_context:
            ours = self.ours.start_span(known, kind, dict(attributes), context, links, None)
        else:
            ours = self.ours.start_span(known, kind, dict(attributes), empty, links, parent)
        return theirs, ours


class Marks(SpanProcessor):
    """Somebody's own processor, which notes what it is told."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def on_start(self, span: Any, parent_context: Context | None = None) -> None:
        self.seen.append("start")
        assert trace.get_current_span(parent_context).get_span_context() == REMOTE
        span.set_attribute("marked", True)

    def on_end(self, span: ReadableSpan) -> None:
        self.seen.append("end")


def essence(span: ReadableSpan) -> dict[str, Any]:
    """What must be the same; ids and times are not."""
    assert span.context is not None
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= span.end_time
    return {
        "name": span.name,
        "kind": span.kind,
        "parent": span.parent,
        "flags": span.context.trace_flags,
        "state": dict(span.context.trace_state),
        "attributes": dict(span.attributes or {}),
        "events": [(e.name, {**(e.attributes or {}), "exception.stacktrace": ""}) for e in span.events],
        "links": [(link.context, dict(link.attributes or {})) for link in span.links],
        "status": (span.status.status_code, span.status.description),
        "resource": span.resource,
        "scope": span.instrumentation_scope,
        "dropped": (span.dropped_attributes, span.dropped_events, span.dropped_links),
    }


def in_any_order(request: ExportTraceServiceRequest) -> ExportTraceServiceRequest:
    """A request whose attributes are sorted: they are a set."""
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                span.attributes.sort(key=lambda attribute: attribute.key)
    return request


def fail(span: Span) -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        span.record_exception(error, {"more": 1})
        span.set_status(Status(StatusCode.ERROR, "ValueError: no"))


def wrong_values(span: Span) -> None:
    span.set_attribute("", "no name")
    span.set_attribute("thing", object())  # type: ignore[arg-type]
    span.set_attributes({"list": ["a", "b"], "none": None, "float": 0.5})  # type: ignore[dict-item]


def statuses(span: Span) -> None:
    span.set_status(StatusCode.OK)
    span.set_status(StatusCode.ERROR, "too late")
    span.set_status(StatusCode.UNSET)


def after_the_end(span: Span) -> None:
    span.end()
    span.set_attribute("late", 1)
    span.update_name("late")


ACTIONS: dict[str, Callable[[Span], object]] = {
    "nothing": lambda span: None,
    "attribute": lambda span: span.set_attribute("a", "c"),
    "event": lambda span: span.add_event("found", {"x": 1}),
    "name": lambda span: span.update_name("other"),
    "link": lambda span: span.add_link(REMOTE, {"why": "test"}),
    "failure": fail,
    "statuses": statuses,
    "wrong values": wrong_values,
    "many attributes": lambda span: [span.set_attribute(f"k{n}", n) for n in range(200)],
    "after the end": after_the_end,
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("in_context", [True, False], ids=["context", "remote"])
@pytest.mark.parametrize("parent", [None, REMOTE], ids=["root", "child"])
def test_a_quick_span_is_what_the_sdk_would_have_made(
    action: str, parent: SpanContext | None, in_context: bool
) -> None:
    """Whatever an actor does to its span, the exporter gets the same; and so does the receiver."""
    pipeline = Pipeline()
    for span in pipeline.both(parent, [Link(REMOTE)], in_context=in_context):
        assert span.is_recording()
        ACTIONS[action](span)
        span.end()
        assert not span.is_recording()
    theirs, ours = pipeline.exporter.get_finished_spans()
    assert essence(ours) == essence(theirs)
    for span in (theirs, ours):
        assert ExportTraceServiceRequest.FromString(encode([span])) == encode_spans([span])


def asks_for_its_ids(span: Span) -> None:
    assert span.get_span_context() == span.get_span_context()


ATTEMPT_ACTIONS = {**ACTIONS, "ids": asks_for_its_ids}


PARENT = f"00-{1:032x}-{2:016x}-01"

HEX = st.text("0123456789abcdef", min_size=16, max_size=16)
ODD = st.sampled_from([" ", "_", "A", "+", "x", "é", "-", "0" * 16, ""])


@given(
    st.lists(st.one_of(HEX, HEX, HEX, ODD), min_size=3, max_size=5), st.sampled_from(["00", "01", "03", "1"])
)
def test_a_sampled_parent_is_read_as_the_conventions_have_it(parts: list[str], flags: str) -> None:
    """Right headers, and such as look like them: the longer way reads the same, or nothing that is sampled."""
    parts = [part if len(part) in (0, 16) else part + "a" * (16 - len(part)) for part in parts]
    header = f"00-{parts[0]}{parts[1]}-{''.join(parts[2:])}-{flags}"
    longer = trace.get_current_span(
        TraceContextTextMapPropagator().extract({"traceparent": header}, Context())
    ).get_span_context()
    if is_sampled(header):
        assert read_sampled(header) == longer
    else:
        assert not (longer.is_valid and longer.trace_flags in (1, 3) and len(header) == 55)


@pytest.mark.parametrize("action", ATTEMPT_ACTIONS)
@pytest.mark.parametrize("outcome", [None, c.Outcome.DONE])
@pytest.mark.parametrize("flags", ["01", "03"])
def test_the_span_of_an_attempt_is_what_the_sdk_would_have_made(
    action: str, outcome: str | None, flags: str
) -> None:
    """Of nothing but the header of its message; whatever is done to it, before or after it has ended."""
    pipeline = Pipeline()
    header = f"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}"
    known = Known("process q", "q", {"a": "b", "queue": "q"})
    attributes = {**known.attributes, c.MESSAGE_ID: "mé-1", c.ATTEMPT: 3}
    theirs = pipeline.theirs.start_span(
        "process q", extract_headers({"traceparent": header}), SpanKind.CONSUMER, attributes=attributes
    )
    assert pipeline.ours.starts_unasked()
    ours, again = AttemptSpan(), AttemptSpan()  # from the same template
    ours.start(pipeline.ours, known, header, "mé-1", 3)
    again.start(pipeline.ours, known, header, "mé-1", 3)
    for span in (theirs, ours, again):
        ATTEMPT_ACTIONS[action](span)
        if outcome is not None and span is theirs:
            span.set_attribute(c.OUTCOME, outcome)
        elif outcome is not None and span.is_recording():
            span.conclude(outcome)  # and ends it
        if span.is_recording():
            span.end()
    assert (action in ("nothing", "ids")) is (ours.is_untouched and again.is_untouched)
    encoded = encode([ours, again])
    spans = pipeline.exporter.get_finished_spans()
    assert essence(spans[1]) == essence(spans[2]) == essence(spans[0])
    assert spans[1].context != spans[2].context
    assert in_any_order(ExportTraceServiceRequest.FromString(encoded)) == in_any_order(
        encode_spans(spans[1:])
    )


def test_templates_are_not_kept_without_end() -> None:
    """Whoever numbers its attempts or message ids without bounds costs time, not memory."""
    pipeline = Pipeline()
    known = Known("process q", "q", {"a": "b"})
    assert pipeline.ours.starts_unasked()
    for attempt in range(3 * MAX_TEMPLATES):
        span = AttemptSpan()
        span.start(pipeline.ours, known, PARENT, "m", attempt)
        span.end()
    spans = pipeline.exporter.get_finished_spans()
    for _ in range(2):
        encoded = encode(spans)
    assert in_any_order(ExportTraceServiceRequest.FromString(encoded)) == in_any_order(encode_spans(spans))
    assert len(known.templates) <= MAX_TEMPLATES


@pytest.mark.parametrize("sampler", [ALWAYS_OFF, TraceIdRatioBased(0), None], ids=["off", "ratio", "default"])
def test_an_attempt_is_begun_the_short_way_only_if_nobody_has_to_be_asked_or_told(
    sampler: Sampler | None,
) -> None:
    pipeline = Pipeline(sampler)
    assert pipeline.ours.starts_unasked() is (sampler is None)
    pipeline.provider.add_span_processor(Marks([]))
    assert not pipeline.ours.starts_unasked()


def test_many_spans_are_encoded_as_the_library_does() -> None:
    """Several resources and scopes, parents near and far, long names and every kind of value."""
    spans: list[ReadableSpan] = []
    for service in ("one", "two"):
        exporter = InMemorySpanExporter()
        provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        for scope in ("a", "b"):
            tracer = provider.get_tracer(scope, "1", attributes={"x": "y"})
            with tracer.start_as_current_span("n" * 300, attributes={"long": "ü" * 5_000}):
                for value in (True, False, 1, 0, -1, 2**62, 1.5, "", "ä", ["a"], [1, 2]):
                    tracer.start_span(
                        "child", attributes={"v": value, c.MESSAGE_ID: "m" * 200}, kind=SpanKind.CLIENT
                    ).end()
        spans.extend(exporter.get_finished_spans())
    ours = ExportTraceServiceRequest.FromString(encode(spans))
    theirs = encode_spans(spans)
    assert len(ours.resource_spans) == 4
    assert len(theirs.resource_spans) == 2

    def flat(request: ExportTraceServiceRequest) -> list[tuple[bytes, bytes, str, bytes]]:
        return sorted(
            (
                resource.resource.SerializeToString(deterministic=True),
                scope.scope.SerializeToString(deterministic=True),
                scope.schema_url,
                span.SerializeToString(deterministic=True),
            )
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        )

    assert flat(ours) == flat(theirs)


@pytest.mark.parametrize("action", ACTIONS)
def test_known_attributes_are_encoded_once_and_right(action: str) -> None:
    """Also when an actor has changed one of them: what is exported is what the span has."""
    pipeline = Pipeline()
    known = Known("process q", "q", {"a": "b", "queue": "q"})
    for n in range(2):
        attributes = {**known.attributes, "n": n}
        span = pipeline.ours.start_span(known, SpanKind.CONSUMER, attributes, Context(), None, None)
        assert isinstance(span, QuickSpan)
        span.note({"outcome": "done"})
        ACTIONS[action](span)
        span.end()
    spans = pipeline.exporter.get_finished_spans()
    assert ExportTraceServiceRequest.FromString(encode(spans)) == encode_spans(spans)


@pytest.mark.parametrize("parent", [None, REMOTE, UNSAMPLED], ids=["root", "sampled", "unsampled"])
@pytest.mark.parametrize(
    "sampler",
    [
        DEFAULT_ON,
        ALWAYS_OFF,
        ParentBased(ALWAYS_OFF),
        ParentBased(TraceIdRatioBased(1.0)),
        TraceIdRatioBased(0),
    ],
    ids=["default", "off", "parent or off", "parent or ratio", "ratio 0"],
)
@pytest.mark.parametrize("in_context", [True, False], ids=["context", "remote"])
def test_the_sampler_is_asked(sampler: Sampler, parent: SpanContext | None, in_context: bool) -> None:
    """What is recorded, and what is passed on about it, is the sampler's decision."""
    pipeline = Pipeline(sampler)
    theirs, ours = pipeline.both(parent, in_context=in_context)
    assert ours.is_recording() == theirs.is_recording()
    a, b = theirs.get_span_context(), ours.get_span_context()
    assert a.trace_flags == b.trace_flags
    assert a.trace_state == b.trace_state
    assert (a.trace_id == b.trace_id) is (parent is not None)
    assert a.span_id != b.span_id


def test_other_processors_are_told() -> None:
    """A processor that a program adds later sees the span begin, may write on it, and sees it end."""
    seen: list[str] = []
    pipeline = Pipeline()
    pipeline.provider.add_span_processor(Marks(seen))
    for in_context in (True, False):
        for span in pipeline.both(REMOTE, in_context=in_context):
            span.end()
    assert seen == 2 * ["start", "start", "end", "end"]
    assert all((span.attributes or {})["marked"] is True for span in pipeline.exporter.get_finished_spans())


def test_a_provider_that_is_not_the_sdks_keeps_its_tracer() -> None:
    """Somebody's own provider, and none at all, are left alone."""

    class Own(TracerProvider):
        pass

    assert QuickTracer.of(Own(shutdown_on_exit=False)) is None
    assert QuickTracer.of(trace.ProxyTracerProvider()) is None
    assert QuickTracer.of(trace.NoOpTracerProvider()) is None


@pytest.mark.parametrize(
    "header",
    [
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-the-future-brings",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0AF7651916CD43DD8448EB211C80319C-B7AD6B7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "",
        "nonsense",
    ],
)
def test_a_traceparent_is_read_as_the_propagator_reads_it(header: str) -> None:
    """The quick way and the general way find the same."""
    quick = trace.get_current_span(extract_headers({"traceparent": header})).get_span_context()
    general = trace.get_current_span(
        extract_headers({"traceparent": header, "unrelated": "x"})
    ).get_span_context()
    assert quick == general
    assert quick.is_remote == general.is_remote


def test_threads_count_for_themselves_and_nothing_is_lost() -> None:
    """Totals have what all threads counted, those that have ended included, and go on growing."""
    tallies = Tallies()
    values = (0.001, 0.005, 0.3, 20.0)

    def work() -> None:
        for _ in range(1_000):
            tallies.count(("seen",))
            for value in values:
                tallies.record(("process",), value)

    for _ in range(2):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            tallies.totals()
        for thread in threads:
            thread.join()
    counts, durations = tallies.totals()
    assert counts == {("seen",): 8_000}
    total = durations["process",]
    assert total.count == 32_000
    assert (total.shortest, total.longest) == (0.001, 20.0)
    assert total.total == pytest.approx(8_000 * sum(values))
    # A value on the border belongs to the bucket below it.
    assert (total.buckets[0], total.buckets[-1]) == (16_000, 8_000)
    assert len(tallies._tables) == 0


def test_histograms_are_cumulative_or_bring_only_what_is_new() -> None:
    """As the exporter prefers it, which OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE decides."""
    data = MetricsData([ResourceMetrics(Resource.create({}), [], "")])
    tallies = Tallies()
    key = ("process", "nats", "q", None, "act", "done")
    feeds = [
        HistogramFeed(tallies, t) for t in (AggregationTemporality.CUMULATIVE, AggregationTemporality.DELTA)
    ]
    counts: list[list[int]] = [[], []]
    for values in ((0.1, 0.2), (0.3,), ()):
        for value in values:
            tallies.record(key, value)
        for feed, seen in zip(feeds, counts, strict=True):
            added = feed.added_to(data).resource_metrics[1:]
            points = [
                p for r in added for s in r.scope_metrics for m in s.metrics for p in m.data.data_points
            ]
            seen.append(sum(point.count for point in points))
            for point in points:
                assert sum(point.bucket_counts) == point.count
                assert point.attributes["messaging.destination.name"] == "q"
                assert point.attributes["dramatiq.outcome"] == "done"
    assert counts == [[2, 3, 3], [2, 1, 0]]
