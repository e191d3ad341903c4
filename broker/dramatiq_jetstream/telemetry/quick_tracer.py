"""Starts quick spans on a provider of the SDK, whose sampler, ids, resource, processors and exporters they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk._shared_internal import BatchProcessor
from opentelemetry.sdk.trace import (
    ReadableSpan,
    SpanLimits,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, TraceFlags

from . import conventions as c
from .known import Known
from .quick_spans import FLAGS, RANDOM, QuickSpan


class QuickTracer:
    """Starts spans on an SDK provider, with what the middleware knows of them."""

    def __init__(self, provider: TracerProvider, processor: SpanProcessor) -> None:
        self.resource = provider.resource
        self.scope = InstrumentationScope(c.SCOPE, c.version(), c.SCHEMA_URL)
        self.limits = SpanLimits()
        self._sampler = provider.sampler
        self.ids = provider.id_generator
        is_random = getattr(self.ids, "is_trace_id_random", None)
        self._root_flags = RANDOM if is_random is not None and is_random() else 0
        self._processor = processor
        self._processors: object = object()  # not looked at yet
        self._at_start: list[Callable[..., None]] = []
        self.at_end: list[Callable[..., None]] = []
        #: The same for spans that are known to be sampled.
        self.at_end_of_sampled: list[Callable[..., None]] = []

    @classmethod
    def of(cls, provider: object) -> QuickTracer | None:
        """A tracer for the SDK's own provider; None for any other, which has a tracer of its own."""
        # Which processors there are is not part of the provider's public interface.
        processor = getattr(provider, "_active_span_processor", None)
        if type(provider) is not TracerProvider or not isinstance(processor, SpanProcessor):
            return None
        tracer = cls(provider, processor)
        return tracer if tracer._fits() else None

    def _fits(self) -> bool:
        """Whether what a QuickSpan writes is where this version of the SDK reads it."""
        known = Known("a", "", {"a": 1})
        span = QuickSpan(self, known, trace.INVALID_SPAN_CONTEXT, None, SpanKind.CONSUMER, {"a": 1}, ())
        span.update_name("b")
        span.note({"b": 2})
        span.add_event("e")
        span.set_status(StatusCode.ERROR)
        span._end_time = 1
        read = (span.name, dict(span.attributes or {}), len(span.events), span.status.is_ok, span.end_time)
        more = (
            span.context,
            span.parent,
            span.kind,
            span.resource,
            span.instrumentation_scope,
            len(span.links),
        )
        return read == ("b", {"a": 1, "b": 2}, 1, False, 1) and more == (
            trace.INVALID_SPAN_CONTEXT,
            None,
            SpanKind.CONSUMER,
            self.resource,
            self.scope,
            0,
        )

    def start_span(
        self,
        known: Known,
        kind: SpanKind,
        attributes: dict[str, Any],
        context: Context,
        links: Sequence[Link] | None,
        remote: SpanContext | None,
    ) -> Span:
        """Begin a span. Its parent is `remote`, or else the span of the context.

        The attributes become the span's own, so they must be new for each. Those that are `known` must be the
        first of them, in the same order.
        """
        parent = remote
        if parent is None:
            parent = trace.get_current_span(context).get_span_context()
        if parent.is_valid:
            trace_id, flags = parent.trace_id, parent.trace_flags & RANDOM
        else:
            parent, trace_id, flags = None, self.ids.generate_trace_id(), self._root_flags
        if self._sampler is DEFAULT_ON and (parent is None or parent.trace_flags & TraceFlags.SAMPLED):
            # The usual case, which needs no asking: everything is sampled, unless the parent was not.
            state = None if parent is None else parent.trace_state
            flags |= TraceFlags.SAMPLED
        else:
            if remote is not None:
                context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
            result = self._sampler.should_sample(
                context, trace_id, known.span_name, kind, attributes, links or ()
            )
            state = result.trace_state
            if result.decision is Decision.RECORD_AND_SAMPLE:
                flags |= TraceFlags.SAMPLED
            elif result.decision is Decision.DROP:
                dropped = SpanContext(trace_id, self.ids.generate_span_id(), False, TraceFlags(flags), state)
                return trace.NonRecordingSpan(dropped)
            if len(result.attributes or ()) != len(attributes):
                attributes = dict(result.attributes or {})
                known = Known(known.span_name, known.queue, {})
        span_context = SpanContext(trace_id, self.ids.generate_span_id(), False, FLAGS[flags], state)
        span = QuickSpan(self, known, span_context, parent, kind, attributes, links or ())
        for on_start in self._listeners():
            if remote is not None:
                context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
            on_start(span, context)
        return span

    def starts_unasked(self) -> bool:
        """Whether a span whose parent is sampled begins without anybody to be asked or told: as a rule."""
        return self._sampler is DEFAULT_ON and not self._listeners()

    def _listeners(self) -> list[Callable[..., None]]:
        """Whom to tell that a span starts."""
        if getattr(self._processor, "_span_processors", self._processor) is not self._processors:
            self._look_at_processors()
        return self._at_start

    def _look_at_processors(self) -> None:
        """Note whom to tell of spans; the provider's tuple of processors is replaced when one is added."""
        self._processors = getattr(self._processor, "_span_processors", self._processor)
        told: Sequence[SpanProcessor] = (self._processor,)
        if type(self._processor) is SynchronousMultiSpanProcessor:
            told = self._processor._span_processors
        # Those that export do nothing when a span starts.
        exporting = (BatchSpanProcessor, SimpleSpanProcessor)
        self._at_start = [processor.on_start for processor in told if type(processor) not in exporting]
        self.at_end = [processor.on_end for processor in told]
        self.at_end_of_sampled = [self._on_end_of_sampled(processor) for processor in told]

    def _on_end_of_sampled(self, processor: SpanProcessor) -> Callable[..., None]:
        """How to tell a processor that a sampled span has ended."""
        inner = getattr(processor, "_batch_processor", None)
        if type(processor) is not BatchSpanProcessor or type(inner) is not BatchProcessor:
            return processor.on_end
        batch: BatchProcessor[Any] = inner
        queue, enough = batch._queue, min(batch._max_export_batch_size, batch._max_queue_size) - 1
        abridger = getattr(batch._exporter, "abridger", None)
        abridge = abridger and abridger(self)

        def put(span: ReadableSpan) -> None:
            waiting = span if abridge is None else abridge(span)
            # As long as nobody has to be woken, and nothing is dropped, this is all that the processor does with it,
            # but for asking the system whether the process was forked; then the queue is emptied anyway.
            if len(queue) < enough and not batch._shutdown:
                queue.appendleft(waiting)
            else:
                batch.emit(waiting)

        return put
