"""Reading orders: before any worker saw them, page by page, as they change, and after a rebuild from the stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dramatiq_jetstream import JetStreamBroker
from tests.support.polling import eventually
from tests.support.processes import REPOSITORY
from tests.tasks.producer import Producer, created
from tests.web.stack import Stack


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Stack]:
    """A service without workers: orders are accepted and stay so."""
    with Stack(tmp_path, workers=False, web_processes=1) as stack:
        yield stack


def pages(shop: Stack, limit: int) -> list[list[str]]:
    """Return the ids on every page of the list."""
    found: list[list[str]] = []
    before: str | None = None
    while True:
        query = {"limit": limit} | ({"before": before} if before else {})
        page = shop.get("/api/orders", params=query).json()
        found.append([order["order_id"] for order in page["orders"]])
        before = page["next"]
        if before is None:
            return found


def test_accepted_orders_without_a_worker(quiet: Stack) -> None:
    """An order can be read at once, though no worker has seen it; others are not found."""
    placed = [quiet.order(("MUG-01", n % 3 + 1)) for n in range(12)]
    for order in placed:
        read = quiet.get(f"/api/orders/{order['order_id']}").json()
        assert (read["status"], read["items"], read["total_minor"]) == (
            "accepted",
            order["items"],
            order["total_minor"],
        )
    for order_id in ("no-such-order", "01a1fc1a-7429-7ba0-8037-0821d7410df9"):
        assert quiet.get(f"/api/orders/{order_id}").status_code == 404
    ids = [order["order_id"] for order in reversed(placed)]
    assert pages(quiet, 5) == [ids[:5], ids[5:10], ids[10:]]
    assert pages(quiet, 6) == [ids[:6], ids[6:]]
    assert pages(quiet, 100) == [ids]


@pytest.mark.parametrize("skew", [3.0, -70.0, 86_400.0])
def test_accepted_orders_whatever_the_clock(tmp_path: Path, skew: float) -> None:
    """The front end's clock is ahead or behind: GET finds what was accepted, under ids that were made or chosen."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "now, now_ns = time.time, time.time_ns\n"
        f"time.time = lambda: now() + {skew}\n"
        f"time.time_ns = lambda: now_ns() + int({skew} * 10**9)\n"
    )
    with Stack(tmp_path, workers=False, env={"PYTHONPATH": str(tmp_path)}) as shop:
        made = shop.order()["order_id"]
        clock = int(made.replace("-", "")[:12], 16) / 1000  # which the front end goes by
        assert abs(clock - time.time() - skew) < 60
        event = created(order_id="chosen-1", customer_id="c-1")
        headers = {"Content-Type": "application/x-protobuf"}
        answer = shop.post("/api/orders", data=event.SerializeToString(), headers=headers)
        assert answer.status_code == 202
        for order_id in (made, "chosen-1"):
            assert shop.get(f"/api/orders/{order_id}").json()["status"] == "accepted"
            assert shop.get(f"/orders/{order_id}").status_code == 200
        assert pages(shop, 5) == [["chosen-1", made]]


def test_empty_list(quiet: Stack) -> None:
    """Before the first order there is one empty page."""
    assert pages(quiet, 5) == [[]]


def test_list_has_each_order_once(shop: Stack, producer: Producer) -> None:
    """Orders come newest first, each once, although its event was stored three times."""
    ids = [producer.publish(created()) for _ in range(30)]
    for order_id in ids:
        producer.wait(order_id, "confirmed")
    for order_id in ids[10:20]:
        for _ in range(2):
            producer.raw("ORDER.created", created(order_id=order_id).SerializeToString())
    listed = [order_id for page in pages(shop, 7) for order_id in page]
    assert listed[: len(ids)] == ids[::-1]
    assert len(listed) == len(set(listed))


def test_waiting_for_a_change(shop: Stack, producer: Producer) -> None:
    """A thread that waits for an order's next change learns of it when it happens, not at the next look."""
    environment = {**os.environ, **shop.environment}
    program = (
        "import sys, time\n"
        "from tasks import service\n"
        "for line in sys.stdin:\n"
        "    order_id, revision, timeout = line.split()\n"
        "    begin = time.monotonic()\n"
        "    order = service.wait_for_change(order_id, int(revision), int(timeout))\n"
        "    status, new = (order.status, order.revision) if order else (None, 0)\n"
        "    print(status, new, int((time.monotonic() - begin) * 1000), time.time_ns() // 10**6, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(order_id: str, revision: int, timeout: int) -> tuple[str, int, int, int]:
            process.stdin.write(f"{order_id} {revision} {timeout}\n")
            process.stdin.flush()
            status, new, waited, at = process.stdout.readline().split()
            return status, int(new), int(waited), int(at)

        assert ask("nobody", 0, 5_000)[0] == "None"
        shop.knobs(latency_ms=400)
        try:
            order_id = producer.publish(created())
            producer.wait(order_id, "reserved")
            status, revision, _, _ = ask(order_id, -1, 5_000)
            assert status == "reserved"
            seen = [ask(order_id, revision, 10_000)]
            while seen[-1][0] != "confirmed":
                seen.append(ask(order_id, seen[-1][1], 10_000))
        finally:
            shop.knobs(latency_ms=0)
        producer.wait(order_id, "confirmed")  # with its whole history: the last event may be added first
        _, revision, _, _ = ask(order_id, -1, 5_000)
        status, _, waited, _ = ask(order_id, revision, 300)
        assert status == "confirmed"
        assert 300 <= waited < 2_000
        process.stdin.close()
        process.wait(30)


def rebuild(shop: Stack) -> str:
    """Run the command of the documentation; returns what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "tasks.rebuild"],
        cwd=REPOSITORY,
        env={**os.environ, **shop.environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rebuild_while_orders_flow(tmp_path: Path) -> None:
    """Records that were lost, falsified or invented are right again, while workers go on projecting."""
    with Stack(tmp_path) as shop:
        broker = JetStreamBroker(shop.nats.url)
        producer = Producer(broker, shop)
        ids = [producer.publish(created(payment_token=["tok", "tok_declined"][n % 2])) for n in range(40)]
        before = {order_id: producer.wait(order_id, "confirmed", "rejected") for order_id in ids}

        records = broker.bucket("orders")
        assert "40 were right" in rebuild(shop)
        for order_id in ids[:10]:
            records.delete(order_id)
        for order_id in ids[10:20]:
            entry = records.get(order_id)
            assert entry is not None
            record: dict[str, Any] = json.loads(entry.value)
            record["customer_id"] = "falsified"
            record["total"] = 1
            del record["events"]["reserved"]
            records.put(order_id, json.dumps(record).encode())
        invented = {"events": {"created": {"sequence": 1, "at": 0}, "confirmed": {"sequence": 2, "at": 0}}}
        records.put("invented", json.dumps(invented).encode())
        assert shop.get(f"/api/orders/{ids[0]}").status_code == 404

        stop = threading.Event()
        flowing: list[str] = []

        def flow() -> None:
            while not stop.is_set():
                flowing.append(producer.publish(created()))
                time.sleep(0.01)

        thread = threading.Thread(target=flow)
        thread.start()
        try:
            eventually(lambda: len(flowing) > 20)
            said = rebuild(shop)
        finally:
            stop.set()
            thread.join()
        assert "1 removed" in said
        for order_id, order in before.items():
            assert shop.get(f"/api/orders/{order_id}").json() == order
        assert shop.get("/api/orders/invented").status_code == 404
        for order_id in flowing:
            order = producer.wait(order_id, "confirmed")
            assert [entry["event"] for entry in order["history"]] == [
                "created",
                "reserved",
                "paid",
                "confirmed",
            ]
        assert "0 records written" in rebuild(shop)
        broker.close()
