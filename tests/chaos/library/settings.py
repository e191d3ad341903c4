"""What the program, its producers and the harness have in common. Times are milliseconds."""

from __future__ import annotations

from typing import Any

NAMESPACE = "chaos"
ACK_WAIT = 10_000
ENQUEUE_TIMEOUT = 4_000
EVERY = 2_000
HOUR = 3_600_000

#: How many runs may hold a turn at once, and after how long a turn that was not given back is free again.
TURNS = 2
TURNS_TTL = 8_000

#: The versions of the program.
OLD, NEW = "old", "new"

QUEUES = ("first", "second", "ticks")
EVENTS = "CHAOS"
MADE = "CHAOS.made"

#: What every program of the namespace sets.
OPTIONS: dict[str, Any] = {
    "namespace": NAMESPACE,
    "ack_wait": ACK_WAIT,
    "enqueue_timeout": ENQUEUE_TIMEOUT,
}

#: The actors that always end as a dead letter, those that may be aborted, and those that every event goes to.
DOOMED = frozenset({"doomed"})
ABORTED = frozenset({"long"})
SUBSCRIBERS = ("on_made", "on_made_too")
