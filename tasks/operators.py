"""Manages the people who sign in with a password: ``python -m tasks.operators set|list|remove``.

``set`` asks for the password at a terminal, and reads it from the first line of standard input elsewhere.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence

from . import app, command
from .audit import at_terminal
from .credentials import SCOPES, InvalidCredential
from .events import isoformat


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return command.run(_parser(), arguments, "The operators")


def _set(options: argparse.Namespace) -> int:
    password, scopes = _password(), options.scope or ["operate"]
    with app.audit_log().record("operator.set", options.name, at_terminal(), scopes=" ".join(scopes)):
        operator = app.operators().set(options.name, password, scopes)
    print(f"{operator.name} can sign in and may: {', '.join(operator.scopes)}.")
    return 0


def _password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise InvalidCredential("The two passwords differ; nothing was changed.")
    return password


def _list(_: argparse.Namespace) -> int:
    for operator in app.operators().list():
        print(f"{operator.name}  {', '.join(operator.scopes)}  since {isoformat(operator.changed_at)[:10]}")
    return 0


def _remove(options: argparse.Namespace) -> int:
    with app.audit_log().record("operator.remove", options.name, at_terminal()) as act:
        removed = app.operators().remove(options.name)
        act.detail["there"] = "yes" if removed else "no"
    if not removed:
        print(f"There is no operator {options.name!r}.", file=sys.stderr)
        return 1
    print(f"{options.name} is removed; their sessions end within seconds.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.operators",
        description="People who sign in to the order service with a password.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    put = commands.add_parser("set", help="make an operator, or change password and scopes of one")
    put.add_argument("name")
    put.add_argument(
        "--scope", action="append", choices=SCOPES, help="may be given several times; operate by default"
    )
    put.set_defaults(run=_set)
    commands.add_parser("list", help="show all operators").set_defaults(run=_list)
    remove = commands.add_parser("remove", help="remove an operator")
    remove.add_argument("name")
    remove.set_defaults(run=_remove)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
