"""nats-py's client without the tasks that stand between its socket and its callers.

nats-py puts every message that arrives into a queue, from which a task hands it on, and every publish wakes a
task that writes. Each costs a turn of the event loop, which is most of the time between an enqueue and its
acknowledgement. Here a message goes to its callback while it is parsed (see `parser`), its headers are parsed when
somebody asks for them, and what is published together is written at once. Everything else (connecting, TLS,
authentication, reconnecting) is nats-py's.

This reaches into nats-py 2.16: `_ps`, `_process_msg`, `_pending` and `_transport`. A newer one is let in when
`tests/broker/test_client.py` has passed with it.
"""

from __future__ import annotations

# What looking up a host imports when it is first needed, on any thread. A process that is forked in the middle of
# that would find the module's lock taken for ever.
import concurrent.futures.thread  # noqa: F401
import encodings.idna  # noqa: F401
import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription

from .parser import DirectParser, HandOver

__all__ = ["DirectClient", "Headers", "Msg", "Outgoing", "parse_headers"]

Headers = Mapping[str, str]

#: Subject, payload, the subject for answers or "", headers: as they are, or encoded already.
Outgoing = tuple[str, bytes, str, Headers | bytes | None]

_VERSION = b"NATS/1.0"
_STATUS = re.compile(rb"NATS/1\.0[ \t]+(\d{3})[ \t]*([^\r\n]*)")
# A token of RFC 9110, as nats-py checks it too.
_KEY = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BREAKS = {ord("\r"): " ", ord("\n"): " "}

logger = logging.getLogger(__name__)


class Msg:
    """What arrived on a subscription; an empty `reply` means that no answer is wanted."""

    __slots__ = ("_headers", "_raw_headers", "data", "reply", "subject")

    def __init__(self, subject: str, reply: str, data: bytes, raw_headers: bytes | None = None) -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self._raw_headers = raw_headers
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """By name; a status line of the server gives `Status` and `Description`."""
        if self._headers is None:
            self._headers = parse_headers(self._raw_headers) if self._raw_headers else {}
        return self._headers

    def mentions(self, header: str) -> bool:
        """Whether the headers may have this one; much cheaper than to parse them."""
        return self._raw_headers is not None and header.encode() in self._raw_headers


def parse_headers(raw: bytes) -> dict[str, str]:
    """The headers of a block as it goes over the wire (ADR-4)."""
    headers: dict[str, str] = {}
    status = _STATUS.match(raw)
    if status is not None:
        headers["Status"] = status[1].decode()
        if status[2]:
            headers["Description"] = status[2].decode("utf-8", "replace").strip()
    for line in raw.decode("utf-8", "replace").split("\r\n")[1:]:
        name, separator, value = line.partition(":")
        if separator:
            headers[name.strip()] = value.strip()
    return headers


@functools.lru_cache(maxsize=1_000)
def _encoded_key(key: str) -> bytes:
    stripped = key.strip()
    if not _KEY.fullmatch(stripped):
        raise nats.errors.BadHeaderError(stripped)
    return b"\r\n" + stripped.encode() + b": "


def encode_headers(headers: Headers) -> bytes:
    """A block of headers as it goes over the wire (ADR-4). A line break in a value becomes a space.

    Raises:
      nats.errors.BadHeaderError: For a name that is not a token.
    """
    parts = [_VERSION]
    for key, value in headers.items():
        parts.append(_encoded_key(key))
        if "\n" in value or "\r" in value:
            value = value.translate(_BREAKS)
        parts.append(value.strip().encode())
    parts.append(b"\r\n\r\n")
    return b"".join(parts)


def encode(message: Outgoing) -> bytes:
    """A publish as it goes over the wire; raises as `encode_headers`."""
    subject, payload, reply, headers = message
    if headers is None:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), len(payload), payload)
    block = headers if isinstance(headers, bytes) else encode_headers(headers)
    return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
        subject.encode(),
        reply.encode(),
        len(block),
        len(block) + len(payload),
        block,
        payload,
    )


def _guarded(callback: Callable[[Msg], None]) -> HandOver:
    def hand_over(subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        try:
            callback(Msg(subject.decode(), reply.decode(), data, headers))
        except Exception:
            # It would end nats-py's reader, and with it everything.
            logger.exception("A callback for a message on %s failed.", subject.decode("utf-8", "replace"))

    return hand_over


class DirectClient(Client):
    """A client whose callbacks are plain functions, called on the loop thread; they must not block."""

    def __init__(self) -> None:
        super().__init__()
        self._callbacks: dict[int, HandOver] = {}
        self._ps = DirectParser(self, self._callbacks)

    async def listen(self, subject: str, callback: Callable[[Msg], None]) -> Subscription:
        """Subscribe; `callback` gets each message as it is parsed, through every reconnect."""
        subscription = await self.subscribe(subject)
        # nothing can have arrived: the request for it has not left this process
        self._callbacks[subscription._id] = _guarded(callback)
        return subscription

    async def unlisten(self, subscription: Subscription) -> None:
        """End a subscription; what is still on its way is dropped."""
        self._callbacks.pop(subscription._id, None)
        await subscription.unsubscribe()

    def withdraw(self, subscription: Subscription) -> None:
        """Tell the server to send no more; what is still on its way is delivered.

        It is told before anything that is written later: what is given back then goes to somebody else.
        """
        # nats-py's own unsubscribe drops what is on its way.
        self._pending.append(b"UNSUB %d\r\n" % subscription._id)
        self.write_all(())

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        callback = self._callbacks.get(sid)
        if callback is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        callback(subject, reply, data, headers)

    def write_all(self, messages: Iterable[Outgoing]) -> int:
        """Write publishes to the socket now, in order, after whatever nats-py still has; returns their bytes.

        What cannot be sent as it is (too large, a wrong header) is left out with a line in the log.

        Raises:
          nats.errors.ConnectionClosedError: Without a connection; nothing was written.
        """
        if not self.is_connected or self._transport is None:
            raise nats.errors.ConnectionClosedError
        pending = self._pending
        limit = self._max_payload
        for message in messages:
            try:
                if len(message[1]) > limit:
                    raise nats.errors.MaxPayloadError
                pending.append(encode(message))
            except (nats.errors.Error, UnicodeEncodeError):
                logger.exception("A message for %s could not be sent.", message[0])
        chunk = b"".join(pending)
        self._pending = []
        self._pending_data_size = 0
        try:
            self._transport.write(chunk)
        except (OSError, RuntimeError, AttributeError) as error:  # it was closed, and nobody has noticed yet
            raise nats.errors.ConnectionClosedError from error
        return len(chunk)

    async def written(self) -> None:
        """Wait until the socket has taken most of what was written."""
        transport: Any = self._transport
        if transport is not None:
            try:
                await transport.drain()
            except (OSError, RuntimeError) as error:
                await self._process_op_err(error)

    def abort(self) -> None:
        """Cut the connection without waiting for a peer that may never take what is buffered."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
