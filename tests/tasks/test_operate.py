"""Orders that do not move on are listed, go on, or end, with and without their dead letters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.dead_letters import DeadLetter
from tests.support.polling import eventually
from tests.tasks.producer import Producer, created
from tests.web.stack import Stack


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    """A service that gives up a step after one retry, and a program beside it."""
    env = {"RETRY_LIMIT": "1", "PAYMENT_TIMEOUT": "300"}
    with Stack(tmp_path_factory.mktemp("operate"), env=env) as stack:
        broker = JetStreamBroker(stack.nats.url)
        yield Producer(broker, stack)
        broker.close()


def operate(producer: Producer, *arguments: str, code: int = 0) -> str:
    """Run the command; returns what it says."""
    done = producer.shop.command("tasks.operate", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def letters(producer: Producer, order_id: str) -> list[DeadLetter]:
    return [one for one in producer.broker.dead_letters.list() if order_id in (one.message_id or "")]


def failed(producer: Producer, sku: str = "LAMP-01", **knobs: object) -> str:
    """Return an order whose payment was given up."""
    producer.shop.knobs(**(knobs or {"failure_rate": 1.0}))
    order_id = producer.publish(created((sku, 2)))
    producer.wait(order_id, "failed")
    eventually(lambda: letters(producer, order_id))
    return order_id


@pytest.fixture(autouse=True)
def well(producer: Producer) -> Iterator[None]:
    yield
    producer.shop.knobs(failure_rate=0.0, hang_after_charge_rate=0.0)


def test_a_failed_order_is_cancelled(producer: Producer) -> None:
    """Its stock and its dead letter go, people see it, and it is not charged when the gateway is back."""
    before = producer.available("LAMP-01")
    order_id = failed(producer)
    assert producer.available("LAMP-01") == before - 2
    page = producer.shop.get(f"/orders/{order_id}").text
    assert "Its payment could not be completed yet." in page
    assert not any(technical in page for technical in ("Gateway", "retries exhausted", "payment gateway"))
    assert f"{order_id}  failed" in operate(producer, "stuck", "--minutes", "0")
    said = operate(producer, "cancel", order_id, "--reason", "the customer asked for it")
    assert "cancelled; " in said
    order = producer.wait(order_id, "cancelled", "failed")
    eventually(lambda: producer.status(order_id) == "cancelled")
    order = producer.shop.get(f"/api/orders/{order_id}").json()
    assert order["reason"] == "the customer asked for it"
    page = producer.shop.get(f"/orders/{order_id}")
    assert page.status_code == 200
    assert "Cancelled" in page.text
    assert producer.available("LAMP-01") == before
    eventually(lambda: letters(producer, order_id) == [])
    producer.shop.knobs(failure_rate=0.0)
    assert "OrderCancelled published again" in operate(producer, "redrive", order_id)
    assert "cancelled; 0" in operate(producer, "cancel", order_id)
    assert producer.charges(order_id) == []
    listed = operate(producer, "stuck", "--minutes", "0")
    assert f"{order_id}  cancelled: the gateway is asked whether it was charged" in listed
    assert "is not paid" in operate(producer, "refund", order_id, "--key", "r-1", code=1)
    producer.books()


@pytest.mark.parametrize("dropped", [True, False])
def test_a_failed_order_goes_on(producer: Producer, dropped: bool) -> None:
    """Its dead letter is replayed; when that is gone, its event is published again: it holds no stock for ever."""
    order_id = failed(producer, hang_after_charge_rate=1.0, hang_ms=1_500)
    if dropped:
        for letter in letters(producer, order_id):
            assert producer.broker.dead_letters.drop(letter)
    producer.shop.knobs(hang_after_charge_rate=0.0)
    (line,) = [one for one in operate(producer, "stuck", "--minutes", "0").splitlines() if order_id in one]
    assert ("no dead letter" in line) == dropped
    assert ("did not answer within" in line) != dropped
    said = operate(producer, "redrive", "--all", "--minutes", "0")
    assert f"{order_id}  {'OrderReserved published again' if dropped else '1 dead letters replayed'}" in said
    eventually(lambda: producer.status(order_id) == "confirmed")
    assert len(producer.charges(order_id)) == 1
    producer.books()


def test_what_is_not_cancelled(producer: Producer) -> None:
    """An order that is over, one that never was, and what is no order id."""
    order_id = producer.publish(created(("no-such-sku", 1)))
    producer.wait(order_id, "rejected")
    assert f"Order {order_id} is rejected already." in operate(producer, "cancel", order_id, code=1)
    assert "There is no order nobody." in operate(producer, "cancel", "nobody", code=1)
    assert "is no order id" in operate(producer, "cancel", "../x", code=2)
    assert "name the orders" in operate(producer, "redrive", code=2)
    assert "there is no such order" in operate(producer, "redrive", "nobody")
    assert order_id not in operate(producer, "stuck", "--minutes", "0")


def test_a_confirmed_order_is_refunded_in_part_and_cancelled(producer: Producer) -> None:
    """What was refunded before is not refunded again, although the gateway loses an answer; its stock comes back."""
    before = producer.available("LAMP-01")
    order_id = producer.publish(created(("LAMP-01", 1)))
    producer.wait(order_id, "confirmed")
    (charge,) = producer.charges(order_id)
    producer.shop.knobs(failure_after_charge_rate=0.5)
    for _ in range(2):
        said = operate(producer, "refund", order_id, "--key", "r-1", "--amount", "100")
        assert "refund requested" in said
    assert "minor units before" in operate(
        producer, "refund", order_id, "--key", "r-1", "--amount", "99", code=1
    )
    assert "can be refunded" in operate(
        producer, "refund", order_id, "--key", "r-2", "--amount", str(charge["amount"]), code=1
    )
    assert "cancelled" in operate(producer, "cancel", order_id)
    producer.shop.knobs(failure_after_charge_rate=0.0)

    def refunds() -> list[int]:
        url = f"{producer.shop.environment['PAYMENT_URL']}/refunds?order_id={order_id}"
        return sorted(one["amount"] for one in requests.get(url, timeout=30).json()["refunds"])

    eventually(lambda: refunds() == sorted([100, charge["amount"] - 100]), timeout=60)
    eventually(lambda: producer.status(order_id) == "cancelled")
    assert producer.available("LAMP-01") == before


def test_an_order_before_its_first_step(tmp_path: Path) -> None:
    """Without workers: it is listed, published again, and cancelled, and holds nothing."""
    with Stack(tmp_path, workers=False) as shop:
        broker = JetStreamBroker(shop.nats.url)
        producer = Producer(broker, shop)
        order_id = shop.order(("MUG-01", 3))["order_id"]
        assert f"{order_id}  accepted" in operate(producer, "stuck", "--minutes", "0")
        assert operate(producer, "stuck", "--minutes", "10") == ""
        # What a newer version has written keeps no other order from being listed, and is left alone.
        broker.bucket("stock").create("order.newer", b'{"state":"lost","at":{"lost":1}}')
        assert f"{order_id}  accepted" in operate(producer, "stuck", "--minutes", "0")
        assert "newer  left alone: " in operate(producer, "redrive", "newer")
        assert "does not know" in operate(producer, "cancel", "newer", code=1)
        broker.bucket("stock").delete("order.newer")
        assert "OrderCreated published again" in operate(producer, "redrive", order_id)
        assert [one["order_id"] for one in shop.get("/api/orders").json()["orders"]] == [order_id]
        assert "cancelled; 0" in operate(producer, "cancel", order_id)
        assert producer.available("MUG-01") == 100_000
        broker.close()
