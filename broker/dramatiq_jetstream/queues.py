"""Operations on a whole queue: counts, pause, purge, join."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from dramatiq.common import current_millis
from dramatiq.errors import QueueJoinTimeout, QueueNotFound

from .config import BrokerConfig
from .dead_letters import DeadLetters
from .errors import BrokerError, NotFound
from .jetstream.declaring import Declarations
from .jetstream.inventory import consumers, stream_names
from .jetstream.names import METADATA_SUBSCRIBER
from .jetstream.reading import first_message
from .sending import delays, unique
from .sending.sender import Sender
from .wire.connection import Connection
from .worker.delivery import Source
from .worker.sources import Sources

__all__ = ["QueueOperations", "QueueStats"]

logger = logging.getLogger(__name__)

#: A pause ends by itself after this long, because JetStream requires an end.
PAUSE = timedelta(days=3650)

#: How long the list of the subscriptions that feed a queue is reused, in seconds: making it asks every stream.
PLACES_SECONDS = 5.0

#: How long the request stands that wakes a consumer, in nanoseconds.
_WAKE_NS = 100_000_000


@dataclass(frozen=True)
class QueueStats:
    """Counts of one queue at one moment; they are read one after the other, so they can be off by a few.

    Events that wait for the queue's actors count as its messages. `in_flight` counts deliveries without an ack;
    requeued messages count there until a worker takes them again.

    `oldest_ready_age` is in milliseconds; None when nothing is ready.

    Examples:
      >>> stats = broker.queue_stats("default")
      >>> stats.dead > 0, stats.paused
      (True, False)
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


class Queues:
    """The queues of a broker's namespace, as the server has them.

    Parameters:
      event_streams: Names the streams of events that the program declared; none when it declared none.
    """

    def __init__(
        self,
        config: BrokerConfig,
        connection: Connection,
        declarations: Declarations,
        dead_letters: DeadLetters,
        event_streams: Callable[[], set[str]],
    ) -> None:
        self._config = config
        self._names = config.names
        self._connection = connection
        self._declarations = declarations
        self._dead_letters = dead_letters
        self._declared_event_streams = event_streams
        #: Which subscriptions feed each queue, as (stream, consumer), and when that was read.
        self._places: tuple[float, dict[str, list[tuple[str, str]]]] = (-PLACES_SECONDS, {})

    def consumers(self, queue: str) -> Iterator[dict[str, Any]]:
        """What the server knows of every consumer that feeds a queue: its stream's, and its actors' subscriptions.

        Subscriptions say in their metadata whose they are, so a program that declares none of them finds them too.
        """
        yield from consumers(self._connection, self._names.queue_stream(queue))
        yield from self._subscriptions().get(queue, ())

    def _subscriptions(self) -> dict[str, list[dict[str, Any]]]:
        """What the server knows of all subscriptions of the namespace, by queue; asks each stream of events once."""
        found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        mine = self._names.subscriber("")
        for stream in self._event_streams():
            with contextlib.suppress(NotFound):
                for info in consumers(self._connection, stream):
                    subscriber = (info["config"].get("metadata") or {}).get(METADATA_SUBSCRIBER, "")
                    if subscriber.startswith(mine):
                        found[subscriber.removeprefix(mine)].append(info)
        self._places = (
            time.monotonic(),
            {
                queue: [(info["stream_name"], info["name"]) for info in infos]
                for queue, infos in found.items()
            },
        )
        return found

    def _subscriptions_of(self, queue: str) -> Iterator[dict[str, Any]]:
        """What the server knows of the subscriptions that are known to feed a queue."""
        for stream, consumer in self._places[1].get(queue, ()):
            with contextlib.suppress(NotFound):
                yield self._connection.api(f"CONSUMER.INFO.{stream}.{consumer}")

    def _event_streams(self) -> list[str]:
        declared = self._declared_event_streams()
        if declared:
            return sorted(declared)
        names = self._names
        own = (names.dead_stream, names.history_stream, names.activity_stream, names.audit_stream)
        return [
            stream
            for stream in stream_names(self._connection)
            if self._names.queue_of_stream(stream) is None
            and stream not in own
            and not stream.startswith("KV_")
        ]

    def stats(self, queue: str) -> QueueStats:
        """Count the messages of a queue and the events for its actors; all zero when it does not exist yet."""
        return next(self.stats_of([queue]))

    def stats_of(self, queues: Iterable[str]) -> Iterator[QueueStats]:
        """Count several queues, one after the other; streams of events are asked once for all of them."""
        for stats, _ in self.look_at(queues):
            yield stats

    def look_at(self, queues: Iterable[str]) -> Iterator[tuple[QueueStats, list[dict[str, Any]]]]:
        """The counts of several queues, each with what the server knows of the consumers that feed it.

        A program that declares no streams of events looks through all streams for subscriptions, at most once in
        PLACES_SECONDS: a new one counts a moment later there.
        """
        is_known = time.monotonic() - self._places[0] < PLACES_SECONDS and not self._declared_event_streams()
        subscriptions: dict[str, list[dict[str, Any]]] | None = None
        for queue in queues:
            if subscriptions is None and not is_known:
                subscriptions = self._subscriptions()
            try:
                found = list(consumers(self._connection, self._names.queue_stream(queue)))
                found += (
                    self._subscriptions_of(queue) if subscriptions is None else subscriptions.get(queue, ())
                )
                yield self._count(queue, found), found
            except NotFound:
                yield QueueStats(queue, dead=self._dead_letters.count(queue)), []

    def _count(self, queue: str, feeding: Sequence[dict[str, Any]]) -> QueueStats:
        stream = self._names.queue_stream(queue)
        ready = in_flight = redelivered = 0
        paused = False
        oldest: int | None = None
        for info in feeding:
            ready += info["num_pending"]
            in_flight += info["num_ack_pending"]
            redelivered += info.get("num_redelivered", 0)
            paused = paused or bool(info.get("paused"))
            if info["num_pending"]:
                start = info["delivered"]["stream_seq"] + 1
                subject = info["config"]["filter_subject"]
                waiting = first_message(self._connection, info["stream_name"], subject, start)
                if waiting is not None:
                    oldest = min(oldest or waiting.time, waiting.time)
        total, delayed = delays.counts(self._connection, stream, self._names.all_delayed(queue))
        ready += self._without_consumer(queue, feeding, total - delayed)
        return QueueStats(
            queue,
            ready=ready,
            in_flight=in_flight,
            delayed=delayed,
            dead=self._dead_letters.count(queue),
            oldest_ready_age=None if oldest is None else max(0, current_millis() - oldest),
            paused=paused,
            redelivered=redelivered,
        )

    def pause(self, queue: str, *, paused: bool) -> None:
        """Pause or resume every consumer that feeds a queue (ADR-42's consumer pause, nats-server 2.11)."""
        until = datetime.now(UTC) + PAUSE
        body: dict[str, Any] = {"pause_until": until.isoformat()} if paused else {}
        self._declarations.ensure_queue(queue)
        for info in list(self.consumers(queue)):
            consumer = f"{info['stream_name']}.{info['name']}"
            self._connection.api(f"CONSUMER.PAUSE.{consumer}", body)
            if not paused:
                self._wake(consumer)

    def _wake(self, consumer: str) -> None:
        """Have the server serve the requests that stand at a consumer.

        It does so at a new message, a heartbeat, or another request, and not when a pause ends (seen with 2.15.1). This
        is a request that no message can fill, because each is larger than a byte.
        """
        request = {"batch": 1, "expires": _WAKE_NS, "max_bytes": 1}
        with contextlib.suppress(BrokerError):
            self._connection.request(
                self._connection.api_subject(f"CONSUMER.MSG.NEXT.{consumer}"), json.dumps(request).encode()
            )

    def is_paused(self, queue: str) -> bool:
        """Whether any consumer that feeds a queue is paused."""
        with contextlib.suppress(NotFound):
            return any(info.get("paused") for info in self.consumers(queue))
        return False

    def purge(self, queue: str, *, ready: bool = True, delayed: bool = True) -> int:
        """Drop the ready (and running) and the delayed messages of a queue; return how many there were.

        When both are dropped, their unique keys are free again.

        Raises:
          BrokerConnectionError: When they are not known to be dropped.
        """
        subjects = [self._names.all_delayed(queue)] if delayed else []
        if ready:
            subjects += [self._names.task(queue), self._names.tasks(queue)]
        stream = self._names.queue_stream(queue)
        purged, done = 0, self._done(stream) if ready else 0
        for subject in subjects:
            with contextlib.suppress(NotFound):
                reply = self._connection.api(f"STREAM.PURGE.{stream}", {"filter": subject})
                purged += int(reply.get("purged", 0))
        if ready and delayed:
            try:
                self._declarations.bucket("unique").clear(unique.prefix(queue))
            except BrokerError as error:
                logger.warning("Unique keys of %r stay taken until their windows end: %s", queue, error)
        return max(0, purged - done)

    def _done(self, stream: str) -> int:
        """How many messages of a queue's stream are done and not removed yet (see `worker.removals`)."""
        with contextlib.suppress(NotFound):
            feeding = list(consumers(self._connection, stream))
            subjects = [info["config"]["filter_subject"] for info in feeding]
            return max(0, sum(self._stored(stream, subject) for subject in subjects) - _undone(feeding))
        return 0

    def _stored(self, stream: str, subject: str) -> int:
        """How many messages a stream has on one subject."""
        state = self._connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject})["state"]
        return int((state.get("subjects") or {}).get(subject, 0))

    def join(self, queue: str, sources: Sequence[Source], *, interval: int, timeout: int | None) -> None:
        """Wait until nothing of a queue is unfinished; see `JetStreamBroker.join`."""
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        while self.unfinished(queue, sources):
            if deadline is not None and time.monotonic() >= deadline:
                raise QueueJoinTimeout(queue)
            time.sleep(interval / 1000)

    def unfinished(self, queue: str, sources: Sequence[Source]) -> int:
        """How many messages a queue has that are not done: ready, running or delayed, and its actors' events."""
        stream = self._names.queue_stream(queue)
        try:
            before = self._feeding(stream, sources)
            if undone := _undone(before):
                return undone
            total, delayed = delays.counts(self._connection, stream, self._names.all_delayed(queue))
            if delayed:
                return delayed
            if waiting := self._without_consumer(queue, before, total):
                return waiting
            # A delay that ends is ready, one that runs may be delayed again, an event becomes a message by its retry:
            # nothing has moved if nothing was delivered between two looks.
            after = self._feeding(stream, sources)
            return _undone(after) or int([*map(_delivered, after)] != [*map(_delivered, before)])
        except NotFound:
            return 0

    def _feeding(self, stream: str, sources: Sequence[Source]) -> list[dict[str, Any]]:
        """What the server knows of the consumers of a queue's stream and of other sources."""
        return [
            *consumers(self._connection, stream),
            *(
                self._connection.api(f"CONSUMER.INFO.{source.stream}.{source.durable.name}")
                for source in sources
                if source.stream != stream
            ),
        ]

    def _without_consumer(self, queue: str, feeding: Iterable[dict[str, Any]], messages: int) -> int:
        """How many of a queue's `messages` that are not delayed wait on subjects that no consumer reads."""
        stream = self._names.queue_stream(queue)
        read = {info["config"]["filter_subject"] for info in feeding if info["stream_name"] == stream}
        if not read:
            return messages - delays.counts(self._connection, stream, self._names.all_periodic(queue))[1]
        subjects = {self._names.task(queue, priority) for priority in self._config.priorities}
        return sum(self._stored(stream, subject) for subject in subjects - read)


def _undone(feeding: Iterable[dict[str, Any]]) -> int:
    """How many messages wait at consumers, or are in flight."""
    return sum(info["num_pending"] + info["num_ack_pending"] for info in feeding)


def _delivered(info: dict[str, Any]) -> int:
    """How many deliveries a consumer has made."""
    return int(info["delivered"]["consumer_seq"])


class QueueOperations:
    """The methods of `JetStreamBroker` for queues and what is delayed in them, put together from the broker's parts.

    Examples:
      >>> broker.declare_queue("scans")
      >>> broker.pause("scans")
      >>> broker.is_paused("scans")
      True
      >>> broker.resume("scans")
      >>> broker.join("scans", timeout=30_000)
      >>> broker.queue_stats("scans").ready
      0
      >>> broker.flush("scans")
    """

    queues: set[str]
    stored_queues: Queues
    declarations: Declarations
    dead_letters: DeadLetters
    sources: Sources
    _sender: Sender

    def queue_stats(self, queue_name: str) -> QueueStats:
        """Count what is in a queue: ready, in flight, delayed, dead."""
        return self.stored_queues.stats(queue_name)

    def queue_stats_of(self, queue_names: Iterable[str]) -> Iterator[QueueStats]:
        """Count several queues, as `queue_stats` does each, with fewer requests: a few for each queue.

        They are counted as the iterator is read.

        Examples:
          >>> [stats.queue for stats in broker.queue_stats_of(["default", "scans"])]
          ['default', 'scans']
        """
        return self.stored_queues.stats_of(queue_names)

    def pause(self, queue_name: str) -> None:
        """Stop delivery from a queue to the whole fleet, until `resume`; workers finish what they have."""
        self.stored_queues.pause(queue_name, paused=True)

    def resume(self, queue_name: str) -> None:
        """End a `pause`."""
        self.stored_queues.pause(queue_name, paused=False)

    def is_paused(self, queue_name: str) -> bool:
        """Return whether delivery from a queue is paused for the whole fleet."""
        return self.stored_queues.is_paused(queue_name)

    def flush(self, queue_name: str) -> None:
        """Drop all messages of a queue: ready, in flight, delayed and dead; free its unique keys.

        Periodic schedules stay.

        Raises:
          QueueNotFound: When the queue was never declared.
        """
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)
        self.declarations.ensure_queue(queue_name)
        self.stored_queues.purge(queue_name)
        self.dead_letters.flush(queue_name)

    def flush_all(self) -> None:
        """Drop all messages of all declared queues, as `flush` does.

        Examples:
          ```python
          broker.flush_all()  # in a test, before the next one
          ```
        """
        for queue_name in sorted(self.queues):
            self.flush(queue_name)

    def cancel(self, message_id: str, queue_name: str | None = None) -> int:
        """Cancel the delays of a message, and free its unique key; return how many were waiting.

        Parameters:
          queue_name: Where it waits; None looks in all declared queues.

        Raises:
          BrokerConnectionError: When it is not known to be cancelled.

        Examples:
          >>> reminder = charge.send_with_options(args=("c-42", 20), delay=60_000)
          >>> broker.cancel(reminder.message_id)
          1
        """
        wanted = self.queues if queue_name is None else {queue_name}
        return sum(self._sender.cancel(name, message_id) for name in wanted)

    def run_now(self, message_id: str, queue_name: str | None = None) -> int:
        """End the delay of a message, or of its retry; return how many were waiting.

        Parameters:
          queue_name: Where it waits; None looks in all declared queues.

        Raises:
          BrokerConnectionError: When it is not known to be on its way.

        Examples:
          >>> reminder = charge.send_with_options(args=("c-42", 20), delay=60_000)
          >>> broker.run_now(reminder.message_id)
          1
        """
        wanted = self.queues if queue_name is None else {queue_name}
        return sum(self._sender.run_now(name, message_id) for name in wanted)

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
        sources = self.sources.of(queue_name)
        self.sources.declare(sources)
        self.stored_queues.join(queue_name, sources, interval=interval, timeout=timeout)
