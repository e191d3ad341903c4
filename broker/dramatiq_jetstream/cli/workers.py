"""`fleet workers` and `fleet running`: the live workers, and the messages that they run."""

from __future__ import annotations

import dataclasses

import click
from rich.table import Table

from .context import Fleet, Rows, age, ago, pass_fleet, show_rows, table
from .screen import styled

COMMANDS: list[click.Command] = []


@click.command()
@click.option("--watch", is_flag=True, help="Keep showing, once a second, until Ctrl-C.")
@pass_fleet
def workers(fleet: Fleet, watch: bool) -> None:
    """Show the worker processes that are alive."""

    def human(found: Rows) -> Table:
        numbers = ("threads", "running", "done", "failed", "memory", "up")
        shown = table("host", "pid", "version", "queues", *numbers, right=("pid", *numbers))
        for worker in found:
            shown.add_row(
                worker["host"],
                str(worker["pid"]),
                worker["program_version"] or "-",
                ", ".join(worker["queues"]),
                str(worker["threads"]),
                str(len(worker["running"])),
                str(worker["done"]),
                styled(str(worker["failed"]), "red" if worker["failed"] else ""),
                f"{worker['rss'] / 1e6:.0f} MB",
                age(ago(worker["since"])),
            )
        return shown

    def read() -> Rows:
        return [dataclasses.asdict(worker) for worker in fleet.workers()]

    show_rows(fleet, read, human, f"No worker is alive in {fleet.where}.", watch=watch)


@click.command()
@click.option("--watch", is_flag=True, help="Keep showing, once a second, until Ctrl-C.")
@pass_fleet
def running(fleet: Fleet, watch: bool) -> None:
    """Show the running messages, the oldest first."""

    def read() -> Rows:
        found = [
            {**dataclasses.asdict(message), "host": worker.host, "pid": worker.pid, "worker": worker.id}
            for worker in fleet.workers()
            for message in worker.running
        ]
        return sorted(found, key=lambda message: message["since"])

    def human(found: Rows) -> Table:
        numbers = ("attempt", "delivery", "for")
        shown = table("message", "actor", "queue", *numbers, "progress", "worker", "arguments", right=numbers)
        for message in found:
            shown.add_row(
                message["message_id"],
                message["actor"],
                message["queue"],
                str(message["attempt"]),
                styled(str(message["deliveries"]), "yellow" if message["deliveries"] > 1 else ""),
                age(ago(message["since"])),
                _progress(message["progress"]),
                f"{message['host']}:{message['pid']}",
                message["arguments"],
            )
        return shown

    show_rows(fleet, read, human, f"Nothing is running in namespace {fleet.namespace!r}.", watch=watch)


def _progress(said: dict[str, float | str | None] | None) -> str:
    if said is None:
        return "-"
    of = "" if said["total"] is None else f"/{said['total']:g}"
    return f"{said['done']:g}{of} {said['note']}".rstrip()


COMMANDS += [workers, running]
