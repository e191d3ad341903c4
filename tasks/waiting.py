"""Events that this process was given, and that no thread of it has begun with: what one run can do for others.

The line is a hint. An event in it may have gone to another process meanwhile, and one that is not in it may wait here
all the same. So what a run does for others is only what they would do themselves, and what may be done twice.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Final, Generic, TypeVar

W = TypeVar("W")

#: How many orders the line has at most, how many events of each, and for how many seconds.
MOST: Final = 1_000
_OF_ONE: Final = 16
SECONDS: Final = 30.0


class Waiting(Generic[W]):
    """The line of one actor's events by their orders, those of the oldest first. Any thread may use it."""

    def __init__(self) -> None:
        self._line: OrderedDict[str, tuple[list[W], float]] = OrderedDict()
        self._lock = threading.Lock()

    def expect(self, order_id: str, event: W) -> None:
        """Put an event into the line."""
        with self._lock:
            events, _ = self._line.setdefault(order_id, ([], time.monotonic()))
            if len(events) < _OF_ONE:
                events.append(event)
            if len(self._line) > MOST:
                self._line.popitem(last=False)

    def take_of(self, order_id: str) -> list[W]:
        """Take the events of an order out of the line, because a run for one of them begins."""
        with self._lock:
            return self._fresh(self._line.pop(order_id, None))

    def take(self, orders: int) -> list[W]:
        """Take the events of the oldest orders out of the line, to do something for them."""
        with self._lock:
            taken = [self._line.popitem(last=False)[1] for _ in range(min(orders, len(self._line)))]
        return [event for one in taken for event in self._fresh(one)]

    def _fresh(self, waiting: tuple[list[W], float] | None) -> list[W]:
        return [] if waiting is None or waiting[1] < time.monotonic() - SECONDS else waiting[0]
