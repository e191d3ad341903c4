"""What the commands share: the broker they work on and how they print."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dramatiq_jetstream.broker import JetStreamBroker
from dramatiq_jetstream.jetstream.inventory import queue_names

__all__ = ["Fleet", "age", "moment", "pass_fleet"]


@dataclass
class Fleet:
    """The options given before the command, and the broker made of them on first use."""

    url: str | None
    given_namespace: str | None
    credentials: str | None
    as_json: bool
    _broker: JetStreamBroker | None = field(default=None, repr=False)

    @property
    def namespace(self) -> str:
        return "dramatiq" if self.given_namespace is None else self.given_namespace

    @property
    def console(self) -> Console:
        return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty())

    @property
    def broker(self) -> JetStreamBroker:
        """A connected broker that uses what exists and creates nothing."""
        if self._broker is None:
            self._broker = JetStreamBroker(
                self.url,
                namespace=self.namespace,
                credentials=self.credentials,
                declare=False,
                middleware=[],
            )
            self._broker.connection.connect()  # or each command would wait for a server that is not there
        return self._broker

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

    def show(self, data: Any, human: Any) -> None:
        """Print `data` as JSON if that was asked for, else `human`, a table or a text."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2, default=str))
        else:
            self.console.print(human, highlight=False)

    def close(self) -> None:
        if self._broker is not None:
            self._broker.close()


pass_fleet = click.make_pass_decorator(Fleet)


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
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
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
