"""What is kept of answers to deliveries: alone, with a connection that only notes what it is asked to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dramatiq_jetstream.errors import BrokerConnectionError
from dramatiq_jetstream.worker import settlements
from dramatiq_jetstream.worker.durables import Durable, Durables
from dramatiq_jetstream.worker.in_flight import InFlight
from dramatiq_jetstream.worker.removals import Removals
from dramatiq_jetstream.worker.settlements import ACK, NAK, WPI, Settlements, nak_after

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
        self.seconds = seconds
        self.answer = lambda answer=None: over(answer)


class Clock:
    """Seconds that pass when the test says so."""

    now = 1_000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(settlements, "time", clock)
    return clock


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
    return Settlements(connection, doubts.append, Removals(connection, Durables(connection, lambda _: None)))


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


@pytest.mark.parametrize(
    ("delay", "nak"),
    [
        (0, b'-NAK {"delay": 0}'),
        (1, b'-NAK {"delay": 1000000}'),
        (2_500, b'-NAK {"delay": 2500000000}'),
    ],
)
def test_the_delay_of_a_nak_is_said_in_nanoseconds(delay, nak):
    assert nak_after(delay) == nak


def test_what_is_certain_is_sent_at_once(connection, durable, settled):
    settled.send(durable, A, "ack.1", ACK)
    settled.send(durable, B, "ack.2", nak_after(5))
    assert connection.written == [("ack.1", b"+ACK"), ("ack.2", b'-NAK {"delay": 5000000}')]
    assert list(settled.unproven_of(durable)) == [A, B]


def test_settlements_are_counted_over_all_durables_and_rounds(connection, durable, settled):
    other = Durable("other", "worker", 30_000)
    settled.send(durable, A, "ack.1", ACK)
    settled.send(durable, B, "ack.2", NAK)
    connection.tick()
    settled.send(durable, C, "ack.3", ACK)
    settled.send(other, A, "ack.4", ACK)
    assert settled.unproven == 4
    assert list(settled.unproven_of(durable)) == [A, B, C]
    assert list(settled.unproven_of(other)) == [A]


@pytest.mark.parametrize(
    ("certain", "missing", "waits"), [(True, False, False), (False, True, False), (False, False, True)]
)
def test_settlements_wait_for_a_doubt_to_end_unless_their_stream_is_gone(
    durable, settled, certain, missing, waits
):
    durable.certain, durable.missing = certain, missing
    assert settled.waits is False, "nothing was settled yet"
    settled.send(durable, A, "ack.1", ACK)
    assert settled.waits is waits


def test_the_nak_of_what_comes_again_is_dropped_also_after_a_question(connection, durable, settled):
    settled.drop(durable, A)
    settled.send(durable, A, "ack.1", NAK)
    settled.send(durable, B, "ack.2", ACK)
    connection.tick()
    settled.drop(durable, A)
    settled.drop(durable, B)
    assert list(settled.unproven_of(durable)) == [B], "an ack is kept"


def test_a_server_that_is_too_far_behind_is_not_asked_for_more(connection, durable, settled, monkeypatch):
    monkeypatch.setattr(settlements, "MAX_UNPROVEN", 2)
    assert settled.is_behind(durable) is False
    settled.send(durable, A, "ack.1", ACK)
    settled.send(durable, B, "ack.2", ACK)
    assert settled.is_behind(durable) is False
    settled.send(durable, C, "ack.3", ACK)
    assert settled.is_behind(durable) is True
    assert settled.is_behind(Durable("other", "worker", 30_000)) is True, "the bound is the process's"


def test_a_server_that_leaves_a_question_open_for_20_seconds_is_behind(clock, connection, durable, settled):
    settled.send(durable, A, "ack.1", ACK)
    clock.now += 100.0
    assert settled.is_behind(durable) is False, "nothing was asked"
    connection.tick()
    clock.now += 20.0
    assert settled.is_behind(durable) is False
    clock.now += 0.1
    assert settled.is_behind(durable) is True
    assert settled.is_behind(Durable("other", "worker", 30_000)) is False
    connection.answer()
    assert settled.is_behind(durable) is False


def test_a_consumer_is_asked_once_a_second_about_its_latest_ack(
    clock, connection, durable, settled, monkeypatch
):
    monkeypatch.setattr(settlements, "PROBE_INTERVAL_SECONDS", 1.0)
    connection.tick()
    settled.send(durable, A, "ack.1", ACK)
    settled.send(durable, B, "ack.2", ACK)
    settled.send(durable, C, "ack.3", NAK)
    clock.now += 0.9
    connection.tick()
    assert connection.questions == []
    clock.now += 0.1
    connection.tick()
    assert connection.questions == [("ack.2", b"+WPI")]


def test_nothing_is_asked_over_a_connection_that_is_not_open(connection, durable, settled):
    settled.send(durable, A, "ack.1", ACK)
    connection.is_open = False
    connection.tick()
    assert connection.questions == []
    connection.is_open = True
    connection.tick()
    assert connection.questions == [("ack.1", WPI)]


def test_each_durable_is_asked_whatever_the_others_have_to_ask(connection, durable, settled):
    idle, doubted, busy = (Durable(name, "worker", 30_000) for name in ("idle", "doubted", "busy"))
    idle.certain = busy.certain = True
    settled.note_done(idle, A)
    settled.send(durable, A, "ack.1", ACK)
    connection.tick()
    settled.send(doubted, A, "ack.2", ACK)
    settled.send(durable, B, "ack.3", ACK)
    settled.send(busy, A, "ack.4", ACK)
    connection.tick()
    assert connection.questions == [("ack.1", WPI), ("ack.4", WPI)]


def test_a_question_without_a_reply_doubles_the_patience_up_to_eight_minutes(connection, durable, settled):
    seconds = []
    for _ in range(6):
        settled.send(durable, A, "ack.1", ACK)
        connection.tick()
        seconds.append(connection.seconds)
        connection.answer(BrokerConnectionError("none in time"))
        settled.resume(durable, same=True)
    assert seconds == [30.0, 60.0, 120.0, 240.0, 480.0, 480.0]
    connection.tick()
    connection.answer()
    settled.send(durable, B, "ack.2", ACK)
    connection.tick()
    assert connection.seconds == 30.0, "a server that replies is trusted again"


def prove(connection, settled, durable, *keys):
    for key in keys:
        settled.send(durable, key, "ack", ACK)
    connection.tick()
    connection.answer()


def test_a_proven_ack_is_remembered_for_at_least_eight_seconds(clock, connection, durable, settled):
    """The older of two generations is dropped when the newer is eight seconds old."""
    prove(connection, settled, durable, A)
    clock.now += 7.9
    prove(connection, settled, durable, B)
    assert acked(settled, durable, A, B) == [True, True]
    clock.now += 0.1
    prove(connection, settled, durable, C)
    assert acked(settled, durable, A, B, C) == [False, True, True]


def test_more_acks_than_can_be_remembered_are_forgotten_sooner(
    clock, connection, durable, settled, monkeypatch
):
    monkeypatch.setattr(settlements, "REMEMBER_MOST", 2)
    prove(connection, settled, durable, A)
    prove(connection, settled, durable, B)
    assert acked(settled, durable, A, B) == [True, True]
    prove(connection, settled, durable, C)
    assert acked(settled, durable, A, B, C) == [False, True, True]


def test_after_a_doubt_acks_are_remembered_for_two_minutes(clock, connection, durable, settled):
    prove(connection, settled, durable, A)
    settled.send(durable, B, "ack.2", ACK)
    settled.resume(durable, same=False)
    clock.now += 60.0
    settled.note_done(durable, C)
    clock.now += 52.0
    for number in (4, 5):
        prove(connection, settled, durable, ("stream", "worker", number, 1))
    assert acked(settled, durable, A, B, C) == [True, True, True]
    clock.now += 8.0
    prove(connection, settled, durable, ("stream", "worker", 6, 1))
    assert acked(settled, durable, A, B, C) == [False, False, True]


def test_a_doubt_begins_the_two_minutes_again(clock, connection, durable, settled):
    prove(connection, settled, durable, A)
    settled.resume(durable, same=True)
    clock.now += 119.0
    prove(connection, settled, durable, B)
    settled.note_done(durable, A)
    settled.resume(durable, same=True)
    clock.now += 119.0
    prove(connection, settled, durable, C)
    assert acked(settled, durable, A, B) == [True, True]


def test_an_ack_whose_two_minutes_began_again_keeps_no_other_in_memory(clock, connection, durable, settled):
    prove(connection, settled, durable, A, B)
    settled.resume(durable, same=True)
    clock.now += 60.0
    for number in (4, 5):
        prove(connection, settled, durable, ("stream", "worker", number, 1))
        clock.now += 10.0
    settled.send(durable, A, "ack.1", ACK)
    settled.resume(durable, same=True)
    clock.now += 40.0
    prove(connection, settled, durable, C)
    assert acked(settled, durable, A, B, C) == [True, False, True]


def test_what_was_done_in_an_earlier_life_counts_as_acked(durable, settled):
    settled.note_done(durable, A)
    assert acked(settled, durable, A, B) == [True, False]
    assert settled.unproven == 0


def test_a_durable_that_settled_nothing_has_nothing_to_send_again(connection, durable, settled):
    settled.resume(durable, same=True)
    assert connection.written == []
    assert list(settled.unproven_of(durable)) == []
