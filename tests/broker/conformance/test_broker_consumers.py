"""Consumers: what they answer, how a message is settled through them, and how they survive a lost connection."""

from __future__ import annotations

import time

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.errors import ConnectionClosed

from tests.broker.conformance.workers import Recorder, consuming, running
from tests.support.polling import eventually


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
    rig.requeue(queue)

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
        assert time.monotonic() - before < 20
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
    rig.requeue(queue)
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
    rig.requeue(queue)
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
            eventually(lambda: done == {1, 2})
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
