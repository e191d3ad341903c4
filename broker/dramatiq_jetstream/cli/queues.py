"""`fleet queues`, `pause`, `resume` and `purge`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from rich.table import Table

from .context import Fleet, age, pass_fleet, show_rows, table
from .names import QUEUE
from .screen import styled

COMMANDS: list[click.Command] = []


def _snapshot(fleet: Fleet) -> list[dict[str, Any]]:
    return [dataclasses.asdict(stats) for stats in fleet.broker.queue_stats_of(fleet.queue_names())]


def _table(stats: list[dict[str, Any]]) -> Table:
    numbers = ("ready", "in flight", "delayed", "dead", "oldest ready")
    human = table("queue", *numbers, "", right=numbers)
    for queue in stats:
        human.add_row(
            queue["queue"],
            str(queue["ready"]),
            str(queue["in_flight"]),
            str(queue["delayed"]),
            styled(str(queue["dead"]), "red" if queue["dead"] else ""),
            age(queue["oldest_ready_age"]),
            styled("paused" if queue["paused"] else "", "yellow"),
        )
    return human


@click.command()
@click.option("--watch", is_flag=True, help="Keep showing, once a second, until Ctrl-C.")
@pass_fleet
def queues(fleet: Fleet, watch: bool) -> None:
    """Show what is in every queue."""
    empty = f"There are no queues in {fleet.where}."
    show_rows(fleet, lambda: _snapshot(fleet), _table, empty, watch=watch)


@click.command()
@click.argument("queue", type=QUEUE)
@pass_fleet
def pause(fleet: Fleet, queue: str) -> None:
    """Stop delivery from QUEUE to the whole fleet."""
    fleet.check_queue(queue)
    with fleet.change("pause", f"queue {queue}") as change:
        fleet.broker.pause(queue)
        change.done = 1
    fleet.show({"queue": queue, "paused": True}, f"{queue} is paused; `fleet resume {queue}` ends that.")


@click.command()
@click.argument("queue", type=QUEUE)
@pass_fleet
def resume(fleet: Fleet, queue: str) -> None:
    """Resume delivery from a paused QUEUE."""
    fleet.check_queue(queue)
    with fleet.change("resume", f"queue {queue}") as change:
        fleet.broker.resume(queue)
        change.done = 1
    fleet.show({"queue": queue, "paused": False}, f"{queue} goes on.")


@click.command()
@click.argument("queue", type=QUEUE)
@click.option("--ready", is_flag=True, help="Drop ready and running messages.")
@click.option("--delayed", is_flag=True, help="Drop delayed messages.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_fleet
def purge(fleet: Fleet, queue: str, ready: bool, delayed: bool, yes: bool) -> None:
    """Drop the messages of QUEUE for good; both kinds unless one is named. Dead letters stay."""
    fleet.check_queue(queue)
    if not (ready or delayed):
        ready = delayed = True
    if not yes:
        click.confirm(f"Drop the messages of {queue} for good?", abort=True, err=True)
    stats = fleet.broker.queue_stats(queue)
    planned = ready * (stats.ready + stats.in_flight) + delayed * stats.delayed
    with fleet.change("purge", f"queue {queue}", planned) as change:
        purged = fleet.broker.stored_queues.purge(queue, ready=ready, delayed=delayed)
        change.done = purged
    fleet.show({"queue": queue, "purged": purged}, f"{purged} messages dropped from {queue}.")


COMMANDS += [queues, pause, resume, purge]
