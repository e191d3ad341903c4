"""Turns an order into what the API answers, and into what the pages show."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tasks.catalogue import CATALOGUE
from tasks.money import MINOR_UNITS, to_float
from tasks.service import HistoryEntry, Order, Page, Product, waits_for_payment

_SYMBOLS = {"EUR": "€", "USD": "$", "GBP": "£"}

STATUS_TEXT = {
    "accepted": "Accepted",
    "reserved": "Stock reserved",
    "paid": "Paid",
    "confirmed": "Confirmed",
    "rejected": "Rejected",
    "cancelled": "Cancelled",
    "failed": "Failed",
}
# What the page says about a status in one sentence; a rejected or failed order says its own reason as well.
STATUS_SENTENCE = {
    "accepted": "Your order is stored. Its stock is being reserved.",
    "reserved": "Everything you ordered is set aside. The payment is next.",
    "paid": "The payment went through. The order is about to be confirmed.",
    "confirmed": "The order is paid and complete.",
    "rejected": "The order is over: nothing was charged and nothing is held for it.",
    "cancelled": "The order is over: nothing is held for it, and what was charged is refunded.",
    "failed": "A step did not succeed after many tries. The order is kept and can be carried on.",
}
WAITING_SENTENCE = "Everything you ordered is set aside. It is waiting for the payment provider."
# What the page says of a step that was given up; the technical cause is in the API, the dead letter and the log.
_FAILED = defaultdict(
    lambda: "The order could not be completed yet.",
    reserve="Its items could not be reserved yet.",
    pay="Its payment could not be completed yet.",
    confirm="It is paid, and could not be confirmed yet.",
    release="Its payment was declined, and its items could not be given back yet.",
)
_SKU = re.compile("|".join(map(re.escape, CATALOGUE)))
_STEPS = (("created", "Accepted"), ("reserved", "Reserved"), ("paid", "Paid"), ("confirmed", "Confirmed"))
_EVENT_TEXT = {
    "created": "Order stored",
    "reserved": "Stock reserved",
    "paid": "Payment captured",
    "declined": "Payment declined",
    "confirmed": "Order confirmed",
    "rejected": "Order rejected",
    "cancelled": "Order cancelled",
    "failed": "Order failed",
}


def status_sentence(order: Order) -> str:
    """Return what the page says about where an order stands."""
    return WAITING_SENTENCE if waits_for_payment(order) else STATUS_SENTENCE[order.status]


def money(minor: int, currency: str) -> str:
    """Return an amount for people: €12.90."""
    units = MINOR_UNITS.get(currency, 100)
    amount = f"{minor / units:,.{len(str(units)) - 1}f}"
    symbol = _SYMBOLS.get(currency)
    return f"{symbol}{amount}" if symbol else f"{amount} {currency}"


def timestamp(moment: datetime) -> str:
    """Return a time as the API shows it: RFC 3339, in UTC, to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def order_json(order: Order) -> dict[str, Any]:
    """Return the order as the API answers it."""
    body: dict[str, Any] = {
        "order_id": order.order_id,
        "status": order.status,
        "customer_id": order.customer_id,
        "items": [
            {
                "sku": line.sku,
                "quantity": line.quantity,
                "unit_price": None if line.unit_price is None else to_float(line.unit_price, order.currency),
            }
            for line in order.items
        ],
        "total_amount": to_float(order.total, order.currency),
        "total_minor": order.total,
        "currency": order.currency,
        "history": [_history_json(entry) for entry in order.history],
    }
    if order.reason is not None:
        body["reason"] = order.reason
    if waits_for_payment(order):
        body["waiting_for"] = "payment provider"
    return body


def _history_json(entry: HistoryEntry) -> dict[str, Any]:
    body: dict[str, Any] = {"event": entry.event, "at": timestamp(entry.at)}
    if entry.detail:
        body["detail"] = dict(entry.detail)
    return body


def page_json(page: Page) -> dict[str, Any]:
    """Return one page of the list of orders as the API answers it."""
    return {"orders": [order_json(order) for order in page.orders], "next": page.next}


def product_json(product: Product) -> dict[str, Any]:
    """Return one product of the catalogue as the API answers it."""
    return {
        "sku": product.sku,
        "name": product.name,
        "unit_price": to_float(product.unit_price, product.currency),
        "unit_price_minor": product.unit_price,
        "currency": product.currency,
        "stock": product.stock,
    }


@dataclass(frozen=True)
class Step:
    """One of the steps to a confirmed order; `state` is done, current, waiting or stopped."""

    text: str
    state: str


@dataclass(frozen=True)
class HistoryLine:
    """One event of an order as the page shows it; `after` is the time since the order was placed."""

    event: str
    text: str
    detail: str
    at: datetime
    after: str


def steps(order: Order) -> list[Step]:
    """Return how far the order has come, for the bar at the top of its page."""
    seen = {entry.event for entry in order.history}
    done = 1 + max((n for n, (event, _) in enumerate(_STEPS) if event in seen), default=0)
    stopped = order.status in ("rejected", "cancelled", "failed")
    bar = [Step(text, "done") for _, text in _STEPS[:done]]
    if stopped:
        bar.append(Step(STATUS_TEXT[order.status], "stopped"))
    else:
        ahead = [Step(text, "waiting") for _, text in _STEPS[done:]]
        if ahead:
            ahead[0] = Step(ahead[0].text, "current")
        bar.extend(ahead)
    return bar


def history(order: Order) -> list[HistoryLine]:
    """Return the order's events, oldest first."""
    start = order.history[0].at if order.history else None
    return [
        HistoryLine(
            entry.event,
            _EVENT_TEXT.get(entry.event, entry.event),
            _detail(order, entry),
            entry.at,
            _duration((entry.at - start).total_seconds()) if start is not None and n else "",
        )
        for n, entry in enumerate(order.history)
    ]


def reason(order: Order) -> str | None:
    """Return why the order was rejected, cancelled or failed, in words for the customer."""
    if order.status == "failed":
        failed = (entry for entry in order.history if entry.event == "failed")
        return " ".join(dict.fromkeys(_FAILED[entry.detail.get("step", "")] for entry in failed))
    last = next((entry for entry in reversed(order.history) if entry.event == order.status), None)
    return None if order.reason is None or last is None else _why(last)


def _detail(order: Order, entry: HistoryEntry) -> str:
    """Return what an event adds to what the page says anyway."""
    if entry.event == "paid":
        return entry.detail.get("charge_id", "")
    if entry.event == "failed":
        text = _FAILED[entry.detail.get("step", "")]
    else:
        text = _why(entry) if "reason" in entry.detail else ""
    return "" if text == reason(order) else text


def _why(entry: HistoryEntry) -> str:
    """Return the reason of an event: products by their names, and nothing about the fields of programs."""
    text = entry.detail.get("reason", "")
    match entry.detail.get("code"):
        case "out_of_stock":
            return _SKU.sub(lambda match: CATALOGUE[match[0]].name, text).replace(" in stock", " left")
        case "invalid" | "unknown_sku" | "total_mismatch":
            return "The order could not be carried out as the program that placed it had written it."
    return _capital(text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _duration(seconds: float) -> str:
    """Return a span for people: +340 ms, +2.1 s, +3 min."""
    if seconds < 1:
        return f"+{max(0, round(seconds * 1000))} ms"
    if seconds < 90:
        return f"+{seconds:.1f} s"
    if seconds < 5_400:
        return f"+{seconds / 60:.0f} min"
    return f"+{seconds / 3_600:.0f} h"
