"""What operators see of a message's arguments: which order, and never who ordered or how they pay."""

from __future__ import annotations

import time
from typing import Any

import pytest
from dramatiq import Message, MessageProxy

from dramatiq_jetstream.events import Event
from orders.v1.events_pb2 import OrderCreated, OrderItem, OrderPaid
from tasks import app
from tasks.actors import Received
from tasks.events import TYPES, Happened

SECRETS = ("tok_visa_of_mine", "Ada Lovelace")
CREATED = OrderCreated(
    order_id="o-1",
    customer_id=SECRETS[1],
    items=[OrderItem(sku="MUG-01", quantity=1)],
    payment_token=SECRETS[0],
)


def shown(*arguments: Any, **named: Any) -> str:
    proxy = MessageProxy(Message("orders", "step", (), named, {}))
    proxy._message = proxy._message.copy(args=arguments)
    return app.broker.describe_arguments(proxy)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (CREATED, "created of order o-1"),
        (OrderPaid(order_id="x" * 900_000), f"paid of order {'x' * 63}…"),
        (Received(Happened(CREATED, 7, 0), time.monotonic()), "created of order o-1"),
        (
            Event("ORDER.created", CREATED.SerializeToString(), stream="ORDERS", sequence=7),
            "ORDER.created at 7",
        ),
        ("o-1", "'o-1'"),
        (None, "None"),
        (CREATED.SerializeToString(), "bytes"),
        ({"token": SECRETS[0]}, "dict"),
    ],
)
def test_an_argument_as_operators_see_it(argument: Any, text: str) -> None:
    """An event is named by its kind and its order."""
    for said in (shown(argument), shown(named=argument)):
        assert said == text
        assert not any(secret in said for secret in SECRETS)


def test_every_event_can_be_described() -> None:
    """Of each type, also one that names no order."""
    for name, kind in TYPES.items():
        assert shown(kind()) == f"{name} of order "
