"""Follows one order for an open page: server-sent events, bounded in time and in number.

A stream occupies a thread of gunicorn while it is open. So each one ends after a while, and the browser
asks again by itself; and when half the threads are taken, further pages are told to poll instead.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dramatiq.errors import BrokerError

from tasks import service
from tasks.service import Order

# Set when this process was asked to stop.
stopping = threading.Event()

# How long a silent stream waits before it looks whether it should end, and writes something, which is how
# a reader that went away is noticed.
_BEAT_MS = 1_000
_RECONNECT_MS = 1_000


class Streams:
    """The open streams of this process."""

    def __init__(self, limit: int, duration: int) -> None:
        self.duration = duration
        self._slots = threading.BoundedSemaphore(limit)

    def take(self) -> bool:
        """Take the place of one stream; False when all are taken."""
        return self._slots.acquire(blocking=False)

    def release(self) -> None:
        """Give the place of one stream back."""
        self._slots.release()


def rests(order: Order) -> bool:
    """Tell whether the order stays as it is unless a person acts; then it need not be watched closely."""
    return order.is_final or order.status == "failed" or order.can_be_accepted


def follow(
    order: Order, version: Callable[[Order], str], state: Callable[[Order], dict[str, Any]], duration: int
) -> Iterator[str]:
    """Yield the order's state now and after each change, until it rests or `duration` ms have passed.

    Parameters:
      version: Returns what changes whenever the state does.
    """
    deadline = time.monotonic() + duration / 1000
    yield f"retry: {_RECONNECT_MS}\n\n"
    shown = version(order)
    yield _event(order, state(order))
    while not rests(order) and not stopping.is_set():
        left = int((deadline - time.monotonic()) * 1000)
        if left <= 0:
            return
        try:
            changed = service.wait_for_change(order.order_id, order.revision, min(_BEAT_MS, left))
        except BrokerError:
            # The browser comes back, and is told then whether the store answers.
            return
        if changed is None:
            return
        order = changed
        try:
            now = version(order)
            event = _event(order, state(order)) if now != shown else ":\n\n"
        except BrokerError:
            return
        shown = now
        yield event


def _event(order: Order, state: dict[str, Any]) -> str:
    return f"id: {order.revision}\nevent: order\ndata: {json.dumps(state)}\n\n"
