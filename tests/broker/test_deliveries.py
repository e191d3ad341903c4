"""What a delivered message says of itself: its place, its age, how often it came, and who it was before."""

from __future__ import annotations

import time

import pytest

from dramatiq_jetstream.sending.envelope import Event
from dramatiq_jetstream.wire.ack_subjects import ack_tokens, is_ack_subject
from dramatiq_jetstream.wire.headers import Msg, encode_headers
from dramatiq_jetstream.worker.delivery import Delivery, Source, event_in
from dramatiq_jetstream.worker.durables import Durable

STORED_NS = 1_700_000_000_123_456_789
TOKENS = ["events", "mails", "3", "7", "42", str(STORED_NS), "9"]
ACK_SUBJECTS = [
    "$JS.ACK.events.mails.3.7.42.1700000000123456789.9",
    "$JS.ACK.domain.hash.events.mails.3.7.42.1700000000123456789.9",
    "$JS.ACK._.hash.events.mails.3.7.42.1700000000123456789.9.random",
]


class Reader:
    """A consumer that is told nothing."""

    lookahead = False

    def released(self, delivery, *, done):
        pass


@pytest.fixture
def durable():
    durable = Durable("events", "mails", 30_000)
    durable.life = object()
    return durable


@pytest.fixture
def source(durable):
    return Source("mails", durable, 0, declare=lambda: None, decode=lambda delivery: None)


@pytest.fixture
def delivered(source):
    def deliver(headers=None, ack_subject=ACK_SUBJECTS[0]):
        raw = None if headers is None else encode_headers(headers)
        return Delivery(Msg("orders.paid", ack_subject, b"data", raw), source, Reader())

    return deliver


@pytest.mark.parametrize("subject", ACK_SUBJECTS)
def test_an_ack_subject_is_read_in_each_of_its_forms(subject):
    """With a domain and account, and with the random token that a server may add."""
    assert is_ack_subject(subject)
    assert ack_tokens(subject)[:7] == TOKENS


@pytest.mark.parametrize("subject", ["", "$JS.ACK", "_INBOX.$JS.ACK.a", "$JS.API.INFO", "$js.ack.a"])
def test_any_other_reply_subject_is_no_ack_subject(subject):
    assert not is_ack_subject(subject)


@pytest.mark.parametrize("subject", ACK_SUBJECTS)
def test_a_delivery_says_where_and_when_its_message_was_stored(delivered, durable, subject):
    delivery = delivered(ack_subject=subject)
    assert delivery.key == ("events", "mails", 7, STORED_NS)
    assert (delivery.stream, delivery.sequence, delivery.timestamp) == ("events", 7, 1_700_000_000_123)
    assert (delivery.deliveries, delivery.pending) == (3, 9)
    assert delivery.life is durable.life
    assert str(delivery) == "Message 7 of events"
    assert (delivery.subject, delivery.data, delivery.ack_subject) == ("orders.paid", b"data", subject)


def test_a_delivery_begins_unsettled_unmarked_and_without_a_place(delivered, source):
    before = time.monotonic()
    delivery = delivered({"Other": "x"})
    assert before <= delivery.touched <= time.monotonic()
    assert delivery.source is source
    assert isinstance(delivery.owner, Reader)
    assert (delivery.settled, delivery.is_suspect, delivery.has_place) == (False, False, False)
    assert (delivery.is_marked, delivery.slot) == (False, None)
    assert delivery.headers == {"Other": "x"}


@pytest.mark.parametrize(
    ("headers", "deliveries"),
    [
        ({"Dramatiq-Earlier-Deliveries": "4"}, 7),
        ({"Dramatiq-Earlier-Deliveries": "many"}, 3),
        ({"Dramatiq-Earlier-Deliveries": "-1"}, 3),
        ({"Dramatiq-Actor": "post"}, 3),
    ],
)
def test_deliveries_before_a_requeue_count(delivered, headers, deliveries):
    delivery = delivered(headers)
    assert (delivery.deliveries, delivery.is_marked) == (deliveries, True)


def test_a_message_is_who_it_was_before_it_was_requeued(delivered):
    place = f"events-mails-7-{STORED_NS:x}"
    assert delivered().origin == place
    assert delivered({"Dramatiq-Actor": "post"}).origin == place
    assert delivered({"Dramatiq-Origin": "first-place"}).origin == "first-place"


def test_a_delivered_event_is_what_its_stream_holds(delivered):
    event = event_in(delivered({"ce-id": "e-1"}))
    assert event == Event("orders.paid", b"data", {"ce-id": "e-1"}, "events", 7, 1_700_000_000_123)


def test_a_source_is_named_by_its_durable(source):
    assert (source.stream, str(source)) == ("events", "mails of events")
