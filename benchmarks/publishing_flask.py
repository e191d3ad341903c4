"""The bound of accepting orders: the empty Flask endpoint, which stores one message made beforehand."""

from __future__ import annotations

import itertools
import os

from flask import Flask

from benchmarks import empty_flask
from dramatiq_jetstream.wire.connection import Connection, ConnectOptions
from orders.v1.events_pb2 import OrderCreated
from tasks.events import STREAM, SUBJECTS, headers, subject_of

EVENT = OrderCreated(order_id="0" * 36)
HEADERS = headers(EVENT, event_id="0" * 36, at=0)
PAYLOAD = b"0" * 120  # about as much as an order of two products has


def create_app() -> Flask:
    connection = Connection(ConnectOptions.of(os.environ["NATS_URL"]))
    connection.api(f"STREAM.CREATE.{STREAM}", {"name": STREAM, "subjects": [SUBJECTS], "storage": "file"})
    subject = subject_of(EVENT)
    numbers = itertools.count()

    def store() -> None:
        """Stores the message under an id of its own."""
        connection.publish(subject, PAYLOAD, {**HEADERS, "Nats-Msg-Id": f"{os.getpid()}.{next(numbers)}"})

    return empty_flask.create_app(store)
