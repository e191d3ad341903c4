"""What people see of a message's arguments, in the fleet's pages, its commands and the history of attempts.

Which order it is about, and nothing of who ordered or how they pay: an event of another program may have a payment
token in it.
"""

from __future__ import annotations

from typing import Any

from dramatiq.broker import MessageProxy
from google.protobuf.message import Message

from dramatiq_jetstream.events import Event

from .events import Happened, name_of
from .model import MAX_ID_LENGTH
from .text import shown


def described(message: MessageProxy) -> str:
    """Return the arguments of a message as a text for operators."""
    return ", ".join(map(_described, (*message.args, *message.kwargs.values())))


def _described(value: Any) -> str:
    match value:
        case Message():
            order_id = shown(value.order_id, MAX_ID_LENGTH)  # type: ignore[attr-defined]  # every event has one
            return f"{name_of(value)} of order {order_id}"
        case Happened(event=event):
            return _described(event)
        case Event():
            return f"{value.subject} at {value.sequence}"
        case tuple():  # what was received, and when
            return _described(value[0])
        case str() | int() | None:
            return repr(value)
    return type(value).__name__
