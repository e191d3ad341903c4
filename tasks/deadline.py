"""Ends orders that are not final in time: each is cancelled as if its customer had asked for it. Ends offers, too, that
were not accepted in time.

The periodic actor `look_after_orders` comes through here. The request is noted in the ledger under the order, so asking
again, in this process or in another, asks for the same. A crash between two orders leaves the rest for the next minute.
So does an order that cannot end now, and it keeps no other from ending. One that moves on meanwhile, paid at the last
moment, is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from .compensation import NotCancellable
from .ledger import NewerRecord
from .stock import RecordBehind
from .unfinished import Unfinished, UnfinishedOrders

#: How many orders one run ends.
MAX_ENDED: Final = 500

logger = logging.getLogger(__name__)


class Deadline:
    """Asks for the end of orders that are too late.

    Parameters:
      unfinished: The orders that are not final.
      request_cancel: Asks that an order is cancelled, given its id and who asks.
      expire_offer: Ends an order whose offer was not accepted in time; False when there is nothing to end.
      after: Milliseconds after it was placed within which an order must be final.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        unfinished: UnfinishedOrders,
        request_cancel: Callable[[str, str], object],
        expire_offer: Callable[[str], bool],
        *,
        after: int,
        now: Callable[[], int],
    ) -> None:
        self._unfinished = unfinished
        self._request_cancel = request_cancel
        self._expire_offer = expire_offer
        self._after = after
        self._now = now

    def run(self) -> list[str]:
        """Ask for the end of the orders that are too late; returns their ids."""
        now, unfinished = self._now(), self._unfinished.all()
        before = now - self._after
        late = [one for one in unfinished if one.placed_at < before]
        expired = [one for one in unfinished if one.placed_at >= before and 0 < one.offered_until <= now]
        ended = self._end(late, self._cancel)
        self._end(expired, self._expire)
        return ended

    def _end(self, orders: Iterable[Unfinished], end: Callable[[str], None]) -> list[str]:
        """End orders, up to MAX_ENDED; returns their ids, without those that cannot end now."""
        ended: list[str] = []
        for one in orders:
            if len(ended) == MAX_ENDED:
                break
            if not self._unfinished.still_stands(one):
                continue  # it has moved on since: the next run looks at it
            try:
                end(one.order_id)
            except (NotCancellable, NewerRecord, RecordBehind) as refusal:
                logger.warning("%s", refusal, extra={"order_id": one.order_id})
            else:
                ended.append(one.order_id)
        return ended

    def _cancel(self, order_id: str) -> None:
        self._request_cancel(order_id, "deadline")
        logger.warning(
            "Order %s is cancelled: it was not completed in time.", order_id, extra={"order_id": order_id}
        )

    def _expire(self, order_id: str) -> None:
        if self._expire_offer(order_id):
            logger.info(
                "Order %s is cancelled: what was offered of it was not accepted in time.",
                order_id,
                extra={"order_id": order_id},
            )
