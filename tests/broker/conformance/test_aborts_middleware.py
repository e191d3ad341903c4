"""Aborting messages through every event backend: pending, delayed and running ones, threads and coroutines."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import dramatiq
import pytest
from dramatiq.middleware import AsyncIO
from dramatiq_abort import Abort, Abortable, abort, abort_requested
from dramatiq_abort.middleware import AbortMode

from tests.broker.conformance.workers import Recorder, running
from tests.support.polling import eventually, holds


class EndingAbortable(Abortable):
    """The middleware with a watcher that can be ended, and that is ended by an error of the backend."""

    def __init__(self, **options):
        super().__init__(**options)
        self.over = threading.Event()
        self.watchers = []

    def _watcher(self):
        self.watchers.append(threading.current_thread())
        while not self.over.is_set():
            self._get_abort_requests()
            self.manager.abort_pending()

    def end(self):
        self.over.set()
        for watcher in self.watchers:
            watcher.join(timeout=5)
            assert not watcher.is_alive()


@pytest.fixture
def abortable(stub_broker, aborts, monkeypatch):
    """The middleware on an in-memory broker, with a watcher that looks often and ends with the test."""
    # The watcher sleeps a second whenever nothing runs.
    impatient = SimpleNamespace(sleep=lambda seconds: time.sleep(0.02), monotonic=time.monotonic)
    monkeypatch.setattr("dramatiq_abort.middleware.time", impatient)
    middleware = EndingAbortable(backend=aborts)
    stub_broker.add_middleware(middleware)
    yield middleware
    middleware.end()


@pytest.fixture
def broker(stub_broker, abortable):
    """An in-memory broker on which messages can be aborted."""
    return stub_broker


def work_until_interrupted(started, ended):
    """Make an actor's function that runs for some seconds if it is let."""

    def work(*args):
        started.set()
        try:
            for _ in range(500):
                time.sleep(0.01)
        except Abort:
            ended.append("aborted")
            raise
        ended.append("done")

    return work


def test_a_pending_message_is_skipped(broker):
    """A message that is aborted before it begins does not run, and those beside it do."""
    recorder = Recorder()
    broker.add_middleware(recorder)
    runs = []

    @dramatiq.actor
    def work(number):
        runs.append(number)

    message = work.send(1)
    work.send(2)
    abort(message.message_id)
    with running(broker) as worker:
        eventually(lambda: runs == [2])
        recorder.wait_for("after_ack", message.message_id)
        broker.join(work.queue_name, timeout=30_000)
        worker.join()
    assert "after_skip_message" in recorder.of(message.message_id)
    assert runs == [2]


def test_a_delayed_message_is_skipped(broker):
    """A message can be aborted while it is delayed; it does not run when it is due."""
    recorder = Recorder()
    broker.add_middleware(recorder)
    runs = []

    @dramatiq.actor
    def work():
        runs.append(1)

    with running(broker):
        message = work.send_with_options(delay=200)
        abort(message.message_id)
        recorder.wait_for("after_skip_message", message.message_id)
    assert not runs


def test_a_running_message_is_interrupted(broker):
    """An actor in a thread gets an Abort soon; its neighbour goes on."""
    started, ended = threading.Event(), []
    done = threading.Event()

    victim = dramatiq.actor(
        work_until_interrupted(started, ended), actor_name="victim", max_retries=0, throws=Abort
    )

    @dramatiq.actor
    def neighbour():
        started.wait(timeout=30)
        done.wait(timeout=30)
        ended.append("neighbour")

    with running(broker, threads=2) as worker:
        message = victim.send()
        neighbour.send()
        assert started.wait(timeout=30)
        abort(message.message_id)
        eventually(lambda: ended == ["aborted"], timeout=4)
        done.set()
        eventually(lambda: ended == ["aborted", "neighbour"])
        broker.join(victim.queue_name, timeout=30_000)
        worker.join()
    assert len(broker.dead_letters) == 1


def test_a_running_coroutine_is_cancelled(broker):
    """An async actor is interrupted too, and may clean up."""
    broker.add_middleware(AsyncIO())
    started, ended = threading.Event(), []

    @dramatiq.actor(max_retries=0, throws=Abort)
    async def work():
        started.set()
        try:
            await asyncio.sleep(5)
        finally:
            ended.append("cleaned up")

    with running(broker):
        message = work.send()
        assert started.wait(timeout=30)
        abort(message.message_id)
        eventually(lambda: ended == ["cleaned up"], timeout=4)
        eventually(lambda: len(broker.dead_letters) == 1)


def test_cancelling_leaves_a_running_message_alone(broker):
    """In "cancel" mode only messages that have not begun are aborted."""
    started, go_on, runs = threading.Event(), threading.Event(), []

    @dramatiq.actor
    def work(number):
        started.set()
        go_on.wait(timeout=30)
        runs.append(number)

    with running(broker, threads=1) as worker:
        begun, pending = work.send(1), work.send(2)
        assert started.wait(timeout=30)
        abort(begun.message_id, mode=AbortMode.CANCEL)
        abort(pending.message_id, mode=AbortMode.CANCEL)
        holds(lambda: not runs, 0.2)
        go_on.set()
        broker.join(work.queue_name, timeout=30_000)
        worker.join()
    assert runs == [1]
    assert broker.dead_letters == []


def test_an_actor_can_see_that_it_is_to_end(broker):
    """With abort_timeout an actor learns how long it has, and is interrupted only after that."""
    started, seen, ended = threading.Event(), [], []

    @dramatiq.actor(max_retries=0, throws=Abort)
    def work(obedient):
        started.set()
        try:
            for _ in range(500):
                left = abort_requested()
                if left is not None:
                    seen.append(left)
                    if obedient:
                        ended.append("by itself")
                        return
                time.sleep(0.01)
        except Abort:
            ended.append("aborted")
            raise

    with running(broker):
        for obedient, timeout, end in ((True, 60_000, "by itself"), (False, 100, "aborted")):
            seen.clear()
            ended.clear()
            started.clear()
            message = work.send(obedient)
            assert started.wait(timeout=30)
            abort(message.message_id, abort_timeout=timeout)
            eventually(lambda end=end: ended == [end])
            assert 0 < max(seen) <= timeout


@pytest.mark.parametrize("option_of", ["actor", "message"])
def test_an_actor_may_be_out_of_reach(broker, option_of):
    """What is not `abortable` runs to its end."""
    runs = []
    options = {"abortable": False}

    @dramatiq.actor(**(options if option_of == "actor" else {}))
    def work():
        runs.append(1)

    message = work.send_with_options(**(options if option_of == "message" else {}))
    abort(message.message_id)
    with running(broker) as worker:
        eventually(lambda: runs == [1])
        broker.join(work.queue_name, timeout=30_000)
        worker.join()


def test_an_aborted_message_can_be_retried(broker):
    """An Abort is an exception like others: with retries left the message runs again."""
    started, ended = threading.Event(), []
    interrupted = work_until_interrupted(started, ended)

    @dramatiq.actor(max_retries=1, min_backoff=10, max_backoff=20)
    def work():
        if ended:
            ended.append("again")
        else:
            interrupted()

    with running(broker):
        message = work.send()
        assert started.wait(timeout=30)
        # Not abort(): its second signal, for pending messages, would have the retry skipped.
        _abort_running(broker, message.message_id)
        eventually(lambda: ended == ["aborted", "again"])


def _abort_running(broker, message_id):
    from dramatiq_abort import Event

    (middleware,) = [m for m in broker.middleware if isinstance(m, Abortable)]
    middleware.backend.notify([Event(middleware.id_to_key(message_id), {"abort_timeout": 0})], 60_000)


@pytest.mark.where(expires=True)
def test_an_abort_is_forgotten_after_its_time(broker, aborts_kind):
    """A message that begins only after abort_ttl is not affected."""
    ttl = max(500, aborts_kind.ttl_step)
    runs = []

    @dramatiq.actor
    def work():
        runs.append(1)

    message = work.send()
    aborted_at = time.monotonic()
    abort(message.message_id, abort_ttl=ttl)
    eventually(lambda: time.monotonic() > aborted_at + ttl / 1000 + 1.2)
    with running(broker):
        eventually(lambda: runs == [1])
