"""The options of periodic actors: what is understood, and how mistakes are named."""

from __future__ import annotations

from datetime import UTC, datetime

import dramatiq
import pytest

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.jetstream.cron import read
from dramatiq_jetstream.periodic import Periodic


def _next(expression: str, zone: str | None, after: str) -> str:
    start = int(datetime.fromisoformat(after).timestamp() * 1000)
    due = read(cron=expression, zone=zone).next(start)
    return datetime.fromtimestamp(due / 1000, UTC).isoformat()


@pytest.mark.parametrize(
    ("expression", "schedule"),
    [
        ("*/15 * * * *", "0 0,15,30,45 * * * *"),
        ("30 6 * * mon-fri", "0 30 6 * * 1,2,3,4,5"),
        ("0 0 1 jan,jul *", "0 0 0 1 1,7 *"),
        ("0 12 * * 7", "0 0 12 * * 0"),
        ("*/10 * * * * *", "0,10,20,30,40,50 * * * * *"),
    ],
)
def test_five_and_six_fields_become_what_the_server_knows(expression: str, schedule: str) -> None:
    """Names, steps and 7 for Sunday are written out."""
    assert read(cron=expression).schedule == schedule


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cron": "61 * * * *"}, "the minute '61'"),
        ({"cron": "* 24 * * *"}, "the hour '24'"),
        ({"cron": "0 0 0 * *"}, "the day of month '0'"),
        ({"cron": "0 0 * 13 *"}, "the month '13'"),
        ({"cron": "0 0 * * 8"}, "the day of week '8'"),
        ({"cron": "0 0 L * *"}, "the day of month 'L'"),
        ({"cron": "0 0 * * 5#1"}, "the day of week '5#1'"),
        ({"cron": "99 0 0 * * *"}, "the second '99'"),
        ({"cron": "0 0 31 2 *"}, "never comes"),
        ({"cron": "* * * *"}, "has 4 fields"),
        ({"cron": 5}, "give a text"),
        ({"every": 500}, "every=500"),
        ({"every": 1_500}, "whole seconds"),
        ({"every": True}, "every=True"),
        ({"cron": "* * * * *", "timezone": "Berlin"}, "timezone='Berlin'"),
        ({"every": 1_000, "timezone": "Europe/Berlin"}, "no time zone"),
        ({"timezone": "Europe/Berlin"}, "no meaning"),
        ({"cron": "* * * * *", "every": 1_000}, "choose one"),
    ],
)
def test_a_mistake_is_an_error_where_the_actor_is_declared(options: dict[str, object], named: str) -> None:
    """And the message names the actor and the field; nothing is contacted."""
    broker = JetStreamBroker("nats://127.0.0.1:1")
    broker.add_middleware(Periodic())
    with pytest.raises(InvalidOption, match="Actor 'tick'") as raised:
        dramatiq.actor(lambda: None, actor_name="tick", broker=broker, **options)
    assert named in str(raised.value)


def test_the_next_tick_is_in_the_time_zone() -> None:
    """Also over the hour that a change to summer time skips."""
    assert _next("0 9 * * *", None, "2026-01-05T10:00:00+00:00") == "2026-01-06T09:00:00+00:00"
    assert _next("0 9 * * *", "Europe/Berlin", "2026-01-05T10:00:00+00:00") == "2026-01-06T08:00:00+00:00"
    assert _next("0 9 * * *", "Europe/Berlin", "2026-07-05T10:00:00+00:00") == "2026-07-06T07:00:00+00:00"
