"""Spans of attempts that are looked at by nobody but the exporter, as most are.

Such a span keeps what it is made of: the ids of the span that sent its message, the message's id, the number of the
attempt and how it ended. What OpenTelemetry shows of a span is made of that when somebody asks for it: an actor that
logs or sends asks for the ids, one that sets an attribute asks for the attributes. A span that is untouched at its end
is exported as one piece of bytes, of which only ids and times differ from the last one (`encode`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Token
from struct import Struct
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any

from dramatiq import MessageProxy
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from . import conventions as c
from .known import Known
from .quick_spans import FLAGS, UNSET, QuickSpan
from .spans import detach, end_span

if TYPE_CHECKING:
    from .metrics import AttemptTally
    from .quick_tracer import QuickTracer


class AttemptSpan(QuickSpan):
    """A sampled span whose parent is the send that its message names, and the attempt itself (see `spans.Attempt`).

    Attributes:
      sent_by: That parent: its trace id, its span id, its flags (see `carrier.read_sampled`).
      outcome: How the attempt ended, or None.
      message, token, retry_stored, fields: As long as it is under way; `fields` are those of its log lines.
      tally: Where its thread counts it.
      finished: Whether the attempt is over, which somebody may have said of the span before.
    """

    _kind = SpanKind.CONSUMER
    _links = ()
    #: Whether somebody asked for the attributes.
    _has_attributes = False
    outcome: str | None = None
    message: MessageProxy | None = None
    tally: AttemptTally
    token: Token[Context] | None = None
    retry_stored = False
    fields: dict[str, Any] | None = None
    finished = False

    def __init__(
        self, tracer: QuickTracer, known: Known, span_id: int, parent: bytes, message_id: str, attempt: int
    ) -> None:
        self._tracer = tracer
        self._resource = tracer.resource
        self._instrumentation_scope = tracer.scope
        self._name = known.span_name
        self.known = known
        self.span_id = span_id
        self.sent_by = parent
        self.message_id = message_id
        self.attempt = attempt
        self._start_time = time_ns()
        self.started = perf_counter()

    def __getattr__(self, name: str) -> Any:
        """Make what is missing. Two threads that do so at once make the same."""
        if name == "_context" or name == "_parent":
            trace_id, sender = (
                int.from_bytes(self.sent_by[:16], "big"),
                int.from_bytes(self.sent_by[16:24], "big"),
            )
            flags = self.sent_by[24]
            self._parent = SpanContext(trace_id, sender, True, TraceFlags(flags))
            self._context = SpanContext(trace_id, self.span_id, False, FLAGS[flags], self._parent.trace_state)
        elif name == "_attributes":
            assert self.known is not None, "what makes it unknown has asked for the attributes first"
            made = {**self.known.attributes, c.MESSAGE_ID: self.message_id, c.ATTEMPT: self.attempt}
            if self.outcome is not None:
                made[c.OUTCOME] = self.outcome
            self._attributes = made
            self._has_attributes = True
        else:
            raise AttributeError(name)
        return self.__dict__[name]

    def update_name(self, name: str) -> None:
        self._attributes  # noqa: B018 - asked for while it is known what they begin with
        super().update_name(name)

    def conclude(self, outcome: str) -> None:
        if self._has_attributes or self._end_time is not None:
            super().conclude(outcome)
            return
        self.outcome = outcome
        self._end_time = time_ns()
        for on_end in self._tracer.at_end_of_sampled:
            on_end(self)

    def end(self, end_time: int | None = None) -> None:
        if self._end_time is not None:
            self._is_over("end")
            return
        self._end_time = end_time or time_ns()
        for on_end in self._tracer.at_end_of_sampled:
            on_end(self)

    # As an attempt

    @property
    def queue(self) -> str:
        return self.tally.queue

    @property
    def actor(self) -> str:
        return self.tally.actor

    @property
    def failed(self) -> bool:
        return self.message is not None and self.message.failed

    def finish(self, outcome: str, error: BaseException | None, attributes: dict[str, Any]) -> float | None:
        """As `Attempt.finish`."""
        seconds: float | None = None
        try:
            if not self.finished:
                seconds = perf_counter() - self.started
                if error is None and not attributes:
                    self.conclude(outcome)
                else:
                    end_span(self, outcome, error, attributes)
                self.finished = True
        finally:
            self.detach()
        return seconds

    def detach(self) -> None:
        """Make the context of before the current one of this thread again."""
        if self.token is not None:
            detach(self.token)
            self.token = None

    @property
    def is_untouched(self) -> bool:
        """Whether it says nothing but what it was made of."""
        return not (self._has_attributes or self._events or self._links or self._status is not UNSET)


class Template:
    """The encoded form of all spans that have everything in common but ids and times.

    Parameters:
      before_ids: The fields' beginning, up to the trace id.
      before_parent: What stands between the end time and the parent's id.
      rest: What follows the parent's id, up to the message id, which is the last thing.
      length: Of the message id.
    """

    def __init__(self, before_ids: bytes, before_parent: bytes, rest: bytes, length: int) -> None:
        self._before_ids, self._before_parent, self._rest = before_ids, before_parent, rest
        layout = f"<{len(before_ids)}s16s2s8scQcQ{len(before_parent)}s8s{len(rest)}s{length}s"
        self._pack: Callable[..., bytes] = Struct(layout).pack

    def encode(self, span: AttemptSpan, message_id: bytes) -> bytes:
        """Return the span in a request, with the tag of its field."""
        parent = span.sent_by
        return self._pack(
            self._before_ids,
            parent[:16],
            b"\x12\x08",
            span.span_id.to_bytes(8, "big"),
            b"\x39",
            span._start_time,
            b"\x41",
            span._end_time,
            self._before_parent,
            parent[16:24],
            self._rest,
            message_id,
        )
