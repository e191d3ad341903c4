"""`fleet schedules`, `run-now`, `pause-schedule` and `resume-schedule`: periodic tasks."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager

import click

from dramatiq_jetstream import schedules as steering
from dramatiq_jetstream.audit import Change
from dramatiq_jetstream.schedules import Schedule, list_schedules, remove_schedule

from .context import Fleet, moment, pass_fleet, table
from .names import QUEUE
from .screen import styled

COMMANDS: list[click.Command] = []


@click.command()
@click.option(
    "--module",
    "modules",
    multiple=True,
    help="A module of the program: tells which schedules are orphans. Give all that the program has.",
)
@click.option("--remove-orphans", is_flag=True, help="Remove the schedules that no module declares any more.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_fleet
def schedules(fleet: Fleet, modules: tuple[str, ...], remove_orphans: bool, yes: bool) -> None:
    """List periodic tasks with their last and next tick.

    The schedule of an actor whose own module exists and was not given is not an orphan.
    """
    modules = modules or ((fleet.program,) if fleet.program else ())
    if remove_orphans and not modules:
        raise click.UsageError("--remove-orphans needs --module, to know what is not one.")
    brokers = list(dict.fromkeys(fleet.load(module) for module in modules)) or [fleet.broker]
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
        orphaned = [schedule for schedule in found if schedule.orphan]
        if orphaned and not yes:
            names = ", ".join(schedule.actor for schedule in orphaned)
            click.confirm(f"Remove the schedules of {names} for good?", abort=True, err=True)
        for schedule in orphaned:
            target = f"schedule of {schedule.actor} on queue {schedule.queue}"
            with fleet.change("remove-schedule", target, broker=brokers[0]) as change:
                if remove_schedule(brokers[0], schedule.queue, schedule.actor):
                    removed.append(schedule.actor)
                    change.done = 1
        found = [schedule for schedule in found if not schedule.orphan]
    human = table("actor", "queue", "schedule", "last tick", "next tick", "")
    for schedule in found:
        orphan = "orphan" if modules and schedule.orphan else ""
        human.add_row(
            schedule.actor,
            schedule.queue,
            schedule.schedule + (f" ({schedule.timezone})" if schedule.timezone else ""),
            moment(schedule.last_tick),
            moment(schedule.next_tick),
            styled("paused" if schedule.paused else orphan, "yellow"),
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


def _find(fleet: Fleet, name: str, queue: str | None) -> Schedule:
    """The schedule of that actor."""
    everything = list_schedules(fleet.broker)
    found = [s for s in everything if s.actor == name and queue in (None, s.queue)]
    if not found:
        known = ", ".join(sorted({schedule.actor for schedule in everything})) or "none"
        raise click.ClickException(f"there is no schedule {name!r}; there are: {known}.")
    if len(found) > 1:
        queues = ", ".join(schedule.queue for schedule in found)
        raise click.ClickException(f"{name!r} has a schedule on several queues: say --queue, of {queues}.")
    return found[0]


def _change(fleet: Fleet, what: str, schedule: Schedule) -> AbstractContextManager[Change]:
    return fleet.change(what, f"schedule of {schedule.actor} on queue {schedule.queue}")


@click.command("run-now")
@click.argument("schedule")
@click.option("--queue", type=QUEUE, help="Its queue, if there are several of that name.")
@pass_fleet
def run_now(fleet: Fleet, schedule: str, queue: str | None) -> None:
    """Run SCHEDULE, the name of a periodic actor, once now; its next tick stays."""
    found = _find(fleet, schedule, queue)
    with _change(fleet, "run-schedule", found) as change:
        message_id = steering.run_now(fleet.broker, found.queue, found.actor)
        change.done = int(message_id is not None)
    if message_id is None:
        raise click.ClickException(f"the schedule {schedule!r} was removed just now.")
    fleet.show({"message_id": message_id}, f"{found.actor} runs now, as {message_id}.")


@click.command("pause-schedule")
@click.argument("schedule")
@click.option("--queue", type=QUEUE, help="Its queue, if there are several of that name.")
@pass_fleet
def pause_schedule(fleet: Fleet, schedule: str, queue: str | None) -> None:
    """Have SCHEDULE, the name of a periodic actor, send nothing until it is resumed."""
    found = _find(fleet, schedule, queue)
    with _change(fleet, "pause-schedule", found) as change:
        steering.pause(fleet.broker, found.queue, found.actor)
        change.done = 1
    fleet.show(
        {"actor": found.actor, "queue": found.queue, "paused": True},
        f"{found.actor} is paused; `fleet resume-schedule {found.actor}` ends that.",
    )


@click.command("resume-schedule")
@click.argument("schedule")
@click.option("--queue", type=QUEUE, help="Its queue, if there are several of that name.")
@pass_fleet
def resume_schedule(fleet: Fleet, schedule: str, queue: str | None) -> None:
    """Go on with a paused SCHEDULE, as the program declares it now."""
    found = _find(fleet, schedule, queue)
    with _change(fleet, "resume-schedule", found) as change:
        steering.resume(fleet.broker, found.queue, found.actor)
        change.done = 1
    fleet.show({"actor": found.actor, "queue": found.queue, "paused": False}, f"{found.actor} goes on.")


COMMANDS += [schedules, run_now, pause_schedule, resume_schedule]
