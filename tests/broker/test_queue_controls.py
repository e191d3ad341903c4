"""Controls of a whole queue: how much of it runs at once, pause and resume, unique messages, counts."""

from __future__ import annotations

import dataclasses
import threading
import time

import dramatiq
import pytest
from dramatiq import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import BrokerConnectionError, InvalidOption, MessageNotUnique, StoreTimeout
from dramatiq_jetstream.jetstream.reading import parse_time
from dramatiq_jetstream.queues import QueueStats
from tests.broker.conformance.workers import consuming, running
from tests.support.polling import eventually, holds


def test_max_in_flight_holds_for_the_whole_fleet(make_fleet):
    """However many processes and threads there are, no more messages run at once; other queues are free."""
    fleet = make_fleet(max_in_flight={"default": 2})
    fleet.start(processes=2, threads=4)
    names = [f"job{number}" for number in range(5)]
    for name in names:
        fleet.send("hold", name)
    for number in range(3):
        fleet.send("other", f"o{number}", queue="other")
    for number in range(3):
        fleet.wait_for(f"other o{number}")

    def running_now():
        counts = fleet.counts()
        return {name for name in names if counts[f"began {name}"] > counts[f"ended {name}"]}

    most = 0
    for ended in range(len(names)):
        expected = min(2, len(names) - ended)
        eventually(lambda expected=expected: len(running_now()) == expected)
        holds(lambda: len(running_now()) <= 2, 0.2)
        most = max(most, len(running_now()))
        fleet.open(min(running_now()))
    assert most == 2
    fleet.broker.join("default", timeout=30_000)
    assert set(fleet.counts().values()) == {1}


def test_priorities_and_max_in_flight_exclude_each_other():
    """The limit could not hold; that is said when the broker is made."""
    with pytest.raises(InvalidOption, match="max_in_flight and max_priority cannot be used together"):
        JetStreamBroker(max_priority=3, max_in_flight={"default": 2})


@pytest.mark.parametrize("limit", [0, -1, 1.5, "2", True])
def test_a_limit_that_is_none_is_refused(limit):
    """A limit is a whole number from one up."""
    with pytest.raises(InvalidOption, match=r"max_in_flight\['default'\]"):
        JetStreamBroker(max_in_flight={"default": limit})


def test_a_paused_queue_is_not_worked_on_by_anybody(make_broker):
    """What was delivered runs, the rest waits for `resume`; workers that start later wait, too."""
    brokers = [make_broker() for _ in range(2)]
    ran = []
    for broker in brokers:
        dramatiq.actor(ran.append, broker=broker, actor_name="work")
        dramatiq.actor(ran.append, broker=broker, actor_name="free", queue_name="free")
    first, second = brokers
    with running(first):
        first.actors["work"].send("before")
        eventually(lambda: ran == ["before"])
        first.pause("default")
        assert first.is_paused("default")
        assert not first.is_paused("free")
        assert second.queue_stats("default").paused
        for number in range(3):
            second.actors["work"].send(number)
        second.actors["free"].send("free")
        with running(second):
            eventually(lambda: "free" in ran)
            holds(lambda: ran == ["before", "free"], 0.5)
            eventually(lambda: first.queue_stats("default").ready == 3)
            second.resume("default")
            eventually(lambda: len(ran) == 5)
    assert not first.is_paused("default")
    first.resume("default")  # nothing happens


def test_what_waits_for_the_end_of_a_pause_begins_at_once(broker):
    """At every queue of a process, not only at the one whose requests have heartbeats."""
    ran = []
    queues = [f"q{number}" for number in range(6)]
    for queue in queues:
        dramatiq.actor(ran.append, broker=broker, actor_name=f"work-{queue}", queue_name=queue)
    with running(broker) as worker:
        for queue in queues:
            eventually(lambda queue=queue: consuming(worker, queue))
            broker.pause(queue)
            broker.actors[f"work-{queue}"].send(queue)
        holds(lambda: ran == [], 0.3)
        for queue in queues:
            broker.resume(queue)
        eventually(lambda: sorted(ran) == queues, 10)


def test_pausing_before_there_is_anything(broker):
    """A queue can be paused before its first worker, and a queue that is not there is not paused."""
    assert broker.is_paused("nowhere") is False
    broker.declare_queue("default")
    broker.pause("default")
    ran = []
    work = dramatiq.actor(ran.append, actor_name="work")
    work.send(1)
    with running(broker):
        holds(lambda: ran == [], 0.3)
        broker.resume("default")
        eventually(lambda: ran == [1])


@pytest.fixture
def work(broker):
    return dramatiq.actor(lambda *args: None, actor_name="work")


def send(work, key, window=60_000, *, queue="default", **options):
    message = Message(queue, "work", (), {}, {"unique_key": key, "unique_window": window})
    return work.broker.enqueue(message, **options)


def test_the_second_unique_message_is_refused(work, make_broker):
    """Within the window the sender is told; another key, another queue or no key are free."""
    send(work, "report.2026/é *")
    with pytest.raises(MessageNotUnique, match=r"'report\.2026/é \*'.* within the last 60000 ms"):
        send(work, "report.2026/é *")
    with pytest.raises(MessageNotUnique):
        send(work, "report.2026/é *", delay=1_000)
    other = make_broker()
    with pytest.raises(MessageNotUnique):
        other.enqueue(Message("default", "work", (), {}, {"unique_key": "report.2026/é *"}))
    send(work, "report.2027")
    send(work, "report.2026/é *", queue="elsewhere")
    work.send()
    eventually(lambda: work.broker.queue_stats("default").ready == 3)
    eventually(lambda: work.broker.queue_stats("elsewhere").ready == 1)


def test_a_key_is_free_after_its_window(work):
    """The window counts from enqueueing, also when the message has long been done."""
    with running(work.broker):
        send(work, "k", 1_000)
        work.broker.join("default", timeout=30_000)
        with pytest.raises(MessageNotUnique):
            send(work, "k", 1_000)

        def free():
            try:
                return send(work, "k", 1_000)
            except MessageNotUnique:
                return None

        eventually(free)


def test_the_same_message_is_not_its_own_rival(work):
    """A caller that enqueues the same message again, because it was not sure, is not refused."""
    message = work.message_with_options(unique_key="k")
    work.broker.enqueue(message)
    work.broker.enqueue(message)
    eventually(lambda: work.broker.queue_stats("default").ready == 2)


def test_one_of_many_at_once_wins(work):
    """Twenty threads with one key: one message is stored, nineteen are told."""
    outcomes = []

    def attempt():
        try:
            outcomes.append(send(work, "k"))
        except MessageNotUnique as error:
            outcomes.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert len(outcomes) == 20
    assert sum(isinstance(outcome, Message) for outcome in outcomes) == 1
    eventually(lambda: work.broker.queue_stats("default").ready == 1)


def test_a_message_that_was_not_stored_does_not_keep_its_key(work, monkeypatch):
    """After a failed enqueue the next one with the key is the first."""
    with monkeypatch.context() as patch:
        patch.setattr(
            work.broker._sender,
            "_store",
            lambda *_: (_ for _ in ()).throw(BrokerConnectionError("not stored")),
        )
        with pytest.raises(BrokerConnectionError):
            send(work, "k")
    send(work, "k")
    eventually(lambda: work.broker.queue_stats("default").ready == 1)


@pytest.mark.parametrize("who", ["the same caller", "another process"])
@pytest.mark.parametrize("first", ["stored", "not stored"])
def test_a_call_is_safely_repeated_with_its_key_when_it_is_not_known_what_became_of_it(
    own_nats_server, make_broker, monkeypatch, who, first
):
    """The server freezes around the first publish; whatever became of it, the repeated call leaves one message."""
    broker = make_broker(own_nats_server.url, enqueue_timeout=3_000)
    repeating = broker if who == "the same caller" else make_broker(own_nats_server.url)
    broker.declare_queue("default")
    broker.setup()
    publish = broker.connection.publish

    def freeze(subject, *arguments, **options):
        if ".task" not in subject:
            return publish(subject, *arguments, **options)
        monkeypatch.setattr(broker.connection, "publish", publish)
        if first == "stored":
            publish(subject, *arguments, **options)
        raise StoreTimeout("no acknowledgement in time")

    monkeypatch.setattr(broker.connection, "publish", freeze)
    message = Message("default", "work", (1,), {}, {"unique_key": "k"})
    with pytest.raises(StoreTimeout):
        broker.enqueue(message)
    if who == "another process":
        monkeypatch.setattr("dramatiq_jetstream.sending.unique._given_up", [])
        with pytest.raises(MessageNotUnique):  # the first call may be under way still
            repeating.enqueue(dataclasses.replace(message, message_id="again"))
        stream = repeating.bucket("unique").stream
        (entry,) = repeating.bucket("unique").items()

        def time_is_up():
            now = repeating.connection.api(f"STREAM.INFO.{stream}")["ts"]
            return parse_time(now) - entry.created >= 3_000

        eventually(time_is_up)
    again = dataclasses.replace(message, message_id="again")
    if first == "stored":
        with pytest.raises(MessageNotUnique):
            repeating.enqueue(again)
    else:
        repeating.enqueue(again)
    with pytest.raises(MessageNotUnique):
        repeating.enqueue(dataclasses.replace(message, message_id="a third time"))
    assert repeating.queue_stats("default").ready == 1


def test_the_same_message_may_be_repeated_when_it_is_not_known_to_be_stored(work, monkeypatch):
    """A caller that enqueues the very same message again is told that it is stored, and it is there once."""
    broker = work.broker
    store = broker._sender._store

    def lose_the_answer(*arguments):
        store(*arguments)
        raise StoreTimeout("no acknowledgement in time")

    message = work.message_with_options(unique_key="k")
    with monkeypatch.context() as patch:
        patch.setattr(broker._sender, "_store", lose_the_answer)
        with pytest.raises(StoreTimeout):
            broker.enqueue(message)
    broker.enqueue(message)
    assert broker.queue_stats("default").ready == 1


def test_cancel_and_flush_free_the_key(work):
    """What was taken away may be enqueued again; a cancel frees no key of another message."""
    broker = work.broker
    cancelled = send(work, "k", delay=60_000)
    send(work, "other", delay=60_000)
    assert broker.cancel(cancelled.message_id, "default") == 1
    assert broker.cancel(cancelled.message_id, "default") == 0
    send(work, "k")
    with pytest.raises(MessageNotUnique):
        send(work, "other")
    send(work, "k", queue="elsewhere")
    broker.flush("default")
    send(work, "k")
    send(work, "other")
    with pytest.raises(MessageNotUnique):
        send(work, "k", queue="elsewhere")


@pytest.mark.parametrize("window", [0, 999, 1.5, "60", None, True])
def test_a_window_that_is_none_is_refused(work, window):
    """Windows are whole milliseconds, from a second up; nothing is stored."""
    with pytest.raises(InvalidOption, match="unique_window"):
        send(work, "k", window)
    assert work.broker.queue_stats("default").ready == 0


def test_counts_of_a_queue(broker):
    """Ready, in flight, delayed and dead, the age of the oldest ready one, and what was redelivered."""
    release = threading.Event()

    @dramatiq.actor(max_retries=0)
    def work(fail=False):
        if fail:
            raise RuntimeError
        release.wait(30)

    assert broker.queue_stats("nowhere") == QueueStats("nowhere")
    for _ in range(3):
        work.send()
    for _ in range(2):
        work.send_with_options(delay=600_000)
    sent = time.monotonic()
    stats = broker.queue_stats("default")
    assert (stats.ready, stats.in_flight, stats.delayed, stats.dead) == (3, 0, 2, 0)
    eventually(lambda: broker.queue_stats("default").oldest_ready_age >= 200)
    assert broker.queue_stats("default").oldest_ready_age <= (time.monotonic() - sent) * 1000 + 2_000
    with running(broker, threads=1, prefetch=2):
        eventually(lambda: broker.queue_stats("default").in_flight == 2)
        eventually(lambda: broker.queue_stats("default").ready == 1)
        release.set()
        eventually(lambda: broker.queue_stats("default").in_flight == 0)
        work.send(fail=True)
        eventually(lambda: broker.queue_stats("default").dead == 1)
        eventually(lambda: broker.queue_stats("default") == QueueStats("default", delayed=2, dead=1))
    broker.flush("default")
    assert broker.queue_stats("default") == QueueStats("default")


def test_join_waits_for_everything_and_has_a_timeout(broker):
    """Ready, running and delayed messages, and what an actor sends in its turn."""
    ran = []

    @dramatiq.actor
    def work(left):
        ran.append(left)
        if left:
            work.send_with_options(args=(left - 1,), delay=50)

    with running(broker):
        work.send_with_options(args=(3,), delay=50)
        broker.join("default", interval=10, timeout=30_000)
        assert ran == [3, 2, 1, 0]
    work.send(0)
    with pytest.raises(dramatiq.errors.QueueJoinTimeout):
        broker.join("default", interval=10, timeout=100)
    with pytest.raises(dramatiq.errors.QueueNotFound):
        broker.join("nowhere")
