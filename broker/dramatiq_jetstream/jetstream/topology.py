"""Every stream and consumer configuration, and how declared topology is compared and created.

Creating is idempotent and never changes what exists: what differs is an error where it would lose or hold
up messages (`TopologyMismatch`), and a warning with the difference where it would not. Bringing the server
in line is a deliberate step, `fleet setup --update`.

A crash between two creations leaves the rest to the next process that declares the same thing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dramatiq_jetstream.errors import ApiError, NotFound, TopologyMismatch
from dramatiq_jetstream.wire.connection import Connection

from .names import METADATA_SUBSCRIBER, Names, bucket_stream

__all__ = [
    "ConsumerConfig",
    "StreamConfig",
    "ack_wait",
    "bucket",
    "dead_letters",
    "ensure_consumer",
    "ensure_stream",
    "events",
    "queue",
    "subscription",
    "worker",
]

logger = logging.getLogger(__name__)

MILLISECOND = 1_000_000  # JetStream's durations are nanoseconds

#: How long JetStream remembers a `Nats-Msg-Id`; longer than any publish is repeated.
DUPLICATE_WINDOW = 120_000

#: How long consumers wait for their stream to be copied to more servers; milliseconds.
SCALING = 60_000

_REPLICAS_EXCEED_STREAM = 10126

#: Requests that may wait at one consumer; the server's default of 512 is a hundred idle processes.
MAX_WAITING = 8_192

# Settings in which a difference loses messages or leaves them waiting for ever.
_VITAL = frozenset(
    {
        "retention",
        "subjects",
        "allow_msg_schedules",
        "allow_msg_ttl",
        "ack_policy",
        "filter_subject",
        "filter_subjects",
        "max_deliver",
    }
)

# The server's error numbers.
_STREAM_EXISTS = 10058
_CONSUMER_EXISTS = frozenset({10013, 10105, 10148})

Json = dict[str, Any]


@dataclass(frozen=True)
class StreamConfig:
    """A stream as it is declared; settings that are not listed are the server's defaults."""

    name: str
    settings: Mapping[str, Any]

    def to_json(self) -> Json:
        return {"name": self.name, **self.settings}


@dataclass(frozen=True)
class ConsumerConfig:
    """A durable pull consumer as it is declared."""

    stream: str
    name: str
    settings: Mapping[str, Any]

    def to_json(self) -> Json:
        return {"name": self.name, "durable_name": self.name, **self.settings}


def queue(names: Names, queue_name: str, *, replicas: int = 1) -> StreamConfig:
    """The stream of a queue: ready messages, delayed messages and periodic schedules."""
    return StreamConfig(
        names.queue_stream(queue_name),
        {
            "subjects": [names.queue_subjects(queue_name)],
            "retention": "workqueue",
            "storage": "file",
            "num_replicas": replicas,
            "duplicate_window": DUPLICATE_WINDOW * MILLISECOND,
            "allow_msg_schedules": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_rollup_hdrs": True,
        },
    )


def dead_letters(names: Names, *, ttl: int, replicas: int = 1) -> StreamConfig:
    """The stream of dead letters of a namespace, each kept for `ttl` milliseconds.

    One message per subject: storing the same letter again after a crash replaces it.
    """
    return StreamConfig(
        names.dead_stream,
        {
            "subjects": [names.all_dead_with_bodies],
            "retention": "limits",
            "storage": "file",
            "num_replicas": replicas,
            "duplicate_window": min(DUPLICATE_WINDOW, ttl) * MILLISECOND,
            "max_age": ttl * MILLISECOND,
            "max_msgs_per_subject": 1,
            "allow_direct": False,
        },
    )


def events(
    name: str,
    subjects: list[str],
    *,
    max_age: int | None = None,
    duplicate_window: int = DUPLICATE_WINDOW,
    replicas: int = 1,
) -> StreamConfig:
    """A stream of events, kept whoever has read them."""
    return StreamConfig(
        name,
        {
            "subjects": subjects,
            "retention": "limits",
            "storage": "file",
            "num_replicas": replicas,
            "max_age": (max_age or 0) * MILLISECOND,
            "duplicate_window": duplicate_window * MILLISECOND,
            "allow_direct": True,
        },
    )


def bucket(
    names: Names,
    name: str,
    *,
    history: int = 1,
    ttl: int | None = None,
    max_value_bytes: int | None = None,
    replicas: int = 1,
) -> StreamConfig:
    """The stream under a key-value bucket (ADR-8), with time to live per key (ADR-43)."""
    bucket_name = names.bucket(name)
    return StreamConfig(
        bucket_stream(bucket_name),
        {
            "subjects": [f"$KV.{bucket_name}.>"],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "num_replicas": replicas,
            "max_msgs_per_subject": history,
            "max_age": (ttl or 0) * MILLISECOND,
            "max_msg_size": -1 if max_value_bytes is None else max_value_bytes,
            "duplicate_window": min(DUPLICATE_WINDOW, ttl or DUPLICATE_WINDOW) * MILLISECOND,
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_direct": True,
            "deny_delete": True,
        },
    )


def announcing_bucket(names: Names, name: str, *, replicas: int = 1) -> StreamConfig:
    """A bucket that announces every key, without its value, after it is stored."""
    config = bucket(names, name, replicas=replicas)
    republish = {
        "src": f"$KV.{names.bucket(name)}.>",
        "dest": f"{names.namespace}.stored.{name}.>",
        "headers_only": True,
    }
    return StreamConfig(config.name, {**config.settings, "republish": republish})


def worker(
    names: Names,
    queue_name: str,
    *,
    priority: int | None = None,
    ack_wait: int,
    max_in_flight: int | None = None,
    replicas: int = 1,
) -> ConsumerConfig:
    """The durable from which all workers of a queue pull; one per priority."""
    return _durable(
        names.queue_stream(queue_name),
        names.worker_durable(priority),
        names.task(queue_name, priority),
        ack_wait=ack_wait,
        max_in_flight=max_in_flight,
        replicas=replicas,
    )


def subscription(
    names: Names,
    stream: str,
    actor_name: str,
    queue_name: str,
    subject: str,
    *,
    ack_wait: int,
    max_in_flight: int | None = None,
    replicas: int = 1,
) -> ConsumerConfig:
    """The durable of one actor on a stream of events; its metadata says for which queue it works."""
    durable = _durable(
        stream,
        names.subscription_durable(actor_name),
        subject,
        ack_wait=ack_wait,
        max_in_flight=max_in_flight,
        replicas=replicas,
    )
    metadata = {METADATA_SUBSCRIBER: names.subscriber(queue_name)}
    return replace(durable, settings={**durable.settings, "metadata": metadata})


def _durable(
    stream: str, name: str, subject: str, *, ack_wait: int, max_in_flight: int | None, replicas: int
) -> ConsumerConfig:
    return ConsumerConfig(
        stream,
        name,
        {
            "ack_policy": "explicit",
            "ack_wait": ack_wait * MILLISECOND,
            "deliver_policy": "all",
            "filter_subject": subject,
            # Never the server's limit: past it a work queue keeps the message for ever, undelivered.
            "max_deliver": -1,
            "max_ack_pending": -1 if max_in_flight is None else max_in_flight,
            "max_waiting": MAX_WAITING,
            "num_replicas": replicas,
            "replay_policy": "instant",
        },
    )


def ack_wait(connection: Connection, stream: str, durable: str) -> int:
    """The `ack_wait` of an existing durable in milliseconds, whatever was declared."""
    config = connection.api(f"CONSUMER.INFO.{stream}.{durable}")["config"]
    return int(config["ack_wait"]) // MILLISECOND


def ensure_stream(connection: Connection, config: StreamConfig, *, update: bool = False) -> str:
    """Create a stream if it is missing; return "created", "unchanged", "updated" or "differs".

    Raises:
      TopologyMismatch: When it exists with settings that would lose or hold up messages.
    """
    wanted = config.to_json()
    try:
        existing = connection.api(f"STREAM.INFO.{config.name}")["config"]
    except NotFound:
        try:
            connection.api(f"STREAM.CREATE.{config.name}", wanted)
            return "created"
        except ApiError as error:
            if error.err_code != _STREAM_EXISTS:  # another process was first, with other settings
                raise
            existing = connection.api(f"STREAM.INFO.{config.name}")["config"]
    differences = _compare(existing, wanted)
    if not differences:
        return "unchanged"
    if update:
        connection.api(f"STREAM.UPDATE.{config.name}", {**existing, **wanted})
        return "updated"
    return _report(f"Stream {config.name}", differences)


def ensure_consumer(connection: Connection, config: ConsumerConfig, *, update: bool = False) -> str:
    """Create a durable if it is missing; results and errors as for `ensure_stream`."""
    wanted = config.to_json()
    try:
        existing = connection.api(f"CONSUMER.INFO.{config.stream}.{config.name}")["config"]
    except NotFound:
        try:
            _put_consumer(connection, config, wanted, "create")
            return "created"
        except ApiError as error:
            if error.err_code not in _CONSUMER_EXISTS:  # another process was first, with other settings
                raise
            existing = connection.api(f"CONSUMER.INFO.{config.stream}.{config.name}")["config"]
    differences = _compare(existing, wanted)
    if not differences:
        return "unchanged"
    if update:
        _put_consumer(connection, config, {**existing, **wanted}, "update")
        return "updated"
    return _report(f"Consumer {config.name} of stream {config.stream}", differences)


def _put_consumer(connection: Connection, config: ConsumerConfig, wanted: Json, action: str) -> None:
    deadline = time.monotonic() + SCALING / 1000
    while True:
        try:
            connection.api(
                f"CONSUMER.CREATE.{config.stream}.{config.name}.{wanted['filter_subject']}",
                {"stream_name": config.stream, "config": wanted, "action": action},
            )
            return
        except ApiError as error:
            # While a stream is copied to more servers, its consumers cannot have as many yet.
            if error.err_code != _REPLICAS_EXCEED_STREAM or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _compare(existing: Json, wanted: Json) -> dict[str, tuple[object, object]]:
    if "metadata" in wanted:
        # The server adds entries of its own.
        known = existing.get("metadata") or {}
        existing = {**existing, "metadata": {name: known.get(name) for name in wanted["metadata"]}}
    return {
        setting: (existing.get(setting), value)
        for setting, value in wanted.items()
        # The server leaves out what is zero, false or empty.
        if existing.get(setting) != value and (existing.get(setting) or value)
    }


def _report(what: str, differences: dict[str, tuple[object, object]]) -> str:
    mismatch = TopologyMismatch(what, differences)
    if not _VITAL.isdisjoint(differences):
        raise mismatch
    logger.warning("%s", mismatch)
    return "differs"
