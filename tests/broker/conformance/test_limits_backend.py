"""What every rate limiter backend does with its counters: atomic, bounded, and gone after their time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.polling import eventually

TTL = 60_000


@pytest.fixture
def key(space):
    """A key as the limiters make them."""
    return f"{space}@1700000000"


@pytest.fixture
def pair(make_limits, limits_kind):
    """Two backends as two processes would have them; what is kept in memory has only one."""
    one = make_limits()
    return one, one if limits_kind.server is None else make_limits()


def value_of(limits, key):
    """Read a counter without changing it: the highest maximum at which adding nothing is refused."""
    value = 0
    while not limits.incr(key, 0, value, TTL):
        value += 1
        assert value < 1000
    return value


def test_a_key_is_added_once(limits, key):
    """Only the first add of a key succeeds, and it keeps the value."""
    assert limits.add(key, 3, TTL) is True
    assert limits.add(key, 5, TTL) is False
    assert value_of(limits, key) == 3


def test_a_counter_goes_up_to_its_maximum(limits, key):
    """An increment that would pass the maximum is refused and changes nothing."""
    assert limits.incr(key, 2, 5, TTL) is True
    assert limits.incr(key, 2, 5, TTL) is True
    assert limits.incr(key, 2, 5, TTL) is False
    assert value_of(limits, key) == 4
    assert limits.incr(key, 1, 5, TTL) is True
    assert limits.incr(key, 1, 5, TTL) is False


def test_a_counter_goes_down_to_its_minimum(limits, key):
    """A decrement that would pass the minimum is refused and changes nothing."""
    assert limits.add(key, 5, TTL)
    assert limits.decr(key, 2, 1, TTL) is True
    assert limits.decr(key, 2, 1, TTL) is True
    assert limits.decr(key, 2, 1, TTL) is False
    assert value_of(limits, key) == 1
    assert limits.decr(key, 1, 0, TTL) is True
    assert value_of(limits, key) == 0


def test_a_counter_that_is_not_there_is_zero(limits, key):
    """Counting starts at zero, in both directions."""
    assert limits.decr(f"{key}-1", 1, 0, TTL) is False
    assert limits.incr(f"{key}-2", 1, 0, TTL) is False
    assert limits.incr(f"{key}-3", 1, 1, TTL) is True
    assert limits.decr(f"{key}-3", 1, 0, TTL) is True


def test_a_sum_is_limited(limits, key):
    """A counter goes up only while the sum over all keys stays within the maximum."""
    keys = [f"{key}-{number}" for number in range(3)]
    assert limits.incr_and_sum(keys[0], lambda: keys, 2, 5, TTL) is True
    assert limits.incr_and_sum(keys[1], lambda: keys, 2, 5, TTL) is True
    assert limits.incr_and_sum(keys[2], lambda: keys, 2, 5, TTL) is False
    assert [value_of(limits, k) for k in keys] == [2, 2, 0]
    assert limits.incr_and_sum(keys[2], lambda: keys, 1, 5, TTL) is True
    assert limits.incr_and_sum(keys[0], lambda: keys, 1, 5, TTL) is False


def test_a_sum_counts_only_the_keys_that_are_asked_for(limits, key):
    """Keys that are no longer in the list, as in a window that moved on, do not count."""
    old, new = f"{key}-old", f"{key}-new"
    assert limits.incr_and_sum(old, lambda: [old], 3, 3, TTL) is True
    assert limits.incr_and_sum(new, lambda: [new, old], 1, 3, TTL) is False
    assert limits.incr_and_sum(new, lambda: [new], 3, 3, TTL) is True


@pytest.mark.parametrize("amount", [1, 3])
def test_a_counter_is_exact_under_contention(pair, key, amount):
    """Many threads of two processes get exactly as many increments as fit, and as many decrements."""
    maximum = 30 * amount
    start = threading.Barrier(16)

    def contend(number):
        backend = pair[number % 2]
        start.wait(timeout=30)
        return sum(backend.incr(key, amount, maximum, TTL) for _ in range(5))

    with ThreadPoolExecutor(max_workers=16) as pool:
        assert sum(pool.map(contend, range(16))) == 30
        assert pair[0].incr(key, 1, maximum, TTL) is False
        start.reset()

        def give_back(number):
            backend = pair[number % 2]
            start.wait(timeout=30)
            return sum(backend.decr(key, amount, 0, TTL) for _ in range(5))

        assert sum(pool.map(give_back, range(16))) == 30
    assert value_of(pair[0], key) == 0


def test_a_sum_is_never_passed_under_contention(pair, key):
    """However many threads of two processes count on different keys at once, their sum stays in bounds."""
    keys = [f"{key}-{number}" for number in range(4)]
    start = threading.Barrier(16)

    def contend(number):
        backend = pair[number % 2]
        start.wait(timeout=30)
        return sum(backend.incr_and_sum(keys[number % 4], lambda: keys, 1, 20, TTL) for _ in range(4))

    with ThreadPoolExecutor(max_workers=16) as pool:
        assert sum(pool.map(contend, range(16))) == 20
    assert sum(value_of(pair[0], k) for k in keys) == 20


def test_only_one_adds_under_contention(pair, key):
    """Of many who add a key at once, one succeeds."""
    start = threading.Barrier(16)

    def contend(number):
        start.wait(timeout=30)
        return pair[number % 2].add(key, number, TTL)

    with ThreadPoolExecutor(max_workers=16) as pool:
        assert sum(pool.map(contend, range(16))) == 1


def test_a_key_is_forgotten_after_its_time(limits, limits_kind, key):
    """Keys that were added or counted live as long as they were told, then start from nothing."""
    ttl = max(400, limits_kind.ttl_step)
    added, counted, summed, long = (f"{key}-{name}" for name in ("added", "counted", "summed", "long"))
    assert limits.add(added, 1, ttl)
    assert limits.incr(counted, 1, 1, ttl)
    assert limits.incr_and_sum(summed, lambda: [summed], 1, 1, ttl)
    assert limits.add(long, 1, TTL)
    assert not limits.add(added, 1, ttl)
    assert not limits.incr(counted, 1, 1, ttl)
    seconds = ttl / 1000 + 3
    eventually(lambda: limits.add(added, 1, TTL), timeout=seconds)
    eventually(lambda: limits.incr(counted, 1, 1, TTL), timeout=seconds)
    eventually(lambda: limits.incr_and_sum(summed, lambda: [summed], 1, 1, TTL), timeout=seconds)
    assert not limits.add(long, 1, TTL)


def test_a_change_starts_the_time_anew(limits, limits_kind, key):
    """A counter lives as long as its last change says, and a refused change says nothing."""
    ttl = max(400, limits_kind.ttl_step)
    assert limits.incr(key, 1, 2, ttl)
    assert limits.incr(key, 1, 2, TTL)
    refused = f"{key}-refused"
    assert limits.incr(refused, 1, 1, ttl)
    assert not limits.incr(refused, 1, 1, TTL)
    eventually(lambda: limits.incr(refused, 1, 1, TTL))
    assert not limits.incr(key, 1, 2, TTL)


@pytest.mark.parametrize("name", ["a b", "*", ">", "a..b.", "@/\\=", "日本", "$KV", "x" * 150])
def test_keys_may_have_any_characters(limits, key, name):
    """Any text is a key, and different texts are different keys."""
    assert limits.add(f"{key}{name}", 1, TTL)
    assert not limits.add(f"{key}{name}", 1, TTL)
    assert limits.add(f"{key}{name}_", 1, TTL)
    assert limits.incr(f"{key}{name}", 1, 2, TTL)
    assert not limits.incr(f"{key}{name}", 1, 2, TTL)


def test_waiting_for_an_event_ends_with_the_timeout(limits, key):
    """Without a notification, wait returns False about when the time is over."""
    before = time.monotonic()
    assert not limits.wait(f"{key}@events", 1000)
    assert 0.9 < time.monotonic() - before < 20


def test_a_notification_wakes_all_who_wait(pair, key):
    """All threads that wait for a key are woken by one notification, soon; others go on waiting."""
    events = f"{key}@events"
    with ThreadPoolExecutor(max_workers=9) as pool:
        other = pool.submit(pair[0].wait, f"{key}@others", 1000)
        waiting = [pool.submit(pair[number % 2].wait, events, 60_000) for number in range(8)]
        time.sleep(0.2)  # there is no way to see that they wait
        before = time.monotonic()
        pair[0].wait_notify(events, TTL)
        assert [bool(future.result(timeout=90)) for future in waiting] == [True] * 8
        assert time.monotonic() - before < 30
        assert not other.result(timeout=30)


@pytest.mark.where(remembers_notifications=True)
def test_a_notification_is_there_for_those_who_come_late(limits, limits_kind, key):
    """Who begins to wait after the notification is not kept waiting, as long as its ttl lasts."""
    events = f"{key}@events"
    ttl = max(3000, limits_kind.ttl_step)
    limits.wait_notify(events, ttl)
    notified_at = time.monotonic()
    for _ in range(2):
        assert limits.wait(events, 10_000)
    assert time.monotonic() - notified_at < 3
    eventually(lambda: time.monotonic() > notified_at + ttl / 1000 + 1.2)
    assert not limits.wait(events, 1000)
