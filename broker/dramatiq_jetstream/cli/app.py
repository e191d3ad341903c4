"""The command line itself: options that all commands share, and how errors become one line."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click
from dramatiq.errors import DramatiqError

from dramatiq_jetstream.errors import InvalidName, InvalidOption
from dramatiq_jetstream.testing import ServerError

from . import (
    dead,
    delayed,
    doctor,
    history,
    messages,
    queues,
    remove,
    scale_hint,
    schedules,
    server,
    setup,
    ui,
    work,
    workers,
)
from .context import Fleet
from .screen import visible

__all__ = ["fleet", "main"]


def _note(context: click.Context, option: click.Parameter, value: Any) -> None:
    """Keep an option for all commands; a later one counts."""
    if value not in (None, False):
        setattr(context.ensure_object(Fleet), option.name or "", value)


def _shared(*, first: bool) -> list[click.Option]:
    """The options of all commands, to stand before a command or after it. Only the `first` ones ask the environment."""
    shared: dict[str, Any] = {"expose_value": False, "callback": _note}
    return [
        click.Option(
            ["--url"],
            metavar="URL",
            help="Server addresses, separated by commas. [NATS_URL, then localhost]",
            **shared,
        ),
        click.Option(
            ["--namespace", "given_namespace"],
            metavar="NAME",
            envvar="FLEET_NAMESPACE" if first else None,
            help="The namespace of the queues. [FLEET_NAMESPACE, then the program's, then dramatiq]",
            **shared,
        ),
        click.Option(
            ["--broker", "program"],
            metavar="MODULE",
            help="A program, as module or module:broker, whose connection, namespace and actors to use; further "
            "modules of it after commas.",
            **shared,
        ),
        click.Option(["--credentials"], metavar="FILE", help="Path of a .creds file. [NATS_CREDS]", **shared),
        click.Option(["--json", "as_json"], is_flag=True, help="Print JSON.", **shared),
    ]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    invoke_without_command=True,
    params=_shared(first=True),
)
@click.version_option(package_name="dramatiq-jetstream")
@click.pass_context
def fleet(context: click.Context) -> None:
    """Look after Dramatiq queues on NATS JetStream.

    The options below work before and after the command.
    """
    context.call_on_close(context.ensure_object(Fleet).close)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _share_options(command: click.Command) -> None:
    """Have a command, and those below it, take the options of all commands too."""
    taken = {name for param in command.params for name in param.opts}
    command.params += [option for option in _shared(first=False) if taken.isdisjoint(option.opts[:1])]
    if isinstance(command, click.Group):
        for below in command.commands.values():
            _share_options(below)


for module in (
    server,
    setup,
    work,
    scale_hint,
    workers,
    queues,
    messages,
    history,
    dead,
    delayed,
    schedules,
    remove,
    ui,
    doctor,
):
    for command in module.COMMANDS:
        fleet.add_command(command)
        if module is not work:  # there the program says everything itself
            _share_options(command)


def main(arguments: list[str] | None = None) -> None:
    """Run `fleet`; the console script."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = fleet.main(args=arguments, prog_name="fleet", standalone_mode=False)
        if isinstance(status, int) and status:
            sys.exit(status)  # what `Exit` was raised with comes back here
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        click.echo(f"fleet: {visible(error.format_message())}", err=True)
        sys.exit(2 if isinstance(error, click.UsageError) else 1)
    except (InvalidName, InvalidOption) as error:
        click.echo(f"fleet: {visible(str(error))}", err=True)
        sys.exit(2)
    except (DramatiqError, ServerError) as error:
        click.echo(f"fleet: {visible(str(error))}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(0)
