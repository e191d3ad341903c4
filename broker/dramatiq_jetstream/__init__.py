"""A Dramatiq broker on NATS JetStream."""

from __future__ import annotations

from .batches import group
from .broker import JetStreamBroker

__all__ = ["JetStreamBroker", "group"]
