"""Adds the events of the stream to the read model, as far as the ledger confirms them.

Workers come through here for every event, and the front end for the event that it has just stored.
"""

from __future__ import annotations

from collections.abc import Callable

from .announcements import Testimony, confirmed_by
from .claims import Claim
from .events import Happened, order_id_of
from .orders import Orders, Recorded, Stored, with_event
from .products import Catalogue
from .stock import Stock


class Projection:
    """Events on their way from the stream into the read model.

    Parameters:
      stock: The ledger.
      orders: The read model.
      catalogue: The products and their prices.
      now: The time in milliseconds.
    """

    def __init__(self, stock: Stock, orders: Orders, catalogue: Catalogue, now: Callable[[], int]) -> None:
        self._stock = stock
        self._orders = orders
        self._catalogue = catalogue
        self._now = now

    def project(self, happened: Happened, claim: Claim | None = None) -> Recorded | None:
        """Add an event to its order's record; returns the record as it is then, None when the ledger confirms nothing.

        The record is asked first. One that has the event had it confirmed, so the ledger need not be asked again.

        Parameters:
          claim: What the order's id was claimed with, of an event that was just published: its record is hardly there.

        Raises:
          UnusableEvent: When it names no order.
          OrderBusy: When others kept changing the record.
        """
        order_id = order_id_of(happened.event)
        known = self._orders.recorded(happened) if claim is None else Recorded(order_id, None, 0)
        if known.has(happened):
            return known
        written = self._recall(happened, known)
        if written is not None:
            return written
        testimony = Testimony(self._stock, order_id, self._now, claim)
        confirmed = testimony.attested(happened, self._catalogue)
        return None if confirmed is None else self._orders.project(confirmed, known)

    def _recall(self, happened: Happened, known: Recorded) -> Recorded | None:
        """Add an event that this process itself wrote into the ledger; returns None when the ledger has to be asked.

        A record of the ledger only moves forward, so what it confirmed once it confirms for good, until its order is
        erased or archived. Both change the record of the read model as well, and then nothing is added here. Of an
        order without a record nothing tells whether it was archived.
        """
        found = self._stock.recall(known.order_id)
        # A record that was read just now may be that of an erased order already.
        if (
            found is None
            or known.stored is None
            or found.record.customer_id != known.stored.get("customer_id")
        ):
            return None
        confirmed = confirmed_by(found.record, happened)
        return None if confirmed is None else self._orders.add(confirmed, known)


def restated(existing: Stored | None, testimony: Testimony) -> Stored | None:
    """Return a record with what the ledger confirms of it, in the ledger's words; None when that is nothing."""
    if existing is None:
        return None
    record: Stored = {**existing, "events": {}}
    for key, fact in existing["events"].items():
        said = testimony.said(key)
        if said is not None:
            place = Happened(said, fact["sequence"], fact["at"], existing.get("trace_id"))
            record = with_event(record, place)
        elif key == "created" and testimony.is_known:
            # The ledger has not what an order asked for that breaks the rules, or that is older than claims.
            record["events"] = {**record["events"], key: fact}
    return record if record["events"] else None
