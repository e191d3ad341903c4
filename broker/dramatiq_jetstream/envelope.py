"""An event on its way to one actor, as a Dramatiq message.

The first run of an event is made from what JetStream delivers; a retry or a replay is an ordinary message
on the actor's queue that carries the event, encoded, in its options. Its `args` stay empty on the wire and
in everything that copies the message (retries, callbacks, dead letters), so that any encoder can carry it;
the consumer puts the decoded event there for the actor alone.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dramatiq.message import Message

__all__ = ["EVENT_OPTION", "Event", "event_of", "to_message"]

#: The message option that carries an event.
EVENT_OPTION = "event"


@dataclass(frozen=True)
class Event:
    """What happened, as the stream holds it; `time` is milliseconds since 1970."""

    subject: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: str = ""
    sequence: int = 0
    time: int = 0

    @property
    def id(self) -> str:
        """The publisher's id of the event (CloudEvents or `Nats-Msg-Id`), else its place in the stream."""
        return (
            self.headers.get("ce-id") or self.headers.get("Nats-Msg-Id") or f"{self.stream}:{self.sequence}"
        )


def to_message(event: Event, *, queue: str, actor: str) -> Message[Any]:
    """The message that hands `event` to `actor`; the same event gives the same message id."""
    return Message(
        queue_name=queue,
        actor_name=actor,
        args=(),
        kwargs={},
        options={
            EVENT_OPTION: {
                "subject": event.subject,
                "data": base64.b64encode(event.data).decode("ascii"),
                "headers": dict(event.headers),
                "stream": event.stream,
                "sequence": event.sequence,
                "time": event.time,
            }
        },
        message_id=f"{event.id}:{actor}",
        message_timestamp=event.time,
    )


def event_of(message: Any) -> Event | None:
    """The event that a message carries, or None for an ordinary message."""
    carried = message.options.get(EVENT_OPTION)
    if not isinstance(carried, Mapping) or "data" not in carried:
        return None
    return Event(
        subject=carried["subject"],
        data=base64.b64decode(carried["data"]),
        headers=carried.get("headers") or {},
        stream=carried.get("stream", ""),
        sequence=carried.get("sequence", 0),
        time=carried.get("time", 0),
    )
