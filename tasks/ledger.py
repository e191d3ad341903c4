"""What has been decided about an order, as one record that only moves forward.

::

    (none) ─► held ─► paid ─► confirmed ─► shipped ─► returning ─► returned
       │   ▲    ├───► declined ─► released
       │   │    └─ (or from offered, paid, confirmed) ─► cancelling ─┐
       ├─► offered                                                   │
       ├────► rejected                                               │
       └────► cancelled ◄────────────────────────────────────────────┘

The record, not the events, is what a step asks before it acts, because events may come twice, late, and in
any order. Every change is a compare-and-set on the record, so each arrow is taken at most once, and an event
can be published again at any time with what the record says.

`rejected`, `released`, `cancelled` and `returned` are final; the first two are one status for the customer. A
`confirmed` order rests until it is shipped or cancelled, a `shipped` one until it is returned, an `offered` one until
its customer accepts it: the one change that makes it `accepted` makes it `held`.

The refunds of an order are part of its record, each first as decided and then as made, and so are its chargebacks. The
change that ends a paid order decides its refund as well. No decision makes refunds and chargebacks together larger than
the charge: a refund that is not made when a chargeback comes is cut down to what is left.

A record that a newer version wrote may mean what this one does not know. It raises `NewerRecord`, nothing is done, and
a step waits for a worker of that version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Final

from .model import OrderedItem

_TEXTS: Final = (
    "customer_id",
    "total",
    "currency",
    "payment_token",
    "charge_id",
    "code",
    "reason",
    "carrier",
    "tracking",
    "stock",
    "expires_at",
    "accepted_by",
)
_FORWARD: Final[dict[str, frozenset[str]]] = {
    "offered": frozenset({"accepted", "cancelling"}),
    "accepted": frozenset({"held"}),
    "held": frozenset({"paid", "declined", "cancelling"}),
    "paid": frozenset({"confirmed", "cancelling"}),
    "declined": frozenset({"released"}),
    "cancelling": frozenset({"cancelled"}),
    "rejected": frozenset(),
    "released": frozenset(),
    "cancelled": frozenset(),
    "confirmed": frozenset({"shipped", "cancelling"}),
    "shipped": frozenset({"returning"}),
    "returning": frozenset({"returned"}),
    "returned": frozenset(),
}

#: What becomes of goods that came back: they are in stock again, or can never be sold.
BACK: Final = "back"
WRITTEN_OFF: Final = "written_off"


class NewerRecord(Exception):
    """A newer version has written this record, and only that version may act on it; another try later is safe."""


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
    `cut` is the part that is not refunded, because the customer's bank took it back first.
    """

    key: str
    amount: int
    at: int
    reason: str = ""
    refund_id: str = ""
    made_at: int = 0
    cut: int = 0

    @property
    def payable(self) -> int:
        """What goes back, in minor units."""
        return self.amount - self.cut


@dataclass(frozen=True, slots=True)
class Chargeback:
    """What a customer's bank took back; `id` is the gateway's, `amount` in minor units, `at` in milliseconds."""

    id: str
    amount: int
    at: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """The decisions about one order.

    Attributes:
      lines: What is offered or held, or was sold: one line per sku. Empty for an order that was rejected.
      total: What the lines cost.
      at: When each state was entered, in milliseconds.
      charge_id: The gateway's charge, from `paid` on; also of an order that was charged while it was cancelled.
      code, reason: Why it was declined, rejected, cancelled or returned.
      refunds: What goes back of the charge, in the order in which that was decided.
      carrier, tracking: Who carries its goods, and under which number.
      stock: What becomes of the goods that came back, `BACK` or `WRITTEN_OFF`.
      chargebacks: What the customer's bank took back of the charge.
      ordered: What was ordered, of an order that stock covers in part only.
      expires_at: Until when what there is was offered, in milliseconds.
      accepted_by: Who accepted it, `customer` or `operator`.
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
    carrier: str = ""
    tracking: str = ""
    stock: str = ""
    chargebacks: tuple[Chargeback, ...] = ()
    ordered: tuple[OrderedItem, ...] = ()
    expires_at: int = 0
    accepted_by: str = ""

    @property
    def taken(self) -> frozenset[str]:
        """The products of which it has pieces, or had, so that a note which says so stands for no others."""
        is_open = "offered" in self.at or "held" in self.at
        return frozenset(line.sku for line in self.lines) if is_open else frozenset()

    @property
    def charged_back(self) -> int:
        """What the customer's bank took back, in minor units."""
        return sum(chargeback.amount for chargeback in self.chargebacks)

    @property
    def refundable(self) -> int:
        """What is left of the charge for further refunds, in minor units."""
        if not self.charge_id:
            return 0
        return max(0, self.total - self.charged_back - sum(refund.payable for refund in self.refunds))

    @property
    def due(self) -> list[Refund]:
        """The refunds that were decided, are not known to be made, and are more than nothing."""
        return [refund for refund in self.refunds if refund.payable and not refund.refund_id]

    @property
    def comes_back(self) -> tuple[PricedItem, ...]:
        """What is in stock again at the end of an order that holds something and gives it back."""
        return () if self.stock == WRITTEN_OFF else self.lines

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

    def excess(self, key: str) -> int:
        """Return how much of a refund that was not made can never be made, because the bank took it back first."""
        refund = self.refund(key)
        if refund is None or refund.refund_id:
            return 0
        promised = sum(one.payable for one in self.refunds)
        return max(0, min(refund.payable, promised + self.charged_back - self.total))

    def cut(self, key: str, amount: int) -> Record:
        """Return the record with a part of a refund never to be made."""
        left = [replace(one, cut=one.cut + amount) if one.key == key else one for one in self.refunds]
        return replace(self, refunds=tuple(left))

    def charged_back_by(self, chargeback: Chargeback) -> Record:
        """Return the record with a further chargeback.

        Raises:
          ValueError: When that is more than is left of what was captured and not refunded, or nothing.
        """
        made = sum(refund.payable for refund in self.refunds if refund.refund_id)
        left = (self.total if self.charge_id else 0) - made - self.charged_back
        if not 0 < chargeback.amount <= left:
            raise ValueError(f"{chargeback.amount} cannot be charged back of {left}")
        return replace(self, chargebacks=(*self.chargebacks, chargeback))

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

    def offered(self, pieces: Mapping[str, int], names: Mapping[str, str], expires_at: int) -> Record:
        """Return what is recorded instead of this reservation when only some of it is there.

        Parameters:
          pieces: What there is of each sku; a sku of which there is nothing may be left out.
          names: What the products were called when the order was placed, by sku.
        """
        there = tuple(replace(line, quantity=pieces[line.sku]) for line in self.lines if pieces.get(line.sku))
        return replace(
            self,
            state="offered",
            at={"offered": self.at["held"]},
            lines=there,
            total=sum(line.quantity * line.unit_price for line in there),
            ordered=tuple(
                OrderedItem(line.sku, line.quantity, line.unit_price, names.get(line.sku, ""))
                for line in self.lines
            ),
            expires_at=expires_at,
        )

    def accepted(self, by: str, at: int) -> Record:
        """Return the record of an offer that was accepted: what there is, is held."""
        return self.forward("accepted", at, accepted_by=by).forward("held", at)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON has it, so that an operator can read it with any NATS tool."""
        stored: dict[str, Any] = {"state": self.state, "at": dict(self.at)}
        if self.lines:
            stored["lines"] = [[line.sku, line.quantity, line.unit_price] for line in self.lines]
        for name in _TEXTS:
            if value := getattr(self, name):
                stored[name] = value
        if self.refunds:
            # As earlier versions read it, for as long as that says everything.
            stored["refunds"] = [list(astuple(one))[: None if one.cut else -1] for one in self.refunds]
        if self.chargebacks:
            stored["chargebacks"] = [list(astuple(one)) for one in self.chargebacks]
        if self.ordered:
            stored["ordered"] = [list(astuple(one)) for one in self.ordered]
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Record:
        """Return the record that `to_json` described.

        Raises:
          NewerRecord: When a newer version described it.
        """
        if stored["state"] not in _FORWARD:
            raise NewerRecord(f"an order is {stored['state']!r}, which this version does not know.")
        try:
            lines = tuple(PricedItem(*line) for line in stored.get("lines", ()))
            refunds = tuple(Refund(*one) for one in stored.get("refunds", ()))
            chargebacks = tuple(Chargeback(*one) for one in stored.get("chargebacks", ()))
            ordered = tuple(OrderedItem(*one) for one in stored.get("ordered", ()))
            read = {"lines": lines, "refunds": refunds, "chargebacks": chargebacks, "ordered": ordered}
            return cls(**{**stored, **read})
        except TypeError as error:
            raise NewerRecord(f"an order's record has what this version does not know: {error}") from None

    def encode(self) -> bytes:
        """Return the record as it is stored."""
        return json.dumps(self.to_json(), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, value: bytes) -> Record:
        """Return the record that `encode` stored."""
        return cls.from_json(json.loads(value))
