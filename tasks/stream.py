"""Reads the events of orders back from the stream: all of them, the newest, or the one that created an order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dramatiq_jetstream.errors import NotFound
from dramatiq_jetstream.jetstream.listing import Listing
from dramatiq_jetstream.jetstream.reading import StoredMessage, last_message
from dramatiq_jetstream.wire.connection import Connection

from .events import STREAM, SUBJECTS, DecodeError, UnusableEvent, decode, isoformat, order_id_of
from .orders import Happened, happened

_CREATED = "ORDER.created"

#: How much the clocks of the front end and of NATS may differ, in milliseconds.
_CLOCK_SKEW = 2_000

#: How many events are looked through for the one that created an order.
_LOOKED_THROUGH = 5_000


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

    def newest_created(self, before: int | None, *, expected: int) -> Iterator[Happened]:
        """Yield the events that created orders, newest first.

        They are read in windows of sequences that grow from the newest end, because JetStream only reads forwards.

        Parameters:
          before: Only those with a smaller sequence.
          expected: How many are likely to be taken.
        """
        self._ensure()
        newest = last_message(self._connection, STREAM, _CREATED)
        if newest is None:
            return
        high = newest.sequence + 1 if before is None else min(before, newest.sequence + 1)
        first = self.range().first
        width = 8 * expected
        while high > first:
            low = max(first, high - width)
            window = []
            for stored in self._listing.read(_CREATED, start=low, page=2 * expected + 16):
                if stored.sequence >= high:
                    break
                window.append(stored)
            for stored in reversed(window):
                found = _read(stored)
                if found is not None:
                    yield found
            high, width = low, min(width * 4, 1_000_000)

    def find_created(self, order_id: str, since: int) -> Happened | None:
        """Return the event that created an order soon after `since` (milliseconds)."""
        self._ensure()
        place = {"start_time": isoformat(since - _CLOCK_SKEW), "next_by_subj": _CREATED}
        try:
            first = self._connection.api(f"STREAM.MSG.GET.{STREAM}", place)["message"]["seq"]
        except NotFound:
            return None
        for looked, stored in enumerate(self._listing.read(_CREATED, start=int(first), page=256)):
            # Most events say in a header whose they are, which is cheaper to look at.
            if stored.headers.get("ce-subject", order_id) == order_id:
                found = _read(stored)
                if found is not None and order_id_of(found.event) == order_id:
                    return found
            if looked >= _LOOKED_THROUGH or stored.time > since + 60_000:
                break
        return None


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
