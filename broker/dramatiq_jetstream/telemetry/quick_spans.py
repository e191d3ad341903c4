"""Spans that cost a worker a fifth of what the SDK's cost, with the same result.

The SDK checks and copies every attribute, and makes locks and lists that a span of a message rarely needs. A
worker begins and ends such a span for each message, with attributes that the middleware knows to be right.
So here they are taken as they are, and the SDK's care begins with the first thing that somebody else does to
the span. Sampler, ids, resource, processors and exporters are those of the SDK's provider.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from time import time_ns
from typing import Any

from opentelemetry import trace
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk.trace import (
    Event,
    ReadableSpan,
    SpanLimits,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import Attributes, AttributeValue

from . import conventions as c
from .known import Known

logger = logging.getLogger(__name__)

_UNSET = Status(StatusCode.UNSET)
#: W3C's second flag, which says that the trace id is random.
_RANDOM = 0x02
_FLAGS = tuple(TraceFlags(flags) for flags in range(4))


class QuickTracer:
    """Starts spans on an SDK provider. Only start_span, with what the middleware knows of them."""

    def __init__(self, provider: TracerProvider, processor: SpanProcessor) -> None:
        self.resource = provider.resource
        self.scope = InstrumentationScope(c.SCOPE, c.version(), c.SCHEMA_URL)
        self.limits = SpanLimits()
        self._sampler = provider.sampler
        self._ids = provider.id_generator
        is_random = getattr(self._ids, "is_trace_id_random", None)
        self._root_flags = _RANDOM if is_random is not None and is_random() else 0
        self._processor = processor
        self._processors: object = None
        self._at_start: list[Callable[..., None]] = []
        self.at_end: list[Callable[..., None]] = []

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
            trace_id, flags = parent.trace_id, parent.trace_flags & _RANDOM
        else:
            parent, trace_id, flags = None, self._ids.generate_trace_id(), self._root_flags
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
                dropped = SpanContext(trace_id, self._ids.generate_span_id(), False, TraceFlags(flags), state)
                return trace.NonRecordingSpan(dropped)
            if len(result.attributes or ()) != len(attributes):
                attributes = dict(result.attributes or {})
                known = Known(known.span_name, known.queue, {})
        span_context = SpanContext(trace_id, self._ids.generate_span_id(), False, _FLAGS[flags], state)
        span = QuickSpan(self, known, span_context, parent, kind, attributes, links or ())
        if getattr(self._processor, "_span_processors", self._processor) is not self._processors:
            self._look_at_processors()
        for on_start in self._at_start:
            if remote is not None:
                context = trace.set_span_in_context(trace.NonRecordingSpan(remote), context)
            on_start(span, context)
        return span

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


class QuickSpan(Span, ReadableSpan):
    """A span that records, and that is what processors and exporters read once it has ended."""

    # What few spans have is here for all of them. The names are those of the SDK's ReadableSpan.
    _instrumentation_info = None
    _events: Sequence[Event] = ()
    _status = _UNSET
    _end_time: int | None = None

    def __init__(
        self,
        tracer: QuickTracer,
        known: Known,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: dict[str, Any],
        links: Sequence[Link],
    ) -> None:
        self._name = known.span_name
        self._context = context
        self._parent = parent
        self._kind = kind
        self._attributes = attributes
        self._links = links
        self._resource = tracer.resource
        self._instrumentation_scope = tracer.scope
        self._tracer = tracer
        #: What it began with, as long as its name is that and the attributes are the first of those that it has.
        self.known: Known | None = known
        self._start_time = time_ns()

    def note(self, attributes: dict[str, Any]) -> None:
        """Add attributes that are known to be right."""
        self._attributes.update(attributes)  # type: ignore[union-attr]

    def get_span_context(self) -> SpanContext:
        return self._context  # type: ignore[return-value]

    def is_recording(self) -> bool:
        return self._end_time is None

    def end(self, end_time: int | None = None) -> None:
        if not self._is_over("end"):
            self._end_time = end_time or time_ns()
            for on_end in self._tracer.at_end:
                on_end(self)

    # What actors, other instrumentations and processors may do to it.

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        if not self._is_over("set_attribute"):
            self._checked()[key] = value

    def set_attributes(self, attributes: Any) -> None:
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        limits = self._tracer.limits
        if self._is_over("add_event") or len(self._events) >= (limits.max_events or 128):
            return
        checked = BoundedAttributes(
            limits.max_event_attributes, attributes, max_value_len=limits.max_attribute_length
        )
        self._events = [*self._events, Event(name, checked, timestamp or time_ns())]

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        if not self._is_over("add_link"):
            self._links = [*self._links, Link(context, attributes)]

    def update_name(self, name: str) -> None:
        if not self._is_over("update_name"):
            self._name = name
            self.known = None

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        # As the specification has it: what was called fine stays so, and nothing is unset again.
        if self._is_over("set_status") or self._status.status_code is StatusCode.OK:
            return
        new = status if isinstance(status, Status) else Status(status, description)
        if new.status_code is not StatusCode.UNSET:
            self._status = new

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        self.add_event(
            "exception",
            {
                "exception.type": c.error_type(exception),
                "exception.message": str(exception),
                "exception.stacktrace": "".join(traceback.format_exception(exception)),
                "exception.escaped": str(escaped),
                **(attributes or {}),
            },
            timestamp,
        )

    def _checked(self) -> BoundedAttributes:
        if not isinstance(self._attributes, BoundedAttributes):
            limits = self._tracer.limits
            self.known = None
            self._attributes = BoundedAttributes(
                limits.max_span_attributes,
                self._attributes,
                immutable=False,
                max_value_len=limits.max_span_attribute_length,
            )
        return self._attributes

    def _is_over(self, method: str) -> bool:
        if self._end_time is not None:
            logger.warning("%s was called on the span %r, which has ended.", method, self._name)
        return self._end_time is not None

    @property
    def is_plain(self) -> bool:
        """Whether it has nothing but a name, times and attributes, none of which was dropped."""
        return not (self._events or self._links or self._status is not _UNSET or self.dropped_attributes)
