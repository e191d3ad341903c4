"""Says what is sold, and at which price: ``python -m tasks.sell list|show|set|withdraw|drop|import``.

A change may be repeated: under the same ``--id`` it is made once, and a product that is as it is wanted stays so.
`tasks.restock` looks after the stock alone.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from dramatiq.errors import BrokerError

from . import app, command, money
from .assortment import ChangeIdUsed, InvalidProduct, NoSuchProduct, Pieces, Wanted
from .audit import at_terminal
from .catalogue import CURRENCY
from .events import isoformat
from .model import Flaw
from .moments import moment_of
from .product_files import COLUMNS, InvalidFile, ProductFile, RowDone, RowError
from .products import StoredProduct
from .stock import StockBusy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (InvalidProduct, InvalidFile, NoSuchProduct, ChangeIdUsed, StockBusy) as error:
        print(error, file=sys.stderr)
    except BrokerError as error:
        print(f"The products cannot be read or changed: {error} Doing it again is safe.", file=sys.stderr)
    except OSError as error:
        print(f"The file cannot be read: {error}", file=sys.stderr)
    finally:
        app.broker.close()
    return 1


def _list(options: argparse.Namespace) -> int:
    levels, now = app.stock_store().available(), app.now()
    for product in app.catalogue().products():
        price = product.price_at(now)
        if price is None and not options.all:
            continue
        if options.json:
            print(json.dumps(_as_json(product, levels.get(product.sku, 0))))
        else:
            cost = "not sold" if price is None else money.to_text(price, CURRENCY)
            print(f"{product.sku}  {product.name}  {cost}  {levels.get(product.sku, 0)}")
    return 0


def _as_json(product: StoredProduct, stock: int) -> dict[str, object]:
    return {
        "sku": product.sku,
        "name": product.name,
        "category": product.category,
        "prices": [{"from": isoformat(one.since), "unit_price_minor": one.amount} for one in product.prices],
        "stock": stock,
    }


def _show(options: argparse.Namespace) -> int:
    goods = app.assortment().look(options.sku)
    if goods.product is None:
        raise NoSuchProduct(
            f"There is no product {options.sku!r}: `python -m tasks.sell list --all` shows them."
        )
    product = goods.product
    print(f"{product.sku}  {product.name}  ({product.category})  {goods.level.pieces} pieces")
    for price in product.prices:
        cost = "not sold" if price.amount is None else money.to_text(price.amount, CURRENCY)
        print(f"from {isoformat(price.since)}  {cost}")
    changes = [(one.at, one.by, one.what or "was so already", one.id) for one in product.changes]
    changes += [
        (one.at, one.by, f"{one.pieces:+} pieces ({one.reason})", one.id) for one in goods.level.adjustments
    ]
    for at, by, what, change_id in sorted(changes):
        print(f"{isoformat(at)}  {by}  {what}  ({change_id})")
    return 0


def _set(options: argparse.Namespace) -> int:
    pieces = None
    if options.count is not None and options.reason is None:
        raise InvalidProduct(Flaw("--reason", "is needed for a count that is corrected."))
    if options.add is not None or options.count is not None:
        pieces = Pieces(options.reason or "restock", options.add, options.count)
    return _change(
        options,
        Wanted(
            name=options.name,
            category=options.category,
            price=options.price,
            since=options.since,
            pieces=pieces,
        ),
    )


def _withdraw(options: argparse.Namespace) -> int:
    return _change(options, Wanted(withdrawn=True))


def _drop(options: argparse.Namespace) -> int:
    return _change(options, Wanted(dropped=options.since))


def _change(options: argparse.Namespace, wanted: Wanted) -> int:
    change_id = options.id or secrets.token_hex(6)
    done = app.assortment().change(options.sku, change_id, wanted, at_terminal())
    said = "nothing is to be changed" if not done.what else done.what
    print(f"{options.sku}  {said}{'  (was done before)' if done.repeated else ''}  ({change_id})")
    return 0


def _import(options: argparse.Namespace) -> int:
    content = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
    file = ProductFile(content, options.id)
    status = 0
    rows: list[RowDone | RowError] = []
    if options.dry_run:
        rows += file.plan(app.assortment())
    for row in rows or file.run(app.assortment(), at_terminal()):
        if isinstance(row, RowError):
            print(row, file=sys.stderr)
            status = 1
        else:
            print(f"line {row.line}  {row.sku}  {_said(row)}")
    if options.dry_run:
        print(f"{len(rows)} rows; nothing was changed.")
    return status


def _said(row: RowDone) -> str:
    return "was imported before" if row.repeated else row.what or "is so already"


def _price(text: str) -> int:
    price = money.from_text(text, CURRENCY)
    if price is None:
        raise argparse.ArgumentTypeError(f"a price is an amount in {CURRENCY} such as 12.90")
    return price


def _moment(text: str) -> int:
    moment = moment_of(text)
    if moment is None:
        raise argparse.ArgumentTypeError("a time is such as 2026-12-01T08:00:00Z, or a day (in UTC)")
    return moment


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.sell", description="The products and their prices."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    lists = commands.add_parser("list", help="show what is sold: sku, name, price, pieces")
    lists.add_argument("--all", action="store_true", help="what is not sold any more, or not yet, too")
    lists.add_argument("--json", action="store_true", help="one JSON object a line, with all prices")
    lists.set_defaults(run=_list)
    show = commands.add_parser("show", help="show a product, its prices and its newest changes")
    show.add_argument("sku")
    show.set_defaults(run=_show)
    put = commands.add_parser("set", help="add a product, or change it")
    put.add_argument("--name", type=command.text)
    put.add_argument("--category", type=command.text)
    put.add_argument("--price", type=_price, help=f"of one piece, in {CURRENCY}, such as 12.90")
    put.add_argument(
        "--from", dest="since", type=_moment, help="when the price begins to hold; now without it"
    )
    stock = put.add_mutually_exclusive_group()
    stock.add_argument("--add", type=command.pieces, help="pieces that came in")
    stock.add_argument("--count", type=command.pieces, help="pieces that can be sold, as they were counted")
    put.add_argument("--reason", type=command.text, help="of the change of the stock")
    put.set_defaults(run=_set)
    withdraw = commands.add_parser(
        "withdraw", help="sell a product no more; `set` with a price sells it again"
    )
    withdraw.set_defaults(run=_withdraw)
    drop = commands.add_parser("drop", help="drop a planned price")
    drop.add_argument("--from", dest="since", type=_moment, required=True, help="when it would begin to hold")
    drop.set_defaults(run=_drop)
    for one in (put, withdraw, drop):
        one.add_argument("sku")
        one.add_argument("--id", type=command.text, help="of the change; repeated with it, it is made once")
    imports = commands.add_parser("import", help="import products, prices and stock from a CSV file")
    imports.add_argument(
        "file", help=f"with a first line that names columns: {', '.join(COLUMNS)}; - is standard input"
    )
    imports.add_argument("--dry-run", action="store_true", help="say what it would do, and change nothing")
    imports.add_argument("--id", type=command.text, help="of the import; without it the digest of the file")
    imports.set_defaults(run=_import)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
