"""What has been decided about an order, as one record that only moves forward.

::

    (none) ─► held ─► paid ─► confirmed
       │        ├───► declined ─► released
       │        └───► cancelling ─┐
       ├────► rejected            │
       └────► cancelled ◄─────────┘

The record, not the events, is what a step asks before it acts, because events may come twice, late, and in
any order. Every change is a compare-and-set on the record, so each arrow is taken at most once, and an event
can be published again at any time with what the record says.

`rejected`, `released`, `cancelled` and `confirmed` are final; the first two are one status for the customer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

_FORWARD: Final[dict[str, frozenset[str]]] = {
    "held": frozenset({"paid", "declined", "cancelling"}),
    "paid": frozenset({"confirmed"}),
    "declined": frozenset({"released"}),
    "cancelling": frozenset({"cancelled"}),
    "rejected": frozenset(),
    "released": frozenset(),
    "cancelled": frozenset(),
    "confirmed": frozenset(),
}


@dataclass(frozen=True, slots=True)
class PricedItem:
    """Pieces of one sku at one price (in minor units)."""

    sku: str
    quantity: int
    unit_price: int


@dataclass(frozen=True, slots=True)
class Record:
    """The decisions about one order.

    Attributes:
      lines: What is held, or was sold: one line per sku. Empty for an order that was rejected.
      at: When each state was entered, in milliseconds.
      charge_id: The gateway's charge, from `paid` on.
      code, reason: Why it was declined, rejected or cancelled.
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
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Record:
        """Return the record that `to_json` described."""
        return cls(**{**stored, "lines": tuple(PricedItem(*line) for line in stored.get("lines", ()))})

    def encode(self) -> bytes:
        """Return the record as it is stored."""
        return json.dumps(self.to_json(), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, value: bytes) -> Record:
        """Return the record that `encode` stored."""
        return cls.from_json(json.loads(value))
