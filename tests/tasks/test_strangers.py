"""Other programs publish what they like: under our ids, before us, after us, and about orders that never were."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.jetstream.reading import message_at
from dramatiq_jetstream.wire.connection import Publication
from orders.v1.events_pb2 import (
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderFailed,
    OrderItem,
    OrderPaid,
    OrderRejected,
    OrderReserved,
)
from tests.support.polling import eventually
from tests.support.processes import dramatiq_worker
from tests.tasks.producer import Producer, created
from tests.web.stack import Stack

FORGED: dict[str, Any] = {
    "reserved": OrderReserved(customer_id="c-forged", total_minor=1, currency="NOPE"),
    "paid": OrderPaid(charge_id="ch_forged", amount_minor=1),
    "declined": OrderDeclined(code="forged", reason="forged"),
    "confirmed": OrderConfirmed(charge_id="ch_forged"),
    "rejected": OrderRejected(reason="forged"),
    "failed": OrderFailed(step="pay", error="forged", message_id="m"),
}


def forged(name: str, order_id: str) -> bytes:
    event = type(FORGED[name])()
    event.CopyFrom(FORGED[name])
    event.order_id = order_id
    getattr(event, f"{name}_at").GetCurrentTime()
    data: bytes = event.SerializeToString()
    return data


def place(shop: Stack, order_id: str, quantity: int, key: str | None = None) -> requests.Response:
    """Place an order under an id of our choice, on a connection of its own."""
    body = OrderCreated(
        order_id=order_id, customer_id="c-1", items=[OrderItem(sku="NOTE-01", quantity=quantity)]
    )
    headers = {"Content-Type": "application/x-protobuf"} | ({"Idempotency-Key": key} if key else {})
    return requests.post(f"{shop.url}/api/orders", data=body.SerializeToString(), headers=headers, timeout=20)


def pieces(order: dict[str, Any]) -> int:
    return int(order["items"][0]["quantity"])


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Stack]:
    """A service whose workers have not come yet."""
    with Stack(tmp_path, workers=False, web_processes=2) as shop:
        assert shop.get("/api/orders").json()["orders"] == []  # which makes the stream
        yield shop


@pytest.mark.parametrize("keyed", [True, False])
def test_two_orders_under_one_id_at_once(shop: Stack, keyed: bool) -> None:
    """One is accepted and becomes the order, the other gets 409."""
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            order_id = f"race-{uuid.uuid4()}"
            keys = [f"{letter}-{order_id}" if keyed else None for letter in "ab"]
            answers = list(pool.map(place, [shop] * 2, [order_id] * 2, [1, 9], keys))
            assert sorted(answer.status_code for answer in answers) == [202, 409]
            (accepted,) = [answer for answer in answers if answer.status_code == 202]
            shown = shop.get(f"/api/orders/{order_id}").json()
            assert pieces(shown) == pieces(accepted.json())


def test_one_after_the_other_without_workers(waiting: Stack) -> None:
    """The second and third order under an id are refused while the first waits, and a repetition is not."""
    order_id = "same-id"
    assert [place(waiting, order_id, n, f"k{n}").status_code for n in (1, 2, 3)] == [202, 409, 409]
    assert place(waiting, order_id, 2).status_code == 409
    again = place(waiting, order_id, 1, "another key")
    assert (again.status_code, again.headers.get("Idempotency-Replayed")) == (202, "true")
    assert pieces(waiting.get(f"/api/orders/{order_id}").json()) == 1


def test_ids_of_events_that_are_taken_hold_nothing_up(waiting: Stack, tmp_path: Path) -> None:
    """Foreign events under the ids that ours would have: accepted, found, carried to the end."""
    broker = JetStreamBroker(waiting.nats.url)
    producer = Producer(broker, waiting)
    order_id = f"taken-{uuid.uuid4()}"
    names = ("created", "reserved", "paid", "confirmed")
    for name in names:
        foreign = created(("TEE-01", 1)).SerializeToString()
        broker.publish("ORDER.created", foreign, event_id=f"{order_id}.{name}")
    answer = place(waiting, order_id, 2)
    assert answer.status_code == 202
    assert waiting.get(f"/api/orders/{order_id}").json()["status"] == "accepted"
    with dramatiq_worker("tasks", log=tmp_path / "late.log", env=waiting.environment):
        order = producer.wait(order_id, "confirmed", "accepted", "reserved", "paid")
        eventually(lambda: producer.status(order_id) == "confirmed")
        order = waiting.get(f"/api/orders/{order_id}").json()
    assert [entry["event"] for entry in order["history"]] == list(names)
    assert pieces(order) == 2
    broker.close()


def test_a_foreign_order_under_an_id_of_ours(waiting: Stack, tmp_path: Path) -> None:
    """It came first and with other contents; what was answered 202 is what is carried out and shown."""
    broker = JetStreamBroker(waiting.nats.url)
    producer = Producer(broker, waiting)
    order_id = f"both-{uuid.uuid4()}"
    producer.publish(created(("NOTE-01", 7), order_id=order_id))
    answer = place(waiting, order_id, 2)
    assert answer.status_code == 202
    producer.publish(created(("NOTE-01", 8), order_id=order_id))
    assert pieces(waiting.get(f"/api/orders/{order_id}").json()) == 2
    with dramatiq_worker("tasks", log=tmp_path / "late.log", env=waiting.environment):
        eventually(lambda: producer.status(order_id) == "confirmed")
        eventually(lambda: len(broker.dead_letters.list("orders")) == 2)
    letters = broker.dead_letters.list("orders")
    assert all("other contents" in letter.error for letter in letters)
    order = waiting.get(f"/api/orders/{order_id}").json()
    assert (pieces(order), order["total_minor"]) == (2, 1_790)
    (charge,) = producer.charges(order_id)
    assert charge["amount"] == 1_790
    listed = waiting.get("/api/orders").json()["orders"]
    assert [one["order_id"] for one in listed] == [order_id]
    producer.books()
    broker.close()


def test_a_foreign_order_takes_its_id(shop: Stack, producer: Producer) -> None:
    """The API refuses another order under it, and answers the same one as a repetition."""
    order_id = producer.publish(created(("NOTE-01", 3), customer_id="c-1"))
    producer.wait(order_id, "confirmed")
    assert place(shop, order_id, 4).status_code == 409
    again = place(shop, order_id, 3)
    assert (again.status_code, again.headers.get("Idempotency-Replayed")) == (202, "true")


def test_forged_events_show_nothing(shop: Stack, producer: Producer) -> None:
    """Every event of a step, forged, for orders in every final status and for orders that never were."""
    orders = {
        producer.publish(created(("NOTE-01", 1))): "confirmed",
        producer.publish(created(("NOTE-01", 1), payment_token="tok_declined")): "rejected",
        producer.publish(created(("PRINT-01", 60))): "rejected",
        producer.publish(created(("NOPE", 1))): "rejected",
    }
    for order_id, status in orders.items():
        producer.wait(order_id, status)
    before = {order_id: shop.get(f"/api/orders/{order_id}").json() for order_id in orders}
    strangers = [f"never-{name}-{uuid.uuid4()}" for name in FORGED]
    for name, never in zip(FORGED, strangers, strict=True):
        for order_id in (*orders, never):
            producer.raw(f"ORDER.{name}", forged(name, order_id))
    producer.wait(producer.publish(created()), "confirmed")
    settled(producer)
    for order_id, order in before.items():
        assert shop.get(f"/api/orders/{order_id}").json() == order
    for never in strangers:
        assert shop.get(f"/api/orders/{never}").status_code == 404
    listed = {order["order_id"] for order in shop.get("/api/orders?limit=100").json()["orders"]}
    assert not listed & set(strangers)
    producer.books()


def test_events_that_run_ahead_are_not_believed(shop: Stack, producer: Producer) -> None:
    """Forged before the service comes to them: while the payment waits, and for each step once more after it."""
    shop.knobs(latency_ms=700)
    try:
        order_id = producer.publish(created(("BAG-01", 2)))
        producer.wait(order_id, "reserved")
        for name in FORGED:
            producer.raw(f"ORDER.{name}", forged(name, order_id))
        settled(producer, but={"capture_payment"})
        order = shop.get(f"/api/orders/{order_id}").json()
        assert [entry["event"] for entry in order["history"]] == ["created", "reserved"]
    finally:
        shop.knobs(latency_ms=0)
    order = producer.wait(order_id, "reserved", "paid", "confirmed")
    eventually(lambda: producer.status(order_id) == "confirmed")
    order = shop.get(f"/api/orders/{order_id}").json()
    assert [entry["event"] for entry in order["history"]] == ["created", "reserved", "paid", "confirmed"]
    (charge,) = producer.charges(order_id)
    assert order["history"][2]["detail"]["charge_id"] == charge["id"]


def settled(producer: Producer, but: frozenset[str] | set[str] = frozenset()) -> None:
    """Wait until every subscription has come to the end of the stream."""

    def waiting() -> list[str]:
        consumers = producer.broker.connection.api("CONSUMER.LIST.ORDERS")["consumers"]
        return [
            one["name"]
            for one in consumers
            if one["num_pending"] + one["num_ack_pending"] and not any(name in one["name"] for name in but)
        ]

    eventually(lambda: not waiting())


def test_many_repetitions_do_not_slow_the_pages(waiting: Stack) -> None:
    """Thousands of one event at the end of the stream: the list has the orders before it, and reads it once."""
    broker = JetStreamBroker(waiting.nats.url)
    placed = [waiting.order(customer_id=f"c-{n}")["order_id"] for n in range(12)]
    first = message_at(broker.connection, "ORDERS", 1)
    assert first is not None
    for _ in range(8):
        broker.connection.publish_many([Publication(first.subject, first.data) for _ in range(1_000)])
    assert {order["order_id"] for order in waiting.get("/api/orders?limit=100").json()["orders"]} == set(
        placed
    )
    begin = time.monotonic()
    for _ in range(10):
        assert waiting.get("/").status_code == 200
    assert (time.monotonic() - begin) / 10 < 1.0
    page = waiting.get("/api/orders?limit=8").json()
    assert [order["order_id"] for order in page["orders"]] == placed[:3:-1]
    broker.close()
