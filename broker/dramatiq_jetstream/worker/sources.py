"""The sources of a queue: its own stream, one for each priority, and the subscriptions of its actors.

What a queue's stream delivers is decoded here: ticks of schedules become messages of their own, and a message that
carries an event gets the decoded event as its actor's argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dramatiq.errors import DecodeError
from dramatiq.message import Message

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.jetstream.names import HEADER_TICK
from dramatiq_jetstream.sending.envelope import Event, checked, decode, event_of

from .delivery import Delivery, Source
from .durables import Durable, Durables

__all__ = ["Sources"]


class Sources:
    """Where the messages of each queue come from."""

    def __init__(self, config: BrokerConfig, durables: Durables) -> None:
        self._config = config
        self._durables = durables
        self._subscriptions: dict[str, dict[str, Callable[[], Source]]] = {}
        self._decoders: dict[str, Callable[[Event], Any]] = {}

    def subscribe(
        self,
        queue_name: str,
        actor_name: str,
        make: Callable[[], Source],
        decoder: Callable[[Event], Any],
    ) -> None:
        """Add the subscription of an actor.

        Parameters:
          make: Declares the subscription's consumer and returns it as a source.
          decoder: Makes what the actor receives of an event.
        """
        self._subscriptions.setdefault(queue_name, {})[actor_name] = make
        self._decoders[actor_name] = decoder

    def of(self, queue_name: str) -> list[Source]:
        """The sources of a queue, the highest priority first."""
        stream = self._config.names.queue_stream(queue_name)
        own = []
        for rank, priority in enumerate(self._config.priorities):
            durable = self.durable(stream, self._config.names.worker_durable(priority))
            own.append(Source(queue=queue_name, durable=durable, rank=rank, decode=self._decode))
        return own + [make() for make in self._subscriptions.get(queue_name, {}).values()]

    def durable(self, stream: str, name: str) -> Durable:
        """A durable of a stream, as this process knows it."""
        return self._durables.get(stream, name, self._config.ack_wait)

    def _decode(self, delivery: Delivery) -> tuple[Message[Any], tuple[Any, ...] | None]:
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
        decode = self._decoders.get(actor_name)
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
