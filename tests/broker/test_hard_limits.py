"""The actor option `hard_time_limit` where no supervisor keeps it; `test_fleet_work` kills real processes for it."""

from __future__ import annotations

import dramatiq
import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.worker.hard_limits import HARD_TIME_LIMIT, limit_of


@pytest.mark.parametrize("limit", [0, -1, 1.5, "10", True])
def test_a_limit_that_can_never_work_is_refused_when_the_actor_is_declared(limit):
    """It names the option and the actor; nothing is contacted."""
    broker = JetStreamBroker("nats://127.0.0.1:1")
    with pytest.raises(InvalidOption, match=r"hard_time_limit=.* of actor 'work' cannot be used"):
        dramatiq.actor(lambda: None, actor_name="work", broker=broker, hard_time_limit=limit)


@pytest.mark.parametrize("asked", [None, 0, -1, 1.5, "10", True, 10**30])
def test_a_message_cannot_ask_for_a_limit_that_is_none(asked):
    """Another program may have sent it: its actor's limit holds, and no worker is killed at once."""
    assert limit_of({HARD_TIME_LIMIT: asked}, 500) == 500


def test_a_message_may_have_a_limit_of_its_own():
    """It counts in place of its actor's, or where that has none."""
    assert (limit_of({HARD_TIME_LIMIT: 10}, 500), limit_of({HARD_TIME_LIMIT: 10}, None)) == (10, 10)


def test_a_worker_without_a_supervisor_says_that_it_keeps_none(make_broker, caplog):
    """Once, with the actors that have one; the actors run as without it."""
    broker = make_broker()
    ran = []
    dramatiq.actor(ran.append, actor_name="work", broker=broker, hard_time_limit=60_000)
    broker.get_actor("work").send(1)
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    try:
        broker.join("default", timeout=30_000)
    finally:
        worker.stop()
    assert ran == [1]
    assert caplog.text.count("hard_time_limit of work is not kept here") == 1
