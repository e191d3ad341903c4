"""Which standing requests the server confirms, so that an idle process costs it few messages whatever its queues.

The server can confirm each standing request with heartbeats. A process with twenty queues of nine priorities has 180 of
them, and a heartbeat for each would be ninety messages a second that say the same. What hides the loss of a request
(a node that crashes or freezes) takes all requests at that node along. So one request at each *node* has heartbeats:
at the leader of its consumer, or at the only server. When they stop, every consumer of that node is in doubt (see
`durables`). While no request with heartbeats stands there, because those that did were filled, one of its consumers is
looked at instead.

Requests without heartbeats are refused audibly and end when they expire. More of them stand for longer, so that their
ends and beginnings are few as well: `SPACING_SECONDS` for each, up to `LONGEST_SECONDS`. A single request that is lost
between two nodes that both live shows when the server announces that one lost the other, and at the latest when it
should have expired.

Nothing here outlives the process. It belongs to the loop thread.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Any

__all__ = ["Heartbeats"]

#: A request stands for SPACING_SECONDS for each request that the process has, but no shorter than EXPIRES_SECONDS and
#: no longer than LONGEST_SECONDS.
EXPIRES_SECONDS = 20.0
SPACING_SECONDS = 12.0
LONGEST_SECONDS = 3_600.0

#: Seconds between two checks of a node where no request has heartbeats.
LOOK_SECONDS = 2.0


class Heartbeats:
    """The requests of one process that have heartbeats, by node."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from nothing: at creation, and in the child of a fork."""
        self._sources: set[Any] = set()
        self._beating: dict[object, set[Hashable]] = {}
        self._looked: dict[object, float] = {}

    def include(self, source: Hashable) -> None:
        """Note that the process reads a source."""
        self._sources.add(source)

    def leave(self, source: Hashable) -> None:
        """Note that the process does not read a source any more."""
        self._sources.discard(source)

    @property
    def expires(self) -> float:
        """How long a request should stand, in seconds."""
        return max(EXPIRES_SECONDS, min(SPACING_SECONDS * len(self._sources), LONGEST_SECONDS))

    def covers(self, node: object) -> bool:
        """Whether a request with heartbeats stands at a node."""
        return bool(self._beating.get(node))

    def begin(self, node: object, request: Hashable) -> None:
        """Note that a request with heartbeats stands at a node."""
        self._beating.setdefault(node, set()).add(request)

    def end(self, node: object, request: Hashable) -> None:
        """Note that a request with heartbeats has ended."""
        self._beating.get(node, set()).discard(request)
        self._looked[node] = time.monotonic()

    def look_due(self, node: object) -> bool:
        """Whether a consumer of a node is to be looked at now; the caller does it."""
        if self.covers(node):
            return False
        now = time.monotonic()
        if now - self._looked.get(node, 0.0) < LOOK_SECONDS:
            return False
        self._looked[node] = now
        return True
