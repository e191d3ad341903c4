"""Which orders are not final, kept up to date at the cost of what has changed since the last look.

The read model's bucket is read once, from a mark before which every order is final, and from then on only what was
written since. So a process that counts unfinished orders every few seconds does not read all orders there ever were.

Each process has its own index, and all come to the same. The mark is a hint in the bucket of the stock: a process that
dies before it moved the mark costs the next one a longer first look. An interrupt leaves orders unread, and they are
read at the next look.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from dramatiq_jetstream.errors import RevisionConflict

from .model import Order
from .ports import Bucket, Entry

_MARK: Final = "mark.unfinished"

#: How many orders an index holds; of more than that, the oldest are known.
MAX_ORDERS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An order that is not final; times in milliseconds. `revision` is that of its record.

    `offered_until` is when its offer ends, 0 for one that does not wait for its customer.
    """

    order_id: str
    status: str
    placed_at: int
    moved_at: int
    revision: int
    offered_until: int = 0


class UnfinishedOrders:
    """The index of one process. Any thread may use it.

    Parameters:
      orders: The bucket of the read model.
      marks: Where the mark is kept.
      read: Reads an order out of an entry, None when there is none in it.
    """

    def __init__(self, orders: Bucket, marks: Bucket, read: Callable[[Entry], Order | None]) -> None:
        self._orders = orders
        self._marks = marks
        self._read = read
        self._open: dict[str, Unfinished] = {}
        self._seen: int | None = None
        self._marked = 0
        self._lock = threading.Lock()

    def all(self) -> list[Unfinished]:
        """Return the orders that are not final now, those first that have not moved for the longest time."""
        with self._lock:
            self._refresh()
            return sorted(self._open.values(), key=lambda one: one.moved_at)

    def still_stands(self, one: Unfinished) -> bool:
        """Whether the record of an order is the one that is known; a record that was removed is forgotten."""
        entry = self._orders.get(one.order_id)
        if entry is None:
            with self._lock:
                self._open.pop(one.order_id, None)
        return entry is not None and entry.revision == one.revision

    def move_mark(self) -> None:
        """Note where the next process has to begin."""
        with self._lock:
            if self._seen is None:
                return
            mark = min((one.revision - 1 for one in self._open.values()), default=self._seen)
            if mark > self._marked and len(self._open) < MAX_ORDERS:
                entry = self._marks.get(_MARK)
                revision = 0 if entry is None else entry.revision
                with suppress(RevisionConflict):  # another process moves it, too
                    self._marks.update(_MARK, str(mark).encode(), revision=revision)
                self._marked = mark

    def _refresh(self) -> None:
        if self._seen is None:
            entry = self._marks.get(_MARK)
            self._seen = self._marked = 0 if entry is None else int(entry.value)
        for entry in self._orders.items(after=self._seen):
            order = self._read(entry)
            if order is None or order.is_final:
                self._open.pop(entry.key, None)
            elif entry.key in self._open or len(self._open) < MAX_ORDERS:
                self._open[entry.key] = _unfinished(order)
            self._seen = max(self._seen, entry.revision)


def _unfinished(order: Order) -> Unfinished:
    times = [int(entry.at.timestamp() * 1000) for entry in order.history] or [0]
    offer = order.offer if order.status == "offered" else None
    until = 0 if offer is None else int(offer.expires_at.timestamp() * 1000)
    return Unfinished(order.order_id, order.status, min(times), max(times), order.revision, until)
