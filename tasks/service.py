"""The order service as the front end sees it: accept an order, read orders and products, tell its health.

Everything raises `dramatiq.errors.BrokerConnectionError` (or a child of it) when NATS cannot be reached or
did not acknowledge in time; nothing waits longer than its timeout. Times are integer milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .model import (
    FINAL_STATUSES,
    MAX_ITEMS,
    MAX_QUANTITY,
    AcceptedOrder,
    HistoryEntry,
    IdempotencyConflict,
    IdempotencyInProgress,
    InvalidCursor,
    InvalidOrder,
    Item,
    Order,
    OrderLine,
    OrderRequest,
    Page,
    Product,
)

__all__ = [
    "FINAL_STATUSES",
    "MAX_ITEMS",
    "MAX_QUANTITY",
    "AcceptedOrder",
    "HistoryEntry",
    "IdempotencyConflict",
    "IdempotencyInProgress",
    "InvalidCursor",
    "InvalidOrder",
    "Item",
    "Order",
    "OrderLine",
    "OrderRequest",
    "Page",
    "Product",
    "accept_order",
    "get_order",
    "health",
    "list_orders",
    "nats_connected",
    "parse_order_json",
    "parse_order_protobuf",
    "products",
    "wait_for_change",
    "watch_order",
]


class Watch(Protocol):
    def close(self) -> None: ...


def parse_order_json(body: bytes) -> OrderRequest:
    """Read an order from JSON; raises InvalidOrder(field, problem)."""
    raise NotImplementedError


def parse_order_protobuf(body: bytes) -> OrderRequest:
    """Read an order from an OrderCreated message; raises InvalidOrder(field, problem)."""
    raise NotImplementedError


def accept_order(request: OrderRequest, idempotency_key: str | None = None) -> AcceptedOrder:
    """Store the order's event and return the order, once JetStream has acknowledged it.

    Raises:
      InvalidOrder: A sku that the catalogue does not have.
      IdempotencyConflict, IdempotencyInProgress: What the key, or the order id, was used for before.
      BrokerConnectionError: It could not be stored within ACCEPT_TIMEOUT; trying again, with the same key,
      is safe.
    """
    raise NotImplementedError


def get_order(order_id: str) -> Order | None:
    """Return the order, also before its first step was done; None when there is none."""
    raise NotImplementedError


def list_orders(limit: int = 20, before: str | None = None) -> Page:
    """Return a page of orders, newest first.

    Parameters:
      before: The cursor `next` of the page before.

    Raises:
      InvalidCursor: When it is not one.
    """
    raise NotImplementedError


def products() -> list[Product]:
    """Return the catalogue with what is in stock now."""
    raise NotImplementedError


def wait_for_change(order_id: str, revision: int, timeout: int = 25_000) -> Order | None:
    """Wait up to `timeout` ms for the order to have another revision; returns it as it is then, or None."""
    raise NotImplementedError


def watch_order(order_id: str, callback: Callable[[Order], None]) -> Watch:
    """Call `callback` on a thread of its own with the order, now and after each change, until closed."""
    raise NotImplementedError


def nats_connected() -> bool:
    """Whether this process is connected to NATS now; makes the connection when it has none yet (bounded)."""
    raise NotImplementedError


def health() -> dict[str, Any]:
    """Return what /health shows: {"status": "ok" | "unavailable", "nats": {...}, "stream": {...}}."""
    raise NotImplementedError
