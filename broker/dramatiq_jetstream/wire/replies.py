"""JetStream's replies as values and errors of this library, and the checks before a message is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import (
    ApiError,
    InvalidName,
    InvalidOption,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    StoreFull,
    StoreTimeout,
    StreamLost,
    TopologyMissing,
)

from . import error_numbers
from .headers import BadHeader, Headers, Msg, encode_headers

__all__ = ["Headers", "Msg", "PubAck", "Publication"]

#: The server cuts the connection at a protocol line of 4,096 bytes; the subject shares it with other fields.
MAX_SUBJECT_BYTES: Final = 3_500

# Almost every acknowledgement looks like this; any other is read as JSON.
_STORED = re.compile(rb'\{"stream":"([\w-]+)",\s*"seq":(\d+)\}', re.ASCII)

_PERMISSION = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PubAck:
    """JetStream's acknowledgement of a stored message."""

    stream: str
    seq: int
    duplicate: bool = False


class Publication:
    """One message on its way to a stream; `block` is its headers as they go over the wire, once it was checked."""

    __slots__ = ("block", "headers", "payload", "subject")

    def __init__(self, subject: str, payload: bytes, headers: Headers | None = None) -> None:
        self.subject = subject
        self.payload = payload
        self.headers = headers
        self.block: bytes | None = None


def read_permission_error(text: str) -> tuple[str, str] | None:
    """The verb and the subject of a permission violation that the server reported."""
    denied = _PERMISSION.search(text)
    return None if denied is None else (denied[1].lower(), denied[2])


def permission_denied(verb: str, subject: str) -> PermissionDenied:
    """The error for a subject that the server refused to this account."""
    action = "publish to" if verb == "publish" else "subscribe to"
    return PermissionDenied(
        f"This account may not {action} {subject!r}: extend its permissions "
        "(dramatiq_jetstream/permissions.conf lists what each role needs)."
    )


def check_subject(subject: str) -> None:
    """Refuse a subject for which the server would cut the connection.

    Raises:
      InvalidName: When it is too long, or would end within the protocol's line.
    """
    encoded = subject.encode()
    if len(encoded) > MAX_SUBJECT_BYTES:
        raise InvalidName(
            f"subject {subject[:60]}… of {len(encoded)} bytes is too long for NATS: {MAX_SUBJECT_BYTES} are possible."
        )
    if encoded.split() != [encoded]:
        raise InvalidName(f"subject {subject!r} cannot be sent: it must not be empty or contain whitespace.")


def check(item: Publication, limit: int) -> None:
    """Encode the headers of a message, and refuse one for which the server would cut the connection.

    Raises:
      MessageTooLarge: For a message over the server's `max_payload`.
      InvalidName, InvalidOption: For a subject that is too long, or a header that is not text.
    """
    check_subject(item.subject)
    size = len(item.payload)
    if item.headers:
        try:
            item.block = encode_headers(item.headers)
        except (UnicodeEncodeError, AttributeError, TypeError, BadHeader):
            raise InvalidOption(
                f"the headers {dict(item.headers)!r} cannot be sent: names must be tokens such as Content-Type, "
                "and values Unicode text."
            ) from None
        size += len(item.block)
    if size > limit:
        raise MessageTooLarge(
            f"A message of {size} bytes for {item.subject} is over the server's max_payload of {limit} bytes: "
            "store large data elsewhere and send a reference, or raise max_payload."
        )


def is_no_responders(reply: Msg) -> bool:
    return not reply.data and bool(reply.headers) and (reply.headers or {}).get("Status") == "503"


def read_puback(subject: str, reply: Msg | BaseException, *, patient: bool) -> PubAck | BrokerError | None:
    """Return what the reply to a publish says, or None for "try again"."""
    if isinstance(reply, BaseException):
        return reply if isinstance(reply, BrokerError) else BrokerError(str(reply))
    stored = _STORED.fullmatch(reply.data)
    if stored is not None:
        return PubAck(stored[1].decode(), int(stored[2]))
    if is_no_responders(reply):
        if patient:
            return None
        return TopologyMissing(
            f"No stream takes {subject}: prepare it with `fleet setup`, or let the broker declare it."
        )
    body = json.loads(reply.data)
    error = body.get("error")
    if error is None:
        return PubAck(body["stream"], body["seq"], body.get("duplicate", False))
    if error.get("err_code") in error_numbers.TRANSIENT:
        return None
    return translate(error)


def in_doubt(refusal: BrokerError) -> BrokerError:
    """What a refused repetition says of a message: what has no place now may have been stored before."""
    if isinstance(refusal, TopologyMissing):
        return StreamLost(f"{refusal} Whether one stored the message before is not known.")
    if isinstance(refusal, StoreFull):
        return StoreTimeout(f"{refusal} Whether there was room for the message before is not known.")
    return refusal


def translate(error: Mapping[str, Any]) -> BrokerError:
    code, err_code = int(error.get("code", 0)), int(error.get("err_code", 0))
    description = str(error.get("description", "unknown error"))
    if err_code in error_numbers.FULL:
        return StoreFull(f"JetStream has no room ({description}): raise its limits or let workers catch up.")
    if err_code in error_numbers.TOO_LARGE:
        return MessageTooLarge(f"JetStream refused the message: {description}.")
    if err_code in error_numbers.MISSING or code == 404:
        return NotFound(code, err_code, description)
    return ApiError(code, err_code, description)
