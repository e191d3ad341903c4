"""The bound of accepting orders: a Flask endpoint that stores one message made beforehand, and does nothing else."""

from __future__ import annotations

import itertools
import os

from flask import Flask, Response, jsonify, request

from dramatiq_jetstream.connection import Connection, ConnectOptions
from tasks.events import STREAM, SUBJECTS

HEADERS = {
    "ce-specversion": "1.0",
    "ce-id": "0" * 36,
    "ce-type": "orders.v1.OrderCreated",
    "ce-source": "/orders",
    "ce-subject": "0" * 36,
    "ce-time": "2026-01-01T00:00:00.000Z",
    "content-type": "application/protobuf",
}
PAYLOAD = b"0" * 120


def create_app() -> Flask:
    app = Flask("publishing")
    connection = Connection(ConnectOptions.of(os.environ["NATS_URL"]))
    numbers = itertools.count()

    @app.post("/api/orders")
    def place_order() -> Response:
        """Stores about as much as the order service does, under an id of its own."""
        request.get_data()
        event_id = f"{os.getpid()}.{next(numbers)}"
        connection.publish("ORDER.created", PAYLOAD, {**HEADERS, "Nats-Msg-Id": event_id})
        answer = jsonify(order_id="0" * 26, status="accepted", customer_id="c-42", items=[], history=[])
        answer.status_code = 202
        return answer

    @app.get("/health")
    def health() -> Response:
        """Makes the stream, which is there when the first order comes."""
        connection.api(f"STREAM.CREATE.{STREAM}", {"name": STREAM, "subjects": [SUBJECTS], "storage": "file"})
        return jsonify(status="ok")

    return app
