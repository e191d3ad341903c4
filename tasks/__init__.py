"""The order service: `fleet work tasks` runs its actors. Importing this sets Dramatiq's broker."""

from __future__ import annotations

from . import actors
from .app import broker
from .webhooks import actors as webhook_actors

__all__ = ["actors", "broker", "webhook_actors"]
