"""The core promises on a cluster of three servers with replicas=3, while one is killed under load."""

from __future__ import annotations

import threading
import time
from collections import Counter

import dramatiq

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import BrokerConnectionError
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


def test_a_killed_leader_loses_nothing(nats_cluster, namespace):
    """Messages, delays and dead letters that were stored are all there; what was promised runs."""
    broker = JetStreamBroker(
        nats_cluster.urls, namespace=namespace, replicas=3, ack_wait=3_000, enqueue_timeout=20_000
    )
    ran = Counter()
    promised = []
    stop = threading.Event()

    @dramatiq.actor(broker=broker)
    def work(number):
        ran[number] += 1

    @dramatiq.actor(broker=broker, max_retries=0)
    def fail(number):
        raise RuntimeError(f"letter {number}")

    def produce(start):
        number = start
        while not stop.is_set():
            try:
                broker.enqueue(work.message(number))
                promised.append(number)
            except BrokerConnectionError:
                pass  # nothing was promised
            number += 3
            time.sleep(0.002)

    broker.setup()
    stream = broker.names.queue_stream("default")
    info = broker.connection.api(f"STREAM.INFO.{stream}")
    assert info["config"]["num_replicas"] == len(info["cluster"]["replicas"]) + 1 == 3
    delayed = list(range(-1, -101, -1))
    broker.enqueue_many([work.message(number) for number in delayed], delay=4_000)
    with running(broker):
        for number in range(10):
            fail.send(number)
        eventually(lambda: broker.dead_letters.count() == 10)
        producers = [threading.Thread(target=produce, args=(start,)) for start in range(3)]
        for producer in producers:
            producer.start()
        eventually(lambda: len(promised) > 100)
        victim = nats_cluster.leader_of(stream)
        nats_cluster.kill(victim)
        try:
            seen = len(promised)
            eventually(lambda: len(promised) > seen + 200, timeout=60)
            stop.set()
            for producer in producers:
                producer.join(30)
            assert nats_cluster.leader_of(stream) is not victim
            broker.join("default", timeout=60_000)
            assert broker.dead_letters.count() == 10
        finally:
            stop.set()
            nats_cluster.restart(victim)
    assert set(promised) <= set(ran)
    assert set(delayed) <= set(ran)
    # An ack may have died with its leader: such a message runs again, and never more than those in flight.
    assert sum(ran.values()) - len(ran) < 50
    broker.close()


def test_an_atomic_batch_on_a_cluster_is_stored_once(nats_cluster, namespace):
    """All of the messages of a batch are there, in order, on every replica that may lead next."""
    broker = JetStreamBroker(nats_cluster.urls, namespace=namespace, replicas=3)
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
    broker.enqueue_many([work.message(number) for number in range(100)], atomic=True)
    stream = broker.names.queue_stream("default")
    broker.connection.api(f"STREAM.LEADER.STEPDOWN.{stream}")
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)
    assert ran == list(range(100))
    broker.close()
