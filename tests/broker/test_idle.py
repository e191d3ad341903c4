"""What a process costs the server that has nothing to do."""

from __future__ import annotations

import time

import dramatiq
import pytest

from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.wire.connection import Publication
from tests.broker.conformance.workers import running
from tests.support.polling import eventually

QUEUES = 20
PRIORITIES = 9

#: How long messages are counted.
SECONDS = 10.0


def messages(server):
    """How many messages a server has received and sent so far."""
    counts = server.monitor("/varz")
    return counts["in_msgs"] + counts["out_msgs"]


def standing(broker):
    """How many sources of a broker have a standing request and nothing to say."""
    consumers = broker._workplace.consumers._open
    return sum(fetcher.is_empty for consumer in consumers for fetcher in consumer._puller._fetchers)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of its own, on which nothing else is counted."""
    with NatsServer(tmp_path_factory.mktemp("idle"), monitor_port=0) as server:
        yield server


def test_an_idle_process_exchanges_a_message_a_second_whatever_its_queues(server, make_broker):
    """Twenty queues of nine priorities: one heartbeat for all requests, and the record of its presence."""
    broker = make_broker(server.url, max_priority=PRIORITIES - 1)
    for number in range(QUEUES):
        dramatiq.actor(lambda: None, broker=broker, actor_name=f"a{number}", queue_name=f"q{number}")
    with running(broker):
        eventually(lambda: standing(broker) == QUEUES * PRIORITIES, timeout=60)
        before, since = messages(server), time.monotonic()
        time.sleep(SECONDS)
        passed = time.monotonic() - since
        assert messages(server) - before <= passed + 2


def test_counting_dead_letters_costs_the_same_whatever_their_number(server, make_broker):
    """The server says how many there are; it does not list them."""
    broker = make_broker(server.url)
    broker.declare_queue("default")
    broker.setup()

    def store(numbers):
        subjects = [broker.names.dead("default", f"letter-{number}") for number in numbers]
        headers = {"Dramatiq-Dead-Queue": "default"}
        broker.connection.publish_many([Publication(subject, b"{}", headers) for subject in subjects])

    def bytes_read():
        """How many letters there are, and the fewest bytes of several looks: other things are counted, too."""
        looks = []
        for _ in range(5):
            before = server.monitor("/varz")["out_bytes"]
            dead = broker.queue_stats("default").dead
            looks.append(server.monitor("/varz")["out_bytes"] - before)
        return dead, min(looks)

    broker.dead_letters.store(
        queue="default",
        subject="x",
        origin="letter-0",
        data=b"{}",
        headers={},
        reason="r",
        error="e",
        deliveries=1,
    )
    dead, few = bytes_read()
    assert dead == 1
    store(range(1, 500))
    dead, many = bytes_read()
    assert dead == broker.dead_letters.count() == 500
    assert many < few + 5_000
