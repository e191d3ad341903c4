"""Opens orders on the short way: takes from all their products and stores their records in one atomic batch.

The batch has what the long way (`tasks.stock`) stores one after the other, in the same order: each level with its
note, then the record. So whatever a server that dies leaves of a batch is something that the long way leaves too, and
that the next run of the step mends. All or none saves the looks for records, because a record that is there refuses the
batch.

The short way is for the ordinary case. If a product runs short, if an order has a note or a record already, or if other
processes keep changing the levels, it opens nothing, and the order takes the long way. Orders that the threads of a
process open at the same time share a batch.

If the process dies, the batch is stored or not. An interrupt leaves it stored or not as well, and no turn held; a level
that this process knows wrongly is found out by the next compare-and-set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from dramatiq_jetstream.errors import ApiError, RevisionConflict

from .ledger import Record
from .levels import TAKEN, Found, Level, Note, Shelf
from .ports import BatchBucket
from .together import Together

logger = logging.getLogger(__name__)

#: How many times a batch is tried while other processes change the levels.
_TRIES: Final = 3

#: The most products whose levels one batch changes; with its records it stays far below the server's 1,000 keys.
_PRODUCTS: Final = 200


class _Missed(Exception):
    """The thread that opened several orders failed with one of them, or was interrupted."""


class _Opening:
    """An order to open; `found` is its record when that is stored."""

    __slots__ = ("found", "order_id", "record")

    def __init__(self, order_id: str, record: Record) -> None:
        self.order_id = order_id
        self.record = record
        self.found: Found | None = None


class Openings:
    """Opens orders for all threads of a process.

    Parameters:
      bucket: Where levels and records are.
      shelf: Returns the shelf of a product.
      now: The time in milliseconds.
    """

    def __init__(self, bucket: BatchBucket, shelf: Callable[[str], Shelf], now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._shelf = shelf
        self._now = now
        self._together = Together(self._open_all, _Missed)

    def open(self, order_id: str, wanted: Record) -> Found | None:
        """Take what an order holds and store its first record; returns None when it has to take the long way."""
        opening = _Opening(order_id, wanted)
        try:
            self._together(opening)
        except _Missed:
            return None
        return opening.found

    def _open_all(self, openings: list[_Opening]) -> None:
        shelves: dict[str, Shelf] = {}
        taken_on: list[_Opening] = []
        # Of two runs of one step, one takes the long way, and finds what the other has stored.
        for one in {one.order_id: one for one in openings}.values():
            more = {line.sku for line in one.record.lines} - shelves.keys()
            if len(shelves) + len(more) <= _PRODUCTS:
                shelves |= {sku: self._shelf(sku) for sku in more}
                taken_on.append(one)
        _in_turns([shelves[sku] for sku in sorted(shelves)], lambda: self._open_in_turn(taken_on, shelves))

    def _open_in_turn(self, left: list[_Opening], shelves: Mapping[str, Shelf]) -> None:
        for _ in range(_TRIES):
            if self._try(left, shelves):
                return
            left = self._read_again(left, list(shelves.values()))

    def _try(self, openings: Sequence[_Opening], shelves: Mapping[str, Shelf]) -> bool:
        """Open what can be opened from the levels that are known; False when those are outdated."""
        known = {sku: shelf.know() for sku, shelf in shelves.items()}
        levels = {sku: level.copy() for sku, (level, _) in known.items()}
        opened = [one for one in openings if self._take(one, levels)]
        if not opened:
            return True
        changed = {line.sku for one in opened for line in one.record.lines}
        written = {sku: shelves[sku].drop(levels[sku], *known[sku]) for sku in changed}
        updates = {shelves[sku].key: (levels[sku].encode(), known[sku][1]) for sku in sorted(changed)}
        updates |= {f"order.{one.order_id}": (one.record.encode(), 0) for one in opened}
        try:
            revisions = self._bucket.update_all(updates)
        except RevisionConflict:
            return False
        except ApiError as error:
            logger.debug("No orders were opened together: %s", error)
            return True
        for sku in changed:
            shelves[sku].changed(levels[sku], revisions[shelves[sku].key], written[sku])
        for one in opened:
            one.found = Found(one.record, revisions[f"order.{one.order_id}"], fresh=True)
        return True

    def _take(self, opening: _Opening, levels: Mapping[str, Level]) -> bool:
        """Take an order's pieces, if all are there and it has taken none before."""
        lines = opening.record.lines
        if any(
            levels[line.sku].pieces < line.quantity or opening.order_id in levels[line.sku].notes
            for line in lines
        ):
            return False
        for line in lines:
            levels[line.sku].pieces -= line.quantity
            levels[line.sku].notes[opening.order_id] = Note(TAKEN, line.quantity, self._now())
        return True

    def _read_again(self, openings: Sequence[_Opening], shelves: Sequence[Shelf]) -> list[_Opening]:
        """Read levels that seem to be outdated, in one request; returns the orders that have no record yet."""
        known = {shelf.key: shelf.know()[1] for shelf in shelves}
        for shelf in shelves:
            shelf.forget()
        newest = max(known, key=lambda key: known[key])
        if not known[newest]:
            return list(openings)
        records = {f"order.{one.order_id}": one for one in openings}
        found = self._bucket.get_many([*known, *records], since=(newest, known[newest]))
        for shelf in shelves:
            if shelf.key in found:
                shelf.heard(found[shelf.key])
        return [one for key, one in records.items() if key not in found]


def _in_turns(shelves: Sequence[Shelf], do: Callable[[], None]) -> None:
    """Do something in the turns of several shelves.

    Each has a `with` of its own. An interrupt may strike between any two lines of an ExitStack, too, and keep a turn.
    """
    if not shelves:
        do()
        return
    with shelves[0].turn:
        _in_turns(shelves[1:], do)
