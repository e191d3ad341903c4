"""Places a few thousand orders against the running service and shows what became of them: `make demo`.

The mix is that of a shop on a busy day: mostly one or two products, some cards that are declined, and a limited product
in great demand that runs out.
"""

from __future__ import annotations

import argparse
import os
import queue
import random
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import requests
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .command import whole

FINAL = frozenset({"confirmed", "rejected", "cancelled", "failed"})
SCARCE = "PRINT-01"
ORDINARY = ("MUG-01", "TEE-01", "NOTE-01", "BAG-01", "LAMP-01", "KETTLE-01", "CHAIR-01")

#: How many orders in a hundred have a declined card, and how many want the limited product.
DECLINED = 5
WANT_SCARCE = 4

#: How long orders may take to become final after the last was placed, and one to be accepted; seconds.
_PATIENCE_SECONDS = 120.0
_ACCEPT_PATIENCE_SECONDS = 60.0


@dataclass
class Tally:
    """What happened to the orders of one demo."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds_to_final: list[float] = field(default_factory=list)
    placing: float = 0.0
    finishing: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def final(self, order: dict[str, Any]) -> None:
        """Count an order that is final."""
        times = [datetime.fromisoformat(entry["at"]) for entry in order["history"]]
        with self.lock:
            self.statuses[order["status"]] += 1
            self.seconds_to_final.append((max(times) - min(times)).total_seconds())
            if order["status"] == "rejected":
                detail = order["history"][-1].get("detail", {})
                self.reasons[str(detail.get("code", "unknown")).replace("_", " ")] += 1


class Shop:
    """The service's API, with a kept-open connection for each thread."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._key = key
        self._local = threading.local()

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            if self._key is not None:
                session.headers["Authorization"] = f"Bearer {self._key}"
        return session

    def healthy(self) -> str | None:
        """Return None when the service takes orders, else what is wrong."""
        try:
            answer = self._session().get(f"{self.url}/health", timeout=5)
        except requests.RequestException:
            return f"Nothing answers at {self.url}: start the service with `make up`, or set URL to where it runs."
        if answer.status_code != 200:
            return f"The service at {self.url} cannot take orders now (/health says {answer.status_code})."
        return None

    def place(self, body: dict[str, Any]) -> dict[str, Any] | str:
        """Place an order, as often as it takes; returns the order, or why it was refused."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        deadline = time.monotonic() + _ACCEPT_PATIENCE_SECONDS
        while True:
            try:
                answer = self._session().post(
                    f"{self.url}/api/orders", json=body, headers=headers, timeout=20
                )
            except requests.RequestException as error:
                status, wait = type(error).__name__, 1.0
            else:
                if answer.status_code == 202:
                    order: dict[str, Any] = answer.json()
                    return order
                if answer.status_code not in (409, 503):
                    return f"{answer.status_code} {answer.json().get('title', '')}"
                status, wait = str(answer.status_code), float(answer.headers.get("Retry-After", 1))
            if time.monotonic() > deadline:
                return status
            time.sleep(wait)

    def get(self, order_id: str) -> dict[str, Any] | None:
        """Return an order, None when it cannot be read now."""
        try:
            answer = self._session().get(f"{self.url}/api/orders/{order_id}", timeout=20)
        except requests.RequestException:
            return None
        order: dict[str, Any] | None = answer.json() if answer.status_code == 200 else None
        return order


def orders(count: int, seed: int) -> Iterable[dict[str, Any]]:
    """Return the bodies of a demo's orders; the same seed gives the same orders."""
    chance = random.Random(seed)
    for number in range(count):
        skus = chance.sample(ORDINARY, k=chance.choices((1, 2, 3), (60, 30, 10))[0])
        items = [{"sku": sku, "quantity": chance.choices((1, 2, 3), (70, 20, 10))[0]} for sku in skus]
        if chance.randrange(100) < WANT_SCARCE:
            items[0] = {"sku": SCARCE, "quantity": 1}
        declined = chance.randrange(100) < DECLINED
        yield {
            "customer_id": f"demo-{number % 500}",
            "items": items,
            "payment_token": chance.choice(("tok_declined", "tok_insufficient")) if declined else "tok_visa",
        }


def run(shop: Shop, count: int, concurrency: int, seed: int, console: Console) -> Tally:
    """Place the orders and follow each until it is final."""
    tally = Tally()
    waiting: queue.Queue[str | None] = queue.Queue()
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(concurrency + 4) as pool:
        placed = progress.add_task("accepted", total=count)
        finished = progress.add_task("final", total=count)
        bodies = iter(orders(count, seed))
        turn = threading.Lock()
        begin = time.monotonic()

        def place() -> None:
            while True:
                with turn:
                    body = next(bodies, None)
                if body is None:
                    return
                answer = shop.place(body)
                with tally.lock:
                    if isinstance(answer, str):
                        tally.refused[answer] += 1
                    else:
                        tally.accepted += 1
                if isinstance(answer, str):
                    progress.advance(finished)
                else:
                    waiting.put(answer["order_id"])
                progress.advance(placed)

        def follow() -> None:
            while (order_id := waiting.get()) is not None:
                order = shop.get(order_id)
                if order is not None and order["status"] in FINAL:
                    tally.final(order)
                    progress.advance(finished)
                else:
                    waiting.put(order_id)
                    time.sleep(0.05)

        followers = [pool.submit(follow) for _ in range(4)]
        for placing in [pool.submit(place) for _ in range(concurrency)]:
            placing.result()
        tally.placing = time.monotonic() - begin
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while tally.statuses.total() < tally.accepted and time.monotonic() < deadline:
            time.sleep(0.05)
        tally.finishing = time.monotonic() - begin
        for _ in followers:
            waiting.put(None)
    return tally


def table(tally: Tally) -> Table:
    """Return what happened as a table."""
    result = Table(title="What became of the orders", show_header=False, title_justify="left")
    result.add_column(style="bold")
    result.add_column(justify="right")
    result.add_row("accepted", f"{tally.accepted:,}")
    for status in ("confirmed", "rejected", "failed"):
        result.add_row(status, f"{tally.statuses[status]:,}")
        if status == "rejected":
            for reason, number in tally.reasons.most_common():
                result.add_row(f"  {reason}", f"{number:,}")
    unfinished = tally.accepted - tally.statuses.total()
    if unfinished:
        result.add_row("not final yet", f"{unfinished:,}")
    for reason, number in tally.refused.most_common():
        result.add_row(f"not accepted: {reason}", f"{number:,}")
    result.add_section()
    result.add_row("accepted per second", f"{tally.accepted / max(tally.placing, 0.001):,.0f}")
    result.add_row("final per second", f"{tally.statuses.total() / max(tally.finishing, 0.001):,.0f}")
    times = sorted(tally.seconds_to_final)
    if times:
        result.add_row("accepted to final, p50", f"{times[len(times) // 2] * 1000:,.0f} ms")
        result.add_row("accepted to final, p99", f"{times[len(times) * 99 // 100] * 1000:,.0f} ms")
    return result


def parser() -> argparse.ArgumentParser:
    """Return what reads the command's arguments."""
    parser = argparse.ArgumentParser(description="Place orders against the running service.")
    parser.add_argument("--orders", type=whole("orders", 1, 1_000_000), default=3_000, help="how many (3000)")
    parser.add_argument(
        "--concurrency", type=whole("clients", 1, 1_000), default=16, help="how many clients at once (16)"
    )
    parser.add_argument(
        "--seed", type=whole("seeds", 0, 2**53 - 1), default=random.randrange(10_000), help="repeats a mix"
    )
    default_url = os.environ.get("URL") or f"http://127.0.0.1:{os.environ.get('PORT') or 8000}"
    parser.add_argument("--url", default=default_url, help="where the service is (URL, else this machine)")
    parser.add_argument(
        "--key", help="an API key that may order and read, for a service that requires sign-in"
    )
    return parser


def main() -> int:
    options = parser().parse_args()
    shop = Shop(options.url.rstrip("/"), options.key)
    problem = shop.healthy()
    if problem is not None:
        print(problem, file=sys.stderr)
        return 1
    console = Console()
    console.print(
        f"{options.orders:,} orders to {shop.url}, {options.concurrency} at a time, seed {options.seed}"
    )
    try:
        tally = run(shop, options.orders, options.concurrency, options.seed, console)
    except KeyboardInterrupt:
        return 130
    console.print(table(tally))
    return 0 if tally.statuses.total() == tally.accepted else 1


if __name__ == "__main__":
    raise SystemExit(main())
