"""Storing many messages at once: pipelined, or all or none; and groups that profit from it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter

import dramatiq
import pytest
from dramatiq import Message, pipeline
from dramatiq.middleware import GroupCallbacks, Middleware, MiddlewareError
from dramatiq.rate_limits.backends import StubBackend
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend as StubResults

from dramatiq_jetstream import group
from dramatiq_jetstream.errors import (
    BrokerConnectionError,
    InvalidName,
    InvalidOption,
    MessageNotUnique,
    MessageTooLarge,
    NotAllStored,
    StoreFull,
    StoreTimeout,
)
from tests.broker.conformance.workers import Recorder, running
from tests.support.polling import eventually


def messages(count, queue="default", **options):
    return [Message(queue, "work", (number,), {}, dict(options)) for number in range(count)]


def ready(broker, queue="default"):
    return broker.queue_stats(queue).ready


def test_many_messages_are_stored_in_order(broker):
    """All are there when the call returns, in the order in which they were given."""
    ran = []
    dramatiq.actor(ran.append, actor_name="work")
    sent = messages(5_000)
    assert broker.enqueue_many(sent) == sent
    assert ready(broker) == 5_000
    with running(broker, threads=1):
        broker.join("default", timeout=30_000)
    assert ran == list(range(5_000))


def test_many_messages_for_several_queues_and_with_a_delay(broker):
    """Each goes to its own queue, and all wait for the same time."""
    sent = broker.enqueue_many([*messages(5), *messages(7, "other")], delay=60_000)
    assert all(message.options["eta"] > time.time() * 1000 for message in sent)
    assert broker.queue_stats("default").delayed == 5
    assert broker.queue_stats("other").delayed == 7


def test_nothing_is_nothing(broker):
    """No messages is no error, and contacts no server."""
    assert broker.enqueue_many([]) == []
    assert broker.enqueue_many([], atomic=True) == []


@pytest.mark.parametrize("atomic", [False, True])
def test_middleware_hears_of_every_message(broker, atomic):
    """Signals are the same as for messages enqueued one by one."""
    recorder = Recorder()
    broker.add_middleware(recorder)
    for message in broker.enqueue_many(messages(3), atomic=atomic):
        assert recorder.of(message.message_id) == ["before_enqueue", "after_enqueue"]


class Refuse(Middleware):
    """Refuses messages with the argument 2."""

    def before_enqueue(self, broker, message, delay):
        if message.args == (2,):
            raise MiddlewareError("not this one")


def test_a_refusal_by_middleware_stores_nothing_of_an_atomic_batch(broker):
    """A message that middleware refuses is an error before anything is half done."""
    broker.add_middleware(Refuse())
    with pytest.raises(MiddlewareError, match="not this one"):
        broker.enqueue_many(messages(4), atomic=True)
    assert ready(broker) == 0


def test_a_message_that_is_too_large_stores_nothing_of_an_atomic_batch(broker):
    """Sizes are checked before the first is sent."""
    large = Message("default", "work", ("x" * 2_000_000,), {}, {})
    with pytest.raises(MessageTooLarge, match="max_payload"):
        broker.enqueue_many([*messages(3), large], atomic=True)
    broker.declare_queue("default")
    assert ready(broker) == 0


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize(
    ("refused", "error"),
    [
        (Message("default", "work", ("x" * 2_000_000,), {}, {}), MessageTooLarge),
        (Message("default", "work", (object(),), {}, {}), TypeError),
        (Message("default", "work", (2,), {}, {}), MiddlewareError),
        (Message("default", "work", (1,), {}, {"broker_priority": -1}), InvalidOption),
        (Message("default", "work", (1,), {}, {"unique_key": "k", "unique_window": 5}), InvalidOption),
        (Message("q" * 400, "work", (1,), {}, {}), InvalidName),
    ],
    ids=["too large", "not encodable", "by middleware", "priority", "window", "queue name"],
)
def test_one_refused_message_does_not_stop_the_others(make_broker, count, refused, error):
    """The others are stored, and the error says which are, which not, and why."""
    broker = make_broker(max_priority=2)
    broker.add_middleware(Refuse())
    before, after = messages(2), [Message("default", "work", (9,), {}, {}) for _ in range(count)]
    with pytest.raises(error) as raised:
        broker.enqueue_many([*before, refused, *after])
    told = raised.value.__cause__
    assert isinstance(told, NotAllStored)
    assert [m.message_id for m in told.stored] == [m.message_id for m in [*before, *after]]
    assert told.not_stored == [(refused, raised.value)]
    assert told.unknown == []
    assert f"{count + 2} are stored, 1 are not" in str(told)
    eventually(lambda: ready(broker) == count + 2)  # the server counts a moment later


def test_what_was_not_acknowledged_in_a_batch_is_not_known(own_nats_server, make_broker):
    """A server that freezes at the wrong moment: all within one `enqueue_timeout`, and the error says what is open."""
    broker = make_broker(own_nats_server.url, enqueue_timeout=4_000)
    queues = ("other", "third", "fourth", "fifth")
    broker.enqueue_many([*messages(1), *(each for queue in queues for each in messages(1, queue))])
    own_nats_server.suspend()
    began = time.monotonic()
    try:
        with pytest.raises(StoreTimeout) as raised:
            broker.enqueue_many([*messages(40), *(each for queue in queues for each in messages(1, queue))])
        took = time.monotonic() - began
    finally:
        own_nats_server.resume()
    told = raised.value.__cause__
    assert (len(told.stored), len(told.not_stored) + len(told.unknown)) == (0, 44)
    assert len(told.unknown) >= 40
    assert took < 14, "each part had the whole time"


def test_a_group_with_several_delays_has_one_time_in_an_outage(own_nats_server, make_broker):
    """Members that start at different times are stored apart, and do not wait for the server one after the other."""
    broker = make_broker(own_nats_server.url, enqueue_timeout=3_000)
    broker.declare_queue("default")
    broker.setup()
    own_nats_server.suspend()
    began = time.monotonic()
    try:
        with pytest.raises(StoreTimeout):
            group(
                [pipeline(messages(1, delay=60_000 * number), broker=broker) for number in range(1, 7)],
                broker=broker,
            ).run()
        took = time.monotonic() - began
    finally:
        own_nats_server.resume()
    assert took < 14, "each delay had the whole time"


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("way", ["each", "atomic", "group"])
def test_a_stream_that_is_gone_is_made_again(broker, way, count):
    """After its stream was deleted a batch makes the queue again, as a single message does."""
    broker.enqueue_many(messages(1))
    broker.connection.api(f"STREAM.DELETE.{broker.names.queue_stream('default')}")
    if way == "group":
        group(messages(count), broker=broker).run()
    else:
        broker.enqueue_many(messages(count), atomic=way == "atomic")
    assert ready(broker) == count


@pytest.mark.parametrize("count", [1, 2, 1_000])
def test_an_atomic_batch_is_stored_as_a_whole(broker, count):
    """Up to a thousand messages are stored, in their order."""
    broker.enqueue_many(messages(count), atomic=True)
    assert ready(broker) == count
    consumer = broker.consume("default", prefetch=count, timeout=5_000)
    assert [next(consumer).args[0] for _ in range(count)] == list(range(count))
    consumer.close()


def test_a_server_that_is_killed_in_the_middle_of_a_batch_has_all_or_none(own_nats_server, make_broker):
    """The commit is not an instant, but what is there after a crash is a whole batch."""
    broker, witness = (make_broker(own_nats_server.url, enqueue_timeout=2_000) for _ in range(2))
    broker.declare_queue("default")
    broker.setup()
    stream = broker.names.queue_stream("default")

    def stored():
        return witness.connection.api(f"STREAM.INFO.{stream}")["state"]["messages"]

    def enqueue():
        with contextlib.suppress(BrokerConnectionError):  # it may be too late for an answer
            broker.enqueue_many(messages(1_000), atomic=True)

    enqueueing = threading.Thread(target=enqueue)
    enqueueing.start()
    eventually(stored, interval=0)
    own_nats_server.kill()
    own_nats_server.start()
    eventually(lambda: witness.connection.is_connected)
    enqueueing.join(10)
    assert stored() == 1_000


def test_an_atomic_batch_may_be_delayed(broker):
    """Schedules are stored all or none as well."""
    broker.enqueue_many(messages(20), atomic=True, delay=60_000)
    assert broker.queue_stats("default").delayed == 20


@pytest.mark.parametrize(
    "batch",
    [messages(1_001), [*messages(2), *messages(2, "other")], messages(2, unique_key="k")],
    ids=["too many", "two queues", "unique"],
)
def test_what_cannot_be_atomic_is_refused(broker, batch):
    """More than a thousand, several queues, or unique keys: an error that says so, and nothing is stored."""
    with pytest.raises(InvalidOption, match="atomic"):
        broker.enqueue_many(batch, atomic=True)
    for queue in ("default", "other"):
        assert ready(broker, queue) == 0


def test_an_atomic_batch_for_a_full_store_stores_nothing(broker):
    """All or none, also when there is room for some."""
    broker.declare_queue("default")
    broker.setup()
    stream = broker.names.queue_stream("default")
    config = broker.connection.api(f"STREAM.INFO.{stream}")["config"]
    broker.connection.api(f"STREAM.UPDATE.{stream}", {**config, "max_msg_size": 2_000})
    large = Message("default", "work", ("x" * 4_000,), {}, {})
    with pytest.raises((StoreFull, MessageTooLarge)):
        broker.enqueue_many([*messages(3), large], atomic=True)
    assert ready(broker) == 0
    broker.enqueue_many(messages(3), atomic=True)
    assert ready(broker) == 3


def test_the_same_message_twice_is_two_messages(broker):
    """A message id makes no duplicate, in one batch as little as in two."""
    (message,) = messages(1)
    broker.enqueue_many([message, message])
    broker.enqueue_many([message, message], atomic=True)
    assert ready(broker) == 4


def test_unique_messages_of_a_batch_are_told_apart(broker):
    """The second message with a key is refused as if it were alone; what came before it is stored."""
    with pytest.raises(MessageNotUnique):
        broker.enqueue_many(messages(2, unique_key="k"))
    assert ready(broker) == 1


@pytest.fixture
def batches(broker, monkeypatch):
    """The sizes of the batches that were enqueued."""
    sizes = []
    enqueue_many = broker.enqueue_many

    def note(batch, **options):
        batch = list(batch)
        sizes.append(len(batch))
        return enqueue_many(batch, **options)

    monkeypatch.setattr(broker, "enqueue_many", note)
    return sizes


def test_a_group_is_enqueued_as_one_batch(broker, batches):
    """Messages, pipelines and groups inside: everything that starts is stored together."""
    ran = []
    work = dramatiq.actor(lambda *args: ran.append(args) or 0, actor_name="work")
    whole = group(
        [
            work.message("single"),
            pipeline([work.message("first"), work.message("second")]),
            group([work.message("inner")]),
        ]
    )
    assert whole.run() is whole
    assert batches == [3]
    with running(broker):
        broker.join("default", timeout=30_000)
    assert sorted(ran) == [("first",), ("inner",), ("second", 0), ("single",)]


def test_a_group_gathers_results_and_calls_back(broker, batches):
    """Completion callbacks, results and delays are Dramatiq's own."""
    broker.add_middleware(Results(backend=StubResults()))
    broker.add_middleware(GroupCallbacks(StubBackend()))
    done = Counter()
    add = dramatiq.actor(lambda a, b: a + b, actor_name="add", store_results=True)
    finished = dramatiq.actor(lambda: done.update("x"), actor_name="finished")
    sums = group([add.message(1, 2), add.message(3, 4), pipeline([add.message(5, 6), add.message(7)])])
    sums.add_completion_callback(finished.message())
    sums.run(delay=20)
    assert batches == [3]
    with running(broker):
        assert list(sums.get_results(block=True, timeout=5_000)) == [3, 7, 18]
        eventually(lambda: done == {"x": 1})
    assert sums.broker is broker
    assert all(child.broker is broker for child in sums.children if hasattr(child, "broker"))


def test_delays_of_parts_are_kept(broker, batches):
    """A pipeline whose first message has a delay of its own starts after it."""
    work = dramatiq.actor(lambda *args: None, actor_name="work")
    slow = work.message_with_options(args=("slow",), delay=60_000)
    group([work.message("fast"), pipeline([slow, work.message("after")])]).run()
    stats = broker.queue_stats("default")
    assert (stats.ready, stats.delayed) == (1, 1)
    assert sorted(batches) == [1, 1]


def test_a_group_of_another_broker_runs_as_ever(stub_broker):
    """On brokers that are not ours the class is Dramatiq's."""
    ran = []
    work = dramatiq.actor(ran.append, broker=stub_broker, actor_name="work")
    with running(stub_broker):
        group([work.message(1), work.message(2)], broker=stub_broker).run()
        stub_broker.join("default", timeout=30_000)
    assert sorted(ran) == [1, 2]


@pytest.fixture
def stub_broker():
    from dramatiq.brokers.stub import StubBroker

    return StubBroker()
