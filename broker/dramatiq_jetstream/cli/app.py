"""The command line itself: options that all commands share, and how errors become one line."""

from __future__ import annotations

import logging
import sys

import click
from dramatiq.errors import DramatiqError

from dramatiq_jetstream.errors import InvalidName, InvalidOption
from dramatiq_jetstream.testing import ServerError

from . import dead, delayed, doctor, messages, queues, scale_hint, server, setup, ui, work, workers
from .context import Fleet

__all__ = ["fleet", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--url", metavar="URL", help="Server addresses, separated by commas. [NATS_URL, then localhost]"
)
@click.option("--namespace", help="Whose queues. [dramatiq]")
@click.option("--credentials", metavar="FILE", help="Path of a .creds file. [NATS_CREDS]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.version_option(package_name="dramatiq-jetstream")
@click.pass_context
def fleet(
    context: click.Context, url: str | None, namespace: str | None, credentials: str | None, as_json: bool
) -> None:
    """Look after Dramatiq queues on NATS JetStream."""
    context.obj = Fleet(url=url, given_namespace=namespace, credentials=credentials, as_json=as_json)
    context.call_on_close(context.obj.close)


for module in (server, setup, work, scale_hint, workers, queues, dead, delayed, messages, ui, doctor):
    for command in module.COMMANDS:
        fleet.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run `fleet`; the console script."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    # `--json` may stand anywhere, as people type it last.
    if "--json" in arguments:
        arguments = ["--json", *(argument for argument in arguments if argument != "--json")]
    try:
        status = fleet.main(args=arguments, prog_name="fleet", standalone_mode=False)
        if isinstance(status, int) and status:
            sys.exit(status)  # what `Exit` was raised with comes back here
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        click.echo(f"fleet: {error.format_message()}", err=True)
        sys.exit(2 if isinstance(error, click.UsageError) else 1)
    except (InvalidName, InvalidOption) as error:
        click.echo(f"fleet: {error}", err=True)
        sys.exit(2)
    except (DramatiqError, ServerError) as error:
        click.echo(f"fleet: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(0)
