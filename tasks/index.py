"""The index of the read model: which orders a customer has, which have a status, and which have a product.

A fold (`tasks.folds`) over the records of the read model. The bucket `orders` gives each write a revision, and is read
by what was written after one. So a position is the revision up to which records are indexed:

    read what was written after the position → change the lists of those orders → store lists and position, all or none

An order is put into a list as often as one likes and is there once. A record that is written again and again is indexed
as it is when its turn comes.

The index is behind, by seconds as a rule. So it says nothing of what was written after its position: a reader gets
those records themselves (`Recent`), and takes from the index what is older. What it finds there is looked up before it
is shown. So lists are right whether the index is kept or not, and nothing depends on it but their cost.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from typing import Final

from dramatiq_jetstream.errors import RevisionConflict, TopologyMissing

from .folds import Fold, Position, Progress, RebuildConflict, read_position, unseen
from .model import REASONED_STATUSES, STATUSES, Order, Wanted
from .ports import BatchBucket, Bucket, Entry
from .postings import LISTS, USED, Lists, Posting, Replaced, drop_empty, newest

BUCKET: Final = "orders-index"

#: How many records make a batch, and in how many lists they are at most: a batch has up to 1,000 documents.
_RECORDS: Final = 300
_LISTS: Final = 200

#: A place behind all others.
_NEWEST: Final = 2**63

#: How many times a change of lists is tried while other processes change them too.
_TRIES: Final = 50

#: The statuses in which most orders end, so that other lists are shorter.
_MOST: Final = frozenset({"confirmed", "shipped"})

#: How many records a reader gets beside the index; a reader of an index that is further behind does without it.
MAX_RECENT: Final = 20_000


@dataclass(frozen=True, slots=True)
class Brief:
    """What a list goes by of an order."""

    place: int
    order_id: str
    customer_id: str
    status: str
    skus: frozenset[str]

    @classmethod
    def of(cls, order: Order) -> Brief:
        return cls(order.place, order.order_id, order.customer_id, order.status, order.skus)

    @property
    def lists(self) -> list[str]:
        """The lists that the order is in whatever its status is, that of its customer first."""
        return [f"customer.{self.customer_id}", *(f"sku.{sku}" for sku in sorted(self.skus))]

    def can_be(self, wanted: Wanted) -> bool:
        """Whether it is wanted, as far as this tells."""
        return (
            wanted.customer_id in (None, self.customer_id)
            and wanted.status in (None, self.status)
            and (wanted.sku is None or wanted.sku in self.skus)
        )


class Indexer:
    """Keeps the index. Any number of processes may try to at once.

    Parameters:
      bucket: The index.
      records: The bucket of the read model.
      read: Reads an order out of a record, None when there is none in it.
    """

    def __init__(self, bucket: BatchBucket, records: Bucket, read: Callable[[Entry], Order | None]) -> None:
        self._bucket = bucket
        self._fold = Fold(bucket, LISTS)
        self._records = records
        self._read = read

    def advance(self, seconds: float = 20.0) -> bool:
        """Index what was written since; returns whether that is all.

        Parameters:
          seconds: No further batch is begun after that.
        """
        position = self._fold.begin()
        if position is not None and position.reached > self._records.newest_revision():
            position = self._fold.restart(position)  # the records were made again
        return position is not None and self._advance(position, seconds) is not None

    def rebuild(self, progress: Progress = unseen) -> None:
        """Make all lists again.

        Raises:
          RebuildConflict: When another process does the same.
        """
        last = self._records.newest_revision()

        def derive(position: Position) -> Position | None:
            return self._advance(position, math.inf, last, progress)

        self._fold.rebuild(derive)

    def forget(self, orders: Iterable[Order]) -> None:
        """Take orders out of the lists; they left the read model, or belong to no customer any more.

        Raises:
          RebuildConflict: When others kept changing the index.
        """
        remaining = iter([Brief.of(order) for order in orders if order.place])
        while batch := list(islice(remaining, _RECORDS // 3)):
            for _ in range(_TRIES):
                position = self._fold.begin()
                if position is not None and self._forget(position, batch):
                    break
                time.sleep(random.uniform(0, 0.2))
            else:
                raise RebuildConflict("The index kept changing: try again.")

    def forget_customer(self, customer_id: str, keeps: Callable[[str], bool]) -> None:
        """Take the orders of a customer out of their list, and the list away when that leaves it empty.

        Parameters:
          keeps: Whether an order, given by its id, still is the customer's.

        Raises:
          RebuildConflict: When others kept changing the index.
        """
        name = f"customer.{customer_id}"
        for _ in range(_TRIES):
            position = self._fold.begin()
            with contextlib.suppress(Replaced):
                if position is not None and self._clear(position, name, keeps):
                    return
            time.sleep(random.uniform(0, 0.2))
        raise RebuildConflict("The index kept changing: try again.")

    def _clear(self, position: Position | None, name: str, keeps: Callable[[str], bool]) -> bool:
        assert position is not None
        there = list(newest(self._bucket, position.generation, name, _NEWEST))
        gone = iter([one for one in there if not keeps(one.order_id)])
        while batch := list(islice(gone, _RECORDS)):
            lists = Lists(self._bucket, position)
            lists.read((name, one.place) for one in batch)
            for one in batch:
                lists.discard(name, one.place)
            position = self._fold.move(position, position.reached, lists.updates())
            if position is None:
                return False
        with contextlib.suppress(RevisionConflict):  # it has an order again
            drop_empty(self._bucket, position.generation, name)
        return True

    def _forget(self, position: Position, batch: list[Brief]) -> bool:
        lists = Lists(self._bucket, position)
        wanted = [(name, one) for one in batch for name in (*one.lists, f"status.{one.status}")]
        lists.read((name, one.place) for name, one in wanted)
        for name, one in wanted:
            found = lists.find(name, one.place)
            if found is not None and found.order_id == one.order_id:
                lists.discard(name, one.place)
        updates = lists.updates()
        return not updates or self._fold.move(position, position.reached, updates) is not None

    def _advance(
        self, position: Position, seconds: float, last: int = 0, progress: Progress = unseen
    ) -> Position | None:
        """Move a position to the end of the records; None when time was up, or another process was faster."""
        deadline = time.monotonic() + seconds
        entries = self._records.items(after=position.reached)
        while batch := self._batch(entries):
            moved = None if time.monotonic() > deadline else self._store(position, batch)
            if moved is None:
                return None
            position = moved
            progress(min(position.reached, last), last)
        return position

    def _batch(self, entries: Iterator[Entry]) -> list[tuple[int, Brief | None]]:
        """Return some records with their revisions."""
        batch: list[tuple[int, Brief | None]] = []
        lists: set[str] = set()
        for entry in islice(entries, _RECORDS):
            order = self._read(entry)
            # An order whose beginning is not known yet is written again with it.
            brief = Brief.of(order) if order is not None and order.place else None
            batch.append((entry.revision, brief))
            lists.update(brief.lists if brief is not None else ())
            if len(lists) >= _LISTS:
                break
        return batch

    def _store(self, position: Position, batch: list[tuple[int, Brief | None]]) -> Position | None:
        """Index a batch and move the position behind it."""
        # A record that was written again meanwhile comes twice.
        orders = list({brief.order_id: brief for _, brief in batch if brief is not None}.values())
        lists = Lists(self._bucket, position)
        lists.read((name, order.place) for order in orders for name in order.lists)
        # Each order is in the list of its customer, so that says which status it had.
        known = {order.order_id: lists.find(order.lists[0], order.place) for order in orders}
        left = {key: one.status for key, one in known.items() if one is not None and one.order_id == key}
        lists.read(
            (f"status.{status}", order.place)
            for order in orders
            for status in {order.status, left.get(order.order_id, order.status)}
        )
        for order in orders:
            posting = Posting(order.place, order.order_id, order.status)
            for name in (*order.lists, f"status.{order.status}"):
                lists.put(name, posting)
            if (old := left.get(order.order_id, order.status)) != order.status:
                lists.discard(f"status.{old}", order.place)
        return self._fold.move(position, batch[-1][0], lists.updates())


class Recent:
    """The orders whose records were written after a revision, as this process knows them. Any thread may use it.

    Each record is read once, not for each list.
    """

    def __init__(self, records: Bucket, read: Callable[[Entry], Order | None]) -> None:
        self._records = records
        self._read = read
        self._orders: dict[str, tuple[int, Brief]] = {}
        self._from = self._seen = 0
        self._lock = threading.Lock()

    def after(self, revision: int) -> Mapping[str, Brief]:
        """Return the orders, by their ids, whose records have a later revision."""
        with self._lock:
            if revision < self._from or revision > self._seen:
                self._orders.clear()
                self._seen = revision
            self._from = revision
            self._orders = {key: one for key, one in self._orders.items() if one[0] > revision}
            for entry in self._records.items(after=self._seen):
                order = self._read(entry)
                if order is not None and order.place:
                    self._orders[entry.key] = entry.revision, Brief.of(order)
                self._seen = max(self._seen, entry.revision)
            return {key: brief for key, (_, brief) in self._orders.items()}


class Index:
    """Finds orders by what the index has lists of. Any thread may use it.

    Parameters:
      bucket: The index.
      records: The bucket of the read model.
      read: Reads an order out of a record, None when there is none in it.
    """

    def __init__(self, bucket: Bucket, records: Bucket, read: Callable[[Entry], Order | None]) -> None:
        self._bucket = bucket
        self._records = records
        self._recent = Recent(records, read)

    def find(self, wanted: Wanted, before: int) -> Iterator[tuple[int, str]] | None:
        """Yield the places and ids of orders that can be wanted, newest first; None where the index is of no use.

        Look each of them up: what is found is what an order was when it was indexed, and some do not fit.

        Raises:
          Replaced: When the index was made again meanwhile, by the iterator as well: ask again.
        """
        names = _lists_for(wanted)
        position = None if names is None else self._position()
        return None if names is None or position is None else self._find(names, position, wanted, before)

    def all(self, before: int) -> Iterator[tuple[int, str]]:
        """Yield the places and ids of all orders, newest first; none where the index is of no use.

        Raises:
          Replaced: As `find`.
        """
        return self._find_in([f"status.{status}" for status in STATUSES], Wanted(), before)

    def anonymous(self, before: int) -> Iterator[tuple[int, str]]:
        """Yield the places and ids of the orders that are no customer's, as `all`."""
        return self._find_in(["customer."], Wanted(customer_id=""), before)

    def _find_in(self, names: list[str], wanted: Wanted, before: int) -> Iterator[tuple[int, str]]:
        position = self._position()
        return iter(()) if position is None else self._find(names, position, wanted, before)

    def _position(self) -> Position | None:
        """Return the position of the index, None where it is of no use."""
        try:
            position = read_position(self._bucket, USED)
        except TopologyMissing:
            return None  # an earlier version has set the buckets up
        if position is None or self._records.newest_revision() - position.reached > MAX_RECENT:
            return None
        return position

    def _find(
        self, names: list[str], position: Position, wanted: Wanted, before: int
    ) -> Iterator[tuple[int, str]]:
        recent = self._recent.after(position.reached)
        fresh = sorted(
            (
                (one.place, one.order_id)
                for one in recent.values()
                if one.place < before and one.can_be(wanted)
            ),
            reverse=True,
        )
        lists = [newest(self._bucket, position.generation, name, before) for name in names]
        indexed = (
            (one.place, one.order_id)
            for one in merge(*lists, key=lambda one: one.place, reverse=True)
            if one.order_id not in recent and wanted.status in (None, one.status)
        )
        yield from merge(fresh, indexed, reverse=True)


def _lists_for(wanted: Wanted) -> list[str] | None:
    """Return the lists in which all orders are that are wanted, the shortest that there are; None for all orders."""
    if wanted.customer_id is not None:
        return [f"customer.{wanted.customer_id}"]
    if wanted.failure is not None:
        return [f"status.{status}" for status in REASONED_STATUSES if wanted.status in (None, status)]
    if wanted.status is not None and wanted.status not in _MOST:
        return [f"status.{wanted.status}"]
    if wanted.sku is not None:
        return [f"sku.{wanted.sku}"]
    return None if wanted.status is None else [f"status.{wanted.status}"]
