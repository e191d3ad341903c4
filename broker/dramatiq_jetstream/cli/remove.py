"""`fleet remove`: takes queues, namespaces, buckets and consumers off the server that no program uses any more.

Each command says what is lost and asks first. It refuses what living workers use. If it dies in between, what it has
removed stays removed, and the same command removes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import click

from dramatiq_jetstream.audit import Change
from dramatiq_jetstream.errors import NotFound
from dramatiq_jetstream.jetstream import inventory, topology
from dramatiq_jetstream.jetstream.names import METADATA_SUBSCRIBER, bucket_stream
from dramatiq_jetstream.periodic import list_schedules

from .context import Fleet, pass_fleet, table
from .names import QUEUE

COMMANDS: list[click.Command] = []


@dataclass(frozen=True)
class _Part:
    """One thing on the server, and what is lost with it; `consumer` is empty for a whole stream."""

    stream: str
    consumer: str
    loses: str

    def __str__(self) -> str:
        return (
            f"consumer {self.consumer} of stream {self.stream}" if self.consumer else f"stream {self.stream}"
        )


def _options(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--yes", is_flag=True, help="Do not ask.")(command)
    return click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")(
        command
    )


@click.group()
def remove() -> None:
    """Remove what no program uses any more; `fleet doctor` finds it."""


@remove.command("queue")
@click.argument("queue", type=QUEUE)
@_options
@pass_fleet
def remove_queue(fleet: Fleet, queue: str, yes: bool, dry_run: bool) -> None:
    """Remove QUEUE with its messages, its schedules, and its actors' subscriptions. Its dead letters stay."""
    fleet.check_queue(queue)
    _refuse_if_served(fleet, queue)
    _remove(fleet, f"queue {queue}", list(_of_queue(fleet, queue)), yes=yes, dry_run=dry_run)


@remove.command("namespace")
@click.argument("namespace")
@_options
@pass_fleet
def remove_namespace(fleet: Fleet, namespace: str, yes: bool, dry_run: bool) -> None:
    """Remove NAMESPACE: its queues, dead letters, history, buckets and subscriptions. Streams of events stay."""
    if fleet.given_namespace is None and fleet.program is None:
        fleet.given_namespace = namespace
    _ = fleet.broker  # which says what a program's namespace is
    if fleet.namespace != namespace:
        raise click.UsageError(f"{namespace!r} is to be removed, and the options say {fleet.namespace!r}.")
    _refuse_if_served(fleet, None)
    parts: list[_Part] = []
    for info in inventory.streams(fleet.broker.connection):
        if topology.recognise_stream(fleet.broker.names, info["config"]) is not None:
            parts.append(_Part(info["config"]["name"], "", f"{info['state']['messages']} messages"))
        else:
            parts += _subscriptions(fleet, info["config"]["name"], None)
    if not parts:
        raise click.ClickException(f"there is nothing of a namespace {namespace!r} on the server.")
    _remove(fleet, f"namespace {namespace}", parts, yes=yes, dry_run=dry_run, recorded=False)


@remove.command("bucket")
@click.argument("bucket")
@_options
@pass_fleet
def remove_bucket(fleet: Fleet, bucket: str, yes: bool, dry_run: bool) -> None:
    """Remove BUCKET of the namespace, by its name in the program or on the server, with all its keys."""
    names = fleet.broker.names
    existing = {
        found: info
        for info in inventory.streams(fleet.broker.connection)
        if (found := names.bucket_of_stream(info["config"]["name"])) is not None
    }
    name = bucket if bucket in existing else names.bucket_of_stream(bucket_stream(bucket)) or bucket
    if name not in existing:
        known = ", ".join(sorted(existing)) or "none"
        raise click.ClickException(
            f"there is no bucket {bucket!r} in namespace {fleet.namespace!r}; there are: {known}."
        )
    _refuse_if_served(fleet, None)
    info = existing[name]
    part = _Part(info["config"]["name"], "", f"{info['state']['messages']} keys")
    _remove(fleet, f"bucket {name}", [part], yes=yes, dry_run=dry_run)


@remove.command("consumer")
@click.argument("stream")
@click.argument("consumer")
@_options
@pass_fleet
def remove_consumer(fleet: Fleet, stream: str, consumer: str, yes: bool, dry_run: bool) -> None:
    """Remove CONSUMER of STREAM, by their names on the server, as `fleet doctor` says them.

    Messages of a queue stay; a subscription that is made again begins at its beginning.
    """
    connection = fleet.broker.connection
    try:
        info: dict[str, Any] = connection.api(f"CONSUMER.INFO.{stream}.{consumer}")
    except NotFound:
        found = ", ".join(entry["name"] for entry in _consumers(fleet, stream)) or "none"
        raise click.ClickException(
            f"there is no consumer {consumer!r} of a stream {stream!r}; there are: {found}."
        ) from None
    if info["num_waiting"]:
        raise click.ClickException(
            f"{info['num_waiting']} requests wait at {consumer} of {stream}: stop the workers that ask there first."
        )
    _remove(fleet, f"consumer {consumer}", [_consumer_part(stream, info)], yes=yes, dry_run=dry_run)


COMMANDS.append(remove)


def _remove(
    fleet: Fleet, what: str, parts: list[_Part], *, yes: bool, dry_run: bool, recorded: bool = True
) -> None:
    """Say what goes, ask, and remove it.

    Parameters:
      recorded: Whether the audit has it; that of a namespace is removed with it.
    """
    if not dry_run and not yes:
        for part in parts:
            fleet.note(f"{part}: {part.loses}")
        click.confirm(f"Remove {what} for good?", abort=True, err=True)
    if not dry_run:
        unrecorded = nullcontext(Change("", "remove", what, len(parts)))
        with fleet.change("remove", what, len(parts)) if recorded else unrecorded as change:
            for part in parts:
                change.done += _remove_part(fleet, part)
    human = table("", "")
    for part in parts:
        human.add_row(f"{'would be removed' if dry_run else 'removed'}: {part}", part.loses)
    fleet.show({"removed": not dry_run, "parts": [asdict(part) for part in parts]}, human)


def _remove_part(fleet: Fleet, part: _Part) -> bool:
    """Remove one thing; False when another process was faster."""
    below = f".{part.consumer}" if part.consumer else ""
    try:
        fleet.broker.connection.api(f"{'CONSUMER' if below else 'STREAM'}.DELETE.{part.stream}{below}")
    except NotFound:
        return False
    return True


def _refuse_if_served(fleet: Fleet, queue: str | None) -> None:
    """Refuse to remove what living workers use: they would make it again."""
    workers = [worker for worker in fleet.workers() if queue is None or queue in worker.queues]
    if workers:
        served = f"queue {queue!r}" if queue is not None else f"namespace {fleet.namespace!r}"
        raise click.ClickException(
            f"{len(workers)} workers serve {served} and would make it again: stop them first (`fleet workers`)."
        )


def _of_queue(fleet: Fleet, queue: str) -> Iterator[_Part]:
    stats = fleet.broker.queue_stats(queue)
    schedules = sum(schedule.queue == queue for schedule in list_schedules(fleet.broker))
    loses = (
        f"{stats.ready} ready, {stats.in_flight} in flight, {stats.delayed} delayed, {schedules} schedules"
    )
    yield _Part(fleet.broker.names.queue_stream(queue), "", loses)
    for info in inventory.streams(fleet.broker.connection):
        if topology.recognise_stream(fleet.broker.names, info["config"]) is None:
            yield from _subscriptions(fleet, info["config"]["name"], queue)


def _subscriptions(fleet: Fleet, stream: str, queue: str | None) -> Iterator[_Part]:
    """The subscriptions of a namespace, or of one queue, on a stream of events."""
    names = fleet.broker.names
    for info in _consumers(fleet, stream):
        config = info["config"]
        mine = topology.recognise_consumer(names, stream, {**config, "name": info["name"]})
        of = (config.get("metadata") or {}).get(METADATA_SUBSCRIBER)
        if (
            mine is not None
            and mine.kind == "subscription"
            and queue in (None, of and of[len(names.subscriber("")) :])
        ):
            yield _consumer_part(stream, info)


def _consumer_part(stream: str, info: dict[str, Any]) -> _Part:
    return _Part(stream, info["name"], f"its place, {info['num_pending'] + info['num_ack_pending']} unread")


def _consumers(fleet: Fleet, stream: str) -> list[dict[str, Any]]:
    try:
        return list(inventory.consumers(fleet.broker.connection, stream))
    except NotFound:
        return []
