"""How many connections a process opens, and what it does where the server takes no more."""

from __future__ import annotations

import logging
import re
import threading
import time
from contextlib import contextmanager

import pytest
from dramatiq import Message
from dramatiq.errors import BrokerError

from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import ConnectionFailed, InvalidOption
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.wire import lanes
from tests.support.polling import eventually

#: More threads than any process here may have connections.
THREADS = 10


def message():
    return Message("default", "actor", (), {}, {})


@contextmanager
def a_server(tmp_path, config=""):
    with NatsServer(tmp_path / "server", monitor_port=0, config=config) as server:
        yield server


def connections(server):
    return server.monitor("/varz")["connections"]


@contextmanager
def sending(broker):
    """Threads that send one message after the other; yields how many were sent, and fails if one was refused."""
    sent, failures, over = [0], [], threading.Event()

    def send():
        try:
            while not over.is_set():
                broker.enqueue(message())
                sent[0] += 1
        except BrokerError as error:
            failures.append(error)

    threads = [threading.Thread(target=send, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield sent
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert failures == []


@pytest.fixture
def hurried(monkeypatch):
    """Processes look for room every second."""
    monkeypatch.setattr(lanes, "LOOK_SECONDS", 1.0)


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "3"])
def test_a_number_that_cannot_work_is_refused(wrong):
    """A process needs one connection."""
    with pytest.raises(InvalidOption, match="max_connections="):
        ConnectOptions(max_connections=wrong)


def test_nine_are_the_most_without_the_setting(tmp_path, make_broker):
    """One, and one for each of up to eight threads that wait for an answer."""
    with a_server(tmp_path) as server:
        broker = make_broker(server.url)
        broker.declare_queue("default")
        with sending(broker):
            eventually(lambda: connections(server) == 9)
            for _ in range(50):
                assert connections(server) <= 9


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_process_opens_no_more_than_it_may(tmp_path, make_broker, hurried, most):
    """Ten threads send, also while it looks for room; with one connection they share that."""
    with a_server(tmp_path) as server:
        broker = make_broker(server.url, max_connections=most)
        earlier = server.monitor("/varz")["total_connections"]
        broker.declare_queue("default")
        with sending(broker) as sent:
            eventually(lambda: connections(server) == most)
            until = time.monotonic() + 2.5
            while time.monotonic() < until:
                assert connections(server) <= most
            eventually(lambda: sent[0] > 100, timeout=60)
        if most == 1:
            assert server.monitor("/varz")["total_connections"] == earlier + 1


@pytest.mark.parametrize("limit", [12, 3])
def test_a_server_that_is_short_of_connections_is_shared(tmp_path, make_broker, hurried, caplog, limit):
    """Busy programs give connections back until another one gets in; all go on, and say once why they are fewer."""
    caplog.set_level(logging.WARNING, logger="dramatiq_jetstream")
    with a_server(tmp_path, f"max_connections: {limit}\n") as server:
        first, second, third = (make_broker(server.url, enqueue_timeout=60_000) for _ in range(3))
        first.declare_queue("default")
        with sending(first) as by_first:
            eventually(lambda: connections(server) >= min(9, limit))
            second.declare_queue("default")
            with sending(second) as by_second:
                eventually(lambda: by_second[0] > 10, timeout=60)
                third.declare_queue("default")
                third.enqueue(message())
                before = by_first[0], by_second[0]
                eventually(lambda: by_first[0] > before[0] + 10 and by_second[0] > before[1] + 10, timeout=60)
                assert connections(server) <= limit
    said = [
        record.getMessage() for record in caplog.records if "no further connection" in record.getMessage()
    ]
    assert 1 <= len(said) <= 3
    assert "maximum connections exceeded" in said[0]
    assert "max_connections" in said[0]


def test_an_account_that_is_short_of_connections_is_shared(tmp_path, make_broker, hurried):
    """Its limit is found when it logs in, and is treated the same."""
    accounts = """
        accounts {
          APP { jetstream: enabled, limits { max_connections: 3 }, users: [{ user: app, password: app }] }
        }
    """
    with a_server(tmp_path, accounts) as server:
        url = server.url.replace("nats://", "nats://app:app@")
        first, second = (make_broker(url, enqueue_timeout=60_000) for _ in range(2))
        first.declare_queue("default")
        with sending(first) as by_first:
            eventually(lambda: by_first[0] > 10, timeout=60)
            second.declare_queue("default")
            second.enqueue(message())


def test_lanes_come_back_when_there_is_room_again(tmp_path, make_broker, hurried):
    """Once the others are gone, a busy process has one more each time that it looks."""
    with a_server(tmp_path, "max_connections: 4\n") as server:
        first, others = make_broker(server.url), [make_broker(server.url) for _ in range(3)]
        first.declare_queue("default")
        with sending(first):
            for other in others:
                eventually(lambda other=other: other.connection.connect() or True, timeout=60)
            for other in others:
                other.close()
            eventually(lambda: connections(server) == 4, timeout=60)


def test_a_server_without_room_says_what_to_do(tmp_path, make_broker):
    """A program that gets no connection is told why, and which two settings there are."""
    with a_server(tmp_path, "max_connections: 1\n") as server:
        first, second = make_broker(server.url), make_broker(server.url)
        first.connection.connect()

        def is_told() -> bool:
            # A server that closes before our first line is written takes its reason along: the next attempt gets it.
            with pytest.raises(ConnectionFailed) as refused:
                second.connection.connect()
            return re.search("takes no further connection .*max_connections", str(refused.value)) is not None

        eventually(is_told)
