"""Where Dramatiq's other brokers agree, this one does as they do."""

from __future__ import annotations

import threading
import time

import dramatiq
import pytest
from dramatiq_abort import Abortable, abort
from dramatiq_abort.backends import StubBackend

from dramatiq_jetstream.jetstream.names import HEADER_TICK
from tests.broker.conformance.workers import Recorder, running
from tests.support.polling import eventually


@pytest.mark.parametrize("delay", [-1, -0.5, -600_000])
def test_a_negative_delay_is_over(broker, delay):
    """The message runs at once."""
    ran = []
    work = dramatiq.actor(lambda: ran.append(1), actor_name="work")
    with running(broker):
        work.send_with_options(delay=delay)
        eventually(lambda: ran)
        broker.join("default", timeout=30_000)
    assert ran == [1]


def test_a_retry_with_a_negative_delay_runs_at_once(broker):
    """Of a time that has passed since: no dead letter."""
    ran = []

    @dramatiq.actor(max_retries=3)
    def work():
        ran.append(1)
        if len(ran) < 3:
            raise dramatiq.Retry("once more", delay=-1_000)

    with running(broker):
        work.send()
        eventually(lambda: len(ran) == 3)
        broker.join("default", timeout=30_000)
    assert broker.dead_letters.list() == []


def test_a_broker_that_was_closed_can_be_used_again(make_broker):
    """Sending, batches, events' streams and workers work after `close`, more than once."""
    broker = make_broker()
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
    for number in range(3):
        work.send(number)
        broker.close()
    with running(broker):
        eventually(lambda: sorted(ran) == [0, 1, 2])
    broker.close()
    broker.enqueue_many([work.message(3), work.message(4)])
    with running(broker):
        eventually(lambda: sorted(ran) == [0, 1, 2, 3, 4])
        broker.join("default", timeout=30_000)


def test_a_tick_that_is_skipped_for_its_age_is_no_dead_letter(broker):
    """There is another one; a message that is too old is one, as elsewhere."""
    recorder = Recorder()
    broker.add_middleware(recorder)
    work = dramatiq.actor(lambda: None, actor_name="work", max_age=1)
    broker.setup()
    old = work.message().copy(options={})
    broker.connection.publish(broker.names.task("default"), old.encode(), {HEADER_TICK: "work"})
    message = work.send()
    time.sleep(0.01)  # older than its max_age
    with running(broker):
        (letter,) = eventually(broker.dead_letters.list)
        broker.join("default", timeout=30_000)
    assert letter.message_id == message.message_id
    assert recorder.names().count("after_skip_message") == 2


@pytest.mark.parametrize("options", [{}, {"max_retries": 0}], ids=["with retries", "without"])
def test_an_aborted_message_is_neither_retried_nor_a_dead_letter(broker, options):
    """It is not wanted any more."""
    abortable = Abortable(backend=StubBackend())
    broker.add_middleware(abortable)
    started = threading.Event()
    ran = []

    @dramatiq.actor(min_backoff=1, max_backoff=2, **options)
    def work():
        ran.append(1)
        started.set()
        for _ in range(1_000):
            time.sleep(0.01)

    with running(broker):
        message = work.send()
        assert started.wait(30)
        abort(message.message_id, middleware=abortable)
        broker.join("default", timeout=30_000)
    assert ran == [1]
    assert broker.dead_letters.list() == []
