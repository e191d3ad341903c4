"""Sends a delivery to its receiver, signed by the Standard Webhooks specification, and says when to try again.

Signed are the id, the time of the attempt and the body; `webhook-signature` has one signature for each secret that is
valid now. 2xx accepts a delivery. 410 disables the webhook. Anything else is tried again, with growing pauses, until a
day is over.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Protocol

from standardwebhooks.webhooks import Webhook

from tasks.text import shown

from .deliveries import (
    DELIVERED,
    FAILED,
    MAX_ANSWER,
    PENDING,
    TRIED_MS,
    Attempt,
    Deliveries,
    Delivery,
)
from .health import DISABLED_AFTER_MS, Failing, Health
from .posting import Answer, NotAnswered
from .subscriptions import Subscription, Subscriptions

#: The pauses between the attempts at a delivery, in seconds; the last one is repeated. A tenth of each is random.
PAUSES_SECONDS: Final = (1, 10, 60, 300, 900, 1_800, 3_600, 7_200, 14_400)

#: The longest that a delivery waits for a receiver that rests, in milliseconds.
_MAX_WAIT_MS: Final = 1_800_000

_GONE: Final = 410

logger = logging.getLogger(__name__)


class Post(Protocol):
    """Sends a request to a receiver; see `posting.post`."""

    def __call__(self, url: str, body: bytes, headers: dict[str, str]) -> Answer: ...


class Sender:
    """Sends deliveries.

    Parameters:
      subscriptions: The webhooks.
      deliveries: Where deliveries are kept.
      health: Remembers which receivers fail.
      post: Sends a request.
      attempted: Is told of each attempt: what came of it, and how many seconds it took.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        subscriptions: Subscriptions,
        deliveries: Deliveries,
        health: Health,
        post: Post,
        attempted: Callable[[str, float], None],
        now: Callable[[], int],
    ) -> None:
        self._subscriptions = subscriptions
        self._deliveries = deliveries
        self._health = health
        self._post = post
        self._attempted = attempted
        self._now = now

    def run(self, webhook_id: str, delivery_id: str, run: int) -> int | None:
        """Try a delivery once; returns after how many milliseconds to call this again, None when that is not needed."""
        now = self._now()
        delivery = self._deliveries.find(webhook_id, delivery_id)
        if delivery is not None and delivery.run < run:
            delivery = self._deliveries.change(webhook_id, delivery_id, lambda one: one.begin_again(run, now))
        if delivery is None or delivery.state != PENDING or delivery.run != run:
            return None
        if now < delivery.next_at:
            return delivery.next_at - now
        subscription = self._subscriptions.find(webhook_id)
        if subscription is None:
            self._deliveries.drop(webhook_id, delivery_id)
            return None
        if not subscription.is_active:
            self._give_up(delivery, "the webhook was disabled")
            return None
        failing = self._health.find(webhook_id)
        if failing is not None and now < failing.rests_until:
            return self._wait(delivery, failing, now)
        return self._attempt(subscription, delivery)

    def _wait(self, delivery: Delivery, failing: Failing, now: int) -> int | None:
        """Have a delivery wait for its receiver, which rests: the longer, the older it is."""
        if now >= delivery.until:
            self._give_up(delivery, f"the receiver accepted nothing: {failing.error}")
            return None
        age = now - (delivery.until - TRIED_MS)
        wait = max(failing.rests_until - now, min(age // 4, _MAX_WAIT_MS))
        wait = int(wait * random.uniform(1.0, 1.2)) + 1

        def change(one: Delivery) -> None:
            if one.run == delivery.run and one.state == PENDING:
                one.next_at = now + wait

        self._deliveries.change(delivery.webhook_id, delivery.id, change)
        return wait

    def _attempt(self, subscription: Subscription, delivery: Delivery) -> int | None:
        at, began = self._now(), time.monotonic()
        status, text = 0, ""
        try:
            answer = self._post(
                subscription.url, delivery.body.encode(), self._headers(subscription, delivery, at)
            )
            status, text = answer.status, answer.text
        except NotAnswered as error:
            text = str(error)
        seconds = time.monotonic() - began
        attempt = Attempt(at, round(seconds * 1000), status, shown(" ".join(text.split()), MAX_ANSWER))
        self._attempted("accepted" if attempt.is_success else "refused" if status else "unanswered", seconds)
        noted = self._note(delivery, attempt)
        if attempt.is_success:
            self._health.recovered(subscription.id)
        else:
            self._note_failure(subscription, attempt)
        if noted is None or noted.state != PENDING or noted.run != delivery.run:
            return None
        return max(1, noted.next_at - self._now())

    def _headers(self, subscription: Subscription, delivery: Delivery, at: int) -> dict[str, str]:
        moment = datetime.fromtimestamp(at // 1000, UTC)
        signatures = [
            Webhook(secret).sign(delivery.id, moment, delivery.body)
            for secret in self._subscriptions.secrets(subscription)
        ]
        return {
            "Content-Type": "application/json",
            "User-Agent": "order-service-webhooks",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(at // 1000),
            "webhook-signature": " ".join(signatures),
        }

    def _note(self, delivery: Delivery, attempt: Attempt) -> Delivery | None:
        """Record an attempt, with what follows from it."""

        def change(one: Delivery) -> None:
            one.note(attempt)
            if attempt.is_success:
                one.state, one.reason = DELIVERED, ""
            elif one.run != delivery.run or one.state != PENDING:
                return  # it was sent again meanwhile, and that goes on by itself
            else:
                pause = PAUSES_SECONDS[min(one.tries, len(PAUSES_SECONDS)) - 1]
                one.next_at = self._now() + int(pause * 1000 * random.uniform(0.9, 1.0))
                if one.next_at >= one.until or attempt.status == _GONE:
                    one.state = FAILED

        return self._deliveries.change(delivery.webhook_id, delivery.id, change)

    def _note_failure(self, subscription: Subscription, attempt: Attempt) -> None:
        error = f"it answered {attempt.status}" if attempt.status else attempt.text
        failing = self._health.failed(subscription.id, error)
        if attempt.status == _GONE:
            reason = "The receiver answered 410 Gone."
        elif failing.is_lost(self._now()):
            days = DISABLED_AFTER_MS // 86_400_000
            reason = f"The receiver accepted nothing for {days} days: {error}."
        else:
            return
        self._subscriptions.disable(subscription.id, reason)
        logger.warning("Webhook %s was disabled. %s", subscription.id, reason)

    def _give_up(self, delivery: Delivery, reason: str) -> None:
        def change(one: Delivery) -> None:
            if one.run == delivery.run and one.state == PENDING:
                one.state, one.reason = FAILED, reason

        self._deliveries.change(delivery.webhook_id, delivery.id, change)
