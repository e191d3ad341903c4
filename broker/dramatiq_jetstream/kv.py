"""Key-value buckets: compare-and-set, time to live per key, consistent listings, watches (ADR-8, ADR-43).

The server holds all state: a bucket is a stream, a key is a subject, a revision is a stream sequence and is
never used twice. Reads go to the stream's leader, so a writer reads what it wrote; when a bucket's
replicas were changed, programs that declared it before must be started again.

In a cluster, a server that was the leader may not know for a while that it no longer is, and still answer from what
it has. So a read may be outdated: a caller that acts on one has to compare-and-set, or asks for a linearizable one.
`jetstream.conditional_writes` says how a write is decided in spite of such a server.

A linearizable read costs a write: a mark that only a majority can store. A replica that has the mark also has what was
acknowledged before it, so any replica is asked for both at once. No thread waits until a server notices that it is no
longer the leader.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import (
    ApiError,
    InvalidOption,
    KeyExists,
    NotFound,
    RevisionConflict,
    StreamLost,
    TopologyMissing,
)
from .jetstream.conditional_writes import (
    HEADER_ROLLUP,
    ConditionalWrites,
    Conflict,
)
from .jetstream.ensuring import ensure_stream
from .jetstream.listing import Listing
from .jetstream.names import (
    HEADER_BATCH_COMMIT,
    HEADER_BATCH_ID,
    HEADER_BATCH_SEQUENCE,
    HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE,
    HEADER_EXPECTED_SUBJECT,
    HEADER_MSG_ID,
    HEADER_TTL,
    bucket_subject,
    decode_key,
    encode_key,
)
from .jetstream.reading import StoredMessage
from .jetstream.topology import StreamConfig
from .jetstream.watching import KeyWatcher
from .wire.connection import Connection, Msg, PubAck, Publication
from .wire.error_numbers import CONFLICT
from .wire.ids import new_id
from .wire.replies import is_no_responders

__all__ = ["Bucket", "Entry", "Snapshot"]

HEADER_OPERATION = "KV-Operation"
HEADER_MARKER_REASON = "Nats-Marker-Reason"

#: How long the mark of a deleted key is kept, in seconds: long enough for watches to see it.
MARK_TTL_SECONDS = 60

#: What linearizable reads write, as a subject that no key has.
_READ_MARK = "=read"


@dataclass(frozen=True)
class Entry:
    """One revision of a key; `created` is milliseconds since 1970 by the server's clock.

    Examples:
      >>> switches = broker.bucket("flags")
      >>> revision = switches.put("mail", b"on")
      >>> entry = switches.get("mail")
      >>> entry.value, entry.revision == revision, entry.deleted
      (b'on', True, False)
    """

    key: str
    value: bytes
    revision: int
    created: int
    deleted: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Snapshot:
    """All entries under a prefix, and the newest revision there (0 when there never was one).

    The revision counts deleted keys too: while it is the newest under the prefix, nothing there changed,
    other than by expiring.

    Examples:
      >>> halls = broker.bucket("halls")
      >>> before = halls.snapshot("a.")
      >>> before.entries, before.revision
      ({}, 0)
    """

    entries: dict[str, Entry]
    revision: int


class Bucket:
    """A key-value bucket that any thread may use. Keys may hold any characters; `.` separates levels.

    All times are milliseconds.

    All methods raise `BrokerConnectionError` when the server does not answer in time, and `TopologyMissing`
    when the bucket does not exist and may not be declared here.

    Parameters:
      connection: The connection to share.
      config: The bucket's stream, from `topology.bucket`.
      declare: Create the bucket at the first use if it is missing.

    Examples:
      >>> carts = broker.bucket("carts")
      >>> first = carts.create("shop.c-7", b"1 mug", ttl=3_600_000)
      >>> second = carts.update("shop.c-7", b"2 mugs", revision=first)
      >>> carts.get("shop.c-7").value
      b'2 mugs'
      >>> carts.keys("shop."), [entry.revision for entry in carts.items("shop.")] == [second]
      (['shop.c-7'], True)
      >>> carts.delete("shop.c-7")
      >>> carts.get("shop.c-7") is None
      True
      >>> carts.clear("shop.")
    """

    def __init__(self, connection: Connection, config: StreamConfig, *, declare: bool = True) -> None:
        self.connection = connection
        self.config = config
        self.stream = config.name
        self.name = config.name.removeprefix("KV_")
        self._history = int(config.settings.get("max_msgs_per_subject", 1))
        self._declare = declare
        self._declared = False
        self._listing = Listing(connection, self.stream)
        self._read_mark = f"$KV.{self.name}.{_READ_MARK}"
        self._writes = ConditionalWrites(connection, self.stream, self._publish)
        self._gone = False

    def __repr__(self) -> str:
        return f"Bucket({self.name!r})"

    # Reading

    def get(self, key: str, *, timeout: int | None = None, linearizable: bool = False) -> Entry | None:
        """Return the key's entry from the leader, or None when it is missing, deleted or expired.

        Parameters:
          timeout: Milliseconds to wait for the server; None takes the connection's own.
          linearizable: Return what is newer than everything that was acknowledged before the call, whichever server
            answers. Where several servers have the bucket it costs a write, so use it when a read was surprising.
        """
        self._ensure()
        read = self._agreed if linearizable and not self._writes.one_server else self._writes.last
        try:
            stored = read(self._subject(key), timeout=timeout, must_exist=self._declare)
        except TopologyMissing:
            self.declare()  # it was deleted on the server
            return None
        return None if stored is None or _is_mark(stored) else self._entry(stored)

    def get_many(self, keys: Sequence[str], *, since: tuple[str, int]) -> dict[str, Entry]:
        """Return the entries of those keys that exist, as one server has them at one moment.

        It is one request. Any server that has the bucket may answer, and may be behind.

        Parameters:
          keys: At most 1,000.
          since: A key that exists and a revision that it has or had: the answer is of a server that has this revision,
            and so everything in the bucket that was stored before it.

        Examples:
          >>> carts = broker.bucket("baskets")
          >>> revision = carts.put("c-8", b"1 mug")
          >>> sorted(carts.get_many(["c-8", "c-9"], since=("c-8", revision)))
          ['c-8']
        """
        self._ensure()
        subjects = [self._subject(key) for key in dict.fromkeys(keys)]
        if not subjects:
            return {}
        if len(subjects) == 1 and self._writes.one_server:
            entry = self.get(keys[0])
            return {} if entry is None else {entry.key: entry}
        try:
            found = self._listing.newest([*subjects, self._subject(since[0])], since=since[1])
        except TopologyMissing:
            if not self._declare:
                raise
            self.declare()  # it was deleted on the server
            return {}
        entries = [
            self._entry(found[name]) for name in subjects if name in found and not _is_mark(found[name])
        ]
        return {entry.key: entry for entry in entries}

    def snapshot(self, prefix: str = "") -> Snapshot:
        """Return everything under a prefix in memory, as one state to compare-and-set against.

        A write under the prefix while it is read only makes the revision newer than a part of the entries
        is; `update(..., within=prefix)` with that revision then still fails for a caller that missed it.

        Examples:
          >>> seats = broker.bucket("seats")
          >>> taken = seats.snapshot("hall.")
          >>> if "hall.17" not in taken.entries:
          ...     revision = seats.update("hall.17", b"ann", revision=taken.revision, within="hall.")
        """
        entries: dict[str, Entry] = {}
        revision = 0
        for stored in self._stored(prefix):
            entry = self._entry(stored)
            entries[entry.key] = entry
            revision = max(revision, stored.sequence)
        return Snapshot({key: entry for key, entry in entries.items() if not entry.deleted}, revision)

    def items(self, prefix: str = "", *, after: int = 0) -> Iterator[Entry]:
        """Yield the entries whose keys start with `prefix`, page by page, oldest revision first.

        Entries that change meanwhile may come in both revisions.

        Parameters:
          after: Only what was written after this revision, so that a reader which comes back gets what has changed.
        """
        if self._history > 1:  # the newest of a key is only known at the end
            entries = self.snapshot(prefix).entries.values()
            yield from (e for e in entries if e.key.startswith(prefix) and e.revision > after)
            return
        for stored in self._stored(prefix, after):
            if not _is_mark(stored):
                entry = self._entry(stored)
                if entry.key.startswith(prefix):
                    yield entry

    def newest_revision(self) -> int:
        """Return the revision of the newest write, 0 before the first one.

        Examples:
          >>> prices = broker.bucket("prices")
          >>> prices.put("mug", b"1290") == prices.newest_revision()
          True
        """
        self._ensure()
        try:
            state = self.connection.api(f"STREAM.INFO.{self.stream}")["state"]
        except NotFound:
            if not self._declare:
                raise TopologyMissing(
                    f"There is no bucket {self.name}: prepare it with `fleet setup`, or let the broker declare it."
                ) from None
            self.declare()  # it was deleted on the server
            return 0
        return int(state["last_seq"])

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that start with `prefix`."""
        return list(dict.fromkeys(entry.key for entry in self.items(prefix)))

    def watch(self, prefix: str, callback: Callable[[Entry], None]) -> KeyWatcher:
        """Call `callback` for each entry whose key starts with `prefix`: those that exist, then each change.

        Deletions come as entries with `deleted` set; expiry is not announced. The callback runs on the
        connection's own thread and must not block, so it must not call this bucket. Reconnects are survived
        without a gap.

        Returns:
          An object with `close()`.

        Examples:
          ```python
          watcher = broker.bucket("switches").watch("mail.", lambda entry: print(entry.key, entry.value))
          ...
          watcher.close()
          ```
        """
        self._ensure()

        def receive(stored: StoredMessage) -> None:
            if stored.subject == self._read_mark:
                return
            entry = self._entry(stored)
            if entry.key.startswith(prefix):
                callback(entry)

        return KeyWatcher(self.connection, self.stream, self._filter(prefix), receive)

    # Writing

    def put(
        self, key: str, value: bytes, *, ttl: int | None = None, headers: Mapping[str, str] | None = None
    ) -> int:
        """Store a value whatever was there, and return its revision.

        Parameters:
          ttl: Milliseconds until the key disappears; the server counts whole seconds, so it is rounded up.
          headers: NATS headers to keep with the value.

        Examples:
          >>> revision = broker.bucket("switches").put("mail.enabled", b"no", ttl=60_000)
        """
        return self._publish(self._subject(key), value, {**(headers or {}), **self._headers(ttl)}).seq

    @contextlib.contextmanager
    def hearing(self, key: str) -> Iterator[threading.Event]:
        """Yield an event that is set whenever the key is written, for a thread that waits for a change.

        It costs the server no consumer. A write is heard as it is sent, which is a moment before it is stored: look,
        and look again shortly. One that is lost with the connection is not heard, so look from time to time as well.

        Examples:
          ```python
          with bucket.hearing("mail.enabled") as written:
              while bucket.get("mail.enabled") is None:
                  written.wait(5.0)
                  written.clear()
          ```
        """
        self._ensure()
        heard = threading.Event()
        subscription = self.connection.subscribe(self._subject(key), lambda _: heard.set())
        try:
            yield heard
        finally:
            subscription.close()

    def note(self, key: str, value: bytes, *, ttl: int | None = None, unanswered: bool = False) -> None:
        """Store a value without waiting; it may get lost. For information only; from any thread.

        A bucket that was deleted is made again by the call after the one that found it missing.

        Parameters:
          unanswered: Have the server not answer, which spares a message and does not find the bucket missing.

        Examples:
          >>> broker.bucket("seen").note("c-42", b"just now", ttl=60_000)
        """
        self._ensure()
        if self._gone:
            self._gone = False
            self.declare()
        if unanswered:
            self.connection.send(self._subject(key), value, self._headers(ttl))
        else:
            self.connection.tell(self._subject(key), value, self._headers(ttl), self._noted)

    def _noted(self, reply: Msg | BaseException) -> None:
        if self._declare and not isinstance(reply, BaseException) and is_no_responders(reply):
            self._gone = True

    def create(self, key: str, value: bytes, *, ttl: int | None = None) -> int:
        """Store a key that is missing, deleted or expired, and return its revision.

        Raises:
          KeyExists: When it is there.
        """
        subject = self._subject(key)
        expected = 0
        while True:
            try:
                return self._writes.compare_and_set(subject, value, self._headers(ttl), expected)
            except Conflict:
                stored = self._writes.newest(subject)
            if stored is not None and not _is_mark(stored):
                raise KeyExists(f"Key {key!r} exists already in bucket {self.name}.")
            expected = 0 if stored is None else stored.sequence

    def update(
        self, key: str, value: bytes, *, revision: int, ttl: int | None = None, within: str | None = None
    ) -> int:
        """Store a value if the key still has `revision`, and return the new revision.

        Parameters:
          revision: What `get` or a write returned; 0 stands for a key that never was or has expired.
          ttl: As for `put`. Without it the key no longer expires.
          within: Compare `revision` with the newest under this prefix (of whole levels, ending in `.`)
            instead of the key's own, so that the write depends on everything there. See `snapshot`.

        Raises:
          RevisionConflict: When another writer was first.
        """
        headers = self._headers(ttl)
        if within is not None:
            headers[HEADER_EXPECTED_SUBJECT] = self._filter(within)
        try:
            return self._writes.compare_and_set(self._subject(key), value, headers, revision)
        except Conflict:
            raise RevisionConflict(
                f"{within or key!r} in bucket {self.name} was changed since revision {revision}: "
                "read it again and repeat the change."
            ) from None

    def update_all(
        self, updates: Mapping[str, tuple[bytes, int]], *, ttl: int | None = None
    ) -> dict[str, int]:
        """Store several keys, all or none, if each still has its revision; return the new ones (ADR-50).

        Parameters:
          updates: For each key its value and the revision it must have; 0 for one that never was.
          ttl: As for `put`, of all of them. Without it they no longer expire.

        Raises:
          RevisionConflict: When another writer was first at any of them; nothing was stored.
          BrokerConnectionError: When no acknowledgement came; whether all were stored or none is not known.

        Examples:
          >>> stock = broker.bucket("stock")
          >>> mug, cup = stock.create("mug", b"5"), stock.create("cup", b"5")
          >>> sorted(stock.update_all({"mug": (b"4", mug), "cup": (b"4", cup)}))
          ['cup', 'mug']
        """
        if not updates:
            return {}
        self._ensure()
        batch = new_id()
        publications = [
            Publication(
                self._subject(key),
                value,
                {
                    **self._headers(ttl),
                    HEADER_BATCH_ID: batch,
                    HEADER_BATCH_SEQUENCE: str(number),
                    HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE: str(revision),
                },
            )
            for number, (key, (value, revision)) in enumerate(updates.items(), start=1)
        ]
        last = publications[-1]
        last.headers = {**(last.headers or {}), HEADER_BATCH_COMMIT: "1"}
        try:
            try:
                final = self.connection.publish_batch(publications).seq
            except TopologyMissing:
                if not self._declare:
                    raise
                self.declare()  # it was deleted on the server
                final = self.connection.publish_batch(publications).seq
        except ApiError as error:
            if error.err_code not in CONFLICT:
                raise
            stored = self._writes.newest(last.subject)
            if stored is not None and stored.headers.get(HEADER_BATCH_ID) == batch:
                final = stored.sequence
            else:
                raise RevisionConflict(
                    f"At least one of {', '.join(updates)} in bucket {self.name} was changed by another writer: "
                    "read them again and repeat the change."
                ) from None
        # A batch is stored without gaps.
        first = final - len(publications) + 1
        return {key: first + position for position, key in enumerate(updates)}

    def delete(self, key: str, *, revision: int | None = None) -> None:
        """Delete a key; one that is missing stays so.

        Parameters:
          revision: Delete only this revision.

        Raises:
          RevisionConflict: When the key has another one.
        """
        subject = self._subject(key)
        headers = _mark()
        if revision is None:
            self._publish(subject, b"", headers)
            return
        try:
            self._writes.compare_and_set(subject, b"", headers, revision)
        except Conflict:
            raise RevisionConflict(
                f"{key!r} in bucket {self.name} was not deleted: it was changed since revision {revision}."
            ) from None

    def clear(self, prefix: str) -> None:
        """Delete the keys that start with `prefix`, except those that are changed meanwhile."""
        for outcome in self.connection.try_publish_many(
            Publication(
                self._subject(entry.key),
                b"",
                {
                    **_mark(),
                    HEADER_MSG_ID: new_id(),
                    HEADER_EXPECTED_LAST_SUBJECT_SEQUENCE: str(entry.revision),
                },
            )
            for entry in self.items(prefix)
        ):
            conflict = isinstance(outcome, ApiError) and outcome.err_code in CONFLICT
            if isinstance(outcome, Exception) and not conflict:
                raise outcome

    def declare(self, *, update: bool = False) -> str:
        """Create the bucket if it is missing, with `update` change what differs; as `ensuring.ensure_stream`.

        Examples:
          >>> broker.bucket("carts").declare() in ("created", "unchanged")
          True
        """
        outcome = ensure_stream(self.connection, self.config, update=update)
        self._writes.one_server = outcome != "differs" and self.config.settings["num_replicas"] == 1
        self._declared = True
        return outcome

    # Inside

    def _agreed(
        self, subject: str, *, timeout: int | None = None, must_exist: bool = False
    ) -> StoredMessage | None:
        """The newest message on a subject, from a replica that has what a majority had when this was called."""
        mark = self.connection.publish(
            self._read_mark, b"", {**_mark(), HEADER_MSG_ID: new_id()}, timeout=timeout
        )
        return self._listing.newest([subject, self._read_mark], since=mark.seq, timeout=timeout).get(subject)

    def _ensure(self) -> None:
        if self._declare and not self._declared:
            self.declare()

    def _subject(self, key: str) -> str:
        return bucket_subject(self.name, key)

    def _filter(self, prefix: str) -> str:
        """The narrowest subject filter that covers every key that starts with `prefix`."""
        levels = prefix.rpartition(".")[0]
        covered = f"{encode_key(levels)}." if "." in prefix and levels else "=." if "." in prefix else ""
        return f"$KV.{self.name}.{covered}>"

    def _stored(self, prefix: str, after: int = 0) -> Iterator[StoredMessage]:
        self._ensure()
        # The server finds the newest of all messages at once, and the newest on a wildcard by looking through all keys.
        subject = self._filter(prefix) if prefix else ">"
        if self._writes.one_server:
            # One cheap question tells a reader that comes back that there is nothing new.
            newest = self._writes.newest(subject)
            if newest is None or newest.sequence <= after:
                return iter(())
        return self._listing.read(subject, start=after + 1)

    def _entry(self, stored: StoredMessage) -> Entry:
        key = decode_key(stored.subject[len(self.name) + 5 :])
        return Entry(key, stored.data, stored.sequence, stored.time, _is_mark(stored), stored.headers)

    def _headers(self, ttl: int | None) -> dict[str, str]:
        if ttl is None:
            return {}
        if isinstance(ttl, bool) or ttl <= 0:
            raise InvalidOption(f"ttl={ttl!r} cannot be used: give a positive number of milliseconds.")
        headers = {HEADER_TTL: f"{-(-int(ttl) // 1000)}s"}
        if self._history > 1:  # otherwise an older revision would come back when this one expires
            headers[HEADER_ROLLUP] = "sub"
        return headers

    def _publish(self, subject: str, value: bytes, headers: dict[str, str]) -> PubAck:
        if HEADER_MSG_ID not in headers:
            headers[HEADER_MSG_ID] = new_id()
        self._ensure()
        try:
            return self.connection.publish(subject, value, headers)
        except (TopologyMissing, StreamLost):
            if not self._declare:
                raise
            self.declare()  # it was deleted on the server
            return self.connection.publish(subject, value, headers)


def _is_mark(stored: StoredMessage) -> bool:
    return stored.headers.get(HEADER_OPERATION) in ("DEL", "PURGE") or HEADER_MARKER_REASON in stored.headers


def _mark() -> dict[str, str]:
    # The rollup drops the key's history, the mark's time to live drops the mark.
    return {HEADER_OPERATION: "PURGE", HEADER_ROLLUP: "sub", HEADER_TTL: f"{MARK_TTL_SECONDS}s"}
