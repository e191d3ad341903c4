"""What threads leave for the loop: urgent calls run at once, others may wait for each other while it is busy."""

from __future__ import annotations

import threading

import pytest

from dramatiq_jetstream.wire import loop
from dramatiq_jetstream.wire.connection import Connection, ConnectOptions
from tests.support.polling import eventually


@pytest.fixture
def connection(nats_url):
    connection = Connection(ConnectOptions.of(nats_url))
    connection.connect()
    yield connection
    connection.close()


def keep_busy(connection: Connection) -> None:
    """Have the loop find several calls at once."""
    begun, go_on = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        assert go_on.wait(30)

    connection.post(block)
    assert begun.wait(30)
    for _ in range(loop.BUSY):
        connection.post(lambda: None)
    go_on.set()
    eventually(lambda: connection._link.loop._coming)


def test_in_quiet_times_no_call_waits(connection, monkeypatch):
    monkeypatch.setattr(loop, "BATCH_SECONDS", 60)
    for _ in range(3 * loop.BUSY):
        done = threading.Event()
        connection.post_lazily(done.set)
        assert done.wait(30)


def test_in_busy_times_only_what_is_urgent_wakes_the_loop(connection, monkeypatch):
    monkeypatch.setattr(loop, "BATCH_SECONDS", 60)
    keep_busy(connection)
    ran, woken = [], []
    wake = connection._link.loop._wake
    monkeypatch.setattr(connection._link.loop, "_wake", lambda: (woken.append(len(ran)), wake()))
    connection.post_lazily(ran.append, "first")
    assert not woken
    connection.post(ran.append, "second")
    eventually(lambda: ran == ["first", "second"])
    assert len(woken) == 1


def test_nothing_waits_longer_than_a_moment(connection, monkeypatch):
    monkeypatch.setattr(loop, "BATCH_SECONDS", 0.05)
    for _ in range(3):
        keep_busy(connection)
        done = threading.Event()
        connection.post_lazily(done.set)
        assert done.wait(30)


def test_a_closing_connection_runs_what_waits(connection, monkeypatch):
    monkeypatch.setattr(loop, "BATCH_SECONDS", 60)
    keep_busy(connection)
    ran: list[int] = []
    connection.post_lazily(ran.append, 1)
    connection.close()
    assert ran == [1]
