"""The sources of a queue: its own stream, one for each priority, and the subscriptions of its actors.

Every source stands alone: it is declared, read, retried and reported by itself, so an unreadable source stops no other
one, neither at boot nor later. A source whose consumer or stream disappears is declared again, and when its stream
begins a new life, everything else that was kept there is restored (see `keeping`). A broker that may not declare
waits until the missing part is there.

What a queue's stream delivers is decoded here: ticks of schedules become messages of their own, and a message that
carries an event gets the decoded event as its actor's argument.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from dramatiq.errors import ActorNotFound, DecodeError
from dramatiq.message import Message

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import NotFound, PermissionDenied, TopologyMissing
from dramatiq_jetstream.jetstream import inventory
from dramatiq_jetstream.jetstream.declaring import Declarations
from dramatiq_jetstream.jetstream.keeping import Keeper
from dramatiq_jetstream.jetstream.names import HEADER_BODY, HEADER_TICK
from dramatiq_jetstream.sending.envelope import EVENT_OPTION, Event, checked, decode, event_of
from dramatiq_jetstream.sending.fitting import unfolded
from dramatiq_jetstream.sending.references import References
from dramatiq_jetstream.wire.connection import Connection

from .delivery import Delivery, Source
from .durables import Durable, Durables

__all__ = ["Sources"]

logger = logging.getLogger(__name__)


class Sources:
    """Where the messages of each queue come from."""

    def __init__(
        self,
        config: BrokerConfig,
        connection: Connection,
        declarations: Declarations,
        durables: Durables,
        keeper: Keeper,
    ) -> None:
        self._config = config
        self._connection = connection
        self._declarations = declarations
        self._durables = durables
        self._keeper = keeper
        self._references = References(connection)
        self._open: dict[str, list[Source]] = {}
        self._seen: set[str] = set()
        self._subscriptions: dict[str, dict[str, Callable[[], Source]]] = {}
        self._decoders: dict[str, Callable[[Event], Any]] = {}
        durables.on_missing(self._missing)
        durables.on_certain(self._certain)
        connection.on_fork(self._open.clear)

    def subscribe(
        self,
        queue_name: str,
        actor_name: str,
        make: Callable[[], Source],
        decoder: Callable[[Event], Any],
    ) -> None:
        """Add the subscription of an actor.

        Parameters:
          make: Returns the subscription as a source.
          decoder: Turns an event into the actor's argument.
        """
        self._subscriptions.setdefault(queue_name, {})[actor_name] = make
        self._decoders[actor_name] = decoder

    def of(self, queue_name: str) -> list[Source]:
        """The sources of a queue, the highest priority first."""
        own = []
        for rank, priority in enumerate(self._config.priorities):
            durable = self._own(queue_name, priority)
            declare = partial(self._declarations.ensure_worker, queue_name, priority)
            own.append(Source(queue_name, durable, rank, declare, self._decode))
        return own + [make() for make in self._subscriptions.get(queue_name, {}).values()]

    def find_others(self, queue_name: str, add: Callable[[Source], None]) -> None:
        """Add the priorities that a queue has on the server and this program does not use; returns at once.

        Another version of the program had a higher `max_priority`: its messages are still to be run.
        """
        stream = self._config.names.queue_stream(queue_name)
        job = partial(self._add_others, queue_name, stream, add)
        self._keeper.do(stream, f"other priorities of {stream}", job)

    def _add_others(self, queue_name: str, stream: str, add: Callable[[Source], None]) -> None:
        names = self._config.names
        own = {names.worker_durable(priority) for priority in self._config.priorities}
        try:
            existing = {info["name"] for info in inventory.consumers(self._connection, stream)}
        except (NotFound, PermissionDenied):
            return  # there are none, or we may not see them
        for name in sorted(existing - own):
            priority = names.priority_of_durable(name)
            if priority is None:
                continue
            logger.warning(
                "Queue %s has the priority %d, which this program does not: it is served all the same. When no program "
                "uses it any more, delete the consumer %s of stream %s.",
                queue_name,
                priority,
                name,
                stream,
            )
            durable = self._own(queue_name, priority)
            add(Source(queue_name, durable, -priority, lambda: None, self._decode))
            self._connection.post(self._durables.begin, durable)

    def open(self, sources: Iterable[Source]) -> None:
        """Declare sources and keep them readable until they are closed; returns at once."""
        for source in sources:
            self._open.setdefault(source.durable.label, []).append(source)
            self._keep(source)

    def close(self, sources: Iterable[Source]) -> None:
        """Stop keeping sources readable."""
        for source in sources:
            opened = self._open.get(source.durable.label, [])
            if source in opened:
                opened.remove(source)

    def declare(self, sources: Iterable[Source]) -> None:
        """Declare sources now, if the broker may."""
        if self._config.declare:
            for source in sources:
                source.declare()

    def _keep(self, source: Source) -> None:
        self._keeper.do(source.stream, f"consumer {source}", partial(self._make_readable, source))

    def _make_readable(self, source: Source) -> None:
        if not self._open.get(source.durable.label):
            return
        if self._config.declare:
            source.declare()
        else:
            self._check(source)
        self._connection.post(self._durables.begin, source.durable)

    def _check(self, source: Source) -> None:
        """Check that a source exists which we may not declare; without permission to ask, fetching will show it."""
        try:
            self._connection.api(f"CONSUMER.INFO.{source.stream}.{source.durable.name}")
        except NotFound:
            raise TopologyMissing(
                f"There is no consumer {source}: prepare it with `fleet setup`, or let the broker declare it."
            ) from None
        except PermissionDenied:
            return

    def _missing(self, durable: Durable) -> None:
        for source in self._open.get(durable.label, [])[:1]:
            self._keep(source)

    def _certain(self, durable: Durable, same: bool) -> None:
        if not same and durable.label in self._seen:
            self._keeper.renewed(durable.stream)
        self._seen.add(durable.label)

    def _own(self, queue_name: str, priority: int | None) -> Durable:
        """The durable of a queue's stream, of one priority."""
        names = self._config.names
        return self._durables.get(
            names.queue_stream(queue_name),
            names.worker_durable(priority),
            self._config.ack_wait,
            names.task(queue_name, priority),
        )

    def durable(self, stream: str, name: str) -> Durable:
        """A durable of a stream of events, as this process knows it."""
        return self._durables.get(stream, name, self._config.ack_wait)

    def _decode(self, delivery: Delivery) -> tuple[Message[Any], tuple[Any, ...] | None]:
        data = delivery.data
        if delivery.is_marked and HEADER_BODY in delivery.headers:
            data = unfolded(data, delivery.headers)
        message = checked(decode(data), delivery.source.queue)
        if delivery.is_marked and HEADER_TICK in delivery.headers:
            # Every tick of a schedule has the same body; its place in the stream makes it a message of its own.
            message = dataclasses.replace(
                message,
                message_id=f"{message.message_id}:{delivery.sequence}",
                message_timestamp=delivery.timestamp,
            )
        if EVENT_OPTION not in message.options:
            return message, None
        if self._references.is_in(message):
            message = self._references.resolve(message)
        event = event_of(message)
        if event is None:
            return message, None
        return message, (self.decode_event(message.actor_name, event),)

    def decode_event(self, actor_name: str, event: Event) -> Any:
        """What an actor receives for an event.

        Raises:
          ActorNotFound: When there is no such actor here, or its subscription is for other events.
          DecodeError: When the event's bytes are not what the actor's subscription says.
        """
        decode = self._decoders.get(actor_name)
        if decode is None:
            raise ActorNotFound(
                f"Actor {actor_name!r} has no subscription here to decode {event.subject} with."
            )
        try:
            return decode(event)
        except ActorNotFound:
            raise
        except Exception as error:
            raise DecodeError(f"Failed to decode the event {event.subject}.", event.data, error) from error
