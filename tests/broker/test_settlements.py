"""What is kept of answers to deliveries: alone, with a connection that only notes what it is asked to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dramatiq_jetstream.worker import settlements
from dramatiq_jetstream.worker.ledger import Ledger
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

    def on_reconnect(self, call):
        self.reconnect = call

    def on_fork(self, call):
        self.fork = call

    def write(self, subject, payload):
        self.written.append((subject, payload))

    def query(self, subject, payload, over, seconds):
        self.questions.append((subject, payload))
        self.answer = over


@pytest.fixture
def connection(monkeypatch):
    monkeypatch.setattr(settlements, "PROBE_INTERVAL", 0.0)
    return NotingConnection()


@pytest.fixture
def settled(connection):
    return Settlements(connection)


def acked(settled, *keys):
    return [settled.has_acked("worker", key) for key in keys]


def test_what_is_acked_counts_as_acked_before_and_after_its_proof(connection, settled):
    settled.answer("worker", A, "ack.1", ACK)
    assert acked(settled, A, B) == [True, False]
    connection.tick()
    assert connection.questions == [("ack.1", WPI)]
    assert acked(settled, A, B) == [True, False]
    assert settled.unproven == 1
    connection.answer()
    assert settled.unproven == 0
    assert acked(settled, A, B) == [True, False]


def test_an_answer_proves_what_was_sent_before_its_question_alone(connection, settled):
    settled.answer("worker", A, "ack.1", ACK)
    connection.tick()
    settled.answer("worker", B, "ack.2", ACK)
    connection.tick()
    assert len(connection.questions) == 1, "there is one question to a consumer at a time"
    connection.answer()
    assert settled.unproven == 1
    connection.tick()
    assert connection.questions[1:] == [("ack.2", WPI)]


def test_what_is_not_proven_is_sent_again_after_a_reconnect(connection, settled):
    settled.answer("worker", A, "ack.1", ACK)
    connection.tick()
    answer_of_before = connection.answer
    settled.answer("worker", B, "ack.2", NAK)
    settled.answer("worker", C, "ack.3", ACK)
    connection.written.clear()
    connection.reconnect()
    assert sorted(connection.written) == [("ack.1", ACK), ("ack.2", NAK), ("ack.3", ACK)]
    connection.tick()
    answer_of_before()
    assert settled.unproven == 3, "what the old connection said is no proof of what was sent over the new one"
    connection.answer()
    assert settled.unproven == 0
    connection.written.clear()
    connection.reconnect()
    assert connection.written == []


def test_what_was_given_back_and_comes_again_is_not_given_back_once_more(connection, settled):
    settled.answer("worker", A, "ack.1", NAK)
    assert acked(settled, A) == [False]
    settled.drop("worker", A)
    connection.written.clear()
    connection.reconnect()
    assert connection.written == []


def test_what_is_held_again_is_given_back_no_more(connection):
    ledger = Ledger(connection)
    ledger.settlements.answer("worker", A, "ack.1", NAK)
    delivery = SimpleNamespace(key=A, source=SimpleNamespace(name="worker"), ack_subject="ack.2")
    assert ledger.receive(delivery)
    assert ledger.settlements.unproven == 0


def test_what_is_given_back_is_not_asked_about(connection, settled):
    """A question is an in-progress signal: it would put off the next delivery."""
    settled.answer("worker", A, "ack.1", NAK)
    connection.tick()
    assert connection.questions == []
    assert settled.unproven == 0
    assert acked(settled, A) == [False]


def test_what_was_acked_before_a_reconnect_outlasts_the_usual_time(connection, settled, monkeypatch):
    monkeypatch.setattr(settlements, "REMEMBER", 0.0)
    for number, key in enumerate((A, B, C)):
        settled.answer("worker", key, f"ack.{number}", ACK)
        connection.tick()
        connection.answer()
        if key == A:
            connection.reconnect()
    assert acked(settled, A, B, C) == [True, False, True], "what came last is always remembered"


def test_a_child_of_a_fork_owes_nothing(connection, settled):
    settled.answer("worker", A, "ack.1", ACK)
    connection.fork()
    connection.written.clear()
    connection.reconnect()
    assert connection.written == []
    assert acked(settled, A) == [False]
