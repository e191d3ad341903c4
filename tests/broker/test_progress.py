"""An actor says how far it is, and any process can read it."""

from __future__ import annotations

import threading
import time

import dramatiq
import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.progress import Progress, progress, read_progress
from tests.support.polling import eventually


@pytest.fixture
def worker_of(broker: JetStreamBroker):
    """Start a worker once the actors are declared."""
    broker.add_middleware(Progress())
    running: list[dramatiq.Worker] = []

    def start() -> None:
        worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=100)
        worker.start()
        running.append(worker)

    yield start
    for worker in running:
        worker.stop()


def test_another_process_reads_what_was_said(
    broker: JetStreamBroker, worker_of, nats_url: str, namespace: str
) -> None:
    """By the message's id; the last word is kept after the actor has ended."""
    go_on = threading.Event()

    @dramatiq.actor(broker=broker)
    def export() -> None:
        progress(1, 4, "rows")
        go_on.wait(30)
        progress(4, 4, "rows")

    worker_of()
    message = export.send()
    other = JetStreamBroker(nats_url, namespace=namespace, declare=False)
    try:
        seen = eventually(lambda: read_progress(message.message_id, other))
        assert (seen.done, seen.total, seen.note, seen.share) == (1, 4, "rows", 0.25)
        assert abs(seen.at - time.time() * 1000) < 60_000
        go_on.set()
        eventually(lambda: read_progress(message.message_id, other).done == 4)
        assert read_progress("nobody", other) is None
    finally:
        go_on.set()
        other.close()


def test_a_loop_may_say_it_in_every_turn(broker: JetStreamBroker, worker_of) -> None:
    """Calls between two that are sent cost microseconds, and the last is always sent."""
    taken: list[float] = []

    @dramatiq.actor(broker=broker)
    def count() -> None:
        start = time.perf_counter()
        for turn in range(20_000):
            progress(turn + 1, 20_000)
        taken.append(time.perf_counter() - start)

    worker_of()
    message = count.send()
    eventually(lambda: taken)
    eventually(lambda: read_progress(message.message_id, broker).done == 20_000)
    assert taken[0] / 20_000 < 50e-6  # generous: other tests may run beside
    written = broker.connection.api(f"STREAM.INFO.{broker.bucket('progress').stream}")["state"]["last_seq"]
    assert written <= 2 + taken[0] / 0.25


def test_an_actor_called_directly_says_nothing() -> None:
    """So that a unit test needs no broker."""
    progress(1, 2)
