"""The list of orders: a customer's own, or all of them for those who may see them.

It has the same filters as the API (`web.queries`), a search for a part of an order's or customer's id, counts by
status, and the way to the same orders as a file. A script asks for the newest page again every few seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final
from urllib.parse import quote, urlencode

from flask import Blueprint, Response, request

from tasks import service
from tasks.events import usable_order_id
from tasks.model import MAX_ID_LENGTH, STATUSES
from tasks.service import Order
from tasks.text import flaw_of, normalised
from web.access import caller, needs
from web.api import find_page, visible
from web.queries import read_query
from web.rendering import page, see_other

blueprint = Blueprint("order_list", __name__)

#: How many of the newest orders the form shows.
RECENT: Final = 8
PER_PAGE: Final = 25

#: What narrows the list, in the order in which an address has it.
FILTERS: Final = ("q", "customer", "status", "since", "until", "sku", "failure")

# What a person is told of a filter that cannot be used, by its control.
_TEXT: Final = {
    "q": "Search for a part of an order id, or of a customer id: up to 64 characters.",
    "customer": "A customer id has up to 64 characters.",
    "status": "Choose a status from the list.",
    "since": "Choose the first day from the calendar.",
    "until": "Choose the last day from the calendar.",
    "sku": "Choose a product from the list.",
    "failure": "Search for a part of a reason: up to 100 characters.",
    "before": "That page of the list does not exist: begin with the newest orders.",
}


@blueprint.get("/orders")
@needs("order", "read")
def list_orders() -> Response:
    """Show the orders that the visitor may see and looks for, newest first."""
    asked = {name: text for name in FILTERS if (text := request.args.get(name, "").strip())}
    query = read_query({name: text for name, text in request.args.items() if name != "limit"})
    text = normalised(asked.get("q", ""), MAX_ID_LENGTH)
    if order := _named(text):
        return see_other(f"/orders/{quote(order.order_id, safe='')}")
    errors = {flaw.field: _TEXT[flaw.field] for flaw in query.flaws}
    if text and flaw_of(text, MAX_ID_LENGTH):
        errors["q"] = _TEXT["q"]
    if errors:
        shown: dict[str, Any] = {}
    else:
        wanted = replace(query.wanted, text=text.casefold() or None)
        found = find_page(PER_PAGE, query.before, wanted)
        shown = {"page": found, "counts": service.count_orders(visible(wanted))}
    return page(
        "orders.html",
        status=400 if errors else 200,
        first=query.before is None,
        asked=asked,
        errors=errors,
        statuses=STATUSES,
        products=service.product_names(),
        address=_address,
        exported=_exported,
        **shown,
    )


@blueprint.get("/recent-orders")
@needs("order", "read")
def recent_orders() -> Response:
    """Answer the table of the newest orders, which the form shows again when it changes."""
    return page("_orders.html", orders=newest())


def newest() -> list[Order]:
    """Return the newest orders that the visitor may see, none for one who may only order."""
    who = caller()
    return find_page(RECENT, None).orders if who.customer_id is not None or who.may("read") else []


def _named(text: str) -> Order | None:
    """Return the order with exactly this id, if the visitor may see it."""
    order = service.get_order(text) if usable_order_id(text) else None
    return order if order is not None and caller().sees(order) else None


def _address(asked: dict[str, str], **changes: str | None) -> str:
    """Return the address of the list with some filters changed, None without one."""
    chosen = {name: text for name, text in {**asked, **changes}.items() if text}
    return f"/orders?{urlencode(chosen)}" if chosen else "/orders"


def _exported(asked: dict[str, str], kind: str) -> str:
    """Return the address of the orders on the list as a file; a search for ids has none."""
    chosen = {name: text for name, text in asked.items() if name != "q"}
    return f"/api/orders.{kind}?{urlencode(chosen)}" if chosen else f"/api/orders.{kind}"
