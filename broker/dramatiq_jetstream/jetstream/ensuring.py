"""Creates what is declared, and compares what exists.

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
from dataclasses import replace
from typing import Any

from dramatiq_jetstream.errors import ApiError, NotFound, TopologyMismatch
from dramatiq_jetstream.wire.connection import Connection
from dramatiq_jetstream.wire.error_numbers import (
    CONSUMER_EXISTS,
    MAX_BYTES_REQUIRED,
    REPLICAS_EXCEED_STREAM,
    STREAM_EXISTS,
)

from .drift import NANOSECONDS_PER_MS, Difference, Verdict, differences, in_line
from .inventory import consumers
from .names import METADATA_ACK_WAIT, METADATA_AFTER, METADATA_SUBSCRIBER, covers
from .topology import ConsumerConfig, StreamConfig

__all__ = ["advice", "all_of", "ensure_consumer", "ensure_stream", "ensure_subscription"]

logger = logging.getLogger(__name__)

#: How long a consumer waits for its stream to be copied to more servers, and the pause between two tries.
SCALING_MS = 60_000
SCALING_PAUSE_SECONDS = 0.5

#: How long a shorter `ack_wait` is announced before it applies: workers look at their consumers every two seconds.
ANNOUNCE_SECONDS = 5.0

#: The server's error when its limit for the duplicate window is shorter.
_WINDOW_LIMIT = re.compile(r"duplicates window can not be larger then server limit of (\w+)")

Json = dict[str, Any]


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
            return _judge(config, _create_stream(connection, config), "created")
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


def first_sequence() -> int:
    """Where the sequences of a queue's new stream begin: microseconds since 1970.

    The server resolves an ack by its sequence alone. A stream that is deleted and made again begins above every
    sequence that it had before, unless it stored more than a million messages a second. So no ack of before removes a
    message of now, however long it was on its way. Streams of events begin at 1: an ack removes nothing from them, and
    people and programs refer to an event by its sequence.
    """
    return time.time_ns() // 1_000


def _create_stream(connection: Connection, config: StreamConfig) -> Json:
    """Create a stream; with a shorter duplicate window where the server allows none as long as was declared."""
    wanted = config.to_json()
    if config.kind == "queue":
        wanted["first_seq"] = first_sequence()
    try:
        return dict(connection.api(f"STREAM.CREATE.{wanted['name']}", wanted)["config"])
    except ApiError as error:
        limit = _WINDOW_LIMIT.search(error.description)
        if limit is None or _duration(limit[1]) < connection.timeout:
            raise
    shorter = {**wanted, "duplicate_window": _duration(limit[1]) * NANOSECONDS_PER_MS}
    return dict(connection.api(f"STREAM.CREATE.{wanted['name']}", shorter)["config"])


def _duration(text: str) -> int:
    """Milliseconds of a duration as the server writes it, as in `1m30s`."""
    units = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)(ms|h|m|s)", text))


def ensure_subscription(
    connection: Connection, config: ConsumerConfig, *, declared: Collection[str], update: bool = False
) -> str:
    """As `ensure_consumer`, for the durable of an actor that subscribes to events.

    A missing durable starts at the stream's first event, unless its actor was renamed: if a durable of the same queue
    has the same subject and is not `declared` here, the new one starts at its position.

    Raises:
      TopologyMismatch: Also when `update` would leave events undelivered that wait on the earlier subject.
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
    """The durable of a subscription under its actor's earlier name, if there is exactly one candidate."""
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
    """The same durable, starting at the position of another one."""
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
        changes = in_line(existing, wanted, found)
        if changes["ack_wait"] < existing["ack_wait"]:
            _announce_ack_wait(connection, config, existing, changes["ack_wait"])
        changed = _put_consumer(connection, config, changes, "update")
        return _judge(config, changed, "updated")
    return _judge(config, existing, "unchanged")


def _announce_ack_wait(connection: Connection, config: ConsumerConfig, existing: Json, ack_wait: int) -> None:
    """Have workers signal in time for a shorter `ack_wait` before it applies, or their messages would run twice."""
    if not connection.api(f"CONSUMER.INFO.{config.stream}.{config.name}")["num_ack_pending"]:
        return
    metadata = {**(existing.get("metadata") or {}), METADATA_ACK_WAIT: str(ack_wait // NANOSECONDS_PER_MS)}
    _put_consumer(connection, config, {**existing, "metadata": metadata}, "update")
    time.sleep(ANNOUNCE_SECONDS)


def _create_consumer(connection: Connection, config: ConsumerConfig, *, patient: bool) -> Json:
    """Create a consumer; while its stream has fewer replicas than declared, with as many as that, unless `patient`."""
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
    connection: Connection, config: ConsumerConfig, wanted: Json, action: str, *, patience: int = SCALING_MS
) -> Json:
    deadline = time.monotonic() + patience / 1000
    while True:
        try:
            reply = connection.api(
                f"CONSUMER.CREATE.{config.stream}.{config.name}.{wanted['filter_subject']}",
                {"stream_name": config.stream, "config": wanted, "action": action},
            )
            return dict(reply["config"])
        except ApiError as error:
            # While a stream is copied to more servers, its consumers cannot have as many yet.
            if error.err_code != REPLICAS_EXCEED_STREAM or time.monotonic() > deadline:
                raise
            time.sleep(SCALING_PAUSE_SECONDS)


def _changeable(found: list[Difference]) -> bool:
    return any(difference.is_known and not difference.fixed for difference in found)


def _judge(config: StreamConfig | ConsumerConfig, existing: Json, outcome: str) -> str:
    """Return `outcome`, or "differs" when the server still has something other than what was declared."""
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
    """Carry out every step of a setup and return all outcomes; the first counts when two have the same name.

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
