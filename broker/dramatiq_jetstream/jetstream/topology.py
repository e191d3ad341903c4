"""Every stream and consumer configuration, and how declared topology is created.

Creating is idempotent and never changes what exists: what differs is an error where it loses or holds up messages
(`TopologyMismatch`), and a warning where it does not, given once in a process. `drift` says which is which. Bringing
the server in line is a deliberate step, `fleet setup --update`.

A crash between two creations leaves the rest to the next process that declares the same thing.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dramatiq_jetstream.config import DUPLICATE_WINDOW, Storage
from dramatiq_jetstream.errors import ApiError, NotFound, TopologyMismatch
from dramatiq_jetstream.wire.connection import Connection
from dramatiq_jetstream.wire.error_numbers import (
    CONSUMER_EXISTS,
    MAX_BYTES_REQUIRED,
    REPLICAS_EXCEED_STREAM,
    STREAM_EXISTS,
)

from .drift import MILLISECOND, Difference, Kind, Verdict, differences, in_line
from .inventory import consumers
from .names import METADATA_AFTER, METADATA_SUBSCRIBER, Names, bucket_stream, covers

__all__ = [
    "ConsumerConfig",
    "StreamConfig",
    "advice",
    "all_of",
    "bucket",
    "dead_letters",
    "ensure_consumer",
    "ensure_stream",
    "ensure_subscription",
    "events",
    "queue",
    "recognise_consumer",
    "recognise_stream",
    "subscription",
    "worker",
]

logger = logging.getLogger(__name__)

#: What streams have that nobody said more of.
STORAGE = Storage()

#: How long consumers wait for their stream to be copied to more servers; milliseconds.
SCALING = 60_000

#: Requests that may wait at one consumer; the server's default of 512 is a hundred idle processes.
MAX_WAITING = 8_192


#: How the server says that it remembers no message id for as long.
_WINDOW_LIMIT = re.compile(r"duplicates window can not be larger then server limit of (\w+)")

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
        "duplicate_window": min(storage.duplicate_window, lifetime or storage.duplicate_window) * MILLISECOND,
    }
    return settings if storage.max_bytes is None else {**settings, "max_bytes": storage.max_bytes}


def queue(names: Names, queue_name: str, *, storage: Storage = STORAGE) -> StreamConfig:
    """The stream of a queue: ready messages, delayed messages and periodic schedules."""
    return StreamConfig(
        "queue",
        names.queue_stream(queue_name),
        {
            "subjects": [names.queue_subjects(queue_name)],
            "retention": "workqueue",
            **_stored(storage),
            "allow_msg_schedules": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_rollup_hdrs": True,
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
    storage: Storage = STORAGE,
) -> StreamConfig:
    """A stream of events, kept whoever has read them."""
    return StreamConfig(
        "events",
        name,
        {
            "subjects": subjects,
            "retention": "limits",
            **_stored(storage, lifetime=max_age),
            "max_age": (max_age or 0) * MILLISECOND,
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
            "max_age": (ttl or 0) * MILLISECOND,
            "max_msg_size": -1 if max_value_bytes is None else max_value_bytes,
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "allow_direct": True,
            "deny_delete": True,
        },
    )


#: The bucket in which workers say that they are there; each says so again every few seconds.
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


def recognise_stream(names: Names, existing: Json) -> StreamConfig | None:
    """The declaration that a stream of this namespace was made from, as far as its name tells; None for others."""
    name = existing["name"]
    queue_name = names.queue_of_stream(name)
    if queue_name is not None:
        return queue(names, queue_name)
    if name == names.dead_stream:
        return dead_letters(names, ttl=existing.get("max_age", 0) // MILLISECOND or DUPLICATE_WINDOW)
    bucket_name = names.bucket_of_stream(name)
    if bucket_name is None:
        return None
    return (memory_bucket if bucket_name == WORKERS else bucket)(names, bucket_name)


def recognise_consumer(names: Names, stream: str, existing: Json) -> ConsumerConfig | None:
    """The declaration that a consumer of this namespace was made from; None for another program's."""
    name, wait = existing["name"], existing.get("ack_wait", 0) // MILLISECOND
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


def ensure_stream(connection: Connection, config: StreamConfig, *, update: bool = False) -> str:
    """Create a stream if it is missing; return "created", "unchanged", "updated" or "differs".

    Raises:
      TopologyMismatch: When it exists with settings that lose or hold up messages and that are not to be, or
        cannot be, changed.
    """
    wanted = config.to_json()
    try:
        existing = connection.api(f"STREAM.INFO.{config.name}")["config"]
    except NotFound:
        try:
            return _judge(config, _create_stream(connection, wanted), "created")
        except ApiError as error:
            if error.err_code != STREAM_EXISTS:  # another process was first, with other settings
                raise _with_advice(error) from None
            existing = connection.api(f"STREAM.INFO.{config.name}")["config"]
    found = differences(config.kind, existing, wanted)
    if update and _changeable(found):
        try:
            changed = connection.api(f"STREAM.UPDATE.{config.name}", in_line(existing, wanted, found))
        except ApiError as error:
            raise _with_advice(error) from None
        return _judge(config, changed["config"], "updated")
    return _judge(config, existing, "unchanged")


def _create_stream(connection: Connection, wanted: Json) -> Json:
    """Create a stream; with a shorter duplicate window where the server allows none as long as was declared."""
    try:
        return dict(connection.api(f"STREAM.CREATE.{wanted['name']}", wanted)["config"])
    except ApiError as error:
        limit = _WINDOW_LIMIT.search(error.description)
        if limit is None or _duration(limit[1]) < connection.timeout:
            raise
    shorter = {**wanted, "duplicate_window": _duration(limit[1]) * MILLISECOND}
    return dict(connection.api(f"STREAM.CREATE.{wanted['name']}", shorter)["config"])


def _duration(text: str) -> int:
    """Milliseconds of a duration as the server writes it, as in `1m30s`."""
    units = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)(ms|h|m|s)", text))


def ensure_subscription(
    connection: Connection, config: ConsumerConfig, *, declared: Collection[str], update: bool = False
) -> str:
    """As `ensure_consumer`, for the durable of an actor that subscribes to events.

    A missing one begins with the stream's first event, unless its actor has another name than before: when a durable
    of the same queue has the same subject and is not `declared` here, the new one begins where that one stands.

    Raises:
      TopologyMismatch: Also when `update` would leave events undelivered that wait at a subject of before.
    """
    try:
        existing = connection.api(f"CONSUMER.INFO.{config.stream}.{config.name}")
    except NotFound:
        before = _before(connection, config, declared)
        return ensure_consumer(connection, config if before is None else _behind(config, before))
    if update:
        _check_nothing_waits(config, existing)
    return ensure_consumer(connection, config, update=update)


def _before(connection: Connection, config: ConsumerConfig, declared: Collection[str]) -> Json | None:
    """The durable that a subscription had under an earlier name of its actor, if exactly one can be it."""
    found: dict[str, Json] = {}
    succeeded = set()
    for info in consumers(connection, config.stream):
        metadata = info["config"].get("metadata") or {}
        succeeded.add(metadata.get(METADATA_AFTER))
        if (
            metadata.get(METADATA_SUBSCRIBER) == config.settings["metadata"][METADATA_SUBSCRIBER]
            and info["config"].get("filter_subject") == config.settings["filter_subject"]
            and info["name"] not in declared
        ):
            found[info["name"]] = info
    candidates = [info for name, info in found.items() if name not in succeeded]
    return candidates[0] if len(candidates) == 1 else None


def _behind(config: ConsumerConfig, before: Json) -> ConsumerConfig:
    """The same durable, to begin where another one stands."""
    floor = before["ack_floor"]["stream_seq"]
    logger.warning(
        "%s begins behind event %d, where %s stands: that has the same queue and subject, and its actor is not "
        "declared here, so it is taken for the same one under an earlier name.",
        config,
        floor,
        before["name"],
    )
    settings = {
        **config.settings,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": floor + 1,
        "metadata": {**config.settings["metadata"], METADATA_AFTER: before["name"]},
    }
    return replace(config, settings=settings)


def _check_nothing_waits(config: ConsumerConfig, existing: Json) -> None:
    have, want = existing["config"].get("filter_subject", ""), config.settings["filter_subject"]
    waiting = existing["num_pending"]
    if waiting and not covers(want, have):
        raise TopologyMismatch(
            f"{config} has {waiting} events waiting on {have!r}, which would never be delivered once it is set to "
            f"{want!r}. Let the old workers handle them first, or subscribe to {want!r} with an actor of its own.",
            {"filter_subject": (have, want)},
        )


def _with_advice(error: ApiError) -> ApiError:
    """The same error; where a setting of the broker helps, it says which."""
    if error.err_code == MAX_BYTES_REQUIRED:
        advice = "give the broker max_stream_bytes"
    elif "duplicates window" in error.description:
        advice = "give the broker a shorter duplicate_window"
    else:
        return error
    return type(error)(error.code, error.err_code, f"{error.description}; {advice}")


def ensure_consumer(connection: Connection, config: ConsumerConfig, *, update: bool = False) -> str:
    """Create a durable if it is missing; results and errors as for `ensure_stream`."""
    wanted = config.to_json()
    try:
        existing = connection.api(f"CONSUMER.INFO.{config.stream}.{config.name}")["config"]
    except NotFound:
        try:
            return _judge(config, _create_consumer(connection, config, patient=update), "created")
        except ApiError as error:
            if error.err_code not in CONSUMER_EXISTS:  # another process was first, with other settings
                raise
            existing = connection.api(f"CONSUMER.INFO.{config.stream}.{config.name}")["config"]
    found = differences(config.kind, existing, wanted)
    if update and _changeable(found):
        changed = _put_consumer(connection, config, in_line(existing, wanted, found), "update")
        return _judge(config, changed, "updated")
    return _judge(config, existing, "unchanged")


def _create_consumer(connection: Connection, config: ConsumerConfig, *, patient: bool) -> Json:
    """Create a consumer; while its stream is on fewer servers, on as many as that unless `patient`."""
    wanted = config.to_json()
    if not patient:
        try:
            return _put_consumer(connection, config, wanted, "create", patience=0)
        except ApiError as error:
            if error.err_code != REPLICAS_EXCEED_STREAM:
                raise
        wanted["num_replicas"] = 0
    return _put_consumer(connection, config, wanted, "create")


def _put_consumer(
    connection: Connection, config: ConsumerConfig, wanted: Json, action: str, *, patience: int = SCALING
) -> Json:
    deadline = time.monotonic() + patience / 1000
    while True:
        try:
            answer = connection.api(
                f"CONSUMER.CREATE.{config.stream}.{config.name}.{wanted['filter_subject']}",
                {"stream_name": config.stream, "config": wanted, "action": action},
            )
            return dict(answer["config"])
        except ApiError as error:
            # While a stream is copied to more servers, its consumers cannot have as many yet.
            if error.err_code != REPLICAS_EXCEED_STREAM or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _changeable(found: list[Difference]) -> bool:
    return any(difference.is_known and not difference.fixed for difference in found)


def _judge(config: StreamConfig | ConsumerConfig, existing: Json, outcome: str) -> str:
    """Return `outcome`, or "differs" when what the server has still is not what was declared."""
    found = differences(config.kind, existing, config.to_json())
    found = [difference for difference in found if difference.verdict is not Verdict.UNKNOWN_OFF]
    if not found:
        return outcome
    mismatch = TopologyMismatch(
        f"{config} differs from its declaration: {'; '.join(map(str, found))}. {advice(found)}",
        {difference.setting: (difference.have, difference.want) for difference in found},
    )
    if any(difference.verdict is Verdict.REFUSED for difference in found):
        raise mismatch
    _warn_once(str(mismatch))
    return "differs"


def all_of(steps: Iterable[Callable[[], Mapping[str, str]]]) -> dict[str, str]:
    """Carry out every step of a set-up and return all outcomes; of two with the same name the first counts.

    Raises:
      TopologyMismatch: With everything that was refused, when all other steps are done.
    """
    outcome: dict[str, str] = {}
    refused: list[TopologyMismatch] = []
    for step in steps:
        try:
            outcome = {**step(), **outcome}
        except TopologyMismatch as mismatch:
            refused.append(mismatch)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        differences = {name: pair for mismatch in refused for name, pair in mismatch.differences.items()}
        raise TopologyMismatch("\n".join(map(str, refused)), differences)
    return outcome


def advice(found: list[Difference]) -> str:
    """How to end differences."""
    if all(difference.fixed for difference in found):
        return "The server cannot change that: when what it holds is no longer needed, delete it and run `fleet setup`."
    return "Change the declaration, or bring the server in line with `fleet setup --update`."


@functools.lru_cache(maxsize=1_000)
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
