"""The middleware that makes a span, and the metrics, of each attempt of an actor.

It stands first in a broker's middleware: the first to hear that an attempt begins and the last to hear that it has
ended. So whatever another middleware does for a message, above all enqueueing its retry, the next step of its pipeline
or the callback of its group, happens in the attempt's context.

An attempt is the child of the send that created its message. With `link_parents` it begins a trace of its own, which
links to the send.

An attempt is kept on its message proxy until it ends, so a message that Dramatiq reports twice ends once. An exception
may strike between any two lines, as time limits and shutdowns do. Dramatiq then reports the end of the message once
more, or settles it; whichever comes first ends the span and restores the context from before the attempt.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from dramatiq import Broker, Message, MessageProxy, Middleware, Worker
from dramatiq.common import q_name
from dramatiq.errors import RateLimitExceeded, Retry
from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.trace import Link, SpanKind, Tracer

from . import conventions as c
from .attempts import ATTEMPT, Attempt, attempt_of
from .carrier import CARRIER_OPTION, extract, extract_headers
from .errors import record_error
from .flushing import flush
from .instruments import Instruments
from .sending import Send, Sender
from .unsampled import follows_unsampled_parents, unsampled_sender

_EMPTY = Context()

#: How long a stopping worker waits for exporters.
_FLUSH_SECONDS = 3.0


class TelemetryMiddleware(Middleware):
    """Spans and metrics of one broker's attempts. DramatiqInstrumentor puts it in and takes it out."""

    def __init__(
        self,
        system: str,
        tracer: Tracer,
        instruments: Instruments,
        sender: Sender,
        *,
        link_parents: bool,
        providers: Callable[[], Iterable[object]],
    ) -> None:
        self._system = system
        self._tracer = tracer
        self._instruments = instruments
        self._sender = sender
        self._link_parents = link_parents
        self._providers = providers
        # For each queue and actor: the name of a span, and the attributes of all its spans and metrics.
        self._known: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
        self._replays: dict[int, Send] = {}
        # JetStreamBroker says why a message became a dead letter, also of those that never reached an actor. Of other
        # brokers all there is to see is that Dramatiq rejects a message.
        self._names_dead_letters = system == "nats"
        self._skips: bool | None = None

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        name, known = self._known_of(broker, message.queue_name, message.actor_name)
        options = message.options
        parent = _EMPTY
        span = unsampled_sender(options.get(CARRIER_OPTION)) if self._skips_unsampled() else None
        if span is None:
            attributes = known | {
                c.MESSAGE_ID: message.message_id,
                c.ATTEMPT: (options.get("retries") or 0) + 1,
            }
            if _deliveries(message) > 1:
                attributes[c.DELIVERY_COUNT] = _deliveries(message)
            parent, links = self._parent(message)
            span = self._tracer.start_span(name, parent, SpanKind.CONSUMER, attributes, links)
        # Noted before its context is current, so that whatever strikes next can be undone.
        vars(message)[ATTEMPT] = Attempt(span, known)
        attach(trace.set_span_in_context(span, parent))
        if self._instruments.are_real:
            self._instruments.consumed.add(1, known)
            if _deliveries(message) > 1:
                self._instruments.redelivered.add(1, known)

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any | None = None,
        exception: BaseException | None = None,
    ) -> None:
        attempt = attempt_of(message)
        if attempt is not None:
            self._end(message, attempt, _outcome(message, attempt, exception), exception)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        attempt = attempt_of(message)
        if attempt is None:
            return
        # Dramatiq emits this while it handles the SkipMessage.
        skip = sys.exc_info()[1]
        if attempt.span.is_recording() and skip is not None and str(skip):
            attempt.span.set_attribute(c.SKIP_REASON, str(skip))
        self._end(message, attempt, c.Outcome.ABORTED if _by_abort(skip) else c.Outcome.SKIPPED, None)

    def after_ack(self, broker: Broker, message: MessageProxy) -> None:
        self._end_abandoned(message)

    def after_nack(self, broker: Broker, message: MessageProxy) -> None:
        if not self._names_dead_letters:
            self._count_dead_letter(message.queue_name, "rejected")
        self._end_abandoned(message)

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        # A worker process of the dramatiq command ends without running atexit handlers, so the SDK gets no other
        # chance to export what is left.
        flush(self._providers(), _FLUSH_SECONDS)

    # What a broker may tell besides Dramatiq's signals; JetStreamBroker does.

    def after_dead_letter(
        self,
        broker: Broker,
        queue_name: str,
        reason: str,
        message: Message[Any] | MessageProxy | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """A message was moved to the dead letters; without `message` it could not be decoded."""
        queue = q_name(queue_name)
        self._count_dead_letter(queue, reason)
        attributes: dict[str, Any] = {
            c.SYSTEM: self._system,
            c.DESTINATION: queue,
            c.OPERATION_NAME: "dead_letter",
            c.OPERATION_TYPE: "settle",
            c.DEAD_LETTER_REASON: reason,
        }
        if message is not None:
            attributes |= {c.MESSAGE_ID: message.message_id, c.ACTOR: message.actor_name}
        parent = extract_headers(headers) if message is None else extract(message)
        self._tracer.start_span(f"dead_letter {queue}", parent, SpanKind.CLIENT, attributes).end()

    def before_replay(
        self,
        broker: Broker,
        queue_name: str,
        headers: MutableMapping[str, str],
        message: Message[Any] | None,
    ) -> None:
        """A dead letter is about to be put back on its queue; without `message` it cannot be decoded."""
        self._replays[id(headers)] = self._sender.replay(queue_name, headers, message)

    def after_replay(
        self,
        broker: Broker,
        queue_name: str,
        headers: MutableMapping[str, str],
        message: Message[Any] | None,
        *,
        exception: BaseException | None = None,
    ) -> None:
        """A dead letter was put back on its queue, or could not be."""
        send = self._replays.pop(id(headers), None)
        if send is not None:
            send.end(exception)

    def _known_of(self, broker: Broker, queue_name: str, actor: str) -> tuple[str, dict[str, Any]]:
        known = self._known.get((queue_name, actor))
        if known is None:
            queue = q_name(queue_name)
            attributes = {
                c.SYSTEM: self._system,
                c.DESTINATION: queue,
                c.OPERATION_NAME: "process",
                c.OPERATION_TYPE: "process",
                c.ACTOR: actor,
            }
            known = (f"process {queue}", attributes)
            if actor in broker.actors:  # other programs may have made up any number of names
                self._known[queue_name, actor] = known
        return known

    def _skips_unsampled(self) -> bool:
        """Whether no span need be made for a message whose sender's span is not sampled."""
        if self._skips is None:
            provider = next(iter(self._providers()))
            if isinstance(provider, trace.ProxyTracerProvider):
                return False  # it is not set yet
            self._skips = not self._link_parents and follows_unsampled_parents(provider)
        return self._skips

    def _parent(self, message: MessageProxy) -> tuple[Context, list[Link] | None]:
        created = extract(message)
        if not self._link_parents:
            return created, None
        creation = trace.get_current_span(created).get_span_context()
        # Baggage does not depend on parents: it goes on with the message.
        root = trace.set_span_in_context(trace.INVALID_SPAN, created)
        return root, [Link(creation)] if creation.is_valid else None

    def _end(
        self, message: MessageProxy, attempt: Attempt, outcome: str, error: BaseException | None
    ) -> None:
        seconds = time.perf_counter() - attempt.started
        span = attempt.span
        error_type = None
        # An actor asks to be run again by raising one of these; Dramatiq does not log them as errors either.
        if outcome == c.Outcome.RETRIED and isinstance(error, (Retry, RateLimitExceeded)):
            error = None
        try:
            if span.is_recording():
                span.set_attribute(c.OUTCOME, outcome)
            if error is not None:
                error_type = record_error(span, error)
        finally:
            if span.is_recording():
                span.end()
            attach(attempt.outer)
            vars(message).pop(ATTEMPT, None)
        if self._instruments.are_real:
            measured = attempt.measured | {c.OUTCOME: outcome}
            if error_type is not None:
                measured[c.ERROR_TYPE] = error_type
            self._instruments.process_duration.record(seconds, measured)

    def _end_abandoned(self, message: MessageProxy) -> None:
        # A message is settled after its attempt has ended, except when an exception struck Dramatiq's own handling
        # of the end. The worker thread is about to die of it.
        attempt = attempt_of(message)
        if attempt is not None:
            self._end(message, attempt, c.Outcome.UNRESOLVED, sys.exc_info()[1])

    def _count_dead_letter(self, queue_name: str, reason: str) -> None:
        self._instruments.dead_lettered.add(
            1, {c.SYSTEM: self._system, c.DESTINATION: q_name(queue_name), c.DEAD_LETTER_REASON: reason}
        )


def _deliveries(message: MessageProxy) -> int:
    """How often the broker has delivered a message, if it says so."""
    deliveries: int = getattr(message, "delivery_count", 1)
    return deliveries


def _outcome(message: MessageProxy, attempt: Attempt, error: BaseException | None) -> str:
    """How an attempt ended that was not skipped."""
    if error is None:
        # The actor did its work, yet something may have rejected the message all the same.
        return c.Outcome.FAILED if message.failed else c.Outcome.DONE
    if any(
        cls.__name__ == "Abort" and cls.__module__.startswith("dramatiq_abort") for cls in type(error).__mro__
    ):
        return c.Outcome.ABORTED
    if message.failed:
        return c.Outcome.FAILED
    return c.Outcome.RETRIED if attempt.was_retried else c.Outcome.UNRESOLVED


def _by_abort(skip: BaseException | None) -> bool:
    """Whether a message was skipped because it had been aborted before it ran.

    dramatiq-abort raises a bare SkipMessage; only where it was raised tells it from other reasons.
    """
    frame = None
    traceback = skip.__traceback__ if skip is not None else None
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("dramatiq_abort")
