"""Orders are cancelled and refunded through the API and on their pages."""

from __future__ import annotations

import uuid
from typing import Any

import requests

from tests.support.polling import eventually
from tests.web.stack import Stack


def confirmed(service: Stack) -> str:
    """Return an order that is confirmed."""
    order_id: str = service.order(("MUG-01", 1))["order_id"]
    assert service.final(order_id)["status"] == "confirmed"
    return order_id


def refunds(service: Stack, order_id: str) -> list[int]:
    url = f"{service.environment['PAYMENT_URL']}/refunds?order_id={order_id}"
    return sorted(one["amount"] for one in requests.get(url, timeout=30).json()["refunds"])


def events(service: Stack, order_id: str) -> list[str]:
    order: dict[str, Any] = service.get(f"/api/orders/{order_id}").json()
    return [entry["event"] for entry in order["history"]]


def test_a_confirmed_order_is_cancelled_and_refunded(service: Stack) -> None:
    """The answer shows the request; the order ends as cancelled, and what it cost goes back once."""
    order_id = confirmed(service)
    for _ in range(2):
        answer = service.post(f"/api/orders/{order_id}/cancel", json={"reason": "ordered by mistake"})
        assert answer.status_code == 202, answer.text
        assert "cancel_requested" in [entry["event"] for entry in answer.json()["history"]]
    eventually(lambda: "refunded" in events(service, order_id), timeout=60)
    order = service.get(f"/api/orders/{order_id}").json()
    assert (order["status"], order["reason"]) == ("cancelled", "ordered by mistake")
    assert refunds(service, order_id) == [1290]
    page = service.get(f"/orders/{order_id}").text
    assert "Refund made" in page
    assert "Cancel the order" not in page


def test_a_refund_in_parts(service: Stack) -> None:
    """Each key refunds once, all together never more than the charge; then the order is refunded."""
    order_id = confirmed(service)
    address = f"/api/orders/{order_id}/refunds"
    assert service.post(address, json={"amount_minor": 300}).status_code == 400
    key = {"Idempotency-Key": str(uuid.uuid4())}
    for _ in range(2):
        assert service.post(address, json={"amount_minor": 300}, headers=key).status_code == 202
    other = {"Idempotency-Key": str(uuid.uuid4())}
    too_much = service.post(address, json={"amount_minor": 991}, headers=other)
    assert (too_much.status_code, too_much.json()["type"]) == (409, "/docs#not-refundable")
    assert service.post(address, headers=other).status_code == 202
    eventually(lambda: service.get(f"/api/orders/{order_id}").json()["status"] == "refunded", timeout=60)
    assert refunds(service, order_id) == [300, 990]
    assert service.post(f"/api/orders/{order_id}/cancel").status_code == 202
    eventually(lambda: "cancelled" in events(service, order_id), timeout=60)
    assert refunds(service, order_id) == [300, 990]


def test_the_buttons_of_the_page(service: Stack) -> None:
    """A person cancels an order by its page's form."""
    order_id = confirmed(service)
    assert f'action="/orders/{order_id}/cancel"' in service.get(f"/orders/{order_id}").text
    page = service.post(f"/orders/{order_id}/cancel", data={"reason": "changed my mind"})
    assert page.status_code == 200
    assert "Cancellation requested" in page.text
    eventually(lambda: "refunded" in events(service, order_id), timeout=60)


def test_what_cannot_be_cancelled(service: Stack) -> None:
    """An order that was rejected, and one that never was."""
    order_id = service.order(("MUG-01", 1), payment_token="tok_declined")["order_id"]
    assert service.final(order_id)["status"] == "rejected"
    assert service.post("/api/orders/no-such-order/cancel").status_code == 404
    answer = service.post(f"/api/orders/{order_id}/refunds", headers={"Idempotency-Key": "r"})
    assert (answer.status_code, answer.json()["type"]) == (409, "/docs#not-refundable")
    service.post(f"/api/orders/{order_id}/cancel")
    assert service.get(f"/api/orders/{order_id}").json()["status"] == "rejected"
