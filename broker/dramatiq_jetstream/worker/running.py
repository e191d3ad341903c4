"""Which message the calling thread, or coroutine, is working on.

A JetStreamBroker notes it around its middleware and the actor, so that log lines and `current_event` need
no middleware of its own, which would cost something for every message.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar

from dramatiq import MessageProxy

__all__ = ["is_abort", "running_message"]

running_message: ContextVar[MessageProxy | None] = ContextVar("dramatiq_jetstream_message", default=None)


def is_abort(error: BaseException | None) -> bool:
    """Whether `dramatiq_abort` interrupted an actor: its message is not wanted any more."""
    abort = sys.modules.get("dramatiq_abort")
    return abort is not None and isinstance(error, abort.Abort)
