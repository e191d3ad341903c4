"""Spans that cost a worker a fifth of what the SDK's cost, with the same result.

The SDK checks and copies every attribute, and makes locks and lists that a span of a message rarely needs. A
worker begins and ends such a span for each message, with attributes that the middleware knows to be right.
So here they are taken as they are, and the SDK's care begins with the first thing that somebody else does to
the span.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from time import time_ns
from typing import TYPE_CHECKING, Any

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import Attributes, AttributeValue

from . import conventions as c
from .known import Known

if TYPE_CHECKING:
    from .quick_tracer import QuickTracer

logger = logging.getLogger(__name__)

UNSET = Status(StatusCode.UNSET)
#: W3C's second flag, which says that the trace id is random.
RANDOM = 0x02
FLAGS = tuple(TraceFlags(flags) for flags in range(4))


class QuickSpan(Span, ReadableSpan):
    """A span that records, and that is what processors and exporters read once it has ended."""

    # What few spans have is here for all of them. The names are those of the SDK's ReadableSpan.
    _instrumentation_info = None
    _events: Sequence[Event] = ()
    _status = UNSET
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

    def conclude(self, outcome: str) -> None:
        """End the span of an attempt, of which nothing is to be said but how that ended."""
        if self._end_time is None:
            self.note({c.OUTCOME: outcome})
        self.end()

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
        return not (self._events or self._links or self._status is not UNSET or self.dropped_attributes)
