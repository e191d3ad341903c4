"""The bound of the front end: a Flask endpoint that does nothing, for the same gunicorn settings."""

from __future__ import annotations

from collections.abc import Callable

from flask import Flask, Response, jsonify, request


def nothing() -> None:
    """What the endpoint does with an order."""


def create_app(store: Callable[[], object] = nothing) -> Flask:
    app = Flask("empty")

    @app.post("/api/orders")
    def place_order() -> Response:
        """Reads the body and answers about as much as the order service does."""
        request.get_data()
        store()
        answer = jsonify(order_id="0" * 26, status="accepted", customer_id="c-42", items=[], history=[])
        answer.status_code = 202
        return answer

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok")

    return app
