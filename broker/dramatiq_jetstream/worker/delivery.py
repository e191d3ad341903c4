"""A delivered message, the source that delivered it, and the event in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dramatiq.message import Message

from dramatiq_jetstream.jetstream.names import HEADER_EARLIER_DELIVERIES, HEADER_ORIGIN, OWN_HEADERS
from dramatiq_jetstream.sending.envelope import Event
from dramatiq_jetstream.wire.ack_subjects import ack_tokens
from dramatiq_jetstream.wire.connection import Msg

from .durables import Durable
from .settlements import Key

__all__ = ["MOMENT_SECONDS", "Delivery", "Owner", "Source", "event_in"]

#: How long a message waits for a thread before it may go back, and how often it does at most (see `giving_back`).
MOMENT_SECONDS = 1.0
MOST_RETURNS = 3


class Owner(Protocol):
    """The consumer that asked for a delivery, and has room for another one once it is settled."""

    lookahead: bool

    def released(self, delivery: Delivery, *, done: bool) -> None:
        """A delivery was settled: done, or requeued."""


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
      takes: Whether this version of the program wants a subject, None if it wants all: another version may have set
        up the consumer since.
    """

    queue: str
    durable: Durable
    rank: int
    declare: Callable[[], object]
    decode: Callable[[Delivery], tuple[Message[Any], tuple[Any, ...] | None]]
    actor: str | None = None
    takes: Callable[[str], bool] | None = None

    @property
    def stream(self) -> str:
        return self.durable.stream

    def __str__(self) -> str:
        return self.durable.label


class Delivery:
    """One delivered message and its place in the stream; what it says comes from its ack subject (ADR-15).

    Attributes:
      deliveries: How often it was delivered, this time included.
      has_place: Whether Dramatiq has it (see `room`).
      is_marked: Whether its headers may have some of this library's own. Those of most messages have none, so the
        others are not looked for.
      is_suspect: Whether its worker may have died of it (see `suspects`).
      slot: Where this process noted that it holds it, if it has a supervisor.
      arrived: When it arrived, by `time.monotonic`.
      touched: When the server was last told that we have it, by `time.monotonic`.
    """

    __slots__ = (
        "_message",
        "ack_subject",
        "arrived",
        "data",
        "deliveries",
        "has_place",
        "is_marked",
        "is_suspect",
        "key",
        "life",
        "owner",
        "settled",
        "slot",
        "source",
        "subject",
        "touched",
    )

    def __init__(self, message: Msg, source: Source, owner: Owner) -> None:
        self.subject = message.subject
        self.data = message.data
        self._message = message
        self.ack_subject = message.reply
        self.source = source
        self.owner = owner
        self.has_place = self.is_suspect = self.settled = False
        self.slot: int | None = None
        tokens = ack_tokens(message.reply)
        durable = source.durable
        self.life = durable.life
        self.deliveries = int(tokens[2])
        self.key: Key = (durable.stream, durable.name, int(tokens[3]), int(tokens[5]))
        self.is_marked = message.mentions(OWN_HEADERS)
        if self.is_marked:
            earlier = self.headers.get(HEADER_EARLIER_DELIVERIES, "")
            self.deliveries += int(earlier) if earlier.isdecimal() else 0
        self.arrived = self.touched = time.monotonic()

    def __str__(self) -> str:
        return f"Message {self.sequence} of {self.stream}"

    @property
    def stream(self) -> str:
        return self.key[0]

    @property
    def sequence(self) -> int:
        return self.key[2]

    @property
    def timestamp(self) -> int:
        """When it was stored, in milliseconds since 1970."""
        return self.key[3] // 1_000_000

    @property
    def may_go_back(self) -> bool:
        """Whether it has waited long enough to be given back to other workers."""
        return self.deliveries <= MOST_RETURNS and time.monotonic() - self.arrived >= MOMENT_SECONDS

    @property
    def pending(self) -> int:
        """How many messages the consumer had left to deliver."""
        return int(ack_tokens(self.ack_subject)[6])

    @property
    def headers(self) -> Mapping[str, str]:
        return self._message.headers

    @property
    def origin(self) -> str:
        """One token that identifies the message wherever it is delivered, also after it was requeued with a delay."""
        if self.is_marked and (origin := self.headers.get(HEADER_ORIGIN)):
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
