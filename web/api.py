"""The HTTP API: orders in, orders out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn
from urllib.parse import quote, urlencode

from flask import Blueprint, Response, current_app, jsonify, request

from tasks import logs, service
from tasks.events import usable_order_id
from tasks.model import Flaw
from tasks.service import ANY, AcceptedOrder, InvalidOrder, Order, OrderRequest, Page, Wanted
from web.access import caller, needs
from web.problems import Problem, of_flaws
from web.queries import read_query
from web.representation import order_json, page_json

blueprint = Blueprint("api", __name__)

_FILTERS = ("customer", "status", "since", "until", "sku", "failure")
_PARSERS: dict[str, Callable[[bytes, str | None, str | None], OrderRequest]] = {
    "application/json": service.parse_order_json,
    "application/x-protobuf": service.parse_order_protobuf,
    "application/protobuf": service.parse_order_protobuf,
}


@blueprint.post("/api/orders")
@needs("order")
def place_order() -> Response:
    """Store the order in JetStream, then answer 202."""
    key, flaw = read_key()
    coding = request.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise Problem(
            "unsupported-media-type",
            f"The body is encoded with {coding[:40]!r}: send it as it is.",
            headers={"Accept-Encoding": "identity"},
        )
    parse = _PARSERS.get(request.mimetype)
    if parse is None:
        sent = request.mimetype or "no Content-Type"
        raise Problem(
            "unsupported-media-type",
            f"The order came with {sent!r}: send application/json or application/x-protobuf.",
            headers={"Accept": "application/json, application/x-protobuf"},
        )
    try:
        scoped = None if key is None else idempotency_key(key)
        order_request = parse(request.get_data(), caller().customer_id, scoped)
        if flaw is not None:
            raise of_flaws("malformed-request", [flaw])
        accepted = accept(order_request, key)
    except InvalidOrder as error:
        refuse(error, *([] if flaw is None else [flaw]))
    headers = {"Location": f"/api/orders/{quote(accepted.order.order_id, safe='')}"}
    if accepted.repeated:
        headers["Idempotency-Replayed"] = "true"
    body = current_app.json.dumps(order_json(accepted.order), separators=(",", ":"))
    return Response(f"{body}\n", 202, headers, mimetype="application/json")


@blueprint.get("/api/orders/<path:order_id>")
@needs("order", "read")
def show_order(order_id: str) -> Response:
    """Answer the order's status, items, total and history."""
    return jsonify(order_json(find_order(order_id), causes=caller().sees_causes))


@blueprint.get("/api/orders")
@needs("order", "read")
def list_orders() -> Response:
    """Answer one page of the orders that the caller may see, newest first."""
    query = read_query(request.args)
    if query.flaws:
        raise of_flaws("malformed-request", query.flaws)
    page = find_page(query.limit, query.before, query.wanted)
    response = jsonify(page_json(page, causes=caller().sees_causes))
    if page.next is not None:
        asked = {name: text for name in _FILTERS if (text := request.args.get(name))}
        following = urlencode({**asked, "limit": query.limit, "before": page.next})
        response.headers["Link"] = f'</api/orders?{following}>; rel="next"'
    return response


def accept(order_request: OrderRequest, key: str | None) -> AcceptedOrder:
    """Accept an order for the API or the form; what the caller, the key or the order's id forbids becomes a problem."""
    who = caller()
    if not who.may_order_for(order_request.customer_id):
        raise Problem("forbidden", f"You can order for customer {who.customer_id!r} alone.")
    try:
        accepted = service.accept_order(order_request, None if key is None else idempotency_key(key))
    except service.IdempotencyConflict as error:
        text = str(error)
        raise Problem("idempotency-key-reused", f"{text[:1].upper()}{text[1:]}.") from None
    except service.OrderArchived as error:
        raise Problem(
            "order-archived", f"Order {error.order_id} was placed before and is archived."
        ) from None
    except service.OrderIdTaken as error:
        raise Problem("order-id-taken", f"There is another order with the id {error.order_id}.") from None
    except service.IdempotencyInProgress as error:
        raise Problem(
            "request-in-progress",
            "The same order with this Idempotency-Key is being stored right now: ask again shortly.",
            headers={"Retry-After": str(error.retry_after)},
        ) from None
    logs.bind(order_id=accepted.order_id)
    return accepted


def idempotency_key(key: str) -> str:
    """Return a caller's key as it is kept: two callers may use the same one and mean nothing by it."""
    return f"{caller().space}/{key}"


def refuse(error: InvalidOrder, *others: Flaw) -> NoReturn:
    """Raise the problem of an order that cannot be read, or can be and is wrong, with what else is wrong."""
    slug = "malformed-request" if error.field == "body" else "invalid-order"
    raise of_flaws(slug, [*error.flaws, *others]) from None


def find_order(order_id: str) -> Order:
    """Return the order if the caller may see it, or raise the 404 problem, which says the same for both reasons.

    An id that no order can have is not even looked up.
    """
    if not usable_order_id(order_id):
        raise Problem("not-found", f"There is no order {order_id[:64]!r}.")
    logs.bind(order_id=order_id)
    order = service.get_order(order_id)
    if order is None or not caller().sees(order):
        raise Problem("not-found", f"There is no order {order_id[:64]!r}.")
    return order


def find_page(limit: int, before: str | None, wanted: Wanted = ANY) -> Page:
    """Return a page of the orders that are wanted and that the caller may see; `before` is an earlier page's cursor."""
    return service.list_orders(limit, before, visible(wanted))


def visible(wanted: Wanted) -> Wanted:
    """Return what the caller may see of what is wanted."""
    who = caller()
    wanted = replace(wanted, causes=who.sees_causes)
    if who.customer_id is None:
        if not who.may("read"):
            raise Problem("forbidden", "A list of all orders needs the scope read.")
        return wanted
    if wanted.customer_id not in (None, who.customer_id):
        # As for a single order: others' orders are not there.
        return replace(wanted, customer_id=who.customer_id, until=0)
    return replace(wanted, customer_id=who.customer_id)


def read_key() -> tuple[str | None, Flaw | None]:
    """Return the request's Idempotency-Key, None without one, and what is wrong with it."""
    given = request.headers.get("Idempotency-Key")
    if given is None:
        return None, None
    key = given.strip()
    if not 1 <= len(key) <= 255 or not key.isascii() or not key.isprintable():
        return None, Flaw("Idempotency-Key", "must be one value of 1 to 255 printable ASCII characters.")
    return key, None
