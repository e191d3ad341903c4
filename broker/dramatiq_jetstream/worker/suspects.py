"""Finds the message that kills its workers among those that died beside it.

The server counts deliveries. It does not know which of them were begun, or why a worker died: a message that takes its
process along has everything delivered again that the process held. So every message gets half of `max_deliveries`
unconditionally. A message that comes more often is a *suspect*. Suspects of a process start one after the other, and
each start is noted in a bucket before it happens: if the process dies then, no other suspect can be the cause, and none
is blamed. A suspect that still runs after `ALONE_SECONDS` does not keep the others waiting: its note is withdrawn
when the next one starts. A message becomes a dead letter when it was delivered more than `max_deliveries` times *and*
has a note for each delivery in the second half. Messages that were only prefetched or requeued, or died beside
another, have no notes.

The latest stored suspect starts first: messages start in the order in which they were stored, so the last ones that a
dead process held are the least likely to have been started.

A message that comes again because of a temporary error (see `rerouting`) is stored again before it becomes a suspect.
If that is not possible, as in an outage, its process remembers that this start was not to blame.

If the process dies between the note and the start, the start counts although it was none. If starts cannot be noted (a
worker without the permission, for instance), deliveries count instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import ApiError, BrokerError, PermissionDenied, QueueNotFound
from dramatiq_jetstream.kv import Bucket

from .delivery import Delivery

__all__ = ["BUCKET", "Suspects"]

#: The bucket in which the starts of suspects are counted.
BUCKET = "starts"

#: How long a suspect keeps the other suspects of its process from starting.
ALONE_SECONDS = 10.0

#: How long the starts of a suspect are kept after its last one, in milliseconds: a week.
KEPT_MS = 7 * 86_400_000

#: For how many messages a process remembers that some of their starts were not to blame.
MOST_EXCUSED = 10_000

logger = logging.getLogger(__name__)


class Suspects:
    """The messages that may kill this process.

    Parameters:
      bucket: Returns the bucket of starts, which is made when there is the first suspect.
    """

    def __init__(self, config: BrokerConfig, bucket: Callable[[], Bucket]) -> None:
        self._most = config.max_deliveries
        self._unquestioned = max(1, config.max_deliveries // 2)
        self._bucket = bucket
        self._waiting: list[Callable[[], None]] = []
        self.reset()

    def reset(self) -> None:
        """Start with none, as in the child of a fork."""
        self._lock = threading.Lock()
        self._alone: Delivery | None = None
        self._since = 0.0
        self._excused: Counter[str] = Counter()

    def include(self, delivery: Delivery) -> bool:
        """Whether a message has been delivered often enough to be a suspect."""
        return delivery.deliveries > self._unquestioned

    def listen(self, free: Callable[[], None]) -> None:
        """Have `free` called whenever the next suspect may run."""
        self._waiting.append(free)

    def ignore(self, free: Callable[[], None]) -> None:
        """Stop calling `free`."""
        if free in self._waiting:
            self._waiting.remove(free)

    def may_start(self, delivery: Delivery) -> bool:
        """Let a suspect start, which then keeps others from starting; False while another suspect runs alone."""
        with self._lock:
            survivor, now = self._alone, time.monotonic()
            if survivor is not None and now - self._since < ALONE_SECONDS:
                return False
            self._alone, self._since = delivery, now
        if survivor is not None:
            self._count(survivor, -1)
        return True

    def settled(self, delivery: Delivery) -> None:
        """Let the next suspect start, if this one was what it waited for."""
        with self._lock:
            if self._alone is not delivery:
                return
            self._alone = None
        for free in list(self._waiting):
            free()

    def excuse(self, delivery: Delivery) -> bool:
        """Hold a start against nothing; returns whether the next delivery would make the message a suspect."""
        if self.include(delivery) and len(self._excused) < MOST_EXCUSED:
            self._excused[delivery.origin] += 1
        return delivery.deliveries >= self._unquestioned

    def note_start(self, delivery: Delivery) -> None:
        """Count the start of a suspect, before it."""
        self._count(delivery, 1)

    def _count(self, delivery: Delivery, change: int) -> None:
        try:
            bucket = self._bucket()
            starts = max(0, self._starts(bucket, delivery) + change)
            bucket.put(delivery.origin, b"%d" % starts, ttl=KEPT_MS)
        except BrokerError as error:
            logger.warning("The starts of %s are not counted: %s", delivery, error)

    def has_killed(self, delivery: Delivery) -> bool:
        """Whether a message has used up its deliveries and was started in each of those that it had alone.

        Raises:
          BrokerError: When that cannot be known now.
        """
        if delivery.deliveries <= self._most:
            return False
        try:
            starts = self._starts(self._bucket(), delivery)
        except (ApiError, PermissionDenied, QueueNotFound) as error:
            logger.warning("The starts of %s were not counted, so its deliveries are: %s", delivery, error)
            return True
        return starts - self._excused[delivery.origin] >= self._most - self._unquestioned

    @staticmethod
    def _starts(bucket: Bucket, delivery: Delivery) -> int:
        entry = bucket.get(delivery.origin)
        return 0 if entry is None else int(entry.value)
