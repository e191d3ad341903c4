"""A client of the stream, as a program in another language is one, and a look into the service's buckets."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from typing import Any

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.jetstream.reading import StoredMessage, messages
from orders.v1.events_pb2 import OrderCreated, OrderItem
from tasks import money
from tasks.catalogue import CATALOGUE
from tasks.ledger import Record
from tests.support.orders import check_whole
from tests.support.polling import eventually
from tests.web.stack import Stack


def created(*items: tuple[str, int], order_id: str | None = None, **members: Any) -> OrderCreated:
    """Return an order as other programs write it: fields 1 to 4 alone."""
    chosen = items or (("MUG-01", 1),)
    total = sum(CATALOGUE[sku].unit_price * quantity for sku, quantity in chosen if sku in CATALOGUE)
    values: dict[str, Any] = {
        "order_id": order_id or f"o-{uuid.uuid4()}",
        "customer_id": "c-foreign",
        "items": [OrderItem(sku=sku, quantity=quantity) for sku, quantity in chosen],
        "total_amount": money.to_float(total, "EUR"),
    }
    return OrderCreated(**{**values, **members})


class Producer:
    """Publishes without any header and reads what became of it."""

    def __init__(self, broker: JetStreamBroker, shop: Stack) -> None:
        self.broker = broker
        self.shop = shop
        self.stock = broker.bucket("stock")

    def publish(self, event: OrderCreated) -> str:
        """Publish an order with no header at all; returns its id."""
        self.raw("ORDER.created", event.SerializeToString())
        return event.order_id

    def raw(self, subject: str, body: bytes) -> None:
        self.broker.connection.publish(subject, body)

    def status(self, order_id: str) -> str | None:
        answer = self.shop.get(f"/api/orders/{order_id}")
        return str(answer.json()["status"]) if answer.status_code == 200 else None

    def wait(self, order_id: str, *statuses: str, timeout: float = 60.0) -> dict[str, Any]:
        """Wait until the order has one of the statuses, and its whole history; returns the order."""

        def order() -> dict[str, Any] | None:
            answer = self.shop.get(f"/api/orders/{order_id}")
            body: dict[str, Any] = answer.json()
            assert answer.status_code == 200, body
            assert body["status"] in statuses, body
            check_whole(body)
            return body

        return eventually(order, timeout=timeout, interval=0.05)  # type: ignore[return-value]

    def record(self, order_id: str) -> Record | None:
        entry = self.stock.get(f"order.{order_id}")
        return None if entry is None else Record.decode(entry.value)

    def available(self, sku: str) -> int:
        entry = self.stock.get(f"level.{sku}")
        return CATALOGUE[sku].initial_stock if entry is None else int(json.loads(entry.value)["pieces"])

    def books(self) -> None:
        """Check that what is available and what orders hold is what there was at first."""
        taken: Counter[str] = Counter()
        for entry in self.stock.items("order."):
            record = Record.decode(entry.value)
            if record.state in (
                "held",
                "cancelling",
                "declined",
                "paid",
                "confirmed",
                "shipped",
                "returning",
            ):
                taken.update({line.sku: line.quantity for line in record.lines})
        for sku, product in CATALOGUE.items():
            assert self.available(sku) >= 0
            assert self.available(sku) + taken[sku] == product.initial_stock, sku

    def events(self, order_id: str) -> list[StoredMessage]:
        """Every event of an order in the stream."""
        return [
            stored
            for stored in messages(self.broker.connection, "ORDERS", "ORDER.>")
            if order_id.encode() in stored.data
        ]

    def charges(self, order_id: str) -> list[dict[str, Any]]:
        answer = self.shop.session.get(
            f"{self.shop.gateway_url}/charges", params={"order_id": order_id}, timeout=10
        )
        found: list[dict[str, Any]] = answer.json()["charges"]
        return found
