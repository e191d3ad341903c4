"""Cancels and refunds orders: the API and the buttons on an order's page.

Both only request it. The request is stored, and the order shows it, before they answer; a worker carries it out.
"""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Response, current_app, request

from tasks import service
from tasks.model import MAX_TEXT, Flaw
from tasks.numbers import whole_number
from tasks.service import Order
from web.access import caller, needs
from web.acts import recorded
from web.api import find_order, idempotency_key, read_key
from web.problems import Problem, of_flaws
from web.rendering import see_other
from web.representation import order_json

blueprint = Blueprint("compensation", __name__)


@blueprint.post("/api/orders/<path:order_id>/cancel")
@needs("order")
def cancel_order(order_id: str) -> Response:
    """Request that an order is cancelled, then answer 202."""
    _cancel(find_order(order_id), _reason(_body()))
    return _accepted(order_id)


@blueprint.post("/api/orders/<path:order_id>/refunds")
@needs("operate")
def refund_order(order_id: str) -> Response:
    """Request that a part of a charge, or all of it, goes back, then answer 202."""
    order = find_order(order_id)
    key, flaw = read_key()
    if key is None:
        missing = Flaw("Idempotency-Key", "must name this refund, so that it is made once.")
        raise of_flaws("malformed-request", [flaw or missing])
    body = _body()
    amount = body.get("amount_minor")
    if amount is not None and (isinstance(amount, bool) or not isinstance(amount, int) or amount < 1):
        wrong = Flaw("amount_minor", "must be a whole number of minor units, 1 or more, or left out.")
        raise of_flaws("malformed-request", [wrong])
    _refund(order, idempotency_key(key), amount, _reason(body))
    return _accepted(order_id)


@blueprint.post("/orders/<path:order_id>/cancel")
@needs("order")
def cancel_by_page(order_id: str) -> Response:
    """Take the button of an order's page."""
    _cancel(find_order(order_id), request.form.get("reason", "")[:MAX_TEXT])
    return see_other(f"/orders/{quote(order_id, safe='')}")


@blueprint.post("/orders/<path:order_id>/refund")
@needs("operate")
def refund_by_page(order_id: str) -> Response:
    """Take the refund form of an order's page; a form that is sent twice refunds once."""
    order = find_order(order_id)
    text = request.form.get("amount_minor", "").strip()
    amount = whole_number(text, 1, 2**53) if text else None
    if text and amount is None:
        raise of_flaws("malformed-request", [Flaw("amount_minor", "must be a whole number of cents.")])
    key = idempotency_key(f"form-{request.form.get('submission', '')[:64]}")
    _refund(order, key, amount, request.form.get("reason", "")[:MAX_TEXT])
    return see_other(f"/orders/{quote(order_id, safe='')}")


def _cancel(order: Order, reason: str) -> None:
    who = caller()
    by = "customer" if who.customer_id is not None or not who.may("operate") else "operator"
    try:
        with recorded("order.cancel", order.order_id):
            service.cancel_order(order.order_id, by, who.name, reason)
    except service.NotCancellable as error:
        raise Problem("not-cancellable", str(error)) from None


def _refund(order: Order, key: str, amount: int | None, reason: str) -> None:
    # What names a refund stands in subjects and keys, so it is made of letters and digits.
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    try:
        with recorded("order.refund", order.order_id, refund=name, minor=str(amount or "all that is left")):
            service.refund_order(order.order_id, name, amount, reason)
    except service.NotRefundable as error:
        raise Problem("not-refundable", str(error)) from None


def _accepted(order_id: str) -> Response:
    body = current_app.json.dumps(order_json(find_order(order_id), causes=caller().sees_causes))
    headers = {"Location": f"/api/orders/{quote(order_id, safe='')}"}
    return Response(f"{body}\n", 202, headers, mimetype="application/json")


def _body() -> dict[str, Any]:
    if not request.get_data():
        return {}
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise of_flaws("malformed-request", [Flaw("body", "must be a JSON object, or left out.")])
    return body


def _reason(body: dict[str, Any]) -> str:
    reason = body.get("reason", "")
    if not isinstance(reason, str) or len(reason) > MAX_TEXT:
        raise of_flaws(
            "malformed-request", [Flaw("reason", f"must be text of {MAX_TEXT} characters at most.")]
        )
    return reason
