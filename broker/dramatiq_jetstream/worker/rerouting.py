"""Where a message goes that is not processed here: to the dead letters, into a delay, or back to its queue.

It is stored there first and acked afterwards. If the process dies between the two, the message is delivered and stored
again: a dead letter replaces itself (see `dead_letters`), and everything else has a `Nats-Msg-Id` made from where it
came from, so JetStream stores it once. What cannot be stored is delivered again later. If its dead letter is what could
not be stored, this process does not run it again.

A message that is delivered again because of a temporary error, such as a full store or an outage, is not to blame.
Before its deliveries make it a suspect, it is stored again and counted from one. Deliveries for other errors keep
counting.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from dramatiq.errors import ActorNotFound, BrokerConnectionError, BrokerError
from dramatiq.message import Message
from dramatiq.middleware import SkipMessage

from dramatiq_jetstream import dead_letters
from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.dead_letters import DeadLetters
from dramatiq_jetstream.errors import ApiError, HardTimeLimitExceeded, PermissionDenied
from dramatiq_jetstream.jetstream.names import (
    HEADER_BODY,
    HEADER_EARLIER_DELIVERIES,
    HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE,
    HEADER_MOMENT,
    HEADER_MSG_ID,
    HEADER_ORIGIN,
    HEADER_TICK,
    HEADER_UNKNOWN_SINCE,
    OPTION_TRACE_CONTEXT,
    REQUEUE_HEADERS,
    trace_headers,
)
from dramatiq_jetstream.jetstream.reading import last_message
from dramatiq_jetstream.sending import delays
from dramatiq_jetstream.sending.envelope import Event, decode, event_of, to_message
from dramatiq_jetstream.sending.fitting import fit, unfolded
from dramatiq_jetstream.sending.references import References
from dramatiq_jetstream.wire.connection import Connection
from dramatiq_jetstream.wire.error_numbers import CONFLICT
from dramatiq_jetstream.wire.headers import sendable

from .delivery import Delivery, Source, event_in
from .in_flight import InFlight
from .message import JetStreamMessage
from .settlements import ACK, NAK, nak_after
from .suspects import Suspects
from .tracebacks import text_of, traceback_of

__all__ = ["Rerouter"]

logger = logging.getLogger(__name__)

#: A message that is requeued with a delay comes again after this time, doubled each time up to the longest.
FIRST_DELAY_MS = 2_000
LONGEST_DELAY_MS = 60_000

#: Messages for another version of the program come again soon, because any worker may get them next. An event comes
#: again after the first of these times, doubled each time up to the second. A message with an unknown actor comes again
#: after half the time that it has waited, within the same bounds.
OTHERS_DELAY_MS = 300
LONGEST_OTHERS_DELAY_MS = 5_000

#: The most messages whose reason for a dead letter this process remembers because the letter could not be stored.
MOST_UNSTORED = 10_000

#: How long storing a message with a delay may take; after that it is requeued instead.
STORE_LATER_TIMEOUT_MS = 2_000


class Rerouter:
    """Sends elsewhere what is not processed here; called on Dramatiq's threads.

    What stores a dead letter, and `delay_until_eta`, raises an error unless the server has confirmed it.

    Parameters:
      actor_options: The options of the actor with that name.
      emit: Calls a hook of this library's own (see `hooks`).
      record: Records that a message which was not begun here is a dead letter, and why.

    Attributes:
      given_up: Called with a message that became a dead letter without being begun here; its earlier workers died.
    """

    def __init__(
        self,
        config: BrokerConfig,
        connection: Connection,
        in_flight: InFlight,
        letters: DeadLetters,
        suspects: Suspects,
        *,
        actor_options: Callable[[str], Mapping[str, Any]],
        emit: Callable[..., None],
        record: Callable[[Delivery, str], None],
    ) -> None:
        self._record = record
        self.given_up: Callable[[Delivery], object] = lambda _: None
        self._config = config
        self._connection = connection
        self._in_flight = in_flight
        self._letters = letters
        self._suspects = suspects
        self._references = References(connection)
        self._actor_options = actor_options
        self._emit = emit
        self._unknown: set[str] = set()  # undeclared actors that were logged already
        self._unstored: dict[str, tuple[str, str]] = {}

    def store_dead_letter(self, delivery: Delivery, reason: str, error: str) -> None:
        """Store a dead letter for a delivery that never became a message here."""
        self._store_letter(delivery, reason, error, None)
        if reason != dead_letters.UNDECODABLE:
            self._record(delivery, error)
            self.given_up(delivery)

    def reject(self, message: JetStreamMessage, follow_up_error: BaseException | None) -> None:
        """Store a dead letter for a message that failed."""
        if follow_up_error is not None:
            reason = dead_letters.REJECTED
            error = f"What follows it cannot be enqueued: {_describe(follow_up_error)}"
            if message._exception is not None and message._exception is not follow_up_error:
                error = f"{_describe(message._exception)[: dead_letters.MAX_ERROR // 2]} | {error}"
        else:
            reason, error = self._reason(message)
        self._store_letter(message._delivery, reason, error, message)
        if reason == dead_letters.UNKNOWN_ACTOR and message.to_record is None:
            self._record(message._delivery, error)

    def _reason(self, message: JetStreamMessage) -> tuple[str, str]:
        error = message._exception
        if isinstance(error, HardTimeLimitExceeded):
            return dead_letters.KILLED, str(error)
        if isinstance(error, ActorNotFound):
            return dead_letters.UNKNOWN_ACTOR, f"No actor {message.actor_name!r} is declared here."
        if error is None:
            return dead_letters.REJECTED, "A middleware rejected it."
        throws = message.options.get("throws") or self._actor_options(message.actor_name).get("throws")
        if isinstance(error, SkipMessage) or (throws and isinstance(error, throws)):
            return dead_letters.REJECTED, _describe(error)
        # Refused the first time it was asked: the actor does not retry such an error. `Retries` counts before it asks.
        if (
            self._actor_options(message.actor_name).get("retry_when")
            and message.options.get("retries", 0) <= 1
        ):
            return dead_letters.REJECTED, _describe(error)
        return dead_letters.RETRIES_EXHAUSTED, _describe(error)

    def owes_dead_letter(self, delivery: Delivery) -> bool:
        """Whether a dead letter for this message could not be stored when it was here before."""
        return bool(self._unstored) and delivery.origin in self._unstored

    def retry_dead_letter(self, delivery: Delivery) -> None:
        """Store the dead letter that could not be stored when the message was here before."""
        reason, error = self._unstored[delivery.origin]
        self._store_letter(delivery, reason, error, None)

    def _store_letter(
        self, delivery: Delivery, reason: str, error: str, message: JetStreamMessage | None
    ) -> None:
        try:
            self._try_to_store_letter(delivery, reason, error, message)
        except BaseException:
            # Several threads come here; an entry that is missing costs one more run of the message.
            if len(self._unstored) < MOST_UNSTORED:
                self._unstored[delivery.origin] = reason, error[: dead_letters.MAX_ERROR]
            raise
        self._unstored.pop(delivery.origin, None)

    def _try_to_store_letter(
        self, delivery: Delivery, reason: str, error: str, message: JetStreamMessage | None
    ) -> None:
        source: Source = delivery.source
        event = self._event_apart(delivery, message)
        failure = None if message is None else message._exception or message.follow_up_error
        self._letters.store(
            queue=source.queue,
            origin=delivery.origin,
            subject=delivery.subject if source.actor is None else self._config.names.task(source.queue),
            data=delivery.data if event is None else event.data,
            headers=delivery.headers if event is None else event.headers,
            reason=reason,
            error=error,
            deliveries=delivery.deliveries,
            traceback="" if failure is None else traceback_of(failure, dead_letters.MAX_TRACEBACK),
            actor=source.actor if message is None else message.actor_name,
            message_id=None if message is None else message.message_id,
            event=event,
            history=dead_letters.history_in(delivery)
            if message is None
            else dead_letters.history_of(message),
        )
        self._emit("after_dead_letter", source.queue, reason, message, headers=delivery.headers)

    def _event_apart(self, delivery: Delivery, message: JetStreamMessage | None) -> Event | None:
        """The event for a dead letter that keeps it by itself: what was delivered is it, or only refers to it."""
        if delivery.source.actor is not None:
            return event_in(delivery)
        event = None if message is None else event_of(message)
        if event is None or not self._references.is_in(decode(unfolded(delivery.data, delivery.headers))):
            return None
        return event

    def delay_until_eta(self, message: JetStreamMessage) -> None:
        """Have the server keep a message of another program until its option `eta`."""
        delivery = message._delivery
        unique = f"postponed:{delivery.origin}"
        subject = self._config.names.delayed(message.queue_name, message.message_id, unique)
        headers = {
            **_own_headers(delivery),
            HEADER_MSG_ID: unique,
            **delays.schedule(int(message.options["eta"]), delivery.subject),
        }
        options = {name: value for name, value in message.options.items() if name != "eta"}
        self._publish(subject, dataclasses.replace(message._message, options=options), headers)

    def _publish(
        self, subject: str, message: Message[Any], headers: dict[str, str], *, timeout: int | None = None
    ) -> None:
        headers.pop(HEADER_BODY, None)
        body = fit(message, self._connection.room_beside(headers), headers, self._references.refer)
        self._connection.publish(subject, body, headers, timeout=timeout)

    def requeue(self, delivery: Delivery) -> None:
        """Return a delivery that was not started, for another worker to take at once.

        The server counts deliveries, and cannot tell a requeued one from one whose worker died. A message that has come
        as often as is allowed is therefore stored again, and counted from one.
        """
        if delivery.settled or delivery.deliveries < self._config.max_deliveries:
            self._in_flight.settle(delivery, NAK)
            return
        try:
            if not self._connection.is_connected:
                raise BrokerConnectionError("there is no connection over which to requeue it")
            self._store_again(delivery)
        except Exception as error:  # noqa: BLE001 - there are others to requeue, and no caller to handle it
            logger.warning("%s will be delivered again after its ack_wait: %s", delivery, error)
            self._in_flight.abandon(delivery)
        else:
            self._in_flight.settle(delivery, ACK)

    def leave_to_others(self, delivery: Delivery) -> None:
        """Have an event delivered again that another version of the program is to take."""
        self.requeue_later(delivery, delay=_grown(OTHERS_DELAY_MS, LONGEST_OTHERS_DELAY_MS, delivery))

    def requeue_later(
        self, delivery: Delivery, because: BaseException | None = None, delay: int | None = None
    ) -> None:
        """Have a message delivered again after a delay, longer each time: its follow-up could not be stored now.

        The server counts a message that waits like this as in flight. On a queue with `max_in_flight`, the message is
        therefore stored again with a delay if possible, so that others get its place.
        """
        if delay is None:
            delay = _grown(FIRST_DELAY_MS, LONGEST_DELAY_MS, delivery)
        marks = {HEADER_ORIGIN: delivery.origin}
        store = delivery.source.queue in self._config.max_in_flight
        if _passes(because) and self._suspects.excuse(delivery):
            store = True
        else:
            marks[HEADER_EARLIER_DELIVERIES] = str(delivery.deliveries)
        if store and self._store_later(delivery, delay, marks):
            self._in_flight.settle(delivery, ACK)
        else:
            self._in_flight.settle(delivery, nak_after(delay))

    def put_off(self, message: JetStreamMessage, delay: int) -> bool:
        """Store a message again, to come after `delay` milliseconds as if it never had been here, and ack it.

        It waits like any delayed message, under its own id, and keeps its moment if it has one. One that cannot be
        stored now is requeued with a delay; False is returned then.
        """
        delivery = message._delivery
        marks = {HEADER_ORIGIN: delivery.origin}
        if message.moment is not None:
            marks[HEADER_MOMENT] = repr(message.moment)
        if self._store_later(delivery, delay, marks, message.message_id):
            self._in_flight.settle(delivery, ACK)
            return True
        self.requeue_later(delivery, BrokerConnectionError("it cannot be stored with a delay now"))
        return False

    def stand_in_line(
        self, message: JetStreamMessage, delay: int, line: str, moment: float | None
    ) -> int | None:
        """Store a message in a line, where it waits at most `delay` milliseconds; returns its sequence.

        It is to be acked with `leave_in_line`, when that is noted. None is returned when it is requeued with a delay,
        because it cannot be stored now.
        """
        delivery = message._delivery
        headers = {
            **_own_headers(delivery),
            HEADER_ORIGIN: delivery.origin,
            HEADER_MSG_ID: f"line:{delivery.origin}:{delivery.deliveries}:{delivery.sequence}",
            HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE: "0",
            **delays.schedule(delays.eta_after(delay), delivery.subject),
        }
        if moment is not None:
            headers[HEADER_MOMENT] = repr(moment)
        for subject in self._places_in_line(message, line):
            try:
                sequence: int | None = self._connection.publish(subject, delivery.data, headers).seq
            except ApiError as error:
                if error.err_code not in CONFLICT:
                    raise
                sequence = self._stood_in_line(subject, delivery)
            if sequence is not None:
                return sequence
        self.requeue_later(delivery, BrokerConnectionError("it cannot be stored in its line now"))
        return None

    def leave_in_line(self, message: JetStreamMessage) -> None:
        """Ack a message that stands in a line."""
        self._in_flight.settle(message._delivery, ACK)

    def place_in_line(self, message: JetStreamMessage, line: str) -> int | None:
        """The sequence with which a message that came before stands in a line; None when it does not."""
        for subject in self._places_in_line(message, line):
            if (sequence := self._stood_in_line(subject, message._delivery)) is not None:
                return sequence
        return None

    def _places_in_line(self, message: JetStreamMessage, line: str) -> list[str]:
        """Where a message may stand: the same one may be enqueued several times, each with an origin of its own."""
        delivery = message._delivery
        tokens = message.message_id, delivery.origin
        return [self._config.names.delayed(delivery.source.queue, token, line) for token in tokens]

    def _stood_in_line(self, subject: str, delivery: Delivery) -> int | None:
        """The sequence of a message that stands in a line already; None when that is another one.

        One that was stored before this delivery is where it was called from, and about to be removed.
        """
        stored = last_message(
            self._connection, self._config.names.queue_stream(delivery.source.queue), subject
        )
        if stored is None or stored.headers.get(HEADER_ORIGIN) != delivery.origin:
            return None
        return stored.sequence if stored.sequence > delivery.sequence else None

    def make_message(self, message: JetStreamMessage) -> None:
        """Store an event as a message of its actor's queue, and ack it."""
        delivery = message._delivery
        headers = {HEADER_ORIGIN: delivery.origin, HEADER_MSG_ID: f"event:{delivery.origin}"}
        self._store_as_message(self._config.names.task(delivery.source.queue), delivery, headers)
        self._in_flight.settle(delivery, ACK)

    def knows_actor(self, name: str) -> bool:
        """Whether this program has an actor of that name."""
        try:
            self._actor_options(name)
        except ActorNotFound:
            return False
        return True

    def wait_for_actor(self, delivery: Delivery, name: str | None = None) -> bool:
        """Requeue a message with an unknown actor, with a delay; returns False once its grace period is over.

        While programs of two versions run, another worker may have the actor. A tick is dropped in the end: another
        will come.
        """
        is_tick = HEADER_TICK in delivery.headers
        if name is not None and name not in self._unknown:
            self._unknown.add(name)
            logger.warning(
                "A %s is for the actor %s, which is not declared here: leaving it to other workers.%s",
                "tick" if is_tick else "message",
                name,
                " If the actor was removed, remove its schedule: `fleet schedules --module ... --remove-orphans`."
                if is_tick
                else "",
            )
        now = delays.now()
        since = delivery.headers.get(HEADER_UNKNOWN_SINCE, "")
        first = int(since) if since.isdecimal() else now
        if now - first >= self._config.unknown_actor_grace:
            if not is_tick:
                return False
            self._in_flight.settle(delivery, ACK)
            return True
        delay = max(OTHERS_DELAY_MS, min((now - first) // 2, LONGEST_OTHERS_DELAY_MS))
        mark = {HEADER_UNKNOWN_SINCE: str(first)}
        is_stored = delivery.source.actor is None and self._store_later(delivery, delay, mark)
        self._in_flight.settle(delivery, ACK if is_stored else nak_after(delay))
        return True

    def _store_later(
        self, delivery: Delivery, delay: int, marks: Mapping[str, str], message_id: str | None = None
    ) -> bool:
        """Store a message again, to come after `delay` milliseconds; False when that cannot be done now.

        Its delay is found by its id, or by its origin where that is not known.
        """
        if not self._connection.is_connected:
            return False
        source: Source = delivery.source
        unique = f"later:{delivery.origin}:{delivery.deliveries}:{delivery.sequence}"
        target = delivery.subject if source.actor is None else self._config.names.task(source.queue)
        headers = {
            **_own_headers(delivery),
            **marks,
            HEADER_MSG_ID: unique,
            **delays.schedule(delays.eta_after(delay), target),
        }
        token = hashlib.sha256(unique.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        subject = self._config.names.delayed(source.queue, message_id or delivery.origin, token)
        try:
            self._store_as_message(subject, delivery, headers, timeout=STORE_LATER_TIMEOUT_MS)
        except Exception as error:  # noqa: BLE001 - a message that is neither stored nor requeued would stay here
            logger.warning("%s cannot be stored with a delay, and is requeued instead: %s", delivery, error)
            return False
        return True

    def _store_again(self, delivery: Delivery) -> None:
        source: Source = delivery.source
        headers = _own_headers(delivery)
        headers[HEADER_MSG_ID] = f"anew:{delivery.origin}:{delivery.deliveries}"
        subject = delivery.subject if source.actor is None else self._config.names.task(source.queue)
        self._store_as_message(subject, delivery, headers)

    def _store_as_message(
        self, subject: str, delivery: Delivery, headers: dict[str, str], *, timeout: int | None = None
    ) -> None:
        """Store what was delivered as a message of its queue: an event becomes one that carries it."""
        source: Source = delivery.source
        if source.actor is None:
            self._connection.publish(subject, delivery.data, headers, timeout=timeout)
        else:
            message = to_message(event_in(delivery), queue=source.queue, actor=source.actor)
            headers.update(trace_headers(message.options.get(OPTION_TRACE_CONTEXT)))
            self._publish(subject, message, headers, timeout=timeout)


def _own_headers(delivery: Delivery) -> dict[str, str]:
    """A message's own headers, without those that the server and workers added about its delivery.

    An event's are in the message that carries it.
    """
    if delivery.source.actor is not None:
        return {}
    return {
        name: value
        for name, value in sendable(delivery.headers).items()
        if not name.startswith("Nats-") and name not in REQUEUE_HEADERS
    }


def _grown(first: int, longest: int, delivery: Delivery) -> int:
    """The delay in milliseconds that is `first` after the first delivery, and doubled by each, up to `longest`."""
    return min(first << min(delivery.deliveries - 1, 10), longest)


def _passes(error: BaseException | None) -> bool:
    """Whether an error is the server's and temporary: a limit, an outage, a missing stream."""
    return isinstance(error, BrokerError) and not isinstance(error, PermissionDenied)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {text_of(error)}"
