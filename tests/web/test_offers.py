"""Of an order that stock does not cover, what there is is offered: accepted or declined by API and page, or it ends."""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.support.polling import eventually
from tests.web.stack import Stack

CHAIR = "CHAIR-01"

#: Long enough for a test to accept an offer, on a slow machine too.
LONG_MS = 600_000


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A service that offers what there is."""
    env = {"SHORT_STOCK": "offer", "OFFER_DEADLINE": str(LONG_MS)}
    with Stack(tmp_path_factory.mktemp("offers"), env=env) as stack:
        yield stack


def stock_of(shop: Stack, sku: str, pieces: int) -> None:
    """Have so many pieces of a product in stock."""
    answer = shop.post(
        f"/api/products/{sku}/stock",
        json={"count": pieces, "reason": "counted"},
        headers={"Idempotency-Key": str(uuid.uuid4())},
    )
    assert answer.status_code == 200, answer.text


def in_stock(shop: Stack, sku: str) -> int:
    return next(one["stock"] for one in shop.get("/api/products").json() if one["sku"] == sku)


def wait_for(shop: Stack, order_id: str, status: str) -> dict[str, Any]:
    """Wait until an order has a status; returns it."""

    def order() -> dict[str, Any] | None:
        body: dict[str, Any] = shop.get(f"/api/orders/{order_id}").json()
        return body if body["status"] == status else None

    return eventually(order, timeout=60)  # type: ignore[return-value]


def offered(shop: Stack, customer_id: str = "c-42") -> dict[str, Any]:
    """Return an order of five chairs and a mug that is offered, for there are two chairs."""
    stock_of(shop, CHAIR, 2)
    placed = shop.order((CHAIR, 5), ("MUG-01", 1), customer_id=customer_id)
    return wait_for(shop, placed["order_id"], "offered")


def charges(shop: Stack, order_id: str) -> list[int]:
    found = requests.get(f"{shop.gateway_url}/charges?order_id={order_id}", timeout=30).json()["charges"]
    return [one["amount"] for one in found]


def test_an_offer_is_accepted_and_what_there_is_is_charged(shop: Stack) -> None:
    """The order shows what there is and until when; accepted, it is that, however often it is accepted."""
    order = offered(shop)
    address = f"/api/orders/{order['order_id']}"
    price = next(line["unit_price"] for line in order["items"] if line["sku"] == CHAIR)
    assert [(line["sku"], line["quantity"]) for line in order["items"]] == [(CHAIR, 5), ("MUG-01", 1)]
    offer = order["offer"]
    assert [(one["sku"], one["ordered"], one["quantity"]) for one in offer["items"]] == [
        (CHAIR, 5, 2),
        ("MUG-01", 1, 1),
    ]
    assert offer["total_amount"] == pytest.approx(2 * price + 12.9)
    assert order["history"][-1]["detail"]["expires_at"] == offer["expires_at"]
    assert charges(shop, order["order_id"]) == []
    assert in_stock(shop, CHAIR) == 0
    for _ in range(2):
        answer = shop.post(f"{address}/accept")
        assert answer.status_code == 202, answer.text
        assert answer.headers["Location"] == address
    confirmed = shop.final(order["order_id"], timeout=60)
    assert confirmed["total_minor"] == offer["total_minor"]
    assert {line["sku"]: line["quantity"] for line in confirmed["items"]} == {CHAIR: 2, "MUG-01": 1}
    assert charges(shop, order["order_id"]) == [offer["total_minor"]]
    assert [entry["event"] for entry in confirmed["history"]].count("offer_accepted") == 1
    assert confirmed["history"][2]["detail"]["by"] == "operator"
    late = shop.post(f"{address}/accept")
    assert late.status_code == 202, "it was accepted, and that is what the repetition is told"


def test_an_offer_is_declined(shop: Stack) -> None:
    """A cancel ends it; what was set aside is in stock again, and there is nothing to accept any more."""
    order = offered(shop)
    address = f"/api/orders/{order['order_id']}"
    assert shop.post(f"{address}/cancel", json={"reason": "I need five"}).status_code == 202
    assert wait_for(shop, order["order_id"], "cancelled")["reason"] == "I need five"
    eventually(lambda: in_stock(shop, CHAIR) == 2, timeout=60)
    refused = shop.post(f"{address}/accept")
    assert (refused.status_code, refused.json()["type"]) == (409, "/docs#not-offered")
    assert charges(shop, order["order_id"]) == []


def test_what_is_not_offered(shop: Stack) -> None:
    """An order that stock covers, one of which there is nothing at all, and one that never was."""
    covered = shop.order(("MUG-01", 1))["order_id"]
    assert shop.final(covered, timeout=60)["status"] == "confirmed"
    stock_of(shop, CHAIR, 0)
    nothing = shop.order((CHAIR, 1))["order_id"]
    assert shop.final(nothing, timeout=60)["status"] == "rejected"
    for order_id in (covered, nothing):
        assert "offer" not in shop.get(f"/api/orders/{order_id}").json()
        assert shop.post(f"/api/orders/{order_id}/accept").status_code == 409
    assert shop.post("/api/orders/no-such-order/accept").status_code == 404


def test_offers_are_found_saved_and_counted(shop: Stack) -> None:
    """By their status, on the list, in exports, and in the figures."""
    order = offered(shop, customer_id="c-found")
    order_id = order["order_id"]
    for query in ("status=offered", f"customer=c-found&sku={CHAIR}"):
        listed = shop.get(f"/api/orders?{query}").json()["orders"]
        assert order_id in [one["order_id"] for one in listed]
    assert "Partly in stock" in shop.get("/orders?status=offered").text
    lines = shop.get("/api/orders.ndjson?status=offered").text.splitlines()
    assert [one["offer"] for one in map(json.loads, lines) if one["order_id"] == order_id] == [order["offer"]]
    rows = list(csv.DictReader(io.StringIO(shop.get("/api/orders.csv?customer=c-found").text)))
    assert [row["status"] for row in rows] == ["offered"]

    def counted() -> bool:
        table = shop.get("/admin").text
        return "Partly in stock" in table and f'<td class="number">{len(offers())}</td>' in table

    def offers() -> list[str]:
        exported = map(json.loads, shop.get("/api/orders.ndjson").text.splitlines())
        return [one["order_id"] for one in exported if "offer" in one]

    eventually(counted, timeout=60)


def test_the_buttons_of_the_page(shop: Stack) -> None:
    """A person accepts what there is, and sees what was ordered beside it from then on."""
    order = offered(shop)
    address = f"/orders/{order['order_id']}"
    text = shop.get(address).text
    assert f'action="{address}/accept"' in text
    assert f'action="{address}/cancel"' in text
    page = shop.post(f"{address}/accept")
    assert page.status_code == 200
    assert "Offer accepted" in page.text
    assert f'action="{address}/accept"' not in page.text
    shop.final(order["order_id"], timeout=60)
    text = shop.get(address).text
    assert "by anyone on this machine" in text
    assert '<th scope="col" class="number">Ordered</th>' in text
    again = shop.post(f"{address}/accept")
    assert again.status_code == 200


def test_the_form_takes_more_than_there_is(shop: Stack) -> None:
    """As long as there is something of it: what there is will be offered."""
    stock_of(shop, CHAIR, 1)
    form = {"customer_id": "c-form", f"quantity-{CHAIR}": "3", "submission": str(uuid.uuid4())}
    page = shop.post("/orders", data=form)
    assert page.status_code == 200, page.text
    order_id = page.url.rpartition("/")[2]
    wait_for(shop, order_id, "offered")
    stock_of(shop, CHAIR, 0)
    refused = shop.post("/orders", data={**form, "submission": str(uuid.uuid4())})
    assert refused.status_code == 422
    assert "none left" in refused.text


def test_an_offer_ends_in_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is not accepted is cancelled by itself, its pieces are in stock again, and its page says why."""
    env = {"SHORT_STOCK": "offer", "OFFER_DEADLINE": "1000", "STUCK_AFTER": "1000"}
    with Stack(tmp_path_factory.mktemp("late"), env=env) as shop:
        stock_of(shop, CHAIR, 2)
        order_id = shop.order((CHAIR, 5))["order_id"]
        wait_for(shop, order_id, "cancelled")

        def events() -> list[str]:
            return [entry["event"] for entry in shop.get(f"/api/orders/{order_id}").json()["history"]]

        whole = ["created", "offered", "cancel_requested", "cancelled"]
        eventually(lambda: events() == whole, timeout=60)
        eventually(lambda: in_stock(shop, CHAIR) == 2, timeout=60)
        assert "not accepted in time" in shop.get(f"/orders/{order_id}").text
        assert shop.post(f"/api/orders/{order_id}/accept").status_code == 409
