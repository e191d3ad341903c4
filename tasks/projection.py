"""Adds the events of the stream to the read model, as far as the ledger confirms them.

Workers come through here for every event, and the front end for the event that it has just stored.
"""

from __future__ import annotations

from collections.abc import Callable

from .announcements import Testimony
from .events import Happened, order_id_of
from .orders import Orders, Stored, with_event
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

    def project(self, happened: Happened) -> Happened | None:
        """Add an event to its order's record; returns what the ledger confirms of it, None when that is nothing.

        Raises:
          UnusableEvent: When it names no order.
          OrderBusy: When others kept changing the record.
        """
        testimony = Testimony(self._stock, order_id_of(happened.event), self._now)
        confirmed = testimony.attested(happened, self._catalogue)
        if confirmed is not None:
            self._orders.project(confirmed)
        return confirmed


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
