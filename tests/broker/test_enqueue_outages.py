"""Enqueueing while the server is away: stored, or an error in time; never both, and never twice."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import BrokerConnectionError, StoreTimeout, StreamLost
from dramatiq_jetstream.events import Events
from tests.support.polling import eventually, holds


def message(number=0):
    return Message("default", "work", (number,), {}, {})


@pytest.fixture
def outage(make_broker, proxy):
    """A broker behind the proxy that has been used, and one that the proxy does not concern."""
    broker = make_broker(proxy.url, enqueue_timeout=6_000)
    broker.declare_queue("default")
    broker.setup()
    witness = make_broker()
    return broker, proxy, witness


@pytest.fixture
def aside():
    """Runs a function in another thread and returns its future."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def enqueue_one(broker):
    broker.enqueue(message())


def enqueue_delayed(broker):
    broker.enqueue(message(), delay=3_600_000)


def enqueue_many(broker):
    broker.enqueue_many([message(number) for number in range(50)])


def enqueue_atomically(broker):
    broker.enqueue_many([message(number) for number in range(50)], atomic=True)


WAYS = [enqueue_one, enqueue_delayed, enqueue_many, enqueue_atomically]


def stored(broker):
    stats = broker.queue_stats("default")
    return stats.ready + stats.delayed


@pytest.mark.parametrize("way", WAYS)
def test_an_acknowledgement_that_got_lost_does_not_store_twice(outage, aside, way):
    """JetStream stored it and its answer is lost with the connection: sent again, it is there once."""
    broker, proxy, witness = outage
    proxy.deaf = True
    enqueueing = aside(way, broker)
    count = 50 if way in (enqueue_many, enqueue_atomically) else 1
    eventually(lambda: stored(witness) == count)
    eventually(lambda: b'"stream"' in proxy.dropped)
    proxy.restore()
    enqueueing.result(60)
    assert stored(witness) == count


@pytest.mark.parametrize("declare", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_repetition_that_finds_no_stream_tells_nothing_of_the_first_time(
    make_broker, proxy, aside, way, declare
):
    """It was stored, its acknowledgement was lost, and its stream was deleted: it is stored again, or in doubt."""
    witness = make_broker()
    witness.declare_queue("default")
    witness.setup()
    broker = make_broker(proxy.url, enqueue_timeout=40_000, declare=declare)
    broker.enqueue(message())
    proxy.deaf = True
    sent = aside(way, broker)
    eventually(lambda: stored(witness) > 1)
    witness.connection.api(f"STREAM.DELETE.{witness.names.queue_stream('default')}")
    proxy.cut()
    proxy.deaf = False
    if declare:
        sent.result(90)
        assert stored(witness) == (1 if way in (enqueue_one, enqueue_delayed) else 50)
        return
    with pytest.raises(StreamLost, match="not known") as caught:
        sent.result(90)
    if way is enqueue_many:
        assert len(caught.value.__cause__.unknown) == 50


@pytest.mark.parametrize("way", WAYS)
def test_a_short_outage_is_waited_out(outage, aside, way):
    """The server is back before the time is up: enqueue returns, and everything is stored once."""
    broker, proxy, witness = outage
    proxy.lose()
    enqueueing = aside(way, broker)
    holds(lambda: not enqueueing.done(), 0.3)
    proxy.restore()
    enqueueing.result(60)
    assert stored(witness) == (50 if way in (enqueue_many, enqueue_atomically) else 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_long_outage_is_an_error_in_time_and_stores_nothing_later(make_broker, proxy, way):
    """After `enqueue_timeout` the caller has an error, and what failed is not sent when the server is back."""
    broker = make_broker(proxy.url, enqueue_timeout=500)
    broker.declare_queue("default")
    broker.setup()
    proxy.lose()
    started = time.monotonic()
    with pytest.raises(BrokerConnectionError) as caught:
        way(broker)
    assert 0.4 < time.monotonic() - started < 8  # by default it would be 10 s
    assert proxy.url.removeprefix("nats://") in str(caught.value)
    proxy.restore()
    eventually(lambda: broker.connection.is_connected)
    broker.enqueue(message("later"))
    assert stored(broker) == 1


def test_silence_is_an_error_in_time(outage):
    """A server that takes everything and answers nothing is not waited for longer than was asked."""
    broker, proxy, _ = outage
    proxy.deaf = True
    started = time.monotonic()
    with pytest.raises(StoreTimeout, match="whether it stored the message is not known"):
        broker.connection.publish(broker.names.task("default"), b"x", {"Nats-Msg-Id": "1"}, timeout=700)
    assert 0.6 < time.monotonic() - started < 8


def test_a_frozen_server_is_an_error_in_time(own_nats_server, make_broker):
    """SIGSTOP: connections stay open and nothing answers. When it goes on, so does everything."""
    broker = make_broker(own_nats_server.url, enqueue_timeout=700)
    broker.enqueue(message())
    own_nats_server.suspend()
    started = time.monotonic()
    with pytest.raises(BrokerConnectionError):
        broker.enqueue(message())
    assert time.monotonic() - started < 8
    own_nats_server.resume()

    def again():
        try:
            return broker.enqueue(message())
        except BrokerConnectionError:
            return None

    eventually(again)


def test_events_are_stored_once_over_an_outage(make_broker, proxy, aside, namespace):
    """`publish` has the same promise as `enqueue`."""
    broker = make_broker(proxy.url)
    broker.add_middleware(Events(stream=namespace, subjects=[f"{namespace}.ev.>"]))
    broker.setup()
    proxy.deaf = True
    publishing = aside(broker.publish, f"{namespace}.ev.created", b"event")
    eventually(lambda: b'"stream"' in proxy.dropped)
    proxy.restore()
    assert publishing.result(60).seq == 1
    info = broker.connection.api(f"STREAM.INFO.{namespace}")
    assert info["state"]["messages"] == 1


def test_a_killed_server_loses_nothing_of_what_enqueue_promised(own_nats_server, make_broker):
    """Under a stream of enqueues the server is killed twice: what returned is stored once, what raised at most."""
    broker = make_broker(own_nats_server.url, enqueue_timeout=10_000)
    promised = []
    unsure = []
    stop = threading.Event()

    def produce(start):
        number = start
        while not stop.is_set():
            try:
                broker.enqueue(message(number))
                promised.append(number)
            except BrokerConnectionError:
                unsure.append(number)
            number += 4

    threads = [threading.Thread(target=produce, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        seen = len(promised)
        eventually(lambda seen=seen: len(promised) > seen + 50)
        own_nats_server.kill()
        own_nats_server.start()
    seen = len(promised)
    eventually(lambda: len(promised) > seen + 50)
    stop.set()
    for thread in threads:
        thread.join(60)
    found = []
    consumer = broker.consume("default", prefetch=500, timeout=300)
    while (taken := next(consumer)) is not None:
        found.append(taken.args[0])
        consumer.ack(taken)
    assert len(found) == len(set(found))
    assert set(promised) <= set(found) <= set(promised) | set(unsure)


def test_nothing_is_contacted_before_first_use():
    """A wrong address is no error until something is enqueued; then it is one that names the address."""
    broker = JetStreamBroker("nats://user:secret@127.0.0.1:1", enqueue_timeout=500)
    broker.declare_queue("default")
    started = time.monotonic()
    with pytest.raises(BrokerConnectionError, match=r"nats://127\.0\.0\.1:1\b") as caught:
        broker.enqueue(message())
    assert time.monotonic() - started < 8
    assert "secret" not in str(caught.value)
    broker.close()


def test_wrong_credentials_are_one_clear_error(tmp_path, caplog):
    """The error says that we were refused and what to check, without quoting the password."""
    from dramatiq_jetstream.testing import NatsServer

    config = 'authorization { user: "alice", password: "right" }\n'
    with NatsServer(store_dir=tmp_path / "nats", config=config, sync="2m") as server:
        broker = JetStreamBroker(server.url, user="alice", password="wrong")
        with pytest.raises(BrokerConnectionError, match=r"refused us .*check the user, password") as caught:
            broker.enqueue(message())
        assert "wrong" not in str(caught.value)
        assert "wrong" not in caplog.text
        broker.close()
        broker = JetStreamBroker(server.url, user="alice", password="right")
        broker.enqueue(message())
        broker.close()


@pytest.mark.parametrize("url", ["", " , ", "http://localhost:4222", "nats://", "a b"])
def test_an_address_that_is_none_is_refused_at_once(url):
    """What cannot be the address of a server is an error where it is written."""
    with pytest.raises(ValueError, match="url"):
        JetStreamBroker(url)
