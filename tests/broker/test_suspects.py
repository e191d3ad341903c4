"""Which message killed its worker: what counts its starts, who starts alone, and what is held against none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import ApiError, BrokerConnectionError, PermissionDenied, QueueNotFound
from dramatiq_jetstream.kv import Entry
from dramatiq_jetstream.worker import suspects as module
from dramatiq_jetstream.worker.suspects import BUCKET, Suspects

WEEK_MS = 604_800_000


class Clock:
    """Seconds that pass when the test says so."""

    now = 1_000.0

    def monotonic(self):
        return self.now


class KeptInMemory:
    """Stands in for the bucket of starts; `error` is what the server refuses everything with."""

    def __init__(self):
        self.values = {}
        self.ttls = set()
        self.error = None

    def get(self, key):
        if self.error is not None:
            raise self.error
        value = self.values.get(key)
        return None if value is None else Entry(key, value, 1, 0)

    def put(self, key, value, *, ttl):
        self.values[key] = value
        self.ttls.add(ttl)


class Coming(SimpleNamespace):
    """A delivery, as far as it matters here."""

    def __str__(self):
        return f"Message {self.origin}"


def coming(origin="a", deliveries=1):
    return Coming(origin=origin, deliveries=deliveries)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def bucket():
    return KeptInMemory()


@pytest.fixture
def suspects(clock, bucket):
    return Suspects(BrokerConfig(namespace="shop", max_deliveries=5), lambda: bucket)


@pytest.mark.parametrize(("most", "last_unsuspected"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (10, 5)])
def test_half_of_the_deliveries_raise_no_suspicion(bucket, most, last_unsuspected):
    suspects = Suspects(BrokerConfig(namespace="shop", max_deliveries=most), lambda: bucket)
    assert not suspects.include(coming(deliveries=last_unsuspected))
    assert suspects.include(coming(deliveries=last_unsuspected + 1))


def test_a_suspect_keeps_the_others_from_starting_until_it_is_settled(suspects):
    first, second = coming("a", 3), coming("b", 3)
    assert suspects.may_start(first) is True
    assert suspects.may_start(second) is False
    suspects.settled(second)
    assert suspects.may_start(second) is False, "it was not what the others wait for"
    suspects.settled(first)
    assert suspects.may_start(second) is True


def test_a_suspect_that_runs_for_ten_seconds_has_killed_nothing(suspects, clock, bucket):
    first, second, third = coming("a", 3), coming("b", 3), coming("c", 3)
    suspects.note_start(first)
    suspects.note_start(first)
    assert suspects.may_start(first)
    clock.now += 9.9
    assert not suspects.may_start(second)
    clock.now += 0.1
    assert suspects.may_start(second)
    assert bucket.values == {"a": b"1"}, "the note of its start is withdrawn"
    assert not suspects.may_start(third)
    suspects.settled(first)
    assert not suspects.may_start(third), "the second runs alone now"


def test_who_waits_is_told_when_the_next_may_start(suspects):
    told = []
    first, other = (lambda: told.append("first")), (lambda: told.append("other"))
    suspects.listen(first)
    suspects.listen(other)
    suspects.ignore(first)
    suspects.ignore(first)
    delivery = coming("a", 3)
    suspects.settled(delivery)
    assert told == [], "it did not run alone"
    assert suspects.may_start(delivery)
    suspects.settled(delivery)
    suspects.settled(delivery)
    assert told == ["other"]


def test_starts_are_counted_for_a_week(suspects, bucket):
    for _ in range(3):
        suspects.note_start(coming("a", 3))
    suspects.note_start(coming("b", 3))
    assert bucket.values == {"a": b"3", "b": b"1"}
    assert bucket.ttls == {WEEK_MS}
    assert BUCKET == "starts"


def test_a_start_that_was_never_noted_is_not_withdrawn(suspects, clock, bucket):
    assert suspects.may_start(coming("a", 3))
    clock.now += 10.0
    assert suspects.may_start(coming("b", 3))
    assert bucket.values == {"a": b"0"}


def test_a_start_that_cannot_be_counted_is_logged_and_happens(suspects, bucket, caplog):
    bucket.error = PermissionDenied("not yours")
    suspects.note_start(coming("a", 3))
    assert caplog.messages == ["The starts of Message a are not counted: not yours"]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("deliveries", "starts", "has_killed"),
    [(5, 9, False), (6, 0, False), (6, 2, False), (6, 3, True), (20, 2, False), (20, 4, True)],
)
def test_a_message_has_killed_if_it_was_started_in_each_delivery_of_the_second_half(
    suspects, bucket, deliveries, starts, has_killed
):
    """Of five deliveries two raise no suspicion, so that there are three starts to be noted."""
    if starts:
        bucket.values["a"] = b"%d" % starts
    assert suspects.has_killed(coming("a", deliveries)) is has_killed


def test_an_excused_start_is_held_against_nothing(suspects, bucket):
    bucket.values = {"a": b"3", "b": b"3"}
    suspects.excuse(coming("a", 3))
    assert not suspects.has_killed(coming("a", 6))
    assert suspects.has_killed(coming("b", 6))
    bucket.values["a"] = b"4"
    assert suspects.has_killed(coming("a", 6))
    suspects.excuse(coming("a", 4))
    assert not suspects.has_killed(coming("a", 6)), "two are excused"
    suspects.reset()
    assert suspects.has_killed(coming("a", 6)), "the child of a fork excused nothing"


@pytest.mark.parametrize(("deliveries", "next_is_suspect"), [(1, False), (2, True), (3, True)])
def test_excusing_a_start_tells_whether_the_next_delivery_is_a_suspect(suspects, deliveries, next_is_suspect):
    assert suspects.excuse(coming("a", deliveries)) is next_is_suspect


def test_only_starts_of_suspects_are_excused_and_of_a_bounded_number_of_messages(
    suspects, bucket, monkeypatch
):
    monkeypatch.setattr(module, "MOST_EXCUSED", 1)
    bucket.values = {"a": b"3", "b": b"3", "c": b"3"}
    suspects.excuse(coming("a", 2))
    suspects.excuse(coming("b", 3))
    suspects.excuse(coming("c", 3))
    assert [suspects.has_killed(coming(name, 6)) for name in "abc"] == [True, False, True]


@pytest.mark.parametrize(
    "error", [PermissionDenied("not yours"), QueueNotFound("gone"), ApiError(400, 1, "odd")]
)
def test_where_starts_cannot_be_counted_deliveries_count(suspects, bucket, caplog, error):
    bucket.error = error
    assert suspects.has_killed(coming("a", 5)) is False
    assert caplog.messages == []
    assert suspects.has_killed(coming("a", 6)) is True
    assert caplog.messages == [f"The starts of Message a were not counted, so its deliveries are: {error}"]


def test_in_an_outage_it_is_not_known_who_killed(suspects, bucket):
    bucket.error = BrokerConnectionError("away")
    with pytest.raises(BrokerConnectionError):
        suspects.has_killed(coming("a", 6))
