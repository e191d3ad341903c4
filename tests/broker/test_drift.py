"""Settings on the server that were not declared: what loses messages or holds them up is refused or warned of."""

from __future__ import annotations

import itertools
import json
import queue as queues
import time

import dramatiq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import ApiError, TopologyMismatch
from dramatiq_jetstream.jetstream import drift, ensuring, topology
from dramatiq_jetstream.jetstream.drift import REFUSED, WARNED, Verdict, differences
from dramatiq_jetstream.jetstream.names import Names
from tests.broker.conformance.workers import running

SECOND = 1_000_000_000

#: A foreign value for a queue's stream, and what follows from it. `NS` stands for the namespace.
STREAM = {
    "max_msgs": ({"max_msgs": 3}, REFUSED),
    "max_bytes": ({"max_bytes": 2_000}, REFUSED),
    "max_age": ({"max_age": 2 * SECOND, "duplicate_window": 2 * SECOND}, REFUSED),
    "max_msgs_per_subject": ({"max_msgs_per_subject": 3}, REFUSED),
    "storage": ({"storage": "memory"}, REFUSED),
    "persist_mode": ({"persist_mode": "async", "allow_atomic": False}, REFUSED),
    "no_ack": ({"no_ack": True}, REFUSED),
    "retention": ({"retention": "interest"}, REFUSED),
    "subject_transform": ({"subject_transform": {"src": "NS.q.q.task", "dest": "NS.q.q.else"}}, REFUSED),
    "subjects": ({"subjects": ["NS.q.q.at.>"]}, REFUSED),
    "allow_msg_schedules": ({"allow_msg_schedules": False}, REFUSED),
    "allow_msg_ttl": ({"allow_msg_ttl": False}, REFUSED),
    "consumer_limits": ({"consumer_limits": {"inactive_threshold": 5 * SECOND}}, REFUSED),
    "max_consumers": ({"max_consumers": 1}, WARNED),
    "max_msg_size": ({"max_msg_size": 100_000}, WARNED),
    "duplicate_window": ({"duplicate_window": SECOND}, WARNED),
    "deny_delete": ({"deny_delete": True}, WARNED),
    "subject_delete_marker_ttl": ({"subject_delete_marker_ttl": SECOND}, WARNED),
    "allow_atomic": ({"allow_atomic": False}, WARNED),
    "republish": ({"republish": {"src": "NS.q.q.>", "dest": "NS.copy.>"}}, WARNED),
    "description": ({"description": "the mail queue"}, None),
    "metadata": ({"metadata": {"team": "shop"}}, None),
    "compression": ({"compression": "s2"}, None),
    "allow_direct": ({"allow_direct": True}, None),
    "allow_batched": ({"allow_batched": True}, None),
    "first_seq": ({"first_seq": 5}, None),
}

#: The same for the consumer of its workers.
CONSUMER = {
    "max_deliver": ({"max_deliver": 2}, REFUSED),
    "backoff": ({"backoff": [SECOND]}, REFUSED),
    "headers_only": ({"headers_only": True}, REFUSED),
    "inactive_threshold": ({"inactive_threshold": 5 * SECOND}, REFUSED),
    "filter_subject": ({"filter_subject": "NS.q.q.task.9"}, REFUSED),
    "replay_policy": ({"replay_policy": "original"}, REFUSED),
    "mem_storage": ({"mem_storage": True}, REFUSED),
    "sourcing": ({"sourcing": True}, REFUSED),
    "priority_groups": ({"priority_groups": ["a"], "priority_policy": "overflow"}, REFUSED),
    "push": ({"deliver_subject": "NS.push", "max_waiting": 0}, REFUSED),
    "max_batch": ({"max_batch": 5}, WARNED),
    "max_expires": ({"max_expires": SECOND}, WARNED),
    "max_bytes": ({"max_bytes": 100}, WARNED),
    "max_ack_pending": ({"max_ack_pending": 1}, WARNED),
    "max_waiting": ({"max_waiting": 1}, WARNED),
    "ack_wait": ({"ack_wait": 2 * SECOND}, WARNED),
    "description": ({"description": "the mail workers"}, None),
    "sample_freq": ({"sample_freq": "100%"}, None),
    "pause_until": ({"pause_until": "2001-01-01T00:00:00Z"}, None),
}


def foreign(config, settings, namespace):
    """What an operator or another tool made of a declaration."""
    return {**config.to_json(), **json.loads(json.dumps(settings).replace("NS", namespace))}


def create_consumer(broker, stream, config):
    subject = f"CONSUMER.CREATE.{stream}.{config['name']}"
    if config.get("filter_subject"):
        subject += f".{config['filter_subject']}"
    body = {"stream_name": stream, "config": config, "action": "create"}
    return broker.connection.api(subject, body)["config"]


@pytest.fixture
def fresh(make_broker):
    """Makes brokers that declare one queue with one actor."""

    def fresh(**options):
        broker = make_broker(**options)
        dramatiq.actor(lambda n: None, broker=broker, actor_name="work", queue_name="q")
        return broker

    return fresh


def said_of(caplog, name):
    return [record.getMessage() for record in caplog.records if name in record.getMessage()]


@pytest.mark.parametrize("case", STREAM)
def test_a_foreign_setting_of_a_stream(fresh, caplog, case):
    """`setup` and the first send refuse what loses or holds up messages, and warn of what does other harm."""
    settings, verdict = STREAM[case]
    broker = fresh()
    name = broker.names.queue_stream("q")
    config = foreign(topology.queue(broker.names, "q"), settings, broker.names.namespace)
    broker.connection.api(f"STREAM.CREATE.{name}", config)
    _check(fresh, caplog, broker, f"stream {name}", case, verdict)


def test_a_queue_that_removes_with_each_ack_is_served_as_it_is(fresh, caplog):
    """Queues had work-queue retention once, which the server does not change; what it costs is said once."""
    broker = fresh()
    name = broker.names.queue_stream("q")
    config = foreign(topology.queue(broker.names, "q"), {"retention": "workqueue"}, broker.names.namespace)
    broker.connection.api(f"STREAM.CREATE.{name}", config)
    _check(fresh, caplog, broker, f"stream {name}", "retention", WARNED)
    with running(broker):
        for number in range(20):
            broker.get_actor("work").send(number)
        broker.join("q", timeout=30_000)
    assert broker.connection.api(f"STREAM.INFO.{name}")["state"]["messages"] == 0


@pytest.mark.parametrize("case", CONSUMER)
def test_a_foreign_setting_of_a_consumer(fresh, caplog, case):
    """The same for what stands between a stream and its workers."""
    settings, verdict = CONSUMER[case]
    broker = fresh()
    name = broker.names.queue_stream("q")
    ensuring.ensure_stream(broker.connection, topology.queue(broker.names, "q"))
    declared = topology.worker(broker.names, "q", ack_wait=30_000)
    create_consumer(broker, name, foreign(declared, settings, broker.names.namespace))
    _check(fresh, caplog, broker, f"consumer worker of {name}", case, verdict)


def _check(fresh, caplog, broker, what, case, verdict):
    setting = {"push": "deliver_subject"}.get(case, case)
    if verdict is REFUSED:
        with pytest.raises(TopologyMismatch) as caught:
            broker.setup()
        assert setting in caught.value.differences
        with pytest.raises(TopologyMismatch):
            fresh().get_actor("work").send(1)
        return
    outcome = broker.setup()[what]
    assert outcome == ("unchanged" if verdict is None else "differs")
    said = said_of(caplog, broker.names.queue_stream("q"))
    assert len(said) == (verdict is not None)
    assert all(f"{setting} is" in text for text in said)
    fresh().get_actor("work").send(1)
    assert said_of(caplog, broker.names.queue_stream("q")) == said


@pytest.mark.parametrize(
    "case", [case for case, (_, verdict) in STREAM.items() if verdict and not drift.STREAM[case].fixed]
)
def test_update_ends_a_difference(fresh, case):
    """What can be changed is as declared afterwards; what is of no account stays."""
    if case in ("allow_msg_schedules", "allow_msg_ttl"):
        return  # the server enables these with the declaration as it is
    settings, _ = STREAM[case]
    broker = fresh()
    name = broker.names.queue_stream("q")
    config = foreign(topology.queue(broker.names, "q"), settings, broker.names.namespace)
    broker.connection.api(f"STREAM.CREATE.{name}", {**config, "description": "kept"})
    assert broker.setup(update=True)[f"stream {name}"] == "updated"
    assert broker.setup()[f"stream {name}"] == "unchanged"
    assert broker.connection.api(f"STREAM.INFO.{name}")["config"]["description"] == "kept"


def test_what_the_server_never_changes_is_said(fresh):
    """`--update` does not promise what the server refuses."""
    broker = fresh()
    name = broker.names.queue_stream("q")
    config = {**topology.queue(broker.names, "q").to_json(), "storage": "memory"}
    broker.connection.api(f"STREAM.CREATE.{name}", config)
    with pytest.raises(TopologyMismatch, match=r"storage is 'memory' .* The server cannot change that"):
        broker.setup(update=True)


def test_foreign_settings_of_a_bucket(fresh):
    """Keys that vanish early, or that can never be deleted, are refused like lost messages."""
    for foreign_settings in ({"max_age": SECOND, "duplicate_window": SECOND}, {"storage": "memory"}):
        broker = fresh()
        bucket = broker.bucket(f"b{foreign_settings.get('max_age', 0)}")
        broker.connection.api(
            f"STREAM.CREATE.{bucket.stream}", {**bucket.config.to_json(), **foreign_settings}
        )
        with pytest.raises(TopologyMismatch):
            bucket.put("k", b"v")
        with pytest.raises(TopologyMismatch):
            broker.setup()


def test_every_setting_of_the_server_has_its_row(fresh):
    """What this server reports of streams and consumers is known; a newer server's further settings are not."""
    broker = fresh()
    broker.setup()
    stream = broker.names.queue_stream("q")
    assert set(broker.connection.api(f"STREAM.INFO.{stream}")["config"]) <= set(drift.STREAM)
    assert set(broker.connection.api(f"CONSUMER.INFO.{stream}.worker")["config"]) <= set(drift.CONSUMER)


def test_a_setting_that_a_newer_server_has(fresh):
    """It is warned of while it is on, and found by `fleet doctor` while it is off."""
    config = topology.queue(Names("shop"), "mail")
    existing = {**config.to_json(), "evict_randomly": True, "new_toy": False}
    found = {
        difference.setting: difference.verdict
        for difference in differences("queue", existing, config.to_json())
    }
    assert found == {"evict_randomly": Verdict.UNKNOWN, "new_toy": Verdict.UNKNOWN_OFF}


_numbers = itertools.count()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stream=st.sets(st.sampled_from(sorted(STREAM)), max_size=2),
    consumer=st.sets(st.sampled_from(sorted(CONSUMER)), max_size=2),
)
def test_what_is_accepted_in_silence_loses_and_delays_nothing(nats_url, namespace, stream, consumer):
    """On any mixture of foreign settings that `setup` finds nothing to say of, every message arrives whole."""
    broker = JetStreamBroker(nats_url, namespace=f"{namespace}{next(_numbers)}", enqueue_timeout=3_000)
    try:
        _arrives_or_is_said(broker, stream, consumer)
    finally:
        broker.close()


def _arrives_or_is_said(broker, stream, consumer):
    connection, names = broker.connection, broker.names
    name, subject = names.queue_stream("q"), names.task("q")
    broker.declare_queue("q")
    merged = {key: value for case in stream for key, value in STREAM[case][0].items()}
    merged_consumer = {key: value for case in consumer for key, value in CONSUMER[case][0].items()}
    try:
        connection.api(f"STREAM.CREATE.{name}", foreign(topology.queue(names, "q"), merged, names.namespace))
        declared = topology.worker(names, "q", ack_wait=30_000)
        create_consumer(broker, name, foreign(declared, merged_consumer, names.namespace))
    except ApiError:
        return  # the server does not take that mixture
    harmful = [STREAM[case][1] for case in stream] + [CONSUMER[case][1] for case in consumer]
    try:
        said = "differs" in broker.setup().values()
    except TopologyMismatch:
        said = True
    assert said == any(harmful)
    if said:
        return
    _twenty_arrive(connection, name, "worker", subject)


def _twenty_arrive(connection, stream, durable, subject):
    wanted = {b"message %d" % number for number in range(20)}
    for body in sorted(wanted):
        connection.publish(subject, body)
    arrived: queues.SimpleQueue[bytes] = queues.SimpleQueue()
    inbox = connection.new_inbox()
    subscription = connection.subscribe(inbox, lambda message: message.data and arrived.put(message.data))
    body = json.dumps({"batch": 20, "expires": 10 * SECOND}).encode()
    connection.send(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}", body, reply=inbox)
    deadline = time.monotonic() + 10
    assert {arrived.get(timeout=max(0.1, deadline - time.monotonic())) for _ in wanted} == wanted
    subscription.close()


#: Foreign values for a stream of events, and whether something has to be said of them.
EVENTS = {
    "max_msgs": ({"max_msgs": 3}, True),
    "max_bytes": ({"max_bytes": 1_500}, True),
    "max_age": ({"max_age": SECOND, "duplicate_window": SECOND}, True),
    "max_msgs_per_subject": ({"max_msgs_per_subject": 3}, True),
    "discard": ({"max_msgs": 3, "discard": "new"}, True),
    "storage": ({"storage": "memory"}, True),
    "no_ack": ({"no_ack": True}, True),
    "retention": ({"retention": "interest"}, True),
    "subject_transform": ({"subject_transform": {"src": "NS.ev.a", "dest": "NS.ev.b"}}, True),
    "consumer_limits": ({"consumer_limits": {"inactive_threshold": 5 * SECOND}}, True),
    "deny_purge": ({"deny_purge": True}, True),
    "allow_msg_counter": ({"allow_msg_counter": True}, True),
    "wider": ({"subjects": ["NS.ev.>", "NS.more.>"]}, True),
    "compression": ({"compression": "s2"}, False),
    "allow_msg_ttl": ({"allow_msg_ttl": True}, False),
    "allow_rollup_hdrs": ({"allow_rollup_hdrs": True}, False),
    "description": ({"description": "what happens in the shop"}, False),
}

#: The same for a consumer that an actor subscribes with.
SUBSCRIPTION = {
    "deliver_policy": ({"deliver_policy": "new"}, True),
    "opt_start_seq": ({"deliver_policy": "by_start_sequence", "opt_start_seq": 1_000}, True),
    "last_per_subject": ({"deliver_policy": "last_per_subject"}, True),
    "ack_policy all": ({"ack_policy": "all"}, True),
    "ack_policy none": ({"ack_policy": "none", "max_ack_pending": 0, "ack_wait": 0, "max_deliver": 1}, True),
    "filter_subjects": ({"filter_subject": "", "filter_subjects": ["NS.ev.b", "NS.ev.c"]}, True),
    "headers_only": ({"headers_only": True}, True),
    "max_deliver": ({"max_deliver": 1}, True),
    "inactive_threshold": ({"inactive_threshold": 5 * SECOND}, True),
    "mem_storage": ({"mem_storage": True}, True),
    "replay_policy": ({"replay_policy": "original"}, True),
    "another queue's": ({"metadata": {"dramatiq-subscriber": "else/q"}}, True),
    "sample_freq": ({"sample_freq": "50%"}, False),
    "description": ({"description": "reserves"}, False),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stream=st.sets(st.sampled_from(sorted(EVENTS)), max_size=2),
    consumer=st.sets(st.sampled_from(sorted(SUBSCRIPTION)), max_size=2),
)
def test_events_that_are_accepted_in_silence_arrive(nats_url, namespace, stream, consumer):
    """The same for streams of events, which are often another program's, and for those who subscribe to them."""
    broker = JetStreamBroker(nats_url, namespace=f"{namespace}{next(_numbers)}", enqueue_timeout=3_000)
    names, connection = broker.names, broker.connection
    subject = f"{names.namespace}.ev.a"
    events = topology.events(f"{names.namespace}-ev", [f"{names.namespace}.ev.>"])
    durable = topology.subscription(names, events.name, "on", "q", subject, ack_wait=30_000)
    try:
        merged = [{}, {}]
        for number, (chosen, table) in enumerate(((stream, EVENTS), (consumer, SUBSCRIPTION))):
            for case in sorted(chosen):
                merged[number] |= table[case][0]
        try:
            connection.api(f"STREAM.CREATE.{events.name}", foreign(events, merged[0], names.namespace))
            create_consumer(broker, events.name, foreign(durable, merged[1], names.namespace))
        except ApiError:
            return  # the server does not take that mixture
        outcomes = []
        for ensure in (
            lambda: ensuring.ensure_stream(connection, events),
            lambda: ensuring.ensure_subscription(connection, durable, declared=[durable.name]),
        ):
            try:
                outcomes.append(ensure())
            except TopologyMismatch:
                outcomes.append("refused")
        harmful = any(EVENTS[case][1] for case in stream), any(SUBSCRIPTION[case][1] for case in consumer)
        said = [outcome != "unchanged" for outcome in outcomes]
        assert all(one or not harm for one, harm in zip(said, harmful, strict=True))
        assert any(said) == any(harmful)  # a consumer takes some of its stream's settings over
        if not any(harmful):
            _twenty_arrive(connection, events.name, durable.name, subject)
    finally:
        broker.close()
