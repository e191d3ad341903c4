"""The Dramatiq broker on NATS JetStream.

`enqueue` returns once JetStream has stored the message. Its `Nats-Msg-Id` is made anew for each call and
kept for every time that call's publish is repeated: a retry, which Dramatiq enqueues under the same message
id, is not taken for a duplicate, and an acknowledgement that got lost does not store a message twice.

Dramatiq acks a message even if its retry, its pipeline's next step or its callback could not be enqueued,
because it swallows what middleware raises after the actor ran. Here such a message is marked, and its
consumer keeps it on the queue (see `consumer`). When it then runs again, within JetStream's duplicate window,
those of its follow-ups that carry a message id of their own (a retry, a pipeline's next step, the callbacks of a
group) and were stored the first time are not stored again.

If the process dies during `enqueue`, the message is stored or it is not, and the caller never learned that
it was. If it dies between an actor's end and the ack, the actor runs again elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dramatiq.broker import MessageProxy
from dramatiq.common import iter_queue, q_name
from dramatiq.errors import DecodeError, QueueJoinTimeout, QueueNotFound
from dramatiq.message import Message
from dramatiq.middleware import Callbacks, GroupCallbacks, Middleware, Pipelines, Retries
from dramatiq.worker import QUEUE_PREFETCH, Worker

from . import queues
from .dead_letters import DeadLetters
from .errors import InvalidOption, MessageNotUnique, TopologyMissing
from .jetstream.declaring import Declarations
from .jetstream.names import (
    HEADER_MSG_ID,
    HEADER_TICK,
    OPTION_TRACE_CONTEXT,
    Names,
    check_subject,
    trace_headers,
)
from .kv import Bucket
from .queues import QueueStats
from .sending import batches, delays
from .sending.envelope import Event, checked, decode, encode, event_of
from .wire.connection import Connection, ConnectOptions, PubAck, Publication
from .wire.ids import new_id
from .worker.consumer import JetStreamConsumer, JetStreamMessage, Source
from .worker.emission import EmittingBroker
from .worker.ledger import Delivery, Ledger
from .worker.running import running_message
from .worker.time_limits import keep_time_of
from .worker.undertaker import JetStreamUndertaker
from .worker.work_queue import DelayQueue, WorkQueue

__all__ = ["JetStreamBroker"]

#: RabbitMQ's advice is ten; each is a durable consumer here.
HIGHEST_PRIORITY = 32

# Middleware that enqueues what follows a message. An error in one of these must not be forgotten.
_FOLLOW_UPS = (Retries, Pipelines, Callbacks, GroupCallbacks)


class JetStreamBroker(EmittingBroker):
    """A Dramatiq broker on NATS JetStream. All times are milliseconds.

    Parameters:
      url: One address, several (a list, or separated by commas), or None for `NATS_URL`, then localhost.
      namespace: Programs with the same namespace share queues, dead letters and buckets.
      middleware: As for every Dramatiq broker.
      credentials: Path or content of a `.creds` file; None takes `NATS_CREDS`.
      user, password, token, nkey, tls: Other ways to authenticate, and the context for `tls://`.
      replicas: How many servers of a cluster keep each stream (1, 3 or 5).
      declare: Create missing streams and consumers. With False only what exists is used, so that a worker
        needs few permissions; prepare the server with `fleet setup`.
      ack_wait: After this long without a sign of life from its worker a message is delivered again.
      max_deliveries: A message delivered more often than this without being settled is a dead letter.
      dead_message_ttl: How long dead letters are kept (7 days).
      enqueue_timeout: How long `enqueue` waits for JetStream, over reconnects, before it raises.
      max_priority: Levels above 0 for the option `broker_priority`, 1 to 32; None for no priorities.
        All programs of a namespace use the same.
      max_in_flight: For each queue named, how many messages the whole fleet may hold at once.
      inbox_prefix: First tokens of the subjects on which answers arrive, for accounts that restrict them.

    Raises:
      InvalidName, InvalidOption: When a setting can never work; nothing is contacted before first use.
    """

    def __init__(
        self,
        url: str | Iterable[str] | None = None,
        *,
        namespace: str = "dramatiq",
        middleware: list[Middleware] | None = None,
        credentials: str | None = None,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        nkey: str | None = None,
        tls: ssl.SSLContext | None = None,
        replicas: int = 1,
        declare: bool = True,
        ack_wait: int = 30_000,
        max_deliveries: int = 10,
        dead_message_ttl: int = 7 * 86_400_000,
        enqueue_timeout: int = 10_000,
        max_priority: int | None = None,
        max_in_flight: Mapping[str, int] | None = None,
        inbox_prefix: str = "_INBOX",
    ) -> None:
        self.names = Names(namespace)
        _at_least("replicas", replicas, 1)
        _at_least("ack_wait", ack_wait, 1_000)
        _at_least("max_deliveries", max_deliveries, 1)
        _at_least("dead_message_ttl", dead_message_ttl, 1_000)
        _at_least("enqueue_timeout", enqueue_timeout, 100)
        if max_priority is not None and not 1 <= max_priority <= HIGHEST_PRIORITY:
            raise InvalidOption(
                f"max_priority={max_priority!r} cannot be used: choose 1 to {HIGHEST_PRIORITY}, "
                "or None for no priorities."
            )
        for queue_name, limit in (max_in_flight or {}).items():
            _at_least(f"max_in_flight[{queue_name!r}]", limit, 1)
            if max_priority is not None:
                raise InvalidOption(
                    "max_in_flight and max_priority cannot be used together: JetStream counts messages in "
                    "flight for each priority, so the limit of a queue would not hold."
                )
        options = ConnectOptions.of(
            url,
            credentials=credentials,
            user=user,
            password=password,
            token=token,
            nkey=nkey,
            tls=tls,
            inbox_prefix=inbox_prefix,
        )
        self.connection = Connection(options, timeout=enqueue_timeout)
        self.replicas = replicas
        self.declare = declare
        self.ack_wait = ack_wait
        self.max_deliveries = max_deliveries
        self.dead_message_ttl = dead_message_ttl
        self.enqueue_timeout = enqueue_timeout
        self.max_priority = max_priority
        self.max_in_flight = dict(max_in_flight or {})
        self.ledger = Ledger(self.connection)
        self.undertaker = JetStreamUndertaker(self)
        self.declarations = Declarations(self)
        self.dead_letters = DeadLetters(
            self.connection, self.names, self.declarations.ensure_dead_letters, self.emit_own
        )
        self.subscriptions: dict[str, dict[str, Callable[[], Source]]] = {}
        self.event_decoders: dict[str, Callable[[Event], Any]] = {}
        self._consumers: list[JetStreamConsumer] = []
        self._after = threading.local()
        self._worker: Worker | None = None
        self.connection.on_fork(self._forget_worker)
        super().__init__(middleware=middleware)
        self._react()
        self.queues: set[str] = set()

    # Declaring

    def get_declared_queues(self) -> set[str]:
        return self.queues.copy()

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue; it is created on the server when it is first used.

        Raises:
          InvalidName: When JetStream cannot carry the name.
        """
        if queue_name not in self.queues:
            self.names.queue_stream(queue_name)
            self.emit_before("declare_queue", queue_name)
            self.queues.add(queue_name)
            self.emit_after("declare_queue", queue_name)

    def setup(self, *, update: bool = False) -> dict[str, str]:
        """Create what is declared and missing; with `update`, change what differs.

        Returns:
          What became of each stream and consumer: "created", "unchanged", "updated" or "differs".

        Raises:
          TopologyMismatch: When something exists that would lose or hold up messages, and `update` is False.
        """
        return self.declarations.setup(update=update)

    def bucket(
        self, name: str, *, history: int = 1, ttl: int | None = None, max_value_bytes: int | None = None
    ) -> Bucket:
        """A key-value bucket of this namespace, made on first use.

        Parameters:
          ttl: Milliseconds that every key lives; None for ever, or as long as each write says.
        """
        return self.declarations.bucket(name, history=history, ttl=ttl, max_value_bytes=max_value_bytes)

    # Enqueueing

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Store a message, to be worked on now or after `delay` milliseconds.

        Returns:
          The message; with a delay, a copy of it whose option `eta` says when it is due.

        Raises:
          BrokerConnectionError: When it is not known to be stored within `enqueue_timeout`.
          InvalidOption: For a delay or priority that cannot be used.
          MessageTooLarge: When it is over the server's `max_payload`.
          MessageNotUnique: When its option `unique_key` was used within its `unique_window`.
        """
        try:
            return self._enqueue(message, delay)
        except Exception as error:
            self._note_follow_up_error(error)
            raise

    def _enqueue(self, message: Message[Any], delay: int | None) -> Message[Any]:
        queue_name = q_name(message.queue_name)
        self.declare_queue(queue_name)
        announced = self._announce(message, delay)
        self.declarations.ensure_queue(queue_name)
        self.emit_before("enqueue", announced, delay)
        publication = self._publication(announced, delay)
        if "unique_key" in announced.options:
            with queues.unique(self, announced):
                self._store(queue_name, publication)
        else:
            self._store(queue_name, publication)
        self.emit_after("enqueue", announced, delay)
        return announced

    def _store(self, queue_name: str, publication: Publication) -> None:
        """Publish to a queue, which is made again if it disappeared."""
        deadline = time.monotonic() + self.enqueue_timeout / 1000
        while True:
            left = max(1, int((deadline - time.monotonic()) * 1000))
            try:
                self.connection.publish(
                    publication.subject, publication.payload, publication.headers, timeout=left
                )
                return
            except TopologyMissing:
                if not self.declare or time.monotonic() >= deadline:
                    raise
                self.declarations.ensure_queue(queue_name, again=True)

    def enqueue_many(
        self, messages: Iterable[Message[Any]], *, atomic: bool = False, delay: int | None = None
    ) -> list[Message[Any]]:
        """Store many messages without waiting for one before sending the next.

        Parameters:
          atomic: Store all or none; then at most 1,000 messages, all for the same queue.

        Raises:
          As `enqueue`. Without `atomic`, the messages other than those that failed are stored.
        """
        try:
            return batches.enqueue_many(self, list(messages), atomic=atomic, delay=delay)
        except Exception as error:
            self._note_follow_up_error(error)
            raise

    def _announce(self, message: Message[Any], delay: int | None) -> Message[Any]:
        """The message as middleware and the caller see it: a delayed one with its `eta`."""
        if delay is None:
            return message
        return message.copy(options={"eta": delays.eta_after(delays.check_delay(delay))})

    def _publication(self, message: Message[Any], delay: int | None) -> Publication:
        queue_name = q_name(message.queue_name)
        stored = message
        if "eta" in message.options:
            # The server keeps the time; a worker that saw it would hold the message in its memory.
            options = {name: value for name, value in message.options.items() if name != "eta"}
            stored = dataclasses.replace(message.copy(), options=options)
        if stored.queue_name != queue_name:
            stored = stored.copy(queue_name=queue_name)
        target = self.names.task(queue_name, self._priority(message))
        unique = self._unique_id(message)
        headers = {HEADER_MSG_ID: unique}
        context = message.options.get(OPTION_TRACE_CONTEXT)
        if context is not None:
            headers.update(trace_headers(context))
        if not delay:  # no delay, or one of 0, which needs no schedule
            return Publication(target, encode(stored), headers)
        return delays.publication(
            self.names,
            queue_name,
            message.message_id,
            unique,
            encode(stored),
            eta=int(message.options["eta"]),
            target=target,
            headers=headers,
        )

    def _unique_id(self, message: Message[Any]) -> str:
        """What tells one enqueue call from another; for what follows a message, the same at its every run."""
        current = getattr(self._after, "message", None)
        if not isinstance(current, JetStreamMessage):
            return new_id()
        if self._after.ids is None:
            self._after.ids = Counter()
        self._after.ids[message.message_id] += 1
        call = f"{current._delivery.origin}:{message.message_id}:{self._after.ids[message.message_id]}"
        return hashlib.sha256(call.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _priority(self, message: Message[Any]) -> int | None:
        """The priority of a message; as in RabbitMQ, one above the highest is the highest."""
        priority = message.options.get("broker_priority")
        if priority is None or not self.max_priority:
            return None
        if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
            raise InvalidOption(
                f"broker_priority={priority!r} cannot be used: give a whole number from 0 to {self.max_priority}."
            )
        return min(priority, self.max_priority) or None

    def cancel(self, message_id: str, queue_name: str | None = None) -> int:
        """Cancel the delays of a message; return how many were waiting.

        Parameters:
          queue_name: Where it waits; None looks in all declared queues.
        """
        wanted = self.queues if queue_name is None else {queue_name}
        return sum(delays.cancel(self.connection, self.names, name, message_id) for name in wanted)

    def publish(
        self,
        subject: str,
        event: Any,
        *,
        event_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: int | None = None,
    ) -> PubAck:
        """Store an event for whoever subscribed to its subject.

        Parameters:
          event: Bytes, or a protobuf message.
          event_id: The same id within the stream's duplicate window is stored once; None makes a new one.
          headers: Further NATS headers.

        Raises:
          As `enqueue`; TopologyMissing when no stream takes the subject.
        """
        try:
            check_subject(subject)
            data = event if isinstance(event, bytes) else event.SerializeToString()
            complete = {**(headers or {}), HEADER_MSG_ID: event_id or new_id()}
            self.emit_own("before_publish_event", subject, complete)
            try:
                ack = self.connection.publish(subject, data, complete, timeout=timeout)
            except BaseException as error:
                self.emit_own("after_publish_event", subject, complete, exception=error)
                raise
            self.emit_own("after_publish_event", subject, complete, exception=None)
            return ack
        except Exception as error:
            self._note_follow_up_error(error)
            raise

    # Consuming

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30_000) -> JetStreamConsumer:
        """Make a consumer of a queue.

        Raises:
          QueueNotFound: When the queue was never declared.
          BrokerConnectionError: When the server cannot be reached.
        """
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        # A new consumer may be needed because the queue disappeared.
        self.declarations.ensure_queue(queue_name, again=True)
        self.declarations.ensure_dead_letters()
        consumer = JetStreamConsumer(
            self.connection,
            self.ledger,
            queue_name,
            self._sources(queue_name),
            prefetch=max(1, prefetch),
            timeout=timeout,
            lookahead=queue_name not in self.max_in_flight and not QUEUE_PREFETCH,
            max_deliveries=self.max_deliveries,
            undertaker=self.undertaker,
            give_back=self._give_back,
        )
        # Several consumer threads come here at once, so nothing but single steps.
        for other in list(self._consumers):
            if other.stopping:
                with contextlib.suppress(ValueError):
                    self._consumers.remove(other)
        self._consumers.append(consumer)
        return consumer

    def _sources(self, queue_name: str) -> list[Source]:
        own = [
            Source(
                queue=queue_name,
                stream=self.names.queue_stream(queue_name),
                durable=self.names.worker_durable(priority),
                rank=rank,
                ack_wait=self.declarations.ack_wait_of(
                    self.names.queue_stream(queue_name), self.names.worker_durable(priority)
                ),
                decode=self._decode,
            )
            for rank, priority in enumerate(self.declarations.priorities)
        ]
        return own + [make() for make in self.subscriptions.get(queue_name, {}).values()]

    def _decode(self, delivery: Delivery) -> tuple[Message[Any], tuple[Any, ...] | None]:
        """Make a message of what a queue's stream delivered; one that carries an event gets it decoded."""
        message = checked(decode(delivery.data), delivery.source.queue)
        if delivery.mentions(HEADER_TICK) and HEADER_TICK in delivery.headers:
            # Every tick of a schedule has the same body; its place in the stream makes it a message of its own.
            message = dataclasses.replace(
                message,
                message_id=f"{message.message_id}:{delivery.sequence}",
                message_timestamp=delivery.timestamp,
            )
        event = event_of(message)
        if event is None:
            return message, None
        return message, (self.decode_event(message.actor_name, event),)

    def decode_event(self, actor_name: str, event: Event) -> Any:
        """What an actor receives for an event.

        Raises:
          DecodeError: When the event's bytes are not what the actor's subscription says.
        """
        decode = self.event_decoders.get(actor_name)
        if decode is None:
            raise DecodeError(
                f"Actor {actor_name!r} has no subscription here to decode {event.subject} with.",
                event.data,
                None,
            )
        try:
            return decode(event)
        except Exception as error:
            raise DecodeError(f"Failed to decode the event {event.subject}.", event.data, error) from error

    # Dramatiq's middleware and signals

    def add_middleware(
        self,
        middleware: Middleware,
        *,
        before: type[Middleware] | None = None,
        after: type[Middleware] | None = None,
    ) -> None:
        keep_time_of(middleware)
        super().add_middleware(middleware, before=before, after=after)

    def _react(self) -> None:
        """Say what this broker does at Dramatiq's signals."""
        self.first["before_worker_boot"] = self._replace_work_queue
        self.last["before_worker_shutdown"] = self._stop_consuming
        self.first["after_consumer_thread_boot"] = self._replace_delay_queue
        self.first["before_process_message"] = running_message.set
        self.first["after_process_message"] = self._note_done
        self.last["after_process_message"] = self._forget_done
        self.last["after_skip_message"] = self._forget_running

    def _replace_work_queue(self, worker: Any) -> None:
        self._worker = worker
        worker.work_queue = WorkQueue()  # its threads, which take it from here, are not made yet

    def _replace_delay_queue(self, consumer_thread: Any) -> None:
        consumer_thread.delay_queue = DelayQueue()

    def _note_done(self, message: MessageProxy) -> None:
        self._after.message = message
        self._after.ids = None

    def _forget_done(self, message: MessageProxy) -> None:
        self._after.message = None
        self._forget_running(message)

    def _forget_running(self, message: MessageProxy) -> None:
        running_message.set(None)

    def failed_after(self, signal: str, middleware: Middleware, error: Exception) -> None:
        if signal == "process_message" and isinstance(middleware, _FOLLOW_UPS):
            self._note_follow_up_error(error)

    def _note_follow_up_error(self, error: Exception) -> None:
        """Mark the message whose after-run middleware failed to enqueue, so that it is not acked."""
        message = getattr(self._after, "message", None)
        if isinstance(error, MessageNotUnique):
            return  # what should follow is there already, which is what its unique key is for
        if isinstance(message, JetStreamMessage):
            message.follow_up_error = message.follow_up_error or error

    def is_running(self, message: Message[Any]) -> bool:
        """Whether a message has just been worked on by this thread, so that enqueueing it is a retry."""
        current = getattr(self._after, "message", None)
        return current is not None and current.message_id == message.message_id

    def _forget_worker(self) -> None:
        """In the child of a fork, where the parent's worker has no threads."""
        self._worker = None
        self._consumers = []

    def _stop_consuming(self, worker: Worker) -> None:
        """Give back at once what a stopping worker has not begun, however long its running actors take."""
        threads = worker.consumers.values()
        consumers = [t.consumer for t in threads if isinstance(t.consumer, JetStreamConsumer)]
        for consumer in consumers:
            consumer.stop_pulling()
        self._worker = worker
        for consumer in consumers:
            self._give_back(consumer.queue_name, 0)

    def _give_back(self, queue_name: str, keep: int) -> None:
        """Give back messages of a queue that this process's worker has not begun, all but `keep` of them."""
        if self._worker is None:
            return
        work_queue = self._worker.work_queue
        for item in list(iter_queue(work_queue)):
            message = item.message
            mine = isinstance(message, JetStreamMessage) and message.queue_name == queue_name
            if mine and keep <= 0:
                self.undertaker.hand_back(message._delivery)
            else:
                keep -= mine
                work_queue.put(item)
            work_queue.task_done()

    # Queues

    def queue_stats(self, queue_name: str) -> QueueStats:
        """Count what is in a queue: ready, in flight, delayed, dead."""
        return queues.stats(self, queue_name)

    def pause(self, queue_name: str) -> None:
        """Stop delivery from a queue to the whole fleet, until `resume`; what was delivered is worked off."""
        queues.pause(self, queue_name, paused=True)

    def resume(self, queue_name: str) -> None:
        """End a `pause`."""
        queues.pause(self, queue_name, paused=False)

    def is_paused(self, queue_name: str) -> bool:
        return queues.is_paused(self, queue_name)

    def flush(self, queue_name: str) -> None:
        """Drop all messages of a queue: ready, in flight, delayed and dead. Periodic schedules stay."""
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        self.declarations.ensure_queue(queue_name)
        queues.purge(self, queue_name)
        self.dead_letters.flush(queue_name)

    def flush_all(self) -> None:
        """Drop all messages of all declared queues."""
        for queue_name in sorted(self.queues):
            self.flush(queue_name)

    def join(self, queue_name: str, *, interval: int = 100, timeout: int | None = None) -> None:
        """Wait until a queue has no ready, running or delayed message, events for its actors included.

        Parameters:
          interval: Milliseconds between two looks.
          timeout: Milliseconds to wait at most.

        Raises:
          QueueJoinTimeout: When the timeout elapses.
          QueueNotFound: When the queue was never declared.
        """
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        self.declarations.ensure_queue(queue_name)
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        sources = self._sources(queue_name)
        while queues.unfinished(self, queue_name, sources):
            if deadline is not None and time.monotonic() >= deadline:
                raise QueueJoinTimeout(queue_name)
            time.sleep(interval / 1000)

    def close(self) -> None:
        """Close the connection; what was enqueued is stored, what was acked is sent."""
        for consumer in self._consumers:
            consumer.close()
        self._consumers = []
        self.connection.close()


def _at_least(option: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidOption(f"{option}={value!r} cannot be used: give a whole number from {minimum} up.")
