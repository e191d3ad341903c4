"""The middleware that makes spans and metrics of Dramatiq's signals.

It stands first in a broker's middleware: the first to hear that an attempt begins and the last to hear that
it has ended. So whatever another middleware does for a message, above all storing its retry, the next step of
its pipeline or the callback of its group, happens inside the attempt's context.

Parents: a send is a child of what is going on where it was called; an attempt is a child of the send that
created it. A retry is sent inside the failed attempt, so a trace reads send → process → send → process. With
`link_parents` an attempt begins a trace of its own, which links to the send.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from threading import current_thread
from typing import TYPE_CHECKING, Any

from dramatiq import Broker, Message, MessageProxy, Middleware, Worker
from dramatiq.common import q_name
from dramatiq.worker import ConsumerThread
from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Tracer

from . import conventions as c
from .carrier import CARRIER_OPTION, extract, extract_headers, inject, remote_parent, replace
from .flush import force_flush
from .known import Known
from .logs import enter, leave
from .metrics import Instruments
from .spans import (
    Attempt,
    CurrentThread,
    Send,
    ThreadState,
    attach,
    is_expected,
    outcome_of,
    skipped_by_abort,
)
from .usual_attempts import UsualAttempts

if TYPE_CHECKING:
    from .attempt_spans import AttemptSpan
    from .quick_tracer import QuickTracer

_NO_ATTRIBUTES: dict[str, Any] = {}
_NO_CONTEXT = Context()


class TelemetryMiddleware(Middleware):
    """Spans and metrics of one broker. DramatiqInstrumentor puts it in and takes it out."""

    def __init__(
        self,
        broker: Broker,
        tracer: Tracer,
        instruments: Instruments,
        *,
        quick_tracer: QuickTracer | None = None,
        link_parents: bool = False,
        providers: Callable[[], Iterable[object]] = tuple,
        flush_timeout: int = 3_000,
    ) -> None:
        self._tracer = tracer
        self._quick_tracer = quick_tracer
        self._known_spans: dict[tuple[str, str, str], Known] = {}
        self._instruments = instruments
        self._link_parents = link_parents
        self._takes_remote_parents = quick_tracer is not None and not link_parents
        self._providers = providers
        self._flush_timeout = flush_timeout
        self._system = c.messaging_system(broker)
        # JetStreamBroker says why a message became a dead letter, and says so for those too that never
        # reached a worker thread. From other brokers all there is to see is the rejection.
        self._names_dead_letters = self._system == "nats"
        self._current_thread = CurrentThread()
        self._usual: UsualAttempts | None = None
        if quick_tracer is not None and not link_parents and instruments.are_tallied:
            self._usual = UsualAttempts(
                self._system, quick_tracer, instruments, self._current_thread, self._known
            )

    @property
    def _thread(self) -> ThreadState:
        return self._current_thread.state

    # ---- sending ------------------------------------------------------------------------------------------

    def open_sends(self) -> dict[int, Send] | None:
        """A call of enqueue begins: what it sends is its own. Returns what to give to close_sends."""
        outer, self._thread.sends = self._thread.sends, {}
        return outer

    def close_sends(self, outer: dict[int, Send] | None, error: BaseException | None) -> None:
        """A call of enqueue has ended: what it left unsent has failed with its error."""
        sends, self._thread.sends = self._thread.sends, outer
        for send in (sends or {}).values():
            self._end_send(send, error)

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        # Redis and RabbitMQ hold delayed messages in the worker and move them on through enqueue when they
        # are due. Nobody sends anything then; the message keeps the context that it has.
        if isinstance(current_thread(), ConsumerThread):
            return
        sends = self._sends()
        if id(message) in sends:
            # RabbitMQ announces a message once more when it tries again after losing its connection.
            return
        parent, links = self._parent_of_send(message)
        known = self._known("send", message.queue_name, message.actor_name)
        queue = known.queue
        attributes = {**known.attributes, c.MESSAGE_ID: message.message_id}
        retries = message.options.get("retries")
        if retries:
            attributes[c.ATTEMPT] = retries + 1
        if delay:
            attributes[c.DELAY] = delay
        span = self._start(known, SpanKind.PRODUCER, attributes, parent, links)
        previous = message.options.get(CARRIER_OPTION)
        sends[id(message)] = Send(message, message.message_id, queue, span, previous)
        carrier: dict[str, str] = {}
        inject(carrier, trace.set_span_in_context(span, parent))
        if carrier:
            message.options[CARRIER_OPTION] = carrier

    def after_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        send = (self._thread.sends or {}).pop(id(message), None)
        if send is None:
            return
        self._end_send(send, None, sent=True)
        attempt = self._thread.attempt
        if attempt is not None and attempt.message_id == send.message_id:
            attempt.retry_stored = True

    def before_publish_event(self, broker: Broker, subject: str, headers: MutableMapping[str, str]) -> None:
        """JetStreamBroker is about to publish an event."""
        parent = get_current()
        # A context that somebody gave the event on purpose stays its context; the send says so by a link.
        given_context = trace.get_current_span(extract_headers(headers)).get_span_context()
        span = self._tracer.start_span(
            f"send {subject}",
            parent,
            SpanKind.PRODUCER,
            attributes={
                c.SYSTEM: self._system,
                c.DESTINATION: subject,
                c.OPERATION_NAME: "send",
                c.OPERATION_TYPE: "send",
                **({c.MESSAGE_ID: headers["Nats-Msg-Id"]} if "Nats-Msg-Id" in headers else {}),
            },
            links=[Link(given_context)] if given_context.is_valid else None,
        )
        self._sends()[id(headers)] = Send(headers, None, subject, span, None)
        if not given_context.is_valid:
            inject(headers, trace.set_span_in_context(span, parent))

    def after_publish_event(
        self,
        broker: Broker,
        subject: str,
        headers: MutableMapping[str, str],
        *,
        exception: BaseException | None = None,
    ) -> None:
        """JetStreamBroker has published an event, or failed to."""
        self._end_own_send(headers, exception)

    def before_replay(
        self,
        broker: Broker,
        queue_name: str,
        headers: MutableMapping[str, str],
        message: Message[Any] | None,
    ) -> None:
        """JetStreamBroker is about to put a dead letter back on its queue; without `message` it cannot read it."""
        queue = q_name(queue_name)
        history = Context() if message is None else extract(message, message.options)
        if not trace.get_current_span(history).get_span_context().is_valid:
            history = extract_headers(headers)
        parent, links = self._continue(history)
        attributes: dict[str, Any] = {
            c.SYSTEM: self._system,
            c.DESTINATION: queue,
            c.OPERATION_NAME: "send",
            c.OPERATION_TYPE: "send",
            c.REPLAY: True,
        }
        if message is not None:
            attributes[c.ACTOR] = message.actor_name
            attributes[c.MESSAGE_ID] = message.message_id
        span = self._tracer.start_span(
            f"send {queue}", parent, SpanKind.PRODUCER, attributes=attributes, links=links
        )
        self._sends()[id(headers)] = Send(headers, None, queue, span, None)
        carrier: dict[str, str] = {}
        inject(carrier, trace.set_span_in_context(span, parent))
        if carrier:
            replace(headers, carrier)
            if message is not None:
                message.options[CARRIER_OPTION] = carrier

    def after_replay(
        self,
        broker: Broker,
        queue_name: str,
        headers: MutableMapping[str, str],
        message: Message[Any] | None,
        *,
        exception: BaseException | None = None,
    ) -> None:
        """JetStreamBroker has put a dead letter back on its queue, or failed to."""
        self._end_own_send(headers, exception)

    def _end_own_send(self, headers: object, error: BaseException | None) -> None:
        """End a send that is known by its headers."""
        send = (self._thread.sends or {}).pop(id(headers), None)
        if send is not None:
            self._end_send(send, error, sent=error is None)

    def _sends(self) -> dict[int, Send]:
        sends = self._thread.sends
        if sends is None:
            # Outside a call of enqueue: an event, or a broker that emits by itself.
            sends = self._thread.sends = {}
        return sends

    def _end_send(self, send: Send, error: BaseException | None, *, sent: bool = False) -> None:
        seconds = send.finish(error)
        if sent or error is not None:
            error_type = None if error is None else c.error_type(error)
            self._instruments.sent(self._system, send.destination, seconds, error_type)
        if send.message_id is not None:
            send.restore()

    def _parent_of_send(self, message: Message[Any]) -> tuple[Context, list[Link] | None]:
        """What a send is part of, and what else it is to be linked to.

        A message that is sent for the first time belongs to whatever is going on here. So does the retry of
        the message that this thread is working on. Any other message that carries a context already has a
        history, such as a dead letter that is replayed: it stays in its trace, and links to the replay.
        """
        attempt = self._thread.attempt
        if CARRIER_OPTION not in message.options or (
            attempt is not None and attempt.message_id == message.message_id
        ):
            return get_current(), None
        return self._continue(extract(message, message.options))

    def _continue(self, history: Context) -> tuple[Context, list[Link] | None]:
        """What the sending of a message with a history is part of, and what it is to be linked to."""
        current = get_current()
        here = trace.get_current_span(current).get_span_context()
        there = trace.get_current_span(history).get_span_context()
        if not there.is_valid or here.trace_id == there.trace_id:
            return current, None
        if self._link_parents and here.is_valid:
            return current, [Link(there)]
        return history, [Link(here)] if here.is_valid else None

    # ---- processing ---------------------------------------------------------------------------------------

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        if self._usual is not None and self._usual.begin(message):
            return
        if self._thread.attempt is not None:
            # An exception that struck outside the actor kept Dramatiq from reporting the end.
            self._end_attempt(self._thread.attempt, c.Outcome.UNRESOLVED, None)
        known = self._known("process", message.queue_name, message.actor_name)
        deliveries = getattr(message, "delivery_count", 1)
        span, parent = self._start_attempt(known, message, message.options, message.message_id, deliveries)
        queue, actor = known.queue, message.actor_name
        # In this order for the same reason as a usual attempt.
        attempt = self._thread.attempt = Attempt(message, message.message_id, queue, actor, span)
        attempt.token = attach(trace.set_span_in_context(span, parent))
        enter(message)
        self._instruments.consumed(self._system, queue, actor, redelivered=deliveries > 1)

    def _start_attempt(
        self, known: Known, message: MessageProxy, options: dict[str, Any], message_id: str, deliveries: int
    ) -> tuple[Span, Context]:
        """Begin the span of an attempt; returns it and the context that it is begun in."""
        remote = remote_parent(options) if self._takes_remote_parents else None
        parent = _NO_CONTEXT if remote is not None else extract(message, options)
        links: list[Link] | None = None
        if self._link_parents:
            created_by = trace.get_current_span(parent).get_span_context()
            if created_by.is_valid:
                links = [Link(created_by)]
                # Baggage is no matter of parents: it goes on with the message.
                parent = trace.set_span_in_context(trace.INVALID_SPAN, parent)
        attributes = {
            **known.attributes,
            c.MESSAGE_ID: message_id,
            c.ATTEMPT: (options.get("retries") or 0) + 1,
        }
        if deliveries > 1:
            attributes[c.DELIVERY_COUNT] = deliveries
        event = options.get("event")
        if event is not None and isinstance(event, dict) and "subject" in event:
            attributes[c.EVENT_SUBJECT] = str(event["subject"])
        return self._start(known, SpanKind.CONSUMER, attributes, parent, links, remote), parent

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any | None = None,
        exception: BaseException | None = None,
    ) -> None:
        if exception is None and self._usual is not None and self._usual.end(message):
            return
        attempt = self._thread.attempt
        if attempt is not None and attempt.message is message:
            self._end_attempt(attempt, outcome_of(attempt, exception), exception)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        attempt = self._thread.attempt
        if attempt is None or attempt.message is not message:
            return
        # Dramatiq emits this while it handles the SkipMessage.
        skip = sys.exc_info()[1]
        outcome = c.Outcome.ABORTED if skipped_by_abort(skip) else c.Outcome.SKIPPED
        attributes = {c.SKIP_REASON: str(skip)} if skip is not None and str(skip) else _NO_ATTRIBUTES
        self._end_attempt(attempt, outcome, None, attributes)

    def after_ack(self, broker: Broker, message: MessageProxy) -> None:
        if self._current_thread.state.attempt is not None:
            self._end_abandoned(message)

    def after_nack(self, broker: Broker, message: MessageProxy) -> None:
        if not self._names_dead_letters:
            self._instruments.dead_lettered(self._system, q_name(message.queue_name), "rejected")
        self._end_abandoned(message)

    def after_dead_letter(
        self,
        broker: Broker,
        queue_name: str,
        reason: str,
        message: Message[Any] | MessageProxy | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """JetStreamBroker has moved a message to the dead letters; without `message` it was not read."""
        queue = q_name(queue_name)
        self._instruments.dead_lettered(self._system, queue, reason)
        attributes: dict[str, Any] = {
            c.SYSTEM: self._system,
            c.DESTINATION: queue,
            c.OPERATION_NAME: "dead_letter",
            c.OPERATION_TYPE: "settle",
            c.DEAD_LETTER_REASON: reason,
        }
        parent = extract_headers(headers)
        if message is not None:
            attributes[c.MESSAGE_ID] = message.message_id
            attributes[c.ACTOR] = message.actor_name
            parent = extract(message, message.options)
        self._tracer.start_span(f"dead_letter {queue}", parent, SpanKind.CLIENT, attributes=attributes).end()

    def _end_abandoned(self, message: MessageProxy) -> None:
        # A message is settled after its attempt has ended, except when an exception struck Dramatiq's own
        # handling of the end. The worker thread is about to die of it.
        attempt = self._thread.attempt
        if attempt is not None and attempt.message is message:
            self._end_attempt(attempt, c.Outcome.UNRESOLVED, sys.exc_info()[1])

    def _end_attempt(
        self,
        attempt: Attempt | AttemptSpan,
        outcome: str,
        error: BaseException | None,
        attributes: dict[str, Any] = _NO_ATTRIBUTES,
    ) -> None:
        if attempt.failed:
            attributes = {**attributes, c.DEAD_LETTERED: True}
        if error is not None and is_expected(error, outcome):
            error = None
        error_type = None if error is None else c.error_type(error)
        leave()
        seconds = attempt.finish(outcome, error, attributes)
        self._thread.attempt = None
        attempt.message = None
        if seconds is not None:
            self._instruments.processed(
                self._system, attempt.queue, attempt.actor, seconds, outcome, error_type
            )

    def _known(self, operation: str, queue_name: str, actor: str) -> Known:
        known = self._known_spans.get((operation, queue_name, actor))
        if known is None:
            queue = q_name(queue_name)
            known = self._known_spans[operation, queue_name, actor] = Known(
                f"{operation} {queue}",
                queue,
                {
                    c.SYSTEM: self._system,
                    c.DESTINATION: queue,
                    c.OPERATION_NAME: operation,
                    c.OPERATION_TYPE: operation,
                    c.ACTOR: actor,
                },
            )
        return known

    def _start(
        self,
        known: Known,
        kind: SpanKind,
        attributes: dict[str, Any],
        parent: Context,
        links: list[Link] | None,
        remote: SpanContext | None = None,
    ) -> Span:
        if self._quick_tracer is not None:
            return self._quick_tracer.start_span(known, kind, attributes, parent, links, remote)
        return self._tracer.start_span(known.span_name, parent, kind, attributes=attributes, links=links)

    # ---- the end of the worker ----------------------------------------------------------------------------

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        # A worker process of the dramatiq command ends without running atexit handlers, so whoever set the
        # providers up gets no other chance.
        force_flush(self._providers(), self._flush_timeout)
