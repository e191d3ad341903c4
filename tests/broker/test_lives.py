"""Answers belong to one life of a stream: those of an earlier one remove nothing from the stream that took its name."""

from __future__ import annotations

import shutil
import threading
from collections import Counter

import dramatiq
import pytest

from dramatiq_jetstream.worker.settlements import ACK, NAK, WPI
from tests.broker.conformance.workers import running
from tests.support.polling import eventually, holds

ACK_WAIT = 3_000


@pytest.fixture
def _same_sequences(monkeypatch):
    """Streams begin at one, as those that other programs make, so that a new life has the sequences of the old."""
    monkeypatch.setattr("dramatiq_jetstream.jetstream.ensuring.first_sequence", lambda: 1)


class Program:
    """A worker program whose actor waits at a gate, and what it ran."""

    def __init__(self, make_broker, url):
        self.broker = make_broker(url, ack_wait=ACK_WAIT)
        self.gate = threading.Event()
        self.began = []
        self.ended = []

        @dramatiq.actor(broker=self.broker, actor_name="work", max_retries=0)
        def work(name):
            self.began.append(name)
            self.gate.wait(60)
            self.ended.append(name)

        self.work = work

    def send(self, *names):
        for name in names:
            self.work.send(name)

    @property
    def stream(self):
        return self.broker.names.queue_stream("default")

    def stored(self):
        return self.broker.connection.api(f"STREAM.INFO.{self.stream}")["state"]["messages"]

    def in_flight(self):
        return self.broker.connection.api(f"CONSUMER.INFO.{self.stream}.worker")["num_ack_pending"]

    def life(self):
        return self.broker.in_flight.durables.get(self.stream, "worker", ACK_WAIT).life

    def finish(self, *names):
        """Let the actors end, and wait until the server has all that is said of them."""
        self.gate.set()
        eventually(lambda: set(names) <= set(self.ended))
        eventually(lambda: self.broker.in_flight.held == 0)
        self.broker.in_flight.flush(2)


@pytest.fixture
def program(own_nats_server, make_broker):
    programs = []

    def make():
        programs.append(Program(make_broker, own_nats_server.url))
        return programs[-1]

    yield make
    for each in programs:
        each.gate.set()


def delete(server, program):
    program.broker.connection.api(f"STREAM.DELETE.{program.stream}")


def empty(server, program):
    server.stop()
    shutil.rmtree(server.store_dir / "jetstream")
    server.start()


@pytest.mark.usefixtures("_same_sequences")
@pytest.mark.parametrize("lose", [delete, empty])
@pytest.mark.parametrize("prefetched", [0, 3], ids=["a pull stands", "no pull stands"])
def test_acks_of_a_stream_that_is_gone_remove_nothing_from_its_successor(
    own_nats_server, program, lose, prefetched
):
    """Its messages have the same sequences; those that another worker has begun must outlive its kill."""
    old, new = program(), program()
    names = [f"old {number}" for number in range(1 + prefetched)]
    with running(old.broker, threads=1, prefetch=1):
        old.send(*names)
        eventually(lambda: old.began == ["old 0"])
        life = old.life()
        lose(own_nats_server, old)
        eventually(lambda: old.life() is not life)
        fresh = [f"new {number}" for number in range(4)]
        # As many as the sequences that the old messages had; begun by whichever worker, ended by none.
        with running(new.broker, threads=8):
            new.send(*fresh)
            eventually(lambda: old.stored() == old.in_flight() == 4)
            eventually(lambda: old.life() not in (None, life))
            old.gate.set()
            eventually(lambda: names[0] in old.ended)
            # What of them this worker took is done as well, by itself.
            mine = [name for name in fresh if name not in new.began]
            eventually(lambda: set(mine) <= set(old.ended))
            eventually(lambda: old.broker.in_flight.held == 0)
            old.broker.in_flight.flush(2)
            eventually(lambda: old.stored() == 4 - len(mine))
            holds(lambda: old.stored() == 4 - len(mine), 0.5)
            new.gate.set()
            eventually(lambda: set(fresh) - set(mine) <= set(new.ended))
            eventually(lambda: old.stored() == 0)
    assert Counter(old.ended + new.ended)["new 0"] == 1


def test_acks_of_an_outage_remove_nothing_from_an_older_copy_of_the_store(own_nats_server, program, tmp_path):
    """The copy ends before the messages that run; what is stored since has their sequences."""
    old, new = program(), program()
    old.broker.setup()
    own_nats_server.stop()
    shutil.copytree(own_nats_server.store_dir, tmp_path / "copy")
    own_nats_server.start()
    with running(old.broker, threads=4):
        old.send("a", "b", "c", "d")
        eventually(lambda: len(old.began) == 4)
        created = old.broker.connection.api(f"CONSUMER.INFO.{old.stream}.worker")["created"]
        life = old.life()
        own_nats_server.stop()
        old.finish("a", "b", "c", "d")
        shutil.rmtree(own_nats_server.store_dir)
        shutil.copytree(tmp_path / "copy", own_nats_server.store_dir)
        old.gate.clear()
        own_nats_server.start()
        eventually(lambda: new.broker.connection.is_connected or new.broker.connection.connect() or True)
        with running(new.broker, threads=4):
            new.send("e", "f", "g", "h")
            eventually(lambda: old.life() not in (None, life))
            assert old.broker.connection.api(f"CONSUMER.INFO.{old.stream}.worker")["created"] == created
            eventually(lambda: len(old.began) + len(new.began) == 8)
            old.broker.in_flight.flush(2)
            assert old.stored() == 4
            old.gate.set()
            new.gate.set()
            eventually(lambda: old.stored() == 0)
    assert sorted(old.ended + new.ended) == list("abcdefgh")


def test_acks_of_an_outage_are_sent_when_the_stream_is_the_same(own_nats_server, program):
    """What was stored meanwhile, and by others, is no reason to do work twice."""
    old, other = program(), program()
    with running(old.broker, threads=4):
        old.send("a", "b", "c")
        eventually(lambda: len(old.began) == 3)
        life = old.life()
        own_nats_server.kill()
        old.finish("a", "b", "c")
        own_nats_server.start()
        other.send("d")
        eventually(lambda: "d" in old.ended)
        eventually(lambda: old.stored() == 0)
        holds(lambda: old.began == ["a", "b", "c", "d"], 1.0)
        assert old.life() is life


def test_what_is_done_is_acked_when_a_consumer_alone_was_made_again(own_nats_server, program):
    """The stream's messages are the same, so the new consumer delivers them once more; they do not run again."""
    old = program()
    with running(old.broker, threads=2):
        old.send("a", "b")
        eventually(lambda: len(old.began) == 2)
        life = old.life()
        old.broker.connection.api(f"CONSUMER.DELETE.{old.stream}.worker")
        eventually(lambda: old.life() not in (None, life))
        old.finish("a", "b")
        eventually(lambda: old.stored() == 0)
        holds(lambda: len(old.began) == 2, 0.5)


@pytest.mark.usefixtures("_same_sequences")
def test_no_answer_of_an_earlier_life_leaves_the_process(own_nats_server, program, monkeypatch):
    """Neither acks nor what gives back or prolongs: all of them would be taken for another message."""
    old = program()
    with running(old.broker, threads=1, prefetch=4):
        old.send("a", "b", "c", "d")
        eventually(lambda: old.began == ["a"] and old.broker.in_flight.held == 4)
        life = old.life()
        delete(own_nats_server, old)
        eventually(lambda: old.life() is not life)
        written = []
        write = old.broker.connection.write
        monkeypatch.setattr(
            old.broker.connection,
            "write",
            lambda subject, payload=b"", *rest: (written.append(payload), write(subject, payload, *rest)),
        )
        holds(lambda: not {ACK, NAK, WPI} & set(written), 1.3 * ACK_WAIT / 3000)
        old.gate.set()
    assert not {ACK, NAK, WPI} & set(written)
    assert old.broker.in_flight.held == 0


@pytest.mark.usefixtures("_same_sequences")
def test_what_was_held_over_a_close_is_not_answered_in_another_life(own_nats_server, program):
    """A broker may be used again after `close`; its stream may be another one by then."""
    old, new = program(), program()
    old.send("a")
    consumer = old.broker.consume("default", prefetch=1, timeout=10_000)
    message = next(consumer)
    assert message is not None
    old.broker.close()
    delete(own_nats_server, new)
    with running(new.broker, threads=1):
        new.send("b")
        eventually(lambda: new.began == ["b"])
        old.send("c")  # it is open again, with what the old life left
        consumer.ack(message)
        eventually(
            lambda: old.broker.in_flight.held == old.broker.in_flight.settlements.unproven == 0, timeout=20
        )
        assert new.stored() == 2
        new.gate.set()
        eventually(lambda: new.stored() == 0)


@pytest.mark.parametrize("answer", [ACK, NAK], ids=bytes.decode)
def test_an_answer_that_was_under_way_meets_no_message_of_the_next_life(program, answer):
    """It left before the stream was deleted, and arrives when others run what took its name."""
    old, new = program(), program()
    old.send("a", "b")
    consumer = old.broker.consume("default", prefetch=2, timeout=10_000)
    messages = [next(consumer), next(consumer)]
    assert all(messages)
    under_way = [message._delivery.ack_subject for message in messages]
    delete(None, new)
    with running(new.broker, threads=2):
        new.send("c", "d")
        eventually(lambda: set(new.began) == {"c", "d"})
        for ack_subject in under_way:
            # Answered: the server has come to it.
            new.broker.connection.request(ack_subject, answer, patient=False)
        assert new.stored() == new.in_flight() == 2
        new.gate.set()
        eventually(lambda: new.stored() == 0)
    assert sorted(new.began) == ["c", "d"]
    consumer.close()
