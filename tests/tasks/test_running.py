"""`make up` and `make demo`: what they start, what they say when something is in the way, how they stop."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from dramatiq_jetstream.testing import NatsServer
from tasks import dev
from tasks.settings import Settings
from tests.support.polling import eventually
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY, Process
from tests.web.stack import Stack, order_body


class Service:
    """A copy of the repository's programs in a directory of its own, so that .data is not the developer's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("tasks", "web", "proto", "Procfile.dev"):
            (directory / name).symlink_to(REPOSITORY / name)
        self.env = {
            "PORT": str(free_port()),
            "NATS_PORT": str(free_port()),
            "PAYMENTS_PORT": str(free_port()),
            "WORKER_PROCESSES": "1",
            "WEB_CONCURRENCY": "1",
        }
        self.url = f"http://127.0.0.1:{self.env['PORT']}"

    def start(self, **env: str) -> Process:
        return Process(
            [sys.executable, "-c", self.program()],
            log=self.directory / "up.log",
            env={**self.env, **env},
            cwd=self.directory,
        ).start()

    def program(self) -> str:
        return (
            "import sys, pathlib, tasks.dev;"
            f"tasks.dev.ROOT = pathlib.Path({str(self.directory)!r});"
            "sys.argv[1:] = ['up'];"
            "raise SystemExit(tasks.dev.main())"
        )

    def refused(self, **env: str) -> str:
        """Start it where it cannot start; returns the one line that it says."""
        environment = {**os.environ, **self.env, **env}
        done = subprocess.run(
            [sys.executable, "-c", self.program()],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        return line


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


def test_the_key_of_payment_tokens_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make up` makes a key that only its owner may read, and keeps it."""
    path = tmp_path / ".data" / "token.key"
    key = dev._token_key(path)
    assert dev._token_key(path) == key == path.read_text().strip()
    assert path.stat().st_mode & 0o777 == 0o600
    assert Settings.from_environment({"TOKEN_KEY": key}).token_keys == (key,)


def test_up_and_down_and_up_again(service: Service) -> None:
    """It says when it is ready, takes an order, ends cleanly at Ctrl-C, and finds the order again."""
    running = service.start()
    running.wait_for_output(re.escape(f"The order service is ready: {service.url}"), timeout=60)
    order = requests.post(f"{service.url}/api/orders", json=order_body(), timeout=10).json()

    def status() -> str:
        return str(requests.get(f"{service.url}/api/orders/{order['order_id']}", timeout=10).json()["status"])

    eventually(lambda: status() == "confirmed")
    assert "is the service running already?" in service.refused()
    assert running.stop(60, signal_number=signal.SIGINT) == 0
    stopped = re.findall(r"system +\| (\w+) stopped \(rc=(-?\d+)\)", running.output)
    assert sorted(stopped) == [
        ("nats", "0"),
        ("payments", "0"),
        ("web", "0"),
        ("worker", "0"),
        ("worker_payments", "0"),
        ("worker_webhooks", "0"),
    ]
    assert stopped[-1][0] == "nats", "nats is to stop last"
    assert "Killing worker" not in running.output
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(service.env["NATS_PORT"]))) != 0

    again = service.start()
    again.wait_for_output(r"is ready: .*", count=2, timeout=60)
    assert status() == "confirmed"
    assert again.stop(60) == 0


def test_with_a_server_that_is_there(service: Service, tmp_path: Path) -> None:
    """With NATS_URL no server is started, and that one is used."""
    with NatsServer(tmp_path / "nats") as nats:
        running = service.start(NATS_URL=nats.url)
        running.wait_for_output(r"is ready: .*", timeout=60)
        assert "nats started" not in running.output
        health = requests.get(f"{service.url}/health", timeout=10).json()
        assert str(nats.port) in health["nats"]["server"]
        assert running.stop(60) == 0
    assert not (service.directory / ".data" / "nats").exists()


@pytest.mark.parametrize("variable", ["PORT", "NATS_PORT", "PAYMENTS_PORT"])
def test_port_in_use(service: Service, variable: str) -> None:
    """A port that is taken: one line that names it and says what to do."""
    with socket.create_server(("127.0.0.1", int(service.env[variable]))):
        line = service.refused()
    assert service.env[variable] in line
    assert variable in line
    assert "Stop what listens there" in line


@pytest.fixture
def old_server() -> Iterator[int]:
    """A port that greets as a nats-server of 2022 does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        greeting = (
            b'INFO {"server_id":"A","version":"2.9.10","proto":1,"max_payload":1048576,"jetstream":true}\r\n'
        )

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                try:
                    with connection:
                        connection.sendall(greeting)
                        while data := connection.recv(4096):
                            if b"PING" in data:
                                connection.sendall(b"PONG\r\n")
                except OSError:
                    continue  # the client hung up, as it should

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


def test_server_that_is_too_old(service: Service, old_server: int) -> None:
    """A server that lacks what is needed is named with its version, and so is what is needed."""
    line = service.refused(NATS_URL=f"nats://127.0.0.1:{old_server}")
    assert "2.9.10" in line
    assert "2.14" in line


def test_server_that_is_not_there(service: Service) -> None:
    """NATS_URL that leads nowhere: one line."""
    line = service.refused(NATS_URL=f"nats://127.0.0.1:{free_port()}")
    assert "Could not connect to NATS" in line
    assert "NATS_URL" in line


@pytest.mark.parametrize(("name", "value"), [("PORT", "http"), ("NATS_PORT", "0"), ("RETRY_LIMIT", "-1")])
def test_wrong_variable(service: Service, name: str, value: str) -> None:
    """A variable that cannot work: one line that names it."""
    line = service.refused(**{name: value})
    assert name in line
    assert repr(value) in line


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tasks.demo", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_demo(shop: Stack) -> None:
    """The demo places its orders, waits for each, and shows what became of them."""
    done = demo("--orders", "120", "--concurrency", "8", "--seed", "1", "--url", shop.url)
    assert done.returncode == 0, done.stdout + done.stderr
    table = dict(re.findall(r"│ +([a-z ,0-9]+?) +│ +([\d,]+)(?: ms)? │", done.stdout))
    assert table["accepted"] == "120"
    assert int(table["confirmed"]) + int(table["rejected"]) + int(table["failed"]) == 120
    assert int(table["payment declined"]) > 0
    assert {"accepted per second", "accepted to final, p50", "accepted to final, p99"} <= set(table)


def test_demo_without_a_service() -> None:
    """Nothing there: one line that says how to start it."""
    done = demo("--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "make up" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
