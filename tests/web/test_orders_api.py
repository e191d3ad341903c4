"""The API as a client uses it: place an order, follow it, list orders, read the catalogue."""

from __future__ import annotations

import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime

import pytest

from dramatiq_jetstream import JetStreamBroker
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks.claims import Claim
from tests.web.stack import Stack, order_body


def test_an_order_is_accepted_and_then_confirmed(service: Stack) -> None:
    """202 with the order's address; its history then leads from created to confirmed."""
    answer = service.post("/api/orders", json=order_body(("MUG-01", 2), ("BAG-01", 1)))
    assert answer.status_code == 202
    accepted = answer.json()
    assert answer.headers["Location"] == f"/api/orders/{accepted['order_id']}"
    assert accepted["status"] == "accepted"
    assert accepted["customer_id"] == "c-42"
    assert accepted["items"][0] == {
        "sku": "MUG-01",
        "name": "Enamel mug",
        "quantity": 2,
        "unit_price": 12.9,
    }
    assert (accepted["total_amount"], accepted["total_minor"], accepted["currency"]) == (45.79, 4579, "EUR")

    order = service.final(accepted["order_id"])
    assert order["status"] == "confirmed"
    assert [entry["event"] for entry in order["history"]] == ["created", "reserved", "paid", "confirmed"]
    times = [datetime.fromisoformat(entry["at"]) for entry in order["history"]]
    assert times == sorted(times)
    assert "reason" not in order


def test_the_address_of_a_new_order_works_at_once(service: Stack) -> None:
    """There is no moment after the 202 in which the order is not found."""
    for _ in range(5):
        location = service.post("/api/orders", json=order_body()).headers["Location"]
        assert service.get(location).status_code == 200


def test_an_order_as_protobuf(service: Stack) -> None:
    """The body may be the event itself; the id in it is the order's id."""
    order_id = f"pb-{uuid.uuid4()}"
    event = OrderCreated(
        order_id=order_id,
        customer_id="c-7",
        items=[OrderItem(sku="NOTE-01", quantity=3)],
        total_amount=26.85,
    )
    answer = service.post(
        "/api/orders",
        data=event.SerializeToString(),
        headers={"Content-Type": "application/x-protobuf"},
    )
    assert answer.status_code == 202, answer.text
    assert answer.json()["order_id"] == order_id
    assert service.final(order_id)["status"] == "confirmed"


def test_a_declined_payment_rejects_the_order_and_gives_the_stock_back(service: Stack) -> None:
    """The order says why it was rejected, and the stock is as it was."""
    before = stock(service, "KETTLE-01")
    order = service.final(service.order(("KETTLE-01", 3), payment_token="tok_declined")["order_id"])
    assert order["status"] == "rejected"
    assert "declined" in order["reason"]
    assert stock(service, "KETTLE-01") == before


def test_more_than_there_is_in_stock_is_rejected(service: Stack) -> None:
    """An order for more than there is ends with that as its reason."""
    order = service.final(service.order(("PRINT-01", 51))["order_id"])
    assert order["status"] == "rejected"
    assert "stock" in order["reason"]


def test_the_catalogue_shows_prices_and_stock(service: Stack) -> None:
    """The products are an array; an order takes from the stock shown."""
    products = service.get("/api/products").json()
    mug = next(product for product in products if product["sku"] == "MUG-01")
    assert mug["name"] == "Enamel mug"
    assert (mug["unit_price"], mug["unit_price_minor"], mug["currency"]) == (12.9, 1290, "EUR")
    before = stock(service, "LAMP-01")
    service.final(service.order(("LAMP-01", 4))["order_id"])
    assert stock(service, "LAMP-01") == before - 4


def stock(service: Stack, sku: str) -> int:
    products = service.get("/api/products").json()
    return next(int(product["stock"]) for product in products if product["sku"] == sku)


def test_the_list_is_newest_first_and_paged(service: Stack) -> None:
    """Following the Link header visits every order once, newest first."""
    placed = [service.order(customer_id="c-list")["order_id"] for _ in range(5)]
    seen: list[str] = []
    path: str | None = "/api/orders?limit=2"
    while path is not None and len(seen) < 500 and not set(placed) <= set(seen):
        answer = service.get(path)
        assert answer.status_code == 200
        body = answer.json()
        assert len(body["orders"]) <= 2
        seen += [order["order_id"] for order in body["orders"]]
        link = answer.links.get("next")
        assert (link is None) == (body["next"] is None)
        path = link["url"] if link else None
    assert [order_id for order_id in seen if order_id in placed] == placed[::-1]
    assert len(seen) == len(set(seen))


class TestIdempotency:
    """The Idempotency-Key header."""

    def test_the_same_request_gets_the_same_answer(self, service: Stack) -> None:
        """A repeated request is answered like the first, and places nothing."""
        key = {"Idempotency-Key": str(uuid.uuid4())}
        first = service.post("/api/orders", json=order_body(), headers=key)
        second = service.post("/api/orders", json=order_body(), headers=key)
        assert (first.status_code, second.status_code) == (202, 202)
        assert second.headers["Location"] == first.headers["Location"]
        assert second.json()["order_id"] == first.json()["order_id"]
        assert "Idempotency-Replayed" not in first.headers
        assert second.headers["Idempotency-Replayed"] == "true"

    def test_another_order_with_the_same_key_is_refused(self, service: Stack) -> None:
        """One key is one order."""
        key = {"Idempotency-Key": str(uuid.uuid4())}
        service.post("/api/orders", json=order_body(("MUG-01", 1)), headers=key)
        answer = service.post("/api/orders", json=order_body(("MUG-01", 2)), headers=key)
        assert answer.status_code == 422
        assert answer.json()["type"] == "/docs#idempotency-key-reused"

    def test_an_archived_order_is_named(self, service: Stack) -> None:
        """The repetition of a request is told the id of its order, which the request does not have."""
        key = {"Idempotency-Key": str(uuid.uuid4())}
        order_id = service.post("/api/orders", json=order_body(), headers=key).json()["order_id"]
        service.final(order_id)
        with closing(JetStreamBroker(service.nats.url)) as broker:
            claims = broker.bucket("stock")
            claim = claims.get(f"claim.{order_id}", linearizable=True)
            assert claim is not None
            claims.update(claim.key, Claim.decode(claim.value).archived.encode(), revision=claim.revision)
        answer = service.post("/api/orders", json=order_body(), headers=key)
        assert (answer.status_code, answer.json()["type"]) == (409, "/docs#order-archived")
        assert answer.json()["detail"] == f"Order {order_id} was placed before and is archived."

    def test_twenty_at_once_place_one_order(self, service: Stack) -> None:
        """Twenty simultaneous requests with one key: one order, and nothing but 202 and 409."""
        key = {"Idempotency-Key": str(uuid.uuid4())}
        customer = f"c-{uuid.uuid4()}"
        with ThreadPoolExecutor(20) as pool:
            answers = list(
                pool.map(
                    lambda _: service.post("/api/orders", json=order_body(customer_id=customer), headers=key),
                    range(20),
                )
            )
        assert {answer.status_code for answer in answers} <= {202, 409}
        assert len({answer.json()["order_id"] for answer in answers if answer.status_code == 202}) == 1
        assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 409)
        orders = service.get("/api/orders?limit=100").json()["orders"]
        assert sum(order["customer_id"] == customer for order in orders) == 1

    @pytest.mark.parametrize("key", ["", "k" * 256, "naïve"])
    def test_a_key_that_cannot_be_one(self, service: Stack, key: str) -> None:
        """An empty, long or non-ASCII key is refused by name."""
        answer = service.post("/api/orders", json=order_body(), headers={"Idempotency-Key": key.encode()})
        assert answer.status_code == 400
        assert "Idempotency-Key" in answer.json()["detail"]


def test_amounts_have_no_rounding_noise(service: Stack) -> None:
    """Amounts are written with at most the decimals of their currency."""
    text = service.post("/api/orders", json=order_body(("BAG-01", 3), ("NOTE-01", 7))).text
    amounts = re.findall(r'"(?:total_amount|unit_price)":\s*([0-9.]+)', text)
    assert amounts == ["19.99", "8.95", "122.62"] or set(amounts) == {"19.99", "8.95", "122.62"}
