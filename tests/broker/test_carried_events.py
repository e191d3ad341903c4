"""What is decoded is checked before a worker gets it, and an event goes into a message and comes out again."""

from __future__ import annotations

import math

import pytest
from dramatiq import Message
from dramatiq.errors import DecodeError

from dramatiq_jetstream.sending.envelope import Event, carried, checked, event_of, to_message

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
EVENT = Event("orders.paid", b"\x00\xffpaid", {"ce-id": "e-1"}, "events", 7, 1_700_000_000_123)
CARRIED = {
    "subject": "orders.paid",
    "data": "AP9wYWlk",
    "headers": {"ce-id": "e-1"},
    "stream": "events",
    "sequence": 7,
    "time": 1_700_000_000_123,
}


def message(**parts):
    whole = {
        "queue_name": "mails",
        "actor_name": "post",
        "args": (),
        "kwargs": {},
        "options": {},
        "message_id": "m-1",
        "message_timestamp": 1_700_000_000_000,
    }
    return Message(**{**whole, **parts})


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"message_timestamp": 1.5},
        {"kwargs": {"to": 1}, "options": {"retries": 1}},
        {"options": {"eta": 9_999_999_999_999}},
        {"options": {"eta": -1}},
        {"options": {"eta": "later"}},
        {"options": {"eta": None, "throws": None}},
        {"options": {"throws": ValueError}},
        {"options": {"throws": (ValueError, KeyboardInterrupt)}},
        {"options": {"throws": ()}},
    ],
)
def test_what_a_worker_can_run_stays_as_it_is(parts):
    whole = message(**parts)
    assert checked(whole, "mails") is whole


def test_a_message_that_claims_another_queue_runs_where_it_is():
    assert checked(message(args=(1,)), "other") == message(args=(1,), queue_name="other")


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"actor_name": 5}, "its actor_name is a int"),
        ({"message_id": None}, "its message_id is a NoneType"),
        ({"message_timestamp": "now"}, "its message_timestamp is a str"),
        ({"kwargs": []}, "its kwargs is a list"),
        ({"options": "none"}, "its options is a str"),
        ({"actor_name": "fine", "kwargs": 1, "options": 2}, "its kwargs is a int"),
        ({"kwargs": {1: 2}}, "its kwargs or options have keys that are not text"),
        ({"options": {"a": 1, None: 2}}, "its kwargs or options have keys that are not text"),
        ({"options": {"eta": math.nan}}, "its eta nan is not a time in milliseconds since 1970"),
        ({"options": {"eta": -math.inf}}, "its eta -inf is not a time in milliseconds since 1970"),
        (
            {"options": {"eta": 10_000_000_000_000}},
            "its eta 10000000000000 is not a time in milliseconds since 1970",
        ),
        (
            {"options": {"throws": "ValueError"}},
            "its option throws has 'ValueError', which is not an exception class",
        ),
        (
            {"options": {"throws": (ValueError, int)}},
            "its option throws has <class 'int'>, which is not an exception class",
        ),
    ],
)
def test_what_would_end_a_worker_thread_is_refused_by_name(parts, what):
    with pytest.raises(DecodeError) as refused:
        checked(message(**parts), "mails")
    assert str(refused.value) == f"This is not a message for a worker: {what}."
    assert (refused.value.data, refused.value.error) == (b"", None)


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"ce-id": "c", "Nats-Msg-Id": "n"}, "c"),
        ({"ce-id": "", "Nats-Msg-Id": "n"}, "n"),
        ({"Nats-Msg-Id": "n"}, "n"),
        ({"other": "o"}, "events:7"),
    ],
)
def test_an_event_has_the_id_of_its_publisher_or_of_its_place(headers, name):
    assert Event("a", b"", headers, "events", 7).id == name


def test_an_event_is_carried_as_json_can_carry_it():
    assert carried(EVENT) == CARRIED


def test_an_event_becomes_a_message_that_says_what_happened_and_when():
    """Its arguments stay empty: the event is in its options, and the same event gives the same id."""
    assert to_message(EVENT, queue="mails", actor="post") == message(
        options={"event": CARRIED}, message_id="e-1:post", message_timestamp=1_700_000_000_123
    )


@pytest.mark.parametrize("name", ["traceparent", "Traceparent", "TRACEPARENT"])
def test_the_trace_of_an_event_goes_on_with_its_message(name):
    made = to_message(Event("a", b"", {name: TRACE}), queue="mails", actor="post")
    assert made.options["trace_context"] == {"traceparent": TRACE}


def test_a_message_gives_back_the_event_that_it_carries():
    assert event_of(to_message(EVENT, queue="mails", actor="post")) == EVENT


def test_what_an_older_message_does_not_say_of_its_event_is_empty():
    said = {"subject": "a", "data": "YQ==", "headers": None}
    assert event_of(message(options={"event": said})) == Event("a", b"a", {}, "", 0, 0)


@pytest.mark.parametrize(
    "options", [{}, {"event": None}, {"event": "data"}, {"event": ["data"]}, {"event": {"subject": "a"}}]
)
def test_a_message_without_an_event_has_none(options):
    assert event_of(message(options=options)) is None
