"""A person who was erased is found nowhere, and what they bought stays."""

from __future__ import annotations

from collections import defaultdict

from tests.chaos.books import Books
from tests.chaos.verdict import Verdict, verdict


def erased_orders(books: Books) -> set[str]:
    """Return the orders of people who were erased, or were to be."""
    people = {person["customer_id"] for person in books.erased}
    return {
        event.order_id for event in books.events if event.name == "created" and event.customer_id in people
    }


def erased_is_gone(books: Books) -> Verdict:
    """Each erasure is certified; nothing of the person is anywhere; their orders have their content and no customer."""
    orders = erased_orders(books)
    wrong = {
        f"{person['customer_id']} was not erased" for person in books.erased if not person["certificate"]
    }
    wrong |= {f"erasure {job['id']} is not done" for job in books.jobs if not job["finished_at"]}
    wrong |= {f"a trace in {place}" for place in books.traces}
    reserved: defaultdict[str, int] = defaultdict(int)
    for event in books.events:
        if event.name == "reserved":
            reserved[event.order_id] = event.total
    for event in books.events:
        if event.order_id in orders and event.name == "created":
            placed = books.placed.get(event.order_id)
            if placed is None:
                wrong.add(f"{event.order_id} is gone")
                continue
            quantities = {sku: quantity for sku, quantity, _ in placed.lines}
            if placed.customer_id:
                wrong.add(f"{event.order_id} has a customer")
            # One that was never held has nothing.
            if reserved[event.order_id] and (quantities, placed.total) != (
                dict(event.quantities),
                reserved[event.order_id],
            ):
                wrong.add(f"{event.order_id} is no longer what was bought")
    return verdict(
        "who was erased is found nowhere, and totals stay",
        wrong,
        f"{len(books.erased)} people with {len(orders)} orders, {len(books.traces)} traces",
    )
