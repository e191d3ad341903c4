"""`fleet setup`: prepares everything that a program declares, for a release step."""

from __future__ import annotations

import click

from dramatiq_jetstream.broker import JetStreamBroker
from dramatiq_jetstream.config import ConnectOptions
from dramatiq_jetstream.fleet.program import ProgramError, load_broker, put_on_path

from .context import Fleet, pass_fleet, table

COMMANDS: list[click.Command] = []


def load(fleet: Fleet, module: str) -> JetStreamBroker:
    """Import a program as `dramatiq` does (`module` or `module:broker`) and return its broker.

    The program itself says where its queues are; options that contradict it are refused.
    """
    put_on_path(["."])
    try:
        broker = load_broker(module)
    except ProgramError as error:
        raise click.ClickException(str(error)) from None
    if fleet.url is not None and ConnectOptions.of(fleet.url).servers != broker.connection.options.servers:
        raise click.ClickException(
            f"{module!r} connects to {broker.connection.options.display}, whatever --url says: "
            "leave it out, or change what the program connects to."
        )
    if fleet.given_namespace not in (None, broker.names.namespace):
        raise click.ClickException(
            f"{module!r} has its queues in the namespace {broker.names.namespace!r}, whatever --namespace says: "
            "leave it out, or change the program's."
        )
    return broker


@click.command()
@click.argument("module")
@click.option("--update", is_flag=True, help="Change what exists and differs.")
@pass_fleet
def setup(fleet: Fleet, module: str, update: bool) -> None:
    """Create the streams, consumers and schedules that MODULE declares.

    It can run any number of times. Without --update it changes nothing that exists and reports the differences.
    """
    broker = load(fleet, module)
    try:
        outcome = broker.setup(update=update)
    finally:
        broker.close()
    human = table("", "")
    for name, became in outcome.items():
        human.add_row(name, became)
    fleet.show(outcome, human)
    if "differs" in outcome.values():
        raise click.ClickException("something exists with another configuration; --update brings it in line.")


COMMANDS.append(setup)
