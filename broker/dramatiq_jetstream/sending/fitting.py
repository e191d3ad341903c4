"""Makes enlarged messages fit: what the server took once can be retried, delayed and replayed.

A retry adds counts and a traceback, a replay the earlier failures, a delay headers; a retry of an event carries the
event, encoded. With these a message that was just small enough is too large for the server. Then the traceback is cut,
the body compressed, as a last resort traceback and history are left out, and then an event is referred to instead of
carried (see `references`), in this order, until it fits. A message that is too large by itself is left as it is, and
refused.

A compressed body says so in a header, which travels with it through schedules and dead letters.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dramatiq.errors import DecodeError
from dramatiq.message import Message

from dramatiq_jetstream.jetstream.names import HEADER_BODY

from .envelope import EVENT_OPTION, HISTORY_OPTION

__all__ = ["ADDED", "fields_of", "fit", "is_enlarged", "unfolded"]

#: The options that Dramatiq's `Retries` adds to a message.
ADDED = ("retries", "traceback", "requeue_timestamp")

_ENLARGED = frozenset((*ADDED, HISTORY_OPTION, EVENT_OPTION))

#: Characters that remain of a traceback that is cut; the end says what was raised.
TRACEBACK_START, TRACEBACK_END = 1_000, 1_000

#: The largest body, in bytes, that is decompressed: no client sends more than 64 MiB, the server's limit.
MAX_BODY_BYTES = 128 * 1024 * 1024

DEFLATE = "deflate"


def fit(
    message: Message[Any],
    room: int,
    headers: dict[str, str],
    refer: Callable[[Message[Any]], Message[Any] | None],
) -> bytes:
    """Encode a message in at most `room` bytes if that can be done, and note in `headers` how.

    Parameters:
      refer: Returns the message with a reference in place of the event that it carries; None if it cannot.
    """
    body = message.encode()
    if len(body) <= room:
        return body
    room -= len(f"{HEADER_BODY}: {DEFLATE}\r\n")
    for shorter in (_with_short_traceback(message), _without(message, ("traceback", HISTORY_OPTION))):
        plain = shorter.encode()
        if len(plain) <= room:
            return plain
        folded = zlib.compress(plain)
        if len(folded) <= room:
            headers[HEADER_BODY] = DEFLATE
            return folded
    referring = refer(_with_short_traceback(message))
    return body if referring is None else referring.encode()


def is_enlarged(message: Message[Any]) -> bool:
    """Whether something was added to a message that the server took before."""
    return not _ENLARGED.isdisjoint(message.options)


def unfolded(body: bytes, headers: Mapping[str, str]) -> bytes:
    """The body of a message as it was encoded.

    Raises:
      DecodeError: When it is not what its header says.
    """
    if headers.get(HEADER_BODY) != DEFLATE:
        return body
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(body, MAX_BODY_BYTES)
    except zlib.error as error:
        raise DecodeError(
            "The body of this message is not compressed as its header says.", body, error
        ) from error
    if not inflate.eof:
        raise DecodeError("The compressed body of this message is cut off or too large.", body, None)
    return plain


def fields_of(body: bytes, headers: Mapping[str, str]) -> dict[str, Any] | None:
    """What a message says, read as JSON alone, for people; None when that is not what it is.

    No encoder of a program is asked: one such as pickle runs what the bytes say.
    """
    try:
        fields = json.loads(unfolded(body, headers))
    except (DecodeError, ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _without(message: Message[Any], names: Iterable[str]) -> Message[Any]:
    options = {name: value for name, value in message.options.items() if name not in names}
    return dataclasses.replace(message, options=options)


def _with_short_traceback(message: Message[Any]) -> Message[Any]:
    text = message.options.get("traceback")
    if not isinstance(text, str) or len(text) <= TRACEBACK_START + TRACEBACK_END:
        return message
    cut = f"{text[:TRACEBACK_START]}\n…\n{text[-TRACEBACK_END:]}"
    return dataclasses.replace(message, options={**message.options, "traceback": cut})
