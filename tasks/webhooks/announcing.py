"""Makes the deliveries of an event: one for each webhook that wants it, in the ledger's words; and sends them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from google.protobuf.message import Message

from orders.v1.events_pb2 import OrderCreated, OrderOffered
from tasks.announcements import Testimony
from tasks.claims import Claim, customer_of
from tasks.events import Happened, isoformat, key_of, name_of, order_id_of
from tasks.ledger import Record
from tasks.model import Order
from tasks.orders import with_event
from tasks.products import Catalogue
from tasks.stock import Stock

from .deliveries import PENDING, TRIED_MS, Deliveries, Delivery, delivery_id
from .subscriptions import Directory, Subscription

#: A webhook gets events that are up to this many milliseconds older than it, because clocks differ.
_CLOCKS_MS: Final = 60_000


class Send(Protocol):
    """Has a delivery sent by a worker. Of those with the same `lane`, a few run at a time."""

    def __call__(self, lane: str, webhook_id: str, delivery_id: str, run: int) -> object: ...


class Announcer:
    """Tells webhooks of events.

    Parameters:
      stock: The ledger.
      catalogue: The products and their prices.
      directory: The webhooks.
      deliveries: Where deliveries are kept.
      find_order: Returns an order of the read model.
      send: Has a delivery sent.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        stock: Stock,
        catalogue: Catalogue,
        directory: Directory,
        deliveries: Deliveries,
        find_order: Callable[[str], Order | None],
        send: Send,
        now: Callable[[], int],
    ) -> None:
        self._stock = stock
        self._catalogue = catalogue
        self._directory = directory
        self._deliveries = deliveries
        self._find_order = find_order
        self._send = send
        self._now = now

    def announce(self, happened: Happened, received_at: float | None = None) -> int:
        """Make the deliveries of an event and have them sent; returns how many were made or found unsent.

        A webhook that was there before the event gets it, because the webhooks were read after the event was stored.

        Parameters:
          received_at: A moment at which this process had the event, by `time.monotonic`; None for now.
        """
        event_type = f"order.{name_of(happened.event)}"
        webhooks = self._directory.refresh(received_at)
        wanting = [one for one in webhooks if one.is_active and one.wants(event_type)]
        if not wanting:
            return 0
        order_id = order_id_of(happened.event)
        testimony = Testimony(self._stock, order_id, self._now)
        confirmed = testimony.attested(happened, self._catalogue)
        if confirmed is None:
            return 0
        customer_id = self._customer(order_id, testimony.claim, confirmed.event)
        at = _time_of(confirmed)
        # What the order is, at the time of the event: what was ordered of it, or was accepted.
        is_open = isinstance(confirmed.event, OrderCreated | OrderOffered)
        contents = testimony.claim if is_open else testimony.accepted or testimony.claim
        told = 0
        for one in wanting:
            if one.customer_id not in (None, customer_id) or at < one.created_at - _CLOCKS_MS:
                continue
            made = self._deliveries.create(self._delivery(one, confirmed, customer_id, contents, at))
            # One that was tried has its message; of one that was not, that is not known.
            if made.state == PENDING and not made.attempts and made.next_at == 0:
                self._send(lane_of(one), one.id, made.id, made.run)
                told += 1
        return told

    def _customer(self, order_id: str, claim: Claim | None, event: Message) -> str | None:
        """Return whose order it is, None when only an order that breaks the rules could say so."""
        if claim is not None and claim.customer_id:
            return claim.customer_id
        if isinstance(event, OrderCreated):
            return customer_of(event)
        order = self._find_order(order_id)
        return None if order is None else order.customer_id or None

    def _delivery(
        self,
        one: Subscription,
        confirmed: Happened,
        customer_id: str | None,
        contents: Claim | Record | None,
        at: int,
    ) -> Delivery:
        event = confirmed.event
        order_id, key = order_id_of(event), key_of(event)
        fact = with_event(None, confirmed)["events"][key]
        detail = {name: value for name, value in fact.items() if name not in ("sequence", "at")}
        if one.customer_id is not None and name_of(event) == "failed":
            detail.pop("reason", None)  # of what a step failed technically is for operators
        data: dict[str, Any] = {"order_id": order_id, "customer_id": customer_id, "detail": detail}
        if contents is not None and contents.lines:
            data["items"] = [
                {"sku": line.sku, "quantity": line.quantity, "unit_price_minor": line.unit_price}
                for line in contents.lines
            ]
            data |= {"total_minor": contents.total, "currency": contents.currency}
        if isinstance(event, OrderOffered):
            data["offer"] = [
                {
                    "sku": item.sku,
                    "name": item.name,
                    "ordered": item.ordered,
                    "quantity": item.quantity,
                    "unit_price_minor": item.unit_price_minor,
                }
                for item in event.items
            ]
        event_type = f"order.{name_of(event)}"
        body = {"type": event_type, "timestamp": isoformat(at), "data": data}
        return Delivery(
            id=delivery_id(one.id, order_id, key),
            webhook_id=one.id,
            order_id=order_id,
            type=event_type,
            at=at,
            body=json.dumps(body, separators=(",", ":")),
            until=self._now() + TRIED_MS,
        )


def send_again(
    deliveries: Deliveries, subscription: Subscription, delivery_id: str, send: Send, now: int
) -> Delivery | None:
    """Send a delivery once more, whatever came of it; returns it, None when there is none.

    The message is stored first, and begins the run if this ends before it does.
    """
    delivery = deliveries.find(subscription.id, delivery_id)
    if delivery is None:
        return None
    run = max(delivery.run + 1, now)
    send(lane_of(subscription), subscription.id, delivery_id, run)
    return deliveries.change(subscription.id, delivery_id, lambda one: one.begin_again(run, now))


def send_failed(
    deliveries: Deliveries,
    subscription: Subscription,
    failed: Iterable[Delivery],
    send: Send,
    run: int,
    now: Callable[[], int],
) -> int:
    """Send deliveries once more in one run; returns how many. A message is stored first, as in `send_again`."""
    sent = 0
    for delivery in failed:
        send(lane_of(subscription), subscription.id, delivery.id, run)
        deliveries.change(subscription.id, delivery.id, lambda one: one.begin_again(run, now()))
        sent += 1
    return sent


def lane_of(subscription: Subscription) -> str:
    """Return what a webhook shares its turns with: the others of its customer, or nothing."""
    if subscription.customer_id is None:
        return subscription.id
    return hashlib.sha256(subscription.customer_id.encode()).hexdigest()[:20]


def _time_of(confirmed: Happened) -> int:
    """Return when an event happened, by the ledger, or else when it was stored."""
    event = confirmed.event
    at: int = getattr(event, f"{name_of(event)}_at").ToMilliseconds()
    return at or confirmed.at
