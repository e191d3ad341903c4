"""The order service's values: requests, orders, products, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

#: Every status that an order can have.
STATUSES = (
    "accepted",
    "offered",
    "reserved",
    "paid",
    "confirmed",
    "shipped",
    "rejected",
    "cancelled",
    "returned",
    "refunded",
    "failed",
)

#: The statuses from which an order does not move on by itself. A failed order moves on when its dead letter is
#: replayed, or it is cancelled; a confirmed one when it is shipped, cancelled or refunded; a shipped one when it is
#: returned or refunded. (An offered one does: the offer expires.)
FINAL_STATUSES = frozenset({"confirmed", "shipped", "rejected", "cancelled", "returned", "refunded"})

#: The statuses that an order never leaves.
OVER_STATUSES = frozenset({"rejected", "cancelled", "returned"})

#: The statuses in which an order can be cancelled.
CANCELLABLE_STATUSES = frozenset({"accepted", "offered", "reserved", "paid", "confirmed", "failed"})

#: The statuses that come with a reason.
REASONED_STATUSES = frozenset({"rejected", "cancelled", "returned", "failed"})

MAX_ITEMS = 100
#: Pieces of one order, however many lines they are spread over.
MAX_QUANTITY = 1_000
MAX_ID_LENGTH = 64
MAX_TOKEN_LENGTH = 255

#: How many characters of a reason or an error are kept.
MAX_TEXT = 500


@dataclass(frozen=True, slots=True)
class RequestedItem:
    """Pieces of one product, as a customer asks for them."""

    sku: str
    quantity: int


@dataclass(frozen=True, slots=True)
class OrderRequest:
    """An order that has been read and checked, but not yet accepted.

    `order_id` is set when the client chose it (protobuf bodies may carry one).
    """

    customer_id: str
    items: list[RequestedItem]
    payment_token: str | None = None
    order_id: str | None = None


@dataclass(frozen=True, slots=True)
class OrderedItem:
    """One item of an order; `unit_price` in minor units, None where the order broke the rules and did not say.

    `name` is what the product was called when the order was placed, empty for an order of an earlier version.
    """

    sku: str
    quantity: int
    unit_price: int | None
    name: str = ""


@dataclass(frozen=True, slots=True)
class OfferedItem:
    """One item of an order that stock does not cover: of `ordered` pieces there are `quantity`, 0 or more.

    `unit_price` in minor units.
    """

    sku: str
    ordered: int
    quantity: int
    unit_price: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """What there is of an order that stock does not cover: its items, what they cost together in minor units, and until
    when they are held for the customer.
    """

    items: list[OfferedItem]
    total: int
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One event of an order; `event` is its name in `tasks.events.TYPES`, such as created or confirmed.

    `detail` holds what the event adds, for instance {"reason": ...} or {"charge_id": ...}; `sequence` is its
    place in the stream, 0 while that is not known.
    """

    event: str
    at: datetime
    detail: Mapping[str, str] = field(default_factory=dict)
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """An order as the read model shows it.

    `status` is one of `STATUSES`; `total` is in minor units;
    `reason` says in one sentence why it was rejected, cancelled or failed. `revision` grows with every change and
    is 0 while only the accepted event is known. `trace_id` is the hexadecimal id of the order's trace, when it has one.
    `offer` is what there was of an order that stock did not cover, whatever became of that; once it is accepted,
    `items` and `total` are what was offered.
    """

    order_id: str
    status: str
    customer_id: str
    items: list[OrderedItem]
    total: int
    currency: str
    history: list[HistoryEntry]
    reason: str | None = None
    revision: int = 0
    trace_id: str | None = None
    offer: Offer | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing further will happen to it by itself."""
        return self.status in FINAL_STATUSES and not self.is_being_cancelled and not self.is_being_returned

    @property
    def can_be_cancelled(self) -> bool:
        """Whether a cancel would end it."""
        return self.status in CANCELLABLE_STATUSES and not self.is_being_cancelled

    @property
    def can_be_accepted(self) -> bool:
        """Whether its customer has yet to say whether what there is will do."""
        return self.status == "offered" and not self.is_being_cancelled

    @property
    def is_partial(self) -> bool:
        """Whether it is what there was of it: offered now, or accepted before."""
        return self.offer is not None and (self.status == "offered" or self._has("offer_accepted"))

    @property
    def skus(self) -> frozenset[str]:
        """The products that were ordered."""
        offered = () if self.offer is None else self.offer.items
        return frozenset(item.sku for item in (*self.items, *offered))

    @property
    def is_being_cancelled(self) -> bool:
        """Whether its cancel was requested, and it has not ended yet."""
        return self.status in CANCELLABLE_STATUSES and self._has("cancel_requested")

    @property
    def was_shipped(self) -> bool:
        """Whether its goods have left."""
        return self._has("shipped")

    @property
    def is_being_returned(self) -> bool:
        """Whether its return was decided, and it has not ended yet."""
        return self.status in ("shipped", "refunded") and self._has("return_requested")

    @property
    def waits_for_return(self) -> bool:
        """Whether its end was requested, it was shipped, and an operator has yet to decide about its return."""
        return self.status == "shipped" and self._has("cancel_requested") and not self.is_being_returned

    def _has(self, event: str) -> bool:
        return any(entry.event == event for entry in self.history)

    @property
    def place(self) -> int:
        """Where in the stream the event stands that placed it, 0 while that is not known."""
        return next((entry.sequence for entry in self.history if entry.event == "created"), 0)


@dataclass(frozen=True, slots=True)
class AcceptedOrder:
    """An order whose event is stored. `repeated`: an earlier request with the same key stored it."""

    order: Order
    repeated: bool = False

    @property
    def order_id(self) -> str:
        return self.order.order_id


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which orders a list is to have; None is any.

    `since` and `until` are milliseconds since 1970, the first is meant and the second is not; `text` is a part of the
    order's or the customer's id, `failure` a part of the reason why it was rejected, cancelled or failed; both in lower
    case (`str.casefold`). With `causes` false, the reasons of failed orders, which are technical, count as unknown.
    """

    customer_id: str | None = None
    status: str | None = None
    since: int | None = None
    until: int | None = None
    sku: str | None = None
    text: str | None = None
    failure: str | None = None
    causes: bool = True


@dataclass(frozen=True, slots=True)
class Counts:
    """How many orders have each status; `complete` says that no older ones were left out."""

    by_status: Mapping[str, int]
    complete: bool

    @property
    def total(self) -> int:
        """How many orders were counted."""
        return sum(self.by_status.values())


@dataclass(frozen=True, slots=True)
class Page:
    """Orders, newest first; `next` is the cursor of the page after it, None on the last page."""

    orders: list[Order]
    next: str | None


@dataclass(frozen=True, slots=True)
class Product:
    """A product of the catalogue: `unit_price` in minor units, `stock` in pieces still available."""

    sku: str
    name: str
    unit_price: int
    currency: str
    stock: int
    category: str = ""


@dataclass(frozen=True, slots=True)
class Flaw:
    """One thing that is wrong with a request: where (`items[2].quantity`), and in one sentence what."""

    field: str
    problem: str


class Refusal(Exception):
    """What is asked of an order cannot be done; the message says why in one sentence."""


class InvalidOrder(ValueError):
    """The request breaks rules: `flaws` are all that were found, `field` and `problem` the first of them."""

    def __init__(self, field: str, problem: str, *others: Flaw) -> None:
        self.flaws = (Flaw(field, problem), *others)
        super().__init__("; ".join(f"{one.field}: {one.problem}" for one in self.flaws))
        self.field = field
        self.problem = problem


class InvalidCursor(ValueError):
    """The cursor of a page was not made by this service."""


class IdempotencyConflict(Exception):
    """The idempotency key was used before for a different order."""


class OrderIdTaken(Exception):
    """Another order has this id."""

    def __init__(self, message: str, order_id: str) -> None:
        super().__init__(message)
        self.order_id = order_id


class OrderArchived(Exception):
    """The order with this id was placed, and is in the archive alone; nothing is placed under its id."""

    def __init__(self, order_id: str) -> None:
        super().__init__(f"order {order_id} was placed and has left for the archive")
        self.order_id = order_id


class IdempotencyInProgress(Exception):
    """A request with the same idempotency key is still running; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after
