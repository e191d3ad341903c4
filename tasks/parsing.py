"""Reads an order out of a request's body, JSON or protobuf, and names what is wrong with it.

What is stated in an event about prices and totals is checked here as well, so that a client is told at once
what the saga would reject later.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from google.protobuf.message import DecodeError

from orders.v1.events_pb2 import OrderCreated

from . import money
from .catalogue import CATALOGUE, CURRENCY
from .events import usable_order_id
from .model import MAX_ID_LENGTH, MAX_ITEMS, MAX_QUANTITY, MAX_TOKEN_LENGTH, InvalidOrder, Item, OrderRequest

MAX_BODY = 1_000_000


def parse_order_json(body: bytes) -> OrderRequest:
    """Read `{"customer_id", "items": [{"sku", "quantity"}], "payment_token"?}`; other members are ignored.

    Raises:
      InvalidOrder: With the field that is wrong, or "body" when it is not JSON.
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
    items = data.get("items")
    if not isinstance(items, list):
        raise InvalidOrder("items", "must be an array of items.")
    _check_count(items)
    return OrderRequest(
        customer_id=check_customer_id(data.get("customer_id")),
        items=_check_pieces([_json_item(f"items[{position}]", item) for position, item in enumerate(items)]),
        payment_token=_check_token(data.get("payment_token")),
    )


def parse_order_protobuf(body: bytes) -> OrderRequest:
    """Read an OrderCreated message; its order id may be empty, its prices and totals may be left out.

    Raises:
      InvalidOrder: With the field that is wrong, or "body" when it is not such a message.
    """
    _check_size(body)
    try:
        event = OrderCreated.FromString(body)
    except DecodeError:
        raise InvalidOrder("body", "is not an orders.v1.OrderCreated message.") from None
    if not event.ListFields():
        raise InvalidOrder("body", "has none of the fields of an orders.v1.OrderCreated message.")
    if event.order_id and not usable_order_id(event.order_id):
        raise InvalidOrder("order_id", f"must be 1 to {MAX_ID_LENGTH} letters, digits, '-', '_', '.' or '~'.")
    _check_count(event.items)
    request = OrderRequest(
        customer_id=check_customer_id(event.customer_id),
        items=_check_pieces(
            [
                Item(
                    _check_sku(f"items[{position}].sku", item.sku),
                    _check_quantity(f"items[{position}].quantity", item.quantity),
                )
                for position, item in enumerate(event.items)
            ]
        ),
        payment_token=_check_token(event.payment_token or None),
        order_id=event.order_id or None,
    )
    _check_prices(event)
    return request


def check_customer_id(value: object) -> str:
    """Return the value if it can name a customer."""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_ID_LENGTH:
        raise InvalidOrder("customer_id", f"must be text of 1 to {MAX_ID_LENGTH} characters.")
    if not value.isprintable():
        raise InvalidOrder("customer_id", "must not have control characters or line breaks.")
    return value


def _json_item(field: str, item: object) -> Item:
    if not isinstance(item, dict):
        raise InvalidOrder(field, 'must be an object such as {"sku": "MUG-01", "quantity": 2}.')
    return Item(
        _check_sku(f"{field}.sku", item.get("sku")),
        _check_quantity(f"{field}.quantity", item.get("quantity")),
    )


def _check_sku(field: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidOrder(field, "must be the sku of a product, as text.")
    if value not in CATALOGUE:
        shown = value if len(value) <= MAX_ID_LENGTH else f"{value[:MAX_ID_LENGTH]}…"
        raise InvalidOrder(field, f"names no product: there is no {shown!r} in the catalogue.")
    return value


def _check_quantity(field: str, value: object) -> int:
    # JSON's true is an int to Python.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_QUANTITY:
        raise InvalidOrder(field, f"must be a whole number from 1 to {MAX_QUANTITY}.")
    return value


def _check_pieces(items: list[Item]) -> list[Item]:
    """Return the items if they are not more pieces than one order may take, over all its lines."""
    pieces = sum(item.quantity for item in items)
    if pieces > MAX_QUANTITY:
        raise InvalidOrder("items", f"must have {MAX_QUANTITY} pieces at most over all lines, not {pieces}.")
    return items


def _check_count(items: Any) -> None:
    if not 1 <= len(items) <= MAX_ITEMS:
        raise InvalidOrder("items", f"must have 1 to {MAX_ITEMS} items, not {len(items)}.")


def _check_token(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TOKEN_LENGTH or not value.isprintable():
        raise InvalidOrder(
            "payment_token", f"must be text of 1 to {MAX_TOKEN_LENGTH} printable characters, or left out."
        )
    return value


def _check_prices(event: OrderCreated) -> None:
    total = 0
    for position, item in enumerate(event.items):
        price = CATALOGUE[item.sku].unit_price
        if item.unit_price_minor not in (0, price):
            raise InvalidOrder(
                f"items[{position}].unit_price_minor", f"is not the catalogue's price, which is {price}."
            )
        total += price * item.quantity
    # Both are 0 when the client left them out.
    if event.total_amount != 0 and money.from_float(event.total_amount, CURRENCY) != total:
        raise InvalidOrder(
            "total_amount", f"is not what the items add up to: {money.to_text(total, CURRENCY)}."
        )
    if event.total_minor not in (0, total):
        raise InvalidOrder("total_minor", f"is not what the items add up to: {total}.")
    if event.currency not in ("", CURRENCY):
        raise InvalidOrder("currency", f"must be {CURRENCY} or left out.")


def _check_size(body: bytes) -> None:
    if len(body) > MAX_BODY:
        raise InvalidOrder("body", f"is larger than {MAX_BODY:,} bytes.")


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidOrder("body", f"has {name}, which JSON does not know.")
