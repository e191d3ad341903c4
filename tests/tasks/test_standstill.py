"""Orders that do not move are reported by the service itself, and go on if nothing else would move them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.queues import QueueStats
from orders.v1.events_pb2 import OrderReserved
from tasks import actors, app, standstill
from tasks.events import name_of
from tasks.orders import Orders
from tasks.products import Catalogue
from tasks.saga import STEPS, Saga
from tasks.standstill import Standstill
from tasks.stock import RecordBehind, Stock
from tasks.stuck import Operator
from tasks.unfinished import UnfinishedOrders
from tests.support.polling import eventually
from tests.tasks.fakes import Crash, FakeBucket, FakeGateway, FakeStream, fake_tokens, no_pause
from tests.tasks.test_saga_properties import created
from tests.web.stack import Stack

MINUTE = 60_000


class Shop:
    """The steps on stores in memory, and an operator of them; the read model knows nothing, and no letter is dead."""

    def __init__(self) -> None:
        self.bucket, self.stream, self.again = FakeBucket(), FakeStream(), list[Message]()
        self.orders = Orders(FakeBucket())
        stock = Stock(self.bucket, {"MUG-01": 3}, lambda: 1_000)
        self.saga = Saga(
            *(stock, FakeGateway(), fake_tokens(), self.stream, self.orders, Catalogue(self.bucket).load()),
            lambda: 1_000,
        )
        self.operator = Operator(
            *(stock, self.bucket, self.orders, FakeBucket(), self.stream, self.saga, self),
            *(self.again.append, STEPS),
        )  # type: ignore[call-overload]

    def list(self) -> list[Any]:
        return []

    def replay(self, letter: Any) -> bool:
        raise AssertionError(letter)


@pytest.mark.parametrize("published", [[], ["paid"]])
def test_an_order_whose_payment_died_and_lost_its_message_gets_all_its_events(published: list[str]) -> None:
    """It is recorded as confirmed then; `paid` is published as well, by the step that is called again."""
    shop = Shop()
    shop.saga.reserve(created("o-1", [("MUG-01", 1)]))

    def die(where: str) -> None:
        if where == f"before publish of {'confirmed' if published else 'paid'}":
            raise Crash

    shop.stream.pause = die
    with pytest.raises(Crash):
        shop.saga.pay(OrderReserved(order_id="o-1"))
    shop.stream.pause = no_pause
    assert [name_of(one.event) for one in shop.stream.stored] == ["reserved", *published]
    said = list(shop.operator.redrive(["o-1"]))
    assert said == [("o-1", "OrderReserved published again")]
    for event in shop.again:
        assert isinstance(event, OrderReserved)
        shop.saga.pay(event)
    assert [name_of(one.event) for one in shop.stream.stored] == ["reserved", "paid", "confirmed"]


class World:
    """An index and what looks after it, on buckets in memory; times are minutes."""

    def __init__(self) -> None:
        self.now = 0
        self.orders, self.stock = FakeBucket(), FakeBucket()
        self.index = self.new_index()
        self.stats = {"orders": QueueStats("orders"), "payments": QueueStats("payments")}
        self.away: int | None = None
        self.called: list[str] = []
        self.standstill = Standstill(
            self.index,
            self.stock,
            self.stats.__getitem__,
            lambda: self.away,
            self.redrive,
            after=15 * MINUTE,
            now=lambda: self.now * MINUTE,
        )

    def new_index(self) -> UnfinishedOrders:
        """What another process has."""
        return UnfinishedOrders(self.orders, self.stock, Orders(self.orders).read)

    def redrive(self, orders: Iterable[str]) -> Iterator[tuple[str, str]]:
        for order_id in orders:
            self.called.append(order_id)
            yield order_id, "published again"

    def record(self, order_id: str, *events: str, at: int = 0) -> None:
        """Write a record with these events, the last of them at a minute."""
        facts = {
            name: {
                "sequence": number,
                "at": at * MINUTE,
                "reason": "",
                "step": "pay",
                "charge_id": "",
                "code": "",
            }
            for number, name in enumerate(events, start=1)
        }
        entry = self.orders.get(order_id)
        value = json.dumps({"events": facts}).encode()
        self.orders.update(order_id, value, revision=0 if entry is None else entry.revision)

    def reasons(self) -> dict[str, str]:
        return {one.order.order_id: one.reason for one in self.standstill.run()}


def test_an_order_that_nothing_moves_is_called_again(caplog: pytest.LogCaptureFixture) -> None:
    """It is reported with its age and its reason; those that move, or are final, are not."""
    world = World()
    world.record("lost", "created", "reserved")
    world.record("young", "created", at=10)
    world.record("done", "created", "reserved", "paid", "confirmed")
    world.now = 16
    with caplog.at_level(logging.WARNING):
        assert world.reasons() == {"lost": standstill.LOST}
    assert world.called == ["lost"]
    assert (
        "Order lost is reserved and has not moved for 16 minutes: nothing is on its way." in caplog.messages
    )


def test_an_order_is_called_once_in_that_time() -> None:
    """Also by another process, until the note has expired."""
    world = World()
    world.record("lost", "created")
    world.now = 16
    world.reasons()
    world.reasons()
    assert world.called == ["lost"]
    world.stock.delete("called.lost")
    world.reasons()
    assert world.called == ["lost"] * 2


def test_an_order_that_waits_for_something_is_left_alone() -> None:
    """An operator's decision, the gateway, its turn, a pause."""
    world = World()
    world.record("failed", "created", "reserved", "failed.pay")
    world.record("reserved", "created", "reserved")
    world.now, world.away = 16, 1
    assert world.reasons() == {"failed": standstill.FAILED, "reserved": standstill.AWAY}
    world.away = None
    world.stats["payments"] = QueueStats("payments", ready=9, oldest_ready_age=10 * MINUTE)
    assert world.reasons()["reserved"] == standstill.WAITS
    world.stats["payments"] = QueueStats("payments", paused=True)
    assert world.reasons()["reserved"] == standstill.PAUSED
    assert world.called == []


def test_a_record_that_was_removed_is_forgotten() -> None:
    """`tasks.rebuild` removes records of orders that never were."""
    world = World()
    world.record("stranger", "created")
    world.now = 16
    world.index.all()
    world.orders.delete("stranger")
    world.reasons()
    assert world.called == []
    assert world.index.all() == []


def test_a_new_process_begins_at_the_mark() -> None:
    """It reads no order that was final before, and finds every one that is not."""
    world = World()
    for number in range(5):
        world.record(f"done-{number}", "created", "confirmed")
    world.record("open", "created")
    world.record("later", "created", "confirmed")
    world.reasons()
    read: list[int] = []
    items = world.orders.items
    world.orders.items = lambda prefix="", *, after=0: (read.append(after), items(prefix, after=after))[1]  # type: ignore[assignment, method-assign]
    index = world.new_index()
    assert [one.order_id for one in index.all()] == ["open"]
    assert read == [5]
    world.record("open", "created", "confirmed")
    assert index.all() == []
    assert world.index.all() == []


def test_a_look_that_comes_too_early_makes_no_dead_letter(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The order is read again, or has moved on, when what is not settled is looked at the next time."""

    class Behind:
        def settle_order(self, order_id: str) -> str:
            raise RecordBehind(f"the record of order {order_id} cannot be read as it is now.")

    monkeypatch.setattr(app, "saga", Behind)
    with caplog.at_level(logging.WARNING):
        actors.settle_order.fn("o-1")
    assert "A refund of order o-1 waits" in caplog.text


def test_a_lost_retry(tmp_path: Path) -> None:
    """Someone purges a queue: the order is reported and carried to the end without a hand."""
    env = {"RETRY_MIN_BACKOFF": "600000", "RETRY_MAX_BACKOFF": "600000", "STUCK_AFTER": "2000"}
    with Stack(tmp_path, env=env) as shop:
        broker = JetStreamBroker(shop.nats.url)
        try:
            shop.knobs(failure_rate=1.0)
            lost = shop.order()["order_id"]
            eventually(lambda: broker.queue_stats("payments").delayed == 1, timeout=60)
            fleet = [Path(sys.executable).parent / "fleet", "--url", shop.nats.url]
            purged = subprocess.run(
                [*fleet, "purge", "payments", "--delayed", "--yes"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert purged.returncode == 0, purged.stdout + purged.stderr
            shop.knobs(failure_rate=0.0)
            shop.final(shop.order()["order_id"], timeout=60)  # the gateway is back
            assert shop.final(lost, timeout=60)["status"] == "confirmed"
            assert f"Order {lost} is reserved and has not moved for 0 minutes" in shop.workers.output
            assert f"Order {lost}: OrderReserved published again." in shop.workers.output
        finally:
            broker.close()
