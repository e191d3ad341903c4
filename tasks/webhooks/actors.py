"""The actors of webhooks.

queue     actor                called by
webhooks  deliver_webhook      project_event, for each webhook that wants the event, and by `send again`
webhooks  send_failed_webhooks (no event: a person asks for all that failed)
webhooks  look_after_webhooks  (once an hour: secrets that an older TOKEN_KEY encrypts)
"""

from __future__ import annotations

import logging
from typing import Final

import dramatiq
from dramatiq.errors import BrokerError

from dramatiq_jetstream import Snooze
from tasks import app
from tasks.options import FINISH, step_options

from . import announcing, stores
from .subscriptions import SecretUnreadable

logger = logging.getLogger(__name__)

QUEUE: Final = "webhooks"

#: How many deliveries to the webhooks of one customer, or to one of an operator, run at a time.
AT_ONCE: Final = 2

_HOUR_MS: Final = 3_600_000
_DAY_MS: Final = 24 * _HOUR_MS


@dramatiq.actor(
    **{
        **step_options(QUEUE, FINISH),
        # However long the store is away, no delivery becomes a dead letter: it has a log of its own.
        "max_retries": None,
        # The request has a limit of its own; the rest is for the store.
        "time_limit": app.SETTINGS.webhook_timeout + 60_000,
    },
    concurrency=AT_ONCE,
    key="lane",
)
def deliver_webhook(lane: str, webhook_id: str, delivery_id: str, run: int) -> None:
    """Send a delivery to its receiver, again and again until it is accepted or given up."""
    del lane  # what the limit is for
    wait = stores.sender().run(webhook_id, delivery_id, run)
    if wait is not None:
        raise Snooze(delay=wait)


@dramatiq.actor(**{**step_options(QUEUE, FINISH), "time_limit": _HOUR_MS}, max_age=_DAY_MS)
def send_failed_webhooks(webhook_id: str, run: int) -> None:
    """Send every delivery of a webhook once more that failed before a run was asked for.

    Done again for the same run, it sends only what is left.
    """
    subscription = stores.subscriptions().find(webhook_id)
    if subscription is None or not subscription.is_active:
        return
    deliveries = stores.deliveries()
    failed = deliveries.failed(webhook_id, run)
    sent = announcing.send_failed(deliveries, subscription, failed, deliver_webhook.send, run, app.now)
    logger.info("Of webhook %s %d deliveries that had failed are sent again.", webhook_id, sent)


@dramatiq.actor(
    every=_HOUR_MS,
    max_age=_HOUR_MS,
    **{**step_options(QUEUE, FINISH), "max_retries": 0},
)
def look_after_webhooks() -> None:
    """Encrypt with the first key of TOKEN_KEY the secrets that an older one has encrypted."""
    try:
        done = stores.subscriptions().reseal()
    except (BrokerError, SecretUnreadable) as error:
        logger.warning("The secrets of webhooks are not encrypted with the newest key: %s", error)
        return
    if done:
        logger.info("The secrets of %d webhooks are encrypted with the newest key.", done)
