"""A newer version runs beside this one: what it writes and this one does not know stops nothing, and is not lost.

Real processes of this version get what such a version may write: events with more members, events of other types,
records with more in them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import RevisionConflict
from dramatiq_jetstream.kv import Bucket
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tests.support.polling import eventually
from tests.web.stack import Stack
from tests.web.test_webhooks import Receiver

#: The member 1000 of a protobuf message, a text.
MORE = b"\xc2\x3e\x05newer"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("newer")
    with Stack(directory, env={"WEBHOOK_NETWORKS": "127.0.0.0/8"}) as stack:
        yield stack


@pytest.fixture(scope="module")
def broker(shop: Stack) -> Iterator[JetStreamBroker]:
    broker = JetStreamBroker(shop.nats.url)
    yield broker
    broker.close()


def settled(broker: JetStreamBroker) -> None:
    stream = broker.stream("ORDERS")
    eventually(lambda: not any(one.waiting or one.in_flight for one in stream.consumers()), timeout=60)


def changed(bucket: Bucket, key: str, **members: Any) -> None:
    """Write what a newer version would: a value with further members, or without one that is None."""

    def written() -> bool:
        entry = bucket.get(key, linearizable=True)
        assert entry is not None
        value = {**json.loads(entry.value), **members}
        value = {name: said for name, said in value.items() if members.get(name, "") is not None}
        try:
            bucket.update(key, json.dumps(value).encode(), revision=entry.revision)
        except RevisionConflict:
            return False
        return True

    eventually(written, timeout=60)


def test_events_with_more_in_them(shop: Stack, broker: JetStreamBroker) -> None:
    """An order of a newer program is carried out, and an event that is not known here is nothing to this version."""
    order_id = f"newer-{uuid.uuid4().hex}"
    items = [OrderItem(sku="MUG-01", quantity=1)]
    event = OrderCreated(order_id=order_id, customer_id="c-42", items=items, total_amount=12.90)
    broker.publish("ORDER.created", event.SerializeToString() + MORE, event_id=order_id)
    broker.publish("ORDER.inspected", b"\x0a\x03o-1" + MORE, event_id=f"{order_id}.inspected")
    eventually(lambda: shop.get(f"/api/orders/{order_id}").status_code == 200, timeout=60)
    assert shop.final(order_id, timeout=60)["status"] == "confirmed"
    settled(broker)
    assert broker.dead_letters.count() == 0
    assert shop.get(f"/orders/{order_id}").status_code == 200
    assert order_id in [one["order_id"] for one in shop.get("/api/orders").json()["orders"]]


def test_a_record_that_only_a_newer_version_may_act_on(shop: Stack, broker: JetStreamBroker) -> None:
    """Its order waits for a worker of that version, others do not; then it is charged once and confirmed."""
    shop.knobs(latency_ms=1_500)
    order_id = shop.order()["order_id"]
    eventually(lambda: shop.get(f"/api/orders/{order_id}").json()["status"] == "reserved", timeout=60)
    stock = broker.bucket("stock")
    changed(stock, f"order.{order_id}", insurance=300)
    shop.workers.wait_for_output("A worker of a newer version is waited for: .*insurance", timeout=60)
    shop.knobs(latency_ms=0)
    assert shop.final(shop.order()["order_id"], timeout=60)["status"] == "confirmed"
    assert shop.post(f"/api/orders/{order_id}/cancel").status_code == 503, "nor does the front end act on it"
    entry = stock.get(f"order.{order_id}", linearizable=True)
    assert entry is not None
    assert json.loads(entry.value)["insurance"] == 300
    changed(stock, f"order.{order_id}", insurance=None)
    assert shop.final(order_id, timeout=60)["status"] == "confirmed"
    charges = shop.session.get(f"{shop.gateway_url}/charges?order_id={order_id}", timeout=30).json()[
        "charges"
    ]
    assert len(charges) == 1


def test_what_is_shown_has_more_in_it(shop: Stack, broker: JetStreamBroker) -> None:
    """Pages show what they know of a record of the read model; the next event leaves the rest as it is."""
    order_id = shop.final(shop.order()["order_id"], timeout=60)["order_id"]
    settled(broker)
    orders = broker.bucket("orders")
    entry = orders.get(order_id)
    assert entry is not None
    events = json.loads(entry.value)["events"]
    inspected = {"sequence": 10**6, "at": events["confirmed"]["at"], "inspector": "bo"}
    changed(orders, order_id, gift="a ribbon", events={**events, "inspected": inspected})
    page = shop.get(f"/orders/{order_id}")
    assert (page.status_code, "inspected" in page.text) == (200, True)
    assert shop.get(f"/api/orders/{order_id}").json()["status"] == "confirmed"
    assert shop.post(f"/api/orders/{order_id}/shipments", json={}).status_code == 202
    eventually(lambda: shop.get(f"/api/orders/{order_id}").json()["status"] == "shipped", timeout=60)
    entry = orders.get(order_id, linearizable=True)
    assert entry is not None
    kept = json.loads(entry.value)
    assert (kept["gift"], kept["events"]["inspected"]) == ("a ribbon", inspected)


def test_webhooks_with_more_in_them(shop: Stack, broker: JetStreamBroker) -> None:
    """They are listed, sent and changed by this version, and keep what it does not know."""
    receiver = Receiver()
    made = shop.post("/api/webhooks", json={"url": receiver.url, "events": ["order.confirmed"]}).json()
    key = f"endpoint.{made['id']}"
    changed(broker.bucket("webhooks"), key, retries="gentle")
    order_id = shop.final(shop.order()["order_id"], timeout=60)["order_id"]
    path = f"/api/webhooks/{made['id']}"

    def deliveries() -> list[dict[str, Any]]:
        answer = shop.get(f"{path}/deliveries")
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["deliveries"]
        return found

    eventually(lambda: [one["state"] for one in deliveries()] == ["delivered"], timeout=60)
    assert receiver.types(made["secret"], order_id) == {"order.confirmed"}
    log = broker.bucket("deliveries")
    (delivery,) = log.keys(f"{made['id']}.")
    changed(log, delivery, trace="abc")
    assert [one["id"] for one in deliveries()] == [delivery.rpartition(".")[2]]
    assert shop.post(f"{path}/deliveries/{delivery.rpartition('.')[2]}/send").status_code == 202
    eventually(lambda: len(receiver.requests) == 2, timeout=60)
    eventually(lambda: [one["state"] for one in deliveries()] == ["delivered"], timeout=60)
    assert shop.session.patch(f"{shop.url}{path}", json={"description": "x"}, timeout=20).status_code == 200
    for bucket, name, member in ((log, delivery, "trace"), (broker.bucket("webhooks"), key, "retries")):
        entry = bucket.get(name, linearizable=True)
        assert entry is not None
        assert member in json.loads(entry.value)
    shop.session.delete(f"{shop.url}{path}", timeout=20)
    receiver.close()
