"""Who did what to which order, product, key or queue, and from where: an append-only record on the stream AUDIT.

    with app.audit_log().record("order.refund", order_id, who, amount_minor="300"):
        ...                        # the act

An act has two records. The first is stored before the block begins, and when it cannot be stored the block is not
entered: nothing is done without a record. The second says how the act ended. A process that is killed in between, or
that cannot store the second, leaves an act that is `unfinished`: it was carried out wholly, in part, or not at all.

The server refuses to delete or purge records; they leave the stream after `KEPT_DAYS`. So nothing of a customer may
stand in them, because it could never be erased: a customer who acts is called `customer`, without name and address, and
a reason that was given stays with its order.

The dashboard and the commands of the fleet keep records of their own (`dramatiq_jetstream.audit`), of queues, messages
and dead letters.
A search shows both.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from typing import Any, Final, Protocol
from urllib.parse import quote

from dramatiq.errors import BrokerError

from dramatiq_jetstream.audit import Change
from dramatiq_jetstream.streams import StoredMessage

from .accept import new_order_id
from .numbers import whole_number
from .text import harmless, shown

STREAM: Final = "AUDIT"
SUBJECTS: Final = "AUDIT.>"

#: How long a record is kept: as long as books have to be, where that is longest.
KEPT_DAYS: Final = 3_650

#: How an act ended; `begun` is its first record.
BEGUN, DONE, FAILED, UNFINISHED = "begun", "done", "failed", "unfinished"

#: What acts are done to: the first part of their name.
KINDS: Final = ("order", "product", "key", "operator", "webhook", "customer", "archive", "queue")

#: Characters of a name, a target and a text in a record.
MAX_NAME: Final = 64
MAX_TEXT: Final = 300

#: How many records one page of a search reads at most, and how many changes of the dashboard are known.
EXAMINED: Final = 5_000
FLEET: Final = 1_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Who:
    """Who acts, and from where.

    Attributes:
      name: What the service calls them; empty for a customer.
      kind: operator, machine, customer, open (anyone on this machine), or service.
      via: page, API, command, dashboard, or worker.
      address: The network address, or the machine of a command; empty for a customer.
    """

    name: str
    kind: str
    via: str
    address: str = ""


@dataclass(slots=True)
class Act:
    """An act, as far as its records say; `at` is when it began, in milliseconds.

    `detail` says what was done in a few short texts. What the act adds to it in its block stands in the second record.
    """

    id: str
    act: str
    target: str
    name: str
    kind: str
    via: str
    address: str
    at: int
    outcome: str = BEGUN
    error: str = ""
    detail: dict[str, str] = field(default_factory=dict)
    place: int = 0

    @property
    def who(self) -> str:
        """The name, or what kind of person it was who has none here."""
        return self.name or self.kind

    def to_json(self) -> dict[str, Any]:
        """Return the act as records and exports have it."""
        said = asdict(self)
        del said["place"]
        return said


@dataclass(frozen=True, slots=True)
class Sought:
    """Which acts are looked for; None is any.

    Attributes:
      kind: What they were done to, one of `KINDS`.
      act: The whole name: `order.cancel`.
      target: The order, product, key or queue; with `kind` found without reading others.
      who: The name of who acted, or `customer`.
      text: A part of anything that is recorded; case does not matter.
      since, until: Milliseconds since 1970; the first is meant and the second is not.
    """

    kind: str | None = None
    act: str | None = None
    target: str | None = None
    who: str | None = None
    text: str | None = None
    since: int | None = None
    until: int | None = None

    def matches(self, act: Act) -> bool:
        """Whether an act is looked for."""
        return (
            (self.kind is None or act.act.partition(".")[0] == self.kind)
            and (self.act is None or act.act == self.act)
            and (self.target is None or act.target == self.target)
            and (self.who is None or act.who.casefold() == self.who.casefold())
            and (self.since is None or act.at >= self.since)
            and (self.until is None or act.at < self.until)
            and (
                self.text is None
                or self.text.casefold() in json.dumps(act.to_json(), ensure_ascii=False).casefold()
            )
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A page of acts, newest first; `next` is the cursor of the page after it, None on the last page."""

    acts: list[Act]
    next: str | None


class InvalidCursor(ValueError):
    """The cursor of a page was not made here."""


class Stored(Protocol):
    """The part of a stream that is read here."""

    def newest(
        self, subject: str = ">", *, before: int | None = None, page: int = 64
    ) -> Iterator[StoredMessage]: ...
    def last(self, subject: str = ">") -> StoredMessage | None: ...
    def read(self, subject: str = ">", *, start: int = 1, page: int = 256) -> Iterator[StoredMessage]: ...


class AuditLog:
    """The records of acts. Any thread may use it.

    Parameters:
      store: Stores a record, given its subject, its bytes and the id under which it is stored once.
      stream: Returns the stream AUDIT, and makes it if it is missing.
      fleet: Returns the newest changes that were made with the fleet's dashboard, at most as many as asked for.
      now: The time in milliseconds.
    """

    def __init__(
        self,
        store: Callable[[str, bytes, str], object],
        stream: Callable[[], Stored],
        fleet: Callable[[int], Iterable[Change]],
        now: Callable[[], int],
    ) -> None:
        self._store = store
        self._stream = stream
        self._fleet = fleet
        self._now = now

    @contextlib.contextmanager
    def record(self, act: str, target: str, who: Who, **detail: str) -> Iterator[Act]:
        """Record an act that is carried out in the block.

        Parameters:
          act: What is done, as kind and verb: `order.cancel`.
          target: The id of what it is done to, nothing of a customer.
          detail: A few short texts, nothing of a customer.

        Raises:
          BrokerConnectionError: When the record is not known to be stored; the block was not entered.
        """
        done = Act(
            new_order_id(self._now()),
            act,
            shown(target, MAX_NAME),
            shown(who.name, MAX_NAME),
            who.kind,
            who.via,
            shown(who.address, MAX_NAME),
            self._now(),
            detail={name: shown(text, MAX_TEXT) for name, text in detail.items()},
        )
        self._write(done)
        try:
            yield done
        except BaseException as error:
            done.outcome, done.error = FAILED, shown(f"{type(error).__name__}: {error}", MAX_TEXT)
            self._end(done)
            raise
        done.outcome = DONE
        self._end(done)

    def _write(self, act: Act) -> None:
        part = "begun" if act.outcome == BEGUN else "ended"
        self._store(_subject(act, part), json.dumps(act.to_json()).encode(), f"{act.id}.{part}")

    def _end(self, act: Act) -> None:
        try:
            self._write(act)
        except BrokerError as error:  # it is over, and its first record is there
            logger.warning(
                "How %s of %s ended (%s) was not recorded: %s", act.act, act.target, act.outcome, error
            )

    # Reading

    def search(self, sought: Sought, limit: int = 50, before: str | None = None) -> Found:
        """Return acts, newest first; a page may be short, or empty, and have a next one.

        Parameters:
          before: The cursor `next` of the page before.

        Raises:
          InvalidCursor: When it is not one.
        """
        place, at = _read_cursor(before)
        acts: list[Act] = []
        for examined, act in enumerate(self._merged(sought, place, at), start=1):
            if sought.since is not None and act.at < sought.since - _SKEW_MS:
                break
            if sought.matches(act):
                acts.append(act)
            place, at = min(act.place or place, place), act.at
            if len(acts) == limit or examined == EXAMINED:
                return Found(acts, f"{place}-{at}")
        return Found(acts, None)

    def all(self, sought: Sought) -> Iterator[Act]:
        """Yield every act that is looked for, newest first, page by page: in bounded memory, whatever their number."""
        before: str | None = None
        while True:
            page = self.search(sought, 500, before)
            yield from page.acts
            before = page.next
            if before is None:
                return

    def _merged(self, sought: Sought, place: int, at: int) -> Iterator[Act]:
        """Yield the acts of both streams behind a cursor, newest first."""
        fleet: list[Act] = []
        if sought.kind in (None, "queue"):
            fleet = [one for one in map(_of_fleet, self._fleet(FLEET)) if one.at < at]
        waiting = iter(fleet)
        other = next(waiting, None)
        for act in self._ours(sought, place):
            while other is not None and other.at >= act.at:
                yield other
                other = next(waiting, None)
            yield act
        if other is not None:
            yield other
        yield from waiting

    def _ours(self, sought: Sought, before: int) -> Iterator[Act]:
        """Yield the acts that are recorded here, each with how it ended, newest first."""
        ended: dict[str, Act] = {}
        for stored in self._stream().newest(_filter(sought), before=before, page=256):
            act = _read(stored)
            if act is None:
                continue
            if act.outcome != BEGUN:
                ended[act.id] = act
                continue
            # How it ended may stand before the place where reading began.
            end = ended.pop(act.id, None) or self._find_end(act)
            yield replace(act, outcome=UNFINISHED) if end is None else replace(end, place=stored.sequence)

    def _find_end(self, act: Act) -> Act | None:
        stored = self._stream().last(_subject(act, "ended"))
        return None if stored is None else _read(stored)

    def of(self, kind: str, target: str, limit: int = 100) -> list[Act]:
        """Return the first acts that were done to one order, product, key or webhook, oldest first.

        They cost the same however many others there are. One that is carried out right now counts as unfinished.
        """
        acts: dict[str, Act] = {}
        for stored in islice(self._stream().read(_filter(Sought(kind, target=target)), page=256), 2 * limit):
            act = _read(stored)
            if act is not None:
                acts[act.id] = replace(act, outcome=UNFINISHED) if act.outcome == BEGUN else act
        return list(acts.values())[:limit]

    def newest_place(self, kind: str, target: str) -> int:
        """Return the place of the newest record about one order, product, key or webhook, 0 when there is none."""
        newest = self._stream().last(_filter(Sought(kind, target=target)))
        return 0 if newest is None else newest.sequence


#: Clocks of processes differ; a search in time reads so much further, in milliseconds.
_SKEW_MS: Final = 60_000

_NEWEST: Final = 2**63 - 1


def _subject(act: Act, part: str) -> str:
    return f"AUDIT.{act.act.partition('.')[0]}.{_token(act.target)}.{act.id}.{part}"


def _token(target: str) -> str:
    """Return a target as one token of a subject."""
    return quote(target, safe="").replace(".", "%2E") or "%"


def _filter(sought: Sought) -> str:
    target = "*" if sought.target is None else _token(sought.target)
    return f"AUDIT.{sought.kind or '*'}.{target}.*.*"


def _read(stored: StoredMessage) -> Act | None:
    """Return the act in a record, None when another program stored something else there."""
    try:
        said = json.loads(stored.data)
        names = {one.name for one in fields(Act)} - {"place"}
        return Act(**{name: value for name, value in said.items() if name in names}, place=stored.sequence)
    except (ValueError, TypeError, AttributeError):
        return None


def _read_cursor(cursor: str | None) -> tuple[int, int]:
    if cursor is None:
        return _NEWEST, _NEWEST
    place, _, at = cursor.partition("-")
    read = whole_number(place, 0, _NEWEST), whole_number(at, 0, _NEWEST)
    if read[0] is None or read[1] is None:
        raise InvalidCursor("the cursor was not made by this service")
    return read[0], read[1]


def _of_fleet(change: Change) -> Act:
    """Return a change that was made with the dashboard, or a command of `fleet`, as an act."""
    outcome = {"finished": DONE, "failed": FAILED}.get(change.outcome, UNFINISHED)
    detail = {"planned": str(change.planned), "done": str(change.done)}
    return Act(
        *(change.id, f"queue.{change.what}", change.target, change.who, "operator", change.via, change.host),
        *(change.at, outcome, change.error, detail),
    )


def at_terminal() -> Who:
    """Return who runs a command: the user of the machine, and the machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        name = f"user {os.getuid()}"
    return Who(name, "operator", "command", socket.gethostname())


#: The columns of an export as CSV.
COLUMNS: Final = ("at", "act", "target", "name", "kind", "via", "address", "outcome", "error", "detail", "id")


def row_of(act: Act, when: Callable[[int], str]) -> list[str]:
    """Return an act as a row of CSV; no cell can be taken for a formula by a spreadsheet."""
    said: Mapping[str, Any] = {**act.to_json(), "at": when(act.at), "detail": json.dumps(act.detail)}
    return [harmless(str(said[name])) for name in COLUMNS]
