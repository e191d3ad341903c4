"""The pages for people: the form with the catalogue, an order and its life, the list of orders.

Every page works as plain HTML. Scripts only add what HTML cannot do: a running total, and an order that
moves on by itself (without them the order page asks again every two seconds until the order is final).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Response, current_app, render_template, request, stream_with_context

from tasks import service
from tasks.catalogue import CATALOGUE
from tasks.model import Flaw
from tasks.numbers import whole_number
from tasks.service import InvalidOrder, Order
from tasks.settings import Settings
from tasks.text import shown
from web import live, openapi, representation
from web.access import anyone, caller, needs, visitor
from web.api import accept, find_order, find_page
from web.assets import asset_url
from web.problems import KINDS, Problem

blueprint = Blueprint("pages", __name__)

RECENT = 8
PER_PAGE = 25
# The test cards of the gateway's stand-in, by their tokens; a real gateway hands out tokens of its own.
TEST_CARDS = (
    ("tok_visa", "Test card"),
    ("tok_declined", "Test card that is declined"),
    ("tok_insufficient", "Test card without money"),
    ("tok_expired", "Test card that has expired"),
)
# Which symbols static/products.svg has; it is asked by the first part of the sku.
PICTURES = frozenset({"mug", "tee", "note", "bag", "lamp", "kettle", "chair", "print"})
_SUBMISSION = re.compile(r"[A-Za-z0-9_-]{16,64}", re.ASCII)
_ITEM_FIELD = re.compile(r"items\[(\d+)\]")


@dataclass
class Form:
    """What was typed into the form, and what is wrong with it."""

    submission: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    customer_id: str = ""
    payment_token: str = ""
    quantities: dict[str, str] = field(default_factory=dict)
    # From the id of the form's control to what is wrong with it; "" is the form as a whole.
    errors: dict[str, str] = field(default_factory=dict)


@blueprint.app_context_processor
def helpers() -> dict[str, Any]:
    """Give every template what it draws with."""
    return {
        "asset": asset_url,
        "visitor": visitor,
        "open": current_app.extensions["settings"].access == "open",
        "money": representation.money,
        "short": short,
        "status_text": representation.STATUS_TEXT,
        "timestamp": representation.timestamp,
        "when": when,
    }


@blueprint.get("/")
@needs("order")
def home() -> Response:
    """Show the form, the catalogue and the newest orders."""
    return _home(Form())


@blueprint.post("/orders")
@needs("order")
def place_order() -> Response:
    """Take the form; answer with the way to the order's page, or with the form and what is wrong with it."""
    form = _read_form(request.form)
    items = [
        {"sku": sku, "quantity": whole_number(text, 1, service.MAX_QUANTITY) or text}
        for sku, text in form.quantities.items()
        if text not in ("", "0")
    ]
    if not items:
        form.errors["products"] = "Choose at least one product: give it a quantity."
    if not form.customer_id:
        form.errors["customer_id"] = "Enter a customer id."
    body: dict[str, Any] = {"customer_id": form.customer_id, "items": items}
    if form.payment_token:
        body["payment_token"] = form.payment_token
    try:
        order = service.parse_order_json(json.dumps(body).encode())
        accepted = accept(order, f"form-{form.submission}")
    except InvalidOrder as error:
        for flaw in error.flaws:
            control, text = _for_people(flaw, items)
            # An empty field has its own message already, in better words.
            if not form.errors.get("products" if flaw.field == "items" else control):
                form.errors[control] = text
        return _home(form, 422)
    except Problem as problem:
        if problem.kind.slug != "idempotency-key-reused":
            raise
        # Came back with the browser's Back button and was changed: that is a new order.
        form.submission = Form().submission
        form.errors[""] = "This form was sent before with other contents. Send it again for a second order."
        return _home(form, 409)
    return _see_other(f"/orders/{quote(accepted.order.order_id, safe='')}")


@blueprint.get("/orders")
@needs("order", "read")
def list_orders() -> Response:
    """Show the orders that the visitor may see, newest first."""
    page = find_page(PER_PAGE, request.args.get("before") or None)
    return _page("orders.html", page=page, first=not request.args.get("before"))


@blueprint.get("/orders/recent")
@needs("order", "read")
def recent_orders() -> Response:
    """Answer the table of the newest orders, which the home page shows again when it changes."""
    return _page("_orders.html", orders=find_page(RECENT, None).orders)


@blueprint.get("/orders/<path:order_id>/state")
@needs("order", "read")
def order_state(order_id: str) -> Response:
    """Answer what an open order page shows, for a browser that cannot have a stream."""
    return _json(_state(find_order(order_id)))


@blueprint.get("/orders/<path:order_id>/stream")
@needs("order", "read")
def order_stream(order_id: str) -> Response:
    """Follow the order: its state now and after each change."""
    order = find_order(order_id)
    streams: live.Streams = current_app.extensions["streams"]
    # A server that serves one request at a time would serve nothing else meanwhile.
    if not request.environ.get("wsgi.multithread") or not streams.take():
        raise Problem(
            "unavailable",
            "Too many pages are followed live here right now: ask for the order's state instead.",
            headers={"Retry-After": "10"},
        )
    events = live.follow(order, _state, streams.duration)
    response = Response(stream_with_context(events), content_type="text/event-stream")
    # A proxy that collects answers before it passes them on would make the page stand still.
    response.headers["X-Accel-Buffering"] = "no"
    response.call_on_close(streams.release)
    return response


@blueprint.get("/docs")
@anyone
def docs() -> Response:
    """Show the API, with a form to try each of its operations."""
    document = openapi.document()
    return _page(
        "docs.html", document=document, operations=openapi.operations(document), kinds=KINDS.values()
    )


@blueprint.get("/orders/<path:order_id>")
@needs("order", "read")
def show_order(order_id: str) -> Response:
    """Show one order."""
    order = find_order(order_id)
    return _page("order.html", **_order_context(order))


def error_page(problem: Problem) -> Response:
    """Return a readable page for a problem."""
    response = _page("error.html", problem=problem)
    response.status_code = problem.status
    response.headers.extend(problem.headers)
    return response


def when(moment: datetime) -> str:
    """Return a time for people; the page's script turns it into the reader's own time zone."""
    moment = moment.astimezone(UTC)
    return f"{moment.day} {moment:%b %Y, %H:%M:%S} UTC"


def short(order_id: str) -> str:
    """Return an order id cut to what tells it from the others in a list."""
    return order_id if len(order_id) <= 14 else f"{order_id[:6]}…{order_id[-6:]}"


def _page(template: str, **context: Any) -> Response:
    return Response(render_template(template, **context), content_type="text/html; charset=utf-8")


def _json(body: Mapping[str, Any]) -> Response:
    return Response(json.dumps(body), content_type="application/json")


def _see_other(location: str) -> Response:
    return Response(status=303, headers={"Location": location})


def _home(form: Form, status: int = 200) -> Response:
    products = service.products()
    who = caller()
    orders = find_page(RECENT, None).orders if who.customer_id is not None or who.may("read") else []
    settings: Settings = current_app.extensions["settings"]
    cards = TEST_CARDS if settings.test_cards else ()
    response = _page(
        "home.html", form=form, products=products, orders=orders, test_cards=cards, pictures=PICTURES
    )
    response.status_code = status
    return response


def _order_context(order: Order) -> dict[str, Any]:
    return {
        "order": order,
        "names": {sku: entry.name for sku, entry in CATALOGUE.items()},
        "steps": representation.steps(order),
        "history": representation.history(order),
        "reason": representation.reason(order),
        "version": live.version(order),
        "rests": live.rests(order),
        "sentence": representation.status_sentence(order),
        "trace_url": _trace_url(order),
    }


def _trace_url(order: Order) -> str | None:
    settings: Settings = current_app.extensions["settings"]
    if settings.trace_url_template is None or order.trace_id is None:
        return None
    return settings.trace_url_template.format(trace_id=quote(order.trace_id, safe=""))


def _state(order: Order) -> dict[str, Any]:
    """Return what an open order page needs to show the order as it is now."""
    return {
        "revision": live.version(order),
        "status": order.status,
        "text": representation.STATUS_TEXT[order.status],
        "sentence": representation.status_sentence(order),
        "rests": live.rests(order),
        "final": order.is_final,
        "html": render_template("_order.html", **_order_context(order)),
    }


def _read_form(data: Mapping[str, str]) -> Form:
    submission = data.get("submission", "")
    return Form(
        submission=submission if _SUBMISSION.fullmatch(submission) else Form().submission,
        customer_id=caller().customer_id or data.get("customer_id", "").strip(),
        payment_token=data.get("payment_token", "").strip(),
        quantities={
            name.removeprefix("quantity-"): text.strip()
            for name, text in data.items()
            if name.startswith("quantity-")
        },
    )


def _for_people(flaw: Flaw, items: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the control of the form that a flaw is about, and what to say there to the person who filled it in."""
    if match := _ITEM_FIELD.match(flaw.field):
        sku = items[int(match[1])]["sku"]
        product = CATALOGUE.get(sku)
        if product is None:
            return "products", f"Choose products from the list: there is no “{shown(sku, 64)}”."
        return f"quantity-{sku}", f"{product.name}: the quantity {flaw.problem}"
    match flaw.field:
        case "customer_id":
            return flaw.field, f"The customer id {flaw.problem}"
        case "payment_token":
            return flaw.field, "Choose a way to pay from the list."
        case "items":
            return "products", f"The order {flaw.problem}"
    return "", f"The order {flaw.problem}"
