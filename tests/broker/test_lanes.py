"""The short way of a single request: used when it works, given up without loss or repetition when it does not."""

from __future__ import annotations

import threading
import time

import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.config import MAX_CONNECTIONS
from dramatiq_jetstream.errors import ConnectionFailed
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.wire import lanes
from tests.support.polling import eventually

#: Lanes of a process at most.
MOST = MAX_CONNECTIONS - 1


def message(name: str = "actor") -> Message:
    return Message("default", name, (), {}, {})


def ready(broker: JetStreamBroker) -> int:
    return broker.queue_stats("default").ready


def lanes_of(broker: JetStreamBroker) -> list[lanes._Lane]:
    return list(broker.connection._link.lanes._lanes)


@pytest.fixture
def used(broker):
    """A broker with an open lane and an empty queue."""
    broker.declare_queue("default")
    broker.enqueue(message())
    broker.flush("default")
    assert len(lanes_of(broker)) == 1
    return broker


def test_one_thread_has_one_lane(used):
    """A hundred enqueues open no second one."""
    (lane,) = lanes_of(used)
    for _ in range(100):
        used.enqueue(message())
    assert lanes_of(used) == [lane]
    eventually(lambda: ready(used) == 100)


def test_more_threads_than_lanes(used):
    """Those for whom there is none go the long way; nothing is lost or doubled."""

    def enqueue() -> None:
        for _ in range(20):
            used.enqueue(message())

    threads = [threading.Thread(target=enqueue) for _ in range(3 * MOST)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(lanes_of(used)) <= MOST
    eventually(lambda: ready(used) == 20 * 3 * MOST)


def test_an_answer_that_is_lost_is_asked_for_the_long_way(make_broker, proxy):
    """Stored without an acknowledgement: the same Nats-Msg-Id goes again, and JetStream stores it once."""
    broker = make_broker(proxy.url)
    broker.declare_queue("default")
    broker.enqueue(message())
    proxy.deaf = True
    timer = threading.Timer(1.2, setattr, (proxy, "deaf", False))
    started = time.monotonic()
    timer.start()
    broker.enqueue(message())
    assert time.monotonic() - started > 1
    eventually(lambda: ready(broker) == 2)
    timer.join()


def test_a_lane_that_broke_is_replaced(used):
    """Closed by the server or by something between: that request goes the long way, later ones a new lane."""
    used.connection._link.lanes._pause = 0.0
    (lane,) = lanes_of(used)
    lane._socket.shutdown(2)
    used.enqueue(message())
    used.enqueue(message())
    assert lane not in lanes_of(used)
    assert len(lanes_of(used)) == 1
    eventually(lambda: ready(used) == 2)


def test_an_exception_in_the_middle_costs_the_lane(used, monkeypatch):
    """Dramatiq raises TimeLimitExceeded in a thread wherever it stands; half an answer must not stay behind."""
    (lane,) = lanes_of(used)

    class Interrupt(BaseException):
        """Stands for what Dramatiq raises."""

    def interrupted() -> None:
        raise Interrupt

    monkeypatch.setattr(lane, "_read", interrupted)
    with pytest.raises(Interrupt):
        used.enqueue(message("first"))
    used.enqueue(message("second"))
    assert lane not in lanes_of(used)
    eventually(lambda: ready(used) == 2)


def test_lanes_follow_the_connection(used, own_nats_server, make_broker):
    """After a restart of the server lanes are new ones, and enqueueing works at once."""
    broker = make_broker(own_nats_server.url)
    broker.declare_queue("default")
    broker.enqueue(message())
    (before,) = lanes_of(broker)
    own_nats_server.kill()
    own_nats_server.start()
    broker.enqueue(message())
    broker.enqueue(message())
    assert before not in lanes_of(broker)
    eventually(lambda: ready(broker) == 3)


def test_an_unused_lane_is_closed(used, monkeypatch):
    """So that an idle program holds one connection."""
    monkeypatch.setattr(lanes, "IDLE_SECONDS", 0.2)
    eventually(lambda: not lanes_of(used))
    used.enqueue(message())
    assert len(lanes_of(used)) == 1


def test_a_server_that_pings_a_lane_is_answered(tmp_path):
    """It closes clients that stay silent."""
    config = 'ping_interval: "100ms"\nping_max: 1\n'
    with NatsServer(store_dir=tmp_path / "nats", sync="2m", config=config) as server:
        broker = JetStreamBroker(server.url)
        broker.declare_queue("default")
        broker.enqueue(message())
        (lane,) = lanes_of(broker)
        for _ in range(8):
            time.sleep(0.06)  # between two pings, so that one is read before each answer
            broker.enqueue(message())
        assert lanes_of(broker) == [lane]
        broker.close()


@pytest.mark.parametrize(
    ("config", "credentials"),
    [
        ('authorization { user: "u", password: "p" }\n', {"user": "u", "password": "p"}),
        ('authorization { token: "t" }\n', {"token": "t"}),
        (
            "authorization { users: [ { nkey: UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4 } ] }\n",
            {"nkey": "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"},
        ),
    ],
    ids=["password", "token", "nkey"],
)
def test_lanes_are_who_the_connection_is(tmp_path, config, credentials):
    """With a password, a token, or a signature of the nonce that the server gave the lane."""
    with NatsServer(store_dir=tmp_path / "nats", sync="2m", config=config) as server:
        broker = JetStreamBroker(server.url, **credentials)
        broker.declare_queue("default")
        broker.enqueue(message())
        assert len(lanes_of(broker)) == 1
        broker.close()


def test_a_server_with_no_room_for_lanes(tmp_path):
    """Where each client counts, the one connection does all."""

    def connects() -> bool:
        try:
            broker.connection.connect()
        except ConnectionFailed:
            return False
        return True

    with NatsServer(store_dir=tmp_path / "nats", sync="2m", config="max_connections: 1\n") as server:
        broker = JetStreamBroker(server.url)
        broker.declare_queue("default")
        eventually(connects)  # for a moment the one is who asked whether the server is up
        for _ in range(5):
            broker.enqueue(message())
        assert not lanes_of(broker)
        eventually(lambda: ready(broker) == 5)
        broker.close()


def test_no_lane_on_the_connections_own_thread(used):
    """A blocking call there would stop everything."""
    raised = []

    def blocks() -> None:
        try:
            used.connection.publish("subject", b"")
        except RuntimeError as error:
            raised.append(str(error))

    used.connection.post(blocks)
    eventually(lambda: raised)
    assert "own thread" in raised[0]
