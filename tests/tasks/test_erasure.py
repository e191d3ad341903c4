"""A customer is erased: unreadable in every stream, bucket and file, while totals stay as they are."""

from __future__ import annotations

import base64
import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dramatiq_jetstream import JetStreamBroker
from orders.v1.events_pb2 import OrderCreated
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, python
from tests.tasks.test_archives import PROGRAM as ARCHIVE
from tests.tasks.test_archives import counted
from tests.web.stack import Stack

ANN = "ann-müller@example.org"
BOB = "ann-müller@example.or"  # the beginning of her name

#: Erases a customer and is killed when it has taken away something of the second kind.
PROGRAM = """
import os, signal, sys
from tasks import erase, erasure

taken = []
take_away = erasure.Erasure._take_away

def dying(self, job, stage):
    if stage.name == sys.argv[1]:
        for one in job.doomed[:1]:
            stage.remove(job, one)
        os.kill(os.getpid(), signal.SIGKILL)
    take_away(self, job, stage)

if sys.argv[1]:
    erasure.Erasure._take_away = dying
sys.exit(erase.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("erasure")
    (directory / "archive").mkdir()
    env = {
        "ARCHIVE_DIR": str(directory / "archive"),
        "RETENTION_DAYS": "1",
        "RETRY_LIMIT": "1",
        "WEBHOOK_NETWORKS": "127.0.0.0/8",
    }
    with Stack(directory, env=env) as stack:
        yield stack


@pytest.fixture(scope="module")
def broker(shop: Stack) -> Iterator[JetStreamBroker]:
    broker = JetStreamBroker(shop.nats.url)
    yield broker
    broker.close()


def command(shop: Stack, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **shop.environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def mentions(broker: JetStreamBroker, *words: str) -> list[str]:
    """Return where in any stream of the server one of some words stands, plain or as JSON has it."""
    needles = [form.encode() for word in words for form in (word, json.dumps(word)[1:-1])]
    found = []
    for name in broker.connection.api("STREAM.NAMES")["streams"]:
        for stored in broker.stream(name).read():
            text = b"\n".join(
                [stored.subject.encode(), stored.data, *(value.encode() for value in stored.headers.values())]
            )
            if any(needle in text for needle in needles):
                found.append(f"{name}:{stored.sequence}:{stored.subject}")
    return found


def settled(broker: JetStreamBroker) -> None:
    stream = broker.stream("ORDERS")
    eventually(lambda: not any(one.waiting or one.in_flight for one in stream.consumers()), timeout=60)


def order(shop: Stack, customer: str, **members: Any) -> str:
    order_id: str = shop.order(customer_id=customer, **members)["order_id"]
    shop.final(order_id)
    return order_id


def cancelled(shop: Stack, order_id: str) -> None:
    shop.post(f"/api/orders/{order_id}/cancel", json={"reason": "Ann Müller moved to Rome"})
    eventually(lambda: shop.get(f"/api/orders/{order_id}").json()["status"] == "cancelled", timeout=60)
    eventually(lambda: "refunded" in shop.get(f"/api/orders/{order_id}").text, timeout=60)


def test_a_customer_becomes_unreadable(shop: Stack, broker: JetStreamBroker, tmp_path: Path) -> None:
    """Archived and live orders, killed in the middle; what was bought stays, and the next order is a new person's."""
    webhook = {"url": f"http://127.0.0.1:{free_port()}/hook", "events": [], "description": "all"}
    assert shop.post("/api/webhooks", json=webhook).status_code == 201
    archived = order(shop, ANN)
    settled(broker)
    counted(broker, broker.stream("ORDERS").range().last)
    command(shop, "-c", ARCHIVE, "")
    token = "tok_declined"
    orders = [order(shop, ANN), order(shop, ANN, payment_token=token), order(shop, ANN)]
    bobs = order(shop, BOB)
    cancelled(shop, orders[2])
    # A repetition with other contents is a dead letter, and leaves records of attempts that failed.
    other = OrderCreated(order_id=orders[0], customer_id=ANN, total_amount=1.0)
    broker.publish("ORDER.created", other.SerializeToString(), event_id="another")
    eventually(lambda: broker.dead_letters.count() == 1, timeout=60)
    command(shop, "-m", "tasks.keys", "add", "her-app", "--scope", "order", "--customer", ANN)
    settled(broker)
    before = {order_id: shop.get(f"/api/orders/{order_id}").json() for order_id in [*orders, bobs]}
    assert len(mentions(broker, ANN)) > 10

    environment = shop.environment
    for stage in ("events", "files of the archive"):
        log = tmp_path / f"{stage}.log"
        with python("-c", PROGRAM, stage, "customer", ANN, "--yes", log=log, env=environment) as program:
            assert program.wait(150) == -signal.SIGKILL, program.output
    # It orders again before it is over: that is a new person's.
    new = order(shop, ANN)
    certificate = json.loads(command(shop, "-m", "tasks.erase", "resume").splitlines()[0])
    counts = certificate["erased"]
    assert (counts["orders"], counts["dead letters"], counts["files of the archive"]) == (3, 1, 1)
    assert counts["API keys"] == 1
    assert counts["deliveries of webhooks"] > 10
    assert counts["events"] == sum(len(before[order_id]["history"]) for order_id in orders) + 1
    assert "müller" not in json.dumps(certificate, ensure_ascii=False).lower()

    # Nothing says who it was, but for the order that came since; the disk of the events says nothing of the others.
    assert shop.get(f"/api/orders/{new}").json()["customer_id"] == ANN
    left = [one for one in mentions(broker, ANN, "Rome") if not about(broker, one, new, bobs)]
    assert left == []
    for segment in (shop.directory / "archive").glob("*.gz"):
        for line in map(json.loads, gzip.decompress(segment.read_bytes()).splitlines()):
            data = base64.b64decode(line.get("event", {}).get("data", ""))
            assert ANN not in json.dumps(line, ensure_ascii=False)
            assert ANN.encode() not in data
    command(shop, "-m", "tasks.archives", "verify")

    # What was bought stays, and what happened when.
    for order_id in orders:
        now, then = shop.get(f"/api/orders/{order_id}").json(), before[order_id]
        assert now["customer_id"] == ""
        for name in ("status", "items", "total_minor"):
            assert now[name] == then[name]
        assert [(one["event"], one["at"]) for one in now["history"]] == [
            (one["event"], one["at"]) for one in then["history"]
        ]
    assert "The customer was erased." in shop.get(f"/orders/{orders[0]}").text
    assert shop.get(f"/api/orders/{bobs}").json() == before[bobs]
    listed = shop.get("/api/orders", params={"customer": ANN}).json()["orders"]
    assert [one["order_id"] for one in listed] == [new]
    everything = [one["order_id"] for one in shop.get("/api/orders").json()["orders"]]
    assert set(everything) == {*orders, bobs, new}

    # Records are made again from what remains, and figures are counted again.
    kept = {order_id: shop.get(f"/api/orders/{order_id}").json() for order_id in everything}
    bucket = broker.bucket("orders")
    for order_id in orders:
        bucket.delete(order_id)
    command(shop, "-m", "tasks.rebuild")
    assert {order_id: shop.get(f"/api/orders/{order_id}").json() for order_id in everything} == kept
    assert archived not in everything


def about(broker: JetStreamBroker, where: str, *orders: str) -> bool:
    """Whether a message is about one of some orders."""
    name, sequence, subject = where.split(":", 2)
    stored = broker.stream(name).at(int(sequence))
    text = subject.encode() + b"" if stored is None else subject.encode() + stored.data
    headers = "" if stored is None else "".join(stored.headers.values())
    return any(order_id.encode() in text or order_id in headers for order_id in orders)


def test_the_page(shop: Stack) -> None:
    """It asks twice, refuses while an order is under way, and a worker carries it out."""
    order_id = order(shop, "page-customer")
    answer = shop.post("/admin/erasures", data={"customer_id": "page-customer", "again": "other"})
    assert (answer.status_code, "ids differ" in answer.text) == (422, True)
    shop.knobs(latency_ms=3_000)
    waiting = shop.order(customer_id="busy-customer")["order_id"]
    answer = shop.post("/admin/erasures", data={"customer_id": "busy-customer", "again": "busy-customer"})
    assert (answer.status_code, waiting in answer.text) == (422, True)
    shop.knobs(latency_ms=0)
    shop.final(waiting)
    answer = shop.post("/admin/erasures", data={"customer_id": "page-customer", "again": "page-customer"})
    assert answer.status_code == 200
    eventually(lambda: shop.get(f"/api/orders/{order_id}").json()["customer_id"] == "", timeout=60)
    eventually(lambda: "Under way" not in shop.get("/admin/erasures").text, timeout=60)
    assert "page-customer" not in shop.get("/admin/erasures").text
    assert "page-customer" not in command(shop, "-m", "tasks.erase", "certificates")
    assert "customer.erase" in command(shop, "-m", "tasks.audits", "--kind", "customer")


def test_it_asks_first(shop: Stack) -> None:
    """Without a yes nothing is changed."""
    said = command(shop, "-m", "tasks.erase", "customer", "nobody", code=1)
    assert "Nothing was changed" in said
