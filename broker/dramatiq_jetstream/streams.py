"""Reading a stream: one message, the newest, or all of them in order, without a consumer on the server; removing some.

    orders = broker.stream("ORDERS")
    for event in orders.read("ORDER.created"):
        print(event.sequence, event.time, event.data)

A stream is read from its leader or from a replica that has caught up with it, so what was acknowledged before the call
is there. Reading changes nothing, and leaves nothing on the server if the process dies. Removing may be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from .errors import ApiError, NotFound, TopologyMissing
from .jetstream.inventory import consumers
from .jetstream.listing import PAGE, Listing
from .jetstream.reading import StoredMessage, first_message, first_message_since, last_message, message_at
from .wire.connection import Connection
from .wire.error_numbers import NO_MESSAGE_TO_DELETE, SEQUENCE_NOT_FOUND

__all__ = ["Range", "StoredMessage", "Stream", "StreamConsumer"]


@dataclass(frozen=True, slots=True)
class Range:
    """The sequences of the first and the last message of a stream; of an empty one, `first` is `last` + 1.

    Examples:
      >>> seen = broker.stream("ORDERS").range()
      >>> seen.last >= seen.first
      True
    """

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class StreamConsumer:
    """How far a consumer of a stream is.

    Attributes:
      waiting: Messages that were not delivered yet.
      in_flight: Messages that were delivered and not acked.
      settled_to: The sequence up to which it has nothing left to do; while it has, that of the last before.

    Examples:
      >>> behind = [consumer.name for consumer in broker.stream("ORDERS").consumers() if consumer.waiting > 1_000]
      >>> behind
      []
    """

    name: str
    waiting: int
    in_flight: int
    settled_to: int = 0


class Stream:
    """One stream, made by `broker.stream(name)`. Any thread may use it.

    All methods raise `TopologyMissing` when the stream does not exist, and `BrokerConnectionError` when the server
    does not answer within the broker's `enqueue_timeout`.

    Examples:
      >>> orders = broker.stream("ORDERS")
      >>> first = orders.first("ORDER.created")
      >>> first.data
      b'17'
      >>> orders.at(first.sequence).data, orders.since(first.time).data
      (b'17', b'17')
      >>> [event.subject for event in orders.read("ORDER.created")]
      ['ORDER.created']
      >>> orders.last().sequence == orders.range().last
      True
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self.name = name
        self._connection = connection
        self._listing = Listing(connection, name)

    def __repr__(self) -> str:
        return f"Stream({self.name!r})"

    def range(self) -> Range:
        """The sequences that the stream has now."""
        try:
            state = self._connection.api(f"STREAM.INFO.{self.name}")["state"]
        except NotFound:
            raise TopologyMissing(
                f"There is no stream {self.name}: create it with `fleet setup`, or correct the name."
            ) from None
        return Range(int(state["first_seq"]), int(state["last_seq"]))

    def read(self, subject: str = ">", *, start: int = 1, page: int = PAGE) -> Iterator[StoredMessage]:
        """Yield the messages on a subject, oldest first.

        Parameters:
          subject: `*` and `>` as in NATS.
          start: The sequence to begin with.
          page: How many messages to ask for at once; choose fewer if you are going to stop early.
        """
        found = False
        for message in self._listing.read(subject, start=start, page=page):
            found = True
            yield message
        if not found:
            self.range()

    def newest(
        self, subject: str = ">", *, before: int | None = None, page: int = 64
    ) -> Iterator[StoredMessage]:
        """Yield the messages on a subject, newest first. One that was stored a moment ago may be missing.

        Parameters:
          subject: `*` and `>` as in NATS.
          before: Only messages with a smaller sequence: the way to the next page.
          page: About how many messages to ask for at once.

        Examples:
          >>> [event.data for event in broker.stream("ORDERS").newest("ORDER.created")]
          [b'17']
        """
        found = False
        for message in self._listing.read_back(subject, before=before, page=page):
            found = True
            yield message
        if not found:
            self.range()

    def _checked(self, found: StoredMessage | None) -> StoredMessage | None:
        """What was found; when that is nothing, the stream must at least exist."""
        if found is None:
            self.range()
        return found

    def at(self, sequence: int) -> StoredMessage | None:
        """The message with a sequence, or None."""
        return self._checked(message_at(self._connection, self.name, sequence))

    def first(self, subject: str = ">", *, start: int = 1) -> StoredMessage | None:
        """The oldest message on a subject from sequence `start` on, or None."""
        return self._checked(first_message(self._connection, self.name, subject, start))

    def since(self, time: int, subject: str = ">") -> StoredMessage | None:
        """The oldest message on a subject stored at `time` or later (milliseconds since 1970), or None."""
        moment = datetime.fromtimestamp(time / 1000, UTC)
        return self._checked(first_message_since(self._connection, self.name, subject, moment))

    def last(self, subject: str = ">") -> StoredMessage | None:
        """The newest message on a subject, or None."""
        return self._checked(last_message(self._connection, self.name, subject))

    def consumers(self) -> list[StreamConsumer]:
        """How far each consumer of the stream is.

        Examples:
          >>> for consumer in broker.stream("ORDERS").consumers():
          ...     print(consumer.name, consumer.waiting)
        """
        self.range()
        return [
            StreamConsumer(
                info["name"], info["num_pending"], info["num_ack_pending"], info["ack_floor"]["stream_seq"]
            )
            for info in consumers(self._connection, self.name)
        ]

    # Removing

    def erase(self, sequence: int) -> bool:
        """Remove a message and overwrite its bytes on the server's disk; False when there is none.

        Raises:
          ApiError: When the stream allows no deletions.

        Examples:
          >>> stored = broker.publish("ORDER.erased", b"19")
          >>> orders = broker.stream("ORDERS")
          >>> orders.erase(stored.seq), orders.erase(stored.seq)
          (True, False)
        """
        try:
            self._connection.api(f"STREAM.MSG.DELETE.{self.name}", {"seq": sequence, "no_erase": False})
        except ApiError as error:
            # The second is also what a stream says that allows no deletions.
            gone = error.err_code == NO_MESSAGE_TO_DELETE and "not permitted" not in error.description
            if error.err_code != SEQUENCE_NOT_FOUND and not gone:
                raise
            return False
        return True

    def trim(self, before: int) -> int:
        """Remove all messages with a smaller sequence than `before`; returns how many there were.

        Examples:
          >>> orders = broker.stream("ORDERS")
          >>> orders.trim(before=orders.range().first)
          0
        """
        reply = self._connection.api(f"STREAM.PURGE.{self.name}", {"seq": before})
        return int(reply.get("purged", 0))
