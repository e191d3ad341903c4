"""Takes over a store whose stock is one key for all products, `levels.all`, and prepares a new one.

Earlier versions changed `levels.all` with every order. It stays as a closed key, in every store, because an earlier
version that finds none begins with all products in stock. Closed, it still shows what was there, and each attempt
of an earlier worker to change it fails before it writes: its steps are tried again until a worker of this version
does them.

    write the records that `levels.all` has noted → close it, with the pieces that there are (compare-and-set)
    → create `level.{sku}` for each product → note in `levels.all` that this is done

An order that an earlier worker decides meanwhile makes the closing fail, and it begins again. Killed between any two
writes, it is carried on by the next process that starts: what is there already stays as it is.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from dramatiq_jetstream.errors import KeyExists, RevisionConflict

from .ledger import Record
from .levels import GIVES_BACK, PREFIX, Level, StockBusy
from .ports import Bucket

LEVELS: Final = "levels.all"

#: What a closed key has in place of notes. An earlier version reads the state of each before it writes, and fails here.
CLOSED: Final = {"closed: the stock is in level.{sku}": None}

#: How long closing the key is retried while earlier workers change it, in seconds.
PATIENCE_SECONDS: Final = 30.0


def take_over(bucket: Bucket, initial: Mapping[str, int]) -> None:
    """See to it that every product has its key; any process may, at any time.

    Parameters:
      initial: The pieces of each product that a new store begins with.

    Raises:
      StockBusy: When workers of an earlier version kept changing the old key.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        entry = bucket.get(LEVELS)
        stored: dict[str, Any] = {"pieces": {}, "pending": {}} if entry is None else json.loads(entry.value)
        revision = 0 if entry is None else entry.revision
        if stored["pending"] != CLOSED:
            for order_id, noted in stored["pending"].items():
                _write(bucket, order_id, Record.from_json(noted))
            stored = {"pieces": {**initial, **stored["pieces"]}, "pending": CLOSED}
        elif not stored.get("done"):
            for sku, pieces in stored["pieces"].items():
                with suppress(KeyExists):
                    bucket.create(f"{PREFIX}{sku}", Level(pieces).encode())
            stored["done"] = True
        else:
            return
        try:
            value = json.dumps(stored, separators=(",", ":")).encode()
            if entry is None:
                bucket.create(LEVELS, value)
            else:
                bucket.update(LEVELS, value, revision=revision)
        except (KeyExists, RevisionConflict) as conflict:
            if time.monotonic() > deadline:
                raise StockBusy("workers of an earlier version keep changing the stock.") from conflict
            time.sleep(random.uniform(0, 0.01))


def _write(bucket: Bucket, order_id: str, noted: Record) -> None:
    """Write a decision into the order's record, unless it is there."""
    key = f"order.{order_id}"
    outdated = False
    while True:
        entry = bucket.get(key, linearizable=outdated)
        outdated = True
        existing = None if entry is None else Record.decode(entry.value)
        with suppress(KeyExists, RevisionConflict):
            if entry is None:
                bucket.create(key, noted.encode())
            elif existing is not None and GIVES_BACK.get(existing.state) == noted.state:
                bucket.update(key, noted.encode(), revision=entry.revision)
            return
