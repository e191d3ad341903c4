"""Looks after orders: `python -m tasks.operate stuck`, `redrive`, `cancel`, `accept`, `refund`, `ship`, `return`.

    stuck      list the orders that have not moved for longer than they should, and those that may owe a refund
    redrive    have the step that an order waits for done again: replay its dead letters, or publish its event again.
               (What nothing calls any more is called again by the service itself, see `tasks.standstill`.)
    cancel     end an order: its stock and what was charged are given back, its dead letters go
    accept     accept for their customers what there is of orders that stock does not cover
    refund     give back what was charged, or a part of it
    ship       say that the goods of confirmed orders have left
    return     take back an order that was shipped: its goods are in stock again or written off, its charge goes back

`tasks.stuck` does it. Every command may be repeated, and killed at any moment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator

from dramatiq.errors import BrokerError

from .audit import AuditLog, Who, at_terminal
from .command import whole
from .events import usable_order_id
from .ledger import BACK, WRITTEN_OFF, NewerRecord
from .model import Refusal
from .stock import Found, Stock
from .stuck import Operator


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tasks.operate", description="Look after orders.")
    commands = parser.add_subparsers(dest="command", required=True)
    stuck = commands.add_parser("stuck", help="list orders that do not move, or may owe a refund")
    redrive = commands.add_parser("redrive", help="have the step that an order waits for done again")
    for command in (stuck, redrive):
        command.add_argument(
            "--minutes",
            type=whole("minutes", 0, 10_080),
            help="without a move for longer than this (STUCK_AFTER, which is 15 minutes by default)",
        )
    redrive.add_argument("--all", action="store_true", help="every order that `stuck` lists")
    redrive.add_argument("orders", nargs="*", metavar="ORDER")
    cancel = commands.add_parser("cancel", help="end orders, and give back what they took")
    cancel.add_argument("--reason", default="an operator cancelled the order", help="for people to read")
    cancel.add_argument("orders", nargs="+", metavar="ORDER")
    accept = commands.add_parser("accept", help="accept for their customers what is offered of orders")
    accept.add_argument("orders", nargs="+", metavar="ORDER")
    refund = commands.add_parser("refund", help="give back what was charged for an order, or a part of it")
    refund.add_argument(
        "--amount",
        type=whole("minor units", 1, 2**53 - 1),
        metavar="MINOR",
        help="in minor units (cents); all without it",
    )
    refund.add_argument("--reason", default="an operator refunded it", help="for people to read")
    refund.add_argument(
        "--key", required=True, help="names this refund: the same command again refunds nothing more"
    )
    refund.add_argument("orders", nargs=1, metavar="ORDER")
    ship = commands.add_parser("ship", help="say that the goods of confirmed orders have left")
    ship.add_argument("--carrier", default="", help="who carries them")
    ship.add_argument("--tracking", default="", help="under which number")
    ship.add_argument("orders", nargs="+", metavar="ORDER")
    back = commands.add_parser("return", help="take back orders that were shipped, and refund them")
    back.add_argument(
        "--stock", required=True, choices=(BACK, WRITTEN_OFF), help="whether the goods can be sold again"
    )
    back.add_argument("--reason", default="", help="for people to read")
    back.add_argument("orders", nargs="+", metavar="ORDER")
    chosen = parser.parse_args(arguments)
    for order_id in getattr(chosen, "orders", ()):
        if not usable_order_id(order_id):
            parser.error(f"{order_id!r} is no order id.")
    if chosen.command == "refund" and not usable_order_id(chosen.key):
        parser.error("--key is 1 to 64 letters, digits, '-', '_', '.' or '~'.")
    if chosen.command == "redrive" and bool(chosen.orders) == chosen.all:
        parser.error("name the orders, or give --all.")
    return chosen


def _run(
    operator: Operator, stock: Stock, audit: AuditLog, chosen: argparse.Namespace, before: int
) -> Iterator[tuple[str, bool]]:
    """Yield what there is to say, and whether it went well."""
    who = at_terminal()
    match chosen.command:
        case "stuck":
            for stuck in operator.stuck(before):
                yield str(stuck), True
            for one in stock.notes.unsettled():
                try:
                    yield f"{one.order_id}  {_owed(stock.find(one.order_id))}", True
                except NewerRecord as error:
                    yield f"{one.order_id}  {error}", True
        case "redrive":
            orders: Iterable[str] = chosen.orders
            if chosen.all:
                orders = [one.order_id for one in operator.stuck(before)]
            for order_id, done in operator.redrive(_recorded(orders, audit, who)):
                yield f"{order_id}  {done}", True
        case _:
            act, detail = _act(operator, chosen)
            for order_id in chosen.orders:
                try:
                    with audit.record(f"order.{chosen.command}", order_id, who, **detail):
                        done = act(order_id)
                except (Refusal, NewerRecord) as refusal:
                    yield str(refusal), False
                else:
                    yield f"{order_id}  {done}", True


def _act(operator: Operator, chosen: argparse.Namespace) -> tuple[Callable[[str], str], dict[str, str]]:
    """Return what a command does to one order, which returns what was done, and what the audit says of it."""
    match chosen.command:
        case "cancel":
            return lambda order_id: operator.cancel(order_id, chosen.reason), {}
        case "accept":
            return operator.accept, {}
        case "refund":
            minor = str(chosen.amount or "all that is left")
            return (
                lambda order_id: operator.refund(order_id, chosen.key, chosen.amount, chosen.reason),
                {"refund": chosen.key, "minor": minor},
            )
        case "ship":
            return lambda order_id: operator.ship(order_id, chosen.carrier, chosen.tracking), {}
        case _:
            return (
                lambda order_id: operator.take_back(order_id, chosen.stock, chosen.reason),
                {"stock": chosen.stock},
            )


def _recorded(orders: Iterable[str], audit: AuditLog, who: Who) -> Iterator[str]:
    """Yield orders, each with its record begun; what is done to one ends when the next is asked for."""
    for order_id in orders:
        with audit.record("order.redrive", order_id, who):
            yield order_id


def _owed(found: Found | None) -> str:
    """Say what is to go back of an order that is not settled."""
    if found is None:
        return "not begun: it is to be cancelled, or is in the archive"
    if found.record.state == "cancelled" and not found.record.charge_id:
        return "cancelled: the gateway is asked whether it was charged"
    due = sum(refund.payable for refund in found.record.due)
    if not due:
        return (
            f"{found.record.state}: a cancel may not be done yet, or the last of its events not be published"
        )
    return f"{found.record.state}: {due} minor units of {found.record.charge_id} are to be refunded"


def main(arguments: list[str] | None = None) -> int:
    chosen = _arguments(arguments)
    from . import app

    operator = app.operator()
    after = app.SETTINGS.stuck_after if getattr(chosen, "minutes", None) is None else chosen.minutes * 60_000
    code = 0
    try:
        for line, well in _run(operator, app.stock_store(), app.audit_log(), chosen, app.now() - after):
            print(line, file=sys.stdout if well else sys.stderr, flush=True)
            code = code if well else 1
    except BrokerError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        app.broker.close()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
