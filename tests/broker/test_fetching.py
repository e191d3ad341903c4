"""What a worker asks its sources for, and what it does about what the server refuses."""

from __future__ import annotations

import json
import time

import dramatiq
import pytest

from dramatiq_jetstream.jetstream import ensuring, topology
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.worker import durables, fetching, heartbeats
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds


def noting(broker, **options):
    ran = []
    return dramatiq.actor(ran.append, broker=broker, actor_name="work", **options), ran


def fetchers_of(broker):
    return eventually(
        lambda: [one for consumer in broker._workplace.consumers._open for one in consumer._puller._fetchers]
    )


def consumer(broker, action, **settings):
    """Create or change the consumer of the queue, as an operator may."""
    names = broker.names
    stream, subject = names.queue_stream("default"), names.task("default")
    if action == "update":
        config = broker.connection.api(f"CONSUMER.INFO.{stream}.worker")["config"]
    else:
        ensuring.ensure_stream(broker.connection, topology.queue(names, "default"))
        config = topology.worker(names, "default", ack_wait=30_000).to_json()
    broker.connection.api(
        f"CONSUMER.CREATE.{stream}.worker.{subject}",
        {"stream_name": stream, "config": {**config, **settings}, "action": action},
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch": 5},
        {"max_expires": 10_000_000_000},
        {"max_expires": 1_500_000_000},
        {"max_bytes": 100_000},
    ],
    ids=str,
)
def test_a_consumer_that_limits_requests_is_read_within_its_limits(make_broker, settings):
    broker = make_broker()
    work, ran = noting(broker)
    for number in range(40):
        work.send(number)
    consumer(broker, "update", **settings)
    with running(broker, threads=8):
        eventually(lambda: sorted(ran) == list(range(40)))
        work.send(40)
        eventually(lambda: 40 in ran)


def test_a_server_that_limits_requests_is_asked_within_its_limits(tmp_path, make_broker, monkeypatch):
    limited = NatsServer._configuration

    def configuration(server):
        return limited(server).replace("jetstream {", "jetstream {\n  limits { max_request_batch: 5 }", 1)

    monkeypatch.setattr(NatsServer, "_configuration", configuration)
    with NatsServer(tmp_path / "nats") as server:
        broker = make_broker(server.url)
        work, ran = noting(broker)
        for number in range(20):
            work.send(number)
        with running(broker, threads=8):
            eventually(lambda: sorted(ran) == list(range(20)))


def test_a_message_larger_than_a_consumer_lets_us_ask_for_is_named(make_broker, caplog, monkeypatch):
    """Once; and it runs when the limit was removed."""
    monkeypatch.setattr(fetching, "REFUSED_PAUSE_SECONDS", 0.2)
    broker = make_broker()
    work, ran = noting(broker)
    work.send("x" * 5_000)
    consumer(broker, "update", max_bytes=1_000)
    with running(broker):
        eventually(lambda: "larger than the 1000 bytes" in caplog.text)
        holds(lambda: caplog.text.count("larger than the 1000 bytes") == 1, 0.5)
        consumer(broker, "update", max_bytes=0)
        eventually(lambda: len(ran) == 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_waiting": 1}, "its max_waiting allows"),
        ({"deliver_subject": "push.here", "max_waiting": 0}, "push based"),
    ],
    ids=["max_waiting", "push"],
)
def test_a_consumer_that_nothing_can_be_fetched_from_is_named_once(
    make_broker, caplog, monkeypatch, settings, said
):
    """Its worker says what to change, and goes on trying."""
    monkeypatch.setattr(fetching, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(fetching, "REFUSED_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(fetching, "HEARTBEAT_SECONDS", 0.4)
    first, second = make_broker(declare=False), make_broker(declare=False)
    consumer(first, "create", **settings)
    noting(first)
    noting(second)
    with running(first):
        fetchers_of(first)
        with running(second):
            eventually(lambda: said in caplog.text)
            holds(lambda: caplog.text.count(said) <= 2, 1.5)


def test_the_worker_and_the_server_agree_on_what_was_asked_for(make_broker, monkeypatch):
    """The server serves requests in turn; after some overlapped and some expired, none is forgotten or made up."""
    monkeypatch.setattr(heartbeats, "EXPIRES_SECONDS", 2.5)
    monkeypatch.setattr(heartbeats, "SPACING_SECONDS", 2.5)
    monkeypatch.setattr(fetching, "HEARTBEAT_SECONDS", 0.5)
    broker = make_broker()
    work, ran = noting(broker)
    stream = broker.names.queue_stream("default")

    def agree():
        info = broker.connection.api(f"CONSUMER.INFO.{stream}.worker")
        pulls = fetchers_of(broker)[0].pulls
        assert info["num_waiting"] == len(pulls)
        return all(pull.left > 0 for pull in pulls)

    with running(broker, threads=8):
        eventually(lambda: fetchers_of(broker)[0].pulls)
        for count in (5, 10, 3):
            for number in range(count):
                work.send(number)
                time.sleep(0.02)  # each fills a part of another request
            eventually(agree)
        eventually(lambda: min(pull.number for pull in fetchers_of(broker)[0].pulls) > 6)
        eventually(agree)
        work.send(0)
        eventually(lambda: len(ran) == 19)
        eventually(agree)


def test_requests_are_bounded_in_bytes(make_broker, monkeypatch):
    """Large messages come in portions, so that they do not fill a narrow link before everything else."""
    broker = make_broker()
    work, ran = noting(broker)
    for _ in range(12):
        work.send("x" * 900_000)
    asked = []
    write = broker.connection.write

    def spy(subject, payload=b"", *rest):
        if ".CONSUMER.MSG.NEXT." in subject:
            asked.append(json.loads(payload))
        write(subject, payload, *rest)

    monkeypatch.setattr(broker.connection, "write", spy)
    with running(broker, threads=8):
        eventually(lambda: len(ran) == 12)
    assert {request["max_bytes"] for request in asked} == {fetching.MAX_BYTES}
    assert len(asked) >= 12 / 2


def test_messages_that_come_after_the_end_of_their_request_are_waited_for(
    nats_cluster, make_broker, monkeypatch
):
    """In a cluster the word that a request is filled overtakes its messages; that is no reason to doubt anything."""
    doubted, overtaken = [], []
    doubt, answered = durables.Durables.doubt, fetching.Fetcher._answered

    def note_doubt(self, durable):
        doubted.append(durable)
        doubt(self, durable)

    def note_answer(self, slot, pull, headers):
        left, before = pull.left, len(doubted)
        answered(self, slot, pull, headers)
        if headers.get("Description") == "Batch Completed":
            overtaken.append((left, pull.left, slot.pull is pull, len(doubted) - before))

    monkeypatch.setattr(durables.Durables, "doubt", note_doubt)
    monkeypatch.setattr(fetching.Fetcher, "_answered", note_answer)
    broker = make_broker(nats_cluster.urls, replicas=3)
    work, ran = noting(broker)
    broker.enqueue_many([work.message(number) for number in range(400)])
    with running(broker):
        eventually(lambda: sorted(ran) == list(range(400)), timeout=60)
        eventually(lambda: all(not pull.ended for pull in fetchers_of(broker)[0].pulls))
    assert overtaken, "the server does not do this any more"
    assert [one for one in overtaken if one[:2] != (one[0], one[0]) or one[2:] != (True, 0)] == []


def test_a_request_that_ended_without_its_messages_is_given_up(make_broker, monkeypatch):
    """They were lost between two nodes, say; others are asked for. It does not count as one that stands meanwhile."""
    monkeypatch.setattr(fetching, "SILENCE_SECONDS", 0.5)
    broker = make_broker()
    work, ran = noting(broker)
    counts = []
    with running(broker):
        fetcher = fetchers_of(broker)[0]
        (opened,) = broker._workplace.consumers._open

        def end():
            before = opened.requests(fetcher.source.durable)
            fetcher._answered(slot, pull, ended)
            counts.append(before - opened.requests(fetcher.source.durable))

        slot = eventually(lambda: next((slot for slot in fetcher._slots if slot.pull is not None), None))
        pull = slot.pull
        ended = {"Status": "409", "Description": "Batch Completed", "Nats-Pending-Messages": "0"}
        broker.connection.post(end)
        eventually(lambda: pull.ended and pull not in fetcher.pulls)
        assert counts == [1]
        eventually(lambda: any(not each.ended for each in fetcher.pulls))
        work.send(1)
        eventually(lambda: ran == [1])


def test_a_leader_that_freezes_and_dies_stops_a_worker_for_seconds(nats_cluster, make_broker, namespace):
    """It takes the questions and acks that it swallowed with it; they go to the new leader, and nothing runs twice."""
    broker = make_broker(nats_cluster.urls, replicas=3)
    broker.declare_queue("default")
    broker.setup()
    stream = broker.names.queue_stream("default")
    victim = nats_cluster.node(broker.connection.api(f"CONSUMER.INFO.{stream}.worker")["cluster"]["leader"])
    others = [node.url for node in nats_cluster.nodes if node is not victim]
    program = make_broker(others, replicas=3, enqueue_timeout=20_000)
    work, ran = noting(program)
    try:
        with running(program):
            program.enqueue_many([work.message(number) for number in range(200)])
            eventually(lambda: len(ran) > 50)
            victim.suspend()
            time.sleep(1.0)  # frozen, and taking what is sent to it
            victim.kill()
            program.enqueue_many([work.message(number) for number in range(200, 300)])
            eventually(lambda: len(set(ran)) == 300, timeout=40)
            eventually(lambda: program.in_flight.settlements.unproven == 0, timeout=40)
    finally:
        victim.start()
    assert sorted(ran) == list(range(300))
