"""Dramatiq's limiters and its barrier on every rate limiter backend."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dramatiq
import pytest
from dramatiq import group
from dramatiq.errors import RateLimitExceeded
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits import (
    Barrier,
    BucketRateLimiter,
    ConcurrentRateLimiter,
    WindowRateLimiter,
)

from tests.broker.conformance.workers import running
from tests.support.polling import eventually


def acquired(limiter):
    with limiter.acquire(raise_on_failure=False) as got:
        return got


def test_a_mutex_is_released_after_each_use(limits, space):
    """A concurrent limiter of one can be taken again and again, one after the other."""
    mutex = ConcurrentRateLimiter(limits, space, limit=1)
    assert all(acquired(mutex) for _ in range(8))


def test_a_mutex_is_held_by_one(limits, space):
    """While a mutex is held no other caller gets it: not nested, not from another thread."""
    mutex = ConcurrentRateLimiter(limits, space, limit=1)
    with mutex.acquire(), ThreadPoolExecutor(max_workers=1) as pool:
        assert not acquired(mutex)
        assert not pool.submit(acquired, mutex).result(timeout=30)
        with pytest.raises(RateLimitExceeded, match=space), mutex.acquire():
            pass
    assert acquired(mutex)


def test_a_mutex_is_released_when_its_work_fails(limits, space):
    """An exception inside gives the mutex back."""
    mutex = ConcurrentRateLimiter(limits, space, limit=1)
    with pytest.raises(ValueError, match="inside"), mutex.acquire():
        raise ValueError("inside")
    assert acquired(mutex)


def test_a_mutex_lets_one_of_many_in(limits, space):
    """Of sixteen threads that try at once and hold on, exactly one succeeds."""
    mutex = ConcurrentRateLimiter(limits, space, limit=1)
    start, tried = threading.Barrier(16), threading.Barrier(16)

    def contend():
        start.wait(timeout=30)
        with mutex.acquire(raise_on_failure=False) as got:
            tried.wait(timeout=30)  # held until all have tried
            return got

    with ThreadPoolExecutor(max_workers=16) as pool:
        results = [pool.submit(contend) for _ in range(16)]
        assert [future.result(timeout=30) for future in results].count(True) == 1


def test_concurrency_is_limited(limits, space):
    """Of twenty threads at once, exactly as many as the limit says are inside together."""
    limiter = ConcurrentRateLimiter(limits, space, limit=4)
    start, tried = threading.Barrier(20), threading.Barrier(20)

    def contend():
        start.wait(timeout=30)
        with limiter.acquire(raise_on_failure=False) as got:
            tried.wait(timeout=30)
            return got

    with ThreadPoolExecutor(max_workers=20) as pool:
        results = [pool.submit(contend) for _ in range(20)]
        assert [future.result(timeout=30) for future in results].count(True) == 4
    assert acquired(limiter)


def test_a_mutex_of_a_holder_that_died_is_free_after_its_time(limits, limits_kind, space):
    """A holder that never gave back loses the mutex when its ttl is over."""
    ttl = max(500, limits_kind.ttl_step)
    mutex = ConcurrentRateLimiter(limits, space, limit=1, ttl=ttl)
    assert mutex._acquire()  # and no release: as if the process had been killed
    assert not acquired(mutex)
    eventually(lambda: acquired(mutex))


def test_a_bucket_has_room_for_its_limit(limits, space):
    """In each bucket of time as many succeed as the limit says, however many try."""
    limiter = BucketRateLimiter(limits, space, limit=3, bucket=700)

    def bucket():
        return time.time() * 1000 // 700

    def tries_of_one_bucket():
        before = bucket()
        eventually(lambda: bucket() > before, interval=0.002)
        began = bucket()
        tries = [acquired(limiter) for _ in range(8)]
        return tries if bucket() == began else None  # a busy machine may need longer for them

    for _ in range(2):
        assert eventually(tries_of_one_bucket).count(True) == 3


def test_a_window_has_room_for_its_limit(limits, space):
    """In a window that moves along as many succeed as the limit says; later there is room again."""
    limiter = WindowRateLimiter(limits, space, limit=3, window=4)
    begun = time.monotonic()
    with ThreadPoolExecutor(max_workers=8) as pool:
        futures = [pool.submit(acquired, limiter) for _ in range(16)]
        assert [future.result(timeout=30) for future in futures].count(True) == 3
    eventually(lambda: acquired(limiter), interval=0.1)
    # Windows are made of whole seconds, so that one of four seconds lasts more than three.
    assert time.monotonic() - begun > 3


def test_a_barrier_is_made_once(limits, space):
    """A second attempt to make a barrier fails and does not change it."""
    barrier = Barrier(limits, space, ttl=30_000)
    assert barrier.create(parties=2)
    assert not barrier.create(parties=10)
    assert not barrier.wait(block=False)
    assert barrier.wait(block=False)


def test_only_the_last_party_passes_a_barrier(limits, space):
    """Of all parties that come at once, exactly one is told that the barrier is cleared."""
    barrier = Barrier(limits, space, ttl=30_000)
    assert barrier.create(parties=16)
    start = threading.Barrier(16)

    def arrive():
        start.wait(timeout=30)
        return barrier.wait(block=False)

    with ThreadPoolExecutor(max_workers=16) as pool:
        results = [pool.submit(arrive) for _ in range(16)]
        assert [future.result(timeout=30) for future in results].count(True) == 1


def test_a_barrier_holds_all_until_the_last_has_come(limits, space):
    """Parties that block leave together, soon after the last has come."""
    barrier = Barrier(limits, space, ttl=30_000)
    assert barrier.create(parties=3)
    left_at = []

    def arrive():
        assert barrier.wait(timeout=25_000)
        left_at.append(time.monotonic())

    with ThreadPoolExecutor(max_workers=3) as pool:
        early = [pool.submit(arrive) for _ in range(2)]
        time.sleep(0.2)  # there is no way to see that they wait
        assert not left_at
        last_came_at = time.monotonic()
        arrive()
        for future in early:
            future.result(timeout=30)
    assert max(left_at) - last_came_at < 20


def test_waiting_at_a_barrier_has_a_timeout(limits, space):
    """A party that the others leave alone gets False when its time is over."""
    barrier = Barrier(limits, space, ttl=30_000)
    assert barrier.create(parties=2)
    before = time.monotonic()
    assert not barrier.wait(timeout=1000)
    assert 0.9 < time.monotonic() - before < 20


def test_a_barrier_disappears_after_its_time(limits, limits_kind, space):
    """A barrier that was never cleared can be made again when its ttl is over."""
    ttl = max(500, limits_kind.ttl_step)
    barrier = Barrier(limits, space, ttl=ttl)
    assert barrier.create(parties=2)
    eventually(lambda: barrier.create(parties=2))


def test_an_actor_waits_its_turn_by_retrying(stub_broker, limits, space):
    """RateLimitExceeded makes Dramatiq try again, until each message has had the mutex for itself."""
    mutex = ConcurrentRateLimiter(limits, space, limit=1)
    inside, most, done = [], [], []

    @dramatiq.actor(max_retries=200, min_backoff=10, max_backoff=20)
    def work():
        with mutex.acquire():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
        done.append(1)

    for _ in range(8):
        work.send()
    with running(stub_broker):
        eventually(lambda: len(done) == 8)
    assert max(most) == 1


def test_a_group_calls_back_when_all_parts_have_run(stub_broker, limits):
    """Completion callbacks run once, after every part, with any number of workers at it."""
    stub_broker.add_middleware(GroupCallbacks(limits))
    ran, finished = [], []

    @dramatiq.actor
    def part(number):
        ran.append(number)

    @dramatiq.actor
    def finish(name):
        finished.append((name, len(ran)))

    with running(stub_broker, threads=8) as worker:
        for round_ in range(1, 6):
            parts = group(part.message(number) for number in range(8))
            parts.add_completion_callback(finish.message(round_))
            parts.run()
            eventually(lambda round_=round_: len(finished) == round_)
        stub_broker.join(part.queue_name, timeout=30_000)
        worker.join()
    assert finished == [(round_, 8 * round_) for round_ in range(1, 6)]
