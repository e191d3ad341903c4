"""Says to people where an order stands, what happened to it, and why it ended as it did.

A customer reads these words alone: products by their names, and no names of errors, fields or stock-keeping units. What
a step failed of technically is in the API, the dead letter and the log, and on the page of an operator
(`technical_cause`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from tasks import service
from tasks.service import HistoryEntry, Order, waits_for_payment
from web.formats import formats

STATUS_TEXT: Final = {
    "accepted": "Accepted",
    "offered": "Partly in stock",
    "reserved": "Stock reserved",
    "paid": "Paid",
    "confirmed": "Confirmed",
    "shipped": "Shipped",
    "rejected": "Rejected",
    "cancelled": "Cancelled",
    "returned": "Returned",
    "refunded": "Refunded",
    "failed": "Failed",
}
# What the page says about a status in one sentence; a rejected or failed order says its own reason as well.
_SENTENCE: Final = {
    "accepted": "Your order is stored. Its stock is being reserved.",
    "offered": "Not everything you ordered is in stock. What is there is set aside for you: accept it, or cancel.",
    "reserved": "The payment is next.",
    "paid": "The payment went through. The order is about to be confirmed.",
    "confirmed": "The order is paid and complete.",
    "shipped": "The order is on its way to you.",
    "rejected": "The order is over: nothing was charged and nothing is held for it.",
    "cancelled": "The order is over: nothing is held for it, and what was charged is refunded.",
    "returned": "The order came back, and what was charged is refunded.",
    "refunded": "The order was completed, and its whole price went back.",
    "failed": "A step did not succeed after many tries. The order is kept and can be carried on.",
}
_CANCELLING: Final = "The order is being cancelled."
_RETURNING: Final = "The order is being returned."
_RETURN_WANTED: Final = "The order was sent before it could be cancelled. Its return is wanted."
_SET_ASIDE: Final = "Everything you ordered is set aside."
_PARTLY_SET_ASIDE: Final = "What you accepted is set aside."
_WAITING: Final = "It is waiting for the payment provider."
# What the page says of a step that was given up.
_FAILED: Final = defaultdict(
    lambda: "The order could not be completed yet.",
    reserve="Its items could not be reserved yet.",
    accept="What there is of it is set aside, and its payment could not be asked for yet.",
    pay="Its payment could not be completed yet.",
    confirm="It is paid, and could not be confirmed yet.",
    release="Its payment was declined, and its items could not be given back yet.",
    cancel="It could not be cancelled yet.",
    ship="It was sent, and that could not be recorded yet.",
    refund="Its refund could not be made yet.",
)
_FAILED["return"] = "Its return could not be completed yet."
_STEPS: Final = (
    ("created", "Accepted"),
    ("reserved", "Reserved"),
    ("paid", "Paid"),
    ("confirmed", "Confirmed"),
    ("shipped", "Shipped"),
)
EVENT_TEXT: Final = {
    "created": "Order stored",
    "offered": "Offered what is in stock",
    "offer_accepted": "Offer accepted",
    "reserved": "Stock reserved",
    "paid": "Payment captured",
    "declined": "Payment declined",
    "confirmed": "Order confirmed",
    "shipped": "Order shipped",
    "return_requested": "Return decided",
    "returned": "Order returned",
    "rejected": "Order rejected",
    "cancel_requested": "Cancellation requested",
    "cancelled": "Order cancelled",
    "refund_requested": "Refund requested",
    "refunded": "Refund made",
    "charged_back": "Charged back by the bank",
    "failed": "Order failed",
}
# Who asked for the end of an order, or accepted what there is of it.
_BY: Final = {
    "customer": "By the customer",
    "operator": "By an operator",
    "deadline": "Not completed in time",
}
# What becomes of goods that came back.
_STOCK: Final = {"back": "Goods back in stock", "written_off": "Goods written off"}
# How `tasks.stock` words it, for programs.
_SHORT: Final = re.compile(r"(\d+) × (\S+) ordered, (\d+) in stock")


@dataclass(frozen=True)
class Step:
    """One of the steps to a confirmed order; `state` is done, current, waiting or stopped."""

    text: str
    state: str


@dataclass(frozen=True)
class HistoryLine:
    """One event of an order as the page shows it; `after` is the time since the order was placed.

    `link` leads to more about it, where there is more; `by` says who asked for it, where that is told.
    """

    event: str
    text: str
    detail: str
    at: datetime
    after: str
    link: str = ""
    by: str = ""


def status_sentence(order: Order) -> str:
    """Return what the page says about where an order stands."""
    if order.is_being_cancelled:
        return _CANCELLING
    if order.is_being_returned:
        return _RETURNING
    if order.waits_for_return:
        return _RETURN_WANTED
    sentence = _WAITING if waits_for_payment(order) else _SENTENCE[order.status]
    if order.status == "reserved":
        return f"{_PARTLY_SET_ASIDE if order.is_partial else _SET_ASIDE} {sentence}"
    return sentence


def product_name(order: Order, sku: str) -> str:
    """Return what a product was called when it was ordered."""
    placed = next((line.name for line in order.items if line.sku == sku and line.name), None)
    return placed or service.product_name(sku) or "Unknown product"


def left(stock: int) -> str:
    """Return how many pieces of a product there are, in words: 3 left."""
    return f"{formats().number(stock)} left" if stock else "none left"


def too_many(name: str, quantity: int, stock: int) -> str:
    """Return that there is less of a product than was ordered: 2 × Enamel mug ordered, 1 left."""
    return f"{formats().number(quantity)} × {name} ordered, {left(stock)}"


def steps(order: Order) -> list[Step]:
    """Return how far the order has come, for the bar at the top of its page."""
    seen = {entry.event for entry in order.history}
    if "offer_accepted" in seen:
        seen.add("reserved")
    # What was not sent is complete all the same.
    path = _STEPS if "shipped" in seen else _STEPS[:-1]
    done = 1 + max((n for n, (event, _) in enumerate(path) if event in seen), default=0)
    stopped = order.status in ("rejected", "cancelled", "returned", "refunded", "failed")
    bar = [Step(text, "done") for _, text in path[:done]]
    if stopped:
        bar.append(Step(STATUS_TEXT[order.status], "stopped"))
    else:
        ahead = [Step(text, "waiting") for _, text in path[done:]]
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
            EVENT_TEXT.get(entry.event, entry.event),
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
        return " ".join(dict.fromkeys(map(failure, failed)))
    last = next((entry for entry in reversed(order.history) if entry.event == order.status), None)
    return None if order.reason is None or last is None else _why(order, last)


def failure(entry: HistoryEntry) -> str:
    """Return what the failure of a step means for the customer."""
    return _FAILED[entry.detail.get("step", "")]


def technical_cause(order: Order) -> str | None:
    """Return why the order was rejected or failed, in the words of the program that found it, for operators."""
    return order.reason if order.status in ("rejected", "failed") else None


def _detail(order: Order, entry: HistoryEntry) -> str:
    """Return what an event adds to what the page says anyway."""
    if entry.event == "paid":
        return entry.detail.get("charge_id", "")
    if entry.event == "offered":
        return _amount(order, entry)
    if entry.event == "offer_accepted":
        return f"{_BY.get(entry.detail.get('by', ''), '')}: {_amount(order, entry)}"
    if entry.event == "shipped":
        return " ".join(filter(None, (entry.detail.get("carrier"), entry.detail.get("tracking"))))
    if entry.event in ("return_requested", "returned"):
        return ": ".join(
            filter(None, (_STOCK.get(entry.detail.get("stock", "")), entry.detail.get("reason")))
        )
    if entry.event in ("refund_requested", "refunded", "charged_back"):
        return ": ".join(part for part in (_amount(order, entry), entry.detail.get("reason", "")) if part)
    if entry.event == "cancel_requested":
        why = _why(order, entry)
        return f"{_BY.get(entry.detail.get('by', ''), '')}{f': {why}' if why else ''}"
    if entry.event == "failed":
        text = failure(entry)
    else:
        text = _why(order, entry) if "reason" in entry.detail else ""
    return "" if text == reason(order) else text


def _amount(order: Order, entry: HistoryEntry) -> str:
    return formats().money(int(entry.detail["amount_minor"]), order.currency)


def _why(order: Order, entry: HistoryEntry) -> str:
    """Return the reason of an event: products by their names, and nothing about the fields of programs."""
    text = entry.detail.get("reason", "")
    match entry.detail.get("code"):
        case "out_of_stock":
            short = _SHORT.fullmatch(text)
            if short is None:
                return "There is less in stock than was ordered."
            return too_many(product_name(order, short[2]), int(short[1]), int(short[3]))
        case "invalid" | "unknown_sku" | "total_mismatch":
            return "The order could not be carried out as the program that placed it had written it."
    return text[:1].upper() + text[1:]


def _duration(seconds: float) -> str:
    """Return a span for people: +340 ms, +2.1 s, +3 min."""
    return f"+{formats().seconds(max(0, seconds))}"
