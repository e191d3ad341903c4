"""What has been decided about an order, as one record that only moves forward.

::

    (none) ─► held ─► paid ─► confirmed
       │        ├───► declined ─► released
       │        └─ (or from paid, confirmed) ─► cancelling ─┐
       ├────► rejected                                      │
       └────► cancelled ◄───────────────────────────────────┘

The record, not the events, is what a step asks before it acts, because events may come twice, late, and in
any order. Every change is a compare-and-set on the record, so each arrow is taken at most once, and an event
can be published again at any time with what the record says.

`rejected`, `released` and `cancelled` are final; the first two are one status for the customer. A `confirmed` order
rests until it is cancelled.

The refunds of an order are part of its record, each first as decided and then as made. The change that ends a paid
order decides its refund as well, and no decision makes the sum of all refunds larger than the charge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Final

_FORWARD: Final[dict[str, frozenset[str]]] = {
    "held": frozenset({"paid", "declined", "cancelling"}),
    "paid": frozenset({"confirmed", "cancelling"}),
    "declined": frozenset({"released"}),
    "cancelling": frozenset({"cancelled"}),
    "rejected": frozenset(),
    "released": frozenset(),
    "cancelled": frozenset(),
    "confirmed": frozenset({"cancelling"}),
}


@dataclass(frozen=True, slots=True)
class PricedItem:
    """Pieces of one sku at one price (in minor units)."""

    sku: str
    quantity: int
    unit_price: int


@dataclass(frozen=True, slots=True)
class Refund:
    """A refund that was decided; `amount` in minor units, times in milliseconds.

    `key` names it among the refunds of its order. `refund_id` is the gateway's, and empty until the refund was made.
    """

    key: str
    amount: int
    at: int
    reason: str = ""
    refund_id: str = ""
    made_at: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """The decisions about one order.

    Attributes:
      lines: What is held, or was sold: one line per sku. Empty for an order that was rejected.
      at: When each state was entered, in milliseconds.
      charge_id: The gateway's charge, from `paid` on; also of an order that was charged while it was cancelled.
      code, reason: Why it was declined, rejected or cancelled.
      refunds: What goes back of the charge, in the order in which that was decided.
    """

    state: str
    at: Mapping[str, int]
    customer_id: str = ""
    lines: tuple[PricedItem, ...] = ()
    total: int = 0
    currency: str = ""
    payment_token: str = ""
    charge_id: str = ""
    code: str = ""
    reason: str = ""
    refunds: tuple[Refund, ...] = ()

    @property
    def refundable(self) -> int:
        """What is left of the charge for further refunds, in minor units."""
        return self.total - sum(refund.amount for refund in self.refunds) if self.charge_id else 0

    @property
    def due(self) -> list[Refund]:
        """The refunds that were decided and are not known to be made."""
        return [refund for refund in self.refunds if not refund.refund_id]

    def refund(self, key: str) -> Refund | None:
        """Return a refund by its name."""
        return next((refund for refund in self.refunds if refund.key == key), None)

    def owing(self, refund: Refund) -> Record:
        """Return the record with a further refund.

        Raises:
          ValueError: When that is more than is left of the charge, or nothing.
        """
        if not 0 < refund.amount <= self.refundable:
            raise ValueError(f"{refund.amount} cannot be refunded of {self.refundable}")
        return replace(self, refunds=(*self.refunds, refund))

    def refunded(self, key: str, refund_id: str, at: int) -> Record:
        """Return the record with a refund as made."""
        made = [
            replace(one, refund_id=refund_id, made_at=at) if one.key == key else one for one in self.refunds
        ]
        return replace(self, refunds=tuple(made))

    def forward(self, state: str, at: int, **facts: str) -> Record:
        """Return the record in its next state.

        Raises:
          ValueError: When no arrow leads there; a step that asks for it has a bug.
        """
        if state not in _FORWARD[self.state]:
            raise ValueError(f"an order does not go from {self.state} to {state}")
        return replace(self, state=state, at={**self.at, state: at}, **facts)  # type: ignore[arg-type]

    def rejected(self, code: str, reason: str) -> Record:
        """Return what is recorded instead of this reservation when it cannot be made."""
        return Record("rejected", {"rejected": self.at["held"]}, code=code, reason=reason)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON has it, so that an operator can read it with any NATS tool."""
        stored: dict[str, Any] = {"state": self.state, "at": dict(self.at)}
        if self.lines:
            stored["lines"] = [[line.sku, line.quantity, line.unit_price] for line in self.lines]
        for name in ("customer_id", "total", "currency", "payment_token", "charge_id", "code", "reason"):
            if value := getattr(self, name):
                stored[name] = value
        if self.refunds:
            stored["refunds"] = [list(astuple(refund)) for refund in self.refunds]
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Record:
        """Return the record that `to_json` described."""
        lines = tuple(PricedItem(*line) for line in stored.get("lines", ()))
        refunds = tuple(Refund(*refund) for refund in stored.get("refunds", ()))
        return cls(**{**stored, "lines": lines, "refunds": refunds})

    def encode(self) -> bytes:
        """Return the record as it is stored."""
        return json.dumps(self.to_json(), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, value: bytes) -> Record:
        """Return the record that `encode` stored."""
        return cls.from_json(json.loads(value))
