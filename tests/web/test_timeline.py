"""The timeline of an order: who asked for what, what was refused, and what webhooks were told, as it happens."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.polling import eventually
from tests.web.closed import Closed, closed_service
from tests.web.test_webhooks import Receiver, webhook


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    with closed_service(tmp_path_factory.mktemp("timeline"), WEBHOOK_NETWORKS="127.0.0.0/8") as closed:
        yield closed


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def confirmed(closed: Closed) -> str:
    order_id: str = closed.order("operator", "alice").json()["order_id"]
    path = f"/api/orders/{order_id}"
    eventually(lambda: closed.get("operator", path).json()["status"] == "confirmed", timeout=60)
    return order_id


def state(closed: Closed, who: str, order_id: str) -> dict[str, Any]:
    answer = closed.get(who, f"/orders/{order_id}/state")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def lines(html: str) -> list[str]:
    """Return the text of each line of the timelines."""
    found = re.findall(r"<li class=\"[^\"]*\">\s*<p><strong>.*?</li>", html, re.DOTALL)
    return [" ".join(re.sub(r"<[^>]+>", " ", line).split()) for line in found]


def test_acts_stand_with_what_they_made(closed: Closed) -> None:
    """An operator sees who shipped it, and what was refused or asked for again; a customer sees what happened."""
    order_id = confirmed(closed)
    before = state(closed, "operator", order_id)
    path = f"/api/orders/{order_id}"
    key = {"Idempotency-Key": str(uuid.uuid4())}
    body = {"amount_minor": 10**9}
    assert closed.ask("operator", "POST", f"{path}/refunds", json=body, headers=key).status_code == 409
    refused = state(closed, "operator", order_id)
    assert refused["revision"] != before["revision"], "an open page learns of it"
    for _ in range(2):
        shipped = closed.ask("operator", "POST", f"{path}/shipments", json={"carrier": "DHL"})
        assert shipped.status_code == 202
    shown = lines(state(closed, "operator", order_id)["html"])
    by = "by operator through the API, from 127.0.0.1"
    (sent,) = [line for line in shown if line.startswith("Order shipped")]
    assert sent.endswith(by)
    (again,) = [line for line in shown if line.startswith("Shipment asked for again")]
    assert again.endswith(by)
    (refusal,) = [line for line in shown if line.startswith("Refund refused")]
    assert "can be refunded" in refusal
    customers = lines(state(closed, "alice", order_id)["html"])
    assert [line for line in customers if "by operator" in line or "asked" in line or "refused" in line] == []
    assert [line for line in customers if line.startswith("Order shipped")] != []


def test_deliveries_come_with_the_state(closed: Closed, receiver: Receiver) -> None:
    """Folded, with their number; one more attempt is another revision, and who asked for it is said."""
    webhook_id, _ = webhook(closed, "operator", receiver, events=["order.confirmed"])
    order_id = confirmed(closed)
    eventually(lambda: "Webhook delivered" in state(closed, "operator", order_id)["html"], timeout=60)
    before = state(closed, "operator", order_id)
    assert "Webhooks: 1 delivery" in " ".join(before["html"].split())
    assert "Webhook delivered" not in state(closed, "alice", order_id)["html"]
    (sent,) = closed.get("operator", f"/api/webhooks/{webhook_id}/deliveries").json()["deliveries"]
    path = f"/api/webhooks/{webhook_id}/deliveries/{sent['id']}/send"
    assert closed.ask("operator", "POST", path).status_code == 202
    eventually(lambda: state(closed, "operator", order_id)["revision"] != before["revision"], timeout=60)

    def told() -> list[str]:
        return [line for line in lines(state(closed, "operator", order_id)["html"]) if "Sent again" in line]

    eventually(lambda: len(told()) == 1, timeout=60)
    assert "by operator through the API" in told()[0]


def test_all_that_failed_is_sent_again(closed: Closed, receiver: Receiver) -> None:
    """Each delivery that failed, once, and none of the others."""
    webhook_id, secret = webhook(closed, "operator", receiver, events=["order.confirmed"])
    delivered = confirmed(closed)
    log = f"/api/webhooks/{webhook_id}/deliveries"
    eventually(lambda: receiver.types(secret, delivered) == {"order.confirmed"}, timeout=60)

    def states() -> dict[str, str]:
        found = closed.get("operator", f"{log}?limit=100").json()["deliveries"]
        return {one["order_id"]: one["state"] for one in found}

    receiver.open.clear()
    refused = {confirmed(closed) for _ in range(3)}
    # The page is read from the newest back, so it can lack one that is just changing: the number is asked for as well.
    waiting = {delivered: "delivered", **dict.fromkeys(refused, "pending")}
    eventually(lambda: states() == waiting, timeout=60)
    receiver.status = 410
    receiver.open.set()
    eventually(lambda: states() == {delivered: "delivered", **dict.fromkeys(refused, "failed")}, timeout=60)
    assert closed.ask("operator", "POST", f"{log}/send-failed").status_code == 409, "410 disables a webhook"
    closed.ask("operator", "PATCH", f"/api/webhooks/{webhook_id}", json={"enabled": True})
    receiver.status = 200
    sent = len(receiver.requests)
    assert closed.ask("operator", "POST", f"{log}/send-failed").status_code == 202
    eventually(lambda: states() == dict.fromkeys({delivered, *refused}, "delivered"), timeout=60)
    again = [event["data"]["order_id"] for _, event in receiver.events(secret)[sent:]]
    assert sorted(again) == sorted(refused)


def test_webhooks_are_listed_by_pages(closed: Closed, receiver: Receiver) -> None:
    """Newest first, each once, a customer's own alone; a cursor that is none is told."""
    made = [webhook(closed, "operator", receiver)[0] for _ in range(5)]
    theirs = webhook(closed, "alice", receiver)[0]
    found: list[str] = []
    before = ""
    while True:
        page = closed.get("operator", f"/api/webhooks?limit=2&before={before}").json()
        found += [one["id"] for one in page["webhooks"]]
        before = page["next"]
        if before is None:
            break
    assert found == [theirs, *reversed(made)]
    assert [one["id"] for one in closed.get("alice", "/api/webhooks").json()["webhooks"]] == [theirs]
    for wrong in ("before=x", "limit=0", "before=9-", "before=-1-x"):
        expected = 400 if wrong != "before=9-" else 200
        assert closed.get("operator", f"/api/webhooks?{wrong}").status_code == expected, wrong


def test_a_refund_that_is_too_high_can_be_corrected(closed: Closed) -> None:
    """The page comes back with the form open, what was typed in it, and what is wrong beside it."""
    order_id = confirmed(closed)
    typed = {"amount": "9999", "reason": "broken", "submission": "s-1234567890123456"}
    answer = closed.ask("operator", "POST", f"/orders/{order_id}/refund", data=typed)
    assert answer.status_code == 409
    assert '<details class="revoke" id="refund" open>' in answer.text
    assert 'value="9999"' in answer.text
    assert 'value="broken"' in answer.text
    assert re.search(r'id="refund-amount-error">.*can be refunded', answer.text)
    wrong = closed.ask("operator", "POST", f"/orders/{order_id}/refund", data={**typed, "amount": "x"})
    assert (wrong.status_code, "Enter an amount" in wrong.text) == (400, True)
    right = closed.ask("operator", "POST", f"/orders/{order_id}/refund", data={**typed, "amount": "1.00"})
    assert right.status_code == 303
    assert "Refund requested" in closed.get("operator", f"/orders/{order_id}").text
