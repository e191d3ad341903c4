"""Declaring queues and actors, and what happens to queues that were not declared."""

from __future__ import annotations

import time

import dramatiq
import pytest
from dramatiq import Message
from dramatiq.common import dq_name
from dramatiq.errors import ActorNotFound, QueueNotFound

from tests.broker.conformance.rigs import nowhere
from tests.broker.conformance.workers import Recorder, consuming, running
from tests.support.polling import eventually, holds


def a_message(queue, actor_name="nobody"):
    return Message(queue_name=queue, actor_name=actor_name, args=(), kwargs={}, options={})


def test_a_new_broker_has_neither_queues_nor_actors(broker):
    """A broker that nothing was declared on knows nothing."""
    assert broker.get_declared_queues() == set()
    assert broker.get_declared_delay_queues() == set()
    assert broker.get_declared_actors() == set()


def test_declaring_an_actor_declares_its_queue(broker, actor, queue):
    """An actor is found by its name once it is declared, and its queue is declared with it."""

    @actor(actor_name="greet")
    def greet():
        pass

    assert broker.get_declared_actors() == {"greet"}
    assert broker.get_actor("greet") is greet
    assert queue in broker.get_declared_queues()


def test_an_actor_that_was_not_declared_is_not_found(broker):
    """Looking up an unknown actor says which one."""
    with pytest.raises(ActorNotFound, match="nobody"):
        broker.get_actor("nobody")


@pytest.mark.where(declares_canonical_queues=True)
def test_declared_queues_are_the_ones_that_were_declared(broker, queue):
    """The set of declared queues contains canonical names only."""
    broker.declare_queue(queue)
    assert broker.get_declared_queues() == {queue}


@pytest.mark.where(delays_held_by="worker")
def test_a_delay_queue_comes_with_every_queue(broker, queue):
    """Where workers hold delayed messages, each queue has a second one for them."""
    broker.declare_queue(queue)
    assert broker.get_declared_delay_queues() == {dq_name(queue)}


@pytest.mark.where(delays_held_by="server")
def test_no_delay_queue_is_declared(broker, queue):
    """Where the server holds delayed messages, no worker has to consume them."""
    recorder = Recorder()
    broker.add_middleware(recorder)
    broker.declare_queue(queue)
    assert broker.get_declared_delay_queues() == set()
    assert "after_declare_delay_queue" not in recorder.names()


def test_declaring_a_queue_twice_has_no_effect(broker, queue):
    """Only the first declaration of a queue is announced, before and after."""
    recorder = Recorder()
    broker.add_middleware(recorder)
    for _ in range(3):
        broker.declare_queue(queue)
    assert recorder.of(queue) == ["before_declare_queue", "after_declare_queue"]


def test_declaring_an_actor_is_announced_around_its_queue(broker, actor, queue):
    """Middleware hears of the actor before, of its queue, and of the actor after."""
    recorder = Recorder()
    broker.add_middleware(recorder)

    @actor
    def greet():
        pass

    names = [name for name in recorder.names() if name != "after_declare_delay_queue"]
    assert names == [
        "before_declare_actor",
        "before_declare_queue",
        "after_declare_queue",
        "after_declare_actor",
    ]


def test_middleware_that_comes_late_hears_of_what_was_declared(broker, actor, queue):
    """Adding a middleware tells it of every actor and queue that is there already."""

    @actor
    def greet():
        pass

    recorder = Recorder()
    broker.add_middleware(recorder)
    assert recorder.of(greet) == ["after_declare_actor"]
    assert "after_declare_queue" in recorder.of(queue)


def test_actor_options_come_from_the_middleware(broker, actor):
    """Options of the broker's middleware are kept on the actor, others are refused."""

    @actor(max_retries=3, max_age=1000)
    def greet():
        pass

    assert greet.options == {"max_retries": 3, "max_age": 1000}
    with pytest.raises(ValueError, match="surely_unknown"):
        actor(surely_unknown=1)(lambda: None)


def test_two_actors_cannot_share_a_name(actor):
    """The second declaration of a name is refused."""
    actor(actor_name="twin")(lambda: None)
    with pytest.raises(ValueError, match="twin"):
        actor(actor_name="twin")(lambda: None)


@pytest.mark.where(enqueue_undeclared="raises")
def test_enqueueing_on_an_undeclared_queue_raises(broker, queue):
    """A message for a queue that was never declared is refused."""
    with pytest.raises(QueueNotFound):
        broker.enqueue(a_message(queue))


@pytest.mark.where(enqueue_undeclared={"declares", "stores"})
def test_a_message_for_an_undeclared_queue_is_stored(rig, broker, queue, broker_kind):
    """A producer need not have the actor: the message waits for a worker that has."""
    broker.enqueue(a_message(queue))
    rig.expect(queue, waiting=1)
    assert (queue in broker.get_declared_queues()) == (broker_kind.enqueue_undeclared == "declares")
    broker.declare_queue(queue)  # so that it is cleaned up


@pytest.mark.where(consume_undeclared="raises")
def test_consuming_an_undeclared_queue_raises(broker, queue):
    """There is nothing to consume where nothing was declared."""
    with pytest.raises(QueueNotFound):
        broker.consume(queue)


@pytest.mark.where(consume_undeclared={"declares", "allows"})
def test_an_undeclared_queue_can_be_consumed(broker, queue, broker_kind):
    """A consumer of a queue that was not declared finds it empty."""
    consumer = broker.consume(queue, timeout=50)
    try:
        assert next(consumer) is None
        assert (queue in broker.get_declared_queues()) == (broker_kind.consume_undeclared == "declares")
    finally:
        consumer.close()


@pytest.mark.where(join_undeclared="raises")
def test_joining_an_undeclared_queue_raises(broker, queue):
    """Waiting for a queue that was never declared is a mistake."""
    with pytest.raises(QueueNotFound):
        broker.join(queue)


@pytest.mark.where(join_undeclared="returns")
def test_joining_an_undeclared_queue_returns(broker, queue):
    """A queue that was never declared has nothing to wait for."""
    assert broker.join(queue, timeout=30_000) is None
    broker.declare_queue(queue)


@pytest.mark.where(storage="server")
def test_connecting_is_left_until_it_is_needed(rig, broker_kind, queue):
    """Broker, queues and actors can be made while no server is there; the first enqueue says so."""
    broker = rig.unreachable()

    @dramatiq.actor(broker=broker, queue_name=queue)
    def greet():
        pass

    before = time.monotonic()
    with pytest.raises(broker_kind.unreachable):
        greet.send()
    assert time.monotonic() - before < 20
    broker.close()


@pytest.mark.where(several_urls=True)
def test_the_first_server_that_answers_is_used(rig, queue):
    """Of several addresses, one where nothing answers is passed over."""
    with rig.another(url=[nowhere(rig.url), rig.url]) as broker:
        broker.declare_queue(queue)
        broker.enqueue(a_message(queue))
    rig.broker.declare_queue(queue)
    rig.expect(queue, waiting=1)


def test_a_worker_consumes_queues_that_are_declared_later(rig, broker, queue):
    """A running worker takes up a queue as soon as it is declared."""
    with running(broker) as worker:
        done = []

        @dramatiq.actor(broker=broker, queue_name=queue)
        def late():
            done.append(1)

        late.send()
        eventually(lambda: done == [1])
        rig.drain(queue, worker)


def test_a_worker_keeps_to_the_queues_it_was_given(rig, broker, queue):
    """A worker that is limited to some queues leaves the others alone."""
    mine, other = f"{queue}-mine", f"{queue}-other"
    done = []
    for name in (mine, other):
        dramatiq.actor(broker=broker, queue_name=name, actor_name=name)(lambda name=name: done.append(name))
        broker.enqueue(a_message(name, actor_name=name))

    with running(broker, queues=[mine]) as worker:
        eventually(lambda: done == [mine])
        holds(lambda: done == [mine], 0.1)
        assert {name.removesuffix(".DQ") for name in worker.consumers} == {mine}
    rig.expect(other, waiting=1)


@pytest.mark.where(remakes_lost_queue=True)
def test_a_queue_that_was_lost_is_made_again_for_the_next_message(rig, broker, actor, queue):
    """A message whose queue was deleted on the server finds a new one."""

    @actor
    def greet():
        pass

    greet.send()
    rig.expect(queue, waiting=1)
    rig.lose_queue(queue)
    rig.expect(queue, waiting=0)
    greet.send()
    rig.expect(queue, waiting=1)


@pytest.mark.where(remakes_lost_queue=True)
def test_a_queue_that_was_lost_is_made_again_by_its_consumer(rig, broker, actor, queue):
    """A worker whose queue was deleted makes it again and goes on."""
    done = []

    @actor
    def greet(number):
        done.append(number)

    with running(broker) as worker:
        greet.send(1)
        eventually(lambda: done == [1])
        eventually(lambda: consuming(worker, queue))
        rig.drain(queue, worker)
        rig.lose_queue(queue)
        eventually(lambda: rig.has_queue(queue))
        greet.send(2)
        eventually(lambda: done == [1, 2])
