"""Signals to middleware, in order, and what Dramatiq's own middleware does on a broker."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest
from dramatiq.errors import RateLimitExceeded
from dramatiq.middleware import (
    AgeLimit,
    CurrentMessage,
    Middleware,
    MiddlewareError,
)

from tests.broker.conformance.workers import Recorder, running
from tests.support.polling import eventually

pytestmark = pytest.mark.where(whole_suite=True)


class Broken(Exception):
    """What the actors of these tests raise."""


def test_the_life_of_a_message_is_signalled_in_order(rig, broker, actor, queue):
    """Enqueued, processed, acknowledged: each signalled once, before and after."""
    recorder = Recorder()
    broker.add_middleware(recorder)

    @actor
    def work():
        pass

    message = work.send()
    with running(broker) as worker:
        recorder.wait_for("after_ack", message.message_id)
        rig.drain(queue, worker)
    assert recorder.of(message.message_id) == [
        "before_enqueue",
        "after_enqueue",
        "before_process_message",
        "after_process_message",
        "before_ack",
        "after_ack",
    ]


def test_the_end_of_a_failed_message_is_signalled_in_order(rig, broker, actor, queue):
    """A message without retries is processed with an exception, then rejected."""
    recorder = Recorder()
    broker.add_middleware(recorder)

    @actor(max_retries=0)
    def work():
        raise Broken

    message = work.send()
    with running(broker) as worker:
        recorder.wait_for("after_nack", message.message_id)
        rig.drain(queue, worker)
    assert recorder.of(message.message_id)[2:] == [
        "before_process_message",
        "after_process_message",
        "before_nack",
        "after_nack",
    ]


def test_enqueue_signals_carry_message_and_delay(broker, actor, queue):
    """Middleware gets the message that is stored and the delay that was asked for."""
    signals = []

    class Watch(Middleware):
        def before_enqueue(self, broker, message, delay):
            signals.append(("before", message.message_id, delay))

        def after_enqueue(self, broker, message, delay):
            signals.append(("after", message.message_id, delay))

    broker.add_middleware(Watch())

    @actor
    def work():
        pass

    now = work.send()
    later = work.send_with_options(delay=60_000)
    assert signals == [
        ("before", now.message_id, None),
        ("after", now.message_id, None),
        ("before", later.message_id, 60_000),
        ("after", later.message_id, 60_000),
    ]


def test_middleware_may_change_options_before_a_message_is_stored(rig, broker, actor, queue):
    """What before_enqueue writes into the options travels with the message, delayed or not."""

    class Tag(Middleware):
        def before_enqueue(self, broker, message, delay):
            message.options["tag"] = "seen"

    broker.add_middleware(Tag())
    broker.add_middleware(CurrentMessage())
    tags = []

    @actor
    def work():
        tags.append(CurrentMessage.get_current_message().options.get("tag"))

    with running(broker) as worker:
        work.send()
        work.send_with_options(delay=20)
        eventually(lambda: len(tags) == 2)
        rig.drain(queue, worker)
    assert tags == ["seen", "seen"]


def test_middleware_may_refuse_a_message(rig, broker, actor, queue):
    """A MiddlewareError from before_enqueue reaches the sender, and nothing is stored."""

    class Refusal(MiddlewareError):
        pass

    class Refuse(Middleware):
        def before_enqueue(self, broker, message, delay):
            raise Refusal("closed on Sundays")

    @actor
    def work():
        pass

    broker.add_middleware(Refuse())
    with pytest.raises(Refusal):
        work.send()
    rig.expect(queue, waiting=0)


def test_middleware_that_breaks_does_not_stop_a_message(rig, broker, actor, queue):
    """Errors in before_ and after_ signals are logged and passed over."""
    called = set()

    def broken(name):
        def signal(self, broker, *args, **kwargs):
            called.add(name)
            raise Broken

        return signal

    names = [
        f"{when}_{what}" for when in ("before", "after") for what in ("enqueue", "process_message", "ack")
    ]
    done = threading.Event()

    @actor
    def work():
        done.set()

    broker.add_middleware(type("Breaks", (Middleware,), {name: broken(name) for name in names})())
    with running(broker) as worker:
        work.send()
        assert done.wait(timeout=30)
        eventually(lambda: called == set(names))
        rig.drain(queue, worker)
    rig.expect(queue, dead=0)


def test_a_worker_signals_its_start_and_its_end(broker, actor, queue):
    """Worker, consumer threads and worker threads each announce that they begin and end, in this order."""
    recorder = Recorder()

    @actor
    def work():
        pass

    broker.add_middleware(recorder)
    with running(broker, threads=2) as worker:
        eventually(lambda: recorder.names().count("after_worker_thread_boot") == 2)
        consumers = len(worker.consumers)
        eventually(lambda: recorder.names().count("after_consumer_thread_boot") == consumers)
    names = recorder.names()
    for signal, count in {
        "before_worker_boot": 1,
        "after_worker_boot": 1,
        "before_worker_shutdown": 1,
        "after_worker_shutdown": 1,
        "before_worker_thread_shutdown": 2,
        "before_consumer_thread_shutdown": consumers,
    }.items():
        assert names.count(signal) == count, signal
    ends = ["before_worker_shutdown", "before_worker_thread_shutdown", "before_consumer_thread_shutdown"]
    assert [names.index(end) for end in ends] == sorted(names.index(end) for end in ends)
    assert names[-1] == "after_worker_shutdown"


def test_middleware_can_be_put_before_and_after_another(broker):
    """The place of a middleware is given relative to one that is there."""

    class Mine(Middleware):
        pass

    class Other(Middleware):
        pass

    mine, other = Mine(), Other()
    broker.add_middleware(mine, before=AgeLimit)
    broker.add_middleware(other, after=AgeLimit)
    kinds = [type(middleware) for middleware in broker.middleware]
    at = kinds.index(AgeLimit)
    assert (kinds[at - 1], kinds[at + 1]) == (Mine, Other)
    with pytest.raises(ValueError, match="not found"):
        broker.add_middleware(mine, after=Recorder)
    with pytest.raises(AssertionError):
        broker.add_middleware(mine, before=AgeLimit, after=AgeLimit)


def test_a_second_middleware_of_a_kind_is_added_with_a_warning(broker, caplog):
    """Two of a kind are allowed, and worth a warning."""

    class Mine(Middleware):
        pass

    first, second = Mine(), Mine()
    broker.add_middleware(first)
    with caplog.at_level(logging.WARNING):
        broker.add_middleware(second)
    assert {first, second} <= set(broker.middleware)
    assert "same type twice" in caplog.text


def test_the_current_message_is_known_in_the_actor_only(rig, broker, actor, queue):
    """CurrentMessage gives each actor its own message, and nothing outside of actors."""
    broker.add_middleware(CurrentMessage())
    seen = {}

    @actor
    def work(number):
        seen[number] = CurrentMessage.get_current_message().message_id

    with running(broker) as worker:
        sent = {number: work.send(number).message_id for number in range(8)}
        eventually(lambda: len(seen) == 8)
        rig.drain(queue, worker)
    assert seen == sent
    assert CurrentMessage.get_current_message() is None


def test_a_success_callback_gets_message_and_result(rig, broker, actor, queue):
    """`on_success`, given as an actor or by name, is sent the message's data and its result."""
    told = []

    @actor
    def tell(message_data, result):
        told.append((message_data["message_id"], result))

    @actor
    def add(x, y):
        return x + y

    with running(broker) as worker:
        first = add.send_with_options(args=(1, 2), on_success=tell)
        second = add.send_with_options(args=(3, 4), on_success="tell")
        eventually(lambda: len(told) == 2)
        rig.drain(queue, worker)
    assert sorted(told) == sorted([(first.message_id, 3), (second.message_id, 7)])


def test_a_callback_that_is_no_actor_is_refused(actor):
    """A callback is a message to an actor; a plain function cannot be sent one."""

    @actor
    def work():
        pass

    with pytest.raises(TypeError):
        work.send_with_options(on_success=lambda message_data, result: None)


def test_an_exceeded_rate_limit_is_not_logged_as_an_error(rig, broker, actor, queue, caplog):
    """RateLimitExceeded is part of normal life: it fails the message, quietly."""

    @actor(max_retries=0)
    def work():
        raise RateLimitExceeded("slowly")

    with caplog.at_level(logging.DEBUG, logger="dramatiq"), running(broker) as worker:
        work.send()
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert "Rate limit exceeded" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.where(drops_exceptions=True)
def test_an_exception_does_not_outlive_its_message(rig, broker, actor, queue, caplog):
    """Once a failed message is settled, nothing refers to its exception, not even in a cycle."""
    caplog.set_level(logging.CRITICAL)  # log records would hold the exceptions
    raised = []

    class Heavy(Exception):
        def __init__(self):
            raised.append(weakref.ref(self))

    @actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work():
        raise Heavy

    gc.disable()
    try:
        with running(broker, threads=1) as worker:
            work.send()
            eventually(lambda: rig.dead(queue) == 1)
            rig.drain(queue, worker)
            eventually(lambda: [ref() for ref in raised] == [None, None])
    finally:
        gc.enable()
