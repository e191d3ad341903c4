"""Remembers requests by their idempotency key, so that a client may send one again without ordering twice.

The key's record is written before the order's event: it holds the order's id, so whoever tries again after a crash,
or after an answer that got lost, publishes the same event. While the first request is still being worked on, a
second one is told to wait; a record whose request died is free again when its lease is over.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Final

from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .model import IdempotencyConflict, IdempotencyInProgress
from .ports import Bucket

BUCKET: Final = "requests"


@dataclass(frozen=True, slots=True)
class _Record:
    digest: str
    order_id: str
    created_at: int
    stored: bool
    owner: str
    lease_until: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to publish the order of a request. `repeated`: an earlier request has done so already."""

    key: str
    order_id: str
    created_at: int
    repeated: bool
    revision: int = 0


class Requests:
    """The records of idempotency keys in their bucket.

    Parameters:
      bucket: Where they are kept; its time to live is how long a key is remembered.
      lease: Milliseconds for which a request counts as being worked on.
      now: The time in milliseconds.
    """

    def __init__(self, bucket: Bucket, *, lease: int, now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._lease = lease
        self._now = now
        self._owner = secrets.token_hex(8)
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, key: str, digest: str, order_id: str) -> Claim:
        """Claim a key for a request; `order_id` is used when the key is new.

        Raises:
          IdempotencyConflict: When the key came before with a request of another digest.
          IdempotencyInProgress: When such a request is being worked on.
        """
        key = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if key in self._running:
                raise IdempotencyInProgress("a request with the same key is being worked on")
            self._running.add(key)
        try:
            return self._claim(key, digest, order_id)
        except BaseException:
            self._running.discard(key)
            raise

    def _claim(self, key: str, digest: str, order_id: str) -> Claim:
        now = self._now()
        wanted = _Record(digest, order_id, now, False, self._owner, now + self._lease)
        while True:
            try:
                revision = self._bucket.create(key, _encode(wanted))
                return Claim(key, order_id, now, False, revision)
            except KeyExists:
                entry = self._bucket.get(key)
            if entry is None:
                continue  # it expired in between
            record = _Record(**json.loads(entry.value))
            if record.digest != digest:
                raise IdempotencyConflict("the key was used before for a different order")
            if record.stored:
                return Claim(key, record.order_id, record.created_at, True, entry.revision)
            # Our own process knows what it is working on: what is not running here any more has failed.
            if record.owner != self._owner and now < record.lease_until:
                wait = max(1, -(-(record.lease_until - now) // 1000))
                raise IdempotencyInProgress("a request with the same key is being worked on", wait)
            taken = replace(record, owner=self._owner, lease_until=now + self._lease)
            try:
                revision = self._bucket.update(key, _encode(taken), revision=entry.revision)
            except RevisionConflict:
                raise IdempotencyInProgress("a request with the same key is being worked on") from None
            return Claim(key, record.order_id, record.created_at, False, revision)

    def stored(self, claim: Claim, digest: str) -> None:
        """Note that the order's event is stored, so that a repetition gets its answer at once."""
        record = _Record(digest, claim.order_id, claim.created_at, True, self._owner, 0)
        try:
            self._bucket.update(claim.key, _encode(record), revision=claim.revision)
        except BrokerError:
            # The order is accepted all the same. A repetition publishes the same event again, which changes
            # nothing.
            pass

    def finished(self, claim: Claim) -> None:
        """End this process's work on a claim, however it went."""
        self._running.discard(claim.key)


def _encode(record: _Record) -> bytes:
    return json.dumps(asdict(record), separators=(",", ":")).encode()
