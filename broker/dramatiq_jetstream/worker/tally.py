"""Counts how the attempts of a worker thread end, in a few numbers however many they are.

The thread counts, and the presence thread takes what was counted. It takes it a round after it has put an empty tally
in its place, so that a count which the thread was just making is not lost.
"""

from __future__ import annotations

import time
from collections import Counter

__all__ = ["Kind", "Tally"]

#: What attempts have in common: the minute in which they ended, their queue, how long they ran and their messages had
#: waited (bits of the milliseconds), and whether they failed.
Kind = tuple[int, str, int, int | None, bool]


class Tally:
    """The attempts of one thread that ended and were not taken yet, by what they have in common."""

    __slots__ = ("_counts", "_left")

    def __init__(self) -> None:
        self._counts: dict[Kind, int] = {}
        self._left: dict[Kind, int] = {}

    def note(self, queue: str, began: float, stored: int, failed: bool) -> None:
        """Count an attempt that ends now.

        Parameters:
          began: When it began, in seconds since 1970.
          stored: When its message was stored, in milliseconds since 1970; 0 if that is not known.
        """
        now = time.time()
        # Clocks differ, and are set: a time below 0 is none.
        waited = max(0, int(began * 1_000 - stored)).bit_length() if stored else None
        kind = int(now) // 60, queue, max(0, int((now - began) * 1_000)).bit_length(), waited, failed
        counts = self._counts
        counts[kind] = counts.get(kind, 0) + 1

    def take(self, *, is_over: bool = False) -> Counter[Kind]:
        """Return what was counted up to the last call; everything when the thread counts no more."""
        taken = Counter(self._left)
        self._left, self._counts = self._counts, {}
        if is_over:
            taken.update(self._left)
            self._left = {}
        return taken
