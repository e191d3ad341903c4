"""Orders that do not move on are listed, go on, or end, with and without their dead letters."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.dead_letters import DeadLetter
from tasks.saga import NotCancellable
from tests.support.polling import eventually
from tests.support.processes import REPOSITORY
from tests.tasks.producer import Producer, created
from tests.tasks.test_saga_properties import Service
from tests.tasks.test_saga_properties import created as small
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
    done = subprocess.run(
        [sys.executable, "-m", "tasks.operate", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **producer.shop.environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
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
    assert "cancelled; 1 dead letters dropped" in said
    order = producer.wait(order_id, "cancelled", "failed")
    eventually(lambda: producer.status(order_id) == "cancelled")
    order = producer.shop.get(f"/api/orders/{order_id}").json()
    assert order["reason"] == "the customer asked for it"
    page = producer.shop.get(f"/orders/{order_id}")
    assert page.status_code == 200
    assert "Cancelled" in page.text
    assert producer.available("LAMP-01") == before
    assert letters(producer, order_id) == []
    producer.shop.knobs(failure_rate=0.0)
    assert "OrderCancelled published again" in operate(producer, "redrive", order_id)
    assert "cancelled; 0" in operate(producer, "cancel", order_id)
    assert producer.charges(order_id) == []
    listed = operate(producer, "stuck", "--minutes", "0")
    assert f"{order_id}  cancelled, refund: ask the gateway" in listed
    assert "noted" in operate(producer, "refunded", order_id)
    assert order_id not in operate(producer, "stuck", "--minutes", "0")
    assert "no refund is due" in operate(producer, "refunded", order_id, code=1)
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
    order_id = producer.publish(created())
    producer.wait(order_id, "confirmed")
    assert f"Order {order_id} is confirmed already." in operate(producer, "cancel", order_id, code=1)
    assert "There is no order nobody." in operate(producer, "cancel", "nobody", code=1)
    assert "is no order id" in operate(producer, "cancel", "../x", code=2)
    assert "name the orders" in operate(producer, "redrive", code=2)
    assert "there is no such order" in operate(producer, "redrive", "nobody")
    assert order_id not in operate(producer, "stuck", "--minutes", "0")


def test_an_order_before_its_first_step(tmp_path: Path) -> None:
    """Without workers: it is listed, published again, and cancelled, and holds nothing."""
    with Stack(tmp_path, workers=False) as shop:
        broker = JetStreamBroker(shop.nats.url)
        producer = Producer(broker, shop)
        order_id = shop.order(("MUG-01", 3))["order_id"]
        assert f"{order_id}  accepted" in operate(producer, "stuck", "--minutes", "0")
        assert operate(producer, "stuck", "--minutes", "10") == ""
        assert "OrderCreated published again" in operate(producer, "redrive", order_id)
        assert [one["order_id"] for one in shop.get("/api/orders").json()["orders"]] == [order_id]
        assert "cancelled; 0" in operate(producer, "cancel", order_id)
        assert producer.available("MUG-01") == 100_000
        broker.close()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_cancelling_at_any_moment(seed: int) -> None:
    """Amid the steps, twice at once, killed half-way: stock is conserved, and no charge is forgotten."""
    chance = random.Random(seed)
    service = Service(window=chance.random() < 0.5, sweep_after=chance.choice([0, 20]))
    order_ids = [f"o-{number}" for number in range(3)]
    for order_id in order_ids:
        service.stream.append(
            small(order_id, [("MUG-01", 1)], chance.choice(["tok_ok", "tok_ok", "tok_declined"]))
        )
    service.deliver_new()
    cancels = [chance.choice(order_ids) for _ in range(4)]

    def cancel(order_id: str) -> None:
        try:
            service.saga().cancel(order_id, "asked for")
        except NotCancellable:
            pass

    while service.running or service.pending:
        if cancels and chance.random() < 0.1:
            order_id = cancels.pop()
            run = service.world.start("cancel", lambda order_id=order_id: cancel(order_id))
            service.running.append((run, ("cancel", order_id)))  # type: ignore[arg-type]
        elif service.pending and len(service.running) < 4:
            service.start(service.pending.pop(chance.randrange(len(service.pending))))
        if not service.running:
            continue
        position = chance.randrange(len(service.running))
        name, what = service.running[position][1]
        crash = chance.random() < 0.05
        service.go_on(position, crash=crash)
        if crash and name == "cancel" and service.pending and service.pending[-1] == (name, what):
            service.pending.pop()
            cancels.append(what)  # type: ignore[arg-type]
    for order_id in order_ids:
        cancel(order_id)  # what was killed half-way comes to its end
    service.deliver_new()
    service.finish()
    stock, records = service.stock(), service.records()
    refunds = {refund.order_id for refund in stock.notes.refunds()}
    for order_id in order_ids:
        state = records[order_id].state
        assert state in ("confirmed", "released", "rejected", "cancelled")
        if order_id in service.gateway.captured and state != "confirmed":
            assert order_id in refunds
    service.check_stock()
