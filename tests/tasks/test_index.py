"""The index: lists are what a look at all records would find, however far it is and whatever is killed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tasks.index
import tasks.postings
from dramatiq_jetstream.streams import Range
from orders.v1.events_pb2 import (
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    OrderFailed,
    OrderItem,
    OrderRejected,
)
from tasks import anonymous
from tasks.events import Happened, order_id_of
from tasks.folds import Position, RebuildConflict, read_position
from tasks.index import Index, Indexer
from tasks.listing import OrderList
from tasks.model import Wanted
from tasks.orders import Orders
from tasks.postings import USED, Lists, Posting, Replaced, newest
from tests.tasks.fakes import FakeBucket, Task, World

PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
SKUS = ("MUG-01", "NOTE-01", "BAG-01")
CUSTOMERS = ("alice", "bob", "al.ice")
REASONS = ("The card was declined", "2 × MUG-01 ordered, 1 in stock", "too late")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that are split, and batches that are full, after a few orders."""
    monkeypatch.setattr(tasks.postings, "SHORT", 3)
    monkeypatch.setattr(tasks.postings, "PART", 4)
    monkeypatch.setattr(tasks.index, "_RECORDS", 3)
    monkeypatch.setattr(tasks.index, "_LISTS", 5)


def store(bucket: FakeBucket, lists: Lists, position: Position) -> Position:
    revisions = bucket.update_all({position.key: (position.at(0), position.revision), **lists.updates()})
    return replace(position, revision=revisions[position.key])


Change = tuple[int, bool]


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=8), max_size=12),
    st.integers(1, 70),
)
def test_a_list_is_what_was_put_into_it(batches: list[list[Change]], before: int) -> None:
    """Orders come and go at any place, in batches of any size; the list has them newest first."""
    bucket = FakeBucket()
    position = Position(USED, 1, 0, bucket.create(USED, Position(USED, 1, 0, 0).at(0)))
    held: dict[int, Posting] = {}
    for number, batch in enumerate(batches):
        lists = Lists(bucket, position)
        lists.read(("customer.a", place) for place, _ in batch)
        for place, there in batch:
            if there:
                held[place] = Posting(place, f"o-{place}", f"status {number}")
                lists.put("customer.a", held[place])
            else:
                held.pop(place, None)
                lists.discard("customer.a", place)
        position = store(bucket, lists, position)
    expected = [held[place] for place in sorted(held, reverse=True) if place < before]
    assert list(newest(bucket, 1, "customer.a", before)) == expected


@given(st.integers(0, 2**32))
@settings(deadline=None, phases=PHASES, max_examples=25)
def test_a_list_that_is_split_while_it_is_read_loses_nothing(seed: int) -> None:
    """All that was there from beginning to end is found, once and in order, whatever is put beside it meanwhile."""
    chance = random.Random(seed)
    bucket = FakeBucket()
    position = Position(USED, 1, 0, bucket.create(USED, Position(USED, 1, 0, 0).at(0)))

    def put(places: list[int]) -> None:
        nonlocal position
        lists = Lists(bucket, position)
        lists.read(("sku.x", place) for place in places)
        for place in places:
            lists.put("sku.x", Posting(place, f"o-{place}", "confirmed"))
        position = store(bucket, lists, position)

    there = sorted(chance.sample(range(1, 200), 30))
    for place in there:
        put([place])
    others = [place for place in range(1, 200) if place not in there]
    found: list[int] = []
    for posting in newest(bucket, 1, "sku.x", 1_000):
        found.append(posting.place)
        more = min(chance.randrange(4), len(others))
        put([others.pop(chance.randrange(len(others))) for _ in range(more)])
    assert found == sorted(set(found), reverse=True)
    assert set(there) <= set(found)


class Shop:
    """A stream of events, the records that projections made of them, in any order, and the index of these."""

    def __init__(self, seed: int, count: int) -> None:
        self.chance = random.Random(seed)
        self.world = World()
        self.records = FakeBucket(self.world.pause)
        self.bucket = FakeBucket(self.world.pause)
        self.events: list[Happened] = []
        self.left: list[Happened] = []
        self.first = 1
        self.gone: set[int] = set()
        for number in range(count):
            self.place(f"o-{number}")

    def place(self, order_id: str) -> None:
        """Put an order's events into the stream, some of them twice."""
        chance = self.chance
        items = [OrderItem(sku=sku, quantity=1) for sku in chance.sample(SKUS, chance.randint(1, 2))]
        reason = chance.choice(REASONS)
        created = OrderCreated(order_id=order_id, customer_id=chance.choice(CUSTOMERS), items=items)
        later = [
            OrderFailed(order_id=order_id, step="pay", error=reason),
            OrderConfirmed(order_id=order_id, charge_id="ch"),
            OrderRejected(order_id=order_id, reason=reason),
            OrderCancelled(order_id=order_id, reason=reason),
        ]
        before = len(self.events)
        for event in (created, created, *chance.sample(later, chance.randint(0, 2)))[chance.randint(0, 1) :]:
            sequence = len(self.events) + 1
            self.events.append(Happened(event, sequence, 1_000 * sequence))
        self.left += self.events[before:]

    def project(self) -> None:
        """Add one of the events to its record, whichever and however often."""
        if self.left:
            happened = self.left[self.chance.randrange(len(self.left))]
            if self.chance.random() < 0.7:
                self.left.remove(happened)
            self.run(lambda: Orders(self.records).project(happened))

    def run(self, run: object) -> None:
        task = self.world.start("", run)  # type: ignore[arg-type]
        while not task.done:
            self.world.step(task)

    def indexer(self) -> Indexer:
        return Indexer(self.bucket, self.records, Orders(self.records).read)

    def list(self) -> OrderList:
        orders = Orders(self.records)
        return OrderList(self, orders, Index(self.bucket, self.records, orders.read))  # type: ignore[arg-type]

    def newest_created(self) -> int:
        return max((one.sequence for one in self.there() if isinstance(one.event, OrderCreated)), default=0)

    def range(self) -> Range:
        return Range(self.first, len(self.events))

    def place_at(self, time: int) -> int | None:
        return next((one.sequence for one in self.there() if one.at >= time), None)

    def place_before(self, time: int) -> int:
        return max((one.sequence for one in self.there() if one.at < time), default=0)

    def created(self, start: int, end: int) -> Iterator[tuple[int, OrderCreated]]:
        for one in self.there():
            if isinstance(one.event, OrderCreated) and start <= one.sequence < end:
                yield one.sequence, one.event

    def there(self) -> list[Happened]:
        """Return the events that the stream has."""
        return [one for one in self.events if one.sequence >= self.first and one.sequence not in self.gone]

    def lose(self) -> None:
        """Let the stream begin later, and erase some customers' orders from it."""
        self.first = self.chance.randrange(1, len(self.events) + 2)
        for key, entry in list(self.records.entries.items()):
            if self.chance.random() < 0.4:
                value = anonymous.shown_order(entry.value)
                self.run(
                    lambda key=key, value=value, entry=entry: self.records.update(
                        key, value, revision=entry.revision
                    )
                )
                self.gone |= {one.sequence for one in self.events if order_id_of(one.event) == key}

    def expected(self, wanted: Wanted) -> list[str]:
        """Return the ids that are wanted, newest first, by looking at all records."""
        orders = [Orders(self.records).get(key) for key in self.records.entries]
        found = [
            order
            for order in orders
            if order is not None
            and order.place
            and wanted.customer_id in (None, order.customer_id)
            and wanted.status in (None, order.status)
            and (wanted.sku is None or wanted.sku in {item.sku for item in order.items})
            and (wanted.failure is None or wanted.failure in (order.reason or "").casefold())
            and (wanted.since is None or order.place * 1_000 >= wanted.since)
        ]
        return [order.order_id for order in sorted(found, key=lambda order: -order.place)]

    def walk(self, listed: OrderList, wanted: Wanted, limit: int) -> list[str]:
        found: list[str] = []
        before: int | None = None
        while True:
            page = listed.page(limit, before, wanted)
            found += [order.order_id for order in page.orders]
            if page.next is None:
                return found
            before = int(page.next)


WANTED = st.builds(
    Wanted,
    customer_id=st.sampled_from([None, *CUSTOMERS, "nobody"]),
    status=st.sampled_from([None, "accepted", "confirmed", "failed", "cancelled", "rejected"]),
    sku=st.sampled_from([None, *SKUS]),
    since=st.sampled_from([None, None, 7_000]),
    failure=st.sampled_from([None, None, "mug-01", "declined"]),
)


@given(st.integers(0, 2**32), WANTED, st.integers(1, 5))
@settings(deadline=None, phases=PHASES, max_examples=25)
def test_lists_are_right_however_far_the_index_is(seed: int, wanted: Wanted, limit: int) -> None:
    """Two indexers are killed between any two effects and begin again, while records change; at any moment a list is
    what a look at all records finds, in a process that has listed before and in one that has not.
    """
    shop = Shop(seed, 9)
    known = shop.list()
    indexers = [shop.world.start("index", lambda: shop.indexer().advance()) for _ in range(2)]
    for _ in range(40):
        shop.project()
        for number, task in enumerate(indexers):
            for _ in range(shop.chance.randrange(4)):
                if task.done:
                    task = indexers[number] = shop.world.start("index", lambda: shop.indexer().advance())
                shop.world.step(task, crash=shop.chance.random() < 0.1)
        if shop.chance.random() < 0.2:
            known._states.clear()  # a status is believed for two seconds
            expected = shop.expected(wanted)
            assert shop.walk(known, wanted, limit) == expected
            assert shop.walk(shop.list(), wanted, limit) == expected
            assert [order.order_id for order in known.all(None, wanted)] == expected


@given(st.integers(0, 2**32), WANTED)
@settings(deadline=None, phases=PHASES, max_examples=25)
def test_a_rebuilt_index_is_the_same(seed: int, wanted: Wanted) -> None:
    """Whatever an index says, a rebuild that is killed and begun again ends with one that is right."""
    shop = Shop(seed, 9)
    for _ in range(20):
        shop.project()
    shop.run(lambda: shop.indexer().advance())
    for key in list(shop.bucket.entries):
        if key != USED and shop.chance.random() < 0.3:
            del shop.bucket.entries[key]
    for last in (False, False, True):
        task = shop.world.start("rebuild", lambda: shop.indexer().rebuild())
        while not task.done:
            if shop.chance.random() < 0.1:
                shop.project()
                shop.run(lambda: shop.indexer().advance())
            shop.world.step(task, crash=not last and shop.chance.random() < 0.03)
    assert shop.walk(shop.list(), wanted, 3) == shop.expected(wanted)
    position = read_position(shop.bucket, USED)
    assert position is not None
    kept = {key.split(".")[1] for key in shop.bucket.entries if key.split(".")[1].isdigit()}
    assert kept <= {str(position.generation)}


@given(st.integers(0, 2**32), st.one_of(st.just(Wanted()), WANTED), st.integers(1, 5), st.booleans())
@settings(deadline=None, phases=PHASES, max_examples=50)
def test_orders_are_listed_whose_events_have_left(
    seed: int, wanted: Wanted, limit: int, indexed: bool
) -> None:
    """Their customers were erased, or the stream begins later: each is listed once and in its place."""
    shop = Shop(seed, 9)
    while shop.left:
        shop.project()
    shop.run(lambda: shop.indexer().advance())
    shop.lose()
    if indexed:
        shop.run(lambda: shop.indexer().advance())
    expected = shop.expected(wanted)
    assert shop.walk(shop.list(), wanted, limit) == expected
    assert [order.order_id for order in shop.list().all(None, wanted)] == expected


def test_a_list_is_read_again_when_the_index_is_replaced() -> None:
    """A page that began before a rebuild ended is made of the new lists; a list alone says that it is gone."""
    shop = Shop(1, 9)
    while shop.left:
        shop.project()
    shop.run(lambda: shop.indexer().advance())
    reading = newest(shop.bucket, 1, "customer.alice", 1_000)
    wanted = Wanted(customer_id="alice")
    exported = shop.list().all(None, wanted)
    shop.run(lambda: shop.indexer().rebuild())
    with pytest.raises(Replaced):
        list(reading)
    assert [order.order_id for order in exported] == shop.expected(wanted)


def test_two_rebuilds_at_once_are_one() -> None:
    """The one that began first is told so, and the other one goes on."""
    shop = Shop(2, 9)
    while shop.left:
        shop.project()
    first = shop.world.start("first", lambda: shop.indexer().rebuild())
    for _ in range(12):
        shop.world.step(first)
    second = shop.world.start("second", lambda: shop.indexer().rebuild())
    for _ in range(12):
        shop.world.step(second)
    with pytest.raises(RebuildConflict):
        finish(shop, first)
    finish(shop, second)
    wanted = Wanted(customer_id="bob")
    assert shop.walk(shop.list(), wanted, 2) == shop.expected(wanted)


def test_records_that_were_made_again_are_indexed_again() -> None:
    """After the bucket of the records was deleted, revisions begin with 1, and the index with them."""
    shop = Shop(3, 9)
    while shop.left:
        shop.project()
    shop.run(lambda: shop.indexer().advance())
    shop.records.__init__(shop.world.pause)  # type: ignore[misc]
    for happened in shop.events[:6]:
        shop.run(lambda happened=happened: Orders(shop.records).project(happened))
    shop.run(lambda: shop.indexer().advance())
    for customer in CUSTOMERS:
        wanted = Wanted(customer_id=customer)
        assert shop.walk(shop.list(), wanted, 2) == shop.expected(wanted)


def finish(shop: Shop, task: Task) -> None:
    while not task.done:
        shop.world.step(task)


class Reads(FakeBucket):
    """A bucket that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(self._asked)
        self.asked: list[str] = []

    def _asked(self, where: str) -> None:
        self.asked.append(where)


@pytest.mark.parametrize("others", [10, 2_000])
def test_a_customers_page_costs_the_same(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of reads, and of what they return, does not depend on how many orders others have."""
    monkeypatch.undo()
    records, bucket = Reads(), Reads()
    orders = Orders(records)
    stream = Shop(1, 0)
    stream.events = [
        Happened(
            OrderCreated(
                order_id=f"o-{number}",
                customer_id="alice" if number % (others // 10) == 0 else f"c-{number % 97}",
                items=[OrderItem(sku="MUG-01", quantity=1)],
            ),
            number + 1,
            1_000 * number,
        )
        for number in range(others)
    ]
    for happened in stream.events:
        orders.project(happened)
    Indexer(bucket, records, orders.read).advance()
    listed = OrderList(stream, orders, Index(bucket, records, orders.read))  # type: ignore[arg-type]
    records.asked.clear()
    bucket.asked.clear()
    page = listed.page(20, None, Wanted(customer_id="alice"))
    assert len(page.orders) == 10
    assert len(bucket.asked) == 2  # the position, and the list
    assert len(records.asked) == 2  # one order, and those that it is asked for with
