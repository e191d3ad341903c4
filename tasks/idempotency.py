"""Remembers requests by their idempotency key, so that a client may send one again without ordering twice.

The key's record is written first: it holds the order's id, so a request that is sent again after a crash, or after
an answer that got lost, places the same order. While the first request is still running, a second one is told to wait;
the record of a request that died is free again when its lease is over. Whether the order was placed is not kept here:
the read model says so.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .model import IdempotencyConflict, IdempotencyInProgress
from .ports import Bucket

BUCKET: Final = "requests"


@dataclass(frozen=True, slots=True)
class _Record:
    digest: str
    order_id: str
    created_at: int
    owner: str
    lease_until: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to place the order of a request."""

    key: str
    order_id: str
    created_at: int


class Requests:
    """The records of idempotency keys in their bucket.

    Parameters:
      bucket: Where they are kept; its time to live is how long a key is remembered.
      lease: Milliseconds for which a request counts as running.
      now: The time in milliseconds.
    """

    def __init__(self, bucket: Bucket, *, lease: int, now: Callable[[], int]) -> None:
        self._bucket = bucket
        self._lease = lease
        self._now = now
        self._owner = secrets.token_hex(8)
        self._running: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, key: str, digest: str, order_id: str, is_placed: Callable[[str], bool]) -> Claim:
        """Claim a key for a request.

        Parameters:
          order_id: Which order the key stands for, when it is new.
          is_placed: Whether an order was placed; its key is free for every repetition.

        Raises:
          IdempotencyConflict: When the key came before with a request of another digest.
          IdempotencyInProgress: When such a request is still running.
        """
        key = _hashed(key)
        with self._lock:
            if key in self._running:
                raise IdempotencyInProgress("a request with the same key is being worked on")
            self._running.add(key)
        try:
            return self._claim(key, digest, order_id, is_placed)
        except BaseException:
            self._running.discard(key)
            raise

    def _claim(self, key: str, digest: str, order_id: str, is_placed: Callable[[str], bool]) -> Claim:
        now = self._now()
        wanted = _Record(digest, order_id, now, self._owner, now + self._lease)
        while True:
            try:
                self._bucket.create(key, _encode(wanted))
                return Claim(key, order_id, now)
            except KeyExists:
                entry = self._bucket.get(key)
            if entry is None:
                continue  # it expired in between
            record = _decode(entry.value)
            if record.digest != digest:
                raise IdempotencyConflict("the key was used before for a different order")
            if is_placed(record.order_id):
                return Claim(key, record.order_id, record.created_at)
            # This process knows its own requests: one that no longer runs here has failed.
            if record.owner != self._owner and now < record.lease_until:
                wait = max(1, -(-(record.lease_until - now) // 1000))
                raise IdempotencyInProgress("a request with the same key is being worked on", wait)
            taken = replace(record, owner=self._owner, lease_until=now + self._lease)
            try:
                self._bucket.update(key, _encode(taken), revision=entry.revision)
            except RevisionConflict:
                raise IdempotencyInProgress("a request with the same key is being worked on") from None
            return Claim(key, record.order_id, record.created_at)

    def order_of(self, key: str) -> str | None:
        """Return the id of the order that a key stands for, None when it was not used."""
        entry = self._bucket.get(_hashed(key))
        return None if entry is None else _decode(entry.value).order_id

    def finished(self, claim: Claim) -> None:
        """End this process's work on a claim, however it went."""
        self._running.discard(claim.key)


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _encode(record: _Record) -> bytes:
    return json.dumps(asdict(record), separators=(",", ":")).encode()


def _decode(value: bytes) -> _Record:
    # Records of an older version say more.
    names = {field.name for field in fields(_Record)}
    return _Record(**{name: fact for name, fact in json.loads(value).items() if name in names})
