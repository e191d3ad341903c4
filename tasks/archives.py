"""Keeps the archive: ``python -m tasks.archives run|verify|restore``.

run        move what is older than RETENTION_DAYS from the stream and the buckets into ARCHIVE_DIR
verify     read the whole archive and check its sums
restore    bring orders back, to be read, cancelled or refunded
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from functools import partial

from dramatiq.errors import BrokerError

from . import app, command
from .archive import ArchiveBroken, ArchiveBusy
from .audit import at_terminal
from .events import usable_order_id


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ArchiveBroken as error:
        print(error, file=sys.stderr)
    except BrokerError as error:
        print(f"The orders cannot be read or moved: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    finally:
        app.broker.close()
    return 1


def _run(options: argparse.Namespace) -> int:
    if not app.SETTINGS.retention_days:
        print("Orders stay where they are: RETENTION_DAYS is not set.", file=sys.stderr)
        return 1
    while True:
        try:
            _run_once()
        except ArchiveBusy as busy:
            if options.every is None:
                raise
            print(busy, file=sys.stderr, flush=True)
        if options.every is None:
            return 0
        threading.Event().wait(options.every * 60)


def _run_once() -> None:
    with app.audit_log().record("archive.run", app.SETTINGS.archive_dir or "", at_terminal()) as act:
        summary = app.retention().run()
        act.detail.update(events=str(summary.events), orders=str(summary.orders), held_by=summary.held_by)
    print(summary, flush=True)


def _verify(_: argparse.Namespace) -> int:
    archive = app.retention().archive
    events = orders = 0
    segments = archive.segments()
    for segment in segments:
        contents = archive.verify(segment)
        events += contents.events
        orders += contents.orders
    place = f", up to event {segments[-1].last}" if segments else ""
    print(f"{len(segments)} segments are whole: {events} events, {orders} orders{place}.")
    return 0


def _restore(options: argparse.Namespace) -> int:
    wanted = None if options.all else options.orders
    with app.audit_log().record(
        "archive.restore", "all orders" if options.all else options.orders[0], at_terminal()
    ) as act:
        back = 0
        recorded = partial(app.audit_log().record, "order.restore", who=at_terminal())
        for order_id in app.retention().restore(wanted, recorded):
            back += 1
            print(f"{order_id}  restored", flush=True)
        act.detail["orders"] = str(back)
    if wanted is not None and back < len(set(wanted)):
        print("The others are not in the archive alone: they are there, or never were.", file=sys.stderr)
        return 1
    return 0


def _order_id(text: str) -> str:
    if not usable_order_id(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no order id")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.archives", description="The archive of orders.")
    commands = parser.add_subparsers(required=True, metavar="command")
    run = commands.add_parser("run", help="move what is older than RETENTION_DAYS into ARCHIVE_DIR")
    minutes = command.whole("minutes", 1, 10_080)
    run.add_argument("--every", type=minutes, metavar="MINUTES", help="again and again, until it is stopped")
    run.set_defaults(run=_run)
    verify = commands.add_parser("verify", help="read the whole archive and check its sums")
    verify.set_defaults(run=_verify)
    restore = commands.add_parser("restore", help="bring orders back")
    which = restore.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every order of the archive")
    which.add_argument("orders", nargs="*", default=[], metavar="ORDER", type=_order_id)
    restore.set_defaults(run=_restore)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
