"""Workers through outages: consumers resume by themselves, and work that is done is not done again."""

from __future__ import annotations

import threading
import time
from collections import Counter

import dramatiq
import pytest

from dramatiq_jetstream.worker.settlements import _Round
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds

ACK_WAIT = 1_000


@pytest.fixture
def fast_fences(monkeypatch):
    """A silent connection is given up after a second or two instead of six."""
    monkeypatch.setattr("dramatiq_jetstream.wire.link.SILENT_FENCES", 2)
    monkeypatch.setattr("dramatiq_jetstream.wire.link.FENCE_SECONDS", 0.3)


@pytest.fixture
def behind(make_broker, proxy, caplog):
    """A broker behind the proxy, with an actor that waits at a gate, and what it wrote down."""
    broker = make_broker(proxy.url, ack_wait=ACK_WAIT)
    gate = threading.Event()
    log = []

    @dramatiq.actor(broker=broker, max_retries=0)
    def work(name):
        log.append(f"began {name}")
        gate.wait(30)
        log.append(f"ended {name}")

    return broker, proxy, work, gate, log


def settled(broker):
    stats = broker.queue_stats("default")
    return stats.ready == stats.in_flight == stats.dead == 0


@pytest.mark.parametrize("outage", ["lose", "deafen", "mute"])
def test_work_that_ends_during_an_outage_is_not_done_again(behind, fast_fences, outage):
    """Its ack, lost with the connection or on a dead one, is sent again, however long the outage was."""
    broker, proxy, work, gate, log = behind
    with running(broker):
        work.send("a")
        eventually(lambda: log == ["began a"])
        {
            "lose": proxy.lose,
            "deafen": lambda: setattr(proxy, "deaf", True),
            "mute": lambda: setattr(proxy, "mute", True),
        }[outage]()
        gate.set()
        eventually(lambda: log == ["began a", "ended a"])
        holds(lambda: len(log) == 2, 1.3 * ACK_WAIT / 1000)
        proxy.restore()
        work.send("b")
        eventually(lambda: "ended b" in log)
        eventually(lambda: settled(broker))
        holds(lambda: len(log) == 4, 0.3)
    assert Counter(log) == Counter(["began a", "ended a", "began b", "ended b"])


def test_work_that_outlives_an_outage_is_not_begun_again(behind):
    """The server has it delivered again after the outage; this process knows that it still runs it."""
    broker, proxy, work, gate, log = behind
    with running(broker):
        work.send("a")
        eventually(lambda: log == ["began a"])
        proxy.lose()
        holds(lambda: len(log) == 1, 1.5 * ACK_WAIT / 1000)
        proxy.restore()
        eventually(lambda: broker.connection.is_connected)
        holds(lambda: len(log) == 1, 1.5 * ACK_WAIT / 1000)
        gate.set()
        eventually(lambda: settled(broker))
    assert log == ["began a", "ended a"]


def test_a_prefetched_message_is_given_away_when_the_outage_is_one_sided(make_broker, behind):
    """Only this worker lost its connection: another one gets its messages, within `ack_wait` of the loss."""
    broker, proxy, work, gate, log = behind
    other = make_broker(ack_wait=ACK_WAIT)
    taken = []
    dramatiq.actor(taken.append, broker=other, actor_name="work")
    with running(broker, threads=1):
        work.send("a")
        eventually(lambda: log == ["began a"])
        proxy.lose()
        lost = time.monotonic()
        with running(other):
            eventually(lambda: taken == ["a"])
            assert time.monotonic() - lost < 20 * ACK_WAIT / 1000
        gate.set()
        proxy.restore()
        eventually(lambda: settled(broker))


def test_consumers_resume_after_the_server_was_killed(own_nats_server, make_broker):
    """Twice killed under load and started again on the same store: every message runs once."""
    broker = make_broker(own_nats_server.url, ack_wait=2_000)
    ran = Counter()
    consumers = []

    @dramatiq.actor(broker=broker)
    def work(number):
        ran[number] += 1

    with running(broker) as worker:
        for outage in range(3):
            broker.enqueue_many([work.message(number) for number in range(outage * 200, outage * 200 + 200)])
            eventually(lambda outage=outage: len(ran) > outage * 200 + 50)
            consumers.append(worker.consumers["default"].consumer)
            if outage < 2:
                own_nats_server.kill()
                own_nats_server.start()
        broker.join("default", timeout=30_000)
    # A killed server forgets the last acks, and that it had delivered those messages; the worker does not.
    assert ran == Counter(range(600))
    assert len({id(consumer) for consumer in consumers}) == 1


def test_acks_that_a_killed_server_had_not_come_to_are_sent_again(own_nats_server, make_broker, monkeypatch):
    """It syncs each ack to disk, so they wait in its memory long after they arrived; what was done stays done."""
    # As if the backlog were ten times as long.
    monkeypatch.setattr("dramatiq_jetstream.worker.settlements.REMEMBER_SECONDS", 0.2)
    monkeypatch.setattr("dramatiq_jetstream.worker.settlements.REMEMBER_MOST", 100)
    monkeypatch.setattr("dramatiq_jetstream.worker.settlements.PROBE_INTERVAL_SECONDS", 0.1)
    broker = make_broker(own_nats_server.url, ack_wait=2_000)
    ran = Counter()

    @dramatiq.actor(broker=broker)
    def work(number):
        ran[number] += 1

    with running(broker):
        broker.enqueue_many([work.message(number) for number in range(6_000)])
        eventually(lambda: len(ran) == 6_000)
        time.sleep(0.7)  # all acks have arrived, and the server has handled only a part of them
        left = broker.queue_stats("default").in_flight
        own_nats_server.kill()
        own_nats_server.start()
        broker.join("default", timeout=60_000)
    assert ran == Counter(range(6_000)), f"{left} were left"
    assert broker.in_flight.settlements.unproven < 6_000


def test_what_is_settled_is_proven_within_seconds(nats_url, make_broker):
    """So that a long-lived worker does not keep a note of every message it ever ran."""
    broker = make_broker(nats_url)
    work = dramatiq.actor(lambda: None, broker=broker, actor_name="work")
    with running(broker):
        broker.enqueue_many([work.message() for _ in range(300)])
        broker.join("default", timeout=30_000)
        eventually(lambda: broker.in_flight.settlements.unproven == 0)


def test_nothing_more_is_asked_for_while_too_many_acks_wait(own_nats_server, make_broker, monkeypatch):
    """A worker faster than the server waits for it, and then goes on."""
    monkeypatch.setattr("dramatiq_jetstream.worker.settlements.MAX_UNPROVEN", 100)
    broker = make_broker(own_nats_server.url)
    ran = []
    most = 0

    def work(number):
        nonlocal most
        most = max(most, broker.in_flight.settlements.unproven)
        ran.append(number)

    actor = dramatiq.actor(work, broker=broker)
    broker.enqueue_many([actor.message(number) for number in range(600)])
    with running(broker):
        eventually(lambda: len(ran) == 600, timeout=60)
    assert sorted(ran) == list(range(600))
    assert 50 < most < 300


def test_nothing_more_is_asked_for_while_the_server_says_nothing_of_acks(nats_url, make_broker, monkeypatch):
    """One whose disk takes long for each; the worker goes on when it has answered."""
    broker = make_broker(nats_url)
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
    with running(broker):
        work.send(1)
        settlements = broker.in_flight.settlements
        eventually(lambda: settlements._books and settlements.unproven == 0)
        ((durable, book),) = settlements._books.items()
        book.since, book.asked = time.monotonic() - 21, _Round()
        assert broker.in_flight.settlements.is_behind(durable)
        broker.enqueue_many([work.message(number) for number in range(100)])
        time.sleep(0.5)
        already = len(ran)
        assert already < 100, "all but what had been asked for already waits"
        book.asked = None
        eventually(lambda: len(ran) == 101)


def test_consumers_resume_after_the_server_was_frozen(own_nats_server, make_broker, fast_fences):
    """SIGSTOP and SIGCONT: the connection is given up, and made again when the server answers."""
    broker = make_broker(own_nats_server.url, ack_wait=ACK_WAIT)
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
    with running(broker):
        work.send(1)
        eventually(lambda: ran == [1])
        own_nats_server.suspend()
        eventually(lambda: not broker.connection.is_connected)
        own_nats_server.resume()
        eventually(lambda: broker.connection.is_connected)
        work.send(2)
        eventually(lambda: ran == [1, 2])
        eventually(lambda: settled(broker))


def test_a_connection_that_is_silently_dead_is_replaced(behind, fast_fences):
    """A firewall that forgot the connection sends nothing: the worker notices, and connects again."""
    broker, proxy, work, gate, log = behind
    gate.set()
    with running(broker):
        work.send("a")
        eventually(lambda: "ended a" in log)
        proxy.strand()
        work.send("b")
        eventually(lambda: "ended b" in log)
        eventually(lambda: settled(broker))
    assert broker.connection.state.reconnects >= 1


@pytest.mark.parametrize(
    "words",
    [b"-ERR 'Maximum Connections Exceeded'\r\n", b"-ERR 'Authorization Violation'\r\n", b"nonsense\r\n"],
    ids=["limit", "authorization", "nonsense"],
)
def test_a_worker_survives_what_ends_a_connection_for_good(behind, words):
    """Whatever the server says, or does not mean to say: a worker that only consumes connects again."""
    broker, proxy, work, gate, log = behind
    gate.set()
    producer = work.message("b")
    with running(broker):
        work.send("a")
        eventually(lambda: "ended a" in log)
        proxy.say(words)
        eventually(lambda: not broker.connection.is_connected)
        eventually(lambda: broker.connection.is_connected)
        broker.enqueue(producer)
        eventually(lambda: "ended b" in log)
        eventually(lambda: settled(broker))


def test_a_worker_that_starts_before_its_server_waits_for_it(own_nats_server, make_broker, monkeypatch):
    """Nothing has to be started in a certain order."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.2)
    own_nats_server.stop()
    broker = make_broker(own_nats_server.url)
    ran = []
    work = dramatiq.actor(ran.append, broker=broker, actor_name="work")
    with running(broker):
        holds(lambda: not broker.connection.is_connected, 0.5)
        own_nats_server.start()
        eventually(lambda: broker.connection.is_connected)
        work.send(1)
        eventually(lambda: ran == [1])


def test_a_worker_can_stop_while_the_server_is_away(behind):
    """A graceful stop waits for the actors, not for a server that does not come back."""
    broker, proxy, work, gate, log = behind
    gate.set()
    with running(broker):
        work.send("a")
        eventually(lambda: "ended a" in log)
        proxy.lose()
        eventually(lambda: not broker.connection.is_connected)
        started = time.monotonic()
    broker.close()
    assert time.monotonic() - started < 20


def test_worker_processes_resume_after_an_outage(own_nats_server, make_fleet):
    """The same with real processes: killed and restarted server, no restart of the workers."""
    fleet = make_fleet(own_nats_server, ack_wait=2_000)
    workers = fleet.start(processes=2, threads=2)
    for number in range(50):
        fleet.send("mark", f"a{number}")
    fleet.wait_for("ran a0")
    own_nats_server.kill()
    own_nats_server.start()
    for number in range(50):
        fleet.send("mark", f"b{number}")
    fleet.broker.join("default", timeout=30_000)
    assert {f"ran {half}{number}" for half in "ab" for number in range(50)} == set(fleet.lines())
    assert workers.running
    assert "Restarting consumer" not in workers.output
