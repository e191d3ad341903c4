"""What is done when all is over: everything comes back from the archive, records are made again, people are looked for.

Each is held against what was there before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.chaos import files
from tests.chaos.books import Books, Held, read_held
from tests.chaos.fleet import Fleet
from tests.chaos.traces import on_disk, traces


def look_back(fleet: Fleet, books: Books) -> Books:
    """Look for people who were erased, restore what is archived, rebuild; returns the books with what came of it."""
    people = [person for person in books.erased if person["certificate"]]
    found = traces(fleet.nats_url, [one["word"] for one in people], fleet.archive, fleet.directory)
    if fleet.topology == "single":
        never_left = [one for one in people if not books.whereabouts.left_at.keys() & set(one["orders"])]
        found += on_disk([one["word"] for one in never_left], fleet.directory / "nats")
    archived, before = files.read(fleet.archive), read_held(fleet.nats_url)
    otherwise = [*_run(fleet, "archives", "verify"), *_run(fleet, "archives", "restore", "--all")]
    restored = read_held(fleet.nats_url)
    for order_id, one in archived.orders.items():
        if order_id not in before.ledger and order_id not in before.records:
            otherwise += _came_otherwise(order_id, one, restored)
    otherwise += _run(fleet, "rebuild")
    rebuilt = read_held(fleet.nats_url).records
    otherwise += [
        f"the record of {order_id} after a rebuild"
        for order_id in restored.records.keys() | rebuilt.keys()
        if _content(restored.records.get(order_id)) != _content(rebuilt.get(order_id))
    ]
    return replace(
        books, traces=found, whereabouts=replace(books.whereabouts, otherwise=tuple(sorted(set(otherwise))))
    )


def _run(fleet: Fleet, *words: str) -> list[str]:
    done = fleet.operate(*words)
    # Of none that is archived, or all of which are back, `restore` says so.
    is_wrong = done.returncode != 0
    return [f"{' '.join(words)}: {done.stderr.strip()[-300:]}"] if is_wrong else []


def _came_otherwise(order_id: str, archived: Mapping[str, Any], now: Held) -> list[str]:
    entries = {
        one.subject.removeprefix("$KV.dramatiq-stock."): one.data.decode()
        for one in now.stock
        if one.data and one.subject.endswith(f".{order_id}")
    }
    entries.pop(f"restored.{order_id}", None)
    expected = {key: value for key, value in archived["entries"].items() if not key.startswith("restored.")}
    found = []
    if entries != expected:
        found.append(f"the ledger of {order_id}")
    if (now.records.get(order_id) or b"").decode() != (archived["record"] or ""):
        found.append(f"the record of {order_id}")
    return found


def _content(record: bytes | None) -> Any:
    """Return what a record says; an event that was published twice may have either place."""
    if record is None:
        return None
    stored = json.loads(record)
    events = {
        key: {name: said for name, said in fact.items() if name not in ("sequence", "at")}
        for key, fact in stored["events"].items()
    }
    return {**stored, "events": events}
