"""What people do is recorded, and found by page, API and command, with what is done on the dashboard."""

from __future__ import annotations

import csv
import io
import json
import uuid
from typing import Any

import pytest

from dramatiq_jetstream import JetStreamBroker, audit
from dramatiq_jetstream.errors import ApiError
from tests.web.stack import Stack


def acts(service: Stack, **asked: str) -> list[dict[str, Any]]:
    answer = service.get("/api/audit", params=asked)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["acts"]
    return found


def command(service: Stack, module: str, *arguments: str) -> str:
    done = service.command(f"tasks.{module}", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_act_on_an_order(service: Stack) -> None:
    """Who, what, from where and how it ended, for one that is carried out and one that is refused."""
    order_id = service.order()["order_id"]
    service.final(order_id)
    service.post(f"/api/orders/{order_id}/cancel", json={"reason": "Mrs Smith called"})
    key = {"Idempotency-Key": str(uuid.uuid4())}
    assert (
        service.post(f"/api/orders/{order_id}/refunds", json={"amount_minor": 10**9}, headers=key).status_code
        == 409
    )
    refused, cancelled = acts(service, kind="order", target=order_id)
    assert (cancelled["act"], cancelled["outcome"], cancelled["via"]) == ("order.cancel", "done", "API")
    assert (cancelled["name"], cancelled["address"]) == ("anyone on this machine", "127.0.0.1")
    assert (refused["act"], refused["outcome"]) == ("order.refund", "failed")
    assert refused["error"].startswith("NotRefundable")
    assert "Smith" not in json.dumps([refused, cancelled])


def test_keys_and_products(service: Stack) -> None:
    """By page and by command."""
    service.post("/admin/keys", data={"name": "audited", "scope": "read", "days": "30"})
    (made,) = acts(service, kind="key", target="audited")
    assert (made["act"], made["via"], made["detail"]["scopes"]) == ("key.make", "page", "read")
    service.post(f"/admin/keys/{made['detail']['id']}/revoke")
    (revoked,) = acts(service, act="key.revoke", target=made["detail"]["id"])
    assert revoked["outcome"] == "done"
    command(service, "restock", "add", "TEE-01", "5", "--reason", "a delivery")
    (restocked, *_) = acts(service, kind="product", target="TEE-01")
    assert (restocked["act"], restocked["via"]) == ("product.restock", "command")
    assert restocked["detail"]["reason"] == "a delivery"
    said = command(service, "audits", "--target", "TEE-01", "--kind", "product")
    assert "product.restock  TEE-01" in said


def test_pages_of_a_search(service: Stack) -> None:
    """Every act comes once, however small the pages, with the changes that were made on the dashboard among them."""
    broker = JetStreamBroker(service.nats.url)
    with audit.record(broker, who="ann", what="pause", target="queue payments", planned=1) as change:
        change.done = 1
    broker.close()
    for number in range(3):
        service.post("/admin/keys", data={"name": f"paged-{number}", "scope": "read", "days": "30"})
    everything = acts(service, limit="100")
    (paused,) = [one for one in everything if one["act"] == "queue.pause"]
    assert (paused["name"], paused["target"], paused["outcome"]) == ("ann", "queue payments", "done")
    found: list[dict[str, Any]] = []
    before = ""
    while True:
        page = service.get("/api/audit", params={"limit": "2", "before": before}).json()
        found += page["acts"]
        before = page["next"]
        if before is None:
            break
    # The service is shared, so that there may be more than one page of a hundred.
    assert found[: len(everything)] == everything
    assert len({one["id"] for one in found}) == len(found) >= 4
    assert [one["target"] for one in acts(service, text="PAGED-")] == ["paged-2", "paged-1", "paged-0"]
    assert acts(service, since="2999-01-01") == []
    for cursor in ("x", "1", "1-", f"{'9' * 30}-1", f"1-{'9' * 30}", f"{2**63}-1", "٣-٣", "-1--1"):
        assert service.get("/api/audit", params={"before": cursor}).status_code == 400, cursor
        assert service.get("/admin/audit", params={"before": cursor}).status_code == 400, cursor
    assert service.get("/api/audit", params={"kind": "x", "since": "soon"}).status_code == 400


def test_exports(service: Stack) -> None:
    """NDJSON and CSV have what the pages have; no cell begins as a formula."""
    service.post("/admin/keys", data={"name": "exported", "scope": "read", "days": "30"})
    command(service, "restock", "add", "TEE-01", "1", "--reason", "=1+1")
    listed = acts(service, limit="100")
    lines = service.get("/api/audit", params={"format": "ndjson"}).text.splitlines()
    assert [json.loads(line) for line in lines][: len(listed)] == listed
    rows = list(csv.DictReader(io.StringIO(service.get("/api/audit", params={"format": "csv"}).text)))
    assert [row["id"] for row in rows[: len(listed)]] == [one["id"] for one in listed]
    assert not [cell for row in rows for cell in row.values() if cell[:1] in ("=", "+", "-", "@")]
    assert command(service, "audits", "--format", "ndjson").splitlines() == lines


def test_the_page(service: Stack) -> None:
    """It shows acts and what narrows them; a wrong filter is told."""
    service.post("/admin/keys", data={"name": "on-the-page", "scope": "read", "days": "30"})
    page = service.get("/admin/audit", params={"target": "on-the-page"})
    assert page.status_code == 200
    assert "key.make" in page.text
    assert "/api/audit?target=on-the-page&amp;format=csv" in page.text
    assert service.get("/admin/audit", params={"kind": "x"}).status_code == 400
    order_id = service.order()["order_id"]
    assert f'href="/admin/audit?kind=order&amp;target={order_id}"' in service.get(f"/orders/{order_id}").text


def test_records_are_there_for_good(service: Stack) -> None:
    """The server deletes none and purges none, not even for one who may do everything."""
    service.post("/admin/keys", data={"name": "for-good", "scope": "read", "days": "30"})
    broker = JetStreamBroker(service.nats.url)
    try:
        for call, body in (("MSG.DELETE", {"seq": 1}), ("PURGE", {})):
            with pytest.raises(ApiError):
                broker.connection.api(f"STREAM.{call}.AUDIT", body)
    finally:
        broker.close()
    assert acts(service, target="for-good")
