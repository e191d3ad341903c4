"""Lists orders, newest first, by the events that created them.

A stream is read forwards only, and what stands at a place of it never changes. So it is read in blocks from the
newest end, and each place once: a process remembers which orders a block names. An order counts at the place that its
record names. Other mentions of it are repetitions, or come from other programs, and are dropped once that is known. So
many repetitions or other events make a list slow at most once.

What one list may read is bounded. When that is used up the page ends early, with the cursor from which the next
one goes on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from .claims import customer_of
from .model import MAX_ID_LENGTH, Order, Page
from .stream import EventStream

#: How many places of the stream make a block, and how many blocks are read for one page.
BLOCK: Final = 1_024
_BLOCKS: Final = 16

#: How many orders that turn out not to belong on the page are looked up for it.
_LOOKED_UP: Final = 500

#: How many characters of a customer's id are remembered; a longer id is not a customer's.
_CUSTOMER: Final = MAX_ID_LENGTH + 1

#: How many mentions of orders a process remembers.
_REMEMBERED: Final = 100_000


@dataclass(slots=True)
class _Block:
    """What a block says: up to where it was read, and the order and the customer that each place names."""

    read_to: int
    orders: dict[int, tuple[str, str]]


class OrderList:
    """The list of all orders.

    Parameters:
      stream: The stream.
      find: Returns an order, as far as the ledger confirms it.
    """

    def __init__(self, stream: EventStream, find: Callable[[str], Order | None]) -> None:
        self._stream = stream
        self._find = find
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._remembered = 0
        self._newest = 0
        self._lock = threading.Lock()

    def page(self, limit: int, before: int | None = None, *, customer_id: str | None = None) -> Page:
        """Return up to `limit` orders, newest first.

        Parameters:
          before: Only those that were created before this place of the stream.
          customer_id: Only this customer's.
        """
        orders: list[Order] = []
        looked_up: dict[str, Order | None] = {}
        last = 0
        for place, mention in self._mentions(before):
            if mention is None or len(looked_up) > _LOOKED_UP + limit:
                return Page(orders, str(place + 1))
            order_id, customer = mention
            if customer_id is not None and customer != customer_id:
                continue
            if order_id not in looked_up:
                looked_up[order_id] = self._find(order_id)
            order = looked_up[order_id]
            created = 0 if order is None else order.place
            if order is not None and created == place:
                if customer_id is not None and order.customer_id != customer_id:
                    continue
                if len(orders) == limit:
                    return Page(orders, str(last))
                orders.append(order)
                last = place
            elif created:
                self._drop(place)
        return Page(orders, None)

    def _mentions(self, before: int | None) -> Iterator[tuple[int, tuple[str, str] | None]]:
        """Yield places and what they name, newest first; None where reading has to stop."""
        newest = self._stream.newest_created()
        if newest < self._newest:
            self._clear()  # the stream was made again
        self._newest = newest
        end = newest + 1 if before is None else min(newest + 1, before)
        if end <= 1:
            return
        first = max(1, self._stream.range().first)
        read = 0
        while end > first:
            if read >= _BLOCKS:
                yield end - 1, None
                return
            number = (end - 1) // BLOCK
            orders, fresh = self._block(number, first, end)
            read += fresh
            for place in sorted(orders, reverse=True):
                if place < end:
                    yield place, orders[place]
            end = number * BLOCK

    def _block(self, number: int, first: int, end: int) -> tuple[dict[int, tuple[str, str]], bool]:
        """Return what a block names up to `end` at least, and whether anything was read for that."""
        with self._lock:
            known = self._blocks.get(number)
            if known is not None and known.read_to >= end:
                self._blocks.move_to_end(number)
                return dict(known.orders), False
        start = max(number * BLOCK, first) if known is None else known.read_to
        orders = {} if known is None else dict(known.orders)
        orders.update(
            (place, (event.order_id, customer_of(event)[:_CUSTOMER]))
            for place, event in self._stream.created(start, end)
        )
        self._remember(number, _Block(end, orders))
        return orders, True

    def _remember(self, number: int, block: _Block) -> None:
        with self._lock:
            known = self._blocks.get(number)
            if known is not None and known.read_to >= block.read_to:
                return
            self._remembered += len(block.orders) - (0 if known is None else len(known.orders))
            self._blocks[number] = block
            self._blocks.move_to_end(number)
            while self._remembered > _REMEMBERED and len(self._blocks) > 1:
                _, oldest = self._blocks.popitem(last=False)
                self._remembered -= len(oldest.orders)

    def _drop(self, place: int) -> None:
        with self._lock:
            block = self._blocks.get(place // BLOCK)
            if block is not None and block.orders.pop(place, None) is not None:
                self._remembered -= 1

    def _clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._remembered = 0
