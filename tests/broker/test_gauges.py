"""The numbers of the fleet: what they say, how they look to Prometheus, and what they do without a server."""

from __future__ import annotations

import time

import dramatiq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.gauges import GAUGES, Gauges
from dramatiq_jetstream.testing import NatsServer
from tests.support.polling import eventually
from tests.support.ports import free_port


@pytest.fixture
def queue() -> str:
    """The test's queue; its namespace is no other test's."""
    return "mail"


def values(gauges: Gauges, queue: str | None) -> dict[str, float]:
    """The numbers of one queue, or of the connection."""
    return {
        gauge.name: sample.value
        for gauge, samples in gauges.read()
        for sample in samples
        if sample.queue == queue
    }


def samples(gauges: Gauges) -> dict[tuple[str, str], float]:
    """The numbers as Prometheus reads them."""
    return {
        (sample.name, sample.labels.get("queue", "")): sample.value
        for family in text_string_to_metric_families(gauges.prometheus_text())
        for sample in family.samples
    }


def test_they_say_what_is_in_the_queues(broker: JetStreamBroker, queue: str) -> None:
    """Ready, in flight, delayed, dead and the age of the oldest; and the connection."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    act.send()
    act.send()
    act.send_with_options(delay=60_000)
    gauges = Gauges(broker)
    found = values(gauges, queue)
    assert 0 <= found.pop("queue.oldest_ready_age") < 60
    assert found == {"queue.ready": 2, "queue.in_flight": 0, "queue.delayed": 1, "queue.dead": 0}
    assert values(gauges, None) == {"connection.up": 1, "connection.reconnects": 0}
    assert [gauge for gauge, _ in gauges.read()] == list(GAUGES)


def test_reading_does_not_connect_a_process(nats_url: str, namespace: str, queue: str) -> None:
    """A process that has not used its broker yet says that it is not connected, and stays so."""
    broker = JetStreamBroker(nats_url, namespace=namespace)
    broker.declare_queue(queue)
    gauges = Gauges(broker)
    assert values(gauges, queue) == {}
    assert values(gauges, None)["connection.up"] == 0
    assert not broker.connection.state.connected
    broker.close()


def test_prometheus_reads_them(broker: JetStreamBroker, queue: str) -> None:
    """The text parses and has every queue."""

    @dramatiq.actor(queue_name=queue)
    def act() -> None:
        pass

    broker.declare_queue('o"th\\er')
    act.send()
    found = samples(Gauges(broker, connect=True))
    assert found["dramatiq_queue_ready", queue] == 1
    assert found["dramatiq_queue_ready", 'o"th\\er'] == 0
    assert found["dramatiq_queue_dead", queue] == 0
    assert ("dramatiq_queue_oldest_ready_age_seconds", queue) in found
    assert ("dramatiq_queue_oldest_ready_age_seconds", 'o"th\\er') not in found
    assert found["dramatiq_connection_up", ""] == 1
    assert found["dramatiq_connection_reconnects_total", ""] == 0


def test_without_a_server_there_are_no_queues(queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape is answered while the server is away, and the server is left alone for a while."""
    monkeypatch.setattr("dramatiq_jetstream.gauges._MAX_AGE_SECONDS", 0.0)
    broker = JetStreamBroker(f"nats://127.0.0.1:{free_port()}", enqueue_timeout=5_000)
    broker.declare_queue(queue)
    gauges = Gauges(broker, connect=True)
    found = samples(gauges)
    assert found == {("dramatiq_connection_up", ""): 0, ("dramatiq_connection_reconnects_total", ""): 0}
    began = time.monotonic()
    assert samples(gauges) == found
    assert time.monotonic() - began < 4, "it did not wait for the server again"
    broker.close()


def test_they_come_back_with_the_server(own_nats_server: NatsServer, queue: str) -> None:
    """The connection's fall and return are seen, and counted."""
    broker = JetStreamBroker(own_nats_server.url, enqueue_timeout=500)
    gauges = Gauges(broker, connect=True)

    @dramatiq.actor(queue_name=queue, broker=broker)
    def act() -> None:
        pass

    act.send()
    own_nats_server.kill()
    eventually(lambda: samples(gauges)["dramatiq_connection_up", ""] == 0)
    own_nats_server.start()
    eventually(lambda: samples(gauges).get(("dramatiq_queue_ready", queue)) == 1)
    found = samples(gauges)
    assert found["dramatiq_connection_up", ""] == 1
    assert found["dramatiq_connection_reconnects_total", ""] >= 1
    broker.close()


def test_one_reading_serves_for_a_moment(
    broker: JetStreamBroker, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gauges of one collection ask the server once."""
    monkeypatch.setattr("dramatiq_jetstream.gauges._MAX_AGE_SECONDS", 60.0)
    broker.declare_queue(queue)
    gauges = Gauges(broker, connect=True)
    first = gauges.read()
    broker.enqueue(dramatiq.Message(queue, "act", (), {}, {}))
    assert gauges.read() is first
