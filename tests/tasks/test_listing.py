"""Lists of chosen orders: all pages are what a look at all orders would find, and no list looks at all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from dramatiq_jetstream.streams import Range
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks.listing import COUNTED, OrderList
from tasks.model import STATUSES, HistoryEntry, Order, OrderedItem, Wanted

SKUS = ("MUG-01", "NOTE-01", "BAG-01")
CUSTOMERS = ("alice", "bob", "Bobby")


@dataclass(frozen=True)
class Placed:
    """An order: where in the stream it was created (at that second), and where its event was repeated."""

    order_id: str
    place: int
    customer: str
    skus: tuple[str, ...]
    status: str


class NoIndex:
    """Stands for an index that was not made yet."""

    def find(self, wanted: Wanted, before: int) -> None:
        return None

    def anonymous(self, before: int) -> Iterator[tuple[int, str]]:
        return iter(())

    all = anonymous


class Shop:
    """A stream of events and the records of their orders, in memory; `looks` are the records that were read."""

    def __init__(self, mentions: list[Placed]) -> None:
        self.mentions = dict(enumerate(mentions, start=1))
        self.orders = {one.order_id: one for one in mentions}
        self.looks: list[str] = []
        self.list = OrderList(self, self, NoIndex())  # type: ignore[arg-type]

    def newest_created(self) -> int:
        return len(self.mentions)

    def range(self) -> Range:
        return Range(1, len(self.mentions))

    def place_at(self, time: int) -> int | None:
        return next((place for place in self.mentions if place * 1000 >= time), None)

    def place_before(self, time: int) -> int:
        return max((place for place in self.mentions if place * 1000 < time), default=0)

    def created(self, start: int, end: int) -> Iterator[tuple[int, OrderCreated]]:
        for place in range(start, min(end, len(self.mentions) + 1)):
            one = self.mentions[place]
            items = [OrderItem(sku=sku, quantity=1) for sku in one.skus]
            yield place, OrderCreated(order_id=one.order_id, customer_id=one.customer, items=items)

    def several(self, order_ids: Sequence[str]) -> dict[str, Order]:
        return {order_id: order for order_id in order_ids if (order := self.get(order_id)) is not None}

    def get(self, order_id: str) -> Order | None:
        self.looks.append(order_id)
        one = self.orders[order_id]
        at = datetime.fromtimestamp(one.place, UTC)
        lines = [OrderedItem(sku, 1, 100) for sku in one.skus]
        history = [HistoryEntry("created", at, {}, one.place)]
        return Order(order_id, one.status, one.customer, lines, 100, "EUR", history)

    def wanted(self, wanted: Wanted) -> list[str]:
        """Return the ids of the orders that are wanted, newest first, by looking at all."""
        return [
            one.order_id
            for one in sorted(self.orders.values(), key=lambda one: -one.place)
            if wanted.customer_id in (None, one.customer)
            and wanted.status in (None, one.status)
            and (wanted.sku is None or wanted.sku in one.skus)
            and (wanted.since is None or one.place * 1000 >= wanted.since)
            and (wanted.until is None or one.place * 1000 < wanted.until)
            and (wanted.text is None or wanted.text in f"{one.order_id} {one.customer}".casefold())
        ]

    def walk(self, limit: int, wanted: Wanted) -> list[str]:
        """Return the ids on all pages of the list."""
        found: list[str] = []
        before: int | None = None
        while True:
            page = self.list.page(limit, before, wanted)
            found += [order.order_id for order in page.orders]
            if page.next is None:
                return found
            assert before is None or int(page.next) < before, "the list does not come to an end"
            before = int(page.next)


@st.composite
def shops(draw: st.DrawFn) -> Shop:
    """Draw a shop whose events are repeated here and there."""
    placed: list[Placed] = []
    for place in range(1, draw(st.integers(1, 30)) + 1):
        if placed and draw(st.integers(0, 3)) == 0:
            placed.append(draw(st.sampled_from(placed)))
            continue
        placed.append(
            Placed(
                f"o-{place}",
                place,
                draw(st.sampled_from(CUSTOMERS)),
                tuple(draw(st.sets(st.sampled_from(SKUS), min_size=1))),
                draw(st.sampled_from(STATUSES)),
            )
        )
    return Shop(placed)


WANTED = st.builds(
    Wanted,
    customer_id=st.sampled_from([None, None, "bob", "nobody"]),
    status=st.sampled_from([None, "confirmed", "failed"]),
    since=st.sampled_from([None, None, 0, 5_000, 5_001, 99_000]),
    until=st.sampled_from([None, None, 0, 9_000, 9_001, 99_000]),
    sku=st.sampled_from([None, None, "MUG-01", "NO-SUCH"]),
    text=st.sampled_from([None, None, "bob", "o-1", "x"]),
)


@given(shops(), st.integers(1, 7), WANTED, st.booleans())
def test_all_pages_together_are_what_is_wanted(
    shop: Shop, limit: int, wanted: Wanted, looked_before: bool
) -> None:
    """Whatever is wanted, however long pages are, whether the list was read before or not."""
    if looked_before:
        shop.list.counts()
    assert shop.walk(limit, wanted) == shop.wanted(wanted)
    assert [order.order_id for order in shop.list.all(None, wanted)] == shop.wanted(wanted)


@given(shops(), WANTED)
def test_counts_are_of_all_that_is_wanted(shop: Shop, wanted: Wanted) -> None:
    """The counts are by status, whichever status is wanted."""
    of_any_status = shop.wanted(replace(wanted, status=None))
    statuses = Counter(shop.orders[order_id].status for order_id in of_any_status)
    counts = shop.list.counts(wanted)
    assert (counts.by_status, counts.complete) == (statuses, True)


def test_counts_are_of_the_newest_and_look_up_what_is_final_once() -> None:
    """Of many orders the newest are counted; those that are final are not read again."""
    placed = [
        Placed(f"o-{place}", place, "alice", ("MUG-01",), "failed" if place % COUNTED == 0 else "confirmed")
        for place in range(1, 3 * COUNTED + 1)
    ]
    shop = Shop(placed)
    counts = shop.list.counts()
    assert (counts.total, counts.complete) == (COUNTED, False)
    assert counts.by_status == {"confirmed": COUNTED - 1, "failed": 1}
    shop.looks.clear()
    shop.list.counts()
    assert set(shop.looks) <= {f"o-{3 * COUNTED}"}


def test_one_page_looks_up_a_bounded_number() -> None:
    """A page of what is rare ends before it has looked at all orders, and says where the next one goes on."""
    placed = [Placed(f"o-{place}", place, "alice", ("MUG-01",), "confirmed") for place in range(1, 5_001)]
    placed[0] = Placed("o-1", 1, "alice", ("MUG-01",), "failed")
    shop = Shop(placed)
    wanted = Wanted(status="failed")
    page = shop.list.page(25, None, wanted)
    assert page.orders == []
    assert page.next is not None
    assert len(shop.looks) < 1_000
    assert shop.walk(25, wanted) == ["o-1"]
