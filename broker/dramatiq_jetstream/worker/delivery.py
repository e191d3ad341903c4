"""A delivered message, the source that delivered it, and the event in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dramatiq.message import Message

from dramatiq_jetstream.jetstream.names import HEADER_EARLIER_DELIVERIES, HEADER_ORIGIN
from dramatiq_jetstream.sending.envelope import Event
from dramatiq_jetstream.wire.ack_subjects import ack_tokens
from dramatiq_jetstream.wire.connection import Msg

from .durables import Durable
from .settlements import Key

__all__ = ["Delivery", "Owner", "Source", "event_in"]


class Owner(Protocol):
    """What asked for a delivery, and has room for another one when it is settled."""

    lookahead: bool

    def released(self, delivery: Delivery, *, done: bool) -> None:
        """A delivery was settled: its work is done, or it was given back."""


@dataclass(eq=False)
class Source:
    """Where messages of a queue come from.

    Attributes:
      rank: 0 is asked first.
      declare: Makes the stream and the consumer if they are missing, and compares them if they are not; it waits for
        the server and raises what is wrong.
      decode: Makes the Dramatiq message and, for an event, the arguments that its actor receives; it raises
        `DecodeError` for bytes that are not a message.
      actor: The subscribed actor, for a source of events.
      takes: Whether this version of the program wants a subject: another version may have set up the consumer since.
    """

    queue: str
    durable: Durable
    rank: int
    declare: Callable[[], object]
    decode: Callable[[Delivery], tuple[Message[Any], tuple[Any, ...] | None]]
    actor: str | None = None
    takes: Callable[[str], bool] = lambda _: True

    @property
    def stream(self) -> str:
        return self.durable.stream

    def __str__(self) -> str:
        return self.durable.label


class Delivery:
    """One delivered message and its place in the stream; what it says comes from its ack subject (ADR-15)."""

    __slots__ = (
        "_message",
        "ack_subject",
        "data",
        "deliveries",
        "has_place",
        "key",
        "life",
        "owner",
        "pending",
        "sequence",
        "settled",
        "slot",
        "source",
        "stream",
        "subject",
        "timestamp",
        "touched",
    )

    def __init__(self, message: Msg, source: Source, owner: Owner) -> None:
        self.subject = message.subject
        self.data = message.data
        self._message = message
        self.ack_subject = message.reply
        self.source = source
        self.owner = owner
        self.has_place = False
        tokens = ack_tokens(message.reply)
        durable = source.durable
        self.life = durable.life
        self.stream = durable.stream
        self.deliveries = int(tokens[2])
        self.sequence = int(tokens[3])
        stored = int(tokens[5])
        self.timestamp = stored // 1_000_000
        self.pending = int(tokens[6])
        if message.mentions(HEADER_EARLIER_DELIVERIES):
            earlier = self.headers.get(HEADER_EARLIER_DELIVERIES, "")
            self.deliveries += int(earlier) if earlier.isdecimal() else 0
        self.key: Key = (durable.stream, durable.name, self.sequence, stored)
        self.settled = False
        #: Where this process noted that it holds it, if it has a supervisor.
        self.slot: int | None = None
        self.touched = time.monotonic()

    def __str__(self) -> str:
        return f"Message {self.sequence} of {self.stream}"

    @property
    def headers(self) -> Mapping[str, str]:
        return self._message.headers

    def mentions(self, header: str) -> bool:
        """Whether the headers may have this one; much cheaper than to look."""
        return self._message.mentions(header)

    @property
    def origin(self) -> str:
        """One token that identifies the message wherever it is delivered, also after it was put off."""
        if self.mentions(HEADER_ORIGIN) and (origin := self.headers.get(HEADER_ORIGIN)):
            return origin
        _, consumer, sequence, stored = self.key
        return f"{self.stream}-{consumer}-{sequence}-{stored:x}"


def event_in(delivery: Delivery) -> Event:
    """The event that a stream of events delivered."""
    return Event(
        delivery.subject,
        delivery.data,
        delivery.headers,
        delivery.stream,
        delivery.sequence,
        delivery.timestamp,
    )
