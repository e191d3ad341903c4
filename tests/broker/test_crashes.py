"""What happens to messages when workers die: real `dramatiq` processes, real kill -9."""

from __future__ import annotations

import os
import signal
import time

import dramatiq
import pytest

from tests.broker.conformance.workers import running
from tests.support.polling import eventually

ACK_WAIT = 2_000


def test_messages_of_a_killed_worker_run_again_within_ack_wait(make_fleet):
    """Everything that the worker held, begun or not, is delivered to another one."""
    fleet = make_fleet(ack_wait=ACK_WAIT)
    victim = fleet.start(threads=2)
    for name in ("a", "b", "c", "d"):
        fleet.send("hold", name)
    fleet.wait_for("began a")
    fleet.wait_for("began b")
    eventually(lambda: fleet.broker.queue_stats("default").in_flight == 4)
    fleet.start(threads=4)
    victim.kill()
    killed = time.monotonic()
    for name in ("a", "b", "c", "d"):
        fleet.open(name)
    fleet.broker.join("default", timeout=60_000)
    assert time.monotonic() - killed < 10 * ACK_WAIT / 1000  # by default it would be 30 s
    counts = fleet.counts()
    assert [counts[f"began {name}"] for name in "abcd"] == [2, 2, 1, 1]
    assert [counts[f"ended {name}"] for name in "abcd"] == [1, 1, 1, 1]


def test_sigterm_hands_back_what_was_not_begun_at_once(make_fleet):
    """Prefetched messages go to other workers while the stopping one still runs a long task."""
    fleet = make_fleet(ack_wait=60_000)
    stopping = fleet.start(threads=1)
    fleet.send("hold", "long")
    fleet.wait_for("began long")
    for number in range(3):
        fleet.send("mark", f"m{number}")
    eventually(lambda: fleet.broker.queue_stats("default").in_flight >= 2)
    fleet.start(threads=1)
    stopping.send_signal(signal.SIGTERM)
    for number in range(3):
        fleet.wait_for(f"ran m{number}", timeout=30)
    assert stopping.running
    assert fleet.counts()["ended long"] == 0
    fleet.open("long")
    assert stopping.wait() == 0
    fleet.broker.join("default", timeout=30_000)
    assert fleet.counts() == {"began long": 1, "ended long": 1, "ran m0": 1, "ran m1": 1, "ran m2": 1}


@pytest.mark.parametrize("kind", ["worker", "consumer"])
def test_a_process_that_loses_a_thread_gives_back_what_it_holds_and_ends(make_fleet, kind):
    """Its messages run elsewhere at once, not after `ack_wait`, and its status says that it failed."""
    fleet = make_fleet(ack_wait=60_000)
    broken = fleet.start(threads=2)
    fleet.send("hold", "other")
    fleet.wait_for("began other")
    fleet.send(f"end_{kind}_thread", "it")
    for number in range(4):
        fleet.send("mark", f"m{number}")
    fleet.wait_for("ran it")
    fleet.open("other")
    assert broken.wait(60) != 0
    fleet.start(threads=2)
    for number in range(4):
        fleet.wait_for(f"ran m{number}", timeout=30)
    fleet.broker.join("default", timeout=30_000)
    assert fleet.counts()["ended other"] == 1


def test_poison_takes_nothing_along_that_died_beside_it(make_fleet):
    """What was prefetched runs, what was begun beside it is begun again, and poison alone becomes a dead letter."""
    fleet = make_fleet(ack_wait=1_000, max_deliveries=3)
    fleet.send("hold", "beside")
    poison = fleet.send("die", "poison")
    for number in range(4):
        fleet.send("mark", f"m{number}")
    for _ in range(10):
        worker = fleet.start(threads=2, wait=False)
        eventually(lambda worker=worker: not worker.running or fleet.broker.dead_letters.count())
        if worker.running:
            break
    (letter,) = fleet.broker.dead_letters.list()
    assert (letter.message_id, letter.reason) == (poison.message_id, "delivered too often")
    fleet.open("beside")
    fleet.broker.join("default", timeout=30_000)
    counts = fleet.counts()
    assert [counts[f"ran m{number}"] for number in range(4)] == [1, 1, 1, 1]
    assert counts["ended beside"] == 1
    assert counts["died poison"] == 3
    assert fleet.broker.dead_letters.count() == 1


def test_what_was_given_back_often_may_kill_a_worker_once(make_fleet):
    """Deliveries that were not started are not held against a message."""
    fleet = make_fleet(ack_wait=1_000, max_deliveries=10)
    fleet.send("die_once", "unlucky")
    fleet.broker.declare_queue("default")
    consumer = fleet.broker.consume("default", prefetch=1, timeout=5_000)
    for delivery in range(1, 10):
        message = next(consumer)
        assert message.delivery_count == delivery
        consumer.requeue([message])
    consumer.close()
    assert fleet.start(threads=1, wait=False).wait() != 0
    fleet.start(threads=1)
    fleet.wait_for("survived unlucky")
    fleet.broker.join("default", timeout=30_000)
    assert fleet.broker.dead_letters.list() == []


def test_a_poison_message_dies_after_max_deliveries(make_fleet):
    """A message that takes its worker along is delivered `max_deliveries` times, then it is a dead letter."""
    fleet = make_fleet(ack_wait=1_000, max_deliveries=2)
    message = fleet.send("die", "poison")
    for _ in range(2):
        worker = fleet.start(threads=1, wait=False)
        assert worker.wait() != 0
    fleet.start(threads=1)
    (letter,) = eventually(lambda: fleet.broker.dead_letters.list("default"))
    assert (letter.reason, letter.deliveries, letter.message_id) == (
        "delivered too often",
        3,
        message.message_id,
    )
    assert letter.actor == "die"
    assert letter.data == message.encode()
    assert fleet.counts() == {"died poison": 2}
    fleet.send("mark", "after")
    fleet.wait_for("ran after")
    assert fleet.broker.dead_letters.replay(letter)
    fleet.wait_for("died poison", count=3)


def test_stops_of_workers_do_not_make_poison(make_broker):
    """A message that one stopping worker after the other gives back unbegun is not taken for a killer."""
    ran = []

    def work(name):
        ran.append(name)

    def another():
        broker = make_broker(ack_wait=60_000, max_deliveries=2)
        dramatiq.actor(broker=broker)(work)
        return broker

    producer = another()
    producer.actors["work"].send("patient")
    for _ in range(5):
        # Without threads, a worker takes messages and begins none.
        broker = another()
        with running(broker, threads=0, prefetch=4):
            eventually(lambda in_flight=broker.in_flight: in_flight.held == 1)
    with running(another()):
        producer.join("default", timeout=30_000)
    assert ran == ["patient"]
    assert producer.dead_letters.list() == []


def test_a_killed_process_of_several_takes_the_command_down_and_loses_nothing(make_fleet):
    """The dramatiq command stops when one of its processes dies; a new one goes on with every message."""
    fleet = make_fleet(ack_wait=ACK_WAIT)
    first = fleet.start(processes=2, threads=1)
    for number in range(20):
        fleet.send("mark", f"m{number}")
    fleet.send("hold", "held")
    fleet.wait_for("began held")
    holder = next(int(line.split()[2]) for line in fleet.runs.read_text().splitlines() if "held" in line)
    os.kill(holder, signal.SIGKILL)
    assert first.wait() != 0
    fleet.open("held")
    fleet.start(processes=2, threads=1)
    fleet.broker.join("default", timeout=30_000)
    counts = fleet.counts()
    assert counts["ended held"] == 1
    assert all(counts[f"ran m{number}"] >= 1 for number in range(20))
    assert fleet.broker.queue_stats("default").dead == 0
