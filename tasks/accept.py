"""Accepts an order: prices it, gives it an id, and has JetStream store its event before anybody is told."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Protocol

from google.protobuf.message import Message

from orders.v1.events_pb2 import OrderCreated, OrderItem

from . import money
from .catalogue import CATALOGUE, CURRENCY
from .events import timestamp
from .idempotency import Requests
from .model import (
    AcceptedOrder,
    HistoryEntry,
    IdempotencyConflict,
    InvalidOrder,
    Order,
    OrderLine,
    OrderRequest,
)


class TimedPublisher(Protocol):
    """Stores an event within `timeout` milliseconds, or raises."""

    def __call__(self, event: Message, at: int, *, timeout: int) -> None: ...


class Acceptance:
    """Accepts orders.

    Parameters:
      requests: Remembers idempotency keys.
      publish: Stores an event.
      find: Returns an order that exists.
      timeout: Milliseconds within which an order is stored or refused.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        requests: Requests,
        publish: TimedPublisher,
        find: Callable[[str], Order | None],
        *,
        timeout: int,
        now: Callable[[], int],
    ) -> None:
        self._requests = requests
        self._publish = publish
        self._find = find
        self._timeout = timeout
        self._now = now

    def accept(self, request: OrderRequest, idempotency_key: str | None) -> AcceptedOrder:
        """Store the order's event and return the order; see `tasks.service.accept_order`."""
        deadline = time.monotonic() + self._timeout / 1000
        lines = _price(request)
        if request.order_id is not None:
            existing = self._find(request.order_id)
            if existing is not None:
                return self._repeat(request, existing)
        # An order id that the client chose is as good as a key: the same id is the same order.
        key = f"key:{idempotency_key}" if idempotency_key else None
        if key is None and request.order_id is not None:
            key = f"order:{request.order_id}"
        if key is None:
            created_at = self._now()
            order_id = new_order_id(created_at)
            self._store(order_id, created_at, request, lines, deadline)
            return AcceptedOrder(_order(order_id, created_at, request, lines))
        digest = _digest(request)
        claim = self._requests.claim(key, digest, request.order_id or new_order_id(self._now()))
        try:
            if not claim.repeated:
                self._store(claim.order_id, claim.created_at, request, lines, deadline)
                self._requests.stored(claim, digest)
        finally:
            self._requests.finished(claim)
        return AcceptedOrder(_order(claim.order_id, claim.created_at, request, lines), claim.repeated)

    def _store(
        self, order_id: str, at: int, request: OrderRequest, lines: list[OrderLine], deadline: float
    ) -> None:
        left = max(200, int((deadline - time.monotonic()) * 1000))
        self._publish(_event(order_id, at, request, lines), at, timeout=left)

    def _repeat(self, request: OrderRequest, existing: Order) -> AcceptedOrder:
        if existing.customer_id != request.customer_id or _quantities(existing) != _quantities(request):
            raise IdempotencyConflict(f"order {request.order_id} exists already, and is another one")
        return AcceptedOrder(existing, repeated=True)


def new_order_id(at: int) -> str:
    """Return a new id (UUID version 7): unique, and it begins with the time, so that the order can be found by it."""
    random = secrets.token_bytes(10)
    value = bytearray((at & (2**48 - 1)).to_bytes(6, "big") + random)
    value[6] = 0x70 | value[6] & 0x0F  # the version
    value[8] = 0x80 | value[8] & 0x3F  # the variant
    text = value.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def time_of(order_id: str) -> int | None:
    """Return the time in milliseconds at which `new_order_id` made an id, None for an id of other origin."""
    try:
        value = uuid.UUID(order_id)
    except ValueError:
        return None
    return value.int >> 80 if value.version == 7 and str(value) == order_id else None


def _price(request: OrderRequest) -> list[OrderLine]:
    lines = []
    for position, item in enumerate(request.items):
        product = CATALOGUE.get(item.sku)
        if product is None:
            raise InvalidOrder(f"items[{position}].sku", f"names no product: there is no {item.sku!r}.")
        lines.append(OrderLine(item.sku, item.quantity, product.unit_price))
    return lines


def _total(lines: list[OrderLine]) -> int:
    return sum(line.quantity * (line.unit_price or 0) for line in lines)


def _event(order_id: str, at: int, request: OrderRequest, lines: list[OrderLine]) -> OrderCreated:
    total = _total(lines)
    return OrderCreated(
        order_id=order_id,
        customer_id=request.customer_id,
        items=[
            OrderItem(sku=line.sku, quantity=line.quantity, unit_price_minor=line.unit_price)
            for line in lines
        ],
        total_amount=money.to_float(total, CURRENCY),
        total_minor=total,
        currency=CURRENCY,
        created_at=timestamp(at),
        payment_token=request.payment_token,
    )


def _order(order_id: str, at: int, request: OrderRequest, lines: list[OrderLine]) -> Order:
    return Order(
        order_id=order_id,
        status="accepted",
        customer_id=request.customer_id,
        items=lines,
        total=_total(lines),
        currency=CURRENCY,
        history=[HistoryEntry("created", datetime.fromtimestamp(at / 1000, UTC))],
    )


def _digest(request: OrderRequest) -> str:
    return hashlib.sha256(json.dumps(asdict(request), sort_keys=True).encode()).hexdigest()


def _quantities(order: Order | OrderRequest) -> dict[str, int]:
    quantities: dict[str, int] = {}
    for item in order.items:
        quantities[item.sku] = quantities.get(item.sku, 0) + item.quantity
    return quantities
