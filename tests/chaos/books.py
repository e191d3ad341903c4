"""Reads what there is: the client's log, stream, archive, buckets, dead letters, queues, charges, webhooks.

With plain nats-py and HTTP, and without the code that is under test: only the names on the wire, the protobuf
contract and the catalogue are shared with it. Events are those of the tape, because they leave the stream meanwhile; of
an order that left for the archive, what the archive has of it counts.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nats.js.client import JetStreamContext

from orders.v1.events_pb2 import (
    RETURNED_STOCK_BACK,
    OrderCancelled,
    OrderCancelRequested,
    OrderChargedBack,
    OrderConfirmed,
    OrderCreated,
    OrderDeclined,
    OrderFailed,
    OrderPaid,
    OrderRefunded,
    OrderRefundRequested,
    OrderRejected,
    OrderReserved,
    OrderReturned,
    OrderReturnRequested,
    OrderShipped,
)
from tasks.catalogue import CATALOGUE
from tests.chaos import files
from tests.chaos.reading import Stored, read_gateway, read_stream, run

EVENTS = {
    "created": OrderCreated,
    "reserved": OrderReserved,
    "rejected": OrderRejected,
    "paid": OrderPaid,
    "declined": OrderDeclined,
    "confirmed": OrderConfirmed,
    "cancel_requested": OrderCancelRequested,
    "cancelled": OrderCancelled,
    "refund_requested": OrderRefundRequested,
    "refunded": OrderRefunded,
    "shipped": OrderShipped,
    "return_requested": OrderReturnRequested,
    "returned": OrderReturned,
    "charged_back": OrderChargedBack,
    "failed": OrderFailed,
}
#: An order that has one of these is finished; a confirmed one may be cancelled or shipped, a shipped one returned.
FINAL = frozenset({"confirmed", "rejected", "cancelled"})
#: What everything that a stranger made up has in it.
FORGED = b"forged"
LEVEL = "$KV.dramatiq-stock.level."
ORDER = "$KV.dramatiq-stock.order."
PRODUCT = "$KV.dramatiq-stock.product."
QUEUES = ("orders", "payments", "projection", "webhooks")


@dataclass(frozen=True)
class Event:
    """One event in the stream.

    Attributes:
      quantities: Of a created or reserved one.
      total: In minor units; of one about a refund or a chargeback what goes back.
      about: The name of the refund or the chargeback; of a returned one, whether its goods are `back` in stock.
    """

    sequence: int
    name: str
    order_id: str
    at: float
    customer_id: str = ""
    quantities: Mapping[str, int] = field(default_factory=dict)
    total: int = 0
    error: str = ""
    about: str = ""


@dataclass(frozen=True)
class Placed:
    """What the ledger says that an order is: its customer, what it took at which price (minor units), and its total."""

    customer_id: str
    lines: tuple[tuple[str, int, int], ...]
    total: int


@dataclass(frozen=True)
class Whereabouts:
    """Where events and orders are in the end.

    Attributes:
      published: The bytes of each event as the tape has them, by its place.
      stream, archive: The bytes of each event that is there.
      damage: What is wrong with the archive's files.
      orders: How many orders are in the archive.
      left_at: When each order left for it, in seconds.
      otherwise: What came back from the archive, or was made again from it, other than it was.
    """

    published: Mapping[int, bytes] = field(default_factory=dict)
    stream: Mapping[int, bytes] = field(default_factory=dict)
    archive: Mapping[int, bytes] = field(default_factory=dict)
    damage: tuple[str, ...] = ()
    orders: int = 0
    left_at: Mapping[str, float] = field(default_factory=dict)
    otherwise: tuple[str, ...] = ()


@dataclass(frozen=True)
class Webhooks:
    """What was asked for, what came, and what the service says of it.

    Attributes:
      hooks: One mapping each: path, id, secret, events, customer_id, at (seconds).
      received: The requests, as the receiver wrote them down.
      log: The deliveries in their bucket.
    """

    hooks: Sequence[Mapping[str, Any]] = ()
    received: Sequence[Mapping[str, Any]] = ()
    log: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Books:
    """Everything that the checker looks at.

    Attributes:
      log: The client's log.
      stock_before, stock_after: Pieces of every sku.
      model: The read model: the names of the events of each order.
      charges: The gateway's, one mapping each: order_id, status, amount, key.
      dead: The dead letters: actor and reason.
      queues: What waits, by queue, and by consumer of the stream of events.
      ledger: The states through which each order went.
      refunds, chargebacks: The gateway's, one mapping each: id, order_id, amount, key.
      decided: What the ledger says that goes back of each order: by refund, and by chargeback, in minor units.
      acts: What was asked of orders and stock, and what was answered.
      adjustments: The adjustments of the stock: sku, id, pieces.
      believed: Orders of whose records in the read model something comes from a stranger.
      visits: What probes and prying visitors were answered.
      patient: Whether orders wait for a gateway that is away for longer than a trial lasts.
      placed: What each order is, by the ledger.
      prices: The prices of each product: the time (milliseconds) from which each holds, and None for not sold.
      figures: What the figures say of all orders together, and `shown` what the read model does.
      erased: The people who were erased: customer_id, orders, certificate.
      jobs: The erasures, as they are stored.
      traces: Where something of people who were erased was found.
    """

    log: list[dict[str, Any]]
    events: list[Event]
    stock_before: dict[str, int]
    stock_after: dict[str, int]
    model: dict[str, frozenset[str]]
    charges: list[dict[str, Any]]
    dead: list[dict[str, str]]
    queues: dict[str, int]
    ledger: dict[str, frozenset[str]] = field(default_factory=dict)
    believed: frozenset[str] = frozenset()
    visits: list[dict[str, Any]] = field(default_factory=list)
    patient: bool = False
    refunds: list[dict[str, Any]] = field(default_factory=list)
    chargebacks: list[dict[str, Any]] = field(default_factory=list)
    decided: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    acts: list[dict[str, Any]] = field(default_factory=list)
    adjustments: list[tuple[str, str, int]] = field(default_factory=list)
    placed: dict[str, Placed] = field(default_factory=dict)
    prices: dict[str, list[tuple[int, int | None]]] = field(default_factory=dict)
    whereabouts: Whereabouts = field(default_factory=Whereabouts)
    webhooks: Webhooks = field(default_factory=Webhooks)
    figures: dict[str, int] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)
    erased: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sources:
    """Where everything is read from.

    Attributes:
      directory: The harness's own logs.
      patient: Whether orders wait for a gateway that is away.
    """

    nats_url: str
    gateway_url: str
    directory: Path
    archive: Path
    stock_before: dict[str, int]
    patient: bool

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a log, none when it was not begun."""
        path = self.directory / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_books(sources: Sources, tape: Sequence[Stored]) -> Books:
    """Read everything; the events are those of the tape."""

    async def read(js: JetStreamContext) -> Books:
        # First: when nothing waits, nothing of what is read afterwards changes any more.
        queues = await _waiting(js)
        stream = await read_stream(js, "ORDERS")
        held = Held.of(
            await read_stream(js, "KV_dramatiq-orders"), await read_stream(js, "KV_dramatiq-stock")
        )
        index = await read_stream(js, "KV_dramatiq-orders-index")
        jobs = await read_stream(js, "KV_dramatiq-erasures")
        archived = files.read(sources.archive)
        # What is in the bucket is newer: an order that is in both came back.
        records = {**_records(archived), **held.records}
        # An order of a stranger is one all the same, and none of the client's.
        shown = {order_id: one for order_id, one in records.items() if not order_id.startswith("forged")}
        ledger = {**_ledger(archived), **held.ledger}
        return Books(
            log=sources.log("client"),
            events=[event for stored in tape for event in parse(stored)],
            stock_before=sources.stock_before,
            stock_after=_pieces(held.stock),
            model={
                order_id: frozenset(name.partition(".")[0] for name in json.loads(data)["events"])
                for order_id, data in shown.items()
            },
            charges=read_gateway(sources.gateway_url, "charges"),
            refunds=read_gateway(sources.gateway_url, "refunds"),
            chargebacks=read_gateway(sources.gateway_url, "chargebacks"),
            decided={order_id: _decided(record) for order_id, record in ledger.items()},
            acts=sources.log("acts"),
            adjustments=_adjustments(held.stock),
            dead=[
                {
                    "actor": stored.headers.get("Dramatiq-Dead-Actor", ""),
                    "reason": stored.headers.get("Dramatiq-Dead-Reason", ""),
                    "error": stored.headers.get("Dramatiq-Dead-Error", "")[:200],
                }
                for stored in await read_stream(js, "dramatiq_dead")
                if not is_forged(stored.data)
            ],
            queues=queues,
            ledger={order_id: frozenset(record["at"]) for order_id, record in ledger.items()},
            visits=sources.log("visits"),
            patient=sources.patient,
            believed=frozenset(order_id for order_id, data in shown.items() if FORGED in data),
            placed={order_id: _placed(record) for order_id, record in ledger.items()},
            prices={
                stored.subject.removeprefix(PRODUCT): [
                    tuple(one) for one in json.loads(stored.data)["prices"]
                ]
                for stored in held.stock
                if stored.subject.startswith(PRODUCT)
            },
            whereabouts=Whereabouts(
                {stored.sequence: stored.data for stored in tape if parse(stored)},
                {stored.sequence: stored.data for stored in stream},
                archived.events,
                tuple(archived.damage),
                len(archived.orders),
                archived.left_at,
            ),
            webhooks=Webhooks(
                sources.log("hooks"),
                sources.log("received"),
                [
                    json.loads(stored.data)
                    for stored in await read_stream(js, "KV_dramatiq-deliveries")
                    if stored.data
                ],
            ),
            figures=_counted(index),
            shown=_summed(records.values()),
            erased=sources.log("erased"),
            jobs=[json.loads(stored.data) for stored in jobs if ".job." in stored.subject and stored.data],
        )

    found: Books = run(sources.nats_url, read)
    return found


@dataclass(frozen=True)
class Held:
    """What the service holds of orders in its buckets: records of the read model as bytes, and the ledger."""

    records: dict[str, bytes]
    ledger: dict[str, dict[str, Any]]
    stock: list[Stored]

    @classmethod
    def of(cls, orders: list[Stored], stock: list[Stored]) -> Held:
        """Return what is in the messages of the two buckets."""
        return cls(
            {one.subject.removeprefix("$KV.dramatiq-orders."): one.data for one in orders if one.data},
            {
                one.subject.removeprefix(ORDER): json.loads(one.data)
                for one in stock
                if one.subject.startswith(ORDER) and one.data
            },
            stock,
        )


def read_held(nats_url: str) -> Held:
    """Read what the service holds of orders."""

    async def read(js: JetStreamContext) -> Held:
        return Held.of(
            await read_stream(js, "KV_dramatiq-orders"), await read_stream(js, "KV_dramatiq-stock")
        )

    found: Held = run(nats_url, read)
    return found


def read_stock(nats_url: str) -> dict[str, int]:
    """Read the pieces of every sku."""
    found: dict[str, int] = run(nats_url, _stock)
    return found


def parse(stored: Stored) -> list[Event]:
    """Return the event of a message, nothing for what is none, or what a stranger made up."""
    name = stored.subject.removeprefix("ORDER.")
    if name not in EVENTS or FORGED in stored.data:
        return []
    event: Any = EVENTS[name]()
    event.ParseFromString(stored.data)
    if name == "shipped" and not event.HasField("shipped_at"):
        return []  # another service says so; what the service itself says of it counts
    quantities: dict[str, int] = {}
    for item in getattr(event, "items", ()):
        quantities[item.sku] = quantities.get(item.sku, 0) + item.quantity
    return [
        Event(
            stored.sequence,
            name,
            event.order_id,
            stored.at,
            getattr(event, "customer_id", ""),
            quantities,
            getattr(event, "total_minor", 0) or getattr(event, "amount_minor", 0),
            getattr(event, "error", ""),
            _about(event),
        )
    ]


def is_forged(data: bytes) -> bool:
    """Whether a dead letter is of what a stranger made up; a retry carries its event in base64."""
    return FORGED in data or any(
        FORGED in base64.b64decode(found) for found in re.findall(rb'"data": ?"([A-Za-z0-9+/=]+)"', data)
    )


def _about(event: Any) -> str:
    if isinstance(event, OrderReturned):
        return "back" if event.stock == RETURNED_STOCK_BACK else "written off"
    return str(getattr(event, "refund", "") or getattr(event, "chargeback_id", ""))


def _records(archived: files.Files) -> dict[str, bytes]:
    return {order_id: one["record"].encode() for order_id, one in archived.orders.items() if one["record"]}


def _ledger(archived: files.Files) -> dict[str, dict[str, Any]]:
    return {
        order_id: json.loads(one["entries"][f"order.{order_id}"])
        for order_id, one in archived.orders.items()
        if f"order.{order_id}" in one["entries"]
    }


def _placed(record: dict[str, Any]) -> Placed:
    lines = tuple((sku, quantity, price) for sku, quantity, price in record.get("lines", ()))
    return Placed(record.get("customer_id", ""), lines, record.get("total", 0))


def _counted(index: list[Stored]) -> dict[str, int]:
    """Return the sums of the figures that are in use."""
    stored = {one.subject.rpartition("$KV.dramatiq-orders-index.")[2]: one.data for one in index if one.data}
    sums: Counter[str] = Counter()
    if "figures.position" in stored:
        generation = json.loads(stored["figures.position"])["generation"]
        for key, data in stored.items():
            if key.startswith(f"figures.{generation}.day."):
                for hour in json.loads(data)["hours"].values():
                    sums.update({name: number for name, number in hour.items() if name != "times"})
    return dict(sums)


def _summed(records: Iterable[bytes]) -> dict[str, int]:
    """Return what the figures should say of these records."""
    sums: Counter[str] = Counter()
    for data in records:
        record = json.loads(data)
        names = Counter(key.partition(".")[0] for key in record["events"])
        for name in ("confirmed", "rejected", "cancelled"):
            sums[name] += names[name]
        sums["placed"] += names["created"]
        sums["failed"] += min(1, names["failed"])
        sums["revenue"] += record.get("total", 0) if names["confirmed"] else 0
        for key, fact in record["events"].items():
            if key.partition(".")[0] in ("refunded", "charged_back"):
                sums["refunded"] += int(fact.get("amount_minor", 0))
    return {name: number for name, number in sums.items() if number}


def _decided(record: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return what goes back of an order: of a refund what is not cut."""
    refunds = {one[0]: one[1] - (one[6] if len(one) > 6 else 0) for one in record.get("refunds", ())}
    return {
        "refunds": {key: amount for key, amount in refunds.items() if amount},
        "chargebacks": {one[0]: one[1] for one in record.get("chargebacks", ())},
    }


async def _stock(js: JetStreamContext) -> dict[str, int]:
    return _pieces(await read_stream(js, "KV_dramatiq-stock"))


def _pieces(stock: list[Stored]) -> dict[str, int]:
    pieces = {entry.sku: entry.initial_stock for entry in CATALOGUE.values()}
    for stored in stock:
        if stored.subject.startswith(LEVEL) and stored.data:
            pieces[stored.subject.removeprefix(LEVEL)] = json.loads(stored.data)["pieces"]
    return pieces


def _adjustments(stock: list[Stored]) -> list[tuple[str, str, int]]:
    """Return what people changed, of each product the newest that it remembers."""
    return [
        (stored.subject.removeprefix(LEVEL), one[0], one[1])
        for stored in stock
        if stored.subject.startswith(LEVEL) and stored.data
        for one in json.loads(stored.data).get("adjustments", ())
    ]


async def _waiting(js: JetStreamContext) -> dict[str, int]:
    waiting: dict[str, int] = {}
    for queue in QUEUES:
        state = (await js.stream_info(f"dramatiq_q_{queue}", subjects_filter=">")).state
        # A periodic task's schedule stands there for good.
        waiting[f"queue {queue}"] = sum(
            count for subject, count in (state.subjects or {}).items() if ".cron." not in subject
        )
    for consumer in await js.consumers_info("ORDERS"):
        if consumer.config.durable_name:
            unsettled = (consumer.num_pending or 0) + (consumer.num_ack_pending or 0)
            waiting[f"events for {consumer.name}"] = unsettled
    return waiting
