"""How many deliveries a consumer has room for, and how many it has: one book for fetching and for handing over.

There is room for the prefetch, and for a little more while messages are short: as many as were settled in the last 25
ms. That lookahead saves a round trip for each message, and is nothing where a message takes longer than that. What
arrived is *in hand* until it is settled. Of that, Dramatiq is given as much as there is room for; the rest waits for a
place, the highest priority first. When messages suddenly take longer, more is in hand than there is room for; what
lasts half a second is *surplus*, to be given back for other workers to take.

If the process dies, all that was in hand is delivered again. The loop thread keeps the book; the consumer thread calls
`has_place` and `hand_over`, which count what the loop thread only reads.
"""

from __future__ import annotations

from collections.abc import Callable

from .delivery import Delivery

__all__ = ["Room"]

#: After this many ticks with more in hand than there is room for, the surplus is given back.
SURPLUS_TICKS = 5

#: The lookahead is what was settled in a quarter of a tick (0.1 s), and at most this many messages.
MAX_LOOKAHEAD = 256


class Room:
    """The book of one consumer.

    Parameters:
      prefetch: How many messages may be in hand at once, those that are worked on included.
      lookahead: Whether there may be more while messages are short.
      made: Called on the loop thread when there is room for something that waits to be handed over.

    Attributes:
      size: How many messages there is room for now.
    """

    def __init__(self, *, prefetch: int, lookahead: bool, made: Callable[[], None]) -> None:
        self.size = prefetch
        self.lookahead = lookahead
        self._prefetch = prefetch
        self._made = made
        self._in_hand = 0
        self._returned = 0
        self._handed = 0  # the consumer thread's own
        self._done = 0
        self._crowded_ticks = 0
        self._wanted = False

    @property
    def free(self) -> int:
        """How many more may be fetched."""
        return self.size - self._in_hand

    @property
    def worth_asking(self) -> int:
        """How many to fetch at least, under load: a message that comes alone costs three threads a wake-up."""
        return max(1, self.size // 4)

    def arrived(self) -> None:
        self._in_hand += 1

    def settled(self, delivery: Delivery, *, done: bool) -> None:
        """Note that a delivery was settled: its work is done, or it was given back."""
        self._in_hand -= 1
        self._done += done
        if delivery.handed_over:
            self._returned += 1
            if self._wanted:
                self._wanted = False
                self._made()

    def has_surplus(self) -> bool:
        """Measure what there is room for, once a tick; True when something should be given back."""
        if self.lookahead:
            self.size = self._prefetch + min(self._done // 4, MAX_LOOKAHEAD)
        self._done = 0
        self._crowded_ticks = self._crowded_ticks + 1 if self._in_hand > self.size else 0
        if self._crowded_ticks < SURPLUS_TICKS:
            return False
        self._crowded_ticks = 0
        return True

    # On the consumer thread

    def has_place(self) -> bool:
        """Whether Dramatiq may have one more; if not, `made` is called when it may."""
        self._wanted = True  # said before looking, so that room made after the look is told
        return self._handed - self._returned < self.size

    def hand_over(self, delivery: Delivery) -> None:
        """Count a delivery as Dramatiq's until it is settled."""
        self._wanted = False
        self._handed += 1
        delivery.handed_over = True
