"""Reading a stream: at a sequence, from a time, the newest, all in order; and how far its consumers are."""

from __future__ import annotations

import pytest

from dramatiq_jetstream.errors import TopologyMissing
from dramatiq_jetstream.streams import Range, StreamConsumer
from tests.broker.services import publish_raw, subscribe
from tests.support.polling import eventually


@pytest.fixture
def events(service, topic):
    """A stream of events with three messages on two subjects, and one subscription."""
    subscribe(service, f"{topic}.a")
    service.setup()
    for subject, body in (("a", b"1"), ("b", b"2"), ("a", b"3")):
        publish_raw(service, f"{topic}.{subject}", body, {"x-body": body.decode()})
    stream = service.stream(topic)
    eventually(lambda: stream.range().last == 3)  # nothing says when they are stored
    return stream


def test_all_messages_are_read_in_order(events, topic):
    """Everything, or what is on one subject, or what comes from a sequence on; in pages of any size."""
    assert [message.data for message in events.read()] == [b"1", b"2", b"3"]
    assert [message.data for message in events.read(f"{topic}.a")] == [b"1", b"3"]
    assert [message.data for message in events.read(start=2, page=1)] == [b"2", b"3"]
    assert events.range() == Range(1, 3)


def test_single_messages_are_found(events, topic):
    """By sequence, as the first or last on a subject, or by the time of storing; None where there is none."""
    found = events.at(2)
    assert found is not None
    assert (found.subject, found.data, found.headers["x-body"]) == (f"{topic}.b", b"2", "2")
    assert events.at(4) is None
    assert events.first(f"{topic}.a", start=2).data == b"3"
    assert events.last(f"{topic}.b").sequence == 2
    assert events.last(f"{topic}.c") is None
    assert events.since(found.time - 60_000).sequence == 1
    assert events.since(found.time + 60_000) is None


def test_a_stream_says_how_far_its_consumers_are(events, service, topic):
    """Nothing was delivered yet, so both events of the subscription wait."""

    def consumer():
        (only,) = events.consumers()
        return only

    eventually(lambda: consumer().waiting == 2)
    assert consumer() == StreamConsumer(consumer().name, waiting=2, in_flight=0)


def test_messages_are_removed(events):
    """A single one for good, or all before a place; again there is nothing to remove."""
    assert events.erase(2)
    assert not events.erase(2)
    assert [message.sequence for message in events.read()] == [1, 3]
    assert events.trim(3) == 1
    assert events.trim(3) == 0
    assert events.range() == Range(3, 3)
    assert not events.erase(9)


def test_a_stream_that_does_not_exist_is_an_error_not_an_empty_one(service):
    """A typing error in the name must not look like a stream without messages."""
    missing = service.stream("NOSUCH")
    asked = (
        missing.range,
        missing.last,
        missing.first,
        missing.consumers,
        lambda: missing.at(1),
        lambda: [*missing.read()],
    )
    for ask in asked:
        with pytest.raises(TopologyMissing):
            ask()


def test_the_newest_messages_come_first(events, service, topic):
    """All in reverse, in pages of any size, past messages of other subjects and gaps; and what is before a place."""
    for number in range(4, 40):
        publish_raw(service, f"{topic}.{'a' if number % 3 else 'b'}", b"%d" % number)
    for gap in range(10, 20):
        service.connection.api(f"STREAM.MSG.DELETE.{topic}", {"seq": gap})
    expected = [number for number in range(39, 0, -1) if not 10 <= number < 20]
    for page in (1, 2, 7, 64):
        assert [message.sequence for message in events.newest(page=page)] == expected
        rare = [message.sequence for message in events.newest(f"{topic}.b", page=page)]
        assert rare == [message.sequence for message in events.read(f"{topic}.b")][::-1]
    assert [message.sequence for message in events.newest(before=22)] == [21, 20, *range(9, 0, -1)]
    assert list(events.newest(before=1)) == []
    assert list(events.newest(f"{topic}.c")) == []
