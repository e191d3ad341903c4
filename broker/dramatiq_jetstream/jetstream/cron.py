"""When a periodic task is due: reads `cron=`, `every=` and `timezone=`, and writes JetStream's schedules.

The server knows six fields, the first of them seconds (ADR-51). What people write for crontab has five; names,
and 7 for Sunday, are allowed there too. Fields are written out in numbers, so that the server and this library mean
the same.

The two day fields need more than that. In crontab a day must match both if one of them begins with `*`, and either
otherwise. The server joins them with "and" only if one is a plain `*`, which matches every day anyway, so it cannot
say "odd days that are Mondays". Such an expression is refused: any translation would run on other days.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from cronsim.cronsim import Field

from dramatiq_jetstream.errors import InvalidOption

__all__ = ["Expression", "from_text", "read"]

_FIELDS = ("second", "minute", "hour", "day of month", "month", "day of week")
_RANGES = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_DAY, _WEEKDAY = 3, 5

#: The shortest interval that the server takes, in milliseconds.
SHORTEST_MS = 1_000


@dataclass(frozen=True)
class Expression:
    """When ticks are due.

    Attributes:
      text: What the actor's declaration says, for people.
      schedule: The value of `Nats-Schedule`.
      zone: The value of `Nats-Schedule-Time-Zone`, or None for UTC.
    """

    text: str
    schedule: str
    zone: str | None = None

    def next(self, after: int) -> int | None:
        """The first tick after a time, both in milliseconds since 1970; None when that depends on the last tick."""
        if self.schedule.startswith("@every"):
            return None
        start = datetime.fromtimestamp(after / 1000, ZoneInfo(self.zone) if self.zone else UTC)
        return int(next(CronSim(self.schedule, start)).timestamp() * 1000)

    def as_text(self) -> str:
        """Schedule and zone in one text, which `from_text` reads."""
        return f"{self.schedule} {self.zone or ''}".rstrip()


def from_text(text: str) -> Expression:
    """The expression that `as_text` wrote."""
    tokens = text.split(" ")
    fields = 2 if text.startswith("@every") else len(_FIELDS)
    return Expression("", " ".join(tokens[:fields]), " ".join(tokens[fields:]) or None)


def read(cron: object = None, every: object = None, zone: object = None) -> Expression | None:
    """Read an actor's options; None when it is not periodic.

    Parameters:
      cron: Five fields as in crontab, or six with seconds first.
      every: Milliseconds between two ticks, whole seconds.
      zone: The IANA name of the time zone in which `cron` is meant; None for UTC.

    Raises:
      InvalidOption: When one of them cannot be used; the message names the field.
    """
    if cron is None and every is None:
        if zone is not None:
            raise InvalidOption(f"timezone={zone!r} has no meaning without cron.")
        return None
    if cron is not None and every is not None:
        raise InvalidOption("cron and every cannot be used together: choose one.")
    if every is not None:
        if zone is not None:
            raise InvalidOption(f"timezone={zone!r} cannot be used with every: an interval has no time zone.")
        return _interval(every)
    return _cron(cron, _zone(zone))


def _interval(every: object) -> Expression:
    if isinstance(every, bool) or not isinstance(every, int) or every < SHORTEST_MS or every % 1_000:
        raise InvalidOption(
            f"every={every!r} cannot be used: give milliseconds in whole seconds, {SHORTEST_MS} or more."
        )
    return Expression(f"every {every} ms", f"@every {every // 1_000}s")


def _zone(zone: object) -> str | None:
    if zone is None:
        return None
    try:
        if not isinstance(zone, str):
            raise ValueError
        return ZoneInfo(zone).key
    except (ValueError, KeyError, OSError):
        raise InvalidOption(
            f"timezone={zone!r} cannot be used: give an IANA name such as 'Europe/Berlin'."
        ) from None


def _cron(cron: object, zone: str | None) -> Expression:
    if not isinstance(cron, str):
        raise InvalidOption(f"cron={cron!r} cannot be used: give a text such as '*/5 * * * *'.")
    parts = cron.split()
    if len(parts) not in (5, 6):
        raise InvalidOption(
            f"cron={cron!r} has {len(parts)} fields: five are needed (minute, hour, day of month, month, "
            "day of week), or six with the second first."
        )
    parts = ["0", *parts] if len(parts) == 5 else parts
    for position, part in enumerate(parts):
        _check(cron, position, part)
    try:
        parsed = CronSim(" ".join(parts), datetime.now(UTC))
        next(parsed)
    except (CronSimError, StopIteration):
        raise InvalidOption(f"cron={cron!r} names a day that never comes.") from None
    values = [
        parsed.seconds,
        parsed.minutes,
        parsed.hours,
        parsed.days,
        parsed.months,
        {day % 7 for day in parsed.weekdays if isinstance(day, int)},
    ]
    written = [
        "*" if part == "*" else ",".join(map(str, sorted(numbers)))
        for part, numbers in zip(parts, values, strict=True)
    ]
    if parsed.day_and:
        unrestricted = [position for position in (_DAY, _WEEKDAY) if len(values[position]) == _size(position)]
        if not unrestricted:
            raise InvalidOption(_both_days(cron))
        for position in unrestricted:
            written[position] = "*"
    return Expression(cron, " ".join(written), zone)


def _size(position: int) -> int:
    low, high = _RANGES[position]
    return high - low + 1


def _both_days(cron: str) -> str:
    *times, day, month, weekday = cron.split()
    either = (day.replace("*", "1-31"), month, weekday.replace("*", "0-6"))
    return (
        f"cron={cron!r} cannot be used: one day field begins with '*', so a day has to match both {day!r} and "
        f"{weekday!r}, which JetStream cannot do. Put '*' in one of the two and check the other in the actor; "
        f"or, if either may match, write {' '.join([*times, *either])!r}."
    )


def _check(cron: str, position: int, part: str) -> None:
    """Check one field alone, so that an error can name it."""
    try:
        values = Field(position).parse(part.upper())
    except CronSimError:
        values = set()
    # Last days and nth weekdays, which cronsim knows and the server does not, are pairs or negative.
    if not values or not all(isinstance(value, int) and value >= 0 for value in values):
        low, high = _RANGES[position]
        raise InvalidOption(
            f"cron={cron!r} cannot be used: the {_FIELDS[position]} {part!r} is not one "
            f"(numbers from {low} to {high}, lists, ranges and steps)."
        )
