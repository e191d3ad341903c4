"""What a fleet did, minute by minute: counted by its workers, added up by the server."""

from __future__ import annotations

import time

import dramatiq
import pytest
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq_abort import Abort

from dramatiq_jetstream.activity import Minute, percentile, read_activity
from dramatiq_jetstream.jetstream.names import HEADER_TICK
from dramatiq_jetstream.worker import activity, presence
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


@pytest.fixture
def quick(monkeypatch):
    """Counts are sent as soon as they are there."""
    monkeypatch.setattr(presence, "BATCH_SECONDS", 0.1)
    monkeypatch.setattr(activity, "INTERVAL_SECONDS", 0.1)


def totals(broker):
    """Attempts that ended, and those that failed, by queue."""
    found = {}
    for minute in read_activity(broker):
        done, failed = found.get(minute.queue, (0, 0))
        found[minute.queue] = done + minute.done, failed + minute.failed
    return found


def test_attempts_and_failures_are_counted_by_queue(broker, make_broker, quick):
    """Two processes add to the same counters; every attempt counts, retries too."""
    assert read_activity(broker) == []

    @dramatiq.actor(max_retries=1, min_backoff=1, max_backoff=1)
    def fail():
        raise RuntimeError("as the test wants it")

    dramatiq.actor(lambda: time.sleep(0.05), actor_name="work", queue_name="a.b")
    other = make_broker()
    dramatiq.actor(lambda: None, actor_name="work", queue_name="a.b", broker=other)
    with running(broker), running(other):
        for _ in range(20):
            broker.get_actor("work").send()
        fail.send()
        eventually(lambda: totals(broker) == {"a.b": (20, 0), "default": (2, 2)})
    found = [minute for minute in read_activity(broker) if minute.queue == "a.b"]
    assert sum(sum(minute.waited.values()) for minute in found) == 20
    assert abs(found[0].at - time.time() * 1000) < 600_000
    assert read_activity(broker, minute=found[0].at) != []
    assert read_activity(broker, minute=0) == []


def test_what_is_aborted_or_comes_too_late_is_no_failure(broker, quick):
    """Both end an attempt, and no one has to look into them."""

    class Late(Middleware):
        def before_process_message(self, broker, message):
            message.fail()
            raise SkipMessage("too late")

    class Aborted(Middleware):
        def before_process_message(self, broker, message):
            if message.args == ("aborted",):
                raise Abort

    broker.add_middleware(Aborted())
    work = dramatiq.actor(lambda what: None, actor_name="work", max_retries=0)
    with running(broker):
        work.send("aborted")
        eventually(lambda: totals(broker) == {"default": (1, 0)})
    broker.middleware.pop()
    broker.add_middleware(Late())
    body = work.message("late").encode()
    for headers in ({}, {HEADER_TICK: "work"}, {HEADER_TICK: "work"}):
        broker.connection.publish(broker.names.task("default"), body, headers)
    with running(broker):
        eventually(lambda: totals(broker) == {"default": (4, 1)})


def test_a_worker_that_stops_has_counted_all(broker):
    """What ended just before is sent with the last word."""
    dramatiq.actor(lambda: None, actor_name="work")
    with running(broker):
        broker.get_actor("work").send()
        broker.join("default", timeout=30_000)
    eventually(lambda: totals(broker) == {"default": (1, 0)})


def test_counters_that_were_lost_begin_anew(broker, quick):
    """A server that forgot what it had in memory is told again where to count."""
    dramatiq.actor(lambda: None, actor_name="work")
    with running(broker):
        broker.get_actor("work").send()
        eventually(lambda: totals(broker))
        broker.connection.api(f"STREAM.DELETE.{broker.names.activity_stream}")

        def counted():
            broker.get_actor("work").send()
            return totals(broker)

        eventually(counted)


@pytest.mark.parametrize(
    ("times", "share", "expected"),
    [
        ({}, 0.5, None),
        ({0: 4}, 1, 1),
        ({3: 10}, 0.5, 6),
        ({3: 90, 10: 10}, 0.95, 768),
        ({3: 90, 10: 10}, 0.5, 4 + 4 * 50 / 90),
    ],
)
def test_a_percentile_is_within_its_power_of_two(times, share, expected):
    """Counts by powers of two are spread evenly within each."""
    assert percentile(times, share) == (None if expected is None else pytest.approx(expected))


def test_a_minute_adds_up_its_attempts():
    """What ran is what was done."""
    assert Minute("q", 0, ran={1: 2, 5: 3}).done == 5
