"""An event that a message has no room to carry is referred to where its stream keeps it, and put back in."""

from __future__ import annotations

import base64

import pytest
from dramatiq import Message
from dramatiq.errors import DecodeError

from dramatiq_jetstream.errors import BrokerConnectionError, NotFound, PermissionDenied
from dramatiq_jetstream.sending.envelope import Event, event_of, to_message
from dramatiq_jetstream.sending.references import References

STORED_MS = 1_700_000_000_123
EVENT = Event("orders.paid", b"paid", {"ce-id": "e-1"}, "events", 7, STORED_MS)
PLACE = {"subject": "orders.paid", "stream": "events", "sequence": 7, "time": STORED_MS}
HEADERS = base64.b64encode(b"NATS/1.0\r\nce-id: e-1\r\n\r\n").decode()


class EventStream:
    """Stands in for the connection to a server with one stream of events."""

    def __init__(self, retention="limits", **stored):
        self.retention = retention
        self.error = None
        self.asked = []
        self.stored = {
            "seq": 7,
            "subject": "orders.paid",
            "data": base64.b64encode(b"paid").decode(),
            "hdrs": HEADERS,
            "time": "2023-11-14T22:13:20.123Z",
        } | stored

    def api(self, verb, body=None, *, timeout=None):
        self.asked.append((verb, body))
        if self.error is not None:
            raise self.error
        if verb.startswith("STREAM.INFO."):
            return {"config": {"retention": self.retention}}
        if self.stored["seq"] != body["seq"]:
            raise NotFound(404, 10037, "no message found")
        return {"message": self.stored}


def carrying(event=EVENT):
    message = to_message(event, queue="mails", actor="post")
    return message.copy(options={**message.options, "retries": 1})


def referring(place=PLACE):
    return carrying().copy(options={"event": place, "retries": 1})


def test_a_reference_says_where_the_event_is():
    stream = EventStream()
    referred = References(stream).refer(carrying())
    assert referred == referring()
    assert stream.asked == [("STREAM.INFO.events", None), ("STREAM.MSG.GET.events", {"seq": 7})]


@pytest.mark.parametrize(
    "stream",
    [
        EventStream("interest"),
        EventStream("workqueue"),
        EventStream(seq=8),
        EventStream(subject="orders.lost"),
        EventStream(time="2023-11-14T22:13:20.124Z"),
    ],
    ids=["interest", "workqueue", "gone", "other subject", "other time"],
)
def test_what_its_stream_does_not_keep_is_not_referred_to(stream):
    """A message of a later life of the stream at the same place is another one."""
    assert References(stream).refer(carrying()) is None


@pytest.mark.parametrize("message", [Message("q", "a", (), {}, {}), carrying(Event("a", b"x"))])
def test_without_an_event_of_a_stream_nothing_is_asked(message):
    stream = EventStream()
    assert References(stream).refer(message) is None
    assert stream.asked == []


@pytest.mark.parametrize("error", [NotFound(404, 10059, "stream not found"), PermissionDenied("not yours")])
def test_a_stream_that_may_not_be_read_is_not_referred_to(error):
    stream = EventStream()
    stream.error = error
    assert References(stream).refer(carrying()) is None


@pytest.mark.parametrize(("call", "message"), [("refer", carrying()), ("resolve", referring())])
def test_in_an_outage_it_is_not_known(call, message):
    stream = EventStream()
    stream.error = BrokerConnectionError("away")
    with pytest.raises(BrokerConnectionError):
        getattr(References(stream), call)(message)


@pytest.mark.parametrize(
    ("options", "refers"),
    [
        ({}, False),
        ({"event": PLACE}, True),
        ({"event": {**PLACE, "data": ""}}, False),
        ({"event": "x"}, False),
    ],
)
def test_a_message_refers_to_its_event_where_the_data_is_missing(options, refers):
    assert References.is_in(Message("q", "a", (), {}, options)) is refers


def test_the_event_is_put_back_where_the_reference_was():
    stream = EventStream()
    resolved = References(stream).resolve(referring())
    assert event_of(resolved) == EVENT
    assert resolved == carrying()
    assert stream.asked == [("STREAM.MSG.GET.events", {"seq": 7})]


@pytest.mark.parametrize(
    "stream",
    [EventStream(seq=8), EventStream(subject="orders.lost"), EventStream(time="2023-11-14T22:13:20.124Z")],
    ids=["gone", "other subject", "other time"],
)
def test_an_event_that_is_gone_is_an_error_that_says_so(stream):
    with pytest.raises(DecodeError) as refused:
        References(stream).resolve(referring())
    assert str(refused.value) == (
        "The event 7 of stream events is gone. This message refers to it, because it had no room to carry it."
    )
    assert (refused.value.data, refused.value.error) == (b"", None)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ({}, KeyError),
        ("x", TypeError),
        ({**PLACE, "sequence": "many"}, ValueError),
        ({**PLACE, "time": None}, TypeError),
    ],
)
def test_a_reference_to_nowhere_is_an_error(place, kind):
    with pytest.raises(DecodeError) as refused:
        References(EventStream()).resolve(referring(place))
    assert str(refused.value) == "The event of this message is neither in it nor in a stream."
    assert (refused.value.data, type(refused.value.error)) == (b"", kind)
