"""Workers and front ends of the version before products were data, beside those of this one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from orders.v1.events_pb2 import OrderCreated
from tasks.announcements import placed_event
from tasks.claims import Claims, digest_of_event
from tasks.events import Happened
from tasks.ledger import PricedItem
from tasks.orders import Orders, order_of
from tasks.pricing import claimed, first_record
from tasks.products import Catalogue
from tasks.projection import Projection
from tasks.stock import Stock
from tests.tasks.fakes import FakeBucket
from tests.tasks.test_products import INITIAL, NOW, Store, event


@dataclass(frozen=True, slots=True)
class EarlierClaim:
    """A claim as the earlier version had it, and as it read one."""

    at: int
    digest: str
    customer_id: str = ""
    lines: tuple[PricedItem, ...] = ()
    total: int = 0
    currency: str = ""

    @classmethod
    def decode(cls, value: bytes) -> EarlierClaim:
        stored = json.loads(value)
        return cls(**{**stored, "lines": tuple(PricedItem(*line) for line in stored.get("lines", ()))})


def test_an_earlier_worker_cannot_decide_an_order_of_this_version() -> None:
    """It fails before it writes, also for an order that this version has rejected."""
    store = Store()
    for total in (25.8, 1.0):
        placed = event(("MUG-01", 2), total=total, order_id=f"o-{total}")
        claimed(Claims(store.bucket), placed.order_id, placed, store.catalogue, NOW, store.now)
        with pytest.raises(TypeError):
            EarlierClaim.decode(store.bucket.entries[f"claim.{placed.order_id}"].value)


def test_a_claim_of_an_earlier_front_end_is_honoured() -> None:
    """At its price, whatever the catalogue says; the name is the present one."""
    store = Store()
    placed = event(("MUG-01", 2), total=25.8)
    earlier: dict[str, Any] = {"at": NOW, "digest": digest_of_event(placed), "customer_id": "c-1"}
    earlier |= {"lines": [["MUG-01", 2, 1_290]], "total": 2_580, "currency": "EUR"}
    store.bucket.create("claim.o-1", json.dumps(earlier).encode())
    store.change("MUG-01", price=2_000)
    claim = claimed(Claims(store.bucket), "o-1", placed, store.catalogue, NOW, store.now)
    assert first_record(claim, placed, NOW).total == 2_580
    assert placed_event("o-1", claim).items[0].name == ""


def test_an_earlier_front_end_reads_the_record_of_this_version() -> None:
    """What is shown of an order has the names beside the items, where the earlier version does not look."""
    bucket = FakeBucket()
    catalogue = Catalogue(bucket).load()
    orders = Orders(FakeBucket())
    placed: OrderCreated = event(("MUG-01", 2), total=25.8)
    Projection(Stock(bucket, INITIAL, lambda: NOW), orders, catalogue, lambda: NOW).project(
        Happened(placed, 1, NOW)
    )
    entry = orders._bucket.get("o-1")
    assert entry is not None
    stored = json.loads(entry.value)
    assert stored["items"] == [["MUG-01", 2, 1_290]]
    order = order_of("o-1", stored, 1)
    assert order.items[0].name == "Enamel mug"
    del stored["names"]
    assert order_of("o-1", stored, 1).items[0].name == ""
