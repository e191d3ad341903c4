"""Reading single stored messages back from a stream.

They come from the stream's leader (`STREAM.MSG.GET`). Where the stream is known to be on one server only, `DIRECT.GET`
(ADR-31) returns the same at half the cost, because its reply is the message itself.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from dramatiq_jetstream.errors import NotFound, TopologyMissing
from dramatiq_jetstream.wire.connection import Connection
from dramatiq_jetstream.wire.error_numbers import STREAM_NOT_FOUND
from dramatiq_jetstream.wire.headers import parse_headers

__all__ = [
    "StoredMessage",
    "first_message",
    "first_message_since",
    "last_message",
    "last_message_direct",
    "message_at",
    "messages",
    "parse_time",
    "time_text",
]


#: The server cuts the connection at a protocol line of 4,096 bytes.
_MAX_DIRECT = 3_000

# The headers that a direct reply adds to the message's own.
_DIRECT_HEADERS = frozenset({"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp"})


_EPOCH = datetime.fromtimestamp(0, UTC)
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True)
class StoredMessage:
    """A message as the stream holds it; `time` is milliseconds since 1970.

    Examples:
      >>> event = broker.stream("ORDERS").first()
      >>> event.subject, event.data
      ('ORDER.created', b'17')
    """

    stream: str
    sequence: int
    subject: str
    data: bytes
    headers: Mapping[str, str]
    time: int


def parse_time(text: str) -> int:
    """Milliseconds since 1970 of the server's RFC 3339 time, which has up to nine decimals."""
    text = re.sub(r"(\.\d{1,6})\d*", lambda m: m[1].ljust(7, "0"), text).replace("Z", "+00:00")
    return (datetime.fromisoformat(text) - _EPOCH) // _MILLISECOND


def time_text(nanoseconds: int) -> str:
    """A time in nanoseconds since 1970 as the server reads it."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def _get(
    connection: Connection,
    stream: str,
    request: Mapping[str, Any],
    *,
    timeout: int | None = None,
    must_exist: bool = False,
) -> StoredMessage | None:
    try:
        message = connection.api(f"STREAM.MSG.GET.{stream}", request, timeout=timeout)["message"]
    except NotFound as error:
        if must_exist and error.err_code == STREAM_NOT_FOUND:
            raise TopologyMissing(
                f"There is no stream {stream}: prepare it with `fleet setup`, or let the broker declare it."
            ) from None
        return None
    return StoredMessage(
        stream=stream,
        sequence=int(message["seq"]),
        subject=message["subject"],
        data=base64.b64decode(message.get("data") or ""),
        headers=parse_headers(base64.b64decode(message["hdrs"])) if message.get("hdrs") else {},
        time=parse_time(message["time"]),
    )


def last_message(
    connection: Connection, stream: str, subject: str, *, timeout: int | None = None, must_exist: bool = False
) -> StoredMessage | None:
    """The newest message on a subject (wildcards allowed), or None.

    Raises:
      TopologyMissing: When there is no such stream and it `must_exist`.
    """
    request = {"last_by_subj": subject}
    return _get(connection, stream, request, timeout=timeout, must_exist=must_exist)


def last_message_direct(
    connection: Connection, stream: str, subject: str, *, timeout: int | None = None, must_exist: bool = False
) -> StoredMessage | None:
    """As `last_message`, for a stream on one server, where no other can lag behind."""
    if len(subject) + len(stream) > _MAX_DIRECT:
        return last_message(connection, stream, subject, timeout=timeout, must_exist=must_exist)
    verb, payload = f"DIRECT.GET.{stream}.{subject}", b""
    if subject.endswith(">") or "*" in subject:  # no subject that a message can have
        verb, payload = f"DIRECT.GET.{stream}", json.dumps({"last_by_subj": subject}).encode()
    # The leader knows at once whether a stream that does not answer exists.
    reply = connection.request(
        connection.api_subject(verb), payload, timeout=timeout, resend=True, patient=False
    )
    headers = reply.headers
    if headers.get("Status") == "404":
        return None
    if "Nats-Sequence" not in headers:  # not served directly, or not now
        return last_message(connection, stream, subject, timeout=timeout, must_exist=must_exist)
    return StoredMessage(
        stream=stream,
        sequence=int(headers["Nats-Sequence"]),
        subject=headers["Nats-Subject"],
        data=reply.data,
        headers={name: value for name, value in headers.items() if name not in _DIRECT_HEADERS},
        time=parse_time(headers["Nats-Time-Stamp"]),
    )


def message_at(connection: Connection, stream: str, sequence: int) -> StoredMessage | None:
    """The message with a sequence, or None."""
    if not 0 < sequence < 2**64:  # which the server calls a bad request
        return None
    return _get(connection, stream, {"seq": sequence})


def first_message(connection: Connection, stream: str, subject: str, start: int = 1) -> StoredMessage | None:
    """The oldest message on a subject (wildcards allowed) from sequence `start` on, or None."""
    return _get(connection, stream, {"seq": max(1, start), "next_by_subj": subject})


def first_message_since(
    connection: Connection, stream: str, subject: str, since: datetime
) -> StoredMessage | None:
    """The oldest message on a subject (wildcards allowed) that was stored at `since` or later, or None."""
    return _get(connection, stream, {"start_time": since.isoformat(), "next_by_subj": subject})


def messages(connection: Connection, stream: str, subject: str, start: int = 1) -> Iterator[StoredMessage]:
    """Every message on a subject (wildcards allowed), oldest first."""
    while (message := first_message(connection, stream, subject, start)) is not None:
        yield message
        start = message.sequence + 1
