"""Spans of attempts that are looked at by nobody but the exporter, as most are.

Such a span keeps what it is made of: the header that came with its message, the message's id, the number of the
attempt and how it ended. What OpenTelemetry shows of a span is made of that when somebody asks for it: an actor that
logs or sends asks for the ids, one that sets an attribute asks for the attributes. A span that is untouched at its end
is exported as one piece of bytes, of which only ids and times differ from the last one (see `encoding`).

What is made late is behind properties and not in a `__getattr__`: a class that has one makes Python 3.11 look up
everything else the long way, too (`dis.dis(..., adaptive=True)` shows it).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Token
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any, NamedTuple, final

from dramatiq import MessageProxy
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode
from opentelemetry.util.types import Attributes

from . import conventions as c
from .carrier import read_sampled
from .known import Known
from .quick_spans import FLAGS, QuickSpan
from .spans import detach, end_span

if TYPE_CHECKING:
    from .metrics import AttemptTally
    from .quick_tracer import QuickTracer


#: What an untouched span says: what is known of it, message id, attempt, outcome, sender's header, id, start, end.
Abridged = tuple[Known, str, int, str | None, str, int, int, int | None]


@final
class AttemptSpan(QuickSpan):
    """A sampled span whose parent is the send that its message names, and the attempt itself (see `spans.Attempt`).

    Attributes:
      is_untouched: Whether it says nothing but what it was made of.
      sent_by: The header that names that parent (see `carrier.is_sampled`).
      outcome: How the attempt ended, or None.
      message, token, retry_stored, fields: As long as it is under way; `fields` are those of its log lines.
      tally: Where its thread counts it.
      finished: Whether the attempt is over, which somebody may have said of the span before.
    """

    _start_time: int
    _kind = SpanKind.CONSUMER
    _links = ()
    #: What somebody asked for.
    _made_attributes: Any = None
    _made_context: SpanContext | None = None
    message: MessageProxy | None = None
    tally: AttemptTally
    retry_stored = False
    fields: dict[str, Any] | None = None
    finished = False

    # A class with an `__init__` of its own takes twice as long to call. This one's is `start`.
    if TYPE_CHECKING:

        def __init__(self) -> None: ...

    else:
        __init__ = object.__init__

    def start(self, tracer: QuickTracer, known: Known, sent_by: str, message_id: str, attempt: int) -> None:
        """Begin. Its end is measured, because the clock may be set in between."""
        self._tracer = tracer
        self._resource = tracer.resource
        self._instrumentation_scope = tracer.scope
        self._name = known.span_name
        self.known = known
        self.sent_by = sent_by
        self.message_id = message_id
        self.attempt = attempt
        # What each span is asked for is on it: Python takes longer to find it on the class.
        self.is_untouched = True
        self.outcome: str | None = None
        self.token: Token[Context] | None = None
        self._end_time = None
        self.span_id = tracer.ids.generate_span_id()
        self._start_time = time_ns()
        self.started = perf_counter_ns()

    # Two threads that ask at once make the same.

    @property
    def _parent(self) -> SpanContext:  # type: ignore[override]
        return read_sampled(self.sent_by)

    @property
    def _context(self) -> SpanContext:  # type: ignore[override]
        if self._made_context is None:
            parent = self._parent
            self._made_context = SpanContext(
                parent.trace_id, self.span_id, False, FLAGS[parent.trace_flags], parent.trace_state
            )
        return self._made_context

    @property
    def _attributes(self) -> Any:
        if self._made_attributes is None:
            self.is_untouched = False
            assert self.known is not None, "what makes it unknown has asked for the attributes first"
            made = {**self.known.attributes, c.MESSAGE_ID: self.message_id, c.ATTEMPT: self.attempt}
            if self.outcome is not None:
                made[c.OUTCOME] = self.outcome
            self._made_attributes = made
        return self._made_attributes

    @_attributes.setter
    def _attributes(self, attributes: Any) -> None:
        self._made_attributes = attributes

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        self.is_untouched = False
        super().add_event(name, attributes, timestamp)

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        self.is_untouched = False
        super().add_link(context, attributes)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        self.is_untouched = False
        super().set_status(status, description)

    def update_name(self, name: str) -> None:
        self._attributes  # noqa: B018 - asked for while it is known what they begin with
        super().update_name(name)

    def conclude(self, outcome: str, nanoseconds: int | None = None) -> None:
        """End it, that long after it began if somebody has measured that already."""
        if self._end_time is not None or not self.is_untouched:
            super().conclude(outcome)
            return
        self.outcome = outcome
        if nanoseconds is None:
            nanoseconds = perf_counter_ns() - self.started
        self._end_time = self._start_time + nanoseconds
        for on_end in self._tracer.at_end_of_sampled:
            on_end(self)

    def end(self, end_time: int | None = None) -> None:
        if self._end_time is not None:
            self._is_over("end")
            return
        self._end_time = end_time or self._start_time + perf_counter_ns() - self.started
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
                seconds = (perf_counter_ns() - self.started) * 1e-9
                if error is None and not attributes:
                    self.conclude(outcome)
                else:
                    end_span(self, outcome, error, attributes)
                self.finished = True
        finally:
            self.detach()
        return seconds

    def abridged(self) -> Abridged:
        """All that it says, of one that is untouched."""
        assert self.known is not None, "who takes that from a span asks for its attributes first"
        return (
            self.known,
            self.message_id,
            self.attempt,
            self.outcome,
            self.sent_by,
            self.span_id,
            self._start_time,
            self._end_time,
        )

    def detach(self) -> None:
        """Make the context of before the current one of this thread again."""
        if self.token is not None:
            detach(self.token)
            self.token = None


class Template(NamedTuple):
    """The encoded form of all spans that have everything in common but ids and times.

    Attributes:
      pack: Puts it together.
      before_ids: The fields' beginning, up to the trace id.
      before_parent: What stands between the end time and the parent's id.
      rest: What follows the parent's id, up to the message id, which is the last thing.
    """

    pack: Callable[..., bytes]
    before_ids: bytes
    before_parent: bytes
    rest: bytes
