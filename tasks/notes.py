"""What is known of an order beside its record: who wants it cancelled, which steps were given up, what is unsettled.

Keys, in the bucket of the stock: `failed.{order_id}` holds the first failure of each step that was ever given up,
`cancel.{order_id}` who wanted first that the order is cancelled, and `refund.{order_id}` stands while money of the
order may have to go back, or what was decided or asked of it may not be done, so that such orders are found without a
look at all. Every change is a compare-and-set. None is part of the record, so a note never keeps a step from moving the
record on.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .ports import Bucket, Entry

#: How long a note is retried while other processes change it, in milliseconds.
TIMEOUT_MS: Final = 10_000


class NoteBusy(Exception):
    """The notes on an order were changed by others for the whole time allowed; trying again is safe."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A step that was given up: when (milliseconds), why, and which message is the dead letter."""

    at: int
    error: str
    message_id: str


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Who wants an order cancelled (`customer`, `operator` or `deadline`), since when (milliseconds), and why.

    `name` is what the front end calls that person or program.
    """

    at: int
    by: str
    reason: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Unsettled:
    """An order whose customer may be owed money: since when, and when that was last looked at (milliseconds)."""

    order_id: str
    at: int
    looked_at: int


class Notes:
    """The notes in their bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def failures(self, order_id: str) -> Mapping[str, GivenUp]:
        """Return the steps of an order that were given up."""
        return _failures(self._bucket.get(f"failed.{order_id}"))

    def give_up(self, order_id: str, step: str, failure: GivenUp) -> GivenUp:
        """Note that a step was given up; returns the note, or the one of before when there is one.

        Raises:
          NoteBusy: When others kept changing the notes of this order.
        """
        key = f"failed.{order_id}"
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while True:
            entry = self._bucket.get(key)
            known = _failures(entry)
            if step in known:
                return known[step]
            noted = {**known, step: failure}
            value = json.dumps(
                {name: [one.at, one.error, one.message_id] for name, one in noted.items()}
            ).encode()
            try:
                if entry is None:
                    self._bucket.create(key, value)
                else:
                    self._bucket.update(key, value, revision=entry.revision)
                return failure
            except (KeyExists, RevisionConflict) as conflict:
                if time.monotonic() > deadline:
                    raise NoteBusy(f"the failures of order {order_id} kept changing.") from conflict
                time.sleep(random.uniform(0, 0.01))

    def cancel_request(self, order_id: str) -> CancelRequest | None:
        """Return who wants an order cancelled."""
        entry = self._bucket.get(f"cancel.{order_id}") or self._bucket.get(
            f"cancel.{order_id}", linearizable=True
        )
        return None if entry is None else CancelRequest(*json.loads(entry.value))

    def was_asked(self, order_id: str) -> bool:
        """Whether it is noted that an order is to be cancelled; a note of a moment ago may be missed."""
        return self._bucket.get(f"cancel.{order_id}") is not None

    def ask_to_cancel(self, order_id: str, request: CancelRequest) -> tuple[CancelRequest, int | None]:
        """Note who wants an order cancelled; returns the note and its revision, or the one of before and None."""
        value = json.dumps([request.at, request.by, request.reason, request.name]).encode()
        try:
            return request, self._bucket.create(f"cancel.{order_id}", value)
        except KeyExists:
            return self.cancel_request(order_id) or request, None

    def take_back_cancel(self, order_id: str, revision: int) -> None:
        """Drop the note that an order is to be cancelled, unless it is another one by now."""
        with suppress(RevisionConflict):
            self._bucket.delete(f"cancel.{order_id}", revision=revision)

    def unsettle(self, order_id: str, at: int, looked_at: int) -> int | None:
        """Note that money of an order may have to go back, or its event be published; returns the revision of the note,
        None when there was one before.
        """
        key = f"refund.{order_id}"
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while True:
            entry = self._bucket.get(key)
            since = at if entry is None else _unsettled(entry).at
            value = json.dumps([since, looked_at]).encode()
            try:
                if entry is None:
                    return self._bucket.create(key, value)
                self._bucket.update(key, value, revision=entry.revision)
                return None
            except (KeyExists, RevisionConflict) as conflict:
                if time.monotonic() > deadline:
                    raise NoteBusy(f"the note on order {order_id} kept changing.") from conflict
                time.sleep(random.uniform(0, 0.01))

    def unsettled(self) -> Iterator[Unsettled]:
        """Yield the orders whose customers may be owed money."""
        return map(_unsettled, self._bucket.items("refund."))

    def find_unsettled(self, order_id: str) -> int | None:
        """Return the revision of the note that money of an order may have to go back, None when there is none."""
        entry = self._bucket.get(f"refund.{order_id}")
        return None if entry is None else entry.revision

    def settled(self, order_id: str, revision: int | None) -> None:
        """Drop the note of a revision, unless it was noted again since: nothing more is to go back of the order."""
        if revision is not None:
            with suppress(RevisionConflict):
                self._bucket.delete(f"refund.{order_id}", revision=revision)


def _failures(entry: Entry | None) -> dict[str, GivenUp]:
    stored = {} if entry is None else json.loads(entry.value)
    return {step: GivenUp(*failure) for step, failure in stored.items()}


def _unsettled(entry: Entry) -> Unsettled:
    at, looked_at = json.loads(entry.value)
    # Until now the second was a charge, which the record has or the gateway knows.
    looked_at = looked_at if isinstance(looked_at, int) else 0
    return Unsettled(entry.key.removeprefix("refund."), at, looked_at)
