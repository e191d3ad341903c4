"""The order service as the front end sees it: accept an order, read orders and products, tell its health.

Everything raises `dramatiq.errors.BrokerConnectionError` (or a child of it) when NATS cannot be reached or
did not acknowledge in time; nothing waits longer than its timeout. Times are integer milliseconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from dramatiq.errors import BrokerError
from google.protobuf.message import Message

from dramatiq_jetstream.jetstream.names import bucket_subject
from orders.v1.events_pb2 import OrderCreated

from . import app
from .accept import Acceptance, time_of
from .catalogue import CATALOGUE, CURRENCY
from .idempotency import Requests
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
from .orders import order_of_events
from .parsing import parse_order_json, parse_order_protobuf
from .stream import EventStream

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


logger = logging.getLogger(__name__)

#: How many orders are looked through for a page of one customer's.
_LOOKED_THROUGH = 4_000

#: How often a watched order is looked at although nothing was heard of it, in seconds.
_LOOK = 1.0

#: An order's change is heard of before it is stored, so the look after it is repeated for so long, in seconds.
_STORING = 0.5


@cache
def event_stream() -> EventStream:
    """Return the reader of the events."""
    return EventStream(app.broker.connection, lambda: app.event_stream.ensure(app.broker))


@cache
def _acceptance() -> Acceptance:
    settings = app.SETTINGS
    # A request that is still running may have used all its time twice: for its key, and for its event.
    requests = Requests(app.requests_bucket(), lease=2 * settings.accept_timeout + 1_000, now=app.now)

    def publish(event: Message, at: int, *, timeout: int) -> None:
        app.publish(event, at, timeout=timeout)

    return Acceptance(requests, publish, app.orders_store().get, timeout=settings.accept_timeout, now=app.now)


def accept_order(request: OrderRequest, idempotency_key: str | None = None) -> AcceptedOrder:
    """Store the order's event and return the order, once JetStream has acknowledged it.

    Raises:
      InvalidOrder: A sku that the catalogue does not have.
      IdempotencyConflict, IdempotencyInProgress: What the key, or the order id, was used for before.
      BrokerConnectionError: It could not be stored within ACCEPT_TIMEOUT; trying again with the same key is
        safe.
    """
    return _acceptance().accept(request, idempotency_key)


def get_order(order_id: str) -> Order | None:
    """Return the order, also before its first step was done; None when there is none."""
    order = app.orders_store().get(order_id)
    if order is not None:
        return order
    # Accepted, and no worker has come to it yet: its event is in the stream, near the time in its id.
    accepted_at = time_of(order_id)
    if accepted_at is None:
        return None
    created = event_stream().find_created(order_id, accepted_at)
    return None if created is None else order_of_events(order_id, [created])


def list_orders(limit: int = 20, before: str | None = None, *, customer_id: str | None = None) -> Page:
    """Return a page of orders, newest first.

    Parameters:
      before: The cursor `next` of the page before.
      customer_id: Only this customer's orders; a page of them may be short, or empty, and have a next one.

    Raises:
      InvalidCursor: When it is not one.
    """
    if before is not None and not (before.isascii() and before.isdigit() and len(before) <= 18):
        raise InvalidCursor("the cursor was not made by this service")
    orders: list[Order] = []
    last = 0
    for sequence, order in _listed(None if before is None else int(before), limit, customer_id):
        if len(orders) == limit:
            return Page(orders, str(last))
        if order is None:
            return Page(orders, str(sequence))
        orders.append(order)
        last = sequence
    return Page(orders, None)


def _listed(before: int | None, limit: int, customer_id: str | None) -> Iterator[tuple[int, Order | None]]:
    """Yield orders with their places in the stream; None instead of one when enough was looked through."""
    expected = limit if customer_id is None else _LOOKED_THROUGH // 8
    for looked, created in enumerate(event_stream().newest_created(before, expected=expected)):
        if looked == _LOOKED_THROUGH:
            yield created.sequence + 1, None
        event: OrderCreated = created.event  # type: ignore[assignment]
        if customer_id is not None and event.customer_id != customer_id:
            continue
        order = app.orders_store().get(event.order_id) or order_of_events(event.order_id, [created])
        # A second event with the same id is no second order.
        first = next((entry for entry in order.history if entry.event == "created"), None)
        if first is not None and first.sequence != created.sequence:
            continue
        if customer_id is None or order.customer_id == customer_id:
            yield created.sequence, order


def products() -> list[Product]:
    """Return the catalogue with what is in stock now."""
    levels = app.stock_store().available()
    return [
        Product(entry.sku, entry.name, entry.unit_price, CURRENCY, levels[entry.sku])
        for entry in CATALOGUE.values()
    ]


def wait_for_change(order_id: str, revision: int, timeout: int = 25_000) -> Order | None:
    """Wait up to `timeout` ms for the order to have another revision; returns it as it is then, or None."""
    deadline = time.monotonic() + timeout / 1000
    heard = threading.Event()
    # A write is a message on the key's subject: hearing it costs the server no consumer.
    subject = bucket_subject(app.orders_bucket().name, order_id)
    subscription = app.broker.connection.subscribe(subject, lambda _: heard.set())
    try:
        while True:
            order = get_order(order_id)
            left = deadline - time.monotonic()
            if order is None or order.revision != revision or left <= 0:
                return order
            if heard.wait(min(left, _LOOK)):
                heard.clear()
                order = _after_write(order_id, revision)
                if order is None or order.revision != revision:
                    return order
    finally:
        subscription.close()


def _after_write(order_id: str, revision: int) -> Order | None:
    """Return the order once the write that was heard is stored, or as it is when it never is."""
    deadline = time.monotonic() + _STORING
    pause = 0.002
    while True:
        order = app.orders_store().get(order_id)
        if (order is not None and order.revision != revision) or time.monotonic() > deadline:
            return order or get_order(order_id)
        time.sleep(pause)
        pause *= 2


class Watch:
    """Follows one order on a thread of its own until it is closed."""

    def __init__(self, order_id: str, callback: Callable[[Order], None]) -> None:
        self._order_id = order_id
        self._callback = callback
        self._closed = threading.Event()
        threading.Thread(target=self._follow, name=f"watch-{order_id}", daemon=True).start()

    def close(self) -> None:
        """Stop; the callback may be under way once more."""
        self._closed.set()

    def _follow(self) -> None:
        revision = -1
        while not self._closed.is_set():
            try:
                order = wait_for_change(self._order_id, revision, 2_000)
            except BrokerError as error:
                logger.warning("Order %s cannot be watched now: %s", self._order_id, error)
                self._closed.wait(1.0)
                continue
            if order is None:
                self._closed.wait(_LOOK)
            elif order.revision != revision and not self._closed.is_set():
                revision = order.revision
                self._callback(order)


def watch_order(order_id: str, callback: Callable[[Order], None]) -> Watch:
    """Call `callback` on a thread of its own with the order, now and after each change, until closed."""
    return Watch(order_id, callback)


_connecting = threading.Lock()
_attempt: threading.Thread | None = None


def nats_connected() -> bool:
    """Whether this process is connected to NATS now.

    The first call makes the connection, for a second at most; calls that come meanwhile wait for it as well, or a
    burst of requests would be refused by a process that has just begun.
    """
    global _attempt
    connection = app.broker.connection
    if connection.is_connected:
        return True
    if connection.state.server is None:
        first = connection.state.last_error is None
        with _connecting:
            mine = _attempt is None or not _attempt.is_alive()
            if mine:
                _attempt = threading.Thread(target=_connect, name="connect", daemon=True)
                _attempt.start()
            attempt = _attempt
        if attempt is not None and (first or mine):
            attempt.join(1.0)
    return connection.is_connected


def _connect() -> None:
    try:
        app.broker.connection.connect()
    except BrokerError as error:
        logger.warning("%s", error)


def health() -> dict[str, Any]:
    """Return what /health shows of the connection to NATS; it asks nobody and does not wait."""
    connection = app.broker.connection
    state = connection.state
    return {
        "nats": {
            "connected": connection.is_connected,
            "server": state.server,
            "version": state.server_version,
            "reconnects": state.reconnects,
            "last_error": state.last_error,
        }
    }
