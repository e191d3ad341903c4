"""The read model: one record per order in a bucket, with everything that happened to it.

A record is what the *set* of events of an order says, so it does not matter in which order and how often they
are projected: an event counts once (its first place in the stream), and the status follows from which events
there are. Only events that the ledger confirms come here (`tasks.projection`); `python -m tasks.rebuild` makes the
records again from stream and ledger.

What a record holds is bounded before it is stored, whatever the event held. A record that cannot be read, because
something else wrote it, is reported and counts as missing, so that it breaks no list.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.message import Message

from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from orders.v1.events_pb2 import (
    OrderCancelled,
    OrderCancelRequested,
    OrderChargedBack,
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderFailed,
    OrderItem,
    OrderOfferAccepted,
    OrderOffered,
    OrderPaid,
    OrderRefunded,
    OrderRefundRequested,
    OrderRejected,
    OrderReserved,
    OrderReturned,
    OrderReturnRequested,
    OrderShipped,
    RejectionCode,
    ReturnedStock,
)

from . import money
from .catalogue import CURRENCY
from .events import Happened, isoformat, key_of, name_of, order_id_of
from .model import (
    FINAL_STATUSES,
    MAX_ID_LENGTH,
    MAX_ITEMS,
    MAX_QUANTITY,
    MAX_TEXT,
    HistoryEntry,
    Offer,
    OfferedItem,
    Order,
    OrderedItem,
)
from .ports import Bucket, Entry
from .saga import OUTCOMES
from .text import normalised, shown

BUCKET: Final = "orders"

#: How long a change of one record is retried while other processes change it, in milliseconds.
TIMEOUT_MS: Final = 10_000

#: How many records a process remembers, in order not to look at each before it adds to it.
REMEMBERED: Final = 5_000

#: The largest amount, in minor units; beyond it a floating point number is not exact.
_MAX_AMOUNT: Final = 2**53

#: The events that say how far an order is that is under way, the furthest first, and the status that each stands for.
_UNDER_WAY: Final = (
    ("paid", "paid"),
    ("reserved", "reserved"),
    ("offer_accepted", "reserved"),
    ("offered", "offered"),
)

#: An order that was offered and has one of these events is one whose offer was accepted.
_ACCEPTED: Final = frozenset({"offer_accepted", "reserved", "paid", "declined", "confirmed", "shipped"})

logger = logging.getLogger(__name__)

Stored = dict[str, Any]


class OrderBusy(Exception):
    """The record was changed by others for the whole time allowed; trying again is safe."""


#: Which event was added right before another, as a rule; `paid` is added with `confirmed`.
_BEFORE: Final = {"reserved": "created", "paid": "reserved", "declined": "reserved", "confirmed": "reserved"}


@dataclass(frozen=True, slots=True)
class Recorded:
    """The record of an order and its revision, None and 0 when there is none.

    `is_read` when it was just read, and not remembered or guessed.
    """

    order_id: str
    stored: Stored | None
    revision: int
    is_read: bool = False

    @property
    def order(self) -> Order | None:
        """The order, None when there is none in the record."""
        return None if self.stored is None else order_of(self.order_id, self.stored, self.revision)

    def has(self, happened: Happened) -> bool:
        """Whether an event would change nothing."""
        known = None if self.stored is None else self.stored["events"].get(key_of(happened.event))
        return known is not None and bool(known["sequence"] <= happened.sequence)


class Orders:
    """The records of all orders in their bucket.

    Parameters:
      finished: Is told once of each order that a projection of this process made final: its status, and the seconds
        since it was accepted.
    """

    def __init__(self, bucket: Bucket, finished: Callable[[str, float], None] | None = None) -> None:
        self._bucket = bucket
        self._finished = finished
        self._recent: OrderedDict[str, Recorded] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, order_id: str) -> Order | None:
        """Return an order, None when no event of it was projected yet."""
        entry = self._bucket.get(order_id)
        return None if entry is None else self.read(entry)

    def read(self, entry: Entry) -> Order | None:
        """Return the order in an entry of the bucket, None when it cannot be read."""
        read = _read(entry)
        return None if read is None else read[1]

    def several(self, order_ids: Sequence[str]) -> dict[str, Order]:
        """Return those orders that can be read, each as it was a moment ago at the latest; at most 1,000."""
        found: dict[str, Order] = {}
        left = list(dict.fromkeys(order_ids))
        while left:
            # With one that is there, all others can be asked for in one request.
            first = self._bucket.get(left.pop(0))
            if first is None:
                continue
            others = self._bucket.get_many(left, since=(first.key, first.revision)) if left else {}
            for entry in (first, *others.values()):
                order = self.read(entry)
                if order is not None:
                    found[entry.key] = order
            break
        return found

    def has_event(self, order_id: str, event: str) -> bool:
        """Whether an event of an order was projected."""
        entry = self._bucket.get(order_id)
        stored = None if entry is None else stored_in(entry)
        return stored is not None and event in stored["events"]

    def recorded(self, happened: Happened) -> Recorded:
        """Return the record of an event's order: as this process remembers it, if that has the event, or seems to lack
        only this one.
        """
        order_id = order_id_of(happened.event)
        with self._lock:
            known = self._recent.get(order_id)
        events = {} if known is None or known.stored is None else known.stored["events"]
        # Where the event before this one is missing, another process may have added both by now.
        if known is not None and (known.has(happened) or _BEFORE.get(name_of(happened.event)) in events):
            return known
        return self._look(order_id)

    def project(
        self, happened: Happened, known: Recorded | None = None, also: Sequence[Happened] = ()
    ) -> Recorded:
        """Add an event to its order's record, if it is not there yet; returns the record as it is then.

        Parameters:
          known: The record, as `recorded` returned it. One that is outdated is found out by the compare-and-set.
          also: Further events of the order, which are added by the same write.

        Raises:
          UnusableEvent: When it names no order.
          OrderBusy: When others kept changing the record.
        """
        order_id = order_id_of(happened.event)
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        known = known or self.recorded(happened)
        while not known.has(happened):
            written = self.add(happened, known, also)
            if written is not None:
                return written
            if time.monotonic() > deadline:
                raise OrderBusy(f"the record of order {order_id} kept changing for {TIMEOUT_MS} ms.")
            if known.is_read:
                time.sleep(random.uniform(0, 0.01))
            known = self._look(order_id)
        return known

    def add(self, happened: Happened, known: Recorded, also: Sequence[Happened] = ()) -> Recorded | None:
        """Add an event to a record that lacks it; returns the record, None when it is not as it is `known` any more."""
        stored = with_event(known.stored, happened)
        for other in also:
            stored = merge(stored, other) or stored
        try:
            written = self._write(known, stored)
        except (KeyExists, RevisionConflict):
            return None
        self._tell_if_finished(known.stored, stored)
        return written

    def _tell_if_finished(self, before: Stored | None, after: Stored) -> None:
        """Tell of an order with the write that added the last fact about its end or its beginning."""
        if self._finished is None or (before is not None and _end_of(before) is not None):
            return
        end = _end_of(after)
        if end is not None:
            self._finished(*end)

    def _look(self, order_id: str) -> Recorded:
        entry = self._bucket.get(order_id)
        if entry is None:
            return Recorded(order_id, None, 0, is_read=True)
        found = Recorded(order_id, stored_in(entry), entry.revision, is_read=True)
        self._remember(found)
        return found

    def _write(self, known: Recorded, stored: Stored) -> Recorded:
        value = json.dumps(stored, separators=(",", ":")).encode()
        if known.revision == 0:
            revision = self._bucket.create(known.order_id, value)
        else:
            revision = self._bucket.update(known.order_id, value, revision=known.revision)
        return self._remember(Recorded(known.order_id, stored, revision))

    def _remember(self, known: Recorded) -> Recorded:
        with self._lock:
            self._recent[known.order_id] = replace(known, is_read=False)
            self._recent.move_to_end(known.order_id)
            if len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        return known


def merge(stored: Stored | None, happened: Happened) -> Stored | None:
    """Return the record with a confirmed event in it, or None when that changes nothing."""
    known = Recorded(order_id_of(happened.event), stored, 0)
    return None if known.has(happened) else with_event(stored, happened)


def with_event(stored: Stored | None, happened: Happened) -> Stored:
    """Return the record with an event in it, in place of what it had of that event."""
    event = happened.event
    merged: Stored = dict(stored or {})
    fact = {"sequence": happened.sequence, "at": happened.at, **_detail(event)}
    merged["events"] = {**merged.get("events", {}), key_of(event): fact}
    if isinstance(event, OrderCreated):
        merged.pop("trace_id", None)
        if happened.trace_id is not None:
            merged["trace_id"] = happened.trace_id
        merged.pop("names", None)
        if names := _names(event):
            merged["names"] = names
        if "reserved" not in merged["events"]:
            merged.update(_ordered(event))
    elif isinstance(event, OrderReserved):
        merged.update(_ordered(event))
    elif isinstance(event, OrderOffered):
        merged["offer"] = _offered(event)
    return merged


def _ordered(event: OrderCreated | OrderReserved) -> Stored:
    """Return what was ordered, of an order that broke the rules as far as it can be shown."""
    items = [
        [shown(item.sku, MAX_ID_LENGTH), item.quantity, _unit_price(item)]
        for item in event.items[:MAX_ITEMS]
        if item.sku and 1 <= item.quantity <= MAX_QUANTITY * MAX_ITEMS
    ]
    total = event.total_minor
    if not total and isinstance(event, OrderCreated):
        total = money.from_float(event.total_amount, CURRENCY) or 0
    return {
        "customer_id": shown(normalised(event.customer_id, MAX_ID_LENGTH), MAX_ID_LENGTH),
        "items": items,
        "total": total if 0 <= total < _MAX_AMOUNT else 0,
        "currency": CURRENCY,
    }


def _offered(event: OrderOffered) -> Stored:
    """Return what there is of what was ordered."""
    items = [
        [shown(item.sku, MAX_ID_LENGTH), item.ordered, item.quantity, item.unit_price_minor]
        for item in event.items[:MAX_ITEMS]
    ]
    return {"items": items, "total": event.total_minor, "expires_at": event.expires_at.ToMilliseconds()}


def _unit_price(item: OrderItem) -> int | None:
    # The ledger says the prices of every order that keeps the rules.
    return item.unit_price_minor if 0 < item.unit_price_minor < _MAX_AMOUNT else None


def _names(event: OrderCreated) -> dict[str, str]:
    """Return what the products were called, by sku, as the ledger has it."""
    return {item.sku: shown(item.name, MAX_TEXT) for item in event.items[:MAX_ITEMS] if item.name}


def _detail(event: Message) -> dict[str, str]:
    match event:
        case OrderRejected():
            code = RejectionCode.Name(event.code) if event.code in RejectionCode.values() else str(event.code)
            return {
                "code": code.removeprefix("REJECTION_CODE_").lower(),
                "reason": shown(event.reason, MAX_TEXT),
            }
        case OrderOffered():
            expires_at = isoformat(event.expires_at.ToMilliseconds())
            return {**_money(event.total_minor, event.currency), "expires_at": expires_at}
        case OrderOfferAccepted():
            return {
                "by": shown(event.by, MAX_ID_LENGTH),
                **_money(event.total_minor, event.currency),
            }
        case OrderPaid() | OrderConfirmed():
            return {"charge_id": shown(event.charge_id, MAX_TEXT)}
        case OrderDeclined():
            return {"code": shown(event.code, MAX_TEXT), "reason": shown(event.reason, MAX_TEXT)}
        case OrderCancelRequested():
            return {"by": shown(event.by, MAX_ID_LENGTH), "reason": shown(event.reason, MAX_TEXT)}
        case OrderRefundRequested():
            return {**_refund(event), "reason": shown(event.reason, MAX_TEXT)}
        case OrderRefunded():
            return {**_refund(event), "refund_id": shown(event.refund_id, MAX_TEXT)}
        case OrderChargedBack():
            return {
                "chargeback_id": shown(event.chargeback_id, MAX_ID_LENGTH),
                **_money(event.amount_minor, event.currency),
                "reason": shown(event.reason, MAX_TEXT),
            }
        case OrderCancelled():
            return {"reason": shown(event.reason, MAX_TEXT)}
        case OrderShipped():
            return {
                "carrier": shown(event.carrier, MAX_ID_LENGTH),
                "tracking": shown(event.tracking, MAX_ID_LENGTH),
            }
        case OrderReturnRequested() | OrderReturned():
            stock = ReturnedStock.Name(event.stock) if event.stock in ReturnedStock.values() else ""
            return {
                "stock": stock.removeprefix("RETURNED_STOCK_").lower(),
                "reason": shown(event.reason, MAX_TEXT),
            }
        case OrderFailed():
            return {"step": shown(event.step, MAX_ID_LENGTH), "reason": shown(event.error, MAX_TEXT)}
    return {}


def _refund(event: OrderRefundRequested | OrderRefunded) -> dict[str, str]:
    return {
        "refund": shown(event.refund, MAX_ID_LENGTH),
        **_money(event.amount_minor, event.currency),
    }


def _money(minor: int, currency: str) -> dict[str, str]:
    # Details are text.
    return {"amount_minor": str(minor), "currency": shown(currency, MAX_ID_LENGTH)}


def stored_in(entry: Entry) -> Stored | None:
    """Return the record in an entry of the bucket, None when it cannot be read."""
    read = _read(entry)
    return None if read is None else read[0]


def _read(entry: Entry) -> tuple[Stored, Order] | None:
    try:
        stored: Stored = json.loads(entry.value)
        return stored, order_of(entry.key, stored, entry.revision)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        OSError,
        RecursionError,
    ) as error:
        logger.warning(
            "The record of order %s cannot be read (%s: %s): run `python -m tasks.rebuild`.",
            entry.key,
            type(error).__name__,
            shown(str(error), MAX_TEXT),
        )
        return None


def status_of(events: Mapping[str, Mapping[str, Any]], total: int) -> str:
    """Return the status that a set of events amounts to.

    Parameters:
      total: What the order costs, in minor units.
    """
    for final in ("cancelled", "rejected", "returned"):
        if final in events:
            return final
    if any(key.startswith("refunded.") for key in events):
        back = sum(
            int(fact["amount_minor"])
            for key, fact in events.items()
            if key.startswith(("refunded.", "charged_back."))
        )
        if back >= total:
            return "refunded"
    for settled in ("shipped", "confirmed"):
        if settled in events:
            return settled
    if _open_failures(events):
        return "failed"
    return next((status for event, status in _UNDER_WAY if event in events), "accepted")


def _contents(stored: Stored) -> tuple[list[list[Any]], Any]:
    """Return the items of an order and what they cost: what was ordered, or what was accepted of it."""
    offer = stored.get("offer")
    if offer is None or _ACCEPTED.isdisjoint(stored["events"]):
        return stored.get("items", []), stored.get("total", 0)
    there = [[sku, quantity, price] for sku, _, quantity, price in offer["items"] if quantity]
    return there, offer["total"]


def _end_of(stored: Stored) -> tuple[str, float] | None:
    """Return the status of a record that is final, and how many seconds its order took; None before that is known."""
    events = stored["events"]
    status = status_of(events, _contents(stored)[1])
    if status not in FINAL_STATUSES or "created" not in events:
        return None
    ended = max(fact["at"] for key, fact in events.items() if key.partition(".")[0] == status)
    # For as long as its customer took to accept an offer, nothing was done for it.
    began = events.get("offer_accepted", events["created"])
    return status, max(0, ended - began["at"]) / 1000


def _open_failures(events: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the failures of steps that have not done their work since, in a replay."""
    return [
        fact
        for key, fact in events.items()
        if key.startswith("failed.") and OUTCOMES.get(fact["step"], frozenset()).isdisjoint(events)
    ]


def order_of(order_id: str, stored: Stored, revision: int) -> Order:
    """Return the order that a record describes.

    Raises:
      Exception: One of those that Python raises for a value of the wrong kind, when it describes none.
    """
    events: dict[str, dict[str, Any]] = stored["events"]
    items, total = _contents(stored)
    total, currency = _whole(total), stored.get("currency", CURRENCY)
    status = status_of(events, total)
    reason = None
    if status in ("rejected", "cancelled", "returned"):
        reason = events[status]["reason"]
    elif status == "failed":
        reason = "; ".join(str(fact["reason"]) for fact in _open_failures(events))
    money.to_float(total, currency)  # of a currency that exists
    if len(items) > MAX_ITEMS:
        raise ValueError(f"{len(items)} items")
    trace_id = stored.get("trace_id")
    names: dict[str, str] = stored.get("names", {})
    return Order(
        order_id=order_id,
        status=status,
        customer_id=_text(stored.get("customer_id", "")),
        items=[
            OrderedItem(
                _text(sku),
                _whole(quantity),
                None if price is None else _whole(price),
                _text(names.get(sku, "")),
            )
            for sku, quantity, price in items
        ],
        total=total,
        currency=currency,
        history=[
            HistoryEntry(
                key.partition(".")[0],
                datetime.fromtimestamp(fact["at"] / 1000, UTC),
                {name: _text(value) for name, value in fact.items() if name not in ("sequence", "at")},
                _whole(fact["sequence"]),
            )
            for key, fact in sorted(events.items(), key=lambda item: item[1]["sequence"])
        ],
        reason=reason,
        revision=revision,
        trace_id=None if trace_id is None else _text(trace_id),
        offer=_offer(stored["offer"], names) if "offer" in stored else None,
    )


def _offer(stored: Stored, names: Mapping[str, str]) -> Offer:
    if len(stored["items"]) > MAX_ITEMS:
        raise ValueError(f"{len(stored['items'])} items")
    return Offer(
        [
            OfferedItem(
                *(_text(sku), _whole(ordered), _whole(quantity), _whole(price)), _text(names.get(sku, ""))
            )
            for sku, ordered, quantity, price in stored["items"]
        ],
        _whole(stored["total"]),
        datetime.fromtimestamp(_whole(stored["expires_at"]) / 1000, UTC),
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise TypeError("a text that is none, or too long")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or abs(value) >= _MAX_AMOUNT:
        raise TypeError("a number that is none, or too large")
    return value
