"""Orders that are not final in time are asked to end, once, and one that cannot end keeps no other from it."""

from __future__ import annotations

import logging

import pytest

import tasks.deadline
from tasks.deadline import Deadline
from tasks.events import key_of, order_id_of
from tasks.model import Order
from tasks.orders import Orders
from tasks.ports import Entry
from tasks.unfinished import UnfinishedOrders
from tests.tasks.fakes import FakeBucket, FakeStored
from tests.tasks.test_saga_properties import Service, created, no_waiting

__all__ = ["no_waiting"]

AFTER = 60_000


class Late:
    """Three orders of mugs, the first confirmed, the others at a payment that nothing calls; and their deadline."""

    def __init__(self) -> None:
        self.service = Service(window=False)
        for number in range(3):
            self.service.stream.append(created(f"o-{number}", [("MUG-01", 1)]))
        self.service.deliver_new()
        self.service.pending = [
            (step, one) for step, one in self.service.pending if not self.waits(step, one)
        ]
        while self.service.running or self.service.pending:
            if not self.service.running:
                self.service.start(self.service.pending.pop(0))
            self.service.go_on(0)
            self.service.pending = [
                (step, one) for step, one in self.service.pending if not self.waits(step, one)
            ]
        self.time = 0

    @staticmethod
    def waits(step: str, stored: FakeStored) -> bool:
        return step == "pay" and stored.event.order_id != "o-0"  # type: ignore[attr-defined]

    def run(self) -> list[str]:
        """Run the deadline as a fresh process does; returns which orders were late."""
        orders = Orders(self.service.orders_bucket)

        def read(entry: Entry) -> Order | None:
            return orders.read(entry)

        unfinished = UnfinishedOrders(self.service.orders_bucket, FakeBucket(), read)
        saga = self.service.saga()
        deadline = Deadline(
            unfinished, saga.request_cancel, saga.expire_offer, after=AFTER, now=lambda: self.time
        )
        return deadline.run()


def test_what_is_late_is_cancelled_and_nothing_else() -> None:
    """Before its time nothing happens; after it each unfinished order ends, gives its stock back, and is done with."""
    late = Late()
    late.time = 1_000 + AFTER  # when the first of them was placed, and a deadline later
    assert late.run() == []
    late.time += 1_000
    assert sorted(late.run()) == ["o-1", "o-2"]
    late.service.deliver_new()
    late.service.finish()
    states = {order_id: record.state for order_id, record in late.service.records().items()}
    assert states == {"o-0": "confirmed", "o-1": "cancelled", "o-2": "cancelled"}
    assert late.service.records()["o-1"].reason == "it was not completed in time"
    assert late.service.pieces()["MUG-01"] == 2
    assert late.run() == []


def test_each_is_asked_for_once_however_often_it_runs() -> None:
    """Two processes at once, and again before a worker came to it: the first request is the one that counts."""
    late = Late()
    late.time = 10 * AFTER
    for _ in range(3):
        assert sorted(late.run()) == ["o-1", "o-2"]
    notes = late.service.stock().notes
    request = notes.cancel_request("o-1")
    assert request is not None
    late.run()
    assert notes.cancel_request("o-1") == request


def test_one_that_cannot_end_keeps_no_other(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read model is behind: the ledger says that the order is over, and that is said in the log."""
    monkeypatch.setattr(tasks.deadline, "MAX_ENDED", 1)
    late = Late()
    late.time = 10 * AFTER
    late.service.saga().cancel("o-1", "")
    entry = late.service.stock_bucket.entries["order.o-1"]
    late.service.stock_bucket.update(
        "order.o-1", entry.value.replace(b'"cancelled"', b'"rejected"'), revision=entry.revision
    )
    with caplog.at_level(logging.WARNING, logger=tasks.deadline.__name__):
        assert late.run() == ["o-2"]
    assert "Order o-1 is rejected already." in caplog.text
    assert late.service.stock().notes.cancel_request("o-2") is not None


def test_one_run_ends_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is for the next run, those first that have not moved for the longest time."""
    monkeypatch.setattr(tasks.deadline, "MAX_ENDED", 1)
    late = Late()
    late.time = 10 * AFTER
    assert len(late.run()) == 1


def test_one_that_was_paid_at_the_last_moment_is_left_alone() -> None:
    """A payment that is captured while others are ended: the order is confirmed, and stays so."""
    late = Late()
    late.time = 10 * AFTER
    service = late.service
    ended: list[str] = []

    def request_cancel(order_id: str, by: str) -> None:
        if not ended:
            paid = "o-2" if order_id == "o-1" else "o-1"
            events = (one for one in service.stream.stored if key_of(one.event) == "reserved")
            service.saga().pay(next(one.event for one in events if order_id_of(one.event) == paid))  # type: ignore[arg-type]
            service.deliver_new()
            service.finish()
        ended.append(order_id)
        service.saga().request_cancel(order_id, by)

    unfinished = UnfinishedOrders(service.orders_bucket, FakeBucket(), Orders(service.orders_bucket).read)
    Deadline(unfinished, request_cancel, lambda _: False, after=AFTER, now=lambda: late.time).run()
    service.deliver_new()
    service.finish()
    assert sorted(record.state for record in service.records().values()) == [
        *("cancelled", "confirmed", "confirmed")
    ]
