"""No task is lost to a failed follow-up: what cannot be enqueued after a message keeps that message on its queue."""

from __future__ import annotations

import threading

import dramatiq
import pytest
from dramatiq import group, pipeline
from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import StubBackend

from tests.broker.conformance.workers import running
from tests.support.polling import eventually


@pytest.fixture
def offline(make_broker, proxy, monkeypatch):
    """A broker that gives up quickly and whose server disappears while `first_run` is called.

    Returns the broker, the function that an actor calls, and what it noted: the runs and the follow-ups.
    """
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 50)
    broker = make_broker(proxy.url, enqueue_timeout=1_000)
    runs = []
    threads = []

    def first_run(name="work"):
        runs.append(name)
        if len(runs) == 1:
            proxy.lose()
            # Longer than enqueueing what follows may take.
            threads.append(threading.Timer(2.0, proxy.restore))
            threads[-1].start()

    yield broker, first_run, runs
    for thread in threads:
        thread.join()


class Failing(RuntimeError):
    pass


def follow_retry(broker, first_run, followed):
    @dramatiq.actor(broker=broker, min_backoff=10, max_backoff=20)
    def work():
        first_run()
        if len(followed) == 0:
            followed.append("retry wanted")
            raise Failing

    return work.message()


def follow_pipeline(broker, first_run, followed):
    @dramatiq.actor(broker=broker)
    def work():
        first_run()
        return "result"

    step = dramatiq.actor(followed.append, broker=broker, actor_name="step", queue_name="next")
    return pipeline([work.message(), step.message()], broker=broker)


def follow_success(broker, first_run, followed):
    dramatiq.actor(
        lambda message, result: followed.append(message["actor_name"]), broker=broker, actor_name="done"
    )
    return dramatiq.actor(first_run, broker=broker, actor_name="work", on_success="done").message()


def follow_failure(broker, first_run, followed):
    dramatiq.actor(lambda message, error: followed.append(error["type"]), broker=broker, actor_name="failed")

    @dramatiq.actor(broker=broker, on_failure="failed", max_retries=0)
    def work():
        first_run()
        raise Failing

    return work.message()


def follow_exhausted(broker, first_run, followed):
    dramatiq.actor(
        lambda message, counts: followed.append(counts["retries"]), broker=broker, actor_name="gave_up"
    )

    @dramatiq.actor(broker=broker, on_retry_exhausted="gave_up", max_retries=0)
    def work():
        first_run()
        raise Failing

    return work.message()


def follow_group(broker, first_run, followed):
    broker.add_middleware(GroupCallbacks(StubBackend()))
    work = dramatiq.actor(first_run, broker=broker, actor_name="work")
    done = dramatiq.actor(lambda: followed.append("all"), broker=broker, actor_name="all_done")
    work_group = group([work.message()], broker=broker)
    work_group.add_completion_callback(done.message())
    return work_group


@pytest.mark.parametrize(
    "prepare",
    [follow_retry, follow_pipeline, follow_success, follow_failure, follow_exhausted, follow_group],
    ids=lambda prepare: prepare.__name__.removeprefix("follow_"),
)
def test_a_message_is_redelivered_until_its_follow_up_is_stored(offline, prepare):
    """The server is gone when the actor ends: the message is not acked, runs again, and its follow-up comes."""
    broker, first_run, runs = offline
    followed = []
    message = prepare(broker, first_run, followed)
    # Before the worker starts: the actor must not cut the connection that this call still uses.
    if hasattr(message, "run"):
        message.run()
    else:
        broker.enqueue(message)
    with running(broker):
        eventually(lambda: len(runs) >= 2 and followed)
        for queue in broker.get_declared_queues():
            broker.join(queue, timeout=30_000)
    assert followed
    assert broker.queue_stats("default").dead == (1 if prepare in (follow_failure, follow_exhausted) else 0)


def fail_enqueueing(broker, monkeypatch, actor_name, error):
    """Make storing messages for one actor fail."""
    store = broker._sender._store
    tried = []

    def fail(queue_name, publication):
        if f'"actor_name":"{actor_name}"'.encode() in publication.payload:
            tried.append(1)
            raise error
        store(queue_name, publication)

    monkeypatch.setattr(broker._sender, "_store", fail)
    return tried


def test_a_follow_up_that_never_succeeds_ends_as_a_dead_letter(make_broker, monkeypatch):
    """Redelivery for what is not known to pass has an end: after `max_deliveries` the message is a dead letter."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 20)
    broker = make_broker(max_deliveries=3)
    runs = []
    dramatiq.actor(lambda message, result: None, broker=broker, actor_name="done")
    work = dramatiq.actor(lambda: runs.append(1), broker=broker, actor_name="work", on_success="done")
    tried = fail_enqueueing(broker, monkeypatch, "done", RuntimeError("a bug"))
    with running(broker):
        message = work.send()
        (letter,) = eventually(broker.dead_letters.list)
    assert (letter.reason, letter.message_id) == ("delivered too often", message.message_id)
    assert "what follows it could not be enqueued" in letter.error
    assert len(runs) == len(tried) == 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"on_success": "nobody"}, "ActorNotFound: nobody"),
        ({"pipe_target": {"queue_name": "default"}}, "TypeError"),
        (
            {
                "pipe_target": {
                    "queue_name": "q" * 300,
                    "actor_name": "a",
                    "args": (),
                    "kwargs": {},
                    "options": {},
                }
            },
            "InvalidName",
        ),
    ],
    ids=["unknown actor", "broken pipeline", "impossible queue"],
)
def test_a_follow_up_that_can_never_be_enqueued_makes_a_dead_letter(broker, options, error):
    """Another run would fail in the same way: the message is rejected at once, with what was wrong."""
    runs = []
    work = dramatiq.actor(lambda: runs.append(1), actor_name="work")
    with running(broker):
        message = work.send_with_options(**options)
        (letter,) = eventually(broker.dead_letters.list)
        broker.join("default", timeout=30_000)
    assert (letter.reason, letter.message_id, letter.actor) == ("rejected", message.message_id, "work")
    assert "What follows it cannot be enqueued" in letter.error
    assert error in letter.error
    assert runs == [1]


def test_a_result_too_large_for_the_next_step_makes_a_dead_letter(broker):
    """A pipeline step that exceeds `max_payload` will exceed it next time, too."""
    step = dramatiq.actor(lambda data: None, actor_name="step")
    work = dramatiq.actor(lambda: "x" * 2_000_000, actor_name="work")
    with running(broker):
        (work.message() | step.message()).run()
        (letter,) = eventually(broker.dead_letters.list)
    assert letter.reason == "rejected"
    assert "MessageTooLarge" in letter.error
    assert "max_payload" in letter.error


def test_a_next_step_that_is_there_already_is_no_failure(broker):
    """When the unique key of a pipeline's step is taken, the step was asked for before: all is well."""
    ran = []
    step = dramatiq.actor(lambda n: ran.append(n), actor_name="step")
    work = dramatiq.actor(lambda n: n, actor_name="work")
    with running(broker):
        for number in (1, 2):
            (work.message(number) | step.message_with_options(unique_key="nightly")).run()
            broker.join("default", timeout=30_000)
    assert ran == [1]
    assert broker.dead_letters.list() == []


def test_a_retry_does_not_compete_for_the_unique_key_of_its_message(broker):
    """A message that fails after its window, when another has the key, is still retried."""
    ran = []

    @dramatiq.actor(min_backoff=10, max_backoff=20)
    def work(name):
        ran.append(name)
        if name == "first" and ran.count("first") == 1:
            eventually(lambda: broker.bucket("unique").get("default/key") is None)
            work.send_with_options(args=("second",), unique_key="key")
            raise Failing

    with running(broker):
        work.send_with_options(args=("first",), unique_key="key", unique_window=1_000)
        broker.join("default", timeout=30_000)
    assert sorted(ran) == ["first", "first", "second"]


def test_what_an_actor_enqueues_itself_is_its_own_affair(broker, monkeypatch):
    """An error that an actor handles does not keep its message from being acked."""
    ran = []
    tried = fail_enqueueing(broker, monkeypatch, "other", BrokerConnectionError("not now"))
    other = dramatiq.actor(lambda: None, actor_name="other")

    @dramatiq.actor
    def work():
        ran.append(1)
        with pytest.raises(BrokerConnectionError):
            other.send()

    with running(broker):
        work.send()
        broker.join("default", timeout=30_000)
    assert len(ran) == len(tried) == 1


def test_asking_how_far_the_server_is_does_not_put_off_what_was_given_back(make_broker, monkeypatch):
    """A message that is to come again after 400 ms does, however often the server is asked in between."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 400)
    monkeypatch.setattr("dramatiq_jetstream.worker.settlements.PROBE_INTERVAL_SECONDS", 0.05)
    broker = make_broker(max_deliveries=3)
    dramatiq.actor(lambda message, result: None, broker=broker, actor_name="done")
    work = dramatiq.actor(lambda: None, broker=broker, actor_name="work", on_success="done")
    fail_enqueueing(broker, monkeypatch, "done", RuntimeError("a bug"))
    with running(broker):
        work.send()
        assert eventually(broker.dead_letters.list)
        eventually(lambda: broker.in_flight.settlements.unproven == 0)


def test_follow_ups_that_were_stored_are_not_stored_again(make_broker, monkeypatch):
    """When one follow-up fails and the message runs again, the pipeline's next step is enqueued once."""
    monkeypatch.setattr("dramatiq_jetstream.worker.rerouting.FIRST_DELAY_MS", 20)
    broker = make_broker(max_deliveries=3)
    ran = []
    dramatiq.actor(lambda message, result: None, broker=broker, actor_name="done")
    step = dramatiq.actor(lambda result: ran.append("step"), broker=broker, actor_name="step")
    work = dramatiq.actor(lambda: ran.append("work"), broker=broker, actor_name="work", on_success="done")
    fail_enqueueing(broker, monkeypatch, "done", RuntimeError("a bug"))
    with running(broker):
        pipeline([work.message(), step.message()], broker=broker).run()
        eventually(broker.dead_letters.list)
        broker.join("default", timeout=30_000)
    assert sorted(ran) == ["step", "work", "work", "work"]


def test_each_failure_has_a_retry_of_its_own(broker):
    """The second and third attempt are as little taken for a duplicate as the first."""
    ran = []

    @dramatiq.actor(max_retries=3, min_backoff=1, max_backoff=2)
    def work():
        ran.append(1)
        raise Failing

    with running(broker):
        work.send()
        eventually(broker.dead_letters.list)
    assert len(ran) == 4
