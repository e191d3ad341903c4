"""Reads the events of orders back from the stream: all of them, one by its place, or which orders were created."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from dramatiq_jetstream.jetstream.listing import Listing
from dramatiq_jetstream.jetstream.reading import StoredMessage, last_message, message_at
from dramatiq_jetstream.wire.connection import Connection
from orders.v1.events_pb2 import OrderCreated

from .events import STREAM, SUBJECTS, DecodeError, Happened, UnusableEvent, decode, happened, order_id_of

_CREATED: Final = "ORDER.created"

#: How many messages are asked for at once when only a stretch of the stream is wanted.
_PAGE: Final = 1_024


@dataclass(frozen=True, slots=True)
class Range:
    """The sequences of the first and last message of the stream."""

    first: int
    last: int


class EventStream:
    """The stream of all events.

    Parameters:
      connection: The connection to read through.
      ensure: Makes the stream if it is missing.
    """

    def __init__(self, connection: Connection, ensure: Callable[[], None]) -> None:
        self._connection = connection
        self._ensure = ensure
        self._listing = Listing(connection, STREAM)

    def range(self) -> Range:
        """Return which sequences the stream has now."""
        self._ensure()
        state = self._connection.api(f"STREAM.INFO.{STREAM}")["state"]
        return Range(int(state["first_seq"]), int(state["last_seq"]))

    def read(self, start: int = 1) -> Iterator[Happened]:
        """Yield every event that can be attributed to an order, oldest first."""
        self._ensure()
        for stored in self._listing.read(SUBJECTS, start=start):
            found = _read(stored)
            if found is not None:
                yield found

    def stored_at(self, sequence: int) -> StoredMessage | None:
        """Return the message at a place of the stream."""
        return message_at(self._connection, STREAM, sequence)

    def happened_at(self, sequence: int) -> Happened | None:
        """Return the event at a place of the stream."""
        stored = self.stored_at(sequence)
        return None if stored is None else _read(stored)

    def newest_created(self) -> int:
        """Return the place of the newest event that created an order, 0 when there is none."""
        self._ensure()
        newest = last_message(self._connection, STREAM, _CREATED)
        return 0 if newest is None else newest.sequence

    def created(self, start: int, end: int) -> Iterator[tuple[int, OrderCreated]]:
        """Yield the events that create orders with their places, from `start` up to and without `end`."""
        for stored in self._listing.read(_CREATED, start=start, page=max(1, min(end - start, _PAGE))):
            if stored.sequence >= end:
                return
            found = _read(stored)
            if found is not None and isinstance(found.event, OrderCreated):
                yield stored.sequence, found.event


def _read(stored: StoredMessage) -> Happened | None:
    """Return the event in a message, None when it is no order's or cannot be read (it is a dead letter then)."""
    try:
        event = decode(stored.subject, stored.data)
        if event is None:
            return None
        order_id_of(event)
    except (DecodeError, UnusableEvent):
        return None
    return happened(event, stored.sequence, stored.time, stored.headers)
