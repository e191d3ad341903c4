"""NATS goes away and comes back: what the front end says meanwhile, and that no accepted order is lost."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.support.polling import eventually
from tests.support.processes import children
from tests.web.stack import Stack, order_body


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    """A service whose nats-server the test may kill; the server syncs every message to disk."""
    with Stack(tmp_path, sync="always", web_processes=2, env={"ACCEPT_TIMEOUT": "2000"}) as stack:
        yield stack


def health(stack: Stack, path: str = "/health") -> int:
    return requests.get(stack.url + path, timeout=10).status_code


def test_health_follows_the_connection(own: Stack) -> None:
    """200 while connected, 503 as soon as NATS is gone, 200 when it is back; the process itself stays alive."""
    for path in ("/health", "/health/ready", "/health/live"):
        assert health(own, path) == 200
    own.nats.kill()
    # Silence alone would be noticed after six seconds.
    eventually(lambda: all(health(own) == 503 for _ in range(6)), timeout=5)
    assert health(own, "/health/ready") == 503
    assert health(own, "/health/live") == 200
    answer = own.get("/health")
    assert answer.json()["status"] == "unavailable"
    own.nats.start()
    eventually(lambda: all(health(own) == 200 for _ in range(6)))


def test_without_nats_nothing_is_accepted(own: Stack) -> None:
    """503 with Retry-After within a bounded time, on every address; pages stay readable."""
    order_id = own.order()["order_id"]
    key = {"Idempotency-Key": str(uuid.uuid4())}
    customer = f"c-{uuid.uuid4()}"
    own.nats.kill()
    start = time.monotonic()
    answer = own.post("/api/orders", json=order_body(customer_id=customer), headers=key)
    assert time.monotonic() - start < 10
    assert answer.status_code == 503
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert int(answer.headers["Retry-After"]) > 0
    for path in ("/api/orders", f"/api/orders/{order_id}", "/api/products"):
        start = time.monotonic()
        answer = own.get(path)
        assert answer.status_code == 503, path
        assert answer.headers["Retry-After"]
        assert time.monotonic() - start < 18, path
    page = own.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 503
    assert 'http-equiv="refresh"' in page.text
    # The address is in the log; it cannot write a line of its own there.
    assert own.get("/orders/x%0a2026-11-28%20CRITICAL%20forged%1b%5b2J/state").status_code in (404, 503)
    assert own.get("/api/products?%0aforged").status_code == 503
    assert own.get("/orders/recent/x%0aCRITICAL%20forged").status_code in (404, 503)
    assert not any(
        line.lstrip().startswith(("CRITICAL", "2026-11-28 C")) for line in own.web.output.splitlines()
    )
    assert "\x1b" not in own.web.output
    form = own.post("/orders", data={"customer_id": "c-1", "quantity-MUG-01": "1", "submission": "x" * 20})
    assert form.status_code == 503
    assert "Try again" in form.text
    assert 'value="xxxxxxxxxxxxxxxxxxxx"' in form.text

    own.nats.start()
    eventually(own.healthy)

    # The client tries again with the same key, and again: it is one order, whatever the first one came to.
    def again() -> dict[str, object] | None:
        answer = own.post("/api/orders", json=order_body(customer_id=customer), headers=key)
        return answer.json() if answer.status_code == 202 else None

    order = eventually(again, timeout=20, interval=0.2)
    assert order is not None
    repeated = own.post("/api/orders", json=order_body(customer_id=customer), headers=key)
    assert repeated.json()["order_id"] == order["order_id"]
    assert own.final(str(order["order_id"]), timeout=30)["status"] == "confirmed"
    orders = own.get("/api/orders?limit=100").json()["orders"]
    assert sum(found["customer_id"] == customer for found in orders) == 1


def test_a_burst_at_the_start_is_accepted(tmp_path: Path) -> None:
    """The first requests of a new process come all at once, before it has a connection."""
    with Stack(tmp_path, workers=False) as stack, ThreadPoolExecutor(16) as pool:
        (worker,) = children(stack.web.pid)
        os.kill(worker, signal.SIGKILL)  # what comes now waits for the next one

        def post(_: int) -> int:
            body = order_body(("MUG-01", 1))
            return requests.post(f"{stack.url}/api/orders", json=body, timeout=20).status_code

        assert Counter(pool.map(post, range(32))) == {202: 32}


def test_health_is_answered_while_requests_wait(own: Stack) -> None:
    """A hundred orders that wait for NATS do not keep the front end from saying that it is alive."""
    own.nats.kill()
    with ThreadPoolExecutor(100) as pool:
        waiting = [pool.submit(own.post, "/api/orders", json=order_body()) for _ in range(100)]
        eventually(lambda: not own.healthy())
        for path, status in (("/health/live", 200), ("/health", 503)) * 5:
            start = time.monotonic()
            assert health(own, path) == status
            assert time.monotonic() - start < 5
        answers = [future.result(timeout=60) for future in waiting]
    assert {answer.status_code for answer in answers} == {503}
    assert all(answer.headers["Retry-After"] for answer in answers)


def test_two_hundred_posts_during_a_restart(own: Stack) -> None:
    """nats-server is killed and started again amid 200 posts: each 202 becomes final, the rest are errors."""

    def place(number: int) -> requests.Response:
        # Spread over the kill and the restart.
        time.sleep(number * 0.03)
        return requests.post(
            f"{own.url}/api/orders",
            json=order_body(customer_id=f"c-{number}"),
            headers={"Idempotency-Key": f"restart-{number}"},
            timeout=60,
        )

    with ThreadPoolExecutor(200) as pool:
        waiting = [pool.submit(place, number) for number in range(200)]
        eventually(lambda: sum(future.done() for future in waiting) >= 20)
        own.nats.kill()
        # Longer than a request waits for a connection, so that some must fail.
        time.sleep(3.0)
        own.nats.start()
        answers = [future.result(timeout=90) for future in waiting]

    counts = Counter(answer.status_code for answer in answers)
    print(f"answers: {dict(counts)}")
    assert set(counts) <= {202, 503}, counts
    assert counts[202] >= 40
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 503)
    accepted = [answer.json()["order_id"] for answer in answers if answer.status_code == 202]
    assert len(accepted) == len(set(accepted))
    for order_id in accepted:
        assert own.final(order_id, timeout=60)["status"] == "confirmed"

    # And who got an error tries again with the same key: no customer ends up with two orders.
    eventually(own.healthy)
    for number, answer in enumerate(answers):
        if answer.status_code == 503:
            eventually(lambda number=number: _accepted(own, number), timeout=30, interval=0.2)
    customers: Counter[str] = Counter()
    path: str | None = "/api/orders?limit=100"
    while path is not None:
        page = own.get(path)
        customers.update(order["customer_id"] for order in page.json()["orders"])
        path = page.links["next"]["url"] if "next" in page.links else None
    assert all(customers[f"c-{number}"] == 1 for number in range(200)), customers.most_common(3)


def _accepted(stack: Stack, number: int) -> bool:
    answer = requests.post(
        f"{stack.url}/api/orders",
        json=order_body(customer_id=f"c-{number}"),
        headers={"Idempotency-Key": f"restart-{number}"},
        timeout=60,
    )
    return answer.status_code == 202
