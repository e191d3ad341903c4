"""What became of messages: a record at the end of each attempt, kept by the server for a while.

    for record in broker.history.of(message_id):
        print(record.outcome, record.error)
    page = broker.history.search(actor="charge", outcome="failed", error="timed out")

A worker leaves a record when an attempt fails, is retried, skipped or aborted, and when a message succeeds that had
been retried or replayed. The broker's setting `history` adds successes: "all", or a share of them. A record is sent
after the message is settled, from a thread of its own: it delays no ack and fails no message. A process that dies loses
the records of about its last second; a message that died with its process never had one.

Records are found by subject: those of one message by its id, those of an actor or a queue by a wildcard. A search for
anything else reads records, newest first, and stops after `EXAMINED`; its page says where the next search continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import islice, takewhile
from typing import Any, Final

from .errors import InvalidOption, NotFound
from .jetstream.listing import Listing
from .jetstream.names import Names
from .jetstream.reading import StoredMessage, first_message_since
from .jetstream.topology import MAX_RECORD_BYTES, MAX_RECORDS_OF_MESSAGE
from .wire.connection import Connection

__all__ = [
    "ABORTED",
    "DONE",
    "EXAMINED",
    "FAILED",
    "OUTCOMES",
    "RETRIED",
    "SKIPPED",
    "History",
    "Page",
    "Record",
]

DONE = "done"
RETRIED = "retried"
FAILED = "failed"
ABORTED = "aborted"
SKIPPED = "skipped"

#: How an attempt can end. After RETRIED the message runs again; FAILED is final, and the message a dead letter.
OUTCOMES: Final = (DONE, RETRIED, FAILED, ABORTED, SKIPPED)

#: How many records one search reads at most.
EXAMINED: Final = 2_000

#: The most records that one page can have.
MAX_LIMIT: Final = 1_000

# The first window of a search, in sequences, and how it grows where there is little and shrinks where there is much.
_FIRST_WINDOW = 200
_WINDOW_FACTOR = 4

#: An attempt has the time of its worker's clock, its record the time at which the server stored it. A search in time
#: allows for a clock that is ahead by up to _SKEW_MS, and for a record stored up to _STORED_WITHIN_MS later.
_SKEW_MS = 60_000
_STORED_WITHIN_MS = 600_000

#: How many records are asked for at once.
_PAGE = 500


@dataclass(frozen=True)
class Record:
    """How one attempt ended. Times are milliseconds since 1970.

    Attributes:
      outcome: One of `OUTCOMES`.
      attempt: 1 for the first.
      deliveries: How often the server had delivered the message, this time included.
      worker: The process, as `host:pid`.
      error_type, error: The class of the exception and its text; empty without one.
      traceback: As Python prints it, shortened in the middle if it is long.
      trace_id: The W3C trace that the message was part of; empty without one.
      arguments: The beginning of the arguments, as `broker.describe_arguments` shows them.
      logs: The last lines that the attempt logged, for an actor with `log_history=True`.
      letter: For FAILED, what identifies the dead letter on its stream.

    Examples:
      >>> record = broker.history.of(refused.message_id)[-1]
      >>> record.error_type, record.attempt, record.duration < 60_000
      ('ValueError', 1, True)
      >>> type(record).decode(record.encode()) == record
      True
      >>> record.as_dict()["outcome"]
      'failed'
    """

    message_id: str
    queue: str
    actor: str
    outcome: str
    began: int
    ended: int
    attempt: int = 1
    deliveries: int = 1
    worker: str = ""
    error_type: str = ""
    error: str = ""
    traceback: str = ""
    trace_id: str = ""
    arguments: str = ""
    logs: tuple[str, ...] = ()
    letter: str = ""

    @property
    def duration(self) -> int:
        """Milliseconds."""
        return max(0, self.ended - self.began)

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**asdict(self), "logs": list(self.logs)}

    def encode(self) -> bytes:
        """The record as it is stored, in at most `MAX_RECORD_BYTES`."""
        content = {name: value for name, value in vars(self).items() if value not in ("", ())}
        data = _json(content)
        for name in ("logs", "traceback", "error", "arguments"):
            if len(data) <= MAX_RECORD_BYTES:
                break
            surplus = len(data) - MAX_RECORD_BYTES
            value = content.get(name, "")
            content[name] = _cut(value, surplus) if isinstance(value, str) else _without(value, surplus)
            data = _json(content)
        return data

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """The record that was stored; a later version may have stored more than this one knows."""
        content = json.loads(data)
        known = {name: content[name] for name in _FIELDS if name in content}
        known["logs"] = tuple(known.get("logs", ()))
        return cls(**known)


_encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_FIELDS = frozenset(field.name for field in fields(Record))


def _json(content: dict[str, Any]) -> bytes:
    return _encode_json(content).encode("utf-8", "backslashreplace")


def _cut(text: str, surplus: int) -> str:
    """A text without `surplus` characters of its middle."""
    kept = max(0, len(text) - surplus - 3)
    return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}" if kept else ""


def _without(lines: Collection[str], surplus: int) -> list[str]:
    """Lines without the oldest, which have at least `surplus` bytes."""
    left = list(lines)
    while left and surplus > 0:
        surplus -= len(left.pop(0).encode("utf-8", "backslashreplace"))
    return left


@dataclass(frozen=True)
class Page:
    """A part of a search.

    Attributes:
      records: Newest first.
      cursor: Give it to the next `search` to continue; None when nothing is left. A page may have fewer records than
        its limit, or none, and a cursor: the search stopped after reading `EXAMINED` records.
      reached: The time of the oldest record that was read, in milliseconds since 1970; None when none was.

    Examples:
      >>> def failures():
      ...     page = broker.history.search(outcome="failed")
      ...     yield from page.records
      ...     while page.cursor is not None:
      ...         page = broker.history.search(outcome="failed", cursor=page.cursor)
      ...         yield from page.records
      >>> {record.actor for record in failures()}
      {'charge'}
    """

    records: list[Record]
    cursor: str | None = None
    reached: int | None = None


class History:
    """The history of a namespace; `broker.history` is one. Any thread may use it.

    All methods raise `BrokerConnectionError` when the server does not answer in time.

    Examples:
      >>> [record.outcome for record in broker.history.of(refused.message_id)]
      ['failed']
      >>> page = broker.history.search(actor="charge", error="no amount", limit=1)
      >>> page.records[0].error
      '-1 is no amount'
    """

    def __init__(self, connection: Connection, names: Names) -> None:
        self._connection = connection
        self._names = names
        self._stream = names.history_stream
        self._listing = Listing(connection, self._stream)

    def of(self, message_id: str) -> list[Record]:
        """The recorded attempts of one message, oldest first; of more than a hundred, the last hundred."""
        if self._range() is None:
            return []
        stored = self._listing.read(
            self._names.history_of_message(message_id), page=MAX_RECORDS_OF_MESSAGE + 1
        )
        found = [Record.decode(each.data) for each in islice(stored, 10 * MAX_RECORDS_OF_MESSAGE)]
        return [record for record in found if record.message_id == message_id][-MAX_RECORDS_OF_MESSAGE:]

    def search(
        self,
        *,
        actor: str | None = None,
        queue: str | None = None,
        outcome: str | Collection[str] | None = None,
        since: int | None = None,
        until: int | None = None,
        error: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page:
        """Records that match everything given, newest first.

        Parameters:
          outcome: One of `OUTCOMES`, or several.
          since, until: When the attempt ended, in milliseconds since 1970; `until` is not included.
          error: A text in the error's class, its message or the traceback; case does not matter.
          limit: How many records at most, up to 1,000.
          cursor: From the page before.

        Raises:
          InvalidOption: For an outcome, limit or cursor that cannot be used.
        """
        wanted = _outcomes(outcome)
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_LIMIT:
            raise InvalidOption(f"limit={limit!r} cannot be used: give a whole number from 1 to {MAX_LIMIT}.")
        if cursor is not None and not (cursor.isdecimal() and len(cursor) < 20):
            raise InvalidOption(f"cursor={cursor!r} cannot be used: give the one of the page before.")
        subject = self._names.history_of(queue, actor)
        bounds = self._bounds(subject, since, until, cursor)
        if bounds is None:
            return Page([])
        text = None if error is None else error.casefold()

        def matches(record: Record) -> bool:
            return (
                (wanted is None or record.outcome in wanted)
                and (since is None or record.ended >= since)
                and (until is None or record.ended < until)
                and (
                    text is None
                    or text in f"{record.error_type}: {record.error}\n{record.traceback}".casefold()
                )
            )

        return self._search(subject, *bounds, matches, limit)

    def _search(
        self, subject: str, first: int, end: int, matches: Callable[[Record], bool], limit: int
    ) -> Page:
        """Read backwards from `end` (not included) to `first`, window by window: the server only reads forwards."""
        found: list[Record] = []
        examined, reached = 0, None
        window = _FIRST_WINDOW
        while end > first:
            start = max(first, end - window)
            inside = self._between(subject, start, end)
            if len(inside) > EXAMINED:
                window //= _WINDOW_FACTOR  # the newest of it were not read
                continue
            for stored in reversed(inside):
                if examined == EXAMINED:
                    return Page(found, str(stored.sequence + 1), reached)
                examined, reached = examined + 1, stored.time
                record = Record.decode(stored.data)
                if matches(record):
                    found.append(record)
                    if len(found) == limit:
                        return Page(found, str(stored.sequence) if stored.sequence > first else None, reached)
            end = start
            if len(inside) < _FIRST_WINDOW // 2:
                window *= _WINDOW_FACTOR
        return Page(found, None, reached)

    def _between(self, subject: str, start: int, end: int) -> list[StoredMessage]:
        """The records from `start` on and before `end`, and no more than decide that they are too many."""
        stored = self._listing.read(subject, start=start, page=_PAGE)
        return list(islice(takewhile(lambda each: each.sequence < end, stored), EXAMINED + 1))

    def _range(self) -> tuple[int, int] | None:
        """The first and the last sequence; None when there is no record."""
        try:
            state = self._connection.api(f"STREAM.INFO.{self._stream}")["state"]
        except NotFound:
            return None
        return (int(state["first_seq"]), int(state["last_seq"])) if state["messages"] else None

    def _bounds(
        self, subject: str, since: int | None, until: int | None, cursor: str | None
    ) -> tuple[int, int] | None:
        """The first sequence to read, and the one to end before."""
        range_ = self._range()
        if range_ is None:
            return None
        first, end = range_[0], range_[1] + 1
        if since is not None:
            oldest = self._first_since(subject, since - _SKEW_MS)
            if oldest is None:
                return None
            first = max(first, oldest)
        if (
            until is not None
            and (beyond := self._first_since(subject, until + _STORED_WITHIN_MS)) is not None
        ):
            end = min(end, beyond)
        return first, end if cursor is None else min(end, int(cursor))

    def _first_since(self, subject: str, time: int) -> int | None:
        try:
            moment = datetime.fromtimestamp(time / 1000, UTC)
        except (OverflowError, ValueError, OSError):
            raise InvalidOption(f"{time!r} is not a time: give milliseconds since 1970.") from None
        stored = first_message_since(self._connection, self._stream, subject, moment)
        return None if stored is None else stored.sequence


def _outcomes(outcome: str | Collection[str] | None) -> frozenset[str] | None:
    if outcome is None:
        return None
    wanted = frozenset((outcome,) if isinstance(outcome, str) else outcome)
    unknown = sorted(wanted.difference(OUTCOMES))
    if unknown:
        raise InvalidOption(f"outcome={unknown[0]!r} cannot be used: choose from {', '.join(OUTCOMES)}.")
    return wanted
