"""Turns a message into what is published: subject, body and headers, at once or as a schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dramatiq.common import q_name
from dramatiq.message import Message

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import InvalidOption
from dramatiq_jetstream.jetstream.names import HEADER_MSG_ID, OPTION_TRACE_CONTEXT, trace_headers
from dramatiq_jetstream.wire.connection import Publication

from . import delays
from .fitting import fit, is_enlarged

__all__ = ["Publications"]

#: The size of a body, in bytes, that every server takes.
ALWAYS_FITS_BYTES = 1_000


class Publications:
    """Makes the publications of one broker.

    Parameters:
      unique_id: Tells one enqueue call from another; becomes the call's `Nats-Msg-Id`.
      room_beside: Bytes that headers leave for a body.
      encloses: Whether a message is a callback with the message it follows as its argument.
      refer: Returns a message with a reference in place of the event that it carries.
    """

    def __init__(
        self,
        config: BrokerConfig,
        unique_id: Callable[[Message[Any]], str],
        room_beside: Callable[[Mapping[str, str]], int],
        encloses: Callable[[Message[Any]], bool],
        refer: Callable[[Message[Any]], Message[Any] | None],
    ) -> None:
        self._config = config
        self._unique_id = unique_id
        self._room_beside = room_beside
        self._encloses = encloses
        self._refer = refer

    @staticmethod
    def announced(message: Message[Any], delay: int | None) -> Message[Any]:
        """The message as middleware and the caller see it: a delayed one with its `eta`."""
        if delay is None:
            return message
        return message.copy(options={"eta": delays.eta_after(delays.check_delay(delay))})

    def publication(self, announced: Message[Any], delay: int | None) -> Publication:
        """What to publish for a message that was announced."""
        queue_name = q_name(announced.queue_name)
        stored = announced
        if "eta" in announced.options:
            # The server keeps the time; a worker that saw `eta` would hold the message in its memory.
            options = {name: value for name, value in announced.options.items() if name != "eta"}
            stored = dataclasses.replace(announced.copy(), options=options)
        if stored.queue_name != queue_name:
            stored = stored.copy(queue_name=queue_name)
        target = self._config.names.task(queue_name, self._priority(announced))
        unique = self._unique_id(announced)
        headers = {HEADER_MSG_ID: unique}
        context = announced.options.get(OPTION_TRACE_CONTEXT)
        if context is not None:
            headers.update(trace_headers(context))
        subject = target
        if delay is not None and delay > 0:  # a delay that is over needs no schedule
            subject = self._config.names.delayed(queue_name, announced.message_id, unique)
            headers.update(delays.schedule(int(announced.options["eta"]), target))
        body = stored.encode()
        if len(body) > ALWAYS_FITS_BYTES:
            room = self._room_beside(headers)
            if len(body) > room and self._grew(stored, len(body), headers):
                body = fit(stored, room, headers, self._refer)
        return Publication(subject, body, headers)

    def _grew(self, message: Message[Any], size: int, headers: Mapping[str, str]) -> bool:
        """Whether a message is too large because of what was added to it; one that the caller made too large is
        refused."""
        if is_enlarged(message) or self._encloses(message):
            return True
        own = {name: value for name, value in headers.items() if name not in delays.SCHEDULE_HEADERS}
        return size <= self._room_beside(own)

    def _priority(self, message: Message[Any]) -> int | None:
        """The priority of a message; as in RabbitMQ, one above the highest is the highest."""
        priority = message.options.get("broker_priority")
        highest = self._config.max_priority
        if priority is None or not highest:
            return None
        if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
            raise InvalidOption(
                f"broker_priority={priority!r} cannot be used: give a whole number from 0 to {highest}."
            )
        return min(priority, highest) or None
