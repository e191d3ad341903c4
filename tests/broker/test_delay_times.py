"""What delays are and when they end, and what the server is asked for them: each request to the letter."""

from __future__ import annotations

import base64
import json
import time
from types import SimpleNamespace

import pytest

from dramatiq_jetstream.errors import ApiError, InvalidOption, NotFound, TopologyMissing
from dramatiq_jetstream.jetstream.names import Names
from dramatiq_jetstream.jetstream.reading import StoredMessage
from dramatiq_jetstream.sending import delays
from dramatiq_jetstream.sending.delays import Delayed

TEN_YEARS_MS = 315_360_000_000
ETA = 1_700_000_000_045
EXPRESSION = "@at 2023-11-14T22:13:20.045Z"
NAMES = Names("shop")
STREAM = "shop_q_mails"


class AnsweringConnection:
    """Stands in for the connection: notes requests and publishes, and gives the answers that the test prepared."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.published = []
        self.refuses = None

    def api(self, verb, body=None, *, timeout=None):
        self.asked.append((verb, body))
        answer = self.answers.pop(0) if self.answers else {}
        if isinstance(answer, Exception):
            raise answer
        return answer

    def publish(self, subject, payload, headers):
        if self.refuses is not None:
            raise self.refuses
        self.published.append((subject, payload, headers))


def stored(sequence=7, subject="shop.q.mails.at.m-1.x", data=b"{}", **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return StoredMessage(STREAM, sequence, subject, data, names, 1)


@pytest.fixture
def listed(monkeypatch):
    """The messages that a listing yields; it notes what was listed."""
    listed = SimpleNamespace(messages=[], reads=[], error=None)

    class Listing:
        def __init__(self, connection, stream):
            assert isinstance(connection, AnsweringConnection)
            self.stream = stream

        def read(self, subject, *, page):
            listed.reads.append((self.stream, subject, page))
            if listed.error is not None:
                raise listed.error
            yield from listed.messages

    monkeypatch.setattr(delays, "Listing", Listing)
    return listed


@pytest.mark.parametrize(
    ("delay", "milliseconds"),
    [
        (0, 0),
        (1, 1),
        (1.9, 1),
        (-5, 0),
        (-0.5, 0),
        (TEN_YEARS_MS, TEN_YEARS_MS),
        (float(TEN_YEARS_MS), TEN_YEARS_MS),
    ],
)
def test_a_delay_is_whole_milliseconds_and_a_negative_one_is_over(delay, milliseconds):
    checked = delays.check_delay(delay)
    assert (checked, type(checked)) == (milliseconds, int)


@pytest.mark.parametrize(
    "delay", [True, False, None, "5", TEN_YEARS_MS + 1, float("inf"), float("-inf"), float("nan")]
)
def test_what_is_no_delay_is_refused(delay):
    with pytest.raises(InvalidOption) as refused:
        delays.check_delay(delay)
    assert str(refused.value) == (
        f"delay={delay!r} cannot be used: give a number of milliseconds up to 315360000000 (ten years)."
    )


@pytest.mark.parametrize(
    ("eta", "expression"),
    [
        (0, "@at 1970-01-01T00:00:00.000Z"),
        (999, "@at 1970-01-01T00:00:00.999Z"),
        (1_001, "@at 1970-01-01T00:00:01.001Z"),
        (ETA, EXPRESSION),
        (4_102_444_799_999, "@at 2099-12-31T23:59:59.999Z"),
    ],
)
def test_a_schedule_says_its_time_to_the_millisecond_and_is_read_again(eta, expression):
    assert delays.schedule(eta, "shop.q.mails") == {
        "Nats-Schedule": expression,
        "Nats-Schedule-Target": "shop.q.mails",
    }
    assert delays.eta_of(stored(Nats_Schedule=expression)) == eta


def test_the_time_zone_of_the_process_does_not_matter(monkeypatch):
    try:
        with monkeypatch.context() as changed:
            changed.setenv("TZ", "Asia/Kolkata")
            time.tzset()
            assert delays.at(ETA) == EXPRESSION
            assert delays.eta_of(stored(Nats_Schedule=EXPRESSION)) == ETA
    finally:
        time.tzset()


@pytest.mark.parametrize("expression", ["", "@every 5s", "0 9 * * *", "at 2023-11-14T22:13:20.045Z"])
def test_what_is_not_for_one_time_is_due_at_none(expression):
    assert delays.eta_of(stored(Nats_Schedule=expression)) is None
    assert delays.eta_of(stored()) is None


@pytest.mark.parametrize(("now", "eta"), [(7_000_000, 307), (7_000_001, 308), (7_999_999, 308)])
def test_a_delay_is_rounded_up(monkeypatch, now, eta):
    """The server fires at whole milliseconds: a time that was cut off would be too early."""
    monkeypatch.setattr(time, "time_ns", lambda: now)
    assert delays.eta_after(300) == eta


def test_now_is_in_whole_milliseconds(monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_045_999_999)
    assert delays.now() == 1_700_000_000_045


def test_a_message_that_waits_is_asked_for_by_its_id_alone():
    message = {
        "seq": 7,
        "subject": "shop.q.mails.at.m-1.x",
        "data": base64.b64encode(b"body").decode(),
        "hdrs": base64.b64encode(b"NATS/1.0\r\nNats-Schedule: " + EXPRESSION.encode() + b"\r\n\r\n").decode(),
        "time": "1970-01-01T00:00:00.001Z",
    }
    connection = AnsweringConnection({"message": message}, {"message": message})
    found = delays.waiting(connection, NAMES, "mails", "m-1")
    assert found == stored(data=b"body", Nats_Schedule=EXPRESSION)
    assert delays.due(connection, NAMES, "mails", "m-1") == ETA
    request = ("STREAM.MSG.GET.shop_q_mails", {"last_by_subj": "shop.q.mails.at.m-1.*"})
    assert connection.asked == [request, request]


def test_a_message_that_does_not_wait_is_due_at_none():
    connection = AnsweringConnection(NotFound(404, 10037, "no message found"))
    assert delays.due(connection, NAMES, "mails", "m-1") is None


@pytest.mark.parametrize(
    ("answer", "count"), [({"purged": 2}, 2), ({}, 0), (NotFound(404, 10059, "stream not found"), 0)]
)
def test_cancelling_purges_the_delays_of_one_message(answer, count):
    connection = AnsweringConnection(answer)
    assert delays.cancel(connection, NAMES, "mails", "m-1") == count
    assert connection.asked == [("STREAM.PURGE.shop_q_mails", {"filter": "shop.q.mails.at.m-1.*"})]


def page(*subjects, total=0):
    return {"total": total, "state": {"subjects": dict.fromkeys(subjects, 1)}}


def test_subjects_are_read_page_by_page_until_all_are_read(monkeypatch):
    monkeypatch.setattr(delays, "PAGE", 2)
    pages = [page("a", "b", total=5), page("c", "d", total=5), page("e", total=5)]
    connection = AnsweringConnection(*pages)
    assert list(delays.subjects(connection, STREAM, "x.>")) == ["a", "b", "c", "d", "e"]
    assert connection.asked == [
        ("STREAM.INFO.shop_q_mails", {"subjects_filter": "x.>", "offset": offset}) for offset in (0, 2, 4)
    ]


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ({"total": 3, "state": {"messages": 7, "subjects": None}}, (7, 3)),
        ({"state": {"messages": 0}}, (0, 0)),
    ],
)
def test_schedules_are_counted_without_listing_them(answer, counts):
    connection = AnsweringConnection(answer)
    assert delays.counts(connection, STREAM, "x.>") == counts
    ((verb, request),) = connection.asked
    assert verb == "STREAM.INFO.shop_q_mails"
    assert request["offset"] > 1_000_000


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (page("a", "b", total=2), ["a", "b"]),
        (page("a", total=3), ["a"]),
        ({"state": {"subjects": {"a": 1, "b": 1}}}, ["a", "b"]),
        ({"state": {"subjects": None}}, []),
        ({"state": {}}, []),
    ],
)
def test_no_further_page_is_asked_for_after_the_last(monkeypatch, answer, found):
    monkeypatch.setattr(delays, "PAGE", 2)
    connection = AnsweringConnection(answer, page("more"))
    assert list(delays.subjects(connection, STREAM, "x.>")) == found
    assert len(connection.asked) == 1


def test_delayed_messages_are_listed_the_next_due_first(listed):
    """What is not for one time is none; an actor that cannot be read is not said."""
    later = stored(
        1, "shop.q.mails.at.m-1.x", b'{"actor_name": "post"}', Nats_Schedule="@at 1970-01-01T00:00:02Z"
    )
    sooner = stored(2, "shop.q.mails.at.m=2E2.y", b"pickled", Nats_Schedule="@at 1970-01-01T00:00:01Z")
    every = stored(3, "shop.q.mails.at.m-3.z", Nats_Schedule="@every 5s")
    unnamed = stored(4, "shop.q.mails.at.m-4.z", Nats_Schedule="@at 1970-01-01T00:00:03Z")
    listed.messages = [later, every, sooner, unnamed]
    assert delays.delayed_messages(AnsweringConnection(), NAMES, "mails") == [
        Delayed("m.2", "mails", 1_000, sooner.subject, ""),
        Delayed("m-1", "mails", 2_000, later.subject, "post"),
        Delayed("m-4", "mails", 3_000, unnamed.subject, ""),
    ]
    assert listed.reads == [(STREAM, "shop.q.mails.at.>", 100)]


def test_a_listing_of_delayed_messages_is_bounded(listed):
    listed.messages = [stored(number, Nats_Schedule=EXPRESSION) for number in range(3)]
    assert len(delays.delayed_messages(AnsweringConnection(), NAMES, "mails", limit=2)) == 2
    delays.delayed_messages(AnsweringConnection(), NAMES, "mails", limit=5_000)
    assert [size for *_, size in listed.reads] == [2, 1_000]


@pytest.mark.parametrize("error", [NotFound(404, 10059, "stream not found"), TopologyMissing("none")])
def test_where_no_stream_is_nothing_is_delayed(listed, error):
    listed.error = error
    assert delays.delayed_messages(AnsweringConnection(), NAMES, "mails") == []


WAITING_HEADERS = {
    "Nats_Schedule": EXPRESSION,
    "Nats_Schedule_Target": "shop.q.mails",
    "Nats_Msg_Id": "old",
    "Nats_Expected_Stream": STREAM,
    "Dramatiq_Actor": "post",
}


def test_a_delay_that_ends_now_is_the_same_schedule_with_another_time(listed, monkeypatch):
    """The new one replaces the old one only if that is still there."""
    monkeypatch.setattr(delays, "now", lambda: 1_001)
    listed.messages = [stored(7, data=b"one", **WAITING_HEADERS), stored(8, "shop.q.mails.at.m-1.y", b"two")]
    connection = AnsweringConnection()
    assert delays.run_now(connection, NAMES, "mails", "m-1") == 2
    assert listed.reads == [(STREAM, "shop.q.mails.at.m-1.*", 100)]
    (subject, data, headers), second = connection.published
    first_id, second_id = headers.pop("Nats-Msg-Id"), second[2].pop("Nats-Msg-Id")
    assert len({first_id, second_id, "old"}) == 3, "the duplicate window must not take one for another"
    assert (subject, data) == ("shop.q.mails.at.m-1.x", b"one")
    assert headers == {
        "Nats-Schedule": "@at 1970-01-01T00:00:01.001Z",
        "Nats-Schedule-Target": "shop.q.mails",
        "Nats-Expected-Last-Subject-Sequence": "7",
        "Dramatiq-Actor": "post",
    }
    assert second == (
        "shop.q.mails.at.m-1.y",
        b"two",
        {"Nats-Schedule": "@at 1970-01-01T00:00:01.001Z", "Nats-Expected-Last-Subject-Sequence": "8"},
    )


@pytest.mark.parametrize("number", [10071, 10164])
def test_a_delay_that_has_just_ended_is_not_ended_again(listed, number):
    listed.messages = [stored(**WAITING_HEADERS)]
    connection = AnsweringConnection()
    connection.refuses = ApiError(400, number, "wrong last sequence: 9")
    assert delays.run_now(connection, NAMES, "mails", "m-1") == 0
    delays.end_now(connection, stored(**WAITING_HEADERS))
    assert connection.asked == [], "what is there by now is not purged"


def test_any_other_refusal_to_end_a_delay_is_raised(listed):
    listed.messages = [stored(**WAITING_HEADERS)]
    connection = AnsweringConnection()
    connection.refuses = ApiError(503, 10077, "maximum bytes exceeded")
    with pytest.raises(ApiError):
        delays.run_now(connection, NAMES, "mails", "m-1")
    with pytest.raises(ApiError):
        delays.end_now(connection, stored(**WAITING_HEADERS))


def test_a_delay_that_ends_at_once_is_stored_on_its_queue_and_then_removed():
    """Up to its own sequence only: a later schedule of the same message stays."""
    connection = AnsweringConnection()
    delays.end_now(connection, stored(7, data=json.dumps({"a": 1}).encode(), **WAITING_HEADERS))
    assert connection.published == [
        (
            "shop.q.mails",
            b'{"a": 1}',
            {
                "Dramatiq-Actor": "post",
                "Nats-Msg-Id": "now:shop_q_mails:7",
                "Nats-Expected-Last-Subject-Sequence": "7",
                "Nats-Expected-Last-Subject-Sequence-Subject": "shop.q.mails.at.m-1.x",
            },
        )
    ]
    assert connection.asked == [("STREAM.PURGE.shop_q_mails", {"filter": "shop.q.mails.at.m-1.x", "seq": 8})]
