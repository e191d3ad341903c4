"""The front end: `gunicorn "benchmarks.contenders.flask_celery_postgres.web:create_app()"`.

An order is answered with 202 when it is in PostgreSQL, with its first task in the outbox.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from typing import Any

from flask import Flask, Response, jsonify, request

from benchmarks.contenders.flask_celery_postgres.store import Row, Store

CURRENCY = "EUR"
MAX_LINES, MAX_QUANTITY, MAX_TEXT = 100, 1_000, 255


class Invalid(ValueError):
    """What is wrong with a request, in one sentence."""


def create_app() -> Flask:
    app = Flask("orders")
    app.json.sort_keys = False  # type: ignore[attr-defined]
    store = Store(int(os.environ["WEB_THREADS"]))
    products = store.products()

    @app.post("/api/orders")
    def place_order() -> tuple[Response, int, dict[str, str]]:
        order = _order(request.get_json(), request.headers.get("Idempotency-Key"), products)
        placed = store.place(order)
        if placed.repeated and bytes(placed.order["request_digest"]) != order["request_digest"]:
            raise Invalid("the Idempotency-Key was used for another order.")
        headers = {"Location": f"/api/orders/{placed.order['id']}"}
        if placed.repeated:
            headers["Idempotency-Replayed"] = "true"
        return jsonify(_shown(placed.order)), 202, headers

    @app.get("/api/orders/<uuid:order_id>")
    def show_order(order_id: uuid.UUID) -> Response | tuple[Response, int]:
        order = store.find(str(order_id))
        if order is None:
            return jsonify(title="There is no such order."), 404
        history = [
            {"status": row["status"], "at": row["at"].isoformat()} for row in store.history(str(order_id))
        ]
        return jsonify(_shown(order), history=history)

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok" if store.is_well() else "ill")

    @app.errorhandler(Invalid)
    def invalid(error: Invalid) -> tuple[Response, int]:
        return jsonify(title="The order is not valid.", detail=str(error)), 422

    return app


def _order(body: Any, key: str | None, products: dict[str, Row]) -> Row:
    """Check and price an order; raises Invalid."""
    if not isinstance(body, dict):
        raise Invalid("the body must be a JSON object.")
    customer, items = body.get("customer_id"), body.get("items")
    token = body.get("payment_token", "tok_visa")
    if not isinstance(customer, str) or not 0 < len(customer) <= MAX_TEXT:
        raise Invalid(f"customer_id must be text of 1 to {MAX_TEXT} characters.")
    if not isinstance(token, str) or not 0 < len(token) <= MAX_TEXT:
        raise Invalid(f"payment_token must be text of 1 to {MAX_TEXT} characters.")
    if key is not None and not 0 < len(key) <= MAX_TEXT:
        raise Invalid(f"Idempotency-Key must have 1 to {MAX_TEXT} characters.")
    if not isinstance(items, list) or not 0 < len(items) <= MAX_LINES:
        raise Invalid(f"items must be a list of 1 to {MAX_LINES} items.")
    wanted: dict[str, int] = {}
    for item in items:
        sku, quantity = (item.get("sku"), item.get("quantity")) if isinstance(item, dict) else (None, None)
        if sku not in products:
            raise Invalid(f"there is no product {sku!r}.")
        if isinstance(quantity, bool) or not isinstance(quantity, int) or not 0 < quantity <= MAX_QUANTITY:
            raise Invalid(f"quantity must be a whole number from 1 to {MAX_QUANTITY}.")
        wanted[sku] = wanted.get(sku, 0) + quantity
    lines = [
        {
            "sku": sku,
            "name": products[sku]["name"],
            "quantity": quantity,
            "unit_price": products[sku]["unit_price"],
        }
        for sku, quantity in wanted.items()
    ]
    asked = json.dumps([customer, sorted(wanted.items()), token]).encode()
    return {
        "id": uuid.uuid4(),
        "customer_id": customer,
        "idempotency_key": key,
        "request_digest": hashlib.sha256(asked).digest(),
        "lines": lines,
        "total": sum(line["quantity"] * line["unit_price"] for line in lines),
        "currency": CURRENCY,
        "payment_token": token,
    }


def _shown(order: Row) -> Row:
    return {
        "order_id": str(order["id"]),
        "status": order["status"],
        "customer_id": order["customer_id"],
        "items": order["lines"],
        "total": order["total"],
        "currency": order["currency"],
        "placed_at": order["placed_at"].isoformat(),
        "reason": order["reason"],
    }
