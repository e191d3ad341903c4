"""Checks an OrderCreated event against the rules and the catalogue, and prices it.

The catalogue's prices hold; what the event says about prices and totals is only compared with them.
"""

from __future__ import annotations

from collections.abc import Callable

from orders.v1.events_pb2 import OrderCreated, OrderItem

from . import money
from .catalogue import CATALOGUE, CURRENCY
from .claims import Claim, Claims, customer_of, digest_of_event, quantities_of, token_of
from .ledger import PricedItem, Record
from .model import MAX_ID_LENGTH, MAX_ITEMS, MAX_QUANTITY, MAX_TOKEN_LENGTH
from .text import flaw_of, shown


class Refused(Exception):
    """The order cannot be carried out; `code` is the name of a RejectionCode without its prefix."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def first_record(event: OrderCreated, at: int) -> Record:
    """Return the first record of an order: held (if stock allows), or rejected for what is wrong with it."""
    try:
        _check_form(event)
        lines = _price(event)
        total = _check_total(event, lines)
    except Refused as refusal:
        return Record("rejected", {"rejected": at}, code=refusal.code, reason=refusal.reason)
    return Record(
        "held",
        {"held": at},
        customer_id=customer_of(event),
        lines=lines,
        total=total,
        currency=CURRENCY,
        payment_token=token_of(event),
    )


def claimed(claims: Claims, order_id: str, event: OrderCreated, now: Callable[[], int]) -> Claim:
    """Return what an order id stands for: for the order that an event asks for, if it is unclaimed."""
    claim = claims.find(order_id)
    if claim is None:
        at = now()
        record = first_record(event, at)
        wanted = Claim(
            at, digest_of_event(event), record.customer_id, record.lines, record.total, record.currency
        )
        claim, _ = claims.claim(order_id, wanted)
    return claim


def _check_form(event: OrderCreated) -> None:
    flaw = flaw_of(customer_of(event), MAX_ID_LENGTH)
    if flaw is not None:
        raise Refused("INVALID", f"customer_id {flaw.removesuffix('.')}")
    token = event.payment_token
    if len(token) > MAX_TOKEN_LENGTH or not token.isprintable():
        raise Refused("INVALID", f"payment_token must have at most {MAX_TOKEN_LENGTH} printable characters")
    if not 1 <= len(event.items) <= MAX_ITEMS:
        raise Refused("INVALID", f"an order has 1 to {MAX_ITEMS} items, this one has {len(event.items)}")
    for item in event.items:
        if not 1 <= item.quantity <= MAX_QUANTITY:
            raise Refused(
                "INVALID",
                f"the quantity of {_shown(item.sku)} must be 1 to {MAX_QUANTITY}, not {item.quantity}",
            )
    pieces = sum(item.quantity for item in event.items)
    if pieces > MAX_QUANTITY:
        raise Refused(
            "INVALID", f"an order has at most {MAX_QUANTITY} pieces over all its lines, not {pieces}"
        )
    if event.currency and event.currency != CURRENCY:
        raise Refused("INVALID", f"orders are in {CURRENCY}, not in {_shown(event.currency)}")


def _price(event: OrderCreated) -> tuple[PricedItem, ...]:
    """Return one line per sku, so that a sku that stands twice is taken from stock in one piece."""
    for item in event.items:
        _check_price(item)
    quantities = quantities_of(event.items)
    return tuple(PricedItem(sku, quantity, CATALOGUE[sku].unit_price) for sku, quantity in quantities.items())


def _check_price(item: OrderItem) -> None:
    product = CATALOGUE.get(item.sku)
    if product is None:
        raise Refused("UNKNOWN_SKU", f"there is no product {_shown(item.sku)}")
    if item.unit_price_minor not in (0, product.unit_price):
        raise Refused(
            "TOTAL_MISMATCH",
            f"{item.sku} costs {money.to_text(product.unit_price, CURRENCY)}, "
            f"not {money.to_text(item.unit_price_minor, CURRENCY)}",
        )


def _check_total(event: OrderCreated, lines: tuple[PricedItem, ...]) -> int:
    total = sum(line.quantity * line.unit_price for line in lines)
    stated = money.from_float(event.total_amount, CURRENCY)
    if stated is None:
        raise Refused("TOTAL_MISMATCH", f"total_amount is {event.total_amount}, which is no amount")
    for amount in (stated, event.total_minor or total):
        if amount != total:
            raise Refused(
                "TOTAL_MISMATCH",
                f"the items add up to {money.to_text(total, CURRENCY)}, the event says {_amount(amount)}",
            )
    return total


def _amount(minor: int) -> str:
    # A double may hold 1e308: three hundred digits are of no use to a reader.
    return money.to_text(minor, CURRENCY) if abs(minor) < 10**15 else "an amount of 14 digits or more"


def _shown(text: str) -> str:
    return repr(shown(text, MAX_ID_LENGTH))
