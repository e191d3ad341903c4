"""When the messages of a steady load are to be sent, and how late their tasks began.

The times are fixed before the first message, so a broker that holds up its sender is charged for the messages that
wait behind it (no coordinated omission). Standard library only: this runs in every contender's environment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise


class Pace:
    """Gives the sending threads one message after the other.

    Parameters:
      rate: Messages a second; 0 for as fast as they are taken. Without a rate messages have the index -1: nothing notes
        when they begin.
      first: The index of the first message.
    """

    def __init__(
        self, rate: float, seconds: float, first: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = rate
        self.start = clock()
        self.given = 0
        self._seconds = seconds
        self._first = first
        self._clock = clock
        self._lock = threading.Lock()

    def take(self) -> tuple[int, float] | None:
        """The index of the next message and when to send it, by the monotonic clock; None when it is over."""
        with self._lock:
            number = self.given
            due = self.start + number / self.rate if self.rate else self._clock()
            if due >= self.start + self._seconds:
                return None
            self.given += 1
            return (self._first + number if self.rate else -1), due


def lateness(start: float, rate: float, began: Sequence[int]) -> list[float]:
    """How late each message began, in milliseconds, from when it was to be sent.

    Parameters:
      start: When the first was to be sent, in seconds by the monotonic clock.
      began: When each began, in nanoseconds by the same clock; 0 for one that did not.

    Raises:
      ValueError: When one did not begin.
    """
    missing = sum(not moment for moment in began)
    if missing:
        raise ValueError(f"{missing} of {len(began)} messages were not run")
    return [moment / 1e6 - (start + number / rate) * 1e3 for number, moment in enumerate(began)]


def longest_gap(began: Sequence[int], since: int) -> float:
    """The longest time, in seconds, in which no message began, from the moment `since` (nanoseconds) on."""
    moments = [since, *sorted(moment for moment in began if moment > since)]
    return max((after - before for before, after in pairwise(moments)), default=0) / 1e9
