"""Lists orders, newest first, by the events that created them.

A stream is read forwards only, and what stands at a place of it never changes. So it is read in blocks from the
newest end, and each place once: a process remembers which orders a block names, with the customer and the products.
An order counts at the place that its record names. Other mentions of it are repetitions, or come from other programs,
and are dropped once that is known. So many repetitions or other events make a list slow at most once.

A place was stored at the time that the order shows, so a list between two times begins and ends at a place. The status
is in the record alone; a final one is remembered, and what is not wanted is looked up once.

What one list may read is bounded. When that is used up the page ends early, with the cursor from which the next
one goes on, and counts say that they are not complete.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from orders.v1.events_pb2 import OrderCreated

from .claims import customer_of
from .model import FINAL_STATUSES, MAX_ID_LENGTH, MAX_ITEMS, OVER_STATUSES, Counts, Order, Page, Wanted
from .stream import EventStream

#: How many places of the stream make a block, and how many blocks are read for one page.
BLOCK: Final = 1_024
_BLOCKS: Final = 16

#: How many orders that turn out not to belong on the page are looked up for it.
_LOOKED_UP: Final = 500

#: How many orders are counted, the newest of those that are wanted.
COUNTED: Final = 1_000

#: How long a status that is not final is good enough to count it, in seconds.
_FRESH_SECONDS: Final = 2.0
# The same for a confirmed order, which few leave: it may be cancelled or refunded.
_SETTLED_SECONDS = 30.0

#: How many characters of an id are remembered; a longer id is not a customer's, and not a product's.
_CUT: Final = MAX_ID_LENGTH + 1

#: How many mentions of orders a process remembers, each of their products counted as one more; and of how many orders
#: the status.
_REMEMBERED: Final = 100_000

ANY: Final = Wanted()


@dataclass(frozen=True, slots=True)
class _Mention:
    """What a place of the stream names."""

    order_id: str
    customer: str
    skus: tuple[str, ...]

    @property
    def size(self) -> int:
        """How much of what a process may remember this takes up."""
        return 1 + len(self.skus)

    def fits(self, wanted: Wanted) -> bool:
        """Whether the order can be one that is wanted."""
        if wanted.customer_id is not None and self.customer != wanted.customer_id:
            return False
        if wanted.sku is not None and wanted.sku not in self.skus:
            return False
        text = wanted.text
        return text is None or text in self.order_id.casefold() or text in self.customer.casefold()


@dataclass(slots=True)
class _Block:
    """What a block says: up to where it was read, and what each place names."""

    read_to: int
    mentions: dict[int, _Mention]

    @property
    def size(self) -> int:
        return sum(mention.size for mention in self.mentions.values())


@dataclass(frozen=True, slots=True)
class _State:
    """What an order's record said: where the order was created (0: nowhere), its status, and when that was read."""

    place: int
    status: str
    read_at: float

    def is_good(self, now: float) -> bool:
        """Whether the order still has this status, or had it a moment ago."""
        if self.status in OVER_STATUSES:
            return True
        fresh = _SETTLED_SECONDS if self.status in FINAL_STATUSES else _FRESH_SECONDS
        return now - self.read_at < fresh


class OrderList:
    """The list of all orders. Any thread may use it.

    Parameters:
      stream: The stream.
      find: Returns an order, as far as the ledger confirms it.
    """

    def __init__(self, stream: EventStream, find: Callable[[str], Order | None]) -> None:
        self._stream = stream
        self._find = find
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._remembered = 0
        self._states: OrderedDict[str, _State] = OrderedDict()
        self._newest = 0
        self._lock = threading.Lock()

    def page(self, limit: int, before: int | None = None, wanted: Wanted = ANY) -> Page:
        """Return up to `limit` orders that are wanted, newest first.

        Parameters:
          before: Only those that were created before this place of the stream.
        """
        orders: list[Order] = []
        looked_up: dict[str, Order | None] = {}
        last = 0
        for place, mention in self._mentions(before, wanted):
            if mention is None or len(looked_up) > _LOOKED_UP + limit:
                return Page(orders, str(place + 1))
            if self._is_known_not_to_fit(place, mention, wanted):
                continue
            order_id = mention.order_id
            if order_id not in looked_up:
                looked_up[order_id] = self._look(order_id)[0]
            order = looked_up[order_id]
            created = 0 if order is None else order.place
            if order is not None and created == place:
                if not _fits(order, wanted):
                    continue
                if len(orders) == limit:
                    return Page(orders, str(last))
                orders.append(order)
                last = place
            elif created:
                self._drop(place)
        return Page(orders, None)

    def counts(self, wanted: Wanted = ANY) -> Counts:
        """Return how many of the newest `COUNTED` orders have each status; which one is wanted does not matter."""
        by_status: Counter[str] = Counter()
        looks = 0
        now = time.monotonic()
        for place, mention in self._mentions(None, replace(wanted, status=None)):
            if mention is None or by_status.total() >= COUNTED or looks >= COUNTED:
                return Counts(by_status, complete=False)
            state = self._states.get(mention.order_id)
            if state is None or not state.is_good(now):
                looks += 1
                state = self._look(mention.order_id)[1]
            if state.place == place:
                by_status[state.status] += 1
        return Counts(by_status, complete=True)

    def _look(self, order_id: str) -> tuple[Order | None, _State]:
        """Look an order up, and remember its status."""
        order = self._find(order_id)
        place, status = (0, "") if order is None else (order.place, order.status)
        state = _State(place, status, time.monotonic())
        with self._lock:
            self._states[order_id] = state
            self._states.move_to_end(order_id)
            if len(self._states) > _REMEMBERED:
                self._states.popitem(last=False)
        return order, state

    def _is_known_not_to_fit(self, place: int, mention: _Mention, wanted: Wanted) -> bool:
        if wanted.status is None:
            return False
        state = self._states.get(mention.order_id)
        return (
            state is not None
            and state.place == place
            and state.status in FINAL_STATUSES
            and state.status != wanted.status
            and state.is_good(time.monotonic())
        )

    def _mentions(self, before: int | None, wanted: Wanted) -> Iterator[tuple[int, _Mention | None]]:
        """Yield places and what they name that can be wanted, newest first; None where reading has to stop."""
        newest = self._stream.newest_created()
        if newest < self._newest:
            self._clear()  # the stream was made again
        self._newest = newest
        end = newest + 1 if before is None else min(newest + 1, before)
        if end <= 1:
            return
        if wanted.until is not None:
            end = min(end, self._stream.place_at(wanted.until) or end)
        oldest = first = max(1, self._stream.range().first)
        if wanted.since is not None:
            first = max(first, self._stream.place_at(wanted.since) or end)
        read = 0
        while end > first:
            if read >= _BLOCKS:
                yield end - 1, None
                return
            number = (end - 1) // BLOCK
            mentions, fresh = self._block(number, oldest, end)
            read += fresh
            for place in sorted(mentions, reverse=True):
                if first <= place < end and mentions[place].fits(wanted):
                    yield place, mentions[place]
            end = number * BLOCK

    def _block(self, number: int, oldest: int, end: int) -> tuple[dict[int, _Mention], bool]:
        """Return what a block names up to `end` at least, and whether anything was read for that."""
        with self._lock:
            known = self._blocks.get(number)
            if known is not None and known.read_to >= end:
                self._blocks.move_to_end(number)
                return dict(known.mentions), False
        start = max(number * BLOCK, oldest) if known is None else known.read_to
        mentions = {} if known is None else dict(known.mentions)
        mentions.update((place, _mention(event)) for place, event in self._stream.created(start, end))
        self._remember(number, _Block(end, mentions))
        return mentions, True

    def _remember(self, number: int, block: _Block) -> None:
        with self._lock:
            known = self._blocks.get(number)
            if known is not None and known.read_to >= block.read_to:
                return
            self._remembered += block.size - (0 if known is None else known.size)
            self._blocks[number] = block
            self._blocks.move_to_end(number)
            while self._remembered > _REMEMBERED and len(self._blocks) > 1:
                _, oldest = self._blocks.popitem(last=False)
                self._remembered -= oldest.size

    def _drop(self, place: int) -> None:
        with self._lock:
            block = self._blocks.get(place // BLOCK)
            mention = None if block is None else block.mentions.pop(place, None)
            if mention is not None:
                self._remembered -= mention.size

    def _clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._states.clear()
            self._remembered = 0


def _mention(event: OrderCreated) -> _Mention:
    skus = {item.sku[:_CUT] for item in event.items[:MAX_ITEMS]}
    return _Mention(event.order_id, customer_of(event)[:_CUT], tuple(skus))


def _fits(order: Order, wanted: Wanted) -> bool:
    """Whether an order is wanted; what its mention said of it is not asked again, but whose it is."""
    return (wanted.customer_id is None or order.customer_id == wanted.customer_id) and (
        wanted.status is None or order.status == wanted.status
    )
