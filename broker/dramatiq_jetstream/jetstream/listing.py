"""Reading all messages under a subject in pages (batched direct get, ADR-31).

Any replica may answer a page and may lag behind the leader. The leader is asked first how far the subject
goes, and a listing that ends before that is continued until it has caught up.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from queue import Empty
from typing import Any

from dramatiq_jetstream.errors import BrokerConnectionError, TopologyMissing
from dramatiq_jetstream.wire.connection import Connection, CoreSubscription, Msg
from dramatiq_jetstream.wire.thread_queue import ThreadQueue

from .reading import StoredMessage, first_message, last_message, parse_time

__all__ = ["Listing"]

#: Messages and bytes of one page; a caller never holds more than this beside what it keeps.
PAGE = 10_000
PAGE_BYTES = 8 * 1024 * 1024

#: How many messages a reading from the end asks for at once: the server cannot be told where to stop.
READ_BACK = 256

#: How much of a stream, in sequences, is looked at in one go from its end.
MAX_WINDOW = 16_384

#: Seconds without a message after which a page counts as lost and is asked for again.
SILENCE_SECONDS = 2.0

#: Seconds between two looks at a replica that lags behind.
LAG_PAUSE_SECONDS = 0.05


class Listing:
    """Lists messages of one stream. Any number of threads may do so at once."""

    def __init__(self, connection: Connection, stream: str) -> None:
        self._connection = connection
        self._stream = stream
        self._inbox = ""
        self._subscription: CoreSubscription | None = None
        self._pages: dict[str, ThreadQueue[Msg]] = {}

    def read(
        self, subject: str, *, start: int = 1, page: int = PAGE, timeout: int | None = None
    ) -> Iterator[StoredMessage]:
        """Yield the stream's messages on `subject` (wildcards allowed), oldest first.

        At least everything that was acknowledged before the call is there.

        Parameters:
          start: The sequence to begin with.
          page: How many messages to ask for at once; choose fewer if you are going to stop early.
          timeout: Milliseconds for each page; None takes the connection's own.

        Raises:
          TopologyMissing: When the stream does not exist.
          BrokerConnectionError: When no answer came in time.
        """
        seconds = (self._connection.timeout if timeout is None else timeout) / 1000
        newest = self._newest(subject)
        deadline = time.monotonic() + seconds
        while newest:
            before = start
            for message in self._page(subject, start, page, deadline):
                start = message.sequence + 1
                yield message
                deadline = time.monotonic() + seconds
            if start > before:
                continue
            if start > newest:
                return
            # Nothing more here, though the leader had more: it expired since, or this replica lags.
            newest = self._newest(subject)
            if start > newest:
                return
            self._check(deadline)

    def newest(
        self, subjects: Sequence[str], *, since: int, timeout: int | None = None
    ) -> dict[str, StoredMessage]:
        """Return the newest message on each of the subjects (no wildcards), as one replica has them at one moment.

        Parameters:
          since: A sequence that is acknowledged, and not newer than the newest message on the last subject. A replica
            that has not applied it yet is not believed.
          timeout: Milliseconds; None takes the connection's own.

        Raises:
          TopologyMissing, BrokerConnectionError: As for `read`.
        """
        deadline = time.monotonic() + (self._connection.timeout if timeout is None else timeout) / 1000
        while True:
            # A message that is overwritten while it is read cuts the reply short.
            found, complete = self._ask({"multi_last": list(subjects)}, deadline)
            newest = {message.subject: message for message in found}
            last = newest.get(subjects[-1])
            if complete and last is not None and last.sequence >= since:
                return newest
            self._check(deadline)

    def _check(self, deadline: float) -> None:
        """Pause before a replica that lags is looked at again."""
        if time.monotonic() > deadline:
            raise BrokerConnectionError(
                f"Stream {self._stream}: the replicas did not catch up with their leader in time."
            )
        time.sleep(LAG_PAUSE_SECONDS)

    def count(self, subject: str) -> int:
        """How many messages the stream has on `subject` (wildcards allowed), as one replica has them.

        The server says how many follow one of them, so that one is read whatever their number.

        Raises:
          TopologyMissing, BrokerConnectionError: As for `read`.
        """
        deadline = time.monotonic() + self._connection.timeout / 1000
        request = {"seq": 1, "next_by_subj": subject, "batch": 1}
        found = self._ask(request, deadline)[0]
        return 1 + int(found[0].headers["Nats-Num-Pending"]) if found else 0

    def read_back(
        self, subject: str, *, before: int | None = None, page: int = 64
    ) -> Iterator[StoredMessage]:
        """Yield the stream's messages on `subject` (wildcards allowed), newest first.

        A replica answers as far as it is: it may miss what was stored a moment ago.

        Parameters:
          before: Only those with a smaller sequence.
          page: About how many messages to ask for at once.

        Raises:
          As `read`.
        """
        oldest = first_message(self._connection, self._stream, subject)
        if oldest is None:
            return
        newest = self._newest(subject)
        end = newest + 1 if before is None else min(before, newest + 1)
        window = page
        while end > oldest.sequence:
            start = max(oldest.sequence, end - window)
            found = self._between(subject, start, end)
            yield from reversed(found)
            if len(found) < page:  # there are gaps, or other subjects: look at more of the stream
                window = min(4 * window, MAX_WINDOW)
            end = start

    def _between(self, subject: str, start: int, end: int) -> list[StoredMessage]:
        found: list[StoredMessage] = []
        while start < end:
            deadline = time.monotonic() + self._connection.timeout / 1000
            page = self._page(subject, start, min(READ_BACK, end - start), deadline)
            found += [message for message in page if message.sequence < end]
            if not page or page[-1].sequence >= end:
                break
            start = page[-1].sequence + 1
        return found

    def _newest(self, subject: str) -> int:
        message = last_message(self._connection, self._stream, subject)
        return message.sequence if message is not None else 0

    def _page(self, subject: str, start: int, size: int, deadline: float) -> list[StoredMessage]:
        request = {"seq": start, "next_by_subj": subject, "batch": size, "max_bytes": PAGE_BYTES}
        return self._ask(request, deadline)[0]

    def _ask(self, request: Mapping[str, Any], deadline: float) -> tuple[list[StoredMessage], bool]:
        """Return the messages of a reply, and whether it was complete."""
        inbox = self._listen()
        while True:
            token = secrets.token_hex(8)
            replies = self._pages[token] = ThreadQueue()
            try:
                self._connection.send(
                    self._connection.api_subject(f"DIRECT.GET.{self._stream}"),
                    json.dumps(request).encode(),
                    reply=f"{inbox}.{token}",
                )
                return self._collect(replies, deadline)
            except Empty:
                if time.monotonic() > deadline:
                    raise BrokerConnectionError(
                        f"No answer to a listing of stream {self._stream} in time."
                    ) from None
                # Behind a leaf node, a stream that does not exist is silent. The API says so.
                last_message(self._connection, self._stream, ">", must_exist=True)
            finally:
                del self._pages[token]

    def _collect(self, replies: ThreadQueue[Msg], deadline: float) -> tuple[list[StoredMessage], bool]:
        found: list[StoredMessage] = []
        while True:
            # Half of what is left, so that there is time to ask again.
            reply = replies.get(timeout=max(0.01, min(SILENCE_SECONDS, (deadline - time.monotonic()) / 2)))
            headers = dict(reply.headers or {})
            match headers.get("Status"):
                case None:
                    found.append(
                        StoredMessage(
                            stream=self._stream,
                            sequence=int(headers["Nats-Sequence"]),
                            subject=headers["Nats-Subject"],
                            data=reply.data,
                            headers=headers,
                            time=parse_time(headers["Nats-Time-Stamp"]),
                        )
                    )
                case "204" | "404" as end:  # the end of the page; nothing there, or not any more
                    return found, end == "204"
                case "503":
                    raise TopologyMissing(
                        f"Stream {self._stream} does not exist, or allows no direct reads: "
                        "prepare it with `fleet setup`."
                    )
                case status:
                    raise BrokerConnectionError(
                        f"Stream {self._stream} refused a listing: {status} {headers.get('Description', '')}."
                    )

    def _listen(self) -> str:
        if self._subscription is None:
            inbox = self._connection.new_inbox()
            self._subscription = self._connection.subscribe(f"{inbox}.*", self._receive)
            self._inbox = inbox
        return self._inbox

    def _receive(self, message: Msg) -> None:
        replies = self._pages.get(message.subject.rpartition(".")[2])
        if replies is not None:
            replies.put(message)
