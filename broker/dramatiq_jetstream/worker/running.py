"""Which message the calling thread, or coroutine, is working on.

A JetStreamBroker notes it around its middleware and the actor, so that whoever asks (log lines, `current_event`) needs
no middleware of its own, which would cost something for every message.
"""

from __future__ import annotations

from contextvars import ContextVar

from dramatiq import MessageProxy

__all__ = ["running_message"]

running_message: ContextVar[MessageProxy | None] = ContextVar("dramatiq_jetstream_message", default=None)
