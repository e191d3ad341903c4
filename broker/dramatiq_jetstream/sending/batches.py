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
from typing import Any

from dramatiq.common import q_name
from dramatiq.message import Message

from dramatiq_jetstream.errors import ApiError, BrokerConnectionError, BrokerError, InvalidOption
from dramatiq_jetstream.jetstream.names import HEADER_BATCH_COMMIT, HEADER_BATCH_ID, HEADER_BATCH_SEQUENCE
from dramatiq_jetstream.wire.connection import Connection, PubAck, Publication
from dramatiq_jetstream.wire.error_numbers import BATCH_ALREADY_STORED, BATCH_PARTS_MISSING
from dramatiq_jetstream.wire.ids import new_id

__all__ = ["check_atomic", "store", "store_atomically"]

#: The server's limit for one atomic batch.
MAX_ATOMIC = 1_000

#: What the server holds in memory for one batch at most, in bytes.
MAX_BYTES = 8_000_000

#: From so many messages on an atomic batch is faster than storing one by one.
WORTH_A_BATCH = 16

#: So long, in milliseconds, the first commit is waited for before the batch is sent again; it doubles each time.
COMMIT_WAIT = 2_000


def check_atomic(messages: Sequence[Message[Any]]) -> None:
    """Refuse messages that cannot be stored as all or none.

    Raises:
      InvalidOption: When they are too many, for several queues, or unique.
    """
    if any("unique_key" in message.options for message in messages):
        raise InvalidOption("unique_key cannot be used in an atomic batch.")
    queue_names = {q_name(message.queue_name) for message in messages}
    if len(queue_names) > 1 or len(messages) > MAX_ATOMIC:
        raise InvalidOption(
            f"atomic=True takes at most {MAX_ATOMIC} messages for one queue; these are {len(messages)} for "
            f"{len(queue_names)} queues. Enqueue them in parts, or without atomic."
        )


def store(
    connection: Connection, by_queue: Sequence[tuple[str, Publication]], *, timeout: int
) -> list[PubAck | BrokerError | None]:
    """Store publications, each with its queue, that need not be stored together; return what became of each."""
    outcomes: list[PubAck | BrokerError | None] = [None] * len(by_queue)
    publications = [publication for _, publication in by_queue]
    for positions in _chunks([queue for queue, _ in by_queue], publications):
        chunk = [publications[position] for position in positions]
        for position, outcome in zip(positions, _store_chunk(connection, chunk, timeout), strict=True):
            outcomes[position] = outcome
    return outcomes


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
    connection: Connection, publications: list[Publication], timeout: int
) -> Sequence[PubAck | BrokerError | None]:
    """Store messages that need not be stored together, together if that is worth while.

    An atomic batch costs the server a few fsyncs, and the same messages one by one cost one each.
    """
    if len(publications) >= WORTH_A_BATCH:
        try:
            store_atomically(connection, publications, timeout=timeout)
            return [None] * len(publications)
        except BrokerConnectionError as error:
            return [error] * len(publications)
        except BrokerError:
            pass  # one of them is refused; one by one tells which, and stores the others
    return connection.try_publish_many(publications)


def store_atomically(connection: Connection, publications: Sequence[Publication], *, timeout: int) -> None:
    """Store publications, at most 1,000 for one stream: all or none.

    Parameters:
      timeout: Milliseconds after which it raises.
    """
    deadline = time.monotonic() + timeout / 1000
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
            if error.err_code == BATCH_ALREADY_STORED and attempts > 1:
                return
            if error.err_code not in BATCH_PARTS_MISSING or time.monotonic() >= deadline:
                raise
        except BrokerConnectionError:
            if time.monotonic() >= deadline:
                raise
