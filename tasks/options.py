"""The options that the service's actors are declared with."""

from __future__ import annotations

from typing import Any, Final

from .app import SETTINGS
from .events import UnusableEvent

#: The priorities of actors: of the messages that a worker holds, it runs those with the lowest number first. Orders
#: under way are finished before others are begun, so little stock is held at a time, and no number of new orders delays
#: those that have begun.
FINISH: Final = 0
CONTINUE: Final = 10
BEGIN: Final = 20

#: How often the index and the figures are brought up to date, in milliseconds.
INDEX_EVERY_MS: Final = 3_000

#: How often orders that do not move are looked for, in milliseconds.
LOOK_EVERY_MS: Final = min(SETTINGS.stuck_after, 60_000)


def step_options(queue: str, priority: int) -> dict[str, Any]:
    """Return the options of an actor; one that needs another value overrides it."""
    return {
        "queue_name": queue,
        "priority": priority,
        "max_retries": SETTINGS.retry_limit,
        "min_backoff": SETTINGS.retry_min_backoff,
        "max_backoff": SETTINGS.retry_max_backoff,
        "throws": UnusableEvent,
        # A step waits for the gateway twice at most (connecting and reading), each again on a fresh connection.
        "time_limit": 4 * SETTINGS.payment_timeout + 60_000,
    }
