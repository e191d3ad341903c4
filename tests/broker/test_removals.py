"""What is done leaves the stream of its queue: by a purge, one by one above a held floor, and never too early."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter
from contextlib import ExitStack

import dramatiq
import pytest
from dramatiq.errors import QueueJoinTimeout

from dramatiq_jetstream.jetstream import topology
from dramatiq_jetstream.jetstream.inventory import stream_names
from dramatiq_jetstream.testing import NatsServer
from dramatiq_jetstream.worker import removals, settlements
from dramatiq_jetstream.worker.durables import Durables
from dramatiq_jetstream.worker.removals import Removals
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds

ACK_WAIT = 20_000


class Program:
    """A worker program with a short actor and one that waits at a gate, and what they ran."""

    def __init__(self, broker):
        self.broker = broker
        self.gate = threading.Event()
        self.ran = []
        self.began = []
        self.work = dramatiq.actor(self.ran.append, broker=broker, actor_name="work", max_retries=0)
        self.wait = dramatiq.actor(self._wait, broker=broker, actor_name="wait", max_retries=0)
        self.stream = broker.names.queue_stream("default")

    def _wait(self, name):
        self.began.append(name)
        self.gate.wait(60)
        self.ran.append(name)

    def stored(self):
        return self.broker.connection.api(f"STREAM.INFO.{self.stream}")["state"]["messages"]

    def consumer(self):
        return self.broker.connection.api(f"CONSUMER.INFO.{self.stream}.worker")


@pytest.fixture
def program(make_broker):
    programs = []

    def make(*args, **options):
        programs.append(Program(make_broker(*args, **{"ack_wait": ACK_WAIT, **options})))
        return programs[-1]

    yield make
    for each in programs:
        each.gate.set()


remove_singly = Removals._remove_singly


def noted(program):
    """How many messages a program has acked that it has not seen removed."""
    return sum(len(done.sequences) for done in program.broker.in_flight.removals._done.values())


async def nothing(*_):
    """Stands in for the removal above a held floor."""


@pytest.fixture
def leaves_all(monkeypatch):
    """Nothing is removed, as if every process died just after its acks."""
    monkeypatch.setattr(Removals, "_tick", lambda self: None)


def test_what_is_done_leaves_the_stream_and_what_is_not_stays(program):
    """Ready, delayed and periodic messages are nobody's to remove."""
    one = program()
    one.broker.declare_queue("default")
    with running(one.broker):
        for number in range(200):
            one.work.send(number)
        eventually(lambda: len(one.ran) == 200)
        one.work.send_with_options(args=("later",), delay=3_600_000)
        eventually(lambda: one.stored() == 1)
    for number in range(3):
        one.work.send(number)
    assert one.stored() == 4
    assert (one.broker.queue_stats("default").ready, one.broker.queue_stats("default").delayed) == (3, 1)


def test_the_next_worker_removes_what_a_dead_one_left(program, leaves_all, monkeypatch):
    """It has acked nothing itself."""
    dead = program()
    with running(dead.broker):
        for number in range(50):
            dead.work.send(number)
        dead.broker.join("default", timeout=30_000)
    assert dead.stored() == 50
    monkeypatch.undo()
    heir = program()
    with running(heir.broker):
        eventually(lambda: heir.stored() == 0)
    assert heir.ran == []


@pytest.mark.usefixtures("leaves_all")
def test_what_is_done_and_still_there_counts_nowhere(program):
    """Not in counts, not for `join`, not for `status`, and not in what a purge says it has dropped."""
    one = program()
    with running(one.broker):
        done = [one.work.send(number) for number in range(5)]
        one.broker.join("default", timeout=30_000)
    waiting = one.work.send("waiting")
    one.work.send_with_options(args=("later",), delay=3_600_000)
    assert one.stored() == 7
    stats = one.broker.queue_stats("default")
    assert (stats.ready, stats.in_flight, stats.delayed) == (1, 0, 1)
    for message in (done[0], done[0].message_id):
        assert one.broker.status(message).state == "unknown"
    for message in (waiting, waiting.message_id):
        assert one.broker.status(message).state == "waiting"
    assert one.broker.stored_queues.purge("default") == 2
    assert one.stored() == 0


def test_a_message_that_runs_for_long_keeps_no_others_in_the_stream(program):
    """It holds the floor; what is done above it is removed one by one."""
    one = program()
    with running(one.broker, threads=4):
        one.wait.send("long")
        eventually(lambda: one.began == ["long"])
        for number in range(300):
            one.work.send(number)
        eventually(lambda: len(one.ran) == 300)
        eventually(lambda: one.stored() == 1, timeout=15)
        assert one.consumer()["ack_floor"]["stream_seq"] < one.consumer()["delivered"]["stream_seq"]
        one.gate.set()
        eventually(lambda: one.stored() == 0)
    assert one.ran.count("long") == 1


def test_no_purge_delays_what_waits_to_be_delivered_again(program):
    """The server would forget it until its `ack_wait` is over; there is nobody to take it when the others are done."""
    one, other = program(), program()
    one.broker.declare_queue("default")
    messages = [one.work.send(number) for number in range(4)]
    consumer = one.broker.consume("default", prefetch=4, timeout=1_000)
    taken = [next(consumer) for _ in range(4)]
    assert [message.message_id for message in taken] == [message.message_id for message in messages]
    consumer.stop_pulling()
    consumer.ack(taken[0])
    consumer.requeue(taken[1:])
    eventually(lambda: one.consumer()["ack_floor"]["consumer_seq"] == 1)
    holds(lambda: one.stored() == 4, 3.0)
    since = time.monotonic()
    with running(other.broker):
        eventually(lambda: sorted(other.ran) == [1, 2, 3])
        assert time.monotonic() - since < ACK_WAIT / 2000
        eventually(lambda: other.stored() == 0)
    consumer.close()


def test_a_purge_makes_the_server_forget_what_waits_to_be_delivered_again(program):
    """The fact that the caution is for; when this fails, the server has learned better and the caution can go."""
    one, other = program(ack_wait=6_000), program(ack_wait=6_000)
    one.broker.declare_queue("default")
    one.work.send("requeued")
    consumer = one.broker.consume("default", prefetch=1, timeout=1_000)
    message = next(consumer)
    consumer.stop_pulling()
    consumer.requeue([message])
    one.broker.in_flight.flush(2)
    body = {"filter": one.broker.names.task("default"), "seq": message._delivery.sequence}
    one.broker.connection.api(f"STREAM.PURGE.{one.stream}", body)
    with running(other.broker):
        holds(lambda: other.ran == [], 2.0)
        eventually(lambda: other.ran == ["requeued"])
    consumer.close()


def test_under_load_purges_go_out_between_first_deliveries(program, monkeypatch):
    """No request stands while all threads are busy; a message that comes for the first time is the sign."""
    monkeypatch.setattr(removals, "HELD_SECONDS", 60.0)
    one = program()
    one.broker.declare_queue("default")
    pace = threading.Semaphore(0)

    def act(_):
        pace.acquire()

    paced = dramatiq.actor(act, broker=one.broker, actor_name="paced", max_retries=0)
    for number in range(800):
        paced.send(number)
    with running(one.broker, threads=2, prefetch=2):
        for _ in range(200):
            pace.release(2)
            time.sleep(0.02)
        assert one.consumer()["num_pending"] > 0
        assert one.stored() <= 700
        pace.release(800)
        eventually(lambda: one.stored() == 0)


def test_a_consumer_that_is_made_again_runs_nothing_that_was_removed(program):
    """The stream is the note of what is done."""
    one = program()
    with running(one.broker):
        for number in range(100):
            one.work.send(number)
        eventually(lambda: len(one.ran) == 100 and one.stored() == 0)
        one.broker.connection.api(f"CONSUMER.DELETE.{one.stream}.worker")
        one.work.send("new")
        eventually(lambda: "new" in one.ran)
        one.broker.join("default", timeout=30_000)
    assert sorted(map(str, one.ran)) == sorted([*map(str, range(100)), "new"])


def test_what_was_done_in_another_life_of_the_stream_removes_nothing(program, monkeypatch):
    """Its messages may have the places of the old ones."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.ensuring.first_sequence", lambda: 1)
    monkeypatch.setattr(removals, "HELD_SECONDS", 0.0)
    old = program()
    with running(old.broker, threads=4):
        old.wait.send("long")
        eventually(lambda: old.began == ["long"])
        monkeypatch.setattr(Removals, "_remove_singly", nothing)
        for number in range(20):
            old.work.send(number)
        eventually(lambda: len(old.ran) == 20)
        eventually(lambda: any(done.sequences for done in old.broker.in_flight.removals._done.values()))
        old.broker.pause("default")
        old.broker.connection.api(f"STREAM.DELETE.{old.stream}")
        eventually(lambda: old.stream in stream_names(old.broker.connection))
        monkeypatch.setattr(Removals, "_remove_singly", remove_singly)
        old.broker.pause("default")
        names = [f"new {number}" for number in range(30)]
        for name in names:
            old.work.send(name)
        holds(lambda: old.stored() == 30, 2.0)
        old.broker.resume("default")
        eventually(lambda: set(names) <= set(old.ran))
        old.gate.set()


def test_a_process_with_too_much_to_remove_fetches_no_more(program, monkeypatch):
    """What it keeps in mind and what stays on the disk are bounded; it goes on when there is room."""
    monkeypatch.setattr(Removals, "_remove_singly", nothing)
    monkeypatch.setattr(removals, "MOST_DONE", 20)
    one = program()
    with running(one.broker, threads=4):
        one.wait.send("long")
        eventually(lambda: one.began == ["long"])
        sent = 0
        while len(one.ran) == sent and sent < 400:
            one.work.send(sent)
            sent += 1
            time.sleep(0.02)
        assert 20 < len(one.ran) < 400
        monkeypatch.setattr(Removals, "_remove_singly", remove_singly)
        eventually(lambda: len(one.ran) == sent)


def test_without_the_permission_messages_run_and_the_log_says_that_they_stay(tmp_path, make_broker, caplog):
    """Once; and nothing that is done runs again."""
    user = """
authorization { users = [
  { user: all, password: all }
  { user: some, password: some, permissions: { publish: { deny: ["$JS.API.STREAM.PURGE.*"] } } }
] }"""
    with NatsServer(tmp_path / "nats", config=user) as server:
        operator = Program(make_broker(server.url, user="all", password="all"))
        one = Program(make_broker(server.url, user="some", password="some"))
        operator.broker.setup()
        with caplog.at_level(logging.ERROR), running(one.broker):
            for number in range(20):
                one.work.send(number)
            eventually(lambda: len(one.ran) == 20)
            eventually(lambda: "fill the disk" in caplog.text)
            for number in range(20):
                one.work.send(number)
            operator.broker.join("default", timeout=30_000)
        assert operator.stored() == 40
        assert len(one.ran) == 40
        assert caplog.text.count("fill the disk") == 1
        one.broker.close()
        operator.broker.close()


def test_what_was_done_before_an_older_copy_of_the_store_removes_nothing_of_what_was_stored_since(
    own_nats_server, program, monkeypatch, tmp_path
):
    """The copy ends before what is done, and what is new has its places; the message that holds the floor is in it."""
    monkeypatch.setattr(removals, "HELD_SECONDS", 60.0)
    old, new = program(own_nats_server.url), program(own_nats_server.url)
    with running(old.broker, threads=4):
        old.wait.send("long")
        eventually(lambda: old.began == ["long"])
        own_nats_server.stop()
        shutil.copytree(own_nats_server.store_dir, tmp_path / "copy")
        own_nats_server.start()
        for number in range(20):
            old.work.send(number)
        eventually(lambda: noted(old) == 20)
        own_nats_server.kill()
        shutil.rmtree(own_nats_server.store_dir)
        shutil.copytree(tmp_path / "copy", own_nats_server.store_dir)
        monkeypatch.setattr(old.broker.in_flight.durables, "_ask", lambda durable: None)  # it comes back last
        own_nats_server.start()
        new.broker.pause("default")
        names = [f"new {number}" for number in range(20)]
        for name in names:
            new.work.send(name)
        monkeypatch.undo()
        monkeypatch.setattr(removals, "HELD_SECONDS", 0.0)
        holds(lambda: new.stored() == 21, 3.0)
        new.broker.resume("default")
        eventually(lambda: set(names) <= set(old.ran))
        old.gate.set()


def test_what_was_purged_before_its_ack_was_proven_is_not_removed_again(program, monkeypatch):
    """A floor covers acks that no question has followed yet: those of the last half second of each burst."""
    monkeypatch.setattr(removals, "LOOK_SECONDS", 1e9)
    one = program()
    with running(one.broker):
        one.work.send(1)
        eventually(lambda: noted(one) == 1)
        monkeypatch.setattr(settlements, "PROBE_INTERVAL_SECONDS", 5.0)
        one.work.send(2)
        eventually(lambda: one.consumer()["ack_floor"]["consumer_seq"] == 2)
        monkeypatch.setattr(removals, "LOOK_SECONDS", 0.5)
        eventually(lambda: one.stored() == 0 and noted(one) == 0)
        monkeypatch.setattr(removals, "LOOK_SECONDS", 1e9)
        assert one.broker.in_flight.settlements.unproven == 1
        eventually(lambda: one.broker.in_flight.settlements.unproven == 0)
        assert noted(one) == 0


def test_what_others_have_removed_is_no_refusal(program, caplog, monkeypatch):
    """An operator purges a queue above a held floor, for instance."""
    monkeypatch.setattr(removals, "HELD_SECONDS", 3.0)
    one = program()
    with running(one.broker, threads=4), caplog.at_level(logging.ERROR):
        one.wait.send("long")
        eventually(lambda: one.began == ["long"])
        for number in range(20):
            one.work.send(number)
        eventually(lambda: noted(one) == 20)
        last = one.consumer()["delivered"]["stream_seq"]
        for sequence in range(last - 10, last + 1):
            one.broker.connection.api(f"STREAM.MSG.DELETE.{one.stream}", {"seq": sequence})
        eventually(lambda: one.stored() == 1)
        assert "fill the disk" not in caplog.text
        one.gate.set()


def test_messages_whose_consumer_alone_is_missing_count(program):
    """Those of one priority, when its consumer was deleted and the others were not."""
    one = program(max_priority=2)
    one.broker.setup()
    one.work.send_with_options(args=(1,), broker_priority=2)
    one.broker.connection.api(f"CONSUMER.DELETE.{one.stream}.worker-2")
    assert one.broker.queue_stats("default").ready == 1
    with pytest.raises(QueueJoinTimeout):
        one.broker.join("default", timeout=500)
    other = program(max_priority=2)
    with running(other.broker):
        one.broker.join("default", timeout=30_000)
    assert other.ran == [1]


@pytest.fixture
def asked(monkeypatch):
    """Counts what processes ask the server for, by its first words."""
    counts = Counter()
    ask = Durables.ask

    def counting(self, verb, body=None):
        counts[".".join(verb.split(".")[:2])] += 1
        return ask(self, verb, body)

    monkeypatch.setattr(Durables, "ask", counting)
    return counts


def test_many_processes_purge_no_more_often_than_one(program, asked):
    """Each as often as its share of the acks; and what is left when they rest, they remove."""
    programs = [program() for _ in range(5)]
    with ExitStack() as workers:
        for each in programs:
            workers.enter_context(running(each.broker, threads=1))
        until = time.monotonic() + 8.0
        sent = 0
        while time.monotonic() < until:
            programs[0].work.send(sent)
            sent += 1
            time.sleep(0.01)
        purges = asked["STREAM.PURGE"]
        assert sum(len(each.ran) for each in programs) > sent / 2
        # If each did it whenever it knows of something, it would be five times a second, 40 times.
        assert 2 <= purges <= 24
        eventually(lambda: programs[0].stored() == 0)


def test_a_queue_that_removes_with_each_ack_is_not_purged(program, asked):
    """There is nothing to purge, and a purge would delay what was requeued."""
    one = program()
    config = topology.queue(one.broker.names, "default").to_json() | {"retention": "workqueue"}
    one.broker.connection.api(f"STREAM.CREATE.{one.stream}", config)
    with running(one.broker):
        for number in range(30):
            one.work.send(number)
            time.sleep(0.1)
        eventually(lambda: len(one.ran) == 30 and one.stored() == 0)
    assert asked["STREAM.PURGE"] == asked["STREAM.MSG"] == 0
