"""Who changed what in a running fleet, and from where: an audit record for every change, on a stream of its own.

    with record(broker, who="ann", what="replay", target="queue=mail", planned=12) as change:
        change.done += 1

The record is stored before the change begins, and once more, in its place, when it is over: a process that dies in
between leaves a record that says `unfinished`, and nothing is changed without one. Records are kept for a year.

The dashboard and the changing commands of `fleet` record what they do. Where a change came from stands in headers of
its records, which earlier versions do not read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice

from .broker import JetStreamBroker
from .errors import BrokerError, StreamLost, TopologyMissing
from .jetstream.reading import StoredMessage
from .streams import Stream
from .wire.ids import new_id

__all__ = ["Change", "changes", "declare", "find", "record"]

#: Characters of a text in a record.
MAX_TEXT = 500

UNFINISHED, FINISHED, FAILED = "unfinished", "finished", "failed"

#: Where changes come from.
DASHBOARD, COMMAND = "dashboard", "command"

#: The headers of a record that say where its change came from.
_VIA, _HOST = "Fleet-Via", "Fleet-Host"

logger = logging.getLogger(__name__)


@dataclass
class Change:
    """A change that a person made.

    Attributes:
      who: The person's name.
      what: The kind of change, such as `replay`.
      target: What it was made to.
      planned: How many messages or schedules it was to change, as far as that was known before.
      done: How many it did change.
      outcome: `unfinished`, `finished` or `failed`.
      error: Why it failed.
      at: When it began, in milliseconds since 1970.
      id: Tells it from every other change.
      via: `dashboard` or `command`.
      host: The machine on which the command ran; empty for the dashboard.

    Examples:
      >>> from dramatiq_jetstream.audit import Change
      >>> Change(who="ann", what="replay", target="queue=mail", planned=12).outcome
      'unfinished'
    """

    who: str
    what: str
    target: str
    planned: int
    done: int = 0
    outcome: str = UNFINISHED
    error: str = ""
    at: int = 0
    id: str = ""
    via: str = DASHBOARD
    host: str = ""


def declare(broker: JetStreamBroker) -> None:
    """Create the stream of audit records if it is missing, whatever the broker's `declare` says.

    Examples:
      >>> from dramatiq_jetstream import audit
      >>> audit.declare(broker)
    """
    broker.declarations.ensure_audit()


@contextlib.contextmanager
def record(
    broker: JetStreamBroker,
    *,
    who: str,
    what: str,
    target: str,
    planned: int,
    via: str = DASHBOARD,
    host: str = "",
) -> Iterator[Change]:
    """Record a change that is made in the block, which counts what it did in `done`.

    Parameters:
      via, host: Where it came from, see `Change`.

    Raises:
      TopologyMissing: When the stream is missing and the broker declares nothing; nothing was changed then.
      BrokerConnectionError: When the record is not known to be stored; nothing was changed then.

    Examples:
      >>> from dramatiq_jetstream import audit
      >>> audit.declare(broker)
      >>> with audit.record(broker, who="ann", what="drop", target="queue=mail", planned=1) as change:
      ...     change.done += 1
      >>> audit.find(broker, change.id).outcome
      'finished'
    """
    change = Change(
        who[:MAX_TEXT],
        what,
        target[:MAX_TEXT],
        planned,
        at=int(time.time() * 1000),
        id=new_id(),
        via=via,
        host=host[:MAX_TEXT],
    )
    subject = broker.names.audit(change.id)
    try:
        _store(broker, subject, change)
    except (TopologyMissing, StreamLost):
        if not broker.config.declare:
            raise
        declare(broker)
        _store(broker, subject, change)
    try:
        yield change
    except BaseException as error:
        change.outcome, change.error = FAILED, f"{type(error).__name__}: {error}"[:MAX_TEXT]
        _store_end(broker, subject, change)
        raise
    change.outcome = FINISHED
    _store_end(broker, subject, change)


def _store(broker: JetStreamBroker, subject: str, change: Change) -> None:
    said = asdict(change)
    headers = {name: text for name, text in ((_VIA, said.pop("via")), (_HOST, said.pop("host"))) if text}
    broker.connection.publish(subject, json.dumps(said).encode(), headers)


def _store_end(broker: JetStreamBroker, subject: str, change: Change) -> None:
    try:
        _store(broker, subject, change)
    except BrokerError as error:  # the change is made, and its first record is there
        logger.warning("How a change by %s ended (%s) was not recorded: %s", change.who, change.what, error)


def changes(broker: JetStreamBroker, *, limit: int = 100) -> list[Change]:
    """The newest changes, newest first.

    Raises:
      BrokerConnectionError: When the server does not answer in time.

    Examples:
      >>> from dramatiq_jetstream import audit
      >>> audit.declare(broker)
      >>> with audit.record(broker, who="ann", what="purge", target="queue=mail", planned=0):
      ...     pass
      >>> for change in audit.changes(broker, limit=1):
      ...     print(change.who, change.what, change.target, change.outcome)
      ann purge queue=mail finished
    """
    try:
        stored = list(islice(Stream(broker.connection, broker.names.audit_stream).newest(), limit))
    except TopologyMissing:
        return []  # none was ever made
    return sorted(map(_read, stored), key=lambda change: change.at, reverse=True)


def find(broker: JetStreamBroker, change_id: str) -> Change | None:
    """The change with an id, or None.

    Examples:
      >>> from dramatiq_jetstream import audit
      >>> audit.find(broker, "unknown") is None
      True
    """
    if not change_id.isalnum():
        return None
    try:
        stored = Stream(broker.connection, broker.names.audit_stream).last(broker.names.audit(change_id))
    except TopologyMissing:
        return None
    return None if stored is None else _read(stored)


def _read(stored: StoredMessage) -> Change:
    via, host = stored.headers.get(_VIA, DASHBOARD), stored.headers.get(_HOST, "")
    # What a later version says beside this is not shown.
    names = {one.name for one in fields(Change)} - {"via", "host"}
    said = {name: value for name, value in json.loads(stored.data).items() if name in names}
    return Change(**said, via=via, host=host)
