"""What a fleet did of late, minute by minute: attempts, failures, how long they ran, how long messages had waited.

    for minute in read_activity(broker):
        print(minute.queue, minute.at, minute.done, minute.failed, percentile(minute.ran, 0.95))

Workers add to counters that the server keeps in memory for `KEPT_MINUTES`: a restart of the server begins with none.
Times are kept by their powers of two, so a percentile is right within a factor of two, and mostly closer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from .broker import JetStreamBroker
from .errors import TopologyMissing
from .jetstream.names import decode
from .jetstream.topology import ACTIVITY_MINUTES as KEPT_MINUTES
from .streams import Stream

__all__ = ["KEPT_MINUTES", "Minute", "percentile", "read_activity"]

_MINUTE_MS = 60_000


@dataclass(frozen=True)
class Minute:
    """What ended on one queue within a minute.

    Attributes:
      at: When the minute began, in milliseconds since 1970.
      failed: Attempts that ended with an error.
      ran, waited: How many attempts ran, and how many messages had been ready, for less than 2**n milliseconds and not
        less than half of that, by n; 0 stands for less than one millisecond.

    Examples:
      >>> from dramatiq_jetstream.activity import Minute
      >>> minute = Minute("mail", at=1_700_000_040_000, failed=1, ran={3: 90, 4: 9, 9: 1})
      >>> minute.done
      100
    """

    queue: str
    at: int
    failed: int = 0
    ran: Mapping[int, int] = field(default_factory=dict)
    waited: Mapping[int, int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Attempts that ended."""
        return sum(self.ran.values())


def read_activity(broker: JetStreamBroker, *, minute: int | None = None) -> list[Minute]:
    """What the fleet did, by queue and time; nothing for minutes in which nothing ended.

    Parameters:
      minute: Only the minute that begins then, in milliseconds since 1970.

    Raises:
      BrokerConnectionError: When the server does not answer in time.

    Examples:
      ```python
      from dramatiq_jetstream.activity import read_activity

      failed = sum(minute.failed for minute in read_activity(broker) if minute.queue == "mail")
      ```
    """
    names = broker.names
    subject = names.activity_of(None if minute is None else minute // _MINUTE_MS)
    found: dict[tuple[str, int], dict[str, dict[int, int]]] = {}
    try:
        for stored in Stream(broker.connection, names.activity_stream).read(subject):
            at, queue, what, bits = stored.subject.split(".")[-4:]
            counts = found.setdefault((decode(queue), int(at) * _MINUTE_MS), {})
            counts.setdefault(what, {})[int(bits)] = int(json.loads(stored.data)["val"])
    except TopologyMissing:
        return []  # no worker of this namespace ever counted
    return [
        Minute(
            queue,
            at,
            sum(counts.get("failed", {}).values()),
            counts.get("ran", {}),
            counts.get("waited", {}),
        )
        for (queue, at), counts in sorted(found.items())
    ]


def percentile(times: Mapping[int, int], share: float) -> float | None:
    """The milliseconds within which a share of times is, as kept in a `Minute`; None when there are none.

    Parameters:
      share: Between 0 and 1, such as 0.95.

    Examples:
      >>> from dramatiq_jetstream.activity import percentile
      >>> percentile({3: 90, 4: 9, 9: 1}, 0.5) < 8
      True
    """
    left = share * sum(times.values())
    if not left:
        return None
    for bits in sorted(times):
        if left <= times[bits]:
            low, high = (0, 1) if bits == 0 else (2 ** (bits - 1), 2**bits)
            return low + (high - low) * left / times[bits]
        left -= times[bits]
    return float(2 ** max(times))
