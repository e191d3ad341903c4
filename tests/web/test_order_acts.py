"""Orders are cancelled, refunded, shipped and returned by the API and their pages; the bank takes money back."""

from __future__ import annotations

import base64
import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import requests
from standardwebhooks import Webhook

from tests.support.polling import eventually
from tests.web.stack import WEBHOOK_SECRET, Stack


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


def test_the_form_of_a_refund_takes_an_amount_of_money(service: Stack) -> None:
    """It is written as prices are, and nothing goes back unless one is given."""
    order_id = confirmed(service)
    for amount in ("", "0", "five", "5,00", "-1", "1.234"):
        refused = service.post(f"/orders/{order_id}/refund", data={"amount": amount, "submission": "s-1"})
        assert refused.status_code == 400
    for _ in range(2):
        sent = service.post(f"/orders/{order_id}/refund", data={"amount": "5.5", "submission": "s-1"})
        assert sent.status_code == 200
    eventually(lambda: refunds(service, order_id) == [550], timeout=60)


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


def wait_for(service: Stack, order_id: str, status: str) -> dict[str, Any]:
    """Wait until an order has a status; returns it."""

    def order() -> dict[str, Any] | None:
        body: dict[str, Any] = service.get(f"/api/orders/{order_id}").json()
        return body if body["status"] == status else None

    return eventually(order, timeout=60)  # type: ignore[return-value]


def in_stock(service: Stack, sku: str) -> int:
    return next(one["stock"] for one in service.get("/api/products").json() if one["sku"] == sku)


def test_an_order_is_shipped_and_returned(service: Stack) -> None:
    """By the API, each as often as it is asked; the goods are in stock again, and the charge goes back once."""
    order_id: str = service.order(("CHAIR-01", 1))["order_id"]
    address = f"/api/orders/{order_id}"
    assert service.final(order_id)["status"] == "confirmed"
    stock = in_stock(service, "CHAIR-01")
    early = service.post(f"{address}/returns", json={"stock": "back"})
    assert (early.status_code, early.json()["type"]) == (409, "/docs#not-returnable")
    for _ in range(2):
        answer = service.post(f"{address}/shipments", json={"carrier": "DHL", "tracking": "JJD-1"})
        assert answer.status_code == 202, answer.text
        assert answer.json()["status"] == "shipped"
    assert answer.json()["history"][-1]["detail"] == {"carrier": "DHL", "tracking": "JJD-1"}
    refused = service.post(f"{address}/cancel")
    assert (refused.status_code, refused.json()["type"]) == (409, "/docs#not-cancellable")
    assert service.post(f"{address}/returns", json={"stock": "lost"}).status_code == 400
    for _ in range(2):
        answer = service.post(f"{address}/returns", json={"stock": "back", "reason": "too small"})
        assert answer.status_code == 202, answer.text
    order = wait_for(service, order_id, "returned")
    assert order["reason"] == "too small"
    eventually(lambda: "refunded" in events(service, order_id), timeout=60)
    assert refunds(service, order_id) == [order["total_minor"]]
    assert in_stock(service, "CHAIR-01") == stock + 1
    late = service.post(f"{address}/shipments")
    assert late.status_code == 202, "it was shipped, and that is what the repetition is told"
    text = service.get(f"/orders/{order_id}").text
    assert all(said in text for said in ("Order shipped", "DHL JJD-1", "Goods back in stock: too small"))


def test_an_order_is_shipped_and_written_off_by_its_page(service: Stack) -> None:
    """An operator's buttons; what comes back broken is in nobody's stock."""
    order_id: str = service.order(("CHAIR-01", 1))["order_id"]
    assert service.final(order_id)["status"] == "confirmed"
    stock = in_stock(service, "CHAIR-01")
    assert f'action="/orders/{order_id}/ship"' in service.get(f"/orders/{order_id}").text
    page = service.post(f"/orders/{order_id}/ship", data={"carrier": "by hand", "tracking": ""})
    assert "Order shipped" in page.text
    page = service.post(f"/orders/{order_id}/return", data={"stock": "written_off", "reason": "broken"})
    assert "Return decided" in page.text
    wait_for(service, order_id, "returned")
    assert in_stock(service, "CHAIR-01") == stock
    assert "Goods written off: broken" in service.get(f"/orders/{order_id}").text


def test_what_the_bank_takes_back_is_shown_and_never_refunded(service: Stack) -> None:
    """The gateway tells of it by itself, signed; the order shows it, and a cancel gives back what is left."""
    order_id = confirmed(service)
    (charge,) = requests.get(f"{service.gateway_url}/charges?order_id={order_id}", timeout=30).json()[
        "charges"
    ]
    taken = requests.post(
        f"{service.gateway_url}/chargebacks",
        json={"charge_id": charge["id"], "amount": 400, "currency": "EUR", "reason": "not received"},
        headers={"Idempotency-Key": order_id},
        timeout=30,
    )
    assert taken.status_code == 201, taken.text
    eventually(lambda: "charged_back" in events(service, order_id), timeout=60)
    text = service.get(f"/orders/{order_id}").text
    assert "Charged back by the bank" in text
    assert "not received" in text
    too_much = service.post(
        f"/api/orders/{order_id}/refunds", json={"amount_minor": 891}, headers={"Idempotency-Key": order_id}
    )
    assert too_much.status_code == 409
    assert service.post(f"/api/orders/{order_id}/cancel").status_code == 202
    eventually(lambda: "refunded" in events(service, order_id), timeout=60)
    assert refunds(service, order_id) == [890]


def signed(body: bytes, secret: str = WEBHOOK_SECRET, at: datetime | None = None) -> dict[str, str]:
    """Return the headers with which the gateway would send a body."""
    at = at or datetime.now(UTC)
    return {
        "webhook-id": "evt-1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign("evt-1", at, body.decode()),
    }


def test_what_is_not_signed_is_not_taken(service: Stack) -> None:
    """Without a signature, with that of another body, secret or time: 401, and nothing is recorded."""
    order_id = confirmed(service)
    (charge,) = requests.get(f"{service.gateway_url}/charges?order_id={order_id}", timeout=30).json()[
        "charges"
    ]
    data = {"id": "cb_x", "order_id": order_id, "charge_id": charge["id"], "amount": 1, "currency": "EUR"}
    body = json.dumps({"type": "chargeback.created", "data": data}).encode()
    other = "whsec_" + base64.b64encode(b"another secret of more than 24").decode()
    for headers in (
        {},
        signed(b"{}"),
        signed(body, other),
        signed(body, at=datetime.now(UTC) - timedelta(hours=1)),
        {**signed(body), "webhook-signature": "nonsense"},
        {**signed(body), "webhook-signature": "v1,%%%"},
    ):
        answer = service.post("/api/payments/events", data=body, headers=headers)
        assert answer.status_code == 401, f"{headers}: {answer.status_code}"
    assert "charged_back" not in events(service, order_id)


def test_what_is_signed_and_cannot_be_recorded(service: Stack) -> None:
    """Of no known charge, of more than is left, malformed: refused, so that it is told again; other events pass."""
    order_id = confirmed(service)
    (charge,) = requests.get(f"{service.gateway_url}/charges?order_id={order_id}", timeout=30).json()[
        "charges"
    ]
    good = {"id": "cb_1", "order_id": order_id, "charge_id": charge["id"], "amount": 1_290}

    def tell(kind: str = "chargeback.created", **changes: Any) -> int:
        body = json.dumps({"type": kind, "data": {**good, **changes}}).encode()
        return service.post("/api/payments/events", data=body, headers=signed(body)).status_code

    assert tell(amount=1_291) == tell(charge_id="ch_none") == tell(order_id="none") == 409
    assert tell(amount=0) == tell(amount="1") == tell(id="a/b") == tell(order_id=None) == 400
    assert tell("charge.updated", amount=0) == 204
    assert tell() == tell() == 204
    assert tell(id="cb_2", amount=1) == 409, "nothing is left of it"
    history = service.get(f"/api/orders/{order_id}").json()["history"]
    assert [one["detail"]["amount_minor"] for one in history if one["event"] == "charged_back"] == ["1290"]
    for body in (b"[]", b"null"):
        answer = service.post("/api/payments/events", data=body, headers=signed(body))
        assert answer.status_code == 400
