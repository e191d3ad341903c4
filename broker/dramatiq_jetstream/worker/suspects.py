"""Finds the message that kills its workers among those that died beside it.

The server counts deliveries. It does not know which of them were begun, or why a worker died: a message that takes its
process along has everything delivered again that the process held. So half of `max_deliveries` are given to every
message without a question. One that comes more often is a *suspect*. Suspects of a process run one at a time, and each
start is noted in a bucket before it happens: if the process dies then, no other suspect can have been the cause, or
suffers from it. A dead letter is for a message that was delivered more than `max_deliveries` times *and* was started
alone as often as is left of them. What was only prefetched or given back has no such starts, and runs.

The latest stored suspect is first: messages begin in the order in which they are stored, so the last of those that a
dead process held are the likeliest not to have been begun.

If the process dies between the note and the start, the start counts although it was none. If starts cannot be noted (a
worker without the permission, for instance), deliveries count instead.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import ApiError, BrokerError, PermissionDenied, QueueNotFound
from dramatiq_jetstream.kv import Bucket

from .delivery import Delivery

__all__ = ["BUCKET", "Suspects"]

#: The bucket in which the starts of suspects are counted.
BUCKET = "starts"

#: How long they are kept after the last one, in milliseconds: a week.
KEPT_MS = 7 * 86_400_000

logger = logging.getLogger(__name__)


class Suspects:
    """The messages of one process that may be the death of it.

    Parameters:
      bucket: Returns the bucket of starts, which is made when there is the first suspect.
    """

    def __init__(self, config: BrokerConfig, bucket: Callable[[], Bucket]) -> None:
        self._most = config.max_deliveries
        self._unquestioned = max(1, config.max_deliveries // 2)
        self._bucket = bucket
        self._waiting: list[Callable[[], None]] = []
        self.forget()

    def forget(self) -> None:
        """Start with none, as in the child of a fork."""
        self._place: deque[None] = deque([None])

    def include(self, delivery: Delivery) -> bool:
        """Whether a message is one, for having been delivered so often."""
        return delivery.deliveries > self._unquestioned

    def listen(self, free: Callable[[], None]) -> None:
        """Have `free` called whenever the next suspect may run."""
        self._waiting.append(free)

    def ignore(self, free: Callable[[], None]) -> None:
        """Have `free` called no more."""
        if free in self._waiting:
            self._waiting.remove(free)

    def take_place(self) -> bool:
        """Take the one place of this process for a suspect; False while another has it."""
        try:
            self._place.pop()
        except IndexError:
            return False
        return True

    def leave_place(self) -> None:
        """Let the next suspect run: the last one was settled."""
        self._place.append(None)
        for free in list(self._waiting):
            free()

    def note_start(self, delivery: Delivery) -> None:
        """Count the start of a suspect, before it."""
        if not self.include(delivery):
            return
        try:
            bucket = self._bucket()
            bucket.put(delivery.origin, b"%d" % (self._starts(bucket, delivery) + 1), ttl=KEPT_MS)
        except BrokerError as error:
            logger.warning("The start of %s is not counted: %s", delivery, error)

    def has_killed(self, delivery: Delivery) -> bool:
        """Whether a message has used up its deliveries, and was started in those that it had alone.

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
        return starts >= self._most - self._unquestioned

    @staticmethod
    def _starts(bucket: Bucket, delivery: Delivery) -> int:
        entry = bucket.get(delivery.origin)
        return 0 if entry is None else int(entry.value)
