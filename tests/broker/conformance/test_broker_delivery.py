"""How messages get from `send` to an actor and are settled: once, in order, and not more than asked for."""

from __future__ import annotations

import threading
import time
from collections import Counter

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import CurrentMessage

from tests.broker.conformance.workers import (
    Recorder,
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
    """`broker_priority` orders what nobody has fetched, higher first; without it a message comes last."""
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
    assert runs == [p for p in range(9, 0, -1) for _ in range(2)] + [None, 0, 0]


@pytest.mark.where(storage="server")
def test_two_workers_share_a_queue(rig, broker, actor, queue):
    """Workers of two processes divide the messages between them; none runs twice."""
    seen = Counter()
    both = threading.Barrier(2)

    def note(number):
        if number < 2:
            both.wait(timeout=10)  # no worker gets further before the other has begun
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


@pytest.mark.where(hands_back_at_shutdown=True)
def test_what_a_worker_did_not_begin_is_handed_back(rig, broker, actor, queue):
    """At shutdown the running message is finished, and the fetched ones are ready for the next worker."""
    started, go_on = threading.Event(), threading.Event()
    done = []

    @actor
    def wait(number):
        started.set()
        go_on.wait(timeout=10)
        done.append(number)

    for number in range(4):
        wait.send(number)
    with running(broker, threads=1, prefetch=4) as worker:
        assert started.wait(timeout=10)
        eventually(lambda: worker.work_queue.qsize() == 3)
        # stop() waits for the actor, so somebody else must let it go on once the worker was told to stop.
        threading.Timer(0.1, go_on.set).start()
    assert done == [0]

    with running(broker) as worker:
        # Sooner than a server that had only lost sight of the first worker would deliver them again.
        eventually(lambda: len(done) == 4, timeout=5)
        rig.drain(queue, worker)
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.where(redelivers=True)
def test_messages_of_a_process_that_went_away_are_delivered_again(make_rig, queue, broker_kind):
    """What a consumer took and never settled is not lost with its process."""
    rig = make_rig(**broker_kind.quick_redelivery)
    rig.broker.declare_queue(queue)
    sent = {rig.broker.enqueue(Message(queue, "nobody", (), {}, {})).message_id for _ in range(200)}

    with rig.another(**broker_kind.quick_redelivery) as lost:
        lost.declare_queue(queue)
        consumer = lost.consume(queue, prefetch=200, timeout=50)
        assert {message.message_id for message in _take(consumer, 200)} == sent
        consumer.close()
    rig.hand_back(queue)

    consumer = rig.broker.consume(queue, prefetch=200, timeout=50)
    found = _take(consumer, 200)
    assert {message.message_id for message in found} == sent
    for message in found:
        consumer.ack(message)
    consumer.close()
    rig.expect(queue, waiting=0, dead=0)


def test_a_consumer_without_messages_answers_after_its_timeout(broker, queue):
    """Waiting for a message is bounded: with nothing there, the consumer returns None."""
    broker.declare_queue(queue)
    consumer = broker.consume(queue, timeout=100)
    try:
        before = time.monotonic()
        assert next(consumer) is None
        assert time.monotonic() - before < 2
    finally:
        consumer.close()


def test_an_acked_message_is_gone(rig, broker, queue):
    """After an ack neither this consumer nor another one sees the message."""
    broker.declare_queue(queue)
    message = broker.enqueue(Message(queue, "nobody", (), {}, {}))
    consumer = broker.consume(queue, timeout=50)
    (taken,) = _take(consumer, 1)
    assert taken.message_id == message.message_id
    consumer.ack(taken)
    consumer.close()
    rig.hand_back(queue)
    rig.expect(queue, waiting=0, dead=0)
    other = broker.consume(queue, timeout=50)
    assert next(other) is None
    other.close()


@pytest.mark.where(ignores_foreign_settlement=True)
def test_settling_a_message_of_another_consumer_does_nothing(rig, broker, queue):
    """An ack or nack for something the consumer does not hold is ignored, and changes nothing."""
    broker.declare_queue(queue)
    broker.enqueue(Message(queue, "nobody", (), {}, {}))
    consumer = broker.consume(queue, prefetch=2, timeout=50)
    (taken,) = _take(consumer, 1)
    consumer.ack(rig.foreign(taken))
    consumer.nack(rig.foreign(taken))
    consumer.ack(taken)
    consumer.close()
    rig.hand_back(queue)
    rig.expect(queue, waiting=0, dead=0)


@pytest.mark.parametrize("settlement", ["ack", "nack"])
def test_a_settlement_that_failed_is_tried_again(rig, broker, actor, queue, settlement, monkeypatch):
    """When the connection fails under an ack or nack, the worker repeats it and runs nothing twice."""
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.01)
    runs = []
    calls = []

    @actor(max_retries=0)
    def work():
        runs.append(1)
        if settlement == "nack":
            raise RuntimeError("to be dead-lettered")

    recorder = Recorder()
    broker.add_middleware(recorder)
    with running(broker) as worker:
        eventually(lambda: consuming(worker, queue))
        consumer = worker.consumers[queue].consumer
        settle = getattr(consumer, settlement)

        def fails_once(message):
            calls.append(message.message_id)
            if len(calls) == 1:
                raise ConnectionClosed(RuntimeError("cut"))
            settle(message)

        monkeypatch.setattr(consumer, settlement, fails_once)
        message = work.send()
        recorder.wait_for(f"after_{settlement}", message.message_id)
        rig.drain(queue, worker)
    assert calls == [message.message_id] * 2
    assert runs == [1]
    rig.expect(queue, dead=1 if settlement == "nack" else 0)


@pytest.mark.where(storage="server")
def test_enqueue_works_again_after_the_connection_was_cut(rig, cable, queue):
    """A producer whose connection broke between two messages does not notice."""
    with rig.another(url=cable.url) as producer:
        producer.declare_queue(queue)
        rig.broker.declare_queue(queue)
        for number in (1, 2):
            producer.enqueue(Message(queue, "nobody", (), {}, {}))
            rig.expect(queue, waiting=number)
            assert cable.cut() >= 1


@pytest.mark.where(storage="server")
def test_a_worker_goes_on_after_its_connection_was_cut(rig, cable, queue):
    """A consumer comes back by itself, and what arrived in the meantime is run."""
    rig.broker.declare_queue(queue)
    done = set()
    with rig.another(url=cable.url) as broker:

        @dramatiq.actor(broker=broker, queue_name=queue)
        def note(number):
            done.add(number)

        with running(broker) as worker:
            rig.broker.enqueue(note.message(1))
            eventually(lambda: done == {1})
            rig.drain(queue, worker)
            assert cable.cut() >= 1
            rig.broker.enqueue(note.message(2))
            eventually(lambda: done == {1, 2}, timeout=15)
            rig.drain(queue, worker)


def _take(consumer, count):
    """Take messages until there are enough of them."""
    taken = []

    def enough():
        message = next(consumer)
        if message is not None:
            taken.append(message)
        return len(taken) >= count

    eventually(enough, interval=0, message=f"{count} messages from the consumer")
    return taken
