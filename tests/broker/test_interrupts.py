"""Interrupts strike in actors and nowhere else: not while a retry, a callback or an ack is under way."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import dramatiq
import pytest
from dramatiq import pipeline
from dramatiq.middleware import Interrupt, Shutdown, TimeLimitExceeded, raise_thread_exception

from dramatiq_jetstream.worker import interrupts
from dramatiq_jetstream.worker.attempts import Attempts
from dramatiq_jetstream.worker.shutdown_notices import ShutdownNotices
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


class AfterWork:
    """Calls `strike` at each line that the calling worker thread runs after its actor, until it has settled.

    Parameters:
      strike: Gets the number of each line.
      within: Part of the paths of the files whose lines are meant; all that are run by default.
    """

    def __init__(self, strike: Callable[[int], None], within: str = "") -> None:
        self._strike = strike
        self._within = within
        self.lines = 0

    def begin(self) -> None:
        """Called in an actor, whose own lines are left alone."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code in (Attempts._run_and_settle.__code__, Attempts._run.__code__):
                frame.f_trace = self._trace
            frame = frame.f_back
        sys.settrace(self._begun)

    def _begun(self, frame: FrameType, event: str, _: Any) -> Any:
        # What the actor itself still calls is no after-work.
        return self._trace if self.lines else None

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is Attempts._run_and_settle.__code__ and event == "return":
            sys.settrace(None)
        elif event == "line" and self._within in frame.f_code.co_filename:
            self.lines += 1
            self._strike(self.lines)
        return self._trace


def strike_self(exception: type[BaseException]) -> None:
    raise_thread_exception(threading.get_ident(), exception)


@pytest.mark.parametrize("exception", [TimeLimitExceeded, Shutdown, Interrupt])
@pytest.mark.parametrize("follow_up", ["retry", "next step", "callback"])
def test_nothing_strikes_after_the_actor(broker, follow_up, exception):
    """At every line of the after-work an interrupt is raised: the follow-up is stored, and the thread lives."""
    after_work = AfterWork(lambda _: strike_self(exception))
    runs, followed = [], []

    def work() -> None:
        runs.append(1)
        if len(runs) == 1:
            after_work.begin()
            if follow_up == "retry":
                raise RuntimeError("to be retried")
        elif follow_up == "retry":
            followed.append(1)

    actor = dramatiq.actor(work, actor_name="work", min_backoff=1, max_backoff=2, on_success="done")
    dramatiq.actor(lambda *_: follow_up == "callback" and followed.append(1), actor_name="done")
    step = dramatiq.actor(lambda *_: followed.append(1), actor_name="step")
    with running(broker, threads=1) as worker:
        if follow_up == "next step":
            pipeline([actor.message(), step.message()]).run()
        else:
            actor.send()
        eventually(lambda: followed)
        broker.join("default", timeout=30_000)
        assert all(thread.is_alive() for thread in worker.workers)
    assert after_work.lines > 100
    assert len(runs) == (2 if follow_up == "retry" else 1)
    assert followed == [1]
    assert broker.dead_letters.list() == []


def test_what_strikes_past_the_gate_costs_no_message_and_no_thread(broker, monkeypatch):
    """An exception that other code raises at any line of ours after the actor makes the message run again, at most."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 20)
    runs: dict[int, int] = {}
    lines: dict[int, int] = {}

    @dramatiq.actor(min_backoff=1, max_backoff=2)
    def work(place: int) -> None:
        runs[place] = runs.get(place, 0) + 1
        if runs[place] == 1:

            def strike(line: int) -> None:
                lines[place] = line
                if line == place:
                    interrupts._raise_now(threading.get_ident(), Interrupt)

            AfterWork(strike, within="/dramatiq_jetstream/worker/").begin()
            raise RuntimeError("to be retried")

    places = range(1, 400)
    with running(broker, threads=2) as worker:
        broker.enqueue_many([work.message(place) for place in places])
        broker.join("default", timeout=60_000)
        assert all(thread.is_alive() for thread in worker.workers)
    assert max(lines.values()) < places[-1], "there are lines that were not struck"
    assert [place for place in places if runs.get(place, 0) < 2] == []
    assert broker.dead_letters.list() == []


class TestShutdownNotices:
    """Dramatiq's `notify_shutdown`, for the messages that run when the worker stops."""

    def test_all_that_run_are_told_while_others_end(self, broker):
        """Threads that come and go do not keep the rest from hearing of it."""
        told = []
        begun = threading.Semaphore(0)

        @dramatiq.actor(notify_shutdown=True, max_retries=0)
        def long() -> None:
            begun.release()
            try:
                for _ in range(1_000):
                    time.sleep(0.01)
            except Shutdown:
                told.append(1)

        short = dramatiq.actor(lambda: None, actor_name="short", notify_shutdown=True)
        with running(broker, threads=8):
            for _ in range(4):
                long.send()
            for _ in range(4):
                assert begun.acquire(timeout=10)
            broker.enqueue_many([short.message() for _ in range(200)])
        assert told == [1] * 4

    def test_a_message_that_begins_meanwhile_is_not_struck_for_the_one_before(self):
        """The mark of a message is gone with it."""
        notices = ShutdownNotices(logging.getLogger(__name__))
        notices.add_notification()
        (mark,) = notices._marks.values()
        notices.remove_notification()
        notices.add_notification()
        assert not notices._is_due(threading.get_ident(), mark)


def test_an_interrupt_that_comes_before_the_actor_waits_for_it() -> None:
    """A shutdown that is noticed while middleware prepares a message ends its actor at once."""
    gate = interrupts.Gate()
    gate.expect()
    raise_thread_exception(threading.get_ident(), Shutdown)  # not now
    ran = []
    with pytest.raises(Shutdown):
        gate.call(ran.append, (1,), {})
    gate.expect()  # the next message has nothing to do with it
    assert gate.call(lambda: "result", (), {}) == "result"
    raise_thread_exception(threading.get_ident(), Shutdown)  # too late
    interrupts._gates.pop(threading.get_ident())
    assert ran == []


def test_what_strikes_as_the_actor_ends_leaves_the_gate_closed() -> None:
    """It was on its way when the actor ended, and strikes at once; what must be whole afterwards waits for nothing."""
    gates: list[interrupts.Gate] = []
    seen: list[str] = []
    coming = threading.Event()

    def run() -> None:
        gate = interrupts.Gate()
        gate.expect()
        gates.append(gate)
        try:
            gate.call(coming.wait, (30,), {})
        except Interrupt:
            seen.append("struck")
        seen.append(interrupts.uninterrupted(lambda: "whole"))

    def is_due() -> bool:
        coming.set()
        eventually(lambda: not gates[0]._expected)  # the actor has ended, and its thread waits for this one
        return True

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    eventually(lambda: gates and gates[0]._is_open)
    assert thread.ident is not None
    interrupts.interrupt(thread.ident, Interrupt, is_due)
    thread.join(30)
    interrupts._gates.pop(thread.ident, None)
    assert seen == ["struck", "whole"]


def test_a_thread_that_is_struck_without_end_is_struck_in_its_actor_only() -> None:
    """Two others interrupt it as often as they can."""
    outcome: list[str] = []
    strikes: list[int] = []
    over = threading.Event()

    def work() -> None:
        gate = interrupts.Gate()
        ident.append(threading.get_ident())
        try:
            while not over.is_set():
                gate.expect()
                try:
                    gate.call(time.sleep, (0,), {})
                except Interrupt:
                    strikes.append(1)
                # No interrupt may strike here: it would end this thread.
                outcome.extend("after" for _ in range(20))
        except BaseException as error:  # noqa: BLE001
            outcome.append(f"struck after the actor: {error!r}")
        finally:
            interrupts._gates.pop(threading.get_ident(), None)

    ident: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: ident)

    def strike() -> None:
        while not over.is_set() and len(strikes) < 200:
            raise_thread_exception(ident[0], Interrupt)

    strikers = [threading.Thread(target=strike) for _ in range(2)]
    for striker in strikers:
        striker.start()
    for striker in strikers:
        striker.join(20)
    over.set()
    thread.join(10)
    assert strikes
    assert set(outcome) == {"after"}
