"""Webhooks, from the request that makes one to the receiver that verifies what comes: everything is real."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from dramatiq_jetstream import JetStreamBroker
from tests.support.polling import eventually
from tests.support.processes import WORKER_READY
from tests.tasks.test_strangers import FORGED, forged
from tests.web.closed import PAGE, Closed, closed_service

STEPS = {"order.created", "order.reserved", "order.paid", "order.confirmed"}


class Receiver:
    """A receiver on a port of its own. What it answers is for the test to say; while it holds, it answers nothing.

    The webhooks that were made for it go when it is closed, so that no test finds those of another that failed.
    """

    def __init__(self) -> None:
        self.webhooks = ExitStack()
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.status = 200
        self.open = threading.Event()
        self.open.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append(({name.lower(): text for name, text in self.headers.items()}, body))
                receiver.open.wait(120)
                self.send_response(receiver.status)
                self.send_header("Content-Length", "6")
                self.end_headers()
                self.wfile.write(b"thanks")

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    pass  # a worker that was killed has hung up

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.webhooks.close()
        self.open.set()
        self._server.shutdown()
        self._server.server_close()

    def events(self, secret: str) -> list[tuple[str, dict[str, Any]]]:
        """Return what came, as far as the library verifies it: ids and events."""
        return [
            (headers["webhook-id"], Webhook(secret).verify(body, headers))
            for headers, body in list(self.requests)
        ]

    def types(self, secret: str, order_id: str) -> set[str]:
        """Return the types of the events of an order that came."""
        return {event["type"] for _, event in self.events(secret) if event["data"]["order_id"] == order_id}


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    """A service that may send to this machine."""
    env = {"WEBHOOK_NETWORKS": "127.0.0.0/8", "WEBHOOK_TIMEOUT": "60000", "ACK_WAIT": "5000"}
    with closed_service(tmp_path_factory.mktemp("webhooks"), **env) as closed:
        yield closed


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def webhook(closed: Closed, who: str, receiver: Receiver, **members: Any) -> tuple[str, str]:
    """Make a webhook; returns its id and its secret."""
    answer = closed.ask(who, "POST", "/api/webhooks", json={"url": receiver.url, **members})
    assert answer.status_code == 201, answer.text
    path = f"/api/webhooks/{answer.json()['id']}"
    receiver.webhooks.callback(closed.ask, who, "DELETE", path)
    return answer.json()["id"], answer.json()["secret"]


def placed(closed: Closed, who: str, customer: str) -> str:
    order_id: str = closed.order(who, customer).json()["order_id"]
    return order_id


def log(closed: Closed, who: str, webhook_id: str) -> list[dict[str, Any]]:
    answer = closed.get(who, f"/api/webhooks/{webhook_id}/deliveries?limit=100")
    assert answer.status_code == 200, answer.text
    deliveries: list[dict[str, Any]] = answer.json()["deliveries"]
    return deliveries


def test_events_come_signed_and_are_retried(closed: Closed, receiver: Receiver) -> None:
    """Each event has one id however often it is tried, the log has each attempt, the order's page shows it."""
    receiver.status = 500
    webhook_id, secret = webhook(closed, "alice", receiver)
    order_id = placed(closed, "alice", "alice")
    eventually(lambda: receiver.types(secret, order_id) == STEPS, timeout=60)
    receiver.status = 200
    eventually(
        lambda: [one["state"] for one in log(closed, "alice", webhook_id)] == ["delivered"] * len(STEPS),
        timeout=60,
    )
    ids = {event["type"]: set[str]() for _, event in receiver.events(secret)}
    for named, event in receiver.events(secret):
        ids[event["type"]].add(named)
    assert all(len(each) == 1 for each in ids.values())
    deliveries = log(closed, "alice", webhook_id)
    assert {one["type"]: {one["id"]} for one in deliveries} == ids
    for one in deliveries:
        assert one["order_id"] == order_id
        assert one["attempts"][0]["status"] == 500
        assert one["attempts"][-1]["status"] == 200
        assert one["attempts"][-1]["answer"] == "thanks"
    headers, body = receiver.requests[0]
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(body + b" ", headers)
    for who in ("alice", "operator"):
        assert "Webhook delivered" in closed.get(who, f"/orders/{order_id}", headers=PAGE).text
    assert "Webhook" not in closed.get("reader", f"/orders/{order_id}", headers=PAGE).text


def test_a_delivery_is_sent_again_with_its_id(closed: Closed, receiver: Receiver) -> None:
    """From the API and from the page, as often as it is asked for."""
    webhook_id, secret = webhook(closed, "alice", receiver, events=["order.confirmed"])
    placed(closed, "alice", "alice")
    eventually(
        lambda: [one["state"] for one in log(closed, "alice", webhook_id)] == ["delivered"], timeout=60
    )
    (one,) = log(closed, "alice", webhook_id)
    address = f"/webhooks/{webhook_id}/deliveries/{one['id']}/send"
    assert closed.ask("alice", "POST", f"/api{address}").status_code == 202
    eventually(lambda: len(receiver.requests) == 2, timeout=60)
    assert closed.ask("alice", "POST", address).status_code == 303
    eventually(lambda: len(receiver.requests) == 3, timeout=60)
    assert {named for named, _ in receiver.events(secret)} == {one["id"]}
    assert {body for _, body in receiver.requests} == {receiver.requests[0][1]}


def test_a_customer_gets_its_own_orders_and_an_operator_all(closed: Closed, receiver: Receiver) -> None:
    """Events of another's order go to no customer, nor does the way to their webhooks."""
    mine, secret = webhook(closed, "alice", receiver)
    all_of_them = Receiver()
    _, operators_secret = webhook(closed, "operator", all_of_them)
    orders = {customer: placed(closed, customer, customer) for customer in ("alice", "bob")}
    for order_id in orders.values():
        eventually(lambda: all_of_them.types(operators_secret, order_id) == STEPS, timeout=60)  # noqa: B023
    eventually(lambda: receiver.types(secret, orders["alice"]) == STEPS, timeout=60)
    assert {event["data"]["customer_id"] for _, event in receiver.events(secret)} == {"alice"}
    assert orders["bob"] not in json.dumps(log(closed, "alice", mine))
    for address in (f"/api/webhooks/{mine}", f"/api/webhooks/{mine}/deliveries", f"/webhooks/{mine}"):
        assert [closed.get(who, address).status_code for who in ("alice", "bob", "operator", "reader")] == [
            200,
            404,
            200,
            403,
        ]
    assert [one["id"] for one in closed.get("bob", "/api/webhooks").json()["webhooks"]] == []
    all_of_them.close()


def test_what_the_ledger_does_not_confirm_is_not_sent(closed: Closed, receiver: Receiver) -> None:
    """Another program's events about a real order, and about none, reach no receiver."""
    webhook_id, secret = webhook(closed, "operator", receiver)
    first = placed(closed, "alice", "alice")
    eventually(lambda: receiver.types(secret, first) == STEPS, timeout=60)
    broker = JetStreamBroker(closed.stack.nats.url)
    for name in FORGED:
        for order_id in (first, f"never-{uuid.uuid4()}"):
            broker.publish(f"ORDER.{name}", forged(name, order_id))
    broker.close()
    # What comes after them in the stream was looked at after them.
    second = placed(closed, "alice", "alice")
    eventually(lambda: receiver.types(secret, second) == STEPS, timeout=60)
    assert {event["data"]["order_id"] for _, event in receiver.events(secret)} == {first, second}
    assert b"forged" not in b"".join(body for _, body in receiver.requests)
    assert len(log(closed, "operator", webhook_id)) == 2 * len(STEPS)


def test_a_receiver_that_hangs_holds_up_no_other(closed: Closed, receiver: Receiver) -> None:
    """While one answers nothing, with more deliveries than there are threads, another gets all of its own."""
    receiver.open.clear()
    slow, _ = webhook(closed, "alice", receiver)
    quick = Receiver()
    _, secret = webhook(closed, "bob", quick)
    for _ in range(3):
        placed(closed, "alice", "alice")
    eventually(lambda: len(receiver.requests) >= 2, timeout=60)
    order_id = placed(closed, "bob", "bob")
    # Before the slow one has run out of time, and leaves its threads.
    eventually(lambda: quick.types(secret, order_id) == STEPS, timeout=50)
    # Nothing was answered, so what came is what runs now, two at a time, and what has run out of time.
    came = len(receiver.requests)
    assert came <= 2 + sum(len(one["attempts"]) for one in log(closed, "alice", slow))
    receiver.open.set()
    quick.close()


def test_a_worker_that_is_killed_loses_no_delivery(closed: Closed, receiver: Receiver) -> None:
    """kill -9 while the receiver is being asked: another worker asks again, under the same id."""
    receiver.open.clear()
    webhook_id, secret = webhook(closed, "alice", receiver, events=["order.confirmed"])
    placed(closed, "alice", "alice")
    eventually(lambda: len(receiver.requests) == 1, timeout=60)
    ready = closed.stack.workers.output.count("Worker process is ready")
    closed.stack.workers.kill()
    receiver.open.set()
    closed.stack.workers.start().wait_for_output(WORKER_READY, count=ready + 1, timeout=60)
    eventually(
        lambda: [one["state"] for one in log(closed, "alice", webhook_id)] == ["delivered"], timeout=90
    )
    assert len(receiver.requests) >= 2
    assert len({named for named, _ in receiver.events(secret)}) == 1


def test_secrets_are_shown_once_and_stored_encrypted(closed: Closed, receiver: Receiver) -> None:
    """No later answer has one, no file of the server does; a new one signs beside the old one."""
    webhook_id, secret = webhook(closed, "alice", receiver, events=["order.created"])
    answer = closed.ask("alice", "POST", f"/api/webhooks/{webhook_id}/secret")
    newer = answer.json()["secret"]
    assert newer != secret
    order_id = placed(closed, "alice", "alice")
    for each in (secret, newer):
        eventually(lambda: receiver.types(each, order_id) == {"order.created"}, timeout=60)  # noqa: B023
    for address in ("/api/webhooks", f"/api/webhooks/{webhook_id}", f"/webhooks/{webhook_id}", "/webhooks"):
        text = closed.get("alice", address).text
        assert "whsec_" not in text
    stored = [path for path in Path(closed.stack.directory).rglob("*") if path.is_file()]
    for each in (secret, newer):
        assert not [path for path in stored if each[6:].encode() in path.read_bytes()]


def test_the_page_makes_changes_disables_and_removes_one(closed: Closed, receiver: Receiver) -> None:
    """All by plain forms; what is wrong stands at its field."""
    made = closed.ask("alice", "POST", "/webhooks", data={"url": receiver.url, "event": "order.created"})
    assert made.status_code == 201
    assert "whsec_" in made.text
    (one,) = closed.get("alice", "/api/webhooks").json()["webhooks"]
    address = f"/webhooks/{one['id']}"
    wrong = closed.ask("alice", "POST", address, data={"url": "https://10.0.0.1/"})
    assert (wrong.status_code, 'aria-invalid="true"' in wrong.text) == (422, True)
    changed = closed.ask("alice", "POST", address, data={"url": receiver.url, "description": "mine"})
    assert changed.status_code == 303
    assert closed.ask("alice", "POST", f"{address}/enabled", data={"on": "0"}).status_code == 303
    shown = closed.get("alice", f"/api{address}").json()
    assert (shown["events"], shown["description"], shown["enabled"]) == ([], "mine", False)
    assert "Disabled." in closed.get("alice", address).text
    assert closed.ask("alice", "POST", f"{address}/enabled", data={"on": "1"}).status_code == 303
    assert closed.get("alice", f"/api{address}").json()["enabled"]
    assert closed.ask("alice", "POST", f"{address}/remove").status_code == 303
    assert closed.get("alice", address).status_code == 404


def test_what_cannot_be_a_webhook(closed: Closed) -> None:
    """Problem details name the field; another customer's, or one of no customer's program, is not made."""
    for body, status, field in (
        ({}, 400, "url"),
        ({"url": 1}, 400, "url"),
        ({"url": "https://10.0.0.1/"}, 422, "url"),
        ({"url": "https://example.com/", "events": ["order.exploded"]}, 422, "events"),
        ({"url": "https://example.com/", "events": [1]}, 400, "events"),
    ):
        answer = closed.ask("alice", "POST", "/api/webhooks", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (status, field), answer.text
    for who, status in ((None, 401), ("shop", 403), ("reader", 403)):
        answer = closed.ask(who, "POST", "/api/webhooks", json={"url": "https://example.com/"})
        assert answer.status_code == status
    assert requests.post(f"{closed.stack.url}/webhooks", timeout=20).status_code == 401
