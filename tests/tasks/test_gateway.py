"""The payment client against the stand-in, a real process: answers, failures, durability, reuse of connections."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tasks.gateway import GatewayUnavailable, HttpGateway
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
        except requests.ConnectionError:
            return False

    def knobs(self, **changes: Any) -> None:
        assert requests.put(f"{self.url}/knobs", json=changes, timeout=5).status_code == 200

    def charges(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = requests.get(f"{self.url}/charges", timeout=5).json()["charges"]
        return found


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    bank = Bank(tmp_path)
    bank.start()
    yield bank
    bank.process.stop()


def test_charge_is_made_once(bank: Bank) -> None:
    """Asked ten times, from ten threads, the gateway charges once and answers the same."""
    gateway = HttpGateway(bank.url, timeout=5_000)
    with ThreadPoolExecutor(10) as pool:
        answers = set(pool.map(lambda _: gateway.charge("o-1", 1_290, "EUR", "tok"), range(10)))
    assert len(answers) == 1
    (charge,) = bank.charges()
    assert (charge["order_id"], charge["amount"], charge["status"]) == ("o-1", 1_290, "captured")
    assert answers == {Charge(charge["id"])}


def test_declines_are_final_answers(bank: Bank) -> None:
    """Test tokens are declined, each with its code, and again with the same when repeated."""
    gateway = HttpGateway(bank.url, timeout=5_000)
    for token, code in (("tok_declined", "card_declined"), ("tok_insufficient", "insufficient_funds")):
        for _ in range(2):
            answer = gateway.charge(f"o-{token}", 100, "EUR", token)
            assert isinstance(answer, Decline)
            assert answer.code == code
    assert [charge["status"] for charge in bank.charges()] == ["declined", "declined"]


def test_answer_that_never_comes(bank: Bank) -> None:
    """A charge that was made and not answered: a timeout first, the same charge at the next attempt."""
    gateway = HttpGateway(bank.url, timeout=300)
    bank.knobs(hang_after_charge_rate=1.0, hang_ms=1_000)
    with pytest.raises(GatewayUnavailable, match="did not answer within 300 ms"):
        gateway.charge("o-1", 100, "EUR", "tok")
    bank.knobs(hang_after_charge_rate=0.0)
    answer = gateway.charge("o-1", 100, "EUR", "tok")
    (charge,) = bank.charges()
    assert answer == Charge(charge["id"])


@pytest.mark.parametrize("knob", ["failure_rate", "failure_after_charge_rate"])
def test_server_errors_are_no_answers(bank: Bank, knob: str) -> None:
    """500 says nothing about the charge."""
    gateway = HttpGateway(bank.url, timeout=2_000)
    bank.knobs(**{knob: 1.0})
    with pytest.raises(GatewayUnavailable, match="answered 500"):
        gateway.charge("o-1", 100, "EUR", "tok")
    bank.knobs(**{knob: 0.0})
    assert isinstance(gateway.charge("o-1", 100, "EUR", "tok"), Charge)
    assert len(bank.charges()) == 1


def test_refused_and_hung_up(bank: Bank) -> None:
    """A gateway that hangs up, and one that is not there, are said to be unreachable."""
    gateway = HttpGateway(bank.url, timeout=2_000)
    bank.knobs(refuse=True)
    with pytest.raises(GatewayUnavailable, match="cannot be reached"):
        gateway.charge("o-1", 100, "EUR", "tok")
    bank.process.kill()
    with pytest.raises(GatewayUnavailable, match="Connection refused"):
        gateway.charge("o-1", 100, "EUR", "tok")
    bank.start()
    assert isinstance(gateway.charge("o-1", 100, "EUR", "tok"), Charge)


def test_charges_survive_kill_9(bank: Bank) -> None:
    """A charge that was answered is there after kill -9, and is not made again."""
    gateway = HttpGateway(bank.url, timeout=5_000)
    before = gateway.charge("o-1", 100, "EUR", "tok")
    bank.process.kill()
    bank.start()
    # The kept-open connection is dead; that is noticed and made up for within the one call.
    assert gateway.charge("o-1", 100, "EUR", "tok") == before
    assert len(bank.charges()) == 1


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


def test_key_of_another_charge(bank: Bank) -> None:
    """A key that was used for another amount is refused, and that is no decline."""
    gateway = HttpGateway(bank.url, timeout=5_000)
    gateway.charge("o-1", 100, "EUR", "tok")
    with pytest.raises(GatewayUnavailable, match="422"):
        gateway.charge("o-1", 200, "EUR", "tok")
