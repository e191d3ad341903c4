"""The webhooks as the front end and the saga's actors use them."""

from __future__ import annotations

from functools import cache

from tasks import app
from tasks.model import Order

from . import announcing
from .actors import deliver_webhook
from .announcing import Announcer
from .deliveries import Delivery
from .stores import deliveries, directory, health, subscriptions
from .subscriptions import Subscription

__all__ = ["announcer", "deliveries", "deliveries_of", "health", "send_again", "subscriptions"]


@cache
def announcer() -> Announcer:
    """Return what makes the deliveries of an event."""
    return Announcer(
        app.stock_store(),
        app.catalogue(),
        directory(),
        deliveries(),
        app.orders_store().get,
        deliver_webhook.send,
        app.now,
    )


def send_again(subscription: Subscription, delivery_id: str) -> Delivery | None:
    """Send a delivery once more, whatever came of it; returns it, None when there is none."""
    return announcing.send_again(deliveries(), subscription, delivery_id, deliver_webhook.send, app.now())


def deliveries_of(order: Order, customer_id: str | None) -> list[Delivery]:
    """Return the deliveries of an order's events, as far as someone may see them.

    Parameters:
      customer_id: Whose webhooks they may see; None for those of operators and of the order's customer.
    """
    owners = {customer_id} if customer_id is not None else {None, order.customer_id}
    shown = {one.id for one in directory().refresh() if one.customer_id in owners}
    return deliveries().of_order(shown, order.order_id) if shown else []
