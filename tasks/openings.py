"""Takes from the products of several orders at once: of all that wait in this process when one of them begins.

::

    look for the claims and records of all → one change for each product, with the notes of all orders
    → then each order's own run creates its record, and publishes it

It is the long way of `tasks.stock` with fewer requests: one look instead of two for each order and each product, and
one change of a product instead of one for each order. The look comes after the levels are known and before they are
changed, as `tasks.levels` asks for; a level that has changed meanwhile has its orders looked for again.

What is taken ahead of an order's own run is a note, and a note without a record is what a crash leaves as well: the
order's next run finds it, here or in another process. So neither an interrupt nor a process that dies, nor an event
that goes to another process meanwhile, needs anything done. What is out of the ordinary, such as a repetition, short
stock or an order that breaks a rule, is left to its own run and takes the long way.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from dramatiq.errors import BrokerError

from orders.v1.events_pb2 import OrderCreated

from .claims import Claim, digest_of_event
from .ledger import Record
from .pricing import first_record
from .stock import RECALLED_SECONDS, Found, Stock, StockBusy
from .together import Together
from .tokens import TokenUnreadable
from .waiting import Waiting

logger = logging.getLogger(__name__)

#: For how many orders one run takes. Their stock is held a moment longer than it had to be.
AT_ONCE: Final = 16

#: How many orders are remembered for which was taken, and whose runs have not come.
_REMEMBERED: Final = 1_000


@dataclass(frozen=True, slots=True)
class _Taken:
    """What was taken for: an order with this digest; `at` by `time.monotonic`."""

    digest: str
    wanted: Record
    at: float


class _Missed(Exception):
    """The thread that took for several orders failed with one of them, or was interrupted."""


class Openings:
    """Opens orders for all threads of a process.

    Parameters:
      stock: Where levels, claims and records are.
      with_token: Returns the first record of an order as its payment token has it be; may raise.
      now: The time in milliseconds.
      waiting: The orders that wait in this process.
    """

    def __init__(
        self,
        stock: Stock,
        with_token: Callable[[str, Record, str], Record],
        now: Callable[[], int],
        waiting: Waiting[OrderCreated],
    ) -> None:
        self._stock = stock
        self._with_token = with_token
        self._now = now
        self._waiting = waiting
        self._taken: OrderedDict[str, _Taken] = OrderedDict()
        self._together: Together[OrderCreated] = Together(self._take_for, _Missed)

    def open(self, event: OrderCreated) -> Found | None:
        """Take what an order holds and store its first record; returns None when it has to take the long way."""
        order_id = event.order_id
        self._waiting.take_of(order_id)
        try:
            self._together(event)
        except (_Missed, StockBusy):
            return None  # what is busy may be a product of another order
        taken = self._taken.pop(order_id, None)
        if taken is None or taken.digest != digest_of_event(event):
            return None
        found = self._stock.record(order_id, taken.wanted)
        return found if found.fresh else None

    def _take_for(self, begun: Iterable[OrderCreated]) -> None:
        """Take for the orders whose runs have begun, as far as that was not done, and for others that wait."""
        left = [event for event in begun if not self._has(event.order_id)]
        if left:
            self._take([*left, *self._waiting.take(max(0, AT_ONCE - len(left)))])

    def _has(self, order_id: str) -> bool:
        """Whether this process took for an order a moment ago; what it took longer ago is forgotten."""
        taken = self._taken.get(order_id)
        if taken is None:
            return False
        # The order may have come to its end since, and left.
        if time.monotonic() - taken.at > RECALLED_SECONDS / 2:
            self._taken.pop(order_id, None)
            return False
        return True

    def _take(self, events: Iterable[OrderCreated]) -> None:
        """Take for the orders that are like any other."""
        at = time.monotonic()
        by_id = {event.order_id: event for event in events}
        skus = {item.sku for event in by_id.values() for item in event.items}
        looked = self._stock.look(list(by_id), skus)
        digests: dict[str, str] = {}
        wanted: dict[str, Record] = {}
        for order_id, claim in looked.claims.items():
            event = by_id[order_id]
            digests[order_id] = digest_of_event(event)
            # Of one that has a record nothing is wanted, and its token was perhaps used and dropped.
            if order_id in looked.recorded or claim.digest != digests[order_id]:
                continue
            first = self._first_record(order_id, claim, event)
            if first is not None:
                wanted[order_id] = first
        for order_id in self._stock.take(wanted, looked.seen_at):
            self._taken[order_id] = _Taken(digests[order_id], wanted[order_id], at)
            if len(self._taken) > _REMEMBERED:
                self._taken.popitem(last=False)

    def _first_record(self, order_id: str, claim: Claim, event: OrderCreated) -> Record | None:
        """Return the first record of an order that holds something, None of another one."""
        record = first_record(claim, event, self._now())
        if record.payment_token:
            try:
                record = self._with_token(order_id, record, event.payment_token)
            except (BrokerError, TokenUnreadable) as error:
                # Its own run meets it again, and says so.
                logger.debug("Nothing was taken for order %s: %s", order_id, error)
                return None
        return record if record.lines else None
