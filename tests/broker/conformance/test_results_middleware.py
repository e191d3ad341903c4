"""Results of actors in every backend: which outcome is kept, and how it is asked for."""

from __future__ import annotations

import threading
import time

import dramatiq
import pytest
from dramatiq import Message, group
from dramatiq.broker import MessageProxy
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.results import ResultFailure, ResultMissing, Results

from tests.broker.conformance.workers import Recorder, running
from tests.support.polling import eventually


@pytest.fixture
def broker(stub_broker, results):
    """An in-memory broker that keeps results in the backend under test."""
    stub_broker.add_middleware(Results(backend=results))
    return stub_broker


@pytest.fixture
def worker(broker):
    """A worker on that broker. Actors may be declared while it runs."""
    with running(broker) as worker:
        yield worker


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("value", [None, 42, {"deep": [1, 2]}])
def test_the_result_of_an_actor_is_kept(results, value):
    """Asked through the backend, or through the message with or without naming the backend."""

    @dramatiq.actor(store_results=True)
    def work():
        return value

    message = work.send()
    assert message.get_result(block=True) == value
    assert message.get_result(backend=results) == value
    assert results.get_result(message) == value


@pytest.mark.usefixtures("worker")
def test_a_result_is_missing_until_the_actor_is_done(results):
    """While the actor works there is no result."""
    started, go_on = threading.Event(), threading.Event()

    @dramatiq.actor(store_results=True)
    def work():
        started.set()
        assert go_on.wait(timeout=30)
        return 42

    message = work.send()
    assert started.wait(timeout=30)
    with pytest.raises(ResultMissing):
        message.get_result()
    go_on.set()
    assert message.get_result(block=True) == 42


def test_a_message_without_backend_has_no_result(stub_broker):
    """Asking for a result where no backend is set up says so."""

    @dramatiq.actor
    def work():
        pass

    with pytest.raises(RuntimeError, match="results backend"):
        work.send().get_result()


@pytest.mark.usefixtures("worker")
def test_the_last_exception_of_an_actor_is_kept():
    """Only when retries are used up, its exception is the result."""
    go_on = threading.Semaphore(1)
    runs = []

    @dramatiq.actor(store_results=True, max_retries=2, min_backoff=10, max_backoff=20)
    def work():
        assert go_on.acquire(timeout=10)
        runs.append(1)
        raise ValueError(f"attempt {len(runs)}")

    message = work.send()
    eventually(lambda: runs)
    with pytest.raises(ResultMissing):
        message.get_result()
    go_on.release(2)
    with pytest.raises(ResultFailure, match="actor raised ValueError: attempt 3"):
        message.get_result(block=True)


@pytest.mark.usefixtures("worker")
def test_a_retry_that_succeeds_gives_the_result():
    """Failures before a success leave no trace in the result."""
    runs = []

    @dramatiq.actor(store_results=True, max_retries=2, min_backoff=10, max_backoff=20)
    def work():
        runs.append(1)
        if len(runs) < 3:
            raise ValueError
        return len(runs)

    assert work.send().get_result(block=True) == 3


@pytest.mark.usefixtures("worker")
def test_a_skipped_message_has_the_result_none(broker):
    """A message that middleware skips without failing it ends the waiting with None."""

    class Skip(Middleware):
        def before_process_message(self, broker, message):
            raise SkipMessage("not today")

    broker.add_middleware(Skip())

    @dramatiq.actor(store_results=True)
    def work():
        return 42

    message = work.send()
    assert message.get_result(block=True) is None
    assert message.get_result() is None


@pytest.mark.usefixtures("worker")
def test_a_message_that_is_too_old_has_a_failure_as_its_result(broker):
    """A message that is skipped for its age is failed: its result says so, now and later."""
    recorder = Recorder()
    broker.add_middleware(recorder)

    @dramatiq.actor(store_results=True, max_age=1)
    def work():
        return 42

    message = work.send_with_options(delay=20)
    for _ in range(2):
        with pytest.raises(ResultFailure, match="Message age limit exceeded") as failure:
            message.get_result(block=True)
        assert failure.value.orig_exc_type == "SkipMessage"
        recorder.wait_for("after_nack", message.message_id)


@pytest.mark.usefixtures("worker")
def test_a_message_may_ask_for_its_result_to_be_kept(results_kind):
    """Options of the message come before those of its actor: whether to keep a result, and how long."""

    @dramatiq.actor(store_results=False, result_ttl=1)
    def work():
        return 42

    ttl = max(1000, results_kind.ttl_step)
    keeps = work.send_with_options(store_results=True, result_ttl=60_000)
    keeps_shortly = work.send_with_options(store_results=True, result_ttl=ttl)
    assert keeps.get_result(block=True) == 42
    eventually(lambda: _is_missing(keeps_shortly), timeout=ttl / 1000 + 3)
    assert keeps.get_result() == 42


def _is_missing(message):
    try:
        message.get_result()
    except ResultMissing:
        return True
    return False


def test_a_result_that_cannot_be_stored_does_not_change_the_outcome(broker):
    """The message of an actor whose result the encoder refuses is acknowledged; it is not run again."""
    runs = []
    recorder = Recorder()
    broker.add_middleware(recorder)

    @dramatiq.actor(store_results=True, min_backoff=1, max_backoff=1)
    def work():
        runs.append(1)
        return object()

    with running(broker) as worker:
        message = work.send()
        recorder.wait_for("after_ack", message.message_id)
        broker.join(work.queue_name, timeout=30_000)
        worker.join()
    assert runs == [1]
    assert "after_nack" not in recorder.of(message.message_id)
    with pytest.raises((ResultMissing, ResultFailure)):  # a backend may say that there will be none
        message.get_result()


def test_the_rejection_of_an_unknown_actor_stores_nothing(broker, results):
    """A dead letter of an actor that is not declared here has no result, and does no harm."""
    message = MessageProxy(Message("q", "nobody", (), {}, {}))
    message.fail()
    Results(backend=results).after_nack(broker, message)
    with pytest.raises(ResultMissing):
        results.get_result(message)


@pytest.mark.usefixtures("worker")
def test_pipelines_and_groups_collect_their_results(broker):
    """Results of steps and parts are found one by one and counted."""

    @dramatiq.actor(store_results=True)
    def add(*numbers):
        return sum(numbers)

    pipe = add.message(1) | add.message(2) | add.message(3)
    parts = group([add.message(1, 1), add.message(2, 2), pipe])
    parts.run()
    assert list(parts.get_results(block=True)) == [2, 4, 6]
    assert list(pipe.get_results()) == [1, 3, 6]
    assert parts.completed_count == 3
    assert pipe.completed_count == 3


@pytest.mark.usefixtures("worker")
def test_a_group_waits_for_all_parts():
    """Waiting for a group is over when the last result is there."""
    slow = threading.Event()

    @dramatiq.actor(store_results=True)
    def work(wait):
        if wait:
            slow.wait(timeout=30)
        return time.monotonic()

    parts = group([work.message(True), work.message(False)])
    parts.run()
    threading.Timer(0.1, slow.set).start()
    parts.wait(timeout=30_000)
    first, second = parts.get_results()
    assert second < first
