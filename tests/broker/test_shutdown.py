"""A worker that stops leaves nothing behind: what it did not begin is another's at once, under load, too."""

from __future__ import annotations

import threading
import time
from collections import Counter

import dramatiq
import pytest

from dramatiq_jetstream.events import Events, subscription
from tests.broker.conformance.workers import running
from tests.support.polling import eventually
from tests.support.processes import python

#: Far longer than any test runs: whatever waits for it has been lost on the way.
ACK_WAIT = 600_000


@pytest.mark.parametrize("sources", ["one", "priorities", "events"])
def test_workers_that_stop_under_load_leave_nothing_waiting(make_broker, namespace, sources):
    """Workers come and go while messages pour in; each runs once, and none waits for its ack_wait."""
    subject = f"EV{namespace}.x"
    ran = Counter()

    def another():
        broker = make_broker(ack_wait=ACK_WAIT, max_priority=3 if sources == "priorities" else None)
        broker.add_middleware(Events(stream=f"EV{namespace}", subjects=[subject]))
        dramatiq.actor(lambda number: ran.update([number]), broker=broker, actor_name="work")
        dramatiq.actor(
            lambda data: ran.update([data.decode()]),
            broker=broker,
            actor_name="handle",
            subscribe=subscription(subject),
        )
        return broker

    producer = another()
    producer.setup()
    work = producer.actors["work"]
    sent = set()
    stop = threading.Event()

    def produce():
        number = 0
        while not stop.is_set():
            options = {"broker_priority": number % 4} if sources == "priorities" else {}
            work.send_with_options(args=(number,), **options)
            sent.add(number)
            if sources == "events":
                producer.publish(subject, f"e{number}".encode())
                sent.add(f"e{number}")
            number += 1

    producing = threading.Thread(target=produce)
    producing.start()
    try:
        for _ in range(8):
            broker = another()
            before = len(ran)
            with running(broker, threads=2) as worker:
                eventually(lambda before=before: len(ran) > before + 20)
            assert worker.work_queue.unfinished_tasks == 0
            assert broker.in_flight.held == 0
            broker.close()
    finally:
        stop.set()
        producing.join(15)
    last = another()
    with running(last, threads=4):
        last.join("default", timeout=30_000)
    assert set(ran) == sent
    assert sum(ran.values()) == len(sent)


def test_join_of_the_worker_counts_what_was_given_back(make_broker):
    """`Worker.join` returns when everything is done, whatever was given back in between."""
    broker = make_broker(ack_wait=ACK_WAIT)
    slow = threading.Event()
    ran = []

    @dramatiq.actor(broker=broker)
    def work(number):
        time.sleep(0.3 if slow.is_set() else 0.001)
        ran.append(number)

    with running(broker, threads=2) as worker:
        broker.enqueue_many([work.message(number) for number in range(300)])
        eventually(lambda: len(ran) > 150)
        slow.set()  # so that what was fetched ahead is given back
        eventually(lambda: len(ran) > 155)
        slow.clear()
        broker.join("default", timeout=30_000)
        worker.join()
        assert worker.work_queue.unfinished_tasks == 0
    assert sorted(ran) == list(range(300))


def test_a_stopped_worker_does_not_stop_another_one_of_the_same_broker(make_broker):
    """Programs that run two workers on one broker, as tests do, may stop one of them."""
    broker = make_broker(ack_wait=ACK_WAIT)
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
    with running(broker):
        with running(broker):
            work.send(1)
            eventually(lambda: ran == [1])
        for number in range(2, 30):
            work.send(number)
        broker.join("default", timeout=30_000)
    assert sorted(ran) == list(range(1, 30))


def test_closing_the_broker_under_a_running_worker_loses_nothing(make_broker):
    """A program that closes its broker before its worker is stopped leaves the rest to others."""
    broker, other = make_broker(ack_wait=1_000), make_broker(ack_wait=1_000)
    ran = Counter()
    for one in (broker, other):
        dramatiq.actor(lambda number: ran.update([number]), broker=one, actor_name="work")
    other.enqueue_many([other.actors["work"].message(number) for number in range(300)])
    with running(broker, threads=2):
        eventually(lambda: len(ran) > 20)
        broker.close()
    with running(other):
        other.join("default", timeout=30_000)
    assert set(ran) == set(range(300))


PROGRAM = """
import atexit, sys, threading
atexit.register(lambda: print("left:", *(t.name for t in threading.enumerate()), flush=True))  # runs as the last one
import dramatiq
from dramatiq_jetstream import JetStreamBroker

broker = JetStreamBroker(sys.argv[1], namespace=sys.argv[2])
dramatiq.set_broker(broker)
dramatiq.actor(lambda number: None, actor_name="work").send(1)
"""


def test_a_program_that_does_not_close_its_broker_leaves_no_loop_running(nats_url, namespace, tmp_path):
    """A loop in C that still runs while the interpreter is taken down under it has crashed."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = python(program, nats_url, namespace, log=tmp_path / "log")
    process.start()
    assert process.popen.wait(30) == 0
    assert process.output == "left: MainThread\n"
