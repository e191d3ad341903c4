"""Which orders are anonymous because their customer was erased, and where the events stood that were removed for that.

`order.{order_id}` in the bucket `erasures` is written before anything of the order is changed, and once more when
ledger and read model are anonymous; only then its events are removed. Readers of the stream get those from here, in the
ledger's words and at their places, so totals, lists and rebuilds stay right.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from dramatiq_jetstream.errors import KeyExists, TopologyMissing

from .announcements import Testimony
from .events import Happened
from .ports import Bucket, Entry
from .stock import Stock

BUCKET: Final = "erasures"

_ORDER: Final = "order."

#: How long a process goes by what it knows of erased orders, in seconds.
_FRESH_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class ErasedOrder:
    """An anonymous order: by which certificate, since when (milliseconds), and place and time of each of its events.

    `is_done` says that the ledger has nothing of the customer any more.
    """

    order_id: str
    certificate: str
    at: int
    places: Mapping[str, tuple[int, int]]
    is_done: bool = False

    @property
    def newest(self) -> int:
        """The place of its newest event."""
        return max((place for place, _ in self.places.values()), default=0)

    @property
    def ended_at(self) -> int:
        """When its newest event was stored, in milliseconds."""
        return max((at for _, at in self.places.values()), default=0)


class ErasedOrders:
    """The anonymous orders. Any thread may use it.

    Parameters:
      bucket: Where they are noted.
      stock: The ledger.
      now: The time in milliseconds.
    """

    def __init__(self, bucket: Bucket, stock: Stock, now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._stock = stock
        self._now = now
        self._facts: list[Happened] = []
        self._seen = 0
        self._looked = float("-inf")
        self._lock = threading.Lock()

    def note(self, order: ErasedOrder) -> None:
        """Note that an order becomes anonymous, unless that is noted."""
        with suppress(KeyExists):
            self._bucket.create(f"{_ORDER}{order.order_id}", _encode(order))

    def done(self, order_id: str) -> None:
        """Note that ledger and read model are anonymous."""
        entry = self._bucket.get(f"{_ORDER}{order_id}")
        if entry is not None and not (order := _read(entry)).is_done:
            self._bucket.update(entry.key, _encode(replace(order, is_done=True)), revision=entry.revision)

    def forget(self, order_id: str) -> None:
        """Drop the note of an order that left for the archive."""
        self._bucket.delete(f"{_ORDER}{order_id}")

    def all(self) -> Iterator[ErasedOrder]:
        """Yield the anonymous orders."""
        return map(_read, self._bucket.items(_ORDER))

    def facts(self) -> Sequence[Happened]:
        """Return the events that were removed, by their places, as the ledger says them; a second old at most."""
        with self._lock:
            if time.monotonic() - self._looked > _FRESH_SECONDS:
                with suppress(TopologyMissing):  # an earlier version has set the buckets up
                    if self._bucket.newest_revision() != self._seen:
                        self._look()
                self._looked = time.monotonic()
            return self._facts

    def _look(self) -> None:
        """Add what was noted since."""
        facts = {one.sequence: one for one in self._facts}
        for entry in self._bucket.items(after=self._seen):
            if entry.key.startswith(_ORDER) and (order := _read(entry)).is_done:
                facts |= {one.sequence: one for one in self._facts_of(order)}
            self._seen = max(self._seen, entry.revision)
        self._facts = [facts[place] for place in sorted(facts)]

    def _facts_of(self, order: ErasedOrder) -> Iterator[Happened]:
        testimony = Testimony(self._stock, order.order_id, self._now)
        if testimony.claim is None:
            return
        for key, (place, at) in order.places.items():
            said = testimony.said(key)
            if said is not None:
                yield Happened(said, place, at)


def _read(entry: Entry) -> ErasedOrder:
    stored = json.loads(entry.value)
    places = {key: (place, at) for key, (place, at) in stored["places"].items()}
    order_id = entry.key.removeprefix(_ORDER)
    return ErasedOrder(order_id, stored["certificate"], stored["at"], places, stored["done"])


def _encode(order: ErasedOrder) -> bytes:
    said = {
        "certificate": order.certificate,
        "at": order.at,
        "places": order.places,
        "done": order.is_done,
    }
    return json.dumps(said, separators=(",", ":")).encode()
