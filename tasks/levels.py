"""The pieces of one product: how many are available, and which orders changed that a moment ago.

`level.{sku}` holds both, and every change is one compare-and-set on it. A change for an order leaves a *note* there:
`taken`, or `given back`. The note says that the order has had its part of this key; the order's record decides what
becomes of it (see `tasks.stock`). A note is dropped only after the record shows what the note stands for, so a run of
a step that comes late finds either the note or the record, and changes nothing.

That needs an order of things: know the key at some revision, *then* look for the order's record on a server that has
this revision, then compare-and-set from it. A change in between makes another revision. The server that answers the
look may be behind others, but not behind the revision that is known, so it has the record if the note was dropped.

The threads of a process that want the same product at the same time are served by one compare-and-set and one look: a
product in great demand costs one for all of them, instead of a race that all but one lose.

A process that is killed, or a thread that is interrupted, between any two lines leaves a note or nothing. A note that
stays behind is dropped with a later change of the same key, when it is older than `sweep_after`.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .ledger import NewerRecord, Record
from .ports import Bucket, Entry
from .together import Together

PREFIX: Final = "level."

#: How many adjustments of a product are remembered.
MAX_ADJUSTMENTS: Final = 50

#: How many notes that others have left behind are looked after with one change.
_SWEPT_AT_ONCE: Final = 3

#: What a note says of an order and this product.
TAKEN: Final = "taken"
GIVEN_BACK: Final = "given back"

#: The states from which an order gives back what it holds, and the state that says that it has.
GIVES_BACK: Final[Mapping[str, str]] = {
    "declined": "released",
    "cancelling": "cancelled",
    "returning": "returned",
}


class StockBusy(Exception):
    """Others kept changing the stock for the whole time allowed; trying again is safe."""


@dataclass(frozen=True, slots=True)
class Found:
    """An order's record and its revision; `fresh` when the call that returns it has just stored it."""

    record: Record
    revision: int
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """What an order has had of a product: `TAKEN` or `GIVEN_BACK`, how many pieces, when (milliseconds)."""

    kind: str
    quantity: int
    at: int


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A change of the stock by people: pieces added (negative: taken away), when (milliseconds), by whom, why."""

    id: str
    pieces: int
    at: int
    by: str
    reason: str


@dataclass(slots=True)
class Level:
    """The value of a key: pieces that can be sold, notes of orders that changed them a moment ago, and adjustments."""

    pieces: int
    notes: dict[str, Note] = field(default_factory=dict)
    adjustments: list[Adjustment] = field(default_factory=list)

    def adjust(
        self, adjustment_id: str, change: Callable[[int], int], at: int, by: str, reason: str
    ) -> Adjustment | Short:
        """Change the pieces for people; an id that is remembered changes nothing more. See `Shelf.adjust`."""
        for known in self.adjustments:
            if known.id == adjustment_id:
                return known
        pieces = change(self.pieces)
        if pieces < 0:
            return Short(self.pieces)
        done = Adjustment(adjustment_id, pieces - self.pieces, at, by, reason)
        self.pieces = pieces
        self.adjustments = [*self.adjustments[1 - MAX_ADJUSTMENTS :], done]
        return done

    def encode(self) -> bytes:
        """Return the level as it is stored."""
        notes = {order_id: [note.kind, note.quantity, note.at] for order_id, note in self.notes.items()}
        stored: dict[str, Any] = {"pieces": self.pieces, "notes": notes}
        if self.adjustments:
            stored["adjustments"] = [[a.id, a.pieces, a.at, a.by, a.reason] for a in self.adjustments]
        return json.dumps(stored, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, value: bytes) -> Level:
        """Return the level that `encode` stored."""
        stored = json.loads(value)
        return cls(
            stored["pieces"],
            {key: Note(*note) for key, note in stored["notes"].items()},
            [Adjustment(*one) for one in stored.get("adjustments", ())],
        )

    def copy(self) -> Level:
        """Return a level that can be changed without changing this one."""
        return Level(self.pieces, dict(self.notes), list(self.adjustments))


@dataclass(frozen=True, slots=True)
class Short:
    """There are fewer pieces than an order wants."""

    available: int


# Changes the level for an order, given its record (None: there is none), and returns what to tell the caller.
Apply = Callable[[Level, Found | None], Any]


class _Change:
    """A change that waits to be made with others."""

    __slots__ = ("apply", "order_id", "record", "recorded", "result", "seen_at")

    def __init__(self, order_id: str, apply: Apply, recorded: int, seen_at: int) -> None:
        self.recorded = recorded
        self.order_id = order_id
        self.apply = apply
        self.record: Found | None = None
        self.seen_at = seen_at  # the record was looked for when the key was known at this revision
        self.result: Any = None


class Shelf:
    """The key of one product; all threads of a process share it.

    Parameters:
      sku: The product.
      initial: Its pieces while the key does not exist.
      bucket: Where the key is.
      now: The time in milliseconds.
      timeout: Milliseconds for which a change competes with others before StockBusy.
      sweep_after: Milliseconds after which a note that was not dropped is taken for one left behind.
    """

    def __init__(
        self,
        sku: str,
        initial: int,
        bucket: Bucket,
        now: Callable[[], int],
        *,
        timeout: int,
        sweep_after: int,
    ) -> None:
        self.key = f"{PREFIX}{sku}"
        self._initial = initial
        self._bucket = bucket
        self._now = now
        self._timeout = timeout
        self._sweep_after = sweep_after
        self._known: tuple[Level, int] | None = None
        self._heard: Entry | None = None
        self._together: Together[list[_Change]] = Together(
            self._make_lists, lambda error: StockBusy(f"the batch failed: {error!r}")
        )
        # Notes of ours whose records are written: the next change drops them.
        self._written: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def take(self, order_id: str, quantity: int, *, in_part: bool = False) -> Note | Short | Found:
        """Take pieces for an order.

        Parameters:
          in_part: Take what there is if that is less, and more than nothing.

        Returns:
          The note that says so, Short, or the order's record: then it is decided, and nothing was taken. The note of
          an earlier run may be of fewer pieces, whatever this one asks for.
        """

        apply = self._taking(order_id, quantity, in_part=in_part)
        note: Note | Short | Found = self._change(order_id, apply, TAKEN)
        if isinstance(note, Short):
            # What is known of the key may be older than a restock.
            with self.turn:
                self._heard, self._known = None, self._read()
            note = self._change(order_id, apply, TAKEN)
        return note

    def take_for(self, quantities: Mapping[str, int], seen_at: int) -> dict[str, Note | Short | Found]:
        """Take pieces for several orders with one change; returns for each what `take` does.

        Parameters:
          quantities: How many pieces each order wants.
          seen_at: The revision that was known when the orders' records were looked for, and there was none.
        """
        changes = [
            self._change_of(order_id, self._taking(order_id, quantity), TAKEN, seen_at=seen_at)
            for order_id, quantity in quantities.items()
        ]
        self._together(changes)
        return {change.order_id: change.result for change in changes}

    def _taking(self, order_id: str, quantity: int, *, in_part: bool = False) -> Apply:
        def apply(level: Level, found: Found | None) -> Note | Short | Found:
            if found is not None:
                return found
            pieces = min(quantity, level.pieces) if in_part else quantity
            if not 0 < pieces <= level.pieces:
                return Short(level.pieces)
            level.pieces -= pieces
            note = level.notes[order_id] = Note(TAKEN, pieces, self._now())
            return note

        return apply

    def undo(self, order_id: str) -> None:
        """Give back what was taken for an order whose record says that it holds nothing, and never will."""
        if not self._change(order_id, lambda level, _: _undo(level, order_id)):
            # What is known of the key may be older than the note.
            with self.turn:
                self._heard, self._known = None, self._read(linearizable=True)
            self._change(order_id, lambda level, _: _undo(level, order_id))

    def give_back(self, order_id: str, quantity: int, known: Found) -> Note | Found:
        """Give back pieces of an order whose record says that it is giving back.

        Parameters:
          known: The record that says so; it may be outdated.

        Returns:
          The note that says so, or the newer record: then it was done before, and nothing was given back.
        """

        def apply(level: Level, found: Found | None) -> Note | Found:
            assert found is not None, "it is as new as the one that is known"
            if found.record.state not in GIVES_BACK:
                return found
            level.pieces += quantity
            note = level.notes[order_id] = Note(GIVEN_BACK, quantity, self._now())
            return note

        note: Note | Found = self._change(order_id, apply, GIVEN_BACK, known.revision)
        return note

    def adjust(
        self, adjustment_id: str, change: Callable[[int], int], by: str, reason: str
    ) -> Adjustment | Short:
        """Change the stock for people, once for each id, while the key remembers it.

        Parameters:
          change: Returns how many pieces there shall be, given how many there are.

        Returns:
          What was done, now or before; Short when there would be fewer than none.
        """

        def apply(level: Level, _: Found | None) -> Adjustment | Short:
            return level.adjust(adjustment_id, change, self._now(), by, reason)

        done: Adjustment | Short = self._change("", apply)
        return done

    def written(self, order_id: str, kind: str) -> None:
        """Say that an order's record shows what its note stands for."""
        with self._lock:
            self._written.add((order_id, kind))

    def heard(self, entry: Entry) -> None:
        """Take note of the newest value; for a watch, so that fewer changes are made to an outdated one."""
        # It is read when it is needed, because most are outdated before that.
        self._heard = entry

    # Changing

    def _change(self, order_id: str, apply: Apply, kind: str = "", recorded: int = 0) -> Any:
        """Make a change with those of other threads; returns its result."""
        change = self._change_of(order_id, apply, kind, recorded)
        self._together([change])
        return change.result

    def _change_of(
        self, order_id: str, apply: Apply, kind: str = "", recorded: int = 0, seen_at: int = -1
    ) -> _Change:
        """Return a change that is made once.

        Parameters:
          kind: The note that stands for the change: one that is there already is the result. With none, no record is
            looked for.
          recorded: A revision of the order's record that is known.
          seen_at: The revision that was known when the record was looked for, and there was none.
        """

        def once(level: Level, found: Found | None) -> Any:
            note = level.notes.get(order_id)
            return note if kind and note is not None and note.kind == kind else apply(level, found)

        return _Change(order_id if kind else "", once, recorded, seen_at)

    def _make_lists(self, lists: list[list[_Change]]) -> None:
        self._make([change for changes in lists for change in changes])

    def _make(self, batch: list[_Change]) -> None:
        try:
            self._make_all(batch)
        except BaseException:
            self.forget()
            raise

    def _make_all(self, batch: list[_Change]) -> None:
        deadline = time.monotonic() + self._timeout / 1000
        attempts = 0
        while not self._try(batch):
            attempts += 1
            if time.monotonic() > deadline:
                raise StockBusy(
                    f"{self.key} was changed by others {attempts} times while this order tried to."
                )
            # Random, so that two processes do not keep meeting.
            time.sleep(random.uniform(0, min(0.001 * 2**attempts, 0.05)))
            self.forget()

    def _try(self, batch: list[_Change]) -> bool:
        """Make every change to the level that is known; False when that is outdated."""
        known, revision = self._know()
        self._look(batch, known, revision)
        level = known.copy()
        results = [(change, change.apply(level, change.record)) for change in batch]
        if level != known:
            written = self._drop(level, known, revision)
            try:
                if revision:
                    revision = self._bucket.update(self.key, level.encode(), revision=revision)
                else:
                    revision = self._bucket.create(self.key, level.encode())
            except (KeyExists, RevisionConflict):
                return False
            self._changed(level, revision, written)
        for change, result in results:
            change.result = result
        return True

    def _look(self, batch: Iterable[_Change], known: Level, revision: int) -> None:
        """Look for the records of the orders that have no note here, on a server that has this revision."""
        unseen = [change for change in batch if change.order_id and change.seen_at != revision]
        if not unseen:
            return
        newest = max(unseen, key=lambda change: change.recorded)
        since = (self.key, revision)
        if newest.recorded > revision:
            since = (f"order.{newest.order_id}", newest.recorded)
        records = self._records([change.order_id for change in unseen], since)
        for change in unseen:
            change.record, change.seen_at = records.get(change.order_id), revision

    def _records(self, order_ids: Sequence[str], since: tuple[str, int]) -> dict[str, Found]:
        """Return the records of orders, from a server that has a revision of a key."""
        keys = {f"order.{order_id}": order_id for order_id in order_ids}
        if since[1]:
            found = self._bucket.get_many(list(keys), since=since)
        else:
            found = {key: entry for key in keys if (entry := self._bucket.get(key)) is not None}
        return {keys[key]: Found(Record.decode(one.value), one.revision) for key, one in found.items()}

    @property
    def turn(self) -> threading.Lock:
        """Held while the key is changed by this process."""
        return self._together.turn

    @property
    def revision(self) -> int:
        """The newest revision of the key that this process knows; -1 for none."""
        heard, known = self._heard, self._known
        return max(-1 if heard is None else heard.revision, -1 if known is None else known[1])

    def _know(self) -> tuple[Level, int]:
        """Return the level and its revision as this process knows them; they are read if they are not known."""
        heard, known = self._heard, self._known
        if heard is not None and (known is None or heard.revision > known[1]):
            known = self._known = Level.decode(heard.value), heard.revision
        elif known is None:
            known = self._known = self._read()
        return known

    def forget(self) -> None:
        """Have the level read again. What was heard may be of another life of the store, so it goes as well."""
        self._known = self._heard = None

    def _changed(self, level: Level, revision: int, written: set[tuple[str, str]]) -> None:
        """Take note of a change that was stored, without the notes that `_drop` has returned."""
        self._known = level, revision
        with self._lock:
            self._written -= written

    def _drop(self, level: Level, known: Level, revision: int) -> set[tuple[str, str]]:
        """Drop the notes whose records are written: ours, and a few that were left behind; returns ours.

        Parameters:
          level: Is about to be stored in place of the one that is `known` at a `revision`.
        """
        with self._lock:
            written = set(self._written)
        for order_id, kind in written:
            note = known.notes.get(order_id)
            if note is not None and note.kind == kind and level.notes.get(order_id) is note:
                del level.notes[order_id]
        oldest = self._now() - self._sweep_after
        left = [
            key for key, note in known.notes.items() if note.at <= oldest and level.notes.get(key) is note
        ]
        if left:
            left = random.sample(left, min(len(left), _SWEPT_AT_ONCE))
            try:
                records = self._records(left, (self.key, revision))
            except NewerRecord:
                return written  # a process of that version does it
            for order_id in left:
                _sweep(level, order_id, records.get(order_id), self.key.removeprefix(PREFIX))
        return written

    # Reading

    def _read(self, *, linearizable: bool = False) -> tuple[Level, int]:
        entry = self._bucket.get(self.key, linearizable=linearizable)
        return (Level(self._initial), 0) if entry is None else (Level.decode(entry.value), entry.revision)


def _undo(level: Level, order_id: str) -> bool:
    """Give back what was taken for an order; False when nothing was."""
    note = level.notes.get(order_id)
    if note is None or note.kind != TAKEN:
        return False
    level.pieces += note.quantity
    del level.notes[order_id]
    return True


def _sweep(level: Level, order_id: str, found: Found | None, sku: str) -> None:
    """Do with a note what its order's record says; a note whose record has yet to be written stays."""
    if found is None:
        return
    if level.notes[order_id].kind == GIVEN_BACK:
        if found.record.state not in GIVES_BACK:
            del level.notes[order_id]
    elif sku in found.record.taken:
        del level.notes[order_id]
    else:
        _undo(level, order_id)
