"""What the commands share: the broker they work on and how they print."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import click
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table

from dramatiq_jetstream import audit
from dramatiq_jetstream.audit import Change
from dramatiq_jetstream.broker import JetStreamBroker
from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.errors import TopologyMissing
from dramatiq_jetstream.fleet.program import ProgramError, load_broker, put_on_path
from dramatiq_jetstream.jetstream.inventory import queue_names
from dramatiq_jetstream.workers import WorkerInfo, list_workers

from .screen import Screen, visible

__all__ = ["Fleet", "Rows", "age", "ago", "moment", "pass_fleet", "show_rows", "table"]

Rows = list[dict[str, Any]]

#: Columns that may be folded where a terminal is narrow; all others are printed as they are.
_FLEXIBLE = frozenset({"", "arguments", "error", "queues"})

#: How often `--watch` looks.
WATCH_SECONDS = 1.0


@dataclass
class Fleet:
    """The options that all commands share, and the broker made of them on first use."""

    url: str | None = None
    given_namespace: str | None = None
    credentials: str | None = None
    program: str | None = None
    as_json: bool = False
    _broker: JetStreamBroker | None = field(default=None, repr=False)

    @property
    def namespace(self) -> str:
        if self._broker is not None:
            return self._broker.names.namespace
        return "dramatiq" if self.given_namespace is None else self.given_namespace

    @property
    def where(self) -> str:
        """The namespace to people, and how another one is named where none was."""
        named = self.given_namespace is not None or self.program is not None
        hint = "" if named else " (--namespace or FLEET_NAMESPACE names another)"
        return f"namespace {self.namespace!r}{hint}"

    @property
    def console(self) -> Screen:
        if sys.stdout.isatty():
            return Screen(file=sys.stdout)
        return Screen(file=sys.stdout, soft_wrap=True, width=1_000)

    @property
    def broker(self) -> JetStreamBroker:
        """A connected broker: the program's that `--broker` names, or one that uses what exists and creates nothing."""
        if self._broker is None:
            if self.program is not None:
                self._broker = self.load(self.program)
            else:
                self._broker = JetStreamBroker(
                    self.url,
                    namespace=self.namespace,
                    credentials=self.credentials,
                    declare=False,
                    middleware=[],
                )
            self._broker.connection.connect()  # or each command would wait for a server that is not there
        return self._broker

    def load(self, *modules: str) -> JetStreamBroker:
        """Import a program as `dramatiq` does and return its broker: `module` or `module:broker`, then further modules.

        A program says itself where its queues are; options that say otherwise are refused.
        """
        module, *others = (name.strip() for given in modules for name in given.split(","))
        put_on_path(["."])
        try:
            broker = load_broker(module, others)
        except ProgramError as error:
            raise click.ClickException(str(error)) from None
        if self.url is not None and ConnectOptions.of(self.url).servers != broker.connection.options.servers:
            raise click.ClickException(
                f"{module!r} connects to {broker.connection.options.display}, whatever --url says: "
                "leave it out, or change what the program connects to."
            )
        if self.given_namespace not in (None, broker.names.namespace):
            raise click.ClickException(
                f"{module!r} has its queues in the namespace {broker.names.namespace!r}, whatever --namespace says: "
                "leave it out, or change the program's."
            )
        return broker

    def queue_names(self) -> list[str]:
        return queue_names(self.broker.connection, self.broker.names)

    def check_queue(self, queue: str) -> str:
        """Return `queue` if it exists on the server, else say which do."""
        existing = self.queue_names()
        if queue not in existing:
            known = ", ".join(existing) or "none"
            raise click.ClickException(
                f"there is no queue {queue!r} in namespace {self.namespace!r}; there are: {known}."
            )
        return queue

    def workers(self) -> list[WorkerInfo]:
        return list_workers(self.broker)

    def seen_actors(self) -> set[str]:
        """The actors of the program that `--broker` names, of what runs, and of what ended lately."""
        running = {message.actor for worker in self.workers() for message in worker.running}
        ended = {record.actor for record in self.broker.history.search(limit=200).records}
        return running | ended | set(self.broker.actors)

    def check_actor(self, actor: str) -> str:
        """Return `actor` if the program has it, or the namespace has a trace of it, else say which it has."""
        broker = self.broker
        seen = self.seen_actors()
        if (
            actor in seen
            or broker.history.search(actor=actor, limit=1).records
            or broker.dead_letters.list(actor=actor, limit=1)
        ):
            return actor
        known = ", ".join(sorted(seen)) or "none"
        raise click.ClickException(
            f"there is no trace of an actor {actor!r} in namespace {self.namespace!r}; seen were: {known}. "
            "--broker MODULE names the program that has it."
        )

    @contextmanager
    def change(
        self, what: str, target: str, planned: int = 1, *, broker: JetStreamBroker | None = None
    ) -> Iterator[Change]:
        """Record in the audit what a command changes in the block: by which user of which machine.

        Parameters:
          planned: How many messages, schedules or streams it is to change.
          broker: Through what, when it is not this fleet's own.

        Raises:
          BrokerConnectionError: When the record is not known to be stored; the block was not entered.
        """
        broker = broker or self.broker
        recorded = partial(
            audit.record,
            broker,
            who=_user(),
            what=what,
            target=target,
            planned=planned,
            via=audit.COMMAND,
            host=socket.gethostname(),
        )
        with ExitStack() as recording:
            try:
                change = recording.enter_context(recorded())
            except TopologyMissing:  # the first change of this namespace
                audit.declare(broker)
                change = recording.enter_context(recorded())
            yield change

    def show(self, data: Any, human: Any) -> None:
        """Print `data` as JSON if that was asked for, else `human`, a table or a text."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2, default=str))
            return
        console = self.console
        if isinstance(human, Table):
            # What cannot be folded is left to the terminal, which breaks lines and lets them be copied.
            needed = Measurement.get(console, console.options.update(width=1_000), human).minimum
            console.print(human, width=max(console.width, needed), crop=False)
        else:
            console.print(human)

    def note(self, text: str) -> None:
        """Say something beside the output, on standard error."""
        click.echo(visible(text), err=True)

    def close(self) -> None:
        if self._broker is not None:
            self._broker.close()


def _user() -> str:
    """The user of the machine who runs the command."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"user {os.getuid()}"


pass_fleet = click.make_pass_decorator(Fleet)


def show_rows(
    fleet: Fleet, read: Callable[[], Rows], human: Callable[[Rows], Table], empty: str, *, watch: bool
) -> None:
    """Print what `read` returns; with `watch` again and again, as JSON one object a line."""
    rows = read()
    if not watch:
        fleet.show(rows, human(rows) if rows else empty)
    elif fleet.as_json:
        while True:
            for row in rows:
                click.echo(json.dumps(row, default=str))
            time.sleep(WATCH_SECONDS)
            rows = read()
    else:
        with Live(human(rows), console=fleet.console, refresh_per_second=4) as live:
            while True:
                time.sleep(WATCH_SECONDS)
                live.update(human(read()))


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    made = Table(
        title=title,
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
        show_header=any(columns),
    )
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column not in _FLEXIBLE,
        )
    return made


def moment(milliseconds: int | None) -> str:
    """A time for people, in their zone."""
    if not milliseconds:
        return "-"
    return datetime.fromtimestamp(milliseconds / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def age(milliseconds: int | None) -> str:
    """A duration for people."""
    if milliseconds is None:
        return "-"
    if milliseconds < 1_000:
        return f"{milliseconds} ms"
    return str(timedelta(seconds=milliseconds // 1000))


def ago(milliseconds: int) -> int:
    """Milliseconds since a time."""
    return max(0, int(time.time() * 1000) - milliseconds)
