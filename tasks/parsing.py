"""Reads an order out of a request's body, JSON or protobuf, and names everything that is wrong with it.

What is stated in an event about prices and totals is checked here as well, so that a client is told at once
what the saga would reject later.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from google.protobuf.message import DecodeError

from orders.v1.events_pb2 import OrderCreated

from . import money
from .catalogue import CATALOGUE, CURRENCY
from .events import usable_order_id
from .model import (
    MAX_ID_LENGTH,
    MAX_ITEMS,
    MAX_QUANTITY,
    MAX_TOKEN_LENGTH,
    Flaw,
    InvalidOrder,
    OrderRequest,
    RequestedItem,
)
from .text import flaw_of, normalised, shown

MAX_BODY_BYTES = 1_000_000

#: How many flaws of one request are named.
MAX_FLAWS = 20

# Stands for an item that cannot be read.
_NO_ITEM = RequestedItem("", 0)

T = TypeVar("T")


def parse_order_json(body: bytes, customer_id: str | None = None) -> OrderRequest:
    """Read `{"customer_id", "items": [{"sku", "quantity"}], "payment_token"?}`; other members are ignored.

    Parameters:
      customer_id: Who orders when the body does not say.

    Raises:
      InvalidOrder: With every field that is wrong, or "body" when it is not JSON.
    """
    _check_size(body)
    try:
        # Reading the text strictly first: json.loads would guess other encodings than UTF-8.
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise InvalidOrder("body", "is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise InvalidOrder("body", f"is not JSON: {error.msg} at line {error.lineno}.") from None
    except RecursionError:
        raise InvalidOrder("body", "is nested too deeply.") from None
    except ValueError as error:  # a number with thousands of digits
        raise InvalidOrder("body", f"has a number that cannot be read: {str(error)[:100]}.") from None
    if not isinstance(data, dict):
        raise InvalidOrder("body", "must be a JSON object with customer_id and items.")
    flaws = _Flaws()
    customer = flaws.of(check_customer_id, data.get("customer_id", customer_id))
    items = data.get("items")
    read: list[RequestedItem] = []
    if not isinstance(items, list):
        flaws.add("items", "must be an array of items.")
    elif flaws.of(_check_count, items) is not None:
        read = [_json_item(flaws, f"items[{position}]", item) for position, item in enumerate(items)]
    token = flaws.of(_check_token, data.get("payment_token"))
    flaws.of(_check_pieces, read)
    flaws.check()
    return OrderRequest(customer or "", read, token)


def parse_order_protobuf(body: bytes, customer_id: str | None = None) -> OrderRequest:
    """Read an OrderCreated message; its order id may be empty, its prices and totals may be left out.

    Parameters:
      customer_id: Who orders when the message does not say.

    Raises:
      InvalidOrder: With every field that is wrong, or "body" when it is not such a message.
    """
    _check_size(body)
    try:
        event = OrderCreated.FromString(body)
    except DecodeError:
        raise InvalidOrder("body", "is not an orders.v1.OrderCreated message.") from None
    if not event.ListFields():
        raise InvalidOrder("body", "has none of the fields of an orders.v1.OrderCreated message.")
    flaws = _Flaws()
    if event.order_id and not usable_order_id(event.order_id):
        flaws.add("order_id", f"must be 1 to {MAX_ID_LENGTH} letters, digits, '-', '_', '.' or '~'.")
    customer = flaws.of(check_customer_id, event.customer_id or customer_id)
    items: list[RequestedItem] = []
    if flaws.of(_check_count, event.items) is not None:
        items = [
            _item(flaws, f"items[{position}]", item.sku, item.quantity)
            for position, item in enumerate(event.items)
        ]
    token = flaws.of(_check_token, event.payment_token or None)
    flaws.of(_check_pieces, items)
    if not flaws:
        _check_prices(flaws, event)
    flaws.check()
    return OrderRequest(customer or "", items, token, event.order_id or None)


class _Flaws:
    """What is wrong with one request, so that a client learns all of it at once."""

    def __init__(self) -> None:
        self._found: list[Flaw] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, field: str, problem: str) -> None:
        if len(self._found) < MAX_FLAWS:
            self._found.append(Flaw(field, problem))

    def of(self, check: Callable[[Any], T], value: object) -> T | None:
        """Return what a check makes of a value, None when it refuses it, which is noted."""
        try:
            return check(value)
        except InvalidOrder as refusal:
            self.add(refusal.field, refusal.problem)
            return None

    def check(self) -> None:
        """Raise what was found."""
        if self._found:
            first, *others = self._found
            raise InvalidOrder(first.field, first.problem, *others)


def check_customer_id(value: object) -> str:
    """Return the value if it can name a customer."""
    name = normalised(value, MAX_ID_LENGTH) if isinstance(value, str) else ""
    flaw = flaw_of(name, MAX_ID_LENGTH)
    if flaw is not None:
        raise InvalidOrder("customer_id", flaw)
    return name


def _json_item(flaws: _Flaws, field: str, item: object) -> RequestedItem:
    if not isinstance(item, dict):
        flaws.add(field, 'must be an object such as {"sku": "MUG-01", "quantity": 2}.')
        return _NO_ITEM
    return _item(flaws, field, item.get("sku"), item.get("quantity"))


def _item(flaws: _Flaws, field: str, sku: object, quantity: object) -> RequestedItem:
    if not isinstance(sku, str) or not sku:
        flaws.add(f"{field}.sku", "must be the sku of a product, as text.")
    elif sku not in CATALOGUE:
        name = shown(sku, MAX_ID_LENGTH)
        flaws.add(f"{field}.sku", f"names no product: there is no {name!r} in the catalogue.")
    # JSON's true is an int to Python.
    if isinstance(quantity, bool) or not isinstance(quantity, int) or not 1 <= quantity <= MAX_QUANTITY:
        flaws.add(f"{field}.quantity", f"must be a whole number from 1 to {MAX_QUANTITY}.")
        return _NO_ITEM
    return RequestedItem(str(sku), quantity)


def _check_pieces(items: list[RequestedItem]) -> list[RequestedItem]:
    """Return the items that can be counted if they are not more pieces than one order may take, over all its lines."""
    pieces = sum(item.quantity for item in items)
    if pieces > MAX_QUANTITY:
        raise InvalidOrder("items", f"must have {MAX_QUANTITY} pieces at most over all lines, not {pieces}.")
    return items


def _check_count(items: Any) -> Any:
    if not 1 <= len(items) <= MAX_ITEMS:
        raise InvalidOrder("items", f"must have 1 to {MAX_ITEMS} items, not {len(items)}.")
    return items


def _check_token(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TOKEN_LENGTH or not value.isprintable():
        raise InvalidOrder(
            "payment_token", f"must be text of 1 to {MAX_TOKEN_LENGTH} printable characters, or left out."
        )
    return value


def _check_prices(flaws: _Flaws, event: OrderCreated) -> None:
    total = 0
    for position, item in enumerate(event.items):
        price = CATALOGUE[item.sku].unit_price
        if item.unit_price_minor not in (0, price):
            flaws.add(
                f"items[{position}].unit_price_minor", f"is not the catalogue's price, which is {price}."
            )
        total += price * item.quantity
    # Both are 0 when the client left them out.
    if event.total_amount != 0 and money.from_float(event.total_amount, CURRENCY) != total:
        flaws.add("total_amount", f"is not what the items add up to: {money.to_text(total, CURRENCY)}.")
    if event.total_minor not in (0, total):
        flaws.add("total_minor", f"is not what the items add up to: {total}.")
    if event.currency not in ("", CURRENCY):
        flaws.add("currency", f"must be {CURRENCY} or left out.")


def _check_size(body: bytes) -> None:
    if len(body) > MAX_BODY_BYTES:
        raise InvalidOrder("body", f"is larger than {MAX_BODY_BYTES:,} bytes.")


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidOrder("body", f"has {name}, which JSON does not know.")
