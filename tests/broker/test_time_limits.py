"""Time limits: each thread is interrupted once when its time is over, and never after it is done."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
from dramatiq.middleware import TimeLimit, TimeLimitExceeded

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.worker import time_limits
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


class Clock:
    """Seconds, as the test sets them; for the threads of other tests they go on as always."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []
        self._thread = threading.current_thread()

    def monotonic(self) -> float:
        return self.now if threading.current_thread() is self._thread else time.monotonic()

    def sleep(self, seconds: float) -> None:
        if threading.current_thread() is self._thread:
            self.slept.append(seconds)
        else:
            time.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_limits, "time", clock)
    return clock


@pytest.fixture
def interruptions(
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[int, type[BaseException], Callable[[], bool]]]:
    """What would be interrupted: the thread, with what, and what says at the last moment whether it still is due."""
    found: list[tuple[int, type[BaseException], Callable[[], bool]]] = []
    here, interrupt = threading.get_ident(), time_limits.interrupt

    def note(thread: int, *given: Any) -> None:
        if threading.get_ident() == here:
            found.append((thread, *given))
        else:
            interrupt(thread, *given)

    monkeypatch.setattr(time_limits, "interrupt", note)
    return found


def test_a_thread_is_interrupted_when_its_time_is_over_and_once(clock, interruptions, caplog) -> None:
    """To the millisecond, as long as it runs the same message."""
    limits, thread = TimeLimits(0.02, logging.getLogger("limits")), threading.get_ident()
    limits.add_timeout(thread, 500)
    clock.now += 0.4999
    limits._interrupt()
    assert interruptions == []
    clock.now = 1_000.5
    limits._interrupt()
    limits._interrupt()
    ((found, error, is_due),) = interruptions
    assert (found, error) == (thread, TimeLimitExceeded)
    assert is_due()
    assert caplog.record_tuples == [
        ("limits", logging.WARNING, f"The time limit of what thread {thread} runs is over; interrupting it.")
    ]
    limits.add_timeout(thread, 500)
    assert not is_due()
    assert len(caplog.records) == 1
    clock.now += 0.5
    limits._interrupt()
    assert len(interruptions) == 2


def test_a_thread_that_is_done_in_time_is_left_alone(clock, interruptions) -> None:
    limits, thread = TimeLimits(0.02, logging.getLogger("limits")), threading.get_ident()
    limits.add_timeout(thread, 500)
    limits.remove_timeout(thread)
    clock.now += 1
    limits._interrupt()
    limits.add_timeout(thread, float("inf"))
    clock.now += 1e9
    limits._interrupt()
    assert interruptions == []


def test_time_is_kept_whatever_goes_wrong(clock, caplog, monkeypatch) -> None:
    """It is looked at in steady steps, in a thread that holds up no process's end."""
    limits = TimeLimits(0.02, logging.getLogger("limits"))
    assert (limits.name, limits.daemon) == ("time-limits", True)
    turns = iter([ValueError("odd"), ValueError("odd"), SystemExit()])

    def look() -> None:
        raise next(turns)

    monkeypatch.setattr(limits, "_interrupt", look)
    with pytest.raises(SystemExit):
        limits.run()
    assert clock.slept == [0.02, 0.02]
    said = ("limits", logging.ERROR, "Time limits could not be looked after; trying again.")
    assert caplog.record_tuples == [said] * 2
    assert all(record.exc_info for record in caplog.records)


def test_one_thread_does_not_pay_for_another(limits: TimeLimits, working: Working) -> None:
    other = Working()
    try:
        other.begin(limits, 60_000)
        working.begin(limits, 10)
        eventually(lambda: working.interrupted == 1)
        assert other.interrupted == 0
    finally:
        other.stop()


def test_a_limit_ends_with_its_thread() -> None:
    """The identifier of a thread that died of something else is given to a new one."""
    limits = TimeLimits(0.005, logging.getLogger(__name__))
    first = Working()
    first.begin(limits, 0)
    first.stop()
    others = [Working() for _ in range(20)]
    try:
        assert first.ident in {other.ident for other in others}, "no identifier was used again"
        limits._interrupt()
        went_on: SimpleQueue[int] = SimpleQueue()
        for other in others:
            other._calls.put(went_on.put)
        eventually(lambda: went_on.qsize() == len(others))
        assert not any(other.interrupted for other in others)
    finally:
        for other in others:
            other.stop()


def test_the_broker_keeps_the_time_of_its_time_limit() -> None:
    own = TimeLimit(interval=20)
    broker = JetStreamBroker(middleware=[own])
    default = [m for m in JetStreamBroker().middleware if isinstance(m, TimeLimit)]

    assert own in broker.middleware
    assert [type(m.manager) for m in (own, *default)] == [TimeLimits, TimeLimits]
    assert (own.manager._interval, own.manager._logger) == (0.02, own.logger)


def test_what_has_started_or_is_something_else_stays_as_it_is() -> None:
    started, special = TimeLimit(), TimeLimit()
    started.manager.start()
    special.manager = object()
    managers = [started.manager, special.manager]
    for middleware in (started, special):
        keep_time_of(middleware)

    assert [started.manager, special.manager] == managers
