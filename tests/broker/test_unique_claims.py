"""Who has a unique key, from before a message is published until its window is over: each step of a claim."""

from __future__ import annotations

import json
from collections import deque

import pytest
from dramatiq import Message

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import (
    BrokerConnectionError,
    InvalidOption,
    KeyExists,
    MessageNotUnique,
    MessageTooLarge,
    RevisionConflict,
    StoreFull,
    StoreTimeout,
)
from dramatiq_jetstream.jetstream.reading import StoredMessage
from dramatiq_jetstream.kv import Entry
from dramatiq_jetstream.sending import unique
from dramatiq_jetstream.sending.unique import Claim, free, name_of, prefix
from dramatiq_jetstream.wire.replies import PubAck, Publication

NOW_MS = 1_700_000_000_000
CONFIG = BrokerConfig(namespace="shop", enqueue_timeout=5_000, duplicate_window=60_000)
KEY = "mails/k"


class ServerClock:
    """Stands in for the connection: the server says what time it is, and what is stored at a sequence."""

    def __init__(self):
        self.bodies = {}
        self.asked = []

    def api(self, verb, body=None, *, timeout=None):
        self.asked.append((verb, body))
        if body is None:
            return {"ts": "2023-11-14T22:13:20.000000000Z"}
        stored = {"seq": body["seq"], "subject": "a", "time": "2023-11-14T22:13:20Z"}
        return {"message": stored | {"data": self.bodies[body["seq"]]}}


class KeptInMemory:
    """Stands in for the bucket of unique keys.

    `before_create` and the like run once, before that call, as another process would.
    """

    stream = "KV_unique"

    def __init__(self):
        self.connection = ServerClock()
        self.entries = {}
        self.ttls = []
        self.revision = 0
        self.before_create = self.before_update = self.before_delete = None
        self.error = None

    def hold(self, record, age=0):
        self.revision += 1
        self.entries[KEY] = Entry(KEY, json.dumps(record).encode(), self.revision, NOW_MS - age)

    def record(self):
        return json.loads(self.entries[KEY].value) if KEY in self.entries else None

    def get(self, key):
        return self.entries.get(key)

    def create(self, key, value, *, ttl):
        if key in self.entries:
            self._interfere("before_create")
            raise KeyExists(key)
        return self._write(key, value, ttl)

    def update(self, key, value, *, revision, ttl):
        self._interfere("before_update")
        self._check(key, revision)
        return self._write(key, value, ttl)

    def delete(self, key, *, revision):
        self._interfere("before_delete")
        self._check(key, revision)
        del self.entries[key]

    def _interfere(self, moment):
        if self.error is not None:
            raise self.error
        call = getattr(self, moment)
        setattr(self, moment, None)
        if call is not None:
            call()

    def _check(self, key, revision):
        if key not in self.entries or self.entries[key].revision != revision:
            raise RevisionConflict(key)

    def _write(self, key, value, ttl):
        self.revision += 1
        self.ttls.append(ttl)
        self.entries[key] = Entry(key, value, self.revision, NOW_MS)
        return self.revision


def message(message_id="m-1", **options):
    return Message("mails", "post", (), {}, {"unique_key": "k", **options}, message_id, 1)


def publication(publish_id="p-1"):
    return Publication("shop.q.mails", b"body", {"Nats-Msg-Id": publish_id, "Other": "x"})


def pending(message_id, publish_id, timeout=5_000):
    return {"message": message_id, "publish_id": publish_id, "timeout": timeout}


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(unique, "_given_up", deque(maxlen=1_000))
    return KeptInMemory()


def claim(bucket, message_id="m-1", item=None, **options):
    return Claim(CONFIG, bucket, message(message_id, **options), item or publication())


def test_a_free_key_is_taken_before_its_message_is_published(bucket):
    item = publication()
    claim(bucket, item=item)
    assert bucket.record() == pending("m-1", "p-1")
    assert bucket.ttls == [60_000]
    assert item.headers == {"Nats-Msg-Id": "p-1", "Other": "x"}


def test_a_stored_message_keeps_its_key_for_its_window(bucket):
    taken = claim(bucket, unique_window=1_000)
    taken.stored(PubAck("s", 7))
    assert bucket.record() == {"message": "m-1"}
    assert bucket.ttls == [1_000, 1_000]


@pytest.mark.parametrize("window", [999, 0, -1, 1_000.0, True, None, "1000"])
def test_a_window_that_cannot_be_used_is_refused(bucket, window):
    with pytest.raises(InvalidOption) as refused:
        claim(bucket, unique_window=window)
    assert str(refused.value) == f"unique_window={window!r} cannot be used: give milliseconds, 1000 or more."
    assert bucket.entries == {}


@pytest.mark.parametrize(
    "record",
    [{"message": "other"}, pending("other", "p-0")],
    ids=["stored", "pending"],
)
def test_a_key_that_another_message_has_is_refused(bucket, record):
    bucket.hold(record, age=4_999)
    with pytest.raises(MessageNotUnique) as refused:
        claim(bucket, unique_window=30_000)
    assert str(refused.value) == (
        "A message with the unique key 'k' was enqueued on 'mails' within the last 30000 ms; this one was not."
    )
    assert bucket.record() == record


def test_a_stored_message_may_be_sent_once_more_on_purpose(bucket):
    bucket.hold({"message": "m-1"})
    item = publication("p-2")
    taken = claim(bucket, item=item)
    taken.stored(PubAck("s", 7))
    taken.failed(MessageTooLarge("too large"))
    assert item.headers["Nats-Msg-Id"] == "p-2"
    assert bucket.record() == {"message": "m-1"}, "the key stays as it is"


@pytest.mark.parametrize(("age", "publish_id"), [(5_000, "p-0"), (59_999, "p-0"), (60_000, "p-1")])
def test_after_a_call_whose_end_is_unknown_the_next_publishes_under_its_id(bucket, age, publish_id):
    """After the duplicate window JetStream knows that id no more, so its own is as good."""
    bucket.hold(pending("other", "p-0"), age=age)
    item = publication()
    claim(bucket, item=item)
    assert item.headers == {"Nats-Msg-Id": publish_id, "Other": "x"}
    assert bucket.record() == pending("m-1", publish_id)
    assert bucket.ttls == [60_000]
    assert bucket.connection.asked == [("STREAM.INFO.KV_unique", None)]


def test_the_time_of_the_earlier_call_is_what_that_call_had(bucket):
    bucket.hold(pending("other", "p-0", timeout=20_000), age=19_999)
    with pytest.raises(MessageNotUnique):
        claim(bucket)


def test_a_call_of_this_process_that_ended_is_not_waited_for(bucket):
    first = claim(bucket, "m-0", publication("p-0"))
    first.failed(StoreTimeout("late"))
    assert bucket.record() == pending("m-0", "p-0"), "the key stays pending"
    item = publication()
    claim(bucket, item=item)
    assert item.headers["Nats-Msg-Id"] == "p-0"


def test_the_same_message_finds_its_own_pending_key(bucket):
    bucket.hold(pending("m-1", "p-0"))
    item = publication()
    taken = claim(bucket, item=item)
    assert item.headers["Nats-Msg-Id"] == "p-0"
    taken.stored(PubAck("s", 7, duplicate=True))
    assert bucket.record() == {"message": "m-1"}


@pytest.mark.parametrize(
    ("ack", "body", "is_first"),
    [
        (None, None, False),
        (PubAck("s", 7), None, False),
        (PubAck("s", 7, duplicate=True), "bS0x", False),
        (PubAck("s", 7, duplicate=True), "b3RoZXI=", True),
    ],
    ids=["unsaid", "new", "ours", "earlier"],
)
def test_a_duplicate_is_the_message_of_the_earlier_call_unless_it_is_ours(bucket, ack, body, is_first):
    bucket.hold(pending("other", "p-0"), age=5_000)
    bucket.connection.bodies[7] = body
    taken = claim(bucket)
    bucket.connection.asked.clear()
    if is_first:
        with pytest.raises(MessageNotUnique):
            taken.stored(ack)
    else:
        taken.stored(ack)
    assert bucket.record() == {"message": "other" if is_first else "m-1"}
    assert bucket.connection.asked == ([("STREAM.MSG.GET.s", {"seq": 7})] if body else [])


def test_that_a_message_is_stored_need_not_be_noted(bucket):
    """The next call finds out by itself."""
    taken = claim(bucket)
    bucket.error = BrokerConnectionError("away")
    taken.stored(PubAck("s", 7))
    assert bucket.record() == pending("m-1", "p-1")


@pytest.mark.parametrize("error", [MessageTooLarge("too large"), StoreFull("full"), ValueError("odd")])
def test_a_refused_message_frees_its_key(bucket, error):
    claim(bucket).failed(error)
    assert bucket.record() is None


@pytest.mark.parametrize("error", [StoreTimeout("late"), BrokerConnectionError("away"), KeyboardInterrupt()])
def test_a_message_that_may_be_stored_keeps_its_key(bucket, error):
    claim(bucket).failed(error)
    assert bucket.record() == pending("m-1", "p-1")
    assert list(unique._given_up) == ["p-1"]


def test_a_refusal_says_nothing_of_an_earlier_call(bucket):
    bucket.hold(pending("other", "p-0"), age=5_000)
    claim(bucket).failed(MessageTooLarge("too large"))
    assert bucket.record() == pending("m-1", "p-0")


def test_a_key_that_cannot_be_freed_ends_by_itself(bucket):
    taken = claim(bucket)
    bucket.error = BrokerConnectionError("away")
    taken.failed(StoreFull("full"))
    assert bucket.record() == pending("m-1", "p-1")


def test_a_key_that_ends_while_it_is_looked_at_is_taken(bucket):
    bucket.hold({"message": "other"})
    bucket.before_create = bucket.entries.clear
    claim(bucket)
    assert bucket.record() == pending("m-1", "p-1")


def test_a_key_that_another_process_takes_over_first_is_looked_at_again(bucket):
    bucket.hold(pending("other", "p-0"), age=5_000)
    bucket.before_update = lambda: bucket.hold({"message": "third"})
    with pytest.raises(MessageNotUnique):
        claim(bucket)
    assert bucket.record() == {"message": "third"}


def test_keys_are_those_of_a_queue():
    assert prefix("mails") == "mails/"
    assert name_of(message()) == KEY
    assert name_of(message(unique_key=5)) == "mails/5"
    assert name_of(message().copy(queue_name="mails.DQ")) == KEY


def stored(data):
    return StoredMessage("s", 7, "a", data, {}, 1)


def test_cancelling_a_message_frees_its_key(bucket):
    bucket.hold({"message": "m-1"})
    free(bucket, stored(message().encode()))
    assert bucket.record() is None
    free(bucket, stored(message().encode()))


@pytest.mark.parametrize(
    "data",
    [
        b"no message",
        message("other").encode(),
        Message("mails", "post", (), {}, {}, "m-1", 1).encode(),
        Message("mails", "post", (), {}, None, "m-1", 1).encode(),
    ],
)
def test_cancelling_anything_else_frees_no_key(bucket, data):
    bucket.hold({"message": "m-1"})
    free(bucket, stored(data))
    assert bucket.record() == {"message": "m-1"}


def test_a_key_that_was_taken_meanwhile_is_not_freed(bucket):
    bucket.hold({"message": "m-1"})
    bucket.before_delete = lambda: bucket.hold({"message": "other"})
    free(bucket, stored(message().encode()))
    assert bucket.record() == {"message": "other"}
