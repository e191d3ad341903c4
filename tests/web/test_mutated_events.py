"""Events in every mutated form, shuffled into those of real orders: no page and no answer of the API breaks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.wire.connection import Publication
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks.events import TYPES
from tasks.model import STATUSES as STATUSES_OF_ORDERS
from tests.support.polling import eventually
from tests.tasks.producer import Producer, created
from tests.web.stack import FINAL, Stack

#: How large an answer may be, in bytes, and how long it may take, in seconds: far more than they are when all is well.
ORDER_SIZE = 20_000
LIST_SIZE = 400_000
PATIENCE_SECONDS = 5.0

STATUSES = set(STATUSES_OF_ORDERS)

TEXTS = st.one_of(
    st.sampled_from(
        ["", "x", "\0", "\x1b[31m", "<b>", "{{x}}", "\n", "\u202e", "EUR", "USD", "JPY", "eur", "NOPE"]
    ),
    st.sampled_from(
        ["pay", "reserve", "MUG-01", "NOTE-01", "tok_declined", "A" * 3_000, "👩\u200d🚀", "e\u0301" * 70]
    ),
    st.text(max_size=80),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, -1, 895, 1_000, 1_001, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63)]),
    st.integers(-(2**63), 2**63 - 1),
)
AMOUNTS = st.one_of(
    st.sampled_from([0.0, -1.0, 8.95, 1e308, 5e-324, float("nan"), float("inf")]), st.floats()
)


def value(draw: Any, field: FieldDescriptor) -> Any:
    """Draw what a field may hold on the wire."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return draw(TEXTS)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return draw(AMOUNTS)
        case FieldDescriptor.CPPTYPE_ENUM:
            return draw(st.sampled_from([0, 1, 5, 99, -1]))
        case FieldDescriptor.CPPTYPE_INT32:
            return max(-(2**31), min(2**31 - 1, draw(NUMBERS)))
    return draw(NUMBERS)


def fill(draw: Any, message: Message) -> None:
    """Set fields of a message to anything."""
    for field in message.DESCRIPTOR.fields:
        if field.name == "order_id" or draw(st.integers(0, 9)) < 3:
            continue
        if field.name == "items":
            for _ in range(draw(st.sampled_from([1, 1, 2, 150]))):
                if len(message.items) < 2:  # type: ignore[attr-defined]
                    fill(draw, message.items.add())  # type: ignore[attr-defined]
                else:
                    message.items.add().CopyFrom(message.items[0])  # type: ignore[attr-defined]
        elif field.message_type is not None:
            stamp = getattr(message, field.name)
            stamp.seconds = draw(NUMBERS)
            stamp.nanos = draw(st.sampled_from([0, -1, 2**31 - 1]))
        else:
            setattr(message, field.name, value(draw, field))


@st.composite
def mutated(draw: Any, strangers: list[str], placed: list[str]) -> tuple[str, bytes]:
    """Draw an event: of a type, filled with anything, perhaps with a flipped bit, or on another event's subject.

    Only a program that may say so is heard when it says that an order was shipped; of those placed none does.
    """
    order_id = draw(st.sampled_from([*strangers, *placed]))
    names = sorted(TYPES.keys() - ({"shipped"} if order_id in placed else set()))
    name = draw(st.sampled_from(names))
    event = TYPES[name]()
    fill(draw, event)
    event.order_id = order_id  # type: ignore[attr-defined]
    data = bytearray(event.SerializeToString())
    if data and draw(st.integers(0, 9)) == 0:
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    if draw(st.integers(0, 19)) == 0:
        name = draw(st.sampled_from([*names, "other", "created.x"]))
    return f"ORDER.{name}", bytes(data)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    """A service of its own, and a program that publishes beside it."""
    env = {"RETRY_LIMIT": "1"}
    with Stack(tmp_path_factory.mktemp("mutated"), env=env) as stack:
        assert stack.get("/api/orders").status_code == 200
        broker = JetStreamBroker(stack.nats.url)
        yield Producer(broker, stack)
        broker.close()


def settled(producer: Producer) -> None:
    """Wait until every subscription and queue has come to its end."""

    def nothing_waits() -> bool:
        consumers = producer.broker.connection.api("CONSUMER.LIST.ORDERS")["consumers"]
        queues = [producer.broker.queue_stats(queue) for queue in ("orders", "payments", "projection")]
        return not any(queue.ready + queue.in_flight + queue.delayed for queue in queues) and not any(
            one["num_pending"] + one["num_ack_pending"] for one in consumers
        )

    eventually(nothing_waits, timeout=60, interval=0.1)


def look(stack: Stack, path: str, size: int, *, expected: tuple[int, ...] = (200,)) -> Any:
    """Get an answer that is none of 5xx, and bounded in size and time."""
    begin = time.monotonic()
    answer = stack.get(path)
    took = time.monotonic() - begin
    assert answer.status_code in expected, f"{path}: {answer.status_code} {answer.text[:300]}"
    assert len(answer.content) < size, f"{path} has {len(answer.content)} bytes"
    assert took < PATIENCE_SECONDS, f"{path} took {took:.1f} s"
    return answer


def check_pages(stack: Stack, order_ids: list[str]) -> None:
    """Look at everything that shows orders."""
    for path in (
        "/api/orders?limit=100",
        "/api/orders",
        "/orders",
        "/",
        "/recent-orders",
        "/orders?status=rejected&sku=MUG-01&q=a",
        "/api/products",
    ):
        look(stack, path, LIST_SIZE)
    for order_id in order_ids:
        answer = look(stack, f"/api/orders/{order_id}", ORDER_SIZE, expected=(200, 404))
        look(stack, f"/orders/{order_id}", 2 * ORDER_SIZE, expected=(200, 404))
        look(stack, f"/orders/{order_id}/state", 2 * ORDER_SIZE, expected=(200, 404))
        if answer.status_code == 200:
            order = answer.json()
            assert order["status"] in STATUSES
            assert len(order["customer_id"]) <= 64
            assert order["history"][0]["event"] == "created", "an order that never was"


@given(data=st.data())
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
def test_mutated_events_break_nothing(shop: Producer, data: st.DataObject) -> None:
    """All types and all fields, before, between and after the events of orders that go their way undisturbed."""
    run = uuid.uuid4().hex[:8]
    strangers = [f"m-{run}-{number}" for number in range(6)]
    placed = [shop.shop.order(("NOTE-01", 1))["order_id"] for _ in range(2)]
    events = data.draw(st.lists(mutated(strangers, placed), min_size=20, max_size=40))
    good = created(("NOTE-01", 2), order_id=f"good-{run}")
    events.insert(data.draw(st.integers(0, len(events))), ("ORDER.created", good.SerializeToString()))
    shop.broker.connection.publish_many([Publication(subject, body) for subject, body in events])
    settled(shop)
    check_pages(shop.shop, [*strangers, *placed, good.order_id])
    for order_id in (*placed, good.order_id):
        order = shop.shop.final(order_id)
        assert order["status"] == "confirmed"
        assert [entry["event"] for entry in order["history"]] == ["created", "reserved", "paid", "confirmed"]
    shop.books()


def test_events_as_large_as_the_server_takes(shop: Producer) -> None:
    """A customer of 900 kB and 70,000 items are rejected orders that are shown in a few lines."""
    huge = OrderCreated(
        order_id=f"huge-{uuid.uuid4()}",
        customer_id="c" * 900_000,
        items=[OrderItem(sku="NOTE-01", quantity=1)],
    )
    many = OrderCreated(
        order_id=f"many-{uuid.uuid4()}",
        customer_id="c",
        items=[OrderItem(sku="NOTE-01", quantity=1)] * 70_000,
    )
    for event in (huge, many):
        shop.publish(event)
    settled(shop)
    check_pages(shop.shop, [huge.order_id, many.order_id])
    for event in (huge, many):
        assert shop.shop.get(f"/api/orders/{event.order_id}").json()["status"] == "rejected"


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"events": []}',
        b'{"events": {"created": {"sequence": "x", "at": 0}}}',
        b'{"events": {"created": {"sequence": 1, "at": 1e300}}}',
        b'{"events": {"rejected": {"sequence": 1, "at": 0}}}',
        b'{"events": {"created": {"sequence": %d, "at": 0}}, "currency": "NOPE"}',
        b'{"events": {"created": {"sequence": %d, "at": 0}}, "customer_id": "%s"}' % (1, b"c" * 900_000),
        b'{"events": {"created": {"sequence": 1, "at": 0}}, "items": [["MUG-01"]]}',
        b"[" * 50_000,
    ],
)
def test_a_bad_record_breaks_no_list(shop: Producer, record: bytes) -> None:
    """Whatever stands in the bucket under an order's id, the other orders are listed."""
    orders = [shop.shop.order()["order_id"] for _ in range(3)]
    for order_id in orders:
        shop.shop.final(order_id)
    settled(shop)
    bucket = shop.broker.bucket("orders")
    entry = bucket.get(orders[1])
    assert entry is not None
    if b"%d" in record:
        record = record.replace(b"%d", str(shop.broker.stream("ORDERS").last().sequence).encode())
    bucket.put(orders[1], record)
    try:
        check_pages(shop.shop, [orders[1]])
        listed = [order["order_id"] for order in shop.shop.get("/api/orders?limit=100").json()["orders"]]
        assert {orders[0], orders[2]} <= set(listed)
    finally:
        bucket.put(orders[1], entry.value)
    assert shop.shop.get(f"/api/orders/{orders[1]}").json()["status"] in FINAL
