"""Lists orders, newest first, by the events that created them.

An order's place in a list is that of the event which created it, and never changes. So a place is a cursor that stays
right while orders arrive and move on.

A list of a customer, a status, a product or a failure begins with what the index has (`tasks.index`), so its cost
depends on what it shows. A list of all orders is read from the stream. That is read forwards only, and what stands at
a place of it never changes. So it is read in blocks from the newest end, and each place once: a process remembers which
orders a block names, with the customer and the products. Where there is no index yet, every list is read like that.

Some orders have no event in the stream that creates them: those whose customer was erased, and, from before the stream
begins, those that came back from the archive or that a late event keeps here. The index has them all.

An order counts at the place that its record names. Other mentions of it are repetitions, or come from other programs,
and are dropped once that is known. A flood of repetitions or other events makes a list slow at most once.

Places and times grow together, so a list between two times begins and ends at about a place, and the time that an order
shows decides. The status is in the record alone; a final one is remembered, and what is not wanted is looked up once.

What one page may read is bounded. When that is used up the page ends early, with the cursor from which the next
one goes on, and counts say that they are not complete. An export has no such bound, and holds a block at a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from itertools import islice, takewhile
from typing import Final, Protocol, TypeVar

from orders.v1.events_pb2 import OrderCreated

from .claims import customer_of
from .index import Index
from .model import FINAL_STATUSES, MAX_ID_LENGTH, MAX_ITEMS, OVER_STATUSES, Counts, Order, Page, Wanted
from .postings import Replaced
from .stream import EventStream

#: How many places of the stream make a block, and how many blocks are read for one page.
BLOCK: Final = 1_024
_BLOCKS: Final = 16

#: How many orders that turn out not to belong on the page are looked up for it.
_LOOKED_UP: Final = 500

#: A place behind all others.
_BEHIND_ALL: Final = 2**63

#: How many orders are counted, the newest of those that are wanted.
COUNTED: Final = 1_000

#: How many orders are looked up at once to be counted, or for an export.
_AT_ONCE: Final = 200

#: How many times a list starts over because the index was rebuilt while it was read.
_TRIES: Final = 5

#: How old a status that is not final may be when it is counted, in seconds.
_FRESH_SECONDS: Final = 2.0
# The same for a confirmed order, which few leave: it may be cancelled or refunded.
_SETTLED_SECONDS = 30.0

#: How many characters of an id are remembered; a longer id is not a customer's, and not a product's.
_CUT: Final = MAX_ID_LENGTH + 1

#: The most orders whose status a process remembers, and the most mentions of orders; each product of an order counts as
#: another mention.
_REMEMBERED: Final = 100_000

ANY: Final = Wanted()

T = TypeVar("T")


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
        return _names(wanted.text, self.order_id, self.customer)


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
    """What an order's record said, as far as it can be wanted; `place` is 0 for an order that is not there."""

    place: int
    order_id: str
    status: str
    customer_id: str
    skus: frozenset[str]
    reason: str | None
    placed_at: int
    read_at: float

    @classmethod
    def of(cls, order_id: str, order: Order | None) -> _State:
        now = time.monotonic()
        if order is None:
            return cls(0, order_id, "", "", frozenset(), None, 0, now)
        placed = next((entry.at for entry in order.history if entry.event == "created"), None)
        at = 0 if placed is None else round(placed.timestamp() * 1000)
        return cls(order.place, order_id, order.status, order.customer_id, order.skus, order.reason, at, now)

    def is_good(self, now: float) -> bool:
        """Whether the order still has this status, or had it a moment ago."""
        if self.status in OVER_STATUSES:
            return True
        fresh = _SETTLED_SECONDS if self.status in FINAL_STATUSES else _FRESH_SECONDS
        return now - self.read_at < fresh

    def fits(self, wanted: Wanted) -> bool:
        """Whether the order is wanted."""
        if wanted.failure is not None:
            told = self.reason if wanted.causes or self.status != "failed" else None
            if told is None or wanted.failure not in told.casefold():
                return False
        return (
            wanted.customer_id in (None, self.customer_id)
            and wanted.status in (None, self.status)
            and (wanted.sku is None or wanted.sku in self.skus)
            and (wanted.since is None or wanted.since <= self.placed_at)
            and (wanted.until is None or self.placed_at < wanted.until)
            and _names(wanted.text, self.order_id, self.customer_id)
        )


def _names(text: str | None, order_id: str, customer_id: str) -> bool:
    return text is None or text in order_id.casefold() or text in customer_id.casefold()


class Records(Protocol):
    """The orders themselves, as far as the ledger confirms them."""

    def get(self, order_id: str) -> Order | None: ...
    def several(self, order_ids: Sequence[str]) -> Mapping[str, Order]: ...


class OrderList:
    """The list of all orders. Any thread may use it.

    Parameters:
      stream: The stream.
      records: The orders.
      index: Finds those of a customer, a status or a product.
    """

    def __init__(self, stream: EventStream, records: Records, index: Index) -> None:
        self._stream = stream
        self._records = records
        self._index = index
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
        return _again(lambda: self._page(limit, before, wanted))

    def _page(self, limit: int, before: int | None, wanted: Wanted) -> Page:
        orders: list[Order] = []
        looked_up: dict[str, Order | None] = {}
        last = 0
        for some in _some(self._candidates(before, wanted), limit + 1):
            fresh = [
                order_id
                for place, order_id in some
                if order_id is not None
                and order_id not in looked_up
                and not self._is_known_not_to_fit(place, order_id, wanted)
            ]
            looked_up.update(self._look(fresh))
            for place, order_id in some:
                if order_id is None or len(looked_up) > _LOOKED_UP + 2 * limit:
                    return Page(orders, str(place + 1))
                order = looked_up.get(order_id)
                if order is not None and order.place == place:
                    if not _State.of(order_id, order).fits(wanted):
                        continue
                    if len(orders) == limit:
                        return Page(orders, str(last))
                    orders.append(order)
                    last = place
                elif order is not None and 0 < order.place < place:
                    # A repetition. An earlier place may become the order's own yet: its record moves there.
                    self._drop(place)
        return Page(orders, None)

    def counts(self, wanted: Wanted = ANY) -> Counts:
        """Return how many of the newest `COUNTED` orders have each status; which one is wanted does not matter."""
        return _again(lambda: self._counts(replace(wanted, status=None)))

    def _counts(self, wanted: Wanted) -> Counts:
        by_status: Counter[str] = Counter()
        looks = 0
        now = time.monotonic()
        for some in _some(self._candidates(None, wanted), _AT_ONCE):
            known = {order_id: self._states.get(order_id) for _, order_id in some if order_id is not None}
            fresh = [key for key, state in known.items() if state is None or not state.is_good(now)]
            looks += len(fresh)
            known.update({key: _State.of(key, order) for key, order in self._look(fresh).items()})
            for place, order_id in some:
                if order_id is None or by_status.total() >= COUNTED or looks > COUNTED:
                    return Counts(by_status, complete=False)
                state = known[order_id]
                if state is not None and state.place == place and state.fits(wanted):
                    by_status[state.status] += 1
        return Counts(by_status, complete=True)

    def all(self, before: int | None = None, wanted: Wanted = ANY) -> Iterator[Order]:
        """Yield all orders that are wanted, newest first, however many there are, and remember none of them."""
        while True:
            try:
                for some in _some(self._candidates(before, wanted, whole=True), _AT_ONCE):
                    found = self._records.several([order_id for _, order_id in some if order_id is not None])
                    for place, order_id in some:
                        before = place
                        order = found.get(order_id or "")
                        if order is None or order.place != place:
                            continue
                        if _State.of(order.order_id, order).fits(wanted):
                            yield order
                return
            except Replaced:
                continue  # from the last one on

    def _look(self, order_ids: Sequence[str]) -> dict[str, Order | None]:
        """Look orders up, and remember their statuses."""
        several = self._records.several(order_ids)
        # One that was stored a moment ago may be found by itself only.
        found = {key: several.get(key) or self._records.get(key) for key in order_ids}
        with self._lock:
            for order_id, order in found.items():
                self._states[order_id] = _State.of(order_id, order)
                self._states.move_to_end(order_id)
            while len(self._states) > _REMEMBERED:
                self._states.popitem(last=False)
        return found

    def _is_known_not_to_fit(self, place: int, order_id: str, wanted: Wanted) -> bool:
        if wanted.status is None:
            return False
        state = self._states.get(order_id)
        return (
            state is not None
            and state.place == place
            and state.status in FINAL_STATUSES
            and state.status != wanted.status
            and state.is_good(time.monotonic())
        )

    def _candidates(
        self, before: int | None, wanted: Wanted, *, whole: bool = False
    ) -> Iterator[tuple[int, str | None]]:
        """Yield places and the orders there that can be wanted, newest first; None where reading has to stop.

        Parameters:
          whole: Read on to the end.
        """
        newest = self._stream.newest_created()
        if newest < self._newest:
            self._clear()  # the stream was made again
        self._newest = newest
        end = _BEHIND_ALL if before is None else before
        if wanted.until is not None:
            end = min(end, self._stream.place_at(wanted.until) or end)
        first = 1 if wanted.since is None else self._stream.place_before(wanted.since) + 1
        found = self._index.find(wanted, end)
        candidates: Iterator[tuple[int, str | None]]
        candidates = self._all(first, end, newest, wanted, whole=whole) if found is None else iter(found)
        yield from takewhile(lambda one: one[0] >= first, candidates)

    def _all(
        self, first: int, end: int, newest: int, wanted: Wanted, *, whole: bool
    ) -> Iterator[tuple[int, str | None]]:
        """Yield what the stream has, with what is missing in it, as `_candidates`."""
        oldest = max(1, self._stream.range().first)
        present = self._scan(oldest, max(first, oldest), min(end, newest + 1), wanted, whole=whole)
        missing = takewhile(lambda one: one[0] >= oldest, self._index.anonymous(end))
        last = 0
        for place, order_id in merge(present, missing, key=lambda one: one[0], reverse=True):
            # What was not removed yet is in both.
            if place != last or order_id is None:
                yield place, order_id
            if order_id is None:
                return
            last = place
        yield from self._index.all(min(end, oldest))

    def _scan(
        self, oldest: int, first: int, end: int, wanted: Wanted, *, whole: bool
    ) -> Iterator[tuple[int, str | None]]:
        """Yield what the stream has from `first` up to and without `end`, as `_candidates`."""
        read = 0
        while end > first:
            if read >= _BLOCKS and not whole:
                yield end - 1, None
                return
            number = (end - 1) // BLOCK
            mentions, fresh = self._block(number, oldest, end, remember=not whole)
            read += fresh
            for place in sorted(mentions, reverse=True):
                if first <= place < end and mentions[place].fits(wanted):
                    yield place, mentions[place].order_id
            end = number * BLOCK

    def _block(
        self, number: int, oldest: int, end: int, *, remember: bool
    ) -> tuple[dict[int, _Mention], bool]:
        """Return what a block names up to `end` at least, and whether anything was read for that."""
        with self._lock:
            known = self._blocks.get(number)
            if known is not None and known.read_to >= end:
                self._blocks.move_to_end(number)
                return dict(known.mentions), False
        start = max(number * BLOCK, oldest) if known is None else known.read_to
        mentions = {} if known is None else dict(known.mentions)
        mentions.update((place, _mention(event)) for place, event in self._stream.created(start, end))
        if remember:
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


def _some(candidates: Iterator[tuple[int, str | None]], count: int) -> Iterator[list[tuple[int, str | None]]]:
    while some := list(islice(candidates, count)):
        yield some


def _mention(event: OrderCreated) -> _Mention:
    skus = {item.sku[:_CUT] for item in event.items[:MAX_ITEMS]}
    return _Mention(event.order_id, customer_of(event)[:_CUT], tuple(skus))


def _again(read: Callable[[], T]) -> T:
    """Read a list, and again when the index was made again meanwhile."""
    for _ in range(_TRIES):
        with contextlib.suppress(Replaced):
            return read()
    return read()
