"""A Dramatiq broker on NATS JetStream."""

from __future__ import annotations

from .broker import JetStreamBroker
from .sending.composition import group

__all__ = ["JetStreamBroker", "__version__", "group"]

__version__ = "0.1.0"
