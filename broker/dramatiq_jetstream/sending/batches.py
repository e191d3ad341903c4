"""Storing many messages at once, in atomic batches (ADR-50), which are all or none.

Messages that need not be stored together go in batches too, because that is several times faster where the server
fsyncs. If the server refuses one message of a batch, the messages are stored one by one.

An atomic batch is stored by its last message, the commit. If the process dies before, the server forgets the
batch; if the server dies in the middle of it, all or none of the messages are there when it is back. Workers may
have the first ones before the last is stored. If the commit's acknowledgement is lost, the batch is sent again;
the server answers that it has those message ids already, which says that the first commit was stored.

A missing stream is created again and its messages are stored then. All of this is one call: it gives up one timeout
after its last progress, however many parts there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from dramatiq.common import q_name
from dramatiq.message import Message

from dramatiq_jetstream.errors import (
    ApiError,
    BrokerConnectionError,
    BrokerError,
    InvalidOption,
    NotSent,
    StoreFull,
    StreamLost,
    TopologyMissing,
)
from dramatiq_jetstream.jetstream.names import HEADER_BATCH_COMMIT, HEADER_BATCH_ID, HEADER_BATCH_SEQUENCE
from dramatiq_jetstream.wire.asking import NO_RESPONDERS_GRACE_MS
from dramatiq_jetstream.wire.connection import Connection, PubAck, Publication
from dramatiq_jetstream.wire.error_numbers import BATCH_ALREADY_STORED, BATCH_PARTS_MISSING
from dramatiq_jetstream.wire.ids import new_id
from dramatiq_jetstream.wire.replies import in_doubt

__all__ = ["check_atomic", "store", "store_atomically"]

#: The server's limit for one atomic batch.
MAX_ATOMIC = 1_000

#: The most bytes that the server holds in memory for one batch.
MAX_BYTES = 8_000_000

#: From this many messages on an atomic batch is faster than storing one by one.
WORTH_A_BATCH = 16

#: Initial commit timeout in milliseconds, which doubles on each retry; longer than a stream may take to start.
COMMIT_WAIT = NO_RESPONDERS_GRACE_MS + 1_000

#: What says that there is no stream.
NO_STREAM = (TopologyMissing, StreamLost)

#: What became of a publication; None says that it was stored in a batch, which has no acknowledgement for each.
Outcome = PubAck | Exception | None


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
    connection: Connection,
    by_queue: Sequence[tuple[str, Publication]],
    *,
    deadline: float,
    timeout: float,
    make_again: Callable[[str], bool],
) -> list[Outcome]:
    """Store publications, each with its queue, that need not be stored together; return what became of each.

    Parameters:
      deadline: The monotonic time after which nothing more is sent; it moves each time a part is stored.
      timeout: Seconds from each such part to the new deadline.
      make_again: Creates a queue whose stream is missing; returns False when that is not allowed.
    """
    outcomes: list[Outcome] = [None] * len(by_queue)
    for queue, positions in _chunks(by_queue):
        chunk = [by_queue[position][1] for position in positions]
        stored = _store_chunk(connection, chunk, deadline)
        if any(isinstance(outcome, NO_STREAM) for outcome in stored):
            stored = _store_again(connection, chunk, stored, deadline, partial(make_again, queue))
        for position, outcome in zip(positions, stored, strict=True):
            outcomes[position] = outcome
        if not any(isinstance(outcome, BrokerConnectionError) for outcome in stored):
            deadline = time.monotonic() + timeout
    return outcomes


def _store_again(
    connection: Connection,
    chunk: list[Publication],
    outcomes: list[Outcome],
    deadline: float,
    make_again: Callable[[], bool],
) -> list[Outcome]:
    """Store the messages that found no stream, once there is one again."""
    lost = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, NO_STREAM)]
    try:
        if time.monotonic() >= deadline or not make_again():
            return outcomes
    except BrokerError as error:
        found: list[Outcome] = [error] * len(lost)
    else:
        found = _store_chunk(connection, [chunk[number] for number in lost], deadline)
    for number, outcome in zip(lost, found, strict=True):
        # A message that may have been stored before still may, whatever is refused now.
        if not (isinstance(outcomes[number], StreamLost) and isinstance(outcome, Exception)):
            outcomes[number] = outcome
    return outcomes


def _chunks(by_queue: Sequence[tuple[str, Publication]]) -> Iterator[tuple[str, list[int]]]:
    """Positions of messages that can be stored together, in order: one queue, limited in number and bytes."""
    positions_of: dict[str, list[int]] = {}
    for position, (queue, _) in enumerate(by_queue):
        positions_of.setdefault(queue, []).append(position)
    for queue, positions in positions_of.items():
        chunk: list[int] = []
        size = 0
        for position in positions:
            length = len(by_queue[position][1].payload)
            size += length
            if chunk and (len(chunk) == MAX_ATOMIC or size > MAX_BYTES):
                yield queue, chunk
                chunk, size = [], length
            chunk.append(position)
        yield queue, chunk


def _store_chunk(connection: Connection, publications: list[Publication], deadline: float) -> list[Outcome]:
    """Store messages that need not be stored together, in one batch if that is faster.

    An atomic batch costs the server a few fsyncs, and the same messages one by one cost one each.
    """
    if len(publications) >= WORTH_A_BATCH:
        try:
            store_atomically(connection, publications, deadline=deadline)
            return [None] * len(publications)
        except (BrokerConnectionError, TopologyMissing) as error:
            return [error] * len(publications)
        except (BrokerError, ValueError):
            pass  # one of them is refused; storing one by one shows which, and stores the others
    try:
        return list(connection.try_publish_many(publications, timeout=_left(deadline)))
    except BrokerError as error:
        return [error] * len(publications)


def store_atomically(
    connection: Connection,
    publications: Sequence[Publication],
    *,
    deadline: float,
    make_again: Callable[[], bool] = lambda: False,
) -> None:
    """Store publications, at most 1,000 for one stream: all or none.

    Parameters:
      deadline: The monotonic time after which it raises.
      make_again: Makes the stream if it is gone; False when that is not allowed.
    """
    attempts = 0
    doubt: BrokerConnectionError | None = None
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
        try:
            connection.publish_batch(numbered, timeout=min(_left(deadline), COMMIT_WAIT << attempts - 1))
            return
        except TopologyMissing as error:
            try:
                again = time.monotonic() < deadline and make_again()
            except BrokerError as failure:
                raise doubt or failure from None
            if not again:
                raise error if doubt is None else in_doubt(error) from None
        except ApiError as error:
            if error.err_code == BATCH_ALREADY_STORED and attempts > 1:
                return
            if error.err_code not in BATCH_PARTS_MISSING:
                raise
            if time.monotonic() >= deadline:
                raise doubt or error from None
        except BrokerConnectionError as error:
            if not isinstance(error, (NotSent, StoreFull)):
                doubt = error
            if time.monotonic() >= deadline:
                raise doubt or error from None


def _left(deadline: float) -> int:
    """Milliseconds until a deadline, at least one."""
    return max(1, int((deadline - time.monotonic()) * 1000))
