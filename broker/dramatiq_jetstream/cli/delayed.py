"""`fleet delayed`: list delayed messages, cancel them, run them now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import click
from dramatiq.common import current_millis

from dramatiq_jetstream.sending import delays

from .context import Fleet, age, moment, pass_fleet, table
from .names import QUEUE

COMMANDS: list[click.Command] = []


@click.group()
def delayed() -> None:
    """Messages that wait for their time."""


@delayed.command("list")
@click.option("--queue", type=QUEUE, help="Only of this queue.")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="At most this many of each queue."
)
@pass_fleet
def list_(fleet: Fleet, queue: str | None, limit: int) -> None:
    """List delayed messages, the next due first."""
    broker = fleet.broker
    wanted = [fleet.check_queue(queue)] if queue else fleet.queue_names()
    found, cut = [], []
    for name in wanted:
        messages = delays.delayed_messages(broker.connection, broker.names, name, limit=limit + 1)
        cut += [name] if len(messages) > limit else []
        found += messages[:limit]
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
    if cut:
        fleet.note(
            f"There are more than {limit} on {', '.join(cut)}, and these are any of them: raise --limit."
        )


@delayed.command()
@click.argument("message_ids", nargs=-1, required=True)
@click.option("--queue", type=QUEUE, help="The queue they wait on. [all queues]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_fleet
def cancel(fleet: Fleet, message_ids: tuple[str, ...], queue: str | None, yes: bool) -> None:
    """Cancel delayed messages for good, by their ids."""
    broker = fleet.broker
    wanted = [fleet.check_queue(queue)] if queue else fleet.queue_names()
    if not yes:
        click.confirm(f"Cancel {len(message_ids)} delayed messages for good?", abort=True, err=True)
    cancelled = _each(
        fleet, "cancel", message_ids, lambda one: sum(broker.cancel(one, name) for name in wanted)
    )
    missing = [message_id for message_id, count in cancelled.items() if not count]
    fleet.show({"cancelled": cancelled}, f"{sum(cancelled.values())} cancelled.")
    if missing:
        raise click.ClickException(f"not delayed (any more): {', '.join(missing)}.")


@delayed.command()
@click.argument("message_ids", nargs=-1, required=True)
@click.option("--queue", type=QUEUE, help="The queue they wait on. [all queues]")
@pass_fleet
def run(fleet: Fleet, message_ids: tuple[str, ...], queue: str | None) -> None:
    """Have delayed messages run now, by their ids."""
    broker = fleet.broker
    wanted = [fleet.check_queue(queue)] if queue else fleet.queue_names()

    def run_now(message_id: str) -> int:
        return sum(delays.run_now(broker.connection, broker.names, name, message_id) for name in wanted)

    hurried = _each(fleet, "run", message_ids, run_now)
    missing = [message_id for message_id, count in hurried.items() if not count]
    fleet.show({"run": hurried}, f"{sum(hurried.values())} run now.")
    if missing:
        raise click.ClickException(f"not delayed (any more): {', '.join(missing)}.")


def _each(
    fleet: Fleet, what: str, message_ids: tuple[str, ...], change_one: Callable[[str], int]
) -> dict[str, int]:
    """Change delayed messages; returns how many there were of each id."""
    done = {}
    for message_id in message_ids:
        with fleet.change(what, f"message {message_id}") as change:
            done[message_id] = change.done = change_one(message_id)
    return done


COMMANDS.append(delayed)
