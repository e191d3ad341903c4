"""The webhooks put together, as the front end and the actors use them."""

from __future__ import annotations

from functools import cache, partial

from dramatiq_jetstream.kv import Bucket
from tasks import app, metrics
from tasks.model import Order

from . import announcing
from .announcing import Announcer
from .deliveries import Deliveries, Delivery
from .health import Health
from .posting import post
from .sending import Sender
from .subscriptions import Directory, Subscription, Subscriptions

__all__ = [
    "announcer",
    "deliveries",
    "deliveries_of",
    "health",
    "send_again",
    "send_failed",
    "sender",
    "subscriptions",
]


def _bucket() -> Bucket:
    return app.webhooks_bucket()


@cache
def subscriptions() -> Subscriptions:
    """Return the webhooks."""
    return Subscriptions(_bucket(), app.SETTINGS.token_keys, app.SETTINGS.webhook_networks, app.now)


def directory() -> Directory:
    """Return the webhooks as this process knows them."""
    return subscriptions().directory


@cache
def health() -> Health:
    """Return what remembers which receivers fail."""
    return Health(_bucket(), app.now)


@cache
def deliveries() -> Deliveries:
    """Return the log of deliveries."""
    bucket = app.deliveries_bucket()
    if app.SETTINGS.declare:
        bucket.declare()  # what reads its stream does not make it
    return Deliveries(bucket, bucket.name, app.broker.stream(bucket.stream))


@cache
def sender() -> Sender:
    """Return what sends deliveries."""
    return Sender(
        subscriptions(),
        deliveries(),
        health(),
        partial(post, allowed=app.SETTINGS.webhook_networks, seconds=app.SETTINGS.webhook_timeout / 1000),
        lambda outcome, seconds: metrics.webhooks.labels(outcome).observe(seconds),
        app.now,
    )


@cache
def announcer() -> Announcer:
    """Return what makes the deliveries of an event."""
    return Announcer(
        app.stock_store(), app.catalogue(), directory(), deliveries(), app.orders_store().get, _send, app.now
    )


def send_again(subscription: Subscription, delivery_id: str) -> Delivery | None:
    """Send a delivery once more, whatever came of it; returns it, None when there is none."""
    return announcing.send_again(deliveries(), subscription, delivery_id, _send, app.now())


def send_failed(webhook_id: str, run: int) -> int:
    """Send every delivery of a webhook once more that failed before a run was asked for; returns how many those are.

    Done again for the same run, it sends only what is left.
    """
    subscription = subscriptions().find(webhook_id)
    if subscription is None or not subscription.is_active:
        return 0
    failed = deliveries().failed(webhook_id, run)
    return announcing.send_failed(deliveries(), subscription, failed, _send, run, app.now)


def deliveries_of(order: Order, customer_id: str | None) -> list[Delivery]:
    """Return the deliveries of an order's events, as far as someone may see them.

    Parameters:
      customer_id: Whose webhooks they may see; None for those of operators and of the order's customer.
    """
    owners = {customer_id} if customer_id is not None else {None, order.customer_id}
    shown = {one.id for one in directory().refresh() if one.customer_id in owners}
    return deliveries().of_order(shown, order.order_id) if shown else []


def _send(lane: str, webhook_id: str, delivery_id: str, run: int) -> None:
    from .actors import deliver_webhook

    deliver_webhook.send(lane, webhook_id, delivery_id, run)
