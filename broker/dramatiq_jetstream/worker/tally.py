"""Counts how the attempts of a worker thread end, in a few numbers however many they are.

The thread counts, and the presence thread takes what was counted. It takes it a round after it has put an empty tally
in its place, so that a count which the thread was just making is not lost.
"""

from __future__ import annotations

import time

__all__ = ["Ended", "Tally"]

#: More bits than the milliseconds of any time have.
_BITS = 64


class Ended:
    """The attempts at messages of a queue that have ended.

    Attributes:
      ran, waited: How many ran, and how many had waited, by the bits of their milliseconds.
      failed: How many raised, without what was aborted and ticks that came too late.
    """

    __slots__ = ("failed", "ran", "waited")

    def __init__(self) -> None:
        self.ran = [0] * _BITS
        self.waited = [0] * _BITS
        self.failed = 0


class Tally:
    """The attempts of one thread that ended and were not taken yet, by queue."""

    __slots__ = ("_ended", "_left")

    def __init__(self) -> None:
        self._ended: dict[str, Ended] = {}
        self._left: dict[str, Ended] = {}

    def note(self, queue: str, began: float, stored: int, failed: bool) -> None:
        """Count an attempt that ends now.

        Parameters:
          began: When it began, in seconds since 1970.
          stored: When its message was stored, in milliseconds since 1970; 0 if that is not known.
        """
        ended = self._ended.get(queue) or self._ended.setdefault(queue, Ended())
        ran = int((time.time() - began) * 1_000)
        ended.ran[ran.bit_length() if ran > 0 else 0] += 1  # a clock that was set may show less than none
        if stored:
            waited = int(began * 1_000) - stored
            ended.waited[waited.bit_length() if waited > 0 else 0] += 1
        if failed:
            ended.failed += 1

    def take(self, *, is_over: bool = False) -> list[tuple[str, Ended]]:
        """Return what was counted up to the last call; everything when the thread counts no more."""
        taken = list(self._left.items())
        self._left, self._ended = self._ended, {}
        if is_over:
            taken += self._left.items()
            self._left = {}
        return taken
