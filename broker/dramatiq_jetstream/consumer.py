"""The consumer of a queue: hands what its sources deliver to Dramatiq's consumer thread.

A *source* is a JetStream durable plus a way to turn what it delivers into a Dramatiq message. A queue has
its own stream as a source (one per priority, highest rank first), and one source for each event
subscription of its actors. To Dramatiq they are one consumer.

What arrives is handed over in lists, one for each turn of the loop, and waits in `_ready`, ordered by
priority, until the consumer thread asks; Dramatiq is never given more than there is room for (see `pulling`).
Messages are decoded there, not on the loop. What cannot be decoded or came too often becomes a dead letter there too.

If the process dies, everything that arrived and was not settled is delivered again after `ack_wait`. A
graceful stop gives back at once what was not begun.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import ActorNotFound, ConnectionClosed, DecodeError
from dramatiq.message import Message

from . import dead_letters
from .connection import Connection
from .deliveries import ACK, NAK, Delivery, Ledger, nak_after
from .errors import ApiError, BrokerConnectionError, MessageTooLarge
from .pulling import Puller, Source

__all__ = ["JetStreamConsumer", "JetStreamMessage", "Source"]

#: A message whose follow-up could not be enqueued is delivered again after this many milliseconds.
FOLLOW_UP_DELAY = 2_000

# Failures of a follow-up that another run would only repeat.
_PERMANENT = (TypeError, ValueError, ActorNotFound, DecodeError, ApiError, MessageTooLarge)


class Undertaker(Protocol):
    """Stores dead letters; both methods raise `BrokerConnectionError` when that is not known to have worked."""

    def bury(self, delivery: Delivery, reason: str, error: str) -> None:
        """For what never became a message here."""

    def reject(self, message: JetStreamMessage, follow_up_error: Exception | None) -> None:
        """For a message that failed, or whose follow-up can never be enqueued."""


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


class JetStreamConsumer(Consumer):
    """A message iterator over the sources of a queue.

    Parameters:
      prefetch: How many messages Dramatiq may have at once, those that are worked on included.
      timeout: Milliseconds after which the iterator yields None when there is nothing.
      lookahead: Whether a little more than the prefetch may wait here while messages are short.
      undertaker: Stores dead letters; called on Dramatiq's threads.
      give_back: Takes messages of a queue that were not begun out of Dramatiq's hands again, other than so many.
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
        lookahead: bool,
        max_deliveries: int,
        undertaker: Undertaker,
        give_back: Callable[[str, int], None],
    ) -> None:
        self.logger = logging.getLogger(__name__)
        self.connection = connection
        self.ledger = ledger
        self.queue_name = queue_name
        self.prefetch = prefetch
        self.timeout = timeout / 1000
        self.max_deliveries = max_deliveries
        self.undertaker = undertaker
        self.give_back = give_back
        self.stopping = False
        self._handover: SimpleQueue[list[Delivery] | ConnectionClosed] = SimpleQueue()
        self._ready: list[tuple[int, int, Delivery]] = []  # the consumer thread's own
        self._order = itertools.count()
        self._handed = 0  # counted by the consumer thread
        self._returned = 0  # counted by the loop thread
        self._waits_for_room = False
        self._has_surplus = False
        self._puller = Puller(
            connection,
            ledger,
            sources,
            prefetch=prefetch,
            lookahead=lookahead,
            deliver=self._handover.put,
            surplus=self._surplus,
        )

    # For Dramatiq's threads

    def __next__(self) -> JetStreamMessage | None:
        deadline = time.monotonic() + self.timeout
        while not self.stopping:
            if self._has_surplus:
                self._has_surplus = False
                self._give_back_all()
                self.give_back(self.queue_name, max(1, self.prefetch // 2))
            if self._ready:
                # Said before looking, so that whoever makes room after the look wakes us.
                self._waits_for_room = True
                if self._handed - self._returned < self._puller.window:
                    self._waits_for_room = False
                    return self._hand_over(heappop(self._ready)[-1])
            try:
                arrived = self._handover.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return None
            if isinstance(arrived, ConnectionClosed):
                raise arrived
            for delivery in arrived:
                heappush(self._ready, (delivery.source.rank, next(self._order), delivery))
        self._give_back_all()
        time.sleep(min(self.timeout, 0.1))
        return None

    def _hand_over(self, delivery: Delivery) -> JetStreamMessage | None:
        self._handed += 1
        delivery.on_settled = self._room_made
        return self._decode(delivery)

    def _room_made(self) -> None:
        self._returned += 1
        if self._waits_for_room:
            self._waits_for_room = False
            self._handover.put([])

    def _surplus(self) -> None:
        self._has_surplus = True
        self._handover.put([])

    def _give_back_all(self) -> None:
        for *_, delivery in self._ready:
            self.ledger.settle(delivery, NAK)
        self._ready.clear()

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
        """Ask for nothing more; the consumer thread gives back what was not handed over, at once."""
        self.stopping = True
        self._puller.stop()
        self._handover.put([])

    def close(self) -> None:
        """Give back what was not handed over, and wait until the server knows what we settled."""
        self.stop_pulling()
        self._empty()
        settled = time.monotonic() + 2
        while self.ledger.unproven and self.connection.is_connected and time.monotonic() < settled:
            self.connection.hurry_fence()
            time.sleep(0.01)
        self._puller.close()

    def _empty(self) -> None:
        self._give_back_all()
        while True:
            try:
                arrived = self._handover.get_nowait()
            except Empty:
                return
            if isinstance(arrived, list):
                for delivery in arrived:
                    self.ledger.settle(delivery, NAK)
