"""A snoozed message waits on the server and runs again, as if its run had not been an attempt."""

from __future__ import annotations

import dramatiq
import pytest
from dramatiq.middleware import Callbacks, Retries
from dramatiq.results import Results

from dramatiq_jetstream import Snooze
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.events import subscription
from dramatiq_jetstream.results import JetStreamBackend
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


def test_a_message_is_snoozed_more_often_than_it_may_be_retried(make_broker):
    """It uses no retry, and has no callback, result or dead letter before it has run."""
    broker = make_broker(middleware=[Retries(max_retries=0), Callbacks()], history="all")
    results = JetStreamBackend(broker)
    broker.add_middleware(Results(backend=results))
    runs, called = [], []

    @dramatiq.actor(broker=broker)
    def told(message, result):
        called.append((message["options"], result))

    @dramatiq.actor(broker=broker, on_success="told", on_failure="told", store_results=True)
    def work(number):
        runs.append(number)
        if len(runs) <= 3:
            raise Snooze(delay=10)
        return "result"

    with running(broker):
        message = work.send(7)
        assert message.get_result(backend=results, block=True, timeout=60_000) == "result"
        eventually(lambda: called, timeout=60)
    assert runs == [7] * 4
    assert called == [({}, "result")]
    assert broker.dead_letters.list() == []
    eventually(lambda: [r.outcome for r in broker.history.of(message.message_id)] == ["done"], timeout=60)


def test_a_snoozed_message_is_an_ordinary_delayed_one(make_broker):
    """It is found by its id, and can be cancelled."""
    broker = make_broker(middleware=[Retries(max_retries=0)])
    ran = []

    @dramatiq.actor(broker=broker)
    def work():
        ran.append(1)
        raise Snooze(delay=3_600_000)

    with running(broker):
        message = work.send()
        eventually(lambda: broker.status(message.message_id).state == "delayed", timeout=60)
    assert broker.cancel(message.message_id) == 1
    assert ran == [1]


def test_an_event_that_is_snoozed_comes_again_as_a_message(service, topic):
    """Its actor gets the same event, and only that actor."""
    got = []

    @dramatiq.actor(broker=service, subscribe=subscription(f"{topic}.a", bytes))
    def listen(event):
        got.append(event)
        if len(got) == 1:
            raise Snooze(delay=10)

    service.setup()
    with running(service):
        service.publish(f"{topic}.a", b"something")
        eventually(lambda: len(got) == 2, timeout=60)
    assert got == [b"something"] * 2


@pytest.mark.parametrize("delay", ["soon", None, True, float("nan"), 10**15])
def test_a_delay_that_cannot_be_used_is_an_error(delay):
    """It is found where it is raised, as an ordinary failure of the actor."""
    with pytest.raises(InvalidOption, match="number of milliseconds"):
        Snooze(delay)
