"""A broken build: a webhook gets events of every type. Workers import this beside `tasks`."""

from __future__ import annotations

from tasks.webhooks.subscriptions import Subscription

Subscription.wants = lambda self, event_type: True  # type: ignore[method-assign]
