"""Which options of a message are refused before anything is sent, to the letter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.sending import options
from dramatiq_jetstream.sending.options import check_options

NOW_MS = 1_700_000_000_000
QUEUE = "give the actor its queue (queue_name=...), or send a copy: message.copy(queue_name=...)"


@pytest.fixture(autouse=True)
def now(monkeypatch):
    monkeypatch.setattr(options, "time", SimpleNamespace(time=lambda: NOW_MS / 1000))


def check(given, known=(), *, delayed=False, highest=None):
    check_options(given, known, delayed=delayed, highest=highest)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("countdown", "give delay=..., in milliseconds"),
        ("queue", QUEUE),
        ("routing_key", QUEUE),
        ("exchange", QUEUE),
        ("priority", "give broker_priority=..., with a broker that has a max_priority"),
        ("expires", "give max_age=..., in milliseconds, with Dramatiq's AgeLimit"),
        ("soft_time_limit", "give time_limit=..., in milliseconds"),
        ("link", "give on_success=..., or build a pipeline with |"),
        ("link_error", "give on_failure=..., the name of an actor"),
        ("ignore_result", "results are stored of actors with store_results=True"),
        ("serializer", "give all programs the same encoder: dramatiq.set_encoder(...)"),
        ("task_id", "a message has its id already, in message_id"),
        ("retry_policy", "give max_retries=..., min_backoff=... and max_backoff=..."),
    ],
)
def test_an_option_of_another_library_says_what_to_give(name, instead):
    """Also one whose value is false; one that a middleware declares is the middleware's own."""
    for value in ("x", None):
        with pytest.raises(InvalidOption) as refusal:
            check({"args": 1, name: value}, {"args"})
        assert str(refusal.value) == f"the option {name}={value!r} means nothing here: {instead}."
    check({name: "x"}, {name})


def test_any_other_option_is_left_alone():
    check({"colour": "red", "max_retries": 3, "eta": None, "broker_priority": 0})


@pytest.mark.parametrize(
    "eta", [NOW_MS + 1, NOW_MS + 0.5, True, "tomorrow", [], 1, NOW_MS / 1000 + 60, 99_999_999_999]
)
def test_a_time_in_the_future_needs_a_delay(eta):
    """One in seconds is meant to be in the future too. With a delay, `eta` is what the broker itself noted."""
    with pytest.raises(InvalidOption) as refusal:
        check({"eta": eta})
    said = f"the option eta={eta!r} means nothing here: give delay=..., in milliseconds from now."
    assert str(refusal.value) == said
    check({"eta": eta}, delayed=True)


@pytest.mark.parametrize("eta", [NOW_MS, NOW_MS - 0.5, 100_000_000_000, 0])
def test_a_time_that_is_over_does_no_harm(eta):
    """A message that was delayed and is sent again still has it."""
    check({"eta": eta})


@pytest.mark.parametrize("highest", [None, 0])
def test_a_priority_needs_a_broker_with_priorities(highest):
    with pytest.raises(InvalidOption) as refusal:
        check({"broker_priority": 3}, {"broker_priority"}, highest=highest)
    assert str(refusal.value) == (
        "broker_priority=3 means nothing here: this broker has no priorities; give all programs of the namespace the "
        "same JetStreamBroker(max_priority=...)."
    )
    check({"broker_priority": 3}, highest=1)
