"""The stock of all products and the record of every order (`tasks.ledger`), in one bucket.

Keys: `levels.all` holds the pieces available of every sku, and *pending*, the decisions about orders that were
made with it and may not have reached their records yet; `order.{order_id}` holds an order's record. (`tasks.claims`
and `tasks.notes` keep theirs in the same bucket.)

A decision is one compare-and-set on `levels.all`: it takes the stock (or gives it back) and notes the decision
in pending, both or none. Then the order's record is written, and later the note is dropped. A process that is
killed in between leaves the note, and the next run of the step finds it there and writes the record. So
nothing is taken twice, given back twice or taken without a record, and an order of several products gets all
or none. (An atomic batch over several keys would say the same in fewer words; JetStream makes a temporary
stream for each, which takes it several milliseconds.)

A decision is made once because of an order of things: know `levels.all` at some revision, *then* look for the
order's record and note, then compare-and-set from that revision. A decision in between changes the
revision, and a note is dropped only after its record was written, so one of the two is always seen.

In a cluster a server that was the leader may answer reads for some seconds from what it had (see the library's
`kv`). Decisions do not suffer, because they compare-and-set; a record that is behind what is known of it is read
once more, linearizably. So a forged event, which the record contradicts for good, costs a write and holds no thread.

The decisions that the threads of one process want at the same time are made in one compare-and-set: a product in great
demand costs one for all of them, instead of a race that all but one lose.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .claims import Claims
from .ledger import Record
from .notes import Notes
from .ports import Bucket, Entry

BUCKET: Final = "stock"
LEVELS: Final = "levels.all"

#: How many decisions are made at once, which bounds the size of a value.
MAX_BATCH: Final = 100

#: How many records a process remembers that it wrote, at most, and for how many seconds.
REMEMBERED: Final = 5_000
RECALLED_SECONDS: Final = 60.0

#: How many notes that others have left behind are cleared up with one decision.
_SWEPT_AT_ONCE: Final = 3

# The decisions about stock that are noted while a record stands.
_GIVEN_BACK: Final = frozenset({("declined", "released"), ("cancelling", "cancelled")})

Pieces = dict[str, int]

# Given what is recorded of the order (None: nothing) and the pieces available, returns the record to store and
# changes the pieces, or returns None to leave everything as it is.
Decision = Callable[[Record | None, Pieces], Record | None]


class StockBusy(Exception):
    """Others kept changing the stock for the whole time allowed; trying again is safe."""


class RecordBehind(Exception):
    """A server answers with a record that is older than what is known of it; trying again is safe."""


@dataclass(frozen=True, slots=True)
class Found:
    """An order's record and its revision; `fresh` when the call that returns it has just stored it."""

    record: Record
    revision: int
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Levels:
    """The value of `levels.all` at a revision. Most notes are never looked at, so they stay as JSON."""

    pieces: Mapping[str, int]
    pending: Mapping[str, Mapping[str, Any]]
    revision: int

    def encode(self) -> bytes:
        """Return the value as it is stored."""
        return json.dumps({"pieces": self.pieces, "pending": self.pending}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, entry: Entry) -> Levels:
        """Return what `encode` stored."""
        stored = json.loads(entry.value)
        return cls(stored["pieces"], stored["pending"], entry.revision)

    def note(self, order_id: str) -> Record | None:
        """Return the decision about an order that is noted here."""
        noted = self.pending.get(order_id)
        return None if noted is None else Record.from_json(noted)


class _Change:
    """A decision about one order that waits to be made with others."""

    __slots__ = ("decide", "error", "existing", "order_id", "result", "seen_at")

    def __init__(self, order_id: str, decide: Decision) -> None:
        self.order_id = order_id
        self.decide = decide
        self.existing: Found | None = None
        self.seen_at = 0  # `existing` was looked for when the levels were known at this revision
        self.result: Record | None = None
        self.error: BaseException | None = None

    @property
    def settled(self) -> bool:
        return self.result is not None or self.error is not None


class Stock:
    """The stock and the orders' records.

    Parameters:
      bucket: Where they are kept.
      initial: The pieces of each sku that there are before the first order.
      now: The time in milliseconds.
      timeout: Milliseconds for which a decision competes with others before StockBusy.
      sweep_after: Milliseconds after which a note that was not dropped is taken for one left behind.
    """

    def __init__(
        self,
        bucket: Bucket,
        initial: Mapping[str, int],
        now: Callable[[], int],
        *,
        timeout: int = 10_000,
        sweep_after: int = 30_000,
    ) -> None:
        #: The claims on order ids and the notes on orders, in the same bucket.
        self.claims = Claims(bucket)
        self.notes = Notes(bucket)
        self._bucket = bucket
        self._initial = initial
        self._now = now
        self._timeout = timeout
        self._sweep_after = sweep_after
        self._levels: Levels | None = None
        self._heard: Entry | None = None
        self._waiting: deque[_Change] = deque()
        self._turn = threading.Lock()
        # Decisions of pending whose records we have written, by order and state.
        self._written: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        # Records as this process last wrote them, oldest first; others may have gone on from there.
        self._recent: OrderedDict[str, tuple[Found, float]] = OrderedDict()

    # Reading

    def available(self) -> dict[str, int]:
        """Return the pieces available of every sku."""
        levels = self._read()
        return {sku: levels.pieces.get(sku, initial) for sku, initial in self._initial.items()}

    def find(self, order_id: str, *, linearizable: bool = False) -> Found | None:
        """Return the record of an order."""
        entry = self._bucket.get(f"order.{order_id}", linearizable=linearizable)
        return None if entry is None else Found(Record.decode(entry.value), entry.revision)

    def find_newer(self, order_id: str, is_newer: Callable[[Found | None], bool]) -> Found | None:
        """Return the record of an order; one that seems to be behind is read again, so that it is not."""
        found = self.find(order_id)
        return found if is_newer(found) else self.find(order_id, linearizable=True)

    def recall(self, order_id: str) -> Found | None:
        """Return the record of an order as this process wrote it a moment ago.

        Others may have gone on from there; `forward` finds out. Not older, because a step that goes on from an outdated
        record asks the gateway again, which knows the charge for a limited time only.
        """
        with self._lock:
            found, written = self._recent.get(order_id, (None, 0.0))
        return found if time.monotonic() - written < RECALLED_SECONDS else None

    def _remember(self, order_id: str, found: Found) -> Found:
        with self._lock:
            self._recent.pop(order_id, None)
            self._recent[order_id] = Found(found.record, found.revision), time.monotonic()
            if len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)
        return found

    def heard(self, entry: Entry) -> None:
        """Take note of newer levels; for a watch, so that fewer decisions are made on outdated ones.

        They are read when they are needed, because most are outdated before that.
        """
        if entry.key == LEVELS:
            self._heard = entry

    # Changing

    def open(self, order_id: str, wanted: Record) -> Found:
        """Store the first record of an order and take what it holds; returns what is recorded then.

        That is the record of before when the order has one already, and a rejection when stock is short.
        """

        def decide(existing: Record | None, pieces: Pieces) -> Record | None:
            if existing is not None:
                return None
            for line in wanted.lines:
                if pieces[line.sku] < line.quantity:
                    return wanted.rejected(
                        "OUT_OF_STOCK", f"{line.quantity} × {line.sku} ordered, {pieces[line.sku]} in stock"
                    )
            for line in wanted.lines:
                pieces[line.sku] -= line.quantity
            return wanted

        return self._settle(_Change(order_id, decide))

    def release(self, order_id: str, at: int) -> Found:
        """Give back what a declined order holds, and record that; returns what is recorded then.

        Raises:
          RecordBehind: When the record says nothing of the payment that was declined.
        """

        def decide(existing: Record | None, pieces: Pieces) -> Record | None:
            if existing is None or existing.state != "declined":
                return None
            for line in existing.lines:
                pieces[line.sku] += line.quantity
            return existing.forward("released", at)

        found = self._settle(_Change(order_id, decide))
        if found.record.state == "held":
            raise RecordBehind(f"the record of order {order_id} cannot be read as it is now.")
        return found

    def cancel(self, order_id: str, at: int, reason: str) -> Found:
        """End an order that is neither paid nor declined nor over, give back what it holds; returns what is recorded.

        What is held is given back in two steps: first the record says that the order is being cancelled, so that a
        payment which is captured meanwhile does not find it held. Cancelling again carries on from there.

        Raises:
          RecordBehind: When the record cannot be read as it is now.
        """

        def decide(existing: Record | None, pieces: Pieces) -> Record | None:
            if existing is None:
                return Record("cancelled", {"cancelled": at}, reason=reason)
            if existing.state != "cancelling":
                return None
            for line in existing.lines:
                pieces[line.sku] += line.quantity
            return existing.forward("cancelled", at)

        while True:
            found = self._settle(_Change(order_id, decide))
            if found.record.state != "held":
                return found
            # A faster process has moved it on, and from there it does not come back.
            self.forward(order_id, found, found.record.forward("cancelling", at, reason=reason))

    def forward(self, order_id: str, found: Found, record: Record) -> Found:
        """Replace the record that was found; returns the newer one when another process was faster.

        Raises:
          RecordBehind: When the server says that one was, and the record does not show it.
        """
        try:
            revision = self._bucket.update(f"order.{order_id}", record.encode(), revision=found.revision)
        except RevisionConflict as conflict:
            current = self.find_newer(order_id, lambda now: now is not None and now.revision > found.revision)
            if current is None or current.revision <= found.revision:
                raise RecordBehind(
                    f"the record of order {order_id} cannot be read as it is now."
                ) from conflict
            return current
        return self._remember(order_id, Found(record, revision, fresh=True))

    # Deciding

    def _settle(self, change: _Change) -> Found:
        self._look(change)
        self._waiting.append(change)
        with self._turn:
            # The thread whose turn it is decides for all that wait meanwhile, perhaps for us.
            while not change.settled:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
                try:
                    self._decide(batch)
                except BaseException as error:
                    # The others are told in words of their own: an interrupt is meant for this thread only.
                    for other in batch:
                        other.error = error if other is change else StockBusy(f"the batch failed: {error!r}")
                    if change not in batch or not isinstance(error, Exception):
                        raise
        if change.error is not None:
            raise change.error
        return self._record(change)

    def _look(self, change: _Change) -> None:
        change.seen_at = self._known().revision
        change.existing = self.find(change.order_id)

    def _decide(self, batch: list[_Change]) -> None:
        deadline = time.monotonic() + self._timeout / 1000
        attempts = 0
        while not self._try_decide(batch):
            attempts += 1
            if time.monotonic() > deadline:
                raise StockBusy(
                    f"the stock was changed by others {attempts} times while this order tried to."
                )
            # Random, so that two processes do not keep meeting.
            time.sleep(random.uniform(0, min(0.001 * 2**attempts, 0.05)))
            self._learn(self._read())

    def _try_decide(self, batch: list[_Change]) -> bool:
        """Make every decision on the levels that are known; False when those are outdated."""
        levels = self._known()
        pieces = {**self._initial, **levels.pieces}
        decisions: dict[str, Record] = {}
        results: list[tuple[_Change, Record]] = []
        for change in batch:
            if change.seen_at < levels.revision:
                self._look(change)
            # One order may be in the batch twice: the second sees what the first decided.
            noted = decisions.get(change.order_id) or levels.note(change.order_id)
            current = _current(change.existing, noted)
            decided = change.decide(current, pieces)
            if decided is not None:
                decisions[change.order_id] = decided
            result = decided or current
            assert result is not None, "what is not decided is recorded"
            results.append((change, result))
        if decisions:
            kept = self._without_written(levels, decisions)
            pending = {**kept, **{order_id: record.to_json() for order_id, record in decisions.items()}}
            newer = Levels(pieces, pending, 0)
            try:
                revision = self._bucket.update(LEVELS, newer.encode(), revision=levels.revision)
            except RevisionConflict:
                return False
            self._learn(Levels(pieces, pending, revision))
            with self._lock:
                self._written &= {(order_id, noted["state"]) for order_id, noted in pending.items()}
        for change, result in results:
            change.result = result
        return True

    def _record(self, change: _Change) -> Found:
        """Write the decision into the order's record, unless it is there."""
        existing, result = change.existing, change.result
        assert result is not None
        if existing is not None and existing.record is result:
            return existing
        found = self._write(change.order_id, existing, result)
        with self._lock:
            self._written.add((change.order_id, result.state))
        return found

    def _write(self, order_id: str, existing: Found | None, decided: Record) -> Found:
        if existing is not None:
            return self.forward(order_id, existing, decided)
        try:
            revision = self._bucket.create(f"order.{order_id}", decided.encode())
            return self._remember(order_id, Found(decided, revision, fresh=True))
        except KeyExists:
            # Another run of the step has written it, and may have gone on from there.
            found = self.find(order_id)
            if found is None:
                raise
            return found

    def _without_written(self, levels: Levels, decisions: Mapping[str, Record]) -> dict[str, Any]:
        """Return the notes without those whose records are written: ours, and a few that were left behind."""
        oldest = self._now() - self._sweep_after
        swept = 0
        with self._lock:
            written = set(self._written)
        kept: dict[str, Any] = {}
        for order_id, noted in levels.pending.items():
            state = noted["state"]
            if (order_id, state) in written or order_id in decisions:
                continue
            if swept < _SWEPT_AT_ONCE and noted["at"][state] <= oldest:
                swept += 1
                record = Record.from_json(noted)
                existing = self.find(order_id)
                if _current(existing, record) is record:
                    self._write(order_id, existing, record)
            else:
                kept[order_id] = noted
        return kept

    # The levels

    def _known(self) -> Levels:
        heard, known = self._heard, self._levels
        if heard is not None and (known is None or heard.revision > known.revision):
            self._learn(Levels.decode(heard))
        elif known is None:
            self._learn(self._read())
        assert self._levels is not None
        return self._levels

    def _learn(self, levels: Levels) -> None:
        with self._lock:
            if self._levels is None or levels.revision > self._levels.revision:
                self._levels = levels

    def _read(self) -> Levels:
        """Return the levels of the bucket, which begin as the initial ones."""
        while True:
            entry = self._bucket.get(LEVELS)
            if entry is not None:
                return Levels.decode(entry)
            first = Levels(dict(self._initial), {}, 0)
            try:
                return Levels(first.pieces, {}, self._bucket.create(LEVELS, first.encode()))
            except KeyExists:
                continue


def _current(existing: Found | None, noted: Record | None) -> Record | None:
    """Return what holds of an order's record and the note about it; either may be behind."""
    if existing is None or noted is None:
        return noted if existing is None else existing.record
    return noted if (existing.record.state, noted.state) in _GIVEN_BACK else existing.record
