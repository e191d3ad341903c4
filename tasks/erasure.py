"""Makes a customer unreadable: in the stream, the buckets, the archive, the history, the dead letters and the queues.

What was bought, for how much and when stays, without who it was, so totals stay right (`tasks.anonymous`). The events
of the customer's orders are removed from the stream and overwritten on the server's disk; their places are noted first,
and readers get what remains of them there (`tasks.erased`). Orders that are placed after the erasure was asked for are
a new person's, whatever name they have. An order that was claimed before and ends later is the customer's, with all
that happened to it until it was made anonymous.

An erasure is a job (`tasks.erasure_jobs`), and does one kind of place after the other. In each it notes what it is
about to take away, takes it away, and counts it; then it looks again, until there is nothing. So it may be killed at
any moment and carried on by any process, and its counts are right all the same. When all kinds are done it looks at all
of them once more. Then the name goes from the job, and what is left of it is the certificate.

No erasure begins, and none goes on, while an order of the customer is under way, or money of one may have to go back:
the service needs the name for that, and what it wrote would come after the erasure. Nor does one go on while a run of
the archive, or a restore, is under way, and none of these begins before the erasure stops.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from google.protobuf.message import Message

from dramatiq_jetstream.errors import RevisionConflict, TopologyMissing
from dramatiq_jetstream.streams import StoredMessage, Stream
from orders.v1.events_pb2 import OrderCreated, OrderReserved

from . import anonymous
from .announcements import Testimony
from .archive import Archive, ArchiveBroken, Line, event_line, stored_in
from .audit import Who
from .claims import Claim
from .entries import entries_of
from .erased import ErasedOrder, ErasedOrders
from .erasure_jobs import Job, Jobs, NotErasable
from .events import key_of, order_id_of
from .index import Indexer
from .ledger import Record
from .model import MAX_ID_LENGTH, Order
from .orders import Orders
from .orders import stored_in as shown_in
from .ports import Bucket
from .projection import restated
from .retention import find_mark
from .stock import Stock
from .stream import EventStream, read_stored
from .text import normalised
from .traces import Traces
from .webhooks.health import Health
from .webhooks.subscriptions import PREFIX as ENDPOINT
from .webhooks.subscriptions import Subscriptions

#: How many things are noted before they are taken away.
_AT_ONCE: Final = 2_000

#: The most passes over everything; an erasure that still finds something after them says so.
_ROUNDS: Final = 5


#: How many orders that are under way are named.
_NAMED: Final = 10

#: How long to wait, in seconds, for readers of the stream to settle and count what is there, and for another process
#: that changes the archive.
_PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Stage:
    """A kind of place: what of the customer is there, and how one of it is taken away."""

    name: str
    find: Callable[[Job], Iterator[str]]
    remove: Callable[[Job, str], None]


class Erasure:
    """Erases customers.

    Parameters:
      jobs: The erasures that were asked for.
      buckets: `requests`, `tokens`, `access`, `webhooks` and `deliveries`.
      streams: Streams of messages that may be about an order, by what a certificate calls them.
      fleet_audit, publish: The records of the fleet's dashboard, and what stores one.
      archive: None where there is none.
      counted: Returns up to which event the figures have counted.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        jobs: Jobs,
        stream: EventStream,
        stock: Stock,
        stock_bucket: Bucket,
        orders: Orders,
        orders_bucket: Bucket,
        erased: ErasedOrders,
        indexer: Indexer,
        buckets: Mapping[str, Bucket],
        streams: Mapping[str, Stream],
        fleet_audit: Stream,
        publish: Callable[[str, bytes, Mapping[str, str]], object],
        archive: Archive | None,
        counted: Callable[[], int],
        now: Callable[[], int],
    ) -> None:
        self._jobs = jobs
        self._stream = stream
        self._stock = stock
        self._stock_bucket = stock_bucket
        self._orders = orders
        self._orders_bucket = orders_bucket
        self._erased = erased
        self._indexer = indexer
        self._buckets = buckets
        self._streams = streams
        self._fleet_audit = fleet_audit
        self._publish = publish
        self._archive = archive
        self._counted = counted
        self._now = now
        # While one is carried out: the orders that it made anonymous, each with the keys of its events, and those of
        # the customer in the archive.
        self._ours: dict[str, Collection[str]] = {}
        self._archived: set[str] | None = None

    def begin(self, customer_id: str, who: Who) -> Job:
        """Ask for an erasure; returns its job, the one of before if it is not done.

        Raises:
          NotErasable: When an order of the customer is under way, or the archive is elsewhere.
        """
        self._check(Job("", customer_id, self._now(), "", ""))
        return self._jobs.begin(customer_id, who)

    def _check(self, job: Job) -> None:
        """Raise NotErasable when an order of the customer is under way, or the archive is elsewhere."""
        if self._archive is None and find_mark(self._stock_bucket) is not None:
            raise NotErasable("There is an archive: set ARCHIVE_DIR to its directory, where this runs.")
        if under_way := sorted(islice(self._under_way(job), _NAMED)):
            raise NotErasable(
                f"Orders are under way: {', '.join(under_way)}. Wait until they are over and settled, or cancel them; "
                "then ask again."
            )

    def run(self, certificate: str) -> Job:
        """Carry an erasure out, from wherever it is; returns it with its certificate.

        Raises:
          NotErasable: When there is none, an order of the customer is under way, or what is about the customer keeps
            coming.
          ArchiveBroken: When the archive cannot be used, or another process changes it for more than a minute.
        """
        job = self._jobs.find(certificate)
        if job is None:
            raise NotErasable(f"There is no erasure {certificate}.")
        if job.is_done:
            return job
        try:
            self._carry_out(job)
        except NotErasable as problem:
            self._jobs.waits(job, str(problem))
            raise
        return job

    def _carry_out(self, job: Job) -> None:
        if not job.is_begun:
            self._check(job)
        self._wait_for_readers()
        self._ours = {
            one.order_id: one.places.keys() for one in self._erased.all() if one.certificate == job.id
        }
        self._archived = None
        # A run of the archive would write what it read before the erasure into a new file behind it.
        with nullcontext() if self._archive is None else self._archive.alone(_PATIENCE_SECONDS):
            self._take_all(job)
        customer_id = job.customer_id
        self._indexer.forget_customer(
            customer_id, lambda order_id: self._is_theirs_now(customer_id, order_id)
        )
        self._jobs.finish(job)
        for order_id in self._ours:
            if (claim := self._stock.claims.find(order_id)) is not None and claim.is_archived:
                self._erased.forget(order_id)

    def _take_all(self, job: Job) -> None:
        """Take away what there is of every kind, until there is nothing."""
        stages = self._stages()
        if job.doomed:
            begun = [stage for stage in stages if stage.name == job.stage]
            if not begun:
                raise NotErasable(f"Erasure {job.id} was at {job.stage}, which this program does not have.")
            self._take_away(job, begun[0])
        for _ in range(_ROUNDS):
            if not sum([self._clear(job, stage) for stage in stages]):
                return
        raise NotErasable(f"What is about the customer kept coming: run erasure {job.id} again.")

    def _wait_for_readers(self) -> None:
        """Wait until what was stored before was settled by each consumer and counted for the figures: they have had
        what is removed.
        """
        last, newest = self._stream.range().last, self._stream.newest_event()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while behind := self._behind(last, newest):
            if time.monotonic() > deadline:
                raise NotErasable(f"{behind}: start its workers, or remove it.")
            time.sleep(0.2)

    def _behind(self, last: int, newest: int) -> str:
        """Return what has not read the stream up to a place; empty when nothing is behind."""
        behind = self._stream.settled_to()
        if behind is not None and behind[0] < last:
            return f"The consumer {behind[1]} has not settled event {behind[0] + 1}"
        counted = self._counted()
        return f"The actor index_orders has not counted event {counted + 1}" if counted < newest else ""

    def _is_theirs_now(self, customer_id: str, order_id: str) -> bool:
        order = self._orders.get(order_id)
        return order is not None and order.customer_id == customer_id

    def _clear(self, job: Job, stage: _Stage) -> int:
        """Take away what is there of a kind; returns how many that were."""
        taken = 0
        found = stage.find(job)
        while doomed := list(islice(found, _AT_ONCE)):
            job.stage, job.doomed = stage.name, doomed
            self._jobs.save(job)
            self._take_away(job, stage)
            taken += len(doomed)
        return taken

    def _take_away(self, job: Job, stage: _Stage) -> None:
        for one in job.doomed:
            stage.remove(job, one)
        job.counts[stage.name] = job.counts.get(stage.name, 0) + len(job.doomed)
        job.doomed = []
        self._jobs.save(job)

    # What is where

    def _stages(self) -> list[_Stage]:
        def entries(name: str, key: str, find: Callable[[Job], Iterator[str]]) -> _Stage:
            bucket = self._buckets[key]
            return _Stage(name, find, lambda _, one: bucket.delete(one))

        stages = [
            _Stage("orders", self._orders_over, self._make_anonymous),
            _Stage("events", self._their_events, lambda _, place: self._erase_event(place)),
            entries("idempotency keys", "requests", self._their_requests),
            entries("payment tokens", "tokens", self._their_tokens),
            entries("API keys", "access", self._their_keys),
            _Stage("webhooks", self._their_webhooks, self._remove_webhook),
            entries("deliveries of webhooks", "deliveries", self._their_deliveries),
        ]
        for name, stream in self._streams.items():
            stages.append(
                _Stage(
                    name,
                    lambda job, stream=stream: self._messages(job, stream),  # type: ignore[misc]
                    lambda _, place, stream=stream: stream.erase(int(place)),  # type: ignore[misc]
                )
            )
        if self._archive is not None:
            stages.append(_Stage("files of the archive", self._their_segments, self._rewrite))
        stages.append(
            _Stage("records of the dashboard", self._dashboard_records, lambda _, place: self._blacken(place))
        )
        return stages

    def _under_way(self, job: Job) -> Iterator[str]:
        return (order_id for order_id in self._their_orders(job) if not self._is_over(order_id))

    def _is_over(self, order_id: str) -> bool:
        order = self._orders.get(order_id)
        settled = self._stock.notes.find_unsettled(order_id) is None
        return order is not None and order.is_final and settled

    def _orders_over(self, job: Job) -> Iterator[str]:
        """Yield their orders.

        Raises:
          NotErasable: When one is under way: it was claimed before the erasure was asked for, and published since.
        """
        for order_id in self._their_orders(job):
            if not self._is_over(order_id):
                raise NotErasable(
                    f"Order {order_id} is under way. Wait until it is over and settled, or cancel it; then run erasure "
                    f"{job.id} again."
                )
            yield order_id

    def _their_orders(self, job: Job) -> Iterator[str]:
        """Yield the ids of their orders in ledger and read model, as far as they are older than the erasure."""
        needle = json.dumps(job.customer_id)[1:-1].encode()
        found: dict[str, None] = {}
        for entry in self._stock_bucket.items("claim."):
            if needle in entry.value and Claim.decode(entry.value).customer_id == job.customer_id:
                found[entry.key.partition(".")[2]] = None
        for entry in self._stock_bucket.items("order."):
            if needle in entry.value and Record.decode(entry.value).customer_id == job.customer_id:
                found[entry.key.partition(".")[2]] = None
        for entry in self._orders_bucket.items():
            if needle in entry.value:
                stored = shown_in(entry)
                if stored is not None and stored.get("customer_id") == job.customer_id:
                    found[entry.key] = None
        for order_id in found:
            if not self._is_new(job, order_id):
                yield order_id

    def _is_new(self, job: Job, order_id: str) -> bool:
        """Whether an order was placed after the erasure was asked for, by the person who has the name now."""
        claim = self._stock.claims.find(order_id)
        return claim is not None and _is_later(job, claim, lambda: self._orders.get(order_id))

    def _make_anonymous(self, job: Job, order_id: str) -> None:
        shown = self._orders_bucket.get(order_id)
        stored = None if shown is None else shown_in(shown)
        facts = {} if stored is None else stored["events"]
        places = {key: (fact["sequence"], fact["at"]) for key, fact in facts.items()}
        self._ours[order_id] = self._erased.note(ErasedOrder(order_id, job.id, job.at, places)).places.keys()
        for key in entries_of(self._stock_bucket, order_id):
            _change(self._stock_bucket, key, lambda value, key=key: anonymous.entry(key, value))  # type: ignore[misc]
        _change(self._orders_bucket, order_id, lambda value: self._restated(order_id, value))
        self._erased.done(order_id)

    def _restated(self, order_id: str, value: bytes) -> bytes:
        """Return a record of the read model as the ledger says it now, so that a rebuild makes the same."""
        stored: dict[str, Any] = json.loads(anonymous.shown_order(value))
        said = restated(stored, Testimony(self._stock, order_id, self._now))
        return json.dumps(stored if said is None else said, separators=(",", ":")).encode()

    def _their_events(self, job: Job) -> Iterator[str]:
        """Yield the places of events that are about the customer: all that were noted, and all of before the erasure.

        What happens to an order when it is anonymous is noted nowhere else, and says nothing of the customer.
        """
        ids = self._theirs(job)
        traces = Traces(job.customer_id, ids)
        for stored in self._stream.stored():
            found = read_stored(stored)
            if found is None:
                theirs = _is_before(job, stored) and traces.are_in(stored)
            elif (order_id := order_id_of(found.event)) in self._ours:
                theirs = _is_before(job, stored) or key_of(found.event) in self._ours[order_id]
            else:
                theirs = order_id in ids or (_is_before(job, stored) and _is_of(job, found.event))
            if theirs:
                yield str(stored.sequence)

    def _erase_event(self, place: str) -> None:
        self._stream.erase(int(place))

    def _their_requests(self, job: Job) -> Iterator[str]:
        ids = self._theirs(job)
        for entry in self._buckets["requests"].items():
            if json.loads(entry.value).get("order_id") in ids:
                yield entry.key

    def _their_tokens(self, job: Job) -> Iterator[str]:
        ids = self._theirs(job)
        return (entry.key for entry in self._buckets["tokens"].items() if entry.key in ids)

    def _their_keys(self, job: Job) -> Iterator[str]:
        """Yield the keys of programs that act for the customer alone, with when they were last used."""
        for entry in self._buckets["access"].items("keys."):
            key = json.loads(entry.value)
            if key.get("customer_id") == job.customer_id and key["created_at"] < job.at:
                yield entry.key
                if self._buckets["access"].get(f"used.{key['id']}") is not None:
                    yield f"used.{key['id']}"

    def _their_webhooks(self, job: Job) -> Iterator[str]:
        for entry in self._buckets["webhooks"].items(ENDPOINT):
            webhook = json.loads(entry.value)
            if webhook.get("customer_id") == job.customer_id and webhook["created_at"] < job.at:
                yield entry.key

    def _remove_webhook(self, _: Job, key: str) -> None:
        """Remove a webhook as its owner does: every process that has it in memory learns of it with its next look."""
        bucket, webhook_id = self._buckets["webhooks"], key.removeprefix(ENDPOINT)
        Subscriptions(bucket, (), (), self._now).remove(webhook_id)
        Health(bucket, self._now).recovered(webhook_id)

    def _their_deliveries(self, job: Job) -> Iterator[str]:
        ids = self._theirs(job)
        for entry in self._buckets["deliveries"].items():
            if json.loads(entry.value).get("order_id") in ids:
                yield entry.key

    def _messages(self, job: Job, stream: Stream) -> Iterator[str]:
        """Yield the places of messages that are about the customer, or whenever they came about one of the orders."""
        ids = self._theirs(job)
        before, after = Traces(job.customer_id, ids), Traces("", ids)
        with suppress(TopologyMissing):  # no worker ever ran
            for stored in stream.read():
                if (before if stored.time < job.at else after).are_in(stored):
                    yield str(stored.sequence)

    def _dashboard_records(self, job: Job) -> Iterator[str]:
        """Yield the places of records of the dashboard in which a filter names the customer."""
        traces = Traces(job.customer_id, ())
        with suppress(TopologyMissing):  # nothing was ever changed with it
            for stored in self._fleet_audit.read():
                if traces.are_in(stored):
                    yield str(stored.sequence)

    def _blacken(self, place: str) -> None:
        """Put a record without what it was done to in the place of one; its earlier bytes are overwritten."""
        stored = self._fleet_audit.at(int(place))
        if stored is not None:
            said = {**json.loads(stored.data), "target": "(erased)", "error": ""}
            headers = {name: text for name, text in stored.headers.items() if name.startswith("Fleet-")}
            self._publish(stored.subject, json.dumps(said).encode(), headers)
            self._fleet_audit.erase(int(place))

    # The archive

    def _their_segments(self, job: Job) -> Iterator[str]:
        """Yield the files of the archive in which something is about the customer."""
        if self._archive is None:
            return
        change = self._change_of(job)
        for segment in self._archive.segments():
            self._archive.verify(segment)
            if any(change(line) != line for line in self._archive.lines(segment)):
                yield segment.path.name

    def _rewrite(self, job: Job, name: str) -> None:
        if self._archive is None:
            raise ArchiveBroken("There is an archive: set ARCHIVE_DIR to its directory, where this runs.")
        for segment in self._archive.segments():
            if segment.path.name == name:
                self._archive.rewrite(segment, self._change_of(job))

    def _change_of(self, job: Job) -> Callable[[Line], Line]:
        """Return what makes a line of the archive anonymous if it is about the customer."""
        ids = self._theirs(job)

        def change(line: Line) -> Line:
            if "event" in line:
                stored = stored_in(line)
                found = read_stored(stored)
                if found is None:
                    theirs = _is_before(job, stored) and Traces(job.customer_id, ids).are_in(stored)
                else:
                    named = _is_before(job, stored) and _is_of(job, found.event)
                    theirs = named or order_id_of(found.event) in ids
                if theirs:
                    return event_line(line, anonymous.event(stored.subject, stored.data), {})
            elif "order" in line and line["order"]["order_id"] in ids:
                order = line["order"]
                entries = {
                    key: anonymous.entry(key, value.encode()).decode()
                    for key, value in order["entries"].items()
                }
                shown = order["record"] and anonymous.shown_order(order["record"].encode()).decode()
                return {"order": {**order, "entries": entries, "record": shown}}
            return line

        return change

    def _theirs(self, job: Job) -> set[str]:
        """Return the orders of the customer: those that this erasure made anonymous, and those in the archive."""
        if self._archived is None:
            self._archived = self._archived_ids(job)
        return self._ours.keys() | self._archived

    def _archived_ids(self, job: Job) -> set[str]:
        """Return the orders of the customer that are in the archive."""
        found: set[str] = set()
        for archived in () if self._archive is None else self._archive.orders():
            claim = archived.entries.get(f"claim.{archived.order_id}")
            record = archived.entries.get(f"order.{archived.order_id}")
            of_claim = None if claim is None else Claim.decode(claim.encode())
            if of_claim is not None and _is_later(job, of_claim, lambda: archived.order):  # noqa: B023
                continue
            names = {of_claim.customer_id} if of_claim is not None else set[str]()
            if record is not None:
                names.add(Record.decode(record.encode()).customer_id)
            if job.customer_id in names:
                found.add(archived.order_id)
        return found


def _is_later(job: Job, claim: Claim, find: Callable[[], Order | None]) -> bool:
    """Whether an order was placed after an erasure was asked for.

    The clock of the process that claimed its id may be ahead. The place of its event says what came first.
    """
    if claim.at < job.at:
        return False
    order = find()
    return order is None or not 0 < order.place <= job.last


def _is_before(job: Job, stored: StoredMessage) -> bool:
    """Whether an event was stored before an erasure was asked for."""
    return stored.sequence <= job.last if job.last else stored.time < job.at


def _is_of(job: Job, event: Message) -> bool:
    """Whether an event names the customer."""
    names = isinstance(event, OrderCreated | OrderReserved)
    return names and normalised(event.customer_id, MAX_ID_LENGTH) == job.customer_id  # type: ignore[attr-defined]


def _change(bucket: Bucket, key: str, change: Callable[[bytes], bytes]) -> None:
    """Change a value by compare-and-set, until it is as it shall be."""
    while True:
        entry = bucket.get(key)
        if entry is None or (new := change(entry.value)) == entry.value:
            return
        try:
            bucket.update(key, new, revision=entry.revision)
        except RevisionConflict:
            continue
        return
