"""The stock of every product and the record of every order (`tasks.ledger`), together in one bucket.

They are together because they change together: taking stock for an order and recording that it was taken is
one atomic batch, with a compare-and-set on each key. So nothing is ever taken twice, given back twice or
taken without a record, wherever a process is killed, and an order of several products gets all or none.

Keys: `sku.{sku}` holds the pieces available, as decimal digits; `order.{order_id}` an encoded record.

The changes that the threads of one process ask for at the same time go into one batch: a product that
everybody wants costs one compare-and-set for all of them, instead of a race that all but one lose.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .ledger import Record
from .ports import Bucket

BUCKET: Final = "stock"

#: How many orders one batch may change; JetStream allows 1,000 messages in one.
MAX_BATCH: Final = 100

Levels = dict[str, int]

# Given the order's record (None: there is none) and the levels, returns the record to store and changes the
# levels, or returns None to leave everything as it is.
Decision = Callable[[Record | None, Levels], Record | None]


class StockBusy(Exception):
    """Others kept changing the same stock for the whole time allowed; trying again is safe."""


@dataclass(frozen=True, slots=True)
class Found:
    """An order's record and its revision; `fresh` when the call that returns it has just stored it."""

    record: Record
    revision: int
    fresh: bool = False


class _Change:
    """A change to one order that waits for its batch."""

    __slots__ = ("decide", "error", "existing", "order_id", "outcome", "skus")

    def __init__(self, order_id: str, skus: frozenset[str], decide: Decision, existing: Found | None) -> None:
        self.order_id = order_id
        self.skus = skus
        self.decide = decide
        self.existing = existing
        self.outcome: Found | None = None
        self.error: BaseException | None = None

    @property
    def settled(self) -> bool:
        return self.outcome is not None or self.error is not None


class Stock:
    """The stock and the orders' records.

    Parameters:
      bucket: Where they are kept.
      initial: The pieces of each sku that there are before the first order.
      timeout: Milliseconds for which a change competes with others before StockBusy.
    """

    def __init__(self, bucket: Bucket, initial: Mapping[str, int], *, timeout: int = 10_000) -> None:
        self._bucket = bucket
        self._initial = initial
        self._timeout = timeout
        self._waiting: deque[_Change] = deque()
        self._turn = threading.Lock()

    def available(self) -> dict[str, int]:
        """Return the pieces available of every sku."""
        return {sku: self._level(sku)[0] for sku in self._initial}

    def find(self, order_id: str) -> Found | None:
        """Return the record of an order."""
        entry = self._bucket.get(f"order.{order_id}")
        return None if entry is None else Found(Record.decode(entry.value), entry.revision)

    def open(self, order_id: str, wanted: Record) -> Found:
        """Store the first record of an order and take what it holds; returns what is recorded then.

        That is the record of before when the order has one already, and a rejection when stock is short.
        """

        def decide(existing: Record | None, levels: Levels) -> Record | None:
            if existing is not None:
                return None
            for line in wanted.lines:
                if levels[line.sku] < line.quantity:
                    return wanted.rejected(
                        "OUT_OF_STOCK", f"{line.quantity} × {line.sku} ordered, {levels[line.sku]} in stock"
                    )
            for line in wanted.lines:
                levels[line.sku] -= line.quantity
            return wanted

        return self._settle(_Change(order_id, frozenset(line.sku for line in wanted.lines), decide, None))

    def forward(self, order_id: str, found: Found, record: Record) -> Found:
        """Replace the record that was found; returns the newer one when somebody else was faster."""
        try:
            revision = self._bucket.update(f"order.{order_id}", record.encode(), revision=found.revision)
        except RevisionConflict:
            current = self.find(order_id)
            if current is None:
                raise
            return current
        return Found(record, revision, fresh=True)

    def release(self, order_id: str, found: Found, at: int) -> Found:
        """Give back what a declined order holds, and record that; returns what is recorded then."""

        def decide(existing: Record | None, levels: Levels) -> Record | None:
            if existing is None or existing.state != "declined":
                return None
            for line in existing.lines:
                levels[line.sku] += line.quantity
            return existing.forward("released", at)

        return self._settle(
            _Change(order_id, frozenset(line.sku for line in found.record.lines), decide, found)
        )

    def _level(self, sku: str) -> tuple[int, int]:
        """Return the pieces available and the revision of that number, which starts as the initial stock."""
        while True:
            entry = self._bucket.get(f"sku.{sku}")
            if entry is not None:
                return int(entry.value), entry.revision
            initial = self._initial[sku]
            try:
                return initial, self._bucket.create(f"sku.{sku}", b"%d" % initial)
            except KeyExists:
                continue

    def _settle(self, change: _Change) -> Found:
        self._waiting.append(change)
        with self._turn:
            # Whoever has the turn commits what all have left in the queue meanwhile, perhaps ours too.
            while not change.settled:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
                try:
                    self._commit(batch)
                except BaseException as error:
                    # The others are told in words of their own: an interrupt is meant for this thread only.
                    for other in batch:
                        other.error = error if other is change else StockBusy(f"the batch failed: {error!r}")
                    if change not in batch or not isinstance(error, Exception):
                        raise
        if change.error is not None:
            raise change.error
        assert change.outcome is not None
        return change.outcome

    def _commit(self, batch: list[_Change]) -> None:
        deadline = time.monotonic() + self._timeout / 1000
        attempt = 0
        while not self._try_commit(batch):
            attempt += 1
            if time.monotonic() > deadline:
                raise StockBusy(f"the stock was changed by others {attempt} times while this order tried to.")
            # Random, so that two processes do not keep meeting.
            time.sleep(random.uniform(0, min(0.002 * 2**attempt, 0.1)))
            for change in batch:
                change.existing = self.find(change.order_id)

    def _try_commit(self, batch: list[_Change]) -> bool:
        """Decide every change on what is stored now and store it all at once; False when that changed."""
        found = {sku: self._level(sku) for sku in sorted(set().union(*(change.skus for change in batch)))}
        levels = {sku: level for sku, (level, _) in found.items()}
        # One order may be in the batch twice: the second sees what the first decided.
        records = {change.order_id: change.existing for change in batch}
        decided: dict[str, Record] = {}
        decided_by: list[_Change] = []
        for change in batch:
            existing = records[change.order_id]
            current = decided.get(change.order_id) or (existing.record if existing else None)
            record = change.decide(current, levels)
            if record is not None:
                decided[change.order_id] = record
                decided_by.append(change)
        updates = {
            f"order.{order_id}": (
                record.encode(),
                existing.revision if (existing := records[order_id]) else 0,
            )
            for order_id, record in decided.items()
        }
        for sku, (before, revision) in found.items():
            if levels[sku] != before:
                updates[f"sku.{sku}"] = (b"%d" % levels[sku], revision)
        revisions: dict[str, int] = {}
        if updates:
            try:
                revisions = self._bucket.update_all(updates)
            except RevisionConflict:
                return False
        for change in batch:
            order_id = change.order_id
            if order_id in decided:
                outcome = Found(decided[order_id], revisions[f"order.{order_id}"], change in decided_by)
            else:
                existing = records[order_id]
                assert existing is not None, "a change that is not decided leaves a record that was there"
                outcome = existing
            change.outcome = outcome
        return True
