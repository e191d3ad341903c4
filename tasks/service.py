"""The order service as the front end sees it: accept an order, read orders and products, tell its health.

Everything raises `dramatiq.errors.BrokerConnectionError` (or a child of it) when NATS cannot be reached or
did not acknowledge in time; nothing waits longer than its timeout. Times are integer milliseconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from dramatiq.errors import BrokerError

from . import app, parsing
from .accept import Acceptance
from .catalogue import CURRENCY
from .compensation import NotCancellable
from .idempotency import Requests
from .ledger import BACK, WRITTEN_OFF, Chargeback
from .listing import ANY, OrderList
from .model import (
    FINAL_STATUSES,
    MAX_ITEMS,
    MAX_QUANTITY,
    STATUSES,
    AcceptedOrder,
    Counts,
    HistoryEntry,
    IdempotencyConflict,
    IdempotencyInProgress,
    InvalidCursor,
    InvalidOrder,
    Offer,
    Order,
    OrderArchived,
    OrderedItem,
    OrderIdTaken,
    OrderRequest,
    Page,
    Product,
    Refusal,
    RequestedItem,
    Wanted,
)
from .numbers import whole_number
from .offers import NotOffered
from .refunds import NotChargedBack, NotRefundable
from .shipping import NotReturnable, NotShippable

__all__ = [
    "ANY",
    "BACK",
    "FINAL_STATUSES",
    "MAX_ITEMS",
    "MAX_QUANTITY",
    "STATUSES",
    "WRITTEN_OFF",
    "AcceptedOrder",
    "Chargeback",
    "Counts",
    "HistoryEntry",
    "IdempotencyConflict",
    "IdempotencyInProgress",
    "InvalidCursor",
    "InvalidOrder",
    "NotCancellable",
    "NotChargedBack",
    "NotOffered",
    "NotRefundable",
    "NotReturnable",
    "NotShippable",
    "Offer",
    "Order",
    "OrderArchived",
    "OrderIdTaken",
    "OrderRequest",
    "OrderedItem",
    "Page",
    "Product",
    "Refusal",
    "RequestedItem",
    "Wanted",
    "accept_offer",
    "accept_order",
    "cancel_order",
    "charge_back",
    "count_orders",
    "export_orders",
    "get_order",
    "health",
    "is_cursor",
    "list_orders",
    "nats_connected",
    "now",
    "parse_order_json",
    "parse_order_protobuf",
    "product_name",
    "product_names",
    "products",
    "refund_order",
    "return_order",
    "ship_order",
    "wait_for_change",
    "waits_for_payment",
    "was_placed",
    "watch_order",
]


logger = logging.getLogger(__name__)

#: How often a watched order is read although no change of it was announced.
_LOOK_SECONDS = 1.0

#: A change is announced before it is stored, so the read after it is repeated for up to this long.
_STORING_SECONDS = 0.5


@cache
def _acceptance() -> Acceptance:
    settings = app.SETTINGS
    # No part of a request begins after its time, and each takes that long at most.
    requests = Requests(app.requests_bucket(), lease=2 * settings.accept_timeout + 1_000, now=app.now)
    return Acceptance(
        requests,
        app.stock_store().claims,
        app.catalogue(),
        app.orders_store(),
        app.token_store(),
        app.publish,
        app.project_at,
        timeout=settings.accept_timeout,
        now=app.now,
    )


@cache
def _list() -> OrderList:
    return OrderList(app.events_stored(), app.orders_store(), app.index())


def parse_order_json(
    body: bytes, customer_id: str | None = None, idempotency_key: str | None = None
) -> OrderRequest:
    """Read an order with the products that are sold; see `tasks.parsing`.

    Parameters:
      idempotency_key: The key that the request came with: the same request, sent again, is as good as it was before.

    Raises:
      InvalidOrder: With everything that is wrong.
    """
    read = partial(parsing.parse_order_json, body, customer_id)
    return _acceptance().offered(lambda offer: read(offer=offer), idempotency_key, lambda: None)


def parse_order_protobuf(
    body: bytes, customer_id: str | None = None, idempotency_key: str | None = None
) -> OrderRequest:
    """Read an order as a protobuf message; otherwise as `parse_order_json`."""
    read = partial(parsing.parse_order_protobuf, body, customer_id)
    return _acceptance().offered(
        lambda offer: read(offer=offer), idempotency_key, lambda: parsing.order_id_in(body)
    )


def accept_order(request: OrderRequest, idempotency_key: str | None = None) -> AcceptedOrder:
    """Store the order's event and return the order, once JetStream has acknowledged it and it can be read.

    Raises:
      InvalidOrder: A sku that the catalogue does not have.
      IdempotencyConflict, IdempotencyInProgress: What the key was used for before.
      OrderIdTaken: Another order has the id that was chosen.
      OrderArchived: The order was placed before, and has left for the archive.
      BrokerConnectionError: It could not be stored within ACCEPT_TIMEOUT; trying again with the same key is
        safe.
    """
    return _acceptance().accept(request, idempotency_key)


def was_placed(idempotency_key: str) -> bool:
    """Whether a request with this key has placed an order."""
    return _acceptance().was_placed(idempotency_key)


def cancel_order(order_id: str, by: str, name: str, reason: str = "") -> None:
    """Request that an order is cancelled; the order shows the request when this returns.

    Parameters:
      by: `customer` or `operator`.
      name: What that person or program is called.

    Raises:
      NotCancellable: When there is no such order, or it is over.
    """
    app.project_at(app.saga().request_cancel(order_id, by, reason, name))


def accept_offer(order_id: str, by: str) -> None:
    """Accept what there is of an order that stock does not cover; the order shows it when this returns.

    Parameters:
      by: `customer` or `operator`.

    Raises:
      NotOffered: When nothing is offered of the order, or not any more.
    """
    app.project_at(app.saga().accept_offer(order_id, by))


def refund_order(order_id: str, key: str, amount: int | None, reason: str) -> None:
    """Decide that a part of a charge goes back (None: all that is left of it); the order shows it when this returns.

    Parameters:
      key: Names the refund; asked again with the same one, nothing more is refunded.

    Raises:
      NotRefundable: When the order was not charged, or less is left of the charge.
    """
    app.project_at(app.saga().request_refund(order_id, key, amount, reason))


def ship_order(order_id: str, carrier: str, tracking: str) -> None:
    """Record that an order was shipped; the order shows it when this returns.

    Raises:
      NotShippable: When it is not confirmed.
    """
    app.project_at(app.saga().request_shipment(order_id, carrier, tracking))


def return_order(order_id: str, stock: str, reason: str) -> None:
    """Decide that an order comes back; the order shows it when this returns.

    Parameters:
      stock: What becomes of the goods: `BACK` in stock, or `WRITTEN_OFF`.

    Raises:
      NotReturnable: When the order was not shipped, or its return was decided otherwise.
    """
    app.project_at(app.saga().request_return(order_id, stock, reason))


def charge_back(order_id: str, charge_id: str, chargeback: Chargeback) -> None:
    """Record what a customer's bank took back of a charge; the order shows it when this returns.

    Raises:
      NotChargedBack: When no such charge of the order is known (yet), or less is left of it than was taken back.
    """
    app.project_at(app.saga().charge_back(order_id, charge_id, chargeback))


def now() -> int:
    """Return the time in milliseconds."""
    return app.now()


def get_order(order_id: str) -> Order | None:
    """Return the order, None when there is none. One that was accepted is always found."""
    return app.orders_store().get(order_id)


def list_orders(limit: int = 20, before: str | None = None, wanted: Wanted = ANY) -> Page:
    """Return a page of orders, newest first.

    Parameters:
      before: The cursor `next` of the page before.
      wanted: Only these; a page of them may be short, or empty, and have a next one.

    Raises:
      InvalidCursor: When it is not one.
    """
    place = None if before is None else _place(before)
    if before is not None and place is None:
        raise InvalidCursor("the cursor was not made by this service")
    return _list().page(limit, place, wanted)


def export_orders(before: str | None = None, wanted: Wanted = ANY) -> Iterator[Order]:
    """Yield all orders that are wanted, newest first, as they are when their turn comes; a few hundred are in memory.

    Parameters:
      before: A cursor, as for `list_orders`.

    Raises:
      InvalidCursor: As `list_orders`.
    """
    place = None if before is None else _place(before)
    if before is not None and place is None:
        raise InvalidCursor("the cursor was not made by this service")
    return _list().all(place, wanted)


def is_cursor(text: str) -> bool:
    """Whether a text can be the cursor of a page."""
    return _place(text) is not None


def _place(cursor: str) -> int | None:
    return whole_number(cursor, 0, 2**63 - 1)


def count_orders(wanted: Wanted = ANY) -> Counts:
    """Return how many of the newest orders that are wanted have each status; a status that is wanted is ignored."""
    return _list().counts(wanted)


def waits_for_payment(order: Order) -> bool:
    """Whether an order is not paid because the payment gateway does not answer; at most a second out of date."""
    return order.status == "reserved" and app.gateway_outage().since() is not None


def products() -> list[Product]:
    """Return what is sold now, in the order of the catalogue, with what is in stock."""
    levels = app.stock_store().available()
    return [
        Product(one.sku, one.name, one.unit_price, CURRENCY, levels.get(one.sku, 0), one.category)
        for one in app.catalogue().at(app.now()).values()
    ]


def product_names() -> dict[str, str]:
    """Return what each product is called now, in the order of the catalogue, those that are not sold any more too."""
    return {product.sku: product.name for product in app.catalogue().products()}


def product_name(sku: str) -> str | None:
    """Return what a product is called now, whether it is sold or not; None when there is none."""
    product = app.catalogue().product(sku)
    return None if product is None else product.name


def wait_for_change(order_id: str, revision: int, timeout: int = 25_000) -> Order | None:
    """Wait up to `timeout` ms for the order to have another revision; returns it as it is then, or None."""
    deadline = time.monotonic() + timeout / 1000
    with app.orders_bucket().hearing(order_id) as heard:
        while True:
            order = get_order(order_id)
            left = deadline - time.monotonic()
            if order is None or order.revision != revision or left <= 0:
                return order
            if heard.wait(min(left, _LOOK_SECONDS)):
                heard.clear()
                order = _after_write(order_id, revision)
                if order is None or order.revision != revision:
                    return order


def _after_write(order_id: str, revision: int) -> Order | None:
    """Return the order once the write that was heard is stored, or as it is when it never is."""
    deadline = time.monotonic() + _STORING_SECONDS
    pause = 0.002
    while True:
        order = app.orders_store().get(order_id)
        if (order is not None and order.revision != revision) or time.monotonic() > deadline:
            return order or get_order(order_id)
        time.sleep(pause)
        pause *= 2


class OrderWatch:
    """Follows one order on a thread of its own until it is closed."""

    def __init__(self, order_id: str, callback: Callable[[Order], None]) -> None:
        self._order_id = order_id
        self._callback = callback
        self._closed = threading.Event()
        threading.Thread(target=self._follow, name=f"watch-{order_id}", daemon=True).start()

    def close(self) -> None:
        """Stop; one last callback may still be running."""
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
                self._closed.wait(_LOOK_SECONDS)
            elif order.revision != revision and not self._closed.is_set():
                revision = order.revision
                self._callback(order)


def watch_order(order_id: str, callback: Callable[[Order], None]) -> OrderWatch:
    """Call `callback` on a thread of its own with the order, now and after each change, until closed."""
    return OrderWatch(order_id, callback)


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
    """Return what /health shows of the connection to NATS; it asks no server and does not wait."""
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
