"""The figures: each order counts once, whatever is repeated or forged, and whatever is killed."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import tasks.figures
from dramatiq_jetstream.streams import Range, StoredMessage
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks.catalogue import CATALOGUE
from tasks.figures import Counting, Figures, Numbers
from tasks.ledger import Chargeback
from tasks.orders import Orders
from tasks.projection import Projection
from tests.tasks.fakes import FakeBucket
from tests.tasks.test_rebuild import Events, shop
from tests.tasks.test_saga_properties import Service

PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


class Stream(Events):
    """The stream of a service whose oldest messages have left it."""

    def __init__(self, service: Service, first: int = 1) -> None:
        super().__init__(service)
        self._first = first

    def range(self) -> Range:
        return Range(self._first, super().range().last)

    def stored_at(self, sequence: int) -> StoredMessage:
        return StoredMessage("ORDERS", sequence, "ORDER.created", b"", {}, 1_000 + sequence)

    def read(self, start: int) -> object:  # type: ignore[override]
        return super().read(max(start, self._first))

    present = read


def counting(service: Service, bucket: FakeBucket, first: int = 1) -> Counting:
    orders = Orders(service.orders_bucket)
    projection = Projection(service.stock(), orders, service.catalogue, service.now)
    stream = Stream(service, first)
    return Counting(bucket, stream, orders, projection.project, lambda: 10_000_000)  # type: ignore[arg-type]


def whole(bucket: FakeBucket) -> tuple[Numbers, dict[str, int]]:
    """Return all that was counted, and the pieces that were sold."""
    spans, sold = Figures(bucket, lambda: 10_000_000).days(2)
    total = Numbers()
    for span in spans:
        total.add(span.numbers)
    return total, {sku: pieces for sku, pieces, _ in sold}


def expected(service: Service) -> tuple[Numbers, dict[str, int]]:
    """Return the same from the records."""
    orders = [Orders(service.orders_bucket).get(key) for key in service.orders_bucket.entries]
    statuses = Counter(order.status for order in orders if order is not None)
    total = Numbers(placed=statuses.total(), confirmed=statuses["confirmed"], rejected=statuses["rejected"])
    sold: Counter[str] = Counter()
    for order in orders:
        assert order is not None
        if order.status == "confirmed":
            total.revenue += order.total
            at = {entry.event: entry.at for entry in order.history}
            total.took(int((at["confirmed"] - at["created"]).total_seconds() * 1000))
            sold.update({item.sku: item.quantity for item in order.items})
        total.failed += any(entry.event == "failed" for entry in order.history)
    return total, dict(sold)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are full after a few events."""
    monkeypatch.setattr(tasks.figures, "_EVENTS", 4)


@given(st.integers(0, 2**32))
@settings(deadline=None, phases=PHASES, max_examples=25)
def test_each_order_counts_once(seed: int) -> None:
    """Two processes count at once and are killed between any two effects, among repetitions and forgeries."""
    chance = random.Random(seed)
    service = shop(5)
    bucket = FakeBucket(service.world.pause)
    # Some records are behind the stream.
    for order_id in list(service.orders_bucket.entries):
        if chance.random() < 0.3:
            del service.orders_bucket.entries[order_id]
    tasks = [service.world.start("count", lambda: counting(service, bucket).advance()) for _ in range(2)]
    for _ in range(150):
        number = chance.randrange(2)
        if tasks[number].done:
            tasks[number] = service.world.start("count", lambda: counting(service, bucket).advance())
        service.world.step(tasks[number], crash=chance.random() < 0.1)
        if chance.random() < 0.05:
            service.stream.append(chance.choice(service.stream.stored).event)
    for task in tasks:
        while not task.done:
            service.world.step(task)
    counting(service, bucket).advance()
    assert whole(bucket) == expected(service)


def test_a_rebuild_counts_the_same_and_keeps_what_has_left_the_stream() -> None:
    """Counted again from the whole stream all is as before; from the rest of it, older hours are kept."""
    service, bucket = shop(6), FakeBucket()
    counting(service, bucket).advance()
    before = whole(bucket)
    for entry in list(bucket.entries.values()):
        if ".day." in entry.key:
            bucket.update(entry.key, b'{"hours":{"0":{"placed":99}},"sold":{}}', revision=entry.revision)
    counting(service, bucket).rebuild()
    assert whole(bucket) == before
    # An hour before the stream begins.
    day = next(entry for entry in bucket.entries.values() if ".day." in entry.key)
    bucket.update(
        day.key.replace("1970-01-01", "1969-12-31"), b'{"hours":{"23":{"placed":7}},"sold":{}}', revision=0
    )
    counting(service, bucket, first=3).rebuild()
    kept = Figures(bucket, lambda: 10_000_000).days(2)[0][0]
    assert kept.begins == datetime(1969, 12, 31, tzinfo=UTC)
    assert kept.numbers.placed == 7
    assert whole(bucket)[0].placed - 7 == before[0].placed


@pytest.mark.parametrize("counted", [0.5, 1.0])
def test_a_rebuild_keeps_what_has_left_the_hour_in_which_the_stream_begins(counted: float) -> None:
    """Wherever in an hour the stream begins, totals stay, also of what was counted after it and not yet."""
    service = shop(6)
    last = len(service.stream.stored)
    for first in range(2, int(last * counted) + 1):
        bucket = FakeBucket()
        some = counting(service, bucket)
        some._now = lambda: 1_000 + int(last * counted) + tasks.figures.SETTLED_MS
        some.advance()
        for _ in range(2):
            counting(service, bucket, first).rebuild()
            assert whole(bucket) == expected(service), first


def test_a_stream_that_was_made_again_is_counted_from_its_beginning() -> None:
    """What was counted stays, and the new orders come to it."""
    service, bucket = shop(4), FakeBucket()
    counting(service, bucket).advance()
    before, _ = whole(bucket)
    service.stream.stored.clear()
    service.stream.append(
        OrderCreated(
            order_id="fresh",
            customer_id="c-1",
            items=[OrderItem(sku="MUG-01", quantity=1)],
            total_amount=CATALOGUE["MUG-01"].unit_price / 100,
        )
    )
    counting(service, bucket).advance()
    counting(service, bucket).advance()
    assert whole(bucket)[0].placed == before.placed + 1


@given(st.lists(st.integers(1, 10_000_000), min_size=1), st.sampled_from([0.5, 0.95, 1.0]))
def test_times_are_a_tenth_too_long_at_most(times: list[int], share: float) -> None:
    """A share of the times is told from classes; the real one is in the class."""
    numbers = Numbers()
    for one in times:
        numbers.took(one)
    real = sorted(times)[max(0, -(-int(share * 100 * len(times)) // 100) - 1)] / 1000
    told = numbers.within(share)
    assert told is not None
    assert real * 0.999 <= told <= real * 1.101


def test_what_the_bank_took_back_counts_as_refunded() -> None:
    """Once, however often its event is repeated."""
    service, bucket = shop(3), FakeBucket()
    service.saga().charge_back("o-0", "ch_o-0", Chargeback("cb-1", 300, service.now(), "fraud"))
    service.stream.append(service.stream.stored[-1].event)
    service.deliver_new()
    service.finish()
    counting(service, bucket).advance()
    assert whole(bucket)[0].refunded == 300
