"""`fleet send`, `abort` and `progress`: single messages."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
from dramatiq.message import Message

from dramatiq_jetstream.errors import NotFound
from dramatiq_jetstream.progress import read_progress
from dramatiq_jetstream.status import LOOKED_AT

from .context import Fleet, moment, pass_fleet
from .names import ACTOR, QUEUE

COMMANDS: list[click.Command] = []


@click.command()
@click.argument("actor", type=ACTOR)
@click.argument("arguments", metavar="ARGS", default="[]")
@click.option("--queue", type=QUEUE, help="The queue to send to; by default the actor's own, with --broker.")
@click.option("--delay", type=click.IntRange(0), metavar="MS", help="Milliseconds to wait before it runs.")
@pass_fleet
def send(fleet: Fleet, actor: str, arguments: str, queue: str | None, delay: int | None) -> None:
    """Send a message to ACTOR. ARGS is JSON: a list of arguments, an object of named ones, or one value.

    --broker MODULE names the program that has the actor; without it, --queue says where the message goes.
    """
    args, kwargs = _arguments(arguments)
    if not actor:
        raise click.UsageError("ACTOR is empty.")
    broker = fleet.broker
    options: dict[str, Any] = {}
    declared = broker.actors.get(actor)
    if declared is not None:
        message: Message[Any] = declared.message_with_options(args=args, kwargs=kwargs)
        message = message if queue is None else message.copy(queue_name=fleet.check_queue(queue))
    elif fleet.program is not None:
        known = ", ".join(sorted(broker.actors)) or "none"
        raise click.ClickException(f"{fleet.program!r} has no actor {actor!r}; it has: {known}.")
    elif queue is None:
        raise click.UsageError("say where to: --broker MODULE of the program that has the actor, or --queue.")
    else:
        message = Message(fleet.check_queue(queue), actor, args, kwargs, options)
    with fleet.change(
        "send", f"message {message.message_id} of {actor} on queue {message.queue_name}"
    ) as change:
        sent = broker.enqueue(message, delay=delay)
        change.done = 1
    fleet.show(
        {"message_id": sent.message_id, "queue": sent.queue_name, "actor": actor},
        f"{sent.message_id} is on {sent.queue_name}.",
    )


def _arguments(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"ARGS is not JSON: {error}. For a text write '\"…\"'.") from None
    if isinstance(given, list):
        return tuple(given), {}
    return ((), given) if isinstance(given, dict) else ((given,), {})


@click.command()
@click.argument("message_id")
@click.option("--cancel", is_flag=True, help="Leave it alone if it is running already.")
@click.option(
    "--timeout",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Milliseconds that it gets to end by itself.",
)
@pass_fleet
def abort(fleet: Fleet, message_id: str, cancel: bool, timeout: int) -> None:
    """Abort a message that waits, is delayed or runs, in a fleet whose broker has Abortable."""
    try:
        from dramatiq_abort.middleware import AbortMode

        from dramatiq_jetstream.abort import abort_message
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from None
    _check_abortable(fleet, message_id)
    mode = AbortMode.CANCEL if cancel else AbortMode.ABORT
    try:
        with fleet.change("abort", f"message {message_id}") as change:
            abort_message(message_id, fleet.broker, mode=mode, abort_timeout=timeout)
            change.done = 1
    except NotFound:
        raise click.ClickException(
            "no program of this namespace can be told to abort: its broker needs Abortable with the backend of "
            "dramatiq_jetstream.abort."
        ) from None
    fleet.show({"message_id": message_id, "abort": mode.value}, f"{message_id} was told to abort.")


def _check_abortable(fleet: Fleet, message_id: str) -> None:
    """Refuse a message that is over, or that is nowhere; in a queue too long to look through, it may yet be."""
    state = fleet.broker.status(message_id).state
    if state in ("waiting", "delayed", "running", "retrying"):
        return
    if state != "unknown":
        raise click.ClickException(f"{message_id} is {state}: there is nothing to abort.")
    stats = fleet.broker.queue_stats_of(fleet.queue_names())
    if all(queue.ready + queue.in_flight <= LOOKED_AT for queue in stats):
        raise click.ClickException(f"no message {message_id} waits, is delayed or runs.")


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


COMMANDS += [send, abort, progress]
