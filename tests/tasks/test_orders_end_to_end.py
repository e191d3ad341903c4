"""Orders through the whole service: real server, real workers, real gateway over HTTP."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from dramatiq_jetstream.sending.envelope import Event
from orders.v1.events_pb2 import (
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderItem,
    OrderPaid,
    OrderReserved,
)
from tests.support.polling import eventually, holds
from tests.tasks.producer import Producer, created
from tests.web.stack import Stack


def events_of(order: dict[str, object]) -> list[str]:
    return [entry["event"] for entry in order["history"]]  # type: ignore[attr-defined]


def test_event_without_headers_is_confirmed(producer: Producer) -> None:
    """A foreign OrderCreated with fields 1 to 4 and no header is priced, charged once and confirmed."""
    order_id = producer.publish(created(("MUG-01", 2), ("TEE-01", 1)))
    order = producer.wait(order_id, "confirmed")
    assert events_of(order) == ["created", "reserved", "paid", "confirmed"]
    assert order["total_minor"] == 2 * 1_290 + 2_450
    assert [item["unit_price"] for item in order["items"]] == [12.9, 24.5]
    (charge,) = producer.charges(order_id)
    assert (charge["amount"], charge["currency"], charge["status"]) == (5_030, "EUR", "captured")


def test_published_events_carry_cloudevents_headers(producer: Producer) -> None:
    """What the service publishes says in headers what it is, and has a deterministic id."""
    order_id = producer.publish(created())
    producer.wait(order_id, "confirmed")
    (confirmed,) = [e for e in producer.events(order_id) if e.subject == "ORDER.confirmed"]
    headers = confirmed.headers
    assert headers["Nats-Msg-Id"] == headers["ce-id"] == f"{order_id}.confirmed"
    assert headers["ce-type"] == "orders.v1.OrderConfirmed"
    assert headers["ce-subject"] == order_id
    assert headers["content-type"] == "application/protobuf"
    assert headers["ce-time"].endswith("Z")


def test_declined_payment_releases_the_stock(producer: Producer) -> None:
    """declined → stock given back → rejected, and no charge is captured."""
    before = producer.available("LAMP-01")
    order_id = producer.publish(created(("LAMP-01", 7), payment_token="tok_insufficient"))
    order = producer.wait(order_id, "rejected")
    assert events_of(order) == ["created", "reserved", "declined", "rejected"]
    assert order["reason"] == "the payment was declined: the account has insufficient funds"
    assert producer.available("LAMP-01") == before
    assert [charge["status"] for charge in producer.charges(order_id)] == ["declined"]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (created(("PRINT-01", 51)), "51 × PRINT-01 ordered"),
        (created(("PRINT-01", 51), ("MUG-01", 1)), "51 × PRINT-01 ordered"),
        (created(("NOPE", 1)), "there is no 'NOPE' in the catalogue"),
        (created(total_amount=1.0), "is not what the items add up to: 12.90 EUR, not 1.00 EUR"),
        (created(total_amount=float("nan")), "total_amount is nan"),
        (created(("MUG-01", -5)), "from 1 to 1000, not -5"),
        (created(("MUG-01", 2**31 - 1)), "from 1 to 1000"),
        (created(items=[]), "1 to 100 items, not 0"),
        (created(items=[OrderItem(sku="MUG-01", quantity=1)] * 10_000), "1 to 100 items, not 10000"),
    ],
)
def test_bad_orders_are_rejected_with_a_reason(producer: Producer, event: OrderCreated, reason: str) -> None:
    """An order that cannot be carried out is rejected at once; nothing is taken and nothing charged."""
    event.order_id = f"bad-{random.getrandbits(64):x}"
    order = producer.wait(producer.publish(event), "rejected")
    assert reason in order["reason"]
    assert events_of(order) == ["created", "rejected"]
    assert producer.charges(event.order_id) == []


@pytest.mark.parametrize(
    "order_id", ["", "../../etc/passwd", ".", "a b", "x" * 65, "*", "a\r\nNats-Msg-Id: 1"]
)
def test_unusable_order_ids_are_dead_letters(producer: Producer, order_id: str) -> None:
    """An event that can be attributed to no order becomes one dead letter, with the reason and the bytes."""
    event = created()
    event.order_id = order_id
    known = {letter.id for letter in producer.broker.dead_letters.list()}
    producer.publish(event)

    def letters() -> list[object]:
        return [one for one in producer.broker.dead_letters.list() if one.id not in known]

    eventually(letters)
    (letter,) = letters()
    assert letter.actor == "reserve_stock"  # type: ignore[attr-defined]
    assert letter.data == event.SerializeToString()  # type: ignore[attr-defined]
    if order_id:
        assert "cannot be used" in letter.error  # type: ignore[attr-defined]
    producer.wait(producer.publish(created()), "confirmed")


def test_bytes_that_are_no_event(producer: Producer) -> None:
    """A body that does not decode is a dead letter of each subscription, and the workers go on."""
    known = {letter.id for letter in producer.broker.dead_letters.list()}
    producer.raw("ORDER.created", b"\xff\xff not protobuf")
    producer.raw("ORDER.nothing-we-know", b"\x00")

    def found() -> bool:
        new = [letter for letter in producer.broker.dead_letters.list() if letter.id not in known]
        assert {letter.actor for letter in new} == {"reserve_stock", "project_event"}
        assert {letter.reason for letter in new} == {"undecodable"}
        return True

    eventually(found)
    producer.wait(producer.publish(created()), "confirmed")


def test_forged_events_change_nothing(producer: Producer) -> None:
    """ORDER.paid and ORDER.declined that no step published neither confirm nor release an order."""
    producer.shop.knobs(latency_ms=300)
    try:
        order_id = producer.publish(created(("BAG-01", 3)))
        producer.wait(order_id, "reserved")
        for subject, event in (
            ("ORDER.paid", OrderPaid(order_id=order_id, charge_id="ch_forged")),
            ("ORDER.declined", OrderDeclined(order_id=order_id)),
            ("ORDER.reserved", OrderReserved(order_id="never-created")),
        ):
            producer.raw(subject, event.SerializeToString())
    finally:
        producer.shop.knobs(latency_ms=0)
    eventually(lambda: (record := producer.record(order_id)) and record.state == "confirmed")
    (charge,) = producer.charges(order_id)
    confirmed = OrderConfirmed.FromString(
        next(e for e in producer.events(order_id) if e.subject == "ORDER.confirmed").data
    )
    assert confirmed.charge_id == charge["id"]
    producer.books()


def test_every_event_again_in_any_order(producer: Producer) -> None:
    """All events of confirmed and of rejected orders published again, shuffled: nothing changes."""
    orders = {
        producer.publish(created(("NOTE-01", 2))): "confirmed",
        producer.publish(created(("NOTE-01", 3), payment_token="tok_declined")): "rejected",
        producer.publish(created(("PRINT-01", 60))): "rejected",
    }
    for order_id, status in orders.items():
        producer.wait(order_id, status)
    stored = [event for order_id in orders for event in producer.events(order_id)]
    before = {order_id: producer.shop.get(f"/api/orders/{order_id}").json() for order_id in orders}
    level = producer.available("NOTE-01")
    again = stored * 2
    random.Random(1).shuffle(again)
    for event in again:
        producer.raw(event.subject, event.data)
    # What comes behind them on the stream is done when they are done.
    producer.wait(producer.publish(created()), "confirmed")

    def unchanged() -> bool:
        assert producer.available("NOTE-01") == level
        for order_id, order in before.items():
            assert producer.shop.get(f"/api/orders/{order_id}").json() == order
            assert len(producer.charges(order_id)) <= 1
            finals = {e.subject for e in producer.events(order_id)} & {"ORDER.confirmed", "ORDER.rejected"}
            assert len(finals) == 1
        return True

    holds(unchanged, 1.0, interval=0.2)
    assert len([e for order_id in orders for e in producer.events(order_id)]) == len(stored) * 3
    producer.books()


def test_gateway_down_for_a_moment(producer: Producer) -> None:
    """A payment that fails is tried again with backoff, and charged once although it was answered with 500."""
    # Slow too, so that the gateway is well again before the retries are used up.
    producer.shop.knobs(failure_after_charge_rate=1.0, latency_ms=350)
    order_id = producer.publish(created())
    eventually(lambda: producer.charges(order_id))
    producer.shop.knobs(failure_after_charge_rate=0.0, latency_ms=0)
    order = producer.wait(order_id, "confirmed")
    assert events_of(order) == ["created", "reserved", "paid", "confirmed"]
    assert len(producer.charges(order_id)) == 1


def test_exhausted_retries_fail_the_order_and_a_replay_confirms_it(producer: Producer) -> None:
    """failed with its cause and a dead letter; replayed when the gateway is back: paid, confirmed."""
    producer.shop.knobs(hang_after_charge_rate=1.0, hang_ms=2_000)
    try:
        order_id = producer.publish(created(("KETTLE-01", 2)))
        order = producer.wait(order_id, "failed")
        assert events_of(order) == ["created", "reserved", "failed"]
        assert "did not answer within 500 ms" in order["reason"]
        (letter,) = [
            one for one in producer.broker.dead_letters.list("payments") if order_id in one.message_id
        ]
        assert letter.reason == "retries exhausted"
        assert letter.actor == "capture_payment"
    finally:
        producer.shop.knobs(hang_after_charge_rate=0.0)
    assert producer.broker.dead_letters.replay(letter)
    order = producer.wait(order_id, "confirmed")
    assert events_of(order) == ["created", "reserved", "failed", "paid", "confirmed"]
    (charge,) = producer.charges(order_id)
    assert charge["status"] == "captured"
    producer.books()


def test_message_that_kills_its_workers_fails_its_order(producer: Producer) -> None:
    """A dead letter of whatever cause, here one delivered too often, makes its order failed."""
    order_id = f"poison-{random.getrandbits(64):x}"
    event = OrderReserved(order_id=order_id)
    producer.broker.dead_letters.store(
        queue="payments",
        origin=order_id,
        subject=producer.broker.names.task("payments"),
        data=event.SerializeToString(),
        headers={},
        reason="delivered too often",
        error="Delivered 11 times without being settled; its workers may have died of it.",
        deliveries=11,
        actor="capture_payment",
        event=Event("ORDER.reserved", event.SerializeToString(), {}, "ORDERS", 1, 0),
    )
    order = producer.wait(order_id, "failed")
    assert order["reason"].startswith("delivered too often")
    (letter,) = [
        one for one in producer.broker.dead_letters.list("payments") if one.data.endswith(order_id.encode())
    ]
    producer.broker.dead_letters.drop(letter)


def test_last_item_goes_to_one_of_twenty(producer: Producer) -> None:
    """Twenty orders for the last piece of a product: one is confirmed, nineteen are rejected."""
    left = producer.available("PRINT-01")
    if left > 1:
        producer.wait(producer.publish(created(("PRINT-01", left - 1))), "confirmed")
    assert producer.available("PRINT-01") == 1
    with ThreadPoolExecutor(20) as pool:
        order_ids = list(pool.map(lambda _: producer.publish(created(("PRINT-01", 1))), range(20)))
    statuses = [producer.wait(order_id, "confirmed", "rejected")["status"] for order_id in order_ids]
    assert sorted(statuses) == ["confirmed"] + ["rejected"] * 19
    assert producer.available("PRINT-01") == 0
    producer.books()


def test_killed_workers_lose_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers killed -9 again and again amid two hundred orders: all become final, and the books balance."""
    directory = tmp_path_factory.mktemp("killed")
    with Stack(directory, env={"ACK_WAIT": "2000", "PAYMENT_TIMEOUT": "1000"}) as shop:
        from dramatiq_jetstream import JetStreamBroker

        broker = JetStreamBroker(shop.nats.url)
        producer = Producer(broker, shop)
        shop.knobs(latency_ms=20, latency_jitter_ms=50)
        order_ids: list[str] = []
        for _ in range(4):
            for _ in range(50):
                token = random.choice(["tok_ok", "tok_ok", "tok_declined"])
                order_ids.append(producer.publish(created(("MUG-01", 1), ("TEE-01", 2), payment_token=token)))
            eventually(lambda: producer.status(order_ids[-50]) not in (None, "accepted"))
            shop.workers.kill()
            shop.workers.start()
        for order_id in order_ids:
            producer.wait(order_id, "confirmed", "rejected", timeout=60)
        for order_id in order_ids:
            captured = [c for c in producer.charges(order_id) if c["status"] == "captured"]
            assert len(captured) == (producer.status(order_id) == "confirmed")
        producer.books()
        assert broker.dead_letters.list() == []
        broker.close()
