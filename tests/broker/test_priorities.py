"""Priorities across the queue: what is more urgent overtakes everything that was not fetched yet."""

from __future__ import annotations

import random
import threading
import time

import dramatiq
import pytest

from dramatiq_jetstream.errors import InvalidOption
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds

MAX_PRIORITY = 5


@pytest.fixture
def ranked(make_broker):
    """A broker with priorities; its actor waits at the gate and notes its name."""
    broker = make_broker(max_priority=MAX_PRIORITY)
    gate = threading.Event()
    ran = []

    @dramatiq.actor(broker=broker)
    def work(name):
        gate.wait(30)
        ran.append(name)

    return broker, work, gate, ran


def send(work, name, priority=None):
    options = {} if priority is None else {"broker_priority": priority}
    return work.send_with_options(args=(name,), **options)


def test_a_waiting_queue_is_worked_off_by_priority(ranked):
    """Higher first, equal ones in the order of sending; none is as 0, and above the highest is the highest."""
    broker, work, gate, ran = ranked
    gate.set()
    priorities = [0, 3, 5, 1, 5, 9, 3, None, 2, 5]
    for number, priority in enumerate(priorities):
        send(work, number, priority)
    with running(broker, threads=1, prefetch=1):
        broker.join("default", timeout=30_000)
    assert ran == [2, 4, 5, 9, 1, 6, 8, 3, 0, 7]


def test_an_urgent_message_overtakes_all_that_is_not_fetched(ranked):
    """While a worker is busy with a thousand others, only what it has fetched runs before the urgent one."""
    broker, work, gate, ran = ranked
    broker.enqueue_many([work.message(number) for number in range(1_000)])
    prefetch = 4
    with running(broker, threads=1, prefetch=prefetch):
        eventually(lambda: broker.queue_stats("default").in_flight >= prefetch)
        send(work, "urgent", MAX_PRIORITY)
        gate.set()
        eventually(lambda: "urgent" in ran)
        assert ran.index("urgent") <= prefetch + 1
        broker.flush("default")


def test_retries_and_delays_keep_their_priority(ranked):
    """A message that was delayed, or failed before, is as urgent as it was."""
    broker, work, gate, ran = ranked
    for priority in (1, 4):
        work.send_with_options(args=(f"late {priority}",), delay=50, broker_priority=priority)
    send(work, "plain")
    eventually(lambda: broker.queue_stats("default").ready == 3)
    gate.set()
    with running(broker, threads=1, prefetch=1):
        broker.join("default", timeout=30_000)
    assert ran == ["late 4", "late 1", "plain"]


def test_an_idle_worker_takes_any_priority_at_once(ranked):
    """Nothing has to wait for a look at the higher priorities."""
    broker, work, gate, ran = ranked
    gate.set()
    with running(broker, threads=2):
        send(work, "first")
        eventually(lambda: ran == ["first"])
        waits = []
        for number in range(20):
            started = time.monotonic()
            send(work, number, random.randint(0, MAX_PRIORITY))
            eventually(lambda number=number: number in ran, interval=0.001)
            waits.append(time.monotonic() - started)
    assert sorted(waits)[10] < 0.1


def test_no_priority_waits_for_what_another_worker_took(ranked, make_broker):
    """A worker that was told of more urgent messages, which then went elsewhere, goes on with the others."""
    broker, work, gate, ran = ranked
    taken = make_broker(max_priority=MAX_PRIORITY)
    dramatiq.actor(lambda name: None, broker=taken, actor_name="work")
    for name in ("urgent 1", "urgent 2"):
        send(work, name, 5)
    with running(broker, threads=2, prefetch=1):
        # This worker has one of two; the other one goes to another consumer.
        eventually(lambda: broker.queue_stats("default").in_flight == 1)
        consumer = taken.consume("default", prefetch=1, timeout=5_000)
        message = next(consumer)
        assert message is not None
        gate.set()
        eventually(lambda: len(ran) == 1)
        send(work, "plain", 0)
        eventually(lambda: "plain" in ran)
        consumer.ack(message)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_worker_holds_no_more_than_its_prefetch_for_long(ranked, prefetch):
    """A burst at every priority may bring more than there is room for; it is given back, for others to take."""
    broker, work, gate, ran = ranked
    with running(broker, threads=1, prefetch=prefetch):
        send(work, "first")
        eventually(lambda: broker.in_flight.held == 1)
        for number in range(30):
            send(work, number, number % (MAX_PRIORITY + 1))
        eventually(lambda: broker.in_flight.held == prefetch)
        holds(lambda: broker.in_flight.held <= prefetch, 1)
        gate.set()
        broker.join("default", timeout=30_000)
    assert sorted(map(str, ran)) == sorted(map(str, ["first", *range(30)]))
    assert broker.dead_letters.list() == []


def test_two_workers_share_every_priority(ranked, make_broker):
    """Each message of each priority runs once, whichever worker takes it."""
    broker, work, gate, ran = ranked
    other = make_broker(max_priority=MAX_PRIORITY)
    dramatiq.actor(work.fn, broker=other, actor_name="work")
    gate.set()
    broker.enqueue_many(
        [
            work.message_with_options(args=(number,), broker_priority=number % (MAX_PRIORITY + 1))
            for number in range(600)
        ]
    )
    with running(broker), running(other):
        broker.join("default", timeout=30_000)
    assert sorted(ran) == list(range(600))


@pytest.mark.parametrize("priority", [-1, 1.5, "high", True])
def test_a_priority_that_is_none_is_refused(ranked, priority):
    """What is not a whole number from 0 up is an error, and nothing is stored."""
    broker, work, *_ = ranked
    with pytest.raises(InvalidOption, match="broker_priority"):
        send(work, "x", priority)
    assert broker.queue_stats("default").ready == 0


def test_without_max_priority_a_priority_is_an_error(broker):
    """It would do nothing; the lowest one, 0, is what every message has."""
    ran = []
    work = dramatiq.actor(ran.append, actor_name="work")
    with pytest.raises(InvalidOption, match="max_priority"):
        send(work, 1, 3)
    send(work, 2, 0)
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)
    assert ran == [2]
