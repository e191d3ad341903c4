"""What an operator has to know of an order beside its record: which steps were given up, and which refunds are due.

Keys, in the bucket of the stock: `failed.{order_id}` holds the first failure of each step that was ever given up,
`refund.{order_id}` the charge of an order that was cancelled, until an operator has seen to it. Every change is a
compare-and-set. Neither is part of the record, so a note never keeps a step from moving the record on.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .ports import Bucket, Entry

#: How long a note competes with others, in milliseconds.
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
class Refund:
    """A refund that may be due: since when (milliseconds), and the charge, empty when only the gateway knows."""

    order_id: str
    at: int
    charge_id: str


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

    def refund_due(self, refund: Refund) -> None:
        """Note a refund; a charge that is known replaces one that is not."""
        key = f"refund.{refund.order_id}"
        value = json.dumps([refund.at, refund.charge_id]).encode()
        while True:
            entry = self._bucket.get(key)
            try:
                if entry is None:
                    self._bucket.create(key, value)
                elif refund.charge_id and not _refund(entry).charge_id:
                    self._bucket.update(key, value, revision=entry.revision)
                return
            except (KeyExists, RevisionConflict):
                continue  # there are two who note it at most, each once

    def refunds(self) -> Iterator[Refund]:
        """Yield the refunds that are still to be made."""
        return map(_refund, self._bucket.items("refund."))

    def refunded(self, order_id: str) -> bool:
        """Note that an operator has made a refund; False when there is none."""
        key = f"refund.{order_id}"
        known = self._bucket.get(key) is not None
        self._bucket.delete(key)
        return known


def _failures(entry: Entry | None) -> dict[str, GivenUp]:
    stored = {} if entry is None else json.loads(entry.value)
    return {step: GivenUp(*failure) for step, failure in stored.items()}


def _refund(entry: Entry) -> Refund:
    at, charge_id = json.loads(entry.value)
    return Refund(entry.key.removeprefix("refund."), at, charge_id)
