"""`fleet scale-hint`: how many processes would clear the backlog in time, for platforms that scale by a command."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import click

from dramatiq_jetstream.errors import NotFound, TopologyMissing
from dramatiq_jetstream.workers import WorkerInfo, list_workers

from .context import Fleet, pass_fleet

COMMANDS: list[click.Command] = []

#: How often the fleet is looked at while it is sampled; workers say what they do once a second.
LOOK_SECONDS = 1.0

#: How many recorded attempts give the mean duration when no worker could be watched.
RECORDS = 200

#: Threads of a process, where none runs to be asked: the default of `fleet work`.
THREADS = 8


@dataclass(frozen=True)
class Look:
    """The fleet at one moment: messages that wait or run, and what the workers of the queues have done and run."""

    at: float
    backlog: int
    workers: tuple[WorkerInfo, ...]


@dataclass(frozen=True)
class Hint:
    """How many processes are needed, and from what that was worked out.

    Attributes:
      processes: Rounded up; within what the caller allows.
      running: Processes that serve the queues now.
      arriving: Messages a second that are sent to the queues.
      each: Messages a second that one process does when all its threads are busy; None when that is not known.
    """

    processes: int
    running: int
    backlog: int
    arriving: float
    each: float | None


def hint(
    looks: Sequence[Look], *, within: float, at_least: int, at_most: int, seconds_each: float | None = None
) -> Hint:
    """Work out a hint.

    A process with T threads does T / d messages a second when attempts take d seconds. That mean is what Little's law
    gives of the looks: attempts that ran at a time, divided by attempts that ended in a second.

    Parameters:
      within: Seconds in which what waits is to be done.
      seconds_each: How long attempts take, where the looks do not show it.
    """
    first, last = looks[0], looks[-1]
    seconds = max(last.at - first.at, 0.001)
    before = {worker.id: worker.done for worker in first.workers}
    done = sum(max(0, worker.done - before.get(worker.id, 0)) for worker in last.workers)
    busy = fmean(sum(len(worker.running) for worker in look.workers) for look in looks)
    threads = fmean(worker.threads for worker in last.workers) if last.workers else THREADS
    if done and busy:
        seconds_each = busy / (done / seconds)
    each = threads / seconds_each if seconds_each else None
    arriving = max(0.0, (last.backlog - first.backlog + done) / seconds)
    if not last.backlog and not arriving:
        wanted = 0
    elif each is None:
        wanted = max(1, len(last.workers))
    else:
        wanted = math.ceil((last.backlog / within + arriving) / each)
    processes = min(max(wanted, at_least), at_most)
    return Hint(processes, len(last.workers), last.backlog, round(arriving, 2), each and round(each, 2))


@click.command("scale-hint")
@click.option(
    "--within",
    type=click.FloatRange(1),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Clear the backlog within this time.",
)
@click.option(
    "-Q", "--queues", multiple=True, metavar="QUEUE", help="Only these queues; repeat it, or use commas."
)
@click.option(
    "--sample",
    type=click.FloatRange(2, 600),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to watch the workers.",
)
@click.option("--at-least", type=click.IntRange(0), default=1, show_default=True)
@click.option("--at-most", type=click.IntRange(1), default=100, show_default=True)
@pass_fleet
def scale_hint(
    fleet: Fleet, within: float, queues: tuple[str, ...], sample: float, at_least: int, at_most: int
) -> None:
    """Print how many worker processes would clear the backlog in time.

    The number alone goes to standard output, what it is made of to standard error.
    """
    if at_most < at_least:
        raise click.UsageError(f"--at-most {at_most} is less than --at-least {at_least}.")
    given = [name.strip() for each in queues for name in each.split(",") if name.strip()]
    wanted = [fleet.check_queue(name) for name in given] or fleet.queue_names()
    until = time.monotonic() + sample
    looks = [_look(fleet, wanted)]
    while time.monotonic() < until:
        time.sleep(min(LOOK_SECONDS, max(0.0, until - time.monotonic())))
        looks.append(_look(fleet, wanted))
    found = hint(
        looks,
        within=within,
        at_least=at_least,
        at_most=at_most,
        seconds_each=_recorded_seconds(fleet, wanted),
    )
    if fleet.as_json:
        fleet.show(asdict(found), "")
        return
    click.echo(_explain(found, within), err=True)
    click.echo(found.processes)


def _look(fleet: Fleet, queues: Iterable[str]) -> Look:
    wanted = set(queues)
    backlog = sum(stats.ready + stats.in_flight for stats in fleet.broker.queue_stats_of(wanted))
    try:
        workers = [worker for worker in list_workers(fleet.broker) if wanted & set(worker.queues)]
    except (NotFound, TopologyMissing):
        workers = []
    return Look(time.monotonic(), backlog, tuple(workers))


def _recorded_seconds(fleet: Fleet, queues: Iterable[str]) -> float | None:
    """The mean duration of attempts that the history has, of these queues."""
    durations: list[int] = []
    for name in queues:
        durations += [
            record.duration for record in fleet.broker.history.search(queue=name, limit=RECORDS).records
        ]
    return fmean(durations) / 1000 if durations and sum(durations) else None


def _explain(found: Hint, within: float) -> str:
    if found.each is None:
        each = "no attempt was seen, so how much one process does is not known"
    else:
        each = f"one process does {found.each:g} a second"
    return (
        f"{found.backlog} messages wait or run, {found.arriving:g} a second arrive, {each}; "
        f"{found.running} run now. To be done within {within:g} s:"
    )


COMMANDS.append(scale_hint)
