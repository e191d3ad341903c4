"""The interfaces through which the steps of an order reach the world: bucket, gateway, publisher.

The real ones are `dramatiq_jetstream`'s bucket, `tasks.gateway` and `tasks.app.publish`. The property tests use others
in their place, which crash between any two effects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import Message

from .ledger import Chargeback


class Entry(Protocol):
    """The value of a key, the revision that the bucket gave it, and when (milliseconds since 1970)."""

    @property
    def key(self) -> str: ...
    @property
    def value(self) -> bytes: ...
    @property
    def revision(self) -> int: ...
    @property
    def created(self) -> int: ...


class Bucket(Protocol):
    """The part of a key-value bucket that the stores use; revision 0 stands for a key that does not exist.

    A read may be outdated unless it is linearizable, which costs a write. `get_many` may be as well,
    but not behind `since`, a key and a revision of it.
    """

    def get(self, key: str, *, linearizable: bool = False) -> Entry | None: ...
    def get_many(self, keys: Sequence[str], *, since: tuple[str, int]) -> Mapping[str, Entry]: ...
    def create(self, key: str, value: bytes, *, ttl: int | None = None) -> int: ...
    def update(self, key: str, value: bytes, *, revision: int, ttl: int | None = None) -> int: ...
    def delete(self, key: str, *, revision: int | None = None) -> None: ...
    def items(self, prefix: str = "", *, after: int = 0) -> Iterator[Entry]: ...
    def newest_revision(self) -> int: ...


class BatchBucket(Bucket, Protocol):
    """A bucket with atomic batches: all of them are stored, or none; and a way to be rid of many keys."""

    def update_all(self, updates: Mapping[str, tuple[bytes, int]]) -> Mapping[str, int]: ...
    def clear(self, prefix: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Charge:
    """A captured payment; `amount` in minor units, 0 where only the id was asked for."""

    charge_id: str
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Decline:
    """A payment that was refused for good."""

    code: str
    reason: str


class Gateway(Protocol):
    """Captures payments and gives them back: asked again with the same order id, or the same key, it answers the same
    and moves no more money. What is refunded and charged back of a charge is together never more than the charge.
    """

    def charge(self, order_id: str, amount: int, currency: str, token: str) -> Charge | Decline: ...
    def find_charge(self, order_id: str) -> Charge | None: ...
    def refund(self, charge_id: str, amount: int, currency: str, key: str) -> str: ...
    def find_refund(self, order_id: str, key: str) -> str | None: ...
    def find_chargebacks(self, order_id: str) -> list[tuple[str, Chargeback]]: ...


class Publisher(Protocol):
    """Stores an event in the stream within `timeout` milliseconds and returns its place there, or raises.

    `headers` are further ones, which say who does what follows (`tasks.events`).
    """

    def __call__(
        self,
        event: Message,
        at: int,
        *,
        timeout: int | None = None,
        headers: Mapping[str, str] = ...,
    ) -> int: ...


class History(Protocol):
    """Says whether an event of an order is known to be in the stream."""

    def has_event(self, order_id: str, event: str) -> bool: ...
