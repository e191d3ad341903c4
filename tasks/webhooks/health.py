"""Remembers which receivers do not accept what they are sent, so that they rest, and are disabled in the end.

`failing.{id}`, in the bucket of the webhooks, stands while the newest attempts at a receiver have failed: since when,
how often, and until when it rests. All processes share it. It is information: a change that loses against another, or a
crash before it, miscounts by one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from tasks.ports import Bucket, Entry

_PREFIX: Final = "failing."

#: After how many failures in a row a receiver rests, and for how many milliseconds: at first, and at most.
RESTS_AFTER: Final = 5
REST_MS: Final = 10_000
MAX_REST_MS: Final = 300_000

#: Milliseconds of nothing but failures, and how many there must be, after which a webhook is disabled.
DISABLED_AFTER_MS: Final = 5 * 86_400_000
DISABLED_AFTER_FAILURES: Final = 10

_KEPT_MS: Final = 30 * 86_400_000


@dataclass(frozen=True, slots=True)
class Failing:
    """A receiver that fails: since when, how often in a row, until when it rests (milliseconds), and the last cause."""

    since: int
    failures: int
    rests_until: int
    error: str

    def is_lost(self, now: int) -> bool:
        """Whether its webhook is to be disabled."""
        return self.failures >= DISABLED_AFTER_FAILURES and now - self.since >= DISABLED_AFTER_MS


class Health:
    """The notes on receivers that fail.

    Parameters:
      bucket: Where they are kept.
      now: The time in milliseconds.
    """

    def __init__(self, bucket: Bucket, now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._now = now

    def find(self, webhook_id: str) -> Failing | None:
        """Return how a receiver fails, None while it accepts what it is sent."""
        entry = self._bucket.get(_PREFIX + webhook_id)
        return None if entry is None else _read(entry)

    def failed(self, webhook_id: str, error: str) -> Failing:
        """Note a failure; returns the note."""
        entry = self._bucket.get(_PREFIX + webhook_id)
        now = self._now()
        known = Failing(now, 0, 0, "") if entry is None else _read(entry)
        failures = known.failures + 1
        rest = 0
        if failures >= RESTS_AFTER:
            rest = min(MAX_REST_MS, REST_MS * 2 ** min(failures - RESTS_AFTER, 10))
            rest = int(rest * random.uniform(0.8, 1.0))
        noted = Failing(known.since, failures, now + rest if rest else 0, error)
        value = json.dumps(asdict(noted), separators=(",", ":")).encode()
        with suppress(KeyExists, RevisionConflict):
            if entry is None:
                self._bucket.create(_PREFIX + webhook_id, value, ttl=_KEPT_MS)
            else:
                self._bucket.update(entry.key, value, revision=entry.revision, ttl=_KEPT_MS)
        return noted

    def recovered(self, webhook_id: str) -> None:
        """Drop the note: the receiver has accepted something, or its webhook is enabled again."""
        if self._bucket.get(_PREFIX + webhook_id) is not None:
            self._bucket.delete(_PREFIX + webhook_id)


def _read(entry: Entry) -> Failing:
    stored = json.loads(entry.value)
    return Failing(**{one.name: stored[one.name] for one in fields(Failing)})
