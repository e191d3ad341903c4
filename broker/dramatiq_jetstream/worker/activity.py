"""Counts on the server what a fleet does: attempts, failures and times, for each queue and minute (see `activity`).

The server adds up (ADR-49), so that all processes of a fleet share a counter. A worker thread counts the attempts that
it ends; the presence thread adds up what the threads have counted and sends it every `INTERVAL_SECONDS`, without
waiting for an answer. If the process dies, or there is no connection, what was not sent is not counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from dramatiq.errors import BrokerError

from dramatiq_jetstream.jetstream.names import Names
from dramatiq_jetstream.wire.connection import Connection, Msg
from dramatiq_jetstream.wire.replies import is_no_responders

from .attachment import Attachment
from .tally import Ended

__all__ = ["Activity"]

#: How often counts are sent.
INTERVAL_SECONDS = 5.0

#: Adds to a counter.
HEADER_INCR = "Nats-Incr"

logger = logging.getLogger(__name__)


class Activity:
    """The counts of one worker process.

    Parameters:
      ensure: Makes the stream of the counters, if that may be done.

    Attributes:
      done, failed: How many attempts have ended, and how many of them with an exception.
    """

    def __init__(
        self, names: Names, connection: Connection, ensure: Callable[[], None], attachment: Attachment
    ) -> None:
        self._names = names
        self._connection = connection
        self._ensure = ensure
        self._attachment = attachment
        self.reset()

    def reset(self) -> None:
        """Start from nothing: at creation, and in the child of a fork."""
        self.done = self.failed = 0
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._sent = 0.0
        self._missing = True

    def send(self, *, now: bool = False) -> None:
        """Add up what has ended, and send the counts if it is time, or `now`, when the worker has shut down."""
        with self._lock:  # the thread that shuts a worker down may send while the presence thread does
            self._send(now)

    def _send(self, now: bool) -> None:
        minute = int(time.time()) // 60
        for tally in list(self._attachment.tallies):
            for queue, ended in tally.take(is_over=now):
                self._add(minute, queue, ended)
        if not self._counts or (not now and time.monotonic() - self._sent < INTERVAL_SECONDS):
            return
        self._sent = time.monotonic()
        if self._missing:
            self._missing = False
            try:
                self._ensure()
            except BrokerError as error:
                logger.warning("What this worker does is not counted: %s", error)
        counts, self._counts = self._counts, Counter()
        for subject, count in counts.items():
            self._connection.tell(subject, b"", {HEADER_INCR: f"+{count}"}, self._told)

    def _add(self, minute: int, queue: str, ended: Ended) -> None:
        self.done += sum(ended.ran)
        self.failed += ended.failed
        for what, times in (("ran", ended.ran), ("waited", ended.waited), ("failed", [ended.failed])):
            for bits, count in enumerate(times):
                if count:
                    self._counts[self._names.activity(minute, queue, what, bits)] += count

    def _told(self, answer: Msg | BaseException) -> None:
        if not isinstance(answer, BaseException) and is_no_responders(answer):
            self._missing = True
