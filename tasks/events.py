"""The events of an order: their subjects, the headers around them, and how a stored one is read back.

The headers follow CloudEvents in binary mode. They are a courtesy to readers: nothing here needs them,
because other programs publish events without any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from orders.v1.events_pb2 import (
    OrderCancelled,
    OrderCancelRequested,
    OrderChargedBack,
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderFailed,
    OrderOfferAccepted,
    OrderOffered,
    OrderPaid,
    OrderRefunded,
    OrderRefundRequested,
    OrderRejected,
    OrderReserved,
    OrderReturned,
    OrderReturnRequested,
    OrderShipped,
)

from .model import MAX_ID_LENGTH
from .text import shown

STREAM: Final = "ORDERS"
SUBJECTS: Final = "ORDER.>"

#: The events by name; the subject of each is ORDER.{name}.
TYPES: Final[dict[str, type[Message]]] = {
    "created": OrderCreated,
    "offered": OrderOffered,
    "offer_accepted": OrderOfferAccepted,
    "reserved": OrderReserved,
    "rejected": OrderRejected,
    "paid": OrderPaid,
    "declined": OrderDeclined,
    "confirmed": OrderConfirmed,
    "shipped": OrderShipped,
    "return_requested": OrderReturnRequested,
    "returned": OrderReturned,
    "cancel_requested": OrderCancelRequested,
    "cancelled": OrderCancelled,
    "refund_requested": OrderRefundRequested,
    "refunded": OrderRefunded,
    "charged_back": OrderChargedBack,
    "failed": OrderFailed,
}
_NAMES: Final = {message_type: name for name, message_type in TYPES.items()}

# What can stand in a subject's token, a path and a file name without meaning anything else there.
_ORDER_ID = re.compile(rf"[A-Za-z0-9_~-][A-Za-z0-9._~-]{{0,{MAX_ID_LENGTH - 1}}}", re.ASCII)

#: The header that names the request which placed an order.
REQUEST_ID: Final = "Request-Id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)

#: The header of a `created` or a `paid` whose publisher itself does what would be done for it: the front end adds
#: `created` to the read model before it answers, and a payment goes on from `paid` to `confirmed`. What a publisher
#: that dies has not done, its repetition does, or what looks after all orders (`tasks.figures` adds what the read
#: model lacks, `tasks.standstill` calls the step again). So a stranger's header delays what is true, and nothing
#: else. On any other event it says nothing.
CARRIED_ON: Final = "Order-Carried-On"

_TRACE_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Happened:
    """An event with its place in the stream. `at` is when JetStream stored it, in milliseconds."""

    event: Message
    sequence: int
    at: int
    trace_id: str | None = None


class UnusableEvent(Exception):
    """The event cannot be attributed to an order, or contradicts it. Trying again would not help."""


def name_of(event: Message) -> str:
    """Return the name of an event: `created` for an OrderCreated."""
    return _NAMES[type(event)]


def subject_of(event: Message) -> str:
    """Return the subject on which an event is published."""
    return f"ORDER.{name_of(event)}"


def usable_order_id(order_id: str) -> bool:
    """Whether an order can have this id."""
    return _ORDER_ID.fullmatch(order_id) is not None


def order_id_of(event: Message) -> str:
    """Return the id of the order that an event is about.

    Raises:
      UnusableEvent: When it is not one that an order can have.
    """
    order_id: str = event.order_id  # type: ignore[attr-defined]  # every type in TYPES has it
    if not usable_order_id(order_id):
        raise UnusableEvent(
            f"order id {shown(order_id, MAX_ID_LENGTH)!r} cannot be used: "
            f"an id is 1 to {MAX_ID_LENGTH} letters, digits, '-', '_', '.' or '~' and does not begin with a dot."
        )
    return order_id


def event_id(event: Message) -> str:
    """Return the id under which JetStream stores an event once: the same for every repetition of it."""
    return f"{order_id_of(event)}.{key_of(event)}"


def key_of(event: Message) -> str:
    """Return what tells an event from the others of its order: its name, and which one of those that may be several."""
    match event:
        case OrderFailed():
            return f"failed.{event.step}"
        case OrderRefundRequested() | OrderRefunded():
            return f"{name_of(event)}.{event.refund}"
        case OrderChargedBack():
            return f"charged_back.{event.chargeback_id}"
    return name_of(event)


def request_id_in(headers: Mapping[str, str]) -> str | None:
    """Return the id of the request that placed an order, None when there is none that could be one."""
    named = headers.get(REQUEST_ID, "")
    return named if is_request_id(named) else None


def is_request_id(text: str) -> bool:
    """Whether a text can be the id of a request."""
    return _REQUEST_ID.fullmatch(text) is not None


def headers(event: Message, event_id: str, at: int, request_id: str | None = None) -> dict[str, str]:
    """Return the headers of an event that happened at `at` (milliseconds): CloudEvents, and the request's id."""
    return {
        **({} if request_id is None else {REQUEST_ID: request_id}),
        "ce-specversion": "1.0",
        "ce-id": event_id,
        "ce-type": event.DESCRIPTOR.full_name,
        "ce-source": "/orders",
        "ce-subject": event.order_id,  # type: ignore[attr-defined]  # every type in TYPES has it
        "ce-time": isoformat(at),
        "content-type": "application/protobuf",
    }


def decode(subject: str, data: bytes) -> Message | None:
    """Return the event in a message of the stream, None when the subject is not one of an order's events.

    Raises:
      DecodeError: When the bytes are not of the subject's type.
    """
    message_type = TYPES.get(subject.removeprefix("ORDER."))
    if message_type is None:
        return None
    event = message_type()
    event.ParseFromString(data)
    return event


def happened(event: Message, sequence: int, at: int, headers: Mapping[str, str]) -> Happened:
    """Return an event with its place in the stream, and the trace that its W3C header names."""
    parts = headers.get("traceparent", "").split("-")
    traced = len(parts) == 4 and _TRACE_ID.fullmatch(parts[1]) is not None
    return Happened(event, sequence, at, parts[1] if traced else None)


def timestamp(at: int) -> Timestamp:
    """Return a time in milliseconds as protobuf has it."""
    stamp = Timestamp()
    stamp.FromMilliseconds(at)
    return stamp


def isoformat(at: int) -> str:
    """Return a time in milliseconds as RFC 3339."""
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


__all__ = [
    "CARRIED_ON",
    "REQUEST_ID",
    "STREAM",
    "SUBJECTS",
    "TYPES",
    "DecodeError",
    "Happened",
    "UnusableEvent",
    "decode",
    "event_id",
    "happened",
    "headers",
    "is_request_id",
    "isoformat",
    "key_of",
    "name_of",
    "order_id_of",
    "request_id_in",
    "subject_of",
    "timestamp",
    "usable_order_id",
]
