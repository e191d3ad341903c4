"""`fleet ui`: serves the dashboard, and makes the lines of the file with its users."""

from __future__ import annotations

import getpass
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dramatiq_jetstream import audit

from .context import Fleet, pass_fleet
from .work import Address

if TYPE_CHECKING:
    from dramatiq_jetstream.ui.access import Access

COMMANDS: list[click.Command] = []

#: Requests that are answered at once; half of them may be live pages.
THREADS = 16


@click.command()
@click.option(
    "--listen", type=Address(), default="127.0.0.1:8080", show_default=True, help="Where to listen."
)
@click.option(
    "--users",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with the people who may sign in: lines of `fleet ui-user`.",
)
@click.option("--trust-header", metavar="NAME", help="A header in which a proxy says who signed in there.")
@click.option(
    "--trust-proxy",
    multiple=True,
    metavar="NETWORK",
    help="A network from which that header is trusted. [loopback]",
)
@click.option(
    "--operator", multiple=True, metavar="NAME", help="One of these who may make changes; can be repeated."
)
@pass_fleet
def ui(
    fleet: Fleet,
    listen: tuple[str, int],
    users: Path | None,
    trust_header: str | None,
    trust_proxy: tuple[str, ...],
    operator: tuple[str, ...],
) -> None:
    """Serve the dashboard in a browser.

    On a loopback address it is open to everyone on this machine, who may look and change nothing. Anywhere else it
    needs --users, or --trust-header behind a proxy that signs people in. Put TLS before it.
    """
    try:
        import waitress

        from dramatiq_jetstream.ui import Passwords, ProxyHeader, create_app
        from dramatiq_jetstream.ui.access import is_loopback
    except ModuleNotFoundError:
        raise click.ClickException(
            "the dashboard needs further packages: pip install 'dramatiq-jetstream[ui]'."
        ) from None
    if users is not None and trust_header is not None:
        raise click.UsageError("people come in by --users or by --trust-header, not by both.")
    if (trust_proxy or operator) and trust_header is None:
        raise click.UsageError("--trust-proxy and --operator belong to --trust-header.")
    host, port = listen
    access: Access | None = None
    if users is not None:
        access = Passwords.read(users)
    elif trust_header is not None:
        networks = {"proxies": trust_proxy} if trust_proxy else {}
        access = ProxyHeader(trust_header, operators=operator, **networks)
    elif not is_loopback(host):
        raise click.ClickException(
            f"the dashboard would be open to all who reach {host}: give it --users or --trust-header, or --listen on "
            "127.0.0.1."
        )
    if access is not None:
        audit.declare(fleet.broker)
    else:
        fleet.broker.connection.connect()
    stopping = threading.Event()
    app = create_app(fleet.broker, access=access, streams=THREADS // 2, stopping=stopping)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    try:
        server: Any = waitress.create_server(
            app,
            host=host,
            port=port,
            threads=THREADS,
            ident=None,
            # By them the dashboard knows that a proxy stands before it; it believes none that it was not told to.
            clear_untrusted_proxy_headers=False,
        )
    except OSError as error:
        raise click.ClickException(f"{host}:{port} cannot be listened on: {error.strerror}.") from None
    shown = f"http://{f'[{host}]' if ':' in host else host}:{server.effective_port}"
    fleet.show({"url": shown}, f"The dashboard of {fleet.namespace} is at {shown}")
    sys.stdout.flush()

    def stop(*_: object) -> None:
        stopping.set()
        raise SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        server.run()
    finally:
        stopping.set()
        server.close()


@click.command("ui-user")
@click.argument("name")
@click.option("--role", type=click.Choice(["viewer", "operator"]), default="viewer", show_default=True)
def ui_user(name: str, role: str) -> None:
    """Print the line for NAME in the file of `fleet ui --users`.

    It asks for the password at a terminal, and reads it from the first line of standard input elsewhere.
    """
    try:
        from dramatiq_jetstream.ui import Passwords
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from None
    if not name or any(letter.isspace() or letter == ":" for letter in name) or name.startswith("#"):
        raise click.UsageError(f"{name!r} cannot be a name: it must have no blanks and no colon.")
    if sys.stdin.isatty():
        password = getpass.getpass("Password: ")
        if getpass.getpass("Again: ") != password:
            raise click.ClickException("the two passwords differ.")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    click.echo(f"{name} {role} {Passwords.hash(password)}")


COMMANDS += [ui, ui_user]
