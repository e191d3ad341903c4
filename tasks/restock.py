"""Changes the stock: ``python -m tasks.restock list|add|correct``.

An adjustment has an id: given again with ``--id``, after a command whose end was not seen, it counts once. The stock
remembers the newest adjustments of each product, with who made them and why.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence

from dramatiq.errors import BrokerError

from . import app, command
from .audit import at_terminal
from .events import isoformat
from .stock import InvalidAdjustment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except InvalidAdjustment as error:
        print(error, file=sys.stderr)
    except BrokerError as error:
        print(f"The stock cannot be read or changed: {error}", file=sys.stderr)
    finally:
        app.broker.close()
    return 1


def _list(options: argparse.Namespace) -> int:
    if options.sku is None:
        for sku, pieces in sorted(app.stock_store().available().items()):
            print(f"{sku}  {pieces}")
        return 0
    for one in app.stock_store().adjustments(options.sku):
        print(f"{isoformat(one.at)}  {one.pieces:+}  {one.by}  {one.reason}  ({one.id})")
    return 0


def _change(options: argparse.Namespace) -> int:
    stock = app.stock_store()
    adjustment_id = options.id or secrets.token_hex(6)
    change = stock.restock if options.command == "add" else stock.correct
    who = at_terminal()
    act = {"add": "product.restock", "correct": "product.correct"}[options.command]
    said = {"pieces": str(options.pieces), "adjustment": adjustment_id, "reason": options.reason}
    with app.audit_log().record(act, options.sku, who, **said):
        done = change(options.sku, options.pieces, adjustment_id, by=who.name, reason=options.reason)
    print(f"{options.sku}  {done.pieces:+} pieces  ({done.id})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.restock", description="The stock of the products.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    lists = commands.add_parser("list", help="show the stock, or the newest adjustments of a product")
    lists.add_argument("sku", nargs="?")
    lists.set_defaults(run=_list)
    add = commands.add_parser("add", help="add pieces that came in")
    correct = commands.add_parser("correct", help="set the pieces that can be sold to what was counted")
    for one in (add, correct):
        one.add_argument("sku")
        one.add_argument("pieces", type=command.pieces)
        one.add_argument(
            "--id", type=command.text, help="of the adjustment; repeated with it, it counts once"
        )
        one.set_defaults(run=_change)
    add.add_argument("--reason", type=command.text, default="restock", help="for people to read")
    correct.add_argument("--reason", type=command.text, required=True, help="for people to read")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
