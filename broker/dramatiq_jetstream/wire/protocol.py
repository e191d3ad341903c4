"""The NATS client protocol without I/O: bytes in, events out; values in, bytes out.

`client` and `lanes` are its two ways of doing I/O: an event loop with many subscriptions, and one thread with one
question at a time. Both parse with a `Protocol` and write what the functions here encode. Parsing takes as long as
with nats-py's parser, which needs nats-py's client.

What a peer can make us keep is bounded: a line by `MAX_LINE_BYTES`, a message by `MAX_MESSAGE_BYTES`. Bytes that break
the protocol raise `ProtocolError`, after which the connection is of no use. An interrupt in `receive` loses bytes, so a
connection on which one struck must be dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .headers import Headers, Msg, encode_headers

__all__ = [
    "PING",
    "Event",
    "Outgoing",
    "Pong",
    "Protocol",
    "ProtocolError",
    "ServerError",
    "ServerInfo",
    "encode_connect",
    "encode_publish",
    "encode_subscribe",
    "encode_unsubscribe",
]

#: The longest line that is accepted, in bytes; INFO lists the servers of a cluster.
MAX_LINE_BYTES: Final = 1_048_576

#: The largest message that is accepted, in bytes; nats-server allows up to 64 MiB.
MAX_MESSAGE_BYTES: Final = 134_217_728

PING: Final = b"PING\r\n"
_PONG: Final = b"PONG\r\n"
_MESSAGES: Final = (b"MSG ", b"HMSG ")

#: Subject, payload, the reply subject or "", and the headers, encoded or not.
Outgoing = tuple[str, bytes, str, Headers | bytes | None]


class ProtocolError(Exception):
    """The peer does not speak the NATS protocol."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server described itself: at the start, and again when its cluster changes."""

    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerError:
    """The server refused something, or says why it is about to close the connection."""

    text: str


@dataclass(frozen=True, slots=True)
class Pong:
    """The server has handled everything that was written before a PING."""


Event = Msg | ServerInfo | ServerError | Pong


class Protocol:
    """The state of one connection's reading side."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._missing = 0
        self._pongs = b""

    def receive(self, data: bytes) -> list[Event]:
        """Parse what arrived and return what became complete, in order.

        Raises:
          ProtocolError: When this is not the NATS protocol.
        """
        if self._parts:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
        events: list[Event] = []
        at, size = 0, len(data)
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > MAX_LINE_BYTES:
                    raise ProtocolError(f"the server sent a line of more than {MAX_LINE_BYTES} bytes")
                self._keep(data[at:], 1)
                break
            if not data.startswith(_MESSAGES, at):
                self._handle_line(data[at:end], events)
                at = end + 2
                continue
            # [H]MSG <subject> <subscription> [<reply>] [<bytes of headers>] <bytes>
            words = data[at:end].split()
            with_headers = words[0] == b"HMSG"
            try:
                reply = words[3].decode() if len(words) == 5 + with_headers else ""
                sid, total = int(words[2]), int(words[-1])
                split = int(words[-2]) if with_headers else 0
                subject = words[1].decode()
            except (ValueError, IndexError):
                raise ProtocolError(f"the server sent {_short(data[at:end])}") from None
            if not 0 <= split <= total <= MAX_MESSAGE_BYTES:
                raise ProtocolError(f"the server sent {_short(data[at:end])}")
            body = end + 2
            stop = body + total
            if stop + 2 > size:
                self._keep(data[at:], stop + 2 - size)
                break
            events.append(
                Msg(
                    subject,
                    reply,
                    data[body + split : stop],
                    data[body : body + split] if with_headers else None,
                    sid,
                )
            )
            at = stop + 2
        return events

    def unfinished(self, most: int) -> tuple[bytes, int]:
        """The first bytes, up to `most`, of a message that has not arrived whole, and how many of it have arrived."""
        if not self._parts:
            return b"", 0
        beginning = self._parts[0]
        if len(beginning) < most and len(self._parts) > 1:
            beginning = b"".join(self._parts)
        return beginning[:most], sum(map(len, self._parts))

    def pongs(self) -> bytes:
        """The PONGs that have to be written now, for the PINGs that arrived; each is returned once."""
        pongs, self._pongs = self._pongs, b""
        return pongs

    def _keep(self, rest: bytes, missing: int) -> None:
        self._parts.append(rest)
        self._missing = missing

    def _handle_line(self, line: bytes, events: list[Event]) -> None:
        if line == b"PING":
            self._pongs += _PONG
        elif line == b"PONG":
            events.append(Pong())
        elif line.startswith(b"-ERR"):
            events.append(ServerError(line[4:].decode("utf-8", "replace").strip().strip("'")))
        elif line.startswith(b"INFO "):
            try:
                fields = json.loads(line[5:])
            except ValueError:
                fields = None
            if not isinstance(fields, dict):
                raise ProtocolError(f"the server sent {_short(line)}")
            events.append(ServerInfo(fields))
        elif line and line != b"+OK":
            raise ProtocolError(f"the server sent {_short(line)}")


def _short(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "replace"))


def encode_connect(options: Mapping[str, Any]) -> bytes:
    """Say who we are; the server answers with an error or, to the PING that follows, with a PONG."""
    return b"CONNECT %b\r\n" % json.dumps(options, separators=(",", ":")).encode() + PING


def encode_subscribe(subject: str, sid: int) -> bytes:
    return b"SUB %b %d\r\n" % (subject.encode(), sid)


def encode_unsubscribe(sid: int, after: int | None = None) -> bytes:
    """End a subscription now, or once it has delivered `after` messages."""
    return b"UNSUB %d\r\n" % sid if after is None else b"UNSUB %d %d\r\n" % (sid, after)


def encode_publish(message: Outgoing) -> bytes:
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
