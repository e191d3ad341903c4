"""The pages of one order, and of the API. The form is `web.order_form`, the list `web.order_list`.

Every page works as plain HTML. Scripts only add what HTML cannot do: a running total, and an order that
moves on by itself (without them the order page asks again every two seconds until the order is final).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Response, current_app, render_template, request, stream_with_context

from tasks.service import Order
from tasks.settings import Settings
from web import live, openapi, words
from web.access import anyone, caller, needs
from web.api import find_order
from web.problems import KINDS, Problem
from web.rendering import json_answer, page
from web.timeline import timeline_of, version

blueprint = Blueprint("pages", __name__)


@blueprint.get("/orders/<path:order_id>")
@needs("order", "read")
def show_order(order_id: str) -> Response:
    """Show one order."""
    return order_page(order_id)


def order_page(
    order_id: str,
    status: int = 200,
    errors: Mapping[str, str] | None = None,
    typed: Mapping[str, str] | None = None,
) -> Response:
    """Return the page of an order.

    Parameters:
      errors: What is wrong with the form that was sent, by control.
      typed: What was entered in it.
    """
    context = {**_context(find_order(order_id)), "errors": errors or {}, "typed": typed or {}}
    return page("order.html", status=status, **context)


@blueprint.get("/orders/<path:order_id>/state")
@needs("order", "read")
def order_state(order_id: str) -> Response:
    """Answer what an open order page shows, for a browser that cannot have a stream."""
    return json_answer(_state(find_order(order_id)))


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
    events = live.follow(order, version, _state, streams.duration)
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
    return page("docs.html", document=document, operations=openapi.operations(document), kinds=KINDS.values())


def _context(order: Order) -> dict[str, Any]:
    return {
        # First: what changes while the rest is looked at is shown with the next version.
        "version": version(order),
        "order": order,
        "product_name": partial(words.product_name, order),
        "steps": words.steps(order),
        "timeline": timeline_of(order),
        "reason": words.reason(order),
        "cause": words.technical_cause(order) if caller().sees_causes and caller().kind != "open" else None,
        **_acts(order),
        "must_say_why": caller().must_say_why,
        "submission": secrets.token_urlsafe(18),
        "errors": {},
        "typed": {},
        "rests": live.rests(order),
        "sentence": words.status_sentence(order),
        "trace_url": _trace_url(order),
    }


def _acts(order: Order) -> dict[str, bool]:
    """Return what the caller may do with the order now, on its page."""
    who = caller()
    operates = who.may("operate")
    # A customer asks for a return as for a cancel; an operator decides about it.
    asks = order.status == "shipped" and not order.waits_for_return and not order.is_being_returned
    return {
        "can_accept": who.may("order") and order.can_be_accepted,
        "can_cancel": who.may("order") and (order.can_be_cancelled or (asks and not operates)),
        "can_refund": operates and order.status in ("paid", "confirmed", "shipped"),
        "can_ship": operates and order.status == "confirmed" and not order.is_being_cancelled,
        "can_return": operates
        and order.was_shipped
        and not order.is_being_returned
        and order.status != "returned",
    }


def _trace_url(order: Order) -> str | None:
    settings: Settings = current_app.extensions["settings"]
    if settings.trace_url_template is None or order.trace_id is None:
        return None
    return settings.trace_url_template.format(trace_id=quote(order.trace_id, safe=""))


def _state(order: Order) -> dict[str, Any]:
    """Return what an open order page needs to show the order as it is now."""
    context = _context(order)
    return {
        "revision": context["version"],
        "status": order.status,
        "text": words.STATUS_TEXT[order.status],
        "sentence": words.status_sentence(order),
        "rests": live.rests(order),
        "final": order.is_final,
        "html": render_template("_order.html", **context),
    }
