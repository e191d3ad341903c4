"""The time by the server's clock, which decides when a delayed message is due.

The clocks of workers may differ, and may be set while a worker runs. So a process asks the server for its time now and
then, and counts on with its own monotonic clock. An answer says what the time was at some moment between the question
and its arrival, so the time is known to within as long as the quickest answer took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from dramatiq_jetstream.jetstream.reading import parse_time
from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.wire.connection import Connection

__all__ = ["ServerClock"]

#: Seconds between two readings of the clock, and how many answers each takes, to keep the quickest.
CLOCK_SECONDS = 20.0
READINGS = 5


class ServerClock:
    """The server's time, within bounds.

    Parameters:
      connection: Asks the server.
      bucket: Returns a bucket, whose stream is asked for.
    """

    def __init__(self, connection: Connection, bucket: Callable[[], Bucket]) -> None:
        self._connection = connection
        self._bucket = bucket
        self._read = 0.0, 0.0
        self._until = 0.0

    def now(self) -> int:
        """The earliest that it can be now, in milliseconds since 1970."""
        _, ahead = self._reading()
        return int(time.monotonic() * 1000 + ahead)

    def latest(self) -> int:
        """The latest that it can be now, in milliseconds since 1970."""
        took, ahead = self._reading()
        return math.ceil(time.monotonic() * 1000 + ahead + took)

    def _reading(self) -> tuple[float, float]:
        """The best of the last readings: how long its answer took, and how far the server is ahead at least."""
        if time.monotonic() >= self._until:
            self._read = min(self._ask() for _ in range(READINGS))
            self._until = time.monotonic() + CLOCK_SECONDS
        return self._read

    def _ask(self) -> tuple[float, float]:
        """Ask once: how long the answer took, and how far the server is ahead of this process at least, both in ms."""
        began = time.monotonic()
        told = self._connection.api(f"STREAM.INFO.{self._bucket().stream}")["ts"]
        ended = time.monotonic()
        return (ended - began) * 1000 + 1, parse_time(told) - ended * 1000  # it is told to the millisecond
