"""Makes, lists and revokes API keys: ``python -m tasks.keys add|list|revoke``.

``add`` prints the key once, alone on standard output, so that it can be stored where it is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from . import app, command
from .audit import at_terminal
from .credentials import MAX_DAYS, SCOPES, ApiKey
from .events import isoformat

_DAY_MS = 86_400_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return command.run(_parser(), arguments, "The keys")


def _add(options: argparse.Namespace) -> int:
    expires_at = None if options.days is None else app.now() + options.days * _DAY_MS
    with app.audit_log().record(
        "key.make", options.name, at_terminal(), scopes=" ".join(options.scope)
    ) as act:
        key, text = app.keys().add(options.name, options.scope, options.customer, expires_at)
        act.detail["id"] = key.id
    print(f"Key {key.id} for {key.name}: {_may(key)}. It is shown this once:", file=sys.stderr)
    print(text)
    return 0


def _list(options: argparse.Namespace) -> int:
    found = app.keys().list()
    if options.json:
        for key, used in found:
            print(json.dumps({**asdict(key), "digest": None, "last_used_at": used}))
        return 0
    rows = [("id", "name", "may", "created", "last used", "state")]
    now = app.now()
    rows += [
        (key.id, key.name, _may(key), _day(key.created_at), _minute(used), _state(key, now))
        for key, used in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _revoke(options: argparse.Namespace) -> int:
    with app.audit_log().record("key.revoke", options.id, at_terminal()) as act:
        revoked = app.keys().revoke(options.id)
        act.detail["there"] = "yes" if revoked else "no"
    if not revoked:
        print(
            f"There is no key {options.id!r}: `python -m tasks.keys list` shows their ids.", file=sys.stderr
        )
        return 1
    print(f"Key {options.id} is revoked; every process refuses it within seconds.")
    return 0


def _may(key: ApiKey) -> str:
    scopes = ", ".join(key.scopes)
    return scopes if key.customer_id is None else f"{scopes} as customer {key.customer_id}"


def _state(key: ApiKey, now: int) -> str:
    if key.revoked_at is not None:
        return f"revoked {_day(key.revoked_at)}"
    if key.expires_at is None:
        return "valid"
    return f"{'valid until' if now < key.expires_at else 'expired'} {_day(key.expires_at)}"


def _day(at: int) -> str:
    return isoformat(at)[:10]


def _minute(at: int | None) -> str:
    return "never" if at is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(at / 1000))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.keys", description="API keys of the order service."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    add = commands.add_parser("add", help="make a key and print it once")
    add.add_argument("name", help="the program that uses it, for the list and the log")
    add.add_argument(
        "--scope", action="append", required=True, choices=SCOPES, help="may be given several times"
    )
    add.add_argument("--customer", help="the one customer for whom it acts; otherwise it acts for all")
    days = command.whole("days", 1, MAX_DAYS)
    add.add_argument("--days", type=days, help="days until it expires; for ever without")
    add.set_defaults(run=_add)
    lists = commands.add_parser("list", help="show all keys and when each was last used")
    lists.add_argument("--json", action="store_true", help="one JSON object a line")
    lists.set_defaults(run=_list)
    revoke = commands.add_parser("revoke", help="end a key")
    revoke.add_argument("id", help="its id, as the list shows it")
    revoke.set_defaults(run=_revoke)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
