"""Who wants which events, and where: the webhooks in their bucket, with their secrets encrypted.

A secret signs what is sent to a receiver. It is shown once, when it is made. What is stored is encrypted with
TOKEN_KEY, together with the webhook's id, so that an entry which is copied under another id opens nothing. A new
secret signs beside the old one for `OVERLAP_MS`, so that a receiver can change over without losing a delivery. When
TOKEN_KEY has a new key in front, `reseal` encrypts with it what an older one has encrypted.

`endpoint.{id}` is changed by compare-and-set alone. A webhook that was removed stays for a day as *removed*, so that
processes which read only what has changed (`Directory`) learn of it. A crash between storing a secret and showing it
leaves one that its owner does not know: they make another, and the one before still signs.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from typing import Any, Final

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from dramatiq_jetstream.errors import RevisionConflict
from tasks.events import TYPES
from tasks.model import InvalidCursor
from tasks.newer import members_of, stored_of
from tasks.numbers import whole_number
from tasks.ports import Bucket, Entry

from .addresses import InvalidAddress, Network, check

BUCKET: Final = "webhooks"
PREFIX: Final = "endpoint."

#: The types of events that a webhook can choose from.
EVENT_TYPES: Final = tuple(f"order.{name}" for name in TYPES)

#: How many webhooks a customer may have, and all operators together.
MAX_OF_CUSTOMER: Final = 10
MAX_OF_OPERATORS: Final = 50
MAX_DESCRIPTION: Final = 100
MAX_CURSOR: Final = 100

#: For how many milliseconds an old secret signs beside a new one, and how many may do so.
OVERLAP_MS: Final = 86_400_000
_MAX_SECRETS: Final = 5

#: For how many milliseconds a webhook that was removed can still be told from one that never was.
_REMOVED_MS: Final = 86_400_000

#: After how many seconds a process reads all webhooks again.
_WHOLE_SECONDS: Final = 600.0

ACTIVE: Final = "active"
DISABLED: Final = "disabled"
_REMOVED: Final = "removed"


class InvalidWebhook(ValueError):
    """A webhook cannot be like this: `field` is what is wrong, the message the end of a sentence about it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


class TooManyWebhooks(Exception):
    """Their owner has as many webhooks as an owner may have."""


class SecretUnreadable(Exception):
    """A secret was encrypted with a key that is not among those of TOKEN_KEY."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """One webhook. Times are milliseconds.

    Attributes:
      events: The types of events that it wants; empty: all.
      customer_id: Whose orders' events it gets; None: those of all orders, for operators.
      state: `active` or `disabled`.
      reason: Why it was disabled; empty when a person did it.
      others: What a newer version has stored beside it.
    """

    id: str
    url: str
    events: tuple[str, ...]
    description: str
    customer_id: str | None
    created_by: str
    created_at: int
    state: str = ACTIVE
    reason: str = ""
    changed_at: int = 0
    sealed: str = field(default="", repr=False)
    others: dict[str, Any] = field(default_factory=dict, repr=False, hash=False)

    @property
    def is_active(self) -> bool:
        """Whether events are sent to it."""
        return self.state == ACTIVE

    def wants(self, event_type: str) -> bool:
        """Whether it chose events of a type."""
        return not self.events or event_type in self.events


class Subscriptions:
    """The webhooks in their bucket.

    Parameters:
      bucket: Where they are kept.
      keys: Fernet keys; the first encrypts, all decrypt.
      allowed: Private networks in which receivers may be.
      now: The time in milliseconds.
    """

    def __init__(
        self, bucket: Bucket, keys: Iterable[str], allowed: Sequence[Network], now: Callable[[], int]
    ) -> None:
        self._bucket = bucket
        self.directory = Directory(bucket)
        self._ciphers = [Fernet(key) for key in keys]
        self._allowed = allowed
        self._now = now

    def add(
        self, url: str, events: Iterable[str], description: str, customer_id: str | None, by: str
    ) -> tuple[Subscription, str]:
        """Make a webhook; returns it and its secret, which cannot be had again.

        Raises:
          InvalidWebhook: For an address, a type of events or a description that it cannot have.
          TooManyWebhooks: When its owner has as many as can be.
        """
        checked = self._checked({"url": url, "events": events, "description": description})
        most = MAX_OF_OPERATORS if customer_id is None else MAX_OF_CUSTOMER
        if sum(one.customer_id == customer_id for one in self.all()) >= most:
            raise TooManyWebhooks(f"There are {most} webhooks already, which is the most: remove one first.")
        now = self._now()
        webhook_id, secret = f"wh_{secrets.token_hex(10)}", _new_secret()
        made = Subscription(
            webhook_id,
            **checked,
            customer_id=customer_id,
            created_by=by,
            created_at=now,
            changed_at=now,
            sealed=self._sealed(webhook_id, [(secret, None)]),
        )
        self._bucket.create(PREFIX + webhook_id, _encoded(made))
        return made, secret

    def all(self) -> list[Subscription]:
        """Return all webhooks; only what has changed is read."""
        return self.directory.refresh()

    def page(
        self, limit: int, before: str | None = None, customer_id: str | None = None
    ) -> tuple[list[Subscription], str | None]:
        """Return up to `limit` webhooks, newest first, and the cursor of the next page.

        Parameters:
          customer_id: Whose; None is everyone's.

        Raises:
          InvalidCursor: When `before` was not made here.
        """
        place = None if before is None else _place(before)
        found = nlargest(
            limit + 1,
            (
                one
                for one in self.all()
                if customer_id in (None, one.customer_id) and (place is None or _key(one) < place)
            ),
            key=_key,
        )
        page = found[:limit]
        return page, "-".join(map(str, _key(page[-1]))) if len(found) > limit else None

    def find(self, webhook_id: str) -> Subscription | None:
        """Return a webhook."""
        entry = self._bucket.get(PREFIX + webhook_id)
        found = None if entry is None else _decoded(entry)
        return None if found is None or found.state == _REMOVED else found

    def change(self, webhook_id: str, **changes: Any) -> Subscription | None:
        """Change `url`, `events` or `description`; returns the webhook, None when there is none.

        Raises:
          InvalidWebhook: For what it cannot have.
        """
        checked = self._checked(changes)
        return self._change(webhook_id, lambda one: replace(one, **checked))

    def enable(self, webhook_id: str) -> Subscription | None:
        """Have events sent to a webhook again; those of the time between are not."""
        return self._change(webhook_id, lambda one: replace(one, state=ACTIVE, reason=""))

    def disable(self, webhook_id: str, reason: str = "") -> Subscription | None:
        """Have no events sent to a webhook until it is enabled; returns None when there is none."""
        return self._change(webhook_id, lambda one: replace(one, state=DISABLED, reason=reason))

    def remove(self, webhook_id: str) -> bool:
        """Remove a webhook with its secrets; False when there is none."""
        gone = self._change(
            webhook_id,
            lambda one: Subscription(one.id, "", (), "", None, "", one.created_at, _REMOVED),
            ttl=_REMOVED_MS,
        )
        return gone is not None

    # Secrets

    def rotate(self, webhook_id: str) -> str | None:
        """Make a new secret; returns it, once, or None when there is no such webhook.

        The old one signs beside it for `OVERLAP_MS`.
        """
        secret = _new_secret()

        def with_new(one: Subscription) -> Subscription:
            until = self._now() + OVERLAP_MS
            old = [(text, end or until) for text, end in self._valid(one)]
            return replace(one, sealed=self._sealed(one.id, [(secret, None), *old][:_MAX_SECRETS]))

        return None if self._change(webhook_id, with_new) is None else secret

    def secrets(self, subscription: Subscription) -> list[str]:
        """Return the secrets that sign now, the newest first.

        Raises:
          SecretUnreadable: When the key is missing with which they were encrypted.
        """
        return [text for text, _ in self._valid(subscription)]

    def reseal(self) -> int:
        """Encrypt with the first key what another one has encrypted; returns how many webhooks that were."""
        done = 0
        for one in self.all():
            try:
                self._ciphers[0].decrypt(one.sealed)
            except InvalidToken:
                kept = self._valid(one)
                self._change(
                    one.id,
                    lambda now, old=one.sealed, kept=kept: (  # type: ignore[misc]
                        replace(now, sealed=self._sealed(now.id, kept)) if now.sealed == old else now
                    ),
                )
                done += 1
        return done

    def _valid(self, subscription: Subscription) -> list[tuple[str, int | None]]:
        try:
            kept_for, kept = json.loads(MultiFernet(self._ciphers).decrypt(subscription.sealed))
        except InvalidToken:
            kept_for, kept = None, []
        if kept_for != subscription.id:
            raise SecretUnreadable(
                f"the secret of webhook {subscription.id} was encrypted with a key that TOKEN_KEY does not have."
            )
        now = self._now()
        return [(text, until) for text, until in kept if until is None or now < until]

    def _sealed(self, webhook_id: str, kept: Sequence[tuple[str, int | None]]) -> str:
        return self._ciphers[0].encrypt(json.dumps([webhook_id, kept]).encode()).decode()

    # Inside

    def _checked(self, changes: dict[str, Any]) -> dict[str, Any]:
        checked = dict(changes)
        if "url" in checked:
            try:
                check(checked["url"], self._allowed)
            except InvalidAddress as error:
                raise InvalidWebhook("url", str(error)) from None
        if "events" in checked:
            chosen = set(checked["events"])
            if chosen - set(EVENT_TYPES):
                raise InvalidWebhook("events", f"must be some of {', '.join(EVENT_TYPES)}; none means all.")
            checked["events"] = tuple(one for one in EVENT_TYPES if one in chosen)
        if "description" in checked:
            text = checked["description"] = checked["description"].strip()
            if len(text) > MAX_DESCRIPTION or not text.isprintable():
                raise InvalidWebhook(
                    "description", f"must be one line of {MAX_DESCRIPTION} characters at most."
                )
        return checked

    def _change(
        self, webhook_id: str, changed: Callable[[Subscription], Subscription], *, ttl: int | None = None
    ) -> Subscription | None:
        while True:
            entry = self._bucket.get(PREFIX + webhook_id)
            if entry is None or (known := _decoded(entry)).state == _REMOVED:
                return None
            wanted = changed(known)
            if wanted == known:
                return known
            wanted = replace(wanted, changed_at=self._now())
            try:
                self._bucket.update(entry.key, _encoded(wanted), revision=entry.revision, ttl=ttl)
                return wanted
            except RevisionConflict:
                continue  # each conflict is a change that another caller has made


class Directory:
    """All webhooks in memory, with what has changed since read again when it is asked for. Any thread may use it.

    Parameters:
      bucket: Where they are kept.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._lock = threading.Lock()
        self._revision = 0
        self._as_of = self._read_all_at = float("-inf")
        self._known: dict[str, Subscription] = {}

    def refresh(self, since: float | None = None) -> list[Subscription]:
        """Return the webhooks as they are at a moment after `since`.

        A thread whose moment comes before a read that another one began gets what that one has read. So the more
        threads ask, and the longer their moments are past, the fewer reads there are for each.

        Parameters:
          since: By `time.monotonic`, in seconds; None for the moment of this call.
        """
        moment = time.monotonic() if since is None else since
        if self._as_of < moment:
            with self._lock:
                # Another thread may have begun to read while this one waited.
                if self._as_of < moment:
                    self._read()
        return list(self._known.values())

    def _read(self) -> None:
        begun = time.monotonic()
        # A bucket that was made again counts from the beginning, so all of it is read from time to time.
        whole = begun - self._read_all_at > _WHOLE_SECONDS
        known = {} if whole else dict(self._known)
        revision = 0 if whole else self._revision
        for entry in self._bucket.items(PREFIX, after=revision):
            one = _decoded(entry)
            revision = max(revision, entry.revision)
            if one.state == _REMOVED:
                known.pop(one.id, None)
            else:
                known[one.id] = one
        self._known, self._revision = known, revision
        if whole:
            self._read_all_at = begun
        # Last: what was not read to its end is of no moment.
        self._as_of = begun


def _key(one: Subscription) -> tuple[int, str]:
    return one.created_at, one.id


def _place(cursor: str) -> tuple[int, str]:
    at, _, webhook_id = cursor.partition("-")
    number = whole_number(at, 0, 2**63 - 1)
    if number is None or len(cursor) > MAX_CURSOR:
        raise InvalidCursor("the cursor was not made by this service")
    return number, webhook_id


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def _encoded(subscription: Subscription) -> bytes:
    return json.dumps(stored_of(subscription), separators=(",", ":")).encode()


def _decoded(entry: Entry) -> Subscription:
    stored = json.loads(entry.value)
    return Subscription(**members_of(Subscription, {**stored, "events": tuple(stored["events"])}))
