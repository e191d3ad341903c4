"""The options of periodic actors: what is understood, and how mistakes are named."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from itertools import takewhile

import dramatiq
import pytest
from cronsim import CronSim, CronSimError
from hypothesis import given, settings
from hypothesis import strategies as st

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.jetstream.cron import read
from dramatiq_jetstream.jetstream.names import (
    HEADER_MSG_ID,
    HEADER_SCHEDULE,
    HEADER_SCHEDULE_NEXT,
    HEADER_SCHEDULE_TARGET,
)
from dramatiq_jetstream.jetstream.reading import last_message
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.wire.connection import Publication
from tests.support.polling import eventually


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
        ("0 9 */1 * mon", "0 0 9 * * 1"),
        ("0 9 1-31 * */2", "0 0 9 * * 0,2,4,6"),
        ("0 9 1 * */1", "0 0 9 1 * *"),
        ("0 9 1-7 * mon", "0 0 9 1,2,3,4,5,6,7 * 1"),
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
        ({"cron": "0 9 */2 * mon"}, "write '0 9 1-31/2 * mon'"),
        ({"cron": "5 0 9 13 * */7"}, "write '5 0 9 13 * 0-6/7'"),
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


def _days_of_a_year(expression: str) -> list[datetime]:
    start = datetime(2026, 1, 1, tzinfo=UTC) - timedelta(seconds=1)
    return list(takewhile(lambda day: day.year == 2026, CronSim(expression, start)))


def _cannot_be_said(expression: str) -> bool:
    try:
        parsed = CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC))
        next(parsed)
    except (CronSimError, StopIteration):
        return True  # it never comes
    return parsed.day_and and len(parsed.days) < 31 and len({day % 7 for day in parsed.weekdays}) < 7


@st.composite
def _field(draw: st.DrawFn, low: int, high: int, names: tuple[str, ...] = ()) -> str:
    """A day or month field as people write them: stars, steps, ranges, lists, names."""

    def term() -> str:
        kind = draw(st.sampled_from(["star", "star step", "number", "range", "range step", "name"]))
        first, last = sorted(draw(st.tuples(st.integers(low, high), st.integers(low, high))))
        step = draw(st.integers(1, high))
        match kind:
            case "star":
                return "*"
            case "star step":
                return f"*/{step}"
            case "range":
                return f"{first}-{last}"
            case "range step":
                return f"{first}-{last}/{step}"
            case "name" if names:
                return draw(st.sampled_from(names))
        return str(first)

    if draw(st.booleans()):
        return "*"
    return ",".join(term() for _ in range(draw(st.integers(1, 3))))


_DAYS = st.builds(
    "{} {} {}".format,
    _field(1, 31),
    _field(1, 12, ("jan", "JUL", "dec")),
    _field(0, 7, ("sun", "Mon", "FRI")),
)


@settings(deadline=None)  # how long it takes is the machine's business
@given(_DAYS)
def test_what_is_stored_means_what_was_written(days: str) -> None:
    """Over a year, both read as crontab reads them; and no day field relies on a step that begins with a star."""
    try:
        schedule = read(cron=f"0 9 {days}").schedule
    except InvalidOption:
        assert _cannot_be_said(f"0 0 9 {days}")
        return
    assert all(field == "*" or "*" not in field for field in schedule.split())
    assert _days_of_a_year(schedule) == _days_of_a_year(f"0 0 9 {days}")


def test_the_server_ticks_when_crontab_would(broker: JetStreamBroker) -> None:
    """Of a thousand random expressions, those tick today that should, and their next day is the server's own word.

    All are due at the same second, a few seconds from now, on the days of their day fields. A tick tells when the
    server will store the next one.
    """
    chosen = random.Random(20_260_101)
    broker.declare_queue("q")
    broker.setup()
    due = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=10)
    moment = f"{due.second} {due.minute} {due.hour}"
    texts = {f"{moment} {_random_days(chosen)}" for _ in range(1_000)}
    wanted: dict[str, str] = {}
    for text in sorted(texts):
        try:
            wanted[text] = read(cron=text).schedule
        except InvalidOption:
            continue
    assert len(wanted) > 500
    names = {text: f"n{number}" for number, text in enumerate(wanted)}
    end = due + timedelta(seconds=2)
    schedules = {names[text]: schedule for text, schedule in wanted.items()}
    schedules["end"] = f"{end.second} {end.minute} {end.hour} * * *"
    _store_schedules(broker, schedules)
    assert datetime.now(UTC) < due, "this machine is too slow to be ready in time"
    eventually(lambda: _tick(broker, "end"), timeout=60)  # a tick is at most a quarter of a second late

    wrong = []
    for text, name in names.items():
        days = CronSim(text, due - timedelta(seconds=1))
        first, second = next(days), next(days)
        expected = second if first == due else None
        if _tick(broker, name) != expected:
            wrong.append((text, wanted[text], expected, _tick(broker, name)))
    assert wrong == []


def _random_days(chosen: random.Random) -> str:
    """Day, month and weekday of an expression; many are due today and none is out of range."""
    today = datetime.now(UTC)

    def field(now: int, low: int, high: int) -> str:
        numbers = [now, *(chosen.randint(low, high) for _ in range(3))]
        first, last = sorted(chosen.sample(numbers, 2))
        return chosen.choice(
            [
                "*",
                f"*/{chosen.randint(1, 4)}",
                f"*/{chosen.randint(2, 7)},{numbers[0]}",
                f"{numbers[0]},{numbers[1]}",
                f"{numbers[2]}",
                f"{first}-{last}",
                f"{first}-{last}/{chosen.randint(1, 3)}",
                f"{low}-{high}",
            ]
        )

    weekday = today.isoweekday() % 7
    return f"{field(today.day, 1, 31)} {field(today.month, 1, 12)} {field(weekday, 0, 6)}"


def _store_schedules(broker: JetStreamBroker, schedules: dict[str, str]) -> None:
    queue = broker.names.queue_subjects("q").removesuffix(">")
    broker.connection.publish_many(
        Publication(
            f"{queue}cron.{name}",
            b"",
            {
                HEADER_MSG_ID: name,
                HEADER_SCHEDULE: schedule,
                HEADER_SCHEDULE_TARGET: f"{queue}ticked.{name}",
            },
        )
        for name, schedule in schedules.items()
    )


def _tick(broker: JetStreamBroker, name: str) -> datetime | None:
    """When the server will store the next tick of a schedule, as its tick says; None when there was none."""
    subject = broker.names.queue_subjects("q").replace(">", f"ticked.{name}")
    stored = last_message(broker.connection, broker.names.queue_stream("q"), subject)
    return None if stored is None else datetime.fromisoformat(stored.headers[HEADER_SCHEDULE_NEXT])
