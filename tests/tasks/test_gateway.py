"""The payment client against the stand-in, a real process: answers, failures, durability, reuse of connections."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tasks.gateway import GatewayUnavailable, HttpGateway, UnusableAnswer
from tasks.ledger import Chargeback
from tasks.ports import Charge, Decline
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import Process, python


class Bank:
    """A running stand-in."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: Process = python(
            *("-m", "tasks.payments_stand_in", "--port", str(self.port)),
            *("--database", directory / "payments.sqlite"),
            log=directory / "payments.log",
        )

    def start(self) -> None:
        self.process.start()
        self.process.wait_for_output(r"payments stand-in on .*")
        eventually(self.up)

    def up(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=2).status_code == 200
        except (requests.ConnectionError, requests.Timeout):
            return False

    def knobs(self, **changes: Any) -> None:
        assert requests.put(f"{self.url}/knobs", json=changes, timeout=5).status_code == 200

    def charges(self, order_id: str) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.url}/charges", params={"order_id": order_id}, timeout=5)
        found: list[dict[str, Any]] = answer.json()["charges"]
        return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bank]:
    """A stand-in that is started once."""
    bank = Bank(tmp_path_factory.mktemp("bank"))
    bank.start()
    yield bank
    bank.process.stop()


@pytest.fixture
def bank(shared: Bank) -> Iterator[Bank]:
    """The shared stand-in, for a test that brings orders of its own; its knobs are put back."""
    yield shared
    well = {"failure_rate": 0.0, "failure_after_charge_rate": 0.0, "hang_after_charge_rate": 0.0}
    shared.knobs(about=["charges", "refunds"], refuse=False, fail_next=0, latency_ms=0, **well)


@pytest.fixture
def own_bank(tmp_path: Path) -> Iterator[Bank]:
    """A stand-in for this test alone, to be killed at will."""
    bank = Bank(tmp_path)
    bank.start()
    yield bank
    bank.process.stop()


@pytest.fixture
def order_id() -> str:
    """An order that no other test uses."""
    return f"o-{uuid.uuid4().hex}"


def test_charge_is_made_once(bank: Bank, order_id: str) -> None:
    """Asked ten times, from ten threads, the gateway charges once and answers the same."""
    gateway = HttpGateway(bank.url, timeout=30_000)
    with ThreadPoolExecutor(10) as pool:
        answers = set(pool.map(lambda _: gateway.charge(order_id, 1_290, "EUR", "tok"), range(10)))
    assert len(answers) == 1
    (charge,) = bank.charges(order_id)
    assert (charge["order_id"], charge["amount"], charge["status"]) == (order_id, 1_290, "captured")
    assert answers == {Charge(charge["id"])}


def test_declines_are_final_answers(bank: Bank, order_id: str) -> None:
    """Test tokens are declined, each with its code, and again with the same when repeated."""
    gateway = HttpGateway(bank.url, timeout=30_000)
    for token, code in (("tok_declined", "card_declined"), ("tok_insufficient", "insufficient_funds")):
        for _ in range(2):
            answer = gateway.charge(f"{order_id}-{token}", 100, "EUR", token)
            assert isinstance(answer, Decline)
            assert answer.code == code
        assert [charge["status"] for charge in bank.charges(f"{order_id}-{token}")] == ["declined"]


def test_answer_that_never_comes(bank: Bank, order_id: str) -> None:
    """A charge that was made and not answered: a timeout first, the same charge at the next attempt."""
    bank.knobs(hang_after_charge_rate=1.0, hang_ms=1_000)
    with pytest.raises(GatewayUnavailable, match="did not answer within 300 ms"):
        HttpGateway(bank.url, timeout=300).charge(order_id, 100, "EUR", "tok")
    bank.knobs(hang_after_charge_rate=0.0)
    answer = HttpGateway(bank.url, timeout=30_000).charge(order_id, 100, "EUR", "tok")
    (charge,) = bank.charges(order_id)
    assert answer == Charge(charge["id"])


@pytest.mark.parametrize("part", ["head", "body", "chunks"])
@pytest.mark.parametrize("kept_open", [False, True])
def test_an_answer_that_comes_byte_by_byte(part: str, kept_open: bool) -> None:
    """It has the time of one that never comes: no byte gives it more."""
    body = b'{"id": "ch_1", "status": "captured", "amount": 100, "currency": "EUR"}'
    head = b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n" % len(body)
    chunked = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
    at_once, bytewise = {
        "head": (b"", head + body),
        "body": (head, body),
        "chunks": (chunked, b"".join(b"1\r\n%c\r\n" % one for one in body) + b"0\r\n\r\n"),
    }[part]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                if kept_open:
                    connection.recv(65_536)
                    connection.sendall(head + body)
                connection.recv(65_536)
                connection.sendall(at_once)
                for one in bytewise:
                    try:
                        connection.sendall(b"%c" % one)
                    except OSError:
                        return
                    time.sleep(0.1)

        dripping = threading.Thread(target=serve, daemon=True)
        dripping.start()
        gateway = HttpGateway(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=30_000)
        if kept_open:
            assert gateway.charge("o-1", 100, "EUR", "tok") == Charge("ch_1")
        gateway._timeout = 1.0  # a busy machine may need more for an answer that comes at once
        with pytest.raises(GatewayUnavailable, match="did not answer within 1000 ms"):
            gateway.charge("o-2", 100, "EUR", "tok")
        dripping.join(timeout=60)


@pytest.mark.parametrize("knob", ["failure_rate", "failure_after_charge_rate"])
def test_server_errors_are_no_answers(bank: Bank, order_id: str, knob: str) -> None:
    """500 says nothing about the charge."""
    gateway = HttpGateway(bank.url, timeout=30_000)
    bank.knobs(**{knob: 1.0})
    with pytest.raises(GatewayUnavailable, match="answered 500"):
        gateway.charge(order_id, 100, "EUR", "tok")
    bank.knobs(**{knob: 0.0})
    assert isinstance(gateway.charge(order_id, 100, "EUR", "tok"), Charge)
    assert len(bank.charges(order_id)) == 1


def test_what_is_not_there_and_what_hangs_up(own_bank: Bank, order_id: str) -> None:
    """Both are said to be unreachable; a charge that was answered is there after kill -9, and is not made again."""
    gateway = HttpGateway(own_bank.url, timeout=30_000)
    own_bank.knobs(refuse=True)
    with pytest.raises(GatewayUnavailable, match="cannot be reached"):
        gateway.charge(order_id, 100, "EUR", "tok")
    own_bank.knobs(refuse=False)
    before = gateway.charge(order_id, 100, "EUR", "tok")
    own_bank.process.kill()
    with pytest.raises(GatewayUnavailable, match="Connection refused"):
        gateway.charge(order_id, 100, "EUR", "tok")
    own_bank.start()
    assert gateway.charge(order_id, 100, "EUR", "tok") == before
    assert len(own_bank.charges(order_id)) == 1


def test_a_connection_that_died_is_made_up_for(own_bank: Bank, order_id: str) -> None:
    """One that was kept open while the gateway was started again is noticed, and replaced within the one call."""
    gateway = HttpGateway(own_bank.url, timeout=30_000)
    before = gateway.charge(order_id, 100, "EUR", "tok")
    own_bank.process.kill()
    own_bank.start()
    assert gateway.charge(order_id, 100, "EUR", "tok") == before
    assert len(own_bank.charges(order_id)) == 1


def test_connection_is_kept_open() -> None:
    """Several charges of a thread go over one connection."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                accepted.append(connection)
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            body = b'{"id": "ch_1", "status": "captured", "amount": 100, "currency": "EUR"}'
            with connection, connection.makefile("rb") as request:
                while line := request.readline():
                    length = 0
                    while line.strip():
                        if line.lower().startswith(b"content-length:"):
                            length = int(line.split(b":")[1])
                        line = request.readline()
                    request.read(length)  # the body may come by itself, and is no second request
                    connection.sendall(
                        b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
                    )

        threading.Thread(target=serve, daemon=True).start()
        gateway = HttpGateway(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=2_000)
        for _ in range(3):
            assert gateway.charge("o-1", 100, "EUR", "tok") == Charge("ch_1")
        with pytest.raises(GatewayUnavailable, match="another charge"):
            gateway.charge("o-1", 200, "EUR", "tok")
        assert len(accepted) == 1
        for connection in accepted:
            connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/refunds", {"amount": 1, "currency": "EUR"}, 400),
        ("POST", "/chargebacks", {"amount": 1, "currency": "EUR", "charge_id": "none"}, 422),
        ("PUT", "/knobs", {"about": ["nothing"]}, 400),
        ("POST", "/charges", {"amount": -1, "currency": "EUR", "token": "t"}, 400),
        ("POST", "/charges", {"amount": 1.5, "currency": "EUR", "token": "t"}, 400),
        ("POST", "/charges", {"amount": 1, "currency": "EUR"}, 400),
        ("POST", "/nothing", {}, 404),
        ("PUT", "/knobs", {"latency_ms": -1}, 400),
        ("PUT", "/knobs", {"failure_rate": 2}, 400),
        ("PUT", "/knobs", {"no_such_knob": 1}, 400),
        ("GET", "/charges?limit=x", None, 400),
        ("GET", "/nothing", None, 404),
    ],
)
def test_stand_in_refuses_nonsense(bank: Bank, method: str, path: str, body: Any, status: int) -> None:
    """The stand-in says what is wrong, and goes on."""
    answer = requests.request(method, bank.url + path, json=body, headers={"Idempotency-Key": "k"}, timeout=5)
    assert answer.status_code == status
    assert answer.json()["message"]
    assert bank.up()


def test_key_of_another_charge(bank: Bank, order_id: str) -> None:
    """A key that was used for another amount is refused, and that is no decline."""
    gateway = HttpGateway(bank.url, timeout=30_000)
    gateway.charge(order_id, 100, "EUR", "tok")
    with pytest.raises(GatewayUnavailable, match="422"):
        gateway.charge(order_id, 200, "EUR", "tok")


@pytest.fixture
def paid(bank: Bank, order_id: str) -> tuple[HttpGateway, str, str]:
    """A gateway, an order of this test, and the id of its charge of 1,000."""
    gateway = HttpGateway(bank.url, timeout=30_000)
    charge = gateway.charge(order_id, 1_000, "EUR", "tok")
    assert isinstance(charge, Charge)
    return gateway, order_id, charge.charge_id


def moved(bank: Bank, table: str, order_id: str) -> list[int]:
    answer = requests.get(f"{bank.url}/{table}", params={"order_id": order_id}, timeout=5)
    return [one["amount"] for one in answer.json()[table]]


def test_refund_is_made_once(bank: Bank, paid: tuple[HttpGateway, str, str]) -> None:
    """Asked ten times with one key, from ten threads, it goes back once; another key is another refund."""
    gateway, order_id, charge_id = paid
    with ThreadPoolExecutor(10) as pool:
        answers = set(pool.map(lambda _: gateway.refund(charge_id, 300, "EUR", f"{order_id}.r-1"), range(10)))
    assert len(answers) == 1
    assert gateway.refund(charge_id, 700, "EUR", f"{order_id}.r-2") not in answers
    assert moved(bank, "refunds", order_id) == [300, 700]
    assert {gateway.find_refund(order_id, f"{order_id}.r-1")} == answers
    assert gateway.find_refund(order_id, f"{order_id}.r-3") is None


def test_refund_of_more_than_is_left(paid: tuple[HttpGateway, str, str]) -> None:
    """The gateway will not have it; that is no outage, and waiting alone does not help."""
    gateway, order_id, charge_id = paid
    gateway.refund(charge_id, 600, "EUR", f"{order_id}.r-1")
    for charge, amount, key in ((charge_id, 401, "r-2"), ("ch_none", 1, "r-3"), (charge_id, 500, "r-1")):
        with pytest.raises(UnusableAnswer, match="422"):
            gateway.refund(charge, amount, "EUR", f"{order_id}.{key}")


@pytest.mark.parametrize("lost", ["failure_after_charge_rate", "hang_after_charge_rate"])
def test_refund_whose_answer_is_lost(bank: Bank, paid: tuple[HttpGateway, str, str], lost: str) -> None:
    """It was made, and the next attempt is told of the same one."""
    gateway, order_id, charge_id = paid
    bank.knobs(about=["refunds"], **{lost: 1.0}, hang_ms=2_000)
    with pytest.raises(GatewayUnavailable, match=r"answered 500|did not answer"):
        HttpGateway(bank.url, timeout=500).refund(charge_id, 300, "EUR", f"{order_id}.r-1")
    bank.knobs(**{lost: 0.0})
    eventually(lambda: moved(bank, "refunds", order_id) == [300])
    assert gateway.refund(charge_id, 300, "EUR", f"{order_id}.r-1") == gateway.find_refund(
        order_id, f"{order_id}.r-1"
    )
    assert moved(bank, "refunds", order_id) == [300]


def test_refund_that_comes_late(bank: Bank, paid: tuple[HttpGateway, str, str]) -> None:
    """The gateway makes it after it was given up; asked again, it does not make another."""
    gateway, order_id, charge_id = paid
    bank.knobs(about=["refunds"], latency_ms=1_500)
    with pytest.raises(GatewayUnavailable, match="did not answer"):
        HttpGateway(bank.url, timeout=300).refund(charge_id, 300, "EUR", f"{order_id}.r-1")
    bank.knobs(latency_ms=0)
    gateway.refund(charge_id, 300, "EUR", f"{order_id}.r-1")
    eventually(lambda: moved(bank, "refunds", order_id) == [300])


def test_look_up_of_a_charge(bank: Bank, paid: tuple[HttpGateway, str, str]) -> None:
    """Captured, declined, and none at all; an answer that is lost or late says nothing."""
    gateway, order_id, charge_id = paid
    assert gateway.find_charge(order_id) == Charge(charge_id, 1_000)
    gateway.charge(f"{order_id}-declined", 100, "EUR", "tok_declined")
    assert gateway.find_charge(f"{order_id}-declined") is None
    assert gateway.find_charge(f"{order_id}-none") is None
    bank.knobs(about=["lookups"], fail_next=1)
    with pytest.raises(GatewayUnavailable, match="answered 500"):
        gateway.find_charge(order_id)
    bank.knobs(hang_after_charge_rate=1.0, hang_ms=2_000)
    with pytest.raises(GatewayUnavailable, match="did not answer"):
        HttpGateway(bank.url, timeout=500).find_charge(order_id)
    bank.knobs(hang_after_charge_rate=0.0, refuse=True)
    with pytest.raises(GatewayUnavailable, match="cannot be reached"):
        gateway.find_charge(order_id)
    bank.knobs(refuse=False)
    assert gateway.find_charge(order_id) == Charge(charge_id, 1_000)


def test_what_the_bank_took_back(bank: Bank, paid: tuple[HttpGateway, str, str]) -> None:
    """It is looked up, and nothing of it is refunded."""
    gateway, order_id, charge_id = paid
    body = {"charge_id": charge_id, "amount": 400, "currency": "EUR", "reason": "not received"}
    for _ in range(2):
        taken = requests.post(
            f"{bank.url}/chargebacks", json=body, headers={"Idempotency-Key": order_id}, timeout=5
        )
        assert taken.status_code == 201, taken.text
    found = gateway.find_chargebacks(order_id)
    assert found == [(charge_id, Chargeback(taken.json()["id"], 400, 0, "not received"))]
    with pytest.raises(UnusableAnswer, match="600 are left"):
        gateway.refund(charge_id, 601, "EUR", f"{order_id}.r-1")


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'{"charges": null}',
        b'{"charges": [null]}',
        b'{"charges": [{"id": "", "amount": 1}]}',
        b'{"charges": [{"id": "x", "amount": "1"}]}',
        b"no JSON",
    ],
)
def test_look_up_that_is_none(body: bytes) -> None:
    """An answer of the wrong shape says nothing of the charge: it is not taken for "there is none"."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
                connection.sendall(head + body)

        thread = threading.Thread(target=answer)
        thread.start()
        gateway = HttpGateway(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=30_000)
        with pytest.raises(GatewayUnavailable, match="payment gateway"):
            gateway.find_charge("o-1")
        thread.join()
