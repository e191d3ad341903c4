"""Reads what there is: the client's log, the stream, the buckets, the dead letters, the queues, the charges.

With plain nats-py and HTTP, and without the code that is under test: only the names on the wire, the protobuf
contract and the catalogue are shared with it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
import requests
from nats.errors import TimeoutError as NatsTimeout
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError, ServiceUnavailableError

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
QUEUES = ("orders", "payments", "projection", "webhooks")

# One look may take this long altogether, in seconds.
_PATIENCE_SECONDS = 30.0


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


@dataclass(frozen=True)
class Stored:
    sequence: int
    subject: str
    data: bytes
    headers: Mapping[str, str]
    at: float


def read_books(
    nats_url: str,
    gateway_url: str,
    log: Path,
    visits: Path,
    stock_before: dict[str, int],
    *,
    patient: bool,
    acts: Path,
) -> Books:
    """Read everything."""

    async def read(js: JetStreamContext) -> Books:
        # First: when nothing waits, nothing of what is read afterwards changes any more.
        queues = await _waiting(js)
        events = [event for stored in await _stream(js, "ORDERS") for event in _event(stored)]
        records = {
            stored.subject.removeprefix("$KV.dramatiq-orders."): stored.data
            for stored in await _stream(js, "KV_dramatiq-orders")
        }
        # An order of a stranger is one all the same, and none of the client's.
        records = {order_id: data for order_id, data in records.items() if not order_id.startswith("forged")}
        stock = await _stream(js, "KV_dramatiq-stock")
        orders = {
            stored.subject.removeprefix(ORDER): json.loads(stored.data)
            for stored in stock
            if stored.subject.startswith(ORDER) and stored.data
        }
        ledger = {order_id: frozenset(record["at"]) for order_id, record in orders.items()}
        return Books(
            log=read_log(log),
            events=events,
            stock_before=stock_before,
            stock_after=_pieces(stock),
            model={
                order_id: frozenset(name.partition(".")[0] for name in json.loads(data)["events"])
                for order_id, data in records.items()
            },
            charges=read_gateway(gateway_url, "charges"),
            refunds=read_gateway(gateway_url, "refunds"),
            chargebacks=read_gateway(gateway_url, "chargebacks"),
            decided={order_id: _decided(record) for order_id, record in orders.items()},
            acts=read_log(acts),
            adjustments=_adjustments(stock),
            dead=[
                {
                    "actor": stored.headers.get("Dramatiq-Dead-Actor", ""),
                    "reason": stored.headers.get("Dramatiq-Dead-Reason", ""),
                    "error": stored.headers.get("Dramatiq-Dead-Error", "")[:200],
                }
                for stored in await _stream(js, "dramatiq_dead")
                if not is_forged(stored.data)
            ],
            queues=queues,
            ledger=ledger,
            visits=read_log(visits),
            patient=patient,
            believed=frozenset(order_id for order_id, data in records.items() if FORGED in data),
        )

    return _run(nats_url, read)


def read_events(nats_url: str, start: int = 1) -> list[Event]:
    """Read the events from a sequence on."""

    async def read(js: JetStreamContext) -> list[Event]:
        return [event for stored in await _stream(js, "ORDERS", start) for event in _event(stored)]

    return _run(nats_url, read)


def read_stock(nats_url: str) -> dict[str, int]:
    """Read the pieces of every sku."""
    return _run(nats_url, _stock)


def read_waiting(nats_url: str) -> dict[str, int]:
    """Read what waits in the queues and at the consumers of events."""
    return _run(nats_url, _waiting)


def count_dead(nats_url: str) -> int:
    """Count the dead letters."""

    async def read(js: JetStreamContext) -> int:
        return len(await _stream(js, "dramatiq_dead"))

    return _run(nats_url, read)


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_gateway(gateway_url: str, what: str) -> list[dict[str, Any]]:
    """Read all charges, refunds or chargebacks from the gateway, page by page."""
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        answer = requests.get(f"{gateway_url}/{what}", params={"after": after, "limit": 5_000}, timeout=20)
        page = answer.json()
        found += page[what]
        after = page["next"]
    return found


def _run(url: str, read: Any) -> Any:
    async def run() -> Any:
        async def ignore(_error: Exception) -> None:
            pass

        client = await nats.connect(url.split(","), connect_timeout=5, allow_reconnect=False, error_cb=ignore)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while True:
                    try:
                        return await read(client.jetstream(timeout=10))
                    except ServiceUnavailableError:
                        # In a cluster a consumer may have been made on a node that the node which is asked
                        # has not heard yet. Nothing is taken by reading, so it is read again from the start.
                        await asyncio.sleep(0.1)
        finally:
            await client.close()

    return asyncio.run(run())


async def _stream(js: JetStreamContext, name: str, start: int = 1) -> list[Stored]:
    """Read a stream that reading takes nothing from."""
    try:
        state = (await js.stream_info(name)).state
    except NotFoundError:
        return []
    last = state.last_seq
    if state.messages == 0 or last < start:
        return []
    subscription = await js.pull_subscribe(
        ">",
        stream=name,
        config=ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=max(start, state.first_seq, 1),
            ack_policy=AckPolicy.NONE,
            num_replicas=1,
            mem_storage=True,
            inactive_threshold=10.0,
        ),
    )
    consumer = (await subscription.consumer_info()).name
    found: list[Stored] = []
    try:
        pending = True
        while pending:
            try:
                batch = await subscription.fetch(500, timeout=5)
            except NatsTimeout:
                raise TimeoutError(f"{name} could be read up to {len(found)} messages only") from None
            for message in batch:
                meta = message.metadata
                found.append(
                    Stored(
                        meta.sequence.stream,
                        message.subject,
                        message.data,
                        message.headers or {},
                        meta.timestamp.timestamp(),
                    )
                )
                pending = meta.num_pending > 0 and meta.sequence.stream < last
    finally:
        await subscription.unsubscribe()
        # One for each look would soon be hundreds, and a cluster is busy with them after a leader's death.
        with contextlib.suppress(NotFoundError):
            await js.delete_consumer(name, consumer)
    return found


def _event(stored: Stored) -> list[Event]:
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


def _decided(record: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return what goes back of an order: of a refund what is not cut."""
    refunds = {one[0]: one[1] - (one[6] if len(one) > 6 else 0) for one in record.get("refunds", ())}
    return {
        "refunds": {key: amount for key, amount in refunds.items() if amount},
        "chargebacks": {one[0]: one[1] for one in record.get("chargebacks", ())},
    }


async def _stock(js: JetStreamContext) -> dict[str, int]:
    return _pieces(await _stream(js, "KV_dramatiq-stock"))


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
