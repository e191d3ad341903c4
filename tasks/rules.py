"""The rules of an order and its prices, stated once for requests and for events of other programs.

A request is told every rule that it breaks (`tasks.parsing`); an event is rejected for the first one (`tasks.pricing`).
The prices of what is offered hold: the catalogue at the time of the order, or what the order was placed with before.
What a client says of prices and totals is only compared with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

from orders.v1.events_pb2 import OrderCreated

from . import money
from .catalogue import CURRENCY
from .ledger import PricedItem
from .model import MAX_ID_LENGTH, MAX_ITEMS, MAX_QUANTITY, MAX_TOKEN_LENGTH, Flaw
from .products import Offered
from .text import flaw_of, normalised, shown


class Item(Protocol):
    """A product and how many pieces of it."""

    @property
    def sku(self) -> str: ...

    @property
    def quantity(self) -> int: ...


@dataclass(frozen=True, slots=True)
class BrokenRule:
    """A flaw, and the name of its RejectionCode without the prefix."""

    field: str
    problem: str
    code: str = "INVALID"

    @property
    def flaw(self) -> Flaw:
        return Flaw(self.field, self.problem)

    @property
    def reason(self) -> str:
        """The flaw as part of a sentence about the order."""
        return f"{self.field} {self.problem.removesuffix('.')}"


def broken_by_customer(value: object) -> Iterator[BrokenRule]:
    """A customer has a name that reads as it is written."""
    name = normalised(value, MAX_ID_LENGTH) if isinstance(value, str) else ""
    flaw = flaw_of(name, MAX_ID_LENGTH)
    if flaw is not None:
        yield BrokenRule("customer_id", flaw)


def broken_by_count(items: Sequence[object]) -> Iterator[BrokenRule]:
    """An order has items, and not too many."""
    if not 1 <= len(items) <= MAX_ITEMS:
        yield BrokenRule("items", f"must have 1 to {MAX_ITEMS} items, not {len(items)}.")


def broken_by_item(
    field: str, sku: object, quantity: object, offer: Mapping[str, Offered]
) -> Iterator[BrokenRule]:
    """An item names a product that is offered, and a number of pieces."""
    if not isinstance(sku, str) or not sku:
        yield BrokenRule(f"{field}.sku", "must be the sku of a product, as text.")
    elif sku not in offer:
        problem = f"names no product: there is no {_quoted(sku)} in the catalogue."
        yield BrokenRule(f"{field}.sku", problem, "UNKNOWN_SKU")
    if not is_quantity(quantity):
        stated = f", not {quantity}" if isinstance(quantity, int) and abs(quantity) < 10**15 else ""
        yield BrokenRule(f"{field}.quantity", f"must be a whole number from 1 to {MAX_QUANTITY}{stated}.")


def is_quantity(value: object) -> TypeGuard[int]:
    """Whether a value is a number of pieces that one item may have."""
    # JSON's true is an int to Python.
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_QUANTITY


def broken_by_pieces(items: Iterable[Item]) -> Iterator[BrokenRule]:
    """All items together are not too many pieces."""
    pieces = sum(item.quantity for item in items)
    if pieces > MAX_QUANTITY:
        yield BrokenRule("items", f"must have {MAX_QUANTITY} pieces at most over all lines, not {pieces}.")


def broken_by_token(value: object) -> Iterator[BrokenRule]:
    """A payment token, if there is one, is printable and not too long."""
    if value is None:
        return
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TOKEN_LENGTH or not value.isprintable():
        problem = f"must be text of 1 to {MAX_TOKEN_LENGTH} printable characters, or left out."
        yield BrokenRule("payment_token", problem)


def broken_by_prices(
    event: OrderCreated, offer: Mapping[str, Offered], *, needs_total: bool
) -> Iterator[BrokenRule]:
    """What is stated of prices and totals is what the offer says, as far as it can tell the items' prices.

    Parameters:
      needs_total: Whether `total_amount` must be stated; 0 then counts as a statement.
    """
    for position, item in enumerate(event.items[:MAX_ITEMS]):
        price = offer[item.sku].unit_price if item.sku in offer else item.unit_price_minor
        if item.unit_price_minor not in (0, price):
            problem = f"is not the catalogue's price: {_amount(price)}, not {_amount(item.unit_price_minor)}."
            yield BrokenRule(f"items[{position}].unit_price_minor", problem, "TOTAL_MISMATCH")
    can_be_added = 1 <= len(event.items) <= MAX_ITEMS and all(
        item.sku in offer and is_quantity(item.quantity) for item in event.items
    )
    if can_be_added:
        yield from _broken_by_totals(event, offer, needs_total)
    if event.currency not in ("", CURRENCY):
        yield BrokenRule("currency", f"must be {CURRENCY} or left out, not {_quoted(event.currency)}.")


def _broken_by_totals(
    event: OrderCreated, offer: Mapping[str, Offered], needs_total: bool
) -> Iterator[BrokenRule]:
    total = total_of(priced(quantities_of(event.items), offer))
    if needs_total or event.total_amount != 0:
        stated = money.from_float(event.total_amount, CURRENCY)
        if stated is None:
            yield BrokenRule(
                "total_amount", f"is {event.total_amount}, which is no amount.", "TOTAL_MISMATCH"
            )
        elif stated != total:
            yield _wrong_total("total_amount", total, stated)
    if event.total_minor not in (0, total):
        yield _wrong_total("total_minor", total, event.total_minor)


def quantities_of(items: Iterable[Item]) -> dict[str, int]:
    """Return how many pieces of each sku are ordered."""
    quantities: dict[str, int] = {}
    for item in items:
        quantities[item.sku] = quantities.get(item.sku, 0) + item.quantity
    return quantities


def priced(quantities: Mapping[str, int], offer: Mapping[str, Offered]) -> tuple[PricedItem, ...]:
    """Return one line per sku at the price of the offer, so that stock gives each sku in one piece."""
    return tuple(PricedItem(sku, quantity, offer[sku].unit_price) for sku, quantity in quantities.items())


def total_of(items: Iterable[PricedItem]) -> int:
    """Return what the items cost together, in minor units."""
    return sum(item.quantity * item.unit_price for item in items)


def _wrong_total(field: str, total: int, stated: int) -> BrokenRule:
    problem = f"is not what the items add up to: {_amount(total)}, not {_amount(stated)}."
    return BrokenRule(field, problem, "TOTAL_MISMATCH")


def _amount(minor: int) -> str:
    # A double may hold 1e308: three hundred digits are of no use to a reader.
    return money.to_text(minor, CURRENCY) if abs(minor) < 10**15 else "an amount of 14 digits or more"


def _quoted(text: str) -> str:
    return repr(shown(text, MAX_ID_LENGTH))
