"""What the tests of events share: an order, an actor that notes its events, a program that knows nothing of us."""

from __future__ import annotations

from typing import Any

import dramatiq

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.events import subscription
from orders.v1.events_pb2 import OrderCreated


def order(order_id: str = "o-1", **fields: Any) -> OrderCreated:
    return OrderCreated(order_id=order_id, customer_id="c-1", **fields)


def subscribe(
    broker: JetStreamBroker, subject: str, type_: Any = bytes, *, name: str = "handle", **options: Any
) -> list[Any]:
    """An actor that notes the events that it receives."""
    seen: list[Any] = []
    dramatiq.actor(
        seen.append, broker=broker, actor_name=name, subscribe=subscription(subject, type_), **options
    )
    return seen


def publish_raw(
    broker: JetStreamBroker, subject: str, data: bytes, headers: dict[str, str] | None = None
) -> None:
    """Publish as a program in another language does, which knows nothing of us."""
    broker.setup()
    broker.connection.send(subject, data, headers)
