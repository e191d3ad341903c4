"""`fleet doctor`: connects, checks, and says what is wrong and how to fix it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
from dramatiq.common import current_millis
from dramatiq.errors import DramatiqError
from rich.text import Text

from dramatiq_jetstream.config import Storage
from dramatiq_jetstream.jetstream import drift, ensuring, inventory, topology
from dramatiq_jetstream.jetstream.names import HEADER_MSG_ID
from dramatiq_jetstream.jetstream.reading import last_message
from dramatiq_jetstream.queues import QueueStats

from .context import Fleet, pass_fleet, table
from .orphans import find_orphans
from .screen import styled, visible

COMMANDS: list[click.Command] = []

OK, WARNING, FAILURE = "ok", "warning", "failure"
_MARKS = {OK: styled("✓", "green"), WARNING: styled("!", "yellow"), FAILURE: styled("✗", "red")}

#: A clock that differs by more than this from the server's makes delays visibly late; milliseconds.
MAX_SKEW_MS = 1_000

#: The used share of a limit that causes a warning.
FULL_SHARE = 0.8


@dataclass(frozen=True)
class Finding:
    """The result of one check; `advice` says how to fix it."""

    check: str
    status: str
    detail: str
    advice: str = ""


@click.command()
@click.option("--strict", is_flag=True, help="End with status 3 when there are warnings and no failures.")
@pass_fleet
def doctor(fleet: Fleet, strict: bool) -> None:
    """Check the connection, the server, its limits and permissions, the clock, and what is left over.

    With --broker MODULE it knows which queues, schedules and subscriptions the program has. The status is 1 after a
    failure, else 0.
    """
    findings: list[Finding] = []
    for check in (_connection, _account, _write, _settings, _queues, _orphans):
        try:
            findings += check(fleet)
        except DramatiqError as error:
            findings.append(Finding(check.__name__.strip("_"), FAILURE, str(error)))
            if check is _connection:
                break
    human = table("", "", "")
    for finding in findings:
        detail = Text(visible(finding.detail))
        if finding.advice:
            detail.append_text(styled(f"\n→ {finding.advice}", "dim"))
        human.add_row(_MARKS[finding.status], finding.check, detail)
    fleet.show([asdict(finding) for finding in findings], human)
    if any(finding.status == FAILURE for finding in findings):
        raise click.exceptions.Exit(1)
    if strict and any(finding.status == WARNING for finding in findings):
        raise click.exceptions.Exit(3)


def _connection(fleet: Fleet) -> Iterator[Finding]:
    connection = fleet.broker.connection
    connection.connect()
    started = time.monotonic()
    connection.api("INFO")
    taken = (time.monotonic() - started) * 1000
    state = connection.state
    yield Finding(
        "connection", OK, f"{state.server}, nats-server {state.server_version}, answers in {taken:.1f} ms"
    )
    yield Finding("max_payload", OK, f"{connection.max_payload} bytes")


def _account(fleet: Fleet) -> Iterator[Finding]:
    info = fleet.broker.connection.api("INFO")
    limits = info.get("limits", {})
    used, most = info.get("storage", 0), limits.get("max_storage", -1)
    share = used / most if most > 0 else 0.0
    detail = f"{used:,} bytes used" + (f" of {most:,}" if most > 0 else ", no limit for the account")
    if share > FULL_SHARE:
        yield Finding(
            "storage", WARNING if share < 0.95 else FAILURE, detail, "raise max_file_store or purge."
        )
    else:
        yield Finding("storage", OK, detail)
    streams, most_streams = info.get("streams", 0), limits.get("max_streams", -1)
    room = most_streams < 0 or streams + 5 < most_streams
    yield Finding(
        "streams",
        OK if room else WARNING,
        f"{streams} of {most_streams if most_streams > 0 else 'any number'}",
        "" if room else "raise the account's max_streams: every queue and bucket is one.",
    )


def _write(fleet: Fleet) -> Iterator[Finding]:
    """Create a stream, store a message, and compare the clocks by the message's time."""
    broker = fleet.broker
    # Small enough for an account that demands limits.
    storage = Storage(duplicate_window=10_000, max_bytes=1_000_000)
    config = topology.queue(broker.names, "doctor=check", storage=storage)
    connection = broker.connection
    ensuring.ensure_stream(connection, config)
    try:
        subject = broker.names.task("doctor=check")
        before = current_millis()
        started = time.monotonic()
        connection.publish(subject, b"doctor", {HEADER_MSG_ID: str(before)})
        taken = (time.monotonic() - started) * 1000
        yield Finding("store", OK, f"a message is stored in {taken:.1f} ms")
        stored = last_message(connection, config.name, subject)
        skew = 0 if stored is None else stored.time - (before + current_millis()) // 2
        if abs(skew) > MAX_SKEW_MS:
            yield Finding(
                "clock",
                WARNING,
                f"this machine and the server differ by {skew} ms",
                "synchronise both clocks (NTP): delays are given as times of day.",
            )
        else:
            yield Finding("clock", OK, f"within {abs(skew) + int(taken)} ms of the server's")
    finally:
        connection.api(f"STREAM.DELETE.{config.name}")


def _settings(fleet: Fleet) -> Iterator[Finding]:
    """Compare every setting of the namespace's streams and consumers with what the library makes."""
    broker = fleet.broker
    compared = found = 0
    for info in inventory.streams(broker.connection):
        stream = info["config"]
        declared = topology.recognise_stream(broker.names, stream)
        infos = []
        if declared is None or declared.kind != "bucket":
            infos = list(inventory.consumers(broker.connection, stream["name"]))
        consumers = [entry["config"] for entry in infos]
        mine = [topology.recognise_consumer(broker.names, stream["name"], config) for config in consumers]
        if declared is None:
            if not any(mine):
                continue
            declared = topology.events(stream["name"], stream.get("subjects") or [])
        for consumer, entry in zip(mine, infos, strict=True):
            if consumer is not None and consumer.kind == "subscription":
                yield from _unread(consumer, entry)
        for config, existing in [(declared, stream), *zip(mine, consumers, strict=True)]:
            if config is None:
                if declared.kind == "queue":
                    found += 1
                    yield Finding(
                        f"consumer {existing['name']} of stream {stream['name']}",
                        FAILURE,
                        "is no worker's and takes messages of the queue",
                        "delete it, if no program of yours needs it.",
                    )
                continue
            compared += 1
            if config.kind == "queue" and stream.get("max_bytes", -1) > 0:
                yield _limited(stream, info["state"]["bytes"])
            differences = drift.without_program(config.kind, existing, config.to_json())
            if differences:
                found += 1
                yield _differing(str(config), differences)
    if not found:
        yield Finding("settings", OK, f"{compared} streams and consumers are as the library makes them")


def _unread(consumer: topology.ConsumerConfig, info: dict[str, Any]) -> Iterator[Finding]:
    if info["num_pending"] and not info["num_waiting"]:
        yield Finding(
            f"consumer {consumer.name} of stream {consumer.stream}",
            WARNING,
            f"{info['num_pending']} events wait and no worker is asking for them",
            f"start workers; if its actor is gone, `fleet remove consumer {consumer.stream} {consumer.name}`.",
        )


def _limited(stream: dict[str, Any], used: int) -> Finding:
    share = used / stream["max_bytes"]
    return Finding(
        f"stream {stream['name']}",
        OK if share < FULL_SHARE else WARNING if share < 1 else FAILURE,
        f"{share:.0%} of its max_bytes of {stream['max_bytes']:,} are used; when it is full, the server throws away "
        "the oldest messages",
        ""
        if share < FULL_SHARE
        else "start workers, or raise max_stream_bytes and run `fleet setup --update`.",
    )


def _differing(what: str, differences: list[drift.Difference]) -> Finding:
    refused = any(difference.verdict is drift.Verdict.REFUSED for difference in differences)
    return Finding(
        what[0].lower() + what[1:],
        FAILURE if refused else WARNING,
        "; ".join(map(str, differences)),
        ensuring.advice(differences),
    )


def _queues(fleet: Fleet) -> Iterator[Finding]:
    names = fleet.queue_names()
    if not names:
        yield Finding(
            "queues",
            WARNING,
            f"there are none in namespace {fleet.namespace!r}",
            "prepare them with `fleet setup MODULE`, or let a worker with declare=True start once.",
        )
    for stats, consumers in fleet.broker.stored_queues.look_at(names):
        yield from _queue(fleet, stats, consumers)


def _queue(fleet: Fleet, stats: QueueStats, consumers: list[dict[str, Any]]) -> Iterator[Finding]:
    name = stats.queue
    waiting = sum(consumer.get("num_waiting", 0) for consumer in consumers)
    if not consumers:
        yield Finding(
            f"queue {name}", FAILURE, "has no consumer", "run `fleet setup MODULE` with the workers' module."
        )
    elif stats.paused:
        yield Finding(
            f"queue {name}", WARNING, f"is paused, {stats.ready} ready", f"`fleet resume {name}` ends that."
        )
    elif stats.ready and not waiting:
        yield Finding(
            f"queue {name}",
            WARNING,
            f"{stats.ready} ready and no worker is asking for them",
            "start workers, or wait if they are all busy.",
        )
    elif stats.in_flight and not waiting and not any(name in worker.queues for worker in fleet.workers()):
        yield Finding(
            f"queue {name}",
            WARNING,
            f"{stats.in_flight} in flight and no worker of this queue is alive",
            "start workers: what dead ones held is delivered again when its ack_wait is over.",
        )
    else:
        yield Finding(f"queue {name}", OK, f"{stats.ready} ready, {stats.in_flight} in flight")
    yield from _unserved_levels(name, consumers)
    if stats.dead:
        yield Finding(
            f"queue {name}",
            WARNING,
            f"{stats.dead} dead letters",
            f"`fleet dead list --queue {name}` lists them.",
        )


def _unserved_levels(queue: str, consumers: list[dict[str, Any]]) -> Iterator[Finding]:
    """Find priorities that no worker asks for, although workers ask for the lowest one, which they do last."""
    waiting = {consumer["name"]: consumer["num_waiting"] for consumer in consumers}
    for consumer in consumers:
        base, _, level = consumer["name"].partition("-")
        if (
            base == "worker"
            and level
            and consumer["num_pending"]
            and not consumer["num_waiting"]
            and waiting[base]
        ):
            yield Finding(
                f"queue {queue}",
                FAILURE,
                f"{consumer['num_pending']} messages of priority {level} wait and no worker asks for that level",
                f"start workers with a max_priority of {level} or more, or restart those that run, which find it.",
            )


def _orphans(fleet: Fleet) -> Iterator[Finding]:
    orphans = list(find_orphans(fleet))
    for name, why, advice in orphans:
        yield Finding(name, WARNING, f"is left over: {why}", advice)
    if not orphans:
        yield Finding("left over", OK, "nothing")


COMMANDS.append(doctor)
