"""What every event backend of dramatiq-abort does: a signal reaches one who asks, at once, and not for ever."""

from __future__ import annotations

import threading
import time

import pytest
from dramatiq_abort import Event

from tests.support.polling import eventually

TTL = 60_000


@pytest.fixture
def key(space):
    """A key as the middleware makes them."""
    return f"abort:{space}"


def test_nothing_was_signalled(aborts, key):
    """Polling for a signal that was not given returns None at once."""
    before = time.monotonic()
    assert aborts.poll(key) is None
    assert time.monotonic() - before < 8


@pytest.mark.parametrize("params", [{}, {"abort_timeout": 500}, {"deep": {"er": ["日本", None]}}], ids=str)
def test_a_signal_is_polled_with_its_parameters(aborts, key, params):
    """A signal carries parameters, and is found by its own key only."""
    aborts.notify([Event(key, params)], TTL)
    assert aborts.poll(f"{key}-other") is None
    assert aborts.poll(key) == Event(key, params)


def test_several_signals_are_given_at_once(aborts, key):
    """Each of several signals is found on its own."""
    keys = [f"{key}-{number}" for number in range(5)]
    aborts.notify([Event(k, {"number": number}) for number, k in enumerate(keys)], TTL)
    for number, k in reversed(list(enumerate(keys))):
        assert aborts.poll(k) == Event(k, {"number": number})


def test_a_second_signal_for_a_key_is_found(aborts, key):
    """After a signal was fetched, another one with the same key is found like the first."""
    for number in range(2):
        aborts.notify([Event(key, {"number": number})], TTL)
        assert aborts.poll(key) == Event(key, {"number": number})


def test_waiting_ends_with_the_timeout(aborts, key):
    """Without a signal, waiting returns None about when the time is over."""
    before = time.monotonic()
    assert aborts.wait_many([f"{key}-{number}" for number in range(3)], 1000) is None
    assert 0.9 < time.monotonic() - before < 20


def test_a_signal_from_before_is_found_by_waiting(aborts, key):
    """Who begins to wait after the signal gets it at once, whatever its place among the keys."""
    aborts.notify([Event(f"{key}-2", {"number": 2})], TTL)
    before = time.monotonic()
    event = aborts.wait_many([f"{key}-{number}" for number in range(4)], 60_000)
    assert event == Event(f"{key}-2", {"number": 2})
    assert time.monotonic() - before < 30


def test_a_signal_ends_the_waiting(make_aborts, aborts_kind, key):
    """A signal that comes from another process while waiting is returned within a moment."""
    here = make_aborts()
    there = here if aborts_kind.server is None else make_aborts()
    event = Event(f"{key}-3", {"abort_timeout": 0})
    timer = threading.Timer(0.3, there.notify, ([event], TTL))
    before = time.monotonic()
    timer.start()
    assert here.wait_many([f"{key}-{number}" for number in range(50)], 60_000) == event
    assert time.monotonic() - before < 30
    timer.join()


def test_waiting_can_be_done_again_and_again(aborts, key):
    """A watcher that asks for changing keys gets every signal once it is given."""
    for number in range(3):
        event = Event(f"{key}-{number}", {"number": number})
        timer = threading.Timer(0.05, aborts.notify, ([event], TTL))
        timer.start()
        assert aborts.wait_many([f"{key}-other", f"{key}-{number}"], 60_000) == event
        timer.join()


@pytest.mark.where(expires=True)
def test_a_signal_that_nobody_fetched_disappears(aborts, aborts_kind, key):
    """A signal is kept for its ttl; one with a longer ttl beside it stays."""
    ttl = max(500, aborts_kind.ttl_step)
    begun = time.monotonic()
    aborts.notify([Event(f"{key}-short", {})], ttl)
    aborts.notify([Event(f"{key}-long", {})], TTL)
    eventually(lambda: time.monotonic() > begun + ttl / 1000 + 1.2)
    assert aborts.poll(f"{key}-short") is None
    assert aborts.wait_many([f"{key}-short"], 1000) is None
    assert aborts.poll(f"{key}-long") == Event(f"{key}-long", {})


def test_backends_of_one_namespace_share_signals(make_aborts, aborts_kind, key):
    """A signal is found in its namespace only."""
    here = make_aborts()
    there = here if aborts_kind.server is None else make_aborts()
    elsewhere = make_aborts(namespace="elsewhere")
    there.notify([Event(key, {})], TTL)
    assert elsewhere.poll(key) is None
    assert here.poll(key) == Event(key, {})


@pytest.mark.parametrize("name", ["a b", "*", ">", "a..b.", "@/\\=", "日本", "x" * 150])
def test_message_ids_may_have_any_characters(aborts, key, name):
    """Programs may choose their own message ids; different ones stay apart."""
    aborts.notify([Event(f"{key}{name}", {"name": name})], TTL)
    assert aborts.poll(f"{key}{name}_") is None
    assert aborts.poll(f"{key}{name}") == Event(f"{key}{name}", {"name": name})
