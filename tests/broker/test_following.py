"""What follows a message: which call is which, what marks the message that must not be acked, and what comes after."""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from dramatiq import Message, MessageProxy
from dramatiq.middleware import Callbacks, GroupCallbacks, Middleware, Pipelines, Retries, TimeLimitExceeded
from dramatiq.results import Results

from dramatiq_jetstream.errors import BrokerConnectionError, MessageNotUnique, NotSent, StoreTimeout
from dramatiq_jetstream.worker.follow_ups import FollowUps
from dramatiq_jetstream.worker.message import JetStreamMessage


@pytest.fixture
def follow_ups():
    return FollowUps()


def message(message_id="m-1", *args):
    return Message("mails", "send", args, {}, {}, message_id=message_id)


def delivered(message_id="m-1", origin="mails:7"):
    return JetStreamMessage(message(message_id), SimpleNamespace(origin=origin))


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def test_what_follows_a_message_has_the_same_ids_at_every_run(follow_ups):
    """Each call its own: by the message that runs, the one that is sent, and how often that was sent."""
    for _ in range(2):
        current = delivered()
        follow_ups.begin(current)
        ids = [follow_ups.unique_id(message(name)) for name in ("m-1", "next", "next")]
        assert ids == [digest("mails:7:m-1:1"), digest("mails:7:next:1"), digest("mails:7:next:2")]
        assert current.follow_up_calls == {"m-1": 1, "next": 2}
        follow_ups.end(current)
    follow_ups.begin(delivered(origin="mails:8"))
    assert follow_ups.unique_id(message("\ud800")) == digest("mails:8:\ud800:1")


def test_what_follows_no_message_has_an_id_of_its_own_each_time(follow_ups):
    """Before an actor has run, after its message is settled, in another thread, for a message of another broker."""
    current = delivered()

    def ids():
        return {follow_ups.unique_id(message("next")) for _ in range(2)}

    found = ids()
    follow_ups.begin(current)
    with ThreadPoolExecutor(1) as pool:
        found |= pool.submit(ids).result()
    follow_ups.end(current)
    found |= ids()
    follow_ups.begin(MessageProxy(message()))
    found |= ids()
    assert len(found) == 8
    assert current.follow_up_calls is None


def test_a_retry_is_the_message_that_has_run(follow_ups):
    current = delivered()
    assert not follow_ups.is_retry(message())
    follow_ups.begin(current)
    assert follow_ups.is_retry(message())
    assert not follow_ups.is_retry(message("m-2"))
    assert not follow_ups.has_retried(current)
    follow_ups.unique_id(message("m-2"))
    assert not follow_ups.has_retried(current)
    follow_ups.unique_id(message())
    assert follow_ups.has_retried(current)
    assert not follow_ups.has_retried(MessageProxy(message()))
    follow_ups.end(current)
    assert not follow_ups.is_retry(message())


def test_a_callback_carries_the_message_that_has_run(follow_ups):
    """As its first argument, which may be anything."""
    carrying = message("callback", {"message_id": "m-1"}, "more")
    assert not follow_ups.encloses(carrying)
    follow_ups.begin(delivered())
    assert follow_ups.encloses(carrying) is True
    for other in ([], ["m-1"], [{"message_id": "m-2"}], [{}], [None, {"message_id": "m-1"}]):
        assert follow_ups.encloses(message("callback", *other)) is False


@pytest.mark.parametrize("kind", [Results, Retries, Pipelines, Callbacks, GroupCallbacks])
@pytest.mark.parametrize("error", [NotSent("away"), StoreTimeout("not known"), TimeLimitExceeded()])
def test_a_follow_up_that_could_not_be_stored_marks_its_message(follow_ups, kind, error):
    """Whatever kind of exception it is; also in a subclass of the program's own."""
    current = delivered()
    own = type("Own", (kind,), {"__init__": lambda self: None})
    follow_ups.begin(current)
    follow_ups.middleware_failed(own(), error)
    assert current.follow_up_error is error
    follow_ups.failed(ValueError("a later one"))
    assert current.follow_up_error is error


def test_what_marks_no_message(follow_ups):
    """Other middleware, a follow-up that is there already, and what happens when no message has run."""
    current, other = delivered(), MessageProxy(message())
    follow_ups.failed(NotSent("away"))
    follow_ups.begin(current)
    follow_ups.middleware_failed(Middleware(), NotSent("away"))
    follow_ups.failed(MessageNotUnique("it is there"))
    follow_ups.end(current)
    follow_ups.failed(NotSent("away"))
    follow_ups.begin(other)
    follow_ups.failed(NotSent("away"))
    assert (current.follow_up_error, getattr(other, "follow_up_error", None)) == (None, None)


def test_a_message_that_was_cut_off_is_marked_and_over(follow_ups):
    """What it held of limits is free, and what waits for success is not done."""
    current, error, done = delivered(), TimeLimitExceeded(), []
    current.turns = (("limiter", lambda: done.append("given back")),)
    current.once_followed_up = (lambda: done.append("success"),)
    follow_ups.cut_off(current, error)
    assert current.follow_up_error is error
    assert done == ["given back"]
    assert not follow_ups.is_retry(message())


@pytest.mark.parametrize(
    ("name", "value"),
    [(None, None), ("follow_up_error", NotSent("away")), ("_exception", ValueError()), ("put_off", 0)],
)
def test_what_waits_for_success_is_done_after_success_alone(follow_ups, name, value):
    current, done = delivered(), []
    current.once_followed_up = (lambda: done.append(1), lambda: done.append(follow_ups.is_retry(message())))
    if name is not None:
        setattr(current, name, value)
    follow_ups.begin(current)
    follow_ups.end(current)
    assert done == ([1, False] if name is None else [])


def test_turns_are_given_back_however_the_actor_ended(follow_ups, caplog):
    """Each of them, once; one that cannot be given back is told of, and its error ends nothing."""
    current, given = delivered(), []

    def fail():
        raise BrokerConnectionError("away")

    current.turns = (("first", fail), ("second", lambda: given.append(2)))
    current.stuff_exception(ValueError())
    follow_ups.begin(current)
    with caplog.at_level(logging.WARNING):
        follow_ups.end(current)
        follow_ups.end(current)
    assert (given, current.turns) == ([2], ())
    assert caplog.messages == [
        "The turn of message m-1 at the limiter first comes free with its time to live: away"
    ]


def test_the_end_of_another_brokers_message_is_just_its_end(follow_ups):
    other = MessageProxy(message())
    follow_ups.begin(other)
    assert follow_ups.is_retry(message())
    follow_ups.end(other)
    assert not follow_ups.is_retry(message())
