"""Changes what is sold while everything burns: prices at once and with a time, new products, and withdrawn ones."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from tasks.catalogue import CATALOGUE

#: What orders are about.
_SKUS = ("MUG-01", "TEE-01", "NOTE-01", "BAG-01", "PRINT-01")

#: Whose price is changed at once, and whose with a time.
_AT_ONCE, _PLANNED = "TEE-01", "MUG-01"

#: How many seconds ahead a price is planned.
_AHEAD_SECONDS = 2.0

#: Pieces of a new product.
PIECES = 400

PATIENCE_SECONDS = 30.0

_DECISIVE = frozenset({200, 404, 409, 422})


class Shelf:
    """What is sold at which price, as far as the merchant knows. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prices = {sku: [(0.0, CATALOGUE[sku].unit_price)] for sku in _SKUS}

    def skus(self) -> list[str]:
        """Return what is sold."""
        with self._lock:
            return sorted(self._prices)

    def price(self, sku: str) -> int:
        """Return what a piece costs now; 0 for what is not sold any more."""
        with self._lock:
            now = time.time()
            return next((price for since, price in reversed(self._prices.get(sku, [])) if since <= now), 0)

    def put(self, sku: str, price: int, since: float = 0.0) -> None:
        """Sell a product at a price from a time on."""
        with self._lock:
            self._prices.setdefault(sku, []).append((since, price))

    def take(self, sku: str) -> None:
        """Sell a product no more."""
        with self._lock:
            self._prices.pop(sku, None)


class Merchant:
    """Changes the catalogue until it is closed.

    Parameters:
      url: The front end.
      key: An operator's API key.
      acts: Where the answers go.
    """

    def __init__(
        self, url: str, key: str, shelf: Shelf, acts: Path, *, seed: int, pause: float = 1.0
    ) -> None:
        self._url = f"{url}/api/products"
        self._key = key
        self._shelf = shelf
        self._choice = random.Random(f"{seed}.merchant")
        self._run = f"{seed:x}-{int(time.time())}"
        self._pause = pause
        self._count = 0
        self._new: str | None = None
        self._accepted = 0
        self._acts = acts.open("a", buffering=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="merchant", daemon=True)

    def __enter__(self) -> Merchant:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Begin nothing more; what was begun comes to its end."""
        self._stop.set()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(5 * PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the merchant did not come to an end"
        self._acts.close()

    def all_done(self) -> bool:
        """Whether each kind of change was made."""
        return self._accepted >= 4

    def _work(self) -> None:
        while not self._stop.wait(self._choice.uniform(0.5, 1.5) * self._pause):
            self._count += 1
            (self._change_price, self._plan_price, self._change_products)[self._count % 3]()

    def _another_price(self, sku: str) -> int:
        return self._choice.choice([one for one in range(1_200, 4_000, 7) if one != self._shelf.price(sku)])

    def _change_price(self) -> None:
        price = self._another_price(_AT_ONCE)
        if self._ask("price", "put", _AT_ONCE, {"unit_price_minor": price}, price=price):
            self._shelf.put(_AT_ONCE, price)

    def _plan_price(self) -> None:
        price, since = self._another_price(_PLANNED), round(time.time() + _AHEAD_SECONDS, 3)
        moment = datetime.fromtimestamp(since, UTC).isoformat(timespec="milliseconds")
        body = {"unit_price_minor": price, "from": moment}
        if self._ask("price", "put", _PLANNED, body, price=price, since=round(since * 1000)):
            self._shelf.put(_PLANNED, price, since)

    def _change_products(self) -> None:
        if self._new is not None:
            self._ask("withdraw", "delete", self._new, None)
            # Whether that is known or not: what is not sold is asked for no more.
            self._shelf.take(self._new)
            self._new = None
            return
        sku, price = f"CHAOS-{self._count}", self._choice.randrange(1_200, 4_000)
        if self._ask(
            "price", "put", sku, {"name": f"Number {self._count}", "unit_price_minor": price}, price=price
        ):
            self._new = sku
            if self._ask("goods", "post", sku, {"add": PIECES}, path="/stock", pieces=PIECES):
                self._shelf.put(sku, price)

    def _ask(self, kind: str, method: str, sku: str, body: Any, *, path: str = "", **facts: Any) -> bool:
        """Ask until an answer decides; returns whether it is done."""
        key, asked = f"{self._run}-{self._count}-{kind}", time.time()
        headers = {"Authorization": f"Bearer {self._key}", "Idempotency-Key": key}
        deadline, status = time.monotonic() + PATIENCE_SECONDS, 0
        ask: Callable[..., requests.Response] = getattr(requests, method)
        while time.monotonic() < deadline and status not in _DECISIVE:
            if status or time.time() > asked + 1:
                time.sleep(0.3)
            try:
                status = ask(f"{self._url}/{sku}{path}", json=body, headers=headers, timeout=10).status_code
            except requests.RequestException:
                status = 0
        line = {"kind": kind, "sku": sku, "key": key, "order_id": "", "asked": asked, **facts}
        line |= {"answer": status, "accepted": status == 200, "at": time.time()}
        self._acts.write(json.dumps(line) + "\n")
        self._accepted += status == 200
        return status == 200
