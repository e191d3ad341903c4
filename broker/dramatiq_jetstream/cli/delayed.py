"""`fleet delayed`: list delayed messages, cancel them, run them now."""

from __future__ import annotations

import dataclasses

import click
from dramatiq.common import current_millis

from dramatiq_jetstream.sending import delays

from .context import Fleet, age, moment, pass_fleet, table

COMMANDS: list[click.Command] = []


@click.group()
def delayed() -> None:
    """Messages that wait for their time."""


@delayed.command("list")
@click.option("--queue", help="Only of this queue.")
@click.option("--limit", default=100, show_default=True, help="How many at most, of each queue.")
@pass_fleet
def list_(fleet: Fleet, queue: str | None, limit: int) -> None:
    """List delayed messages, the next due first."""
    broker = fleet.broker
    wanted = [fleet.check_queue(queue)] if queue else fleet.queue_names()
    found = [
        message
        for name in wanted
        for message in delays.delayed_messages(broker.connection, broker.names, name, limit=limit)
    ]
    found.sort(key=lambda message: message.eta)
    human = table("message id", "queue", "due", "in")
    for message in found:
        human.add_row(
            message.message_id,
            message.queue,
            moment(message.eta),
            age(max(0, message.eta - current_millis())),
        )
    fleet.show([dataclasses.asdict(m) for m in found], human if found else "No messages are delayed.")


@delayed.command()
@click.argument("message_ids", nargs=-1, required=True)
@click.option("--queue", help="The queue they wait on. [all queues]")
@pass_fleet
def cancel(fleet: Fleet, message_ids: tuple[str, ...], queue: str | None) -> None:
    """Cancel delayed messages by their ids."""
    broker = fleet.broker
    wanted = [fleet.check_queue(queue)] if queue else fleet.queue_names()
    cancelled = {
        message_id: sum(broker.cancel(message_id, name) for name in wanted) for message_id in message_ids
    }
    missing = [message_id for message_id, count in cancelled.items() if not count]
    fleet.show({"cancelled": cancelled}, f"{sum(cancelled.values())} cancelled.")
    if missing:
        raise click.ClickException(f"not delayed (any more): {', '.join(missing)}.")


@delayed.command()
@click.argument("message_ids", nargs=-1, required=True)
@click.option("--queue", help="The queue they wait on. [all queues]")
@pass_fleet
def run(fleet: Fleet, message_ids: tuple[str, ...], queue: str | None) -> None:
    """Have delayed messages run now, by their ids."""
    broker = fleet.broker
    wanted = [fleet.check_queue(queue)] if queue else fleet.queue_names()
    hurried = {
        message_id: sum(delays.run_now(broker.connection, broker.names, name, message_id) for name in wanted)
        for message_id in message_ids
    }
    missing = [message_id for message_id, count in hurried.items() if not count]
    fleet.show({"run": hurried}, f"{sum(hurried.values())} run now.")
    if missing:
        raise click.ClickException(f"not delayed (any more): {', '.join(missing)}.")


COMMANDS.append(delayed)
