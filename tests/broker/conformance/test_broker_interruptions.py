"""Actors that are interrupted by a time limit or a shutdown, and workers that are paused in their midst."""

from __future__ import annotations

import threading
import time

import dramatiq
import pytest
from dramatiq.middleware import Retries, Shutdown, TimeLimit, TimeLimitExceeded

from tests.broker.conformance.workers import consuming, running
from tests.support.polling import eventually, holds


@pytest.mark.parametrize("option_of", ["actor", "message"])
def test_a_time_limit_interrupts_an_actor(make_rig, queue, option_of):
    """An actor that takes longer than its limit is interrupted, and its message fails."""
    # Looks at the time every 20 ms instead of every second.
    rig = make_rig(middleware=[TimeLimit(interval=20), Retries()])
    rig.broker.emit_after("process_boot")
    ended_by = []

    def work():
        try:
            for _ in range(500):
                time.sleep(0.01)
        except TimeLimitExceeded as e:
            ended_by.append(e)
            raise
        ended_by.append(None)

    options = {"time_limit": 50}
    actor_options = {"max_retries": 0, **(options if option_of == "actor" else {})}
    actor = dramatiq.actor(work, broker=rig.broker, queue_name=queue, **actor_options)
    with running(rig.broker) as worker:
        actor.send_with_options(**(options if option_of == "message" else {}))
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert [type(e) for e in ended_by] == [TimeLimitExceeded]


def test_an_actor_that_wants_to_know_is_told_of_the_shutdown(rig, broker, actor, queue, broker_kind):
    """`notify_shutdown` interrupts an actor when its worker stops; its retry is left to the next worker."""
    started = threading.Event()
    ended_by = []

    # Long enough that the worker that is stopping does not begin the retry itself.
    @actor(notify_shutdown=True, max_retries=1, min_backoff=1_500, max_backoff=3_000)
    def work():
        if ended_by:
            ended_by.append("done")
            return
        started.set()
        try:
            for _ in range(500):
                time.sleep(0.01)
        except Shutdown:
            ended_by.append("shutdown")
            raise

    work.send()
    with running(broker):
        assert started.wait(timeout=30)
    assert ended_by == ["shutdown"]
    if broker_kind.requeues_at_shutdown:
        with running(broker) as worker:
            eventually(lambda: ended_by == ["shutdown", "done"])
            rig.drain(queue, worker)


def test_an_actor_that_does_not_want_to_know_is_let_finish(rig, broker, actor, queue):
    """Without `notify_shutdown` a worker that stops waits for its actors, and their messages are settled."""
    started = threading.Event()
    ended = []

    @actor
    def work():
        started.set()
        time.sleep(0.2)
        ended.append(1)

    work.send()
    with running(broker):
        assert started.wait(timeout=30)
    assert ended == [1]
    rig.requeue(queue)
    rig.expect(queue, waiting=0, delayed=0, dead=0)


def test_a_shutdown_does_not_reach_threads_that_are_done(rig, broker, actor, queue):
    """Of two actors that want to know, only the one that is still running is interrupted."""
    long_started = threading.Event()
    ended = []

    @actor(notify_shutdown=True, max_retries=0)
    def work(long):
        if long:
            long_started.set()
        try:
            for _ in range(500 if long else 1):
                time.sleep(0.01)
        except Shutdown:
            ended.append("shutdown")
            raise
        ended.append("done")

    work.send(False)
    work.send(True)
    with running(broker, threads=2):
        assert long_started.wait(timeout=30)
        eventually(lambda: ended == ["done"])
    assert ended == ["done", "shutdown"]
    eventually(lambda: rig.dead(queue) == 1)


def test_a_pause_of_the_consumer_keeps_what_was_fetched(rig, broker, actor, queue):
    """Pausing does not drop the messages that a worker has fetched: each still runs."""
    runs = []

    @actor
    def work(number):
        runs.append(number)

    with running(broker, threads=2) as worker:
        eventually(lambda: consuming(worker, queue))
        for number in range(20):
            work.send(number)
            if number == 10:
                worker.pause()
        seen = len(runs)
        holds(lambda: len(runs) == seen, 0.1)
        worker.resume()
        eventually(lambda: len(set(runs)) == 20)
        rig.drain(queue, worker)
