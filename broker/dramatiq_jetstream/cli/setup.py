"""`fleet setup`: prepares everything that a program declares, for a release step."""

from __future__ import annotations

from contextlib import nullcontext

import click

from .context import Fleet, pass_fleet, table

COMMANDS: list[click.Command] = []


@click.command()
@click.argument("modules", metavar="MODULE...", nargs=-1, required=True)
@click.option("--update", is_flag=True, help="Change what exists and differs from its declaration.")
@pass_fleet
def setup(fleet: Fleet, modules: tuple[str, ...], update: bool) -> None:
    """Create the streams, consumers and schedules that a program declares.

    The first MODULE is the program (module, or module:broker), the others are imported too.

    It can run any number of times. Without --update it changes nothing that exists and reports the differences.
    """
    broker = fleet.load(*modules)
    try:
        # Without --update nothing changes that exists, as when a worker starts.
        with fleet.change("setup", " ".join(modules), broker=broker) if update else nullcontext():
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
