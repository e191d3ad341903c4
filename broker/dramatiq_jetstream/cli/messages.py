"""`fleet abort`, `progress` and `schedules`: single messages and periodic tasks."""

from __future__ import annotations

import dataclasses

import click

from dramatiq_jetstream.errors import NotFound
from dramatiq_jetstream.periodic import list_schedules, remove_schedule
from dramatiq_jetstream.progress import read_progress

from .context import Fleet, moment, pass_fleet, table
from .setup import load

COMMANDS: list[click.Command] = []


@click.command()
@click.argument("message_id")
@click.option("--cancel", is_flag=True, help="Leave it alone if it is running already.")
@click.option("--timeout", default=0, show_default=True, help="Milliseconds that it gets to end by itself.")
@pass_fleet
def abort(fleet: Fleet, message_id: str, cancel: bool, timeout: int) -> None:
    """Abort a message that waits, is delayed or runs, in a fleet whose broker has Abortable."""
    try:
        from dramatiq_abort.middleware import AbortMode

        from dramatiq_jetstream.abort import abort_message
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from None
    mode = AbortMode.CANCEL if cancel else AbortMode.ABORT
    try:
        abort_message(message_id, fleet.broker, mode=mode, abort_timeout=timeout)
    except NotFound:
        raise click.ClickException(
            "no program of this namespace can be told to abort: its broker needs Abortable with the backend of "
            "dramatiq_jetstream.abort."
        ) from None
    fleet.show({"message_id": message_id, "abort": mode.value}, f"{message_id} was told to abort.")


@click.command()
@click.argument("message_id")
@pass_fleet
def progress(fleet: Fleet, message_id: str) -> None:
    """Show the progress that the actor of a message reported."""
    said = read_progress(message_id, fleet.broker)
    if said is None:
        raise click.ClickException(f"the actor of {message_id} said nothing in the last day.")
    share = "" if said.share is None else f" ({said.share:.0%})"
    of = "" if said.total is None else f" of {said.total:g}"
    fleet.show(
        dataclasses.asdict(said), f"{said.done:g}{of}{share} {said.note}".rstrip() + f", {moment(said.at)}"
    )


@click.command()
@click.option(
    "--module",
    "modules",
    multiple=True,
    help="A module of the program: tells which schedules are orphans. Give all that the program has.",
)
@click.option("--remove-orphans", is_flag=True, help="Remove the schedules that no module declares any more.")
@pass_fleet
def schedules(fleet: Fleet, modules: tuple[str, ...], remove_orphans: bool) -> None:
    """List periodic tasks with their last and next tick.

    The schedule of an actor whose own module exists and was not given is not an orphan.
    """
    if remove_orphans and not modules:
        raise click.UsageError("--remove-orphans needs --module, to know what is not one.")
    brokers = list(dict.fromkeys(load(fleet, module) for module in modules)) or [fleet.broker]
    found = list_schedules(brokers[0])
    for broker in brokers[1:]:
        orphans = {(schedule.queue, schedule.actor) for schedule in list_schedules(broker) if schedule.orphan}
        found = [
            dataclasses.replace(
                schedule, orphan=schedule.orphan and (schedule.queue, schedule.actor) in orphans
            )
            for schedule in found
        ]
    removed = []
    if remove_orphans:
        removed = [s.actor for s in found if s.orphan and remove_schedule(brokers[0], s.queue, s.actor)]
        found = [schedule for schedule in found if not schedule.orphan]
    human = table("actor", "queue", "schedule", "last tick", "next tick", "")
    for schedule in found:
        human.add_row(
            schedule.actor,
            schedule.queue,
            schedule.schedule + (f" ({schedule.timezone})" if schedule.timezone else ""),
            moment(schedule.last_tick),
            moment(schedule.next_tick),
            "orphan" if modules and schedule.orphan else "",
        )
    data = [dataclasses.asdict(schedule) for schedule in found]
    if not modules:
        for entry in data:
            del entry["orphan"]  # only a program can tell
    for broker in brokers:
        broker.close()
    if fleet.as_json and remove_orphans:
        fleet.show({"removed": removed, "schedules": data}, "")
        return
    if removed:
        fleet.console.print(f"removed: {', '.join(removed)}")
    fleet.show(data, human if found else "There are no schedules.")


COMMANDS += [abort, progress, schedules]
