"""A long task keeps its message: in-progress signals hold off redelivery however long it runs."""

from __future__ import annotations

import asyncio
import threading
import time

import dramatiq
from dramatiq.middleware import AsyncIO

from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds

#: Longer than a busy machine lets a thread wait for its turn, because a third of it later a signal is due.
ACK_WAIT = 3_000


def test_a_task_of_several_ack_waits_runs_once(make_broker):
    """The messages that run go to no other worker, however long they take."""
    threads = 2
    busy, idle = (make_broker(ack_wait=ACK_WAIT) for _ in range(2))
    release = threading.Event()
    began = []

    def work(name):
        began.append(name)
        release.wait(30)

    dramatiq.actor(broker=busy)(work)
    with running(busy, threads=threads):
        messages = [busy.actors["work"].message(n) for n in range(threads)]
        busy.enqueue_many(messages)
        eventually(lambda: len(began) == threads)
        eventually(lambda: busy.queue_stats("default").in_flight == threads)
        dramatiq.actor(broker=idle)(work)
        with running(idle):
            holds(lambda: len(began) == threads, 2.2 * ACK_WAIT / 1000)
            assert busy.queue_stats("default").redelivered == 0
            release.set()
            busy.join("default", timeout=30_000)
    assert sorted(began) == list(range(threads))


def test_coroutines_and_computations_keep_their_messages(make_broker):
    """Signals need no help from the actor: not from a coroutine, not from one that keeps the interpreter busy."""
    broker = make_broker(ack_wait=ACK_WAIT)
    broker.add_middleware(AsyncIO())
    long = 2.2 * ACK_WAIT / 1000
    began = []

    @dramatiq.actor(broker=broker)
    async def wait():
        began.append("wait")
        await asyncio.sleep(long)

    @dramatiq.actor(broker=broker)
    def compute():
        began.append("compute")
        end = time.monotonic() + long
        while time.monotonic() < end:
            sum(range(10_000))

    with running(broker):
        wait.send()
        compute.send()
        broker.join("default", timeout=30_000)
    assert sorted(began) == ["compute", "wait"]


def test_signals_are_for_what_is_held_only(make_broker):
    """A message that is done, or was given back, is not held any more."""
    broker = make_broker(ack_wait=ACK_WAIT)
    done = threading.Event()

    @dramatiq.actor(broker=broker)
    def work():
        done.wait(30)

    with running(broker, threads=1):
        for _ in range(2):
            work.send()
        eventually(lambda: broker.in_flight.held == 2)
        done.set()
        broker.join("default", timeout=30_000)
        eventually(lambda: broker.in_flight.held == 0)
