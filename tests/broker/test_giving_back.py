"""A long message holds none up that another worker could run."""

from __future__ import annotations

import threading

import dramatiq
import pytest

from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds


@pytest.mark.parametrize("max_deliveries", [1, 10])
def test_a_message_behind_a_long_one_runs_in_another_process(make_fleet, max_deliveries):
    """It goes to an idle process while the long message runs, and this is no delivery that counts."""
    fleet = make_fleet(max_deliveries=max_deliveries)
    fleet.start(threads=1)
    fleet.send("hold", "long")
    eventually(lambda: fleet.counts()["began long"] == 1)
    fleet.send("mark", "short")
    eventually(lambda: fleet.broker.queue_stats("default").in_flight == 2)
    fleet.start(threads=4)
    fleet.wait_for("ran short", timeout=30)
    assert fleet.counts()["ended long"] == 0
    fleet.open("long")
    fleet.wait_for("ended long", timeout=30)
    assert fleet.counts()["began long"] == fleet.counts()["ran short"] == 1
    assert fleet.broker.dead_letters.count() == 0


def test_between_busy_workers_a_message_does_not_go_back_and_forth(make_broker):
    """It stays with one of them, and runs where a thread is free first."""
    gates = [threading.Event(), threading.Event()]
    ran = []

    def program(number):
        broker = make_broker()

        def work(kind):
            if kind == "long":
                began.append(number)
                gates[number].wait(60)
            else:
                ran.append(number)

        return broker, dramatiq.actor(work, broker=broker, actor_name="work")

    began = []
    (first, work), (second, _) = program(0), program(1)
    with running(first, threads=1), running(second, threads=1):
        try:
            work.send("long")
            eventually(lambda: len(began) == 1)
            work.send("long")
            work.send("long")
            eventually(lambda: len(began) == 2)
            stream = first.names.queue_stream("default")

            def delivered():
                return first.connection.api(f"CONSUMER.INFO.{stream}.worker")["delivered"]["consumer_seq"]

            holds(lambda: delivered() <= 6, 5.0, interval=0.2)
            work.send("short")
        finally:
            for gate in gates:
                gate.set()
        eventually(lambda: len(began) == 3 and len(ran) == 1)
