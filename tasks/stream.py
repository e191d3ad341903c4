"""Reads the events of orders back from the stream: all of them, one by its place, or which orders were created."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from typing import Final

from dramatiq_jetstream.streams import Range, StoredMessage, Stream
from orders.v1.events_pb2 import OrderCreated

from .events import SUBJECTS, DecodeError, Happened, UnusableEvent, decode, happened, order_id_of

_CREATED: Final = "ORDER.created"

#: How many messages are asked for at once when only a stretch of the stream is wanted.
_PAGE: Final = 1_024


class EventStream:
    """The stream of all events.

    Parameters:
      stream: Where they are.
      ensure: Makes the stream if it is missing.
      erased: Yields the events that were removed when customers were erased, as they remain, by their places.
    """

    def __init__(
        self,
        stream: Stream,
        ensure: Callable[[], None],
        erased: Callable[[], Iterator[Happened]] = lambda: iter(()),
    ) -> None:
        self._stream = stream
        self._ensure = ensure
        self.erased = erased

    def range(self) -> Range:
        """Return which sequences the stream has now."""
        self._ensure()
        return self._stream.range()

    def read(self, start: int = 1) -> Iterator[Happened]:
        """Yield every event that can be attributed to an order, oldest first, and in its place what was erased.

        To find what was erased takes a look at all that was.
        """
        # What the stream begins behind has left it.
        first = max(start, self.range().first)
        return merged(self.present(start), (one for one in self.erased() if one.sequence >= first))

    def present(self, start: int = 1) -> Iterator[Happened]:
        """Yield the events that the stream has and that can be attributed to an order, oldest first."""
        self._ensure()
        for stored in self._stream.read(SUBJECTS, start=start):
            found = read_stored(stored)
            if found is not None:
                yield found

    def stored(self, start: int = 1) -> Iterator[StoredMessage]:
        """Yield every message, also those that are no order's event, oldest first."""
        self._ensure()
        return self._stream.read(SUBJECTS, start=start)

    def settled_to(self) -> tuple[int, str] | None:
        """Return how far the consumer has settled events that is behind all others, and its name; None when none is."""
        behind = [
            (one.settled_to, one.name) for one in self._stream.consumers() if one.waiting or one.in_flight
        ]
        return min(behind, default=None)

    def trim(self, before: int) -> None:
        """Remove everything before a place; it is in the archive."""
        self._stream.trim(before)

    def erase(self, sequence: int) -> bool:
        """Remove the message at a place and overwrite it on the server's disk; False when there is none."""
        return self._stream.erase(sequence)

    def stored_at(self, sequence: int) -> StoredMessage | None:
        """Return the message at a place of the stream."""
        return self._stream.at(sequence)

    def happened_at(self, sequence: int) -> Happened | None:
        """Return the event at a place of the stream."""
        stored = self.stored_at(sequence)
        return None if stored is None else read_stored(stored)

    def newest_created(self) -> int:
        """Return the place of the newest event that created an order and is there, 0 when there is none."""
        self._ensure()
        newest = self._stream.last(_CREATED)
        return 0 if newest is None else newest.sequence

    def newest_event(self) -> int:
        """Return the place of the newest event that can be attributed to an order, 0 when there is none."""
        self._ensure()
        events = (one.sequence for one in self._stream.newest(SUBJECTS) if read_stored(one) is not None)
        return next(events, 0)

    def place_at(self, time: int) -> int | None:
        """Return the place of the first event that is there of a time (milliseconds) or later, None when none is.

        Everything behind it is as late, also what was removed.
        """
        self._ensure()
        found = self._stream.since(time, SUBJECTS)
        return None if found is None else found.sequence

    def place_before(self, time: int) -> int:
        """Return the place of the last event that is there of before a time (milliseconds), 0 when none is.

        Everything before it is as early, also what was removed.
        """
        self._ensure()
        found = self._stream.newest(SUBJECTS, before=self.place_at(time), page=1)
        return next((one.sequence for one in found), 0)

    def created(self, start: int, end: int) -> Iterator[tuple[int, OrderCreated]]:
        """Yield the events that create orders with their places, from `start` up to and without `end`."""
        for stored in self._stream.read(_CREATED, start=start, page=max(1, min(end - start, _PAGE))):
            if stored.sequence >= end:
                return
            found = read_stored(stored)
            if found is not None and isinstance(found.event, OrderCreated):
                yield found.sequence, found.event


def read_stored(stored: StoredMessage) -> Happened | None:
    """Return the event in a message, None when it is no order's or cannot be read (it is a dead letter then)."""
    try:
        event = decode(stored.subject, stored.data)
        if event is None:
            return None
        order_id_of(event)
    except (DecodeError, UnusableEvent):
        return None
    return happened(event, stored.sequence, stored.time, stored.headers)


def merged(events: Iterable[Happened], facts: Iterable[Happened]) -> Iterator[Happened]:
    """Yield events and what remains of erased ones by their places; where both are, what remains.

    The event is not removed from the stream yet then, or it is in the archive without its customer.
    """
    last = 0
    for one in merge(facts, events, key=lambda one: one.sequence):
        if one.sequence != last:
            yield one
        last = one.sequence
