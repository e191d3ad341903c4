"""Stores a broker's messages and events: announces them, takes unique keys, publishes, recreates missing streams.

If the calling thread has just run a message, what it sends follows that message. An error here marks that message,
which must then not be acked (see `follow_ups`).

If the process dies here, the message is stored or it is not, and the caller never learned that it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dramatiq.common import q_name
from dramatiq.message import Message

from dramatiq_jetstream.config import BrokerConfig
from dramatiq_jetstream.errors import BrokerError, StoreTimeout, StreamLost, TopologyMissing
from dramatiq_jetstream.jetstream.declaring import Declarations
from dramatiq_jetstream.jetstream.names import HEADER_MSG_ID, check_subject
from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.wire.connection import Connection, PubAck, Publication
from dramatiq_jetstream.wire.ids import new_id

from . import batches, delays
from .many import Many, Ready
from .options import check_options
from .publications import Publications
from .references import References
from .unique import Claim, free

__all__ = ["Announcer", "FollowedMessages", "Sender"]


class Announcer(Protocol):
    """Tells a broker's middleware what is enqueued.

    Attributes:
      actor_options: The options that middleware and the broker declare.
    """

    actor_options: set[str]

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue that was not declared before."""

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Call what listens before a signal."""

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Call what listens after a signal."""


class FollowedMessages(Protocol):
    """Knows which message the calling thread has just run."""

    def unique_id(self, message: Message[Any]) -> str:
        """What tells one enqueue call from another."""

    def encloses(self, message: Message[Any]) -> bool:
        """Whether `message` is a callback that carries the message this thread has just run."""

    def is_retry(self, message: Message[Any]) -> bool:
        """Whether this thread has just run `message`."""

    def failed(self, error: BaseException) -> None:
        """Mark the message whose follow-up could not be enqueued."""


class Sender:
    """The way into the streams for one broker.

    Parameters:
      unique_keys: Returns the bucket of unique keys.
    """

    def __init__(
        self,
        config: BrokerConfig,
        connection: Connection,
        declarations: Declarations,
        announcer: Announcer,
        follow_ups: FollowedMessages,
        unique_keys: Callable[[], Bucket],
    ) -> None:
        self._config = config
        self._connection = connection
        self._declarations = declarations
        self._announcer = announcer
        self._follow_ups = follow_ups
        self._unique_keys = unique_keys
        self._publications = Publications(
            config,
            follow_ups.unique_id,
            connection.room_beside,
            follow_ups.encloses,
            References(connection).refer,
        )

    def enqueue(self, message: Message[Any], delay: int | None) -> Message[Any]:
        """See `JetStreamBroker.enqueue`."""
        try:
            announced, queue_name, publication, claim = self._prepare(message, delay)
            try:
                ack = self._store(queue_name, publication)
            except BaseException as error:
                if claim is not None:
                    claim.failed(error)
                raise
            if claim is not None:
                claim.stored(ack)
            self._announcer.emit_after("enqueue", announced, delay)
            return announced
        except BaseException as error:
            self._follow_ups.failed(error)
            raise

    def enqueue_many(
        self, messages: list[Message[Any]], *, atomic: bool, delay: int | None
    ) -> list[Message[Any]]:
        """See `JetStreamBroker.enqueue_many`."""
        try:
            enqueue = self._enqueue_all_or_none if atomic else self._enqueue_each
            return enqueue(messages, delay)
        except BaseException as error:
            self._follow_ups.failed(error)
            raise

    def publish(
        self,
        subject: str,
        event: Any,
        *,
        event_id: str | None,
        headers: Mapping[str, str] | None,
        timeout: int | None,
    ) -> PubAck:
        """See `JetStreamBroker.publish`."""
        try:
            check_subject(subject)
            data = event if isinstance(event, bytes) else event.SerializeToString()
            complete = {**(headers or {}), HEADER_MSG_ID: event_id or new_id()}
            return self._connection.publish(subject, data, complete, timeout=timeout)
        except BaseException as error:
            self._follow_ups.failed(error)
            raise

    def cancel(self, queue_name: str, message_id: str) -> int:
        """Cancel the delays of a message on one queue, and free its unique key; return how many were waiting."""
        waiting = delays.waiting(self._connection, self._config.names, queue_name, message_id)
        if waiting is None:
            return 0
        cancelled = delays.cancel(self._connection, self._config.names, queue_name, message_id)
        if cancelled:
            free(self._unique_keys(), waiting)
        return cancelled

    def run_now(self, queue_name: str, message_id: str) -> int:
        """End the delay of a message on one queue; return how many were waiting."""
        return delays.run_now(self._connection, self._config.names, queue_name, message_id)

    def _prepare(self, message: Message[Any], delay: int | None) -> Ready:
        """Announce a message, and make what is published for it."""
        queue_name = q_name(message.queue_name)
        if message.options and not self._follow_ups.is_retry(message):
            check_options(
                message.options,
                self._announcer.actor_options,
                delayed=delay is not None,
                highest=self._config.max_priority,
            )
        self._announcer.declare_queue(queue_name)
        announced = self._publications.announced(message, delay)
        self._declarations.ensure_queue(queue_name)
        self._announcer.emit_before("enqueue", announced, delay)
        publication = self._publications.publication(announced, delay)
        # A retry is the same message, however late it comes.
        if "unique_key" not in announced.options or self._follow_ups.is_retry(announced):
            return announced, queue_name, publication, None
        claim = Claim(self._config, self._unique_keys(), announced, publication)
        return announced, queue_name, publication, claim

    def _store(self, queue_name: str, publication: Publication) -> PubAck:
        """Publish to a queue, which is made again if it disappeared."""
        deadline = time.monotonic() + self._config.enqueue_timeout / 1000
        doubt: StoreTimeout | None = None
        while True:
            left = max(1, int((deadline - time.monotonic()) * 1000))
            try:
                try:
                    return self._connection.publish(
                        publication.subject, publication.payload, publication.headers, timeout=left
                    )
                except (TopologyMissing, StreamLost) as error:
                    if isinstance(error, StreamLost):
                        doubt = error
                    if time.monotonic() >= deadline or not self._make_again(queue_name):
                        raise
            except BrokerError as error:
                if doubt is None or error is doubt:
                    raise
                raise doubt from error

    def _make_again(self, queue_name: str) -> bool:
        """Make a queue whose stream is gone; False when that is not allowed."""
        if self._config.declare:
            self._declarations.ensure_queue(queue_name, again=True)
        return self._config.declare

    def _enqueue_each(self, messages: list[Message[Any]], delay: int | None) -> list[Message[Any]]:
        many = Many(messages, self._config.enqueue_timeout / 1000)
        many.make_ready(lambda message: self._prepare(message, delay))
        stored = many.store(self._connection, self._make_again)
        for message in stored:
            self._announcer.emit_after("enqueue", message, delay)
        many.raise_failure()
        return stored

    def _enqueue_all_or_none(self, messages: list[Message[Any]], delay: int | None) -> list[Message[Any]]:
        batches.check_atomic(messages)
        ready = [self._prepare(message, delay) for message in messages]
        if len(ready) == 1:
            self._store(ready[0][1], ready[0][2])
        elif ready:
            batches.store_atomically(
                self._connection,
                [publication for _, _, publication, _ in ready],
                deadline=time.monotonic() + self._config.enqueue_timeout / 1000,
                make_again=lambda: self._make_again(ready[0][1]),
            )
        for announced, _, _, _ in ready:
            self._announcer.emit_after("enqueue", announced, delay)
        return [announced for announced, _, _, _ in ready]
