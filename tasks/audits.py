"""Searches and exports the audit: ``python -m tasks.audits``.

python -m tasks.audits --target ORDER_ID           # what was done to an order, a product, a key, a queue
python -m tasks.audits --who ann --since 2026-11-01
python -m tasks.audits --format csv > audit.csv    # everything, newest first
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from dramatiq.errors import BrokerError

from . import app
from .audit import COLUMNS, KINDS, Act, Sought, row_of
from .events import isoformat


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    sought = Sought(
        options.kind, options.act, options.target, options.who, options.text, options.since, options.until
    )
    try:
        acts = app.audit_log().all(sought)
        if options.format == "csv":
            rows = csv.writer(sys.stdout)
            rows.writerow(COLUMNS)
            rows.writerows(row_of(act, isoformat) for act in acts)
        else:
            for line in _lines(acts, as_json=options.format == "ndjson"):
                print(line)
    except BrokerError as error:
        print(f"The audit cannot be read: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
    finally:
        app.broker.close()
    return 0


def _lines(acts: Iterator[Act], *, as_json: bool) -> Iterator[str]:
    for act in acts:
        if as_json:
            yield json.dumps({**act.to_json(), "at": isoformat(act.at)}, ensure_ascii=False)
            continue
        place = f"{act.via} at {act.address}" if act.address else act.via
        detail = "  ".join(f"{name}={text}" for name, text in act.detail.items())
        said = [
            isoformat(act.at),
            act.act,
            act.target,
            f"{act.who} ({place})",
            act.outcome,
            detail,
            act.error,
        ]
        yield "  ".join(part for part in said if part)


def _moment(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("give a day such as 2026-11-29, or a time of it") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.audits", description="Who did what to which order, product, key or queue."
    )
    parser.add_argument("--kind", choices=KINDS, help="what it was done to")
    parser.add_argument("--act", help="what was done, such as order.cancel")
    parser.add_argument("--target", help="the id of what it was done to")
    parser.add_argument("--who", help="the name of who did it, or `customer`")
    parser.add_argument("--text", help="a part of anything that is recorded")
    parser.add_argument("--since", type=_moment, metavar="TIME", help="in UTC, unless it says its zone")
    parser.add_argument("--until", type=_moment, metavar="TIME", help="not included")
    parser.add_argument("--format", choices=("text", "ndjson", "csv"), default="text")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
