"""`fleet dead`: list, show, replay and drop dead letters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dramatiq_jetstream.dead_letters import REASONS, DeadLetter

from .context import Fleet, moment, pass_fleet, table
from .names import ACTOR, QUEUE

COMMANDS: list[click.Command] = []

#: How many of the changed letters are named in the audit.
_NAMED = 10

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _filters(function: _Function) -> _Function:
    for option in (
        click.option("--queue", type=QUEUE, help="Only of this queue."),
        click.option("--actor", type=ACTOR, help="Only of this actor."),
        click.option("--reason", type=click.Choice(REASONS), help="Only with this reason."),
    ):
        function = option(function)
    return function


@click.group()
def dead() -> None:
    """Messages that could not be processed."""


@dead.command("list")
@_filters
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most this many.")
@click.option("--after", metavar="ID", help="Continue after the letter with this id.")
@pass_fleet
def list_(
    fleet: Fleet, queue: str | None, actor: str | None, reason: str | None, limit: int, after: str | None
) -> None:
    """List dead letters, oldest first."""
    _check(fleet, queue, actor)
    letters = fleet.broker.dead_letters.list(queue, actor=actor, reason=reason, limit=limit + 1, after=after)
    is_cut, letters = len(letters) > limit, letters[:limit]
    human = table("id", "when", "queue", "actor", "reason", "error", right=("id",))
    for letter in letters:
        human.add_row(
            letter.id,
            moment(letter.time),
            letter.queue,
            letter.actor or "-",
            letter.reason + (f" ({len(letter.history) + 1}×)" if letter.history else ""),
            letter.error[:120],
        )
    fleet.show([letter.summary() for letter in letters], human if letters else "There are no dead letters.")
    if is_cut:
        fleet.note(f"There is more: --after {letters[-1].id}")


@dead.command()
@click.argument("id")
@pass_fleet
def show(fleet: Fleet, id: str) -> None:  # noqa: A002 - the option's name
    """Show one dead letter with its bytes."""
    letter = _get(fleet, id)
    body = letter.data.decode("utf-8", "backslashreplace")
    data = {
        **letter.summary(),
        "attempts": list(letter.attempts),
        "subject": letter.subject,
        "headers": dict(letter.headers),
        "data": body,
    }
    human = table("", "")
    for name, value in data.items():
        if name not in ("history", "attempts"):
            human.add_row(name, moment(letter.time) if name == "time" else str(value))
    for entry in letter.history:
        human.add_row("earlier", f"{moment(entry['time'])} {entry['reason']}: {entry['error']}")
    for attempt in letter.attempts:
        human.add_row(
            f"attempt {attempt['attempt']}",
            f"{moment(attempt['ended'])} {attempt['outcome']}: {attempt['error_type']}: {attempt['error']}",
        )
    fleet.show(data, human)


@dead.command()
@click.argument("ids", nargs=-1)
@_filters
@click.option("--all", "everything", is_flag=True, help="All that match the filters.")
@pass_fleet
def replay(
    fleet: Fleet,
    ids: tuple[str, ...],
    queue: str | None,
    actor: str | None,
    reason: str | None,
    everything: bool,
) -> None:
    """Put dead letters back on their queues: those with IDS, or --all that match the filters."""
    chosen = _choose(fleet, ids, queue, actor, reason, everything)
    replayed = _each(fleet, "replay", chosen, fleet.broker.dead_letters.replay)
    fleet.show({"replayed": replayed}, f"{len(replayed)} replayed.")


@dead.command()
@click.argument("ids", nargs=-1)
@_filters
@click.option("--all", "everything", is_flag=True, help="All that match the filters.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_fleet
def drop(
    fleet: Fleet,
    ids: tuple[str, ...],
    queue: str | None,
    actor: str | None,
    reason: str | None,
    everything: bool,
    yes: bool,
) -> None:
    """Delete dead letters for good: those with IDS, or --all that match the filters."""
    chosen = _choose(fleet, ids, queue, actor, reason, everything)
    if chosen and not yes:
        click.confirm(f"Delete {len(chosen)} dead letters for good?", abort=True, err=True)
    dropped = _each(fleet, "drop", chosen, fleet.broker.dead_letters.drop)
    fleet.show({"dropped": dropped}, f"{len(dropped)} dropped.")


def _each(
    fleet: Fleet, what: str, letters: list[DeadLetter], change_one: Callable[[DeadLetter], bool]
) -> list[str]:
    """Change dead letters; returns the ids of those that were still there."""
    if not letters:
        return []
    named = ", ".join(letter.id for letter in letters[:_NAMED]) + (" …" if len(letters) > _NAMED else "")
    done = []
    with fleet.change(what, f"dead letters {named}", len(letters)) as change:
        for letter in letters:
            if change_one(letter):
                done.append(letter.id)
                change.done += 1
    return done


def _check(fleet: Fleet, queue: str | None, actor: str | None) -> None:
    """Refuse a filter that is a typo. Of a queue that was removed there may be letters."""
    if queue is not None and not fleet.broker.dead_letters.count(queue):
        fleet.check_queue(queue)
    if actor is not None:
        fleet.check_actor(actor)


def _get(fleet: Fleet, letter_id: str) -> DeadLetter:
    letter = fleet.broker.dead_letters.get(letter_id)
    if letter is None:
        raise click.ClickException(
            f"there is no dead letter {letter_id}: it was replayed, dropped, or kept for its time."
        )
    return letter


def _choose(
    fleet: Fleet,
    ids: tuple[str, ...],
    queue: str | None,
    actor: str | None,
    reason: str | None,
    everything: bool,
) -> list[DeadLetter]:
    if bool(ids) == everything:
        raise click.UsageError("name the ids of dead letters, or say --all (with filters if wanted).")
    _check(fleet, queue, actor)
    if ids:
        return [_get(fleet, letter_id) for letter_id in ids]
    return fleet.broker.dead_letters.list(queue, actor=actor, reason=reason)


COMMANDS.append(dead)
