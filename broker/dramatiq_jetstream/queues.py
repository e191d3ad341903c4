"""What can be asked of and done to a whole queue: counts, pause, purge, unique messages.

A unique message takes a key in the bucket `unique`, first for a short while, and for its whole window once
it is stored. If the process dies in between, the key is free again after twice `enqueue_timeout`, so a
crash delays the next message with that key but never forbids it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from dramatiq.common import current_millis, q_name
from dramatiq.message import Message

from .errors import InvalidOption, KeyExists, MessageNotUnique, NotFound
from .jetstream.names import METADATA_SUBSCRIBER, Names
from .jetstream.reading import first_message
from .sending import delays
from .wire.connection import Connection
from .worker.consumer import Source

if TYPE_CHECKING:
    from .broker import JetStreamBroker

__all__ = ["QueueStats"]

logger = logging.getLogger(__name__)

#: A pause ends by itself after this long; JetStream wants an end.
PAUSE = timedelta(days=3650)


@dataclass(frozen=True)
class QueueStats:
    """Counts of one queue at one moment; they are read one after the other, so they can be off by a few.

    Events that wait for the queue's actors count as its messages. `in_flight` is what the server waits for an
    answer for; messages that were given back count there until a worker takes them again.

    `oldest_ready_age` is in milliseconds; None when nothing is ready.
    """

    queue: str
    ready: int = 0
    in_flight: int = 0
    delayed: int = 0
    dead: int = 0
    oldest_ready_age: int | None = None
    paused: bool = False
    redelivered: int = 0

    @property
    def oldest_ready_age_ms(self) -> int | None:
        return self.oldest_ready_age


def consumers(connection: Connection, stream: str) -> Iterator[dict[str, Any]]:
    """What the server knows of every consumer of a stream."""
    offset = 0
    while True:
        answer = connection.api(f"CONSUMER.LIST.{stream}", {"offset": offset})
        found = answer.get("consumers") or []
        yield from found
        offset += len(found)
        if not found or offset >= answer["total"]:
            return


def stream_names(connection: Connection) -> list[str]:
    """The names of all streams of the account."""
    found: list[str] = []
    while True:
        answer = connection.api("STREAM.NAMES", {"offset": len(found)})
        page = answer.get("streams") or []
        found += page
        if not page or len(found) >= answer["total"]:
            return found


def queue_names(connection: Connection, names: Names) -> list[str]:
    """The queues of a namespace that exist on the server, whoever declared them."""
    queues = map(names.queue_of_stream, stream_names(connection))
    return sorted(queue for queue in queues if queue is not None)


def feeding(broker: JetStreamBroker, queue: str) -> Iterator[dict[str, Any]]:
    """What the server knows of every durable that feeds a queue: of its stream, and its actors' subscriptions.

    Subscriptions say in their metadata whose they are, so a program that declares none of them finds them too.
    """
    connection, names = broker.connection, broker.names
    yield from consumers(connection, names.queue_stream(queue))
    mine = names.subscriber(queue)
    for stream in _event_streams(broker):
        with contextlib.suppress(NotFound):
            for info in consumers(connection, stream):
                if (info["config"].get("metadata") or {}).get(METADATA_SUBSCRIBER) == mine:
                    yield info


def _event_streams(broker: JetStreamBroker) -> list[str]:
    declared = {stream for middleware in broker.middleware if (stream := getattr(middleware, "stream", None))}
    if declared:
        return sorted(declared)
    names = broker.names
    return [
        stream
        for stream in stream_names(broker.connection)
        if names.queue_of_stream(stream) is None
        and stream != names.dead_stream
        and not stream.startswith("KV_")
    ]


def stats(broker: JetStreamBroker, queue: str) -> QueueStats:
    """Count the messages of a queue and the events for its actors; all zero when it does not exist yet."""
    names, connection = broker.names, broker.connection
    stream = names.queue_stream(queue)
    ready = in_flight = redelivered = own = 0
    paused = False
    oldest: int | None = None
    try:
        for info in feeding(broker, queue):
            ready += info["num_pending"]
            in_flight += info["num_ack_pending"]
            redelivered += info.get("num_redelivered", 0)
            paused = paused or bool(info.get("paused"))
            if info["stream_name"] == stream:
                own += info["num_pending"] + info["num_ack_pending"]
            if info["num_pending"]:
                start = info["delivered"]["stream_seq"] + 1
                subject = info["config"]["filter_subject"]
                waiting = first_message(connection, info["stream_name"], subject, start)
                if waiting is not None:
                    oldest = min(oldest or waiting.time, waiting.time)
        total = connection.api(f"STREAM.INFO.{stream}")["state"]["messages"]
        periodic = delays.count(connection, stream, names.all_periodic(queue))
    except NotFound:
        return QueueStats(queue, dead=broker.dead_letters.count(queue))
    return QueueStats(
        queue,
        ready=ready,
        in_flight=in_flight,
        delayed=max(0, total - own - periodic),
        dead=broker.dead_letters.count(queue),
        oldest_ready_age=None if oldest is None else max(0, current_millis() - oldest),
        paused=paused,
        redelivered=redelivered,
    )


def pause(broker: JetStreamBroker, queue: str, *, paused: bool) -> None:
    """Pause or resume every durable that feeds a queue (ADR-42's consumer pause, nats-server 2.11)."""
    until = datetime.now(UTC) + PAUSE
    body: dict[str, Any] = {"pause_until": until.isoformat()} if paused else {}
    broker.declarations.ensure_queue(queue)
    for info in list(feeding(broker, queue)):
        broker.connection.api(f"CONSUMER.PAUSE.{info['stream_name']}.{info['name']}", body)


def is_paused(broker: JetStreamBroker, queue: str) -> bool:
    """Whether any durable that feeds a queue is paused."""
    with contextlib.suppress(NotFound):
        return any(info.get("paused") for info in feeding(broker, queue))
    return False


def purge(broker: JetStreamBroker, queue: str, *, ready: bool = True, delayed: bool = True) -> int:
    """Drop the ready (and running) and the delayed messages of a queue; return how many there were."""
    names = broker.names
    subjects = [names.all_delayed(queue)] if delayed else []
    if ready:
        subjects += [names.task(queue), names.tasks(queue)]
    purged = 0
    for subject in subjects:
        with contextlib.suppress(NotFound):
            answer = broker.connection.api(f"STREAM.PURGE.{names.queue_stream(queue)}", {"filter": subject})
            purged += int(answer.get("purged", 0))
    return purged


def unfinished(broker: JetStreamBroker, queue: str, sources: Sequence[Source]) -> int:
    """How many messages a queue has that are not done: ready, running or delayed, and events for its actors."""
    names, connection = broker.names, broker.connection
    stream = names.queue_stream(queue)

    def messages() -> int:
        count = int(connection.api(f"STREAM.INFO.{stream}")["state"]["messages"])
        return count - delays.count(connection, stream, names.all_periodic(queue)) if count else 0

    def events() -> int:
        count = 0
        for source in sources:
            if source.stream != stream:
                info = connection.api(f"CONSUMER.INFO.{source.stream}.{source.durable}")
                count += info["num_pending"] + info["num_ack_pending"]
        return count

    try:
        # An event becomes a message by its retry, and a message may publish an event: between two looks work
        # can move from one to the other, and is seen by the look after.
        return messages() or events() or (messages() if len(sources) > 1 else 0)
    except NotFound:
        return 0


@contextlib.contextmanager
def unique(broker: JetStreamBroker, message: Message[Any]) -> Iterator[None]:
    """Take the message's unique key around storing it.

    Raises:
      MessageNotUnique: When another message has it.
    """
    key = message.options.get("unique_key")
    if key is None or broker.is_running(message):  # a retry is not another message, however late it comes
        yield
        return
    window = message.options.get("unique_window", 60_000)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1_000:
        raise InvalidOption(f"unique_window={window!r} cannot be used: give milliseconds, 1000 or more.")
    bucket = broker.bucket("unique")
    name = f"{q_name(message.queue_name)}/{key}"
    mine = message.message_id.encode()
    revision = 0
    while not revision:
        try:
            revision = bucket.create(name, mine, ttl=min(window, 2 * broker.enqueue_timeout))
        except KeyExists:
            holder = bucket.get(name)
            if holder is None:
                continue  # its window ended just now
            if holder.value == mine:
                break  # the same message again
            raise MessageNotUnique(
                f"A message with the unique key {key!r} was enqueued on {message.queue_name!r} within the last "
                f"{window} ms; this one was not."
            ) from None
    try:
        yield
    except BaseException:
        if revision:
            bucket.delete(name, revision=revision)
        raise
    if revision:
        bucket.put(name, mine, ttl=window)
