"""What calls cost with more of everything: messages are counted at a server on which nothing else happens."""

from __future__ import annotations

import threading

import dramatiq
import pytest
from dramatiq import Message

from dramatiq_jetstream.dead_letters import DeadLetters
from dramatiq_jetstream.jetstream.names import METADATA_SUBSCRIBER
from dramatiq_jetstream.periodic import Periodic, list_schedules
from dramatiq_jetstream.results import JetStreamBackend
from dramatiq_jetstream.testing import NatsServer
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of its own, on which nothing else is counted."""
    with NatsServer(tmp_path_factory.mktemp("costs"), monitor_port=0) as server:
        yield server


def counted(server, direction, call):
    """How many messages the server received or sent during a call."""
    name = f"{direction}_msgs"
    before = server.monitor("/varz")[name]
    call()
    return server.monitor("/varz")[name] - before


def with_events(broker, streams, queue):
    """Make streams of events, and a subscription of an actor of that queue at each."""
    for number in range(streams):
        name = f"EV{broker.names.namespace}{number}"
        broker.connection.api(f"STREAM.CREATE.{name}", {"name": name, "subjects": [f"{name}.>"]})
        config = {
            "durable_name": "reader",
            "ack_policy": "explicit",
            "filter_subject": f"{name}.>",
            "metadata": {METADATA_SUBSCRIBER: broker.names.subscriber(queue)},
        }
        broker.connection.api(
            f"CONSUMER.CREATE.{name}.reader.{name}.>", {"stream_name": name, "config": config}
        )
        broker.connection.publish(f"{name}.happened", b"{}")


def test_counting_all_queues_takes_a_few_requests_for_each(server, make_broker):
    """Twice the queues cost twice the requests, whatever the streams of events; all counts are right."""
    broker, looking = make_broker(server.url), make_broker(server.url, declare=False, middleware=[])
    names = [f"q{number:02}" for number in range(40)]
    for name in names:
        broker.declare_queue(name)
    broker.enqueue_many([Message(name, "actor", (), {}, {}) for name in names for _ in range(3)])
    broker.enqueue_many([Message(name, "actor", (), {}, {}) for name in names], delay=3_600_000)
    with_events(broker, 10, "q01")
    looking.queue_stats("q00")  # the first look subscribes to its answers
    found = []
    half = counted(server, "in", lambda: list(looking.queue_stats_of(names[:20])))
    whole = counted(server, "in", lambda: found.extend(looking.queue_stats_of(names)))
    assert [stats.queue for stats in found] == names
    assert {(stats.ready, stats.delayed, stats.dead) for stats in found if stats.queue != "q01"} == {
        (3, 1, 0)
    }
    assert found[1].ready == 3 + 10
    assert whole - half <= 20 * 5
    assert whole <= 40 * 5 + 30


def test_counting_queues_one_by_one_asks_other_streams_once(server, make_broker, monkeypatch):
    """What other programs have on the server costs nothing for each queue; events are counted as they come."""
    broker, looking = make_broker(server.url), make_broker(server.url, declare=False, middleware=[])
    names = [f"q{number:02}" for number in range(20)]
    for name in names:
        broker.declare_queue(name)
    broker.enqueue_many([Message(name, "actor", (), {}, {}) for name in names])
    with_events(broker, 30, "q01")
    monkeypatch.setattr("dramatiq_jetstream.queues.PLACES_SECONDS", 3600.0)
    assert looking.queue_stats("q01").ready == 1 + 30
    broker.connection.publish(f"EV{broker.names.namespace}7.happened", b"{}")
    asked = counted(server, "in", lambda: [looking.queue_stats(name) for name in names if name != "q01"])
    assert asked <= 19 * 5
    assert looking.queue_stats("q01").ready == 1 + 31


def store_letter(letters: DeadLetters, number: int, data: bytes) -> None:
    letters.store(
        queue="default",
        origin=f"letter-{number}",
        subject="x",
        data=data,
        headers={},
        reason="rejected",
        error="no",
        deliveries=1,
    )


def test_dead_letters_are_listed_in_pages(server, make_broker):
    """Also those whose bodies are stored apart because they leave no room for a letter's headers."""
    broker = make_broker(server.url)
    large = b"x" * (broker.connection.max_payload - 10)
    for number in range(300):
        store_letter(broker.dead_letters, number, large if number % 30 == 0 else b"%d" % number)
    broker.dead_letters.list()  # the first look subscribes to its answers
    found = []
    asked = counted(server, "in", lambda: found.extend(broker.dead_letters.list()))
    assert [letter.data for letter in found] == [
        large if number % 30 == 0 else b"%d" % number for number in range(300)
    ]
    assert asked <= 10
    # The page begins with a letter's body, or between a body and its letter.
    after = broker.dead_letters.list(after=found[89].id, limit=2)
    assert after == found[90:92]
    assert broker.dead_letters.list("default", limit=1) == found[:1]


def test_results_are_announced_to_those_that_wait_for_them(server, make_broker, monkeypatch):
    """Five programs wait for a result each; those of two hundred other messages are sent to none of them."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.wakeups.LOOK_AGAIN_SECONDS", 3600.0)
    storing = JetStreamBackend(make_broker(server.url))
    waiting = [JetStreamBackend(make_broker(server.url)) for _ in range(5)]
    messages = [Message("q", "a", (), {}, {}, message_id=f"m{number}") for number in range(205)]
    storing.store_result(messages[204], 204, 60_000)
    results = {}

    def wait(number: int) -> None:
        results[number] = waiting[number].get_result(messages[number], block=True, timeout=120_000)

    subscribed = server.monitor("/varz")["subscriptions"]
    threads = [threading.Thread(target=wait, args=(number,), daemon=True) for number in range(5)]
    for thread in threads:
        thread.start()
    eventually(lambda: server.monitor("/varz")["subscriptions"] >= subscribed + 5, timeout=30)

    def store() -> None:
        for number in range(5, 205):
            storing.store_result(messages[number], number, 60_000)

    assert counted(server, "out", store) < 2 * 200
    for number in range(5):
        storing.store_result(messages[number], number, 60_000)
    for thread in threads:
        thread.join(30)
    assert results == {number: number for number in range(5)}


def test_schedules_are_looked_at_a_few_times_for_each_queue_at_boot(server, make_broker):
    """A worker of twelve queues with periodic actors does not look into each queue once for every other one."""
    broker, looking = make_broker(server.url), make_broker(server.url)
    broker.add_middleware(Periodic())
    for number in range(12):
        options = {"actor_name": f"a{number}", "queue_name": f"q{number}", "every": 3_600_000}
        dramatiq.actor(lambda: None, broker=broker, **options)
    asked = []

    def heard(question):
        if b"subjects_filter" in question.data and b".cron." in question.data:
            asked.append(question.data)

    looking.connection.subscribe("$JS.API.STREAM.INFO.*", heard)
    with running(broker):
        eventually(lambda: broker.keeper.is_idle, timeout=60)
        eventually(lambda: len(asked) >= 12, timeout=30)
        assert len(asked) <= 5 * 12
    assert len(list_schedules(broker)) == 12
