"""Finds orders that have not moved for too long, reports them, and calls the step that they wait for again.

The periodic actor `look_after_orders` comes through here once a minute, and `python -m tasks.operate stuck` asks the
same of all orders. An order may stand still for a reason: its step was given up and waits for an operator, the payment
gateway is away, or others wait before it in the queue. Such an order is reported and left alone. An order without such
a reason has lost its event or its message, because an operator purged a queue or a dead letter expired; its event is
published again. An order that is offered waits for its customer, and is none of these.

An order is called again once in STUCK_AFTER: a key with that time to live notes it, before the event is published.
A crash between the two costs the order one more STUCK_AFTER.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from dramatiq_jetstream.errors import KeyExists
from dramatiq_jetstream.queues import QueueStats

from .ports import Bucket
from .unfinished import Unfinished, UnfinishedOrders

#: How many orders one run names in the log, and calls again.
MAX_NAMED: Final = 20
MAX_CALLED: Final = 500

#: The queue of the step that an order of each status waits for.
QUEUES: Final = {"accepted": "orders", "reserved": "payments", "paid": "orders"}

FAILED: Final = "its step was given up: see `python -m tasks.operate stuck`"
AWAY: Final = "the payment gateway is away"
WAITS: Final = "its queue is behind"
PAUSED: Final = "its queue is paused"
LOST: Final = "nothing is on its way"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """An order that has not moved, and why."""

    order: Unfinished
    reason: str


class Standstill:
    """Looks after orders that do not move.

    Parameters:
      unfinished: The orders that are not final.
      notes: The bucket in which it is noted that an order was called again.
      queue_stats: Counts a queue.
      gateway_away: Returns since when the payment gateway is away, None while it answers.
      redrive: Has the steps that orders wait for done again; yields what was done about each.
      after: Milliseconds without a move after which an order is looked after.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        unfinished: UnfinishedOrders,
        notes: Bucket,
        queue_stats: Callable[[str], QueueStats],
        gateway_away: Callable[[], int | None],
        redrive: Callable[[Iterable[str]], Iterator[tuple[str, str]]],
        *,
        after: int,
        now: Callable[[], int],
    ) -> None:
        self._unfinished = unfinished
        self._notes = notes
        self._queue_stats = queue_stats
        self._gateway_away = gateway_away
        self._redrive = redrive
        self._after = after
        self._now = now

    def standing(self) -> list[Standing]:
        """Return the orders that have not moved for too long, longest first."""
        before = self._now() - self._after
        late = [one for one in self._unfinished.all() if one.moved_at < before and not one.offered_until]
        reasons = {queue: self._reason(queue) for queue in {_queue_of(one) for one in late}}
        return [Standing(one, FAILED if one.status == "failed" else reasons[_queue_of(one)]) for one in late]

    def run(self) -> list[Standing]:
        """Report the orders that stand still, call those again that nothing calls; return them all."""
        found = self.standing()
        for standing in found[:MAX_NAMED]:
            one = standing.order
            minutes = (self._now() - one.moved_at) // 60_000
            logger.warning(
                "Order %s is %s and has not moved for %d minutes: %s.",
                *(one.order_id, one.status, minutes, standing.reason),
                extra={"order_id": one.order_id, "status": one.status, "standing_minutes": minutes},
            )
        if len(found) > MAX_NAMED:
            logger.warning("%d further orders do not move.", len(found) - MAX_NAMED)
        lost = [standing.order for standing in found if standing.reason == LOST]
        calls = [one.order_id for one in lost[:MAX_CALLED] if self._may_call(one)]
        for order_id, done in self._redrive(calls) if calls else ():
            logger.warning("Order %s: %s.", order_id, done, extra={"order_id": order_id})
        self._unfinished.move_mark()
        return found

    def _reason(self, queue: str) -> str:
        if queue == "payments" and self._gateway_away() is not None:
            return AWAY
        stats = self._queue_stats(queue)
        if stats.paused:
            return PAUSED
        # Only what has waited since the order last moved can be what the order waits for.
        return WAITS if (stats.oldest_ready_age or 0) > self._after / 2 else LOST

    def _may_call(self, order: Unfinished) -> bool:
        if not self._unfinished.still_stands(order):
            return False
        try:
            self._notes.create(f"called.{order.order_id}", b"", ttl=self._after)
        except KeyExists:
            return False
        return True


def _queue_of(order: Unfinished) -> str:
    return QUEUES.get(order.status, "orders")
