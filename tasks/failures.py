"""Reads out of a message whose retries are exhausted which order failed, in which step, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dramatiq.message import Message

from dramatiq_jetstream.envelope import event_of

from .events import UnusableEvent, decode, order_id_of

_MAX_ERROR = 500


@dataclass(frozen=True, slots=True)
class Failure:
    """A step of an order that was given up."""

    order_id: str
    step: str
    error: str
    message_id: str


def failure_of(message: Message[Any], retries: Mapping[str, Any], steps: Mapping[str, str]) -> Failure:
    """Return the failure that a message stands for.

    Parameters:
      retries: What Dramatiq says about its retries.
      steps: The step of each actor.

    Raises:
      UnusableEvent: When the message carries no event of an order.
    """
    event = event_of(message)
    decoded = None if event is None else decode(event.subject, event.data)
    if decoded is None:
        raise UnusableEvent(
            f"message {message.message_id} of {message.actor_name} carries no event of an order."
        )
    attempts = int(retries.get("retries", 0)) + 1
    error = _last_line(message.options.get("traceback") or "unknown error")
    return Failure(
        order_id=order_id_of(decoded),
        step=steps[message.actor_name],
        error=f"{error} (given up after {attempts} attempts)"[:_MAX_ERROR],
        message_id=message.message_id,
    )


def _last_line(traceback: str) -> str:
    """Return the exception's line of a traceback, without the name of its module."""
    line = traceback.strip().rsplit("\n", 1)[-1].strip()
    name, separator, text = line.partition(": ")
    return f"{name.rpartition('.')[2]}{separator}{text}"
