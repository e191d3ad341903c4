"""Writes to a stream on a condition: that the newest message on a subject is the one that the writer knows.

Each write carries an id of its own. A write whose acknowledgement got lost is sent again by the connection and is then
either known to the server as a duplicate, or refused because its own first copy was stored. Before such a refusal
becomes a conflict, the server is asked whether it has stored that id, so a writer never loses against itself.

In a cluster, a server that was the leader may not know for a while that it no longer is. It still answers from what it
has, and its reply may come before the true leader's: a write is refused although it is being stored. So a refusal is
believed only when there is a message that is newer than the expected one and is not ours; otherwise the write is sent
again under its id.

If the process dies, its write is stored or not, as the server decides. Any thread may call this.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from dramatiq_jetstream.errors import ApiError
from dramatiq_jetstream.wire.connection import Connection, PubAck
from dramatiq_jetstream.wire.error_numbers import CONFLICT, OTHER_WRITE_IN_FLIGHT, ROLLUP_FAILED
from dramatiq_jetstream.wire.ids import new_id

from .names import HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE, HEADER_EXPECTED_SUBJECT, HEADER_MSG_ID
from .reading import StoredMessage, last_message, last_message_direct

__all__ = ["HEADER_ROLLUP", "ConditionalWrites", "Conflict"]

HEADER_ROLLUP = "Nats-Rollup"

#: For how long a server may believe that it is the leader although it is not.
DEPOSED_SECONDS = 5.0


class Conflict(Exception):
    """The newest message on the subject was not the expected one."""


class ConditionalWrites:
    """The conditional writes to one stream.

    Parameters:
      publish: Stores a message with its headers, also when the stream has to be made first.

    Attributes:
      one_server: Whether the stream is on one server only, so that none can be behind another.
    """

    def __init__(
        self, connection: Connection, stream: str, publish: Callable[[str, bytes, dict[str, str]], PubAck]
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._publish = publish
        self.one_server = False

    def last(
        self, subject: str, *, timeout: int | None = None, must_exist: bool = False
    ) -> StoredMessage | None:
        """The newest message on a subject; from the leader, if another server may be behind it."""
        read = last_message_direct if self.one_server else last_message
        return read(self._connection, self._stream, subject, timeout=timeout, must_exist=must_exist)

    def compare_and_set(self, subject: str, value: bytes, headers: dict[str, str], expected: int) -> int:
        """Store a message if the newest on its subject is still `expected`; return its sequence.

        Raises:
          Conflict: When another writer was first.
        """
        write = new_id()
        headers = {**headers, HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE: str(expected), HEADER_MSG_ID: write}
        began = time.monotonic()
        deadline = began + self._connection.timeout / 1000
        repeats = self._connection.repeats
        while True:
            try:
                return self._publish(subject, value, headers).seq
            except ApiError as error:
                if error.err_code == OTHER_WRITE_IN_FLIGHT and time.monotonic() < deadline:
                    time.sleep(random.uniform(0.001, 0.01))  # the outcome of that write decides
                    continue
                if error.err_code not in CONFLICT:
                    raise
            newest = self.newest(headers.get(HEADER_EXPECTED_SUBJECT, subject))
            if newest is not None and newest.headers.get(HEADER_MSG_ID) == write:
                return newest.sequence
            outdated = newest is None or newest.sequence <= expected
            if outdated and not self.one_server and time.monotonic() - began < DEPOSED_SECONDS:
                time.sleep(random.uniform(0.005, 0.05))
                continue
            own = None
            if not self.one_server or self._connection.repeats != repeats:  # perhaps it was this write
                own = self._stored_as(subject, write)
            if own is None:
                raise Conflict
            return own

    def newest(self, subject: str) -> StoredMessage | None:
        """The newest message on a subject, which may have wildcards."""
        return self.last(subject)

    def _stored_as(self, subject: str, write: str) -> int | None:
        """Ask whether a write was stored, without writing: return its revision, or None.

        The server looks for duplicates before it looks at rollups, alone and in a cluster, and there is no rollup
        of this kind. (Not every header will do: expecting another last message id stops the stream of a cluster,
        whose servers notice only when they apply it; expecting a revision is checked before duplicates elsewhere.)
        """
        try:
            return self._connection.publish(subject, b"", {HEADER_MSG_ID: write, HEADER_ROLLUP: "none"}).seq
        except ApiError as error:
            if error.err_code != ROLLUP_FAILED:
                raise
            return None
