"""An order costs what it was placed with, and that is what was sold then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from tests.chaos.books import Books, Placed
from tests.chaos.verdict import Verdict, verdict

#: For how long a process may go by an older price, in milliseconds: it hears of a change as long as it is connected.
_BEHIND_MS = 15_000


def charged_as_placed(books: Books) -> Verdict:
    """What is captured and confirmed is what the order was placed with, and each price held when it was placed."""
    wrong: set[str] = set()
    asked = _asked(books)
    created = {event.order_id: event for event in reversed(books.events) if event.name == "created"}
    money: defaultdict[str, set[int]] = defaultdict(set)
    for event in books.events:
        if event.name in ("reserved", "confirmed", "paid"):
            money[event.order_id].add(event.total)
    for charge in books.charges:
        if charge["status"] == "captured":
            money[charge["order_id"]].add(charge["amount"])
    checked = 0
    for order_id, amounts in money.items():
        placed, event = books.placed.get(order_id), created.get(order_id)
        if placed is None or event is None or not placed.lines:
            wrong.add(f"{order_id} is not in the ledger")
            continue
        checked += 1
        if amounts != {placed.total} or sum(q * price for _, q, price in placed.lines) != placed.total:
            wrong.add(f"{order_id} is {placed.total}, and {sorted(amounts)} was said or captured")
        if event.total and event.total != placed.total:
            wrong.add(f"{order_id} was placed with {event.total} and is {placed.total}")
        first, last = asked.get(order_id, (event.at, event.at))
        wrong |= _not_sold_then(books, order_id, placed, first * 1000 - _BEHIND_MS, last * 1000)
    changes = sum(max(0, len(prices) - 1) for prices in books.prices.values())
    return verdict(
        "an order costs what it was placed with",
        wrong,
        f"{checked} orders checked beside {changes} changes of prices, {len(wrong)} cost something else",
    )


def _asked(books: Books) -> Mapping[str, tuple[float, float]]:
    """Return when each order of the API was asked for first, and when it was accepted."""
    first: dict[str, float] = {}
    found = {}
    for entry in books.log:
        if entry.get("kind") == "api":
            first.setdefault(entry["key"], entry["at"])
            if entry["accepted"]:
                found[entry["order_id"]] = (first[entry["key"]], entry["at"])
    return found


def _not_sold_then(books: Books, order_id: str, placed: Placed, first: float, last: float) -> set[str]:
    """Return the lines of an order whose prices held at no moment of a time."""
    wrong = set()
    for sku, _, price in placed.lines:
        prices = books.prices.get(sku, [])
        until = [since for since, _ in prices[1:]] + [float("inf")]
        if prices and not any(
            amount == price and since <= last and first < end
            for (since, amount), end in zip(prices, until, strict=True)
        ):
            wrong.add(f"{order_id} has {sku} at {price}, which did not hold then")
    return wrong
