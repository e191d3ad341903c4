"""What a stream or consumer on the server does differently from its declaration, and how bad that is.

The comparison covers every setting the server reports, declared or not. Each known setting has a row in one of the two
tables: what a foreign value does, and whether it loses or holds up messages (refused) or not (a warning). A setting
without a row comes from a server newer than this library. It causes a warning; while it is off, only `fleet doctor`
mentions it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from .names import METADATA_AFTER, covers

__all__ = ["NANOSECONDS_PER_MS", "Difference", "Kind", "Verdict", "differences", "in_line"]

NANOSECONDS_PER_MS = 1_000_000  # JetStream's durations are nanoseconds

Json = Mapping[str, Any]

#: What a stream or a consumer is for.
Kind = Literal[
    "queue", "dead letters", "history", "activity", "audit", "events", "bucket", "worker", "subscription"
]


class Verdict(Enum):
    """What follows from a difference."""

    REFUSED = "refused"  # it loses messages or holds them up for ever
    WARNED = "warned"
    UNKNOWN = "unknown"  # a setting of a newer server, and switched on
    UNKNOWN_OFF = "unknown, off"


REFUSED, WARNED = Verdict.REFUSED, Verdict.WARNED


@dataclass(frozen=True)
class Setting:
    """One setting of the server.

    Attributes:
      verdict: None where any value is as good as another.
      does: What a foreign value does.
      off: Values that do nothing, beside what is zero, false or empty.
      limit: A higher value is looser; `verdict` applies only where no limit was declared.
      duration: The server counts it in nanoseconds.
      needed: Only its absence does harm.
      fixed: The server never changes it on what exists.
      of: Verdicts that differ by the purpose of the stream or consumer.
    """

    verdict: Verdict | None = None
    does: str = ""
    off: object = None
    limit: bool = False
    duration: bool = False
    needed: bool = False
    fixed: bool = False
    of: Mapping[str, Verdict] | None = None

    def verdict_for(self, kind: Kind) -> Verdict | None:
        return (self.of or {}).get(kind, self.verdict)


# A stream of events may be another program's: how long it keeps them is for that program to say.
_NOT_OURS: Mapping[str, Verdict] = {"events": WARNED}

_LOSES = "the server throws away stored messages to keep to it"

STREAM: Mapping[str, Setting] = {
    "name": Setting(),
    "description": Setting(),
    "metadata": Setting(),
    "placement": Setting(),
    "compression": Setting(),
    "first_seq": Setting(),
    "mirror_direct": Setting(),
    "allow_batched": Setting(),
    "subjects": Setting(REFUSED, "messages on a subject that is missing are not stored"),
    "retention": Setting(REFUSED, "it decides when the server removes a message", fixed=True),
    "max_consumers": Setting(WARNED, "the server refuses further consumers", off=-1, limit=True),
    "max_msgs": Setting(REFUSED, _LOSES, off=-1, limit=True, of=_NOT_OURS),
    "max_bytes": Setting(REFUSED, _LOSES, off=-1, limit=True, of=_NOT_OURS),
    "max_age": Setting(REFUSED, "older messages are thrown away", limit=True, duration=True, of=_NOT_OURS),
    "max_msgs_per_subject": Setting(REFUSED, _LOSES, off=-1, limit=True, of=_NOT_OURS),
    "max_msg_size": Setting(WARNED, "larger messages are refused", off=-1, limit=True),
    "discard": Setting(WARNED, "it decides what happens at a limit", off="old"),
    "discard_new_per_subject": Setting(REFUSED, "a second message on a subject is refused"),
    "storage": Setting(
        REFUSED, "a restart of the server loses everything in memory", fixed=True, of=_NOT_OURS
    ),
    "persist_mode": Setting(
        REFUSED, "a crash loses acknowledged messages", fixed=True, off="default", of=_NOT_OURS
    ),
    "num_replicas": Setting(WARNED, "it decides how many servers may be lost"),
    "no_ack": Setting(REFUSED, "no publish is ever acknowledged"),
    "duplicate_window": Setting(
        WARNED, "a publish repeated later than that is stored twice", limit=True, duration=True
    ),
    "mirror": Setting(REFUSED, "nothing can be published to it", fixed=True),
    "sources": Setting(REFUSED, "messages of other streams come in", of=_NOT_OURS),
    "subject_transform": Setting(REFUSED, "messages are stored under other subjects"),
    "republish": Setting(WARNED, "what is stored is announced elsewhere, or waiting threads are not woken"),
    "allow_direct": Setting(WARNED, "listings fail without it", needed=True, of={"bucket": REFUSED}),
    "sealed": Setting(REFUSED, "nothing can be stored or removed", fixed=True),
    "deny_delete": Setting(WARNED, "single messages cannot be dropped", fixed=True),
    "deny_purge": Setting(WARNED, "nothing can be purged or cancelled", fixed=True, of={"bucket": REFUSED}),
    "allow_rollup_hdrs": Setting(
        WARNED, "keys cannot be deleted without it", needed=True, of={"bucket": REFUSED}
    ),
    "allow_msg_ttl": Setting(
        WARNED, "without it nothing expires by itself", needed=True, of={"bucket": REFUSED, "queue": REFUSED}
    ),
    "subject_delete_marker_ttl": Setting(
        WARNED, "the server stores a mark for what expires, which arrives as a message", duration=True
    ),
    "allow_msg_counter": Setting(REFUSED, "only counters can be stored", fixed=True),
    "allow_atomic": Setting(WARNED, "atomic batches are refused without it", needed=True),
    "allow_msg_schedules": Setting(
        WARNED, "nothing can be delayed without it", needed=True, of={"queue": REFUSED}
    ),
    "consumer_limits": Setting(REFUSED, "they bind every consumer that the stream gets", of=_NOT_OURS),
}

_ANOTHER_KIND = "workers cannot pull from it"
_REQUESTS = "requests beyond it are refused"

CONSUMER: Mapping[str, Setting] = {
    "name": Setting(),
    "durable_name": Setting(),
    "description": Setting(),
    "metadata": Setting(WARNED, "its events are counted on another queue"),
    "sample_freq": Setting(),
    "pause_until": Setting(),  # by `fleet pause`
    "opt_start_seq": Setting(),  # follow `deliver_policy`
    "opt_start_time": Setting(),
    "deliver_policy": Setting(
        WARNED, "what was stored before it was made may not have been delivered", fixed=True
    ),
    "ack_policy": Setting(REFUSED, "an ack settles other messages, or none", fixed=True),
    "ack_wait": Setting(
        WARNED, "it decides when a silent worker's messages are delivered again", duration=True
    ),
    "backoff": Setting(
        REFUSED, "running messages are delivered again before their worker's next sign of life"
    ),
    "max_deliver": Setting(REFUSED, "a message delivered so often stays, undelivered", off=-1, limit=True),
    "filter_subject": Setting(REFUSED, "it delivers other messages"),
    "filter_subjects": Setting(REFUSED, "it delivers other messages"),
    "replay_policy": Setting(REFUSED, "messages come no quicker than they were stored", fixed=True),
    "rate_limit_bps": Setting(REFUSED, "messages come no quicker"),
    "max_waiting": Setting(WARNED, _REQUESTS, fixed=True, limit=True),
    "max_ack_pending": Setting(WARNED, "the whole fleet holds no more messages at once", off=-1, limit=True),
    "flow_control": Setting(REFUSED, _ANOTHER_KIND),
    "headers_only": Setting(REFUSED, "messages come without their bodies"),
    "max_batch": Setting(WARNED, _REQUESTS, limit=True),
    "max_expires": Setting(WARNED, _REQUESTS, limit=True, duration=True),
    "max_bytes": Setting(WARNED, _REQUESTS, limit=True),
    "deliver_subject": Setting(REFUSED, _ANOTHER_KIND),
    "deliver_group": Setting(WARNED, "it has no meaning here"),
    "idle_heartbeat": Setting(REFUSED, _ANOTHER_KIND),
    "inactive_threshold": Setting(
        REFUSED, "the server deletes it when no worker asks for that long", duration=True
    ),
    "num_replicas": Setting(WARNED, "it decides how many servers may be lost"),
    "mem_storage": Setting(
        REFUSED, "a restart of the server forgets what was delivered and acked", fixed=True
    ),
    "direct": Setting(REFUSED, _ANOTHER_KIND, fixed=True),
    "sourcing": Setting(REFUSED, _ANOTHER_KIND, fixed=True),
    "priority_groups": Setting(REFUSED, "requests without a group are refused"),
    "priority_policy": Setting(REFUSED, "requests without a group are refused", off="none"),
    "priority_timeout": Setting(WARNED, "it belongs to a priority policy", duration=True),
}

_CONSUMERS = ("worker", "subscription")

_UNKNOWN = "a setting of the server that this version of the library does not know"

# At these limits `discard` decides what happens.
_LIMITS_OF_ALL = ("max_msgs", "max_bytes")
_LIMITS = (*_LIMITS_OF_ALL, "max_msgs_per_subject")


@dataclass(frozen=True)
class Difference:
    """One setting that is not as it was declared; durations are in milliseconds.

    Attributes:
      does: What the value on the server does.
      needed: Only its absence does harm.
      fixed: The server never changes this setting on what exists.
    """

    setting: str
    have: object
    want: object
    verdict: Verdict
    does: str
    fixed: bool = False
    unit: str = ""

    @property
    def is_known(self) -> bool:
        return self.verdict in (REFUSED, WARNED)

    def __str__(self) -> str:
        have = "off" if self.have in (None, False) else f"{self.have!r}{self.unit}"
        want = "nothing" if self.want is None else f"{self.want!r}{self.unit}"
        return f"{self.setting} is {have} but {want} was declared ({self.does})"


#: What a program chooses; only the program can say what is right.
_CHOSEN: Mapping[Kind, frozenset[str]] = {
    "queue": frozenset({"num_replicas", "duplicate_window", "max_bytes"}),
    "dead letters": frozenset({"num_replicas", "duplicate_window", "max_age", "max_bytes"}),
    "history": frozenset({"num_replicas", "duplicate_window", "max_age", "max_bytes", "max_msgs"}),
    "activity": frozenset({"num_replicas", "duplicate_window", "max_bytes"}),
    "audit": frozenset({"num_replicas", "duplicate_window", "max_bytes"}),
    "events": frozenset({"num_replicas", "duplicate_window", "subjects", "discard", *_LIMITS, "max_age"}),
    "bucket": frozenset(
        {
            "num_replicas",
            "duplicate_window",
            "max_age",
            "max_msgs_per_subject",
            "max_msg_size",
            "max_bytes",
            "republish",
        }
    ),
    "worker": frozenset({"num_replicas", "ack_wait", "max_ack_pending"}),
    "subscription": frozenset({"num_replicas", "ack_wait", "max_ack_pending", "filter_subject", "metadata"}),
}


def without_program(kind: Kind, existing: Json, declared: Json) -> list[Difference]:
    """As `differences`, for inspecting a server without the program that chose some of the settings."""
    chosen = _CHOSEN[kind]
    return [
        difference for difference in differences(kind, existing, declared) if difference.setting not in chosen
    ]


def differences(kind: Kind, existing: Json, declared: Json) -> list[Difference]:
    """Compare what the server has with a declaration, in every setting that either has."""
    table = CONSUMER if kind in _CONSUMERS else STREAM
    found = []
    for name in dict.fromkeys([*declared, *existing]):
        have, want = existing.get(name), declared.get(name)
        setting = table.get(name)
        if setting is None:
            verdict = Verdict.UNKNOWN if _is_on(have, -1) else Verdict.UNKNOWN_OFF
            found.append(Difference(name, have, want, verdict, _UNKNOWN))
            continue
        if name == "deliver_policy" and METADATA_AFTER in (existing.get("metadata") or {}):
            continue  # it started at another consumer's position
        if name == "metadata":  # programs may add entries of their own
            have = {entry: (have or {}).get(entry) for entry in want or {}}
        decided = _verdict(setting, kind, name, existing, have, want)
        if decided is not None:
            if setting.duration:
                have, want = _in_milliseconds(have), _in_milliseconds(want)
            unit = " ms" if setting.duration else ""
            found.append(Difference(name, have, want, decided, setting.does, setting.fixed, unit))
    return found


def in_line(existing: Json, declared: Json, found: list[Difference]) -> dict[str, Any]:
    """The configuration that ends the differences, other than fixed ones, and keeps what does not matter."""
    fixed = {difference.setting for difference in found if difference.fixed} | {"deliver_policy"}
    known = (difference for difference in found if difference.is_known)
    foreign = {difference.setting for difference in known} - fixed
    wanted = {name: value for name, value in declared.items() if name not in fixed}
    if "metadata" in wanted:
        wanted["metadata"] = {**(existing.get("metadata") or {}), **wanted["metadata"]}
    return {**{name: value for name, value in existing.items() if name not in foreign}, **wanted}


def _verdict(
    setting: Setting, kind: Kind, name: str, existing: Json, have: object, want: object
) -> Verdict | None:
    verdict = setting.verdict_for(kind)
    is_on, wants_on = _is_on(have, setting.off), _is_on(want, setting.off)
    if name == "retention" and kind == "queue" and have == "workqueue":
        return WARNED  # an ack removes its message at once, and costs more
    if verdict is None or have == want or not (is_on or wants_on) or (setting.needed and is_on):
        return None
    if name == "discard" and not any(_is_on(existing.get(limit), -1) for limit in _LIMITS):
        return None  # nothing to decide
    if setting.limit and wants_on:
        return WARNED  # another limit, or none
    if name == "subjects" and _all_covered(have, want):
        return WARNED  # it has more
    if name in _LIMITS_OF_ALL and existing.get("discard") == "new":
        return WARNED  # it refuses to store instead
    return verdict


def _all_covered(have: Any, want: Any) -> bool:
    return all(any(covers(kept, subject) for kept in have or []) for subject in want or [])


def _is_on(value: object, off: object) -> bool:
    return bool(value) and value != off


def _in_milliseconds(value: Any) -> Any:
    return value // NANOSECONDS_PER_MS if isinstance(value, int) else value
