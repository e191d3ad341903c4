"""How many deliveries a consumer has room for and how many it has, counted once for fetching and for Dramatiq.

There is room for the prefetch, and for a little more while messages are short: as many as were settled in the last
25 ms. That lookahead saves a round trip per message, and shrinks to nothing when messages take longer than that;
without it, a message that does nothing costs a worker twice the CPU. A
delivery is *in hand* from its arrival until it is settled. Dramatiq gets as many as there is room for; the rest wait,
highest priority first. When messages suddenly take longer, more is in hand than there is room for. What lasts half a
second is *surplus*, and is requeued for other workers to take.

If the process dies, everything in hand is delivered again. The loop thread keeps the count; the consumer thread calls
`has_place` and `occupy`, which write only what the loop thread reads.
"""

from __future__ import annotations

from collections.abc import Callable

from .delivery import Delivery

__all__ = ["Room"]

#: After this many ticks with more in hand than there is room for, the surplus is requeued.
SURPLUS_TICKS = 5

#: The lookahead is what was settled in a quarter of a tick (0.1 s), and at most this many messages.
MAX_LOOKAHEAD = 256


class Room:
    """The room of one consumer.

    Parameters:
      prefetch: How many messages may be in hand at once, including those that run.
      lookahead: Whether there may be more while messages are short.
      made: Called on the loop thread when a place is free again and a delivery waits for one.

    Attributes:
      size: How many messages there is room for now.
      is_held_up: Whether nothing more is to be fetched, because what is here waits for a thread (see `giving_back`).
      worth_asking: The fewest messages to fetch under load: one that arrives alone wakes three threads.
    """

    def __init__(self, *, prefetch: int, lookahead: bool, made: Callable[[], None]) -> None:
        self.size = prefetch
        self.lookahead = lookahead
        self.is_held_up = False
        self._prefetch = prefetch
        self._made = made
        self._in_hand = 0
        self._returned = 0
        self._occupied = 0  # the consumer thread's own
        self._done = 0
        self._crowded_ticks = 0
        self._wanted = False
        self._measure()

    @property
    def free(self) -> int:
        """How many more may be fetched."""
        return 0 if self.is_held_up else self.size - self._in_hand

    def arrived(self) -> None:
        self._in_hand += 1

    def settled(self, delivery: Delivery, *, done: bool) -> bool:
        """Note that a delivery was settled: done, or requeued.

        Returns:
          Whether there is room for enough messages to make it worth asking under load.
        """
        self._in_hand -= 1
        self._done += done
        if delivery.has_place:
            self._returned += 1
            if self._wanted:
                self._wanted = False
                self._made()
        return self.size - self._in_hand >= self.worth_asking

    def has_surplus(self) -> bool:
        """Measure the room, once a tick; returns True when the surplus should be requeued."""
        self._measure()
        self._crowded_ticks = self._crowded_ticks + 1 if self._in_hand > self.size else 0
        if self._crowded_ticks < SURPLUS_TICKS:
            return False
        self._crowded_ticks = 0
        return True

    def _measure(self) -> None:
        if self.lookahead:
            self.size = self._prefetch + min(self._done // 4, MAX_LOOKAHEAD)
        self.worth_asking = max(1, self.size // 4)
        self._done = 0

    # On the consumer thread

    def has_place(self) -> bool:
        """Whether Dramatiq may have one more; if not, `made` is called once it may."""
        self._wanted = True  # set before looking, so that a place freed after the look is reported
        return self._occupied - self._returned < self.size

    def occupy(self, delivery: Delivery) -> None:
        """Count a delivery as Dramatiq's until it is settled."""
        self._wanted = False
        self._occupied += 1
        delivery.has_place = True
