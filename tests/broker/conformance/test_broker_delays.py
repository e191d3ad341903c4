"""Delayed messages: not before their time, independent of each other, not lost with the worker."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from dramatiq import QueueJoinTimeout
from dramatiq.common import dq_name
from dramatiq.middleware import CurrentMessage

from tests.broker.conformance.workers import Recorder, consuming, running
from tests.support.polling import eventually, holds


def test_a_delayed_message_runs_not_before_its_time(rig, broker, actor, queue):
    """The delay is a lower bound, and what comes on top is short."""
    ran_at = []

    @actor
    def note():
        ran_at.append(time.time())

    with running(broker) as worker:
        sent_at = time.time()
        note.send_with_options(delay=300)
        eventually(lambda: ran_at)
        rig.drain(queue, worker)
    assert 0.3 <= ran_at[0] - sent_at < 2


def test_messages_are_delayed_independent_of_each_other(rig, broker, actor, queue):
    """A shorter delay, given in milliseconds or as a timedelta, overtakes a longer one sent before."""
    order = []

    @actor
    def note(name):
        order.append(name)

    with running(broker, threads=1) as worker:
        note.send_with_options(args=("long",), delay=900)
        note.send_with_options(args=("short",), delay=timedelta(milliseconds=300))
        note.send("now")
        eventually(lambda: len(order) == 3)
        rig.drain(queue, worker)
    assert order == ["now", "short", "long"]


def test_a_delay_of_zero_is_no_delay(rig, broker, actor, queue):
    """A retry may ask for no backoff at all."""
    done = threading.Event()

    @actor
    def note():
        done.set()

    with running(broker) as worker:
        note.send_with_options(delay=0)
        assert done.wait(timeout=30)
        rig.drain(queue, worker)


def test_a_delayed_message_is_not_ready(rig, broker, actor, queue):
    """While it is delayed a message is counted apart and not handed to a consumer."""

    @actor
    def note():
        pass

    note.send_with_options(delay=60_000)
    rig.expect(queue, waiting=0, delayed=1)
    consumer = broker.consume(queue, timeout=50)
    assert next(consumer) is None
    consumer.close()


@pytest.mark.where(delays_held_by="worker")
def test_enqueueing_with_a_delay_returns_the_message_of_the_delay_queue(broker, actor, queue):
    """What workers hold back is a copy on the delay queue, which carries its time as `eta`."""

    @actor
    def note():
        pass

    message = note.message()
    before = time.time() * 1000
    delayed = broker.enqueue(message, delay=60_000)
    assert delayed.message_id == message.message_id
    assert delayed.queue_name == dq_name(queue)
    assert before + 59_000 < delayed.options["eta"] < before + 61_000


@pytest.mark.where(delays_held_by="server")
def test_enqueueing_with_a_delay_returns_the_message_on_its_own_queue(broker, actor, queue):
    """What the server holds back needs no second queue: the message keeps its queue and identity."""

    @actor
    def note():
        pass

    message = note.message()
    delayed = broker.enqueue(message, delay=60_000)
    assert (delayed.message_id, delayed.queue_name) == (message.message_id, queue)


def test_the_actor_cannot_tell_that_its_message_was_delayed(rig, broker, actor, queue):
    """The message that runs is on its own queue, with its own id and without an `eta`."""
    broker.add_middleware(CurrentMessage())
    received = []

    @actor
    def note():
        received.append(CurrentMessage.get_current_message())

    with running(broker) as worker:
        sent = note.send_with_options(delay=50)
        eventually(lambda: received)
        rig.drain(queue, worker)
    assert received[0].message_id == sent.message_id
    assert received[0].queue_name == queue
    assert "eta" not in received[0].options


@pytest.mark.where(requeues_at_shutdown=True)
def test_a_delayed_message_outlives_the_worker(rig, broker, actor, queue):
    """A worker that stops while a message is delayed leaves it to the next one."""
    done = []

    @actor
    def note():
        done.append(1)

    with running(broker) as worker:
        note.send_with_options(delay=6_000)
        eventually(lambda: all(consuming(worker, name) for name in worker.consumers))
    eventually(lambda: rig.delayed(queue) == 1)
    assert not done
    with running(broker) as worker:
        eventually(lambda: done == [1])
        rig.drain(queue, worker)


@pytest.mark.where(delays_held_by="worker")
def test_a_worker_announces_that_it_holds_a_message_back(rig, broker, actor, queue):
    """Middleware hears of each delayed message that a worker takes into its memory."""
    recorder = Recorder()
    broker.add_middleware(recorder)

    @actor
    def note():
        pass

    with running(broker) as worker:
        message = note.send_with_options(delay=100)
        recorder.wait_for("before_delay_message", message.message_id)
        rig.drain(queue, worker)


@pytest.mark.where(delays_held_by="server")
def test_a_worker_holds_no_delayed_message(rig, broker, actor, queue):
    """A thousand delayed messages are not in the worker's memory, and none is announced as held back."""
    recorder = Recorder()
    broker.add_middleware(recorder)
    done = threading.Event()

    @actor
    def note(last=False):
        if last:
            done.set()

    for _ in range(1000):
        note.send_with_options(delay=600_000)
    with running(broker) as worker:
        note.send(last=True)
        assert done.wait(timeout=30), "a ready message was held up by delayed ones"
        holds(lambda: worker.consumers[queue].delay_queue.empty() and worker.work_queue.empty(), 0.1)
        assert set(worker.consumers) == {queue}
    assert "before_delay_message" not in recorder.names()
    rig.expect(queue, delayed=1000)


def test_join_waits_for_delayed_messages(rig, broker, actor, queue):
    """A queue with a delayed message is not finished until that has run."""
    done = []

    @actor
    def note():
        done.append(1)

    with running(broker):
        note.send_with_options(delay=400)
        broker.join(queue, timeout=30_000)
        eventually(lambda: done == [1])


def test_join_has_a_timeout_for_delayed_messages(broker, actor, queue):
    """Waiting for a message that is delayed for long ends with the timeout."""

    @actor
    def note():
        pass

    note.send_with_options(delay=60_000)
    before = time.monotonic()
    with pytest.raises(QueueJoinTimeout):
        broker.join(queue, timeout=200)
    assert time.monotonic() - before < 30


@pytest.mark.where(join_waits_for_running=True)
def test_join_misses_nothing_that_a_running_message_delays(broker, actor, queue):
    """Between a running message and the delayed one it sends, the queue never looks finished."""
    done = []

    @actor
    def first():
        second.send_with_options(delay=300)
        time.sleep(0.1)
        done.append("first")

    @actor
    def second():
        done.append("second")

    with running(broker, threads=1):
        first.send()
        broker.join(queue, timeout=30_000)
        assert done == ["first", "second"]


@pytest.mark.parametrize("eta", [None, "not a number", 0])
def test_an_eta_that_makes_no_sense_does_not_hold_a_message_up(rig, broker, actor, queue, eta):
    """A message from another program with a wrong `eta` is run."""
    done = threading.Event()

    @actor
    def note():
        done.set()

    rig.put(queue, note.message_with_options(eta=eta).encode())
    with running(broker) as worker:
        assert done.wait(timeout=30)
        rig.drain(queue, worker)
    rig.expect(queue, dead=0)


def test_an_eta_in_the_future_is_respected(rig, broker, actor, queue):
    """A message from another program that puts an `eta` on a ready message runs when that has come."""
    ran_at = []

    @actor
    def note():
        ran_at.append(time.time())

    eta = time.time() + 0.4
    rig.put(queue, note.message_with_options(eta=int(eta * 1000)).encode())
    with running(broker) as worker:
        eventually(lambda: ran_at)
        rig.drain(queue, worker)
    assert ran_at[0] >= eta - 0.001
