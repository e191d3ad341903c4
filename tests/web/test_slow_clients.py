"""Clients that send and take as little as they can hold up no other client; `slow_clients` has the full measure."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waitress.channel import HTTPChannel

from tests.support.polling import eventually
from tests.web.slow_clients import measure
from tests.web.stack import Stack
from web.worker import ANSWER_BYTES, ANSWER_SECONDS, IDLE_SECONDS, REQUEST_SECONDS, Channel

#: A front end that is held up answers none; one on a busy machine answers all, late.
PATIENCE_MS = 5_000


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A front end of one process with as few threads as it can have."""
    with Stack(tmp_path_factory.mktemp("narrow"), workers=False, env={"WEB_THREADS": "4"}) as stack:
        yield stack


def test_dripping_clients_hold_nobody_up(narrow: Stack) -> None:
    """Beside 300 slow connections, 75 for each thread, every order and every probe is answered."""
    orders, probes, slow = measure(narrow.url, connections=300, seconds=8)
    assert slow.closed_by_server or slow.open == 0
    for times in (orders, probes):
        assert not times.failed, times
        assert len(times.took) > 5
        assert max(times.took) < PATIENCE_MS, times


def test_clients_that_take_no_answer_hold_nobody_up(narrow: Stack) -> None:
    """Answers that are not read wait in a buffer, not on a thread."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    clients = []
    try:
        for _ in range(40):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.connect(("127.0.0.1", narrow.web_port))
            client.sendall(request * 20)
            clients.append(client)
        orders, probes, _ = measure(narrow.url, connections=0, seconds=3)
        assert not orders.failed + probes.failed
        assert max(orders.took + probes.took) < PATIENCE_MS
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("first", "piece", "seconds"),
    [
        (b"POST /api/orders HTTP/1.1\r\nHost: localhost\r\n", b"A: b\r\n", REQUEST_SECONDS),
        (
            b"POST /api/orders HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n",
            b" ",
            REQUEST_SECONDS,
        ),
        (b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n", b"", IDLE_SECONDS),
        (b"", b"", IDLE_SECONDS),
    ],
    ids=["a head", "a body", "nothing more", "nothing"],
)
def test_a_request_has_its_time_as_a_whole(narrow: Stack, first: bytes, piece: bytes, seconds: float) -> None:
    """However busily a client drips, its connection ends when the time is over, and not long before."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", narrow.web_port), timeout=10) as client:
        client.sendall(first)
        client.settimeout(0.5)

        def closed() -> bool:
            try:
                if piece:
                    client.sendall(piece)
                return client.recv(4_096) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(closed, timeout=seconds + 20, interval=0.2)
    assert time.monotonic() - started > seconds - 2


def test_an_answer_has_its_time() -> None:
    """One that is being taken ends when its time is over, and a new answer has a time of its own."""
    channel = Channel.__new__(Channel)
    channel.requests, channel.last_activity = [], 1_000.0
    channel.total_outbufs_len = 10
    assert not channel.is_overdue(1_000.0)
    assert not channel.is_overdue(1_000.0 + ANSWER_SECONDS)
    assert channel.is_overdue(1_001.0 + ANSWER_SECONDS)
    channel.total_outbufs_len = 0
    channel.last_activity = 1_100.0
    assert not channel.is_overdue(1_100.0)
    channel.total_outbufs_len = 10
    assert not channel.is_overdue(1_200.0)


def test_a_long_answer_has_its_time_for_each_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export lasts as long as its client takes it, and one who takes a little at a time is not served for ever."""
    monkeypatch.setattr(HTTPChannel, "send", lambda _, data, do_close: len(data))
    channel = Channel.__new__(Channel)
    channel.requests, channel.last_activity, channel.total_outbufs_len = [], 0.0, 10
    for minute in range(10):
        now = minute * ANSWER_SECONDS
        assert not channel.is_overdue(now)
        channel.send(b"x" * ANSWER_BYTES)
    assert not channel.is_overdue(now)
    channel.send(b"x")
    assert channel.is_overdue(now + ANSWER_SECONDS + 1)


def test_a_stop_waits_for_what_was_begun_and_for_no_slow_client(tmp_path: Path) -> None:
    """SIGTERM ends the front end in good order although a client drips."""
    with Stack(tmp_path, workers=False) as stack:
        with socket.create_connection(("127.0.0.1", stack.web_port), timeout=10) as client:
            client.sendall(b"POST /api/orders HTTP/1.1\r\nHost: localhost\r\n")
            started = time.monotonic()
            assert stack.web.stop(timeout=30) == 0
            assert time.monotonic() - started < 15
