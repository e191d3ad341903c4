"""Leaves an event in its stream where a message has no room to carry it, and says where it is.

A retry or a replay of an event carries the event. What is added to it does not fit where the event itself takes nearly
all of `max_payload` and does not compress. Such a message refers to the event, and decoding it puts the event back in.
That is possible with a stream that keeps what was read, for as long as it keeps it; an event that is gone by then makes
the message a dead letter that says so.

If the process dies, nothing is lost: the event is acked after the message that refers to it is stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dramatiq.errors import DecodeError
from dramatiq.message import Message

from dramatiq_jetstream.errors import NotFound, PermissionDenied
from dramatiq_jetstream.jetstream.reading import StoredMessage, message_at
from dramatiq_jetstream.wire.connection import Connection

from .envelope import EVENT_OPTION, Event, carried, event_of

__all__ = ["References"]


class References:
    """The references of one connection's messages to events."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @staticmethod
    def is_in(message: Message[Any]) -> bool:
        """Whether a message refers to an event instead of carrying it."""
        place = message.options.get(EVENT_OPTION)
        return isinstance(place, dict) and "data" not in place

    def refer(self, message: Message[Any]) -> Message[Any] | None:
        """The message with a reference in place of its event; None when its stream does not keep that.

        Raises:
          BrokerConnectionError: When that cannot be known now.
        """
        event = event_of(message)
        if event is None or not event.stream:
            return None
        try:
            config = self._connection.api(f"STREAM.INFO.{event.stream}")["config"]
            stored = message_at(self._connection, event.stream, event.sequence)
        except (NotFound, PermissionDenied):
            return None
        if config["retention"] != "limits" or stored is None or not _is_of(event, stored):
            return None
        place = {name: value for name, value in carried(event).items() if name not in ("data", "headers")}
        return dataclasses.replace(message, options={**message.options, EVENT_OPTION: place})

    def resolve(self, message: Message[Any]) -> Message[Any]:
        """The message with the event to which it refers.

        Raises:
          DecodeError: When that is not in its stream any more.
          BrokerConnectionError: When it cannot be read now.
        """
        place = message.options[EVENT_OPTION]
        try:
            event = Event(
                place["subject"],
                b"",
                stream=place["stream"],
                sequence=int(place["sequence"]),
                time=int(place["time"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DecodeError(
                "The event of this message is neither in it nor in a stream.", b"", error
            ) from error
        stored = message_at(self._connection, event.stream, event.sequence)
        if stored is None or not _is_of(event, stored):
            raise DecodeError(
                f"The event {event.sequence} of stream {event.stream} is gone. This message refers to it, because it "
                "had no room to carry it.",
                b"",
                None,
            )
        whole = dataclasses.replace(event, data=stored.data, headers=stored.headers)
        return dataclasses.replace(message, options={**message.options, EVENT_OPTION: carried(whole)})


def _is_of(event: Event, stored: StoredMessage) -> bool:
    """Whether what is stored at an event's place is that event, and none of a later life of the stream."""
    return (stored.subject, stored.time) == (event.subject, event.time)
