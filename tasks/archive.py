"""The archive: files with the events that left the stream, and with what was known of the orders that ended there.

A *segment* is one file, `orders-<first>-<last>.ndjson.gz`, for a stretch of the stream. Each line is a JSON object:

    {"segment": {"version": 1, "first": 1, "last": 812, "at": …}}
    {"event": {"sequence": 1, "at": …, "subject": "ORDER.created", "headers": {…}, "data": "base64"}}
    {"order": {"order_id": "…", "entries": {"claim.…": "…", "order.…": "…"}, "record": "…"}}
    {"end": {"events": 809, "orders": 160, "sha256": "of all lines before this one"}}

Segments follow one another without a gap, so what is archived is known from their names, and nothing is archived twice.
An order is in the segment in which its last event is.

A segment is written beside its place, synced, read back with its sum checked, and then renamed, so a file with the name
of a segment is whole; what a process that was killed left behind is removed by the next. A file that was changed or cut
off since, or that is missing, is found when it is read: by the sum in its last line, and by the gap.

`archive.json` holds the directory's id, which the store of the service knows. So a process with another directory does
not begin a second archive.
"""

from __future__ import annotations

import base64
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dramatiq_jetstream.streams import StoredMessage

from .events import Happened
from .model import Order
from .orders import order_of
from .stream import read_stored

_NAME: Final = re.compile(r"orders-(\d{20})-(\d{20})\.ndjson\.gz", re.ASCII)

_VERSION: Final = 1

#: The pause between two checks whether another process still changes the archive, in seconds.
_LOOK_SECONDS: Final = 0.1

Line = dict[str, Any]


class ArchiveBroken(Exception):
    """The archive cannot be used as it is; the message says what is wrong and where."""


class ArchiveBusy(ArchiveBroken):
    """Another process changes the archive; trying again later is safe."""


@dataclass(frozen=True, slots=True)
class ArchivedOrder:
    """What was known of an order: its entries in the bucket of the stock by key, and its record in the read model."""

    order_id: str
    entries: Mapping[str, str]
    record: str | None

    def to_line(self) -> Line:
        return {"order": {"order_id": self.order_id, "entries": dict(self.entries), "record": self.record}}

    @property
    def order(self) -> Order | None:
        """The order as the read model had it."""
        if self.record is None:
            return None
        return order_of(self.order_id, json.loads(self.record), 0)

    @classmethod
    def of(cls, line: Line) -> ArchivedOrder:
        order = line["order"]
        return cls(order["order_id"], order["entries"], order["record"])


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the stream in a file."""

    path: Path
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a segment says that it has."""

    events: int
    orders: int


class Archive:
    """The archive in a directory, which exists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def id(self) -> str:
        """What tells this archive from others; it is made when there is none.

        Raises:
          ArchiveBroken: When the directory cannot be used.
        """
        path = self.directory / "archive.json"
        try:
            if not path.exists():
                _put(path, json.dumps({"id": secrets.token_hex(8)}).encode())
            return str(json.loads(path.read_bytes())["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ArchiveBroken(f"The archive in {self.directory} cannot be used: {error}") from None

    @contextmanager
    def alone(self, patience: float = 0.0) -> Iterator[None]:
        """Keep other processes of this machine from changing the archive meanwhile.

        Parameters:
          patience: For how many seconds to wait for one that does so now.

        Raises:
          ArchiveBusy: When one still does so then.
          ArchiveBroken: When the directory cannot be used.
        """
        try:
            lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ArchiveBroken(
                f"The archive in {self.directory} cannot be used: {error.strerror}. ARCHIVE_DIR names a directory that "
                "exists and can be written to."
            ) from None
        try:
            deadline = time.monotonic() + patience
            while not _locked(lock):
                if time.monotonic() >= deadline:
                    raise ArchiveBusy(
                        f"Another process is changing the archive in {self.directory}: try again when it is done."
                    )
                time.sleep(_LOOK_SECONDS)
            for left_over in self.directory.glob(".*.part"):
                left_over.unlink(missing_ok=True)
            yield
        finally:
            os.close(lock)

    # Reading

    def segments(self) -> list[Segment]:
        """Return the segments, oldest first.

        Raises:
          ArchiveBroken: When one is missing between two others, or two overlap.
        """
        named = ((path, _NAME.fullmatch(path.name)) for path in self.directory.iterdir())
        found = [Segment(path, int(match[1]), int(match[2])) for path, match in named if match is not None]
        found.sort(key=lambda segment: segment.first)
        for before, after in itertools.pairwise(found):
            if after.first != before.last + 1:
                raise ArchiveBroken(
                    f"The archive in {self.directory} is not whole: {after.path.name} does not follow "
                    f"{before.path.name}. Put back the file that is missing."
                )
        return found

    def lines(self, segment: Segment) -> Iterator[Line]:
        """Yield the lines of a segment but the last, which is checked when the others were yielded.

        Raises:
          ArchiveBroken: When the file is damaged.
        """
        digest = hashlib.sha256()
        count = {"event": 0, "order": 0}
        try:
            with gzip.open(segment.path, "rb") as file:
                for raw in file:
                    line: Line = json.loads(raw)
                    if "end" in line:
                        end = line["end"]
                        if (end["sha256"], end["events"], end["orders"]) != (
                            digest.hexdigest(),
                            count["event"],
                            count["order"],
                        ):
                            raise ValueError("its sum is not that of its lines")
                        if file.read(1):
                            raise ValueError("there is something after its end")
                        return
                    digest.update(raw)
                    for kind in count:
                        count[kind] += kind in line
                    yield line
            raise ValueError("its end is missing")
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            raise ArchiveBroken(f"{segment.path} is damaged: {error}. Put back a copy of it.") from None

    def verify(self, segment: Segment) -> Contents:
        """Read a segment to its end and check its sum.

        Raises:
          ArchiveBroken: When the file is damaged.
        """
        events = orders = 0
        for line in self.lines(segment):
            events += "event" in line
            orders += "order" in line
        return Contents(events, orders)

    def orders(self) -> Iterator[ArchivedOrder]:
        """Yield the archived orders, oldest first; one that was restored and archived again comes again."""
        for segment in self.segments():
            self.verify(segment)
            yield from (ArchivedOrder.of(line) for line in self.lines(segment) if "order" in line)

    def events(self) -> Iterator[Happened]:
        """Yield every event that can be attributed to an order, oldest first, as the stream yielded it."""
        for segment in self.segments():
            self.verify(segment)
            for line in self.lines(segment):
                happened = read_stored(stored_in(line)) if "event" in line else None
                if happened is not None:
                    yield happened

    # Writing

    def write(
        self, first: int, last: int, at: int, events: Iterable[StoredMessage], orders: Iterable[ArchivedOrder]
    ) -> Segment:
        """Add a segment; it is on the disk, and was read back, when this returns."""
        path = self.directory / f"orders-{first:020}-{last:020}.ndjson.gz"
        head: Line = {"segment": {"version": _VERSION, "first": first, "last": last, "at": at}}

        def lines() -> Iterator[Line]:
            yield head
            yield from map(_event_line, events)
            yield from (order.to_line() for order in orders)

        segment = Segment(path, first, last)
        self._replace(segment, lines())
        return segment

    def rewrite(self, segment: Segment, change: Callable[[Line], Line | None]) -> int:
        """Put other lines in the place of a segment's; returns how many `change` changed. None drops a line."""
        changed = 0
        self.verify(segment)

        def lines() -> Iterator[Line]:
            nonlocal changed
            for line in self.lines(segment):
                new = change(line)
                changed += new != line
                if new is not None:
                    yield new

        # Most segments have nothing to change, and are only read.
        for _ in lines():
            pass
        if changed:
            changed = 0
            self._replace(segment, lines())
        return changed

    def _replace(self, segment: Segment, lines: Iterable[Line]) -> None:
        part = self.directory / f".{segment.path.name}.part"
        digest = hashlib.sha256()
        events = orders = 0
        with part.open("wb") as raw:
            # Without the time of writing and the name of the part, the same lines are the same bytes.
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
                for line in lines:
                    written = _encoded(line)
                    digest.update(written)
                    events += "event" in line
                    orders += "order" in line
                    file.write(written)
                end = {"events": events, "orders": orders, "sha256": digest.hexdigest()}
                file.write(_encoded({"end": end}))
            raw.flush()
            os.fsync(raw.fileno())
        self.verify(Segment(part, segment.first, segment.last))
        part.replace(segment.path)
        _sync(self.directory)


def stored_in(line: Line) -> StoredMessage:
    """Return the message of an event's line, as the stream had it."""
    event = line["event"]
    return StoredMessage(
        stream="ORDERS",
        sequence=event["sequence"],
        subject=event["subject"],
        data=base64.b64decode(event["data"]),
        headers=event["headers"],
        time=event["at"],
    )


def _locked(lock: int) -> bool:
    """Take a lock, unless another process has it; returns whether it was taken."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _event_line(stored: StoredMessage) -> Line:
    return {
        "event": {
            "sequence": stored.sequence,
            "at": stored.time,
            "subject": stored.subject,
            "headers": dict(stored.headers),
            "data": base64.b64encode(stored.data).decode(),
        }
    }


def event_line(line: Line, data: bytes, headers: Mapping[str, str]) -> Line:
    """Return an event's line with other bytes and headers."""
    return {
        "event": {**line["event"], "data": base64.b64encode(data).decode(), "headers": dict(headers)},
    }


def _encoded(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _put(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(part, path)  # not over one that another process has made
    except FileExistsError:
        pass
    finally:
        part.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
