"""Time limits: each thread is interrupted once when its time is over, and never after it is done."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest
from dramatiq.middleware import TimeLimit, TimeLimitExceeded

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.worker.time_limits import TimeLimits, keep_time_of
from tests.support.polling import eventually, holds


class Working:
    """A thread that is told its limits, goes on after interruptions, and counts them."""

    def __init__(self) -> None:
        self.interrupted = 0
        self._calls: SimpleQueue[Callable[[int], None]] = SimpleQueue()
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._thread.ident is not None
        self.ident = self._thread.ident

    def _run(self) -> None:
        while not self._stop:
            try:
                while not self._stop:
                    if not self._calls.empty():
                        self._calls.get()(threading.get_ident())
                    time.sleep(0.001)
            except TimeLimitExceeded:
                self.interrupted += 1

    def begin(self, limits: TimeLimits, ttl: float) -> None:
        self._calls.put(lambda ident: limits.add_timeout(ident, ttl))

    def end(self, limits: TimeLimits) -> None:
        self._calls.put(limits.remove_timeout)

    def stop(self) -> None:
        eventually(self._calls.empty)
        self._stop = True
        self._thread.join(10)


@pytest.fixture
def working() -> Iterator[Working]:
    thread = Working()
    yield thread
    thread.stop()


@pytest.fixture
def limits() -> TimeLimits:
    limits = TimeLimits(0.005, logging.getLogger(__name__))
    limits.start()
    return limits


def test_a_thread_whose_time_is_over_is_interrupted_once(limits: TimeLimits, working: Working) -> None:
    working.begin(limits, 10)

    eventually(lambda: working.interrupted == 1)
    holds(lambda: working.interrupted == 1, 0.1)


def test_every_message_of_a_thread_has_its_own_limit(limits: TimeLimits, working: Working) -> None:
    for number in range(1, 4):
        working.begin(limits, 10)
        eventually(lambda number=number: working.interrupted == number)
        working.end(limits)


def test_a_thread_that_is_done_in_time_is_left_alone(limits: TimeLimits, working: Working) -> None:
    working.begin(limits, 50)
    working.end(limits)
    working.begin(limits, float("inf"))

    holds(lambda: working.interrupted == 0, 0.2)


def test_one_thread_does_not_pay_for_another(limits: TimeLimits, working: Working) -> None:
    other = Working()
    try:
        other.begin(limits, 60_000)
        working.begin(limits, 10)
        eventually(lambda: working.interrupted == 1)
        assert other.interrupted == 0
    finally:
        other.stop()


def test_a_limit_ends_with_its_thread(limits: TimeLimits) -> None:
    """The identifier of a thread that died of something else is given to a new one."""
    first = Working()
    first.begin(limits, 50)
    first.stop()
    assert first.interrupted == 0
    others = [Working() for _ in range(20)]
    try:
        assert first.ident in {other.ident for other in others}, "no identifier was used again"
        holds(lambda: not any(other.interrupted for other in others), 0.2)
    finally:
        for other in others:
            other.stop()


def test_the_broker_keeps_the_time_of_its_time_limit() -> None:
    own = TimeLimit(interval=20)
    broker = JetStreamBroker(middleware=[own])
    default = [m for m in JetStreamBroker().middleware if isinstance(m, TimeLimit)]

    assert own in broker.middleware
    assert [type(m.manager) for m in (own, *default)] == [TimeLimits, TimeLimits]
    assert own.manager._interval == 0.02


def test_what_has_started_or_is_something_else_stays_as_it_is() -> None:
    started, special = TimeLimit(), TimeLimit()
    started.manager.start()
    special.manager = object()
    managers = [started.manager, special.manager]
    for middleware in (started, special):
        keep_time_of(middleware)

    assert [started.manager, special.manager] == managers
