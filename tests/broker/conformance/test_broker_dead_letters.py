"""What becomes a dead letter, what does not, and what flush and join do."""

from __future__ import annotations

import threading
import time

import dramatiq
import pytest
from dramatiq import Message, QueueJoinTimeout
from dramatiq.common import dq_name
from dramatiq.encoder import JSONEncoder
from dramatiq.middleware import SkipMessage
from dramatiq.middleware.middleware import Middleware

from tests.broker.conformance.workers import Recorder, running
from tests.support.polling import eventually, holds


class Broken(Exception):
    """What the actors of these tests raise."""


@pytest.fixture
def fail(actor):
    """An actor that fails for good at the first attempt."""

    @actor(max_retries=0)
    def fail():
        raise Broken

    return fail


def test_a_message_without_retries_left_becomes_a_dead_letter(rig, broker, fail, queue):
    """The last failure moves the message to the dead letters, once."""
    fail.send()
    with running(broker) as worker:
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    rig.expect(queue, waiting=0, delayed=0, dead=1)


def test_many_dead_letters_are_kept(rig, broker, fail, queue):
    """Every failed message has its own dead letter."""
    for _ in range(50):
        fail.send()
    with running(broker) as worker:
        eventually(lambda: rig.dead(queue) == 50)
        rig.drain(queue, worker)


def test_a_dead_letter_is_not_delivered_again(rig, broker, actor, queue):
    """A new worker leaves dead letters where they are."""
    runs = []

    @actor(max_retries=0)
    def fail():
        runs.append(1)
        raise Broken

    fail.send()
    for _ in range(2):
        with running(broker) as worker:
            eventually(lambda: rig.dead(queue) == 1)
            rig.drain(queue, worker)
    assert runs == [1]


def test_a_message_for_an_unknown_actor_becomes_a_dead_letter(rig, broker, actor, queue):
    """A worker that does not have the actor rejects the message and goes on."""
    done = threading.Event()

    @actor
    def known():
        done.set()

    unknown = broker.enqueue(Message(queue, "somebody-else", (), {}, {}))
    known.send()
    recorder = Recorder()
    broker.add_middleware(recorder)
    with running(broker) as worker:
        assert done.wait(timeout=30)
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert recorder.of(unknown.message_id) == ["before_nack", "after_nack"]


@pytest.mark.where(rejects_undecodable=True)
@pytest.mark.parametrize(
    "body",
    [b"", b"\x00\xff not JSON", b"[]", b"null", b'{"queue_name": "q"}', b'{"surplus": 1}'],
    ids=["empty", "binary", "list", "null", "incomplete", "surplus"],
)
def test_a_body_that_cannot_be_decoded_becomes_a_dead_letter(rig, broker, actor, queue, body):
    """A body that is no message is rejected once, and the messages behind it are run."""
    done = threading.Event()

    @actor
    def note():
        done.set()

    rig.put(queue, body)
    note.send()
    with running(broker, prefetch=1) as worker:
        assert done.wait(timeout=30)
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    rig.expect(queue, waiting=0)


@pytest.mark.where(rejects_undecodable=True)
def test_a_body_that_the_encoder_chokes_on_becomes_a_dead_letter(rig, broker, actor, queue):
    """Any exception of the encoder in use counts as a body that cannot be decoded."""

    class Choking(JSONEncoder):
        def decode(self, data):
            if b"poison" in data:
                raise Broken
            return super().decode(data)

    done = []

    @actor
    def note(what):
        done.append(what)

    before = dramatiq.get_encoder()
    dramatiq.set_encoder(Choking())
    try:
        note.send("poison")
        note.send("food")
        with running(broker) as worker:
            eventually(lambda: rig.dead(queue) == 1 and done == ["food"])
            rig.drain(queue, worker)
    finally:
        dramatiq.set_encoder(before)


def test_without_retries_middleware_a_failed_message_is_settled(make_rig, queue):
    """Only middleware rejects messages: with none, a failure is logged and the message acknowledged."""
    rig = make_rig(middleware=[])
    assert rig.broker.middleware == []
    failed = threading.Event()

    @dramatiq.actor(broker=rig.broker, queue_name=queue)
    def fail():
        failed.set()
        raise Broken

    fail.send()
    with running(rig.broker) as worker:
        assert failed.wait(timeout=30)
        rig.drain(queue, worker)
    rig.expect(queue, waiting=0, dead=0)


def test_a_skipped_message_is_settled_and_not_dead(rig, broker, actor, queue):
    """Middleware that skips a message without failing it has it acknowledged, and its actor does not run."""

    class Skip(Middleware):
        def before_process_message(self, broker, message):
            raise SkipMessage

    runs = []

    @actor
    def note():
        runs.append(1)

    recorder = Recorder()
    broker.add_middleware(Skip())
    broker.add_middleware(recorder)
    message = note.send()
    with running(broker) as worker:
        recorder.wait_for("after_ack", message.message_id)
        rig.drain(queue, worker)
    assert not runs
    rig.expect(queue, dead=0)
    assert "after_skip_message" in recorder.of(message.message_id)
    assert "after_process_message" not in recorder.of(message.message_id)


@pytest.mark.parametrize("option_of", ["actor", "message"])
def test_a_message_that_is_too_old_becomes_a_dead_letter(rig, broker, actor, queue, option_of):
    """`max_age`, of the actor or of the message, keeps an old message from running."""
    runs = []

    @actor(**({"max_age": 1} if option_of == "actor" else {}))
    def note():
        runs.append(1)

    message = note.send_with_options(**({"max_age": 1} if option_of == "message" else {}))
    eventually(lambda: time.time() * 1000 > message.message_timestamp + 2)
    with running(broker) as worker:
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert not runs


@pytest.mark.where(expires_dead_letters=True)
def test_dead_letters_are_kept_for_their_time_only(make_rig, queue):
    """Dead letters older than `dead_message_ttl` disappear."""
    rig = make_rig(dead_message_ttl=3000)

    @dramatiq.actor(broker=rig.broker, queue_name=queue, max_retries=0)
    def fail():
        raise Broken

    for _ in range(20):
        fail.send()
    with running(rig.broker) as worker:
        eventually(lambda: rig.dead(queue))  # the first ones may be gone before the last ones are there
        rig.drain(queue, worker)

    def gone():
        rig.expire_dead_letters(queue)
        return rig.dead(queue) == 0

    eventually(gone, interval=0.1)


def test_flush_drops_what_is_ready_and_what_is_delayed(rig, broker, actor, queue, broker_kind):
    """After a flush there is nothing left to run or to wait for, and other queues are as they were."""
    other = f"{queue}-other"
    runs = []

    @actor
    def note():
        runs.append(1)

    broker.declare_queue(other)
    broker.enqueue(Message(other, "nobody", (), {}, {}))
    for _ in range(3):
        note.send()
    note.send_with_options(delay=60_000)
    broker.flush(queue)
    if not broker_kind.flush_drops_delayed:
        broker.flush(dq_name(queue))
    rig.expect(queue, waiting=0, delayed=0)
    rig.expect(other, waiting=1)
    broker.join(queue, timeout=30_000)
    with running(broker, queues=[queue]):
        holds(lambda: not runs, 0.1)


def test_flush_all_empties_every_queue(rig, broker, fail, queue):
    """After flush_all no queue has messages or dead letters, and all go on working."""
    other = f"{queue}-other"
    broker.declare_queue(other)
    fail.send()
    with running(broker, queues=[queue]) as worker:
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    broker.enqueue(Message(other, "nobody", (), {}, {}))
    fail.send()
    fail.send_with_options(delay=60_000)
    broker.flush_all()
    for name in (queue, other):
        rig.expect(name, waiting=0, delayed=0, dead=0)

    fail.send()
    with running(broker, queues=[queue]) as worker:
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)


def test_flush_and_dead_letters(rig, broker, fail, queue, broker_kind):
    """Whether `flush` of one queue takes its dead letters along is a trait of the broker."""
    fail.send()
    with running(broker) as worker:
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    broker.flush(queue)
    rig.expect(queue, dead=0 if broker_kind.flush_drops_dead_letters else 1)


def test_join_returns_at_once_when_there_is_nothing(broker, queue):
    """An empty queue is finished. (RabbitMQ's join looks several times, for want of a count of what runs.)"""
    broker.declare_queue(queue)
    before = time.monotonic()
    broker.join(queue, timeout=30_000)
    assert time.monotonic() - before < 15


def test_join_waits_for_ready_messages_and_has_a_timeout(broker, fail, queue):
    """With no worker to run it, a message keeps join waiting until its timeout."""
    fail.send()
    before = time.monotonic()
    with pytest.raises(QueueJoinTimeout):
        broker.join(queue, timeout=200)
    assert 0.19 < time.monotonic() - before < 20


@pytest.mark.where(join_waits_for_running=True)
def test_join_waits_for_running_messages_and_has_a_timeout(rig, broker, actor, queue):
    """A message that an actor is working on is not finished."""
    started, go_on = threading.Event(), threading.Event()

    @actor
    def wait():
        started.set()
        go_on.wait(timeout=30)

    with running(broker):
        wait.send()
        assert started.wait(timeout=30)
        with pytest.raises(QueueJoinTimeout):
            broker.join(queue, timeout=200)
        go_on.set()
        broker.join(queue, timeout=30_000)
