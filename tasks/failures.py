"""Reads out of a dead letter which order failed, in which step, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dramatiq_jetstream.dead_letters import DeadLetter
from dramatiq_jetstream.events import event_of

from .events import DecodeError, UnusableEvent, decode, order_id_of

_MAX_ERROR = 500


@dataclass(frozen=True, slots=True)
class Failure:
    """A step of an order that was given up."""

    order_id: str
    step: str
    error: str
    message_id: str


def failure_of(letter: DeadLetter, steps: Mapping[str, str]) -> Failure | None:
    """Return the failure that a letter stands for, None when no order waits for it.

    Parameters:
      steps: The step of each actor.
    """
    step = steps.get(letter.actor or "")
    message = letter.decode()
    event = None if message is None else event_of(message)
    # An event that no order can have sent is a dead letter too, and is no failure of the order it names.
    if step is None or event is None or letter.error.startswith(UnusableEvent.__name__):
        return None
    try:
        decoded = decode(event.subject, event.data)
        order_id = None if decoded is None else order_id_of(decoded)
    except (DecodeError, UnusableEvent):
        return None
    if order_id is None:
        return None
    return Failure(order_id, step, f"{letter.reason}: {letter.error}"[:_MAX_ERROR], letter.message_id or "")
