"""Retries: how often, how soon, on whose word, and what is told when they are used up."""

from __future__ import annotations

import logging
import time

import pytest
from dramatiq.errors import Retry
from dramatiq.middleware import CurrentMessage

from tests.broker.conformance.workers import Recorder, consuming, running
from tests.support.polling import eventually

pytestmark = pytest.mark.where(whole_suite=True)


class Broken(Exception):
    """What the actors of these tests raise."""


class Expected(Exception):
    """What actors declare that they may raise."""


def test_a_failed_message_runs_again(rig, broker, actor, queue):
    """A message that fails and then succeeds is settled, and leaves nothing behind."""
    runs = []

    @actor(min_backoff=10, max_backoff=20)
    def work():
        runs.append(1)
        if len(runs) < 4:
            raise Broken

    work.send()
    with running(broker) as worker:
        eventually(lambda: len(runs) == 4)
        rig.drain(queue, worker)
    assert len(runs) == 4
    rig.expect(queue, waiting=0, delayed=0, dead=0)


def test_retries_are_limited_by_the_actor(rig, broker, actor, queue):
    """After `max_retries` further attempts the message is dead."""
    runs = []

    @actor(max_retries=3, min_backoff=10, max_backoff=20)
    def work():
        runs.append(1)
        raise Broken

    work.send()
    with running(broker) as worker:
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert len(runs) == 4


@pytest.mark.parametrize("max_retries", [0, 2])
def test_retries_are_limited_by_the_message(rig, broker, actor, queue, max_retries):
    """Limits and backoff of a message come before those of its actor."""
    runs = []

    @actor(max_retries=99, min_backoff=60_000, max_backoff=600_000)
    def work():
        runs.append(1)
        raise Broken

    work.send_with_options(max_retries=max_retries, min_backoff=10, max_backoff=20)
    with running(broker) as worker:
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert len(runs) == 1 + max_retries


def test_retries_are_limited_by_age(rig, broker, actor, queue):
    """A message that keeps failing is dead once it is older than `max_age`."""
    runs = []

    @actor(max_age=500, min_backoff=100, max_backoff=200)
    def work():
        runs.append(1)
        raise Broken

    with running(broker) as worker:
        # A message grows older while its queue is made.
        eventually(lambda: consuming(worker, queue))
        work.send()
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert runs


def test_the_backoff_passes_before_the_retry(rig, broker, actor, queue):
    """The next attempt comes after `min_backoff`, and at first before twice that and a bit."""
    times = []

    @actor(max_retries=1, min_backoff=300, max_backoff=5000)
    def work():
        times.append(time.monotonic())
        if len(times) == 1:
            raise Broken

    work.send()
    with running(broker) as worker:
        eventually(lambda: len(times) == 2)
        rig.drain(queue, worker)
    assert 0.3 <= times[1] - times[0] < 0.6 + 1


def test_an_actor_can_ask_for_a_retry_at_a_time_of_its_own(rig, broker, actor, queue, caplog):
    """`Retry(delay=...)` sets the time of the next attempt and is not logged as an error."""
    times = []

    @actor(max_retries=1, min_backoff=60_000)
    def work():
        times.append(time.monotonic())
        if len(times) == 1:
            raise Retry(delay=100)

    with caplog.at_level(logging.INFO, logger="dramatiq"), running(broker) as worker:
        work.send()
        eventually(lambda: len(times) == 2)
        rig.drain(queue, worker)
    assert 0.1 <= times[1] - times[0] < 1.1
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("option", ["min_backoff", "max_backoff"])
@pytest.mark.parametrize("option_of", ["actor", "message"])
def test_a_backoff_of_zero_retries_at_once(rig, broker, actor, queue, option, option_of):
    """Either limit of the backoff, set to zero on actor or message, takes the waiting away."""
    times = []

    @actor(max_retries=5, **({option: 0} if option_of == "actor" else {"min_backoff": 60_000}))
    def work():
        times.append(time.monotonic())
        raise Broken

    with running(broker) as worker:
        work.send_with_options(**({option: 0} if option_of == "message" else {}))
        eventually(lambda: len(times) == 6)
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert times[-1] - times[0] < 0.8


def test_a_predicate_decides_about_retries(rig, broker, actor, queue):
    """`retry_when` gets the number of retries so far and the error, and overrules `max_retries`."""
    runs = []
    asked = []

    def retry_when(retries, exception):
        asked.append((retries, type(exception)))
        return retries < 2 and isinstance(exception, Broken)

    @actor(max_retries=0, retry_when=retry_when, min_backoff=10, max_backoff=20)
    def work(exception):
        runs.append(exception)
        raise {"broken": Broken, "other": ValueError}[exception]

    with running(broker) as worker:
        work.send("other")
        eventually(lambda: rig.dead(queue) == 1)
        work.send("broken")
        eventually(lambda: rig.dead(queue) == 2)
        rig.drain(queue, worker)
    assert runs == ["other", "broken", "broken", "broken"]
    assert asked == [(0, ValueError), (0, Broken), (1, Broken), (2, Broken)]


@pytest.mark.parametrize("throws", [Expected, (Broken, Expected)], ids=["one", "several"])
def test_an_expected_error_is_not_retried(rig, broker, actor, queue, throws, caplog):
    """An error that the actor `throws` makes a dead letter at once and is not logged as a failure."""
    runs = []

    @actor(throws=throws, min_backoff=10, max_backoff=20)
    def work():
        runs.append(1)
        raise Expected

    with caplog.at_level(logging.INFO, logger="dramatiq"), running(broker) as worker:
        work.send()
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert runs == [1]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_retry_carries_its_history(rig, broker, actor, queue):
    """The options of a retry tell the number of retries, the last traceback and when it was put back."""
    broker.add_middleware(CurrentMessage())
    seen = []

    @actor(max_retries=2, min_backoff=20, max_backoff=40)
    def work():
        message = CurrentMessage.get_current_message()
        seen.append((message.message_id, dict(message.options)))
        raise Broken("on purpose")

    message = work.send_with_options(delay=20)
    with running(broker) as worker:
        eventually(lambda: rig.dead(queue) == 1)
        rig.drain(queue, worker)
    assert [message_id for message_id, _ in seen] == [message.message_id] * 3
    assert [options.get("retries", 0) for _, options in seen] == [0, 1, 2]
    assert "requeue_timestamp" not in seen[0][1]
    requeued = [options["requeue_timestamp"] for _, options in seen[1:]]
    assert message.message_timestamp < requeued[0] < requeued[1]
    assert all("Broken: on purpose" in options["traceback"] for _, options in seen[1:])


def test_a_retry_is_enqueued_before_the_failed_attempt_is_settled(rig, broker, actor, queue):
    """There is no moment at which a message that is to be retried is stored nowhere."""
    recorder = Recorder()
    broker.add_middleware(recorder)
    runs = []

    @actor(max_retries=1, min_backoff=200, max_backoff=400)
    def work():
        runs.append(1)
        raise Broken

    message = work.send()
    with running(broker) as worker:
        recorder.wait_for("after_nack", message.message_id)
        rig.drain(queue, worker)
    signals = [name for name in recorder.of(message.message_id) if name != "before_delay_message"]
    first_attempt = signals[2 : signals.index("after_ack") + 1]
    assert first_attempt == [
        "before_process_message",
        "after_process_message",
        "before_enqueue",
        "after_enqueue",
        "before_ack",
        "after_ack",
    ]
    assert len(runs) == 2


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_an_actor_is_told_when_retries_are_used_up(rig, broker, actor, queue, failures):
    """`on_retry_exhausted` names an actor that gets message and counts, and only after the last failure."""
    told = []
    runs = []

    @actor
    def tell(message_data, retry_info):
        told.append((message_data["message_id"], retry_info))

    @actor(max_retries=2, on_retry_exhausted="tell")
    def work():
        runs.append(1)
        if len(runs) <= failures:
            raise Retry(delay=1)

    with running(broker) as worker:
        message = work.send()
        expected = min(failures, 2) + 1
        eventually(lambda: len(runs) == expected and (failures < 3 or told))
        rig.drain(queue, worker)
    exhausted = [(message.message_id, {"retries": 2, "max_retries": 2})]
    assert told == (exhausted if failures == 3 else [])
    assert len(runs) == expected


def test_a_failure_callback_counts_along(rig, broker, actor, queue):
    """`on_failure` is called for every failed attempt, with the number of retries so far and the error."""
    told = []

    @actor
    def tell(message_data, exception_data):
        told.append((message_data["options"]["retries"], exception_data))

    @actor(max_retries=2, min_backoff=20, max_backoff=40, on_failure="tell")
    def work():
        raise Broken("on purpose")

    with running(broker) as worker:
        work.send()
        eventually(lambda: len(told) == 3)
        rig.drain(queue, worker)
    assert sorted(retries for retries, _ in told) == [1, 2, 3]
    assert all(error == {"type": "Broken", "message": "on purpose"} for _, error in told)
