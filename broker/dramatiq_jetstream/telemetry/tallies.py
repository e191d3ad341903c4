"""Counts messages and their durations at next to no cost; OpenTelemetry reads the totals when it exports.

Recording a value through OpenTelemetry's SDK takes longer than Dramatiq needs to handle a message, most of it
for locks that all worker threads share. Here each thread counts for itself, without a lock, and the one who
exports adds the threads up.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import ref

from .conventions import DURATION_BUCKETS

#: The kind of what is counted, then what tells one count from another.
Key = tuple[str | None, ...]


@dataclass(slots=True)
class Durations:
    """A histogram of seconds by the conventions' buckets."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BUCKETS) + 1))
    total: float = 0.0
    shortest: float = float("inf")
    longest: float = 0.0

    def record(self, seconds: float) -> None:
        self.buckets[bisect_left(DURATION_BUCKETS, seconds)] += 1
        self.total += seconds
        if seconds < self.shortest:
            self.shortest = seconds
        if seconds > self.longest:
            self.longest = seconds

    @property
    def count(self) -> int:
        # Not a field of its own: read while another thread records, it would disagree with the buckets.
        return sum(self.buckets)

    def add(self, other: Durations) -> None:
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]
        self.total += other.total
        self.shortest = min(self.shortest, other.shortest)
        self.longest = max(self.longest, other.longest)


@dataclass(slots=True)
class Count:
    """How often something happened."""

    number: int = 0


class _Table:
    """What one thread has counted."""

    __slots__ = ("counts", "durations")

    def __init__(self) -> None:
        self.counts: dict[Key, Count] = {}
        self.durations: dict[Key, Durations] = {}

    def add(self, other: _Table) -> None:
        # list() takes what is there in one step, while the other thread may go on.
        for key, count in list(other.counts.items()):
            self.counts.setdefault(key, Count()).number += count.number
        for key, durations in list(other.durations.items()):
            self.durations.setdefault(key, Durations()).add(durations)


class _OwnTable(threading.local):
    table: _Table | None = None


class Tallies:
    """The totals of all threads of this process."""

    def __init__(self) -> None:
        self._own = _OwnTable()
        self._lock = threading.Lock()
        self._tables: list[tuple[ref[threading.Thread], _Table]] = []
        #: What threads have counted that are no more.
        self._past = _Table()

    def counter(self, key: Key) -> Count:
        """Where the calling thread counts something; nobody else may."""
        counts = (self._own.table or self._make_table()).counts
        return counts.get(key) or counts.setdefault(key, Count())

    def timer(self, key: Key) -> Durations:
        """Where the calling thread records durations of something; nobody else may."""
        durations = (self._own.table or self._make_table()).durations
        return durations.get(key) or durations.setdefault(key, Durations())

    def count(self, key: Key) -> None:
        """Add one."""
        self.counter(key).number += 1

    def record(self, key: Key, seconds: float) -> None:
        """Add one duration."""
        self.timer(key).record(seconds)

    def totals(self) -> tuple[Mapping[Key, int], Mapping[Key, Durations]]:
        """Everything counted so far."""
        with self._lock:
            alive = []
            for thread, table in self._tables:
                running = thread()
                if running is None or not running.is_alive():
                    self._past.add(table)
                else:
                    alive.append((thread, table))
            self._tables = alive
            sum_ = _Table()
            sum_.add(self._past)
            for _, table in alive:
                sum_.add(table)
        return {key: count.number for key, count in sum_.counts.items()}, sum_.durations

    def _make_table(self) -> _Table:
        table = self._own.table = _Table()
        with self._lock:
            self._tables.append((ref(threading.current_thread()), table))
        return table
