"""The order in which the threads of a process change a limit (see `limits`).

Threads wait for their turn outside of actors, where no interrupt strikes (see `interrupts`), and the one whose turn it
is waits for the server no longer than its calls do. Nothing here outlives the process.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Place"]


class Place:
    """Threads that wait to change a limit; the message that was stored first is served first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._order = itertools.count()
        self._is_taken = False

    @contextmanager
    def turn(self, sequence: int) -> Iterator[None]:
        """Wait for the turn of the message that is stored at `sequence`, and have it in the block."""
        own = sequence, next(self._order)
        with self._changed:
            heapq.heappush(self._waiting, own)
            while self._is_taken or self._waiting[0] != own:
                self._changed.wait()
            heapq.heappop(self._waiting)
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()
