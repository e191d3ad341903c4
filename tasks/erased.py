"""Which orders are anonymous because their customer was erased, and where the events stood that were removed for that.

`order.{order_id}` in the bucket `erasures` is written before anything of the order is changed, and once more when
ledger and read model are anonymous; only then its events are removed. What is made again from the whole stream gets
those from here, in the ledger's words and at their places, so totals stay right. It sorts them on the disk. Everything
else goes by the records of the orders, which stay, so no process holds what was erased in memory.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from dramatiq_jetstream.errors import KeyExists, TopologyMissing
from orders.v1.events_pb2 import OrderCreated

from .announcements import Testimony
from .events import Happened
from .ports import Bucket, Entry
from .stock import Stock

BUCKET: Final = "erasures"

_ORDER: Final = "order."

#: How many orders are read from the ledger at once.
_AT_ONCE: Final = 1_000


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

    def note(self, order: ErasedOrder) -> ErasedOrder:
        """Note that an order becomes anonymous; returns what is noted, which may have been before."""
        with suppress(KeyExists):
            self._bucket.create(f"{_ORDER}{order.order_id}", _encode(order))
            return order
        return self.find(order.order_id) or order

    def find(self, order_id: str) -> ErasedOrder | None:
        """Return an anonymous order, None when it is none, or was brought back from the archive."""
        entry = self._bucket.get(f"{_ORDER}{order_id}")
        return None if entry is None else _read(entry)

    def done(self, order_id: str) -> None:
        """Note that ledger and read model are anonymous."""
        entry = self._bucket.get(f"{_ORDER}{order_id}")
        if entry is not None and not (order := _read(entry)).is_done:
            self._bucket.update(entry.key, _encode(replace(order, is_done=True)), revision=entry.revision)

    def forget(self, order_id: str) -> None:
        """Drop the note of an order that left for the archive, unless its erasure is under way and knows it by that."""
        entry = self._bucket.get(f"{_ORDER}{order_id}")
        job = None if entry is None else self._bucket.get(f"job.{_read(entry).certificate}")
        if entry is not None and (job is None or json.loads(job.value)["finished_at"]):
            self._bucket.delete(entry.key)

    def all(self) -> Iterator[ErasedOrder]:
        """Yield the anonymous orders."""
        return map(_read, self._bucket.items(_ORDER))

    def facts(self) -> Iterator[Happened]:
        """Yield the events that were removed, by their places, as the ledger says them.

        Their number is bounded by the disk for temporary files: some 60 bytes each.
        """
        with closing(sqlite3.connect("")) as places:  # a temporary file, gone with the connection
            places.execute(
                "CREATE TABLE fact (place INTEGER PRIMARY KEY, at INTEGER, order_id TEXT, key TEXT)"
            )
            with suppress(TopologyMissing):  # an earlier version has set the buckets up
                for order in self.all():
                    if order.is_done:
                        facts = (
                            (place, at, order.order_id, key) for key, (place, at) in order.places.items()
                        )
                        places.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?, ?, ?)", facts)
            # The events of an order stand near each other.
            ledger = lru_cache(_AT_ONCE)(lambda order_id: Testimony(self._stock, order_id, self._now))
            for place, at, order_id, key in places.execute("SELECT * FROM fact ORDER BY place"):
                said = ledger(order_id).said(key) if ledger(order_id).claim is not None else None
                if said is None and key == "created" and ledger(order_id).is_anonymous:
                    said = OrderCreated(
                        order_id=order_id
                    )  # of one that broke the rules the ledger has no more
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
