"""The consumer of a queue: gives what its sources deliver to Dramatiq's consumer thread.

A *source* is a JetStream durable plus a way to turn what it delivers into a Dramatiq message. A queue has
its own stream as a source (one per priority, highest rank first), and one source for each event
subscription of its actors. To Dramatiq they are one consumer.

Deliveries come from the loop thread in lists, one for each turn of the loop, and wait in `_ready`, ordered by priority,
until the consumer thread asks. Dramatiq never gets more than there is room for (see `room`). The consumer thread
decodes messages, not the loop, and makes dead letters of those that cannot be decoded or came too often.

If the process dies, everything that arrived and was not settled is delivered again after `ack_wait`. A graceful stop
requeues unstarted messages at once.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import time
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from queue import Empty
from threading import current_thread
from types import NoneType

from dramatiq.broker import Consumer, MessageProxy
from dramatiq.common import current_millis
from dramatiq.errors import ActorNotFound, BrokerError, DecodeError
from dramatiq.worker import ConsumerThread

from dramatiq_jetstream import dead_letters
from dramatiq_jetstream.errors import ApiError, MessageTooLarge
from dramatiq_jetstream.wire import error_numbers
from dramatiq_jetstream.wire.connection import Connection
from dramatiq_jetstream.wire.thread_queue import ThreadQueue

from .delivery import Delivery, Source
from .durables import Durable
from .in_flight import InFlight
from .message import JetStreamMessage
from .pulling import Puller
from .rerouting import Rerouter
from .room import Room
from .settlements import ACK
from .sources import Sources
from .suspects import Suspects

__all__ = ["JetStreamConsumer"]

# Failures of a follow-up that another run would only repeat.
_PERMANENT = (
    TypeError,
    ValueError,
    RecursionError,
    pickle.PicklingError,
    ActorNotFound,
    DecodeError,
    ApiError,
    MessageTooLarge,
)


class JetStreamConsumer(Consumer):
    """A message iterator over the sources of a queue.

    Parameters:
      prefetch: How many messages Dramatiq may have at once, including those that run.
      timeout: Milliseconds after which the iterator yields None when there is nothing.
      lookahead: Whether a little more than the prefetch may wait here while messages are short.
      rerouter: Sends elsewhere what is not processed here.
      suspects: The messages that may kill this process.
      return_unstarted: Takes a queue, how many of its unstarted messages to keep, and whether only those that may be
        given back count; the server gets the others back.
    """

    def __init__(
        self,
        connection: Connection,
        in_flight: InFlight,
        queue_name: str,
        sources: Sources,
        *,
        prefetch: int,
        timeout: int,
        lookahead: bool,
        suspects: Suspects,
        rerouter: Rerouter,
        return_unstarted: Callable[[str, int, bool], None],
    ) -> None:
        self.logger = logging.getLogger(__name__)
        self.connection = connection
        self.in_flight = in_flight
        self.queue_name = queue_name
        self.prefetch = prefetch
        self.timeout = timeout / 1000
        self.suspects = suspects
        self.rerouter = rerouter
        self.return_unstarted = return_unstarted
        self.lookahead = lookahead
        self.stopping = False
        # A program that takes messages by itself needs no actors.
        self._runs_actors = isinstance(current_thread(), ConsumerThread)
        self._known_actors: set[str] = set()
        self._arrivals: ThreadQueue[list[Delivery]] = ThreadQueue()
        self._ready: list[tuple[int, int, Delivery]] = []  # the consumer thread's own
        self._suspected: list[tuple[int, int, Delivery]] = []  # as well; the latest stored first
        self._order = itertools.count()
        self._has_surplus = False
        self._gives_back = False
        self._room = Room(prefetch=prefetch, lookahead=lookahead, made=self._wake)
        self._sources = sources
        self._opened = sources.of(queue_name)
        self._puller = Puller(
            connection,
            in_flight,
            self._opened,
            self._room,
            owner=self,
            deliver=self._arrivals.put,
            surplus=self._surplus,
        )
        sources.open(self._opened)
        sources.find_others(queue_name, self._puller.add)
        suspects.listen(self._wake)

    # For Dramatiq's threads

    def __next__(self) -> JetStreamMessage | None:
        deadline = time.monotonic() + self.timeout
        while not self.stopping:
            if self._has_surplus:
                self._has_surplus = False
                self._requeue_all()
                self.return_unstarted(self.queue_name, max(1, self.prefetch // 2), False)
            if self._gives_back:
                self._gives_back = False
                self._requeue_waiting()
                self.return_unstarted(self.queue_name, 0, True)
            if (self._ready or self._suspected) and (delivery := self._next_delivery()) is not None:
                message = self._decode(delivery)
                if message is None or not self.stopping:
                    return message
                self.rerouter.requeue(message._delivery)
            try:
                arrived = self._arrivals.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return None
            for delivery in arrived:
                if self.suspects.include(delivery):
                    delivery.is_suspect = True
                    heappush(self._suspected, (-delivery.timestamp, next(self._order), delivery))
                else:
                    heappush(self._ready, (delivery.source.rank, next(self._order), delivery))
        self._empty(min(self.timeout, 0.1))
        return None

    def _next_delivery(self) -> Delivery | None:
        """The next suspect if it may start, otherwise the next of the others; None without room."""
        if not self._room.has_place():
            return None
        if self._suspected and self.suspects.may_start(self._suspected[0][-1]):
            delivery = heappop(self._suspected)[-1]
        elif self._ready:
            delivery = heappop(self._ready)[-1]
        else:
            return None
        self._room.occupy(delivery)
        return delivery

    def released(self, delivery: Delivery, *, done: bool) -> None:
        """A delivery of ours was settled: there may be room for another. On the loop thread."""
        if delivery.is_suspect:
            self.suspects.settled(delivery)
        if self._room.settled(delivery, done=done):
            self._puller.ask_soon()

    @property
    def sources(self) -> list[Source]:
        """Where its messages come from, as this program declares it."""
        return self._opened

    def _wake(self) -> None:
        self._arrivals.put([])

    def _surplus(self) -> None:
        self._has_surplus = True
        self._wake()

    def _requeue_all(self) -> None:
        while self._ready:
            self.rerouter.requeue(heappop(self._ready)[-1])

    def _requeue_waiting(self) -> None:
        ready, self._ready = self._ready, []
        for each in ready:
            if each[-1].may_go_back:
                self.rerouter.requeue(each[-1])
            else:
                heappush(self._ready, each)

    # For `giving_back`, on the loop thread

    def waiting(self) -> list[Delivery]:
        """The messages that Dramatiq does not have yet, as far as another thread can see them."""
        return [each[-1] for each in list(self._ready)]

    def requests(self, durable: Durable) -> int:
        """How many requests of ours stand at a durable."""
        return self._puller.requests(durable)

    def give_back(self) -> None:
        """Requeue what has waited for a moment, and ask for nothing more until `ask_again`."""
        self._room.is_held_up = self._gives_back = True
        self._wake()

    def ask_again(self) -> None:
        """A thread is free: ask for messages again."""
        if self._room.is_held_up:
            self._room.is_held_up = False
            self._puller.ask_soon()

    def _leave_to_others(self, delivery: Delivery) -> None:
        """Requeue what another version of the program subscribed to, with a longer delay each time."""
        if delivery.deliveries == 1:
            self.logger.warning(
                "%s delivers %s, to which this version of the program does not subscribe: leaving it to other workers.",
                delivery.source,
                delivery.subject,
            )
        self.rerouter.leave_to_others(delivery)

    def _decode(self, delivery: Delivery) -> JetStreamMessage | None:
        source = delivery.source
        if source.takes is not None and not source.takes(delivery.subject):
            self._leave_to_others(delivery)
            return None
        if delivery.deliveries > 1 and self._is_to_be_a_dead_letter(delivery):
            return None
        try:
            message, arguments = source.decode(delivery)
        except ActorNotFound as error:
            if not self.rerouter.wait_for_actor(delivery):
                self._make_dead_letter(delivery, dead_letters.UNKNOWN_ACTOR, str(error))
            return None
        except BrokerError as error:
            self.logger.warning("%s cannot be decoded now and is requeued: %s", delivery, error)
            self.rerouter.requeue_later(delivery)
            return None
        except Exception as error:  # noqa: BLE001 - whatever decoding raises, these bytes are not a message
            cause = (error.error if isinstance(error, DecodeError) else None) or error
            self._make_dead_letter(delivery, dead_letters.UNDECODABLE, f"{type(cause).__name__}: {cause}")
            return None
        name = message.actor_name
        if name not in self._known_actors and self._waits_for_actor(delivery, name):
            return None
        proxy = JetStreamMessage(message, delivery, arguments)
        if "eta" in message.options and self._waits_for_eta(proxy):
            return None
        return proxy

    def _is_to_be_a_dead_letter(self, delivery: Delivery) -> bool:
        """Whether a message that was here before must not run again; its dead letter is stored then."""
        if self.rerouter.owes_dead_letter(delivery):
            self._store_elsewhere(delivery, lambda: self.rerouter.retry_dead_letter(delivery))
            return True
        try:
            if not self.suspects.has_killed(delivery):
                return False
        except BrokerError as error:
            self.logger.warning("How often %s was started is not known now: %s", delivery, error)
            self.rerouter.requeue_later(delivery)
            return True
        self._make_dead_letter(
            delivery,
            dead_letters.DELIVERED_TOO_OFTEN,
            f"Delivered {delivery.deliveries} times without being settled: its workers may have died of it, "
            "or what follows it could not be enqueued.",
        )
        return True

    def _waits_for_actor(self, delivery: Delivery, name: str) -> bool:
        """Whether this program lacks the actor of a message, which is requeued with a delay then."""
        if not self._runs_actors:
            return False
        if self.rerouter.knows_actor(name):
            self._known_actors.add(name)
            return False
        return self.rerouter.wait_for_actor(delivery, name)

    def _waits_for_eta(self, message: JetStreamMessage) -> bool:
        """Whether it is too early for a message of another program, which the server is to keep then.

        Our own have no option `eta` when they are delivered.
        """
        eta = message.options["eta"]
        if isinstance(eta, (int, float)) and eta > current_millis():
            # Dramatiq would hold it in its memory.
            self._store_elsewhere(message._delivery, lambda: self.rerouter.delay_until_eta(message))
            return True
        if not isinstance(eta, (int, float, NoneType)):
            self.logger.warning("Message %s has an eta that is not a time, %r; running it now.", message, eta)
        del message.options["eta"]  # Dramatiq would enqueue the message once more for it
        return False

    def _make_dead_letter(self, delivery: Delivery, reason: str, error: str) -> None:
        """Make a dead letter of a delivery that never becomes a message here."""
        self.logger.error("A message from %s is %s: %s", delivery.source, reason, error)
        self._store_elsewhere(delivery, lambda: self.rerouter.store_dead_letter(delivery, reason, error))

    def _store_elsewhere(self, delivery: Delivery, store: Callable[[], None]) -> None:
        """Store a delivery elsewhere, then ack it."""
        try:
            store()
        except Exception as error:  # noqa: BLE001 - nothing may be raised here, or it would stay with us
            self.logger.warning("%s cannot be stored elsewhere now and will come again: %s", delivery, error)
            self.rerouter.requeue_later(delivery)
        else:
            self.in_flight.settle(delivery, ACK)

    def ack(self, message: MessageProxy) -> None:
        """Note that a message is done; the ack is sent by the loop, again after a reconnect if need be."""
        self._settle(message, failed=False)

    def nack(self, message: MessageProxy) -> None:
        """Make a dead letter of a failed message, then ack it; one that cannot be stored comes again later."""
        self._settle(message, failed=True)

    def _settle(self, message: MessageProxy, *, failed: bool) -> None:
        if not isinstance(message, JetStreamMessage) or message._delivery.settled:
            return
        delivery = message._delivery
        error = message.follow_up_error
        if error is not None:
            if not _is_permanent(error):
                self.logger.warning(
                    "Message %s stays on its queue, because what follows it could not be enqueued: %s",
                    message.message_id,
                    error,
                )
                self.rerouter.requeue_later(delivery, error)
                return
            failed = True
        elif message.put_off is not None and not failed:
            self.rerouter.put_off(message, message.put_off)
            return
        if not failed or (error is None and message.is_unwanted):
            self.in_flight.settle(delivery, ACK)
            return
        try:
            self.rerouter.reject(message, error)
        except Exception as error:  # noqa: BLE001 - Dramatiq would call again, and hold up a thread with it
            self.logger.warning(
                "Message %s has no dead letter and will run again, because it could not be stored: %s",
                message.message_id,
                error,
            )
            self.rerouter.requeue_later(delivery, error)
        else:
            self.in_flight.settle(delivery, ACK)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Return messages to the queue at once."""
        for message in messages:
            if isinstance(message, JetStreamMessage):
                self.rerouter.requeue(message._delivery)

    def stop_pulling(self) -> None:
        """Ask for nothing more; the consumer thread requeues at once what Dramatiq does not have."""
        self.stopping = True
        self._sources.close(self._opened)
        self._puller.stop()
        self._wake()

    def close(self) -> None:
        """Requeue what Dramatiq does not have, and wait until the server knows what we settled."""
        self.stop_pulling()
        self._empty()
        self.in_flight.flush(2)
        self._empty()
        self.suspects.ignore(self._wake)
        self._puller.close()

    def _empty(self, timeout: float = 0.0) -> None:
        """Requeue what has arrived, until nothing came for `timeout` seconds."""
        self._requeue_all()
        while self._suspected:
            self.rerouter.requeue(heappop(self._suspected)[-1])
        while True:
            try:
                arrived = self._arrivals.get(timeout=timeout)
            except Empty:
                return
            for delivery in arrived:
                self.rerouter.requeue(delivery)


def _is_permanent(error: BaseException) -> bool:
    """Whether another run of a message would fail to enqueue its follow-up for the same reason."""
    if isinstance(error, ApiError) and (error.err_code in error_numbers.LIMIT_REACHED or error.code >= 500):
        return False
    return isinstance(error, _PERMANENT)
