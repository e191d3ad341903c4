"""What keeps and sends webhooks, made once in each process."""

from __future__ import annotations

from functools import cache, partial

from tasks import app, metrics

from .deliveries import Deliveries
from .health import Health
from .posting import post
from .sending import Sender
from .subscriptions import Directory, Subscriptions


@cache
def subscriptions() -> Subscriptions:
    """Return the webhooks."""
    return Subscriptions(
        app.webhooks_bucket(), app.SETTINGS.token_keys, app.SETTINGS.webhook_networks, app.now
    )


def directory() -> Directory:
    """Return the webhooks as this process knows them."""
    return subscriptions().directory


@cache
def health() -> Health:
    """Return what remembers which receivers fail."""
    return Health(app.webhooks_bucket(), app.now)


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
