"""Kinds of actors and encoders: whatever Dramatiq can make of a function runs on every broker."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO, CurrentMessage, TimeLimit, TimeLimitExceeded
from dramatiq.middleware.retries import Retries

from tests.broker.conformance.workers import running
from tests.support.polling import eventually

pytestmark = pytest.mark.where(whole_suite=True)


class Broken(Exception):
    """What the actors of these tests raise."""


@pytest.fixture
def pickled():
    """Pickle as the encoder of all messages."""
    before = dramatiq.get_encoder()
    dramatiq.set_encoder(dramatiq.PickleEncoder())
    yield
    dramatiq.set_encoder(before)


def test_an_actor_is_still_a_function(actor):
    """Calling an actor runs it here and now."""

    @actor
    def add(x, y):
        return x + y

    assert add(1, 2) == 3


def test_a_queue_name_that_dramatiq_refuses_is_refused(broker):
    """Names of queues follow Dramatiq's rules whatever the broker could carry."""
    with pytest.raises(ValueError, match="Queue names"):
        dramatiq.actor(lambda: None, broker=broker, queue_name="$2@!@#")


def test_names_of_queues_and_actors_may_have_dots_and_dashes(rig, broker, queue):
    """What Dramatiq allows in a name works on every broker."""
    name = f"{queue}.with.dots_and-dashes"
    done = threading.Event()

    @dramatiq.actor(broker=broker, queue_name=name, actor_name="an actor: of *any* name > ü")
    def note():
        done.set()

    with running(broker) as worker:
        note.send_with_options(delay=10)
        assert done.wait(timeout=30)
        rig.drain(name, worker)
    rig.expect(name, dead=0)


def test_generic_actors_run(rig, broker, queue):
    """Subclasses of an abstract actor share its settings and run their own code."""
    done = set()

    class Task(dramatiq.GenericActor):
        class Meta:
            abstract = True
            queue_name = queue
            max_retries = 7

        def perform(self, number):
            done.add((type(self).__name__, number))

    class One(Task):
        pass

    class Two(Task):
        pass

    assert One.options["max_retries"] == 7
    with running(broker) as worker:
        One.send(1)
        Two.send(2)
        eventually(lambda: done == {("One", 1), ("Two", 2)})
        rig.drain(queue, worker)


@pytest.fixture
def loops(broker):
    """Room for async actors on the broker under test."""
    broker.add_middleware(AsyncIO())
    broker.add_middleware(CurrentMessage())


@pytest.mark.usefixtures("loops")
def test_async_actors_run_side_by_side(rig, broker, actor, queue):
    """Async actors of several worker threads share an event loop and know their own message."""
    seen = {}
    arrived = []

    @actor
    async def meet(number):
        arrived.append(number)
        while len(arrived) < 3:  # noqa: ASYNC110 - plain polling is all that is needed here
            await asyncio.sleep(0.005)
        seen[number] = CurrentMessage.get_current_message().message_id

    with running(broker) as worker:
        sent = {number: meet.send(number).message_id for number in range(3)}
        eventually(lambda: len(seen) == 3)
        rig.drain(queue, worker)
    assert seen == sent


@pytest.mark.usefixtures("loops")
def test_async_actors_are_retried(rig, broker, actor, queue):
    """An exception of a coroutine fails its message like any other, a TimeoutError too."""
    runs = []

    @actor(max_retries=2, min_backoff=10, max_backoff=20)
    async def work():
        runs.append(1)
        await asyncio.sleep(0)
        raise TimeoutError if len(runs) == 1 else Broken

    with running(broker) as worker:
        work.send()
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert len(runs) == 3


@pytest.mark.where(drops_exceptions=True)
@pytest.mark.usefixtures("loops")
def test_an_exception_of_an_async_actor_does_not_outlive_its_message(rig, broker, actor, queue, caplog):
    """Once a failed message is settled, nothing refers to its exception, not even in a cycle."""
    caplog.set_level(logging.CRITICAL)  # log records would hold the exceptions
    raised = []

    class Heavy(Exception):
        def __init__(self):
            raised.append(weakref.ref(self))

    @actor(max_retries=1, min_backoff=1, max_backoff=2)
    async def work():
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


def test_a_time_limit_cancels_an_async_actor(make_rig, queue):
    """The coroutine of an actor that takes too long is cancelled and may clean up."""
    rig = make_rig(middleware=[TimeLimit(interval=20), AsyncIO(), Retries()])
    rig.broker.emit_after("process_boot")
    cleaned_up = []

    @dramatiq.actor(broker=rig.broker, queue_name=queue, max_retries=0, time_limit=50)
    async def work():
        try:
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.01)
            cleaned_up.append(1)

    errors = []
    rig.broker.add_middleware(_Errors(errors))
    with running(rig.broker) as worker:
        work.send()
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert cleaned_up == [1]
    assert [type(error) for error in errors] == [TimeLimitExceeded]


class _Errors(dramatiq.Middleware):
    def __init__(self, errors):
        self.errors = errors

    def after_process_message(self, broker, message, *, result=None, exception=None):
        self.errors.append(exception)


@pytest.mark.usefixtures("pickled")
def test_pickled_messages_run(rig, broker, actor, queue, broker_kind):
    """The broker stores what the encoder makes, which need not be text; retries and delays included."""
    runs = []

    @actor(max_retries=1, min_backoff=10, max_backoff=20)
    def note(values):
        runs.append(values)
        if len(runs) == 1:
            raise Broken

    with running(broker) as worker:
        note.send_with_options(args=({1, 2, 3},), delay=10)
        eventually(lambda: len(runs) == 2)
        rig.drain(queue, worker)
    assert runs == [{1, 2, 3}] * 2


def test_a_discarded_result_is_worth_a_warning(rig, broker, actor, queue, caplog):
    """A result that is not kept is logged; None, and what goes into a pipeline, is not."""

    @actor
    def quiet(*args):
        return None

    @actor
    def loud():
        return 1

    with caplog.at_level(logging.WARNING, logger="dramatiq"), running(broker) as worker:
        (loud.message() | quiet.message()).run()
        rig.drain(queue, worker)
        assert "has been discarded" not in caplog.text
        loud.send()
        eventually(lambda: "has been discarded" in caplog.text)
        rig.drain(queue, worker)


def test_a_message_of_another_broker_runs_here(rig, broker, actor, queue):
    """A message is data: what was built for an actor elsewhere can be enqueued on this broker."""
    done = []

    @actor
    def note(number):
        done.append(number)

    elsewhere = dramatiq.actor(
        lambda number: None, actor_name="note", broker=StubBroker(), queue_name="somewhere"
    )
    broker.enqueue(elsewhere.message(1).copy(queue_name=queue))
    with running(broker) as worker:
        eventually(lambda: done == [1])
        rig.drain(queue, worker)
