"""Adds the events of the stream to the read model, as far as the ledger confirms them.

Workers come through here for every event, and the front end for the event that it has just stored.
"""

from __future__ import annotations

from collections.abc import Callable

from .announcements import Testimony
from .events import Happened, order_id_of
from .orders import Orders
from .stock import Stock


class Projection:
    """Events on their way from the stream into the read model.

    Parameters:
      stock: The ledger.
      orders: The read model.
      now: The time in milliseconds.
    """

    def __init__(self, stock: Stock, orders: Orders, now: Callable[[], int]) -> None:
        self._stock = stock
        self._orders = orders
        self._now = now

    def project(self, happened: Happened) -> Happened | None:
        """Add an event to its order's record; returns what the ledger confirms of it, None when that is nothing.

        Raises:
          UnusableEvent: When it names no order.
          OrderBusy: When others kept changing the record.
        """
        testimony = Testimony(self._stock, order_id_of(happened.event), self._now)
        confirmed = testimony.attested(happened)
        if confirmed is not None:
            self._orders.project(confirmed)
        return confirmed
