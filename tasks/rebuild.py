"""Makes the read model again from the stream, while the service runs: `python -m tasks.rebuild`.

The events up to the end of the stream at the start are what a record is made of; whatever the workers project
meanwhile is newer and stays. Records whose orders the stream does not have are removed. Events that are older than
the stream's first message cannot be read again, so what records say about them stays too. Killed half-way it has
done no harm: run it again.
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

from .events import order_id_of
from .orders import Happened, Stored, merge
from .ports import Bucket, Entry
from .stream import EventStream, Range

#: How many events are held in memory before the records of their orders are written.
_CHUNK = 5_000

#: How long one record is competed for with the workers, in seconds.
_PATIENCE = 30.0


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

    def __init__(self, bucket: Bucket, stream: EventStream, progress: Callable[[int, int], None]) -> None:
        self._bucket = bucket
        self._stream = stream
        self._progress = progress
        self._summary = Summary()
        self._range = Range(0, 0)
        # The orders whose records begin with what this run has read.
        self._begun: set[str] = set()

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
            deadline = time.monotonic() + _PATIENCE
            while not self._write_one(order_id, happenings):
                if time.monotonic() > deadline:
                    raise BrokerError(f"The record of order {order_id} kept changing; run the rebuild again.")
                time.sleep(random.uniform(0, 0.02))
            self._begun.add(order_id)

    def _write_one(self, order_id: str, happenings: Iterable[Happened]) -> bool:
        """Write the record of an order; False when a worker was faster."""
        entry = self._bucket.get(order_id)
        existing: Stored | None = None if entry is None else json.loads(entry.value)
        record = existing if order_id in self._begun else self._beyond(existing)
        for one in happenings:
            record = merge(record, one) or record
        if record == existing:
            self._summary.unchanged += 1
            return True
        value = json.dumps(record, separators=(",", ":")).encode()
        try:
            if entry is None:
                self._bucket.create(order_id, value)
            else:
                self._bucket.update(order_id, value, revision=entry.revision)
        except (KeyExists, RevisionConflict):
            return False
        self._summary.written += 1
        return True

    def _beyond(self, record: Stored | None) -> Stored | None:
        """Return what a record says about events that this run does not read; None when that is nothing."""
        if record is None:
            return None
        first, last = self._range.first, self._range.last
        kept = {key: fact for key, fact in record["events"].items() if not first <= fact["sequence"] <= last}
        return {**record, "events": kept} if kept else None

    def _remove_strangers(self) -> None:
        for entry in self._bucket.items():
            if entry.key not in self._begun and self._beyond(_stored(entry)) is None:
                try:
                    self._bucket.delete(entry.key, revision=entry.revision)
                except RevisionConflict:
                    continue  # a worker has just written it, so it is no stranger
                self._summary.removed += 1


def _stored(entry: Entry) -> Stored:
    stored: Stored = json.loads(entry.value)
    return stored


def main() -> int:
    from . import app, service

    argparse.ArgumentParser(description="Make the read model again from the stream.").parse_args()

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done:,} of {of:,}", end="\n" if done == of else "", file=sys.stderr, flush=True)

    try:
        print(Rebuild(app.orders_bucket(), service.event_stream(), progress).run())
    except BrokerError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        app.broker.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
