"""The table of implementations: what each suite runs against, and where implementations differ on purpose.

A test that only fits some implementations says so with `@pytest.mark.where(trait=value)`; it is then not made
for the others at all, so that nothing has to be skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import redis.exceptions
from dramatiq.errors import BrokerConnectionError
from dramatiq.rate_limits import RateLimiterBackend
from dramatiq.rate_limits import backends as limits_backends
from dramatiq.results import ResultBackend
from dramatiq.results import backends as results_backends
from dramatiq_abort import EventBackend
from dramatiq_abort import backends as abort_backends

from tests.broker.conformance.rigs import RabbitmqRig, RedisRig, Rig, StubRig


@dataclass(frozen=True)
class Kind:
    """One implementation of one plug-in point."""

    suite: Literal["brokers", "results", "limits", "aborts"]
    name: str
    #: The fixture that gives the address of its server.
    server: Literal["redis_url", "rabbitmq_url", "nats_url"] | None


@dataclass(frozen=True, kw_only=True)
class BrokerKind(Kind):
    """A Dramatiq broker."""

    rig: Callable[..., Rig]
    #: False for another way of using an implementation that is in the table already: only tests about queues
    #: and deliveries are made for it, for the others would take the same paths again.
    whole_suite: bool = True
    #: Messages are in this process alone, or on a server where other processes find them.
    storage: Literal["memory", "server"]
    #: Workers keep delayed messages in memory, or the server hands them out when they are due.
    delays_held_by: Literal["worker", "server"]
    #: What enqueue, consume and join do with a queue that this broker object has not declared.
    enqueue_undeclared: Literal["raises", "declares", "stores"]
    consume_undeclared: Literal["raises", "declares", "allows"]
    join_undeclared: Literal["raises", "returns"]
    #: `get_declared_queues` names only the queues that were declared, no ".DQ" beside them.
    declares_canonical_queues: bool = True
    #: `join` also waits for messages that a worker has taken and not finished.
    join_waits_for_running: bool = True
    #: `flush(queue)` also drops the queue's delayed messages; else its delay queue is flushed by name.
    flush_drops_delayed: bool = True
    #: `flush(queue)` also drops the queue's dead letters. (`flush_all` always does.)
    flush_drops_dead_letters: bool = True
    #: What a worker took and did not begin is ready again as soon as the worker stops.
    requeues_at_shutdown: bool = True
    #: Messages of a consumer that went away without settling them are delivered again.
    redelivers: bool = True
    #: Options of the broker with which that happens soon.
    quick_redelivery: Mapping[str, Any] = field(default_factory=dict)
    #: A body that cannot be decoded becomes a dead letter, and the consumer goes on.
    rejects_undecodable: bool = True
    #: Dead letters disappear after `dead_message_ttl`.
    expires_dead_letters: bool = False
    #: `broker_priority` lets a message overtake all that are not yet fetched.
    priorities: bool = False
    #: A queue that was deleted on the server is made again when it is used.
    remakes_lost_queue: bool = False
    #: `url` may name several servers; the first that answers is used.
    several_urls: bool = False
    #: A settlement of a message that the consumer does not hold is ignored.
    ignores_foreign_settlement: bool = True
    #: A message drops its exception once it is settled, so that tracebacks are not kept alive.
    drops_exceptions: bool = True
    #: What `enqueue` raises when no server can be reached.
    unreachable: type[Exception] = BrokerConnectionError


BROKERS = [
    BrokerKind(
        "brokers",
        "stub",
        None,
        rig=StubRig,
        storage="memory",
        delays_held_by="worker",
        enqueue_undeclared="raises",
        consume_undeclared="raises",
        join_undeclared="raises",
        declares_canonical_queues=False,
        flush_drops_delayed=False,
        flush_drops_dead_letters=False,
        requeues_at_shutdown=False,
        redelivers=False,
        rejects_undecodable=False,
        ignores_foreign_settlement=False,
        drops_exceptions=False,
    ),
    BrokerKind(
        "brokers",
        "redis",
        "redis_url",
        rig=RedisRig,
        storage="server",
        delays_held_by="worker",
        enqueue_undeclared="stores",
        consume_undeclared="allows",
        join_undeclared="returns",
        rejects_undecodable=False,
        expires_dead_letters=True,
        unreachable=redis.exceptions.ConnectionError,
    ),
    BrokerKind(
        "brokers",
        "rabbitmq",
        "rabbitmq_url",
        rig=RabbitmqRig,
        storage="server",
        delays_held_by="worker",
        enqueue_undeclared="declares",
        consume_undeclared="declares",
        join_undeclared="returns",
        join_waits_for_running=False,
        priorities=True,
        remakes_lost_queue=True,
        several_urls=True,
    ),
]


def _jetstream(part: str) -> Any:
    """Import our side only when it is used: the other implementations can be tested without it."""
    from tests.broker.conformance import jetstream

    return getattr(jetstream, part)


def _jetstream_broker(name: str, rig: str, *, whole_suite: bool = True) -> BrokerKind:
    return BrokerKind(
        "brokers",
        name,
        "nats_url",
        rig=lambda *args, **options: _jetstream(rig)(*args, **options),
        whole_suite=whole_suite,
        storage="server",
        delays_held_by="server",
        enqueue_undeclared="declares",
        consume_undeclared="raises",
        join_undeclared="raises",
        quick_redelivery={"ack_wait": 1000},
        expires_dead_letters=True,
        priorities=True,
        remakes_lost_queue=True,
        several_urls=True,
    )


# With priorities a queue has several sources, which takes other paths through the consumer.
BROKERS += [
    _jetstream_broker("jetstream", "JetStreamRig"),
    _jetstream_broker("jetstream-priorities", "PrioritiesRig", whole_suite=False),
]


@dataclass(frozen=True, kw_only=True)
class ResultsKind(Kind):
    """A result backend."""

    make: Callable[..., ResultBackend]
    #: Those who wait look again now and then, or are woken when the result is stored.
    waiting: Literal["looks", "is woken"] = "is woken"
    #: Waiting times and lifetimes are cut down to whole multiples of this many milliseconds.
    timeout_step: int = 1
    ttl_step: int = 1


RESULTS = [
    ResultsKind(
        "results",
        "stub",
        None,
        make=lambda url, namespace, **options: results_backends.StubBackend(namespace=namespace, **options),
        waiting="looks",
        ttl_step=1000,
    ),
    ResultsKind(
        "results",
        "redis",
        "redis_url",
        make=lambda url, namespace, **options: results_backends.RedisBackend(
            url=url, namespace=namespace, **options
        ),
        timeout_step=1000,
    ),
    ResultsKind(
        "results",
        "jetstream",
        "nats_url",
        make=lambda *args, **options: _jetstream("make_results")(*args, **options),
        # Seconds are what the server counts lifetimes in.
        ttl_step=1000,
    ),
]


@dataclass(frozen=True, kw_only=True)
class LimitsKind(Kind):
    """A rate limiter backend."""

    make: Callable[..., RateLimiterBackend]
    #: A `wait` that begins after the `wait_notify` still sees it, for as long as its ttl lasts.
    remembers_notifications: bool = True
    ttl_step: int = 1


LIMITS = [
    LimitsKind(
        "limits",
        "stub",
        None,
        make=lambda url, namespace: limits_backends.StubBackend(),
        remembers_notifications=False,
    ),
    LimitsKind(
        "limits",
        "redis",
        "redis_url",
        make=lambda url, namespace: limits_backends.RedisBackend(url=url),
    ),
    LimitsKind(
        "limits",
        "jetstream",
        "nats_url",
        make=lambda *args, **options: _jetstream("make_limits")(*args, **options),
        ttl_step=1000,
    ),
]


@dataclass(frozen=True, kw_only=True)
class AbortsKind(Kind):
    """An event backend of dramatiq-abort."""

    make: Callable[..., EventBackend]
    #: Signals that were not fetched disappear after their ttl.
    expires: bool = True
    ttl_step: int = 1


ABORTS = [
    AbortsKind(
        "aborts", "stub", None, make=lambda url, namespace: abort_backends.StubBackend(), expires=False
    ),
    AbortsKind(
        "aborts",
        "redis",
        "redis_url",
        make=lambda url, namespace: abort_backends.RedisBackend.from_url(url, namespace=f"{namespace}:"),
    ),
    AbortsKind(
        "aborts",
        "jetstream",
        "nats_url",
        make=lambda *args, **options: _jetstream("make_aborts")(*args, **options),
        ttl_step=1000,
    ),
]
