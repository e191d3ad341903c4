"""Makes the read model again from stream and ledger, while the service runs: `python -m tasks.rebuild`.

Every record is brought in line by itself, by compare-and-set, and only ever forward: what the ledger confirms stays
in a record, whether this run has come to its event yet or not. So no record is ever behind what it was, although this
is killed at any moment and the workers go on meanwhile. What goes is what the ledger does not confirm: facts and whole
orders that it does not know, and places in the stream where this run found something else.

Events that left the stream are read from the archive (`tasks.archive`). What records say of events that are in neither
stays.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dramatiq.errors import BrokerError

from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from dramatiq_jetstream.streams import Range

from .announcements import Testimony
from .archive import ArchiveBroken
from .events import Happened, key_of, order_id_of
from .folds import RebuildConflict
from .orders import Stored, merge, stored_in, with_event
from .ports import Bucket, Entry
from .products import Catalogue
from .projection import restated
from .retention import Chronicle
from .stock import Stock

#: How many events are held in memory before the records of their orders are written.
_CHUNK = 5_000

#: How long a change of one record is retried while workers change it, in seconds.
_PATIENCE_SECONDS = 30.0


@dataclass
class Summary:
    """What a rebuild has done."""

    events: int = 0
    written: int = 0
    unchanged: int = 0
    removed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.events} events read; {self.written} records written, {self.unchanged} were right, "
            f"{self.removed} removed"
        )


class Rebuild:
    """One rebuild of the records in a bucket."""

    def __init__(
        self,
        bucket: Bucket,
        stock: Stock,
        stream: Chronicle,
        catalogue: Catalogue,
        progress: Callable[[int, int], None],
        now: Callable[[], int],
    ) -> None:
        self._bucket = bucket
        self._stock = stock
        self._stream = stream
        self._catalogue = catalogue
        self._progress = progress
        self._now = now
        self._summary = Summary()
        self._range = Range(0, 0)
        # For each order whose first event this run has found, the keys of its events.
        self._placed: dict[str, frozenset[str]] = {}
        # Most orders have the same ones, which are kept once.
        self._alike: dict[frozenset[str], frozenset[str]] = {}

    def run(self) -> Summary:
        """Rebuild every record."""
        self._range = self._stream.range()
        chunk: dict[str, list[Happened]] = {}
        held = 0
        for happened in self._stream.read(self._range.first):
            if happened.sequence > self._range.last:
                break
            chunk.setdefault(order_id_of(happened.event), []).append(happened)
            held += 1
            if held >= _CHUNK:
                self._write(chunk)
                self._progress(happened.sequence, self._range.last)
                chunk, held = {}, 0
        self._write(chunk)
        self._remove_strangers()
        self._progress(self._range.last, self._range.last)
        return self._summary

    def _write(self, chunk: dict[str, list[Happened]]) -> None:
        for order_id, happenings in chunk.items():
            self._summary.events += len(happenings)
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not self._write_one(order_id, happenings):
                if time.monotonic() > deadline:
                    raise BrokerError(f"The record of order {order_id} kept changing; run the rebuild again.")
                time.sleep(random.uniform(0, 0.02))

    def _write_one(self, order_id: str, happenings: Iterable[Happened]) -> bool:
        """Bring the record of an order in line; False when a worker was faster."""
        entry = self._bucket.get(order_id)
        existing = None if entry is None else stored_in(entry)
        testimony = Testimony(self._stock, order_id, self._now)
        record = restated(existing, testimony)
        placed = set(self._placed.get(order_id, ()))
        for one in happenings:
            confirmed = testimony.attested(one, self._catalogue)
            if confirmed is not None:
                record = self._with(record, confirmed, placed)
        if record is not None and record != existing:
            if not self._store(order_id, entry, record):
                return False
            self._summary.written += 1
        elif order_id not in self._placed and placed:
            self._summary.unchanged += 1
        keys = frozenset(placed)
        self._placed[order_id] = self._alike.setdefault(keys, keys)
        return True

    def _with(self, record: Stored | None, confirmed: Happened, placed: set[str]) -> Stored:
        """Return the record with an event at its first place, whatever place the record gave it."""
        key = key_of(confirmed.event)
        known = None if record is None else record["events"].get(key)
        if (
            record is not None
            and known is not None
            and (key in placed or known["sequence"] < self._range.first)
        ):
            placed.add(key)
            return merge(record, confirmed) or record
        placed.add(key)
        return with_event(record, confirmed)

    def _store(self, order_id: str, entry: Entry | None, record: Stored) -> bool:
        value = json.dumps(record, separators=(",", ":")).encode()
        try:
            if entry is None:
                self._bucket.create(order_id, value)
            else:
                self._bucket.update(order_id, value, revision=entry.revision)
        except (KeyExists, RevisionConflict):
            return False
        return True

    def _remove_strangers(self) -> None:
        """Remove the records of orders that the ledger does not know, or that have no event in the stream.

        The events of an order whose customer was erased were removed. If it came back from the archive, no note says
        where they stood, so what the ledger confirms stays.
        """
        for entry in self._bucket.items():
            if self._placed.get(entry.key):
                continue
            stored = stored_in(entry)
            testimony = Testimony(self._stock, entry.key, self._now)
            known = None if stored is None else restated(stored, testimony)
            if known is not None and (testimony.is_anonymous or self._has_beyond(known)):
                continue
            try:
                self._bucket.delete(entry.key, revision=entry.revision)
            except RevisionConflict:
                continue  # a worker has just written it, so it is no stranger
            self._summary.removed += 1

    def _has_beyond(self, stored: Stored) -> bool:
        """Whether a record has events that this run does not read."""
        first, last = self._range.first, self._range.last
        return any(not first <= fact["sequence"] <= last for fact in stored["events"].values())


def main() -> int:
    from . import app

    argparse.ArgumentParser(
        description="Make the read model again from stream and ledger: records, index and figures."
    ).parse_args()

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done:,} of {of:,}", end="\n" if done == of else "", file=sys.stderr, flush=True)

    try:
        rebuild = Rebuild(
            *(app.orders_bucket(), app.stock_store(), app.chronicle(), app.catalogue(), progress, app.now)
        )
        print(rebuild.run())
        app.indexer().rebuild(progress)
        print("the index is made again")
        app.counting().rebuild(progress)
        print("the figures are counted again")
    except (BrokerError, RebuildConflict, ArchiveBroken) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        app.broker.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
