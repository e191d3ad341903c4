"""Reads an order out of a request's body, JSON or protobuf, and names everything that is wrong with it.

The rules are those of `tasks.rules`, prices and totals included, so a client is told at once what the saga would reject
later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NoReturn

from google.protobuf.message import DecodeError

from orders.v1.events_pb2 import OrderCreated

from . import rules
from .events import usable_order_id
from .model import MAX_ID_LENGTH, Flaw, InvalidOrder, OrderRequest, RequestedItem
from .products import Offered
from .text import normalised

MAX_BODY_BYTES = 1_000_000


def parse_order_json(
    body: bytes, customer_id: str | None = None, *, offer: Mapping[str, Offered]
) -> OrderRequest:
    """Read `{"customer_id", "items": [{"sku", "quantity"}], "payment_token"?}`; other members are ignored.

    Parameters:
      customer_id: Who orders when the body does not say.
      offer: The products that can be ordered.

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
    except ValueError as error:  # a number with thousands of digits, or none such as NaN
        raise InvalidOrder("body", f"has a number that cannot be read: {str(error)[:100]}.") from None
    if not isinstance(data, dict):
        raise InvalidOrder("body", "must be a JSON object with customer_id and items.")
    flaws = _Flaws()
    customer = data.get("customer_id", customer_id)
    flaws.add_broken(rules.broken_by_customer(customer))
    items = data.get("items")
    read: list[RequestedItem] = []
    if not isinstance(items, list):
        flaws.add("items", "must be an array of items.")
    elif not flaws.add_broken(rules.broken_by_count(items)):
        for position, item in enumerate(items):
            if not isinstance(item, dict):
                flaws.add(f"items[{position}]", 'must be an object such as {"sku": "MUG-01", "quantity": 2}.')
                continue
            read += _item(flaws, position, item.get("sku"), item.get("quantity"), offer)
    token = data.get("payment_token")
    flaws.add_broken(rules.broken_by_token(token))
    flaws.add_broken(rules.broken_by_pieces(read))
    flaws.check()
    return OrderRequest(_name(customer), read, token)


def parse_order_protobuf(
    body: bytes, customer_id: str | None = None, *, offer: Mapping[str, Offered]
) -> OrderRequest:
    """Read an OrderCreated message; its order id may be empty, its prices and totals may be left out.

    Parameters:
      customer_id: Who orders when the message does not say.
      offer: The products that can be ordered.

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
    customer = event.customer_id or customer_id
    flaws.add_broken(rules.broken_by_customer(customer))
    items: list[RequestedItem] = []
    if not flaws.add_broken(rules.broken_by_count(event.items)):
        for position, item in enumerate(event.items):
            items += _item(flaws, position, item.sku, item.quantity, offer)
    token = event.payment_token or None
    flaws.add_broken(rules.broken_by_token(token))
    flaws.add_broken(rules.broken_by_pieces(items))
    flaws.add_broken(rules.broken_by_prices(event, offer, needs_total=False))
    flaws.check()
    return OrderRequest(_name(customer), items, token, event.order_id or None)


def order_id_in(body: bytes) -> str | None:
    """Return the id that an OrderCreated message chooses for its order; None without a usable one."""
    try:
        order_id: str = OrderCreated.FromString(body).order_id
    except DecodeError:
        return None
    return order_id if usable_order_id(order_id) else None


class _Flaws:
    """What is wrong with one request, so that a client learns all of it at once.

    The rules bound it: only of the first MAX_ITEMS items are flaws named.
    """

    def __init__(self) -> None:
        self._found: list[Flaw] = []

    def add(self, field: str, problem: str) -> None:
        self._found.append(Flaw(field, problem))

    def add_broken(self, broken: Iterable[rules.BrokenRule]) -> bool:
        """Note the rules that are broken; returns whether there are any."""
        found = list(broken)
        for rule in found:
            self.add(rule.field, rule.problem)
        return bool(found)

    def check(self) -> None:
        """Raise what was found."""
        if self._found:
            first, *others = self._found
            raise InvalidOrder(first.field, first.problem, *others)


def check_customer_id(value: object) -> str:
    """Return the value, in the one form that a name always has, if it can name a customer.

    Raises:
      InvalidOrder: When it cannot.
    """
    for broken in rules.broken_by_customer(value):
        raise InvalidOrder(broken.field, broken.problem)
    return _name(value)


def _name(value: object) -> str:
    return normalised(str(value), MAX_ID_LENGTH)


def _item(
    flaws: _Flaws, position: int, sku: object, quantity: object, offer: Mapping[str, Offered]
) -> list[RequestedItem]:
    """Note what is wrong with an item; returns it when its pieces can be counted."""
    flaws.add_broken(rules.broken_by_item(f"items[{position}]", sku, quantity, offer))
    return [RequestedItem(str(sku), quantity)] if rules.is_quantity(quantity) else []


def _check_size(body: bytes) -> None:
    if len(body) > MAX_BODY_BYTES:
        raise InvalidOrder("body", f"is larger than {MAX_BODY_BYTES:,} bytes.")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")
