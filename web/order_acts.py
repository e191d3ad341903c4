"""Cancels, refunds, ships and returns orders, and accepts offers: the API and the buttons on an order's page.

Each is recorded or requested, and the order shows it, before the answer; a worker carries out the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

from flask import Blueprint, Response, current_app, request

from tasks import money, service
from tasks.model import MAX_ID_LENGTH, MAX_TEXT, Flaw
from web.access import caller, needs
from web.acts import recorded
from web.api import find_order, idempotency_key, read_key
from web.pages import order_page
from web.problems import Problem, of_flaws
from web.rendering import see_other
from web.representation import order_json

blueprint = Blueprint("order_acts", __name__)

_SLUGS: Final[dict[type[service.Refusal], str]] = {
    service.NotCancellable: "not-cancellable",
    service.NotOffered: "not-offered",
    service.NotRefundable: "not-refundable",
    service.NotShippable: "not-shippable",
    service.NotReturnable: "not-returnable",
}
_STOCKS: Final = (service.BACK, service.WRITTEN_OFF)


@blueprint.post("/api/orders/<path:order_id>/cancel")
@needs("order")
def cancel_order(order_id: str) -> Response:
    """Request that an order is cancelled, then answer 202."""
    find_order(order_id)
    reason = _text(_body(), "reason", MAX_TEXT)
    if caller().must_say_why and not reason.strip():
        raise of_flaws("malformed-request", [Flaw("reason", "must say why you cancel another's order.")])
    _cancel(order_id, reason)
    return _accepted(order_id)


@blueprint.post("/api/orders/<path:order_id>/accept")
@needs("order")
def accept_offer(order_id: str) -> Response:
    """Accept what there is of an order that stock does not cover, then answer 202."""
    find_order(order_id)
    _accept(order_id)
    return _accepted(order_id)


@blueprint.post("/api/orders/<path:order_id>/refunds")
@needs("operate")
def refund_order(order_id: str) -> Response:
    """Request that a part of a charge, or all of it, goes back, then answer 202."""
    find_order(order_id)
    key, flaw = read_key()
    if key is None:
        missing = Flaw("Idempotency-Key", "must name this refund, so that it is made once.")
        raise of_flaws("malformed-request", [flaw or missing])
    body = _body()
    amount = body.get("amount_minor")
    if amount is not None and (isinstance(amount, bool) or not isinstance(amount, int) or amount < 1):
        wrong = Flaw("amount_minor", "must be a whole number of minor units, 1 or more, or left out.")
        raise of_flaws("malformed-request", [wrong])
    _refund(order_id, idempotency_key(key), amount, _text(body, "reason", MAX_TEXT))
    return _accepted(order_id)


@blueprint.post("/api/orders/<path:order_id>/shipments")
@needs("operate")
def ship_order(order_id: str) -> Response:
    """Record that the goods of an order have left, then answer 202."""
    find_order(order_id)
    body = _body()
    carrier, tracking = _text(body, "carrier", MAX_ID_LENGTH), _text(body, "tracking", MAX_ID_LENGTH)
    _do("order.ship", order_id, lambda: service.ship_order(order_id, carrier, tracking))
    return _accepted(order_id)


@blueprint.post("/api/orders/<path:order_id>/returns")
@needs("operate")
def return_order(order_id: str) -> Response:
    """Decide that the goods of an order come back, then answer 202."""
    find_order(order_id)
    body = _body()
    stock, reason = _stock(body.get("stock")), _text(body, "reason", MAX_TEXT)
    _do("order.return", order_id, lambda: service.return_order(order_id, stock, reason), stock=stock)
    return _accepted(order_id)


@blueprint.post("/orders/<path:order_id>/cancel")
@needs("order")
def cancel_by_page(order_id: str) -> Response:
    """Take the button of an order's page."""
    find_order(order_id)
    reason = _field("reason", MAX_TEXT)
    if caller().must_say_why and not reason.strip():
        return order_page(order_id, 400, {"cancel-reason": "Say why you cancel another's order."})
    _cancel(order_id, reason)
    return _to_page(order_id)


@blueprint.post("/orders/<path:order_id>/accept")
@needs("order")
def accept_by_page(order_id: str) -> Response:
    """Take the button of an order's page."""
    find_order(order_id)
    _accept(order_id)
    return _to_page(order_id)


@blueprint.post("/orders/<path:order_id>/refund")
@needs("operate")
def refund_by_page(order_id: str) -> Response:
    """Take the refund form of an order's page; a form that is sent twice refunds once, a wrong one can be corrected."""
    currency = find_order(order_id).currency
    typed = {"amount": _field("amount", 20), "reason": _field("reason", MAX_TEXT)}
    amount = money.from_text(typed["amount"], currency)
    if not amount:
        return order_page(order_id, 400, {"refund-amount": "Enter an amount such as 12.90."}, typed)
    try:
        _refund(order_id, idempotency_key(f"form-{_field('submission', 64)}"), amount, typed["reason"])
    except Problem as problem:
        if problem.kind.slug != "not-refundable":
            raise
        return order_page(order_id, problem.status, {"refund-amount": problem.detail}, typed)
    return _to_page(order_id)


@blueprint.post("/orders/<path:order_id>/ship")
@needs("operate")
def ship_by_page(order_id: str) -> Response:
    """Take the shipping form of an order's page."""
    find_order(order_id)
    carrier, tracking = _field("carrier", MAX_ID_LENGTH), _field("tracking", MAX_ID_LENGTH)
    _do("order.ship", order_id, lambda: service.ship_order(order_id, carrier, tracking))
    return _to_page(order_id)


@blueprint.post("/orders/<path:order_id>/return")
@needs("operate")
def return_by_page(order_id: str) -> Response:
    """Take the return form of an order's page."""
    find_order(order_id)
    stock, reason = _stock(_field("stock", 20)), _field("reason", MAX_TEXT)
    _do("order.return", order_id, lambda: service.return_order(order_id, stock, reason), stock=stock)
    return _to_page(order_id)


def _cancel(order_id: str, reason: str) -> None:
    _do("order.cancel", order_id, lambda: service.cancel_order(order_id, _by(), caller().name, reason))


def _accept(order_id: str) -> None:
    _do("order.accept", order_id, lambda: service.accept_offer(order_id, _by()))


def _by() -> str:
    who = caller()
    return "customer" if who.customer_id is not None or not who.may("operate") else "operator"


def _refund(order_id: str, key: str, amount: int | None, reason: str) -> None:
    # What names a refund stands in subjects and keys, so it is made of letters and digits.
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    _do(
        "order.refund",
        order_id,
        lambda: service.refund_order(order_id, name, amount, reason),
        refund=name,
        minor=str(amount or "all that is left"),
    )


def _do(name: str, order_id: str, act: Callable[[], None], **detail: str) -> None:
    try:
        with recorded(name, order_id, **detail):
            act()
    except service.Refusal as refusal:
        raise Problem(_SLUGS[type(refusal)], str(refusal)) from None


def _accepted(order_id: str) -> Response:
    body = current_app.json.dumps(order_json(find_order(order_id), causes=caller().sees_causes))
    headers = {"Location": f"/api/orders/{quote(order_id, safe='')}"}
    return Response(f"{body}\n", 202, headers, mimetype="application/json")


def _to_page(order_id: str) -> Response:
    return see_other(f"/orders/{quote(order_id, safe='')}")


def _body() -> dict[str, Any]:
    if not request.get_data():
        return {}
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise of_flaws("malformed-request", [Flaw("body", "must be a JSON object, or left out.")])
    return body


def _text(body: dict[str, Any], name: str, longest: int) -> str:
    text = body.get(name, "")
    if not isinstance(text, str) or len(text) > longest:
        flaw = Flaw(name, f"must be text of {longest} characters at most.")
        raise of_flaws("malformed-request", [flaw])
    return text


def _stock(value: Any) -> str:
    if value not in _STOCKS:
        problem = f"must say what becomes of the goods: {' or '.join(_STOCKS)}."
        raise of_flaws("malformed-request", [Flaw("stock", problem)])
    return str(value)


def _field(name: str, longest: int) -> str:
    return request.form.get(name, "")[:longest]
