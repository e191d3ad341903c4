"""Which order an id stands for.

`claim.{order_id}`, in the bucket of the stock, is written once, before anything else happens to an order: by the front
end before it publishes the order, or by the worker that first sees an order of another program. It is changed
when the order leaves for the archive, or its customer is erased, and nothing can be claimed under it then either. So an
id has one content, and another order under the same id is refused. The products' names and prices are part of it:
whatever becomes of the catalogue, an order costs what it did when it was placed.

A crash after a claim leaves an id that is taken, by the order that will be asked for again, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dramatiq_jetstream.errors import KeyExists
from orders.v1.events_pb2 import OrderCreated

from .ledger import PricedItem
from .model import MAX_ID_LENGTH
from .ports import Bucket
from .products import Offered
from .rules import quantities_of
from .text import normalised
from .tokens import is_reference, reference

#: What a claim has in place of a digest when its order is in the archive, or its customer was erased; no content has
#: it.
ARCHIVED: Final = "archived"
ERASED: Final = "erased"


class ClaimBehind(Exception):
    """A server says that an existing claim is missing; trying again is safe."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The content of an order.

    Attributes:
      at: When the id was claimed, in milliseconds.
      digest: Identifies the order's content, including the payment token, which is not kept here.
      lines: One line per sku. Empty, as is the rest, for an order that breaks the rules.
      names: What the products were called, by sku.
      code, reason: Which rule the order breaks.
    """

    at: int
    digest: str
    customer_id: str = ""
    lines: tuple[PricedItem, ...] = ()
    total: int = 0
    currency: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    reason: str = ""

    @property
    def is_archived(self) -> bool:
        """Whether the order is in the archive, and only there."""
        return self.digest == ARCHIVED

    @property
    def archived(self) -> Claim:
        """What remains of the claim of an archived order."""
        return Claim(self.at, ARCHIVED)

    @property
    def anonymous(self) -> Claim:
        """The claim without who ordered, and without the words in which it broke a rule."""
        return replace(self, digest=ERASED, customer_id="", reason="")

    def encode(self) -> bytes:
        """Return the claim as it is stored."""
        stored: dict[str, Any] = {"at": self.at, "digest": self.digest}
        if self.lines:
            lines = [[line.sku, line.quantity, line.unit_price] for line in self.lines]
            stored |= {
                "customer_id": self.customer_id,
                "lines": lines,
                "total": self.total,
                "currency": self.currency,
                "names": dict(self.names),
            }
        elif self.code:
            stored |= {"code": self.code, "reason": self.reason}
        return json.dumps(stored, separators=(",", ":")).encode()

    @property
    def offer(self) -> Mapping[str, Offered]:
        """What the order was placed with, as products that are sold."""
        return {
            line.sku: Offered(line.sku, self.names.get(line.sku, line.sku), line.unit_price)
            for line in self.lines
        }

    @classmethod
    def decode(cls, value: bytes) -> Claim:
        """Return the claim that `encode` stored."""
        stored = json.loads(value)
        return cls(**{**stored, "lines": tuple(PricedItem(*line) for line in stored.get("lines", ()))})


class Claims:
    """The claims in their bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def find(self, order_id: str, *, linearizable: bool = False) -> Claim | None:
        """Return what an id stands for."""
        entry = self._bucket.get(f"claim.{order_id}", linearizable=linearizable)
        return None if entry is None else Claim.decode(entry.value)

    def claim(self, order_id: str, wanted: Claim) -> tuple[Claim, bool]:
        """Claim an id; returns what it stands for, and whether that was decided now.

        Raises:
          ClaimBehind: When it is taken, and what for cannot be read.
        """
        try:
            self._bucket.create(f"claim.{order_id}", wanted.encode())
            return wanted, True
        except KeyExists as conflict:
            existing = self.find(order_id) or self.find(order_id, linearizable=True)
            if existing is None:
                raise ClaimBehind(
                    f"the claim on order id {order_id} cannot be read as it is now."
                ) from conflict
            return existing, False


def digest_of(customer_id: str, quantities: Mapping[str, int], token_reference: str) -> str:
    """Return the digest of an order's content; the same order always has the same one."""
    content = [customer_id, sorted(quantities.items()), token_reference]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digest_of_event(event: OrderCreated) -> str:
    """Return the digest of the order that an event asks for."""
    return digest_of(customer_of(event), quantities_of(event.items), token_of(event))


def token_of(event: OrderCreated) -> str:
    """Return the reference of an event's payment token; other programs send the token itself."""
    token: str = event.payment_token
    return token if is_reference(token) else reference(customer_of(event), token)


def customer_of(event: OrderCreated) -> str:
    """Return who ordered, in the one form that the same name always has."""
    return normalised(event.customer_id, MAX_ID_LENGTH)
