"""`fleet ui` and `fleet ui-user`: what they refuse, and what survives a restart of the server and a killed worker."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from dramatiq_jetstream.cli.app import main
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.ui import Passwords
from tests.support.polling import eventually
from tests.support.processes import WORKER_READY
from tests.ui.conftest import Shop

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `fleet` and returns its status, output and errors."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            main(list(arguments))
        except SystemExit as end:
            status = int(end.code or 0)
        return (status, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--listen", "0.0.0.0:8080"), 1, "open to all who reach 0.0.0.0"),
        (("--listen", "[::]:8080"), 1, "open to all who reach ::"),
        (("--listen", "dash.example:8080"), 1, "open to all who reach dash.example"),
        (("--operator", "ann"), 2, "belong to --trust-header"),
        (("--users", "USERS", "--trust-header", "X-User"), 2, "not by both"),
        (
            (
                "--users",
                "EMPTY",
            ),
            2,
            "there are no users",
        ),
        (("--trust-header", "X-User", "--trust-proxy", "nowhere"), 2, "proxies cannot be used"),
    ],
)
def test_a_dashboard_that_would_be_open_does_not_start(
    tmp_path: Path, nats_url: str, command: Command, arguments: tuple[str, ...], status: int, says: str
) -> None:
    """One sentence says why; nothing listens."""
    users, empty = tmp_path / "users", tmp_path / "empty"
    users.write_text(f"ann operator {Passwords.hash('a long password')}\n")
    empty.touch()
    given = [{"USERS": str(users), "EMPTY": str(empty)}.get(each, each) for each in arguments]
    ended, _, errors = command("--url", nats_url, "ui", *given)
    assert (ended, errors.count("\n")) == (status, 1), errors
    assert says in errors


def test_a_line_for_the_file_of_users(command: Command) -> None:
    """It has the name, the role and a hash that the password opens; a short password is refused."""
    _, line, _ = command("ui-user", "ann", "--role", "operator", stdin="a long password\n")
    name, role, kept = line.split()
    assert (name, role) == ("ann", "operator")
    assert kept.startswith("$argon2id$")
    assert "12 to 256 characters" in command("ui-user", "ann", stdin="short\n")[2]
    assert "cannot be a name" in command("ui-user", "a b", stdin="a long password\n")[2]


def test_a_restart_of_the_server_and_a_killed_worker_are_seen(tmp_path: Path) -> None:
    """While NATS is away pages say so, afterwards they show what was there; what a dead worker ran runs redelivered."""
    server = NatsServer(store_dir=tmp_path / "nats")
    server.start()
    try:
        shop = Shop(tmp_path, server)
        dashboard = shop.dashboard()
        workers = shop.workers(processes=2, threads=1)
        with dashboard, workers:
            dashboard.wait_for_output("is at", timeout=60)
            workers.wait_for_output(WORKER_READY, count=2, timeout=60)
            # It is for this machine: what a proxy on it passes on is for others.
            proxied = requests.get(shop.url, headers={"X-Forwarded-For": "192.0.2.7"}, timeout=60)
            assert (proxied.status_code, "In flight" in proxied.text) == (403, False)
            message = shop.send("video", "transcode", "film.mov", preset="1080p")
            delayed = shop.send("mail", "send_receipt", 1, "later@example.com", delay=3_600_000)

            def shows(page: str, text: str) -> bool:
                answer = requests.get(f"{shop.url}/{page}", timeout=60)
                return answer.status_code == 200 and text in answer.text

            eventually(lambda: shows("running", message.message_id), timeout=60)
            os.kill(shop.running()[message.message_id], signal.SIGKILL)
            eventually(lambda: shows("running", "redelivered"), timeout=90)
            server.stop()
            eventually(lambda: requests.get(f"{shop.url}/delayed", timeout=60).status_code == 503, timeout=60)
            server.start()
            eventually(lambda: shows("delayed", delayed.message_id), timeout=90)
            eventually(lambda: shows("running", message.message_id), timeout=90)
            (shop.gates / "film.mov").touch()
        shop.broker.close()
    finally:
        server.stop()
