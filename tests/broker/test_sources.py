"""Every source stands alone, and what a running worker reads is made again when it disappears."""

from __future__ import annotations

import logging

import dramatiq
import pytest

from dramatiq_jetstream.errors import NotFound
from dramatiq_jetstream.events import subscription
from dramatiq_jetstream.jetstream import ensuring, topology
from dramatiq_jetstream.periodic import Periodic, list_schedules
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr("dramatiq_jetstream.jetstream.keeping.RETRY_SECONDS", 0.2)


def noting(broker, name="work", **options):
    """An actor that notes what it was called with."""
    ran = []
    return dramatiq.actor(ran.append, broker=broker, actor_name=name, **options), ran


def exists(broker, stream, durable):
    try:
        return broker.connection.api(f"CONSUMER.INFO.{stream}.{durable}")
    except NotFound:
        return None


def spoil(broker, stream, durable, subject):
    """Make a durable that reads something else than what is declared."""
    config = topology._durable(
        "worker", stream, durable, subject, ack_wait=30_000, max_in_flight=None, replicas=1
    )
    ensuring.ensure_consumer(broker.connection, config)


def complaints(caplog, *words):
    """What was logged as an error about something, each text once for each time."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.ERROR and all(word in record.getMessage() for word in words)
    ]


def test_a_subscription_that_cannot_be_read_stops_nothing_else(service, topic, caplog, short_pauses):
    """Neither the queue's own messages nor another subscription; it is read once it is put right."""
    work, ran = noting(service)
    _, seen = noting(service, "good", subscribe=subscription(f"{topic}.good"))
    _, later = noting(service, "bad", subscribe=subscription(f"{topic}.bad"))
    durable = service.names.subscription_durable("bad")
    ensuring.ensure_stream(service.connection, topology.events(topic, [f"{topic}.>"]))
    spoil(service, topic, durable, f"{topic}.other")
    with running(service):
        work.send(1)
        service.publish(f"{topic}.good", b"2")
        service.publish(f"{topic}.bad", b"3")
        eventually(lambda: ran == [1] and seen == [b"2"])
        eventually(lambda: complaints(caplog, durable, "filter_subject"))
        holds(lambda: len(complaints(caplog, durable)) == 1 and later == [], 1.0)
        service.connection.api(f"CONSUMER.DELETE.{topic}.{durable}")
        eventually(lambda: later == [b"3"])
    assert not complaints(caplog, "Traceback")


def test_a_priority_that_cannot_be_read_stops_no_other_one(make_broker, short_pauses):
    """Higher and lower ones are read as if it had nothing."""
    broker = make_broker(max_priority=3)
    work, ran = noting(broker)
    stream = broker.names.queue_stream("default")
    ensuring.ensure_stream(broker.connection, topology.queue(broker.names, "default"))
    spoil(broker, stream, "worker-2", broker.names.all_delayed("default"))
    for priority in range(4):
        publication = broker._sender._publications.publication(
            work.message_with_options(args=(priority,), broker_priority=priority), None
        )
        broker.connection.publish(publication.subject, publication.payload, publication.headers)
    with running(broker):
        eventually(lambda: sorted(ran) == [0, 1, 3])
        broker.connection.api(f"CONSUMER.DELETE.{stream}.worker-2")
        eventually(lambda: sorted(ran) == [0, 1, 2, 3])


def test_a_queue_that_cannot_be_read_stops_no_schedule_of_another(make_broker, caplog, short_pauses):
    """Each queue's schedules are stored by themselves, at boot and when it is put right."""
    broker = make_broker()
    broker.add_middleware(Periodic())
    noted = []
    for name, queue in (("tick", "good"), ("late", "bad")):
        dramatiq.actor(
            lambda queue=queue: noted.append(queue),
            broker=broker,
            actor_name=name,
            queue_name=queue,
            every=1000,
        )
    bad = broker.names.queue_stream("bad")
    settings = {**topology.queue(broker.names, "bad").settings, "retention": "interest"}
    broker.connection.api(f"STREAM.CREATE.{bad}", {"name": bad, **settings})
    with running(broker):
        eventually(lambda: noted.count("good") >= 2)
        assert complaints(caplog, bad, "retention")
        assert "bad" not in noted
        broker.connection.api(f"STREAM.DELETE.{bad}")
        eventually(lambda: "bad" in noted)


def test_messages_and_ticks_come_again_after_their_stream_was_deleted(make_broker, short_pauses):
    """Also when another program, which knows of no schedule, was the first to make it again."""
    broker, producer = make_broker(), make_broker()
    broker.add_middleware(Periodic())
    noted = []
    dramatiq.actor(lambda: noted.append("tick"), broker=broker, actor_name="tick", every=1000)
    work = dramatiq.actor(lambda: noted.append("work"), broker=broker, actor_name="work")
    with running(broker):
        eventually(lambda: "tick" in noted)
        broker.connection.api(f"STREAM.DELETE.{broker.names.queue_stream('default')}")
        producer.declare_queue("default")
        producer.enqueue(work.message())
        eventually(lambda: "work" in noted)
        noted.clear()
        eventually(lambda: noted.count("tick") >= 2)
    assert [schedule.actor for schedule in list_schedules(broker)] == ["tick"]


def test_a_subscription_is_made_again_with_its_stream(service, topic, short_pauses):
    """Its worker does it, without a restart."""
    _, seen = noting(service, "on_event", subscribe=subscription(f"{topic}.made"))
    work, ran = noting(service)
    with running(service) as worker:
        work.send(1)
        eventually(lambda: ran == [1])
        thread = worker.consumers["default"].consumer
        service.connection.api(f"STREAM.DELETE.{topic}")
        eventually(lambda: exists(service, topic, service.names.subscription_durable("on_event")))
        eventually(lambda: service.connection.api(f"STREAM.INFO.{topic}"))
        service.publish(f"{topic}.made", b"1")
        eventually(lambda: seen == [b"1"])
        assert worker.consumers["default"].consumer is thread


def test_a_worker_that_may_not_declare_names_what_is_missing_and_goes_on(make_broker, caplog, short_pauses):
    """It reads its other queues, and the missing one as soon as it was prepared."""
    operator, broker = make_broker(), make_broker(declare=False)
    first, ran = noting(broker, "first", queue_name="there")
    second, later = noting(broker, "second", queue_name="missing")
    operator.declare_queue("there")
    operator.setup()
    with running(broker):
        first.send(1)
        eventually(lambda: ran == [1])
        stream = broker.names.queue_stream("missing")
        eventually(lambda: complaints(caplog, f"no consumer worker of {stream}", "fleet setup"))
        operator.declare_queue("missing")
        operator.setup()
        second.send(2)
        eventually(lambda: later == [2])
        operator.connection.api(f"CONSUMER.DELETE.{stream}.worker")
        eventually(lambda: len(complaints(caplog, f"no consumer worker of {stream}")) == 2)
        first.send(3)
        eventually(lambda: ran == [1, 3])
        with pytest.raises(NotFound):
            operator.connection.api(f"CONSUMER.INFO.{stream}.worker")


def test_more_replicas_and_a_new_priority_hold_up_neither_boot_nor_enqueue(nats_cluster, make_broker):
    """The stream is still on one server; its new consumer is made there, until `fleet setup --update` copies both."""
    old = make_broker(nats_cluster.urls)
    old.declare_queue("default")
    old.setup()
    broker = make_broker(nats_cluster.urls, replicas=3, max_priority=1)
    work, ran = noting(broker)
    with running(broker):
        work.send(1)
        work.send_with_options(args=(2,), broker_priority=1)
        eventually(lambda: sorted(ran) == [1, 2])
