"""Moves orders that are over from the stream and the buckets into the archive, and brings them back.

A stretch of the stream leaves as a whole, oldest first, so everything before one place is archived and everything from
it on is in the stream. Events leave that are older than RETENTION_DAYS, up to the first that has to stay: of an order
that is not final, of which money may have to go back, that the read model does not show, that the figures have not
counted, or that a consumer of the stream has not settled. What the bucket of the stock and the read model have of an
order leaves with its last event.

    write a segment, synced and read back (`tasks.archive`) → move the mark in the bucket of the stock
    → for each order that ends in it: close its claim, delete its entries, delete its record → remove the stretch

Killed between any two of these, the next run carries on: what the mark does not know of is a whole segment that follows
it, and what was closed and deleted stays so. Nothing is removed before its segment is on the disk. An entry is deleted
only as it was archived; an order that was changed meanwhile keeps its entries, and leaves with its new last event.

A closed claim stays, so that no event that comes again, and no request, begins an archived order again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict
from dramatiq_jetstream.streams import Range, StoredMessage

from .archive import Archive, ArchiveBroken, ArchivedOrder, Segment
from .claims import Claim
from .entries import claim_key, entries_of, record_key
from .erased import ErasedOrders
from .events import Happened, order_id_of
from .ledger import Record
from .model import Order
from .orders import Orders
from .ports import Bucket, Entry
from .stream import EventStream, merged, read_stored

#: The key that says how far the stream is archived, in the bucket of the stock.
MARK: Final = "mark.archive"

#: How many events a segment has at most, about how many bytes of them, and how many orders without events.
MAX_EVENTS: Final = 10_000
MAX_ORDERS: Final = 10_000
MAX_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Mark:
    """Up to where the stream is archived, from where on, and in which archive."""

    archive: str
    since: int
    last: int


@dataclass
class Summary:
    """What a run has done, and what kept it from going on; empty when nothing older is left."""

    segments: int = 0
    events: int = 0
    orders: int = 0
    held_by: str = ""

    def __str__(self) -> str:
        said = f"{self.segments} segments written: {self.events} events, {self.orders} orders."
        return f"{said} It goes no further: {self.held_by}." if self.held_by else said


class Retention:
    """Moves orders into an archive.

    Parameters:
      stream: The events.
      stock_bucket: The ledger.
      orders, orders_bucket: The read model.
      erased: The orders whose customers were erased.
      forget: Takes orders out of the index of the read model.
      counted: Returns up to which event the figures have counted.
      keep: Milliseconds for which events stay in the stream.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        archive: Archive,
        stream: EventStream,
        stock_bucket: Bucket,
        orders: Orders,
        orders_bucket: Bucket,
        erased: ErasedOrders,
        forget: Callable[[Iterable[Order]], None],
        counted: Callable[[], int],
        *,
        keep: int,
        now: Callable[[], int],
    ) -> None:
        self.archive = archive
        self._stream = stream
        self._stock_bucket = stock_bucket
        self._orders = orders
        self._orders_bucket = orders_bucket
        self._erased = erased
        self._forget = forget
        self._counted = counted
        self._keep = keep
        self._now = now

    def run(self) -> Summary:
        """Archive what may leave at this moment; returns what was done.

        What becomes old enough meanwhile is for the next run: however busy the service is, this one comes to its end.

        Raises:
          ArchiveBroken: When the archive is not whole, not this store's, or used by another process.
        """
        summary, oldest = Summary(), self._now() - self._keep
        with self.archive.alone():
            mark = self._begin()
            due = self._due(oldest)
            while True:
                stretch = self._next(mark.last + 1, oldest)
                summary.held_by = stretch.held_by
                if not stretch.events:
                    return summary
                last = stretch.events[-1].sequence
                orders = list(self._ending(stretch, last, due))
                segment = self.archive.write(mark.last + 1, last, self._now(), stretch.events, orders)
                mark = self._move(mark, last)
                self._leave(segment)
                summary.segments += 1
                summary.events += len(stretch.events)
                summary.orders += len(orders)

    # What is where

    def _begin(self) -> Mark:
        """Return the mark, after what an earlier run has begun is brought to its end."""
        mark = self._mark()
        segments = self.archive.segments()
        last = segments[-1] if segments else None
        if segments and segments[0].first != mark.since + 1:
            raise ArchiveBroken(
                f"The archive in {self.archive.directory} is not whole: it begins with event {segments[0].first}, and "
                f"should with {mark.since + 1}. Put back the files that are missing."
            )
        if last is not None and last.first == mark.last + 1:
            self.archive.verify(last)
            mark = self._move(mark, last.last)
        if (mark.since if last is None else last.last) != mark.last:
            raise ArchiveBroken(
                f"The archive in {self.archive.directory} is not whole: events up to {mark.last} were archived, and it "
                f"ends with {mark.since if last is None else last.last}. Put back the files that are missing."
            )
        if last is not None and self._stream.range().first <= mark.last:
            self.archive.verify(last)
            self._leave(last)
        return mark

    def _mark(self) -> Mark:
        mine = self.archive.id
        mark = find_mark(self._stock_bucket)
        if mark is None:
            if self.archive.segments():
                raise ArchiveBroken(
                    f"The archive in {self.archive.directory} is another store's: give ARCHIVE_DIR an empty directory."
                )
            since = self._stream.range().first - 1
            with suppress(KeyExists):
                self._stock_bucket.create(MARK, _encode(Mark(mine, since, since)))
            mark = find_mark(self._stock_bucket)
            assert mark is not None, "it is there"
        if mark.archive != mine:
            raise ArchiveBroken(
                f"Events up to {mark.last} are in another archive than the one in {self.archive.directory}, with the "
                f"id {mark.archive}: set ARCHIVE_DIR to its directory."
            )
        return mark

    def _move(self, mark: Mark, last: int) -> Mark:
        """Note that the archive goes up to a place."""
        entry = self._stock_bucket.get(MARK)
        moved = Mark(mark.archive, mark.since, last)
        assert entry is not None, "nothing removes it"
        if entry.value != _encode(mark):
            raise ArchiveBroken(
                "Another process archives at the same time, with a copy of the archive: stop one."
            )
        self._stock_bucket.update(MARK, _encode(moved), revision=entry.revision)
        return moved

    # What may leave

    def _next(self, first: int, oldest: int) -> _Stretch:
        """Return the next events that may leave, of those that were stored before `oldest` (milliseconds)."""
        stretch = _Stretch()
        behind, counted = self._stream.settled_to(), self._counted()
        size = 0
        for stored in self._stream.stored(first):
            if stored.time >= oldest:
                break
            if behind is not None and stored.sequence > behind[0]:
                stretch.held_by = f"the consumer {behind[1]} has not settled event {stored.sequence}"
                break
            happened = read_stored(stored)
            if happened is not None and stored.sequence > counted:
                stretch.held_by = f"the figures have not counted event {stored.sequence}"
                break
            if happened is not None and (held_by := self._held_by(stretch, happened)):
                stretch.held_by = held_by
                break
            stretch.events.append(stored)
            size += len(stored.data)
            if len(stretch.events) >= MAX_EVENTS or size >= MAX_BYTES:
                break
        return stretch

    def _held_by(self, stretch: _Stretch, happened: Happened) -> str:
        """Return what keeps an event in the stream; empty when it may leave."""
        order_id = order_id_of(happened.event)
        if order_id in stretch.newest:
            return ""
        entries = entries_of(self._stock_bucket, order_id)
        claim = entries.get(claim_key(order_id))
        if claim is None and record_key(order_id) not in entries:
            return ""  # no order of this service
        if _is_closed(claim):
            return ""  # one that left before
        order = self._orders.get(order_id)
        if order is None:
            return f"order {order_id} is not in the read model, see `python -m tasks.rebuild`"
        if unfinished := _unfinished(order, entries):
            return unfinished
        stretch.newest[order_id] = max(entry.sequence for entry in order.history)
        stretch.entries[order_id] = entries
        return ""

    def _ending(self, stretch: _Stretch, last: int, due: dict[str, int]) -> Iterator[ArchivedOrder]:
        """Yield the orders that have no event left behind a place, as they were when they were found to be over.

        One that was changed since stays: its refund or cancel was accepted a moment ago.
        """
        ending = {key: stretch.entries[key] for key, newest in stretch.newest.items() if newest <= last}
        for order_id, found in {**dict(self._without_events(due, last)), **ending}.items():
            record = self._orders_bucket.get(order_id)
            entries = entries_of(self._stock_bucket, order_id)
            if _revisions(entries) == _revisions(found):
                yield ArchivedOrder(
                    order_id,
                    {key: entry.value.decode() for key, entry in entries.items()},
                    None if record is None else record.value.decode(),
                )

    def _due(self, oldest: int) -> dict[str, int]:
        """Return the orders that have no event in the stream and whose time is over, each with the place of its newest
        event as far as that is known: restored ones, and erased ones.
        """
        restored = self._stock_bucket.items("restored.")
        due = {one.key.partition(".")[2]: 0 for one in restored if json.loads(one.value)["at"] < oldest}
        return due | {one.order_id: one.newest for one in self._erased.all() if one.ended_at < oldest}

    def _without_events(self, due: dict[str, int], last: int) -> Iterator[tuple[str, Mapping[str, Entry]]]:
        """Yield the orders that are due and have no event behind a place, with their entries; a run looks at each once,
        unless it has a later event.
        """
        looked_at = list(islice((one for one, newest in due.items() if newest <= last), MAX_ORDERS))
        for order_id in looked_at:
            del due[order_id]
            # The entries first: what changes while the rest is looked at makes them outdated.
            entries = entries_of(self._stock_bucket, order_id)
            order = self._orders.get(order_id)
            if order is None or _is_closed(entries.get(claim_key(order_id))) or _unfinished(order, entries):
                continue  # with its claim closed it is only half back: its restore was killed, and is to be repeated
            newest = max(one.sequence for one in order.history)
            if newest <= last:
                yield order_id, entries
            else:
                due[order_id] = newest

    # Leaving

    def _leave(self, segment: Segment) -> None:
        """Take away what a segment has."""
        closed = []
        for line in self.archive.lines(segment):
            if "order" in line:
                archived = ArchivedOrder.of(line)
                if self._close(archived) and (order := archived.order) is not None:
                    closed.append(order)
                    if not order.customer_id:
                        self._erased.forget(order.order_id)
        self._forget(closed)
        self._stream.trim(segment.last + 1)

    def _close(self, archived: ArchivedOrder) -> bool:
        """Delete the entries of an order, if they are still as they were archived, and its record.

        Returns:
          Whether the order is in the archive alone now.
        """
        bucket, order_id = self._stock_bucket, archived.order_id
        there = entries_of(bucket, order_id)
        claim = there.get(claim_key(order_id))
        was_closed = _is_closed(claim)
        record = there.get(record_key(order_id))
        if was_closed and record is None and record_key(order_id) in archived.entries:
            # A run was killed when it had deleted the record.
            self._take_rest(order_id)
            return True
        others = {key: entry for key, entry in there.items() if key != claim_key(order_id)}
        changed = [key for key, entry in others.items() if archived.entries.get(key) != entry.value.decode()]
        if was_closed and changed and claim is not None:
            # A run was killed as it closed an order that was changed at that moment.
            self._stock_bucket.update(
                claim.key, archived.entries[claim.key].encode(), revision=claim.revision
            )
            return False
        if changed or (not was_closed and len(there) != len(archived.entries)):
            return False
        if claim is not None and not was_closed:
            closed = Claim.decode(claim.value).archived.encode()
            revision = bucket.update(claim.key, closed, revision=claim.revision)
            # A cancel that was noted before the claim was closed is accepted, one that comes later is refused.
            noted = entries_of(bucket, order_id, (claim.key, revision)).keys() - there.keys()
        else:
            revision = 0 if claim is None else claim.revision
            noted = set()
        try:
            if record is not None and not noted:
                bucket.delete(record.key, revision=record.revision)
        except RevisionConflict:
            noted = {record_key(order_id)}
        if noted:
            if claim is not None:
                bucket.update(claim.key, archived.entries[claim.key].encode(), revision=revision)
            return False
        self._take_rest(order_id)
        return True

    def _take_rest(self, order_id: str) -> None:
        """Delete what stands beside the record of an order.

        Without a record nothing can be decided of the order, so what was noted meanwhile goes as well. Nothing brings
        the record back but `restore`, which does not run now.
        """
        for key in entries_of(self._stock_bucket, order_id):
            if key != claim_key(order_id):
                self._stock_bucket.delete(key)
        self._orders_bucket.delete(order_id)

    # Coming back

    def restore(
        self,
        wanted: Iterable[str] | None,
        recorded: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> Iterator[str]:
        """Bring orders back from the archive, to be read, refunded and so on; yields the ids of those that are back.

        They stay for as long as new ones. Their events stay in the archive. Killed at any moment, it may be repeated.
        No run and no erasure changes the archive meanwhile.

        Parameters:
          wanted: Which; None is all of them.
          recorded: Is given each order, and entered before it comes back.

        Raises:
          ArchiveBroken: When the archive is not whole, or used by another process; what was yielded before is back.
        """
        ids = None if wanted is None else set(wanted)
        with self.archive.alone():
            # One that was archived twice is as it was archived last.
            newest = {one.order_id: place for place, one in enumerate(self.archive.orders())}
            for place, archived in enumerate(self.archive.orders()):
                is_wanted = ids is None or archived.order_id in ids
                if not is_wanted or newest[archived.order_id] != place:
                    continue
                claim = self._stock_bucket.get(claim_key(archived.order_id))
                if claim is None or _is_closed(claim):  # or it is back, or never left
                    with recorded(archived.order_id):
                        self._bring_back(archived, claim)
                    yield archived.order_id

    def _bring_back(self, archived: ArchivedOrder, claim: Entry | None) -> None:
        order_id = archived.order_id
        at = json.dumps({"at": self._now()})
        entries = {**archived.entries, f"restored.{order_id}": at}
        opened = entries.pop(claim_key(order_id), None)
        for key, value in entries.items():
            with suppress(KeyExists):
                self._stock_bucket.create(key, value.encode())
        if archived.record is not None:
            with suppress(KeyExists):
                self._orders_bucket.create(order_id, archived.record.encode())
        # Last: with it the order counts again.
        if opened is not None:
            if claim is None:
                self._stock_bucket.create(claim_key(order_id), opened.encode())
            else:
                self._stock_bucket.update(claim.key, opened.encode(), revision=claim.revision)


class _Stretch:
    """Events that may leave, and what stopped the stretch. For each order in them: the place of its newest event, and
    its entries from before it was found to be over.
    """

    def __init__(self) -> None:
        self.events: list[StoredMessage] = []
        self.newest: dict[str, int] = {}
        self.entries: dict[str, Mapping[str, Entry]] = {}
        self.held_by = ""


def _unfinished(order: Order, entries: Mapping[str, Entry]) -> str:
    """Return why an order is not over; empty when it is."""
    order_id = order.order_id
    if not order.is_final:
        return f"order {order_id} is {order.status}"
    record = entries.get(record_key(order_id))
    if f"cancel.{order_id}" in entries and record and Record.decode(record.value).state == "confirmed":
        return f"order {order_id} is to be cancelled"
    if f"refund.{order_id}" in entries:
        return f"money of order {order_id} may have to go back"
    return ""


def _is_closed(claim: Entry | None) -> bool:
    """Whether a claim says that its order is in the archive alone."""
    return claim is not None and Claim.decode(claim.value).is_archived


def _revisions(entries: Mapping[str, Entry]) -> Mapping[str, int]:
    return {key: entry.revision for key, entry in entries.items()}


def find_mark(bucket: Bucket) -> Mark | None:
    """Return up to where the stream is archived, None when nothing ever was."""
    entry = bucket.get(MARK)
    return None if entry is None else Mark(**json.loads(entry.value))


def _encode(mark: Mark) -> bytes:
    return json.dumps({"archive": mark.archive, "since": mark.since, "last": mark.last}).encode()


class Chronicle:
    """The events of the archive and, behind them, those of the stream, as one stream.

    Parameters:
      archive: None where there is none.
      stream: The events that have not left.
    """

    def __init__(self, archive: Archive | None, stream: EventStream) -> None:
        self._archive = archive
        self._stream = stream

    def range(self) -> Range:
        """Return which sequences there are."""
        there = self._stream.range()
        segments = [] if self._archive is None else self._archive.segments()
        first = min([there.first, *(one.first for one in segments[:1])])
        return Range(first, max([there.last, *(one.last for one in segments[-1:])]))

    def read(self, start: int = 1) -> Iterator[Happened]:
        """Yield every event that can be attributed to an order, oldest first.

        Raises:
          ArchiveBroken: When the archive is not whole.
        """
        if self._archive is not None:
            for segment in self._archive.segments():
                start = max(start, segment.last + 1)
        yield from merged(self._events(start), self._stream.erased())

    def _events(self, start: int) -> Iterator[Happened]:
        if self._archive is not None:
            yield from self._archive.events()
        yield from self._stream.present(start)
