"""Spans and metrics of what a program sends: messages, batches of messages, events and replays.

Dramatiq has no signal for a send that failed, so the methods of a broker that send are wrapped (see `methods`). A
message takes the context of its send along in its options, which are put back afterwards: a program may send the same
message object again and must not find itself in the trace of the first time.

A send is a child of the span that is current where it is called. A message that carries a context already has a
history, such as a dead letter that is replayed: it stays in its trace, and links to whatever sent it this time. The
retry of an attempt is part of that attempt.

An exception may strike between any two lines, as time limits and shutdowns do. A span that was begun ends in the
`finally` of its send, which also makes the caller's context current again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from threading import current_thread
from types import TracebackType
from typing import Any

from dramatiq import Message
from dramatiq.common import q_name
from dramatiq.worker import ConsumerThread
from opentelemetry import trace
from opentelemetry.context import Context, attach, get_current
from opentelemetry.trace import Link, SpanKind, Tracer

from . import conventions as c
from .attempts import attempt_of
from .carrier import CARRIER_OPTION, extract, extract_headers, inject, replace
from .errors import record_error
from .instruments import Instruments

_ABSENT = object()
_MEASURED = (c.SYSTEM, c.DESTINATION, c.OPERATION_NAME, c.OPERATION_TYPE)


class Sender:
    """The wrappers of one broker's sending methods."""

    def __init__(self, system: str, tracer: Tracer, instruments: Instruments, *, link_parents: bool) -> None:
        self.system = system
        self.tracer = tracer
        self.instruments = instruments
        self._link_parents = link_parents

    def enqueue(
        self, send: Callable[..., Any], message: Message[Any], *, delay: int | None = None, **options: Any
    ) -> Any:
        """Around `Broker.enqueue`; further options are the broker's own."""
        # Redis and RabbitMQ hold delayed messages in the worker and enqueue them again when they are due. Nothing is
        # sent then; the message keeps the context that it has.
        if isinstance(current_thread(), ConsumerThread):
            return send(message, delay=delay, **options)
        attempt = attempt_of(message)
        parent, links = (get_current(), None) if attempt is not None else self._continue(extract(message))
        previous = message.options.get(CARRIER_OPTION, _ABSENT)
        try:
            with Send(self, self._attributes("send", message, delay), parent, links) as context:
                _carry(message.options, context)
                sent = send(message, delay=delay, **options)
        finally:
            _put_back(message.options, previous)
        if attempt is not None:
            attempt.was_retried = True
        return sent

    def enqueue_many(self, send: Callable[..., Any], messages: Any, **options: Any) -> Any:
        """Around a broker's `enqueue_many(messages, *, delay=…)`, which JetStreamBroker has.

        By the conventions each message gets a `create` span, whose context it carries, and the batch one `send`.
        """
        messages = list(messages)
        previous = [message.options.get(CARRIER_OPTION, _ABSENT) for message in messages]
        try:
            links = [self._create(message, options.get("delay")) for message in messages]
            queues = {q_name(message.queue_name) for message in messages}
            attributes = self._operation("send", queues.pop() if len(queues) == 1 else None)
            attributes[c.BATCH_SIZE] = len(messages)
            with Send(self, attributes, get_current(), links, SpanKind.CLIENT, count=len(messages)):
                return send(messages, **options)
        finally:
            for message, carrier in zip(messages, previous, strict=True):
                _put_back(message.options, carrier)

    def publish(self, send: Callable[..., Any], subject: str, event: Any, **options: Any) -> Any:
        """Around a broker's `publish(subject, event, *, event_id=…, headers=…)`, which JetStreamBroker has."""
        headers = dict(options.pop("headers", None) or {})
        attributes = self._operation("send", subject)
        if options.get("event_id") is not None:
            attributes[c.MESSAGE_ID] = options["event_id"]
        # A context that the program gave the event stays the event's context; the send links to it.
        given = trace.get_current_span(extract_headers(headers)).get_span_context()
        with Send(self, attributes, get_current(), [Link(given)] if given.is_valid else None) as context:
            if not given.is_valid:
                headers |= inject(context)
            return send(subject, event, headers=headers, **options)

    def replay(
        self, queue_name: str, headers: MutableMapping[str, str], message: Message[Any] | None
    ) -> Send:
        """A dead letter is put back on its queue. Without `message` the broker could not decode it."""
        history = Context() if message is None else extract(message)
        if not trace.get_current_span(history).get_span_context().is_valid:
            history = extract_headers(headers)
        parent, links = self._continue(history)
        attributes = self._operation("send", q_name(queue_name)) | {c.REPLAY: True}
        if message is not None:
            attributes |= {c.ACTOR: message.actor_name, c.MESSAGE_ID: message.message_id}
        send = Send(self, attributes, parent, links)
        carrier = inject(send.context)
        replace(headers, carrier)
        if message is not None and carrier:
            message.options[CARRIER_OPTION] = carrier
        return send

    def _create(self, message: Message[Any], delay: int | None) -> Link:
        """Give a message of a batch a context of its own; return the link to it."""
        parent, links = self._continue(extract(message))
        attributes = self._attributes("create", message, delay)
        name = f"create {attributes[c.DESTINATION]}"
        span = self.tracer.start_span(name, parent, SpanKind.PRODUCER, attributes, links)
        span.end()
        _carry(message.options, trace.set_span_in_context(span, parent))
        return Link(span.get_span_context())

    def _continue(self, history: Context) -> tuple[Context, list[Link] | None]:
        """What sending a message with a history is part of, and what it links to."""
        current = get_current()
        there = trace.get_current_span(history).get_span_context()
        if not there.is_valid:
            return current, None
        here = trace.get_current_span(current).get_span_context()
        if here.trace_id == there.trace_id:
            return current, None
        if self._link_parents and here.is_valid:
            return current, [Link(there)]
        return history, [Link(here)] if here.is_valid else None

    def _attributes(self, operation: str, message: Message[Any], delay: int | None) -> dict[str, Any]:
        attributes = self._operation(operation, q_name(message.queue_name))
        attributes[c.ACTOR] = message.actor_name
        attributes[c.MESSAGE_ID] = message.message_id
        retries = message.options.get("retries")
        if retries:
            attributes[c.ATTEMPT] = retries + 1
        if delay:
            attributes[c.DELAY] = delay
        return attributes

    def _operation(self, name: str, destination: str | None) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            c.SYSTEM: self.system,
            c.OPERATION_NAME: name,
            c.OPERATION_TYPE: name,
        }
        if destination is not None:
            attributes[c.DESTINATION] = destination
        return attributes


class Send:
    """One send: a span, which begins when this is made and is current in a `with`, and its metrics."""

    __slots__ = ("_count", "_measured", "_outer", "_sender", "_span", "_started", "context")

    def __init__(
        self,
        sender: Sender,
        attributes: dict[str, Any],
        parent: Context,
        links: list[Link] | None,
        kind: SpanKind = SpanKind.PRODUCER,
        *,
        count: int = 1,
    ) -> None:
        destination = attributes.get(c.DESTINATION)
        name = "send" if destination is None else f"send {destination}"
        self._sender = sender
        self._count = count
        self._measured = {key: attributes[key] for key in _MEASURED if key in attributes}
        self._outer = get_current()
        self._started = time.perf_counter()
        self._span = sender.tracer.start_span(name, parent, kind, attributes, links)
        #: What the message carries.
        self.context = trace.set_span_in_context(self._span, parent)

    def __enter__(self) -> Context:
        attach(self.context)
        return self.context

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        attach(self._outer)
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """End the span, with the error that the send raised."""
        measured = self._measured
        if error is not None:
            measured[c.ERROR_TYPE] = record_error(self._span, error)
        self._span.end()
        instruments = self._sender.instruments
        instruments.send_duration.record(time.perf_counter() - self._started, measured)
        instruments.sent.add(self._count, measured)


def _carry(options: MutableMapping[str, Any], context: Context) -> None:
    carrier = inject(context)
    if carrier:
        options[CARRIER_OPTION] = carrier


def _put_back(options: MutableMapping[str, Any], previous: Any) -> None:
    if previous is _ABSENT:
        options.pop(CARRIER_OPTION, None)
    else:
        options[CARRIER_OPTION] = previous
