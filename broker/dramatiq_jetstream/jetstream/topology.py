"""Every stream and consumer configuration. `ensuring` creates them, `drift` compares them with what exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dramatiq_jetstream.config import DUPLICATE_WINDOW_MS, Storage

from .drift import NANOSECONDS_PER_MS, Kind
from .names import METADATA_SUBSCRIBER, Names, bucket_stream

__all__ = [
    "ConsumerConfig",
    "StreamConfig",
    "activity",
    "audit",
    "bucket",
    "dead_letters",
    "events",
    "history",
    "queue",
    "recognise_consumer",
    "recognise_stream",
    "subscription",
    "worker",
]

#: The defaults of every stream.
STORAGE = Storage()

#: How many requests may wait at one consumer; the server's default of 512 is used up by a hundred idle processes.
MAX_WAITING = 8_192


Json = dict[str, Any]


@dataclass(frozen=True)
class StreamConfig:
    """A stream as it is declared; settings that are not listed are the server's defaults."""

    kind: Kind
    name: str
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return f"Stream {self.name}"

    def to_json(self) -> Json:
        return {"name": self.name, **self.settings}


@dataclass(frozen=True)
class ConsumerConfig:
    """A durable pull consumer as it is declared."""

    kind: Kind
    stream: str
    name: str
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return f"Consumer {self.name} of stream {self.stream}"

    def to_json(self) -> Json:
        return {"name": self.name, "durable_name": self.name, **self.settings}


def _stored(storage: Storage, *, lifetime: int | None = None) -> Json:
    settings: Json = {
        "storage": "file",
        "num_replicas": storage.replicas,
        "duplicate_window": min(storage.duplicate_window, lifetime or storage.duplicate_window)
        * NANOSECONDS_PER_MS,
    }
    return settings if storage.max_bytes is None else {**settings, "max_bytes": storage.max_bytes}


def queue(names: Names, queue_name: str, *, storage: Storage = STORAGE) -> StreamConfig:
    """The stream of a queue: ready messages, delayed messages and periodic schedules."""
    return StreamConfig(
        "queue",
        names.queue_stream(queue_name),
        {
            "subjects": [names.queue_subjects(queue_name)],
            "retention": "limits",
            **_stored(storage),
            "allow_msg_schedules": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_rollup_hdrs": True,
            "allow_direct": True,
        },
    )


def dead_letters(names: Names, *, ttl: int, storage: Storage = STORAGE) -> StreamConfig:
    """The stream of dead letters of a namespace, each kept for `ttl` milliseconds.

    One message per subject: storing the same letter again after a crash replaces it.
    """
    return StreamConfig(
        "dead letters",
        names.dead_stream,
        {
            "subjects": [names.all_dead_with_bodies],
            "retention": "limits",
            **_stored(storage, lifetime=ttl),
            "max_age": ttl * NANOSECONDS_PER_MS,
            "max_msgs_per_subject": 1,
            "allow_direct": True,
        },
    )


#: How long counts of what a fleet did are kept.
ACTIVITY_MINUTES = 65

#: The memory that the counts take at most where an account demands a limit: an hour of a hundred queues has half of it.
MAX_ACTIVITY_BYTES = 64 * 1024 * 1024


def activity(names: Names, *, storage: Storage = STORAGE) -> StreamConfig:
    """The counters of what a fleet did, added up by the server (ADR-49), in memory."""
    if storage.max_bytes is not None:  # the server would set that much memory aside
        storage = replace(storage, max_bytes=min(storage.max_bytes, MAX_ACTIVITY_BYTES))
    return StreamConfig(
        "activity",
        names.activity_stream,
        {
            "subjects": [names.activity_of()],
            "retention": "limits",
            **_stored(storage),
            "storage": "memory",
            "max_age": ACTIVITY_MINUTES * 60_000 * NANOSECONDS_PER_MS,
            "max_msgs_per_subject": 1,
            "allow_msg_counter": True,
            "allow_direct": True,
        },
    )


#: How long audit records are kept.
AUDIT_DAYS = 365


def audit(names: Names, *, kept_days: int = AUDIT_DAYS, storage: Storage = STORAGE) -> StreamConfig:
    """The stream of audit records: how a change ended takes the place of that it began."""
    return StreamConfig(
        "audit",
        names.audit_stream,
        {
            "subjects": [names.all_audits],
            "retention": "limits",
            **_stored(storage),
            "max_age": kept_days * 86_400_000 * NANOSECONDS_PER_MS,
            "max_msgs_per_subject": 1,
            "allow_direct": True,
        },
    )


#: The largest record of the history, in bytes, and how many records of one message are kept.
MAX_RECORD_BYTES = 10_000
MAX_RECORDS_OF_MESSAGE = 100


def history(names: Names, *, ttl: int, room: int, storage: Storage = STORAGE) -> StreamConfig:
    """The stream of the history of a namespace; each record is kept for `ttl` milliseconds, in `room` bytes at most.

    The room is a number of records, because a limit in bytes would reserve that much of the server's disk.
    """
    return StreamConfig(
        "history",
        names.history_stream,
        {
            "subjects": [names.all_history],
            "retention": "limits",
            **_stored(storage, lifetime=ttl),
            "max_age": ttl * NANOSECONDS_PER_MS,
            "max_msgs": room // MAX_RECORD_BYTES,
            "max_msgs_per_subject": MAX_RECORDS_OF_MESSAGE,
            "allow_atomic": True,
            "allow_direct": True,
        },
    )


def events(
    name: str,
    subjects: list[str],
    *,
    max_age: int | None = None,
    append_only: bool = False,
    storage: Storage = STORAGE,
) -> StreamConfig:
    """A stream of events, which keeps them after they were read; of an append-only one the server removes none."""
    return StreamConfig(
        "events",
        name,
        {
            "subjects": subjects,
            "retention": "limits",
            **_stored(storage, lifetime=max_age),
            "max_age": (max_age or 0) * NANOSECONDS_PER_MS,
            "allow_direct": True,
            **({"deny_delete": True, "deny_purge": True} if append_only else {}),
        },
    )


def bucket(
    names: Names,
    name: str,
    *,
    history: int = 1,
    ttl: int | None = None,
    max_value_bytes: int | None = None,
    storage: Storage = STORAGE,
) -> StreamConfig:
    """The stream under a key-value bucket (ADR-8), with time to live per key (ADR-43)."""
    bucket_name = names.bucket(name)
    return StreamConfig(
        "bucket",
        bucket_stream(bucket_name),
        {
            "subjects": [f"$KV.{bucket_name}.>"],
            "retention": "limits",
            **_stored(storage, lifetime=ttl),
            "discard": "new",
            "max_msgs_per_subject": history,
            "max_age": (ttl or 0) * NANOSECONDS_PER_MS,
            "max_msg_size": -1 if max_value_bytes is None else max_value_bytes,
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_direct": True,
            "deny_delete": True,
        },
    )


#: The bucket of worker presence; each worker renews its record every few seconds.
WORKERS = "workers"


def memory_bucket(names: Names, name: str, *, storage: Storage = STORAGE) -> StreamConfig:
    """A bucket that is lost when its servers stop."""
    config = bucket(names, name, storage=storage)
    return replace(config, settings={**config.settings, "storage": "memory"})


def announcing_bucket(names: Names, name: str, *, storage: Storage = STORAGE) -> StreamConfig:
    """A bucket that announces every key, without its value, after it is stored."""
    config = bucket(names, name, storage=storage)
    republish = {
        "src": f"$KV.{names.bucket(name)}.>",
        "dest": f"{names.namespace}.stored.{name}.>",
        "headers_only": True,
    }
    return replace(config, settings={**config.settings, "republish": republish})


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
        "worker",
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
        "subscription",
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
    kind: Kind,
    stream: str,
    name: str,
    subject: str,
    *,
    ack_wait: int,
    max_in_flight: int | None,
    replicas: int,
) -> ConsumerConfig:
    return ConsumerConfig(
        kind,
        stream,
        name,
        {
            "ack_policy": "explicit",
            "ack_wait": ack_wait * NANOSECONDS_PER_MS,
            "deliver_policy": "all",
            "filter_subject": subject,
            # Never the server's limit: past it the stream keeps the message and never delivers it again.
            "max_deliver": -1,
            "max_ack_pending": -1 if max_in_flight is None else max_in_flight,
            "max_waiting": MAX_WAITING,
            "num_replicas": replicas,
            "replay_policy": "instant",
        },
    )


def recognise_stream(names: Names, existing: Json) -> StreamConfig | None:
    """The declaration of a stream of this namespace, as far as its name tells; None for other streams."""
    name = existing["name"]
    queue_name = names.queue_of_stream(name)
    if queue_name is not None:
        return queue(names, queue_name)
    if name == names.dead_stream:
        return dead_letters(
            names, ttl=existing.get("max_age", 0) // NANOSECONDS_PER_MS or DUPLICATE_WINDOW_MS
        )
    if name == names.history_stream:
        ttl = existing.get("max_age", 0) // NANOSECONDS_PER_MS or DUPLICATE_WINDOW_MS
        return history(names, ttl=ttl, room=existing.get("max_msgs", 0) * MAX_RECORD_BYTES)
    if name == names.activity_stream:
        return activity(names)
    if name == names.audit_stream:
        return audit(names, kept_days=existing.get("max_age", 0) // NANOSECONDS_PER_MS // 86_400_000)
    bucket_name = names.bucket_of_stream(name)
    if bucket_name is None:
        return None
    return (memory_bucket if bucket_name == WORKERS else bucket)(names, bucket_name)


def recognise_consumer(names: Names, stream: str, existing: Json) -> ConsumerConfig | None:
    """The declaration of a consumer of this namespace; None for another program's."""
    name, wait = existing["name"], existing.get("ack_wait", 0) // NANOSECONDS_PER_MS
    queue_name = names.queue_of_stream(stream)
    if queue_name is not None:
        base, _, priority = name.partition("-")
        if base != "worker" or not (priority.isdecimal() or name == base):
            return None
        return worker(names, queue_name, priority=int(priority) if priority else None, ack_wait=wait)
    subscriber = names.subscriber("")
    if not (existing.get("metadata") or {}).get(METADATA_SUBSCRIBER, "").startswith(subscriber):
        return None
    subject = existing.get("filter_subject", "")
    return _durable("subscription", stream, name, subject, ack_wait=wait, max_in_flight=None, replicas=1)
