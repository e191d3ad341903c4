"""Events that cannot be read or handled: dead letters, retries and replays reach the one actor they concern."""

from __future__ import annotations

import threading

import dramatiq
import pytest

from dramatiq_jetstream.errors import TopologyMissing
from dramatiq_jetstream.events import current_event, subscription
from dramatiq_jetstream.wire.connection import CoreSubscription
from orders.v1.events_pb2 import OrderCreated
from tests.broker.conformance.workers import running
from tests.broker.services import order, publish_raw, subscribe
from tests.support.polling import eventually, holds


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b'{"order_id": "o-1"}', b"\x9a\x06\x01x"])
def test_an_undecodable_event_is_a_dead_letter_with_its_bytes(service, topic, body):
    """The body as it came, its headers, the actor that could not read it; and the next event is handled."""
    seen = subscribe(service, f"{topic}.created", OrderCreated)
    with running(service):
        publish_raw(service, f"{topic}.created", body, {"traceparent": "00-1-2-01", "ce-id": "e-1"})
        publish_raw(service, f"{topic}.created", order().SerializeToString())
        eventually(lambda: seen)
        (letter,) = eventually(service.dead_letters.list)
    assert (letter.reason, letter.queue, letter.actor, letter.data) == (
        "undecodable",
        "default",
        "handle",
        body,
    )
    assert letter.headers == {"traceparent": "00-1-2-01", "ce-id": "e-1"}
    assert (letter.event.subject, letter.event.sequence) == (f"{topic}.created", 1)
    assert seen == [order()]


def test_a_retry_carries_its_event(service, topic):
    """The second attempt gets the same decoded event and the same headers, from the actor's own queue."""
    seen = []

    @dramatiq.actor(
        broker=service, subscribe=subscription(f"{topic}.created", OrderCreated), min_backoff=1, max_backoff=2
    )
    def handle(event):
        seen.append((event, current_event().headers["ce-id"], current_event().sequence))
        if len(seen) < 3:
            raise RuntimeError("again")

    with running(service):
        publish_raw(service, f"{topic}.created", order().SerializeToString(), {"ce-id": "e-9"})
        eventually(lambda: len(seen) == 3)
        service.join("default", timeout=30_000)
    assert seen == [(order(), "e-9", 1)] * 3
    assert service.dead_letters.list() == []


@pytest.mark.parametrize("retries", [0, 1])
def test_a_replay_reaches_only_the_actor_that_failed(service, topic, retries):
    """Other actors that received the event are not bothered again, whether it died at once or on a retry."""
    seen = subscribe(service, f"{topic}.created", OrderCreated, name="fine")
    broken = True
    tries = []

    @dramatiq.actor(
        broker=service,
        subscribe=subscription(f"{topic}.created", OrderCreated),
        max_retries=retries,
        min_backoff=1,
        max_backoff=2,
    )
    def fails(event):
        tries.append((event, current_event().id))
        if broken:
            raise RuntimeError("broken")

    with running(service):
        service.setup()
        service.publish(f"{topic}.created", order(), event_id="e-1")
        (letter,) = eventually(service.dead_letters.list)
        assert (letter.actor, letter.reason) == ("fails", "retries exhausted")
        assert letter.message_id == "e-1:fails"
        broken = False
        assert service.dead_letters.replay(letter)
        eventually(lambda: len(tries) == retries + 2)
        service.join("default", timeout=30_000)
    assert tries == [(order(), "e-1")] * (retries + 2)
    assert seen == [order()]
    assert service.dead_letters.count() == 0


def test_an_undecodable_event_is_replayed_to_a_mended_actor(make_service, topic):
    """After the fix is deployed, the letter's bytes go through the new decoder."""
    old, new = make_service(), make_service()
    subscribe(old, f"{topic}.created", lambda event: 1 / 0)
    seen = subscribe(new, f"{topic}.created", lambda event: event.data.decode())
    old.setup()
    old.publish(f"{topic}.created", b"v2")
    with running(old):
        (letter,) = eventually(old.dead_letters.list)
        assert "ZeroDivisionError" in letter.error
        assert old.dead_letters.replay(letter)
        (again,) = eventually(lambda: [x for x in old.dead_letters.list() if x.id != letter.id])
    assert [entry["reason"] for entry in again.history] == ["undecodable"]
    assert old.dead_letters.replay(again)
    with running(new):
        new.join("default", timeout=30_000)
    assert seen == ["v2"]


def test_an_event_handed_back_too_often_is_not_poison(make_service, topic):
    """Events of workers that stop before they begin them are handled all the same."""
    publisher = make_service(max_deliveries=2)
    publisher.setup()
    publisher.publish(f"{topic}.created", b"patient", event_id="e-1")
    for _ in range(4):
        broker = make_service(max_deliveries=2)
        subscribe(broker, f"{topic}.created")
        with running(broker, threads=0, prefetch=4):
            eventually(lambda in_flight=broker.in_flight: in_flight.held == 1)
    last = make_service(max_deliveries=2)
    seen = subscribe(last, f"{topic}.created")
    with running(last):
        last.join("default", timeout=30_000)
    assert seen == [b"patient"]
    assert last.dead_letters.list() == []


def test_a_worker_survives_the_loss_of_a_stream_of_events(service, topic, monkeypatch):
    """A stream that is deleted under its workers is made again, with its consumers."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.2)
    seen = subscribe(service, f"{topic}.created")
    with running(service):
        service.setup()
        service.publish(f"{topic}.created", b"1")
        eventually(lambda: seen == [b"1"])
        service.connection.api(f"STREAM.DELETE.{topic}")

        def publish():
            try:
                return service.publish(f"{topic}.created", b"2", event_id="e-2", timeout=800)
            except TopologyMissing:
                return None

        eventually(publish)
        eventually(lambda: seen == [b"1", b"2"])


def test_an_event_that_its_actor_still_handles_is_not_handled_twice(make_service, topic):
    """Long-running handlers keep their event, as they keep a message."""
    busy, idle = make_service(ack_wait=3_000), make_service(ack_wait=3_000)
    release = threading.Event()
    began = []

    def handle(data):
        began.append(data)
        release.wait(30)

    for broker in (busy, idle):
        dramatiq.actor(handle, broker=broker, actor_name="handle", subscribe=subscription(f"{topic}.created"))
    with running(busy):
        busy.publish(f"{topic}.created", b"1")
        eventually(lambda: began)
        with running(idle):
            holds(lambda: len(began) == 1, 6.6)
            release.set()
            busy.join("default", timeout=30_000)
    assert began == [b"1"]


def test_large_events_of_stopping_workers_are_given_back(make_service, topic):
    """What came as often as is allowed is stored again, however large it is, and counts from one."""
    publisher = make_service(max_deliveries=1, ack_wait=1_000)
    publisher.setup()
    publisher.publish(f"{topic}.created", b"x" * 900_000)
    publisher.publish(f"{topic}.created", b"small")
    stopping = make_service(max_deliveries=1, ack_wait=1_000)
    subscribe(stopping, f"{topic}.created")
    with running(stopping, threads=0, prefetch=4):
        eventually(lambda: stopping.in_flight.held == 2)
    assert stopping.in_flight.held == 0
    last = make_service(max_deliveries=1, ack_wait=1_000)
    seen = subscribe(last, f"{topic}.created")
    with running(last):
        eventually(lambda: len(seen) == 2)
    assert sorted(map(len, seen)) == [5, 900_000]
    assert last.dead_letters.list() == []


def test_what_a_stopping_worker_is_still_sent_does_not_count_as_a_try(make_service, topic, monkeypatch):
    """What is given back is stored over another connection, and may come back before the server was told to stop."""
    publisher = make_service(max_deliveries=1)
    publisher.setup()
    publisher.publish(f"{topic}.created", b"small")
    stopping = make_service(max_deliveries=1)
    subscribe(stopping, f"{topic}.created")
    at_once, late, stored = CoreSubscription.withdraw, [], []

    def store(delivery, inner=stopping._workplace.rerouter._store_again):
        stored.append(delivery.stream)
        inner(delivery)
        if len(stored) == 1:
            eventually(lambda: stopping.in_flight.held == 2 or len(stored) == 2)  # it came back
            monkeypatch.setattr(CoreSubscription, "withdraw", at_once)
            for subscription in late:
                subscription.withdraw()

    monkeypatch.setattr(stopping._workplace.rerouter, "_store_again", store)
    consumer = f"CONSUMER.INFO.{stopping.names.queue_stream('default')}.worker"
    with running(stopping, threads=0, prefetch=4):
        eventually(lambda: stopping.in_flight.held == 1)
        eventually(lambda: stopping.connection.api(consumer)["num_waiting"])
        monkeypatch.setattr(CoreSubscription, "withdraw", lambda subscription: late.append(subscription))
    monkeypatch.undo()
    assert len(set(stored)) == 2, "what came back was not stored again"
    last = make_service(max_deliveries=1)
    seen = subscribe(last, f"{topic}.created")
    with running(last):
        eventually(lambda: seen == [b"small"])
        holds(lambda: seen == [b"small"], 0.3)
    assert last.dead_letters.list() == []
