"""What the pages show, read from JetStream: shared for a second by all who look at the same, and kept no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

from dramatiq_jetstream import audit
from dramatiq_jetstream.activity import Minute, read_activity
from dramatiq_jetstream.broker import JetStreamBroker
from dramatiq_jetstream.dead_letters import DeadLetter
from dramatiq_jetstream.errors import NotFound, TopologyMissing
from dramatiq_jetstream.jetstream.inventory import queue_names
from dramatiq_jetstream.queues import QueueStats
from dramatiq_jetstream.rate_limits import Limit, limits_in_use
from dramatiq_jetstream.schedules import Schedule, list_schedules
from dramatiq_jetstream.sending.delays import Delayed, delayed_messages
from dramatiq_jetstream.workers import Running, WorkerInfo, list_workers

__all__ = ["Found", "Reader", "RunningHere"]

#: How long what was read is shown to others.
SHARED_SECONDS: Final = 1.0

#: How long a page looks through what its filters may leave; then it shows what it found, and the way to look further.
SEARCH_SECONDS: Final = 0.1

#: Delayed messages of a queue that a page sorts by their time.
MAX_DELAYED: Final = 500

HOUR_MS: Final = 3_600_000

T = TypeVar("T")


@dataclass(frozen=True)
class RunningHere:
    """A message that runs, and where."""

    message: Running
    worker: WorkerInfo


@dataclass(frozen=True)
class Found:
    """One page of a search, newest first.

    Attributes:
      letters: What the filters leave.
      searched: How many were looked at.
      further: The id of the last that was looked at, if there are more; the next page begins after it.
    """

    letters: list[DeadLetter] = field(default_factory=list)
    searched: int = 0
    further: str = ""


class Reader:
    """Reads what a broker's namespace has on the server; any thread may use it."""

    def __init__(self, broker: JetStreamBroker) -> None:
        self.broker = broker
        self._lock = threading.Lock()
        self._read: dict[str, tuple[float, Any]] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._minutes: list[Minute] = []
        self._counted = 0

    def forget(self) -> None:
        """Read everything again: something was changed."""
        with self._lock:
            self._read.clear()

    def _shared(self, what: str, read: Callable[[], T]) -> T:
        with self._lock:
            turn = self._turns.setdefault(what, threading.Lock())
        with turn:
            with self._lock:
                at, known = self._read.get(what, (-SHARED_SECONDS, None))
            if time.monotonic() - at < SHARED_SECONDS:
                return cast("T", known)
            found = read()
            with self._lock:
                self._read[what] = time.monotonic(), found
            return found

    def queue_names(self) -> list[str]:
        """The queues that exist."""
        return self._shared("names", lambda: queue_names(self.broker.connection, self.broker.names))

    def queues(self) -> list[QueueStats]:
        """The counts of all queues."""
        return self._shared("queues", lambda: list(self.broker.queue_stats_of(self.queue_names())))

    def workers(self) -> list[WorkerInfo]:
        """The live workers."""

        def read() -> list[WorkerInfo]:
            try:
                return list_workers(self.broker)
            except (NotFound, TopologyMissing):
                return []  # there never was one

        return self._shared("workers", read)

    def running(self) -> list[RunningHere]:
        """What runs, the longest first."""
        found = [RunningHere(message, worker) for worker in self.workers() for message in worker.running]
        return sorted(found, key=lambda here: here.message.since)

    def activity(self) -> list[Minute]:
        """What the fleet did in the last hour. Minutes that are over are read once."""

        def read() -> list[Minute]:
            now = int(time.time() // 60) * 60_000
            since = self._counted or now - 2 * HOUR_MS
            if now - since > 5 * 60_000:
                fresh = read_activity(self.broker)
            else:  # the minute before may have been counted on
                places = range(since - 60_000, now + 60_000, 60_000)
                fresh = [each for at in places for each in read_activity(self.broker, minute=at)]
            kept = {
                (each.queue, each.at): each for each in [*self._minutes, *fresh] if each.at > now - HOUR_MS
            }
            self._minutes, self._counted = list(kept.values()), now
            return self._minutes

        return self._shared("activity", read)

    def delayed(self, queue: str) -> list[Delayed]:
        """The first delayed messages of a queue that were stored, the next due first."""

        def read() -> list[Delayed]:
            broker = self.broker
            return delayed_messages(broker.connection, broker.names, queue, limit=MAX_DELAYED)

        return self._shared(f"delayed {queue}", read)

    def schedules(self) -> list[Schedule]:
        """The schedules of all queues."""
        return self._shared("schedules", lambda: list_schedules(self.broker))

    def limits(self) -> list[Limit]:
        """The limiters' counters that are not zero."""
        return self._shared("limits", lambda: limits_in_use(self.broker))

    def audit(self, limit: int) -> list[audit.Change]:
        """The newest changes."""
        return audit.changes(self.broker, limit=limit)

    def dead(
        self, matches: Callable[[DeadLetter], bool], *, queue: str | None, before: str | None, limit: int
    ) -> Found:
        """A page of the dead letters that match."""
        found: list[DeadLetter] = []
        searched, last = 0, ""
        deadline = time.monotonic() + SEARCH_SECONDS
        for letter in self.broker.dead_letters.newest(queue, before=before):
            if len(found) == limit or time.monotonic() > deadline:
                return Found(found, searched, last)
            searched, last = searched + 1, letter.id
            if matches(letter):
                found.append(letter)
        return Found(found, searched)

    def all_dead(
        self, matches: Callable[[DeadLetter], bool], *, queue: str | None, before: str | None = None
    ) -> Iterator[DeadLetter]:
        """All dead letters that match, newest first."""
        letters = self.broker.dead_letters.newest(queue, before=before)
        return (letter for letter in letters if matches(letter))
