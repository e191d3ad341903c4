"""Calls that are due in a moment, on one thread for all of them, which the first one starts.

If the process dies, they are lost: a held message is delivered again, and a turn that was to be given back is found
without its message (see `limits`).
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Later"]

#: Seconds after which the thread ends when nothing is due.
IDLE_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Later:
    """Calls functions at their time."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start with none, as in the child of a fork."""
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._changed = threading.Condition()
        self._order = itertools.count()
        self._is_running = False

    def call(self, seconds: float, function: Callable[[], object]) -> None:
        """Call a function after `seconds`."""
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), function))
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="limits", daemon=True).start()
            self._changed.notify()

    def _run(self) -> None:
        while (function := self._next()) is not None:
            try:
                function()
            except Exception:
                logger.exception("What was due is not done.")

    def _next(self) -> Callable[[], object] | None:
        idle_since = time.monotonic()
        with self._changed:
            while True:
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    return heapq.heappop(self._due)[-1]
                left = self._due[0][0] - now if self._due else idle_since + IDLE_SECONDS - now
                if left <= 0:
                    self._is_running = False
                    return None
                self._changed.wait(left)
