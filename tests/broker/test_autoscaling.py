"""KEDA's `nats-jetstream` scaler and we count the same.

The scaler reads `/jsz?acc=…&consumers=true&config=true` and takes `num_pending` and `num_ack_pending` of the consumer
that its trigger names, or the stream's last sequence when there is no such consumer.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import dramatiq
import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.testing import NatsServer
from tests.support.polling import eventually


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(tmp_path_factory.mktemp("nats"), monitor_port=0) as server:
        yield server


def lag(server: NatsServer, stream: str, consumer: str) -> int:
    """What the scaler takes for the length of the queue, by the algorithm of its source."""
    url = f"{server.monitor_url}/jsz?acc=$G&consumers=true&config=true"
    with urllib.request.urlopen(url, timeout=10) as answer:
        accounts = json.load(answer)["account_details"]
    for account in accounts:
        for found in account["stream_detail"]:
            if account["name"] == "$G" and found["name"] == stream:
                for detail in found.get("consumer_detail", ()):
                    if detail["name"] == consumer:
                        return int(detail["num_pending"] + detail["num_ack_pending"])
                return int(found["state"]["last_seq"])
    raise AssertionError(f"the scaler finds no stream {stream}")


def test_the_scaler_sees_what_waits_and_what_runs(server: NatsServer) -> None:
    """Ready and in flight are counted; delayed messages, dead letters and schedules are not."""
    broker = JetStreamBroker(server.url, namespace="keda", middleware=[])
    try:
        broker.declare_queue("work")
        for number in range(7):
            broker.enqueue(Message("work", "a", (number,), {}, {}))
        for number in range(3):
            broker.enqueue(Message("work", "a", (number,), {}, {}), delay=3_600_000)
        consumer = broker.consume("work", prefetch=2, timeout=10_000)
        taken = [next(consumer), next(consumer)]
        assert all(taken)
        stream = broker.names.queue_stream("work")
        durable = broker.names.worker_durable(None)
        eventually(lambda: lag(server, stream, durable) == 7, timeout=30)
        stats = broker.queue_stats("work")
        assert stats.ready + stats.in_flight == 7
        assert stats.delayed == 3
        for message in taken:
            consumer.ack(message)
        eventually(lambda: lag(server, stream, durable) == 5, timeout=30)
        eventually(lambda: (s := broker.queue_stats("work")).ready + s.in_flight == 5, timeout=30)
        consumer.close()
    finally:
        broker.close()


def test_a_consumer_for_each_priority_has_a_trigger_of_its_own(server: NatsServer) -> None:
    """With `max_priority` there is no consumer `worker` for the higher levels: the names are `worker-N`."""
    broker = JetStreamBroker(server.url, namespace="levels", max_priority=2, middleware=[])
    try:
        broker.add_middleware(dramatiq.middleware.Retries())
        broker.declare_queue("work")
        for priority in (0, 1, 1, 2):
            broker.enqueue(Message("work", "a", (), {}, {"broker_priority": priority}))
        broker.setup()
        stream = broker.names.queue_stream("work")
        lags = {name: lag(server, stream, name) for name in map(broker.names.worker_durable, (None, 1, 2))}
        assert lags == {"worker": 1, "worker-1": 2, "worker-2": 1}
        # The stream's last sequence, which begins with a time here: a wrong name scales to the maximum.
        assert lag(server, stream, "misspelt") > 1_000_000
    finally:
        broker.close()
