"""How messages get from `send` to an actor and are settled: once, in order, and not more than asked for."""

from __future__ import annotations

import threading
from collections import Counter

import dramatiq
import pytest
from dramatiq.middleware import CurrentMessage

from tests.broker.conformance.workers import (
    consuming,
    pause_threads,
    resume_threads,
    running,
)
from tests.support.polling import eventually, holds


def test_every_message_runs_once(rig, broker, actor, queue):
    """A hundred messages make a hundred runs, each with its own arguments."""
    seen = Counter()

    @actor
    def note(key, *, value):
        seen[key, value] += 1

    for i in range(100):
        note.send(f"key-{i}", value=i)
    with running(broker) as worker:
        eventually(lambda: len(seen) == 100)
        rig.drain(queue, worker)
    assert seen == {(f"key-{i}", i): 1 for i in range(100)}


def test_arguments_arrive_as_they_were_sent(rig, broker, actor, queue):
    """Text of any script, nested data, nothing and large numbers survive the way."""
    sent = [["Zürich 東京 🐰 \u0000", None, True], {"deep": {"er": [1.5, -(2**53)]}}, "", "x" * 200_000]
    received = []

    @actor
    def note(*args, **kwargs):
        received.append((list(args), kwargs))

    note.send(*sent, extra={"ключ": []})
    with running(broker) as worker:
        eventually(lambda: received)
        rig.drain(queue, worker)
    assert received == [(sent, {"extra": {"ключ": []}})]


def test_send_returns_the_message_that_the_actor_gets(rig, broker, actor, queue):
    """Identity, time, name, queue and arguments are the same at both ends."""
    broker.add_middleware(CurrentMessage())
    received = []

    @actor
    def note(x, *, y):
        received.append(CurrentMessage.get_current_message())

    sent = note.send(1, y=2)
    with running(broker) as worker:
        eventually(lambda: received)
        rig.drain(queue, worker)
    for field in ("message_id", "message_timestamp", "actor_name", "queue_name", "args", "kwargs"):
        assert getattr(received[0], field) == getattr(sent, field), field


def test_the_sent_message_is_left_as_it_was(rig, broker, actor):
    """Enqueueing does not write into the caller's message, so that it can be sent again."""

    @actor
    def note(x):
        pass

    message = note.message_with_options(args=(1,), max_retries=2)
    before = message.copy()
    for _ in range(2):
        broker.enqueue(message)
        broker.enqueue(message, delay=60_000)
    assert message == before
    assert message.options == {"max_retries": 2}
    rig.expect(message.queue_name, waiting=2)


def test_the_same_message_enqueued_twice_runs_twice(rig, broker, actor, queue):
    """A message id does not make a message unique: a retry carries the id of the first attempt."""
    runs = []

    @actor
    def note():
        runs.append(1)

    message = note.message()
    broker.enqueue(message)
    broker.enqueue(message)
    with running(broker) as worker:
        eventually(lambda: len(runs) == 2)
        rig.drain(queue, worker)


def test_one_thread_works_in_the_order_of_sending(rig, broker, actor, queue):
    """With a single thread the first message sent is the first run."""
    order = []

    @actor
    def note(number):
        order.append(number)

    for number in range(20):
        note.send(number)
    with running(broker, threads=1, prefetch=10) as worker:
        eventually(lambda: len(order) == 20)
        rig.drain(queue, worker)
    assert order == list(range(20))


def test_a_worker_takes_no_more_than_its_prefetch(rig, broker, actor, queue):
    """What is beyond the prefetch count stays on the broker, for others to take."""
    done = []

    @actor
    def note(number):
        done.append(number)

    with running(broker, prefetch=5) as worker:
        eventually(lambda: consuming(worker, queue))
        pause_threads(worker)
        for number in range(15):
            note.send(number)
        eventually(lambda: worker.work_queue.qsize() == 5)
        holds(lambda: (worker.work_queue.qsize(), rig.waiting(queue)) == (5, 10), 0.1)
        resume_threads(worker)
        eventually(lambda: sorted(done) == list(range(15)))
        rig.drain(queue, worker)


def test_a_prefetch_of_one_fetches_only_after_the_last_is_done(rig, broker, actor, queue):
    """Messages in progress count as prefetched."""
    started, go_on = threading.Semaphore(0), threading.Semaphore(0)

    @actor
    def wait():
        started.release()
        assert go_on.acquire(timeout=10)

    for _ in range(3):
        wait.send()
    with running(broker, threads=2, prefetch=1) as worker:
        for left in (2, 1, 0):
            assert started.acquire(timeout=10)
            holds(lambda left=left: (rig.waiting(queue), worker.work_queue.qsize()) == (left, 0), 0.05)
            go_on.release()
        rig.drain(queue, worker)


def test_a_paused_worker_runs_nothing_until_it_is_resumed(rig, broker, actor, queue):
    """Pausing stops consumers and threads, resuming starts both."""
    runs = []

    @actor
    def note():
        runs.append(1)

    with running(broker) as worker:
        worker.pause()
        note.send()
        holds(lambda: not runs, 0.15)
        worker.resume()
        eventually(lambda: runs == [1])
        rig.drain(queue, worker)


def test_actors_of_higher_priority_run_first(rig, broker, actor, queue):
    """Of what a worker has fetched, it runs the actor with the lower number first."""
    runs = []

    @actor(priority=0)
    def urgent():
        runs.append("urgent")

    @actor(priority=10)
    def later():
        runs.append("later")

    with running(broker, threads=1, prefetch=20) as worker:
        eventually(lambda: consuming(worker, queue))
        pause_threads(worker)
        for _ in range(10):
            later.send()
            urgent.send()
        eventually(lambda: worker.work_queue.qsize() == 20)
        resume_threads(worker)
        eventually(lambda: len(runs) == 20)
        rig.drain(queue, worker)
    assert runs == ["urgent"] * 10 + ["later"] * 10


@pytest.mark.where(priorities=True)
def test_messages_of_higher_broker_priority_overtake_the_queue(make_rig, queue):
    """`broker_priority` orders what was not fetched yet, higher first; without it a message comes last."""
    rig = make_rig(max_priority=9)
    runs = []

    @dramatiq.actor(broker=rig.broker, queue_name=queue)
    def note(priority):
        runs.append(priority)

    for priority in (None, *range(10)):
        options = {} if priority is None else {"broker_priority": priority}
        note.send_with_options(args=(priority,), **options)
        if priority is not None:
            note.send_with_options(args=(priority,), **options)
    with running(rig.broker, threads=1, prefetch=1) as worker:
        eventually(lambda: len(runs) == 21)
        rig.drain(queue, worker)
    expected = [p for p in range(9, 0, -1) for _ in range(2)] + [None, 0, 0]
    # What the worker fetched before it had asked for all priorities comes first: one that runs, one that waits.
    for early in runs[:2]:
        expected.remove(early)
    assert runs[2:] == expected


@pytest.mark.where(storage="server")
def test_two_workers_share_a_queue(rig, broker, actor, queue):
    """Workers of two processes divide the messages between them; none runs twice."""
    seen = Counter()
    both = threading.Barrier(2)

    def note(number):
        if number < 2:
            both.wait(timeout=30)  # no worker gets further before the other has begun
        seen[number] += 1

    here = actor(note)
    with rig.another() as other:
        dramatiq.actor(note, broker=other, queue_name=queue)
        with running(broker, threads=1, prefetch=1) as worker, running(other, threads=1, prefetch=1):
            for number in range(40):
                here.send(number)
            eventually(lambda: len(seen) == 40)
            rig.drain(queue, worker)
    assert set(seen.values()) == {1}


@pytest.mark.where(requeues_at_shutdown=True)
def test_what_a_worker_did_not_begin_is_requeued(rig, broker, actor, queue):
    """At shutdown the running message is finished, and the fetched ones are ready for the next worker."""
    started, go_on = threading.Event(), threading.Event()
    done = []

    @actor
    def wait(number):
        started.set()
        go_on.wait(timeout=30)
        done.append(number)

    for number in range(4):
        wait.send(number)
    with running(broker, threads=1, prefetch=4) as worker:
        assert started.wait(timeout=30)
        eventually(lambda: worker.work_queue.qsize() == 3)
        # stop() waits for the actor, so another thread must let it go on once the worker was told to stop.
        threading.Timer(0.1, go_on.set).start()
    assert done == [0]

    with running(broker) as worker:
        # Sooner than a server that had only lost sight of the first worker would deliver them again.
        eventually(lambda: len(done) == 4)
        rig.drain(queue, worker)
    assert sorted(done) == [0, 1, 2, 3]
