"""Storing many messages at once, in atomic batches (ADR-50), which are all or none.

Messages that need not be stored together go in batches too, because that is several times as fast where the
server fsyncs; if one of a batch is refused, its messages are stored one by one.

An atomic batch is stored by its last message, the commit. If the process dies before, the server forgets the
batch; if the server dies in the middle of it, all or none of the messages are there when it is back. Workers may
have the first ones before the last is stored. If the commit's acknowledgement is lost, the batch is sent again;
the server answers that it has those message ids already, which says that the first commit was stored.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dramatiq.common import q_name
from dramatiq.composition import group as dramatiq_group
from dramatiq.message import Message

from dramatiq_jetstream.errors import ApiError, BrokerConnectionError, BrokerError, InvalidOption
from dramatiq_jetstream.jetstream.names import HEADER_BATCH_COMMIT, HEADER_BATCH_ID, HEADER_BATCH_SEQUENCE
from dramatiq_jetstream.wire.connection import PubAck, Publication
from dramatiq_jetstream.wire.ids import new_id

if TYPE_CHECKING:
    from dramatiq_jetstream.broker import JetStreamBroker

__all__ = ["enqueue_many", "group"]

#: The server's limit for one atomic batch.
MAX_ATOMIC = 1_000

#: What the server holds in memory for one batch at most, in bytes.
MAX_BYTES = 8_000_000

#: From so many messages on an atomic batch is faster than storing one by one.
WORTH_A_BATCH = 16

#: So long, in milliseconds, the first commit is waited for before the batch is sent again; it doubles each time.
COMMIT_WAIT = 2_000

_ALREADY_STORED = 10201  # a message id of the batch is in the duplicate window
_PARTS_MISSING = frozenset({10175, 10176})  # some were lost with the connection


def enqueue_many(
    broker: JetStreamBroker, messages: list[Message[Any]], *, atomic: bool, delay: int | None
) -> list[Message[Any]]:
    """Store messages together; see `JetStreamBroker.enqueue_many`."""
    if any("unique_key" in message.options for message in messages):
        if atomic:
            raise InvalidOption("unique_key cannot be used in an atomic batch.")
        return [broker.enqueue(message, delay=delay) for message in messages]
    announced = [broker._announce(message, delay) for message in messages]
    queue_names = {q_name(message.queue_name) for message in announced}
    if atomic and (len(queue_names) > 1 or len(announced) > MAX_ATOMIC):
        raise InvalidOption(
            f"atomic=True takes at most {MAX_ATOMIC} messages for one queue; these are {len(announced)} for "
            f"{len(queue_names)} queues. Enqueue them in parts, or without atomic."
        )
    for queue_name in queue_names:
        broker.declare_queue(queue_name)
        broker.declarations.ensure_queue(queue_name)
    for message in announced:
        broker.emit_before("enqueue", message, delay)
    publications = [broker._publication(message, delay) for message in announced]
    outcomes: list[PubAck | BrokerError | None] = [None] * len(publications)
    if atomic and len(publications) > 1:
        _store_atomically(broker, publications)
    else:
        for positions in _chunks([q_name(message.queue_name) for message in announced], publications):
            stored = _store_chunk(broker, [publications[position] for position in positions])
            for position, outcome in zip(positions, stored, strict=True):
                outcomes[position] = outcome
    failures = []
    for message, outcome in zip(announced, outcomes, strict=True):
        if isinstance(outcome, BrokerError):
            failures.append(outcome)
        else:
            broker.emit_after("enqueue", message, delay)
    if failures:
        raise failures[0]
    return announced


def _chunks(queue_names: list[str], publications: list[Publication]) -> Iterator[list[int]]:
    """Positions of messages that can be stored together, in order: one queue, so many, so many bytes."""
    by_queue: dict[str, list[int]] = {}
    for position, queue_name in enumerate(queue_names):
        by_queue.setdefault(queue_name, []).append(position)
    for positions in by_queue.values():
        chunk: list[int] = []
        size = 0
        for position in positions:
            size += len(publications[position].payload)
            if chunk and (len(chunk) == MAX_ATOMIC or size > MAX_BYTES):
                yield chunk
                chunk, size = [], len(publications[position].payload)
            chunk.append(position)
        yield chunk


def _store_chunk(
    broker: JetStreamBroker, publications: list[Publication]
) -> Sequence[PubAck | BrokerError | None]:
    """Store messages that need not be stored together, together if that is worth while.

    An atomic batch costs the server a few fsyncs, and the same messages one by one cost one each.
    """
    if len(publications) >= WORTH_A_BATCH:
        try:
            _store_atomically(broker, publications)
            return [None] * len(publications)
        except BrokerConnectionError as error:
            return [error] * len(publications)
        except BrokerError:
            pass  # one of them is refused; one by one tells which, and stores the others
    return broker.connection.try_publish_many(publications)


def _store_atomically(broker: JetStreamBroker, publications: list[Publication]) -> None:
    connection = broker.connection
    deadline = time.monotonic() + broker.enqueue_timeout / 1000
    attempts = 0
    while True:
        if attempts:
            time.sleep(0.1)
        attempts += 1
        batch = new_id()
        numbered = []
        for sequence, publication in enumerate(publications, start=1):
            headers = {
                **(publication.headers or {}),
                HEADER_BATCH_ID: batch,
                HEADER_BATCH_SEQUENCE: str(sequence),
            }
            if sequence == len(publications):
                headers[HEADER_BATCH_COMMIT] = "1"
            numbered.append(Publication(publication.subject, publication.payload, headers))
        left = int((deadline - time.monotonic()) * 1000)
        try:
            connection.publish_batch(numbered, timeout=max(1, min(left, COMMIT_WAIT << attempts - 1)))
            return
        except ApiError as error:
            if error.err_code == _ALREADY_STORED and attempts > 1:
                return
            if error.err_code not in _PARTS_MISSING or time.monotonic() >= deadline:
                raise
        except BrokerConnectionError:
            if time.monotonic() >= deadline:
                raise


class _Collector:
    """Stands in for a broker while a group runs, and keeps what it would have enqueued."""

    def __init__(self, broker: JetStreamBroker) -> None:
        self.broker = broker
        self.collected: list[tuple[Message[Any], int | None]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.broker, name)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        self.collected.append((message, delay))
        return message


class group(dramatiq_group):  # noqa: N801 - the name that Dramatiq gives it
    """A `dramatiq.group` that enqueues its messages together when its broker is a `JetStreamBroker`."""

    def run(self, *, delay: int | None = None) -> group:
        from dramatiq_jetstream.broker import JetStreamBroker

        broker = self.broker
        if not isinstance(broker, JetStreamBroker):
            super().run(delay=delay)  # type: ignore[no-untyped-call]
            return self
        collector = _Collector(broker)
        nested = [child for child in self.children if hasattr(child, "broker")]
        owners = [child.broker for child in nested]
        try:
            self.broker = collector
            for child in nested:
                if child.broker is broker:
                    child.broker = collector
            super().run(delay=delay)  # type: ignore[no-untyped-call]
        finally:
            self.broker = broker
            for child, owner in zip(nested, owners, strict=True):
                child.broker = owner
        for wanted in {delay for _, delay in collector.collected}:
            broker.enqueue_many([m for m, delay in collector.collected if delay == wanted], delay=wanted)
        return self
