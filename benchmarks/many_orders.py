"""A store with many orders, and what it costs to look at them: `python -m benchmarks.many_orders --orders 1000000`.

The orders are written as a service would have left them, by hundreds at once: claims and records in the ledger, events
in the stream, records in the read model. Nineteen of twenty are confirmed, the others were declined. Each customer has
twenty, spread over the whole time. Then the index and the figures are made, a front end is started, and asked by HTTP
for a customer's page, searches and exports, once with a hundred orders in the store and once with all. At the end the
read model is rebuilt by the command that operators use.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import requests
from cryptography.fernet import Fernet

from benchmarks.processes import Process, wait_until
from benchmarks.servers import REPOSITORY
from dramatiq_jetstream.testing import NatsServer, free_port
from dramatiq_jetstream.wire.connection import Publication

#: How many orders are written at once.
_CHUNK = 2_000

#: How many orders a customer has.
_EACH = 20

#: How many orders are there when the first figures are taken.
FEW = 100


def customer_of(number: int, customers: int) -> str:
    """Return who placed an order: each customer comes again after all others."""
    return f"customer-{number % customers}"


class Writer:
    """Writes orders into the store of a server. It uses the service's own code, which wants its environment first."""

    def __init__(self, url: str, orders: int) -> None:
        os.environ |= {"NATS_URL": url, "TOKEN_KEY": Fernet.generate_key().decode()}
        from tasks import app

        self._app = app
        self._customers = max(1, orders // _EACH)
        app.broker.setup()

    def write(self, first: int, end: int) -> None:
        """Write the orders with these numbers, index and figures with them."""
        for start in range(first, end, _CHUNK):
            self._write(range(start, min(end, start + _CHUNK)))
            if sys.stderr.isatty():
                print(f"\r{start:,} of {end:,} orders", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def index(self) -> tuple[float, float]:
        """Bring index and figures up to date; returns the seconds of each."""
        # What is younger than this is not counted yet.
        time.sleep(2.1)
        return timed(lambda: self._app.indexer().advance(math.inf)), timed(
            lambda: self._app.counting().advance(math.inf)
        )

    def close(self) -> None:
        """Disconnect."""
        self._app.broker.close()

    def _write(self, numbers: range) -> None:
        from tasks.announcements import event_of, placed_event
        from tasks.catalogue import CATALOGUE, CURRENCY
        from tasks.claims import Claim, digest_of
        from tasks.events import event_id, order_id_of, subject_of
        from tasks.ledger import PricedItem, Record
        from tasks.orders import Stored, with_event
        from tasks.tokens import reference

        now = self._app.now()
        skus = list(CATALOGUE)
        stock, records = self._app.stock_bucket().name, self._app.orders_bucket().name
        ledger: list[Publication] = []
        events: list[Publication] = []
        for number in numbers:
            order_id, customer = f"bench-{number:09}", customer_of(number, self._customers)
            product = CATALOGUE[skus[number % len(skus)]]
            line = PricedItem(product.sku, 1 + number % 3, product.unit_price)
            total = line.quantity * line.unit_price
            digest = digest_of(customer, {line.sku: line.quantity}, reference(customer, ""))
            claim = Claim(now, digest, customer, (line,), total, CURRENCY)
            record = Record("held", {"held": now}, customer, (line,), total, CURRENCY)
            happened = [placed_event(order_id, claim), event_of(order_id, record)]
            if number % _EACH:
                record = record.forward("paid", now, charge_id=f"ch_{number}")
                happened.append(event_of(order_id, record))
                record = record.forward("confirmed", now)
            else:
                reason = ("insufficient funds", "the card has expired")[number // _EACH % 2]
                record = record.forward("declined", now, code="card_declined", reason=reason)
                happened.append(event_of(order_id, record))
                record = record.forward("released", now)
            happened.append(event_of(order_id, record))
            ledger.append(Publication(f"$KV.{stock}.claim.{order_id}", claim.encode(), {}))
            ledger.append(Publication(f"$KV.{stock}.order.{order_id}", record.encode(), {}))
            for event in happened:
                body = event.SerializeToString(deterministic=True)
                events.append(Publication(subject_of(event), body, {"Nats-Msg-Id": event_id(event)}))
        self._app.broker.connection.publish_many(ledger, timeout=120_000)
        places = self._app.broker.connection.publish_many(events, timeout=120_000)
        read: dict[str, Stored] = {}
        for happening in self._app.events_stored().read(places[0].seq):
            order_id = order_id_of(happening.event)
            read[order_id] = with_event(read.get(order_id), happening)
        self._app.broker.connection.publish_many(
            [
                Publication(
                    f"$KV.{records}.{order_id}", json.dumps(stored, separators=(",", ":")).encode(), {}
                )
                for order_id, stored in read.items()
            ],
            timeout=120_000,
        )


def timed(run: Callable[[], object]) -> float:
    """Return how many seconds something takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_mib(pid: int) -> float:
    """Return the most memory that a process has had, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


class FrontEnd:
    """A front end of one process, in the environment that a `Writer` has made."""

    def __init__(self, directory: Path) -> None:
        self.address = f"http://127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        environment = {
            "ACCESS": "open",
            "HOST": "127.0.0.1",
            "PORT": port,
            "WEB_CONCURRENCY": "1",
            "RATE_LIMIT": "1000000",
        }
        command = [sys.executable, "-m", "gunicorn", "-c", "web/gunicorn.conf.py", "web:create_app()"]
        self.process = Process(command, directory / "web.log", environment)
        wait_until(self._is_ready, 60, "the front end answers")

    def _is_ready(self) -> bool:
        self.process.require_running()
        try:
            return requests.get(f"{self.address}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    def median_ms(self, addresses: Iterator[str]) -> tuple[float, float]:
        """Return the median and the longest time of requests, in milliseconds."""
        with requests.Session() as session:
            times = [timed(lambda one=address: self._get(session, one)) * 1_000 for address in addresses]  # type: ignore[misc]
        return statistics.median(times), max(times)

    def _get(self, session: requests.Session, address: str) -> None:
        session.get(f"{self.address}{address}", timeout=300).raise_for_status()

    def export(self, address: str) -> tuple[int, int, float]:
        """Return the lines and bytes of an export, and the seconds that it took."""
        began = time.perf_counter()
        lines = size = 0
        with requests.get(f"{self.address}{address}", timeout=600, stream=True) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_content(1 << 16):
                lines += chunk.count(b"\n")
                size += len(chunk)
        return lines, size, time.perf_counter() - began

    def peak_mib(self) -> float:
        """Return the most memory that one of its processes has had."""
        return max(peak_mib(pid) for pid in self.process.members())


def look(front_end: FrontEnd, orders: int, all_orders: int) -> None:
    """Ask for lists, and say how long they take."""
    customers = max(1, all_orders // _EACH)
    there = min(orders, customers)

    def of_customers() -> Iterator[str]:
        for turn in range(20):
            yield customer_of(turn * 7_919 % there, customers)

    cases = {
        "a customer's page (API)": [f"/api/orders?limit=20&customer={name}" for name in of_customers()],
        "a customer's page": [f"/orders?customer={name}" for name in of_customers()],
        "all orders": ["/api/orders?limit=20"] * 20,
        "by status: rejected": ["/api/orders?limit=20&status=rejected"] * 20,
        "by product": ["/api/orders?limit=20&sku=MUG-01"] * 20,
        "by product and status": ["/api/orders?limit=20&sku=MUG-01&status=rejected"] * 20,
        "by text of the failure": ["/api/orders?limit=20&failure=expired"] * 20,
        "the order form": ["/"] * 5,
        "the overview": ["/admin"] * 5,
    }
    print(f"with {orders:,} orders:")
    for name, addresses in cases.items():
        median, longest = front_end.median_ms(iter(addresses))
        print(f"  {name:<28} median {median:9.1f} ms, longest {longest:9.1f} ms", flush=True)


def main() -> None:
    """Make the store, look at it, rebuild it."""
    parser = argparse.ArgumentParser(description="What it costs to look at many orders.")
    parser.add_argument("--orders", type=int, default=20_000, help="20,000 by default")
    parser.add_argument(
        "--store", type=Path, help="where the store is made; a temporary directory by default"
    )
    parser.add_argument(
        "--no-rebuild", action="store_true", help="leave out the rebuild, which takes longest"
    )
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="many-orders-", dir=arguments.store))
    try:
        with NatsServer(store_dir=directory / "nats", sync="2m") as server:
            run(server, directory, max(FEW, arguments.orders), rebuild=not arguments.no_rebuild)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(server: NatsServer, directory: Path, orders: int, *, rebuild: bool) -> None:
    """Measure with a server."""
    writer = Writer(server.url, orders)
    writer.write(0, FEW)
    writer.index()
    front_end = FrontEnd(directory)
    try:
        look(front_end, FEW, orders)
        seconds = timed(lambda: writer.write(FEW, orders))
        print(f"{orders:,} orders written in {seconds:.0f} s")
        indexed, counted = writer.index()
        print(f"index made in {indexed:.0f} s, figures in {counted:.0f} s")
        look(front_end, orders, orders)
        before = front_end.peak_mib()
        for kind in ("ndjson", "csv"):
            lines, size, took = front_end.export(f"/api/orders.{kind}")
            print(
                f"  export as {kind}: {lines:,} lines, {size / 1e6:.0f} MB, {took:.0f} s, {lines / took:,.0f}/s"
            )
        print(
            f"  memory of the front end: {before:.0f} MiB before the exports, {front_end.peak_mib():.0f} MiB with them"
        )
    finally:
        front_end.process.stop()
        writer.close()
    if rebuild:
        environment = {**os.environ, "PYTHONPATH": f"proto{os.pathsep}broker"}
        began = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-m", "tasks.rebuild"], cwd=REPOSITORY, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        took = time.perf_counter() - began
        print(
            f"rebuild: {took:.0f} s, {usage.ru_maxrss / 1024:.0f} MiB, exit {os.waitstatus_to_exitcode(status)}"
        )
    size = sum(file.stat().st_size for file in (directory / "nats").rglob("*") if file.is_file())
    print(f"server: {peak_mib(server.pid):.0f} MiB of memory, {size / 1e6:.0f} MB on disk")


if __name__ == "__main__":
    main()
