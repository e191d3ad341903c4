"""Options that mean something in another library and nothing here are errors that say what to give."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import dramatiq
import pytest
from dramatiq.middleware import Middleware, Retries

from dramatiq_jetstream.errors import InvalidOption
from tests.broker.conformance.workers import running
from tests.support.polling import eventually


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"countdown": 10}, "delay="),
        ({"eta": datetime(2030, 1, 1, tzinfo=UTC)}, "delay="),
        ({"eta": time.time() * 1000 + 3_600_000}, "delay="),
        ({"queue": "mail"}, "queue_name="),
        ({"routing_key": "mail"}, "queue_name="),
        ({"priority": 3}, "broker_priority="),
        ({"expires": 60}, "max_age="),
        ({"soft_time_limit": 60}, "time_limit="),
        ({"link": "other"}, "on_success="),
        ({"broker_priority": 3}, "max_priority="),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_option_of_another_library_says_what_to_give(broker, options, said):
    """Nothing is stored, with one message and with many."""

    @dramatiq.actor(broker=broker)
    def work():
        pass

    with pytest.raises(InvalidOption, match=said) as raised:
        work.send_with_options(**options)
    assert "means nothing here" in str(raised.value)
    with pytest.raises(InvalidOption, match=said):
        broker.enqueue_many([work.message_with_options(**options)])
    broker.setup()
    assert broker.queue_stats("default").ready == 0


def test_an_option_that_a_middleware_knows_is_its_own(broker):
    """Whatever it is called."""

    class Expiry(Middleware):
        actor_options = {"expires"}  # noqa: RUF012 - as Dramatiq asks for it

    broker.add_middleware(Expiry())

    @dramatiq.actor(broker=broker)
    def work():
        pass

    work.send_with_options(expires=60)
    assert broker.queue_stats("default").ready == 1


def test_a_message_that_another_program_sent_with_one_is_retried(make_broker):
    """It is here already, and its option has done no harm."""
    broker = make_broker(middleware=[Retries(min_backoff=1, max_backoff=2)])
    ran = []

    @dramatiq.actor(broker=broker)
    def work():
        ran.append(1)
        if len(ran) == 1:
            raise ValueError

    broker.setup()
    message = work.message_with_options(countdown=10)
    broker.connection.publish(broker.names.task("default"), message.encode(), {})
    with running(broker):
        eventually(lambda: len(ran) == 2, timeout=60)


def test_a_queue_in_max_in_flight_that_does_not_exist_is_an_error(make_broker):
    """As the topology is prepared; one of another program is none."""
    make_other = make_broker()
    dramatiq.actor(lambda: None, actor_name="other", queue_name="elsewhere", broker=make_other)
    make_other.setup()
    broker = make_broker(max_in_flight={"elsewhere": 1, "payment": 3})
    dramatiq.actor(lambda: None, actor_name="work", queue_name="payments", broker=broker)
    with pytest.raises(InvalidOption, match=r"'payment', which does not exist.*Did you mean 'payments'"):
        broker.setup()
    fine = make_broker(max_in_flight={"elsewhere": 1})
    dramatiq.actor(lambda: None, actor_name="work", queue_name="payments", broker=fine)
    fine.setup()
