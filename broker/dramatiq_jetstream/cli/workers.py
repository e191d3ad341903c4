"""`fleet workers` and `fleet running`: the live workers, and the messages that they run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import click
from rich.live import Live
from rich.table import Table

from dramatiq_jetstream.errors import NotFound, TopologyMissing
from dramatiq_jetstream.workers import WorkerInfo, list_workers

from .context import Fleet, age, pass_fleet, table

COMMANDS: list[click.Command] = []

_Rows = list[dict[str, Any]]


def _workers(fleet: Fleet) -> list[WorkerInfo]:
    try:
        return list_workers(fleet.broker)
    except (NotFound, TopologyMissing):
        return []  # no worker of this namespace was ever there


def _show(
    fleet: Fleet,
    read: Callable[[], list[dict[str, Any]]],
    human: Callable[[list[dict[str, Any]]], Table],
    empty: str,
    watch: bool,
) -> None:
    found = read()
    if not watch or fleet.as_json:
        fleet.show(found, human(found) if found else empty)
        return
    with Live(human(found), console=fleet.console, refresh_per_second=4) as live:
        while True:
            time.sleep(1)
            live.update(human(read()))


@click.command()
@click.option("--watch", is_flag=True, help="Keep showing, once a second, until Ctrl-C.")
@pass_fleet
def workers(fleet: Fleet, watch: bool) -> None:
    """Show the worker processes that are alive."""

    def human(found: _Rows) -> Table:
        numbers = ("threads", "running", "done", "failed", "memory", "up")
        shown = table("host", "pid", "queues", *numbers, right=("pid", *numbers))
        for worker in found:
            shown.add_row(
                worker["host"],
                str(worker["pid"]),
                ", ".join(worker["queues"]),
                str(worker["threads"]),
                str(len(worker["running"])),
                str(worker["done"]),
                f"[red]{worker['failed']}[/red]" if worker["failed"] else "0",
                f"{worker['rss'] / 1e6:.0f} MB",
                age(_since(worker["since"])),
            )
        return shown

    empty = f"No worker of namespace {fleet.namespace!r} is alive."
    _show(fleet, lambda: [dataclasses.asdict(worker) for worker in _workers(fleet)], human, empty, watch)


@click.command()
@click.option("--watch", is_flag=True, help="Keep showing, once a second, until Ctrl-C.")
@pass_fleet
def running(fleet: Fleet, watch: bool) -> None:
    """Show the running messages, the oldest first."""

    def read() -> _Rows:
        found = [
            {**dataclasses.asdict(message), "host": worker.host, "pid": worker.pid, "worker": worker.id}
            for worker in _workers(fleet)
            for message in worker.running
        ]
        return sorted(found, key=lambda message: message["since"])

    def human(found: _Rows) -> Table:
        shown = table(
            "message", "actor", "queue", "attempt", "for", "worker", "arguments", right=("attempt", "for")
        )
        for message in found:
            shown.add_row(
                message["message_id"],
                message["actor"],
                message["queue"],
                str(message["attempt"]),
                age(_since(message["since"])),
                f"{message['host']}:{message['pid']}",
                message["arguments"],
            )
        return shown

    _show(fleet, read, human, f"Nothing is running in namespace {fleet.namespace!r}.", watch)


def _since(milliseconds: int) -> int:
    return max(0, int(time.time() * 1000) - milliseconds)


COMMANDS += [workers, running]
