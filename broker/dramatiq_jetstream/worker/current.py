"""The message that the calling thread, or coroutine, runs.

A JetStreamBroker notes it around its middleware and the actor, so that log lines and `current_event` need
no middleware of its own, which would cost something for every message.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from dramatiq import MessageProxy

__all__ = ["current_message", "is_abort", "is_abortable", "note_said", "said_of"]

#: Characters of what an actor notes with its progress that people see of a running message.
MAX_NOTE = 200

current_message: ContextVar[MessageProxy | None] = ContextVar("dramatiq_jetstream_message", default=None)


def note_said(said: Mapping[str, Any]) -> None:
    """Keep a progress report of the running actor with its message, for the presence of its worker."""
    message = current_message.get()
    if message is not None:
        vars(message)["progress_said"] = {**said, "note": str(said["note"])[:MAX_NOTE]}


def said_of(message: MessageProxy) -> dict[str, Any] | None:
    """The last progress report of a running message's actor."""
    said: dict[str, Any] | None = vars(message).get("progress_said")
    return said


def is_abort(error: BaseException | None) -> bool:
    """Whether `dramatiq_abort` interrupted an actor, so that its message must not run again."""
    abort = sys.modules.get("dramatiq_abort")
    return abort is not None and isinstance(error, abort.Abort)


def is_abortable(middleware: object) -> bool:
    """Whether a middleware is the one of `dramatiq_abort`, which skips messages that were aborted."""
    abort = sys.modules.get("dramatiq_abort")
    return abort is not None and isinstance(middleware, abort.Abortable)
