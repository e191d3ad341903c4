"""Puts the order service together: the broker with its middleware, the buckets, and the steps on them.

Importing this makes the broker and sets it as Dramatiq's, and contacts nothing.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import dramatiq
from dramatiq.middleware import Middleware
from google.protobuf.message import Message

from dramatiq_jetstream import JetStreamBroker
from dramatiq_jetstream.audit import Change, changes
from dramatiq_jetstream.events import DeadLetterEvents, Events
from dramatiq_jetstream.kv import Bucket
from dramatiq_jetstream.periodic import Periodic
from dramatiq_jetstream.streams import Stream
from orders.v1.events_pb2 import OrderCreated

from . import (
    audit,
    credentials,
    erased,
    events,
    idempotency,
    logs,
    metrics,
    orders,
    outage,
    products,
    stock,
    telemetry,
    tokens,
)
from .archive import Archive, ArchiveBroken
from .assortment import Assortment
from .audit import AuditLog
from .catalogue import CATALOGUE
from .claims import Claim
from .credentials import Keys, Operators
from .deadline import Deadline
from .described import described
from .erased import ErasedOrders
from .erasure import Erasure
from .erasure_jobs import Jobs
from .figures import Counting, Figures
from .gateway import HttpGateway
from .index import BUCKET as INDEX_BUCKET
from .index import Index, Indexer
from .levels import PREFIX
from .orders import Orders, Recorded
from .outage import GuardedGateway, OneLine, Outage
from .products import Catalogue
from .projection import Projection
from .retention import Chronicle, Retention
from .saga import STEPS, Saga
from .settings import InvalidSetting, settings, worker_settings
from .standstill import Standstill
from .stock import Stock
from .stream import EventStream
from .stuck import Operator
from .tokens import Tokens
from .unfinished import UnfinishedOrders
from .waiting import Waiting
from .webhooks import deliveries, subscriptions

SETTINGS = settings()

T = TypeVar("T")


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """Have all threads share what the first of them makes; what could not be made is tried again."""
    lock = threading.RLock()
    made: list[T] = []

    @wraps(make)
    def shared() -> T:
        if not made:
            with lock:
                if not made:
                    made.append(make())
        return made[0]

    return shared


class Buckets(Middleware):
    """Has `fleet setup` prepare the buckets, and the stock in them."""

    def setup_topology(self, broker: JetStreamBroker, *, update: bool = False) -> dict[str, str]:
        """Create what is missing; called by `broker.setup`."""
        outcome = {
            f"bucket {bucket.name}": bucket.declare(update=update)
            for bucket in (
                stock_bucket(),
                orders_bucket(),
                index_bucket(),
                erasures_bucket(),
                requests_bucket(),
                access_bucket(),
                gateway_bucket(),
                tokens_bucket(),
                webhooks_bucket(),
                deliveries_bucket(),
                broker.bucket("limits"),  # of the actors that have one
            )
        }
        levels = stock_store().available()
        known = catalogue().products()
        return {**outcome, "stock": f"{len(levels)} products", "catalogue": f"{len(known)} products"}


class Boot(Middleware):
    """Sets up logs and telemetry in a worker process; the front end does so for itself."""

    def after_process_boot(self, broker: JetStreamBroker) -> None:  # type: ignore[override]
        logs.configure(SETTINGS)
        worker_settings()
        logging.getLogger("dramatiq.worker.WorkerThread").addFilter(OneLine())
        try:
            telemetry.configure("order-service-worker", broker)
        except InvalidSetting as error:
            # Dramatiq would log it and go on.
            raise SystemExit(str(error)) from None


class AuditStream(Events):
    """The stream of the audit; Dramatiq takes two middleware of one type for a mistake."""


event_stream = Events(events.STREAM, [events.SUBJECTS])
broker = JetStreamBroker(
    SETTINGS.nats_url,
    credentials=SETTINGS.nats_creds,
    replicas=SETTINGS.replicas,
    declare=SETTINGS.declare,
    ack_wait=SETTINGS.ack_wait,
    enqueue_timeout=SETTINGS.accept_timeout,
)
dead_letter_events = DeadLetterEvents(broker)
audit_stream = AuditStream(
    audit.STREAM, [audit.SUBJECTS], max_age=audit.KEPT_DAYS * 86_400_000, append_only=True
)
for middleware in (event_stream, dead_letter_events, audit_stream, Periodic(), Buckets(), Boot()):
    broker.add_middleware(middleware)
broker.add_middleware(logs.LogContext(), before=type(broker.middleware[0]))
broker.describe_arguments = described
dramatiq.set_broker(broker)


#: What has been delivered to this process, and not begun.
orders_waiting: Waiting[OrderCreated] = Waiting()
events_waiting: Waiting[events.Happened] = Waiting()


def publish(
    event: Message,
    at: int,
    *,
    timeout: int | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Store an event that happened at `at` (milliseconds), once however often it is repeated; return its place.

    The answer "this id is stored already" counts only if this very event is stored, because any program may publish
    under any id. If something else is stored under the id, the event is stored under an id that no other program can
    have taken.
    """
    event_stream.ensure(broker)
    event_id = events.event_id(event)
    subject, body = events.subject_of(event), event.SerializeToString(deterministic=True)
    store = partial(
        broker.publish,
        *(subject, body),
        headers={**events.headers(event, event_id, at, logs.bound("request_id")), **headers},
        timeout=timeout,
    )
    ack = store(event_id=event_id)
    if ack.duplicate:
        stored = events_stored().stored_at(ack.seq)
        if stored is None or (stored.subject, stored.data) != (subject, body):
            ack = store(event_id=f"{event_id}.{secrets.token_hex(16)}")
    return ack.seq


def publish_again(event: Message) -> None:
    """Store an event once more, whatever is stored already, so that the step which follows it runs again."""
    event_stream.ensure(broker)
    event_id = events.event_id(event)
    broker.publish(
        events.subject_of(event),
        event,
        event_id=f"{event_id}.{secrets.token_hex(16)}",
        headers=events.headers(event, event_id, now(), logs.bound("request_id")),
    )


def now() -> int:
    """Return the time in milliseconds."""
    return time.time_ns() // 1_000_000


def stock_bucket() -> Bucket:
    return broker.bucket(stock.BUCKET)


def orders_bucket() -> Bucket:
    return broker.bucket(orders.BUCKET)


def index_bucket() -> Bucket:
    return broker.bucket(INDEX_BUCKET)


def erasures_bucket() -> Bucket:
    return broker.bucket(erased.BUCKET)


def requests_bucket() -> Bucket:
    return broker.bucket(idempotency.BUCKET, ttl=SETTINGS.idempotency_ttl)


def gateway_bucket() -> Bucket:
    return broker.bucket(outage.BUCKET)


def access_bucket() -> Bucket:
    return broker.bucket(credentials.BUCKET)


@_once
def gateway_outage() -> Outage:
    """Return the note that the payment gateway is away."""
    # Longer than the longest pause after which a payment is tried again, and renewed by each try.
    return Outage(gateway_bucket(), ttl=SETTINGS.retry_max_backoff + 60_000, now=now)


def tokens_bucket() -> Bucket:
    return broker.bucket(tokens.BUCKET)


def webhooks_bucket() -> Bucket:
    return broker.bucket(subscriptions.BUCKET)


def deliveries_bucket() -> Bucket:
    return broker.bucket(deliveries.BUCKET)


@_once
def token_store() -> Tokens:
    """Return the payment tokens."""
    ttl = SETTINGS.payment_patience + (SETTINGS.offered_for or 0) + tokens.KEPT_MS
    return Tokens(tokens_bucket(), SETTINGS.token_keys, ttl=ttl)


@_once
def keys() -> Keys:
    """Return the API keys."""
    return Keys(access_bucket(), now)


@_once
def operators() -> Operators:
    """Return the people who sign in with a password."""
    return Operators(access_bucket(), now)


@_once
def audit_log() -> AuditLog:
    """Return the record of who did what."""

    def store(subject: str, record: bytes, record_id: str) -> None:
        audit_stream.ensure(broker)
        broker.publish(subject, record, event_id=record_id)

    def fleet(count: int) -> list[Change]:
        return changes(broker, limit=count)

    def stream() -> Stream:
        audit_stream.ensure(broker)
        return broker.stream(audit.STREAM)

    return AuditLog(store, stream, fleet, now)


@_once
def stock_store() -> Stock:
    """Return the stock, which all threads share so that their decisions can be made together."""
    initial = {entry.sku: entry.initial_stock for entry in CATALOGUE.values()}
    return Stock(stock_bucket(), initial, now)


@_once
def catalogue() -> Catalogue:
    """Return the products, which all threads share, kept up to date by a watch."""
    loaded = Catalogue(stock_bucket()).load()
    stock_bucket().watch(products.PREFIX, loaded.heard)
    return loaded


@_once
def assortment() -> Assortment:
    """Return what changes products and their stock."""
    return Assortment(stock_bucket(), stock_store(), catalogue(), audit_log().record, now)


@_once
def orders_store() -> Orders:
    """Return the read model."""
    return Orders(
        orders_bucket(), finished=lambda status, seconds: metrics.finished.labels(status).observe(seconds)
    )


@_once
def index() -> Index:
    """Return what finds the orders of a customer, a status or a product."""
    return Index(index_bucket(), orders_bucket(), orders_store().read)


@_once
def indexer() -> Indexer:
    """Return what keeps the index."""
    return Indexer(index_bucket(), orders_bucket(), orders_store().read)


@_once
def counting() -> Counting:
    """Return what counts orders for the figures."""
    return Counting(index_bucket(), events_stored(), orders_store(), projection().project, now)


@_once
def figures() -> Figures:
    """Return the figures."""
    return Figures(index_bucket(), now)


@_once
def events_stored() -> EventStream:
    """Return the reader of the events."""
    return EventStream(
        broker.stream(events.STREAM), lambda: event_stream.ensure(broker), erased_orders().facts
    )


@_once
def erased_orders() -> ErasedOrders:
    """Return the orders whose customers were erased."""
    return ErasedOrders(erasures_bucket(), stock_store(), now)


def archive() -> Archive | None:
    """Return the archive, None where none is set up.

    Raises:
      ArchiveBroken: When its directory is missing.
    """
    if SETTINGS.archive_dir is None:
        return None
    directory = Path(SETTINGS.archive_dir)
    if not directory.is_dir():
        raise ArchiveBroken(f"ARCHIVE_DIR is {directory}, which is no directory here: make it, or mount it.")
    return Archive(directory)


def chronicle() -> Chronicle:
    """Return the events of the archive and of the stream, as one."""
    return Chronicle(archive(), events_stored())


def retention() -> Retention:
    """Return what moves orders into the archive and back.

    Raises:
      ArchiveBroken: When there is no archive.
    """
    found = archive()
    if found is None:
        raise ArchiveBroken("There is no archive here: set ARCHIVE_DIR to its directory.")
    return Retention(
        found,
        events_stored(),
        stock_bucket(),
        orders_store(),
        orders_bucket(),
        erased_orders(),
        indexer().forget,
        counting().reached,
        keep=SETTINGS.retention_days * 86_400_000,
        now=now,
    )


def erasure() -> Erasure:
    """Return what makes customers unreadable.

    Raises:
      ArchiveBroken: When the directory of the archive is missing.
    """
    queues = sorted(broker.get_declared_queues())
    return Erasure(
        erasure_jobs(),
        events_stored(),
        stock_store(),
        stock_bucket(),
        orders_store(),
        orders_bucket(),
        erased_orders(),
        indexer(),
        {
            "requests": requests_bucket(),
            "tokens": tokens_bucket(),
            "access": access_bucket(),
            "webhooks": webhooks_bucket(),
            "deliveries": deliveries_bucket(),
        },
        {
            "dead letters": broker.stream(broker.names.dead_stream),
            "history": broker.stream(broker.names.history_stream),
            **{f"queue {name}": broker.stream(broker.names.queue_stream(name)) for name in queues},
        },
        broker.stream(broker.names.audit_stream),
        lambda subject, record, headers: broker.publish(subject, record, headers=headers),
        archive(),
        counting().reached,
        now,
    )


@_once
def erasure_jobs() -> Jobs:
    """Return the erasures that were asked for."""
    bucket = erasures_bucket()
    if SETTINGS.declare:
        bucket.declare()  # what reads its stream does not make it
    newest = broker.stream(bucket.stream).newest
    return Jobs(bucket, bucket.name, newest, lambda: events_stored().range().last, now)


@_once
def projection() -> Projection:
    """Return the way into the read model."""
    return Projection(stock_store(), orders_store(), catalogue(), now, events_waiting)


def project_at(sequence: int, claim: Claim | None = None) -> Recorded | None:
    """Add the event at a place of the stream to the read model; see `Projection.project`."""
    happened = events_stored().happened_at(sequence)
    return None if happened is None else projection().project(happened, claim)


@_once
def saga() -> Saga:
    """Return the steps."""
    gateway = GuardedGateway(
        HttpGateway(SETTINGS.payment_url, timeout=SETTINGS.payment_timeout), gateway_outage()
    )
    stock_bucket().watch(PREFIX, stock_store().heard)
    return Saga(
        *(stock_store(), gateway, token_store(), publish, orders_store(), catalogue(), now),
        offered_for=SETTINGS.offered_for,
        waiting=orders_waiting,
    )


@_once
def operator() -> Operator:
    """Return what an operator does with orders."""
    return Operator(
        stock_store(),
        stock_bucket(),
        orders_store(),
        orders_bucket(),
        events_stored(),
        saga(),
        broker.dead_letters,
        publish_again,
        STEPS,
    )


@_once
def unfinished_orders() -> UnfinishedOrders:
    """Return the index of the orders that are not final."""
    return UnfinishedOrders(orders_bucket(), stock_bucket(), orders_store().read)


@_once
def standstill() -> Standstill:
    """Return what looks after orders that do not move."""
    return Standstill(
        unfinished_orders(),
        stock_bucket(),
        broker.queue_stats,
        gateway_outage().since,
        operator().redrive,
        after=SETTINGS.stuck_after,
        now=now,
    )


@_once
def deadline() -> Deadline:
    """Return what ends orders that are not final in time."""
    return Deadline(
        unfinished_orders(),
        saga().request_cancel,
        saga().expire_offer,
        after=SETTINGS.order_deadline,
        now=now,
    )
