"""Writes orders, pages of them and products as the API answers them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from tasks.catalogue import CURRENCY
from tasks.events import isoformat
from tasks.money import to_float
from tasks.product_files import RowDone, RowError
from tasks.products import StoredProduct
from tasks.service import HistoryEntry, Offer, Order, Page, Product, waits_for_payment
from web import words


def timestamp(moment: datetime) -> str:
    """Return a time as the API shows it: RFC 3339, in UTC, to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def order_json(order: Order, *, causes: bool = True) -> dict[str, Any]:
    """Return the order as the API answers it.

    Parameters:
      causes: Whether it says of what a step failed technically, or only what that means for the customer.
    """
    body: dict[str, Any] = {
        "order_id": order.order_id,
        "status": order.status,
        "customer_id": order.customer_id,
        "items": [
            {
                "sku": line.sku,
                **({"name": line.name} if line.name else {}),
                "quantity": line.quantity,
                "unit_price": None if line.unit_price is None else to_float(line.unit_price, order.currency),
            }
            for line in order.items
        ],
        "total_amount": to_float(order.total, order.currency),
        "total_minor": order.total,
        "currency": order.currency,
        "history": [_history_json(entry, causes) for entry in order.history],
    }
    if order.offer is not None:
        body["offer"] = _offer_json(order.offer, order.currency)
    if order.reason is not None:
        body["reason"] = order.reason if causes or order.status != "failed" else words.reason(order)
    if waits_for_payment(order):
        body["waiting_for"] = "payment provider"
    return body


def _offer_json(offer: Offer, currency: str) -> dict[str, Any]:
    return {
        "items": [
            {
                "sku": item.sku,
                **({"name": item.name} if item.name else {}),
                "ordered": item.ordered,
                "quantity": item.quantity,
                "unit_price": to_float(item.unit_price, currency),
            }
            for item in offer.items
        ],
        "total_amount": to_float(offer.total, currency),
        "total_minor": offer.total,
        "expires_at": timestamp(offer.expires_at),
    }


def _history_json(entry: HistoryEntry, causes: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"event": entry.event, "at": timestamp(entry.at)}
    if entry.detail:
        body["detail"] = dict(entry.detail)
        if entry.event == "failed" and not causes:
            body["detail"]["reason"] = words.failure(entry)
    return body


def page_json(page: Page, *, causes: bool = True) -> dict[str, Any]:
    """Return one page of the list of orders as the API answers it."""
    return {"orders": [order_json(order, causes=causes) for order in page.orders], "next": page.next}


def product_json(product: Product) -> dict[str, Any]:
    """Return one product of the catalogue as the API answers it."""
    return {
        "sku": product.sku,
        "name": product.name,
        "category": product.category,
        "unit_price": to_float(product.unit_price, product.currency),
        "unit_price_minor": product.unit_price,
        "currency": product.currency,
        "stock": product.stock,
    }


def stored_product_json(product: StoredProduct, stock: int, now: int) -> dict[str, Any]:
    """Return a product as the API answers it to operators: with all its prices, sold or not."""
    price = product.price_at(now)
    return {
        "sku": product.sku,
        "name": product.name,
        "category": product.category,
        "unit_price": None if price is None else to_float(price, CURRENCY),
        "unit_price_minor": price,
        "currency": CURRENCY,
        "stock": stock,
        "prices": [{"from": isoformat(one.since), "unit_price_minor": one.amount} for one in product.prices],
    }


def import_json(rows: Iterable[RowDone], errors: Iterable[RowError], *, dry_run: bool) -> dict[str, Any]:
    """Return what an import did, or would do, as the API answers it."""
    return {
        "dry_run": dry_run,
        "rows": [
            {"line": row.line, "sku": row.sku, "change": row.what, "repeated": row.repeated} for row in rows
        ],
        "errors": [
            {"field": f"line {error.line}.{error.column}", "problem": error.problem} for error in errors
        ],
    }
