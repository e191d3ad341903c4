"""The payment gateway goes away: orders wait for it, visibly, and the log says one line each time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dramatiq.errors import BrokerError

from tasks.gateway import GatewayUnavailable, UnusableAnswer
from tasks.outage import FAILURES, GuardedGateway, Outage
from tasks.ports import Charge, Decline
from tests.support.polling import eventually, holds
from tests.tasks.fakes import FakeBucket
from tests.web.stack import Stack


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Stack]:
    """A service whose orders wait long for their payment, and whose other steps are not tried again."""
    env = {"RETRY_LIMIT": "1", "PAYMENT_PATIENCE": "600000", "PAYMENT_TIMEOUT": "500"}
    with Stack(tmp_path, env=env) as stack:
        yield stack


def test_orders_wait_visibly_and_go_on(patient: Stack) -> None:
    """Through an outage longer than all retries no order fails; the API and the page say what they wait for."""
    patient.knobs(failure_rate=1.0)
    orders = [patient.order(("MUG-01", 1)) for _ in range(8)]

    def waiting() -> bool:
        bodies = [patient.get(f"/api/orders/{order['order_id']}").json() for order in orders]
        return all(body.get("waiting_for") == "payment provider" for body in bodies)

    eventually(waiting)
    page = patient.get(f"/orders/{orders[0]['order_id']}", headers={"Accept": "text/html"})
    assert "waiting for the payment provider" in page.text
    state = patient.get(f"/orders/{orders[0]['order_id']}/state").json()
    assert state["revision"].partition(".")[0].endswith("w")
    # Many times the pauses between RETRY_LIMIT retries.
    holds(waiting, 5.0, interval=0.5)
    patient.knobs(failure_rate=0.0)
    for order in orders:
        final = patient.final(order["order_id"], timeout=60)
        assert final["status"] == "confirmed"
        assert "waiting_for" not in final
    _check_log(patient)


def _check_log(stack: Stack) -> None:
    """Each charge without an answer is one WARNING line, without a traceback."""
    log = stack.workers.output
    lines = [line for line in log.splitlines() if "A payment waits" in line]
    assert len(lines) > FAILURES
    assert all(" WARNING " in line and "order_id=" in line for line in lines)
    assert "Traceback" not in log
    assert "ERROR" not in log
    # The breaker: not every try was one at the gateway.
    assert any("left alone" in line for line in lines)


def test_patience_ends(tmp_path: Path) -> None:
    """An order whose patience is over fails, and a replay carries it on when the gateway is back."""
    env = {"RETRY_LIMIT": "0", "PAYMENT_PATIENCE": "3000", "PAYMENT_TIMEOUT": "500"}
    with Stack(tmp_path, env=env) as stack:
        stack.knobs(failure_rate=1.0)
        order_id = stack.order()["order_id"]
        started = time.monotonic()
        eventually(lambda: stack.get(f"/api/orders/{order_id}").json()["status"] == "failed")
        assert time.monotonic() - started > 2.0
        body = stack.get(f"/api/orders/{order_id}").json()
        assert "waiting_for" not in body
        assert re.search("payment gateway", body["reason"])


class Broken:
    """A gateway that counts how often it is asked, and answers when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers = False

    def charge(self, order_id: str, amount: int, currency: str, token: str) -> Charge | Decline:
        self.asked += 1
        if not self.answers:
            raise GatewayUnavailable("no answer")
        return Charge("ch_1")


def test_a_gateway_that_is_down_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few failures in a row it is not asked, then by one charge; the first answer opens the way for all."""
    clock = [1_000.0]
    monkeypatch.setattr("circuitbreaker.monotonic", lambda: clock[0])
    gateway, outage = Broken(), Outage(FakeBucket(), ttl=60_000, now=lambda: 7)
    monkeypatch.setattr(outage, "since", lambda: outage._since)
    guarded = GuardedGateway(gateway, outage)

    def charge() -> Charge | Decline:
        return guarded.charge("o", 100, "EUR", "")

    for _ in range(50):
        with pytest.raises(GatewayUnavailable):
            charge()
    assert gateway.asked == FAILURES
    assert guarded.is_open
    clock[0] += 6.0
    with pytest.raises(GatewayUnavailable):
        charge()
    assert gateway.asked == FAILURES + 1
    assert guarded.is_open
    clock[0] += 6.0
    gateway.answers = True
    assert charge() == Charge("ch_1")
    assert not guarded.is_open
    assert charge() == Charge("ch_1")


def test_a_decline_is_an_answer() -> None:
    """Declined payments, however many, say nothing against the gateway."""

    class Declining:
        def charge(self, order_id: str, amount: int, currency: str, token: str) -> Charge | Decline:
            return Decline("card_declined", "no")

    guarded = GuardedGateway(Declining(), Outage(FakeBucket(), ttl=60_000, now=lambda: 7))
    for _ in range(3 * FAILURES):
        assert guarded.charge("o", 1, "EUR", "") == Decline("card_declined", "no")
    assert not guarded.is_open


def test_an_answer_that_is_none_is_no_outage() -> None:
    """One order that the gateway will not have keeps no other from being paid."""

    class Refusing:
        def charge(self, order_id: str, amount: int, currency: str, token: str) -> Charge | Decline:
            raise UnusableAnswer("the payment gateway answered 400")

    outage = Outage(FakeBucket(), ttl=60_000, now=lambda: 7)
    guarded = GuardedGateway(Refusing(), outage)
    for _ in range(3 * FAILURES):
        with pytest.raises(UnusableAnswer):
            guarded.charge("o", 1, "EUR", "")
    assert not guarded.is_open
    assert outage.since() is None


def test_the_note_of_an_outage_is_shared_and_removed() -> None:
    """What one process notes another reads, with the time it began; whichever gets an answer removes it."""
    bucket = FakeBucket()
    clock = [5_000]
    noting, reading = (Outage(bucket, ttl=60_000, now=lambda: clock[0]) for _ in range(2))
    assert reading.since() is None
    noting.note("refused")
    clock[0] += 60_000
    noting.note("refused again")
    third = Outage(bucket, ttl=60_000, now=lambda: clock[0])
    assert third.since() == 5_000
    third.over()
    eventually(lambda: Outage(bucket, ttl=60_000, now=lambda: clock[0]).since() is None)
    eventually(lambda: third.since() is None)


def test_no_note_outlives_the_last_answer() -> None:
    """One that was made just after a process looked goes as well, and so does one that could not be removed at once."""
    bucket = FakeBucket()
    noting, answered = (Outage(bucket, ttl=60_000, now=lambda: 7) for _ in range(2))
    looks, away = list[str](), threading.Event()

    def pause(at: str) -> None:
        looks.append(at)
        if away.is_set():
            away.clear()
            raise BrokerError("the store is away")

    bucket.pause = pause
    answered.over()
    eventually(lambda: len(looks) == 1)
    noting.note("refused")
    away.set()
    answered.over()
    eventually(lambda: not bucket.entries)
    assert not away.is_set()


def test_what_fails_after_an_answer_is_noted() -> None:
    """The look for an older note, which comes up to a second after an answer, leaves a newer one alone."""
    bucket = FakeBucket()
    clock = [1_000]
    outage = Outage(bucket, ttl=60_000, now=lambda: clock[0])
    looks = list[str]()
    bucket.pause = looks.append
    outage.over()
    eventually(lambda: len(looks) == 1)
    outage.over()  # looks again in a second
    clock[0] += 1
    outage.note("refused")
    noted = len(looks)
    eventually(lambda: len(looks) > noted)
    holds(lambda: bool(bucket.entries), 0.2)
    clock[0] += 1
    outage.over()
    eventually(lambda: not bucket.entries)
