"""Reads the archive's files as a program would that knows their description alone.

Every sum is checked here once more, and that the files follow one another.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAME = re.compile(r"orders-(\d{20})-(\d{20})\.ndjson\.gz")


@dataclass
class Files:
    """What the archive holds.

    Attributes:
      events: The bytes of each event, by its place in the stream.
      orders: The newest of what is archived of each order: its entries by key and its record.
      left_at: When each order left first, in seconds.
      damage: What is wrong with the files.
    """

    events: dict[int, bytes] = field(default_factory=dict)
    orders: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_at: dict[str, float] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)


def read(directory: Path) -> Files:
    """Read all files, oldest first."""
    found = Files()
    expected: int | None = None
    for path in sorted(directory.glob("orders-*.ndjson.gz")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            found.damage.append(f"{path.name} is no name")
            continue
        first, last = int(match[1]), int(match[2])
        if expected is not None and first != expected:
            found.damage.append(f"{path.name} does not begin with {expected}")
        expected = last + 1
        try:
            _read(path, found, first, last)
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            found.damage.append(f"{path.name}: {error!r}")
    return found


def _read(path: Path, found: Files, first: int, last: int) -> None:
    raw = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    *lines, end = raw
    said = json.loads(end)["end"]
    if said["sha256"] != hashlib.sha256(b"".join(lines)).hexdigest():
        found.damage.append(f"{path.name}: its sum is another")
    parsed = [json.loads(line) for line in lines]
    at = parsed[0]["segment"]["at"] / 1000
    events = [line["event"] for line in parsed if "event" in line]
    orders = [line["order"] for line in parsed if "order" in line]
    if (said["events"], said["orders"]) != (len(events), len(orders)):
        found.damage.append(f"{path.name}: it has other numbers of events and orders than it says")
    for event in events:
        if not first <= event["sequence"] <= last:
            found.damage.append(f"{path.name}: event {event['sequence']} is outside")
        found.events[event["sequence"]] = base64.b64decode(event["data"])
    for order in orders:
        found.orders[order["order_id"]] = order
        found.left_at.setdefault(order["order_id"], at)


def texts(directory: Path) -> list[tuple[str, bytes]]:
    """Return the text of each file with its name."""
    return [(path.name, gzip.decompress(path.read_bytes())) for path in sorted(directory.glob("*.gz"))]
