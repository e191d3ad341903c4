"""Messages waiting to be written, in order, until the socket takes them.

A message whose call has a deadline is dropped when that passes first (see `calls`). Others wait as long as the
connection lasts. If too many wait, the server no longer reads, and the connection is cut.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Final

from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import InvalidOption, MessageTooLarge

from .calls import Call, Calls
from .client import Client
from .protocol import Outgoing, encode_publish
from .replies import check_subject

__all__ = ["Outbox"]

#: How many bytes are given to the socket at once.
CHUNK_BYTES: Final = 65_536

#: How many bytes of messages without a deadline may wait.
OUTBOX_BYTES: Final = 16_777_216

logger = logging.getLogger(__name__)


class Outbox:
    """Messages of one link on their way to the socket. On the loop's thread only."""

    def __init__(self, calls: Calls) -> None:
        self.max_payload = 1_048_576
        self._calls = calls
        self._waiting: deque[bytes | tuple[Outgoing, Call]] = deque()
        self._bytes = 0  # of what has no deadline

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, client: Client, message: Outgoing | bytes) -> None:
        """Append a message, or a command as it goes over the wire, which has no deadline."""
        try:
            command = message if isinstance(message, bytes) else self._encode(message)
        except (BrokerError, ValueError) as error:
            logger.error("A message could not be sent: %s", error)
            return
        self._waiting.append(command)
        self._bytes += len(command)
        if self._bytes > OUTBOX_BYTES:
            client.abort(f"more than {OUTBOX_BYTES >> 20} MiB waited to be written")

    def add_for(self, call: Call, message: Outgoing) -> None:
        """Append a message that is dropped if the deadline of its call is over when its turn comes."""
        self._waiting.append((message, call))

    def clear(self) -> None:
        self._waiting.clear()
        self._bytes = 0

    def flush(self, client: Client) -> None:
        """Write as much as the socket takes."""
        waiting = self._waiting
        while waiting and client.open and not client.paused:
            now = time.monotonic()
            chunk: list[bytes] = []
            size = 0
            while waiting and size < CHUNK_BYTES:
                entry = waiting.popleft()
                if isinstance(entry, bytes):
                    command = entry
                    self._bytes -= len(command)
                else:
                    message, call = entry
                    if not call.may_leave(now, client, client.handed + size, part=not message[2]):
                        continue
                    try:
                        command = self._encode(message)
                    except (BrokerError, ValueError) as error:
                        call.sent = None
                        self._calls.fail(call, error)
                        continue
                chunk.append(command)
                size += len(command)
            client.write(b"".join(chunk))

    def _encode(self, message: Outgoing) -> bytes:
        subject, payload, _, headers = message
        # Publications were checked before they were posted; the server may allow less since.
        checked = type(headers) is bytes
        size = len(payload) + len(headers) if checked and headers else len(payload)
        if size > self.max_payload:
            raise MessageTooLarge(
                f"A message of {size} bytes for {subject} is over the server's max_payload of "
                f"{self.max_payload} bytes."
            )
        if checked:
            return encode_publish(message)
        check_subject(subject)
        try:
            return encode_publish(message)
        except ValueError as error:
            raise InvalidOption(
                f"the headers {headers!r} of a message for {subject} cannot be sent ({error})."
            ) from None
