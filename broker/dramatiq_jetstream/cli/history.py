"""`fleet status`, `history` and `retry`: what becomes of messages, and another try for them."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from dramatiq_jetstream.history import OUTCOMES, Page, Record
from dramatiq_jetstream.status import MessageStatus

from .context import WATCH_SECONDS, Fleet, age, ago, moment, pass_fleet, table
from .names import ACTOR, QUEUE
from .screen import styled, visible

COMMANDS: list[click.Command] = []

_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

#: Records of different workers are stored in any order within this time.
_UNORDERED_MS = 5_000

#: After these nothing happens to a message by itself.
_OVER = frozenset({"done", "failed", "dead", "aborted", "skipped"})

_COLOURS = {"done": "green", "failed": "red", "dead": "red", "retried": "yellow", "retrying": "yellow"}


class Since(click.ParamType[int]):
    """A time: how long ago (90s, 10m, 2h, 7d), or a date and time (ISO 8601)."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        ago = re.fullmatch(r"(\d+)([smhd])", value)
        if ago is not None:
            return int(time.time() * 1000) - int(ago[1]) * _UNITS_MS[ago[2]]
        try:
            return int(datetime.fromisoformat(value).timestamp() * 1000)
        except ValueError:
            self.fail(f"{value!r} is not a time: give 90s, 10m, 2h, 7d or 2026-01-31T12:00.", param, ctx)


@click.command()
@click.argument("message_id")
@click.option("--watch", is_flag=True, help="Keep showing until the message is over, or Ctrl-C.")
@pass_fleet
def status(fleet: Fleet, message_id: str, watch: bool) -> None:
    """Show the state of a message, and its recorded attempts."""
    found = fleet.broker.status(message_id)
    attempts = fleet.broker.history.of(message_id)
    if not watch:
        data = {**found.as_dict(), "attempts": [record.as_dict() for record in attempts]}
        fleet.show(data, _described(found, attempts))
        if found.state == "unknown" and not fleet.as_json:
            fleet.note("It never was, is over without a record, or waits in a long queue.")
        return
    while True:
        fleet_line = json.dumps(found.as_dict(), default=str)
        if fleet.as_json:
            click.echo(fleet_line)
        else:
            fleet.show(None, _described(found, attempts))
        while found.state not in _OVER:
            time.sleep(WATCH_SECONDS)
            found = fleet.broker.status(message_id)
            if json.dumps(found.as_dict(), default=str) != fleet_line:
                break
        else:
            return
        attempts = fleet.broker.history.of(message_id)


def _described(found: MessageStatus, attempts: list[Record]) -> Table:
    human = table("", "")
    human.add_row("message", found.message_id)
    human.add_row("state", _coloured(found.state))
    for name, value in (
        ("queue", found.queue),
        ("actor", found.actor),
        ("attempt", found.attempt),
        ("since", None if found.since is None else f"{moment(found.since)}, for {age(ago(found.since))}"),
        ("due", None if found.due is None else moment(found.due)),
        ("worker", found.worker),
        ("error", found.error),
        ("dead letter", found.letter),
    ):
        if value is not None:
            human.add_row(name, str(value))
    if found.progress is not None:
        human.add_row("progress", f"{found.progress.done:g} {found.progress.note}".rstrip())
    for record in attempts:
        error = f" {record.error_type}: {record.error}" if record.error_type else ""
        human.add_row(
            f"attempt {record.attempt}",
            Text.assemble(
                f"{moment(record.began)} ",
                _coloured(record.outcome),
                visible(f" after {age(record.duration)} at {record.worker}{error}"),
            ),
        )
        for line in record.logs:
            human.add_row("", styled(line, "dim"))
    if attempts and attempts[-1].traceback:
        human.add_row("traceback", attempts[-1].traceback.rstrip())
    return human


def _coloured(state: str) -> Text:
    return styled(state, _COLOURS.get(state, ""))


@click.command()
@click.option("--actor", type=ACTOR, help="Only of this actor.")
@click.option("--queue", type=QUEUE, help="Only of this queue.")
@click.option(
    "--outcome", type=click.Choice(OUTCOMES), multiple=True, help="Only with this outcome; can be repeated."
)
@click.option(
    "--since",
    type=Since(),
    help="Only attempts that ended since then: 90s, 10m, 2h, 7d ago, or a date and time.",
)
@click.option("--error", metavar="TEXT", help="Only with this text in the error or its traceback.")
@click.option(
    "--limit", type=click.IntRange(1, 1_000), default=50, show_default=True, help="At most this many."
)
@click.option("--cursor", help="Continue after the page that named it.")
@click.option("--watch", is_flag=True, help="Show further attempts as they end, until Ctrl-C.")
@pass_fleet
def history(
    fleet: Fleet,
    actor: str | None,
    queue: str | None,
    outcome: tuple[str, ...],
    since: int | None,
    error: str | None,
    limit: int,
    cursor: str | None,
    watch: bool,
) -> None:
    """Show recorded attempts, the newest first."""
    filters: dict[str, Any] = {
        "actor": None if actor is None else fleet.check_actor(actor),
        "queue": None if queue is None else fleet.check_queue(queue),
        "outcome": outcome or None,
        "error": error,
    }

    def search(**more: Any) -> Page:
        return fleet.broker.history.search(**filters, **more)

    page = search(since=since, limit=limit, cursor=cursor)
    if watch:
        _follow(fleet, page.records, search)
    shown = _attempts(page.records)
    fleet.show(
        [record.as_dict() for record in page.records],
        shown if page.records else f"Nothing is recorded in {fleet.where}.",
    )
    if page.cursor is not None:
        reached = "" if page.reached is None else f" back to {moment(page.reached)}"
        fleet.note(f"Searched{reached}. There is more: --cursor {page.cursor}")


def _follow(fleet: Fleet, records: list[Record], search: Any) -> None:
    """Print records as they come, each once."""
    header = True
    # By the clocks of workers, which may be behind this one.
    newest = max((record.ended for record in records), default=int(time.time() * 1000) - 60_000)
    known: dict[tuple[str, int], int] = {}
    while True:
        if fleet.as_json:
            for record in reversed(records):
                click.echo(json.dumps(record.as_dict()))
        elif records:
            shown = _attempts(records[::-1])
            shown.show_header = header
            fleet.show(None, shown)
            header = False
        known |= {(record.message_id, record.began): record.ended for record in records}
        newest = max([newest, *known.values()])
        known = {key: ended for key, ended in known.items() if ended >= newest - _UNORDERED_MS}
        time.sleep(WATCH_SECONDS)
        page = search(since=newest - _UNORDERED_MS, limit=1_000)
        records = [r for r in page.records if (r.message_id, r.began) not in known]


def _attempts(records: list[Record]) -> Table:
    human = table(
        "ended", "outcome", "actor", "queue", "attempt", "took", "message", "error", right=("attempt", "took")
    )
    for record in records:
        human.add_row(
            moment(record.ended),
            _coloured(record.outcome),
            record.actor,
            record.queue,
            str(record.attempt),
            age(record.duration),
            record.message_id,
            f"{record.error_type}: {record.error}"[:120] if record.error_type else "",
        )
    return human


@click.command()
@click.argument("message_ids", nargs=-1, required=True)
@pass_fleet
def retry(fleet: Fleet, message_ids: tuple[str, ...]) -> None:
    """Try messages again now: replay the dead letter, or end the delay of a retry or message."""
    broker = fleet.broker
    done: dict[str, str] = {}
    refused: dict[str, str] = {}
    for message_id in message_ids:
        found = broker.status(message_id)
        if found.letter is None and found.due is None:
            refused[message_id] = found.state
            continue
        with fleet.change("retry", f"message {message_id}") as change:
            if found.letter is not None and broker.dead_letters.replay(found.letter):
                done[message_id] = "replayed"
            elif found.due is not None and broker.run_now(message_id, found.queue):
                done[message_id] = "run now"
            else:
                refused[message_id] = found.state
            change.done = int(message_id in done)
    fleet.show({"retried": done}, "\n".join(f"{name}: {what}." for name, what in done.items()))
    if refused:
        states = ", ".join(f"{message_id} is {state}" for message_id, state in refused.items())
        raise click.ClickException(f"only what is dead, delayed or retrying can be tried again: {states}.")


COMMANDS += [status, history, retry]
