"""The log of deliveries: what is sent to which receiver, and what came of each attempt.

`{webhook}.{order}.{delivery}` holds one delivery, with the body as it is sent each time and the newest attempts at it.
The parts are digests, so a key names no person, and the delivery's id follows from webhook, order and event: the same
event makes the same delivery, however often and by whichever process it is seen. Every change is a compare-and-set.
An entry goes `KEPT_MS` after its last change.

A delivery has *runs*: sending it again begins another. A message carries its run. One of an older run does nothing, one
of a newer run begins it, so a run that was asked for is never without a message, whichever process is killed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol

from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from dramatiq_jetstream.streams import StoredMessage
from tasks.newer import members_of, stored_of
from tasks.ports import Bucket

BUCKET: Final = "deliveries"

#: For how many milliseconds after its last change a delivery is kept.
KEPT_MS: Final = 14 * 86_400_000

#: For how many milliseconds a run of a delivery is tried.
TRIED_MS: Final = 86_400_000

#: How many attempts at a delivery are kept, and how many characters of each answer.
MAX_ATTEMPTS: Final = 20
MAX_ANSWER: Final = 300

PENDING: Final = "pending"
DELIVERED: Final = "delivered"
FAILED: Final = "failed"

#: How many deliveries of an order are asked for at once.
_PAGE: Final = 256

#: How often it is looked whether something has changed while a page was read.
_LOOKS: Final = 5

#: How many members an attempt has here.
_MEMBERS: Final = 4

_DIGITS: Final = 20
_ID: Final = re.compile(rf"msg_[0-9a-f]{{{2 * _DIGITS}}}", re.ASCII)

#: How long a change is retried while other processes change the delivery, in seconds.
_TIMEOUT_SECONDS: Final = 10.0


class DeliveryBusy(Exception):
    """The entry was changed by others for the whole time allowed; trying again is safe."""


class Stored(Protocol):
    """The part of the bucket's stream that is read here."""

    def newest(
        self, subject: str = ">", *, before: int | None = None, page: int = 64
    ) -> Iterator[StoredMessage]: ...
    def read(self, subject: str = ">", *, start: int = 1, page: int = 256) -> Iterator[StoredMessage]: ...
    def last(self, subject: str = ">") -> StoredMessage | None: ...


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request: when, for how long (milliseconds), its status (0: no answer), and what was answered, or why not."""

    at: int
    milliseconds: int
    status: int
    text: str

    @property
    def is_success(self) -> bool:
        """Whether the receiver has accepted it."""
        return 200 <= self.status < 300


@dataclass(slots=True)
class Delivery:
    """One event for one webhook. Times are milliseconds.

    Attributes:
      type: The type of the event, such as `order.paid`; `at` is when it happened.
      body: What is sent, each time the same.
      state: `pending`, `delivered` or `failed`.
      reason: Why no request was sent, when it failed so.
      run: 0 for the first run, else when a person asked for it; a later one has a higher number.
      until: When it is given up.
      next_at: When it is tried next, if it is pending.
      tries: How many requests this run has sent.
      others: What a newer version has stored beside it.
    """

    id: str
    webhook_id: str
    order_id: str
    type: str
    at: int
    body: str
    until: int
    state: str = PENDING
    reason: str = ""
    run: int = 0
    next_at: int = 0
    tries: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None

    def begin_again(self, run: int, now: int) -> None:
        """Begin another run, unless it was begun already, or a newer one."""
        if run <= self.run:
            return
        self.run = run
        self.state, self.reason = PENDING, ""
        self.until, self.next_at, self.tries = now + TRIED_MS, 0, 0

    def note(self, attempt: Attempt) -> None:
        """Add an attempt; the oldest are forgotten."""
        self.attempts = [*self.attempts, attempt][-MAX_ATTEMPTS:]
        self.tries += 1


def delivery_id(webhook_id: str, order_id: str, event: str) -> str:
    """Return the id of the delivery of an event to a webhook.

    Parameters:
      event: What tells the event from the others of its order (`tasks.events.key_of`).
    """
    return f"msg_{_digest(order_id)}{_digest(json.dumps([webhook_id, order_id, event]))}"


def is_delivery_id(text: str) -> bool:
    """Whether a delivery can have this id."""
    return _ID.fullmatch(text) is not None


class Deliveries:
    """The deliveries in their bucket.

    Parameters:
      bucket: Where they are kept.
      name: The bucket's name on the server, for which its subjects begin with `$KV.`.
      stream: Its stream.
    """

    def __init__(self, bucket: Bucket, name: str, stream: Stored) -> None:
        self._bucket = bucket
        self._subjects = f"$KV.{name}."
        self._stream = stream

    def create(self, delivery: Delivery) -> Delivery:
        """Store a delivery, and return it, or the one that is there already."""
        try:
            self._bucket.create(_key(delivery.webhook_id, delivery.id), _encoded(delivery), ttl=KEPT_MS)
            return delivery
        except KeyExists:
            return self.find(delivery.webhook_id, delivery.id) or delivery

    def find(self, webhook_id: str, delivery_id: str) -> Delivery | None:
        """Return a delivery."""
        entry = self._bucket.get(_key(webhook_id, delivery_id))
        return None if entry is None else _decoded(entry.value)

    def change(
        self, webhook_id: str, delivery_id: str, change: Callable[[Delivery], None]
    ) -> Delivery | None:
        """Apply a change to a delivery; returns it, None when there is none.

        Raises:
          DeliveryBusy: When others kept changing it.
        """
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            entry = self._bucket.get(_key(webhook_id, delivery_id))
            if entry is None:
                return None
            delivery = _decoded(entry.value)
            change(delivery)
            try:
                self._bucket.update(entry.key, _encoded(delivery), revision=entry.revision, ttl=KEPT_MS)
                return delivery
            except RevisionConflict:
                if time.monotonic() > deadline:
                    raise DeliveryBusy(f"delivery {delivery_id} kept changing.") from None

    def page(
        self, webhook_id: str, limit: int, before: int | None = None
    ) -> tuple[list[Delivery], int | None]:
        """Return the deliveries of a webhook that changed last, and the cursor of the next page.

        The first page has those, too, that change while it is read.
        """
        subject = f"{self._subjects}{webhook_id}.>"
        newest = self._stream.last(subject) if before is None else None
        # Of a key that was deleted or has expired a mark is left, without a value.
        found = (one for one in self._stream.newest(subject, before=before, page=limit + 1) if one.data)
        page = {one.subject: one for one in islice(found, limit + 1)}
        if newest is not None:
            page |= {one.subject: one for one in self._changed_since(subject, newest.sequence)}
        newest_first = sorted((one for one in page.values() if one.data), key=lambda one: -one.sequence)
        following = newest_first[limit - 1].sequence if len(newest_first) > limit else None
        return [_decoded(one.data) for one in newest_first[:limit]], following

    def _changed_since(self, subject: str, place: int) -> Iterator[StoredMessage]:
        """Yield what was stored behind a place, until that is all: what changes is stored again at the end."""
        for _ in range(_LOOKS):
            changed = list(self._stream.read(subject, start=place + 1, page=_PAGE))
            if not changed:
                return
            yield from changed
            place = changed[-1].sequence

    def failed(self, webhook_id: str, run: int) -> Iterator[Delivery]:
        """Yield the deliveries of a webhook that failed in a run before this one, page by page."""
        for one in self._stream.read(f"{self._subjects}{webhook_id}.>", page=_PAGE):
            delivery = _decoded(one.data) if one.data else None
            if delivery is not None and delivery.state == FAILED and delivery.run < run:
                yield delivery

    def of_order(self, webhook_ids: Container[str], order_id: str) -> list[Delivery]:
        """Return the deliveries of an order's events to some webhooks, what changed last behind the others."""
        # Of a key that was deleted or has expired a mark is left, without a value.
        return [
            _decoded(one.data)
            for one in self._stream.read(self._of(order_id), page=_PAGE)
            if one.data and one.subject.removeprefix(self._subjects).partition(".")[0] in webhook_ids
        ]

    def newest_place(self, order_id: str) -> int:
        """Return a number that grows with each change of a delivery of an order's events, 0 when there is none."""
        newest = self._stream.last(self._of(order_id))
        return 0 if newest is None else newest.sequence

    def _of(self, order_id: str) -> str:
        return f"{self._subjects}*.{_digest(order_id)}.>"

    def drop(self, webhook_id: str, delivery_id: str) -> None:
        """Drop a delivery, whose webhook is gone."""
        self._bucket.delete(_key(webhook_id, delivery_id))


def _key(webhook_id: str, delivery_id: str) -> str:
    return f"{webhook_id}.{delivery_id[4 : 4 + _DIGITS]}.{delivery_id}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _encoded(delivery: Delivery) -> bytes:
    stored = stored_of(delivery)
    stored["attempts"] = [[one.at, one.milliseconds, one.status, one.text] for one in delivery.attempts]
    return json.dumps(stored, separators=(",", ":")).encode()


def _decoded(value: bytes) -> Delivery:
    stored = json.loads(value)
    stored["attempts"] = [Attempt(*one[:_MEMBERS]) for one in stored["attempts"]]
    return Delivery(**members_of(Delivery, stored))
