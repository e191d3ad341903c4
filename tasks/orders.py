"""The read model: one record per order in a bucket, with everything that happened to it.

A record is what the *set* of events of an order says, so it does not matter in which order and how often
they are
projected: an event counts once (its first place in the stream), and the status follows from which events
there are. The stream is the authority; `python -m tasks.rebuild` makes the records again from it.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.message import Message

from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from orders.v1.events_pb2 import (
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderFailed,
    OrderPaid,
    OrderRejected,
    OrderReserved,
    RejectionCode,
)

from . import money
from .catalogue import CATALOGUE, CURRENCY
from .events import name_of, order_id_of
from .model import MAX_ID_LENGTH, MAX_ITEMS, HistoryEntry, Order, OrderLine
from .ports import Bucket
from .saga import OUTCOMES

BUCKET: Final = "orders"

#: How long a projection competes with others for one record, in milliseconds.
TIMEOUT: Final = 10_000

#: How many records a process remembers, in order not to look at each before it adds to it.
REMEMBERED: Final = 5_000

_MAX_TEXT: Final = 500

Stored = dict[str, Any]


class OrderBusy(Exception):
    """The record was changed by others for the whole time allowed; trying again is safe."""


@dataclass(frozen=True, slots=True)
class Happened:
    """An event with its place in the stream. `at` is when JetStream stored it, in milliseconds."""

    event: Message
    sequence: int
    at: int
    trace_id: str | None = None


def happened(event: Message, sequence: int, at: int, headers: Mapping[str, str]) -> Happened:
    """Return an event with its place in the stream, and the trace that its W3C header names."""
    parts = headers.get("traceparent", "").split("-")
    traced = len(parts) == 4 and len(parts[1]) == 32
    return Happened(event, sequence, at, parts[1] if traced else None)


@dataclass(frozen=True, slots=True)
class _Known:
    """A record and its revision, 0 and None when there is none."""

    stored: Stored | None
    revision: int


class Orders:
    """The records of all orders in their bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._recent: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, order_id: str) -> Order | None:
        """Return an order, None when no event of it was projected yet."""
        entry = self._bucket.get(order_id)
        return None if entry is None else order_of(order_id, json.loads(entry.value), entry.revision)

    def has_event(self, order_id: str, event: str) -> bool:
        """Whether an event of an order was projected."""
        entry = self._bucket.get(order_id)
        return entry is not None and event in json.loads(entry.value)["events"]

    def project(self, happened: Happened) -> None:
        """Add an event to its order's record, if it is not there yet.

        Raises:
          UnusableEvent: When it names no order.
          OrderBusy: When others kept changing the record.
        """
        order_id = order_id_of(happened.event)
        deadline = time.monotonic() + TIMEOUT / 1000
        while True:
            # A guess saves the look in most cases, and a wrong one is only found out by the compare-and-set.
            known = self._guess(order_id, happened)
            stored = merge(known.stored, happened)
            if stored is None:
                known = self._look(order_id)
                stored = merge(known.stored, happened)
                if stored is None:
                    return
            try:
                self._remember(order_id, self._write(order_id, stored, known.revision))
                return
            except (KeyExists, RevisionConflict):
                self._remember(order_id, self._look(order_id))
                if time.monotonic() > deadline:
                    raise OrderBusy(
                        f"the record of order {order_id} kept changing for {TIMEOUT} ms."
                    ) from None
                time.sleep(random.uniform(0, 0.01))

    def _guess(self, order_id: str, happened: Happened) -> _Known:
        """Return the record as this process last saw it; that of a new order is missing as a rule."""
        with self._lock:
            known = self._recent.get(order_id)
        if known is not None:
            return known
        return _Known(None, 0) if isinstance(happened.event, OrderCreated) else self._look(order_id)

    def _look(self, order_id: str) -> _Known:
        entry = self._bucket.get(order_id)
        return _Known(None, 0) if entry is None else _Known(json.loads(entry.value), entry.revision)

    def _write(self, order_id: str, stored: Stored, revision: int) -> _Known:
        value = json.dumps(stored, separators=(",", ":")).encode()
        if revision == 0:
            return _Known(stored, self._bucket.create(order_id, value))
        return _Known(stored, self._bucket.update(order_id, value, revision=revision))

    def _remember(self, order_id: str, known: _Known) -> None:
        with self._lock:
            self._recent[order_id] = known
            self._recent.move_to_end(order_id)
            if len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)


def merge(stored: Stored | None, happened: Happened) -> Stored | None:
    """Return the record with the event in it, or None when that changes nothing."""
    event = happened.event
    name = name_of(event)
    key = f"{name}.{event.step}" if isinstance(event, OrderFailed) else name
    known = None if stored is None else stored["events"].get(key)
    if known is not None and known["sequence"] <= happened.sequence:
        return None
    merged: Stored = dict(stored or {})
    fact = {"sequence": happened.sequence, "at": happened.at, **_detail(event)}
    merged["events"] = {**merged.get("events", {}), key: fact}
    if isinstance(event, OrderCreated):
        if happened.trace_id is not None:
            merged["trace_id"] = happened.trace_id
        if "reserved" not in merged["events"]:
            merged.update(_ordered(event))
    elif isinstance(event, OrderReserved):
        # What was reserved holds, should a second event with the same id have asked for something else.
        merged.update(
            customer_id=event.customer_id,
            items=[[item.sku, item.quantity, item.unit_price_minor] for item in event.items],
            total=event.total_minor,
            currency=event.currency,
        )
    return merged


def _ordered(event: OrderCreated) -> Stored:
    items = [
        [
            item.sku[:MAX_ID_LENGTH],
            item.quantity,
            CATALOGUE[item.sku].unit_price if item.sku in CATALOGUE else None,
        ]
        for item in event.items[:MAX_ITEMS]
    ]
    total = event.total_minor or money.from_float(event.total_amount, CURRENCY) or 0
    return {
        "customer_id": event.customer_id[:MAX_ID_LENGTH],
        "items": items,
        "total": total if abs(total) < 2**53 else 0,
        "currency": CURRENCY,
    }


def _detail(event: Message) -> dict[str, str]:
    match event:
        case OrderRejected():
            code = RejectionCode.Name(event.code) if event.code in RejectionCode.values() else str(event.code)
            return {"code": code.removeprefix("REJECTION_CODE_").lower(), "reason": event.reason[:_MAX_TEXT]}
        case OrderPaid() | OrderConfirmed():
            return {"charge_id": event.charge_id[:_MAX_TEXT]}
        case OrderDeclined():
            return {"code": event.code[:_MAX_TEXT], "reason": event.reason[:_MAX_TEXT]}
        case OrderFailed():
            return {"step": event.step[:_MAX_TEXT], "reason": event.error[:_MAX_TEXT]}
    return {}


def order_of_events(order_id: str, happenings: Iterable[Happened]) -> Order:
    """Return the order that events amount to, without a record of it."""
    stored: Stored | None = None
    for one in happenings:
        stored = merge(stored, one) or stored
    return order_of(order_id, stored or {"events": {}}, 0)


def status_of(events: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the status that a set of events amounts to."""
    for final in ("confirmed", "rejected"):
        if final in events:
            return final
    if _open_failures(events):
        return "failed"
    for event, status in (("paid", "paid"), ("reserved", "reserved")):
        if event in events:
            return status
    return "accepted"


def _open_failures(events: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the failures of steps that have not done their work since, in a replay."""
    return [
        fact
        for key, fact in events.items()
        if key.startswith("failed.") and OUTCOMES.get(fact["step"], frozenset()).isdisjoint(events)
    ]


def order_of(order_id: str, stored: Stored, revision: int) -> Order:
    """Return the order that a record describes."""
    events: dict[str, dict[str, Any]] = stored["events"]
    status = status_of(events)
    reason = None
    if status == "rejected":
        reason = events["rejected"]["reason"]
    elif status == "failed":
        reason = "; ".join(str(fact["reason"]) for fact in _open_failures(events))
    return Order(
        order_id=order_id,
        status=status,
        customer_id=stored.get("customer_id", ""),
        items=[OrderLine(*item) for item in stored.get("items", [])],
        total=stored.get("total", 0),
        currency=stored.get("currency", CURRENCY),
        history=[
            HistoryEntry(
                key.partition(".")[0],
                datetime.fromtimestamp(fact["at"] / 1000, UTC),
                {k: v for k, v in fact.items() if k not in ("sequence", "at")},
                fact["sequence"],
            )
            for key, fact in sorted(events.items(), key=lambda item: item[1]["sequence"])
        ],
        reason=reason,
        revision=revision,
        trace_id=stored.get("trace_id"),
    )
