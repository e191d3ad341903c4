"""Ends orders that are not final in time: each is cancelled as if its customer had asked for it.

The periodic actor `look_after_orders` comes through here. The request is noted in the ledger under the order, so asking
again, in this process or in another, asks for the same. A crash between two orders leaves the rest for the next minute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from .compensation import NotCancellable
from .unfinished import UnfinishedOrders

#: How many orders one run ends.
MAX_ENDED: Final = 500

logger = logging.getLogger(__name__)


class Deadline:
    """Asks for the end of orders that are too late.

    Parameters:
      unfinished: The orders that are not final.
      request_cancel: Asks that an order is cancelled, given its id and who asks.
      after: Milliseconds after it was placed within which an order must be final.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        unfinished: UnfinishedOrders,
        request_cancel: Callable[[str, str], object],
        *,
        after: int,
        now: Callable[[], int],
    ) -> None:
        self._unfinished = unfinished
        self._request_cancel = request_cancel
        self._after = after
        self._now = now

    def run(self) -> list[str]:
        """Ask for the end of the orders that are too late; returns their ids."""
        before = self._now() - self._after
        late = [one.order_id for one in self._unfinished.all() if one.placed_at < before][:MAX_ENDED]
        for order_id in late:
            try:
                self._request_cancel(order_id, "deadline")
            except NotCancellable as refusal:
                logger.warning("%s", refusal, extra={"order_id": order_id})
            else:
                logger.warning(
                    "Order %s is cancelled: it was not completed in time.",
                    order_id,
                    extra={"order_id": order_id},
                )
        return late
