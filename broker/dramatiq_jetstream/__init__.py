"""A Dramatiq broker on NATS JetStream."""

from __future__ import annotations

from .broker import JetStreamBroker
from .limits import Snooze
from .sending.composition import group

__all__ = ["JetStreamBroker", "Snooze", "__version__", "group"]

__version__ = "0.1.0"
