"""A record of a newer version is left alone: nothing is written, the message waits for a worker of that version."""

from __future__ import annotations

import json

import pytest

from dramatiq_jetstream import Snooze
from orders.v1.events_pb2 import OrderPaid, OrderReserved
from tasks.ledger import Chargeback, NewerRecord, Record, Refund
from tasks.steps import observed
from tests.tasks.test_saga_properties import Service, created, no_waiting

__all__ = ["no_waiting"]

PAID = Record("paid", {"held": 1, "paid": 2}, total=100, charge_id="ch_1")


@pytest.mark.parametrize(
    "newer",
    [
        {"state": "lost"},
        {"insurance": 300},
        {"refunds": [["r-1", 1, 2, "", "", 0, 0, "further"]]},
        {"chargebacks": [["cb-1", 1, 2, "", "further"]]},
        {"lines": [["MUG-01", 1, 2, "further"]]},
        {"ordered": [["MUG-01", 1, 2, "Enamel mug", "further"]]},
    ],
    ids=lambda newer: next(iter(newer)),
)
def test_what_is_not_known_is_not_read(newer: dict[str, object]) -> None:
    """Another state, another member, a longer list: acting on the rest could be wrong."""
    with pytest.raises(NewerRecord):
        Record.from_json({**PAID.to_json(), **newer})


def test_what_an_earlier_version_can_read_is_written_for_it() -> None:
    """A refund that is not cut has the members that it had; one that is has one more, and both are read back."""
    record = PAID.owing(Refund("r-1", 60, 3, "why"))
    assert record.to_json()["refunds"] == [["r-1", 60, 3, "why", "", 0]]
    record = record.charged_back_by(Chargeback("cb-1", 70, 4))
    record = record.cut("r-1", record.excess("r-1"))
    assert record.to_json()["refunds"] == [["r-1", 60, 3, "why", "", 0, 30]]
    assert Record.decode(record.encode()) == record


def test_a_step_leaves_it_alone_and_waits() -> None:
    """No write, no event, no charge; the message is put off, which uses no retry."""
    service = Service(window=False)
    saga = service.saga()
    saga.reserve(created("o-1", [("MUG-01", 1)]))
    entry = service.stock_bucket.entries["order.o-1"]
    stored = {**json.loads(entry.value), "insurance": 300}
    service.stock_bucket.update("order.o-1", json.dumps(stored).encode(), revision=entry.revision)
    before = dict(service.stock_bucket.entries), list(service.stream.stored)
    for step, event in ((saga.pay, OrderReserved(order_id="o-1")), (saga.confirm, OrderPaid(order_id="o-1"))):
        with pytest.raises(Snooze), observed("pay", event):
            step(event)  # type: ignore[operator]
    assert before == (dict(service.stock_bucket.entries), list(service.stream.stored))
    assert service.gateway.captured == []


def test_it_keeps_no_other_order_from_its_stock() -> None:
    """Its note stays where it is, for a process that can read its record, and the product is sold on."""
    service = Service(window=False, sweep_after=0)
    service.saga().reserve(created("o-1", [("MUG-01", 1)]))
    entry = service.stock_bucket.entries["order.o-1"]
    stored = {**json.loads(entry.value), "insurance": 300}
    service.stock_bucket.update("order.o-1", json.dumps(stored).encode(), revision=entry.revision)
    for number in (2, 3):
        assert service.saga().reserve(created(f"o-{number}", [("MUG-01", 1)])) == "held"
    assert service.pieces()["MUG-01"] == 0
    assert "o-1" in service.levels()["MUG-01"].notes
