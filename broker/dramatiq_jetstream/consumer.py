"""The consumer of a queue: pulls from its sources and hands messages to Dramatiq's consumer thread.

A *source* is a JetStream durable plus a way to turn what it delivers into a Dramatiq message. A queue has
its own stream as a source (one per priority, highest rank first), and one source for each event
subscription of its actors. To Dramatiq they are one consumer.

On the loop thread, pull requests are kept open for as many messages as the prefetch leaves room for. A
request stands for 30 s with heartbeats, so that an arriving message is delivered at once. Requests do not
survive a reconnect or a new leader: they are made again after a reconnect, and when heartbeats stop.

What has arrived waits in the handover queue, ordered by priority, until the consumer thread asks. Messages
are decoded there, not on the loop. What cannot be decoded or came too often becomes a dead letter there too.

If the process dies, everything handed over and not settled is delivered again after `ack_wait`; what sat in
the handover queue likewise. A graceful stop gives both back at once.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import Empty, PriorityQueue, SimpleQueue
from typing import Any, Protocol

from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import ActorNotFound, ConnectionClosed, DecodeError
from dramatiq.message import Message

from . import dead_letters
from .connection import Connection, Msg, Subscription
from .deliveries import ACK, NAK, Delivery, Ledger, nak_after
from .errors import ApiError, BrokerConnectionError, BrokerError, MessageTooLarge, TopologyMissing

__all__ = ["JetStreamConsumer", "JetStreamMessage", "Source"]

#: A pull request stands this long, and says every so often that it does; seconds.
PULL_EXPIRES = 30
HEARTBEAT = 2

#: Pull requests of one source at a time; a message that fills a small one must not wait for the next.
MAX_PULLS = 4

#: For so long (seconds) a higher priority must have had nothing before a lower one is asked.
QUIET = 0.02

#: A message whose follow-up could not be enqueued is delivered again after this many milliseconds.
FOLLOW_UP_DELAY = 2_000

# Failures of a follow-up that another run would only repeat.
_PERMANENT = (TypeError, ValueError, ActorNotFound, DecodeError, ApiError, MessageTooLarge)

_NANOSECONDS = 1_000_000_000


class Undertaker(Protocol):
    """Stores dead letters; both methods raise `BrokerConnectionError` when that is not known to have worked."""

    def bury(self, delivery: Delivery, reason: str, error: str) -> None:
        """For what never became a message here."""

    def reject(self, message: JetStreamMessage, follow_up_error: Exception | None) -> None:
        """For a message that failed, or whose follow-up can never be enqueued."""


@dataclass(eq=False)
class Source:
    """Where messages of a queue come from; `rank` 0 is asked first.

    `decode` makes the Dramatiq message and, for an event, the arguments that its actor receives; it raises
    `DecodeError` for bytes that are not a message.
    """

    queue: str
    stream: str
    durable: str
    rank: int
    ack_wait: int
    decode: Callable[[Delivery], tuple[Message[Any], tuple[Any, ...] | None]]
    actor: str | None = None

    def __str__(self) -> str:
        return f"{self.durable} of {self.stream}"


class JetStreamMessage(MessageProxy):
    """A message on its way through a worker.

    Attributes:
      delivery_count: How often the server has delivered it, this time included; 1 is the first.
      follow_up_error: Why a retry, pipeline step or callback of it could not be enqueued, if so.
    """

    def __init__(
        self, message: Message[Any], delivery: Delivery, arguments: tuple[Any, ...] | None = None
    ) -> None:
        super().__init__(message)
        self._delivery = delivery
        self._arguments = arguments
        self.follow_up_error: Exception | None = None

    @property
    def args(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The actor's arguments: for an event the decoded event, which is not part of the message."""
        return self._message.args if self._arguments is None else self._arguments

    @property
    def delivery_count(self) -> int:
        return self._delivery.deliveries

    @property
    def redelivered(self) -> bool:
        return self._delivery.deliveries > 1


@dataclass(eq=False)
class _Pull:
    number: int
    left: int


@dataclass(eq=False)
class _Feed:
    """The pull requests of one source; only on the loop thread."""

    source: Source
    inbox: str
    subscription: Subscription | None = None
    pulls: list[_Pull] = field(default_factory=list)
    heard: float = 0.0
    asked: float = 0.0
    busy: bool = False
    refused: int = 0

    @property
    def outstanding(self) -> int:
        return sum(pull.left for pull in self.pulls)

    def quiet(self, now: float) -> bool:
        return bool(self.pulls) and not self.busy and now - self.asked > QUIET


class JetStreamConsumer(Consumer):
    """A message iterator over the sources of a queue.

    Parameters:
      prefetch: How many messages may be here at once, those that are worked on included.
      timeout: Milliseconds after which the iterator yields None when there is nothing.
      undertaker: Stores dead letters; called on Dramatiq's threads.
    """

    def __init__(
        self,
        connection: Connection,
        ledger: Ledger,
        queue_name: str,
        sources: list[Source],
        *,
        prefetch: int,
        timeout: int,
        max_deliveries: int,
        undertaker: Undertaker,
    ) -> None:
        self.logger = logging.getLogger(__name__)
        self.connection = connection
        self.ledger = ledger
        self.queue_name = queue_name
        self.prefetch = prefetch
        self.timeout = timeout / 1000
        self.max_deliveries = max_deliveries
        self.undertaker = undertaker
        self.stopping = False
        self._in_hand = 0
        self._numbers = itertools.count(1)
        self._replenishing = False
        self._handover: SimpleQueue[Any] | PriorityQueue[Any] = (
            SimpleQueue() if len(sources) == 1 else PriorityQueue()
        )
        # Several sources can fill their requests at once; Dramatiq still gets no more than it asked for.
        self._slots = threading.Semaphore(prefetch) if len(sources) > 1 else None
        self._feeds = [_Feed(source, connection.new_inbox()) for source in sources]
        ranks = sorted({source.rank for source in sources})
        self._ranks = [[feed for feed in self._feeds if feed.source.rank == rank] for rank in ranks]
        for feed in self._feeds:
            feed.subscription = connection.subscribe(f"{feed.inbox}.*", self._receiver(feed))
        connection.on_reconnect(self._start_over)
        connection.on_tick(self._tick)
        connection.post(self._replenish)

    # For Dramatiq's threads

    def __next__(self) -> JetStreamMessage | None:
        if self.stopping:
            time.sleep(min(self.timeout, 0.1))
            return None
        if self._slots is not None and not self._slots.acquire(timeout=self.timeout):
            return None
        try:
            item = self._handover.get(timeout=self.timeout)
        except Empty:
            item = None
        if not isinstance(item, Delivery):
            if self._slots is not None:
                self._slots.release()  # a delivery's slot is free again when it is settled
            if item is not None:
                raise item.error
            return None
        return self._decode(item)

    def _decode(self, delivery: Delivery) -> JetStreamMessage | None:
        if delivery.deliveries > self.max_deliveries:
            self._bury(
                delivery,
                dead_letters.DELIVERED_TOO_OFTEN,
                f"Delivered {delivery.deliveries} times without being settled; "
                "its workers may have died of it.",
            )
            return None
        try:
            message, arguments = delivery.source.decode(delivery)
        except DecodeError as error:
            cause = error.error if error.error is not None else error
            self._bury(delivery, dead_letters.UNDECODABLE, f"{type(cause).__name__}: {cause}")
            return None
        return JetStreamMessage(message, delivery, arguments)

    def _bury(self, delivery: Delivery, reason: str, error: str) -> None:
        """Make a dead letter of what never becomes a message here."""
        self.logger.error("A message from %s is %s: %s", delivery.source, reason, error)
        try:
            self.undertaker.bury(delivery, reason, error)
        except BrokerConnectionError as failure:
            # Not acked: it comes again after its ack_wait, and then becomes a dead letter.
            self.logger.error(
                "Its dead letter could not be stored (%s); it will be delivered again.", failure
            )
            self.ledger.abandon(delivery)
        else:
            self.ledger.settle(delivery, ACK)

    def ack(self, message: MessageProxy) -> None:
        """Note that a message is done; the ack is sent by the loop, again after a reconnect if need be."""
        assert isinstance(message, JetStreamMessage)
        self._settle(message, failed=False)

    def nack(self, message: MessageProxy) -> None:
        """Make a dead letter of a failed message, then ack it.

        Raises:
          BrokerConnectionError: When the letter is not known to be stored; Dramatiq calls again.
        """
        assert isinstance(message, JetStreamMessage)
        self._settle(message, failed=True)

    def _settle(self, message: JetStreamMessage, *, failed: bool) -> None:
        delivery = message._delivery
        if delivery.settled:
            return
        error = message.follow_up_error
        if error is not None:
            if not isinstance(error, _PERMANENT):
                self.logger.warning(
                    "Message %s stays on its queue, because what follows it could not be enqueued: %s",
                    message.message_id,
                    error,
                )
                self.ledger.settle(delivery, nak_after(FOLLOW_UP_DELAY))
                return
            failed = True
        if failed:
            self.undertaker.reject(message, error)
        self.ledger.settle(delivery, ACK)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Give messages back to the queue at once."""
        for message in messages:
            if isinstance(message, JetStreamMessage):
                self.ledger.settle(message._delivery, NAK)

    def stop_pulling(self) -> None:
        """Ask for nothing more and give back what was not handed over yet."""
        self.stopping = True
        for feed in self._feeds:
            if feed.subscription is not None:
                feed.subscription.withdraw()
        self._empty_handover()

    def close(self) -> None:
        """Give everything back that was not handed over, and wait until the server knows what we settled."""
        self.stop_pulling()
        self.connection.forget(self._start_over)
        self.connection.forget(self._tick)
        settled = time.monotonic() + 2
        while self.ledger.unproven and self.connection.is_connected and time.monotonic() < settled:
            time.sleep(0.02)
            self.connection.hurry_fence()
        for feed in self._feeds:
            if feed.subscription is not None:
                feed.subscription.close()
        self._empty_handover()

    def _empty_handover(self) -> None:
        while True:
            try:
                item = self._handover.get_nowait()
            except Empty:
                return
            if isinstance(item, Delivery):
                self.ledger.settle(item, NAK)

    # On the loop thread

    def _receiver(self, feed: _Feed) -> Callable[[Msg], None]:
        def receive(message: Msg) -> None:
            feed.heard = time.monotonic()
            if message.reply.startswith("$JS.ACK."):
                self._arrived(feed, message)
            elif message.headers and "Status" in message.headers:
                self._answered(feed, message, message.headers)

        return receive

    def _arrived(self, feed: _Feed, message: Msg) -> None:
        delivery = Delivery(message, feed.source, self._released, feed.source.ack_wait)
        feed.refused = 0
        feed.busy = delivery.pending > 0
        feed.asked = feed.heard
        if feed.pulls:
            pull = feed.pulls[0]
            pull.left -= 1
            if pull.left <= 0:
                del feed.pulls[0]
        if not self.ledger.receive(delivery):
            self._schedule_replenish()
            return
        self._in_hand += 1
        if self.stopping:
            self.ledger.settle(delivery, NAK)
        else:
            self._handover.put(delivery)

    def _answered(self, feed: _Feed, message: Msg, headers: dict[str, str]) -> None:
        status = headers["Status"]
        if status == "100":  # a heartbeat
            return
        number = int(message.subject.rpartition(".")[2])
        feed.pulls = [pull for pull in feed.pulls if pull.number != number]
        description = headers.get("Description", "")
        if status == "503" or (status == "409" and "Deleted" in description):
            feed.refused += 1
            if feed.refused == 5 or "Deleted" in description:
                self._fail(
                    TopologyMissing(
                        f"There is no consumer {feed.source}: prepare it with `fleet setup`, "
                        "or let the broker declare it."
                    )
                )
            return  # the tick asks again
        if not self.stopping:
            self._schedule_replenish()

    def _fail(self, error: BrokerError) -> None:
        """Have `__next__` raise, so that Dramatiq makes a new consumer and the topology is ensured again."""
        self._handover.put(_Failure(ConnectionClosed(str(error))))

    def _released(self) -> None:
        """A delivery of ours was settled: there is room for another."""
        self._in_hand -= 1
        if self._slots is not None:
            self._slots.release()
        self._schedule_replenish()

    def _schedule_replenish(self) -> None:
        # Many are settled in one turn of the loop; one look at what to ask for is enough.
        if not self._replenishing:
            self._replenishing = True
            self.connection.soon(self._replenish)

    def _replenish(self) -> None:
        """Ask for as many messages as there is room for, highest rank first."""
        self._replenishing = False
        free = self.prefetch - self._in_hand
        if free <= 0 or self.stopping:
            return
        now = time.monotonic()
        last = self._ranks[-1]
        for feeds in self._ranks:
            busy = sum(feed.busy for feed in feeds) or 1
            for feed in feeds:
                share = free if len(feeds) == 1 else max(1, free // (busy if feed.busy else len(feeds)))
                self._pull(feed, share - feed.outstanding, now)
            if feeds is not last and not all(feed.quiet(now) for feed in feeds):
                self.connection.soon(self._replenish, delay=QUIET * 1.5)
                return

    def _pull(self, feed: _Feed, batch: int, now: float) -> None:
        if batch <= 0 or len(feed.pulls) >= MAX_PULLS:
            return
        if not feed.pulls:
            feed.asked = feed.heard = now
        pull = _Pull(next(self._numbers), batch)
        feed.pulls.append(pull)
        body = {
            "batch": batch,
            "expires": PULL_EXPIRES * _NANOSECONDS,
            "idle_heartbeat": HEARTBEAT * _NANOSECONDS,
        }
        self.connection.write(
            f"$JS.API.CONSUMER.MSG.NEXT.{feed.source.stream}.{feed.source.durable}",
            json.dumps(body).encode(),
            f"{feed.inbox}.{pull.number}",
        )

    def _start_over(self) -> None:
        for feed in self._feeds:
            feed.pulls.clear()
            feed.busy = False
        self._replenish()

    def _tick(self) -> None:
        now = time.monotonic()
        for feed in self._feeds:
            if feed.pulls and now - feed.heard > 2.5 * HEARTBEAT:
                feed.pulls.clear()  # nobody knows of our requests any more: a new leader, or a restart
        self._replenish()


@dataclass(eq=False)
class _Failure:
    """An error on its way to the consumer thread; it overtakes every delivery."""

    error: Exception

    def __lt__(self, other: object) -> bool:
        return True
