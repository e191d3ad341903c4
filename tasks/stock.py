"""The stock of all products and the record of every order (`tasks.ledger`), in one bucket.

Keys: `level.{sku}` holds the pieces available of one product and notes about the orders that changed them
(`tasks.levels`); `order.{order_id}` holds an order's record. (`tasks.claims`, `tasks.notes` and `tasks.products` keep
theirs in the same bucket.) No key is shared by all orders, so orders of different products do not compete.

The record decides. An order takes from its products one after the other, by their skus, and leaves a note at each::

    take from every product → create the record as held     → drop the notes
    take … one runs short   → create the record as rejected → give back what was taken, note by note
    take what there is      → create the record as offered  → drop the notes   (where offers are made)

Where nothing stands against it, that is done for several orders at once (`tasks.openings`).

The record is created once, so of several runs of a step, and of a cancel, one wins, and the others do what its
record says. A process that is killed in between leaves notes: the next run of the step finds them, takes the rest, and
carries on; if it finds a record that holds nothing, it gives the notes' pieces back. Until then they are not sold to
others. A step that is never repeated leaves its notes until an operator cancels the order.

Giving back is the same in the other direction: the record says that the order is giving back (`declined`,
`cancelling`, `returning`), each product gets its pieces and a note, the record says that this is done, the notes are
dropped.

In a cluster a server that was the leader may answer reads for some seconds from what it had (see the library's
`kv`). Decisions do not suffer, because they compare-and-set; a record that is behind what is known of it is read
once more, linearizably. So a forged event, which the record contradicts for good, costs a write and holds no thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .claims import Claim, Claims
from .ledger import PricedItem, Record
from .levels import (
    GIVEN_BACK,
    GIVES_BACK,
    PREFIX,
    TAKEN,
    Adjustment,
    Found,
    Level,
    Note,
    Shelf,
    Short,
    StockBusy,
)
from .notes import Notes
from .ports import Bucket, Entry
from .takeover import take_over

__all__ = ["BUCKET", "Found", "InvalidAdjustment", "RecordBehind", "Stock", "StockBusy"]

BUCKET: Final = "stock"

#: How many records a process remembers that it wrote, at most, and for how many seconds.
REMEMBERED: Final = 5_000
RECALLED_SECONDS: Final = 60.0


class InvalidAdjustment(ValueError):
    """The stock cannot be changed so; the message says why."""


class RecordBehind(Exception):
    """A server answers with a record that is older than what is known of it; trying again is safe."""


class Looked(NamedTuple):
    """What was found of several orders: their claims, which have a record, and at which revision each product was known
    before.
    """

    claims: Mapping[str, Claim]
    recorded: frozenset[str]
    seen_at: Mapping[str, int]


class Stock:
    """The stock and the orders' records.

    Parameters:
      bucket: Where they are kept.
      initial: The pieces of each sku that there are before the first order.
      now: The time in milliseconds.
      timeout: Milliseconds for which a change competes with others before StockBusy.
      sweep_after: Milliseconds after which a note that was not dropped is taken for one left behind.
    """

    def __init__(
        self,
        bucket: Bucket,
        initial: Mapping[str, int],
        now: Callable[[], int],
        *,
        timeout: int = 10_000,
        sweep_after: int = 30_000,
    ) -> None:
        #: The claims on order ids and the notes on orders, in the same bucket.
        self.claims = Claims(bucket)
        self.notes = Notes(bucket)
        self._bucket = bucket
        self._initial = initial
        self._now = now
        self._timeout = timeout
        self._sweep_after = sweep_after
        self._taken_over = False
        self._shelves: dict[str, Shelf] = {}
        self._lock = threading.Lock()
        # Records as this process last wrote them, oldest first; others may have gone on from there.
        self._recent: OrderedDict[str, tuple[Found, float]] = OrderedDict()

    # Reading

    def available(self) -> dict[str, int]:
        """Return the pieces available of every sku."""
        self._take_over()
        found = {
            entry.key.removeprefix(PREFIX): Level.decode(entry.value).pieces
            for entry in self._bucket.items(PREFIX)
        }
        return {**self._initial, **found}

    def find(self, order_id: str, *, linearizable: bool = False) -> Found | None:
        """Return the record of an order."""
        entry = self._bucket.get(f"order.{order_id}", linearizable=linearizable)
        return None if entry is None else Found(Record.decode(entry.value), entry.revision)

    def find_newer(self, order_id: str, is_newer: Callable[[Found | None], bool]) -> Found | None:
        """Return the record of an order; one that seems to be behind is read again, so that it is not."""
        found = self.find(order_id)
        return found if is_newer(found) else self.find(order_id, linearizable=True)

    def recall(self, order_id: str) -> Found | None:
        """Return the record of an order as this process wrote it a moment ago.

        Others may have gone on from there; `forward` finds out. Not older, because a step that goes on from an outdated
        record asks the gateway again, which knows the charge for a limited time only.
        """
        with self._lock:
            found, written = self._recent.get(order_id, (None, 0.0))
        return found if time.monotonic() - written < RECALLED_SECONDS else None

    def _remember(self, order_id: str, found: Found) -> Found:
        with self._lock:
            self._recent.pop(order_id, None)
            self._recent[order_id] = Found(found.record, found.revision), time.monotonic()
            if len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        return found

    def heard(self, entry: Entry) -> None:
        """Take note of a newer level; for a watch, so that fewer changes are made to outdated ones."""
        shelf = self._shelves.get(entry.key.removeprefix(PREFIX))
        if shelf is not None:
            shelf.heard(entry)

    # Changing

    def open(
        self, order_id: str, wanted: Record, offer: Callable[[Mapping[str, int]], Record] | None = None
    ) -> Found:
        """Store the first record of an order and take what it holds; returns what is recorded then.

        That is the record of before when the order has one already; when stock is short an offer, or a rejection.

        Parameters:
          offer: Makes the record that offers the pieces which there are, by sku; without it nothing is offered.
        """
        self._take_over()
        shortage = ""
        taken: dict[str, int] = {}
        for line in _in_order(wanted.lines):
            match self._shelf(line.sku).take(order_id, line.quantity, in_part=offer is not None):
                case Found() as found:
                    return self._opened(order_id, wanted.lines, found)
                case Short(there):
                    pass
                case Note(quantity=there):
                    # A run that makes offers may have taken less.
                    taken[line.sku] = there
            if there < line.quantity:
                shortage = shortage or f"{line.quantity} × {line.sku} ordered, {there} in stock"
                if offer is None:
                    break
        decided = wanted
        if shortage:
            rejected = wanted.rejected("OUT_OF_STOCK", shortage)
            decided = rejected if offer is None or not taken else offer(taken)
        found = self._create(order_id, decided)
        # Another run may have taken more, before it left its record or was killed.
        lines = [line for line in wanted.lines if line.sku in taken] if found.fresh else wanted.lines
        return self._opened(order_id, lines, found)

    def look(self, order_ids: Sequence[str], skus: Iterable[str]) -> Looked:
        """Look for the claims and the records of several orders, with one request.

        When that fails, all levels are read again: what is known of them may be of another life of the store, whose
        revisions no server will ever have.

        Parameters:
          skus: The products of which a level is known before. Where none of them is known, nothing is looked for.
        """
        self._take_over()
        # Known before the look, as `tasks.levels` asks for.
        seen_at = {sku: self._shelves[sku].revision for sku in skus if sku in self._shelves}
        newest = max(seen_at, key=lambda sku: seen_at[sku], default=None)
        if newest is None or seen_at[newest] <= 0:
            return Looked({}, frozenset(), {})
        keys = [f"{kind}.{order_id}" for order_id in order_ids for kind in ("claim", "order")]
        try:
            found = self._bucket.get_many(keys, since=(f"{PREFIX}{newest}", seen_at[newest]))
        except BaseException:
            for shelf in list(self._shelves.values()):
                shelf.forget()
            raise
        claims: dict[str, Claim] = {}
        for order_id in order_ids:
            # A claim that is missing, or cannot be read, is a matter of its order's own run.
            with suppress(LookupError, TypeError, ValueError):
                claims[order_id] = Claim.decode(found[f"claim.{order_id}"].value)
        recorded = frozenset(order_id for order_id in order_ids if f"order.{order_id}" in found)
        return Looked(claims, recorded, seen_at)

    def take(self, wanted: Mapping[str, Record], seen_at: Mapping[str, int]) -> list[str]:
        """Take what several orders hold, with one change for each product; returns those of which all is taken.

        What is taken for the others, their notes say, until their records do.

        Parameters:
          wanted: The records that the orders shall have, which had none when they were looked for.
          seen_at: What was known of each product before that.
        """
        left = {order_id: {line.sku: line.quantity for line in wanted[order_id].lines} for order_id in wanted}
        for sku in sorted({sku for quantities in left.values() for sku in quantities}):
            quantities = {order_id: lines[sku] for order_id, lines in left.items() if sku in lines}
            if not quantities:
                continue
            for order_id, done in self._shelf(sku).take_for(quantities, seen_at.get(sku, -1)).items():
                if not isinstance(done, Note) or done.quantity != quantities[order_id]:
                    del left[order_id]
        return list(left)

    def record(self, order_id: str, taken: Record) -> Found:
        """Store the first record of an order for which all was taken; returns what is recorded then."""
        return self._opened(order_id, taken.lines, self._create(order_id, taken))

    def _opened(self, order_id: str, lines: Iterable[PricedItem], found: Found) -> Found:
        """Do with the notes of an order what its record says."""
        taken = found.record.taken
        for sku in taken:
            self._shelf(sku).written(order_id, TAKEN)
        self._undo(order_id, [line for line in lines if line.sku not in taken])
        return found

    def _undo(self, order_id: str, lines: Iterable[PricedItem]) -> None:
        for line in _in_order(lines):
            self._shelf(line.sku).undo(order_id)

    def restock(self, sku: str, pieces: int, adjustment_id: str, *, by: str, reason: str) -> Adjustment:
        """Add pieces of a product (negative: take them away); an id that was used before changes nothing more.

        Raises:
          InvalidAdjustment: When there is no such product, or fewer pieces than are taken away.
        """
        return self._adjust(sku, lambda there: there + pieces, adjustment_id, by, reason)

    def correct(self, sku: str, pieces: int, adjustment_id: str, *, by: str, reason: str) -> Adjustment:
        """Set the pieces that can be sold to what was counted; what orders hold is not among them.

        Raises:
          InvalidAdjustment: When there is no such product.
        """
        return self._adjust(sku, lambda _: pieces, adjustment_id, by, reason)

    def _adjust(
        self, sku: str, change: Callable[[int], int], adjustment_id: str, by: str, reason: str
    ) -> Adjustment:
        if self.level(sku)[1] == 0 and sku not in self._initial:
            raise InvalidAdjustment(f"There is no product {sku!r}.")
        done = self._shelf(sku).adjust(adjustment_id, change, by, reason)
        if isinstance(done, Short):
            raise InvalidAdjustment(f"There are only {done.available} pieces of {sku}.")
        return done

    def level(self, sku: str) -> tuple[Level, int]:
        """Return the level of a product and its revision, 0 where it has none yet."""
        self._take_over()
        entry = self._bucket.get(f"{PREFIX}{sku}")
        if entry is None:
            return Level(self._initial.get(sku, 0)), 0
        return Level.decode(entry.value), entry.revision

    def levels(self) -> dict[str, tuple[Level, int]]:
        """Return the level of each product that has one, with its revision."""
        self._take_over()
        entries = self._bucket.items(PREFIX)
        return {
            entry.key.removeprefix(PREFIX): (Level.decode(entry.value), entry.revision) for entry in entries
        }

    def adjustments(self, sku: str) -> list[Adjustment]:
        """Return the newest adjustments of a product, oldest first."""
        return self.level(sku)[0].adjustments

    def release(self, order_id: str, at: int) -> Found:
        """Give back what a declined order holds, and record that; returns what is recorded then.

        Raises:
          RecordBehind: When the record says nothing of the payment that was declined.
        """
        found = self.find_newer(
            order_id,
            lambda now: now is not None and now.record.state not in ("offered", "held", "cancelling"),
        )
        if found is None or found.record.state in ("offered", "held"):
            raise RecordBehind(f"the record of order {order_id} cannot be read as it is now.")
        return self._give_back(order_id, found, at) if found.record.state == "declined" else found

    def cancel(self, order_id: str, at: int, reason: str) -> Found:
        """End an order that is neither paid nor declined nor over, give back what it holds; returns what is recorded.

        What is held is given back in two steps: first the record says that the order is being cancelled, so that a
        payment which is captured meanwhile does not find it held. Cancelling again carries on from there.

        Raises:
          RecordBehind: When the record cannot be read as it is now.
        """
        self._take_over()
        found = self.find(order_id)
        if found is None:
            found = self._create(order_id, Record("cancelled", {"cancelled": at}, reason=reason))
        if not found.record.taken:
            claim = self.claims.find(order_id)
            self._undo(order_id, () if claim is None else claim.lines)
        if found.record.state in ("offered", "held"):
            # A faster process may have moved it on, and from there it does not come back.
            found = self.forward(order_id, found, found.record.forward("cancelling", at, reason=reason))
        return self._give_back(order_id, found, at) if found.record.state == "cancelling" else found

    def bring_back(self, order_id: str, found: Found, at: int) -> Found:
        """Put the goods of an order that is being returned in stock again, unless they are written off, and record that
        it is returned; returns what is recorded then.
        """
        return self._give_back(order_id, found, at) if found.record.state == "returning" else found

    def _give_back(self, order_id: str, found: Found, at: int) -> Found:
        """Give back what an order holds whose record says that it is about to, then record that this is done."""
        self._take_over()
        state, lines = found.record.state, _in_order(found.record.comes_back)
        for line in lines:
            moved_on = self._shelf(line.sku).give_back(order_id, line.quantity, found)
            if isinstance(moved_on, Found):
                return moved_on  # another process was faster
        while found.record.state == state:
            # A chargeback may change the record and leave its state.
            found = self.forward(order_id, found, found.record.forward(GIVES_BACK[state], at))
        for line in lines:
            self._shelf(line.sku).written(order_id, GIVEN_BACK)
        return found

    def _create(self, order_id: str, record: Record) -> Found:
        """Store the first record of an order; returns the one of another run that was faster.

        Raises:
          RecordBehind: When the server says that one was, and the record does not show it.
        """
        try:
            revision = self._bucket.create(f"order.{order_id}", record.encode())
        except KeyExists as conflict:
            # The other run may have gone on from there.
            found = self.find_newer(order_id, bool)
            if found is None:
                raise RecordBehind(
                    f"the record of order {order_id} cannot be read as it is now."
                ) from conflict
            return found
        return self._remember(order_id, Found(record, revision, fresh=True))

    def forward(self, order_id: str, found: Found, record: Record) -> Found:
        """Replace the record that was found; returns the newer one when another process was faster.

        Raises:
          RecordBehind: When the server says that one was, and the record does not show it.
        """
        try:
            revision = self._bucket.update(f"order.{order_id}", record.encode(), revision=found.revision)
        except RevisionConflict as conflict:
            current = self.find_newer(order_id, lambda now: now is not None and now.revision > found.revision)
            if current is None or current.revision <= found.revision:
                raise RecordBehind(
                    f"the record of order {order_id} cannot be read as it is now."
                ) from conflict
            return current
        return self._remember(order_id, Found(record, revision, fresh=True))

    # The levels

    def _shelf(self, sku: str) -> Shelf:
        shelf = self._shelves.get(sku)
        if shelf is None:
            with self._lock:
                shelf = self._shelves.setdefault(
                    sku,
                    Shelf(
                        sku,
                        self._initial.get(sku, 0),
                        self._bucket,
                        self._now,
                        timeout=self._timeout,
                        sweep_after=self._sweep_after,
                    ),
                )
        return shelf

    def _take_over(self) -> None:
        """See to it, once, that every product has its key."""
        if not self._taken_over:
            take_over(self._bucket, self._initial)
            self._taken_over = True


def _in_order(lines: Iterable[PricedItem]) -> list[PricedItem]:
    """Return lines in the one order in which all orders take them."""
    return sorted(lines, key=lambda line: line.sku)
