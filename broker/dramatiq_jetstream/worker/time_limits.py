"""Keeps time for Dramatiq's `TimeLimit`, and interrupts a thread only for the message whose time is over.

Dramatiq notes a deadline by the thread's identifier. It may interrupt a thread that has gone on to its next message, or
a new thread that got the identifier of a dead one. Here each running message has a deadline of its own, which is looked
at when its thread cannot go on (see `interrupts`). Its thread puts it into a dict and replaces it when the message is
done, in a single step each. What a thread does after its actor has ended, such as storing a retry, is not interrupted.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from threading import Thread, current_thread

from dramatiq.middleware import Middleware, TimeLimit, TimeLimitExceeded
from dramatiq.middleware.time_limit import _CtypesTimeoutManager

from .interrupts import interrupt

__all__ = ["TimeLimits", "keep_time_of"]

#: The monotonic time in seconds, and its thread.
_Deadline = tuple[float, Thread]


def keep_time_of(middleware: Middleware) -> None:
    """Have a `TimeLimit` of Dramatiq's that has not started yet use this module; anything else stays as it is."""
    manager = getattr(middleware, "manager", None)
    if (
        isinstance(middleware, TimeLimit)
        and type(manager) is _CtypesTimeoutManager
        and not manager.is_alive()
    ):
        middleware.manager = TimeLimits(manager.interval, middleware.logger)  # type: ignore[assignment]


class TimeLimits(Thread):
    """Raises TimeLimitExceeded in threads whose time is over; looks every `interval` seconds."""

    def __init__(self, interval: float, logger: logging.Logger) -> None:
        super().__init__(name="time-limits", daemon=True)
        self._interval = interval
        self._logger = logger
        self._deadlines: dict[int, _Deadline | None] = {}
        self._struck: dict[int, _Deadline] = {}

    def add_timeout(self, thread_id: int, ttl: float) -> None:
        """The calling thread begins something that may take `ttl` milliseconds."""
        self._deadlines[thread_id] = time.monotonic() + ttl / 1000, current_thread()

    def remove_timeout(self, thread_id: int) -> None:
        """The calling thread is done with it."""
        self._deadlines[thread_id] = None

    def run(self) -> None:
        while True:
            try:
                self._interrupt()
            except Exception:
                # The limits of all further messages depend on this thread.
                self._logger.exception("Time limits could not be looked after; trying again.")
            time.sleep(self._interval)

    def _interrupt(self) -> None:
        now = time.monotonic()
        for thread_id, deadline in self._deadlines.copy().items():
            # Deadlines that passed are remembered here, not in the threads' dict: each thread is interrupted once.
            if deadline is None or now < deadline[0] or self._struck.get(thread_id) is deadline:
                continue
            self._struck[thread_id] = deadline
            if deadline[1].is_alive():
                interrupt(thread_id, TimeLimitExceeded, partial(self._is_due, thread_id, deadline))

    def _is_due(self, thread_id: int, deadline: _Deadline) -> bool:
        """Whether that thread still runs the message whose time is over; it cannot go on during this call."""
        due = self._deadlines.get(thread_id) is deadline
        if due:
            self._logger.warning("The time limit of what thread %r runs is over; interrupting it.", thread_id)
        return due
