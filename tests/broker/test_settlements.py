"""What is kept of answers to deliveries: alone, with a connection that only notes what it is asked to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dramatiq_jetstream.errors import BrokerConnectionError
from dramatiq_jetstream.worker import settlements
from dramatiq_jetstream.worker.durables import Durable
from dramatiq_jetstream.worker.in_flight import InFlight
from dramatiq_jetstream.worker.settlements import ACK, NAK, WPI, Settlements

A, B, C = (("stream", "worker", number, 1_700_000_000) for number in (1, 2, 3))


class NotingConnection:
    """Stands in for the connection: the loop that calls back, and a server whose answers the test gives."""

    is_open = True

    def __init__(self):
        self.written = []
        self.questions = []

    def on_tick(self, call):
        self.tick = call

    def on_node_lost(self, call):
        pass

    def on_lost(self, call):
        self.lose = call

    def on_reconnect(self, call):
        self.reconnect = call

    def on_fork(self, call):
        self.fork = call

    def respond(self, subject, payload):
        self.written.append((subject, payload))

    def query(self, subject, payload, over, seconds):
        self.questions.append((subject, payload))
        self.answer = lambda answer=None: over(answer)


@pytest.fixture
def connection(monkeypatch):
    monkeypatch.setattr(settlements, "PROBE_INTERVAL_SECONDS", 0.0)
    return NotingConnection()


@pytest.fixture
def durable():
    """A durable that the server has spoken of."""
    durable = Durable("stream", "worker", 30_000)
    durable.certain, durable.life = True, object()
    return durable


@pytest.fixture
def doubts():
    return []


@pytest.fixture
def settled(connection, doubts):
    return Settlements(connection, doubts.append)


def acked(settled, durable, *keys):
    return [settled.has_acked(durable, key) for key in keys]


def test_what_is_acked_counts_as_acked_before_and_after_its_proof(connection, durable, settled):
    settled.send(durable, A, "ack.1", ACK)
    assert acked(settled, durable, A, B) == [True, False]
    connection.tick()
    assert connection.questions == [("ack.1", WPI)]
    assert acked(settled, durable, A, B) == [True, False]
    assert settled.unproven == 1
    connection.answer()
    assert settled.unproven == 0
    assert acked(settled, durable, A, B) == [True, False]


def test_an_answer_proves_what_was_sent_before_its_question_alone(connection, durable, settled):
    settled.send(durable, A, "ack.1", ACK)
    connection.tick()
    settled.send(durable, B, "ack.2", ACK)
    connection.tick()
    assert len(connection.questions) == 1, "there is one question to a consumer at a time"
    connection.answer()
    assert settled.unproven == 1
    connection.tick()
    assert connection.questions[1:] == [("ack.2", WPI)]


def test_what_is_not_proven_is_sent_again_after_a_reconnect(connection, durable, settled):
    settled.send(durable, A, "ack.1", ACK)
    connection.tick()
    answer_of_before = connection.answer
    settled.send(durable, B, "ack.2", NAK)
    settled.send(durable, C, "ack.3", ACK)
    connection.written.clear()
    settled.resume(durable, same=True)
    assert sorted(connection.written) == [("ack.1", ACK), ("ack.2", NAK), ("ack.3", ACK)]
    connection.tick()
    answer_of_before()
    assert settled.unproven == 3, "what the old connection said is no proof of what was sent over the new one"
    connection.answer()
    assert settled.unproven == 0
    connection.written.clear()
    settled.resume(durable, same=True)
    assert connection.written == []


def test_what_was_given_back_and_comes_again_is_not_given_back_once_more(connection, durable, settled):
    settled.send(durable, A, "ack.1", NAK)
    assert acked(settled, durable, A) == [False]
    settled.drop(durable, A)
    connection.written.clear()
    settled.resume(durable, same=True)
    assert connection.written == []


def test_what_is_held_again_is_given_back_no_more(connection, durable):
    in_flight = InFlight(connection)
    in_flight.settlements.send(durable, A, "ack.1", NAK)
    delivery = SimpleNamespace(key=A, source=SimpleNamespace(durable=durable), ack_subject="ack.2")
    assert in_flight.receive(delivery)
    assert in_flight.settlements.unproven == 0


def test_in_doubt_answers_are_kept_and_sent_when_the_life_goes_on(connection, durable, settled):
    durable.certain = False
    settled.send(durable, A, "ack.1", ACK)
    settled.send(durable, B, "ack.2", NAK)
    connection.tick()
    assert (connection.written, connection.questions) == ([], [])
    durable.certain = True
    settled.resume(durable, same=True)
    assert connection.written == [("ack.1", ACK), ("ack.2", NAK)]


def test_answers_of_a_life_that_is_over_are_dropped_and_what_was_done_is_remembered(
    connection, durable, settled
):
    settled.send(durable, A, "ack.1", ACK)
    connection.tick()
    durable.certain = False
    settled.send(durable, B, "ack.2", ACK)
    settled.send(durable, C, "ack.3", NAK)
    connection.written.clear()
    durable.certain = True
    settled.resume(durable, same=False)
    assert connection.written == []
    assert settled.unproven == 0
    assert acked(settled, durable, A, B, C) == [True, True, False]


def test_a_question_without_an_answer_raises_a_doubt_and_the_next_is_given_more_time(
    connection, durable, doubts, settled
):
    settled.send(durable, A, "ack.1", ACK)
    connection.tick()
    connection.answer(BrokerConnectionError("none in time"))
    assert doubts == [durable]
    assert settled.unproven == 1, "it is no proof"
    settled.resume(durable, same=True)
    assert settled._books[durable].patience == 2 * settlements.PROBE_TIMEOUT_SECONDS


def test_what_is_given_back_is_not_asked_about(connection, durable, settled):
    """A question is an in-progress signal: it would put off the next delivery."""
    settled.send(durable, A, "ack.1", NAK)
    connection.tick()
    assert connection.questions == []
    assert settled.unproven == 0
    assert acked(settled, durable, A) == [False]


def test_what_was_acked_before_a_reconnect_outlasts_the_usual_time(connection, durable, settled, monkeypatch):
    monkeypatch.setattr(settlements, "REMEMBER_SECONDS", 0.0)
    for number, key in enumerate((A, B, C)):
        settled.send(durable, key, f"ack.{number}", ACK)
        connection.tick()
        connection.answer()
        if key == A:
            settled.resume(durable, same=True)
    assert acked(settled, durable, A, B, C) == [True, False, True], "what came last is always remembered"


def test_a_child_of_a_fork_owes_nothing(connection, durable, settled):
    settled.send(durable, A, "ack.1", ACK)
    connection.fork()
    connection.written.clear()
    settled.resume(durable, same=True)
    assert connection.written == []
    assert acked(settled, durable, A) == [False]
