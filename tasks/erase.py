"""Makes a customer unreadable everywhere: ``python -m tasks.erase customer|resume|certificates``.

    customer       erase a customer, and print the certificate
    resume         carry on erasures that were cut off, by a crash or because the archive was elsewhere
    certificates   print what was certified, one JSON object a line

A certificate says what was done, when, how many, and by whom, and nothing of the customer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from dramatiq.errors import BrokerError

from . import app
from .archive import ArchiveBroken
from .audit import at_terminal
from .erasure_jobs import Job, NotErasable
from .events import isoformat
from .folds import RebuildConflict
from .model import InvalidOrder
from .parsing import check_customer_id


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    from . import actors  # noqa: F401 - the queues are theirs

    try:
        return int(options.run(options))
    except (NotErasable, ArchiveBroken, RebuildConflict) as error:
        print(error, file=sys.stderr)
    except BrokerError as error:
        print(
            f"The erasure was cut off, `python -m tasks.erase resume` carries it on: {error}", file=sys.stderr
        )
    finally:
        app.broker.close()
    return 1


def _customer(options: argparse.Namespace) -> int:
    if not options.yes:
        print(
            "Everything that says who this customer is will be gone from stream, buckets, archive, history, dead "
            "letters and queues. It cannot be taken back. Erase? [y/N] ",
            end="",
            file=sys.stderr,
            flush=True,
        )
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was changed.", file=sys.stderr)
            return 1
    _run(app.erasure().begin(options.customer_id, at_terminal()))
    return 0


def _resume(_: argparse.Namespace) -> int:
    for job in list(app.erasure_jobs().all()):
        if not job.is_done:
            _run(job)
    return 0


def _run(job: Job) -> None:
    with app.audit_log().record("customer.erase", job.id, at_terminal()) as act:
        done = app.erasure().run(job.id)
        act.detail.update({kind: str(count) for kind, count in done.counts.items()})
    print(json.dumps(certificate(done)), flush=True)


def _certificates(_: argparse.Namespace) -> int:
    for job in sorted(app.erasure_jobs().all(), key=lambda job: job.at):
        if job.is_done:
            print(json.dumps(certificate(job)))
        else:
            print(f"Erasure {job.id} is not done: `python -m tasks.erase resume`.", file=sys.stderr)
    return 0


def certificate(job: Job) -> dict[str, Any]:
    """Return what is certified, with times for people."""
    said = job.certificate()
    return {**said, "asked_for_at": isoformat(job.at), "finished_at": isoformat(job.finished_at)}


def _customer_id(text: str) -> str:
    try:
        return check_customer_id(text)
    except InvalidOrder as error:
        raise argparse.ArgumentTypeError(f"the customer id {error.problem}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tasks.erase", description="Erase customers.")
    commands = parser.add_subparsers(required=True, metavar="command")
    customer = commands.add_parser("customer", help="erase a customer and print the certificate")
    customer.add_argument("customer_id", type=_customer_id)
    customer.add_argument("--yes", action="store_true", help="do not ask")
    customer.set_defaults(run=_customer)
    resume = commands.add_parser("resume", help="carry on what was cut off")
    resume.set_defaults(run=_resume)
    certificates = commands.add_parser("certificates", help="print what was certified")
    certificates.set_defaults(run=_certificates)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
