"""The numbers people look at: orders, revenue, failures and time to confirmed by hour and day, and what sold.

A fold (`tasks.folds`) over the stream. An event counts at its first place there, and only if the record of its order
has it at that place: so each order counts once, however often its events are repeated, and whatever strangers publish.
What the record does not have yet is added to it first, as a worker would.

The numbers of a day are one document. They name no customer, and stay when orders leave the stream.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import islice, takewhile
from typing import Any, Final, Protocol

from orders.v1.events_pb2 import (
    OrderCancelled,
    OrderChargedBack,
    OrderConfirmed,
    OrderCreated,
    OrderFailed,
    OrderOffered,
    OrderRefunded,
    OrderRejected,
)

from .events import Happened, key_of, order_id_of
from .folds import Fold, Position, Progress, read_position, unseen
from .model import HistoryEntry, Order
from .ports import BatchBucket, Bucket
from .stream import EventStream

_NAME: Final = "figures"

#: The key of the position that is in use.
USED: Final = f"{_NAME}.position"

#: The events that count.
_COUNTED: Final = (
    OrderCreated,
    OrderOffered,
    OrderConfirmed,
    OrderRejected,
    OrderFailed,
    OrderCancelled,
    OrderRefunded,
    OrderChargedBack,
)

#: How many events make a batch.
_EVENTS: Final = 500

#: How old an event is before it is counted, in milliseconds: its record has it by then, as a rule.
SETTLED_MS: Final = 2_000

#: Times are counted in classes, each this much longer than the one before, from a millisecond on.
_CLASS: Final = 1.1

#: How many days are read at most.
MAX_DAYS: Final = 400


@dataclass(slots=True)
class Numbers:
    """What happened in an hour or a day: orders by what happened to them, money in minor units.

    `placed`, `offered`, `confirmed`, `rejected`, `failed` and `cancelled` are orders; `times` has how many of those
    confirmed took how long, without the time that their customers took to accept an offer.
    """

    placed: int = 0
    offered: int = 0
    confirmed: int = 0
    rejected: int = 0
    failed: int = 0
    cancelled: int = 0
    revenue: int = 0
    refunded: int = 0
    times: Counter[int] = field(default_factory=Counter)

    def took(self, milliseconds: int) -> None:
        """Count how long a confirmed order took."""
        self.times[_class_of(milliseconds)] += 1

    def within(self, share: float) -> float | None:
        """Return in how many seconds this share of the confirmed orders was confirmed, about 10 % too long at most."""
        left = math.ceil(share * self.times.total())
        for number, count in sorted(self.times.items()):
            left -= count
            if left <= 0:
                return float(_CLASS**number / 1000)
        return None

    def add(self, other: Numbers) -> None:
        """Add the numbers of another time."""
        for name in _PLAIN:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.times.update(other.times)

    def to_json(self) -> dict[str, Any]:
        """Return what is stored: what is not zero."""
        stored: dict[str, Any] = {name: value for name in _PLAIN if (value := getattr(self, name))}
        if self.times:
            stored["times"] = {str(number): count for number, count in sorted(self.times.items())}
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Numbers:
        """Return what `to_json` described."""
        times = Counter({int(number): count for number, count in stored.get("times", {}).items()})
        return cls(**{name: stored.get(name, 0) for name in _PLAIN}, times=times)


_PLAIN: Final = ("placed", "offered", "confirmed", "rejected", "failed", "cancelled", "revenue", "refunded")


def _class_of(milliseconds: int) -> int:
    return math.ceil(math.log(max(1, milliseconds), _CLASS))


@dataclass(slots=True)
class Day:
    """The numbers of a day in UTC by its hours, and by sku how many pieces were sold for how much."""

    hours: dict[int, Numbers] = field(default_factory=dict)
    sold: dict[str, tuple[int, int]] = field(default_factory=dict)

    def hour(self, number: int) -> Numbers:
        """Return the numbers of an hour, to add to them."""
        return self.hours.setdefault(number, Numbers())

    @property
    def whole(self) -> Numbers:
        """The numbers of the whole day."""
        total = Numbers()
        for one in self.hours.values():
            total.add(one)
        return total

    def encode(self) -> bytes:
        """Return the day as it is stored."""
        stored = {
            "hours": {str(number): one.to_json() for number, one in sorted(self.hours.items())},
            "sold": self.sold,
        }
        return json.dumps(stored, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, value: bytes) -> Day:
        """Return the day that `encode` stored."""
        stored = json.loads(value)
        return cls(
            {int(number): Numbers.from_json(one) for number, one in stored["hours"].items()},
            {sku: (pieces, amount) for sku, (pieces, amount) in stored["sold"].items()},
        )


class Records(Protocol):
    """The orders, as far as the ledger confirms them."""

    def get(self, order_id: str) -> Order | None: ...
    def several(self, order_ids: Sequence[str]) -> Mapping[str, Order]: ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """The days that a rebuild takes over: up to `until`, as they were when the events up to `reached` were counted."""

    until: date
    reached: int
    days: Mapping[date, bytes]

    def has(self, entry: HistoryEntry) -> bool:
        """Whether an event is counted in these days."""
        return entry.at.date() <= self.until and entry.sequence <= self.reached


_NOTHING: Final = _Kept(date.min, 0, {})


class Counting:
    """Counts. Any number of processes may try to at once.

    Parameters:
      bucket: Where the numbers are.
      project: Adds an event to the record of its order, as far as the ledger confirms it.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        bucket: BatchBucket,
        stream: EventStream,
        records: Records,
        project: Callable[[Happened], object],
        now: Callable[[], int],
    ) -> None:
        self._bucket = bucket
        self._fold = Fold(bucket, _NAME)
        self._stream = stream
        self._records = records
        self._project = project
        self._now = now

    def advance(self, seconds: float = 20.0) -> bool:
        """Count what was stored since; returns whether that is all.

        Parameters:
          seconds: No further batch is begun after that.
        """
        position = self._fold.begin()
        if position is not None and position.reached > self._stream.range().last:
            position = self._fold.move(position, 0, {})  # the stream was made again; what was counted, was
        return position is not None and self._advance(position, seconds) is not None

    def reached(self) -> int:
        """Return up to which event all are counted, in the figures that are in use."""
        position = read_position(self._bucket, USED)
        return 0 if position is None else position.reached

    def rebuild(self, progress: Progress = unseen) -> None:
        """Count all again, but for the days up to the one on which the stream begins.

        Those keep what was counted of them: a part of it has left the stream, and a day does not say which.

        Raises:
          RebuildConflict: When another process does the same.
        """
        last = self._stream.range().last
        kept = self._kept()

        def derive(position: Position) -> Position | None:
            moved = position if position.reached else self._keep(position, kept)
            if moved is None:
                return None
            return self._advance(moved, math.inf, last, progress, self._stream.read, kept)

        self._fold.rebuild(derive)

    def _kept(self) -> _Kept:
        """Return what cannot be counted again, because events of it have left the stream."""
        there = self._stream.range()
        oldest = self._stream.stored_at(there.first) if there.first > 1 else None
        used = read_position(self._bucket, USED)
        if oldest is None or used is None:
            return _NOTHING
        until = datetime.fromtimestamp(oldest.time / 1000, UTC).date()
        while True:
            entries = self._bucket.items(f"{_NAME}.{used.generation}.day.")
            days = {date.fromisoformat(one.key.rpartition(".")[2]): one.value for one in entries}
            before, used = used, read_position(self._bucket, USED)
            if used is None:
                return _NOTHING
            if used == before:  # nothing was counted while the days were read
                break
        # Of a stream that was made again nothing was counted yet.
        reached = used.reached if used.reached <= there.last else 0
        return _Kept(until, reached, {day: value for day, value in days.items() if day <= until})

    def _keep(self, position: Position, kept: _Kept) -> Position | None:
        """Take over what cannot be counted again."""
        for number, value in kept.days.items():
            moved = self._fold.move(position, 0, {_day_key(position.generation, number): (value, 0)})
            if moved is None:
                return None
            position = moved
        return position

    def _advance(
        self,
        position: Position,
        seconds: float,
        last: int = 0,
        progress: Progress = unseen,
        read: Callable[[int], Iterator[Happened]] | None = None,
        kept: _Kept | None = None,
    ) -> Position | None:
        """Move a position to the end of the stream; None when time was up, or another process was faster.

        Parameters:
          read: Yields the events; those that are there by default. No event is erased before it was counted.
          kept: What was taken over.
        """
        deadline = time.monotonic() + seconds
        settled = self._now() - SETTLED_MS
        stored = (read or self._stream.present)(position.reached + 1)
        events = takewhile(lambda one: one.at <= settled, stored)
        while batch := list(islice(events, _EVENTS)):
            moved = None if time.monotonic() > deadline else self._store(position, batch, kept or _NOTHING)
            if moved is None:
                return None
            position = moved
            progress(min(position.reached, last), last)
        return position

    def _store(self, position: Position, batch: list[Happened], kept: _Kept) -> Position | None:
        """Count a batch and move the position behind it."""
        found = self._found([one for one in batch if isinstance(one.event, _COUNTED)])
        counted = [one for one in found if not kept.has(one[1])]
        days = sorted({entry.at.date() for _, entry, _ in counted})
        known = read_days(self._bucket, position, days)
        for happened, entry, order in counted:
            day, _ = known[entry.at.date()]
            _count(day, happened, entry, order)
        updates = {
            _day_key(position.generation, number): (day.encode(), revision)
            for number, (day, revision) in known.items()
        }
        return self._fold.move(position, batch[-1].sequence, updates)

    def _found(self, batch: list[Happened]) -> Iterator[tuple[Happened, HistoryEntry, Order]]:
        """Yield the events that count, with what the record says of them."""
        orders = dict(self._records.several([order_id_of(one.event) for one in batch])) if batch else {}
        for happened in batch:
            order_id, key = order_id_of(happened.event), key_of(happened.event)
            entry = _entry(orders.get(order_id), key)
            if entry is None or entry.sequence > happened.sequence:
                self._project(happened)
                fresh = self._records.get(order_id)
                if fresh is None:
                    continue
                orders[order_id] = fresh
                entry = _entry(fresh, key)
            if entry is not None and entry.sequence == happened.sequence:
                yield happened, entry, orders[order_id]


def _count(day: Day, happened: Happened, entry: HistoryEntry, order: Order) -> None:
    hour = day.hour(entry.at.hour)
    match happened.event:
        case OrderCreated():
            hour.placed += 1
        case OrderConfirmed():
            hour.confirmed += 1
            hour.revenue += order.total
            began = _entry(order, "offer_accepted") or _entry(order, "created")
            if began is not None:
                hour.took(int((entry.at - began.at).total_seconds() * 1000))
            for item in order.items:
                pieces, amount = day.sold.get(item.sku, (0, 0))
                day.sold[item.sku] = pieces + item.quantity, amount + item.quantity * (item.unit_price or 0)
        case OrderOffered():
            hour.offered += 1
        case OrderRejected():
            hour.rejected += 1
        case OrderCancelled():
            hour.cancelled += 1
        case OrderRefunded() | OrderChargedBack():
            hour.refunded += int(entry.detail.get("amount_minor", 0))
        case OrderFailed():
            # An order that fails again, in another step, has failed once.
            first = min(one.sequence for one in order.history if one.event == "failed")
            hour.failed += entry.sequence == first


def _entry(order: Order | None, key: str) -> HistoryEntry | None:
    """Return what a record says of one event of its order."""
    name, _, which = key.partition(".")
    for entry in () if order is None else order.history:
        named = (entry.detail.get(name) for name in ("step", "refund", "chargeback_id"))
        if entry.event == name and which in ("", *named):
            return entry
    return None


def _day_key(generation: int, day: date) -> str:
    return f"{_NAME}.{generation}.day.{day.isoformat()}"


def read_days(bucket: Bucket, position: Position, days: Sequence[date]) -> dict[date, tuple[Day, int]]:
    """Return days with their revisions, empty ones where nothing happened."""
    keys = {_day_key(position.generation, number): number for number in days}
    entries = bucket.get_many(list(keys), since=(position.key, position.revision)) if keys else {}
    found = {number: (Day(), 0) for number in days}
    for key, entry in entries.items():
        found[keys[key]] = Day.decode(entry.value), entry.revision
    return found


@dataclass(frozen=True, slots=True)
class Span:
    """An hour or a day: when it begins, and its numbers."""

    begins: datetime
    numbers: Numbers


class Figures:
    """Reads what was counted.

    Parameters:
      now: The time in milliseconds.
    """

    def __init__(self, bucket: Bucket, now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._now = now

    def hours(self, count: int) -> list[Span]:
        """Return the last hours, this one included, oldest first."""
        end = datetime.fromtimestamp(self._now() / 1000, UTC).replace(minute=0, second=0, microsecond=0)
        begins = [end - timedelta(hours=back) for back in reversed(range(count))]
        days = self._days(sorted({moment.date() for moment in begins}))
        return [Span(moment, days[moment.date()].hours.get(moment.hour, Numbers())) for moment in begins]

    def days(self, count: int) -> tuple[list[Span], list[tuple[str, int, int]]]:
        """Return the last days, today included, oldest first; and what sold, the best by revenue first.

        Of each product: its sku, how many pieces, for how much.
        """
        today = datetime.fromtimestamp(self._now() / 1000, UTC).date()
        wanted = [today - timedelta(days=back) for back in reversed(range(min(count, MAX_DAYS)))]
        days = self._days(wanted)
        pieces: Counter[str] = Counter()
        amounts: Counter[str] = Counter()
        for day in days.values():
            for sku, (sold, amount) in day.sold.items():
                pieces[sku] += sold
                amounts[sku] += amount
        spans = [
            Span(datetime(number.year, number.month, number.day, tzinfo=UTC), days[number].whole)
            for number in wanted
        ]
        best = sorted(pieces, key=lambda sku: (-amounts[sku], -pieces[sku], sku))
        return spans, [(sku, pieces[sku], amounts[sku]) for sku in best]

    def _days(self, wanted: Sequence[date]) -> dict[date, Day]:
        position = read_position(self._bucket, USED)
        if position is None:
            return {number: Day() for number in wanted}
        return {number: day for number, (day, _) in read_days(self._bucket, position, wanted).items()}
